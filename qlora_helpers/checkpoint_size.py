"""How large a base model is before it is loaded: what is downloaded of it, and what its weights take in memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.errors import ModelError
from qlora_helpers.hub import cached, checkpoint_files, explain, fetch, file_names, files

_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight; a scale for each 64 in 8 bits; a scale of those for each 256 in 32


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes: of the files that loading reads, of those that the hub's cache does not hold yet, of the weights in memory."""

    files: int
    download: int
    memory: int


def checkpoint_size(source: str | os.PathLike, dtype: torch.dtype = torch.float16) -> CheckpointSize:
    """The size of the folder or hub id `source`, loaded by `load_base_model` with `dtype` for what NF4 leaves out: the embedding, the head
    and the norms. Nothing is downloaded but config.json. Raises ModelError if it cannot be had."""
    name, folder = str(source), Path(source)
    if not folder.is_dir():
        folder = cached(name, "model", checkpoint_files)
    if folder:
        sizes, download = {file: (folder / file).stat().st_size for file in checkpoint_files(file_names(folder))}, 0
    else:
        folder = fetch(name, "model", lambda names: [file for file in names if file == "config.json"], ModelError,
                       "Or set QLORA_BASE_MODEL to a folder with a checkpoint.")
        try:
            listed = files(name, "model")[1]
        except Exception as error:
            raise ModelError(f"{name} cannot be looked up on the hub: {explain(name, 'model', error)}") from error
        sizes = {file: listed[file] for file in checkpoint_files(listed)}
        download = sum(sizes.values())
    if not sizes:
        raise ModelError(f"{name} does not hold a whole checkpoint with safetensors weights: choose another one.")
    return CheckpointSize(sum(sizes.values()), download, _memory(folder, dtype))


def _memory(folder: Path, dtype: torch.dtype) -> int:
    plain = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # the shapes are those before
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    linear = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return round(linear * _NF4_BYTES) + (sum(p.numel() for p in model.parameters()) - linear) * dtype.itemsize
