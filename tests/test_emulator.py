"""The emulator of PTX (testing/): its numbers against ml_dtypes and exact arithmetic, its control flow and memory on small
programs, and whether a wrong instruction in a compiled kernel would be noticed.
"""

import os
import random
import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import QuantSpec, kernel
from quant.random import Key
from testing import device, numbers
from testing.machine import run_asm, run_kernel
from testing.ptx import Program

FORMATS = {
    "e2m1": (numbers.to_e2m1, numbers.from_e2m1, ml_dtypes.float4_e2m1fn, 6.0, 16),
    "e4m3": (numbers.to_e4m3, numbers.from_e4m3, ml_dtypes.float8_e4m3fn, 448.0, 256),
    "e5m2": (numbers.to_e5m2, numbers.from_e5m2, ml_dtypes.float8_e5m2, 57344.0, 256),
}


def inputs(values: np.ndarray) -> np.ndarray:
    """fp32: every BF16 and every FP16 number, the neighbours of every midpoint between `values`, and random bits."""
    finite = np.unique(values[np.isfinite(values)].astype(np.float64))
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    near = np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))])
    codes = np.arange(2**16, dtype=np.uint32)
    half = codes.astype(np.uint16).view(np.float16).astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([(codes << 16).view(np.float32), half, near, noise])
    return x[~np.isnan(x)]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_equal_ml_dtypes(name):
    encode, decode, dtype, top, count = FORMATS[name]
    codes = np.arange(count, dtype=np.uint8)
    values = decode(codes)
    expected = codes.view(dtype).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)
    x = inputs(values)
    with np.errstate(all="ignore"):
        wanted = np.clip(x, -top, top).astype(dtype).view(np.uint8)
    assert np.array_equal(encode(x), wanted)
    assert set(encode(np.array([np.nan, -np.nan], np.float32))) == {7 if count == 16 else 0x7F}


def test_bf16_and_scales():
    x = inputs(np.zeros(2))
    with np.errstate(all="ignore"):
        assert np.array_equal(numbers.f32_to_bf16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    positive = np.abs(x[(x != 0) & np.isfinite(x)])
    down, up = numbers.to_ue8m0(positive, up=False), numbers.to_ue8m0(positive, up=True)
    log = np.log2(positive.astype(np.float64))
    power = (positive.view(np.uint32) & 0x7FFFFF) == 0
    normal = positive >= 2.0**-126
    assert np.array_equal(down[normal], np.floor(log[normal]) + 127)
    assert np.array_equal(up[normal], np.minimum(np.where(power, np.round(log), np.ceil(log))[normal] + 127, 254))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_even(exact: Fraction) -> np.float32:
    """Of an exact number, in fp32."""
    if exact == 0:
        return np.float32(0)
    guess = np.float32(float(exact))
    with np.errstate(over="ignore"):
        around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    around = [v for v in around if np.isfinite(v)]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(np.float32(v).view(np.uint32)) & 1))


@settings(max_examples=300, deadline=None)
@given(floats, floats, floats, st.booleans())
def test_fma_is_rounded_once(a, b, c, cancel):
    a, b, c = (np.float32(v) for v in (a, b, c))
    with np.errstate(all="ignore"):
        if cancel and np.isfinite(a * b):
            c = -np.float32(a * b)
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103 or (exact != 0 and abs(exact) < Fraction(2) ** -126):
            return  # (overflow and subnormal results: left to numpy's own rounding of fp64)
        found = numbers.fma32(*(np.array([v], np.float32) for v in (a, b, c)))[0]
    assert found == nearest_even(exact), (a, b, c)


@settings(max_examples=200, deadline=None)
@given(floats)
def test_toward_zero(x):
    x = np.array([x], np.float32)
    with np.errstate(all="ignore"):
        half = numbers.f32_to_f16(x, toward_zero=True).view(np.float16).astype(np.float32)[0]
        beyond = np.float32(np.nextafter(np.float16(half), np.float16(np.copysign(np.inf, x[0]))))
    assert abs(half) <= abs(x[0]) and np.signbit(half) == np.signbit(x[0])
    assert abs(beyond) > abs(x[0]) or abs(half) == 65504


