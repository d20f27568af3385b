"""Products with LoRA, the MLP and the heads of a decoder layer, each with its own backward pass.

The `parameters` of the adapters are arguments only for autograd to bring their gradients.
"""

import torch

from qlora_helpers.fast import kernels


class Linear(torch.autograd.Function):
    """x (tokens, inputs) to (tokens, outputs of the group), with LoRA (arXiv:2106.09685)."""

    @staticmethod
    def forward(ctx, adapter, x, *parameters):
        keys, (a, b) = adapter.keys(x), adapter.matrices(x.dtype)
        inner = kernels.drop(x, adapter.rate, keys) @ a.T
        ctx.save_for_backward(x, inner, a, b)
        ctx.choices = adapter, keys
        return (inner @ b.T).addmm_(x, adapter.group.frozen(x.dtype).T)

    @staticmethod
    def backward(ctx, grad):
        (adapter, keys), (x, inner, a, b) = ctx.choices, ctx.saved_tensors
        grads_b = (grad.T @ inner).split(adapter.group.sizes)
        inner = grad @ b
        grad_x = grad @ adapter.group.frozen(x.dtype)
        grad_x, kept = kernels.drop_backward(grad_x, inner @ a, x, adapter.rate, keys)
        return None, grad_x, *adapter.gradients(inner.T @ kept, grads_b)


class SwiGlu(torch.autograd.Function):
    """x (tokens, inputs) to down(silu(gate(x)) * up(x)) (arXiv:2002.05202), all three with LoRA.

    `pair` is the adapter of gate and up. They have a product each: the halves of a common one would
    not be contiguous, and every pass over them would be slower.
    """

    @staticmethod
    def forward(ctx, pair, down, x, *parameters):
        keys, down_keys = pair.keys(x), down.keys(x)
        (a, b), (down_a, down_b) = pair.matrices(x.dtype), down.matrices(x.dtype)
        inner = kernels.drop(x, pair.rate, keys) @ a.T
        gate_w, up_w = pair.group.frozen(x.dtype).split(pair.group.sizes)
        gate_b, up_b = b.split(pair.group.sizes)
        gate, up = (inner @ gate_b.T).addmm_(x, gate_w.T), (inner @ up_b.T).addmm_(x, up_w.T)
        hidden, kept = kernels.swiglu(gate, up, down.rate, down_keys)
        down_inner = kept @ down_a.T
        ctx.save_for_backward(x, gate, up, inner, a, b, down_inner, down_a, down_b)
        ctx.choices = pair, down, keys, down_keys
        return (down_inner @ down_b.T).addmm_(hidden, down.group.frozen(x.dtype).T)

    @staticmethod
    def backward(ctx, grad):
        pair, down, keys, down_keys = ctx.choices
        x, gate, up, inner, a, b, down_inner, down_a, down_b = ctx.saved_tensors
        grads_down_b = [grad.T @ down_inner]
        down_inner = grad @ down_b
        grad_gate, grad_up, kept = kernels.swiglu_backward(
            grad @ down.group.frozen(x.dtype), down_inner @ down_a, gate, up, down.rate, down_keys
        )
        of_down = down.gradients(down_inner.T @ kept, grads_down_b)
        del kept
        grads_b = [grad_gate.T @ inner, grad_up.T @ inner]
        gate_w, up_w = pair.group.frozen(x.dtype).split(pair.group.sizes)
        gate_b, up_b = b.split(pair.group.sizes)
        inner = (grad_gate @ gate_b).addmm_(grad_up, up_b)
        grad_x = (grad_gate @ gate_w).addmm_(grad_up, up_w)
        grad_x, kept = kernels.drop_backward(grad_x, inner @ a, x, pair.rate, keys)
        return None, None, grad_x, *pair.gradients(inner.T @ kept, grads_b), *of_down


class Heads(torch.autograd.Function):
    """qkv (tokens, outputs of q, k and v) to query, key and value (rows, heads, width, size) each.

    Query and key are rotated by their positions (arXiv:2104.09864), keys and values repeated for
    the queries that share them. Padding holds some token's values, which none before it attends to.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, real, place, shape, block):
        ctx.save_for_backward(cos, sin, real)
        ctx.size, ctx.groups = block.head_dim, block.num_key_value_groups
        heads = kernels.heads(qkv, cos[0], sin[0], place, ctx.size, ctx.groups)
        return tuple(head.view(*shape, -1, ctx.size).transpose(1, 2) for head in heads)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, real = ctx.saved_tensors
        grads = [grad.transpose(1, 2).flatten(0, 1) for grad in grads]
        grad = kernels.heads_backward(*grads, cos[0], sin[0], real, ctx.groups)
        return grad, None, None, None, None, None, None
