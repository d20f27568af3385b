"""Products with LoRA, the MLP and the heads of a decoder layer, each with a backward pass of its own."""

import torch
from torch.autograd.function import once_differentiable

from qlora_helpers.fast import kernels


class Linear(torch.autograd.Function):
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


class SwiGlu(torch.autograd.Function):
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


class Heads(torch.autograd.Function):
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
