"""The product of kernels/matmul.py against exact sums of what the operands stand for.

wgmma, tcgen05 and TMA are not executed without a GPU: what sm_90 and sm_100 are given is tested in the interpreter, which reads
by the same descriptors and scales, and `make kernels-check` looks at the instructions.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_product

from configs import load
from kernels import capability as current
from kernels import target_at
from kernels.matmul import matmul, native, obstacle, tile, way
from kernels.quantize import Given
from kernels.quantize import quantize as quantize_both
from quant import Context, Linear, QuantSpec, Scale, gemm, kernel, launch
from quant.encode import encode
from quant.gemm import Operand
from quant.native import parts, supports
from quant.qtensor import tiled
from testing import products
from tests.test_kernels import CUDA, ENGINES, INTERPRETED, numbers, on

NV = QuantSpec()
MX4 = QuantSpec("e2m1", (1, 32), Scale("e8m0"))
MX8 = QuantSpec("e4m3", (1, 32), Scale("e8m0"))
MX8G = QuantSpec("e5m2", (1, 32), Scale("e8m0"))
TENSOR = QuantSpec("e5m2", (-1, -1), Scale("fp32"))
ROWS = QuantSpec("e4m3", (1, -1), Scale("fp32"))
FOUR = QuantSpec("e2m1", (1, -1), Scale("fp32"))
PAIRS = {
    "nvfp4": (NV, NV),
    "mxfp4": (MX4, MX4),
    "mxfp8": (MX8, MX8),
    "e5m2": (MX8G, MX8),
    "mixed": (MX8, MX4),
    "fp8 tensor and rows": (TENSOR, ROWS),
    "fp8 rows": (ROWS, ROWS),
    "e2m1 rows": (FOUR, ROWS),
}
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in (89, 120)]
MACHINES = [80, *SLOW] if isinstance(ENGINES[0], int) else ENGINES


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """[R, B] -> [tiles, 512] in the order of tensor cores, by the formula, scale by scale."""
    rows, count = scale.shape
    tiles = -(-count // 4)
    out = torch.zeros(-(-rows // 128) * tiles * 512, dtype=scale.dtype)
    r, b = torch.meshgrid(torch.arange(rows), torch.arange(count), indexing="ij")
    out[((r // 128) * tiles + b // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + b % 4] = scale
    return out.view(-1, 512)


def product(engine, specs, M: int, N: int, K: int, dtype=torch.float32, capability=None):
    """testing.products.product there; capability: as on which GPU, where the interpreter runs it."""
    return products.product(on(engine), specs, M, N, K, dtype, capability, "cuda" if CUDA else "cpu")


@pytest.mark.parametrize("engine", MACHINES)
@pytest.mark.parametrize("name", PAIRS)
def test_products(name, engine):
    group = max(2, *(spec.block[1] for spec in PAIRS[name]))
    for M, N, K in ((128, 128, 256), (96, 112, 9 * group), (33, 71, group), (1, 257, 3 * group)):
        y, exact, bound = product(engine, PAIRS[name], M, N, K)
        assert ((y - exact).abs() <= bound).all(), (M, N, K, float(((y - exact).abs() / bound).max()))


@pytest.mark.skipif(not INTERPRETED, reason="tcgen05, wgmma and TMA are not emulated")
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *((name, 100) for name in PAIRS),
        ("nvfp4", 120),
        ("mxfp8", 120),
        ("nvfp4", 90),
        ("fp8 rows", 90),
        ("fp8 tensor and rows", 89),
    ],
)
def test_what_other_gpus_are_given(name, capability):
    """Rows of 16 bytes, which TMA reads, and others; tiles that are and are not whole; an operand of more than one tile."""
    group = max(2, *(spec.block[1] for spec in PAIRS[name]))
    for M, N, K in ((256, 128, 512), (130, 264, 320), (40, 24, 3 * group)):
        y, exact, bound = product("interpreter", PAIRS[name], M, N, K, torch.bfloat16, capability)
        assert ((y - exact).abs() <= bound).all(), (M, N, K, float(((y - exact).abs() / bound).max()))


@pytest.mark.skipif(not INTERPRETED, reason="TMA is not emulated")
def test_the_large_tile(monkeypatch):
    """Of two halves of columns; given to what is too small for it, since it takes a minute to interpret what is not."""
    monkeypatch.setattr("kernels.matmul.tile", lambda *_: tile("scaled", True, ("e2m1", "e2m1"), 4096, 4096, 100))
    assert tile("scaled", True, ("e2m1", "e2m1"), 4096, 4096, 100).BN == 256
    y, exact, bound = product("interpreter", PAIRS["nvfp4"], 130, 300, 512, capability=100)
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("engine", ENGINES[:1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_are_multiplied_first_and_y_is_rounded_once(engine, dtype):
    """Bit for bit, as quant/gemm.py has it: sums of these integers are exact."""
    engine = engine if engine in ("interpreter", "cuda") else 80
    generator = torch.Generator().manual_seed(3)
    M, N, K = 48, 80, 64
    x, w = (torch.randint(-8, 9, (rows, K), generator=generator).float() for rows in (M, N))
    f, g = (torch.rand(rows, 1, generator=generator) * 3 for rows in (M, N))
    codes = [(t.to(torch.float8_e4m3fn).view(torch.uint8).to("cuda" if CUDA else "cpu"), None) for t in (x, w)]
    for one, other in ((f, g), (f[0, 0], g), (f, g[:1]), (f[0, 0], g[0, 0]), (None, g), (f, None), (None, None)):
        with on(engine):
            given = [t.cuda() if CUDA and t is not None else t for t in (one, other)]
            y = matmul(*codes, given, ("e4m3", "e4m3"), "none", 0, K, current(), dtype).cpu()
        one, other = (torch.ones(()) if t is None else t for t in (one, other))
        wanted = ((x @ w.t()) * (one * (other.t() if other.ndim else other))).to(dtype)
        assert torch.equal(y, wanted)


def test_what_is_native_where():
    FP4, MIXED, FP8 = ("e2m1", "e2m1"), ("e4m3", "e2m1"), ("e5m2", "e4m3")
    assert native(MIXED, "e8m0", 32, 100) and not native(MIXED, "e8m0", 32, 120) and native(FP8, "e8m0", 32, 120)
    assert native(FP4, "e4m3", 16, 103) and not native(FP4, "e4m3", 32, 120) and not native(FP8, "e4m3", 16, 100)
    assert not any(native(FP4, "e4m3", 16, capability) for capability in (0, 80, 89, 90))
    assert [way(FP8, "none", 0, c) for c in (0, 80, 89, 90, 120)] == ["decoded"] * 2 + ["plain"] * 3
    assert way(MIXED, "none", 0, 100) == way(FP4, "none", 0, 100) == way(FP8, "e4m3", 16, 100) == "decoded"


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("elements int8", {"formats": ("int8", "e4m3")}),
        ("scales fp32", {"scale": "fp32"}),
        ("groups of 128", {"group": 128}),
        ("K = 80, expected a multiple of 32", {"K": 80}),
        ("K = 33, expected a multiple of 2", {"scale": "none", "K": 33, "formats": ("e2m1", "e4m3")}),
        ("sizes 64 x 64 x 0", {"K": 0}),
        ("sm_75", {"capability": 75}),
        ("codes of b: torch.uint8 [64, 128], expected torch.uint8 [64, 64]", {"formats": ("e4m3", "e2m1")}),
        (
            "scales of a: torch.uint8 [64, 4], expected torch.uint8 [1, 512]",
            {"capability": 100, "formats": ("e4m3", "e4m3"), "K": 128},
        ),
        ("scales of a: torch.uint8 [64, 4], expected torch.uint8 [64, 8]", {"scale": "e4m3", "group": 16}),
        ("factor of a: torch.float64 [1], expected torch.float32 [1]", {"factor": torch.ones(1, dtype=torch.float64)}),
        ("factor of a: torch.float32 [3, 1], expected torch.float32 [64, 1]", {"factor": torch.ones(3, 1)}),
    ],
)
def test_what_it_cannot_it_says(why, change):
    kind = {"formats": ("e4m3", "e4m3"), "scale": "e8m0", "group": 32, "K": 128, "capability": 80} | change
    factor = kind.pop("factor", None)
    operand = torch.zeros(64, 128, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
    with pytest.raises(ValueError) as found:
        matmul(operand, operand, (factor, None), **kind)
    assert why in str(found.value)
    if "expected torch" not in why:
        assert why in obstacle(M=64, N=64, **kind)
    else:
        assert not obstacle(M=64, N=64, **kind)


def test_scales_in_tiles():
    for rows, count in ((128, 4), (1, 1), (130, 6), (300, 12)):
        scale = torch.randint(0, 256, (rows, count), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
        assert torch.equal(tiled(scale), swizzled(scale))


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


# --- as a backend of quant/gemm.py ---


def assert_sums(y, a, b, eights: bool, what: str = "product") -> None:
    """helpers.assert_product, or by the bound of the sums of FP8 that some GPUs make (testing/products.py)."""
    if not (eights and CUDA and current() in (89, 90)):
        assert_product(y, a, b, int(y.dtype == torch.bfloat16), what)
        return
    bound = products.bound_of(a, b, y.dtype, True, step=128 if current() == 90 else 0)
    assert ((y.double() - a @ b.t()).abs() <= bound).all(), what


def on_device(q):
    parts = {name: part.cuda() for name, part in vars(q).items() if CUDA and isinstance(part, torch.Tensor)}
    return replace(q, **parts)


@pytest.fixture
def there(monkeypatch):
    """Kernels run where tensors are."""
    monkeypatch.setattr(kernel, "DEVICES", {"cpu", "cuda"})


@pytest.mark.parametrize("engine", MACHINES[:1])
@pytest.mark.parametrize(
    "specs", [(NV, replace(NV, block=(16, 16))), (MX8G, MX8), (TENSOR, ROWS), (MX8, MX4)], ids=lambda s: s[0].short()
)
def test_a_gemm_of_packed_operands(specs, engine, there):
    """The operator gives what the kernel gives, of squares of scales too, and operands that lie in columns."""
    M, N, K = 48, 64, 96
    x, w = numbers("normal", M, K), numbers("normal", K, N).t()
    packed = [on_device(encode(each, spec)) for each, spec in zip((x, w), specs, strict=True)]
    with on(engine):
        assert supports("triton", *specs, (M, N, K), packed[0].packed_codes.device) == ""
        y = gemm(*(Operand(packed=q) for q in packed), torch.float32, "fp32", "triton").cpu()
    assert_sums(y, *(q.dequantize().cpu().double() for q in packed), specs == (TENSOR, ROWS))


@pytest.mark.parametrize("engine", MACHINES[:1])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8-tensorwise"])
def test_a_linear_by_the_kernel(name, engine, there):
    """All three GEMMs multiply what they say they do, and what is kept for backward is what emulation keeps."""
    config = load(f"configs/{name}.toml")
    seen, kept = {}, {}
    for backend in ("triton", "emulate"):
        module = Linear(256, 128, device="cuda" if CUDA else "cpu")
        module.recipe = config.recipes[config.policy[-1].recipe]
        module.context = Context(gemm="fp32", backend=backend, device=module.weight.device)
        torch.nn.init.normal_(module.weight, generator=torch.Generator(module.weight.device).manual_seed(1))
        taps, sizes = seen.setdefault(backend, {}), kept.setdefault(backend, [])
        module.context.tap = lambda m, gemm, a, b, y, taps=taps: taps.update({gemm: (a.dense(), b.dense(), y)})
        x = numbers("normal", 128, 256).to(module.weight.device).requires_grad_()
        with on(engine), torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            y = module(x)
            y.backward(numbers("normal", 128, 128).to(y.device))
    assert sum(kept["triton"]) == sum(kept["emulate"])
    for gemm_, (a, b, y) in seen["triton"].items():
        for ours, wanted in zip((a, b), seen["emulate"][gemm_], strict=False):
            assert torch.equal(ours, wanted), f"{gemm_}: operands"
        assert_sums(y.cpu(), a.cpu().double(), b.cpu().double(), name == "fp8-tensorwise", gemm_)


def test_the_operator_of_products(there):
    if not (INTERPRETED or CUDA):
        pytest.skip("in the interpreter or on a GPU: a driver that is not there is not one to opcheck")
    for specs in ((NV, NV), (TENSOR, ROWS)):
        packed = [on_device(encode(numbers("normal", 32, 64), spec)) for spec in specs]
        given = [parts(q) for q in packed]
        scale = ("none", 1) if specs[0].leaves else (specs[0].scale.format, specs[0].block[1])
        formats = [spec.format for spec in specs]
        torch.library.opcheck(launch.matmul_op, (*given, *formats, *scale, 64, torch.bfloat16))
