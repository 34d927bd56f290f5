"""Arithmetic: a lane's registers in, the same lane's registers out.

    integers          wrap; division by zero gives all ones (unspecified)
    fp32, fp64, f32x2 rounded to nearest even; add, sub, mul and fma of fp32 also toward zero (.rz); .ftz flushes what goes
                      in and what comes out, after rounding; NaN is 0x7FFFFFFF
    fp16, bf16        computed exactly or to odd in fp64, rounded once
    min, max          -0 < +0; the number where one is NaN, or NaN with .NaN; .xorsign.abs: of the magnitudes, signs multiplied
    .approx, .full    the correctly rounded result, or numpy's; counted as approximate. So are add, sub, mul without .rn, which
                      the assembler may fuse.

Refused: .sat, .relu, .rm, .rp, .cc, fp64 fma, integer instructions of video. Source: PTX ISA 9, Instruction Set.
"""

import functools
from collections.abc import Callable

import numpy as np

from testing.numbers import add32, bf16_to_f32, canonical, f16_to_f32, f32_to_f16, f64_to_bf16, flush, fma32, mul32, sum_to_odd
from testing.opcode import (
    DTYPES,
    HALF_PAIRS,
    HALVES,
    INTEGERS,
    SIGNED,
    SIGNEDS,
    UNSIGNED,
    Opcode,
    Operation,
    in_parts,
    lanewise,
    width,
)

ALL_BUT_8 = tuple(kind for kind in INTEGERS if width(kind) > 8)
FLOATS = ("f32", "f32x2", "f64", *HALVES, *HALF_PAIRS)
INFINITY = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0 << 48}  # bits; NaNs lie above


def flushing(function: Callable, ftz: bool) -> Callable:
    """`function` of float32 with .ftz."""
    return (lambda *values: flush(function(*map(flush, values)))) if ftz else function


def widened(code: np.ndarray, kind: str) -> np.ndarray:
    """Bits of f16 or bf16, uint16 -> float32."""
    return bf16_to_f32(code) if kind == "bf16" else f16_to_f32(code)


def on_halves(function: Callable, kind: str) -> Callable:
    """A function of float64, exact or rounded to odd -> one of bits of f16 or bf16."""
    narrow = f64_to_bf16 if kind == "bf16" else f32_to_f16
    return lambda *codes: narrow(function(*[widened(code, kind).astype(np.float64) for code in codes]))


def numeric(op: Opcode, kind: str, count: int, single: Callable, double: Callable | None, exact: Callable | None, **options):
    """An operation of `count` sources on float32 (`single`), float64 (`double`), and halves (`exact`, see on_halves)."""
    if kind == "f32":
        return lanewise(flushing(single, op.flag("ftz")), [kind] * count, **options)
    if kind == "f32x2":
        return lanewise(in_parts(flushing(single, op.flag("ftz")), DTYPES["f32"]), [kind] * count, whole=True, **options)
    if kind == "f64" and double:
        return lanewise(double, [kind] * count, **options)
    if kind in HALVES + HALF_PAIRS and exact:
        function = on_halves(exact, kind.removesuffix("x2"))
        return lanewise(in_parts(function, UNSIGNED[16]), [kind] * count, whole=True, **options)
    raise NotImplementedError(f"type .{kind} of {op.text}")


# --- add, sub, mul, fma ---


