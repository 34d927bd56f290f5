"""How far what a candidate makes of x is from x: sums, or extremes, over units of decision, in fp64.

With v its values times their factor, y = x, over the y of a unit, and top the unit's largest |y|:

    relative_error    sum of rint(|v - y| / |y| 2^24) over y != 0        2^24 of them for each y != 0
    underflow         the y != 0 with v = 0 (NaN if a v is)              the y != 0
    absolute_error    sum of rint(|v - y| / top 2^30)                    sum of rint(|y| / top 2^30)
    squared_error     sum of rint((|v - y| / top)^2 2^30)                sum of rint((|y| / top)^2 2^30)
    largest_error     max |v - y|                                        max |y|
    dynamic_range     max |y|                                            min |y| over y != 0

all terms in fp32, divisions correctly rounded. Terms are integers below 2^24 or 2^30 (errors of a value rounded to nearest are
at most what it was, but for a rounding or two; what leaves fp32's range is Inf), so sums of them have no order in fp64, which
adds up to 2^53 exactly. Within a tile they need none of it, since chips have few fp64 units: a term is split into a multiple of
2^a and a rest of at most 2^(a - 1), a = 12 or 15,

    h = (t + 1.5 2^(23 + a)) - 1.5 2^(23 + a)        l = t - h

and fp32 adds 256 of either exactly: multiples of 2^a up to 2^(a + 24), integers up to 2^24. Only those sums become fp64.

A program takes a tile [BR, BK], and writes a pair of numbers for each part [p, q] of it, the largest powers of two that divide
the unit, at most the tile; the parts of a unit are put together by torch. Left out: several metrics or candidates in one read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dequantise import Candidate, Layout, as_read, cut, load_x, times_factor, unit_of, values
from kernels.numerics import bits

SUMS = "relative_error", "underflow", "absolute_error", "squared_error"
SHARES = "absolute_error", "squared_error"


@triton.jit
def rint(t):
    """fp32 t >= 0 -> to the nearest integer, halves to even."""
    return tl.where(t < 8388608.0, (t + 8388608.0) - 8388608.0, t)


@triton.jit
def along(x, q: tl.constexpr):
    """(BR, BK) -> (BR, BK / q, q)"""
    return tl.reshape(x, (x.shape[0], x.shape[1] // q, q))


@triton.jit
def total(t, a: tl.constexpr, p: tl.constexpr, q: tl.constexpr):
    """Sums of integers t >= 0, fp32 (BR, BK), over parts [p, q]: fp64 (BR / p, BK / q). a: see above, or 0 for t of 0 and 1."""
    if a == 0:
        s = tl.sum(along(t, q), 2).to(tl.float64)
    else:
        h = (t + 1.5 * 2.0 ** (23 + a)) - 1.5 * 2.0 ** (23 + a)
        high, low = tl.sum(along(h, q), 2), tl.sum(along(t - h, q), 2)
        s = high.to(tl.float64) + tl.where(high < float("inf"), low, 0.0).to(tl.float64)  # (Inf - Inf is NaN, and Inf is meant)
    return tl.sum(tl.reshape(s, (s.shape[0] // p, p, s.shape[1])), 1)


@triton.jit
def extreme(u, LARGEST: tl.constexpr, p: tl.constexpr, q: tl.constexpr):
    """The largest or the smallest of magnitudes by their bits (BR, BK), in which NaN is above Inf: fp64 (BR / p, BK / q)."""
    u = tl.max(along(u, q), 2) if LARGEST else tl.min(along(u, q), 2)
    u = tl.reshape(u, (u.shape[0] // p, p, u.shape[1]))
    u = tl.max(u, 1) if LARGEST else tl.min(u, 1)
    return u.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def share(x, top):
    """x / top, 0 where top is."""
    return tl.where(top == 0, 0.0, tl.div_rn(x, top))


@triton.jit
def errors_kernel(
    x_ptr, codes_ptr, scales_ptr, factor_ptr, top_ptr, out_ptr, R, K,
    candidate: tl.constexpr, BY: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, p: tl.constexpr, q: tl.constexpr,
    TURNED: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """top fp32 [R / P, K / Q]; out fp64 [2, ceil(R / p), ceil(K / q)]."""
    r0, k0 = tl.program_id(0) * BR, tl.program_id(1) * BK
    y = load_x(x_ptr, None, r0, k0, R, K, TURNED, EVEN, BR, BK)
    u = bits(y) & 0x7FFFFFFF
    if BY == "dynamic_range":
        first = extreme(u, True, p, q)
        second = extreme(tl.where((u > 0) & (u < 0x7F800000), u, 0x7F800000), False, p, q)
    else:
        v = values(x_ptr, codes_ptr, scales_ptr, None, r0, k0, R, K, candidate, TURNED, EVEN, BR, BK)
        v = times_factor(v, factor_ptr, r0, R, candidate, BR)
        r, k = r0 + tl.arange(0, BR)[:, None], k0 + tl.arange(0, BK)[None, :]
        if not EVEN:  # (a NaN among the scales reaches beyond the matrix)
            v = tl.where((r < R) & (k < K), v, 0.0)
        error, size = tl.abs(v - y), tl.abs(y)
        if BY == "largest_error":
            first, second = extreme(bits(error) & 0x7FFFFFFF, True, p, q), extreme(u, True, p, q)
        elif BY == "relative_error":
            t = rint(tl.where(u > 0, tl.div_rn(error, size), 0.0) * 16777216.0)
            first = total(t, 12, p, q)
            second = total(tl.where(u > 0, 1.0, 0.0), 0, p, q) * 16777216.0
        elif BY == "underflow":
            t = tl.where((u > 0) & (v == 0), 1.0, tl.where(v == v, 0.0, float("nan")))
            first, second = total(t, 0, p, q), total(tl.where(u > 0, 1.0, 0.0), 0, p, q)
        else:
            top = tl.load(top_ptr + unit_of(r0, k0, R, K, P, Q, BR, BK))
            error, size = share(error, top), share(size, top)
            if BY == "squared_error":
                error, size = error * error, size * size
            first, second = total(rint(error * 1073741824.0), 15, p, q), total(rint(size * 1073741824.0), 15, p, q)
    i = r0 // p + tl.arange(0, BR // p)[:, None]
    j = k0 // q + tl.arange(0, BK // q)[None, :]
    rows, columns = tl.cdiv(R, p), tl.cdiv(K, q)
    at = out_ptr + i.to(tl.int64) * columns + j
    there = (i < rows) & (j < columns)
    tl.store(at, first, mask=there)
    tl.store(at + rows.to(tl.int64) * columns, second, mask=there)


def errors(x: Tensor, candidate: Candidate | None, by: str, unit: tuple[int, int]) -> Tensor:
    """x [R, K], BF16 or fp32, in rows or columns; unit: [rows, contraction] that divide it, 0 for the whole axis -> fp64
    [2, R / unit, K / unit]: two numbers as above, of each unit. No candidate for "dynamic_range"."""
    (R, K), (read, turned) = x.shape, as_read(x)
    how, (P, Q) = cut(R, K, 32), unit  # (twice the rows take twice the registers, for a twentieth fewer instructions)
    p, q = (min(size & -size or most, most) for size, most in ((P, how.BR), (Q, how.BK)))
    top = errors(x, None, "dynamic_range", unit)[0].to(torch.float32) if by in SHARES else read
    given = candidate or Candidate(Layout())
    out = torch.empty(2, triton.cdiv(R, p), triton.cdiv(K, q), dtype=torch.float64, device=x.device)
    errors_kernel[triton.cdiv(R, how.BR), triton.cdiv(K, how.BK)](
        read, *(read if t is None else t.contiguous() for t in given[1:]), top, out, R, K,
        given.layout, by, *((P, Q) if by in SHARES else (0, 0)), p, q, turned, R % how.BR == 0 and K % how.BK == 0,
        how.BR, how.BK, num_warps=how.warps, enable_fp_fusion=False,
    )  # fmt: skip
    parts = out.unflatten(2, (K // Q if Q else 1, -1)).unflatten(1, (R // P if P else 1, -1))  # [2, units, parts, units, parts]
    if by in SUMS:
        return parts.sum((2, 4))
    largest = parts.amax((2, 4))
    return torch.stack([largest[0], parts[1].amin((1, 3))]) if by == "dynamic_range" else largest
