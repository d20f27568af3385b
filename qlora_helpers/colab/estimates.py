"""What a run will take: GPU memory for the weights, and minutes."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qlora_helpers.config import EMBEDDED_MODEL, RunConfig

_NF4_BITS = 4.127  # of a weight, with double quantisation (arXiv:2305.14314, 3)


def model_gib(config: PreTrainedConfig) -> float | None:
    """Return the GPU memory of the weights that `config` describes: linear layers in 4 bits, others
    in 16; None if it is no language model."""
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(config).from_dict(settings))
    except Exception:  # of any kind: loading it will say what is wrong
        return None
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    linear = sum(layer.weight.numel() for layer in layers)
    return (linear * _NF4_BITS / 8 + (model.num_parameters() - linear) * 2) / 2**30


def minutes(config: RunConfig, download: int) -> dict[str, float]:
    """Return the minutes of each notebook, with `download` bytes of the model on each new machine.

    The embedded model's were measured on two CPU cores. A T4's rows a second are those of 24
    TFLOP/s and 250 GB/s on paper (a step of 16 rows of 64 tokens: 1.2 s of products, 0.2 s of
    elementwise passes, 0.14 s of dequantising); its minutes to start, compile and plan are those
    of tests/gpu/rehearse.py on another GPU, with one to install.
    """
    if config.base_model == EMBEDDED_MODEL:
        train, score, few_shot = 3.7, 9.0, 5.0  # rows a second
        setup, subset, load, plan, baselines = 0.2, 0.3, 0.4, 0.7, 0.7
    else:
        train, score, few_shot = 10.0, 24.0, 24.0
        setup, subset, load, plan, baselines = 1.0, 2.0, 1.5 + download / 25e6 / 60, 2.0, 0.5
    training = config.train_size * config.num_epochs / train
    training += config.validation_size * (config.num_epochs + 2) / score
    evaluation = (2 * config.test_size + config.validation_size) / score
    evaluation += config.test_size / few_shot
    return {
        "01": setup,
        "02": subset,
        "03": training / 60 + load + plan,
        "04": evaluation / 60 + load + baselines,
        "05": load + 0.2,
    }
