"""Logic, fields of bits, comparison, choice and moves: a lane's registers in, the same lane's registers out.

Amounts of shifts and positions of fields may be beyond the width, where PTX says what happens. Comparisons of floats: -0 = +0,
and false where one is NaN, or true for those that end in u. Refused: the modes of prmt, lop3 into predicates, set, slct,
addresses but of global memory. Source: PTX ISA 9, Instruction Set.
"""

from collections.abc import Callable

import numpy as np

from testing.arithmetic import ALL_BUT_8, widened
from testing.numbers import flush
from testing.opcode import (
    BITS,
    DTYPES,
    HALF_PAIRS,
    HALVES,
    SIGNEDS,
    UNSIGNED,
    UNSIGNEDS,
    Opcode,
    Operation,
    lanewise,
    width,
)


def decode_logic(op: Opcode) -> Operation:
    kind = op.kind("b16", "b32", "b64", "pred")
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[op.name]
    return lanewise(function, [kind] * (1 if op.name == "not" else 2))


def decode_shift(op: Opcode) -> Operation:
    """shl and shr; numpy shifts by the width and more as PTX does, all out."""
    kind = op.kind("b16", "b32", "b64") if op.name == "shl" else op.kind("b16", "b32", "b64", *ALL_BUT_8)
    dtype, bits = DTYPES[kind], width(kind)
    shift = np.left_shift if op.name == "shl" else np.right_shift

    def function(a, amount):
        if bits != 32 or dtype.kind == "i":
            amount = np.minimum(amount, np.uint32(bits)).astype(dtype)
        return shift(a, amount)

    return lanewise(function, [kind, "u32"])


def decode_funnel(op: Opcode) -> Operation:
    """shf: 32 bits of the 64 of (b, a), shifted; .wrap takes the amount modulo 32, .clamp at most 32."""
    op.kind("b32")
    left, wrap = op.one("l", "r") == "l", op.one("wrap", "clamp") == "wrap"

    def function(a, b, amount):
        amount = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)

    return lanewise(function, ["b32", "b32", "u32"])


