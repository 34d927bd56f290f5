"""The product of kernels/matmul.py beside the exact one: operands of normal numbers, and how far apart the two may be."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kernels import capability as current
from kernels.matmul import matmul, native
from quant import QuantSpec
from quant.encode import encode
from quant.qtensor import tiled
from testing.operands import numbers


def product(
    where: AbstractContextManager,
    specs: tuple[QuantSpec, QuantSpec],
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    capability: int | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y of the kernel, fp64 [M, N]; the exact one; and the bound on their difference. where: the context in which kernels
    run; capability: as on which GPU (default: the one that there is)."""
    operands = [encode(numbers("normal", rows, K), spec) for rows, spec in zip((M, N), specs, strict=True)]
    formats = tuple(spec.format for spec in specs)
    blocks = specs[0].block[1] > 0
    scale, group = (specs[0].scale.format, specs[0].block[1]) if blocks else ("none", 0)
    factors = [q.global_scale if blocks else q.scale_codes for q in operands]
    with where:
        capability = current() if capability is None else capability
        order = tiled if native(formats, scale, group, capability) else torch.Tensor.contiguous
        given = [(q.packed(), order(q.scale_codes) if blocks else None) for q in operands]
        given, factors = [tuple(map(_to(device), pair)) for pair in given], list(map(_to(device), factors))
        y = matmul(*given, factors, formats, scale, group, K, capability, dtype).cpu().double()
    x, w = (q.dequantize().double() for q in operands)
    exact = x @ w.t()
    # Sums of K terms in fp32, in any order, toward zero at worst, then a product with that of the factors, and a rounding to
    # the dtype. (dequantize rounds code * factor to fp32, half an ulp of each of two operands.)
    ulp, last = 2.0**-23, torch.finfo(dtype).eps / 2
    return y, exact, (x.abs() @ w.abs().t()) * (K + 1) * ulp * 1.01 + exact.abs() * (2 * ulp + last) * 1.01


def _to(device: str):
    return lambda t: None if t is None else t.to(device)
