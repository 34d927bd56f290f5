"""cvt: between numbers of all types.

    float -> narrower float      .rn and .rz to fp16, bf16, fp32; NaN becomes the canonical one
    -> e2m1x2, e4m3x2, e5m2x2    .rn.satfinite; of two sources the first goes into the upper half
    -> ue8m0x2                   .rz and .rp, .satfinite
    float -> integer             .rni .rzi .rmi .rpi; saturates, NaN becomes 0
    integer -> integer           extends by the type of the source, truncates, or clamps (.sat)

cvt.rs, stochastic: the random bits are added to those that are dropped, at their top. Which bits of the operand serve which
number IS AN ASSUMPTION, the ISA does not say. {a, b, e, f} -> e2m1x4: 8 bits each, a 31:24, e 23:16, b 15:8, f 7:0. -> e4m3x4,
e5m2x4: as FlashInfer measured on sm_100a, bits 31:16 for a and b, 15:0 for e and f; of b and f as they are, of a and e in
reverse order. settle.py asks a GPU.

Refused: .relu, .sat of floats, .satfinite of fp16 and bf16, .rm, .rp and .rna to floats, tf32, 6-bit formats. Source: PTX ISA
9, cvt.
"""

from collections.abc import Callable

import numpy as np

from testing.arithmetic import widened
from testing.numbers import (
    canonical,
    f32_to_bf16,
    f32_to_f16,
    f64_to_f32,
    flush,
    from_e2m1,
    from_e4m3,
    from_e5m2,
    from_ue8m0,
    to_e2m1,
    to_e4m3,
    to_e5m2,
    to_ue8m0,
)
from testing.opcode import DTYPES, HALF_PAIRS, HALVES, INTEGERS, UNSIGNED, Opcode, Operation, lanewise, width

SMALL = {"e2m1x2": (to_e2m1, 4), "e4m3x2": (to_e4m3, 8), "e5m2x2": (to_e5m2, 8)}
FROM_SMALL = {"e2m1x2": (from_e2m1, 4), "e4m3x2": (from_e4m3, 8), "e5m2x2": (from_e5m2, 8)}
STOCHASTIC = {"e2m1x4": (to_e2m1, 4), "e4m3x4": (to_e4m3, 8), "e5m2x4": (to_e5m2, 8)}
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
SCALARS = (*INTEGERS, *HALVES, "f32", "f64")


