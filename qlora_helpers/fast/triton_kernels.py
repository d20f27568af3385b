"""The passes of `kernels`, each as one Triton kernel for a GPU, down to a T4's capability 7.5.

They compute in float32 and store in the dtype of their input. A program works on a row of a matrix,
or on one token and one key head, so that no element needs a division to find its place.
"""

import torch
import triton
import triton.language as tl

from qlora_helpers.fast.kernels import threshold

_BLOCK = tl.constexpr(1024)  # elements of a program


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _keep(keys, row, columns, least):
    """See `kernels.keep_mask`; int32 arithmetic that overflows, and shifts that keep the sign."""
    hashed = (tl.load(keys + row) ^ _mix(columns)) * 0x7FEB352D
    hashed = (hashed ^ (hashed >> 15)) * -0x7B935975
    return hashed >= least


@triton.jit
def _place(width):
    """Return the row of a program, its columns, their places in the matrix, and which exist."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    return row, columns, row.to(tl.int64) * width + columns, columns < width


@triton.jit
def _drop(x, out, keys, least, width):
    row, columns, at, inside = _place(width)
    value = tl.load(x + at, inside)
    tl.store(out + at, tl.where(_keep(keys, row, columns, least), value, 0.0), inside)


@triton.jit
def _drop_backward(grad, low, x, kept, keys, least, width):
    row, columns, at, inside = _place(width)
    keep = _keep(keys, row, columns, least)
    through = tl.where(keep, tl.load(low + at, inside).to(tl.float32), 0.0)
    tl.store(grad + at, tl.load(grad + at, inside).to(tl.float32) + through, inside)
    tl.store(kept + at, tl.where(keep, tl.load(x + at, inside), 0.0), inside)


@triton.jit
def _swiglu(gate, up, hidden, kept, keys, least, width, DROP: tl.constexpr):
    row, columns, at, inside = _place(width)
    g = tl.load(gate + at, inside).to(tl.float32)
    value = g * tl.sigmoid(g) * tl.load(up + at, inside).to(tl.float32)
    tl.store(hidden + at, value, inside)
    if DROP:
        tl.store(kept + at, tl.where(_keep(keys, row, columns, least), value, 0.0), inside)


@triton.jit
def _swiglu_backward(grad, low, gate, up, grad_gate, kept, keys, least, width, DROP: tl.constexpr):
    row, columns, at, inside = _place(width)
    g = tl.load(gate + at, inside).to(tl.float32)
    u = tl.load(up + at, inside).to(tl.float32)
    d = tl.load(low + at, inside).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    activated = g * sigmoid
    value = activated * u
    if DROP:
        keep = _keep(keys, row, columns, least)
        d, value = tl.where(keep, d, 0.0), tl.where(keep, value, 0.0)
    d += tl.load(grad + at, inside).to(tl.float32)
    tl.store(grad_gate + at, d * u * (sigmoid + activated * (1 - sigmoid)), inside)
    tl.store(grad + at, d * activated, inside)  # the gradient of up
    tl.store(kept + at, value, inside)


@triton.jit
def _turned(x, at, inside, other, angles, columns, SIZE: tl.constexpr):
    """Return x, whose halves are the coordinates of points, turned by angles (cos, sin)."""
    cos, sin = angles
    sign = tl.where(columns < SIZE // 2, -1.0, 1.0)
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    partner = tl.load(x + other, inside, 0.0).to(tl.float32)
    return value * cos + partner * (sin * sign)


@triton.jit
def _heads(
    qkv, cos, sin, place, query, key, value, key_heads, GROUPS: tl.constexpr, SIZE: tl.constexpr
):
    # one place and one key head, with the queries that share it
    target, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(place + target)
    rows = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
    columns = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    inside = (rows < GROUPS) & (columns < SIZE)
    partner = (columns + SIZE // 2) % SIZE
    in_size = columns < SIZE
    angles = (
        tl.load(cos + token * SIZE + columns, in_size, 0.0).to(tl.float32),
        tl.load(sin + token * SIZE + columns, in_size, 0.0).to(tl.float32),
    )
    source = token * key_heads * (GROUPS + 2) * SIZE
    queries = source + (head * GROUPS + rows) * SIZE
    to = (target * key_heads * GROUPS + head * GROUPS + rows) * SIZE + columns
    turned = _turned(qkv, queries + columns, inside, queries + partner, angles, columns, SIZE)
    tl.store(query + to, turned, inside)
    keys = source + (key_heads * GROUPS + head) * SIZE + 0 * rows
    turned = _turned(qkv, keys + columns, inside, keys + partner, angles, columns, SIZE)
    tl.store(key + to, turned, inside)
    values = keys + key_heads * SIZE + columns
    tl.store(value + to, tl.load(qkv + values, inside), inside)


@triton.jit
def _heads_backward(
    query, key, value, cos, sin, real, grad, key_heads, GROUPS: tl.constexpr, SIZE: tl.constexpr
):
    # one token and one key head, with the queries that share it
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
    columns = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    inside = (rows < GROUPS) & (columns < SIZE)
    in_size = columns < SIZE
    angles = (
        tl.load(cos + token * SIZE + columns, in_size, 0.0).to(tl.float32),
        -tl.load(sin + token * SIZE + columns, in_size, 0.0).to(tl.float32),
    )
    source = (tl.load(real + token) * key_heads * GROUPS + head * GROUPS + rows) * SIZE
    at, partner = source + columns, source + (columns + SIZE // 2) % SIZE
    target = token * key_heads * (GROUPS + 2) * SIZE
    turned = _turned(query, at, inside, partner, angles, columns, SIZE)
    tl.store(grad + target + (head * GROUPS + rows) * SIZE + columns, turned, inside)
    turned = _turned(key, at, inside, partner, angles, columns, SIZE)
    summed, one_row = tl.sum(turned, 0)[None, :], in_size
    to = target + (key_heads * GROUPS + head) * SIZE + columns
    tl.store(grad + to, summed, one_row)
    summed = tl.sum(tl.load(value + at, inside, 0.0).to(tl.float32), 0)[None, :]
    tl.store(grad + to + key_heads * SIZE, summed, one_row)


def _matrix(x: torch.Tensor) -> tuple[tuple[int, int], int]:
    """Return the grid of programs for a matrix, and its width."""
    return (len(x), triton.cdiv(x.shape[1], _BLOCK.value)), x.shape[1]


def drop(x, rate, keys):
    """See `kernels.drop`."""
    if not rate:
        return x
    x = x.contiguous()
    out, (grid, width) = torch.empty_like(x), _matrix(x)
    _drop[grid](x, out, keys, threshold(rate), width)
    return out


def drop_backward(grad, low, x, rate, keys):
    """See `kernels.drop_backward`."""
    if not rate:
        return grad.add_(low), x
    grad, low, x = grad.contiguous(), low.contiguous(), x.contiguous()
    kept, (grid, width) = torch.empty_like(x), _matrix(x)
    _drop_backward[grid](grad, low, x, kept, keys, threshold(rate), width)
    return grad, kept


def swiglu(gate, up, rate, keys):
    """See `kernels.swiglu`."""
    gate, up = gate.contiguous(), up.contiguous()
    hidden, (grid, width) = torch.empty_like(gate), _matrix(gate)
    kept = hidden if rate == 0 else torch.empty_like(gate)
    _swiglu[grid](gate, up, hidden, kept, keys, threshold(rate), width, rate > 0)
    return hidden, kept


def swiglu_backward(grad, low, gate, up, rate, keys):
    """See `kernels.swiglu_backward`."""
    grad, low, gate, up = (x.contiguous() for x in (grad, low, gate, up))
    grad_gate, kept, (grid, width) = torch.empty_like(gate), torch.empty_like(gate), _matrix(gate)
    _swiglu_backward[grid](
        grad, low, gate, up, grad_gate, kept, keys, threshold(rate), width, rate > 0
    )
    return grad_gate, grad, kept


def heads(qkv, cos, sin, place, size, groups):
    """See `kernels.heads`."""
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    key_heads = qkv.shape[1] // size // (groups + 2)
    query, key, value = (qkv.new_empty(len(place), key_heads * groups, size) for _ in range(3))
    _heads[len(place), key_heads](qkv, cos, sin, place, query, key, value, key_heads, groups, size)
    return query, key, value


def heads_backward(query, key, value, cos, sin, real, groups):
    """See `kernels.heads_backward`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    key_heads, size = query.shape[1] // groups, query.shape[2]
    grad = query.new_empty(len(real), key_heads * (groups + 2) * size)
    _heads_backward[len(real), key_heads](
        query, key, value, cos, sin, real, grad, key_heads, groups, size
    )
    return grad
