"""Kernels against the plain-torch reference, byte for byte, wherever this process can run them.

    TRITON_INTERPRET=1       in Triton's interpreter, repaired (testing/interpreter.py): exact arithmetic, and the inline PTX
    a GPU                    on it
    neither                  compiled for sm_100a (the slow tests: others), and its PTX executed (testing/machine.py)

`make test` runs this file twice, as the first and as whichever of the others there is; `make test-gpu` on the GPU. What every
recipe makes of every operand on every architecture is `make kernels-check`.
"""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import testing
from configs import load
from kernels import HAVE_RS, target_at
from kernels import capability as current
from kernels.numerics import NEAREST_HALVES
from quant import Linear, QuantSpec, Scale, kernel, launch
from quant.encode import encode
from quant.random import Key, random_ints
from quant.rounding import random_bits
from testing.machine import run_asm
from testing.numbers import to_e2m1
from testing.operands import astray, beside, difference, element_codes, frequencies, numbers, rounded_by

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
EMULATED = [100, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 90, 120))]
ENGINES = ["interpreter"] if INTERPRETED else ["cuda"] if CUDA else EMULATED
ONE = ENGINES[:1]
QUICK = INTERPRETED or CUDA  # else each kernel takes a second to compile
LADDERS = ["mor-block-2way", *["mor-tensor", "mor-nvfp4"] * QUICK]
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
    "mxfp4 sr8": QuantSpec("e2m1", (1, 32), Scale("e8m0"), rounding="stochastic8"),
    "mxfp8 sr8": QuantSpec("e4m3", (1, 32), Scale("e8m0"), rounding="stochastic8"),
    "mxfp8 e5m2 sr8": QuantSpec("e5m2", (1, 32), Scale("e8m0"), rounding="stochastic8"),
    "mxfp6": QuantSpec("e3m2", (1, 32), Scale("e8m0", rule="floor"), rounding="away"),
    "fp8 1x128 fp32": QuantSpec("e4m3", (1, 128), Scale("fp32")),
    "fp8 128x128 gam": QuantSpec("e4m3", (128, 128), Scale("e8m0", rule="gam")),
    "fp8 128x128 fp32": QuantSpec("e5m2", (128, 128), Scale("fp32")),
    "fp8 tensor": QuantSpec("e5m2", (-1, -1), Scale("fp32")),
    "fp8 tensor sr": QuantSpec("e4m3", (-1, -1), Scale("fp32"), rounding="stochastic"),
    "fp8 lines gam": QuantSpec("e4m3", (1, -1), Scale("e8m0", rule="gam")),
}


def check(engine, x: torch.Tensor, spec: QuantSpec, held=None) -> None:
    with on(engine):
        found = kernel.encode(x.cuda() if CUDA else x, spec, KEY, None, held.cuda() if CUDA and held is not None else held)
    assert not difference(found, encode(x, spec, KEY, None, held))


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


# --- cvt.rs, by name ---

RS = pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine in (100, "cuda")])


def by_rs(engine, x: torch.Tensor, spec: QuantSpec):
    """-> what cvt.rs makes of it; skipped on a GPU that has none."""
    if CUDA and current() not in HAVE_RS:
        pytest.skip(f"cvt.rs: not on sm_{current()}")
    with on(engine) as launches, rounded_by(kernel.RS):
        found = kernel.encode(x.cuda() if CUDA else x, spec, KEY)
    if launches:
        assert f"cvt.rs.satfinite.{spec.format}x4.f32" in launches[-1].kernel.asm["ptx"]
    return found


@RS
@pytest.mark.parametrize("name", ["nvfp4 sr8", "nvfp4 rht16 fresh sr8", "mxfp4 sr8", "mxfp8 sr8", "mxfp8 e5m2 sr8"])
def test_cvt_rs_takes_a_neighbour_as_often_as_it_should(name, engine):
    spec = SPECS[name]
    for x in (numbers("normal", 512, 256), numbers("normal", 256, 512).t()):
        found = by_rs(engine, x, spec)
        assert not astray(found, x, KEY)
        rows = frequencies(found, x, KEY)
        assert len(rows) == 8
        for count, due, rate, bound in rows:
            assert abs(rate - due) < bound < 0.06, (count, due, rate)
    for kind in ("bits", "subnormal", "zeros"):
        assert not astray(by_rs(engine, x := numbers(kind, 160, 224), spec), x, KEY), kind