def decode_lop3(op: Opcode) -> Operation:
    """Any function of three bits: bit 4a + 2b + c of the immediate."""
    op.kind("b32")

    def function(a, b, c, table):
        if np.ndim(table):
            raise NotImplementedError("lop3 with a table that is no immediate")
        made = np.zeros_like(a ^ b ^ c)
        for row in range(8):
            if int(table) >> row & 1:
                made = made | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return made

    return lanewise(function, ["b32", "b32", "b32", "u32"])


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: byte k of the result is byte (selector nibble k & 7) of (b, a), or its sign bit eight times (nibble & 8)."""
    lanes = np.broadcast_shapes(a.shape, b.shape, selector.shape)[0] if a.ndim or b.ndim or selector.ndim else 1
    source = np.empty((lanes, 2), np.uint32)
    source[:, 0], source[:, 1] = a, b
    source = source.view(np.uint8)
    shifts = np.arange(0, 16, 4, dtype=np.uint32)
    if not selector.ndim:
        nibbles = (int(selector) >> shifts) & 15
        chosen = source[:, nibbles & 7]
    else:
        nibbles = (selector[:, None] >> shifts) & np.uint32(15)
        chosen = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    if (nibbles & 8).any():
        chosen = np.where(nibbles & 8, (chosen.view(np.int8) >> 7).view(np.uint8), chosen)
    made = np.ascontiguousarray(chosen).view(np.uint32)[:, 0]
    return made if a.ndim or b.ndim or selector.ndim else made[0]


def decode_prmt(op: Opcode) -> Operation:
    op.kind("b32")
    return lanewise(permuted, ["b32", "b32", "u32"])


def decode_bfe(op: Opcode) -> Operation:
    """Bits position ... position + count - 1; beyond the top they are zeros, or the sign."""
    kind = op.kind("u32", "u64", "s32", "s64")
    dtype, unsigned, bits = DTYPES[kind], UNSIGNED[width(kind)], width(kind)

    def function(a, position, count):
        position, count = (np.minimum(v & np.uint32(255), np.uint32(bits)) for v in (position, count))
        mask = (unsigned.type(1) << count.astype(unsigned)) - unsigned.type(1)
        field = (a >> position.astype(dtype)).view(unsigned) & mask
        if dtype.kind == "u":
            return field
        top = np.minimum(position + count - np.uint32(1), np.uint32(bits - 1)).astype(unsigned)
        filled = ((a.view(unsigned) >> top) & unsigned.type(1)).astype(bool) & (count > 0)
        return np.where(filled, field | ~mask, field)

    return lanewise(function, [kind, "u32", "u32"], f"b{bits}")


def decode_bfi(op: Opcode) -> Operation:
    """`count` bits of a into b at `position`."""
    kind = op.kind("b32", "b64")
    dtype = DTYPES[kind]

    def function(a, b, position, count):
        position, count = ((v & np.uint32(255)).astype(dtype) for v in (position, count))
        mask = ((dtype.type(1) << count) - dtype.type(1)) << position
        return (b & ~mask) | ((a << position) & mask)

    return lanewise(function, [kind, kind, "u32", "u32"])


def decode_count(op: Opcode) -> Operation:
    """popc and clz."""
    kind = op.kind("b32", "b64")
    bits = width(kind)
    if op.name == "popc":
        return lanewise(np.bitwise_count, [kind], "u32")

    def leading(a):
        for step in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
            a = a | a >> a.dtype.type(step)
        return np.uint8(bits) - np.bitwise_count(a)

    return lanewise(leading, [kind], "u32")


# --- comparison, choice, moves ---

# Floats: false where one is NaN, then (with u) true.
COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
INTEGER_COMPARISONS = {"eq": np.equal, "ne": np.not_equal}
ORDER = {word: COMPARISONS[word] for word in ("lt", "le", "gt", "ge")}
UNSIGNED_ORDER = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparisons_of(kind: str) -> dict[str, Callable]:
    if kind in BITS:
        return INTEGER_COMPARISONS
    if kind in SIGNEDS:
        return INTEGER_COMPARISONS | ORDER
    return INTEGER_COMPARISONS | ORDER | UNSIGNED_ORDER if kind in UNSIGNEDS else COMPARISONS


def decode_setp(op: Opcode) -> Operation:
    """p|q = (a ? b) and its negation, each combined with a third predicate by .and, .or, .xor; of a pair, its two halves."""
    kind = op.kind("b16", "b32", "b64", *ALL_BUT_8, "f32", "f64", *HALVES, *HALF_PAIRS)
    available = comparisons_of(kind)
    compare = available[op.one(*available)]
    combine = COMBINATIONS.get(op.one(*COMBINATIONS, default=""))
    ftz = kind == "f32" and op.flag("ftz")
    dtype, half, pair = DTYPES[kind], kind.removesuffix("x2") in HALVES, kind in HALF_PAIRS

    def execute(lanes, operands, active):
        if len(operands) != (4 if combine else 3):
            raise NotImplementedError(f"{len(operands)} operands")
        a, b = ((lanes.whole if half else lanes.read)(operand, dtype) for operand in operands[1:3])
        if half:
            a, b = (widened(np.ascontiguousarray(v).view(np.uint16), kind.removesuffix("x2")) for v in (a, b))
        elif ftz:
            a, b = flush(a), flush(b)
        found = compare(a, b)
        results = [found[0::2], found[1::2]] if pair else [found, ~found]
        if combine:
            third = lanes.read(operands[3], DTYPES["pred"])
            results = [combine(result, third) for result in results]
        for destination, result in zip(getattr(operands[0], "parts", operands[:1]), results, strict=pair):
            lanes.write(destination, result, active)

    return Operation(execute)


def decode_selp(op: Opcode) -> Operation:
    kind = op.kind("b16", "b32", "b64", *ALL_BUT_8, "f32", "f64")
    return lanewise(lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"])


def decode_mov(op: Opcode) -> Operation:
    """Also packs {a, b} into one register and unpacks it, the first part lowest."""
    kind = op.kind("b16", "b32", "b64", *ALL_BUT_8, "f32", "f64", "pred")
    return lanewise(lambda a: a, [kind])


def decode_cvta(op: Opcode) -> Operation:
    """Generic addresses are those of global memory."""
    op.kind("u64")
    op.ignore("to")
    op.one("global")
    return lanewise(lambda a: a, ["u64"])


DECODERS = {
    **dict.fromkeys(("and", "or", "xor", "not"), decode_logic),
    **dict.fromkeys(("shl", "shr"), decode_shift),
    **dict.fromkeys(("popc", "clz"), decode_count),
    "shf": decode_funnel,
    "lop3": decode_lop3,
    "prmt": decode_prmt,
    "bfe": decode_bfe,
    "bfi": decode_bfi,
    "setp": decode_setp,
    "selp": decode_selp,
    "mov": decode_mov,
    "cvta": decode_cvta,
}