def decode_cvt(op: Opcode) -> Operation:
    source = op.kind(*SCALARS, *HALF_PAIRS, *SMALL, "ue8m0x2")
    target = op.kind(*SCALARS, *HALF_PAIRS, *SMALL, "ue8m0x2", *STOCHASTIC)
    if target in STOCHASTIC:
        return stochastic(op, target, source)
    if target in (*SMALL, "ue8m0x2"):
        return to_pair(op, narrowing(op, target), width(target) // 2, target, source)
    if target in HALF_PAIRS and source == "f32":
        return to_pair(op, narrowing(op, target.removesuffix("x2")), 16, target, source)
    if target in HALF_PAIRS:
        return from_pair(op, target, source)
    if source in SCALARS:
        return scalar(op, target, source)
    raise NotImplementedError(op.text)


def narrowing(op: Opcode, target: str) -> Callable:
    """float32 -> codes, by the rounding that the opcode names."""
    if target in SMALL:
        op.one("rn")
        op.one("satfinite")
        return SMALL[target][0]
    if target == "ue8m0x2":
        up = op.one("rz", "rp") == "rp"
        op.one("satfinite")
        return lambda x: to_ue8m0(x, up)
    toward_zero = op.one("rn", "rz") == "rz"
    narrow = f32_to_bf16 if target == "bf16" else f32_to_f16
    return lambda x: narrow(x, toward_zero)


def to_pair(op: Opcode, narrow: Callable, bits: int, target: str, source: str) -> Operation:
    """Two fp32 sources, the first for the upper half, or one pair."""
    dtype = DTYPES[target]

    def joined(high, low):
        return (narrow(high).astype(dtype) << dtype.type(bits)) | narrow(low)

    if source == "f32":
        return lanewise(joined, ["f32", "f32"])
    if source not in HALF_PAIRS:
        raise NotImplementedError(op.text)

    def split(pair):
        halves = (pair >> np.uint32(16)).astype(np.uint16), pair.astype(np.uint16)
        return joined(*[widened(half, source.removesuffix("x2")) for half in halves])

    return lanewise(split, [source])


def from_pair(op: Opcode, target: str, source: str) -> Operation:
    """Two small numbers -> two of 16 bits, exact."""
    op.one("rn")
    if source == "ue8m0x2" and target == "bf16x2":
        decode, bits, narrow = from_ue8m0, 8, f32_to_bf16
    elif source in FROM_SMALL and target == "f16x2":
        decode, bits = FROM_SMALL[source]
        narrow = f32_to_f16
    else:
        raise NotImplementedError(op.text)
    mask = DTYPES[source].type(2**bits - 1)

    def function(codes):
        high, low = (narrow(decode(half)).astype(np.uint32) for half in (codes >> mask.dtype.type(bits), codes & mask))
        return (high << np.uint32(16)) | low

    return lanewise(function, [source])


def stochastic(op: Opcode, target: str, source: str) -> Operation:
    op.one("rs")
    op.one("satfinite")
    if source != "f32":
        raise NotImplementedError(op.text)
    narrow, bits = STOCHASTIC[target]
    dtype = UNSIGNED[4 * bits]

    def execute(lanes, operands, active):
        destination, vector, random = operands
        shares = random_shares(lanes.whole(random, DTYPES["b32"]), target)
        codes = np.zeros(lanes.size, dtype)
        for part, (share, count) in zip(vector.parts, shares, strict=True):
            codes = (codes << dtype.type(bits)) | narrow(lanes.read(part, DTYPES["f32"]), share, count)
        lanes.write(destination, codes, active)

    return Operation(execute)


def random_shares(random: np.ndarray, target: str) -> list[tuple[np.ndarray, int]]:
    """Random words, uint32 -> what serves a, b, e and f, and of how many bits it is; assumed, see above."""
    if target == "e2m1x4":
        return [((random >> np.uint32(shift)) & np.uint32(0xFF), 8) for shift in (24, 8, 16, 0)]
    high, low = random >> np.uint32(16), random & np.uint32(0xFFFF)
    return [(reversed16(high), 16), (high, 16), (reversed16(low), 16), (low, 16)]


def reversed16(x: np.ndarray) -> np.ndarray:
    """uint32 below 2^16 with its 16 bits in reverse order."""
    for shift, mask in ((1, 0x5555), (2, 0x3333), (4, 0x0F0F), (8, 0x00FF)):
        x = ((x & np.uint32(mask)) << np.uint32(shift)) | ((x >> np.uint32(shift)) & np.uint32(mask))
    return x


# --- one number ---


def scalar(op: Opcode, target: str, source: str) -> Operation:
    ftz = "f32" in (source, target) and op.flag("ftz")
    convert = between(op, target, source)

    def function(value):
        if source in HALVES:
            value = widened(value, source)
        elif ftz and source == "f32":
            value = flush(value)
        value = convert(value)
        return flush(value) if ftz and target == "f32" else value

    return lanewise(function, [source])


def between(op: Opcode, target: str, source: str) -> Callable:
    """A function on values: numpy numbers, with 16-bit floats as float32 on the way in and bits on the way out."""
    if target in INTEGERS:
        return integer_of_integer(op, target, source) if source in INTEGERS else integer_of_float(op, target)
    if source in INTEGERS:
        return float_of_integer(op, target, source)
    if target in HALVES and source == "f32":
        return narrowing(op, target)
    if (target, source) == ("f16", "f64"):
        return narrowing(op, target)
    if (target, source) == ("f32", "f64"):
        toward_zero = op.one("rn", "rz") == "rz"
        return lambda x: f64_to_f32(x, toward_zero)
    if target == source and target in ("f32", "f64"):
        whole = TO_INTEGER[op.one(*TO_INTEGER)]
        return (lambda x: canonical(whole(x))) if target == "f32" else whole
    if target in ("f32", "f64") and target != source:  # wider: exact
        return lambda x: x.astype(DTYPES[target])
    raise NotImplementedError(op.text)


def integer_of_integer(op: Opcode, target: str, source: str) -> Callable:
    dtype = DTYPES[target]
    if not op.flag("sat"):
        return lambda x: x.astype(dtype)
    limits, given = np.iinfo(dtype), np.iinfo(DTYPES[source])
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return lambda x: np.clip(x, low, high).astype(dtype)


def integer_of_float(op: Opcode, target: str) -> Callable:
    whole = TO_INTEGER[op.one(*TO_INTEGER)]
    dtype = DTYPES[target]
    limits = np.iinfo(dtype)
    # 2^63 - 1 and 2^64 - 1 are no float64: what is not below them is clamped by hand.
    above, below = float(limits.max) if limits.bits < 64 else float(limits.max + 1), float(limits.min)

    def function(x):
        x = whole(x.astype(np.float64))
        inside = (x > below) & (x < above)
        made = np.where(inside, x, 0.0).astype(dtype)
        return np.where(x >= above, dtype.type(limits.max), np.where(x <= below, dtype.type(limits.min), made))

    return function


def float_of_integer(op: Opcode, target: str, source: str) -> Callable:
    op.one("rn")
    if target in ("f32", "f64"):
        return lambda x: x.astype(DTYPES[target])
    if target == "f16" and width(source) <= 32:  # exact in fp64, then rounded once
        return lambda x: f32_to_f16(x.astype(np.float64))
    raise NotImplementedError(op.text)


DECODERS = {"cvt": decode_cvt}
