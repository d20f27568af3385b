"""An adapter's folder: written, found, checked before anything of it is loaded, and read."""

import json
import math
import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_helpers.colab.hub import fetch
from qlora_helpers.config import PROFILES, RunConfig, default_profile
from qlora_helpers.errors import ModelError, reason
from qlora_helpers.model import fused
from qlora_helpers.prompts import TEMPLATE
from qlora_helpers.run.files import DAMAGE, copy_folder, ordinary, writing

SETTINGS, WEIGHTS = "qlora_config.json", "adapter_model.safetensors"
_REMEDY = "Take the whole folder that notebooks/03_qlora_training.ipynb writes, or run that again."
_CODE = {
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".py",
    ".so",
}  # what runs, or may run, when it is loaded
_FREE = {
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_type",
    "peft_version",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
}  # the others must say what plain LoRA says
_PREFIX = "base_model.model."


def save_adapter(model: PeftModel, config: RunConfig, folder: Path) -> None:
    """Write the adapter to `folder` as safetensors, whole or not at all. It names the base model, not where this machine keeps it,
    and `qlora_config.json` beside the weights says what else is needed to use it alone. Raises WorkspaceError if it cannot be written."""
    model.peft_config["default"].base_model_name_or_path = config.base_model
    with tempfile.TemporaryDirectory() as made, writing(folder):
        model.save_pretrained(made, save_embedding_layers=False)
        Path(made, "README.md").unlink(
            missing_ok=True
        )  # PEFT's is a form to fill in; 04 writes the model card
        Path(made, SETTINGS).write_text(settings_json(config), encoding="utf-8")
        copy_folder(Path(made), folder)
        _check_weights(model, folder, "written")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model`, from `load_base_model`, with the adapter that `save_adapter` wrote to `folder`, ready to score. Raises ModelError,
    before anything of it is loaded, for a folder that holds anything but plain LoRA weights of this base model."""
    check_adapter(model, Path(folder))
    loaded = fused(PeftModel.from_pretrained, model, folder).eval()
    _check_weights(loaded, Path(folder), "loaded")
    return loaded


def _check_weights(model: PeftModel, folder: Path, done: str) -> None:
    """Raise ModelError unless `model` and the adapter in `folder` hold the same weights: PEFT only warns of one that it did not load."""
    parameters = {
        name.replace(".default.weight", ".weight"): p
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    weights = load_file(folder / WEIGHTS)
    for name in weights.keys() | parameters.keys():
        if (
            name not in weights
            or name not in parameters
            or not torch.equal(parameters[name].cpu(), weights[name].float())
        ):
            raise ModelError(
                f"the adapter in {folder} was not {done} whole: {name} differs. Run notebooks/03_qlora_training.ipynb again."
            )


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
        (SETTINGS, "adapter_config.json", WEIGHTS, "calibration.json"),
        ModelError,
        f"An adapter holds {SETTINGS}, adapter_config.json and {WEIGHTS}, as "
        "notebooks/03_qlora_training.ipynb writes them.",
    )


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


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Raise ModelError unless `folder` holds plain LoRA weights that fit `model`, as safetensors, and nothing that may run.
    Only JSON and the header of the weights are read; nothing follows a path that the folder names."""
    try:
        _check(model, folder)
    except (*DAMAGE, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} is refused: {reason(error)}. Nothing of it was loaded. If it should be this run's own, "
            "run notebooks/03_qlora_training.ipynb again."
        ) from error


def _check(model: PreTrainedModel, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in _CODE or path.name.endswith(".index.json") or path.is_dir():
            raise ValueError(
                f"it holds {path.name}, where adapter_config.json and adapter_model.safetensors are all that is wanted"
            )
    if ordinary(folder / "adapter_config.json") > 2**20:
        raise ValueError("adapter_config.json is longer than a mebibyte")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError("adapter_config.json is not of LoRA")
    plain = json.loads(
        json.dumps({name: _plain(value) for name, value in LoraConfig().to_dict().items()})
    )
    for name, value in config.items():
        if name not in _FREE and value not in (plain.get(name), None, False) and value != {}:
            raise ValueError(
                f"adapter_config.json asks for {name}={str(value)[:80]!r}, which is not plain LoRA"
            )
    base, rank, targets = (
        config.get("base_model_name_or_path"),
        config.get("r"),
        config.get("target_modules"),
    )
    if base != model.name_or_path:
        raise ValueError(
            f"it was made for the base model {str(base)[:200]!r}, and this one is {model.name_or_path!r}"
        )
    if (
        type(rank) is not int
        or not 1 <= rank <= 1024
        or config.get("init_lora_weights", True) not in (True, False, "gaussian")
    ):
        raise ValueError(f"its rank {str(rank)[:20]!r} or its init_lora_weights is out of bounds")
    for name, least, most in (("lora_alpha", 0, 1e6), ("lora_dropout", 0, 1)):
        value = config.get(name, least)
        if (
            type(value) not in (int, float)
            or not math.isfinite(value)
            or not least <= value <= most
        ):
            raise ValueError(f"its {name} is {str(value)[:20]!r}")
    if (
        not isinstance(targets, list)
        or not targets
        or not all(isinstance(name, str) for name in targets)
    ):
        raise ValueError("its target_modules is not a list of names")
    expected = {}
    for name, module in model.named_modules():
        if any(name == target or name.endswith("." + target) for target in targets):
            expected |= {
                f"{_PREFIX}{name}.lora_A.weight": [rank, module.in_features],
                f"{_PREFIX}{name}.lora_B.weight": [module.out_features, rank],
            }
    if not expected:
        raise ValueError(f"the base model has no layers named {str(targets)[:80]}")
    ordinary(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        if odd := sorted(names ^ expected.keys()):
            raise ValueError(f"its weights and the base model's layers differ at {odd[0][:200]}")
        for name in names:
            part = tensors.get_slice(name)
            if part.get_shape() != expected[name] or part.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{name} is {part.get_dtype()} {part.get_shape()}, where the base model needs {expected[name]}"
                )


def _plain(value):
    return (
        value if isinstance(value, (str, int, float, bool, dict, list, type(None))) else str(value)
    )
