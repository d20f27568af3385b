"""Batches without padding: the real tokens of all rows one after another, padded only where a row's tokens meet, in attention."""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "packed_causal"  # Transformers knows no mask of this name and builds none


def pack(encoded: Sequence[Sequence[int]], device: torch.device) -> dict:
    """A decoder's arguments for rows of token ids: (1, tokens) `input_ids` and `position_ids`; `real`, where the tokens stand in the
    flattened (rows, width) `shape`; `place`, which token stands at each place of it (the first one, where none does); and `ends`,
    each row's last token."""
    lengths = torch.tensor([len(row) for row in encoded])
    inside = (torch.arange(int(lengths.max())) < lengths[:, None]).flatten()
    real = inside.nonzero().flatten()
    tensors = {
        "input_ids": torch.cat([torch.as_tensor(row) for row in encoded])[None],
        "position_ids": (real % int(lengths.max()))[None],
        "real": real,
        "place": (inside.cumsum(0) - 1) * inside,
        "ends": lengths.cumsum(0) - 1,
    }
    return {name: x.to(device) for name, x in tensors.items()} | {
        "shape": (len(encoded), int(lengths.max()))
    }


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let `model` run batches that `pack` made. A batch that is not packed must not be padded from here on."""
    AttentionInterface.register(_NAME, _packed_causal)
    model.set_attn_implementation(_NAME)


def _packed_causal(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    real=None,
    place=None,
    shape=None,
    softcap=None,
    s_aux=None,
    **_,
):
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("its attention has a softcap or sinks")
    # Padding follows a row's tokens and none of them looks ahead: no mask is needed, and attention without one is the fastest.
    if real is not None:
        query, key, value = (
            x[0].transpose(0, 1)[place].view(*shape, -1, x.shape[-1]).transpose(1, 2)
            for x in (query, key, value)
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # enable_gqa without FlashAttention would fall to the slow math kernel on a T4
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    attended = scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scaling
    )
    return (
        attended.transpose(1, 2)
        if real is None
        else take(attended, real).unflatten(1, (query.shape[1], -1))[None]
    ), None


def take(attended: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(tokens, heads * size): what stands at the real tokens of (rows, heads, width, size)."""
    return _Take.apply(attended, real)


class _Take(
    torch.autograd.Function
):  # indexing's own gradient adds up by sorting or atomics; here each place is written once
    @staticmethod
    def forward(ctx, x, real):
        ctx.save_for_backward(real)
        ctx.shape = x.shape
        return x.transpose(1, 2).flatten(0, 1)[real].flatten(1)

    @staticmethod
    def backward(ctx, grad):
        rows, heads, width, size = ctx.shape
        whole = grad.new_zeros(rows * width, heads, size).index_copy_(
            0, ctx.saved_tensors[0], grad.view(-1, heads, size)
        )
        return whole.view(rows, width, heads, size).transpose(1, 2), None
