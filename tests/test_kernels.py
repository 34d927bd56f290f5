"""Kernels against the plain-torch reference, byte for byte, wherever this process can run them.

    TRITON_INTERPRET=1       in Triton's interpreter, repaired (testing/interpreter.py): exact arithmetic, and the inline PTX
    a GPU                    on it
    neither                  compiled for sm_100a (the slow tests: others), and its PTX executed (testing/machine.py)

`make test` runs this file twice, as the first and as whichever of the others there is; `make test-gpu` on the GPU. What every
recipe makes of every operand on every architecture is `make kernels-check`.
"""

import os
from contextlib import nullcontext

import pytest
import torch

import testing
from configs import load
from quant import Linear, QuantSpec, Scale, kernel, launch
from quant.encode import encode
from quant.random import Key

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
EMULATED = [100, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 90, 120))]
ENGINES = ["interpreter"] if INTERPRETED else ["cuda"] if CUDA else EMULATED
ONE = ENGINES[:1]
KEY = Key(77, index=5, layer=2, use=3)

if INTERPRETED:
    import testing.interpreter  # noqa: F401


def on(engine):
    """The context in which kernels run there."""
    if engine in ("interpreter", "cuda"):
        return nullcontext()
    from testing.device import emulated

    return emulated(engine)


NV = QuantSpec()
MX = QuantSpec("e4m3", (1, 32), Scale("e8m0"))
SPECS = {
    "nvfp4": NV,
    "nvfp4 g1": QuantSpec(scale=Scale(order="g1")),
    "nvfp4 rht16": QuantSpec(hadamard=16),
    "nvfp4 rht16 fresh sr8": QuantSpec(hadamard=16, signs="fresh", rounding="stochastic8"),
    "nvfp4 sr8": QuantSpec(rounding="stochastic8"),
    "nvfp4 sr": QuantSpec(rounding="stochastic"),
    "nvfp4 sr5": QuantSpec(rounding="stochastic5"),
    "nvfp4 squares": QuantSpec(block=(16, 16)),
    "ue5m3": QuantSpec(scale=Scale("e5m3")),
    "mxfp8": MX,
    "mxfp8 e5m2": QuantSpec("e5m2", (1, 32), Scale("e8m0")),
    "mxfp8 floor away": QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="floor"), rounding="away"),
    "mxfp8 ceil zero": QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="ceil"), rounding="zero"),
    "mxfp4 even inward": QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="even"), rounding="inward"),
    "mxfp4 x3/4 rht32 sr": QuantSpec(
        "e2m1", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75), rounding="stochastic", hadamard=32
    ),
    "mxfp6": QuantSpec("e3m2", (1, 32), Scale("e8m0", rule="floor"), rounding="away"),
    "fp8 1x128 fp32": QuantSpec("e4m3", (1, 128), Scale("fp32")),
    "fp8 128x128 gam": QuantSpec("e4m3", (128, 128), Scale("e8m0", rule="gam")),
    "fp8 128x128 fp32": QuantSpec("e5m2", (128, 128), Scale("fp32")),
    "fp8 tensor": QuantSpec("e5m2", (-1, -1), Scale("fp32")),
    "fp8 tensor sr": QuantSpec("e4m3", (-1, -1), Scale("fp32"), rounding="stochastic"),
    "fp8 lines gam": QuantSpec("e4m3", (1, -1), Scale("e8m0", rule="gam")),
}


def numbers(kind: str, rows: int, k: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + k)
    x = torch.randn(rows, k, generator=generator)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-60, 60, (rows, k), generator=generator).float())
    elif kind == "huge":
        x = x * 1e38
    elif kind == "subnormal":
        x = x * 1e-38
    elif kind == "zeros":
        x[:, :32] = 0.0
        x[:32] = 0.0
        x[:, ::3] = -0.0
    elif kind == "nan":
        x[5, 7], x[rows - 1, 3] = float("nan"), float("inf")
    elif kind == "bits":  # every pattern there is, and so NaN in most blocks
        x = torch.randint(-(2**15), 2**15, (rows, k), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    return x.to(dtype)


def assert_equal(found, wanted) -> None:
    """Codes, scales and outer scales of two QTensors, bit for bit; a NaN is a NaN."""
    assert found.shape == wanted.shape and found.spec == wanted.spec
    for name in ("packed_codes", "scale_codes", "outer_codes"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, name
        a, b = a.cpu(), b.cpu()
        if a.is_floating_point():
            a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t).contiguous().view(torch.int32) for t in (a, b))
        wrong = (a != b).nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} differ, first {wrong[0].tolist()}"


def check(engine, x: torch.Tensor, spec: QuantSpec, held=None) -> None:
    with on(engine):
        found = kernel.encode(x.cuda() if CUDA else x, spec, KEY, None, held.cuda() if CUDA and held is not None else held)
    assert_equal(found, encode(x, spec, KEY, None, held))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPECS)
