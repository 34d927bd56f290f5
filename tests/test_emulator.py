"""testing/: the emulator of PTX. Formats against ml_dtypes, arithmetic against rational numbers, instructions against plain
Python, small programs against what they say, and kernels that Triton compiles against what they compute.
"""

import json
import os
import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testing import numbers
from testing.instructions import decode
from testing.machine import run_asm, run_kernel
from testing.ptx import Immediate, Register, Vector, parse_assembly, parse_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about casts that overflow or meet NaN

FEW = settings(max_examples=60, deadline=None)
WORDS = st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1]), min_size=12, max_size=12)


def array(values, dtype=np.uint32) -> np.ndarray:
    return np.array(values, dtype)


def apply(asm: str, *inputs: np.ndarray, out: int = 32, letters: str = "") -> np.ndarray:
    """One line of assembly on lanes, $0 its result."""
    sizes = {2: "h", 4: "r", 8: "l"}
    inputs = [np.asarray(i) for i in inputs]
    inputs = [i.view(f"u{i.dtype.itemsize}") for i in inputs]
    constraints = letters or ",".join(["=" + sizes[out // 8], *(sizes[i.dtype.itemsize] for i in inputs)])
    return run_asm(asm, constraints, inputs, [out], 1)[0]


# --- formats ---


def fp32_patterns(values: np.ndarray, count: int = 1 << 17) -> np.ndarray:
    """Every BF16 and FP16 number, midpoints of these values with their fp32 neighbours, and random bit patterns."""
    random = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    values = np.unique(np.abs(values[np.isfinite(values)])).astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32).view(np.uint32)
    near = np.concatenate([middles + np.uint32(d) for d in (0xFFFFFFFF, 0, 1)])
    halves = np.arange(2**16, dtype=np.uint16)
    bits = np.concatenate([random, near, near | np.uint32(1 << 31), halves.astype(np.uint32) << 16])
    return np.concatenate([bits.view(np.float32), halves.view(np.float16).astype(np.float32)])


SMALL = {
    "e2m1": (ml_dtypes.float4_e2m1fn, numbers.to_e2m1, numbers.from_e2m1, 6.0, 0x7),
    "e4m3": (ml_dtypes.float8_e4m3fn, numbers.to_e4m3, numbers.from_e4m3, 448.0, 0x7F),
    "e5m2": (ml_dtypes.float8_e5m2, numbers.to_e5m2, numbers.from_e5m2, 57344.0, 0x7F),
}


@pytest.mark.parametrize("name", SMALL)
def test_codes_of_small_formats(name):
    theirs, encode, decode, top, nan = SMALL[name]
    codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
    values = codes.view(theirs).astype(np.float32)
    np.testing.assert_array_equal(decode(codes), values)
    x = fp32_patterns(values)
    expected = np.clip(x, -top, top).astype(theirs).view(np.uint8)  # ml_dtypes overflows, the ISA's satfinite does not
    np.testing.assert_array_equal(encode(x), np.where(np.isnan(x), nan, expected))


def test_codes_of_ue8m0():
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(numbers.from_ue8m0(codes), values)
    x = np.abs(fp32_patterns(values))
    finite, exact = values[:255].astype(np.float64), x.astype(np.float64)
    at_least = np.minimum(np.searchsorted(finite, exact, "left"), 254)
    at_most = np.maximum(np.searchsorted(finite, exact, "right") - 1, 0)
    np.testing.assert_array_equal(numbers.to_ue8m0(x, up=True), np.where(np.isnan(x), 255, at_least))
    np.testing.assert_array_equal(numbers.to_ue8m0(x, up=False), np.where(np.isnan(x), 255, at_most))


def test_sixteen_bits():
    codes = np.arange(2**16, dtype=np.uint16)
    bf16 = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(numbers.bf16_to_f32(codes), bf16)
    x = fp32_patterns(bf16)
    expected = np.where(np.isnan(x), 0x7FFF, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(numbers.f32_to_bf16(x), expected)
    np.testing.assert_array_equal(numbers.f32_to_bf16(x, True), np.where(np.isnan(x), 0x7FFF, x.view(np.uint32) >> 16))

    half = codes.view(np.float16).astype(np.float32)
    finite = ~np.isnan(half)
    np.testing.assert_array_equal(numbers.f32_to_f16(half)[finite], codes[finite])
    assert set(numbers.f32_to_f16(half)[~finite]) == {0x7FFF}
    np.testing.assert_array_equal(numbers.f16_to_f32(codes)[finite], half[finite])
    assert set(numbers.f16_to_f32(codes)[~finite].view(np.uint32)) == {0x7FFFFFFF}


def rounded(value: Fraction, precision: int, lowest: int, highest: int, toward_zero: bool) -> float:
    """A rational as a binary float: nearest even or toward zero. lowest, highest: exponents of normal numbers."""
    size = abs(value)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    quotient = size / unit
    whole = quotient.numerator // quotient.denominator
    rest = quotient - whole
    if not toward_zero and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)):
        whole += 1
    made = whole * unit
    if made >= Fraction(2) ** (highest + 1):
        top = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** highest
        made = top if toward_zero else float("inf")
    return float(made) if value > 0 else -float(made)


SINGLE, HALF, BRAIN = (24, -126, 127), (11, -14, 15), (8, -126, 127)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@FEW
@given(st.lists(FLOATS, min_size=1, max_size=30), st.booleans())
def test_narrowing_of_fp32(values, toward_zero):
    x = array(values, np.float32)
    for narrow, widen, form in (
        (numbers.f32_to_f16, numbers.f16_to_f32, HALF),
        (numbers.f32_to_bf16, numbers.bf16_to_f32, BRAIN),
    ):
        found = widen(narrow(x, toward_zero))
        assert [float(v) for v in found] == [rounded(Fraction(float(v)), *form, toward_zero) for v in x]


def exact_triples(kind: str) -> np.ndarray:
    """fp32 [n, 3] where rounding of a b + c is hard: far apart, cancelling, subnormal, overflowing."""
    g = np.random.default_rng(sum(map(ord, kind)))
    bits = g.integers(0, 2**32, (300, 3), dtype=np.uint32)
    t = bits.view(np.float32).copy()
    t[~np.isfinite(t)] = 1.5
    if kind == "near":
        t = (t.view(np.uint32) & np.uint32(0x807FFFFF) | g.integers(120, 134, (300, 3), dtype=np.uint32) << 23).view(np.float32)
    elif kind == "cancelling":
        t = (t.view(np.uint32) & np.uint32(0x807FFFFF) | g.integers(110, 144, (300, 3), dtype=np.uint32) << 23).view(np.float32)
        t[:, 2] = -t[:, 0] * t[:, 1]
        t[::2, 2] = (t[::2, 2].view(np.uint32) + g.integers(-2, 3, 150).astype(np.uint32)).view(np.float32)
    elif kind == "subnormal":
        t[:, 1] = (t[:, 1].view(np.uint32) & np.uint32(0x807FFFFF) | np.uint32(100 << 23)).view(np.float32)
        fields = g.integers(0, 30, 300, dtype=np.uint32) << 23
        t[:, 0] = (t[:, 0].view(np.uint32) & np.uint32(0x807FFFFF) | fields).view(np.float32)
        t[:, 2] = (t[:, 2].view(np.uint32) & np.uint32(0x80FFFFFF)).view(np.float32)
    elif kind == "huge":
        t = (t.view(np.uint32) & np.uint32(0x807FFFFF) | g.integers(185, 196, (300, 3), dtype=np.uint32) << 23).view(np.float32)
        t[:, 2] = (t[:, 2].view(np.uint32) & np.uint32(0x807FFFFF) | np.uint32(254 << 23)).view(np.float32)
    return np.ascontiguousarray(t)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["any", "near", "cancelling", "subnormal", "huge"])
