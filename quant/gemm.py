"""gemm(a, b): y[M, N] = a[M, K] b[N, K]^T of two operands. The only place where a backend is picked.

`emulate`, the one backend so far, runs everywhere: operands arrive as `code * scale`, BF16 where that is exact (quantize.py),
and scales of a tensor or of rows leave the sum as alpha, so one ordinary matrix product is all there is. Two modes:

    bf16    y = round( bf16(sum) * alpha )      two roundings: a CPU's BF16 matmul returns BF16. Fast, and what the BF16
                                                baseline beside it does
    fp32    y = round( fp32(sum) * alpha )      one rounding, with fp32 matmuls; for CPUs without BF16 arithmetic too

An operand that BF16 cannot hold exactly (fp32 scales inside the sum, NF4) makes its GEMM fp32 in either mode.

Left out so far: scaled_mm, Triton, accumulation models of the hardware.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.fuse import run

MODES = ("bf16", "fp32")


class Operand(NamedTuple):
    values: Tensor  # [R, K]: BF16 where that is exact or the compute dtype, else fp32
    factor: Tensor | None = None  # fp32, [] or [R, 1]: what left the sum and is still to be applied
    quantised: bool = True
    index: Tensor | int | None = None  # of a ladder: which candidate, or which each block has (choose.py)

    def dense(self) -> Tensor:
        """fp32 [R, K]: fl(values * factor)."""
        if self.factor is None:
            return self.values.to(torch.float32)
        return run(_times, self.values, self.factor, None, dtype=torch.float32)


def pick_mode(wanted: str, device: torch.device) -> tuple[str, str]:
    """ "auto" or one of MODES -> (mode, one line that says which and why)."""
    if wanted != "auto":
        return wanted, f"emulated GEMMs: {wanted}, as asked"
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32", "emulated GEMMs: fp32, since this CPU has no BF16 arithmetic"
    return "bf16", "emulated GEMMs: bf16 (sum rounded to BF16, then scaled and rounded again)"


def gemm(a: Operand, b: Operand, dtype: torch.dtype, mode: str) -> Tensor:
    """a [M, K], b [N, K] -> [M, N] in `dtype` (BF16 for activations and their gradients, fp32 for weight gradients)."""
    x, w = a.values, b.values
    if not (a.quantised or b.quantised):
        return linear(x, w).to(dtype)  # exactly what nn.Linear does
    if mode == "fp32" or x.dtype != w.dtype:  # (an operand that is not quantised in a run with an fp32 compute dtype)
        x, w = x.to(torch.float32), w.to(torch.float32)
    y = linear(x, w)
    # A factor of w's rows belongs to the columns of y.
    factors = [f for f in (a.factor, None if b.factor is None else b.factor.t()) if f is not None]
    if len(factors) == 2 and any(f.ndim == 0 for f in factors):  # (row by column: no matrix of products is made)
        factors = [factors[0] * factors[1]]
    return run(_times, y, *[*factors, None][:2], dtype=dtype) if factors else y.to(dtype)


def _times(y, alpha, other, *, dtype):
    return (y.to(torch.float32) * (alpha if other is None else alpha * other)).to(dtype)


_times.wide = lambda **_: True
