"""What a run will take, estimated before it: memory, disk, the batch plan and minutes. 03 finds out the first three for real."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qlora_helpers.config import EMBEDDED_MODEL, RunConfig

_NF4_BITS = 4.127  # a weight, with its share of the scales that double quantisation leaves (arXiv:2305.14314, 3)
_FREE_SHARE = 0.9  # of the memory, which a plan fills
_DOWNLOAD = 25e6  # bytes a second


@dataclass(frozen=True)
class ModelSize:
    """Weights of the linear layers, which NF4 holds; of the others, which stay in 16 bits; and of LoRA for each rank."""

    linear: int
    other: int
    lora: int
    layers: int
    hidden: int

    @property
    def gib(self) -> float:
        """In memory, with the linear layers in NF4."""
        return (self.linear * _NF4_BITS / 8 + self.other * 2) / 2**30


def model_size(config: PreTrainedConfig) -> ModelSize | None:
    """The size of the model that `config` describes; nothing is loaded. None for one that is no plain language model."""
    try:
        return _model_size(config)
    except (
        AttributeError,
        ValueError,
        TypeError,
        LookupError,
    ):  # loading will say what is wrong with it
        return None


def _model_size(config: PreTrainedConfig) -> ModelSize:
    plain = type(config).from_dict(
        {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("quantization_config", "_name_or_path")
        }
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.float16)
    linear = [
        module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)
    ]
    in_linear = sum(module.weight.numel() for module in linear)
    return ModelSize(
        in_linear,
        sum(p.numel() for p in model.parameters()) - in_linear,
        sum(module.in_features + module.out_features for module in linear),
        plain.num_hidden_layers,
        plain.hidden_size,
    )


def bytes_written(size: ModelSize, config: RunConfig) -> int:
    """The adapter in float32, and three checkpoints (two kept, one being written) of four times as much: weights, best weights, AdamW."""
    return 4 * size.lora * config.lora_r * (1 + 3 * 4)


def expected_plan(size: ModelSize, config: RunConfig, gib: float) -> tuple[int, int] | None:
    """The micro-batch and the layers that are checkpointed on its longest rows in `gib` of GPU memory, by README's table of Mistral-7B;
    None for a model of another shape. (0, layers) if not even one row fits."""
    if (size.layers, size.hidden) != (32, 4096):
        return None
    share = config.max_length / 256  # of the longest rows, by which a plan is made
    room = _FREE_SHARE * gib - size.gib
    for rows in _cuts(config):
        least, layer = 0.96 + 0.094 * rows * share, 0.0188 * rows * share
        if least <= room:
            return rows, size.layers - min(size.layers, int((room - least) / layer))
    return 0, size.layers


def rows_on_cpu(config: RunConfig, gib: float) -> int | None:
    """The micro-batch of the embedded model in `gib` of host memory, by what 16 rows of its own sample keep: 2.05 GiB in float32."""
    return next((rows for rows in _cuts(config) if rows * 2.05 / 16 <= _FREE_SHARE * gib), None)


def _cuts(config: RunConfig) -> list[int]:
    return [
        rows
        for rows in range(config.effective_batch_size, 0, -1)
        if config.effective_batch_size % rows == 0
    ]


def minutes(config: RunConfig, download: int) -> dict[str, float]:
    """Minutes for each notebook, with `download` bytes of the base model to fetch on each new machine. On two CPU cores by the measured
    rows a second. On a T4, where nothing has been measured, rows a second are those of a model on paper (at 16 rows of 64 tokens,
    24 TFLOP/s and 250 GB/s a step is 1.2 s of products, 0.2 s of elementwise passes and 0.14 s of dequantising), and the time to start,
    to compile and to plan is that of tests/gpu/rehearse.py, with a minute for the installation."""
    cpu = config.base_model == EMBEDDED_MODEL
    train, score = (3.7, 9.0) if cpu else (10.0, 24.0)  # rows a second
    examples = 5.0 if cpu else score  # with four solved examples before each row
    # to start and fetch; to plan, compile and load again; to count words and draw
    load, plan, draw = (0.4, 0.7, 0.7) if cpu else (1.5 + download / _DOWNLOAD / 60, 2, 0.5)
    trained = (
        config.train_size * config.num_epochs / train
        + config.validation_size * (config.num_epochs + 2) / score
    )
    scored = config.test_size * (2 / score + 1 / examples) + config.validation_size / score
    return {
        "01": 0.2 if cpu else 1,
        "02": 0.3 if cpu else 2,
        "03": trained / 60 + load + plan,
        "04": scored / 60 + load + draw,
        "05": load + 0.2,
    }
