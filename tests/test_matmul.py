"""The block-scaled product of kernels/matmul.py against exact sums of what the operands stand for."""

import pytest
import torch

from kernels import capability as current
from kernels import target_at
from kernels.matmul import matmul, native
from kernels.quantize import Given
from kernels.quantize import quantize as quantize_both
from quant import QuantSpec, Scale, launch, quantize
from tests.test_kernels import CUDA, ENGINES, numbers, on

NV = QuantSpec()
MX4 = QuantSpec("e2m1", (1, 32), Scale("e8m0"))
MX8 = QuantSpec("e4m3", (1, 32), Scale("e8m0"))
MX8G = QuantSpec("e5m2", (1, 32), Scale("e8m0"))


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """[R, B] -> [tiles, 512] in the order of tensor cores, by the formula, scale by scale."""
    rows, count = scale.shape
    tiles = -(-count // 4)
    out = torch.zeros(-(-rows // 128) * tiles * 512, dtype=scale.dtype)
    r, b = torch.meshgrid(torch.arange(rows), torch.arange(count), indexing="ij")
    out[((r // 128) * tiles + b // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + b % 4] = scale
    return out.view(-1, 512)


def product(engine, specs, M: int, N: int, K: int, dtype=torch.float32):
    """-> y of the kernel; the exact one, fp64; and the bound on their difference."""
    operands = [quantize(numbers("normal", rows, K), spec) for rows, spec in zip((M, N), specs, strict=True)]
    formats = tuple(spec.format for spec in specs)
    outer = [q.global_scale if q.global_scale is not None else torch.ones(()) for q in operands]
    alpha = (outer[0] * outer[1]).reshape(1)
    with on(engine):
        capability = current()
        fast = native(capability, *formats)
        given = [(q.packed(), swizzled(q.scale_codes) if fast else q.scale_codes) for q in operands]
        given = [tuple(t.cuda() for t in pair) for pair in given] if CUDA else given
        scale, group = specs[0].scale.format, specs[0].block[1]
        y = matmul(*given, alpha.cuda() if CUDA else alpha, formats, scale, group, K, capability, dtype).cpu()
    x, w = (q.dequantize().double() / o for q, o in zip(operands, outer, strict=True))
    # Sums of K terms in fp32, in any order, toward zero at worst, then two roundings: alpha's and that to the dtype.
    ulp = 2.0**-23
    bound = (x.abs() @ w.abs().t()) * alpha.double() * (K * ulp) * 1.01
    return y.double(), x @ w.t() * alpha.double(), bound + (x @ w.t() * alpha.double()).abs() * 2 * ulp


@pytest.mark.parametrize("engine", [80, pytest.param(120, marks=pytest.mark.slow)] if isinstance(ENGINES[0], int) else ENGINES)
@pytest.mark.parametrize(
    "specs", [(NV, NV), (MX4, MX4), (MX8, MX8), (MX8G, MX8), (MX8, MX4)], ids=["nvfp4", "mxfp4", "mxfp8", "e5m2", "mixed"]
)
def test_products(specs, engine):
    y, exact, bound = product(engine, specs, 128, 128, 256)
    assert ((y - exact).abs() <= bound).all(), float(((y - exact).abs() / bound).max())
    y, exact, bound = product(engine, specs, 96, 112, 288)
    assert ((y - exact).abs() <= bound).all(), "ragged"


def test_mixed_formats_are_no_native_product_of_sm_120():
    assert native(100, "e4m3", "e2m1") and not native(120, "e4m3", "e2m1") and native(120, "e5m2", "e4m3")
    assert not any(native(capability, "e2m1", "e2m1") for capability in (0, 80, 89, 90))


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_scales_in_the_order_of_tensor_cores(engine):
    """As the quantiser writes them along both axes: the plain ones, by the formula; padding is 0."""
    x = numbers("normal", 160, 224)
    x = x.cuda() if CUDA else x
    with on(engine):
        target = target_at(current())
        given = Given(
            *(torch.zeros(5, dtype=dtype, device=x.device) for dtype in (torch.float32,) * 2 + (torch.int64, torch.int32))
        )
        side = launch.side_of(MX8)
        plain = quantize_both(x, side, given, side, given, target)
        side = side._replace(swizzle=True)
        found = quantize_both(x, side, given, side, given, target)
    for (codes, scale), (same, order) in zip(plain, found, strict=True):
        assert torch.equal(codes, same) and torch.equal(swizzled(scale.cpu()), order.cpu())
