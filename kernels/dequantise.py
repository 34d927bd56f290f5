"""Codes and scales -> what a GEMM multiplies, of one candidate, or, unit by unit, of the one of several that an index names.

    value = code * scale, one fp32 product, then BF16 where that is exact; or, where the scale leaves the sum, the code alone,
    NaN where the scale is. A candidate without codes is x itself: to BF16, nearest even, saturating; NaN where not finite.

Codes [R, K], two of four bits to a byte, and scales [R / rows, K / block] lie in rows along the contraction, as quantize.py
writes them for either side (not `swizzle`); x may also lie in columns. A program takes a tile [BR, BK]. Units may be of any
size, or the whole of an axis: where a tile is within one, as of 128 x 128 or of a tensor, only its candidate is computed; else
all are, read under masks, each only where its units are.

Left out: outer scales of parts of a row; formats of more than eight bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.numerics import Float, bf16_bits, bits, decode

MOST = 4  # candidates


class Layout(NamedTuple):
    """What codes and scales are. element None: x itself, which has neither. scale None: fp32, as it is stored. rows, block: the
    elements that share a scale, 0 for the whole axis. leaves: the scale is no part of a value. exact: values are BF16.
    factor: what is left to multiply values by, "none", a number ("tensor") or one for each row ("line")."""

    element: Float | None = None
    scale: Float | None = None
    rows: int = 0
    block: int = 0
    leaves: bool = False
    exact: bool = True
    factor: str = "none"


@triton.jit
def load_x(x_ptr, wanted, r0, k0, R, K, TURNED: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """-> fp32 (BR, BK), 0 outside of [R, K] and of `wanted`, bool, or None for all of it. x: bits of BF16 as int16, or fp32;
    TURNED: it lies as [K, R]."""
    r, k = r0 + tl.arange(0, BR), k0 + tl.arange(0, BK)
    if TURNED:
        at, there = x_ptr + k[:, None].to(tl.int64) * R + r[None, :], (k[:, None] < K) & (r[None, :] < R)
    else:
        at, there = x_ptr + r[:, None].to(tl.int64) * K + k[None, :], (r[:, None] < R) & (k[None, :] < K)
    zero = tl.zeros((), tl.float32).to(x_ptr.dtype.element_ty)
    if wanted is not None:
        x = tl.load(at, mask=there & (tl.trans(wanted) if TURNED else wanted), other=zero)
    else:
        x = tl.load(at) if EVEN else tl.load(at, mask=there, other=zero)
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.trans(x) if TURNED else x


@triton.jit
def load_scales(scales_ptr, r, k0, R, K, c: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """fp32, of rows r (BR, 1): (BR, BK), or (BR, 1) where the tile has one scale a row, or (1, 1)."""
    if c.block == 0:
        if c.rows == 0:
            s = tl.load(scales_ptr + tl.zeros((1, 1), tl.int32))
        else:
            s = tl.load(scales_ptr + tl.minimum(r, R - 1) // c.rows)
    else:
        B: tl.constexpr = max(BK // c.block, 1)
        count = K // c.block
        b = k0 // c.block + tl.arange(0, B)[None, :]
        row = r // c.rows
        if not EVEN:
            row, b = tl.minimum(r, R - 1) // c.rows, tl.minimum(b, count - 1)
        s = tl.load(scales_ptr + row * count + b)
    if c.scale is not None:
        s = decode(s, c.scale)
    if c.block == 0 or c.block >= BK:
        return s
    else:
        return tl.reshape(tl.broadcast_to(s[:, :, None], (BR, BK // c.block, c.block)), (BR, BK))


@triton.jit
def values(
    x_ptr, codes_ptr, scales_ptr, wanted, r0, k0, R, K,
    c: tl.constexpr, TURNED: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 (BR, BK): the values of a candidate, of x where it has no codes; wanted: as above."""
    if c.element is None:
        x = load_x(x_ptr, wanted, r0, k0, R, K, TURNED, EVEN, BR, BK)
        a = bits(x) & 0x7FFFFFFF
        v = bf16_bits(x)
        v = tl.where((v & 0x7FFFFFFF) == 0x7F800000, v - 0x10000, v).to(tl.float32, bitcast=True)  # (the sign stays)
        return tl.where(a < 0x7F800000, v, float("nan"))
    else:
        PER: tl.constexpr = 2 if c.element.bits <= 4 else 1
        r = r0 + tl.arange(0, BR)[:, None]
        k = k0 // PER + tl.arange(0, BK // PER)[None, :]
        at = codes_ptr + r.to(tl.int64) * (K // PER) + k
        if wanted is not None:
            if PER == 2:  # (both halves of a byte are of one unit, or the byte is read)
                wanted = tl.max(tl.reshape(wanted.to(tl.int32), (BR, BK // 2, 2)), 2) > 0
            if not EVEN:
                wanted = wanted & (r < R) & (k < K // PER)
            code = tl.load(at, mask=wanted, other=0)
        elif EVEN:
            code = tl.load(at)
        else:
            code = tl.load(at, mask=(r < R) & (k < K // PER), other=0)
        if PER == 2:
            v = tl.reshape(tl.join(decode(code & 15, c.element), decode(code >> 4, c.element)), (BR, BK))
        else:
            v = decode(code, c.element)
        s = load_scales(scales_ptr, r, k0, R, K, c, EVEN, BR, BK)
        v = tl.where(s == s, v, float("nan")) if c.leaves else v * s
        return v.to(tl.bfloat16).to(tl.float32) if c.exact and not c.leaves else v


@triton.jit
def times_factor(v, factor_ptr, r0, R, c: tl.constexpr, BR: tl.constexpr):
    """Values (BR, BK) times what has left the sum."""
    if c.factor == "none":
        return v
    elif c.factor == "tensor":
        return v * tl.load(factor_ptr + tl.zeros((1, 1), tl.int32))
    else:
        return v * tl.load(factor_ptr + tl.minimum(r0 + tl.arange(0, BR)[:, None], R - 1))


@triton.jit
def unit_of(r0, k0, R, K, P: tl.constexpr, Q: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """The number of the unit [P, Q] (0: the whole axis) that an element of the tile belongs to: a scalar where all of the tile
    does, else one that broadcasts to (BR, BK)."""
    row, column = 0, 0
    if P > 0 and P % BR == 0:
        row = r0 // P
    elif P > 0:
        row = tl.minimum(r0 + tl.arange(0, BR)[:, None], R - 1) // P
    if Q > 0 and Q % BK == 0:
        column = k0 // Q
    elif Q > 0:
        column = tl.minimum(k0 + tl.arange(0, BK)[None, :], K - 1) // Q
    return row * (K // Q if Q > 0 else 1) + column


@triton.jit
def dequantise_kernel(
    x_ptr, index_ptr, c0, s0, f0, c1, s1, f1, c2, s2, f2, c3, s3, f3, out_ptr, R, K,
    candidates: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DENSE: tl.constexpr,
    TURNED: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """index int64 [R / P, K / Q]; codes, scales, factor of each candidate; out fp32, or BF16 as int16, [R, K]. DENSE: values
    times their factors."""
    r0, k0 = tl.program_id(0) * BR, tl.program_id(1) * BK
    N: tl.constexpr = len(candidates)
    UNIFORM: tl.constexpr = (P == 0 or P % BR == 0) and (Q == 0 or Q % BK == 0)
    codes, scales, factors = (c0, c1, c2, c3), (s0, s1, s2, s3), (f0, f1, f2, f3)
    r, k = r0 + tl.arange(0, BR)[:, None], k0 + tl.arange(0, BK)[None, :]
    taken, index = tl.zeros((BR, BK), tl.float32), 0
    if N > 1:
        index = tl.load(index_ptr + unit_of(r0, k0, R, K, P, Q, BR, BK)).to(tl.int32)
        if not UNIFORM:
            index = tl.broadcast_to(index, (BR, BK))
    for i in tl.static_range(N):
        if UNIFORM:
            if index == i:
                taken = values(x_ptr, codes[i], scales[i], None, r0, k0, R, K, candidates[i], TURNED, EVEN, BR, BK)
                if DENSE:
                    taken = times_factor(taken, factors[i], r0, R, candidates[i], BR)
        else:
            v = values(x_ptr, codes[i], scales[i], index == i, r0, k0, R, K, candidates[i], TURNED, EVEN, BR, BK)
            if DENSE:
                v = times_factor(v, factors[i], r0, R, candidates[i], BR)
            taken = tl.where(index == i, v, taken)
    if out_ptr.dtype.element_ty == tl.int16:
        taken = taken.to(tl.bfloat16).to(tl.int16, bitcast=True)
    at = out_ptr + r.to(tl.int64) * K + k
    tl.store(at, taken, mask=None if EVEN else (r < R) & (k < K))


class Cut(NamedTuple):
    BR: int
    BK: int
    warps: int


def cut(R: int, K: int, BR: int) -> Cut:
    """The tile of a program, BR rows of it; or as few programs as may be, in the interpreter."""
    if triton.knobs.runtime.interpret:
        BR, BK = (max(128, min(256, triton.next_power_of_2(size))) for size in (R, K))
        return Cut(BR, BK, 4)
    return Cut(BR, 128, 4)


def as_read(x: Tensor) -> tuple[Tensor, bool]:
    """x [R, K], BF16 or fp32, in rows or in columns -> what `load_x` reads, and whether it is turned."""
    turned = not x.is_contiguous() and x.t().is_contiguous()
    x = x.t() if turned else x.contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x, turned


class Candidate(NamedTuple):
    """Its codes uint8 [R, K] or [R, K / 2], scales, and factor fp32 [] or [R, 1] (anything where it has none)."""

    layout: Layout
    codes: Tensor | None = None
    scales: Tensor | None = None
    factor: Tensor | None = None


def dequantise(
    shape: tuple[int, int],
    candidates: list[Candidate],
    dtype: torch.dtype,
    x: Tensor | None = None,
    index: Tensor | None = None,
    unit: tuple[int, int] = (0, 0),
    dense: bool = False,
) -> Tensor:
    """-> [R, K] in BF16 or fp32. x: BF16 or fp32, where a candidate is x itself. index int64: of each unit which of several
    candidates; unit: its [rows, contraction], 0 for the whole axis. dense: times the factors. Raises ValueError for more than
    MOST candidates."""
    if len(candidates) > MOST:
        raise ValueError(f"{len(candidates)} candidates: expected at most {MOST}")
    (R, K), device = shape, candidates[0].codes.device if x is None else x.device
    out = torch.empty(R, K, dtype=dtype, device=device)
    raw = out.view(torch.int16) if dtype == torch.bfloat16 else out
    (read, turned), how = (raw, False) if x is None else as_read(x), cut(R, K, 64)
    passed = [read if t is None else t.contiguous() for each in candidates for t in each[1:]]
    passed += [read] * (3 * (MOST - len(candidates)))
    dequantise_kernel[triton.cdiv(R, how.BR), triton.cdiv(K, how.BK)](
        read, read if index is None else index.contiguous(), *passed, raw, R, K,
        tuple(each.layout if dense else each.layout._replace(factor="none") for each in candidates), *unit, dense,
        turned, R % how.BR == 0 and K % how.BK == 0, how.BR, how.BK, num_warps=how.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
