"""Scales: from a statistic of a block to the code of its scale, in a stated order of fp32 operations.

Each block has a = max |y| (or the standard deviation of y), to be mapped to the element's `target`, by default its max.

E8M0, a power of two (OCP MX v1.0 and what came after it): one subtraction of fp32 bit patterns, no logarithm, no division.

    floor   2^floor(log2(a / 2^emax))             the largest elements may saturate (OCP, microxcaling)
    even    2^floor(log2(a / 2^emax)), a first rounded to the element's mantissa bits, halves up (torchao EVEN)
    ceil    2^ceil(log2(a / 2^emax))              nothing saturates; up to a binade is wasted
    rceil   2^ceil(log2(a / max))                 nothing saturates (arXiv:2506.08027; TransformerEngine, cuBLAS)

    each is floor or ceil of log2(a / T) for one T: (bits(a) - bits(T) + [ceil] 0x7FFFFF) >> 23

A float scale (E4M3, E5M3, BF16), alone or under an outer fp32 scale that maps the amax of a tensor, a row or some blocks of
it to target * outer_target (NVFP4, arXiv:2509.25149 section 2, in the orders of TransformerEngine; 6 * 448 = 2688):

    S_enc = min(fl(2688 / amax), FLT_MAX), 1 where amax = 0          S_dec = fl(1 / S_enc)      the global (decode) scale
    s     = fl(a * fl(S_enc * fl(1/6)))           order g2           s     = fl(fl(a / 6) * S_enc)           order g1
    s8    = e4m3(min(s, FLT_MAX))                 nearest even, saturating, may be 0: no floor, no epsilon
    enc   = min(fl(1 / fl(s8 * S_dec)), FLT_MAX)  from the ROUNDED scale, so that code * s8 * S_dec is near y

fp32: S_enc and S_dec themselves, with target / a. Alone, a float scale has S_enc = S_dec = 1.

Each fl is one IEEE rounding to nearest even; divisions are correctly rounded. A block whose scale is 0 gets enc = FLT_MAX:
its elements saturate, and decode to 0 through the scale. A non-finite a makes its scale NaN, and under an outer scale every
scale below that: nothing is laundered (TransformerEngine keeps a finite value, and its MXFP8 loses the NaN of a block).
"""

import math

import torch
from torch import Tensor

from quant.formats import FORMATS, code_dtype
from quant.spec import QuantSpec, Scale

FLT_MAX = torch.finfo(torch.float32).max
E8M0_NAN = 255


def _sum(x: Tensor, axis: int) -> Tensor:
    """The sum over an axis in a stated order, halves onto halves: the same bits on every device."""
    while (n := x.shape[axis]) > 1:
        half = n // 2
        rest = x.narrow(axis, 2 * half, n - 2 * half)
        x = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
        x = torch.cat([x, rest], axis) if n % 2 else x
    return x


def statistic(blocks: Tensor, scale: Scale) -> Tensor:
    """blocks [P / p, p, Q / q, q] -> fp32 [P / p, 1, Q / q, 1]: the largest magnitude of each block, NaN if it has one; or the
    standard deviation, sqrt(mean of squares - squared mean) (QuEST, arXiv:2502.05003)."""
    if scale.statistic == "absmax":
        return blocks.abs().amax((1, 3), keepdim=True).to(torch.float32)
    x, count = blocks.to(torch.float32), blocks.shape[1] * blocks.shape[3]
    mean, squares = (_sum(_sum(v, 3), 1) * (1 / count) for v in (x, x * x))
    return (squares - mean * mean).clamp(min=0).sqrt()


def power_of_two(a: Tensor, T: float, up: bool) -> Tensor:
    """fp32 a >= 0 -> int32 E8M0 codes of 2^floor(log2(a / T)), or ceil if `up`, within 2^-127 ... 2^127; NaN for NaN, Inf."""
    significand, exponent = math.frexp(T)  # 0.5 <= significand < 1
    pattern = ((exponent + 126) << 23) + round((2 * significand - 1) * 2**23)
    small = a < 2.0**-126  # a subnormal pattern is not of the form exponent, mantissa
    bits = torch.where(small, a * 2.0**64, a).view(torch.int32)
    code = (bits - (pattern - (0x7FFFFF if up else 0))) >> 23
    code = torch.where(small, code + (127 - 64), code + 127)
    return torch.where(a.isfinite(), code.clamp(0, 254), E8M0_NAN)


