"""A tuned model to take along: its adapter as a zip file, or merged into the base model's weights as one ordinary checkpoint."""

import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from tqdm import tqdm

from qlora_helpers.adapter import SETTINGS, WEIGHTS, settings_json
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.run.files import cannot_write, nearest, write_file
from qlora_helpers.run.workspace import Workspace

_ROOM = 10**9  # bytes of disk and of host memory beside what is written


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


def merged_bytes(classifier: HeadlineClassifier) -> int:
    """What `merge_adapter` writes to the disk: two bytes for each weight of the base model."""
    base = classifier.model.get_base_model()
    in_layers = sum(layer.in_features * layer.out_features for layer in _layers(base).values())
    return 2 * (in_layers + sum(p.numel() for _, p in _others(base)))


def merge_adapter(classifier: HeadlineClassifier, folder: str | os.PathLike) -> Path:
    """Write the tuned model to the new `folder` as a float16 checkpoint that Transformers loads without PEFT and bitsandbytes: the weights
    that NF4 holds, dequantised, with (alpha / r) B A added (arXiv:2106.09685, 4.1). One decoder layer at a time is in memory.
    Raises ModelError, before anything is written, if it would not fit, and for weights that float16 cannot hold; WorkspaceError if the
    disk does not take it all the same, and nothing of it stays."""
    folder, base = Path(folder), classifier.model.get_base_model()
    needed, free = merged_bytes(classifier) + _ROOM, shutil.disk_usage(nearest(folder)).free
    if folder.exists():
        raise ModelError(f"{folder} is there already: delete it, or name another folder.")
    if free < needed:
        raise ModelError(
            f"the merged model needs {needed / 1e9:.1f} GB of disk and {folder} has {free / 1e9:.1f} GB free: make room, or "
            "name a folder on another disk."
        )
    if (memory := psutil.virtual_memory().available) < 2 * _ROOM:
        raise ModelError(
            f"merging needs {2 * _ROOM / 1e9:.1f} GB of host memory and {memory / 1e9:.1f} GB are free: close "
            "other notebooks."
        )
    layers, others, parts = _layers(base), dict(_others(base)), {}
    for name in (*layers, *others):
        layer = re.match(r"\w+\.layers\.(\d+)\.", name)
        parts.setdefault(int(layer[1]) if layer else -1, []).append(name)
    made, places = folder.with_name(f"{folder.name}.partial"), {}
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        for i, names in enumerate(tqdm(parts.values(), desc="merged", unit="layer"), 1):
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
            tensors = {
                name: _merged(layers[name]) if name in layers else others[name].detach()
                for name in names
            }
            tensors = {
                name: tensor.to("cpu", torch.float16).contiguous()
                for name, tensor in tensors.items()
            }
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ModelError(
                    f"{file} would hold values that float16 cannot: train again with a lower QLORA_LEARNING_RATE."
                )
            save_file(tensors, made / file, {"format": "pt"})
            places |= dict.fromkeys(names, file)
        (made / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": needed - _ROOM}, "weight_map": places}, indent=1)
        )
        config = base.config.to_dict() | {
            "dtype": "float16",
            "architectures": [type(base).__name__],
        }
        config.pop("quantization_config", None)
        type(base.config).from_dict(config).save_pretrained(made)
        classifier.tokenizer.save_pretrained(made)
        os.replace(made, folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _layers(base) -> dict[str, LoraLayer]:
    return {
        f"{name}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }


def _others(base) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name.replace(".base_layer.", "."), p)
        for name, p in base.named_parameters()
        if "lora_" not in name and not name.endswith(".base_layer.weight")
    ]


@torch.no_grad()
def _merged(layer: LoraLayer) -> torch.Tensor:
    weight = layer.base_layer.weight
    if isinstance(layer.base_layer, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.float() + layer.get_delta_weight(layer.active_adapters[0]).float()
