"""mma.sync: D = A B + C by a warp. A [16, K], B [K, 8], C and D [16, 8] in fp32.

    m16n8k8, m16n8k16                     fp16, bf16
    m16n8k32                              e4m3, e5m2
    m16n8k64, kind::mxf4nvf4, mxf4        e2m1, a scale (ue4m3 or ue8m0) for every 16 or 32 along K
    m16n8k32, kind::mxf8f6f4              e4m3, e5m2, e2m1 in bytes (bits 5:2), a ue8m0 scale for every 32

Products are exact and sums are in fp64, rounded once to fp32: tensor cores align and truncate in ways that are not published,
so results are counted as approximate. Lane l of a warp holds, with g = l / 4 and t = l % 4 and n numbers to a register,

    A register r: row g + 8 (r % 2), columns n t + K/2 (r / 2) ...     B register r: column g, rows n t + K/2 r ...
    C register r: row g + 8 (r / 2), column 2 t + r % 2                (with 8 bits and K = 8: r / 2 is always 0)

Scales: of rows g and g + 8 of A in the lanes 4 g + 2 thread and the next, of column g of B in lane 4 g + thread; byte id + j
of the register for block j. Refused: fp16 sums, tf32, integers, sparse A, 6 bits. Source: PTX ISA 9, mma.
"""

import re

import numpy as np

from testing.numbers import bf16_to_f32, f16_to_f32, f64_to_f32, from_e2m1, from_e4m3, from_e5m2, from_ue8m0
from testing.opcode import DTYPES, UNSIGNED, Opcode, Operation
from testing.ptx import Immediate, Vector

WORD, SINGLE = UNSIGNED[32], DTYPES["f32"]
GROUP, THREAD = np.arange(32) // 4, np.arange(32) % 4
HALVES = {"f16": f16_to_f32, "bf16": bf16_to_f32}
EIGHTS = {"e4m3": from_e4m3, "e5m2": from_e5m2}
SMALL = {"e2m1": from_e2m1, **EIGHTS}
# kind -> K, bits of an element, blocks along K -> types of their scales, types of elements
SCALED = {
    "kind::mxf4nvf4": (64, 4, {4: ("ue4m3",), 2: ("ue8m0",)}, ("e2m1",)),
    "kind::mxf4": (64, 4, {2: ("ue8m0",)}, ("e2m1",)),
    "kind::mxf8f6f4": (32, 8, {1: ("ue8m0",)}, ("e2m1", "e4m3", "e5m2")),
}


def decode_mma(op: Opcode) -> Operation:
    for word in ("sync", "aligned", "row", "col"):
        op.one(word)
    kind = op.one(*SCALED, default="")
    return decode_scaled(op, kind) if kind else decode_plain(op)


def decode_plain(op: Opcode) -> Operation:
    shape, types = op.words[0], op.words[1:]
    op.words = []
    found = re.fullmatch(r"m16n8k(8|16|32)", shape)
    if not found or len(types) != 4 or types[0] != "f32" or types[3] != "f32":
        raise NotImplementedError(op.text)
    depth, (type_a, type_b) = int(found[1]), types[1:3]
    decoders = EIGHTS if depth == 32 else HALVES
    if not {type_a, type_b} <= set(decoders) or (depth < 32 and type_a != type_b):
        raise NotImplementedError(op.text)
    bits = 8 if depth == 32 else 16

    def execute(lanes, operands, active):
        lanes.whole_warps(active, op.text)
        a = gathered_a(elements(lanes, operands[1], bits, decoders[type_a]), depth)
        b = gathered_b(elements(lanes, operands[2], bits, decoders[type_b]), depth)
        finish(lanes, operands, a @ b, active)

    return Operation(execute, approximate=True)


