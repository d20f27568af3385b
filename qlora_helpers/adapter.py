"""An adapter's folder: saved, found, checked before anything of it is loaded, and loaded."""

import json
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

SETTINGS, LORA, WEIGHTS = "qlora_config.json", "adapter_config.json", "adapter_model.safetensors"
_TRAIN = "notebooks/03_qlora_training.ipynb"
_REMEDY = f"Take the whole folder that {_TRAIN} writes, or run that again."
# Files that may run code when they are loaded.
_CODE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so"}
# Settings that are checked on their own, or may have any value.
_FREE = {"base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"}
_FREE |= {"inference_mode", "use_rslora"}


def save_adapter(model: PeftModel, config: RunConfig, folder: Path) -> None:
    """Write the adapter to `folder` as safetensors, whole or not at all.

    It names the base model as the config does, not where this machine keeps it. Raises
    WorkspaceError if it cannot be written, ModelError if what was written is not the model's.
    """
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = config.base_model
    lora.target_modules = sorted(lora.target_modules)
    with tempfile.TemporaryDirectory() as temporary, writing(folder):
        model.save_pretrained(temporary, save_embedding_layers=False)
        # PEFT's model card is an empty form; 04 writes a real one.
        Path(temporary, "README.md").unlink(missing_ok=True)
        # What PEFT's settings leave open: the labels, the longest prompt, and its wording.
        own = {"labels": config.labels, "max_length": config.max_length, "prompt": TEMPLATE}
        Path(temporary, SETTINGS).write_text(json.dumps(own, indent=1), encoding="utf-8")
        copy_folder(Path(temporary), folder)
        _check_weights(model, folder, "written")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `model`, from `load_base_model`, with the adapter in `folder`, ready to score.

    Raises ModelError, before anything of it is loaded, as `check_adapter` does.
    """
    check_adapter(model, Path(folder))
    loaded = fused(PeftModel.from_pretrained, model, folder).eval()
    _check_weights(loaded, Path(folder), "loaded")
    return loaded


def _check_weights(model: PeftModel, folder: Path, done: str) -> None:
    """Raise ModelError unless `model` has the weights in `folder`: PEFT only warns of a gap."""
    weights, parameters = load_file(folder / WEIGHTS), {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameters[name.replace(".default.weight", ".weight")] = parameter.cpu()
    for name in weights.keys() | parameters.keys():
        both = name in weights and name in parameters
        if not both or not torch.equal(parameters[name], weights[name].float()):
            raise ModelError(
                f"the adapter in {folder} was not {done} whole: {name} differs. Run {_TRAIN} again."
            )


def read_settings(folder: Path) -> RunConfig:
    """Return a config with the base model, labels and max_length of the adapter in `folder`.

    The other fields are the profile's defaults. Raises ModelError if a file is missing or damaged,
    or if the adapter was trained with another prompt.
    """
    saved, lora = _read_json(folder / SETTINGS), _read_json(folder / LORA)
    profile = default_profile()
    try:
        if saved["prompt"] != TEMPLATE:
            raise ModelError(
                f"the adapter in {folder} was trained with the prompt {saved['prompt']!r}, and this"
                f" version of qlora_helpers asks {TEMPLATE!r}: use the version that trained it, or "
                "train again."
            )
        defaults = PROFILES[profile] | {"base_model": lora["base_model_name_or_path"]}
        own = {"labels": tuple(saved["labels"]), "max_length": saved["max_length"]}
        return RunConfig(profile=profile, **defaults, **own)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / SETTINGS} or its {LORA} does not hold what it should ({error!r}). {_REMEDY}"
        ) from error


def read_temperature(folder: Path) -> float:
    """Return the temperature that 04 saved in an adapter's `folder`, else 1. Raises ModelError."""
    path = folder / "calibration.json"
    if not path.exists():
        return 1.0
    temperature = _read_json(path).get("temperature")
    if type(temperature) not in (int, float) or not 0 < temperature < float("inf"):
        raise ModelError(
            f"{path} says temperature {temperature!r}, not a positive number. Run "
            "notebooks/04_evaluation.ipynb again."
        )
    return float(temperature)


