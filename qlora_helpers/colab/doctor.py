"""The doctor of notebook 01: what this machine and the network have for a run, and remedies."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch
from huggingface_hub import constants
from pandas.io.formats.style import Styler

from qlora_helpers.colab.drive import without_drive
from qlora_helpers.colab.estimates import minutes, model_gib
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.colab.machine import on_colab, on_kaggle
from qlora_helpers.colab.reach import reach
from qlora_helpers.colab.threads import bounded
from qlora_helpers.colab.versions import check_versions
from qlora_helpers.config import EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import PreflightError, reason
from qlora_helpers.fast.plan import free_gpu_bytes
from qlora_helpers.model import compute_dtype
from qlora_helpers.run.files import nearest
from qlora_helpers.run.workspace import Workspace

_CHOOSE_T4 = "In Colab: Runtime > Change runtime type > T4 GPU, then Runtime > Run all"
_CHOOSE_T4_ON_KAGGLE = "Choose Settings > Accelerator > GPU T4 x2, then Run all"
_COLOURS = {
    "ok": "background-color: #d9f2d9; color: #14521a",
    "warning": "background-color: #fff0c2; color: #6b4e00",
    "stop": "background-color: #fbd5d5; color: #8b1111; font-weight: bold",
}


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table; `verdict` is ok, warning or stop."""

    area: str
    found: str
    verdict: str = "ok"
    remedy: str = ""


def examine(config: RunConfig, workspace: Workspace, profile: str | None = None) -> list[Finding]:
    """Return all findings: within seconds, or 36 if neither Colab nor the hub answers.

    Args:
        profile: the form's choice. A Colab runtime without a GPU is a stop, unless this or
            QLORA_PROFILE is "cpu".
    """
    token = use_token(config, again=True)
    model, data = reach(config)
    gib = model_gib(model.config) if model.config else None
    # the adapter and three checkpoints, of the embedded model or of one of 7B parameters
    written = (130 if config.base_model == EMBEDDED_MODEL else 1100) * 10**6 * config.lora_r // 8
    token_found = f"from {token.source}" if token.source else token.note or "none"
    data_name = os.path.basename(config.data) if os.path.exists(config.data) else config.data
    return [
        _gpu(config, "cpu" in (profile, os.environ.get("QLORA_PROFILE"))),
        *_memory(gib),
        Finding("versions", *check_versions()),
        _finding("hub token", token_found, not token.warning, token.remedy, "warning"),
        Finding("base model", f"{config.base_model}: {model.found}", model.verdict, model.remedy),
        Finding("data", f"{data_name}: {data.found}", data.verdict, data.remedy),
        *_disks(workspace, model.download + data.download, written),
        *_kaggle_batch(),
        _workspace(workspace),
        _minutes(config, model.download),
    ]


def findings_table(findings: list[Finding]) -> Styler:
    """Return the findings as a table whose verdicts are words and colours."""
    table = pd.DataFrame([vars(one) for one in findings]).style.format(escape="html").hide()
    table.set_properties(**{"text-align": "left", "white-space": "normal"})
    return table.map(_COLOURS.get, subset="verdict")


def require_ok(findings: list[Finding]) -> None:
    """Raise PreflightError, with each remedy, if a finding is a stop."""
    stops = [one for one in findings if one.verdict == "stop"]
    if stops:
        lines = "\n".join(f"- {one.area}: {one.found}. {one.remedy}" for one in stops)
        raise PreflightError(f"this run cannot go on here, and nothing was written.\n{lines}")


def _finding(area: str, found: str, ok: bool, remedy: str, otherwise: str = "stop") -> Finding:
    return Finding(area, found) if ok else Finding(area, found, otherwise, remedy)


def _gpu(config: RunConfig, cpu_asked: bool) -> Finding:
    dtype, why = compute_dtype()
    runs = f"runs in {str(dtype).removeprefix('torch.')}"
    choose = _CHOOSE_T4_ON_KAGGLE if on_kaggle() else _CHOOSE_T4
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (7, 0):  # a P100, for which Triton and newer builds of PyTorch have no code
            hide = "On a PC, CUDA_VISIBLE_DEVICES= make run hides it, for the small model"
            return Finding("GPU", why, "stop", f"It is too old. {choose}. {hide}.")
        remedy = f"It is older than a T4, and nothing was tried there. {choose}."
        count = torch.cuda.device_count()
        runs += f", on {count} GPUs at once" if count > 1 else ""
        return _finding("GPU", f"{why}: {runs}", capability >= (7, 5), remedy, "warning")
    remedy = (
        f"{choose}. To run the small model on the CPU, choose PROFILE cpu in the "
        "form (or set QLORA_PROFILE=cpu) and run all again."
    )
    ok = config.profile == "cpu" and (cpu_asked or not (on_colab() or on_kaggle()))
    return _finding("GPU", f"none: {runs} on {os.cpu_count()} CPU cores", ok, remedy)


