"""Triton kernels: plain tensors and numbers in, plain tensors out; nothing here imports anything of ours.

    numerics.py    codes of small floats, random bits, pairs of numbers: what a thread computes
    quantize.py    a matrix to codes and scales, along one axis or both in one read
    amax.py        the largest magnitudes of a matrix, before or after a Hadamard transform
    prepare.py     what a tensor's amax makes of its scales
    dequantise.py  codes and scales to values, of one candidate or of whichever each block has
    errors.py      how far the values of a candidate are from what was quantised, block by block
    matmul.py      the product of two quantised matrices

Each kernel has one source. Where a GPU has an instruction that gives the same bits as the exact arithmetic, `target_at` says
so and the kernel uses it; everything is compiled without fusing multiply and add, and divides with div_rn, so that the
interpreter, PTX executed without a GPU (testing/) and every GPU give the bits of the plain-torch reference in quant/.

The name shadows a PyPI package called `kernels`, which loaders of FlashAttention builds import: run such a loader from
another working directory.
"""

import functools

import triton

from kernels.numerics import Target

HAVE_RS = 100, 103  # compute capabilities that have cvt.rs: sm_100a and sm_103a, and no others


@functools.cache
def target_at(capability: int, rs: bool = False) -> Target:
    """What a GPU of that compute capability (80, 90, 100, ...) has; 0: exact arithmetic alone, as in the interpreter. rs: round
    stochastically by cvt.rs, which is never so unless asked for; raises ValueError where there is no such instruction.

    Conversions to E4M3 and E5M2 round twice on sm_89 in Triton 3.8 and miss ties on sm_80, so exact arithmetic stands for
    them."""
    if rs and capability not in HAVE_RS:
        here = f"sm_{capability}" if capability else "no GPU"
        raise ValueError(f"cvt.rs: an instruction of sm_100a and sm_103a, and this is {here}")
    new, at_least_90 = capability >= 100, capability >= 90
    return Target(f32x2=new, e2m1=new, fp8=at_least_90, max2=at_least_90, min2=capability >= 80, rs=rs)


def capability() -> int:
    """That of the current GPU; 0 in Triton's interpreter. Raises RuntimeError where there is neither."""
    return 0 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