def find_adapter(source: str | os.PathLike) -> Path:
    """Return the folder `source`, or that of the hub's `account/name`. Raises ModelError."""
    folder, name = Path(source).expanduser(), str(source)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name[0] in "./~" or name[-1] == "/":
        raise ModelError(
            f"there is no adapter folder {name!r} here, and a name on the hub is account/name."
        )
    files = (SETTINGS, LORA, WEIGHTS, "calibration.json")
    otherwise = f"An adapter holds {SETTINGS}, {LORA} and {WEIGHTS}, as {_TRAIN} writes them."
    return fetch(name, "model", files, ModelError, otherwise)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing. {_REMEDY}") from None
    except DAMAGE as error:
        raise ModelError(f"{path} cannot be read ({reason(error)}). {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not what it should be, a JSON object. {_REMEDY}")
    return content


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Raise ModelError unless `folder` holds plain LoRA weights that fit `model`.

    Only JSON and the header of the weights are read, and no path that the folder names is followed.
    """
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _CODE or path.name.endswith(".index.json") or path.is_dir():
                raise ValueError(f"it holds {path.name}, where only {LORA} and {WEIGHTS} are read")
        if ordinary(folder / LORA) > 2**20:
            raise ValueError(f"{LORA} is longer than a mebibyte")
        settings = _check_settings(model, json.loads((folder / LORA).read_bytes()))
        ordinary(folder / WEIGHTS)
        _check_shapes(model, settings, folder / WEIGHTS)
    except (*DAMAGE, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} is refused: {reason(error)}. Nothing of it was loaded. If it "
            f"should be this run's own, run {_TRAIN} again."
        ) from error


def _check_settings(model: PreTrainedModel, settings: dict) -> dict:
    """Return the settings, with plain LoRA's for those that are not there."""
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ValueError(f"{LORA} is not of LoRA")
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    settings = plain | settings
    base, rank = settings["base_model_name_or_path"], settings["r"]
    targets = settings["target_modules"]
    if base != model.name_or_path:
        raise ValueError(f"it was made for {str(base)[:200]!r}, and not for {model.name_or_path!r}")
    right = {
        "r": type(rank) is int and 1 <= rank <= 1024,
        "lora_alpha": _within(settings["lora_alpha"], 0, 1e6),
        "lora_dropout": _within(settings["lora_dropout"], 0, 1),
        "init_lora_weights": settings["init_lora_weights"] in (True, False, "gaussian"),
        "target_modules": isinstance(targets, list) and all(type(name) is str for name in targets),
    }
    for name, value in settings.items():
        free = name in _FREE or value in (plain.get(name), None, False) or value == {}
        if not right.get(name, free):
            raise ValueError(f"its {name} is {str(value)[:80]!r}, not a plain LoRA's")
    return settings


def _within(value, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _check_shapes(model: PreTrainedModel, settings: dict, weights: Path) -> None:
    rank, shapes = settings["r"], {}
    ends = tuple(f".{target}" for target in settings["target_modules"])
    for name, layer in model.named_modules():
        if f".{name}".endswith(ends):
            shapes[f"base_model.model.{name}.lora_A.weight"] = [rank, layer.in_features]
            shapes[f"base_model.model.{name}.lora_B.weight"] = [layer.out_features, rank]
    if not shapes:
        raise ValueError(f"the base model has no layers named {str(ends)[:80]}")
    with safe_open(weights, "pt") as tensors:
        if odd := sorted(shapes.keys() ^ set(tensors.keys())):
            raise ValueError(f"its weights and the base model's layers differ at {odd[0][:200]}")
        for name, shape in shapes.items():
            part = tensors.get_slice(name)
            kind = part.get_dtype()
            if part.get_shape() != shape or kind not in ("F32", "F16", "BF16"):
                raise ValueError(f"{name} is {kind} {part.get_shape()}, not {shape} of floats")