def subtract32(a: np.ndarray, b: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    return add32(a, -b, toward_zero)


FLOAT_FUNCTIONS = {
    "add": (add32, np.add, sum_to_odd),
    "sub": (subtract32, np.subtract, lambda a, b: sum_to_odd(a, -b)),
    "mul": (mul32, np.multiply, np.multiply),
    "fma": (fma32, None, lambda a, b, c: sum_to_odd(a * b, c)),
}


def float_arithmetic(op: Opcode, kind: str) -> Operation:
    name = "fma" if op.name == "mad" else op.name
    single, double, exact = FLOAT_FUNCTIONS[name]
    rounding = op.one("rn", "rz", default="" if name != "fma" else None)
    if rounding == "rz":
        if kind not in ("f32", "f32x2"):
            raise NotImplementedError(f".rz of {op.text}")
        single = functools.partial(single, toward_zero=True)
    fusible = not rounding and name in ("add", "sub", "mul")
    return numeric(op, kind, 3 if name == "fma" else 2, single, double, exact, approximate=fusible)


def mixed_fma(op: Opcode, kind: str) -> Operation:
    """fma.rn.f32.bf16: a and b of 16 bits, c and the result fp32."""
    op.one("f32")
    rounding = op.one("rn", "rz")
    return lanewise(
        lambda a, b, c: fma32(widened(a, kind), widened(b, kind), c, rounding == "rz"), [kind, kind, "f32"], "f32", whole=True
    )


def mixed_sum(op: Opcode, kind: str) -> Operation:
    """add.rn.f32.bf16 and sub: a of 16 bits, c and the result fp32."""
    op.one("f32")
    toward_zero = op.one("rn", "rz") == "rz"
    function = {"add": add32, "sub": subtract32}[op.name]
    return lanewise(lambda a, c: function(widened(a, kind), c, toward_zero), [kind, "f32"], "f32", whole=True)


def decode_add(op: Opcode) -> Operation:
    kind = op.kind(*ALL_BUT_8, *FLOATS)
    if kind in HALVES and "f32" in op.words:
        return mixed_sum(op, kind)
    if kind in INTEGERS:
        return lanewise({"add": np.add, "sub": np.subtract}[op.name], [kind, kind])
    return float_arithmetic(op, kind)


def decode_fma(op: Opcode) -> Operation:
    kind = op.kind(*FLOATS)
    return mixed_fma(op, kind) if kind in HALVES and "f32" in op.words else float_arithmetic(op, kind)


def product(kind: str, part: str) -> Callable:
    """Of two integers: its lower half (lo), its upper half (hi) or all of it (wide)."""
    if part == "lo":
        return np.multiply
    signed, bits = kind[0] == "s", width(kind)
    if bits == 64:
        return _high64
    wide = (SIGNED if signed else UNSIGNED)[2 * bits]
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(DTYPES[kind])


def _high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of 64-bit integers, from four of 32 bits."""
    x, y = (v.astype(np.uint64) for v in (a, b))
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def decode_mul(op: Opcode) -> Operation:
    kind = op.kind(*ALL_BUT_8, *FLOATS)
    if kind not in INTEGERS:
        return float_arithmetic(op, kind)
    part = op.one("lo", "hi", "wide")
    if part == "wide" and width(kind) == 64:
        raise NotImplementedError(op.text)
    return lanewise(product(kind, part), [kind, kind])


def decode_mad(op: Opcode) -> Operation:
    kind = op.kind(*ALL_BUT_8, "f32", "f64")
    if kind not in INTEGERS:
        return float_arithmetic(op, kind)
    part = op.one("lo", "hi", "wide")
    if part == "wide" and width(kind) == 64:
        raise NotImplementedError(op.text)
    multiply = product(kind, part)
    addend = f"{kind[0]}{2 * width(kind)}" if part == "wide" else kind
    return lanewise(lambda a, b, c: multiply(a, b) + c, [kind, kind, addend])


# --- division and what is approximate ---


def integer_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Toward zero; all ones for b = 0."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    return np.where(zero, ~b.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def integer_remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of a; 0 for b = 0."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def decode_div(op: Opcode) -> Operation:
    kind = op.kind(*ALL_BUT_8, "f32", "f64")
    if kind in INTEGERS:
        return lanewise(integer_quotient, [kind, kind])
    mode = op.one("rn", "full", "approx")
    if mode != "rn" and kind == "f64":
        raise NotImplementedError(op.text)
    return numeric(op, kind, 2, lambda a, b: canonical(a / b), np.divide, None, approximate=mode != "rn")


def decode_rem(op: Opcode) -> Operation:
    kind = op.kind(*ALL_BUT_8)
    return lanewise(integer_remainder, [kind, kind])


ROOTS = {"rcp": np.reciprocal, "sqrt": np.sqrt}
SPECIAL = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def decode_root(op: Opcode) -> Operation:
    """rcp and sqrt, which have exact forms."""
    kind = op.kind("f32", "f64")
    approximate = op.one("rn", "approx") == "approx"
    if approximate and kind == "f64":
        raise NotImplementedError(op.text)
    function = ROOTS[op.name]
    return numeric(op, kind, 1, lambda x: canonical(function(x)), function, None, approximate=approximate)


def decode_special(op: Opcode) -> Operation:
    """In fp64, rounded to fp32: nearer than hardware is."""
    kind = op.kind("f32")
    op.one("approx")
    function = SPECIAL[op.name]
    return numeric(
        op, kind, 1, lambda x: canonical(function(x.astype(np.float64)).astype(np.float32)), None, None, approximate=True
    )


# --- signs, extremes ---


def decode_sign(op: Opcode) -> Operation:
    """neg and abs; of floats the sign bit alone, NaN included."""
    kind = op.kind(*(k for k in SIGNEDS if k != "s8"), "f32", "f64", *HALVES, *HALF_PAIRS)
    if kind in SIGNEDS:
        return lanewise({"neg": np.negative, "abs": np.abs}[op.name], [kind])
    sign = 0x80008000 if kind in HALF_PAIRS else 1 << (width(kind) - 1)
    bits = f"b{width(kind)}"
    mask = DTYPES[bits].type(sign)
    function = (lambda u: u ^ mask) if op.name == "neg" else (lambda u: u & ~mask)
    if kind == "f32" and op.flag("ftz"):
        return lanewise(lambda x: function(flush(x).view(np.uint32)), ["f32"])
    return lanewise(function, [bits])


def decode_copysign(op: Opcode) -> Operation:
    """The sign of the first source, the magnitude of the second."""
    kind = op.kind("f32", "f64")
    return lanewise(lambda sign, x: np.copysign(x, sign), [kind, kind])


def extreme(a: np.ndarray, b: np.ndarray, kind: str, larger: bool, nan: bool, absolute: bool, xorsign: bool) -> np.ndarray:
    """max or min of floats as unsigned bits: as integers, once those of negative numbers are turned around."""
    bits = a.dtype.itemsize * 8
    sign, magnitude = a.dtype.type(1 << (bits - 1)), a.dtype.type((1 << (bits - 1)) - 1)
    infinity = a.dtype.type(INFINITY[kind])
    better = np.maximum if larger else np.minimum
    signs = (a ^ b) & sign if xorsign else None
    if absolute:
        a, b = a & magnitude, b & magnitude
        chosen = better(a, b)
    else:
        x, y = (v.view(SIGNED[bits]) for v in (a, b))
        shift, rest = x.dtype.type(bits - 1), x.dtype.type(magnitude)
        key = better(x ^ ((x >> shift) & rest), y ^ ((y >> shift) & rest))
        chosen = (key ^ ((key >> shift) & rest)).view(a.dtype)
    if absolute and nan and larger:
        lost = chosen > infinity  # NaN is the largest magnitude
    else:
        a_nan, b_nan = (a & magnitude) > infinity, (b & magnitude) > infinity
        lost = (a_nan | b_nan) if nan else (a_nan & b_nan)
        if not nan:
            chosen = np.where(a_nan, b, np.where(b_nan, a, chosen))
    if signs is not None:
        chosen = chosen | signs
    return np.where(lost, magnitude, chosen)  # the canonical NaN: all ones but the sign


def decode_extreme(op: Opcode) -> Operation:
    """min and max, of two sources (.xorsign.abs) or of three fp32 (.abs)."""
    kind = op.kind(*ALL_BUT_8, "f32", "f64", *HALVES, *HALF_PAIRS)
    if kind in INTEGERS:
        return lanewise(np.maximum if op.name == "max" else np.minimum, [kind, kind])
    nan, xorsign, absolute = op.flag("NaN"), op.flag("xorsign"), op.flag("abs")
    ftz = kind == "f32" and op.flag("ftz")
    pair = kind in HALF_PAIRS
    pick = functools.partial(
        extreme, kind=kind.removesuffix("x2"), larger=op.name == "max", nan=nan, absolute=absolute, xorsign=xorsign
    )

    def function(*values):
        if ftz:
            values = [flush(v.view(np.float32)).view(np.uint32) for v in values]
        return functools.reduce(pick, values)

    bits = f"b{width(kind)}"
    two = lanewise(in_parts(function, UNSIGNED[16]) if pair else function, [bits] * 2, bits, pair)
    three = lanewise(function, [bits] * 3, bits)

    def execute(lanes, operands, active):
        several = len(operands) == 4
        if (xorsign and (several or not absolute)) or (several and kind != "f32") or (absolute and not xorsign and not several):
            raise NotImplementedError(op.text)
        (three if several else two).execute(lanes, operands, active)

    return Operation(execute)


DECODERS = {
    **dict.fromkeys(("add", "sub"), decode_add),
    **dict.fromkeys(("rcp", "sqrt"), decode_root),
    **dict.fromkeys(SPECIAL, decode_special),
    **dict.fromkeys(("neg", "abs"), decode_sign),
    **dict.fromkeys(("min", "max"), decode_extreme),
    "fma": decode_fma,
    "mul": decode_mul,
    "mad": decode_mad,
    "div": decode_div,
    "rem": decode_rem,
    "copysign": decode_copysign,
}
