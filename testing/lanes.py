"""The lanes of a grid: their registers, how operands are read and written, and who runs when.

Every lane of every CTA is one element of numpy arrays, an instruction an operation on them. Where lanes part, those at the
lowest instruction run first, until they reach others that wait: they meet again after a branch or a loop, as compilers lay
code out. All CTAs run at once, in lock step.
"""

import collections

import numpy as np

from testing.instructions import decode
from testing.memory import Global, Shared
from testing.opcode import DTYPES, UNSIGNED
from testing.ptx import SINK, Address, Immediate, Not, Program, Register, Vector

NOWHERE = 1 << 60  # behind every instruction
STORAGE = UNSIGNED | {1: np.dtype(np.bool_)}
PREDICATE = DTYPES["pred"]


class Lanes:
    """The state of all lanes: `registers`, name -> array [size].

    size      lanes                            threads   lanes of a CTA
    count     instructions executed, by name: Counter; an instruction counts once for all lanes
    approx    those of them whose result hardware may give otherwise, by opcode: Counter

    Arrays in `registers` are never changed, only replaced. They hold the type last written, of the register's width.
    """

    def __init__(self, program: Program, size: int, threads: int = 0):
        self.program, self.size, self.threads = program, size, threads
        zeros = {width: np.zeros(size, dtype) for width, dtype in STORAGE.items()}
        self.registers = {name: zeros[width] for name, width in program.widths.items()}
        self.parameters: dict[str, int] = {}
        self.spaces: dict[str, Global | Shared] = {}
        self.operations = [None] * len(program.instructions)
        self.visits = [0] * len(program.instructions)

    def place(self, grid: tuple[int, int, int]) -> np.ndarray:
        """Fills the special registers; gives the CTA of each lane."""
        lane = np.arange(self.size)
        cta, thread = lane // self.threads, lane % self.threads
        x, y, z = grid
        special = {
            "%tid.x": thread,
            "%laneid": thread % 32,
            "%warpid": thread // 32,
            "%ctaid.x": cta % x,
            "%ctaid.y": cta // x % y,
            "%ctaid.z": cta // (x * y),
            **dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x"), (x, y, z, self.threads), strict=True)),
            **dict.fromkeys(("%tid.y", "%tid.z"), 0),
            **dict.fromkeys(("%ntid.y", "%ntid.z"), 1),
        }
        self.registers |= {name: np.full(self.size, value).astype(np.uint32) for name, value in special.items()}
        return cta

    # --- operands ---

    def read(self, operand, dtype: np.dtype) -> np.ndarray:
        """An operand as that dtype: [size], or a numpy scalar of an immediate. A wider register gives its lower bits."""
        if type(operand) is not Register:
            return self._read(operand, dtype)
        value = self.registers.get(operand.name)
        if value is None:
            raise NotImplementedError(f"what {operand.name} is")
        if value.dtype == dtype:
            return value
        if (value.dtype == PREDICATE) != (dtype == PREDICATE):
            raise NotImplementedError(f"{operand.name} as {dtype}")
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        if value.dtype.itemsize < dtype.itemsize:
            raise NotImplementedError(f"{operand.name} is narrower than {dtype}")
        return value.view(UNSIGNED[8 * value.dtype.itemsize]).astype(UNSIGNED[8 * dtype.itemsize]).view(dtype)

    def _read(self, operand, dtype: np.dtype) -> np.ndarray:
        if type(operand) is Immediate:
            if dtype == PREDICATE:
                return np.bool_(operand.bits)
            bits = 8 * dtype.itemsize
            if operand.width not in (0, bits) or (not operand.width and dtype.kind == "f"):
                raise NotImplementedError(f"an immediate of {operand.width} bits as {dtype}")
            return UNSIGNED[bits].type(operand.bits & ((1 << bits) - 1)).view(dtype)
        if type(operand) is Not and dtype == PREDICATE:
            return ~self.read(operand.register, dtype)
        if type(operand) is Vector and dtype != PREDICATE:
            bits = 8 * dtype.itemsize // len(operand.parts)
            if bits not in UNSIGNED or bits * len(operand.parts) != 8 * dtype.itemsize:
                raise NotImplementedError(f"{len(operand.parts)} parts of {dtype}")
            packed = np.empty((self.size, len(operand.parts)), UNSIGNED[bits])
            for i, part in enumerate(operand.parts):
                packed[:, i] = self.read(part, UNSIGNED[bits])
            return packed.view(dtype)[:, 0]
        raise NotImplementedError(f"operand {operand}")

    def whole(self, operand, dtype: np.dtype) -> np.ndarray:
        """`read`, of an immediate too as an array [size]."""
        value = self.read(operand, dtype)
        return value if value.ndim else np.full(self.size, value)

    def write(self, operand, value: np.ndarray, active: np.ndarray | None) -> None:
        """A value [size], or one for all, into the active lanes of a register, extended by its type where that is wider."""
        if type(operand) is Register:
            old = self.registers.get(operand.name)
            if old is None:
                raise NotImplementedError(f"what {operand.name} is")
            if value.dtype.itemsize != old.dtype.itemsize or (value.dtype == PREDICATE) != (old.dtype == PREDICATE):
                value = self._extended(value, old, operand.name)
            if active is not None:
                value = np.where(active, value, old.view(value.dtype))
            elif not value.ndim:
                value = np.full(self.size, value)
            self.registers[operand.name] = value
        elif type(operand) is Vector:
            bits = 8 * value.dtype.itemsize // len(operand.parts)
            if not value.ndim:
                value = np.full(self.size, value)
            parts = np.ascontiguousarray(value).view(UNSIGNED[bits]).reshape(self.size, -1)
            for i, part in enumerate(operand.parts):
                self.write(part, parts[:, i], active)
        elif operand != SINK:
            raise NotImplementedError(f"destination {operand}")

    def _extended(self, value: np.ndarray, old: np.ndarray, name: str) -> np.ndarray:
        if value.dtype.kind not in "ui" or old.dtype == PREDICATE or value.dtype.itemsize > old.dtype.itemsize:
            raise NotImplementedError(f"{value.dtype} into {name} of {8 * old.dtype.itemsize} bits")
        return value.astype(UNSIGNED[8 * old.dtype.itemsize])

    def put(self, operand, values: np.ndarray, active: np.ndarray | None) -> None:
        """`write` of values for the active lanes alone."""
        if active is not None and operand != SINK:
            some, values = values, np.zeros(self.size, values.dtype)
            values[active] = some
        self.write(operand, values, active)

    def locate(self, space: str, address, active: np.ndarray | None, size: int, alignment: int = 0) -> tuple:
        """(memory, offsets in its buffer, lanes) of an access by the active lanes. Raises as memory.py says."""
        if space not in self.spaces:
            raise NotImplementedError(f"{space} memory in inline assembly")
        if type(address) is not Address:
            raise NotImplementedError(f"address {address}")
        if type(address.base) is Immediate:
            base = np.full(self.size, address.base.bits & (2**64 - 1), np.uint64)
        else:
            base = self.registers.get(address.base.name)
            if base is None:
                raise NotImplementedError(f"what {address.base.name} is")
            base = base.view(UNSIGNED[8 * base.dtype.itemsize])
        lanes = slice(None) if active is None else active.nonzero()[0]
        addresses = base[lanes].astype(np.uint64) + np.uint64(address.offset & (2**64 - 1))
        memory = self.spaces[space]
        return memory, memory.locate(addresses, lanes, size, alignment or size), lanes

    # --- warps ---

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """[size] -> [warps, 32]. Raises NotImplementedError where CTAs are not made of whole warps."""
        if not self.threads or self.threads % 32:
            raise NotImplementedError(f"warps, with {self.threads} lanes in a CTA")
        return values.reshape(-1, 32)

    def whole_warps(self, active: np.ndarray | None, name: str) -> np.ndarray:
        """The warps that are here. Raises RuntimeError where one is only in part."""
        here = self.by_warp(np.ones(self.size, bool) if active is None else active)
        if (here.any(1) != here.all(1)).any():
            raise RuntimeError(f"{name} reached by a part of a warp")
        return here.all(1).nonzero()[0]

    # --- control ---

    @property
    def count(self) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        for instruction, visits in zip(self.program.instructions, self.visits, strict=True):
            found[instruction.opcode.split(".", 1)[0]] += visits
        return +found

    @property
    def approx(self) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        for instruction, operation, visits in zip(self.program.instructions, self.operations, self.visits, strict=True):
            if operation and operation.approximate:
                found[instruction.opcode] += visits
        return +found

    def run(self, steps: int) -> None:
        """Until every lane has left. Raises RuntimeError after that many instructions, and what instructions raise."""
        instructions, operations, visits = self.program.instructions, self.operations, self.visits
        end = len(instructions)
        pc, active, waiting = 0, None, NOWHERE  # who runs, None: all; where the first of the others waits
        places = np.zeros(0)  # where each lane is, of those that do not run
        try:
            with np.errstate(all="ignore"):
                for _ in range(steps):
                    if pc >= waiting:
                        places[active] = pc
                        pc, active, waiting = _lowest(places)
                    if pc >= end:
                        return
                    instruction, operation = instructions[pc], operations[pc]
                    if operation is None:
                        operation = operations[pc] = decode(instruction.opcode)
                    mask = active
                    if instruction.predicate is not None:
                        mask = self.read(Register(instruction.predicate), PREDICATE)
                        mask = ~mask if instruction.negated else mask
                        mask = mask if active is None else mask & active
                        if not mask.any():
                            pc += 1
                            continue
                        if active is None and mask.all():
                            mask = None
                    visits[pc] += 1
                    if not operation.jump:
                        operation.execute(self, instruction.operands, mask)
                        pc += 1
                        continue
                    target = end if operation.jump == "exit" else instruction.operands[0].bits
                    if mask is active or (active is not None and (mask == active).all()):
                        pc = target
                        continue
                    if active is None:
                        places, active = np.zeros(self.size, np.int64), ~mask
                    places[active] = pc + 1
                    places[mask] = target
                    pc, active, waiting = _lowest(places)
        except NotImplementedError as error:
            raise NotImplementedError(f"{instructions[pc].text}: {error}") from None
        except (IndexError, ValueError, RuntimeError) as error:
            error.add_note(f"instruction {pc}: {instructions[pc].text}")
            raise
        raise RuntimeError(f"still running after {steps} instructions, at {instructions[pc].text}")


def _lowest(places: np.ndarray) -> tuple[int, np.ndarray | None, int]:
    """Where the lowest lanes are, which they are (None: all), and where the next ones wait."""
    pc = int(places.min())
    active = places == pc
    if active.all():
        return pc, None, NOWHERE
    return pc, active, int(places[~active].min())
