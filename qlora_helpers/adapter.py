"""An adapter's folder: saved, found, checked before anything of it is loaded, and loaded."""

import contextlib
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
from qlora_helpers.model import fused, load_base_model
from qlora_helpers.prompts import TEMPLATE
from qlora_helpers.run.files import DAMAGE, copy_folder, ordinary, read_file, writing

SETTINGS, LORA, WEIGHTS = "qlora_config.json", "adapter_config.json", "adapter_model.safetensors"
CALIBRATION, CARD = "calibration.json", "README.md"
_TRAIN = "notebooks/03_qlora_training.ipynb"
# Files that may run code when they are loaded.
_CODE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so"}
# Settings that are checked on their own, or may have any value.
_FREE = {"base_model_name_or_path", "peft_type", "peft_version", "revision"}
_MOST_BYTES = 2**32  # of a file: the weights of rank 8 beside Mistral-7B take a fiftieth
MOST_TEXT = 2**20  # bytes of a file of settings, or of the model card
_LARGEST = 65504  # of float16, and a bound for the norm of a weight, which is below 400 in practice


def save_adapter(model: PeftModel, config: RunConfig, folder: Path) -> None:
    """Write the adapter to `folder` as safetensors, whole or not at all.

    It names the base model as the config does, not where this machine keeps it. An adapter that is
    there is replaced. Raises WorkspaceError if it cannot be written, ModelError if what was written
    is not the model's, or if `folder` holds something else than an adapter.
    """
    for path in sorted(folder.glob("*")):
        if path.name not in (SETTINGS, LORA, WEIGHTS, CALIBRATION, CARD):
            raise ModelError(f"{path} is no part of an adapter: name another folder.")
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = config.base_model
    lora.target_modules = sorted(lora.target_modules)  # of a set, whose order no run repeats
    with tempfile.TemporaryDirectory() as temporary, writing(folder):
        model.save_pretrained(temporary, save_embedding_layers=False)
        # PEFT's model card is an empty form; 04 writes a real one.
        Path(temporary, CARD).unlink(missing_ok=True)
        # What PEFT's settings leave open: the labels, the longest prompt, and its wording.
        own = {"labels": config.labels, "max_length": config.max_length, "prompt": TEMPLATE}
        Path(temporary, SETTINGS).write_text(json.dumps(own, indent=1), encoding="utf-8")
        copy_folder(Path(temporary), folder)
        _check_same(model, folder, "written")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `model`, from `load_base_model`, with the adapter in `folder`, ready to score.

    Raises ModelError, before anything of it is loaded, if `read_adapter` does or if it was made for
    another base model or other layers.
    """
    folder = Path(folder)
    config, _, lora = read_adapter(folder)
    with refusing(folder):
        base, own = config.base_model, model.name_or_path
        if base != own:
            raise ValueError(f"it was made for {base[:200]!r}, and not for {own!r}")
        _check_shapes(model, lora, folder / WEIGHTS)
    loaded = fused(PeftModel.from_pretrained, model, folder).eval()
    _check_same(loaded, folder, "loaded")
    return loaded


def load_on_each_gpu(config: RunConfig, folder: Path) -> list[PeftModel]:
    """Return the base model with the adapter in `folder`, once on each GPU, or once on a CPU.

    Raises what `load_base_model` and `load_adapter` raise.
    """
    models = []
    for gpu in range(max(1, torch.cuda.device_count())):
        with torch.cuda.device(gpu) if torch.cuda.is_available() else contextlib.nullcontext():
            models.append(load_adapter(load_base_model(config), folder))
    return models


def _check_same(model: PeftModel, folder: Path, done: str) -> None:
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


def find_adapter(source: str | os.PathLike) -> Path:
    """Return the folder `source`, or that of the hub's `account/name`. Raises ModelError."""
    folder, name = Path(os.path.expanduser(source)), str(source)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name[0] in "./~" or name[-1] == "/":
        raise ModelError(
            f"there is no adapter folder {name!r} here, and a name on the hub is account/name."
        )
    files = (SETTINGS, LORA, WEIGHTS, CALIBRATION)
    otherwise = f"An adapter holds {SETTINGS}, {LORA} and {WEIGHTS}, as {_TRAIN} writes them."
    return fetch(name, "model", files, ModelError, otherwise)