HEAD = ".version 8.7\n.target sm_100a\n.visible .entry k(.param .u64 p, .param .u64 q)\n.reqntid 64\n{{{body}}}"


def execute(body: str, *arrays: np.ndarray, grid=(2,), shared=1024):
    return run_kernel(HEAD.format(body=body), grid, list(arrays), shared)


ADDRESS = """.reg .b32 %t<9>; .reg .b64 %a<9>; .reg .pred %p<4>;
ld.param.u64 %a0, [p]; mov.u32 %t0, %tid.x; mov.u32 %t1, %ctaid.x; mad.lo.s32 %t2, %t1, 64, %t0;
mul.wide.u32 %a1, %t2, 4; add.s64 %a2, %a0, %a1; ld.global.b32 %t3, [%a2];
"""


def test_branches_and_loops():
    """Collatz steps, a number of iterations that differs between lanes."""
    x = np.arange(1, 129, dtype=np.uint32)
    wanted = []
    for n in x.tolist():
        steps = 0
        while n != 1:
            n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
        wanted.append(steps)
    execute(ADDRESS + """mov.u32 %t4, 0;
$again: setp.eq.u32 %p0, %t3, 1; @%p0 bra $done; and.b32 %t5, %t3, 1; setp.eq.u32 %p1, %t5, 0; @%p1 bra $even;
mad.lo.u32 %t3, %t3, 3, 1; bra $next;
$even: shr.u32 %t3, %t3, 1;
$next: add.u32 %t4, %t4, 1; bra $again;
$done: st.global.b32 [%a2], %t4; ret;""", x)  # fmt: skip
    assert x.tolist() == wanted


def test_shared_memory_and_a_barrier():
    x = np.arange(128, dtype=np.uint32)
    execute(ADDRESS + """mul.lo.u32 %t4, %t0, 4; st.shared.b32 [%t4], %t3; bar.sync 0; sub.u32 %t5, 252, %t4;
ld.shared.b32 %t6, [%t5]; st.global.b32 [%a2], %t6; ret;""", x)  # fmt: skip
    assert np.array_equal(x, np.arange(128).reshape(2, 64)[:, ::-1].ravel())
    with pytest.raises(RuntimeError, match="bar.sync"):
        execute(ADDRESS + "setp.lt.u32 %p0, %t0, 7; @%p0 bra $out; bar.sync 0;\n$out: ret;", np.zeros(128, np.uint32))


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5), ("idx", 9, 31, lambda lane: 9),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane < 29 else lane),
    ],
)  # fmt: skip
def test_shuffles(mode, b, c, source):
    x = np.arange(128, dtype=np.uint32) * 7
    wanted = [7 * (base + source(lane)) for base in range(0, 128, 32) for lane in range(32)]
    execute(ADDRESS + f"shfl.sync.{mode}.b32 %t4, %t3, {b}, {c}, -1; st.global.b32 [%a2], %t4; ret;", x)
    assert x.tolist() == wanted


def test_memory_is_guarded():
    with pytest.raises(IndexError, match="in no tensor"):
        execute(ADDRESS + "ret;", np.zeros(100, np.uint32))
    with pytest.raises(ValueError, match="misaligned"):
        execute(ADDRESS + "ld.global.v2.b32 {%t4, %t5}, [%a2]; ret;", np.zeros(130, np.uint32))


def test_what_is_not_implemented_is_refused():
    for line in (
        "add.rz.f32 %t4, %t3, %t3;",
        "mul.ftz.f32 %t4, %t3, %t3;",
        "cvt.rna.tf32.f32 %t4, %t3;",
        "sin.approx.f32 %t4, %t3;",
    ):
        with pytest.raises(NotImplementedError, match=re.escape(line[:-1])):
            execute(ADDRESS + line + " ret;", np.zeros(128, np.uint32))


def test_names_in_braces_are_their_own():
    program = Program("{ .reg .b32 t; mov.b32 t, 1; } { .reg .b16 t; mov.b16 t, 2; }")
    assert sorted(program.widths.values()) == [16, 32]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1))
