"""What an adapter's folder may hold: looked at before anything of it is loaded."""

import json
import math
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from qlora_helpers.errors import ModelError
from qlora_helpers.run.files import ordinary, read_file, reason

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


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Raise ModelError unless `folder` holds plain LoRA weights that fit `model`, as safetensors, and nothing that may run.
    Only JSON and the header of the weights are read; nothing follows a path that the folder names."""
    try:
        _check(model, folder)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
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
    config = json.loads(read_file(folder / "adapter_config.json"))
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
