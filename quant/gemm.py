"""gemm(a, b): y[M, N] = a[M, K] b[N, K]^T of two operands. A backend is picked here and in native.py, and nowhere else.

    emulate     anywhere: operands as `code * scale`, BF16 where that is exact (quantize.py); scales of a tensor or of rows
                leave the sum as alpha, so one ordinary matrix product is all there is
    scaled_mm   torch.nn.functional.scaled_mm   \\   of the packed operands; native.py has what they can
    triton      kernels/matmul.py               /
    auto        on CUDA, for each GEMM scaled_mm if it can, else triton if it can without decoding, else emulate

What is emulated has a mode, which also says how hardware may add (accumulate.py):

    bf16        y = round( bf16(sum) * alpha )      two roundings: a CPU's BF16 matmul returns BF16. Fast, and what the BF16
                                                    baseline beside it does
    fp32        y = round( fp32(sum) * alpha )      one rounding, with fp32 matmuls; for CPUs without BF16 arithmetic too
    te16 ...    as fp32, and the sum in a stated order; slow

An operand that BF16 cannot hold exactly (fp32 scales inside the sum, NF4) makes its GEMM fp32 in mode bf16. The same recipe on
another backend or in another mode has the same codes and scales; its sums differ by their order and by these roundings.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant import kernel, native
from quant.accumulate import MODELS, accumulate
from quant.fuse import run
from quant.native import Sizes, Spec, multiply, supports
from quant.qtensor import QTensor

MODES = ("bf16", "fp32", *MODELS)
BACKENDS = ("auto", "emulate", "scaled_mm", "triton")


class Operand(NamedTuple):
    """Of a GEMM, [R, K]: its values, or, for a backend that takes them, codes and scales."""

    values: Tensor | None = None  # BF16 where that is exact or the compute dtype, else fp32
    factor: Tensor | None = None  # fp32, [] or [R, 1]: what left the sum and is still to be applied
    quantised: bool = True
    index: Tensor | int | None = None  # of a ladder: which candidate, or which each block has (choose.py)
    packed: QTensor | None = None  # in place of values and factor

    def decoded(self) -> "Operand":
        if self.packed is None:
            return self
        values, factor = kernel.decode(self.packed)
        return self._replace(values=values, factor=factor, packed=None)

    def dense(self) -> Tensor:
        """fp32 [R, K]: fl(values * factor)."""
        values, factor, *_ = self.decoded()
        return values.to(torch.float32) if factor is None else run(_times, values, factor, None, dtype=torch.float32)


def backend_of(wanted: str, device: torch.device) -> str:
    """A backend or one of MODES -> the backend of a run there ("auto" finds nothing on a CPU)."""
    return "emulate" if wanted in MODES or (wanted == "auto" and device.type == "cpu") else wanted


def pick_mode(wanted: str, device: torch.device) -> tuple[str, str]:
    """A backend or one of MODES -> (the mode of what is emulated, one line that says which and why)."""
    if wanted not in BACKENDS:
        return wanted, f"emulated GEMMs: {wanted}, as asked"
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32", "emulated GEMMs: fp32, since this CPU has no BF16 arithmetic"
    return "bf16", "emulated GEMMs: bf16 (sum rounded to BF16, then scaled and rounded again)"


def pick(
    backend: str,
    name: str,
    a: Spec | None,
    b: Spec | None,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> str:
    """One of BACKENDS -> the one that multiplies a [M, K] by b [N, K] into `dtype`, for the GEMM `name` ("fprop", ...). What
    "auto" takes is said once for each GEMM and pair of specs. Raises ValueError if one that is named cannot."""
    if a is None and b is None:
        return "emulate"
    pair = " x ".join("not quantised" if spec is None else spec.short() for spec in (a, b))
    if backend != "auto":
        if why := supports(backend, a, b, sizes, device, dtype):
            raise ValueError(f"train.gemm = {backend!r} cannot multiply {name}, {pair}: {why}")
        return backend
    if device.type == "cpu":
        found, reasons = "emulate", ["auto takes GEMMs of hardware on CUDA"]
    else:
        found, why = native.pick(a, b, sizes, device, dtype)
        reasons = [f"not {each}, {reason}" for each, reason in why.items()]
    _once(say, f"GEMM {name}, {pair}: " + "; ".join([found, *reasons]))
    return found


@cache
def _once(say: Callable[[str], None], line: str) -> None:
    say(line)


def gemm(a: Operand, b: Operand, dtype: torch.dtype, mode: str, backend: str = "emulate") -> Tensor:
    """a [M, K], b [N, K] -> [M, N] in `dtype` (BF16 for activations and their gradients, fp32 for weight gradients).

    Another backend than "emulate" takes operands that are `packed`, of specs that it supports (native.supports)."""
    if backend != "emulate":
        return multiply(backend, a.packed, b.packed, dtype)
    a, b = a.decoded(), b.decoded()
    x, w = a.values, b.values
    if not (a.quantised or b.quantised):
        return linear(x, w).to(dtype)  # exactly what nn.Linear does
    if mode in MODELS:
        y = accumulate(x, w, mode)
    elif mode == "fp32" or x.dtype != w.dtype:  # (an operand that is not quantised in a run with an fp32 compute dtype)
        y = linear(x.to(torch.float32), w.to(torch.float32))
    else:
        y = linear(x, w)
    # A factor of w's rows belongs to the columns of y.
    factors = [f for f in (a.factor, None if b.factor is None else b.factor.t()) if f is not None]
    if len(factors) == 2 and any(f.ndim == 0 for f in factors):  # (row by column: no matrix of products is made)
        factors = [factors[0] * factors[1]]
    return run(_times, y, *[*factors, None][:2], dtype=dtype) if factors else y.to(dtype)


def _times(y, alpha, other, *, dtype):
    return (y.to(torch.float32) * (alpha if other is None else alpha * other)).to(dtype)


_times.wide = lambda **_: True
