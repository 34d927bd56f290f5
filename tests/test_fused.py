"""quant/fuse.py: what torch.compile makes of the units has the bits of eager torch: each unit in both memory layouts,
on special values, for sizes it was not compiled for; a Linear forward and backward; a Linear compiled whole.

Compiling takes seconds a unit (once, then it is on disk): the default run checks two operands of the NVFP4 recipe,
which have each kind of unit in them (rotate, scales, noise, values, pack, decode), the slow one everything.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from torch._dynamo.utils import counters

from configs import load
from quant import Choice, Context, Linear, QuantSpec, Recipe, fuse, quantize
from quant.encode import decode, rotated
from quant.formats import FORMATS, binade
from quant.fuse import run
from quant.quantize import quantized_values
from quant.random import Key, random_ints
from quant.spec import Scale

fusing = sys.modules["quant.fuse"]  # (the name `quant.fuse` is the function)
ROOT = Path(__file__).parent.parent
NV, SQUARE, SR8 = QuantSpec(), QuantSpec(block=(16, 16)), QuantSpec(rounding="stochastic8")
RHT, RHT_SR8 = QuantSpec(hadamard=16), QuantSpec(hadamard=16, rounding="stochastic8")
NVFP4 = Recipe(fprop={"x": NV, "w": SQUARE}, dgrad={"g": SR8, "w": SQUARE}, wgrad={"g": RHT_SR8, "x": RHT})
NVFP4_FRESH = Recipe(
    fprop={"x": NV, "w": QuantSpec(scale=Scale(order="g1"))},
    dgrad={"g": QuantSpec(rounding="stochastic"), "w": QuantSpec(scale=Scale(order="g1"))},
    wgrad={
        "g": QuantSpec(hadamard=32, signs="fresh", rounding="stochastic"),
        "x": QuantSpec(hadamard=32, signs="fresh"),
    },
)
KEY = Key(1, 2, 3, 4)


@pytest.fixture(autouse=True)
def switched_off_again():
    yield
    fuse(False)


@pytest.fixture
def compiler():
    line = fuse(True)
    fuse(False)
    if ": fused" not in line:
        pytest.skip(line)


def both(function: Callable[[], dict[str, Tensor | None]], what: str) -> None:
    fuse(False)
    eager = function()
    fuse(True)
    fused = function()
    fuse(False)
    for name in eager:
        if eager[name] is None:
            assert fused[name] is None
        else:
            assert_same_bits(fused[name], eager[name], f"{what}: fused {name}")


def normal(*shape: int, seed: int = 0, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def special(dtype: torch.dtype) -> dict[str, Tensor]:
    """Operands [32, 64] on which fused arithmetic could go its own way: flushed subnormals, signs of zero, NaN in a
    maximum, overflow, and scales in every binade."""
    tiny, top = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    g = torch.Generator().manual_seed(0)
    x = normal(32, 64, dtype=dtype)
    zero_block, nan, inf, outlier = x.clone(), x.clone(), x.clone(), x.clone()
    zero_block[:16, 16:32] = 0
    zero_block[3, 20:24] = -0.0
    nan[31, 63], inf[0, 17], outlier[9, 9] = math.nan, -math.inf, 1e6
    wild = (x.float() * 2.0 ** torch.randint(-126, 100, (32, 1), generator=g)).to(dtype)
    steps = torch.randint(-100, 101, (32, 64), generator=g)
    subnormal = (steps.double() * tiny / 128).to(dtype)  # BF16 has 7 bits below its smallest normal number
    return {
        "normal": x, "a zero block": zero_block, "NaN": nan, "Inf": inf, "blocks whose scale is 0": outlier,
        "wild exponents": wild, "subnormals": subnormal, "subnormals beside 1": torch.where(x > 2, 1, subnormal),
        "large": (x.float().clamp(-4, 4) * (top / 4)).to(dtype), "zeros": torch.zeros_like(x),
        "negative zeros": -torch.zeros_like(x),
    }  # fmt: skip


def three_ways(x: Tensor, spec: QuantSpec) -> dict[str, Tensor | None]:
    """quantize, quantized_values and decode of x as it lies in memory."""
    key = KEY if spec.keyed else None
    q = quantize(x, spec, key)
    values, scale = quantized_values(x, spec, key)
    decoded, _ = decode(q)
    return {
        "codes": q.packed(), "scales": q.scale_codes, "global scale": q.global_scale, "values": values,
        "its factor": scale, "decoded values": decoded,
    }  # fmt: skip


def check_spec(spec: QuantSpec, dtype: torch.dtype, transposed: bool) -> None:
    for what, x in special(dtype).items():
        for part, view in {"32 x 64": x, "32 x 32": x[:, 32:], "64 x 192": x.repeat(2, 3)}.items():
            view = view.clone().t() if transposed else view
            what = f"{spec.short()} of {what}, {part}, {dtype}{', transposed' if transposed else ''}"
            both(lambda view=view: three_ways(view, spec), what)


# --- the switch ---


def test_it_says_what_runs_and_why(compiler):
    assert fuse(False) == "quantiser: eager, as asked"
    assert fuse(True) == "quantiser: fused by torch.compile (C++), bit-equal to eager"


# --- what compiled code computes by other formulas ---


LINES = ["e2m1", "e3m10b114", "int8"]
MANY = [f"e{E}m{M}" for E in (1, 2, 3) for M in range(11)] + ["e1m3b122", "e2m5b-3", "ue3m2", "int2"]


@pytest.mark.parametrize("names", [LINES, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"])
def test_codes_and_values_along_the_line(names, compiler):
    """Every code."""
    for f in (FORMATS[name] for name in names):
        assert f.bends is not None
        codes = torch.arange(2**f.bits, dtype=torch.uint8 if f.bits <= 8 else torch.int32)
        values = f.decode(codes)
        values = values[~values.isinf()]  # which E3M4 has a code for, and rounding never gives
        own = {"values": run(_decoded, codes, format=f.name), "codes": run(_codes, values, format=f.name)}
        fuse(True)
        assert_same_bits(run(_decoded, codes, format=f.name), own["values"], f"{f.name}: values of all codes")
        assert_same_bits(run(_codes, values, format=f.name), own["codes"], f"{f.name}: codes of all values")
        fuse(False)


def _decoded(codes, *, format):
    return FORMATS[format].decode(codes)


def _codes(values, *, format):
    return FORMATS[format].codes_of(values)


def test_binades_of_every_significand(compiler):
    a = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    compiled = torch.compile(binade, fullgraph=True, dynamic=True)
    for k in (-100, -1, 0, 1, 100):  # and so in every binade: no operation is near an end of fp32
        assert_same_bits(compiled(a * 2.0**k), torch.full_like(a, 2.0**k), f"2^{k} to 2^{k + 1}")
    assert_same_bits(compiled(torch.zeros(32)), torch.zeros(32), "zero")


# --- two operands of the NVFP4 recipe: g of dgrad, and x^T of wgrad, which is kept packed ---


def gradient(x: Tensor) -> dict[str, Tensor]:
    return dict(zip(("values", "scale"), quantized_values(x, SR8, KEY), strict=True))


def kept(x: Tensor) -> dict[str, Tensor]:
    q = quantize(x.t(), RHT)
    return {"codes": q.packed(), "scales": q.scale_codes, "decoded": decode(q)[0], "scale": q.global_scale}


def test_special_values(compiler):
    for what, x in special(torch.bfloat16).items():
        both(lambda x=x: gradient(x), f"g: {what}")
        both(lambda x=x: kept(x), f"x^T: {what}")


def traces() -> int:
    return sum(map(len, fusing._traces.values()))


def _twice_if_not_a_multiple_of_four(x):
    return x * 2 if x.shape[0] % 4 else x * 1


def test_other_sizes_compile_nothing(compiler):
    """Sizes change with the batch of an evaluation and from Linear to Linear: one unit must serve them all."""
    fuse(True)
    gradient(normal(64, 96)), kept(normal(64, 96))
    before = traces()
    for rows, k in ((32, 64), (96, 32), (128, 256), (48, 48), (240, 80)):
        x = normal(rows, k)
        both(lambda x=x: gradient(x) | {f"kept {name}": t for name, t in kept(x).items()}, f"{rows} x {k}")
    assert traces() == before, "units were compiled again for other sizes"


def test_a_single_row(compiler):
    """A vector, as the gains of norms are: sizes of 1 are no symbols."""
    for shape in ((1, 96), (2, 96), (1, 64), (96,)):
        x = normal(*shape)
        for spec in (SR8, QuantSpec(rounding="stochastic"), QuantSpec("e4m3", (1, 32), Scale("e8m0"))):
            both(lambda x=x, spec=spec: {"codes": quantize(x, spec, KEY).codes()}, f"{spec.short()} of {list(shape)}")


def test_one_tensor_given_twice_is_two_inputs(compiler):
    fuse(True)
    a, b = torch.full((8,), 5.0), torch.ones(8)
    assert run(_difference, a, a).tolist() == [0.0] * 8
    assert run(_difference, a, b).tolist() == [4.0] * 8


def _difference(a, b):
    return a - b


def test_strides_do_not_matter(compiler):
    a = normal(12, 10).float()
    fuse(True)
    for view in (a, a.t(), a[:, :6], a[::2], a[:1], a[:0]):
        assert_same_bits(run(_difference, view, view * 2), view - view * 2, f"{view.shape}, {view.stride()}")


def test_a_trace_serves_only_sizes_that_it_was_made_for(compiler):
    """A unit may look at a size: then another size is another trace, and never a wrong answer."""
    fuse(True)
    for n, expected in ((6, 2), (8, 1), (3, 2), (4, 1), (16, 1), (5, 2)):
        assert run(_twice_if_not_a_multiple_of_four, torch.ones(n)).tolist() == [expected] * n
    found = [trace for (unit, *_), made in fusing._traces.items() for trace in made if unit is _twice_if_not_a_multiple_of_four]
    assert len(found) == 2, "one trace for either branch"


# --- everything ---

SPECS = [NV, SQUARE, RHT, SR8, QuantSpec(rounding="stochastic"), QuantSpec(scale=Scale(order="g1")),
         QuantSpec(hadamard=128, signs="fresh"), QuantSpec(rounding="away"), QuantSpec(format="e4m3"),
         QuantSpec(block=(2, 32), rounding="zero"), QuantSpec(format="e3m2", block=(1, 32)),
         *(QuantSpec("e4m3", (1, 32), Scale("e8m0", rule=rule)) for rule in ("floor", "even", "rceil")),
         QuantSpec("int8", (1, 32), Scale("e8m0", rule="floor"), "away"),
         QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75), "stochastic"),
         QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", statistic="std", target=2.05305)),
         QuantSpec(scale=Scale("e5m3")), QuantSpec(scale=Scale("e4m3", "row")), QuantSpec(scale=Scale("e4m3", "1x32")),
         QuantSpec("e5m2", (-1, -1), Scale("fp32")), QuantSpec("int8", (1, -1), Scale("fp32"), "stochastic8"),
         QuantSpec("int4", (1, 32), Scale("bf16")), QuantSpec("int16", (-1, -1), Scale("e8m0", rule="ceil")),
         QuantSpec("e4m3-fnuz", (-1, -1), Scale("fp32")), QuantSpec("e8m3", scale=Scale("none")),
         QuantSpec("nf4", (1, 32), Scale("fp32")), QuantSpec("posit8-es1", (1, 32), Scale("e8m0", rule="rceil")),
         Choice((QuantSpec(scale=Scale(target=6, outer_target=256)), QuantSpec(scale=Scale(target=4, outer_target=384)))),
         Choice((NV, QuantSpec("int4-6")), "absolute_error"), QuantSpec(scale=Scale("e5m3", rounding="stochastic8")),
         QuantSpec(hadamard=32, signs="fresh", rounding="inward", scale=Scale(rounding="stochastic", correction="eden")),
         QuantSpec("e2m1", (1, 32), Scale("e8m0", "1x64", outer_format="m8")),
         QuantSpec("ue4m4b7", (1, 32), Scale("bf16"))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, transposed",
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)],
    ids=["bf16", "bf16 transposed", "fp32"],
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.short()} {s.scale.order}")
def test_every_spec(spec, dtype, transposed, compiler):
    if spec.multiple[1] <= 32:
        return check_spec(spec, dtype, transposed)
    for what, x in special(dtype).items():  # longer than the operands of the others
        x = x.repeat(8, 8)
        both(lambda x=x: three_ways(x.t() if transposed else x, spec), f"{spec.short()} of {what}")


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "transposed"])
@pytest.mark.parametrize("bits", [8, 11, 24])
def test_random_bits(bits, transposed, compiler):
    run = torch.compile(random_ints, fullgraph=True, dynamic=True)
    for rows, k, key in ((32, 64, KEY), (48, 128, Key(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1))):
        expected = random_ints(rows, k, bits, key.words(), transposed)
        assert_same_bits(run(rows, k, bits, key.words(), transposed), expected, f"{bits} bits, {rows} x {k}")


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 4, 16, 64])
def test_rotation_alone(d, compiler):
    spec = QuantSpec(hadamard=d)
    for dtype in (torch.bfloat16, torch.float32):
        for what, x in special(dtype).items():
            for view in (x.repeat(2, 1), x.repeat(2, 1).t()):
                both(lambda view=view: {"RHT": rotated(view, spec)}, f"{what}, d = {d}")


def passes(module: torch.nn.Module, weight: Tensor, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    weight.grad = None
    y = module(x)
    y.backward(g)
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad.clone()}


def make(recipe: Recipe, I: int, O: int, mode: str = "bf16") -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Linear(I, O)
    module.recipe, module.context = recipe, Context(7, mode)
    return module


def check_linear(recipe: Recipe, mode: str) -> None:
    for T, I, O in ((64, 96, 128), (32, 160, 64), (128, 64, 64)):

        def once(T=T, I=I, O=O):
            module = make(recipe, I, O, mode)
            module.context.at(1, T)
            return passes(module, module.weight, normal(T, I), normal(T, O, seed=1))

        both(once, f"Linear, T {T}, I {I}, O {O}, {mode}:")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [NVFP4, NVFP4_FRESH], ids=["nvfp4", "fresh g1 sr"])
@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_a_linear_forward_and_backward(recipe, mode, compiler):
    check_linear(recipe, mode)


FILES = sorted(path for path in (ROOT / "configs").glob("*.toml") if load(path).recipes)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_linear_of_every_recipe(path, compiler):
    """Codes, scales, outputs and gradients of two micro-batches in two steps, compiled and eager."""
    for name, recipe in load(path).recipes.items():

        def passed(recipe=recipe):
            module, found = make(recipe, 128, 256), {}
            for step in range(2):
                module.context.at(step, 10 + step)
                made = passes(module, module.weight, normal(128, 128, seed=step), normal(128, 256, seed=5 + step))
                found |= {f"{key}, step {step}": value for key, value in made.items()}
            if (q := module.quantized_weight()) is not None:
                found |= q.state("w")[0] | {"w": module.dequantized(q)}
            return found

        both(passed, f"{path.stem}, {name}:")


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CXX": "false"}, "No working C++ compiler"), ({"PATH": ""}, "install g++ to fuse it")],
    ids=["a compiler that fails", "none"],
)
def test_without_a_working_compiler_it_is_eager_and_says_why(environment, said, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **environment}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from quant import fuse; print(fuse(True))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("quantiser: eager, since torch.compile fails here (") and said in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_one_compilation_serves_all_sizes_and_callers(compiler):
    """No step compiles again: not for a size equal to a block's, a view, an input with a gradient, or another grad mode."""
    fuse(True)
    quantized_values(normal(48, 96), NV)
    before = traces()
    quantized_values(normal(256, 256), NV)  # 256 / 16 blocks of 16
    quantized_values(normal(16, 32).requires_grad_(), NV)
    quantized_values(normal(4, 32, 64)[1], NV)
    with torch.no_grad():
        quantized_values(normal(32, 512), NV)
    assert traces() == before, "compiled again"


ALL = [
    pytest.param(recipe, mode, id=f"{name} {mode}", marks=() if (name, mode) == ("nvfp4", "bf16") else pytest.mark.slow)
    for name, recipe in (("nvfp4", NVFP4), ("fresh g1 sr", NVFP4_FRESH))
    for mode in ("bf16", "fp32")
]


@pytest.mark.parametrize(("recipe", "mode"), ALL)
def test_a_linear_compiled_whole(recipe, mode, compiler):
    """torch.compile(model) sees through a Linear, backward too (fullgraph: no break), and still nothing moves by a bit;
    nor does a later micro-batch or step need another graph."""
    module = make(recipe, 96, 128, mode)
    compiled = torch.compile(module, fullgraph=True)
    for step in range(3):
        module.context.at(step // 2, step)
        x, g = normal(64, 96, seed=step), normal(64, 128, seed=10 + step)
        eager = passes(module, module.weight, x, g)
        ours = passes(compiled, module.weight, x, g)
        for name in eager:
            assert_same_bits(ours[name], eager[name], f"compiled {name}, micro-batch {step}")
        if step == 0:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before, "compiled again for the next micro-batch or step"
