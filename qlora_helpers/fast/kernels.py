"""The elementwise passes between a decoder layer's products: plain PyTorch, and on a GPU one Triton
kernel each (see `triton_kernels`)."""

from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch.nn.functional import silu

_failure = None  # why a Triton kernel could not be compiled or run in this process


def _kernel(plain: Callable) -> Callable:
    """Return `plain` with the Triton kernel of its name in its place on a GPU.

    Once a kernel has failed to compile or to run, the plain functions serve, and a line says so.
    """

    @wraps(plain)
    def call(*args):
        if not _failure and _compiles(args[0]):
            try:
                return _run(plain.__name__, *args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of Triton, its assembler or the driver
                _fall_back(error)
        return plain(*args)

    return call


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _compiles(x: torch.Tensor) -> bool:
    return x.is_cuda and _has_triton()


def _run(name: str, *args):
    from qlora_helpers.fast import triton_kernels

    return getattr(triton_kernels, name)(*args)


def _fall_back(error: Exception) -> None:
    global _failure
    _failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    print(
        f"The Triton kernels could not be compiled or run here ({_failure}). Plain PyTorch "
        "functions are used instead: the results are the same, a step takes longer."
    )


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


@_kernel
def drop(x, rate, keys):
    """Return x (tokens, width) with zeros where it is dropped; what is kept is not scaled up."""
    return x * keep_mask(x, rate, keys) if rate else x


@_kernel
def drop_backward(grad, low, x, rate, keys):
    """Return the gradient of x, from `grad` of the frozen product (overwritten) and `low` of the
    dropped x, and the dropped x."""
    if not rate:
        return grad.add_(low), x
    keep = keep_mask(x, rate, keys)
    return grad.addcmul_(low, keep), x * keep


@_kernel
def swiglu(gate, up, rate, keys):
    """Return silu(gate) * up (tokens, width), and the same with zeros where it is dropped."""
    hidden = silu(gate) * up
    return hidden, hidden * keep_mask(gate, rate, keys) if rate else hidden


@_kernel
def swiglu_backward(grad, low, gate, up, rate, keys):
    """Return the gradients of gate and up, from `grad` of the frozen product (overwritten) and
    `low` of the dropped input, and the dropped input."""
    keep = keep_mask(gate, rate, keys) if rate else None
    grad = grad.add_(low) if keep is None else grad.addcmul_(low, keep)
    sigmoid = gate.sigmoid()
    activated = gate * sigmoid
    hidden = activated * up
    grad_gate = grad * up * (sigmoid + activated * (1 - sigmoid))
    return grad_gate, grad.mul_(activated), hidden if keep is None else hidden * keep


def _turn(x, cos, sin):
    """Return x (tokens, heads, size), whose halves are the coordinates of points, turned by the
    angles of cos and sin (tokens, size); -sin turns back (arXiv:2104.09864)."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


@_kernel
def heads(qkv, cos, sin, place, size, groups):
    """Return query, key and value (places, heads, size) of the tokens that `place` (places,) names.

    Queries and keys are turned by cos and sin (tokens, size) of their positions; keys and values
    are repeated for the `groups` queries that share them. qkv is (tokens, all heads' outputs).
    """
    qkv, cos, sin = qkv.view(len(qkv), -1, size)[place], cos[place], sin[place]
    n = qkv.shape[1] // (groups + 2)
    query, key, value = qkv.split([groups * n, n, n], 1)
    key = _turn(key, cos, sin).repeat_interleave(groups, 1)
    return _turn(query, cos, sin), key, value.repeat_interleave(groups, 1)


@_kernel
def heads_backward(query, key, value, cos, sin, real, groups):
    """Return the gradient of qkv from those of what `heads` returned; token t is at `real[t]`."""
    key, value = (x[real].unflatten(1, (-1, groups)).sum(2) for x in (key, value))
    turned = _turn(query[real], cos, -sin), _turn(key, cos, -sin)
    return torch.cat((*turned, value), 1).flatten(1)