def test_arithmetic_of_fp32_is_exact(kind, mode):
    a, b, c = exact_triples(kind).T.copy()
    rows = [[Fraction(float(v)) for v in row] for row in zip(a, b, c, strict=True)]
    far = np.maximum(np.abs(b), np.float32(2.0**-126))
    for asm, inputs, wanted in (
        (f"fma.{mode}.f32 $0, $1, $2, $3;", (a, b, c), [x * y + z for x, y, z in rows]),
        (f"mul.{mode}.f32 $0, $1, $2;", (a, b), [x * y for x, y, _ in rows]),
        (f"add.{mode}.f32 $0, $1, $2;", (a, c), [x + z for x, _, z in rows]),
        (f"sub.{mode}.f32 $0, $1, $2;", (a, c), [x - z for x, _, z in rows]),
        ("div.rn.f32 $0, $1, $2;", (a, far), [x / Fraction(float(y)) for (x, _, _), y in zip(rows, far, strict=True)]),
    ):
        found = apply(asm, *inputs).view(np.float32)
        toward_zero = mode == "rz" and "div" not in asm
        assert [float(v) for v in found] == [rounded(w, *SINGLE, toward_zero) for w in wanted], asm


@pytest.mark.parametrize("kind, form", [("f16", HALF), ("bf16", BRAIN)])
def test_arithmetic_of_halves_is_rounded_once(kind, form):
    g = np.random.default_rng(5)
    codes = g.integers(0, 2**16, (3, 2000), dtype=np.uint16)
    widen = numbers.f16_to_f32 if kind == "f16" else numbers.bf16_to_f32
    values = widen(codes.reshape(-1)).reshape(3, -1)
    codes = codes[:, np.isfinite(values).all(0)]
    rows = [[Fraction(float(v)) for v in widen(np.ascontiguousarray(r))] for r in codes.T]
    for asm, count, wanted in (
        (f"fma.rn.{kind} $0, $1, $2, $3;", 3, [x * y + z for x, y, z in rows]),
        (f"mul.rn.{kind} $0, $1, $2;", 2, [x * y for x, y, _ in rows]),
        (f"add.rn.{kind} $0, $1, $2;", 2, [x + y for x, y, _ in rows]),
    ):
        found = widen(apply(asm, *codes[:count], out=16))
        assert [float(v) for v in found] == [rounded(w, *form, False) for w in wanted], asm


def test_signs_of_zero_infinities_and_nan():
    one, zero, minus, inf, nan = array([1, 0, -0.0, np.inf, np.nan], np.float32)
    cases = [(one, -one, zero, 0), (minus, one, minus, 1 << 31), (inf, zero, one, 0x7FFFFFFF), (inf, one, -inf, 0x7FFFFFFF),
             (inf, one, one, 0x7F800000), (-nan, one, one, 0x7FFFFFFF)]  # fmt: skip
    a, b, c, wanted = map(list, zip(*cases, strict=True))
    c[0] = one
    for mode in ("rn", "rz"):
        found = apply(f"fma.{mode}.f32 $0, $1, $2, $3;", *(array(v, np.float32) for v in (a, b, c)))
        assert found.tolist() == wanted
    x, y = array([inf, -nan, zero], np.float32), array([-inf, one, minus], np.float32)
    assert apply("add.rn.f32 $0, $1, $2;", x, y).tolist() == [0x7FFFFFFF, 0x7FFFFFFF, 0]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_a_half_and_a_single(kind, mode):
    """add and sub of a 16-bit number and a fp32 one are those of fp32 once it is widened, sign of a zero included."""
    random = np.random.default_rng(1)
    codes, c = random.integers(0, 2**16, 999).astype(np.uint16), random.integers(0, 2**32, 999, dtype=np.uint32)
    codes[:3], c[:3] = (0, 0x8000, 0x8000), (1 << 31, 0, 1 << 31)
    widen = numbers.f16_to_f32 if kind == "f16" else numbers.bf16_to_f32
    for name in ("add", "sub"):
        found = apply(f"{name}.{mode}.f32.{kind} $0, $1, $2;", codes, c)
        assert np.array_equal(found, apply(f"{name}.{mode}.f32 $0, $1, $2;", widen(codes), c)), name


def test_ftz_flushes_inputs_and_results():
    x = array([2.0**-127, -(2.0**-127), 2.0**-126, 1.5 * 2.0**-126], np.float32)
    ones, less = np.ones(4, np.float32), np.full(4, 2.0**-126, np.float32)
    assert apply("mul.rn.ftz.f32 $0, $1, $2;", x, np.full(4, 2.0**100, np.float32)).view(np.float32)[:2].tolist() == [0, 0]
    assert apply("mul.rn.ftz.f32 $0, $1, $2;", x, ones).tolist() == [0, 1 << 31, 0x00800000, 0x00C00000]
    assert apply("sub.rn.ftz.f32 $0, $1, $2;", x, less).view(np.float32)[3] == 0


# --- instructions against plain Python ---


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


@FEW
@given(WORDS, WORDS, WORDS)
def test_permutations(a, b, s):
    def model(x, y, selector):
        source = (y << 32 | x).to_bytes(8, "little")
        made = 0
        for k in range(4):
            nibble = selector >> 4 * k & 15
            byte = source[nibble & 7]
            made |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * k
        return made

    assert apply("prmt.b32 $0, $1, $2, $3;", array(a), array(b), array(s)).tolist() == list(map(model, a, b, s))
    found = apply(f"prmt.b32 $0, $1, $2, {s[0] & 0xFFFF:#x};", array(a), array(b))
    assert found.tolist() == [model(x, y, s[0]) for x, y in zip(a, b, strict=True)]
    assert apply("prmt.b32 $0, $1, 0, 0x5140;", array(a)).tolist() == [model(x, 0, 0x5140) for x in a]


@FEW
@given(WORDS, WORDS, WORDS, st.integers(0, 255))
def test_logic_of_three(a, b, c, table):
    def model(x, y, z):
        return sum((table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))

    found = apply(f"lop3.b32 $0, $1, $2, $3, {table};", array(a), array(b), array(c))
    assert found.tolist() == list(map(model, a, b, c))


AMOUNTS = st.lists(st.integers(0, 70) | st.integers(0, 2**32 - 1), min_size=12, max_size=12)


