"""ld, st, atom, red, cp.async: what reads and writes memory, at addresses that memory.py checks.

Hints (caches, eviction, prefetch), scopes and orders of memory change nothing here: lanes act in order and all see each write
at once. For the same reason cp.async has copied when the instruction is over, so a wait that is missing goes unnoticed.

Refused: atomics of fewer than 32 bits and of vectors, bulk and tensor copies, mbarriers, local and constant memory.
Source: PTX ISA 9, Instruction Set.
"""

import re

import numpy as np

from testing.numbers import add32
from testing.opcode import BITS, DTYPES, INTEGERS, UNSIGNED, Opcode, Operation, width
from testing.ptx import Immediate, Vector

HINTS = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release", "acq_rel", "weak"),
    *("cta", "gpu", "sys"),
    *(f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{hint}" for hint in ("evict_normal", "evict_first", "evict_last", "64B", "128B", "256B")),
)
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
SHARED = "shared", "shared::cta"
DATA = (*BITS, *INTEGERS, "f32", "f64")


def vector_of(op: Opcode, kind: str) -> int:
    """Takes .v2, .v4 or .v8: how many numbers, of at most 32 bytes."""
    count = VECTORS.get(op.one(*VECTORS, default=""), 1)
    if count * width(kind) > 256:
        raise NotImplementedError(op.text)
    return count


def parts_of(operand, count: int) -> tuple:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise NotImplementedError(f"{len(parts)} registers, expected {count}")
    return parts


def space_of(op: Opcode) -> str:
    """Takes the state space; without one an address is generic, and global here."""
    return "shared" if op.one("global", *SHARED, default="global") in SHARED else "global"


