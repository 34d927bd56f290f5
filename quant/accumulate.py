"""How hardware may add: models of a GEMM's sums, for study. y[M, N] = sum over k of a[M, k] b[N, k], in fp32.

    te16        c <- fl(c + fl(s))     s exact over 16 products, in storage order     TransformerEngine's emulation of NVFP4
    rz64        c <- rz(c + s)         s exact over 64 products, one rounding toward zero
    rz64_rne    c <- rz(c + fl(s))     ... the sum of 64 rounded to nearest before
    exact       c = fl(s)              s over all products, in fp64

fl rounds to nearest, ties to even, rz toward zero. What tensor cores do is not published. Of NVFP4 on one GB200 the authors of
MrHuff/ue5m3-fp4 report that groups of 64 added toward zero give 258 of 258 reorderings of a witness and 7 of 7 BF16 witnesses;
whether a group's sum is rounded before is not established (`rz64_rne` gives 366 of 512 sampled fp32 outputs; that `rz64` gives
more is an inference). So none of these is called the hardware's, and none is a default.

Where the block scales of both operands lie within a few binades every sum is exact in fp32, since products of E2M1 and E4M3 are
multiples of one small number: then all of these agree. What tells them apart is operands of wide scales (tests/test_gemm.py).

s is summed in fp64: exactly for NVFP4, whose products are multiples of 2^-20 below 2^24, else to within 2^-53 of the largest.
Left out: sums split over K, and the 1/1024 that the same authors' emulator rounds to.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def toward_zero(s: Tensor) -> Tensor:
    """fp64 -> fp32, rounded toward zero (but what overflows is infinite)."""
    y = s.to(torch.float32)
    return torch.where(y.double().abs() > s.abs(), torch.nextafter(y, torch.zeros_like(y)), y)


def nearest(s: Tensor) -> Tensor:
    return s.to(torch.float32)


# name -> products in a group (0: all), how the group's sum is rounded (None: not), how it is added to the others.
MODELS: dict[str, tuple[int, Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor]]] = {
    "te16": (16, nearest, nearest),
    "rz64": (64, None, toward_zero),
    "rz64_rne": (64, nearest, toward_zero),
    "exact": (0, None, nearest),
}


def accumulate(a: Tensor, b: Tensor, model: str) -> Tensor:
    """a [M, K], b [N, K] -> fp32 [M, N] by one of MODELS. A last group may be shorter. Slow: K / 16 or K / 64 fp64 products."""
    size, part, add = MODELS[model]
    size = size or a.shape[1]
    c = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for x, w in zip(a.double().split(size, 1), b.double().split(size, 1), strict=True):
        s = x @ w.t()
        c = add(c.double() + (s if part is None else part(s).double()))
    return c
