"""Decoder layers with LoRA in fewer and leaner passes: PEFT's values and gradients, sooner and in less memory."""

from functools import partial
from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from qlora_helpers.fast import kernels
from qlora_helpers.fast.dropout import RowDropout, use_row_dropout
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


def _groups(*groups) -> "list[_Group] | None":
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
    return [_Group(group) for group in groups]


class _Adapter(NamedTuple):
    """The adapter of a group's layers in one pass."""

    scale: float  # of A's product; what dropout keeps is scaled up here
    rate: float  # of dropout; 0 outside training
    parameters: list[nn.Parameter]  # each layer's A (r, inputs), then each layer's B (outputs, r)
    dropout: nn.Module | None

    @property
    def is_off(self) -> bool:
        """Whether it is switched off: it has rank 0 then."""
        return not self.parameters

    def keys(self, x) -> torch.Tensor | None:
        """Return the keys from which the mask of x (tokens, inputs) is drawn; None without dropout."""
        return self.dropout.keys(x) if self.rate else None


def _rate(dropout: nn.Module) -> float | None:
    """Return the present rate of a layer's dropout; None for one that is newer than `fuse_lora`."""
    if type(dropout) is nn.Dropout:
        return None
    # It is an Identity where the rate is zero.
    return dropout.p if isinstance(dropout, RowDropout) and dropout.training else 0.0


class _Group:
    """LoRA layers that read the same input, their frozen weights merged into one matrix (outputs of all, inputs)."""

    def __init__(self, layers):
        self.layers, self.sizes, self.state = layers, [layer.out_features for layer in layers], None
        for layer in layers:  # they share their mask, in PEFT's own path too
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, RowDropout):
                    dropout.number = layers[0].lora_dropout[name].number
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = _merge(weights, [weight.data for weight in weights], "data")
        if isinstance(layers[0].base_layer, Linear4bit):
            states = [weight.quant_state for weight in weights]
            scales = [
                dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax
                for s in states
            ]
            scales, shape = (
                _merge(states, scales, "absmax"),
                torch.Size([sum(self.sizes), states[0].shape[1]]),
            )
            for state in states:
                state.nested, state.state2, state.offset = False, None, None
            dtype = (
                layers[0].base_layer.compute_dtype or state.dtype
            )  # a checkpoint quantised elsewhere may say another
            self.state = QuantState(
                scales, shape, state.code, state.blocksize, state.quant_type, dtype
            )

    def adapter(self) -> "_Adapter | None":
        """Return the one adapter, the same in all layers, as it is now; None where there is no such adapter."""
        layers, first = self.layers, self.layers[0]
        if any(layer.merged for layer in layers):
            return None
        if all(layer.disable_adapters for layer in layers):
            return _Adapter(0.0, 0.0, [], None)
        active = first.active_adapters
        if len(active) != 1 or any(layer.disable_adapters for layer in layers):
            return None
        name = active[0]
        for layer in layers:
            if layer.active_adapters != active or name not in layer.lora_A:
                return None
        kinds = {(layer.r[name], layer.scaling[name]) for layer in layers}
        rates = {_rate(layer.lora_dropout[name]) for layer in layers}
        if len(kinds) > 1 or len(rates) > 1 or None in rates:
            return None
        parameters = [layer.lora_A[name].weight for layer in layers]
        parameters += [layer.lora_B[name].weight for layer in layers]
        rate = rates.pop()
        return _Adapter(
            first.scaling[name] / (1 - rate), rate, parameters, first.lora_dropout[name]
        )

    def frozen(self, dtype) -> torch.Tensor:
        """(outputs of all, inputs)"""
        return (dequantize_4bit(self.weight, self.state) if self.state else self.weight).to(dtype)

    def tuned(self, adapter: "_Adapter") -> torch.Tensor:
        """(outputs of all, inputs) in float32: the frozen weights and each layer's scaled B A added up, to read only."""
        weight, matrices, n = self.frozen(torch.float32), adapter.parameters, len(self.layers)
        if not matrices:
            return weight
        if not self.state:
            weight = weight.clone()
        for rows, a, b in zip(weight.split(self.sizes), matrices[:n], matrices[n:], strict=True):
            rows.addmm_(b, a, alpha=adapter.scale)
        return weight

    def adapted(self, parameters, scale, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n r, inputs) times `scale`, and B (outputs of all, n r), block-diagonal."""
        n = len(self.layers)
        if (
            not parameters
        ):  # rank 0: its product is a matrix of zeros, to which the frozen product is added as ever
            empty = torch.empty(0, device=self.weight.device, dtype=dtype)
            return empty.view(0, self.layers[0].in_features), empty.view(sum(self.sizes), 0)
        return torch.cat(parameters[:n]).mul_(scale).to(dtype), torch.block_diag(
            *parameters[n:]
        ).to(dtype)

    def gradients(self, grad_a, grads_b, scale) -> list[torch.Tensor]:
        """Of `parameters`, in float32, from those of A (n r, inputs) and of each layer's rows of B (outputs, n r)."""
        n = len(self.layers)
        if not len(grad_a):
            return []
        return [
            *grad_a.float().mul_(scale).chunk(n),
            *(grad.chunk(n, 1)[i].float() for i, grad in enumerate(grads_b)),
        ]


