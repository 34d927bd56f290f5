"""gemm(a, b): y[M, N] = a[M, K] b[N, K]^T of two operands. The only place where a backend is picked.

`emulate`, the one backend so far, runs everywhere: operands arrive as BF16 `code * scale` (exact, see quantize.py) and
the product of their global scales leaves the sum as alpha, so one ordinary matrix product is all there is. Two modes:

    bf16    y = round( bf16(sum) * alpha )      two roundings: a CPU's BF16 matmul returns BF16. Fast, and what the BF16
                                                baseline beside it does
    fp32    y = round( fp32(sum) * alpha )      one rounding, with fp32 matmuls; for CPUs without BF16 arithmetic too

Left out so far: scaled_mm, Triton, accumulation models of the hardware.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.fuse import run

MODES = ("bf16", "fp32")

# values [R, K] in the compute dtype, and the global scale [] still to be applied, or None
Operand = tuple[Tensor, Tensor | None]


def pick_mode(wanted: str, device: torch.device) -> tuple[str, str]:
    """ "auto" or one of MODES -> (mode, one line that says which and why)."""
    if wanted != "auto":
        return wanted, f"emulated GEMMs: {wanted}, as asked"
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32", "emulated GEMMs: fp32, since this CPU has no BF16 arithmetic"
    return "bf16", "emulated GEMMs: bf16 (sum rounded to BF16, then scaled and rounded again)"


def gemm(a: Operand, b: Operand, dtype: torch.dtype, mode: str) -> Tensor:
    """a [M, K], b [N, K] -> [M, N] in `dtype` (BF16 for activations and their gradients, fp32 for weight gradients)."""
    (x, sx), (w, sw) = a, b
    scales = [s for s in (sx, sw) if s is not None]
    if not scales:
        return linear(x, w).to(dtype)  # nothing is quantised: exactly what nn.Linear does
    if mode == "fp32" or x.dtype != w.dtype:  # (an operand that is not quantised in a run with an fp32 compute dtype)
        x, w = x.to(torch.float32), w.to(torch.float32)
    y = linear(x, w)
    alpha = scales[0] if len(scales) == 1 else scales[0] * scales[1]
    return run(_times, y, alpha, dtype=dtype)


def _times(y, alpha, *, dtype):
    return (y.to(torch.float32) * alpha).to(dtype)
