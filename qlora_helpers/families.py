"""Whether packed batches of a base model give what the library gives for each row alone."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError, reason
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.scoring import label_logits

# The relative difference of two rows' logits that rounding explains. SmolLM2-135M showed at most
# 1.4e-6 in float32, 1.3e-3 in float16 and 5.4e-3 in bfloat16, random models of the shapes of
# Mistral-7B and Qwen3-4B on an H100 6.4e-3 and 3.9e-2. With rows that read each other, SmolLM2
# showed at least .22, and with a softcap of 30 left out .15.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


def check_window(model_config: PreTrainedConfig, config: RunConfig) -> None:
    """Raise ModelError if prompts may be longer than the window of the model's attention."""
    text = model_config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if window and window < config.max_length and (kinds is None or "sliding_attention" in kinds):
        raise ModelError(
            f"max_length is {config.max_length}, and the attention of {config.base_model!r} "
            f"(family {model_config.model_type!r}) reaches back {window} tokens, which packed "
            f"batches do not keep to: set QLORA_MAX_LENGTH to {window} or less, or choose another "
            "base model."
        )


def check_family(model: PreTrainedModel, config: RunConfig) -> None:
    """Raise ModelError unless a packed batch of two rows gives the library's logits for each alone.

    From then on `model`, which is in eval mode, runs packed batches.
    """
    if problem := _problem(model):
        raise ModelError(
            f"{config.base_model!r} is of the family {model.config.model_type!r}, which cannot be "
            f"used here: {problem}. Choose a base model of a family that README.md names as right, "
            "for example Llama, Mistral, Qwen2, Qwen3, Gemma or Phi3."
        )


@torch.no_grad()
def _problem(model: PreTrainedModel) -> str:
    """Return what is wrong with packed batches of `model`; empty if nothing is."""
    try:
        step = model.get_output_embeddings().weight.shape[0] // 16
        # The second row is short: most of it would see what it should not.
        rows = [list(range(step, 10 * step, step)), list(range(10 * step, 13 * step, step))]
        batches = [torch.tensor([row], device=model.device) for row in rows]
        own = torch.cat([model(batch, use_cache=False).logits[:, -1] for batch in batches]).float()
        if not own.isfinite().all():
            return f"in {str(model.dtype).removeprefix('torch.')} its logits are not finite"
        # The likeliest tokens show scales and softcaps, the rows' own what was read.
        ids = sorted({*own.topk(8).indices.flatten().tolist(), *rows[0], *rows[1]})
        use_packed_attention(model)
        layers = model.base_model.layers  # training checkpoints them by this name
        packed = label_logits(model, rows, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: it does not take what a decoder takes
        said = f"{type(error).__name__}: {reason(error)}"
        return f"it does not run in 4 bits and packed batches ({said})"
    own, packed = (x - x.mean(1, keepdim=True) for x in (own[:, ids], packed))
    difference = ((packed - own).norm() / own.norm()).item()
    if not difference <= _ROUNDING[model.dtype]:
        return (
            f"the logits of two rows in one batch differ by {difference:.0%} from the library's "
            f"own for each row alone, where rounding explains {_ROUNDING[model.dtype]:.2%}"
        )
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 2:  # the experts of a mixture
            return f"layers.{name} is not the matrix of a linear layer, as NF4 and LoRA need it"
    return ""