def test_rows_and_columns(name, engine):
    check(engine, numbers("normal", 256, 128), SPECS[name])
    check(engine, numbers("normal", 128, 256).t(), SPECS[name])


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("kind", ["wide", "huge", "subnormal", "zeros", "nan", "bits"])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 rht16 fresh sr8", "nvfp4 squares", "mxfp8", "fp8 128x128 gam"])
def test_extreme_numbers(name, kind, engine):
    check(engine, numbers(kind, 128, 128), SPECS[name])


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 rht16", "nvfp4 sr8", "mxfp8", "mxfp8 floor away"])
def test_ragged_shapes_and_other_dtypes(name, engine):
    rows, k = 144, 224
    check(engine, numbers("normal", rows, k), SPECS[name])
    check(engine, numbers("normal", k, rows + 16).t(), SPECS[name])
    check(engine, numbers("normal", rows, k, torch.float32), SPECS[name])
    check(engine, numbers("normal", rows, k, torch.float16).t().contiguous().t()[:, :k], SPECS[name])
    check(engine, numbers("normal", rows, 2 * k)[:, ::2], SPECS[name])
    check(engine, numbers("normal", rows + 1, k).flatten()[1 : 1 + rows * k].view(rows, k), SPECS[name])


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_an_amax_of_earlier_steps(engine):
    spec = QuantSpec(scale=Scale("e5m3", outer="tensor", outer_target=448, history=50))
    for held in (3.0, 0.0):
        check(engine, numbers("normal", 64, 128), spec, torch.tensor(held))
    spec = QuantSpec("e4m3", (-1, -1), Scale("fp32", history=4))
    check(engine, numbers("normal", 64, 128), spec, torch.tensor(3.0))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (QuantSpec("int8", (1, 32), Scale("fp32")), "elements int8"),
        (QuantSpec("e4m3", (1, 48), Scale("fp32")), "blocks"),
        (QuantSpec(hadamard=64), "Hadamard"),
        (QuantSpec(rounding="stochastic12"), "12 random bits"),
        (QuantSpec(scale=Scale(outer="row")), "scales e4m3-row"),
        (QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", target=1.5)), "target of 1.5"),
    ],
)
def test_what_kernels_cannot_they_say(spec, why):
    assert why in kernel.obstacle(spec)
    with pytest.raises(ValueError, match="no kernel for"):
        kernel.encode(torch.randn(128, 192), spec, KEY)


def test_shapes_that_cannot_be_cut_raise_what_the_reference_raises():
    x = torch.randn(20, 40)
    with pytest.raises(ValueError) as reference:
        encode(x, NV)
    with pytest.raises(ValueError) as found:
        kernel.encode(x, NV)
    assert str(found.value) == str(reference.value)


@pytest.mark.parametrize("engine", ONE)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8-blockwise", "fp8-tensorwise", "nvfp4-4over6"])
def test_a_linear(name, engine, monkeypatch):
    """Forward and backward, quantised by kernels and without: equal, as all that differs is who quantises."""
    found = []
    for devices in (set(), {"cpu", "cuda"}):
        monkeypatch.setattr(kernel, "DEVICES", devices)
        config = load(f"configs/{name}.toml")
        module = Linear(256, 128, device="cuda" if CUDA else "cpu")
        module.recipe = config.recipes[config.policy[-1].recipe]
        module.context.gemm = "fp32"
        torch.nn.init.normal_(module.weight, generator=torch.Generator(module.weight.device).manual_seed(1))
        x = numbers("normal", 128, 256).to(module.weight.device).requires_grad_()
        with on(engine) if devices else nullcontext():
            y = module(x)
            y.backward(numbers("normal", 128, 128).to(y.device))
        found.append((y.detach(), x.grad, module.weight.grad))
    for name, a, b in zip(("y", "dx", "dw"), *found, strict=True):
        assert torch.equal(a, b), name


def test_the_operator():
    """Its fake makes what it makes, and autograd and tracing take it (torch.library.opcheck)."""
    if not (INTERPRETED or CUDA):
        pytest.skip("in the interpreter or on a GPU: a driver that is not there is not one to opcheck")
    x, empty = numbers("normal", 64, 64), torch.empty(0)
    x, empty = (x.cuda(), empty.cuda()) if CUDA else (x, empty)
    for rows, cols in ((NV, NV), (MX, None), (None, QuantSpec("e4m3", (-1, -1), Scale("fp32")))):
        keys = [torch.zeros(5, dtype=torch.int64, device=x.device), empty, empty]
        torch.library.opcheck(launch.quantize_op, (x, *(kernel._text(spec) for spec in (rows, cols)), keys, keys))


def test_what_runs_where_is_said(monkeypatch):
    assert kernel.report([NV], torch.device("cpu")) == []
    monkeypatch.setattr(kernel, "DEVICES", {"cpu"})
    with on(ONE[0]):
        lines = kernel.report([NV, MX, QuantSpec("int8", (1, 32), Scale("fp32")), NV], torch.device("cpu"))
    assert len(lines) == 2 and "2 of 3 specs" in lines[0]
    assert lines[1].startswith("kernels: not int8/1x32 fp32, for elements int8") and lines[1].endswith(": fused")
