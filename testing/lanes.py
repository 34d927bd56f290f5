"""The state of a grid that executes a Program: registers, memory, and which lanes go where.

Every lane of every block is one element of numpy arrays, a register an array over all of them, an instruction one operation on
arrays. Where lanes part, those at the lowest instruction go first, so they meet again as early as may be.

Checked on the way: bounds and alignment of every access of global memory, between whose tensors there are gaps, and of shared
memory. Left out: races, since lanes run in lock step; time."""

from collections import Counter

import numpy as np

from testing.ptx import Instruction, Program

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


class Memory:
    """Global memory: arrays copied in, at addresses apart from each other."""

    BASE = 0x7000_0000_0000

    def __init__(self):
        self.bytes = np.zeros(0, np.uint8)
        self.spans: list[tuple[int, int]] = []

    def add(self, array: np.ndarray) -> int:
        """-> its address."""
        raw, start = np.ascontiguousarray(array).view(np.uint8).ravel(), len(self.bytes)
        self.bytes = np.concatenate([self.bytes, raw, np.zeros(-raw.size % 256 + 256, np.uint8)])
        self.spans.append((start, raw.size))
        return self.BASE + start

    def read(self, address: int, size: int) -> np.ndarray:
        return self.bytes[address - self.BASE : address - self.BASE + size]

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Where accesses of so many bytes lie in `bytes`. IndexError outside of every array, ValueError if misaligned."""
        index = addresses.astype(np.int64) - self.BASE
        inside = np.zeros(index.shape, bool)
        for start, length in self.spans:
            inside |= (index >= start) & (index + size <= start + length)
        if not inside.all():
            first = int(addresses[~inside][0])
            raise IndexError(f"global access of {size} bytes at {first:#x}, in no tensor, by {int((~inside).sum())} lanes")
        if (index % size).any():
            raise ValueError(f"misaligned global access of {size} bytes")
        return index


class Lanes:
    """One program on `count` lanes; `blocks` of `threads` each. Results: the registers, the memory, and

    count     how often each instruction ran
    approx    approximate instructions that ran, and products whose order of sums is the hardware's
    """

    def __init__(self, program: Program, count: int, memory=None, blocks=1, threads=1, shared=0, grid=(1, 1, 1), symbols=None):
        self.program, self.n, self.memory, self.blocks, self.threads = program, count, memory, blocks, threads
        self.registers = {name: np.zeros(count, UNSIGNED[width]) for name, width in program.widths.items()}
        lane = np.arange(count)
        thread, self.block = lane % max(threads, 1), lane // max(threads, 1)
        self.shared_size, self.shared = shared, np.zeros(max(shared, 1) * blocks, np.uint8)
        self.symbols, self.parameters = symbols or {}, {}
        self.count, self.approx = Counter(), Counter()
        x, y, _ = grid
        self.special = {
            "%tid.x": thread, "%tid.y": 0 * thread, "%tid.z": 0 * thread, "%laneid": thread % 32, "%warpid": thread // 32,
            "%ntid.x": np.full(count, threads), "%ctaid.x": self.block % x, "%ctaid.y": self.block // x % y,
            "%ctaid.z": self.block // (x * y),
        }  # fmt: skip
        self.special |= {f"%nctaid.{axis}": np.full(count, size) for axis, size in zip("xyz", grid, strict=True)}

    def get(self, operand: tuple, width: int) -> np.ndarray:
        """Its bits, of so many, unsigned; bool for width 1."""
        kind = operand[0]
        if kind == "i":
            if width == 1:
                return np.full(self.n, bool(operand[1]))
            return np.full(self.n, operand[1] & ((1 << width) - 1), np.uint64).astype(UNSIGNED[width])
        if kind == "r":
            name = operand[1]
            if name in self.registers:
                value = self.registers[name]
            elif name in self.special:
                value = self.special[name].astype(np.uint32)
            else:
                value = np.full(self.n, self.symbols[name], np.uint64)
            return value if value.dtype == UNSIGNED[width] else value.astype(UNSIGNED[width])
        if kind == "n":
            return ~self.get(operand[1], 1)
        if kind == "v":  # the first part is the lowest
            part = width // len(operand[1])
            value = np.zeros(self.n, UNSIGNED[width])
            for i, each in enumerate(operand[1]):
                value |= self.get(each, part).astype(UNSIGNED[width]) << UNSIGNED[width](i * part)
            return value
        raise NotImplementedError(f"operand {operand}")

    def fp32(self, operand: tuple) -> np.ndarray:
        return np.ascontiguousarray(self.get(operand, 32)).view(np.float32)

    def put(self, operand: tuple, value: np.ndarray, active: np.ndarray | None) -> None:
        """Into a register, of the active lanes (None: all)."""
        if operand[0] == "_":
            return
        if operand[0] == "v":
            part = value.dtype.itemsize * 8 // len(operand[1])
            for i, each in enumerate(operand[1]):
                self.put(each, (value >> value.dtype.type(i * part)).astype(UNSIGNED[part]), active)
            return
        old, value = self.registers[operand[1]], np.asarray(value)
        if value.dtype.kind == "f":
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
        value = value if value.dtype == old.dtype else value.astype(old.dtype)
        self.registers[operand[1]] = value if active is None else np.where(active, value, old)

    def execute(self, instruction: Instruction, active: np.ndarray | None) -> None:
        raise NotImplementedError

    def run(self, limit: int = 10_000_000) -> "Lanes":
        """To the end. RuntimeError after so many instructions."""
        program, end = self.program, len(self.program.instructions)
        at, places = 0, None  # places: of each lane, or None while all are at one
        with np.errstate(all="ignore"):
            for _ in range(limit):
                active = None
                if places is not None:
                    at = int(places.min())
                    active = places == at
                    if active.all():
                        places = active = None
                if at >= end:
                    return self
                instruction = program.instructions[at]
                name = instruction.op[0]
                self.count[name] += 1
                doing = active
                if instruction.predicate is not None:
                    holds = self.registers[instruction.predicate]
                    holds = ~holds if instruction.negated else holds
                    doing = holds if active is None else active & holds
                if name in ("bra", "ret", "exit"):
                    to = program.labels[instruction.operands[0][1]] if name == "bra" else end
                    at, places = self._jump(at, to, places, active, doing)
                    continue
                if doing is None or doing.any():
                    self.execute(instruction, doing)
                if places is None:
                    at += 1
                else:
                    places = np.where(active, at + 1, places)
        raise RuntimeError(f"{limit} instructions, and no end")

    def _jump(self, at: int, to: int, places, active, doing):
        """-> (where all lanes are, where each is or None)."""
        if active is None and (doing is None or doing.all()):
            return to, None
        if active is None and not doing.any():
            return at + 1, None
        places = np.full(self.n, at) if places is None else places
        active = np.ones(self.n, bool) if active is None else active
        return at, np.where(active & (True if doing is None else doing), to, np.where(active, at + 1, places))
