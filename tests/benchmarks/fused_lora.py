"""LoRA in fewer, leaner passes: layers that share an input run as one product and keep that input and a rank-r product alone.

A candidate for the package: the notebooks train with PEFT's own layers, and bench_training.py measures both.
"""

from functools import cache, partial

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

_GROUPS = ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]


def fuse_lora(model: PeftModel) -> PeftModel:
    """`model`, patched in place: a Llama's or Mistral's LoRA layers give PEFT's values and gradients, sooner and in less memory.

    (q, k, v) and (gate, up) share a dropout mask: still dropout on each layer's input. Masks are drawn again in backward, from a
    seed of the CPU's default generator, which checkpointing replays; a CPU rounds the rate to 1/65536. LoRA products run in the
    input's dtype. Layers that are switched off, merged, called on their own, or not plain LoRA beside frozen weights without bias
    run PEFT's own path. A group's base weights become views of one matrix, and their scales float32 (the same values, 0.05 bytes a
    weight more): move or deep-copy a model before, not after.
    """
    for block in list(model.modules()):
        layers = {name: layer for name, layer in block.named_children() if isinstance(layer, LoraLayer)}
        groups = [[layers[name] for name in names] for names in _GROUPS if layers.keys() >= set(names)]
        if len(groups) != 2 or not all(map(_fusible, groups)):
            continue
        first, last = map(_Group, groups)
        if "SiLU" in type(getattr(block, "act_fn", None)).__name__:
            block.forward = partial(_swiglu, first, last, block.forward)
        elif "o_proj" in layers:
            block.forward = partial(first.around, partial(last.around, block.forward))
            for group in (first, last):
                for i, layer in enumerate(group.layers):
                    layer.forward = partial(group.output, i, layer.forward)
    return model


def _fusible(layers) -> bool:
    bases = [layer.base_layer for layer in layers]
    packed = any(getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False) for base in bases)  # has no backward
    plain = not any(layer.lora_variant or any(layer.lora_bias.values()) for layer in layers)
    return plain and not packed and {type(base) for base in bases} in ({Linear4bit}, {nn.Linear}) and all(
        base.bias is None and not base.weight.requires_grad for base in bases)


def _swiglu(pair, down, plain, x):
    return down(*pair(x))[0] if pair.adapter() and down.adapter() else plain(x)  # silu(gate) * up is computed inside, and again in backward


class _Group:
    """LoRA layers that are given the same input, their frozen weights merged into one matrix (outputs of all, inputs)."""

    def __init__(self, layers):
        self.layers, self.sizes, self.state, self.waiting = layers, [layer.out_features for layer in layers], None, None
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = _merge(weights, [weight.data for weight in weights], "data")
        if isinstance(layers[0].base_layer, Linear4bit):
            states = [weight.quant_state for weight in weights]
            scales = [dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax for s in states]
            scales, shape = _merge(states, scales, "absmax"), torch.Size([sum(self.sizes), states[0].shape[1]])
            for state in states:
                state.nested, state.state2, state.offset = False, None, None
            dtype = layers[0].base_layer.compute_dtype or state.dtype  # a checkpoint quantised elsewhere may say another
            self.state = QuantState(scales, shape, state.code, state.blocksize, state.quant_type, dtype)

    def adapter(self) -> tuple | None:
        """Name, rank, scaling and present dropout rate of the one adapter at work, the same in all layers; None without one."""
        name, *others = self.layers[0].active_adapters or [None]
        found = set()
        for layer in self.layers:
            if others or layer.disable_adapters or layer.merged or layer.active_adapters != [name] or name not in layer.lora_A:
                return None
            dropout = layer.lora_dropout[name]  # an Identity where the rate is zero
            rate = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
            found.add((name, layer.r[name], layer.scaling[name], rate))
        return found.pop() if len(found) == 1 else None

    def around(self, plain, *args, **kwargs):
        """The attention's forward. While it runs, and no longer, the outputs that the first layer's call computed wait for the others'."""
        self.waiting = {}
        try:
            return plain(*args, **kwargs)
        finally:
            self.waiting = None

    def output(self, i, plain, x, *args, **kwargs):
        """Layer `i`'s forward."""
        if i == 0 and self.waiting is not None and self.adapter() and not (args or kwargs):
            self.waiting = {j: (x, y) for j, y in enumerate(self(x))}
        source, y = self.waiting.pop(i, (None, None)) if self.waiting else (None, None)
        return y if source is x else plain(x, *args, **kwargs)

    def __call__(self, x, up=None) -> tuple[torch.Tensor, ...]:
        """Each layer's output (..., outputs) for the input (..., inputs): `x`, or silu(x) * up."""
        name, _, scaling, rate = self.adapter()
        if torch.is_autocast_enabled(x.device.type):
            x, up = (t if t is None else t.to(torch.get_autocast_dtype(t.device.type)) for t in (x, up))
        seed = int(torch.empty((), dtype=torch.int64).random_()) if rate else None
        weights = [getattr(layer, matrix)[name].weight for matrix in ("lora_A", "lora_B") for layer in self.layers]
        return _FusedLora.apply(self, scaling / (1 - rate), rate, seed, x, up, *weights)


