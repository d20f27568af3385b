"""Dropout's masks: a hash of integers says what is kept, the same on every device."""

from functools import cache

import torch


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return an int32 hash of int32 numbers: a multiply-xorshift finaliser."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)


def keep_mask(x: torch.Tensor, rate: float, keys: torch.Tensor) -> torch.Tensor:
    """Return 1 where an element of x (tokens, width) is kept and 0 where it is dropped, in its
    dtype. It is a function of its token's key (int32) and its column alone, on every device."""
    mask, columns = torch.empty_like(x), _hashed_columns(x.shape[1], x.device)
    # slices that stay in a CPU's cache
    size = len(x) if x.is_cuda else max(1, 2**16 // x.shape[1])
    for part, token in zip(mask.split(size), keys.split(size), strict=True):
        hashed = (token[:, None] ^ columns).mul_(0x7FEB352D)
        hashed ^= hashed >> 15
        torch.ge(hashed.mul_(-0x7B935975), threshold(rate), out=part)
    return mask


@cache
def _hashed_columns(width: int, device: torch.device) -> torch.Tensor:
    return mix(torch.arange(width, dtype=torch.int32, device=device))


def threshold(rate: float) -> int:
    """Return what an int32 hash must reach for its element to be kept."""
    return 2 * round(rate * 2**31) - 2**31
