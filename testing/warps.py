"""What the 32 lanes of a warp, or the lanes of a CTA, do together: shfl, vote, redux, elect, bar, ldmatrix, stmatrix.

    shfl, vote, redux, elect, bar.warp     by just the lanes of their mask, else RuntimeError (on hardware it may hang)
    bar.sync, barrier.sync                 by all lanes of a CTA, at one instruction, else RuntimeError
    ldmatrix, stmatrix                     by whole warps

The lane that shfl reads may lie outside the mask only where the lane reads itself. Refused: match, activemask, bar.red,
bar.arrive, named subsets of a CTA, the matrices of 8 and fewer bits. Source: PTX ISA 9, Instruction Set.
"""

import functools

import numpy as np

from testing.arithmetic import extreme
from testing.opcode import DTYPES, UNSIGNED, Opcode, Operation
from testing.ptx import Immediate, Pair, Vector

WORD = UNSIGNED[32]
PREDICATE = DTYPES["pred"]
LANE = np.arange(32)


def members(lanes, operand, active: np.ndarray | None, name: str) -> np.ndarray:
    """The lanes that take part, bool [warps, 32]. Raises RuntimeError where the mask of one names others than are here."""
    here = lanes.by_warp(np.ones(lanes.size, bool) if active is None else active)
    if active is None and isinstance(operand, Immediate) and operand.bits & 0xFFFFFFFF == 0xFFFFFFFF:
        return here
    words = (here.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
    wrong = (here & (lanes.by_warp(lanes.whole(operand, WORD)) != words[:, None])).any(1)
    if wrong.any():
        raise RuntimeError(f"{name} by other lanes than its mask names, warp {int(wrong.nonzero()[0][0])}")
    return here


def decode_shfl(op: Opcode) -> Operation:
    """d|p = the register of the lane that b and c name; p says whether there is one, else it is the lane's own."""
    op.kind("b32")
    op.one("sync")
    mode = op.one("up", "down", "bfly", "idx")

    def execute(lanes, operands, active):
        destination, source, b, c, mask = operands
        here = members(lanes, mask, active, op.text)
        lane = np.arange(lanes.size) & 31
        amount = lanes.read(b, WORD).astype(np.int64) & 31
        limits = lanes.read(c, WORD).astype(np.int64)
        segment, clamp = (limits >> 8) & 31, limits & 31
        first = lane & segment
        last = first | (clamp & ~segment)
        if mode == "bfly":
            wanted = lane ^ amount
        elif mode == "idx":
            wanted = first | (amount & ~segment)
        else:
            wanted = lane - amount if mode == "up" else lane + amount
        there = wanted >= last if mode == "up" else wanted <= last
        wanted = np.where(there, wanted, lane) + np.arange(lanes.size) - lane
        if active is not None and not here.reshape(-1)[wanted][active].all():
            raise RuntimeError(f"{op.text} reads a lane outside its mask")
        values = lanes.whole(source, WORD)[wanted]
        several = isinstance(destination, Pair)
        lanes.write(destination.parts[0] if several else destination, values, active)
        if several:
            lanes.write(destination.parts[1], there, active)

    return Operation(execute)


def decode_vote(op: Opcode) -> Operation:
    op.kind("pred", "b32")
    op.one("sync")
    mode = op.one("all", "any", "uni", "ballot")

    def execute(lanes, operands, active):
        destination, source, mask = operands
        here = members(lanes, mask, active, op.text)
        votes = lanes.by_warp(lanes.whole(source, PREDICATE))
        if mode == "ballot":
            found = ((votes & here).astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            some, every = (votes & here).any(1), (votes | ~here).all(1)
            found = {"any": some, "all": every, "uni": every | ~some}[mode]
        lanes.write(destination, np.repeat(found, 32), active)

    return Operation(execute)


REDUCTIONS = {
    "add": (np.add, lambda dtype: 0),
    "min": (np.minimum, lambda dtype: np.iinfo(dtype).max),
    "max": (np.maximum, lambda dtype: np.iinfo(dtype).min),
    "and": (np.bitwise_and, lambda dtype: np.iinfo(dtype).max),
    "or": (np.bitwise_or, lambda dtype: 0),
    "xor": (np.bitwise_xor, lambda dtype: 0),
}


def decode_redux(op: Opcode) -> Operation:
    kind = op.kind("u32", "s32", "b32", "f32")
    op.one("sync")
    choices = {"b32": ("and", "or", "xor"), "f32": ("min", "max")}.get(kind, ("add", "min", "max"))
    name = op.one(*choices)
    if kind == "f32":
        nan, absolute = op.flag("NaN"), op.flag("abs")
        pick = functools.partial(extreme, kind=kind, larger=name == "max", nan=nan, absolute=absolute, xorsign=False)
    dtype = WORD if kind == "f32" else DTYPES[kind]

    def execute(lanes, operands, active):
        destination, source, mask = operands
        here = members(lanes, mask, active, op.text)
        values = lanes.by_warp(lanes.whole(source, dtype))
        if kind == "f32":
            if not here.all():  # a lane that is not here repeats one that is
                values = np.take_along_axis(values, np.where(here, LANE, here.argmax(1)[:, None]), 1)
            found = functools.reduce(pick, values.T)
        else:
            function, identity = REDUCTIONS[name]
            found = function.reduce(np.where(here, values, dtype.type(identity(dtype))), axis=1, dtype=dtype)
        lanes.write(destination, np.repeat(found, 32), active)

    return Operation(execute)


def decode_elect(op: Opcode) -> Operation:
    """d|p: p of the lowest lane, whose number is d."""
    op.one("sync")

    def execute(lanes, operands, active):
        destination, mask = operands
        here = members(lanes, mask, active, op.text)
        leader = np.repeat(here.argmax(1), 32)
        first, second = destination.parts
        lanes.write(first, leader.astype(np.uint32), active)
        lanes.write(second, leader == np.arange(lanes.size) % 32, active)

    return Operation(execute)


def decode_bar(op: Opcode) -> Operation:
    """bar.sync, barrier.sync and bar.warp.sync."""
    warp = op.flag("warp")
    op.flag("cta")
    op.one("sync")
    op.flag("aligned")

    def execute(lanes, operands, active):
        if warp:
            members(lanes, operands[0], active, op.text)
            return
        if len(operands) == 2 and operands[1] != Immediate(lanes.threads):
            raise NotImplementedError("a barrier of a part of a CTA")
        if active is not None:
            here = active.reshape(-1, lanes.threads)
            partly = here.any(1) & ~here.all(1)
            if partly.any():
                cta = int(partly.nonzero()[0][0])
                raise RuntimeError(f"{op.text} reached by {int(here[cta].sum())} of {lanes.threads} lanes of CTA {cta}")

    return Operation(execute)


# --- 8 by 8 matrices of 16 bits: lane i holds columns 2 (i % 4) and the next of row i / 4 ---


def matrices_of(op: Opcode) -> tuple[int, bool]:
    """Takes the words of ldmatrix and stmatrix: how many matrices, whether transposed."""
    op.kind("b16")
    op.one("sync")
    op.one("aligned")
    op.one("m8n8")
    op.one("shared", "shared::cta")
    return int(op.one("x1", "x2", "x4")[1]), op.flag("trans")


def rows_of(lanes, address, warps: np.ndarray, count: int) -> np.ndarray:
    """Where the rows of `count` matrices begin, in units of 16 bits, [warps, count, 8]: lane 8 k + i has row i of matrix k."""
    giving = np.zeros((lanes.size // 32, 32), bool)
    giving[warps, : 8 * count] = True
    _, offsets, _ = lanes.locate("shared", address, giving.reshape(-1), 16)
    return offsets.reshape(-1, count, 8) // 2


def decode_ldmatrix(op: Opcode) -> Operation:
    count, transposed = matrices_of(op)

    def execute(lanes, operands, active):
        warps = lanes.whole_warps(active, op.text)
        begins = rows_of(lanes, operands[1], warps, count)
        matrices = lanes.spaces["shared"].buffer.view(np.uint16)[begins[..., None] + np.arange(8)]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.zeros((count, lanes.size // 32, 32), np.uint32)
        words[:, warps] = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32).swapaxes(0, 1)
        parts = operands[0].parts if isinstance(operands[0], Vector) else (operands[0],)
        for part, word in zip(parts, words, strict=True):
            lanes.write(part, word.reshape(-1), active)

    return Operation(execute)


def decode_stmatrix(op: Opcode) -> Operation:
    count, transposed = matrices_of(op)

    def execute(lanes, operands, active):
        warps = lanes.whole_warps(active, op.text)
        begins = rows_of(lanes, operands[0], warps, count)
        parts = operands[1].parts if isinstance(operands[1], Vector) else (operands[1],)
        if len(parts) != count:
            raise NotImplementedError(f"{len(parts)} registers, expected {count}")
        words = np.stack([lanes.by_warp(lanes.whole(part, WORD))[warps] for part in parts], 1)
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        lanes.spaces["shared"].buffer.view(np.uint16)[begins[..., None] + np.arange(8)] = matrices

    return Operation(execute)


DECODERS = {
    **dict.fromkeys(("bar", "barrier"), decode_bar),
    "shfl": decode_shfl,
    "vote": decode_vote,
    "redux": decode_redux,
    "elect": decode_elect,
    "ldmatrix": decode_ldmatrix,
    "stmatrix": decode_stmatrix,
}