def _merge(owners, tensors, attribute) -> torch.Tensor:
    whole = torch.cat(tensors)
    for owner, part in zip(owners, whole.split([len(tensor) for tensor in tensors]), strict=True):
        setattr(owner, attribute, part)
    return whole


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, scale, rate, seed, x, up, *weights):
        n = len(group.layers)
        source = (x if up is None else silu(x).mul_(up)).flatten(0, -2)  # (tokens, inputs)
        kept = source if seed is None else _mask(source, rate, seed).mul_(source)
        a = torch.cat(weights[:n]).mul_(scale).to(x.dtype)  # (n r, inputs)
        b = torch.block_diag(*weights[n:]).to(x.dtype)  # (outputs of all, n r)
        inner = kept @ a.T
        y = (matmul_4bit(source, group.weight, group.state) if group.state else linear(source, group.weight)).addmm_(inner, b.T)
        ctx.save_for_backward(x, up, inner, a, b)
        ctx.settings = group, scale, rate, seed, weights[0].dtype
        return y.view(*x.shape[:-1], -1).split(group.sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        group, scale, rate, seed, master = ctx.settings
        x, up, inner, a, b = ctx.saved_tensors
        n, grad_x, grad_up = len(grads), None, None
        grad = (torch.cat(grads, -1) if n > 1 else grads[0]).flatten(0, -2)
        source = (x if up is None else silu(x).mul_(up)).flatten(0, -2)
        mask = None if seed is None else _mask(source, rate, seed)
        grads_b = [rows.chunk(n, 1)[i].to(master) for i, rows in enumerate((grad.T @ inner).split(group.sizes))]
        inner = grad @ b
        grads_a = (inner.T @ (source if mask is None else source * mask)).to(master).mul_(scale).chunk(n)
        if ctx.needs_input_grad[4]:
            grad_x = grad @ (dequantize_4bit(group.weight, group.state) if group.state else group.weight).to(x.dtype)
            grad_x = (grad_x.addmm_(inner, a) if mask is None else grad_x.addcmul_(inner @ a, mask)).view_as(x)
        if up is not None:
            grad_up = silu(x).mul_(grad_x)
            grad_x = torch.ops.aten.silu_backward(grad_x.mul_(up), x)
        return None, None, None, None, grad_x, grad_up, *grads_a, *grads_b


_generator = cache(torch.Generator)


def _mask(x, rate, seed) -> torch.Tensor:
    """1 where an element of `x` is kept, 0 where it is dropped, in its shape and dtype: a function of the seed alone."""
    out, generator = torch.empty(x.shape, dtype=x.dtype, device=x.device), _generator(x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return out.bernoulli_(1 - rate, generator=generator)
    # a draw of 64 bits serves four elements: one draw each took a fifth of a training step
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None, generator=generator).view(torch.int16)
    return torch.ge(bits[:x.numel()].view(x.shape), round(rate * 65536) - 32768, out=out)
