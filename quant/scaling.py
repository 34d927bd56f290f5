"""Scales: from a statistic of a block to the code of its scale, in a stated order of fp32 operations.

Each block has a = max |y| (or the standard deviation of y), to be mapped to the element's `target`, by default its max.

E8M0, a power of two (OCP MX v1.0 and what came after it): one comparison with a threshold, no logarithm, no division.

    floor   2^floor(log2(a / 2^emax))             the largest elements may saturate (OCP, microxcaling)
    even    2^floor(log2(a / 2^emax)), a first rounded to the element's mantissa bits, halves up (torchao EVEN)
    ceil    2^ceil(log2(a / 2^emax))              nothing saturates; up to a binade is wasted
    rceil   2^ceil(log2(a / max))                 nothing saturates (arXiv:2506.08027; TransformerEngine, cuBLAS)

    each is floor or ceil of log2(a / T) for one T = t 2^k, 1 <= t < 2. With p = 2^floor(log2 a), from the exponent of a:
    p 2^-k, halved if a < t p for floor, or doubled if a > t p for ceil

    gam     under an outer significand m of fl(max / amax) of the whole tensor: the block's factor is m 2^e, e the exponent of
            s = fl(max / a), less 1 where m is above the significand of s (group amax mantissa, the public code of
            arXiv:2512.22804, which takes amaxes below 1e-35 for that; we do not): nothing saturates, and the tensor's
            largest element becomes exactly the largest one

A float scale (E4M3, E5M3, BF16), alone or under an outer fp32 scale that maps the amax of a tensor, a row or some blocks of
it to target * outer_target (NVFP4, arXiv:2509.25149 section 2, in the orders of TransformerEngine; 6 * 448 = 2688):

    S_enc = min(fl(2688 / amax), FLT_MAX), 1 where amax = 0          S_dec = fl(1 / S_enc)      the global (decode) scale
    s     = fl(a * fl(S_enc * fl(1/6)))           order g2           s     = fl(fl(a / 6) * S_enc)           order g1
    s8    = e4m3(min(s, FLT_MAX))                 nearest even, saturating, may be 0: no floor, no epsilon
    enc   = min(fl(1 / fl(s8 * S_dec)), FLT_MAX)  from the ROUNDED scale, so that code * s8 * S_dec is near y

fp32: S_enc and S_dec themselves, with target / a. Alone, a float scale has S_enc = S_dec = 1.

A macro-block scale over E8M0 is a significand f = 1.m, m the top 8 mantissa bits of fl(max / amax of the macro-block): elements
are multiplied by f, then scaled as above, and values by fl(1 / f) (arXiv:2603.08713).

With a history (delayed scaling) the largest of earlier amaxes stands for the operand's own where one scale spans all of it.

Each fl is one IEEE rounding to nearest even; divisions are correctly rounded. A block whose scale is 0 gets enc = FLT_MAX:
its elements saturate, and decode to 0 through the scale. A non-finite a makes its scale NaN, and under an outer scale every
scale below that: nothing is laundered (TransformerEngine keeps a finite value, and its MXFP8 loses the NaN of a block).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant.choice import Choice
from quant.formats import FLT_MAX, FORMATS, binade, code_dtype
from quant.fuse import compiling
from quant.spec import QuantSpec, Scale


def stated_sum(x: Tensor, axis: int) -> Tensor:
    """The sum over an axis in a stated order, halves onto halves: the same bits on every device."""
    while (n := x.shape[axis]) > 1:
        half = n // 2
        rest = x.narrow(axis, 2 * half, n - 2 * half)
        x = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
        x = torch.cat([x, rest], axis) if n % 2 else x
    return x


def block_sum(blocks: Tensor, axis: int) -> Tensor:
    """Sums over blocks [P / p, p, Q / q, q], first along the contraction on `axis`, so that a transposed view has the same."""
    return stated_sum(stated_sum(blocks, axis), 4 - axis)


def statistic(blocks: Tensor, scale: Scale, axis: int = 3) -> Tensor:
    """blocks [P / p, p, Q / q, q], whose contraction runs along `axis` (1 or 3) -> fp32 [P / p, 1, Q / q, 1]: the largest
    magnitude of each block, NaN if it has one; or the standard deviation, sqrt(mean of squares - squared mean) (QuEST,
    arXiv:2502.05003)."""
    if scale.statistic == "absmax":
        blocks = blocks.to(torch.float32) if compiling() else blocks  # (compiled, abs of BF16 goes to fp32 and back)
        return blocks.abs().amax((1, 3), keepdim=True).to(torch.float32)
    x, count = blocks.to(torch.float32), blocks.shape[1] * blocks.shape[3]
    mean, squares = (block_sum(v, axis) * (1 / count) for v in (x, x * x))
    return (squares - mean * mean).clamp(min=0).sqrt()


def power_of_two(a: Tensor, T: float, up: bool) -> Tensor:
    """fp32 a >= 0 -> 2^floor(log2(a / T)), or 2^ceil(...) if `up`, within 2^-127 ... 2^127; NaN for NaN, Inf. T: as fp32."""
    significand, exponent = math.frexp(T)
    significand, exponent = math.frexp(round(significand * 2**24) * 2.0 ** (exponent - 24))
    t = 2 * significand
    small, large = a < 2.0**-60, a > 2.0**60  # what is neither has room for everything here
    b = a * torch.where(small, 2.0**66, torch.where(large, 2.0**-66, 1.0))
    p = binade(b)
    if up:
        p = torch.where(b > p * t, p * 2, p)
    elif t > 1:
        p = torch.where(b < p * t, p * 0.5, p)
    p = p * torch.where(small, 2.0 ** (1 - exponent - 66), 2.0 ** (1 - exponent)) * torch.where(large, 2.0**66, 1.0)
    return torch.where(a.isfinite(), p.clamp(2.0**-127, 2.0**127), torch.nan)


def encode_factor(amax: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """amax (fp32) -> (S_enc, S_dec), the fp32 factors that map amax to target and back."""
    # (`2688 / amax` would be torch's reciprocal times 2688: two roundings.)
    s_enc = (torch.full_like(amax, target) / amax).clamp(max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    s_enc = torch.where(amax.isfinite(), s_enc, torch.nan)
    return s_enc, torch.ones_like(s_enc) / s_enc


class Scales(NamedTuple):
    """Of blocks [P / p, p, Q / q, q]: all are [P / p, 1, Q / q, 1], but for `outer`."""

    encode: Tensor | None  # fp32: what elements are multiplied by
    decoded: Tensor | None  # fp32: the decode scales, numbers of their format
    outer: Tensor | None  # the outer decode scale as stored (`decode_outer`): [], or 1 or fewer along the contraction


def block_scales(a: Tensor, spec: QuantSpec, axis: int, held: Tensor | None = None, noise: Tensor | None = None) -> Scales:
    """a: the statistic fp32 [P / p, 1, Q / q, 1] of blocks that follow each other along the contraction on `axis` (0 or 2).
    held: fp32 [], an amax in place of the operand's own. noise: random ints like a, for scales rounded stochastically."""
    scale, element = spec.scale, spec.element
    target = scale.target or element.max
    if scale.format == "e8m0":
        factor, outer = scale.multiplier, None
        if scale.rule == "gam":
            whole = _in_place_of(a.amax(), held)
            (_, m), (p, of_block) = _binade_and_significand(whole, target), _binade_and_significand(a, target)
            p = torch.where(whole.isfinite(), torch.where(m > of_block, p * 0.5, p), torch.nan)
            return Scales(p * m, torch.ones_like(p) / p, torch.ones_like(m) / m)
        if scale.macro:
            whole = outer_amax(a, spec, axis)
            outer = ((torch.full_like(whole, element.max) / whole).view(torch.int32) >> 15) & 0xFF
            outer = torch.where(whole.isfinite(), outer, 0)  # (which bits a NaN has is nobody's promise)
            factor, whole = (repeat(v, axis, scale.group // spec.block[1]) for v in (_significand(outer), whole))
            a = torch.where(whole.isfinite(), (a * factor).clamp(max=FLT_MAX), torch.nan)
        elif factor != 1:
            outer = torch.full((), 1 / factor, device=a.device)
        decoded = power_of_two(a, *threshold(spec))
        return Scales((torch.ones_like(a) / decoded) * factor, decoded, outer)
    if scale.format == "fp32":
        enc, dec = encode_factor(_in_place_of(a, held), target)
        return Scales(enc, dec, None)
    fmt, outer = FORMATS[scale.format], None
    if scale.outer == "none":
        s_enc = s_dec = torch.where(a.isfinite(), 1.0, torch.nan)
    else:
        whole = _in_place_of(outer_amax(a, spec, axis), held)
        s_enc, s_dec = encode_factor(whole, target * (scale.outer_target or fmt.max))
        outer = s_dec
        if scale.group:
            s_enc, s_dec = (repeat(s, axis, scale.group // spec.block[1]) for s in (s_enc, s_dec))
    s = a * (s_enc * (1.0 / target)) if scale.order == "g2" else (a / torch.full_like(a, target)) * s_enc
    rounding = "nearest" if scale.correction == "eden" else scale.rounding  # (eden: what is corrected, and rounded again)
    decoded = fmt.round(s, rounding, noise)
    full = decoded * s_dec
    return Scales((torch.ones_like(full) / full).clamp(max=FLT_MAX), decoded, outer)


def _binade_and_significand(amax: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """2^e and m in [1, 2) of min(fl(target / amax), FLT_MAX) = m 2^e; NaN where amax is not finite."""
    s = (torch.full_like(amax, target) / amax).clamp(max=FLT_MAX)
    p = power_of_two(torch.where(amax.isfinite(), s, torch.nan), 1.0, up=False)
    return p, s / p


def _in_place_of(amax: Tensor, held: Tensor | None) -> Tensor:
    """`held`, unless there is none yet (0) or the operand is not finite."""
    return amax if held is None else torch.where((held > 0) & amax.isfinite(), held, amax)


def eden(x: Tensor, codes: Tensor, decoded: Tensor, spec: QuantSpec, axis: int, noise: Tensor) -> Tensor:
    """MS-EDEN: x = fl(y * enc) and what it was rounded to, fp32 blocks [P / p, p, Q / q, q] along `axis`, and decoded scales
    -> the corrected scales, decoded: <y, y> / <y, q> of the Hadamard tile times the scale, rounded stochastically.

    y = x * decoded and q = codes * decoded stand for both, but for the outer scale: so the sums stay within fp32's range.
    """
    tile = spec.hadamard // spec.block[1]
    y, q = x * decoded, codes * decoded
    dots = (stated_sum(v, axis).unflatten(axis - 1, (-1, tile)) for v in (y * y, y * q))
    yy, yq = (repeat(stated_sum(dot, axis).squeeze(axis), axis - 1, tile) for dot in dots)
    return FORMATS[spec.scale.format].round(decoded * torch.where(yq > 0, yy / yq, 1.0), spec.scale.rounding, noise)


def repeat(x: Tensor, axis: int, times: int) -> Tensor:
    """Each entry along `axis` so many times."""
    return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], times, *x.shape[axis + 1 :]).flatten(axis, axis + 1)


def spread(scale: Tensor, rows: int, k: int) -> Tensor:
    """A scale [], or [R / b0, K / b1] of blocks of any size, as one for each element, [R, K]."""
    return scale if scale.ndim == 0 else repeat(repeat(scale, 0, rows // scale.shape[0]), 1, k // scale.shape[1])


def outer_amax(a: Tensor, spec: QuantSpec, axis: int) -> Tensor:
    """The amax that each outer scale spans: that of the tensor [], of a row of blocks, or of `group` elements of a row."""
    if spec.scale.outer == "tensor":
        return a.amax()
    if spec.scale.outer == "row":
        return a.amax(axis, keepdim=True)
    return a.unflatten(axis, (-1, spec.scale.group // spec.block[1])).amax(axis + 1)


def _significand(m: Tensor) -> Tensor:
    """int codes of eight mantissa bits -> fp32 1.m."""
    return (m.to(torch.int32) + 256).to(torch.float32) * 2.0**-8


def decode_outer(outer: Tensor, scale: Scale) -> Tensor:
    """A stored outer scale -> the fp32 decode scale."""
    if not scale.macro:
        return outer
    f = _significand(outer)
    return torch.ones_like(f) / f


def scale_codes(decoded: Tensor, scale: Scale) -> Tensor:
    """The inverse of `decode_scale`, but for what a Choice writes into the sign: scales as they are stored, or float8."""
    if scale.format == "fp32":
        return decoded
    codes = FORMATS[scale.format].codes_of(decoded)
    return codes if codes.itemsize == 1 else codes.to(code_dtype(FORMATS[scale.format].bits))


def decode_scale(codes: Tensor, spec: QuantSpec | Choice) -> Tensor:
    """Stored scales -> fp32, whatever a Choice has written into their sign."""
    if spec.scale.format == "fp32":
        return codes
    return FORMATS[spec.scale.format].decode(
        codes.to(torch.int32) & (sign_of(spec.scale) - 1) if len(spec.elements) > 1 else codes
    )


def sign_of(scale: Scale) -> int:
    """The sign bit of a stored scale."""
    return 1 << (FORMATS[scale.format].bits - 1)


def second(codes: Tensor, spec: QuantSpec | Choice) -> Tensor | None:
    """Which blocks a Choice of two element formats gave the second one, by the sign of their stored scales; else None."""
    return None if len(spec.elements) == 1 else (codes.to(torch.int32) & sign_of(spec.scale)) > 0


def threshold(spec: QuantSpec) -> tuple[float, bool]:
    """(T, whether up) of an E8M0 rule, as above."""
    element, rule = spec.element, spec.scale.rule
    mantissa_bits = element.significant_bits - 1
    T = {
        "floor": 2.0**element.emax,
        "ceil": 2.0**element.emax,
        "rceil": element.max,
        "even": 2.0**element.emax * (1 - 2.0 ** -(mantissa_bits + 2)),
    }[rule]
    return spec.scale.target or T, rule in ("ceil", "rceil")
