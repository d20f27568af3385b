"""Batches without padding: the tokens of all rows one after another, padded in attention alone."""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "packed_causal"  # Transformers knows no mask of this name and builds none


def pack(encoded: Sequence[Sequence[int]], device: torch.device) -> dict:
    """Return a decoder's arguments for rows of token ids as one packed batch.

    `input_ids` and `position_ids` are (1, tokens). `shape` is (rows, width), the padded batch that
    attention sees. `real` (tokens,) gives each token's index in the flattened `shape`, `place`
    (rows * width,) the token at each index (some token, for padding), and `ends` (rows,) each row's
    last token.
    """
    lengths = torch.tensor([len(row) for row in encoded])
    width = int(lengths.max())
    inside = (torch.arange(width) < lengths[:, None]).flatten()
    real = inside.nonzero().flatten()
    tensors = {
        "input_ids": torch.cat([torch.as_tensor(row) for row in encoded])[None],
        "position_ids": (real % width)[None],
        "real": real,
        "place": (inside.cumsum(0) - 1) * inside,
        "ends": lengths.cumsum(0) - 1,
    }
    packed = {name: tensor.to(device) for name, tensor in tensors.items()}
    return packed | {"shape": (len(encoded), width)}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let `model` run batches of `pack`. Masks of padding have no effect then."""
    AttentionInterface.register(_NAME, _packed_causal)
    model.set_attn_implementation(_NAME)


def _packed_causal(
    module, query, key, value, mask, scaling=None, real=None, place=None, shape=None, **others
):
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise NotImplementedError("its attention has a softcap or sinks")
    if real is not None:
        query, key, value = (
            x[0].transpose(0, 1)[place].view(*shape, -1, x.shape[-1]).transpose(1, 2)
            for x in (query, key, value)
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # enable_gqa without FlashAttention would fall to the slow math kernel on a T4
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Padding follows a row's tokens, and none of them looks ahead: no mask is needed, which is
    # the fastest.
    causal = query.shape[2] > 1
    attended = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
    if real is None:
        return attended.transpose(1, 2), None
    return take(attended, real).unflatten(1, (query.shape[1], -1))[None], None


def take(attended: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the real tokens (tokens, heads * size) of `attended` (rows, heads, width, size)."""
    return _Take.apply(attended, real)


class _Take(torch.autograd.Function):
    """Indexing whose gradient writes each place once: PyTorch's own sorts or adds atomically."""

    @staticmethod
    def forward(ctx, x, real):
        ctx.shape, ctx.real = x.shape, real
        return x.transpose(1, 2).flatten(0, 1)[real].flatten(1)

    @staticmethod
    def backward(ctx, grad):
        rows, heads, width, size = ctx.shape
        padded = grad.new_zeros(rows * width, heads, size)
        padded.index_copy_(0, ctx.real, grad.view(-1, heads, size))
        return padded.view(rows, width, heads, size).transpose(1, 2), None
