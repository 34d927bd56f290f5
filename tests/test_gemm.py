"""quant/gemm.py, native.py and accumulate.py: each backend multiplies the operands that the codes and scales stand for, within
what its order of adding may do; what a backend cannot it refuses with a reason, and what "auto" takes it says once.
"""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers import assert_product, assert_same_bits
from torch import Tensor

from quant import Choice, Context, Linear, QuantSpec, Recipe, Scale, gemm, quantize
from quant.accumulate import MODELS, accumulate
from quant.gemm import Operand, backend_of, pick, pick_mode
from quant.native import kind, line_scales, multiply, supports
from quant.quantize import quantized_values

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))
TENSOR = QuantSpec("e4m3", (-1, -1), Scale("fp32"))
ROW = replace(TENSOR, block=(1, -1))
MX, NV = QuantSpec("e4m3", (1, 32), Scale("e8m0")), QuantSpec()
LADDER = Choice((TENSOR, QuantSpec("bf16", scale=Scale("none"))), "relative_error", 0.045, "tensor")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(rows: int, k: int, seed: int) -> Tensor:
    """Each 16 of a row times 2^u, u uniform in -8 ... 0: sums of such operands are not exact in fp32."""
    u = torch.randint(-8, 1, (rows, k // 16), generator=torch.Generator().manual_seed(seed + 100))
    return normal(rows, k, seed=seed) * (2.0**u).repeat_interleave(16, 1)


# --- models of accumulation ---


def fl(x: Fraction, toward_zero: bool = False) -> Fraction:
    """x rounded to fp32, in whole numbers of its own exponent."""
    if x == 0:
        return x
    e = max(math.frexp(float(x))[1], -125) - 24  # (float(x) may round up to a power of two, so look again)
    if abs(x) < Fraction(2) ** (e + 23):
        e = max(e - 1, -149)
    steps = x / Fraction(2) ** e
    whole = int(steps) if toward_zero else round(steps)  # (round: ties to even)
    return whole * Fraction(2) ** e


@pytest.mark.parametrize("model", MODELS)
def test_models_are_their_definitions(model):
    """In exact arithmetic, with cancellation, subnormal sums and a last group that is short."""
    a, b = (quantized_values(wide(3, 144, seed), NV)[0] for seed in (1, 2))
    a = torch.cat([a, a[:1] * 2.0**-70, -a[:1]])
    b = torch.cat([b, b[:1] * 2.0**-66])
    size, part, _ = MODELS[model]
    found = accumulate(a, b, model)
    for i, x in enumerate(a.tolist()):
        for j, w in enumerate(b.tolist()):
            products = [Fraction(p) * Fraction(q) for p, q in zip(x, w, strict=True)]
            c = Fraction(0)
            for k in range(0, len(products), size or len(products)):
                s = sum(products[k : k + size] if size else products)
                c = fl(c + (fl(s) if part else s), toward_zero=model.startswith("rz"))
            assert Fraction(found[i, j].item()) == c, (model, i, j)


def test_what_tells_models_apart():
    """Published (specs of NVFP4 GEMMs, one draw): of 64 x 64 sums of K = 512 and 2048, te16 and groups of 64 toward zero differ
    in 59 % and 94 % for wide operands, in none for normal ones. A share of 4096 deviates by at most 0.8 %; four of these, two
    draws of two operands each."""
    for k, share in ((512, 0.59), (2048, 0.94)):
        a, b = (quantized_values(wide(64, k, seed), NV)[0] for seed in (3, 4))
        sums = {model: accumulate(a, b, model) for model in MODELS}
        assert float((sums["te16"] != sums["rz64_rne"]).float().mean()) == pytest.approx(share, abs=4 * 0.008)
        assert len({s.numpy().tobytes() for s in sums.values()}) == len(MODELS), "two models are one"
        a, b = (quantized_values(normal(64, k, seed=seed), NV)[0] for seed in (3, 4))
        sums = [accumulate(a, b, model) for model in MODELS] + [a.float() @ b.float().t()]
        assert len({s.numpy().tobytes() for s in sums}) == 1, "sums of normal operands are exact in any order"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_a_mode_of_emulation(model):
    x, w = wide(16, 128, 1), wide(32, 128, 2)
    a, b = (Operand(*quantized_values(each, NV)) for each in (x, w))
    y = gemm(a, b, torch.float32, model)
    assert_same_bits(y, accumulate(a.values, b.values, model) * (a.factor * b.factor))
    module = Linear(128, 32)
    module.recipe, module.context = Recipe(fprop={"x": NV, "w": NV}), Context(gemm=model)
    with torch.no_grad():
        module.weight.copy_(w)
        assert_same_bits(module(x), y, "a Linear")


# --- packed operands ---


def test_squares_are_read_as_rows():
    q = quantize(normal(32, 64), replace(NV, block=(16, 16)))
    values = quantized_values(normal(32, 64), replace(NV, block=(16, 16)))[0]
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[q.codes().long()]
    scale = line_scales(q).contiguous().view(torch.float8_e4m3fn).float()
    assert scale.shape == (32, 4)
    assert_same_bits((codes * scale.repeat_interleave(16, 1)).bfloat16(), values)


def dense(q) -> Tensor:
    return q.dequantize().double()


FP8 = [
    (a, b)
    for a in (TENSOR, ROW, replace(TENSOR, format="e5m2"), replace(ROW, scale=Scale("e8m0")))
    for b in (TENSOR, ROW, replace(ROW, format="e5m2"))
]


@pytest.mark.parametrize("a, b", FP8, ids=lambda spec: spec.short().replace(" ", "-"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_mm_of_fp8(a, b, dtype):
    """It may round a sum to BF16 before its scales are applied."""
    x, w = quantize(normal(48, 96), a), quantize(normal(32, 96, seed=1).t().contiguous().t(), b)
    assert supports("scaled_mm", a, b, (48, 32, 96), CPU, dtype) == ""
    y = gemm(Operand(packed=x), Operand(packed=w), dtype, "fp32", "scaled_mm")
    assert y.dtype == dtype
    assert_product(y, dense(x), dense(w), 2 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("sizes", [(256, 128, 512), (48, 32, 96), (130, 48, 160)])
@pytest.mark.parametrize(
    "a, b", [(MX, replace(MX, block=(32, 32))), (replace(MX, format="e5m2"), MX), (NV, replace(NV, block=(16, 16))), (NV, NV)]
)
def test_shapes_of_block_scales_on_meta(a, b, sizes):
    """torch checks types, sizes of packed codes and of tiled scales without a GPU."""
    M, N, K = sizes
    if M % b.block[0] or N % b.block[0]:
        b = replace(b, block=(1, b.block[1]))
    packed = [quantize(normal(rows, K), spec) for rows, spec in ((M, a), (N, b))]
    meta = [replace(q, **{n: getattr(q, n).to("meta") for n in PARTS if getattr(q, n) is not None}) for q in packed]
    assert supports("scaled_mm", a, b, sizes, META) == ""
    for dtype in (torch.bfloat16, torch.float32):
        y = multiply("scaled_mm", *meta, dtype)
        assert (y.shape, y.dtype, y.device.type) == ((M, N), dtype, "meta")
    with pytest.raises(RuntimeError, match="scale"):  # so the check above is one
        multiply("scaled_mm", replace(meta[0], scale_codes=meta[0].scale_codes.repeat(5, 1)), meta[1], torch.bfloat16)


PARTS = "packed_codes", "scale_codes", "outer_codes"


# --- what can be multiplied, and why not ---


def test_reasons():
    int8, square = QuantSpec("int8", (-1, -1), Scale("fp32")), QuantSpec("e4m3", (128, 128), Scale("fp32"))
    e5m2 = replace(TENSOR, format="e5m2")
    cases = [
        ("scaled_mm", NV, NV, CPU, None, "on CUDA only, from sm_100 on"),
        ("scaled_mm", NV, NV, CUDA, 90, "needs sm_100 or newer, not sm_90"),
        ("scaled_mm", MX, MX, CUDA, 120, ""),
        ("scaled_mm", NV, NV, CUDA, 103, ""),
        ("scaled_mm", TENSOR, ROW, CUDA, 89, ""),
        ("scaled_mm", TENSOR, ROW, CUDA, 80, "needs sm_89"),
        ("scaled_mm", e5m2, e5m2, CUDA, 90, "E5M2 by E5M2"),
        ("scaled_mm", replace(NV, scale=Scale("e8m0"), block=(1, 32)), MX, CUDA, 100, "MXFP4"),
        ("scaled_mm", MX, NV, CUDA, 100, "MX by NVFP4: scales of two kinds"),
        ("scaled_mm", int8, TENSOR, CUDA, 100, "neither E2M1, E4M3 nor E5M2"),
        ("scaled_mm", square, square, CUDA, 100, "scales are neither"),
        ("scaled_mm", LADDER, TENSOR, CUDA, 100, "known only when it has decided"),
        ("scaled_mm", None, TENSOR, CUDA, 100, "an operand is not quantised"),
        ("triton", NV, NV, CPU, None, "kernels run on CUDA, not on cpu"),
        ("emulate", None, LADDER, CPU, None, ""),
    ]
    for backend, a, b, device, capability, reason in cases:
        found = supports(backend, a, b, (64, 64, 128), device, torch.bfloat16, capability)
        assert (reason in found) if reason else found == "", (backend, found, reason)
    assert "multiples of 16" in supports("scaled_mm", TENSOR, TENSOR, (64, 24, 128), CPU)
    assert "bfloat16 or float32" in supports("scaled_mm", TENSOR, TENSOR, (64, 32, 128), CPU, torch.float16)
    six, four = (replace(NV, scale=replace(NV.scale, target=t, outer_target=256 * 6 / t)) for t in (6.0, 4.0))
    assert kind(Choice((six, four))).scale == "nv", "four over six"


def test_auto_says_once_what_it_takes():
    said: list[str] = []
    given = "fprop", TENSOR, NV, (64, 32, 128), torch.bfloat16
    for _ in range(2):
        assert pick("auto", *given, META, said.append) == "emulate"
    (line,) = said
    assert line.startswith("GEMM fprop, e4m3/allxall fp32 x e2m1/1x16: emulate; not scaled_mm, FP8 by tensor or row by NVFP4: ")
    assert "; not triton, " in line
    assert pick("auto", "fprop", TENSOR, TENSOR, *given[3:], META, said.append) == "scaled_mm" and len(said) == 2
    assert said[1] == "GEMM fprop, e4m3/allxall fp32 x e4m3/allxall fp32: scaled_mm"
    assert pick("auto", "fprop", None, None, *given[3:], META, said.append) == "emulate" and len(said) == 2
    assert backend_of("auto", CPU) == backend_of("rz64", CUDA) == "emulate" and backend_of("auto", CUDA) == "auto"
    assert pick_mode("rz64", CPU)[0] == "rz64" and pick_mode("triton", CPU)[0] in ("bf16", "fp32")


def test_a_named_backend_that_cannot_says_why():
    module = Linear(64, 32)
    module.recipe, module.context = Recipe(fprop={"x": NV, "w": NV}), Context(backend="scaled_mm")
    with pytest.raises(ValueError, match=r"'scaled_mm' cannot multiply fprop, e2m1/1x16 x e2m1/1x16: NVFP4: .* CUDA only"):
        module(normal(16, 64))


@pytest.mark.parametrize("block", [(-1, -1), (1, -1)], ids=["tensor", "row"])
def test_a_linear_by_scaled_mm(block):
    """All three GEMMs, what is kept for backward, and the values that a tap sees: those of emulation in mode fp32, but for the
    order of sums: K = 96 additions at most, twice that apart; and BF16 once or twice."""
    e4m3 = replace(TENSOR, block=block)
    e5m2 = replace(e4m3, format="e5m2")
    recipe = Recipe({"x": e4m3, "w": e4m3}, {"g": e5m2, "w": e4m3}, {"g": e5m2, "x": e4m3})
    results, seen, kept = {}, {}, {}
    for backend in ("scaled_mm", "emulate"):
        module = Linear(64, 32)
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
        module.recipe, module.context = recipe, Context(gemm="fp32", backend=backend)
        taps = seen[backend] = {}
        module.context.tap = lambda m, name, a, b, y, taps=taps: taps.update({name: (a.dense(), b.dense(), y)})
        x = normal(96, 64).bfloat16().requires_grad_()
        kept[backend] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept[backend]: (k.append(t), t)[1], lambda t: t):
            y = module(x)
        y.backward(normal(96, 32, seed=2).bfloat16())
        results[backend] = {"fprop": y, "dgrad": x.grad, "wgrad": module.weight.grad}
    assert sum(t.nbytes for t in kept["scaled_mm"]) == sum(t.nbytes for t in kept["emulate"])
    for name, (a, b, y) in seen["scaled_mm"].items():
        for ours, expected in zip((a, b), seen["emulate"][name], strict=False):
            assert_same_bits(ours, expected, f"{name}: operands")
        assert_product(y, a.double(), b.double(), 0 if name == "wgrad" else 2, name)
        assert results["scaled_mm"][name].dtype == results["emulate"][name].dtype
