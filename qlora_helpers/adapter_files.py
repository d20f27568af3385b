"""What an adapter's folder holds beside its weights, so that it can be used away from its run; where to find one; one to take along."""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from qlora_helpers.config import PROFILES, RunConfig, default_profile
from qlora_helpers.errors import ModelError
from qlora_helpers.hub import fetch
from qlora_helpers.prompts import TEMPLATE
from qlora_helpers.run.files import write_file
from qlora_helpers.run.workspace import Workspace

SETTINGS, WEIGHTS = "qlora_config.json", "adapter_model.safetensors"
_REMEDY = "Take the whole folder that notebooks/03_qlora_training.ipynb writes, or run that again."


def settings_json(config: RunConfig) -> str:
    """What `adapter_config.json`, which names the base model, leaves open: labels, tokens of a prompt, and the prompt."""
    return json.dumps(
        {"labels": config.labels, "max_length": config.max_length, "prompt": TEMPLATE}, indent=1
    )


def read_settings(folder: Path) -> RunConfig:
    """A config with the base model, labels and max_length of the adapter in `folder`; the rest is the profile's, and nobody's business.
    Raises ModelError if a file is missing or damaged, or the adapter was trained with another prompt."""
    saved, adapter = (_read_json(folder / name) for name in (SETTINGS, "adapter_config.json"))
    profile = default_profile()
    try:
        if saved["prompt"] != TEMPLATE:
            raise ModelError(
                f"the adapter in {folder} was trained with the prompt {saved['prompt']!r}, and this version of qlora_helpers "
                f"asks {TEMPLATE!r}: use the version that trained it, or train again."
            )
        return RunConfig(
            profile=profile,
            **PROFILES[profile]
            | {
                "base_model": adapter["base_model_name_or_path"],
                "labels": tuple(saved["labels"]),
                "max_length": saved["max_length"],
            },
        )
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / SETTINGS} or its adapter_config.json does not hold what it should ({error!r}). {_REMEDY}"
        ) from error


def read_temperature(folder: Path) -> float:
    """The temperature that 04 saved with the adapter in `folder`; 1 without 04. Raises ModelError for one that cannot be."""
    path = folder / "calibration.json"
    if not path.exists():
        return 1.0
    temperature = _read_json(path).get("temperature")
    if type(temperature) not in (int, float) or not (
        math.isfinite(temperature) and temperature > 0
    ):
        raise ModelError(
            f"{path} says temperature {temperature!r}, not a positive number. Run notebooks/04_evaluation.ipynb again."
        )
    return float(temperature)


def find_adapter(source: str | os.PathLike) -> Path:
    """The folder `source`, or the newest copy to be had of the hub's `account/name`: its settings and weights, nothing that could run.
    Raises ModelError if it is neither."""
    folder, name = Path(source).expanduser(), str(source)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name[0] in "./~" or name[-1] == "/":
        raise ModelError(
            f"there is no adapter folder {name!r} here, and a name on the hub would be account/name."
        )
    return fetch(
        name,
        "model",
        _adapter_files,
        ModelError,
        f"An adapter holds {SETTINGS}, adapter_config.json and {WEIGHTS}, as "
        "notebooks/03_qlora_training.ipynb writes them.",
        newest=True,
    )


def _adapter_files(names: Iterable[str]) -> list[str]:
    """What is read of an adapter; empty if it could not be used."""
    needed = {SETTINGS, "adapter_config.json", WEIGHTS}
    return sorted((needed | {"calibration.json"}) & set(names)) if needed <= set(names) else []


def export_adapter(workspace: Workspace, path: str | os.PathLike) -> Path:
    """Write the adapter of `workspace` to the zip file `path`, its weights in float16: half the size, and all that
    `HeadlineClassifier.from_adapter` needs once unpacked. Raises ModelError for weights that float16 cannot hold, WorkspaceError if the
    file cannot be written."""
    config = RunConfig.from_json(workspace.open("03_qlora_training"))
    folder, path = workspace / "adapter", Path(path)
    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} of {folder} holds values that float16 cannot: train again with a lower QLORA_LEARNING_RATE."
            )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(WEIGHTS, save(weights, {"format": "pt"}))
        file.writestr(SETTINGS, settings_json(config))
        for name in ("adapter_config.json", "calibration.json", "README.md"):
            if (folder / name).exists():
                file.write(folder / name, name)
    write_file(path, packed.getvalue())
    return path


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: the adapter cannot be used without it. {_REMEDY}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}). {_REMEDY}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not what it should be, a JSON object. {_REMEDY}")
    return found
