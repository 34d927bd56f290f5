"""Kernels that decode and that decide ladders, against the plain-torch reference, wherever this process can run them (see
tests/test_kernels.py)."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from configs import load
from kernels.numerics import FLOATS
from quant import Bound, Choice, QTensor, QuantSpec, Scale, kernel, launch
from quant.choose import Operands, Quantised, choose, unrotated
from quant.encode import decode, encode, factor_of
from quant.formats import FORMATS
from quant.quantize import quantize
from quant.random import Key
from tests.helpers import assert_same_bits
from tests.test_kernels import CUDA, ENGINES, INTERPRETED, ONE, QUICK, SPECS, numbers, on

KEY = Key(5, index=2, layer=1, use=4)
BF16, INT8 = QuantSpec("bf16", scale=Scale("none")), QuantSpec("int8", (1, 32), Scale("fp32"))
SUMS = "relative_error", "underflow", "squared_error", "absolute_error", "largest_error"
# What shipped ladders measure, what else there is of scales and formats, and their units.
LAYOUTS = {
    **{name: SPECS[name] for name in ("nvfp4", "nvfp4 squares", "mxfp8", "fp8 128x128 gam", "fp8 lines gam", "ue5m3", "mxfp6")},
    **{name: SPECS[name] for name in ("fp8 tensor", "fp8 1x128 fp32", "mxfp4 even inward")},
    "fp8 128x128": QuantSpec("e4m3", (128, 128), Scale("e8m0")),
    "mxfp4 x3/4": QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75)),
    "fp8 lines": QuantSpec("e5m2", (1, -1), Scale("fp32")),
}
UNITS = (-1, -1), (128, 128), (32, 64), (1, 32), (96, 192)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(kernel, "DEVICES", {"cpu", "cuda"})


def here(x):
    return x.cuda() if CUDA and x is not None else x


def moved(q: QTensor) -> QTensor:
    """Codes as kernels write them: in rows."""
    parts = (here(t if t is None else t.contiguous()) for t in (q.packed_codes, q.scale_codes, q.outer_codes))
    return QTensor(*parts, q.spec, q.shape)


def same(found, wanted, what: str) -> None:
    if wanted is None:
        assert found is None, what
    else:
        assert_same_bits(found.cpu(), wanted, what)


def compare(engine, x, spec, units=UNITS[:2], metrics=SUMS) -> None:
    """Values and all sums, of codes that the reference has made."""
    q = encode(x, spec, KEY)
    wanted, factor = decode(q)
    with on(engine):
        found, left = kernel.decode(moved(q))
    same(found, wanted, spec.short())
    same(left, factor, f"factor of {spec.short()}")
    for per in units:
        if any(size % max(unit, 1) for size, unit in zip(x.shape, per, strict=True)):
            continue
        o = Operands(x, KEY, per)
        for by in metrics:
            parts = o._parts(by, None if by == "dynamic_range" else spec)
            with on(engine):
                found = kernel.errors(here(x), *((None, None) if by == "dynamic_range" else (spec, moved(q))), by, per)
            for a, b in zip(found, parts, strict=True):
                same(a, b.t() if o.transposed else b, f"{by} of {spec.short()} per {per}")


def test_formats_known_by_name_are_those_of_quant():
    assert {name: launch.float_of(name) for name in FLOATS} == FLOATS


@pytest.mark.parametrize("engine", ONE)
@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e4m3", "e5m2", "e3m4", "e4m3b3", "e2m5", "e5m2b-40"])
def test_every_code(name, engine):
    """Infinities, NaN and negative zeros among them; formats whose numbers are all small, or large, too."""
    spec, bits = QuantSpec(name, (1, 32), Scale("fp32")), FORMATS[name].bits
    codes, k = torch.arange(256, dtype=torch.uint8).view(2, 128), 256 if bits <= 4 else 128
    codes = codes if bits <= 4 else codes & ((1 << bits) - 1)
    q = QTensor(codes, torch.ones(2, k // 32), None, spec, (2, k))
    with on(engine):
        found = kernel.decode(moved(q))[0]
    same(found, decode(q)[0], name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_errors(name, engine):
    metrics = SUMS if QUICK or name in ("nvfp4", "fp8 lines") and engine == 100 else SUMS[:1]
    compare(engine, numbers("normal", 128, 256), LAYOUTS[name], UNITS[:1], metrics)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("kind", ["wide", "huge", "subnormal", "zeros", "nan", "bits"])
@pytest.mark.parametrize("name", ["nvfp4", "fp8 128x128", "fp8 128x128 gam", "fp8 lines"])
def test_extreme_numbers(name, kind, engine):
    compare(engine, numbers(kind, 128, 128), LAYOUTS[name], UNITS[1:2], SUMS if QUICK else ("relative_error", "underflow"))


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("per", UNITS, ids=str)
def test_units(per, engine):
    x = numbers("wide", 192, 384) if per[0] != 128 else numbers("wide", 256, 384)
    x[: x.shape[0] // 2, ::5] = 0
    metrics = (*SUMS, "dynamic_range") if QUICK else ("relative_error", "squared_error", "dynamic_range")
    compare(engine, x, SPECS["mxfp8"], [per], metrics)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_ragged_shapes_and_other_dtypes(name, engine):
    rows, k = 80, 224
    for x in (
        numbers("nan", rows, k),
        numbers("nan", k, rows).t(),
        numbers("normal", rows, k, torch.float32),
        numbers("normal", rows, 2 * k)[:, ::2],
    ):
        compare(engine, x, SPECS[name], UNITS[:1], SUMS if QUICK else ("relative_error", "largest_error"))


@pytest.mark.parametrize("engine", ONE)
def test_what_overflows(engine):
    """3.4e38 in E4M3 under a power of two is 2^128: an error that is Inf stays so, and is no NaN."""
    x = numbers("normal", 128, 128, torch.float32) * 1e37
    x[3, 5] = 3.4e38
    compare(engine, x, LAYOUTS["fp8 128x128"], UNITS[:1], ("relative_error", "largest_error", "underflow", "dynamic_range"))
    assert torch.isinf(Operands(x, None, (-1, -1))._parts("relative_error", LAYOUTS["fp8 128x128"])[0]).all()


def test_codes_that_lie_in_columns_go_to_the_reference(monkeypatch):
    q = encode(numbers("normal", 64, 128).t(), SPECS["mxfp8"])
    monkeypatch.setattr(kernel, "values", None)
    assert_same_bits(kernel.decode(q)[0], decode(q)[0])


# --- ladders ---


def ladders() -> dict[str, Choice]:
    """Those of shipped recipes, and ones that look at the other metrics."""
    found = {}
    for name in ("mor-tensor", "mor-channel", "mor-block-2way", "mor-block-3way", "mor-nvfp4"):
        config = load(f"configs/{name}.toml")
        for operand, spec in config.recipes[config.policy[-1].recipe].operands().items():
            if spec not in found.values():
                found[f"{name} {operand}"] = spec
    mx, five = LAYOUTS["mxfp8"], QuantSpec("e5m2", (1, 32), Scale("e8m0"))
    found["gated"] = replace(
        found["mor-block-3way fprop.x"],
        bounds=(
            (Bound("dynamic_range", 1e4, enough=True), Bound("relative_error", 0.02)),
            (Bound("largest_error", 0.1), Bound("underflow", 0.01)),
        ),
    )
    found["packed"] = Choice((QuantSpec(), mx, BF16), "squared_error", 0.005, (32, 64))
    found["nearest"] = Choice((five, mx), "absolute_error", per=(32, 32))
    return found


LADDERS = ladders()
FEW = "mor-channel fprop.x", "mor-block-3way fprop.x", "mor-nvfp4 dgrad.g", "gated", "packed", "nearest"
SOME = [name if QUICK or name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in LADDERS]


def operands(choice: Choice) -> list[torch.Tensor]:
    """Of which some blocks are taken by each candidate; the first two serve where kernels are slow."""
    rows, k = (max(128, size) for size in choice.multiple)
    x = numbers("normal", 2 * rows, 2 * k)
    several = x.clone()
    several[:rows] *= torch.exp2((torch.arange(rows)[:, None] * 7 % 23 - 11) * (torch.arange(2 * k) >= k)).bfloat16()
    several[rows:, k:] = 0
    return [several, numbers("normal", k, rows).t(), x, several.float(), numbers("nan", rows, 2 * k)]


def decided(choice: Choice, x, engine, picked=None):
    """choose, by kernels where there is an engine, on what is there; picked: the candidates that are known to be taken."""
    with on(engine) if engine else nullcontext():
        return choose(here(x) if engine else x, choice, KEY, None, picked)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SOME)
def test_ladders(name, engine, monkeypatch):
    choice, seen = LADDERS[name], set()
    assert kernel.obstacle(choice) == "" and kernel.decides(operands(choice)[0], choice)
    for x in operands(choice)[: 5 if QUICK else 2 if engine == 100 else 1]:
        monkeypatch.setattr(kernel, "DEVICES", set())
        wanted = decided(choice, x, None)
        monkeypatch.setattr(kernel, "DEVICES", {"cpu", "cuda"})
        found = decided(choice, x, engine)
        assert torch.equal(torch.as_tensor(found.index).cpu(), torch.as_tensor(wanted.index))
        if "backward_error" not in choice.short():  # (products of fp64, in any order)
            same(found.ratios, wanted.ratios, "ratios")
        same(found.values.contiguous(), wanted.values.contiguous(), "values")
        same(found.factor, wanted.factor, "factor")
        same(found.error, wanted.error, "error")
        seen |= set(torch.as_tensor(wanted.index).flatten().tolist())
    one = choice.per == "tensor"
    assert len(seen) > 1 or name.startswith("mor-channel") or (one and not QUICK)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("name", ["mor-tensor fprop.x", "mor-channel fprop.x", "mor-nvfp4 dgrad.g"])
def test_one_decision_that_the_host_does_not_know(name, engine):
    """As on a GPU: the index is a number on the device, and so is what is taken."""
    choice, x = LADDERS[name], here(numbers("zeros", 128, 256))
    specs, dtype = tuple(map(unrotated, choice.candidates)), torch.bfloat16 if choice.exact else torch.float32
    for i, spec in enumerate(specs):
        index = torch.tensor(i, device=x.device)
        wanted = Operands(x, KEY, (-1, -1)).mixed(specs, index, dtype)
        with on(engine):
            o = Quantised(x, KEY, (-1, -1))
            found, left = o.mixed(specs, index, dtype), o.logical_factor(spec)
        same(found, wanted.cpu(), f"candidate {i}")
        same(left, Operands(x, KEY, (-1, -1)).logical_factor(spec), f"factor {i}")


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (Choice((INT8, BF16), "relative_error", 0.1, "tensor"), "elements int8"),
        (Choice((SPECS["mxfp8"], QuantSpec("fp16", scale=Scale("none"))), "relative_error", 0.1, "tensor"), "elements fp16"),
        (Choice((SPECS["mxfp8"],) * 4 + (BF16,), "relative_error", 0.1, "tensor"), "5 candidates"),
        (
            Choice((SPECS["mxfp8"], BF16), per="tensor", bounds=((Bound("underflow", than=INT8),),)),
            "elements int8",
        ),
        (Choice(tuple(QuantSpec(scale=Scale(target=a, outer_target=1536 / a)) for a in (6.0, 4.0))), "a choice between specs"),
    ],
)  # fmt: skip
def test_ladders_that_kernels_do_not_decide(choice, why):
    assert why in kernel.obstacle(choice) and not kernel.decides(numbers("normal", 128, 128), choice)


@pytest.mark.parametrize("engine", ONE)
def test_a_ladder_packed(engine, monkeypatch):
    """quantize gives a Mixed with the bytes of the reference."""
    choice = LADDERS["packed"]
    x = operands(choice)[0]
    with on(engine):
        found = quantize(here(x), choice, KEY)
    monkeypatch.setattr(kernel, "DEVICES", set())
    wanted = quantize(x, choice, KEY)
    same(found.dequantize(), wanted.dequantize(), "values")
    assert found.parts.keys() == wanted.parts.keys() and len(wanted.parts) > 1
    for i, part in wanted.parts.items():
        same(found.parts[i].packed_codes, part.packed_codes.contiguous(), f"codes of candidate {i}")


def test_the_operators():
    """Their fakes make what they make, and autograd and tracing take them (torch.library.opcheck)."""
    if not (INTERPRETED or CUDA):
        pytest.skip("in the interpreter or on a GPU: a driver that is not there is not one to opcheck")
    x, empty = here(numbers("normal", 64, 64)), here(torch.empty(0))
    specs = QuantSpec(), BF16
    q = moved(encode(x.cpu(), specs[0]))
    codes, scales, factors = kernel._lists([q, None], empty, True)
    index = here(torch.tensor([[0, 1], [1, 0]]))
    for given in (
        (empty, empty, codes[:1], scales[:1], [empty], kernel._texts(specs[:1]), [0, 0], False, True),
        (x.t(), index, codes, scales, factors, kernel._texts(specs), [32, 32], True, True),
    ):
        torch.library.opcheck(launch.dequantise_op, given)
    for by, spec in (("squared_error", specs[0]), ("relative_error", specs[1]), ("dynamic_range", None)):
        parts = kernel._lists([q if spec is specs[0] else None], empty, True)
        torch.library.opcheck(launch.errors_op, (x, *parts, kernel._text(spec), by, [32, 0]))
    assert factor_of(q).ndim == 0
