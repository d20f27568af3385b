"""Export a tuned model: its adapter as a zip file, or the adapter merged into the base model."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from qlora_helpers.adapter import (
    CALIBRATION,
    CARD,
    LORA,
    MOST_TEXT,
    SETTINGS,
    WEIGHTS,
    read_adapter,
    refusing,
)
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.errors import ModelError
from qlora_helpers.run.files import new_folder, read_file, write_file
from qlora_helpers.run.workspace import Workspace


def export_adapter(workspace: Workspace, path: str | os.PathLike) -> Path:
    """Write the adapter of `workspace` to the zip file `path`, its weights in float16.

    Unpacked, it is all that `HeadlineClassifier.from_adapter` needs. Raises ModelError for weights
    that float16 cannot hold, WorkspaceError if the file cannot be written.
    """
    workspace.open("03_qlora_training")
    folder, packed = workspace / "adapter", io.BytesIO()
    read_adapter(folder)
    with refusing(folder), zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in (SETTINGS, LORA, WEIGHTS, CALIBRATION, CARD):
            if (folder / name).is_symlink():
                raise ValueError(f"{name} is a link, which may lead elsewhere")
            if name == WEIGHTS:
                file.writestr(name, save(_halves(load_file(folder / name)), {"format": "pt"}))
            elif (folder / name).exists():
                file.writestr(name, read_file(folder / name, MOST_TEXT))
    write_file(Path(path), packed.getvalue())
    return Path(path)


def merge_adapter(classifier: HeadlineClassifier, folder: str | os.PathLike) -> Path:
    """Write the tuned model to the new `folder` as an ordinary float16 checkpoint.

    Its weights are those that NF4 holds, dequantised, with (alpha / r) B A added (arXiv:2106.09685,
    section 4.1). One decoder layer at a time is in memory. Raises ModelError for weights that
    float16 cannot hold, WorkspaceError if the disk is full. Nothing half-written stays.
    """
    base = classifier.model.get_base_model()
    with new_folder(folder) as partial:
        _write_weights(base, partial)
        config = base.config.to_dict() | {"dtype": "float16"}
        config["architectures"] = [type(base).__name__]
        config.pop("quantization_config", None)
        type(base.config).from_dict(config).save_pretrained(partial)
        classifier.tokenizer.save_pretrained(partial)
    return Path(folder)


@torch.no_grad()
def _write_weights(base: PreTrainedModel, folder: Path) -> None:
    """Write a safetensors file for each decoder layer, one for the rest, and their index."""
    sources, parts, weight_map, size = _sources(base), {}, {}, 0
    for name in sources:
        layer = re.match(r"\w+\.layers\.\d+\.", name)
        parts.setdefault(layer and layer[0], []).append(name)
    for i, names in enumerate(tqdm(parts.values(), desc="merged", unit="layer"), 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        tensors = _halves({name: _merged(sources[name]).half().cpu() for name in names})
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _sources(base: PreTrainedModel) -> dict[str, LoraLayer | torch.nn.Parameter]:
    """Return what each weight of the merged checkpoint is made from, by its name there."""
    sources = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            sources[f"{name}.weight"] = module
    for name, parameter in base.named_parameters():
        if "lora_" not in name and not name.endswith(".base_layer.weight"):
            sources[name.replace(".base_layer.", ".")] = parameter
    return sources


def _merged(source: LoraLayer | torch.nn.Parameter) -> torch.Tensor:
    if not isinstance(source, LoraLayer):
        return source.detach()
    weight = source.base_layer.weight
    if isinstance(source.base_layer, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.float() + source.get_delta_weight(source.active_adapters[0]).float()


def _halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors in float16. Raises ModelError for one that float16 cannot hold."""
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} holds values that float16 cannot: train again with a lower "
                "QLORA_LEARNING_RATE."
            )
    return halves