@pytest.mark.skipif(100 not in ENGINES, reason="of the emulator's model of cvt.rs")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["nvfp4 sr8", "nvfp4 rht16 fresh sr8"])
def test_cvt_rs_is_fed_the_bytes_of_its_own_elements(name, turned):
    """As the emulator shares a word among four elements (bytes 0, 2, 1, 3, assumed), codes are those of `stochastic8` with the
    same bytes in that order. So each word arrives where it should, whatever the hardware makes of it."""
    spec, x = SPECS[name], numbers("normal", 256, 160).t() if turned else numbers("normal", 160, 256)
    noise = random_ints(*x.shape, random_bits(spec.rounding), KEY.words()).view(-1, 4)[:, [0, 2, 1, 3]].reshape(x.shape)
    expected = element_codes(spec, spec.element.round(beside(x, spec, KEY).p, spec.rounding, noise))
    assert torch.equal(by_rs(100, x, spec).codes().to(torch.int32), expected)


@pytest.mark.parametrize("capability", [80, 90, 110, 120])
def test_cvt_rs_where_there_is_none(capability):
    with pytest.raises(ValueError, match=f"cvt.rs: an instruction of sm_100a and sm_103a, and this is sm_{capability}"):
        target_at(capability, rs=True)
    assert target_at(100, rs=True) == target_at(100)._replace(rs=True) and not any(target_at(c).rs for c in (0, 90, 100, 103))


def test_cvt_rs_needs_a_gpu_and_a_name():
    with pytest.raises(ValueError, match="kernels do not run on cpu"):
        kernel.round_by("cvt.rs", torch.device("cpu"))
    with pytest.raises(ValueError, match="rounding 'rs': expected 'exact' or 'cvt.rs'"):
        kernel.round_by("rs", torch.device("cuda"))
    if not CUDA:
        with on(90 if 100 in ENGINES else "interpreter"), pytest.raises(ValueError, match="this is (sm_90|no GPU)"):
            kernel.round_by("cvt.rs", torch.device("cuda"))


@pytest.mark.skipif(100 not in ENGINES, reason="the emulator names its GPU")
def test_cvt_rs_is_reported(monkeypatch):
    monkeypatch.setattr(kernel, "DEVICES", {"cpu", "cuda"})
    specs, device = [SPECS[name] for name in ("nvfp4", "nvfp4 sr8", "nvfp4 sr")], torch.device("cpu")
    with on(100):
        exact = kernel.report(specs, device)
        with rounded_by(kernel.RS):
            lines = kernel.report(specs, device)
        assert kernel.report(specs, device) == exact
    assert len(lines) == len(exact) + 1 and not any("cvt.rs" in line for line in exact)
    assert lines[1] == "kernels: rounding is cvt.rs by 1 of 2 stochastic specs: results are not reproducible on other hardware"


# --- what kernels cannot ---


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (QuantSpec("int8", (1, 32), Scale("fp32")), "elements int8"),
        (QuantSpec("e5m2b127", (1, 32), Scale("fp32")), "smallest number is below 2^-103"),
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


def test_packed_halves_round_as_fp32_does():
    """The inline PTX for sm_80 and sm_90, executed: numbers around all ties of E2M1, as far as a half's unit and more; every
    BF16 number."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32).view(np.uint32).astype(np.int64)
    steps = np.concatenate(
        [np.arange(-300, 300), 2 ** np.arange(31)[:19], -(2 ** np.arange(31)[:19]), np.arange(-64, 64) << 12]
    )
    near = (ties[:, None] + steps).reshape(-1).astype(np.uint32)
    bits = np.concatenate([near, near | np.uint32(1 << 31), np.arange(2**16, dtype=np.uint32) << 16])
    bits = bits[: len(bits) // 8 * 8]
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        a, b = ((x[i::2] * np.float32(2.0**-14)).view(np.uint32) for i in range(2))
    (found,) = run_asm(NEAREST_HALVES.value, "=r,f,f,f,f,f,f,f,f", [a, b], [8], 4)
    found = np.stack([found & 15, found >> 4], 1).reshape(-1)
    # NaN is 7, and its sign is a promise of nobody.
    wanted = np.where(np.isnan(x), 7 | found & 8, to_e2m1(x))
    assert len(x) > 2**16 and np.array_equal(found, wanted)


def test_shapes_that_cannot_be_cut_raise_what_the_reference_raises():
    x = torch.randn(20, 40)
    with pytest.raises(ValueError) as reference:
        encode(x, NV)
    with pytest.raises(ValueError) as found:
        kernel.encode(x, NV)
    assert str(found.value) == str(reference.value)


@pytest.mark.parametrize("engine", ONE)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8-blockwise", "fp8-tensorwise", "nvfp4-4over6", *LADDERS])
def test_a_linear(name, engine, monkeypatch):
    """Forward and backward, by kernels and without: equal, as all that differs is who quantises, and who decides."""
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
