"""Decoder layers with LoRA in fewer and leaner passes: PEFT's values and gradients, sooner and in less memory."""

from functools import partial

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from qlora_helpers.fast.dropout import use_row_dropout
from qlora_helpers.fast.functions import Heads, Linear, SwiGlu
from qlora_helpers.fast.groups import Group
from qlora_helpers.fast.packing import take

_FAMILIES = ("Llama", "Mistral")  # whose attention and MLP compute what is computed here


def fuse_lora(model: PeftModel) -> PeftModel:
    """`model`, patched in place: the attention and the MLP of a Llama or Mistral run packed batches with LoRA in few passes.

    Each dropout becomes a `RowDropout`, in a model of any family. Layers that read the same input (q, k, v; gate, up) share its mask: still
    dropout on each layer's input. It is drawn again in backward. Only inputs and rank-r products are kept for
    backward; LoRA products run in the input's dtype, from float32 weights. Without gradients, the last layer's MLP sees each row's
    last token alone, and large batches in float32 add B A to the weights first. An adapter that is switched off has rank 0 here: the base
    model and the tuned model take the same code, and differ by B A alone. Where an adapter is merged or more than plain LoRA beside
    frozen weights, and where a batch is not packed, PEFT's own layers run. Frozen weights become views of one matrix a group, their
    scales float32 (the same values): move or deep-copy a model before, not after.
    """
    use_row_dropout(model)
    for block in list(model.modules()):
        block.__dict__.pop(
            "forward", None
        )  # of an adapter that was there before: kept, it would hold that one's memory
        kind = type(block).__name__
        if kind in {family + "RMSNorm" for family in _FAMILIES} and block.weight.is_cuda:
            block.forward = partial(
                rms_norm,
                normalized_shape=block.weight.shape,
                weight=block.weight,
                eps=block.variance_epsilon,
            )
        elif kind in {family + "Attention" for family in _FAMILIES}:
            groups = _groups([block.q_proj, block.k_proj, block.v_proj], [block.o_proj])
            if groups:
                block.forward = partial(_attention, block, *groups, block.forward)
        elif kind in {family + "MLP" for family in _FAMILIES} and block.config.hidden_act == "silu":
            groups = _groups([block.gate_proj, block.up_proj], [block.down_proj])
            if groups:
                block.forward = partial(_mlp, *groups, block.forward)
    layers = [
        block
        for block in model.modules()
        if type(block).__name__ in {family + "DecoderLayer" for family in _FAMILIES}
    ]
    if layers and "forward" in vars(layers[-1].mlp):
        layers[-1].forward = partial(
            _last_layer, layers[-1], layers[-1].mlp.forward.args[0], layers[-1].forward
        )
    return model


def _groups(*groups) -> "list[Group] | None":
    for layer in (layer for group in groups for layer in group):
        if not isinstance(layer, LoraLayer) or layer.lora_variant or any(layer.lora_bias.values()):
            return None
        base = layer.base_layer
        packed = getattr(
            getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False
        )  # has no backward
        if (
            packed
            or type(base) not in (Linear4bit, nn.Linear)
            or base.bias is not None
            or base.weight.requires_grad
        ):
            return None
    return [Group(group) for group in groups]


def _attention(
    block,
    qkv,
    out,
    plain,
    hidden_states,
    position_embeddings,
    attention_mask=None,
    *args,
    real=None,
    place=None,
    shape=None,
    **kwargs,
):
    adapters = (qkv.adapter(), out.adapter())
    if real is None or None in adapters:
        return plain(
            hidden_states,
            position_embeddings,
            attention_mask,
            *args,
            real=real,
            place=place,
            shape=shape,
            **kwargs,
        )
    query, key, value = Heads.apply(
        _linear(qkv, adapters[0], hidden_states[0]),
        *position_embeddings,
        real,
        place,
        shape,
        block,
    )
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=block.scaling)
    return _linear(out, adapters[1], take(attended, real))[None], None


def _mlp(pair, down, plain, x):
    adapters = (pair.adapter(), down.adapter())
    if None in adapters or adapters[0].is_off != adapters[1].is_off:
        return plain(x)
    rows = x.flatten(0, -2)
    if _adds_up(rows, *adapters):
        gate, up = (rows @ weight.T for weight in pair.tuned(adapters[0]).split(pair.sizes))
        return (silu(gate, inplace=True).mul_(up) @ down.tuned(adapters[1]).T).view_as(x)
    choices = [
        choice
        for adapter in adapters
        for choice in (adapter.scale, adapter.rate, adapter.keys(rows))
    ]
    parameters = adapters[0].parameters + adapters[1].parameters
    return SwiGlu.apply(pair, down, *choices, rows, *parameters).view_as(x)


def _linear(group, adapter, x):
    if _adds_up(x, adapter):
        return x @ group.tuned(adapter).T
    return Linear.apply(group, adapter.scale, adapter.rate, adapter.keys(x), x, *adapter.parameters)


def _adds_up(x, *adapters) -> bool:
    """Whether weights and B A are added up before the product with x: less work where tokens outnumber inputs and nothing is kept for
    backward, but half precision would round the sum."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and len(x) > x.shape[1]
        and not any(adapter.rate for adapter in adapters)
    )


def _last_layer(layer, pair, plain, hidden_states, ends=None, **kwargs):
    """`plain`, its MLP for the last token of each row alone: without gradients nothing reads the others."""
    if ends is None or torch.is_grad_enabled() or not pair.adapter():
        return plain(hidden_states, ends=ends, **kwargs)
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states), ends=ends, **kwargs
    )
    last = hidden_states[:, ends] + attended[:, ends]
    return hidden_states.index_copy(1, ends, last + layer.mlp(layer.post_attention_layernorm(last)))
