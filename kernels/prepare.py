"""What a side of the quantiser needs of the tensor's amax: the table of encode factors, and the outer scale.

    float    S_enc = min(fl(top / amax), FLT_MAX), 1 where amax = 0; S_dec = fl(1 / S_enc)        top = target * outer_target
             table[c] = min(fl(1 / fl(float(c) * S_dec)), FLT_MAX), NaN where c is no number
             factor = fl(S_enc * fl(1 / target)), or S_enc where a block's amax is divided by `target`
             without an outer scale S_enc = S_dec = 1
    gam      factor = m, the significand of min(fl(target / amax), FLT_MAX)                       outer = fl(1 / m)

An amax that is not finite makes all of it NaN (arXiv:2509.25149 section 2, in TransformerEngine's order; quant/scaling.py).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.numerics import bits
from kernels.quantize import Scale

FLT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def values_of(code, f: tl.constexpr):
    """int32 codes -> fp32 numbers, NaN where there is none."""
    M: tl.constexpr = f.mantissa
    magnitude = code & ((1 << (f.exponent + M)) - 1)
    binades = tl.maximum((magnitude >> M) - 1, 0)  # above the lowest
    significand = (magnitude - (binades << M)).to(tl.float32)
    value = significand * ((binades + f.lowest - M) << 23).to(tl.float32, bitcast=True)
    return tl.where((code == magnitude) & (magnitude <= f.top), value, float("nan"))


@triton.jit
def prepare_kernel(amax_ptr, held_ptr, table_ptr, factor_ptr, outer_ptr, top, inverse, scale: tl.constexpr, HELD: tl.constexpr):
    """top: what the amax is mapped to; inverse: fl(1 / target). amax fp32 [1]; held fp32 [1], an amax in its place, 0: none."""
    i = tl.arange(0, 1)
    amax = tl.load(amax_ptr + i)
    finite = (bits(amax) & 0x7FFFFFFF) < 0x7F800000
    if HELD:
        held = tl.load(held_ptr + i)
        amax = tl.where((held > 0) & finite, held, amax)
    if scale.kind == "gam":
        s = bits(tl.minimum(tl.div_rn(tl.full((1,), scale.target, tl.float32), amax), FLT_MAX))
        m = tl.where(finite, (s & 0x7FFFFF) | 0x3F800000, 0x7FC00000).to(tl.float32, bitcast=True)
        tl.store(factor_ptr + i, m)
        tl.store(outer_ptr + i, tl.div_rn(tl.full((1,), 1.0, tl.float32), m))
    else:
        encode = tl.full((1,), 1.0, tl.float32)
        if not scale.alone:
            encode = tl.minimum(tl.div_rn(encode * top, amax), FLT_MAX)
            encode = tl.where(finite, tl.where(amax == 0, 1.0, encode), float("nan"))
        decode = tl.div_rn(tl.full((1,), 1.0, tl.float32), encode)
        tl.store(outer_ptr + i, decode)
        tl.store(factor_ptr + i, encode if scale.divide else encode * inverse)
        code = tl.arange(0, 256)
        full = values_of(code, scale.float) * decode
        factor = tl.div_rn(tl.full((256,), 1.0, tl.float32), full)
        tl.store(table_ptr + code, tl.where(factor == factor, tl.minimum(factor, FLT_MAX), float("nan")))


@functools.cache
def fp32(x: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(x))


def prepare(amax: Tensor, scale: Scale, outer_target: float, held: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """amax fp32 [1] -> the table fp32 [256], the factor fp32 [1], the outer scale fp32 [1]."""
    table, factor, outer = (torch.empty(n, device=amax.device) for n in (256, 1, 1))
    top, inverse = fp32(scale.target * outer_target), fp32(1.0 / scale.target)
    prepare_kernel[(1,)](
        amax, amax if held is None else held, table, factor, outer, top, inverse, scale, held is not None,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return table, factor, outer
