"""Decoder layers with LoRA in fewer passes, which give PEFT's values and gradients."""

from functools import partial

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from qlora_helpers.fast.dropout import use_row_dropout
from qlora_helpers.fast.functions import Heads, Linear, SwiGlu
from qlora_helpers.fast.groups import Adapter, Group
from qlora_helpers.fast.packing import take

_FAMILIES = ("Llama", "Mistral")  # whose attention and MLP compute what is computed here


def fuse_lora(model: PeftModel) -> PeftModel:
    """Patch `model` in place: Llama and Mistral layers run packed batches with LoRA in few passes.

    Each dropout becomes a `RowDropout`, in any family; layers with the same input share its mask.
    Backward keeps inputs and products of rank r alone. LoRA runs in the input's dtype, from float32
    weights. An adapter that is switched off has rank 0: base and tuned model run the same code.
    PEFT's own layers run where a batch is not packed, or the adapter is merged or not plain LoRA.
    Frozen weights become views of one matrix a group: move or deep-copy a model before, not after.
    """
    use_row_dropout(model)
    last = None
    for block in list(model.modules()):
        block.__dict__.pop("forward", None)  # an earlier adapter's would keep its memory
        kind = type(block).__name__
        part = kind.removeprefix(next(filter(kind.startswith, _FAMILIES), kind))
        if part == "RMSNorm" and block.weight.is_cuda:
            weight, eps = block.weight, block.variance_epsilon
            block.forward = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        elif part == "Attention":
            _fuse(block, _attention, [block.q_proj, block.k_proj, block.v_proj], [block.o_proj])
        elif part == "MLP" and block.config.hidden_act == "silu":
            _fuse(block, _mlp, [block.gate_proj, block.up_proj], [block.down_proj])
        elif part == "DecoderLayer":
            last = block
    if last and "forward" in vars(last.mlp):
        last.forward = partial(_last_layer, last, last.forward)
    return model


def _fuse(block: nn.Module, forward, *groups: list[nn.Module]) -> None:
    if all(_is_plain_lora(layer) for group in groups for layer in group):
        block.forward = partial(forward, block, *map(Group, groups), block.forward)


def _is_plain_lora(layer: nn.Module) -> bool:
    if not isinstance(layer, LoraLayer) or layer.lora_variant or any(layer.lora_bias.values()):
        return False
    base = layer.base_layer
    is_frozen = base.bias is None and not base.weight.requires_grad
    return is_frozen and type(base) in (Linear4bit, nn.Linear)


def _attention(block, qkv, out, plain, hidden_states, position_embeddings, **kwargs):
    qkv, out, real = qkv.adapter(), out.adapter(), kwargs.get("real")
    if real is None or qkv is None or out is None:
        return plain(hidden_states, position_embeddings, **kwargs)
    x, place, shape = _linear(qkv, hidden_states[0]), kwargs["place"], kwargs["shape"]
    query, key, value = Heads.apply(x, *position_embeddings, real, place, shape, block)
    # No token attends to the padding, which comes after the tokens of a row.
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=block.scaling)
    return _linear(out, take(attended, real))[None], None


def _mlp(block, pair, down, plain, x):
    pair, down = pair.adapter(), down.adapter()
    if pair is None or down is None:
        return plain(x)
    rows = x.flatten(0, -2)
    if _adds_up(rows, pair, down):
        gate, up = (rows @ weight.T for weight in pair.tuned().split(pair.group.sizes))
        return (silu(gate, inplace=True).mul_(up) @ down.tuned().T).view_as(x)
    return SwiGlu.apply(pair, down, rows, *pair.parameters, *down.parameters).view_as(x)


def _linear(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    if _adds_up(x, adapter):
        return x @ adapter.tuned().T
    return Linear.apply(adapter, x, *adapter.parameters)


def _adds_up(x: torch.Tensor, *adapters: Adapter) -> bool:
    # B A is added to the weights where that is less work; half precision would round the sum.
    if torch.is_grad_enabled() or x.dtype != torch.float32 or len(x) <= x.shape[1]:
        return False
    return not any(adapter.rate for adapter in adapters)


def _last_layer(layer, plain, hidden_states, ends=None, **kwargs):
    """Run the MLP for the last token of each row alone: without gradients no other is read."""
    if ends is None or torch.is_grad_enabled():
        return plain(hidden_states, ends=ends, **kwargs)
    states = layer.input_layernorm(hidden_states)
    attended, _ = layer.self_attn(hidden_states=states, ends=ends, **kwargs)
    last = hidden_states[:, ends] + attended[:, ends]
    return hidden_states.index_copy(1, ends, last + layer.mlp(layer.post_attention_layernorm(last)))
