"""The product of kernels/matmul.py beside the exact one: operands of normal numbers, and how far apart the two may be."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kernels import capability as current
from kernels.matmul import matmul, native, way
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
    truncating = capability in (89, 90) and way(formats, scale, group, capability) == "plain"
    return y, exact, bound_of(x, w, dtype, truncating, step=128 if capability == 90 else 0)


def bound_of(x: Tensor, w: Tensor, dtype: torch.dtype, truncating: bool = False, step: int = 128) -> Tensor:
    """x [M, K] w [N, K]^T of fp64 -> how far the product may be from it. truncating: sums of FP8 on sm_89 and sm_90, where
    each `step` along K has a sum of its own, in fp32 added to those before; 0: all of K has one."""
    exact = x @ w.t()
    # Sums of K terms in fp32, in any order, toward zero at worst, then a product with that of the factors, and a rounding to
    # the dtype. (dequantize rounds code * factor to fp32, half an ulp of each of two operands.)
    ulp, last = 2.0**-23, torch.finfo(dtype).eps / 2
    bound = (x.abs() @ w.abs().t()) * (x.shape[1] + 1) * ulp * 1.01 + exact.abs() * (2 * ulp + last) * 1.01
    if not truncating:
        return bound
    # An instruction adds 32 products to its sum, each cut off 13 bits below the largest of them, and so is what comes out
    # (arXiv:2412.19437 section 3.5.2 of sm_90, arXiv:2411.10958 of sm_89 too): 34 times 2^-13 of the largest.
    step = step or x.shape[1]
    for start in range(0, x.shape[1], step):
        total = torch.zeros_like(exact)
        for k in range(start, min(start + step, x.shape[1]), 32):
            a, b = x[:, k : k + 32], w[:, k : k + 32]
            before, total = total, total + a @ b.t()
            largest = torch.outer(a.abs().amax(1), b.abs().amax(1)).maximum(before.abs()).maximum(total.abs())
            bound += 34 * 2.0**-13 * 1.01 * largest
    return bound


def _to(device: str):
    return lambda t: None if t is None else t.to(device)
