"""The elementwise passes between a decoder layer's products: each one kernel on a GPU, plain PyTorch elsewhere."""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch.nn.functional import silu

_failure = None  # why compiling or running a compiled pass failed in this process


def _one_pass(dynamic: bool | None) -> Callable:
    """Return a decorator that compiles a function of tensors to one kernel on a GPU.

    `dynamic` is True to compile once for all shapes and numbers. It is None to compile once for
    all lengths of the tensors' first dimension, while the other dimensions and the numbers are
    constants. Elsewhere, and once a compilation has failed, the function runs as it stands.
    """

    def decorate(function):
        known = set()  # the kinds of arguments that were seen

        @cache
        def compiled():
            if len(os.sched_getaffinity(0)) <= 2:
                # Worker processes would take both cores from the process that waits for them.
                torch._inductor.config.compile_threads = 1
            return torch.compile(function, dynamic=dynamic)

        @wraps(function)
        def call(*args):
            if _failure or not _compiles(args[0]):
                return function(*args)
            if dynamic is None:
                _free_lengths(args, known)
            try:
                return compiled()(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of Dynamo, Inductor, Triton or the driver
                _fall_back(error)
                return function(*args)

        return call

    return decorate


def _free_lengths(args: tuple, known: set) -> None:
    """Have the compiler take the tensors' lengths as variables of their own, if it has not compiled
    this kind of arguments yet: lengths that are equal now may differ later."""
    kind = tuple((x.dtype, x.shape[1:]) if torch.is_tensor(x) else x for x in args)
    if kind in known:
        return
    known.add(kind)
    for tensor in filter(torch.is_tensor, args):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _compiles(x: torch.Tensor) -> bool:
    """Return whether passes over `x` are compiled. A single token is not worth a kernel of its own,
    which it would get: the compiler makes a constant of a length of 1."""
    return x.is_cuda and len(x) > 1 and _has_triton()


def _fall_back(error: Exception) -> None:
    """Use the plain functions from now on, and say so in one line."""
    global _failure
    _failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    print(
        f"The fused kernels cannot be compiled here ({_failure}). Plain PyTorch functions are "
        "used instead: the results are the same, a step takes longer."
    )


def keep_mask(x, rate, keys) -> torch.Tensor:
    """1 where an element of `x` (tokens, width) is kept, 0 where it is dropped, in its dtype: a function of its token's key, an int32,
    and its column alone, the same on every device."""
    rate = round(rate * 2**31)
    if x.is_cuda:  # arithmetic alone, in the kernel that applies the mask: no memory traffic
        # The compiler may compute in 64 bits, where nothing overflows: the lower 32 bits of each
        # product count, and a shift has to bring down their sign.
        hashed = (keys[:, None] ^ _columns(x.shape[1], x.device)) * 0x7FEB352D
        shifted = (hashed >> 15 & 0x1FFFF) - (hashed >> 14 & 0x20000)
        hashed = (hashed ^ shifted) * -0x7B935975
        return ((hashed >> 1 & 0x7FFFFFFF ^ 0x40000000) >= rate).to(x.dtype)
    mask, columns = torch.empty_like(x), _columns_kept(x.shape[1])
    size = max(1, 2**16 // x.shape[1])  # of slices that stay in the cache
    for part, token in zip(mask.split(size), keys.split(size), strict=True):
        hashed = (token[:, None] ^ columns).mul_(0x7FEB352D)
        hashed ^= hashed >> 15
        torch.ge(hashed.mul_(-0x7B935975), 2 * rate - 2**31, out=part)  # the same, in 32 bits
    return mask


def mix(x) -> torch.Tensor:
    """An int32 hash: a multiply-xorshift finaliser."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)


def _columns(width, device) -> torch.Tensor:
    return mix(torch.arange(width, dtype=torch.int32, device=device))


@cache
def _columns_kept(width) -> torch.Tensor:
    return _columns(width, "cpu")


@_one_pass(dynamic=True)
def _dropped(x, rate, keys):
    return x * keep_mask(x, rate, keys)


def drop(x, rate, keys):
    """x (tokens, width) where it is kept, not scaled up; x itself if nothing is dropped."""
    return _dropped(x, rate, keys) if rate else x


@_one_pass(dynamic=True)
def _drop_gradients(grad, low, x, rate, keys):
    keep = keep_mask(x, rate, keys)
    return torch.addcmul(grad, low, keep), x * keep


def drop_backward(grad, low, x, rate, keys):
    """The gradient of x from that of the frozen product and that of the dropped x, and the dropped x."""
    return _drop_gradients(grad, low, x, rate, keys) if rate else (grad.add_(low), x)


@_one_pass(dynamic=True)
def swiglu(gate, up, rate, keys):
    """silu(gate) * up, and the same where it is kept."""
    hidden = silu(gate) * up
    return hidden, hidden * keep_mask(gate, rate, keys) if rate else hidden


@_one_pass(dynamic=True)
def swiglu_backward(grad, low, gate, up, rate, keys):
    """The gradients of gate and up from that of the frozen product and that of what was kept; and what was kept."""
    keep = keep_mask(gate, rate, keys) if rate else None
    grad = grad + low if keep is None else torch.addcmul(grad, low, keep)
    sigmoid = gate.sigmoid()
    activated = gate * sigmoid
    hidden = activated * up
    return (
        grad * up * (sigmoid + activated * (1 - sigmoid)),
        grad * activated,
        hidden if keep is None else hidden * keep,
    )


def _rotate(x, cos, sin):
    """x, its two halves as the coordinates of points turned by the angles of `cos` and `sin`; -sin turns them back."""
    half = x.shape[-1] // 2
    sign = torch.where(torch.arange(x.shape[-1], device=x.device) < half, -1, 1).to(x.dtype)
    return x * cos[:, None] + x.roll(half, -1) * (sin * sign)[:, None]


@_one_pass(dynamic=None)
def heads(qkv, cos, sin, place, size, groups):
    """Query, key and value (places, heads, size) of the tokens that `place` names, rotated by `cos` and `sin` (tokens, size) of their
    positions, from qkv (tokens, all heads' outputs); keys and values are repeated for the `groups` queries that share them."""
    qkv, cos, sin = qkv.view(len(qkv), -1, size)[place], cos[place], sin[place]
    n = qkv.shape[1] // (groups + 2)
    query, key, value = qkv.split([groups * n, n, n], 1)
    return (
        _rotate(query, cos, sin),
        _rotate(key, cos, sin).repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
    )


@_one_pass(dynamic=None)
def heads_backward(query, key, value, cos, sin, real, groups):
    """The gradient of qkv from those of `heads`, of the tokens at the places `real`."""
    # a sum of slices: as a reduction it becomes a kernel of its own, ten times slower
    key, value = (sum(x[real].unflatten(1, (-1, groups)).unbind(2)) for x in (key, value))
    return torch.cat((_rotate(query[real], cos, -sin), _rotate(key, cos, -sin), value), 1).flatten(
        1
    )