@FEW
@given(WORDS, WORDS, AMOUNTS, AMOUNTS)
def test_fields_and_shifts(a, b, p, n):
    def bfe(x, position, count, sign):
        position, count = position & 255, count & 255
        top = x >> min(position + count - 1, 31) & 1 if count and sign else 0
        return sum((x >> position + i & 1 if i < count and position + i < 32 else top) << i for i in range(32))

    def bfi(x, y, position, count):
        position, count = position & 255, count & 255
        mask = (((1 << count) - 1) << position) & 0xFFFFFFFF
        return y & ~mask | x << position & mask

    def shf(x, y, amount, left, wrap):
        amount = amount & 31 if wrap else min(amount, 32)
        both = y << 32 | x
        return (both << amount >> 32 if left else both >> amount) & 0xFFFFFFFF

    words, others, positions, counts = map(array, (a, b, p, n))
    for kind, sign in (("u32", False), ("s32", True)):
        wanted = [bfe(x, i, k, sign) for x, i, k in zip(a, p, n, strict=True)]
        assert apply(f"bfe.{kind} $0, $1, $2, $3;", words, positions, counts).tolist() == wanted
        wanted = [bfe(x, p[0] & 63, n[0] & 63, sign) for x in a]
        assert apply(f"bfe.{kind} $0, $1, {p[0] & 63}, {n[0] & 63};", words).tolist() == wanted
    found = apply("bfi.b32 $0, $1, $2, $3, $4;", words, others, positions, counts)
    assert found.tolist() == list(map(bfi, a, b, p, n))
    for left in (True, False):
        for wrap in (True, False):
            found = apply(f"shf.{'rl'[left]}.{'wrap' if wrap else 'clamp'}.b32 $0, $1, $2, $3;", words, others, positions)
            assert found.tolist() == [shf(x, y, i, left, wrap) for x, y, i in zip(a, b, p, strict=True)]
    wanted = [x << min(i, 32) & 0xFFFFFFFF for x, i in zip(a, p, strict=True)]
    assert apply("shl.b32 $0, $1, $2;", words, positions).tolist() == wanted
    wanted = [x >> min(i, 32) for x, i in zip(a, p, strict=True)]
    assert apply("shr.u32 $0, $1, $2;", words, positions).tolist() == wanted
    wanted = [signed(x) >> min(i, 32) & 0xFFFFFFFF for x, i in zip(a, p, strict=True)]
    assert apply("shr.s32 $0, $1, $2;", words, positions).tolist() == wanted
    assert apply(f"shr.s32 $0, $1, {p[0]};", words).tolist() == [signed(x) >> min(p[0], 32) & 0xFFFFFFFF for x in a]
    wide = array(a, np.uint64) << np.uint64(32) | array(b, np.uint64)
    wanted = [x << min(i, 64) & (2**64 - 1) for x, i in zip(wide.tolist(), p, strict=True)]
    assert apply("shl.b64 $0, $1, $2;", wide, positions, out=64).tolist() == wanted
    assert apply("clz.b32 $0, $1;", words).tolist() == [32 - x.bit_length() for x in a]
    assert apply("popc.b64 $0, $1;", wide, letters="=r,l").tolist() == [x.bit_count() for x in wide.tolist()]


@FEW
@given(WORDS, WORDS, WORDS)
def test_integers(a, b, c):
    m, n, k = map(array, (a, b, c))
    rows = list(zip(a, b, c, strict=True))

    def same(asm, model, out=32, inputs=(m, n)):
        assert apply(asm, *inputs, out=out).tolist() == [model(*row) & ((1 << out) - 1) for row in rows], asm

    def quotient(x, y):
        return -1 if not y else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    same("sub.s32 $0, $1, $2;", lambda x, y, z: x - y)
    same("mul.wide.u32 $0, $1, $2;", lambda x, y, z: x * y, 64)
    same("mul.wide.s32 $0, $1, $2;", lambda x, y, z: signed(x) * signed(y), 64)
    same("mul.hi.s32 $0, $1, $2;", lambda x, y, z: signed(x) * signed(y) >> 32)
    same("mad.lo.u32 $0, $1, $2, $3;", lambda x, y, z: x * y + z, 32, (m, n, k))
    same("mad.lo.u32 $0, $1, 2, $1;", lambda x, y, z: 3 * x, 32, (m,))
    same("div.u32 $0, $1, $2;", lambda x, y, z: quotient(x, y))
    same("div.s32 $0, $1, $2;", lambda x, y, z: quotient(signed(x), signed(y)))
    same("max.s32 $0, $1, $2;", lambda x, y, z: max(signed(x), signed(y)))
    same("min.u32 $0, $1, $2;", lambda x, y, z: min(x, y))
    same("cvt.s8.s32 $0, $1;", lambda x, y, z: signed(x & 255, 8), 32, (m,))
    same("cvt.sat.u8.s32 $0, $1;", lambda x, y, z: min(max(signed(x), 0), 255), 32, (m,))
    same("cvt.s64.s32 $0, $1;", lambda x, y, z: signed(x), 64, (m,))
    wide = array([x << 32 | y for x, y, _ in rows], np.uint64)
    other = array([z << 32 | x for x, _, z in rows], np.uint64)
    for kind, value in (("u64", int), ("s64", lambda v: signed(v, 64))):
        wanted = [value(x) * value(y) >> 64 & (2**64 - 1) for x, y in zip(wide.tolist(), other.tolist(), strict=True)]
        assert apply(f"mul.hi.{kind} $0, $1, $2;", wide, other, out=64).tolist() == wanted


@FEW
@given(WORDS, WORDS, WORDS)
def test_larger_and_smaller(a, b, c):
    """Floats of any bits: -0 < +0, NaN loses unless .NaN."""

    def model(values, best, nan):
        some = [v for v in values if not np.isnan(v)]
        if (nan and len(some) < len(values)) or not some:
            return 0x7FFFFFFF
        return int(best(some, key=lambda v: (v, not np.signbit(v))).view(np.uint32))

    x, y, z = (array(v).view(np.float32) for v in (a, b, c))
    for word, best in (("max", max), ("min", min)):
        for nan in ("", ".NaN"):
            wanted = [model(row, best, nan) for row in zip(x, y, strict=True)]
            assert apply(f"{word}{nan}.f32 $0, $1, $2;", x, y).tolist() == wanted
            wanted = [model(row, best, nan) for row in zip(x, y, z, strict=True)]
            assert apply(f"{word}{nan}.f32 $0, $1, $2, $3;", x, y, z).tolist() == wanted
    words = apply("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", x, y)
    for half in range(2):
        for found, u, v in zip(words, array(a), array(b), strict=True):
            found, u, v = (int(w) >> 16 * half & 0xFFFF for w in (found, u, v))
            size = max(u & 0x7FFF, v & 0x7FFF)
            assert found == (0x7FFF if size > 0x7F80 else size | (u ^ v) & 0x8000)


def test_comparisons_with_nan():
    x = array([1, 2, np.nan, 0.0], np.float32)
    y = array([2, 1, 1, -0.0], np.float32)
    ordered = {"lt": [1, 0, 0, 0], "ge": [0, 1, 0, 1], "eq": [0, 0, 0, 1], "ne": [1, 1, 0, 0]}
    unordered = {word + "u": [*row[:2], 1, row[3]] for word, row in ordered.items()}
    wanted = ordered | unordered | {"num": [1, 1, 0, 1], "nan": [0, 0, 1, 0]}
    for word, row in wanted.items():
        text = f"{{ .reg .pred p, q; setp.{word}.f32 p|q, $1, $2; selp.b32 $0, 1, 0, p; @q or.b32 $0, $0, 2; }}"
        assert apply(text, x, y).tolist() == [r or 2 for r in row], word


def test_pairs_of_floats():
    g = np.random.default_rng(1)
    a, b, c = (g.standard_normal((3, 40)).astype(np.float32).view(np.uint64)[:, :] for _ in range(3))
    a, b, c = (v.reshape(-1) for v in (a, b, c))
    x, y, z = (v.view(np.float32) for v in (a, b, c))
    for word, wanted in (("add", x + y), ("sub", x - y), ("mul", x * y)):
        assert apply(f"{word}.rn.f32x2 $0, $1, $2;", a, b, out=64).tolist() == wanted.view(np.uint64).tolist()
    found = apply("fma.rn.f32x2 $0, $1, $2, $3;", a, b, c, out=64)
    assert found.tolist() == numbers.fma32(x, y, z).view(np.uint64).tolist()
    h, k = (v.astype(np.float16).view(np.uint32) for v in (x, y))
    wanted = (h.view(np.float16) * k.view(np.float16)).view(np.uint32)
    assert apply("mul.rn.f16x2 $0, $1, $2;", h, k).tolist() == wanted.tolist()