def read_adapter(folder: Path) -> tuple[RunConfig, float, dict]:
    """Return what the files of an adapter say: a config with its base model, labels and max_length,
    the temperature that 04 saved, else 1, and the settings of LoRA.

    The config's other fields are the profile's defaults. Raises ModelError unless the files are
    whole, of plain LoRA, for the prompt of this version, with weights that are ordinary numbers. No
    path that the folder names is followed.
    """
    profile = default_profile()
    with refusing(folder):
        saved, lora = _read_json(folder / SETTINGS), _read_lora(folder / LORA)
        for path in sorted(folder.iterdir()):
            if path.suffix in _CODE or path.name.endswith(".index.json") or path.is_dir():
                raise ValueError(f"it holds {path.name}, where only {LORA} and {WEIGHTS} are read")
            ordinary(path, _MOST_BYTES)
        if (prompt := saved["prompt"]) != TEMPLATE:
            raise ValueError(
                f"it was trained with the prompt {str(prompt)[:200]!r}, and this version of "
                f"qlora_helpers asks {TEMPLATE!r}"
            )
        if not isinstance(saved["labels"], list):
            raise ValueError(f"{SETTINGS} says labels {str(saved['labels'])[:80]!r}, not a list")
        own = {"labels": tuple(saved["labels"]), "max_length": saved["max_length"]}
        own["base_model"] = lora["base_model_name_or_path"]
        config = RunConfig(profile=profile, **PROFILES[profile] | own)
        temperature = 1.0
        if (folder / CALIBRATION).exists():
            temperature = _read_json(folder / CALIBRATION)["temperature"]
        if not _within(temperature, 0.01, 100):
            raise ValueError(
                f"{CALIBRATION} says temperature {str(temperature)[:80]}, not a number from 0.01 "
                "to 100, as notebooks/04_evaluation.ipynb writes it"
            )
        _check_numbers(folder / WEIGHTS)
        return config, float(temperature), lora


def _check_numbers(weights: Path) -> None:
    with safe_open(weights, "pt") as tensors:
        for name in sorted(tensors.keys()):
            weight = tensors.get_tensor(name)
            if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{name[:200]} is {weight.dtype}, not of floats")
            if not weight.float().norm() <= _LARGEST:
                raise ValueError(f"{name[:200]} holds NaN, or an infinite or huge number")


@contextlib.contextmanager
def refusing(folder: Path):
    """Turn what damaged files raise into a ModelError that names `folder`."""
    try:
        yield
    except (*DAMAGE, SafetensorError) as error:
        why = f"it does not say {error}" if isinstance(error, KeyError) else reason(error)
        raise ModelError(
            f"the adapter in {folder} is refused: {why.rstrip('.')}. Nothing of it was loaded. "
            f"Take the whole folder that {_TRAIN} writes, or run that again."
        ) from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(read_file(path, MOST_TEXT))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _read_lora(path: Path) -> dict:
    """Return the settings in a file, with plain LoRA's for those that are not there."""
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    settings = plain | _read_json(path)
    if settings["peft_type"] != "LORA":
        raise ValueError(f"{LORA} is not of LoRA")
    rank, targets = settings["r"], settings["target_modules"]
    right = {
        "r": type(rank) is int and 1 <= rank <= 1024,
        "lora_alpha": _within(settings["lora_alpha"], 0, 1e6),
        "lora_dropout": _within(settings["lora_dropout"], 0, 1),
        "init_lora_weights": settings["init_lora_weights"] in (True, False, "gaussian"),
        "target_modules": isinstance(targets, list) and all(type(name) is str for name in targets),
        "task_type": settings["task_type"] in ("CAUSAL_LM", None),
        "inference_mode": type(settings["inference_mode"]) is bool,
        "use_rslora": type(settings["use_rslora"]) is bool,
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
            if (own := tensors.get_slice(name).get_shape()) != shape:
                raise ValueError(f"{name} is {own}, not {shape}")
