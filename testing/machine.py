"""PTX on numpy arrays: a kernel over its grid, or one inline assembly over elements.

It executes what Triton compiles for sm_80 to sm_120, conversions of sm_100a among it, and block-scaled mma.sync. Not
executed: wgmma, tcgen05, TMA, mbarrier, clusters. Not seen: what ptxas does with the PTX."""

import re

import numpy as np

from testing.instructions import Machine
from testing.lanes import UNSIGNED, Lanes, Memory
from testing.ptx import Program, entry, without_comments

WIDTHS = {"r": 32, "f": 32, "h": 16, "l": 64, "d": 64, "b": 1}  # of the constraints of inline assembly


def run_kernel(ptx: str, grid: tuple[int, ...], arguments: list, shared: int, warps: int | None = None) -> Lanes:
    """arguments: contiguous arrays, updated in place (one that is passed twice is one array), ints and floats, in the order
    of the PTX. shared: bytes of shared memory of a block. Raises NotImplementedError, naming the instruction that is not
    known."""
    found = entry(ptx)
    threads = found.threads or warps * 32
    grid = tuple(grid) + (1,) * (3 - len(grid))
    blocks = int(np.prod(grid))
    memory, places, values = Memory(), {}, []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            place = argument.__array_interface__["data"][0], argument.nbytes
            if place not in places:
                places[place] = memory.add(argument), argument
            values.append(places[place][0])
        elif isinstance(argument, float):
            values.append(int(np.float32(argument).view(np.uint32)))
        else:
            values.append(int(argument))
    values += [0] * (len(found.parameters) - len(values))  # (Triton appends pointers to scratch memory)
    program = Program(found.body)
    symbols, size = {}, 0
    for name, length in (found.shared | program.shared).items():
        symbols[name] = size
        size += -(-length // 16) * 16
    lanes = Machine(program, blocks * threads, memory, blocks, threads, max(shared, size), grid, symbols)
    lanes.parameters = dict(zip(found.parameters, values, strict=True))
    lanes.run()
    for address, array in places.values():
        array.view(np.uint8).reshape(-1)[:] = memory.read(address, array.nbytes)
    return lanes


def run_asm(asm: str, constraints: str, arguments: list[np.ndarray], out_bits: list[int], pack: int) -> list[np.ndarray]:
    """One inline_asm_elementwise of Triton: flat unsigned arrays of one length, a multiple of `pack`; widths of the elements
    of the results -> these. Elements of less than 32 bits come and go packed in registers of 32."""
    lanes = arguments[0].size // pack
    kinds = [constraint.strip() for constraint in constraints.split(",")]
    widths = {f"%op{i}": WIDTHS[kind.lstrip("=")] for i, kind in enumerate(kinds)}
    text = re.sub(r"\$(\d+)", r"%op\1", without_comments(asm).replace("$$", "$")).rstrip()
    machine = Machine(Program(text if text.endswith((";", "}")) else text + ";", widths), lanes)
    number = sum(kind.startswith("=") for kind in kinds)
    for argument in arguments:
        bits, elements = argument.dtype.itemsize * 8, argument.reshape(lanes, pack)
        each = max(1, 32 // bits)
        for i in range(0, pack, each):
            value = np.zeros(lanes, UNSIGNED[max(bits, 32)])
            for j in range(min(each, pack - i)):
                value |= elements[:, i + j].astype(value.dtype) << value.dtype.type(j * bits)
            machine.registers[f"%op{number}"] = value.astype(UNSIGNED[widths[f"%op{number}"]])
            number += 1
    machine.run()
    made, number = [], 0
    for bits in out_bits:
        out, each = np.zeros((lanes, pack), UNSIGNED[bits]), max(1, 32 // bits)
        for i in range(0, pack, each):
            value = machine.registers[f"%op{number}"]
            number += 1
            for j in range(min(each, pack - i)):
                out[:, i + j] = (value >> value.dtype.type(j * bits)).astype(UNSIGNED[bits])
        made.append(out.reshape(-1))
    return made