def test_conversions():
    x = fp32_patterns(np.arange(7, dtype=np.float32), 4096)[: 4096 * 2]
    low, high = x[::2].copy(), x[1::2].copy()
    for name, encode, dtype, bits in (
        ("bf16x2", numbers.f32_to_bf16, np.uint32, 32),
        ("f16x2", numbers.f32_to_f16, np.uint32, 32),
    ):
        for mode in ("rn", "rz"):
            wanted = encode(high, mode == "rz").astype(dtype) << 16 | encode(low, mode == "rz")
            assert apply(f"cvt.{mode}.{name}.f32 $0, $1, $2;", high, low, out=bits).tolist() == wanted.tolist()
    half = numbers.f32_to_f16(x)
    pairs = half.view(np.uint32)
    for name, encode, bits in (("e4m3x2", numbers.to_e4m3, 8), ("e5m2x2", numbers.to_e5m2, 8), ("e2m1x2", numbers.to_e2m1, 4)):
        text = f"cvt.rn.satfinite.{name}.f32 $0, $1, $2;"
        wanted = encode(high).astype(np.uint16) << bits | encode(low)
        assert apply(text, high, low, letters="=r,r,r").tolist() == wanted.tolist()
        wide = numbers.f16_to_f32(half)
        wanted = encode(wide[1::2]).astype(np.uint16) << bits | encode(wide[::2])
        assert apply(f"cvt.rn.satfinite.{name}.f16x2 $0, $1;", pairs, letters="=r,r").tolist() == wanted.tolist()
    text = "{ .reg .b8 c; cvt.u8.u32 c, $1; cvt.rn.f16x2.e2m1x2 $0, c; }"
    with pytest.raises(NotImplementedError, match="cvt.rn.bf16x2.e4m3x2"):
        apply("cvt.rn.bf16x2.e4m3x2 $0, $1;", np.zeros(4, np.uint16))
    codes = np.arange(256, dtype=np.uint32)
    found = apply(text, codes).view(np.float16).reshape(-1, 2)
    assert found[:, 0].tolist() == numbers.from_e2m1(codes & 15).tolist()
    assert found[:, 1].tolist() == numbers.from_e2m1(codes >> 4).tolist()


@FEW
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_floats_to_integers(values):
    x = array(values, np.float32)
    for mode, whole in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        for kind, bits in (("s32", 32), ("u32", 32), ("s64", 64), ("u64", 64)):
            top = 2 ** (bits - (kind[0] == "s")) - 1
            low = -top - 1 if kind[0] == "s" else 0

            def model(v, whole=whole, top=top, low=low):
                if np.isnan(v):
                    return 0
                return (top if v > 0 else low) if np.isinf(v) else min(max(int(whole(np.float64(v))), low), top)

            found = apply(f"cvt.{mode}.{kind}.f32 $0, $1;", x, out=bits)
            assert found.tolist() == [model(v) & (2**bits - 1) for v in x], (mode, kind)


def test_stochastic_conversions_take_the_bits_that_are_assumed():
    """All random bits set round up whatever is not on the grid, none set truncate; each number has its own bits."""
    x = array([1.2, 2.2, 3.5, 5.0], np.float32)
    inputs = [np.full(4, v) for v in x]
    text = "{ .reg .b16 h; cvt.rs.satfinite.e2m1x4.f32 h, {$1, $2, $3, $4}, $5; cvt.u32.u16 $0, h; }"
    masks = array([0xFF000000, 0x0000FF00, 0x00FF0000, 0x000000FF])
    found = apply(text, *inputs, masks)
    down, up = numbers.from_e2m1(array([2, 4, 5, 6])), array([1.5, 3, 4, 6], np.float32)
    for lane in range(4):
        values = numbers.from_e2m1(found[lane] >> array([12, 8, 4, 0]) & 15)
        assert values.tolist() == [up[k] if k == lane else down[k] for k in range(4)]
    # e4m3: 1.2 lies 0.6 of a unit (1/8) above 1.125: up iff its 16 bits are at least 0.4 of 2^16.
    text = "cvt.rs.satfinite.e4m3x4.f32 $0, {$1, $2, $3, $4}, $5;"
    inputs = [np.full(6, 1.2, np.float32)] * 4
    words = array([0x8000_0000, 0x0001_0000, 0x0000_8000, 0x0000_0001, 0, 0xFFFF_FFFF])
    found = apply(text, *inputs, words)
    ups = [[code == 0x3A for code in int(f).to_bytes(4, "big")] for f in found]  # a, b, e, f
    assert ups == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0] * 4, [1] * 4]
    assert apply(text, *[np.full(4, -1e9, np.float32)] * 4, words[:4]).tolist() == [0xFEFEFEFE] * 4


def test_inline_assembly_of_four_elements():
    g = np.random.default_rng(2)
    low, high = g.standard_normal((2, 64)).astype(np.float32) * 3
    text = """{ .reg .b8 c<4>;
    cvt.rn.satfinite.e2m1x2.f32 c0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 c1, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 c2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 c3, $8, $4;
    mov.b32 $0, {c0, c1, c2, c3}; }"""
    (found,) = run_asm(text, "=r,f,f,f,f,f,f,f,f", [low.view(np.uint32), high.view(np.uint32)], [8], 4)
    assert found.tolist() == (numbers.to_e2m1(low) | numbers.to_e2m1(high) << 4).tolist()
    a = g.integers(0, 256, 12, dtype=np.uint8)
    assert run_asm("not.b32 $0, $1;", "=r,r", [a], [8], 4)[0].tolist() == (~a).tolist()
    x, y = g.integers(0, 2**16, (2, 6), dtype=np.uint16)
    found = run_asm("{ mov.b32 $0, {$2, $3}; mov.u32 $1, 7; }", "=r,=r,h,h", [x, y], [32, 32], 1)
    assert found[0].tolist() == (x | y.astype(np.uint32) << 16).tolist() and set(found[1]) == {7}
    for constraints, pack in (("=r,r,r", 4), ("r,=r", 4), ("=r,q", 4), ("=r,r", 5)):
        with pytest.raises(ValueError):
            run_asm("not.b32 $0, $1;", constraints, [a], [8], pack)


@pytest.mark.parametrize(
    "text",
    [
        "add.rm.f32 $0, $1, $1;",
        "add.sat.f32 $0, $1, $1;",
        "add.cc.u32 $0, $1, $1;",
        "add.rn.f128 $0, $1, $1;",
        "fma.rn.relu.f16x2 $0, $1, $1, $1;",
        "fma.f32 $0, $1, $1, $1;",
        "mul.rz.bf16x2 $0, $1, $1;",
        "mul.u32 $0, $1, $1;",
        "max.abs.f32 $0, $1, $1;",
        "cvt.rn.relu.bf16x2.f32 $0, $1, $1;",
        "cvt.rm.f16x2.f32 $0, $1, $1;",
        "cvt.rna.tf32.f32 $0, $1;",
        "cvt.sat.f32.f32 $0, $1;",
        "cvt.s32.f32 $0, $1;",
        "cvt.rz.f32.s32 $0, $1;",
        "cvt.rn.e4m3x2.f32 $0, $1, $1;",
        "cvt.rn.satfinite.e3m2x2.f32 $0, $1, $1;",
        "cvt.rz.ue8m0x2.f32 $0, $1, $1;",
        "prmt.b32.f4e $0, $1, $1, 3;",
        "lop3.or.b32 $0, $1, $1, $1, 3;",
        "setp.lo.s32 $0, $1, $1;",
        "ex2.approx.f16x2 $0, $1;",
        "dp4a.u32.u32 $0, $1, $1, $1;",
        "wgmma.fence.sync.aligned;",
        "tcgen05.wait::ld.sync.aligned;",
        "mbarrier.init.shared.b64 [$1], 1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0}, {$1}, {$1}, {$1};",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {$0}, [$1];",
        "atom.global.add.noftz.f16x2 $0, [$1], $1;",
        "bar.arrive 0, 32;",
        "add.u32 $0, $1;",
        "mov.u32 $0, %clock;",
        "add.f32 $0, $1, 1;",
    ],
)
def test_what_is_not_implemented_is_refused(text):
    with pytest.raises(NotImplementedError) as found:
        apply(text, np.zeros(2, np.uint32))
    assert text.split()[0].rstrip(";") in str(found.value)