def _memory(model_gib: float | None) -> list[Finding]:
    findings = []
    if torch.cuda.is_available():
        gib = free_gpu_bytes() / 2**30
        takes = f"; the model takes {model_gib:.2f} GiB in 4 bits" if model_gib else ""
        # training takes 1.1 GiB more for a single row, and a tenth is left free
        needed = (model_gib + 1.1) / 0.9 if model_gib else 0
        remedy = (
            f"{needed:.1f} GiB are needed: Runtime > Restart session frees what an earlier run "
            "holds; else choose a larger GPU or a smaller model."
        )
        found = f"{gib:.1f} GiB free{takes}"
        findings.append(_finding("GPU memory", found, gib >= needed, remedy))
    gib = psutil.virtual_memory().available / 2**30
    remedy = "3 GiB are comfortable: close other notebooks and programs, or restart the runtime."
    verdict = "warning" if gib >= 1 else "stop"
    found = f"{gib:.1f} GiB available"
    return [*findings, _finding("host memory", found, gib >= 3, remedy, verdict)]


def _disks(workspace: Workspace, download: int, written: int) -> list[Finding]:
    """Return a finding for each disk: downloads and the run may share one."""
    cache, run = nearest(Path(constants.HF_HUB_CACHE)), nearest(workspace.path)
    disks = [("downloads", cache, download), ("run", run, written)]
    if os.stat(cache).st_dev == os.stat(run).st_dev:
        disks = [("downloads and run", run, download + written)]
    findings = []
    for use, folder, size in disks:
        free, size = shutil.disk_usage(folder).free, max(size, 5 * 10**7)
        verdict = "warning" if free > size else "stop"
        findings.append(_space(f"disk, {use}", free, size, verdict))
    if workspace.mirror:
        try:
            free = bounded(lambda: shutil.disk_usage(workspace.mirror.drive).free, 10)
            findings.append(_space("Google Drive", free, written, "warning"))
        except OSError as error:
            remedy = "The run stays on this machine's own disk."
            found = f"it does not say how much is free ({reason(error)})"
            findings.append(Finding("Google Drive", found, "warning", remedy))
    return findings


def _space(area: str, free: int, size: int, otherwise: str) -> Finding:
    found = f"{free / 1e9:.1f} GB free, {size / 1e9:.2f} GB to write"
    remedy = f"Make room for {1.5 * size / 1e9:.1f} GB."
    return _finding(area, found, free > 1.5 * size, remedy, otherwise)


def _workspace(workspace: Workspace) -> Finding:
    if workspace.mirror:
        return Finding("workspace", f"{workspace}, copied to Google Drive")
    remedy = (
        "The other notebooks get machines of their own and will not find it: Runtime > Restart "
        "session and run all, and allow Google Drive."
    )
    why = f", without Google Drive ({without_drive()})" if without_drive() else ""
    return _finding("workspace", f"{workspace}{why}", not on_colab(), remedy, "warning")


def _kaggle_batch() -> list[Finding]:
    if not on_kaggle() or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch":
        return []
    found = "this is a batch run: panels do not react, the pictures beside them stand"
    return [Finding("panels", found)]


def _minutes(config: RunConfig, download: int) -> Finding:
    if config.base_model == EMBEDDED_MODEL:
        source = "measured on two CPU cores"
    elif torch.cuda.is_available():
        source = "a T4's, estimated: its rows a second on paper, the rest from another GPU"
    else:
        remedy = "A model of billions of weights takes hours without a GPU."
        return Finding("minutes", "not known for this model on a CPU", "warning", remedy)
    each = minutes(config, download).items()
    found = ", ".join(f"{name}: {max(1, round(count))}" for name, count in each)
    return Finding("minutes", f"{found} ({source})")
