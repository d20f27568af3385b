"""The doctor of notebook 01: what this machine, its packages and the network have for a run, and the remedy for what they lack."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch
from huggingface_hub import constants
from pandas.io.formats.style import Styler
from transformers import MistralConfig

from qlora_helpers.colab.drive import without_drive
from qlora_helpers.colab.estimates import (
    ModelSize,
    bytes_written,
    expected_plan,
    minutes,
    model_size,
    rows_on_cpu,
)
from qlora_helpers.colab.hub_token import Token, needs_hub, use_token
from qlora_helpers.colab.machine import on_colab
from qlora_helpers.colab.reach import MISTRALS, reach
from qlora_helpers.colab.threads import bounded
from qlora_helpers.colab.versions import check_versions
from qlora_helpers.config import EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import PreflightError, reason
from qlora_helpers.fast.plan import free_gpu_bytes
from qlora_helpers.model import compute_dtype
from qlora_helpers.run.files import nearest
from qlora_helpers.run.workspace import Workspace

CHOOSE_T4 = "Runtime > Change runtime type > T4 GPU, then Runtime > Run all"
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
    """All findings, within a quarter of a minute (and the time that Colab takes for a secret). `profile` is what the form asks for: without
    a GPU, Colab goes on only if that, or QLORA_PROFILE, is cpu."""
    token = use_token(config, again=True)
    model, data = reach(config)
    shape = MistralConfig() if config.base_model in MISTRALS else model.config
    size = shape and model_size(shape)
    download = None if "stop" in (model.verdict, data.verdict) else model.download + data.download
    return [
        _gpu(config, "cpu" in (profile, os.environ.get("QLORA_PROFILE"))),
        *_memory(config, size),
        Finding("versions", *check_versions()),
        *([_token(token)] if needs_hub(config) else []),
        Finding("base model", f"{config.base_model}: {model.found}", model.verdict, model.remedy),
        Finding(
            "data",
            f"{os.path.basename(config.data) if os.path.exists(config.data) else config.data}: {data.found}",
            data.verdict,
            data.remedy,
        ),
        *_disks(config, workspace, size, download),
        _workspace(workspace),
        _plan(config, size),
        _minutes(config, size, model.download),
    ]


def findings_table(findings: list[Finding]) -> Styler:
    """The findings as a table whose verdicts are words and colours."""
    table = pd.DataFrame([vars(one) for one in findings])
    return (
        table.style.map(_COLOURS.get, subset="verdict")
        .hide()
        .set_properties(**{"text-align": "left", "white-space": "normal"})
    )


def require_ok(findings: list[Finding]) -> None:
    """Raise PreflightError, with each remedy, if a finding is a stop."""
    if stops := [
        f"{one.area}: {one.found}. {one.remedy}" for one in findings if one.verdict == "stop"
    ]:
        raise PreflightError(
            "this run cannot go on here, and nothing was written.\n"
            + "\n".join(f"- {line}" for line in stops)
        )


def _gpu(config: RunConfig, cpu_asked: bool) -> Finding:
    dtype, reason = compute_dtype()
    runs = f"runs in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.is_available():
        older = ("warning", f"Older than a T4: nothing was tried there. {CHOOSE_T4}.")
        return Finding(
            "GPU",
            f"{reason}: {runs}",
            *(older if torch.cuda.get_device_capability() < (7, 5) else ()),
        )
    if config.profile == "t4":
        return Finding(
            "GPU",
            "none",
            "stop",
            f"In Colab: {CHOOSE_T4}. To run the small model on the CPU, choose profile cpu.",
        )
    if on_colab() and not cpu_asked:
        return Finding(
            "GPU",
            "none in this runtime",
            "stop",
            f"{CHOOSE_T4}. Or, to run the small model on the CPU, choose PROFILE cpu in "
            "the form (or set QLORA_PROFILE=cpu) and run all again.",
        )
    return Finding("GPU", f"none: profile cpu {runs} on {os.cpu_count()} cores")


def _memory(config: RunConfig, size: ModelSize | None) -> list[Finding]:
    found = []
    if torch.cuda.is_available():
        gib = free_gpu_bytes() / 2**30
        needed = size and size.gib + 1.1
        what = f"{gib:.1f} GiB free" + (
            f"; the model takes {size.gib:.2f} GiB in 4 bits" if size else ""
        )
        short = needed and 0.9 * gib < needed
        found.append(
            Finding(
                "GPU memory",
                what,
                *(
                    (
                        "stop",
                        f"{needed / 0.9:.1f} GiB are needed: Runtime > Restart session frees what an "
                        "earlier run holds; else choose a larger GPU or a smaller model.",
                    )
                    if short
                    else ()
                ),
            )
        )
    gib = psutil.virtual_memory().available / 2**30
    least, good = 1.0, 4.0 if config.profile == "t4" else 3.0
    verdict = "stop" if gib < least else "warning" if gib < good else "ok"
    remedy = (
        ""
        if verdict == "ok"
        else f"{good:g} GiB are comfortable: close other notebooks and programs, or restart the runtime."
    )
    return [*found, Finding("host memory", f"{gib:.1f} GiB available", verdict, remedy)]


def _token(token: Token) -> Finding:
    said = (f"from {token.source}" if token.source else "none") + (
        f" ({token.note.rstrip('.')})" if token.note else ""
    )
    return Finding("hub token", said, "warning" if token.warning else "ok", token.remedy)


def _disks(
    config: RunConfig, workspace: Workspace, size: ModelSize | None, download: int | None
) -> list[Finding]:
    written = (
        bytes_written(size, config)
        if size
        else 130 * 10**6
        if config.base_model == EMBEDDED_MODEL
        else 11 * 10**8
    )
    cache, run = Path(constants.HF_HUB_CACHE), workspace.path
    shared = _device(cache) == _device(run)  # what both need, one disk must hold
    found = []
    for area, folder, needed, what in (
        ("disk, downloads", cache, download, "to download"),
        ("disk, run", run, written, "to write"),
    ):
        least = max((download or 0) + written if shared else needed or 0, 5 * 10**7)
        free = shutil.disk_usage(nearest(folder)).free
        verdict = "ok" if free > 1.5 * least else "warning" if free > least else "stop"
        remedy = (
            f"Make room for {least / 1e9:.1f} GB and half as much again." if verdict != "ok" else ""
        )
        said = f"{'an unknown amount' if needed is None else f'{needed / 1e9:.2f} GB'} {what}"
        found.append(Finding(area, f"{free / 1e9:.1f} GB free, {said}", verdict, remedy))
    return found + _drive(workspace, written)


def _drive(workspace: Workspace, written: int) -> list[Finding]:
    if not workspace.mirror:
        return []
    area = "disk, Google Drive"
    try:
        free = bounded(lambda: shutil.disk_usage(workspace.mirror.drive).free, 10)
    except OSError as error:
        return [
            Finding(area, f"not known ({reason(error)})", "warning", "The run goes on without.")
        ]
    remedy = (
        f"Make room for {1.5 * written / 1e9:.1f} GB. When Drive is full, the run goes on on this "
        "machine's own disk."
    )
    verdict = ("ok", "") if free > 1.5 * written else ("warning", remedy)
    return [Finding(area, f"{free / 1e9:.1f} GB free, {written / 1e9:.2f} GB to copy", *verdict)]


def _workspace(workspace: Workspace) -> Finding:
    if on_colab() and not workspace.mirror:
        why = f" ({without_drive()})" if without_drive() else ""
        return Finding(
            "workspace",
            f"{workspace}, on this machine{why}",
            "warning",
            "The other notebooks get machines of their own and "
            "will not find it: Runtime > Restart session and run all, and allow Google Drive.",
        )
    copied = ", copied to Google Drive" if workspace.mirror else ""
    return Finding("workspace", f"{workspace}{copied}")


def _plan(config: RunConfig, size: ModelSize | None) -> Finding:
    area = "batch plan, expected"
    if not torch.cuda.is_available():
        rows = (
            rows_on_cpu(config, psutil.virtual_memory().available / 2**30)
            if config.base_model == EMBEDDED_MODEL
            else None
        )
        return Finding(
            area, f"{rows} rows at once; 03 tries it" if rows else "03 tries it on the model itself"
        )
    plan = size and expected_plan(size, config, free_gpu_bytes() / 2**30)
    if not plan or not plan[0]:
        return Finding(area, "03 tries it on the model itself")
    rows, checkpointed = plan
    return Finding(
        area,
        f"{rows} rows at once, about {checkpointed} of {size.layers} layers checkpointed on the longest; 03 tries it",
    )


def _minutes(config: RunConfig, size: ModelSize | None, download: int) -> Finding:
    if not torch.cuda.is_available() and config.base_model != EMBEDDED_MODEL:
        large = size is None or size.linear > 10**9
        return Finding(
            "minutes",
            "hours: this model is for a GPU" if large else "not known for this model",
            "warning" if large else "ok",
        )
    said = ", ".join(
        f"{name}: {max(1, round(count))}" for name, count in minutes(config, download).items()
    )
    measured = config.base_model == EMBEDDED_MODEL
    where = (
        "two CPU cores, measured"
        if measured
        else "a T4, by a rehearsal on another GPU and a T4's rows a second on paper"
    )
    return Finding("minutes", f"{said} ({where})")


def _device(folder: Path) -> int:
    return os.stat(nearest(folder)).st_dev