def test_what_is_approximate_is_counted():
    body = "rcp.approx.ftz.f32 %r4, 0f40000000; add.f32 %r5, %r4, %r4; add.rn.f32 %r6, %r4, %r4; @%p0 lg2.approx.f32 %r7, %r4;"
    lanes = launch(body)
    assert lanes.approx == {"rcp.approx.ftz.f32": 1, "add.f32": 1}
    assert lanes.count["add"] == 2 + 2 and lanes.count["lg2"] == 0  # launch has two of its own


# --- small programs ---


def launch(body: str, *args, threads: int = 32, grid: tuple[int, ...] = (1,), smem: int = 0, shared: str = "", steps=10**5):
    """Runs statements of PTX. %d0, %d1, ... point to the arguments, %r0 is the lane of its CTA, %r1 the CTA, %r2 the lane of
    the grid; %e0, %e1, ... point to element %r2, of 4 bytes, of the arguments."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 16 p{i}" for i in range(len(args)))
    loads = "".join(
        f"ld.param.b64 %d{i}, [p{i}]; mul.wide.u32 %e{i}, %r2, 4; add.s64 %e{i}, %e{i}, %d{i};\n" for i in range(len(args))
    )
    text = f"""
    .version 9.0
    .target sm_100a
    .address_size 64
    {shared}
    .visible .entry k({parameters})
    .reqntid {threads}
    {{
        .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .b64 %d<16>; .reg .b64 %e<8>;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r3, %ntid.x; mul.lo.u32 %r2, %r1, %r3; add.u32 %r2, %r2, %r0;
        add.u32 %r3, %r0, 0; // a comment; with a semicolon
        {loads}
        {body}
        ret;
    }}"""
    return run_kernel(text, grid, list(args), smem, steps=steps)


def test_predication_and_branches():
    out = np.zeros(128, np.uint32)
    launch(
        """
        setp.lt.u32 %p1, %r0, 10; and.b32 %r4, %r0, 1; setp.eq.u32 %p2, %r4, 1;
        mov.u32 %r5, 100;
        @%p1 add.u32 %r5, %r5, 1;
        @!%p1 bra $FAR;
        @%p2 bra $ODD;
        add.u32 %r5, %r5, 10;
        bra.uni $MEET;
    $ODD:
        add.u32 %r5, %r5, 20;
    $MEET:
        add.u32 %r5, %r5, 200;
    $FAR:
        setp.eq.u32 %p3, %r0, 63;
        @%p3 exit;
        st.global.b32 [%e0], %r5;
        """,
        out,
        threads=64,
        grid=(2,),
    )
    wanted = [(301 + (20 if i % 2 else 10)) if i < 10 else 100 for i in range(63)] + [0]
    assert out.tolist() == wanted * 2


def test_loops_of_different_lengths():
    out = np.zeros(96, np.uint32)
    body = """
        mov.u32 %r4, 0; mov.u32 %r5, 0;
    L:  setp.ge.u32 %p1, %r4, %r0;
        @%p1 bra D;
        add.u32 %r4, %r4, 1; add.u32 %r5, %r5, %r4;
        { .reg .b32 %r4; mov.u32 %r4, 7; }
        bra L;
    D:  st.global.b32 [%e0], %r5;
    """
    launch(body, out, threads=32, grid=(3,))
    assert out.tolist() == [i * (i + 1) // 2 for i in range(32)] * 3
    with pytest.raises(RuntimeError, match="still running after 50"):
        launch("L: bra L;", steps=50)


def test_labels_belong_to_their_braces():
    out = np.zeros(32, np.uint32)
    block = "{ .reg .pred q; setp.lt.u32 q, %r0, LIMIT; @q bra skip; add.u32 %r5, %r5, 1; skip: }"
    body = "mov.u32 %r5, 0;" + block.replace("LIMIT", "5") + block.replace("LIMIT", "20") + "st.global.b32 [%e0], %r5;"
    launch(body, out)
    assert out.tolist() == [(i >= 5) + (i >= 20) for i in range(32)]


def test_shared_memory_and_barriers():
    x = np.arange(256, dtype=np.uint32) * 3
    out = np.zeros(256, np.uint32)
    launch(
        """
        ld.global.b32 %r4, [%e0];
        shl.b32 %r5, %r0, 2; mov.u32 %r6, space; add.u32 %r5, %r5, %r6;
        st.shared.b32 [%r5+4], %r4; st.shared.b32 [first+8], 1;
        bar.sync 0;
        xor.b32 %r7, %r0, 127; shl.b32 %r7, %r7, 2; add.u32 %r7, %r7, %r6;
        ld.shared.b32 %r8, [%r7+4];
        st.global.b32 [%e1], %r8;
        """,
        x, out, threads=128, grid=(2,), smem=516,
        shared=".extern .shared .align 16 .b8 space[]; .shared .align 4 .b8 first[12];",
    )  # fmt: skip
    assert out.tolist() == x.reshape(2, 128)[:, ::-1].reshape(-1).tolist()


def test_each_cta_has_its_own_shared_memory():
    out = np.zeros(128, np.uint32)
    body = """cvt.u64.u32 %d4, %r1; st.shared.b64 [0], %d4; st.shared.b32 [8], 77; bar.sync 0;
    ld.shared.b64 %d5, [0]; cvt.u32.u64 %r4, %d5; st.global.b32 [%e0], %r4;"""
    launch(body, out, grid=(4,), smem=12)
    assert out.tolist() == np.repeat(range(4), 32).tolist()


def test_grids_of_three_sizes():
    out = np.zeros(24, np.uint32)
    body = """mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %nctaid.y;
    mad.lo.u32 %r8, %r5, %r7, %r4; mad.lo.u32 %r8, %r8, %r6, %r1; mul.wide.u32 %d4, %r8, 4; add.s64 %d4, %d4, %d0;
    shl.b32 %r5, %r5, 8; shl.b32 %r4, %r4, 4; or.b32 %r5, %r5, %r4; or.b32 %r5, %r5, %r1; st.global.b32 [%d4], %r5;"""
    launch(body, out, grid=(2, 3, 4))
    assert out.tolist() == [z << 8 | y << 4 | x for z in range(4) for y in range(3) for x in range(2)]


def test_lanes_meet_again():
    """After a branch all are one again: barriers and shuffles of all are allowed."""
    out = np.zeros(64, np.uint32)
    body = """mov.u32 %r4, 1; setp.lt.u32 %p1, %r0, 9; @%p1 bra A; mov.u32 %r4, 2;
    A: bar.sync 0; shfl.sync.bfly.b32 %r5, %r4, 31, 31, 0xffffffff; st.global.b32 [%e0], %r5;"""
    launch(body, out, threads=64)
    assert out.tolist() == [2] * 23 + [1] * 9 + [2] * 32


def test_a_barrier_that_a_part_reaches_raises():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra S; bar.sync 0; S: ret;"
    with pytest.raises(RuntimeError, match="bar.sync reached by 32 of 64 lanes of CTA 0"):
        launch(body, threads=64)
    launch("setp.lt.u32 %p1, %r1, 1; @%p1 bra S; bar.sync 0; S: ret;", threads=64, grid=(2,))  # a whole CTA is enough


WIDTHS = [("b8", 1), ("b8", 4), ("b16", 1), ("b32", 1), ("b32", 2), ("b32", 4), ("b32", 8), ("b64", 2)]


@pytest.mark.parametrize("kind, count", WIDTHS)
def test_widths_of_accesses(kind, count):
    size = int(kind[1:]) // 8 * count
    x = np.random.default_rng(3).integers(0, 256, 64 * size, dtype=np.uint8)
    out, back = np.zeros_like(x), np.zeros_like(x)
    letter = {"b8": "%h", "b16": "%h", "b32": "%r1", "b64": "%d1"}[kind]
    registers = ", ".join(f"{letter}{i}" for i in range(count))
    vector, registers = (f".v{count}", f"{{{registers}}}") if count > 1 else ("", f"{letter}0")
    shared = f"st.shared{vector}.{kind} [%r4], {registers}; bar.sync 0; ld.shared{vector}.{kind} {registers}, [%r4];"
    launch(
        f"""mul.lo.u32 %r4, %r0, {size}; mul.wide.u32 %e5, %r2, {size}; add.s64 %e5, %e5, %d0;
        ld.global.nc.L1::no_allocate{vector}.{kind} {registers}, [%e5];
        {shared if count < 8 else ""}
        mul.wide.u32 %e6, %r2, {size}; add.s64 %e6, %e6, %d1; add.s64 %e7, %e6, -{size};
        setp.gt.u32 %p1, %r2, 2;
        st.global{vector}.{kind} [%e6], {registers};
        sub.s64 %e6, %e6, %d1; add.s64 %e6, %e6, %d2;
        @%p1 st.global{vector}.{kind} [%e6], {registers};
        """,
        x, out, back, grid=(2,), smem=32 * size,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(back[3 * size :], x[3 * size :])
    assert not back[: 3 * size].any()


def test_signed_loads_extend():
    x, out = array([-5, 7] * 16, np.int8), np.zeros(32, np.int32)
    launch("cvt.u64.u32 %d5, %r0; add.s64 %d5, %d5, %d0; ld.global.s8 %r4, [%d5]; st.global.b32 [%e1], %r4;", x, out)
    assert out.tolist() == x.tolist()


def test_atomics():
    top, counter = array([-7], np.int32), array([5])
    order, total = np.zeros(64, np.uint32), np.zeros(1, np.float32)
    launch(
        """
        sub.s32 %r4, %r2, 20; red.global.gpu.relaxed.max.s32 [%d0], %r4;
        atom.global.gpu.acq_rel.add.u32 %r5, [%d1], 2; st.global.b32 [%e2], %r5;
        red.global.add.f32 [%d3], 0f3F000000;
        st.shared.b32 [0], 0; atom.shared.cta.or.b32 %r6, [0], %r0;
        setp.eq.u32 %p1, %r2, 40; @%p1 atom.global.cas.b32 %r7, [%d1], 133, 9;
        """,
        top, counter, order, total, grid=(2,), smem=4,
    )  # fmt: skip
    assert top.tolist() == [43] and total.tolist() == [32.0] and counter.tolist() == [9]
    assert sorted(order.tolist()) == list(range(5, 133, 2))


def test_wrong_addresses_raise_and_name_them():
    x = np.zeros(32, np.uint32)
    with pytest.raises(IndexError, match="4 bytes of global memory at 0x700000000080 .*array 0") as found:
        launch("ld.global.b32 %r4, [%e0+4];", x, np.zeros(4, np.uint32))
    assert "ld.global.b32 %r4" in found.value.__notes__[0]
    with pytest.raises(IndexError, match="0x6ffffffffffc"):
        launch("st.global.b32 [%d0+-4], %r0;", x)
    with pytest.raises(ValueError, match="misaligned access of global memory at 0x700000000004, no multiple of 8"):
        launch("ld.global.v2.b32 {%r4, %r5}, [%d0+4];", x)
    with pytest.raises(IndexError, match="shared memory at 0x7c, there are 124"):
        launch("shl.b32 %r4, %r0, 2; st.shared.b32 [%r4], %r0;", smem=124)
    with pytest.raises(ValueError, match="misaligned access of shared memory at 0x2"):
        launch("st.shared.b32 [2], %r0;", smem=64)
    launch("setp.lt.u32 %p1, %r0, 31; @%p1 ld.global.b32 %r4, [%e0+4];", x)
    assert launch("ret; frobnicate.b32 %r1;").count["ret"] == 1
    with pytest.raises(NotImplementedError, match="frobnicate.b32 %r1"):
        launch("frobnicate.b32 %r1;")


def test_arrays_may_overlap():
    x = np.arange(64, dtype=np.uint32)
    body = "ld.global.b32 %r4, [%e0]; bar.sync 0; st.global.b32 [%e1], %r4;"
    launch(body, x[:32], x[16:48])
    assert x.tolist() == [*range(16), *range(32), *range(48, 64)]
    launch("st.global.b32 [%e1], 5;", x, x)
    assert x[:32].tolist() == [5] * 32


def test_arguments():
    text = """.entry k(.param .u64 a, .param .f32 b, .param .u32 c, .param .u64 .ptr .global .align 1 d) .reqntid 32
    { .reg .b64 %d<2>; .reg .b32 %r<4>; ld.param.u64 %d0, [a]; ld.param.f32 %r0, [b]; ld.param.u32 %r1, [c];
      st.global.v2.b32 [%d0], {%r0, %r1}; }"""
    out = np.zeros(2, np.uint32)
    run_kernel(text, (1,), [out, 1.5, -1], 0)
    assert out.tolist() == [0x3FC00000, 2**32 - 1]
    for args, error in (([out, 1.5], TypeError), ([out, 1.5, 2**32], OverflowError), ([out, out, 1], TypeError),
                        ([1.0, 1.5, 1], TypeError), ([np.zeros((4, 4))[:, 0], 1.5, 1], ValueError)):  # fmt: skip
        with pytest.raises(error):
            run_kernel(text, (1,), args, 0)
    with pytest.raises(ValueError, match="give nwarps"):
        run_kernel(text.replace(".reqntid 32", ""), (1,), [out, 1.5, 1], 0)


# --- warps ---


def shuffled(values: list[int], mode: str, b: int, c: int) -> tuple[list[int], list[int]]:
    made, there = [], []
    for lane in range(32):
        segment, clamp, amount = c >> 8 & 31, c & 31, b & 31
        last = lane & segment | clamp & ~segment
        wanted = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount}.get(mode)
        wanted = lane & segment | amount & ~segment if mode == "idx" else wanted
        inside = wanted >= last if mode == "up" else wanted <= last
        made.append(values[wanted if inside else lane])
        there.append(int(inside))
    return made, there


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("amount, c", [(1, None), (16, None), (5, 0x1807), (35, None), (3, 0x1003)])
def test_shuffles(mode, amount, c):
    c = (0 if mode == "up" else 31) if c is None else c
    x = np.random.default_rng(4).integers(0, 2**32, 64, dtype=np.uint32)
    out, inside = np.zeros((2, 64), np.uint32)
    body = f"""ld.global.b32 %r4, [%e0]; shfl.sync.{mode}.b32 %r5|%p1, %r4, {amount}, {c}, -1; selp.u32 %r6, 1, 0, %p1;
    st.global.b32 [%e1], %r5; st.global.b32 [%e2], %r6;"""
    launch(body, x, out, inside, threads=64)
    for warp in (slice(0, 32), slice(32, 64)):
        assert (out[warp].tolist(), inside[warp].tolist()) == shuffled(x[warp].tolist(), mode, amount, c)


def test_votes_and_reductions():
    x = np.random.default_rng(6).integers(0, 2**32, 64, dtype=np.uint32)
    x[32:] |= 1
    outs = [np.zeros(64, np.uint32) for _ in range(5)]
    launch(
        """
        ld.global.b32 %r4, [%e0]; and.b32 %r5, %r4, 1; setp.eq.u32 %p1, %r5, 1;
        vote.sync.ballot.b32 %r6, %p1, -1; st.global.b32 [%e1], %r6;
        vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, !%p1, -1; vote.sync.uni.pred %p4, %p1, -1;
        selp.b32 %r7, 1, 0, %p2; @%p3 or.b32 %r7, %r7, 2; @%p4 or.b32 %r7, %r7, 4; st.global.b32 [%e2], %r7;
        redux.sync.max.s32 %r8, %r4, -1; st.global.b32 [%e3], %r8;
        redux.sync.add.u32 %r9, %r4, -1; st.global.b32 [%e4], %r9;
        setp.lt.u32 %p5, %r0, 40; elect.sync %r10|%p6, -1;
        vote.sync.ballot.b32 %r12, %p5, -1;
        @%p5 redux.sync.min.u32 %r11, %r4, %r12; @%p5 vote.sync.all.pred %p6, %p5, %r12; @!%p6 mov.u32 %r11, 0;
        st.global.b32 [%e5], %r11;
        """,
        x, *outs, threads=64,
    )  # fmt: skip
    warps = [x[:32].tolist(), x[32:].tolist()]
    ballots, flags, largest, sums, least = ([int(o[0]), int(o[63])] for o in outs)
    assert ballots == [sum((v & 1) << i for i, v in enumerate(w)) for w in warps]
    assert flags == [2, 5]
    assert largest == [max(map(signed, w)) & 0xFFFFFFFF for w in warps]
    assert sums == [sum(w) & 0xFFFFFFFF for w in warps]
    assert outs[4].tolist() == [min(warps[0])] * 32 + [min(warps[1][:8])] * 8 + [0] * 24 and least[1] == 0


def test_largest_float_of_a_warp():
    x = np.random.default_rng(8).standard_normal(64).astype(np.float32)
    x[3], x[40] = -9, np.nan
    outs = [np.zeros(64, np.float32) for _ in range(3)]
    body = """ld.global.b32 %r4, [%e0]; redux.sync.max.abs.f32 %r5, %r4, -1; redux.sync.max.NaN.f32 %r6, %r4, -1;
    redux.sync.min.f32 %r7, %r4, -1; st.global.b32 [%e1], %r5; st.global.b32 [%e2], %r6; st.global.b32 [%e3], %r7;"""
    launch(body, x, *outs, threads=64)
    assert outs[0][0] == 9 and outs[0][63] == np.nanmax(np.abs(x[32:]))
    assert outs[1][0] == x[:32].max() and outs[1].view(np.uint32)[63] == 0x7FFFFFFF
    assert outs[2][0] == -9 and outs[2][63] == np.nanmin(x[32:])


def test_warps_in_part():
    part = "setp.lt.u32 %p1, %r0, 7; @%p1 "
    with pytest.raises(RuntimeError, match="shfl.sync.bfly.b32 by other lanes than its mask names, warp 0"):
        launch(part + "shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;")
    with pytest.raises(RuntimeError, match="reads a lane outside its mask"):
        launch(part + "shfl.sync.bfly.b32 %r4, %r0, 16, 31, 127;")
    launch(part + "shfl.sync.idx.b32 %r4, %r0, 3, 31, 127;")
    with pytest.raises(RuntimeError, match="reached by a part of a warp"):
        launch(part + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r0];", smem=64)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_in_shared_memory(count, trans):
    """Row i of matrix k comes from the address of lane 8 k + i; lane l holds two neighbours of row l / 4."""
    x = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8) * 7
    out, back = np.zeros((2, 32, count), np.uint32), np.zeros_like(x)
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    stores = "".join(f"st.global.b32 [%d5+{4 * i}], %r{10 + i};" for i in range(count))
    launch(
        f"""setp.lt.u32 %p1, %r0, {8 * count}; shl.b32 %r4, %r0, 4; cvt.u64.u32 %d4, %r4;
        add.s64 %d6, %d4, %d0; @%p1 ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d6];
        @%p1 st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r4];
        mul.wide.u32 %d5, %r0, {4 * count}; add.s64 %d5, %d5, %d1; {stores}
        bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {registers}; bar.sync 0;
        add.s64 %d6, %d4, %d2; @%p1 ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4];
        @%p1 st.global.v4.b32 [%d6], {{%r5, %r6, %r7, %r8}};
        """,
        x, out[0], back, smem=128 * count,
    )  # fmt: skip
    seen = x.swapaxes(1, 2) if trans else x
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        assert out[0, lane].tolist() == [int(m[row, column]) | int(m[row, column + 1]) << 16 for m in seen]
    np.testing.assert_array_equal(back, x)


def test_asynchronous_copies():
    """The bytes beyond those that are read are zeros, and need not be there."""
    x, out = np.arange(1, 129, dtype=np.uint32)[:126].copy(), np.zeros(128, np.uint32)
    launch(
        """shl.b32 %r4, %r0, 4; cvt.u64.u32 %d4, %r4; add.s64 %d5, %d4, %d0; setp.lt.u32 %p1, %r0, 31; selp.u32 %r5, 16, 8, %p1;
        cp.async.cg.shared.global.L2::128B [%r4], [%d5], 16, %r5; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
        ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4]; add.s64 %d5, %d4, %d1; st.global.v4.b32 [%d5], {%r5, %r6, %r7, %r8};""",
        x, out, smem=512,
    )  # fmt: skip
    assert out.tolist() == [*x.tolist(), 0, 0]


# --- the parser ---


def test_operands():
    program = parse_assembly("@!p mad.wide.s32 {$0, _}, -3, 0f3F800000, [$1 + 0x10]; mov.b64 a$$b, $1;", (32, 64))
    first, second = program.instructions
    assert (first.predicate, first.negated, first.opcode) == ("p", True, "mad.wide.s32")
    vector, three, one, address = first.operands
    assert isinstance(vector, Vector) and vector.parts[0] == Register("%op0") and three == Immediate(-3)
    assert one == Immediate(0x3F800000, 32) and address == (Register("%op1"), 16)
    assert second.operands[0] == Register("a$b")


def test_scopes():
    program = parse_assembly("{ .reg .b32 x; { .reg .b64 x; mov.b64 x, 1; } mov.b32 x, 2; } { .reg .b32 x; mov.b32 x, 3; }", ())
    names = [i.operands[0].name for i in program.instructions]
    assert names[0] != names[1] and [program.widths[n] for n in names] == [64, 32, 32]


def test_what_the_parser_refuses():
    for text in ("bra nowhere;", ".local .b8 x[4];", "l: l: ret;"):
        with pytest.raises(NotImplementedError):
            parse_assembly(text, ())
    with pytest.raises(ValueError, match="0 entries"):
        parse_kernel(".version 9.0")


def test_decoding_is_cached_and_says_what_it_refuses():
    assert decode("add.rn.f32") is decode("add.rn.f32")
    with pytest.raises(NotImplementedError, match=r"\.sat of add\.sat\.s32"):
        decode("add.sat.s32")


# --- kernels that Triton compiles ---

KERNELS = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def scaled(x_ptr, y_ptr, s_ptr, n, repeats, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    for _ in range(repeats):
        x = x * 1.5 - 0.25
    blocks = tl.reshape(x, (B // 64, 64))
    s = tl.div_rn(tl.max(tl.abs(blocks), 1), 6.0)
    y = tl.div_rn(blocks, s[:, None]).to(tl.bfloat16)
    tl.store(y_ptr + i, tl.reshape(y, (B,)), mask=i < n)
    tl.store(s_ptr + tl.program_id(0) * (B // 64) + tl.arange(0, B // 64), s)

@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + n[None, :] * K + start + k[:, None])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)

@triton.jit
def scaled_product(a_ptr, b_ptr, as_ptr, bs_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                   FA: tl.constexpr, FB: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // PACK), tl.arange(0, K // BLOCK)
    a = tl.load(a_ptr + m[:, None] * (K // PACK) + k[None, :])
    b = tl.load(b_ptr + n[None, :] * (K // PACK) + k[:, None])
    sa = tl.load(as_ptr + m[:, None] * (K // BLOCK) + s[None, :])
    sb = tl.load(bs_ptr + n[:, None] * (K // BLOCK) + s[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot_scaled(a, sa, FA, b, sb, FB))

def build(kernel, capability, types, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name == "K"}
    aligned = {at: attribute for at, attribute in aligned.items() if names[at[0]] not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=4, enable_fp_fusion=False)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"], made.metadata.shared

made = {}
types = dict(x_ptr="*fp32", y_ptr="*bf16", s_ptr="*fp32", n="i32", repeats="i32")
for capability in (80, 90, 100, 120):
    made[f"scaled {capability}"] = build(scaled, capability, types, B=1024)
for name, a, b in (("bf16", "*bf16", "*bf16"), ("fp16", "*fp16", "*fp16"), ("fp8", "*fp8e5", "*fp8e4nv")):
    types = dict(a_ptr=a, b_ptr=b, c_ptr="*fp32", K="i32")
    made[f"product {name}"] = build(product, 89, types, M=32, N=32, BK=32)
for name, a, b, of_a, of_b, scale, pack, block in (
    ("nvfp4", "e2m1", "e2m1", "*u8", "*u8", "*fp8e4nv", 2, 16),
    ("mxfp4", "e2m1", "e2m1", "*u8", "*u8", "*u8", 2, 32),
    ("mxfp8", "e4m3", "e5m2", "*fp8e4nv", "*fp8e5", "*u8", 1, 32),
):
    types = dict(a_ptr=of_a, b_ptr=of_b, as_ptr=scale, bs_ptr=scale, c_ptr="*fp32")
    made[f"scaled_product {name}"] = build(
        scaled_product, 120, types, M=128, N=32, K=128, FA=a, FB=b, PACK=pack, BLOCK=block)
json.dump(made, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, tuple[str, int]]:
    """PTX and bytes of shared memory, made in a process where Triton compiles."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.py").write_text(KERNELS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(folder / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_a_kernel(compiled, capability):
    ptx, shared = compiled[f"scaled {capability}"]
    n = 2500
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 100
    padded = torch.zeros(3072)
    padded[:n] = x
    for _ in range(3):
        padded = padded * 1.5 - 0.25
    blocks = padded.view(-1, 64)
    scales = blocks.abs().amax(1) / 6
    wanted = (blocks / scales[:, None]).to(torch.bfloat16).view(-1)[:n]
    y, s = np.zeros(n, np.int16), np.zeros(48, np.float32)
    lanes = run_kernel(ptx, (3,), [x.numpy(), y, s, n, 3], shared)
    assert torch.equal(torch.from_numpy(s), scales)
    assert torch.equal(torch.from_numpy(y), wanted.view(torch.int16))
    assert not lanes.approx and lanes.count["bar"]


@pytest.mark.parametrize(
    ("kind", "dtypes", "largest"),
    [
        ("bf16", (torch.bfloat16, torch.bfloat16), 40),
        ("fp16", (torch.float16, torch.float16), 40),
        ("fp8", (torch.float8_e5m2, torch.float8_e4m3fn), 8),
    ],
)
def test_a_product(compiled, kind, dtypes, largest):
    """Of numbers that are integers, whose sums are exact."""
    ptx, shared = compiled[f"product {kind}"]
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-largest, largest + 1, (32, 96), generator=g).to(dtype) for dtype in dtypes)
    c = np.zeros((32, 32), np.float32)
    given = [x.view(torch.uint8 if x.itemsize == 1 else torch.int16).numpy() for x in (a, b)]
    lanes = run_kernel(ptx, (1,), [*given, c, 96], shared)
    np.testing.assert_array_equal(c, (a.float() @ b.float().T).numpy())
    assert any(opcode.startswith("mma.sync") for opcode in lanes.approx)