def decode_ld(op: Opcode) -> Operation:
    kind = op.kind(*DATA)
    count = vector_of(op, kind)
    if op.flag("param"):
        return load_parameter(kind, count)
    space = space_of(op)
    hint = op.flag("L2::cache_hint")
    op.ignore(*HINTS)
    dtype, bits = DTYPES[kind], width(kind)

    def execute(lanes, operands, active):
        if len(operands) != 2 + hint:
            raise NotImplementedError(f"{len(operands)} operands")
        parts = parts_of(operands[0], count)
        memory, offsets, _ = lanes.locate(space, operands[1], active, count * bits // 8)
        for part, loaded in zip(parts, memory.load(offsets, count, bits), strict=True):
            lanes.put(part, loaded.view(dtype), active)

    return Operation(execute)


def load_parameter(kind: str, count: int) -> Operation:
    if count > 1:
        raise NotImplementedError("a vector of parameters")
    dtype, bits = DTYPES[kind], width(kind)

    def execute(lanes, operands, active):
        destination, address = operands
        if address.offset:
            raise NotImplementedError("a part of a parameter")
        value = lanes.parameters[address.base.name] & (2**bits - 1)
        lanes.write(destination, UNSIGNED[bits].type(value).view(dtype), active)

    return Operation(execute)


def decode_st(op: Opcode) -> Operation:
    kind = op.kind(*DATA)
    count = vector_of(op, kind)
    space = space_of(op)
    hint = op.flag("L2::cache_hint")
    op.ignore(*HINTS)
    bits = width(kind)
    dtype = UNSIGNED[bits]

    def execute(lanes, operands, active):
        if len(operands) != 2 + hint:
            raise NotImplementedError(f"{len(operands)} operands")
        parts = parts_of(operands[1], count)
        memory, offsets, chosen = lanes.locate(space, operands[0], active, count * bits // 8)
        memory.store(offsets, [lanes.whole(part, dtype)[chosen] for part in parts])

    return Operation(execute)


# --- atomics: one lane after the other ---

ATOMICS = {
    "add": lambda kind: add32 if kind == "f32" else np.add,
    "min": lambda kind: np.minimum,
    "max": lambda kind: np.maximum,
    "and": lambda kind: np.bitwise_and,
    "or": lambda kind: np.bitwise_or,
    "xor": lambda kind: np.bitwise_xor,
    "exch": lambda kind: lambda old, new: new,
}
ATOMIC_KINDS = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64")),
    **dict.fromkeys(("and", "or", "xor", "exch", "cas"), ("b32", "b64")),
}


def decode_atom(op: Opcode) -> Operation:
    """Sums of floats depend on the order of lanes, which hardware does not fix: approximate."""
    kind = op.kind("b32", "b64", *INTEGERS, "f32", "f64")
    name = op.one(*ATOMICS, *(["cas"] if op.name == "atom" else []))
    if kind not in ATOMIC_KINDS[name] or (name == "exch" and op.name == "red"):
        raise NotImplementedError(op.text)
    space = space_of(op)
    op.ignore("relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys")
    dtype, bits = DTYPES[kind], width(kind)
    function = ATOMICS[name](kind) if name != "cas" else None
    returns = op.name == "atom"
    count = returns + 2 + (name == "cas")

    def execute(lanes, operands, active):
        if len(operands) != count:
            raise NotImplementedError(f"{len(operands)} operands")
        memory, offsets, chosen = lanes.locate(space, operands[returns], active, bits // 8)
        values = [lanes.whole(operand, dtype)[chosen] for operand in operands[returns + 1 :]]
        elements = memory.buffer.view(dtype)
        places = offsets // (bits // 8)
        if not returns and isinstance(function, np.ufunc):
            function.at(elements, places, values[0])
            return
        before = np.empty(places.size, dtype)
        for i, place in enumerate(places):
            before[i] = elements[place]
            if function:
                elements[place] = function(before[i], values[0][i])
            elif before[i] == values[0][i]:
                elements[place] = values[1][i]
        if returns:
            lanes.put(operands[0], before, active)

    return Operation(execute, approximate=kind in ("f32", "f64"))


# --- copies from global to shared memory ---


def nothing(lanes, operands, active) -> None:
    """An instruction that only orders what is in order here."""


def decode_cp(op: Opcode) -> Operation:
    """cp.async dst, src, bytes {, of which so many are read and the rest are zeros}"""
    op.one("async")
    if op.one("commit_group", "wait_group", "wait_all", default=""):
        return Operation(nothing)
    op.one("ca", "cg")
    op.one(*SHARED)
    op.one("global")
    op.ignore(*HINTS)

    def execute(lanes, operands, active):
        if len(operands) not in (3, 4) or not isinstance(operands[2], Immediate):
            raise NotImplementedError("cp.async with these operands")
        size = operands[2].bits
        target, to, chosen = lanes.locate("shared", operands[0], active, size)
        read = lanes.whole(operands[3], DTYPES["u32"])[chosen] if len(operands) == 4 else np.full(to.size, size, np.uint32)
        if (read > size).any():
            raise ValueError(f"cp.async of {size} bytes reads {int(read.max())}")
        copied = np.zeros((to.size, size), np.uint8)
        mask = np.zeros(lanes.size, bool)
        mask[chosen] = read > 0
        if mask.any():
            # The whole of it must be there where all of it is read, else only what is.
            for length in np.unique(read[read > 0]):
                some = mask.copy()
                some[chosen] &= read == length
                source, begin, _ = lanes.locate("global", operands[1], some, int(length), alignment=size)
                copied[read == length, :length] = source.buffer[begin[:, None] + np.arange(length)]
        target.buffer[to[:, None] + np.arange(size)] = copied

    return Operation(execute)


def decode_order(op: Opcode) -> Operation:
    """membar, fence, griddepcontrol, prefetch: nothing to do."""
    known = {
        "membar": ("cta", "gl", "sys"),
        "fence": ("sc", "acq_rel", "cta", "gpu", "sys", "cluster"),
        "griddepcontrol": ("wait", "launch_dependents"),
        "prefetch": ("global", "L1", "L2"),
    }
    op.ignore(*known[op.name])
    return Operation(nothing)


def decode_policy(op: Opcode) -> Operation:
    """createpolicy: a hint for caches, 0 here."""
    op.kind("b64")
    op.one("fractional")
    op.words = [word for word in op.words if not re.fullmatch(r"L2::evict_\w+", word)]
    return Operation(lambda lanes, operands, active: lanes.write(operands[0], np.uint64(0), active))


DECODERS = {
    **dict.fromkeys(("atom", "red"), decode_atom),
    **dict.fromkeys(("membar", "fence", "griddepcontrol", "prefetch"), decode_order),
    "ld": decode_ld,
    "st": decode_st,
    "cp": decode_cp,
    "createpolicy": decode_policy,
}