def _merge(owners, tensors, attribute) -> torch.Tensor:
    whole = torch.cat(tensors)
    for owner, part in zip(owners, whole.split([len(tensor) for tensor in tensors]), strict=True):
        setattr(owner, attribute, part)
    return whole


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
    query, key, value = _Heads.apply(
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
    return _SwiGlu.apply(pair, down, *choices, rows, *parameters).view_as(x)


def _linear(group, adapter, x):
    if _adds_up(x, adapter):
        return x @ group.tuned(adapter).T
    return _Linear.apply(
        group, adapter.scale, adapter.rate, adapter.keys(x), x, *adapter.parameters
    )


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


class _Linear(torch.autograd.Function):
    """(tokens, inputs) to (tokens, outputs of all)"""

    @staticmethod
    def forward(ctx, group, scale, rate, keys, x, *parameters):
        a, b = group.adapted(parameters, scale, x.dtype)
        inner = kernels.drop(x, rate, keys) @ a.T
        ctx.save_for_backward(x, inner, a, b)
        ctx.choices = group, scale, rate, keys
        return (inner @ b.T).addmm_(x, group.frozen(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (group, scale, rate, keys), (x, inner, a, b) = ctx.choices, ctx.saved_tensors
        grads_b = (grad.T @ inner).split(group.sizes)
        inner = grad @ b
        grad_x, kept = kernels.drop_backward(grad @ group.frozen(x.dtype), inner @ a, x, rate, keys)
        return None, None, None, None, grad_x, *group.gradients(inner.T @ kept, grads_b, scale)


class _SwiGlu(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) for x (tokens, inputs)"""

    @staticmethod
    def forward(
        ctx, pair, down, scale, rate, keys, down_scale, down_rate, down_keys, x, *parameters
    ):
        (a, b), (down_a, down_b) = (
            pair.adapted(parameters[:4], scale, x.dtype),
            down.adapted(parameters[4:], down_scale, x.dtype),
        )
        inner = kernels.drop(x, rate, keys) @ a.T
        # one product each: the halves of a common one would not be contiguous, and every pass over them slower
        gate, up = (
            (inner @ rows.T).addmm_(x, weight.T)
            for rows, weight in zip(
                b.split(pair.sizes), pair.frozen(x.dtype).split(pair.sizes), strict=True
            )
        )
        hidden, kept = kernels.swiglu(gate, up, down_rate, down_keys)
        down_inner = kept @ down_a.T
        ctx.save_for_backward(x, gate, up, inner, a, b, down_inner, down_a, down_b)
        ctx.choices = pair, down, scale, rate, keys, down_scale, down_rate, down_keys
        return (down_inner @ down_b.T).addmm_(hidden, down.frozen(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pair, down, scale, rate, keys, down_scale, down_rate, down_keys = ctx.choices
        x, gate, up, inner, a, b, down_inner, down_a, down_b = ctx.saved_tensors
        grads_down_b = [grad.T @ down_inner]
        down_inner = grad @ down_b
        grad_gate, grad_up, kept = kernels.swiglu_backward(
            grad @ down.frozen(x.dtype), down_inner @ down_a, gate, up, down_rate, down_keys
        )
        of_down = down.gradients(down_inner.T @ kept, grads_down_b, down_scale)
        del kept
        grads_b = [grad_gate.T @ inner, grad_up.T @ inner]
        (gate_b, up_b), (gate_weight, up_weight) = (
            b.split(pair.sizes),
            pair.frozen(x.dtype).split(pair.sizes),
        )
        inner = (grad_gate @ gate_b).addmm_(grad_up, up_b)
        grad_x, kept = kernels.drop_backward(
            (grad_gate @ gate_weight).addmm_(grad_up, up_weight), inner @ a, x, rate, keys
        )
        return *[None] * 8, grad_x, *pair.gradients(inner.T @ kept, grads_b, scale), *of_down


class _Heads(torch.autograd.Function):
    """Query, key and value (rows, heads, width, size) of a packed batch from (tokens, all heads' outputs): keys and values repeated
    for their queries, queries and keys rotated by their positions (arXiv:2104.09864). Padding holds some token's values, which no
    token before it attends to."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, real, place, shape, block):
        ctx.save_for_backward(cos, sin, real)
        ctx.size, ctx.groups = block.head_dim, block.num_key_value_groups
        made = kernels.heads(qkv, cos[0], sin[0], place, ctx.size, ctx.groups)
        return tuple(head.view(*shape, -1, ctx.size).transpose(1, 2) for head in made)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin, real = ctx.saved_tensors
        grads = [grad.transpose(1, 2).flatten(0, 1) for grad in grads]
        return (
            kernels.heads_backward(*grads, cos[0], sin[0], real, ctx.groups),
            None,
            None,
            None,
            None,
            None,
            None,
        )
