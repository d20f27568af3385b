"""Dropout whose masks belong to the rows of a batch: the same however an effective batch is cut."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from qlora_helpers.fast.kernels import drop, mix

_keys = None  # in `masks_of`: an int32 key for each token of the micro-batch


@contextlib.contextmanager
def masks_of(
    seed: Sequence[int], rows: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Iterator[None]:
    """In this block, let each `RowDropout` draw the masks of a packed batch by its rows.

    Forward and backward both belong into the block: backward draws the masks again. `seed` names
    the optimizer step (numbers from 0), `rows` has a number for each row, unique within the step,
    and `lengths` its number of tokens.
    """
    global _keys
    start = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    lengths = torch.as_tensor(lengths)
    row = torch.as_tensor(rows, dtype=torch.int32).repeat_interleave(lengths)
    place = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    _keys = mix(mix(mix(row) + start) + place).to(device)
    try:
        yield
    finally:
        _keys = None


class RowDropout(nn.Dropout):
    """Dropout on packed tokens (1, tokens, width); in backward the mask is drawn again.

    In `masks_of`, an element's mask depends on the seed, its row, its place there, its column and
    this layer's `number`, and on nothing else. Elsewhere, and for another number of tokens than the
    batch has, it depends on a draw from the CPU's generator.
    """

    def __init__(self, p: float, number: int):
        super().__init__(p)
        self.number = number

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return (tokens,) int32 keys, from which `kernels.keep_mask` draws the mask of `x`."""
        tokens = x.shape[:-1].numel()
        if _keys is not None and len(_keys) == tokens:
            return _keys + self.number * 0x9E3779B9 % 2**31  # far from the keys of other layers
        places = torch.arange(tokens, dtype=torch.int32, device=x.device)
        return mix(places) + int(torch.randint(2**31 - 1, ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Drop.apply(x, self.p, self.keys(x)) if self.training and self.p else x


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rate, keys):
        ctx.rate, ctx.keys = rate, keys
        return drop(x.flatten(0, -2), rate, keys).view_as(x).div_(1 - rate)

    @staticmethod
    def backward(ctx, grad):
        return _Drop.forward(ctx, grad, ctx.rate, ctx.keys), None, None


def use_row_dropout(model: nn.Module) -> None:
    """Replace each dropout of `model`, its own and that of LoRA, by a `RowDropout`."""
    for number, parent in enumerate(list(model.modules())):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and child.p:
                setattr(parent, name, RowDropout(child.p, number).train(child.training))