def test_prmt(a, b, selector):
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    wanted = []
    for i in range(4):
        n = selector >> 4 * i & 15
        byte = data[n & 7]
        wanted.append((0xFF if byte & 0x80 else 0) if n & 8 else byte)
    x, y = np.array([a], np.uint32), np.array([b], np.uint32)
    found = run_asm(f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [x, y], [32], 1)[0]
    assert int(found[0]) == int.from_bytes(bytes(wanted), "little")


def test_inline_assembly_over_packed_elements():
    """Four pairs to four bytes, two codes of E2M1 each, the first source in the upper half."""
    text = """{ .reg .b8 c<4>; cvt.rn.satfinite.e2m1x2.f32 c0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 c1, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 c2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 c3, $8, $4; mov.b32 $0, {c0, c1, c2, c3}; }"""
    low, high = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32) * 3
    found = run_asm(text, "=r,f,f,f,f,f,f,f,f", [low.view(np.uint32), high.view(np.uint32)], [8], 4)[0]
    assert np.array_equal(found, numbers.to_e2m1(low) | numbers.to_e2m1(high) << 4)


SWAPS = {
    "add": "sub", "sub": "add", "and": "or", "or": "and", "xor": "or", "shl": "shr", "max": "min", "min": "max", "mul": "add",
}  # fmt: skip


def mutants(ptx: str, count: int) -> list[tuple[str, str]]:
    """(what was changed, the text): one instruction replaced by another, or one of its immediates by its neighbour."""
    lines, found = ptx.splitlines(), []
    for i, line in enumerate(lines):
        code = line.strip()
        if not re.match(r"(@!?%p\d+ )?[a-z]", code) or code.startswith(("ret", "bra", "ld.param", "bar")):
            continue
        op = code.split()[1 if code.startswith("@") else 0]
        name, _, rest = op.partition(".")
        if name in SWAPS and not (name == "mul" and ("wide" in rest or "lo" in rest or "hi" in rest)) and "NaN" not in rest:
            other = SWAPS[name] + "." + (rest.replace("b32", "u32").replace("b64", "u64") if name == "shl" else rest)
            found.append((code, "\n".join([*lines[:i], line.replace(op, other, 1), *lines[i + 1 :]])))
        elif number := re.search(r", (-?\d+);", code):
            changed = line.replace(number[0], f", {int(number[1]) ^ 1};")
            found.append((code, "\n".join([*lines[:i], changed, *lines[i + 1 :]])))
    return random.Random(0).sample(found, min(count, len(found)))


@pytest.mark.slow
def test_a_wrong_instruction_is_noticed():
    """Of single-instruction changes in the compiled NVFP4 kernel of sm_100a, at least 95 % change a byte or fail."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are not compiled in the interpreter")
    calls = []
    run = device.run_kernel

    def noted(ptx, grid, arguments, shared):
        calls.append((ptx, grid, [a.copy() if isinstance(a, np.ndarray) else a for a in arguments], shared))
        result = run(ptx, grid, arguments, shared)
        calls[-1] += ([a.copy() for a in arguments if isinstance(a, np.ndarray)],)
        return result

    device.run_kernel = noted
    try:
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        x = (x * torch.exp2(torch.randint(-9, 3, x.shape, generator=torch.Generator().manual_seed(1)).float())).to(
            torch.bfloat16
        )
        specs = QuantSpec(rounding="stochastic8"), QuantSpec(rounding="stochastic8", hadamard=16)
        with device.emulated(100):
            kernel.encode_pair(x, specs, (Key(1), Key(2)), (None, None), (None, None))
    finally:
        device.run_kernel = run
    ptx, grid, arguments, shared, wanted = calls[-1]
    survivors = []
    tried = mutants(ptx, 200)
    for what, text in tried:
        arrays = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        try:
            run_kernel(text, grid, arrays, shared)
        except Exception:
            continue
        made = [a for a in arrays if isinstance(a, np.ndarray)]
        if all(np.array_equal(a, b) for a, b in zip(made, wanted, strict=True)):
            survivors.append(what)
    assert len(tried) >= 100
    assert len(survivors) <= 0.05 * len(tried), survivors