def decode_scaled(op: Opcode, kind: str) -> Operation:
    depth, bits, scales, types = SCALED[kind]
    op.one("block_scale")
    op.one(f"m16n8k{depth}")
    blocks = int(op.one(*(f"scale_vec::{n}X" for n in scales))[-2])
    scale_type = op.kind(*scales[blocks])
    op.kind("f32")
    type_b, type_a = op.kind(*types), op.kind(*types)
    op.kind("f32")
    scale_of = scale_from_e4m3 if scale_type == "ue4m3" else from_ue8m0

    def decoder(element: str):
        decode = SMALL[element]
        return (lambda code: decode(code >> 2)) if element == "e2m1" and bits == 8 else decode

    def execute(lanes, operands, active):
        warps = lanes.whole_warps(active, op.text)
        a = gathered_a(elements(lanes, operands[1], bits, decoder(type_a)), depth)
        b = gathered_b(elements(lanes, operands[2], bits, decoder(type_b)), depth)
        (byte_a, thread_a), (byte_b, thread_b) = selector(lanes, operands[5]), selector(lanes, operands[7])
        scales_a, scales_b = (scale_bytes(lanes, operand) for operand in (operands[4], operands[6]))
        first = 4 * np.arange(8)  # of the lanes of a row or column
        size = depth // blocks

        def of(scales, column, byte):
            made = np.ones((len(scales), 8))
            made[warps] = scale_of(scales[warps][:, first + column, byte])
            return made

        for j in range(blocks):
            some = slice(j * size, (j + 1) * size)
            for half in range(2):
                a[:, 8 * half : 8 * half + 8, some] *= of(scales_a, 2 * thread_a + half, byte_a + j)[:, :, None]
            b[:, some] *= of(scales_b, thread_b, byte_b + j)[:, None]
        finish(lanes, operands, a @ b, active)

    return Operation(execute, approximate=True)


def elements(lanes, vector: Vector, bits: int, decode) -> np.ndarray:
    """The numbers in registers, fp64 [warps, 32, registers, numbers of one]."""
    words = np.stack([lanes.by_warp(lanes.whole(part, WORD)) for part in vector.parts], -1)
    if bits == 16:
        codes = words[..., None].view(np.uint16)
    else:
        codes = words[..., None].view(np.uint8)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(*words.shape, 8)
    return decode(codes).astype(np.float64)


def gathered_a(values: np.ndarray, depth: int) -> np.ndarray:
    """[warps, 32, registers, n] -> A [warps, 16, depth]."""
    warps, _, registers, n = values.shape
    if 32 * registers * n != 16 * depth:
        raise NotImplementedError(f"{registers} registers of A")
    made = np.empty((warps, 16, depth))
    for r in range(registers):
        columns = THREAD[:, None] * n + depth // 2 * (r >> 1) + np.arange(n)
        made[:, (GROUP + 8 * (r & 1))[:, None], columns] = values[:, :, r]
    return made


def gathered_b(values: np.ndarray, depth: int) -> np.ndarray:
    """[warps, 32, registers, n] -> B [warps, depth, 8]."""
    warps, _, registers, n = values.shape
    if 32 * registers * n != 8 * depth:
        raise NotImplementedError(f"{registers} registers of B")
    made = np.empty((warps, depth, 8))
    for r in range(registers):
        made[:, THREAD[:, None] * n + depth // 2 * r + np.arange(n), GROUP[:, None]] = values[:, :, r]
    return made


def finish(lanes, operands, product: np.ndarray, active) -> None:
    """D = product + C."""
    for r, (to, c) in enumerate(zip(operands[0].parts, operands[3].parts, strict=True)):
        mine = product[:, GROUP + 8 * (r >> 1), 2 * THREAD + (r & 1)]
        total = mine + lanes.by_warp(lanes.whole(c, SINGLE)).astype(np.float64)
        lanes.write(to, f64_to_f32(total.reshape(-1)), active)


def scale_bytes(lanes, operand) -> np.ndarray:
    """The register of scales as bytes, [warps, 32, 4]."""
    register = operand.parts[0] if isinstance(operand, Vector) else operand
    return lanes.by_warp(lanes.whole(register, WORD))[..., None].view(np.uint8)


def scale_from_e4m3(code: np.ndarray) -> np.ndarray:
    if (code & 0x80).any():
        raise ValueError(f"{int(code.max()):#x} is no scale in ue4m3")
    return from_e4m3(code)


def selector(lanes, operand: Vector) -> list[int]:
    """{byte, thread}, the same in all lanes."""
    return [part.bits if isinstance(part, Immediate) else int(lanes.whole(part, UNSIGNED[16])[0]) for part in operand.parts]


DECODERS = {"mma": decode_mma}