def test_four_bits_in_bytes():
    """kind::mxf8f6f4 takes e2m1 in bits 5:2 of a byte."""
    out = np.zeros((4, 32), np.float32)
    launch(
        """mov.b32 %r4, 0x18181818; mov.b32 %r5, 0x38383838; mov.b32 %r6, 0x80; mov.b32 %r7, 0x7f;
        mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e2m1.e4m3.f32.ue8m0
            {%r10, %r11, %r12, %r13}, {%r4, %r4, %r4, %r4}, {%r5, %r5}, {%r6, %r6, %r6, %r7}, %r6, {0, 0}, %r7, {0, 0};
        st.global.b32 [%e0], %r10; st.global.b32 [%e0+128], %r11;
        st.global.b32 [%e0+256], %r12; st.global.b32 [%e0+384], %r13;""",
        out,
    )
    assert (out == 32 * 4 * 2).all()  # 6 is the code of 4; 1 in e4m3; scales 2 and 1


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_a_scaled_product(compiled, name):
    """Of numbers and scales with few bits, whose sums are exact."""
    ptx, shared = compiled[f"scaled_product {name}"]
    assert "mma.sync" in ptx
    g = np.random.default_rng(7)
    size = 16 if name == "nvfp4" else 32
    scale_codes = [g.integers(125, 130, (rows, 128 // size), dtype=np.uint8) for rows in (128, 32)]
    scales = [numbers.from_ue8m0(c) for c in scale_codes]
    if name == "nvfp4":
        scale_codes = [g.integers(0x30, 0x48, (rows, 8), dtype=np.uint8) for rows in (128, 32)]
        scales = [numbers.from_e4m3(c) for c in scale_codes]
    if name == "mxfp8":
        codes = [g.integers(0x30, 0x48, (128, 128), dtype=np.uint8), g.integers(0x38, 0x44, (32, 128), dtype=np.uint8)]
        codes = [c | g.integers(0, 2, c.shape, dtype=np.uint8) << 7 for c in codes]
        values, stored = [numbers.from_e4m3(codes[0]), numbers.from_e5m2(codes[1])], codes
    else:
        codes = [g.integers(0, 16, (rows, 128), dtype=np.uint8) for rows in (128, 32)]
        values = [numbers.from_e2m1(c) for c in codes]
        stored = [np.ascontiguousarray(c[:, ::2] | c[:, 1::2] << 4) for c in codes]
    a, b = (v.astype(np.float64) * np.repeat(s, size, 1) for v, s in zip(values, scales, strict=True))
    c = np.zeros((128, 32), np.float32)
    run_kernel(ptx, (1,), [*stored, *scale_codes, c], shared)
    np.testing.assert_array_equal(c, a @ b.T)