def inverse_power(code: Tensor) -> Tensor:
    """int32 E8M0 codes -> fp32 1 / 2^(code - 127), exactly; NaN for NaN."""
    pattern = torch.where(code > 253, 0x00400000, (254 - code) << 23)  # 2^-127 is a subnormal number
    return torch.where(code > 254, torch.nan, pattern.view(torch.float32))


def encode_factor(amax: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """amax (fp32) -> (S_enc, S_dec), the fp32 factors that map amax to target and back."""
    # (`2688 / amax` would be torch's reciprocal times 2688: two roundings.)
    s_enc = (torch.full_like(amax, target) / amax).clamp(max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    s_enc = torch.where(amax.isfinite(), s_enc, torch.nan)
    return s_enc, torch.ones_like(s_enc) / s_enc


def block_scales(a: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """a fp32 [P / p, 1, Q / q, 1], whose blocks follow each other along the contraction on `axis` (0 or 2)
    -> (scale codes int32 or, for fp32, the scales; encode factors; decoded scales, all like a; the outer decode scale fp32,
    [], or 1 or fewer along `axis`; codes and outer scale are None where there are none)."""
    scale, element = spec.scale, FORMATS[spec.format]
    target = scale.target or element.max
    if scale.format == "e8m0":
        code = power_of_two(a, *threshold(spec))
        outer = None if scale.multiplier == 1 else torch.full((), 1 / scale.multiplier, device=a.device)
        return code, inverse_power(code) * scale.multiplier, FORMATS["e8m0"].decode(code), outer
    if scale.format == "fp32":
        enc, dec = encode_factor(a, target)
        return dec, enc, dec, None
    fmt = FORMATS[scale.format]
    outer = None
    if scale.outer == "none":
        s_enc = s_dec = torch.where(a.isfinite(), 1.0, torch.nan)
    else:
        s_enc, s_dec = encode_factor(outer_amax(a, spec, axis), target * (scale.outer_target or fmt.max))
        outer = s_dec
        if scale.group:
            s_enc, s_dec = (repeat(s, axis, scale.group // spec.block[1]) for s in (s_enc, s_dec))
    s = a * (s_enc * (1.0 / target)) if scale.order == "g2" else (a / torch.full_like(a, target)) * s_enc
    code = fmt.encode(torch.where(s_enc.isfinite(), s.clamp(max=FLT_MAX), torch.nan))
    decoded = fmt.decode(code)
    full = decoded * s_dec
    return code, (torch.ones_like(full) / full).clamp(max=FLT_MAX), decoded, outer


def repeat(x: Tensor, axis: int, times: int) -> Tensor:
    """Each entry along `axis` so many times."""
    return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], times, *x.shape[axis + 1 :]).flatten(axis, axis + 1)


def outer_amax(a: Tensor, spec: QuantSpec, axis: int) -> Tensor:
    """The amax that each outer scale spans: that of the tensor [], of a row of blocks, or of `group` elements of a row."""
    if spec.scale.outer == "tensor":
        return a.amax()
    if spec.scale.outer == "row":
        return a.amax(axis, keepdim=True)
    return a.unflatten(axis, (-1, spec.scale.group // spec.block[1])).amax(axis + 1)


def scale_dtype(scale: Scale) -> torch.dtype:
    """Of stored scales: codes, but for fp32."""
    return torch.float32 if scale.format == "fp32" else code_dtype(FORMATS[scale.format].bits)


def decode_scale(codes: Tensor, scale: Scale) -> Tensor:
    """Stored scales -> fp32."""
    return codes if scale.format == "fp32" else FORMATS[scale.format].decode(codes)


def threshold(spec: QuantSpec) -> tuple[float, bool]:
    """(T, whether up) of an E8M0 rule, as above."""
    element, rule = FORMATS[spec.format], spec.scale.rule
    mantissa_bits = element.significant_bits - 1
    T = {
        "floor": 2.0**element.emax,
        "ceil": 2.0**element.emax,
        "rceil": element.max,
        "even": 2.0**element.emax * (1 - 2.0 ** -(mantissa_bits + 2)),
    }[rule]
    return spec.scale.target or T, rule in ("ceil", "rceil")
