"""Global and shared memory of a launch: bytes, addresses, and the checks of every access.

Global memory holds copies of the arrays that a launch is given, each at a multiple of 256 bytes, with at least 256 bytes
between two that belong to nobody; arrays that overlap keep their distance and stay one piece. Shared memory is one piece for
each CTA, which begins at address 0. An access of n bytes must lie within one array and at a multiple of n (PTX ISA).

Left out: generic addresses of shared memory, local and constant memory, and races: lanes act in order, the last write stays.
"""

import bisect

import numpy as np

from testing.opcode import UNSIGNED

BASE = 0x7000_0000_0000
GAP = 256
# complex128 is 16 bytes that numpy moves at once.
ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Space:
    """A buffer of bytes and what lies where in it."""

    name = ""
    buffer: np.ndarray

    def locate(self, addresses: np.ndarray, lanes: np.ndarray | slice, size: int, alignment: int) -> np.ndarray:
        """Addresses, uint64, of accesses of `size` bytes by these lanes -> offsets in the buffer, int64.

        Raises IndexError and ValueError, which name the first address that is wrong."""
        raise NotImplementedError

    def load(self, offsets: np.ndarray, count: int, bits: int) -> np.ndarray:
        """Checked offsets -> [count, lanes], unsigned integers of that many bits."""
        size = count * bits // 8
        if count == 1 or size not in ITEMS:
            elements = self.buffer.view(UNSIGNED[bits])
            return elements[offsets // (bits // 8) + np.arange(count)[:, None]]
        items = self.buffer.view(ITEMS[size])[offsets // size]
        return np.ascontiguousarray(items.view(UNSIGNED[bits]).reshape(-1, count).T)

    def store(self, offsets: np.ndarray, values: list[np.ndarray]) -> None:
        """values, [lanes] each and side by side, to checked offsets; of two lanes that write one place the later stays."""
        dtype, count = values[0].dtype, len(values)
        size = count * dtype.itemsize
        if count == 1:
            self.buffer.view(dtype)[offsets // size] = values[0]
        elif size in ITEMS:
            self.buffer.view(ITEMS[size])[offsets // size] = np.stack(values, 1).view(ITEMS[size])[:, 0]
        else:
            self.buffer.view(dtype)[offsets[:, None] // dtype.itemsize + np.arange(count)] = np.stack(values, 1)

    def _aligned(self, offsets: np.ndarray, addresses: np.ndarray, alignment: int) -> None:
        wrong = offsets & (alignment - 1)
        if wrong.any():
            first = int(addresses[wrong.nonzero()[0][0]])
            raise ValueError(f"misaligned access of {self.name} memory at {first:#x}, no multiple of {alignment}")


class Global(Space):
    """Copies of arrays; `address(i)` of the i-th, and `write_back` into all of them."""

    name = "global"

    def __init__(self, arrays: list[np.ndarray]):
        """Raises ValueError for an array that is not C-contiguous."""
        for array in arrays:
            if not array.flags.c_contiguous:
                raise ValueError(f"an array of shape {array.shape} is not contiguous")
        self.arrays = [array.reshape(-1).view(np.uint8) for array in arrays]
        begins = [array.__array_interface__["data"][0] for array in arrays]  # in the memory of this process
        pieces: list[list[int]] = []
        end = 0
        for i in sorted(range(len(arrays)), key=lambda i: (not self.arrays[i].size, begins[i])):
            if not self.arrays[i].size or not pieces or begins[i] >= end:
                pieces.append([])
                end = begins[i]
            pieces[-1].append(i)
            end = max(end, begins[i] + self.arrays[i].size)
        self.offsets = [0] * len(arrays)
        self.starts: list[int] = []
        self.ends: list[int] = []
        free = 0
        for piece in sorted(pieces, key=min):  # in the order of the arguments, whatever process this is
            for i in piece:
                self.offsets[i] = free + begins[i] - begins[piece[0]]
            self.starts.append(free)
            self.ends.append(max(self.offsets[i] + self.arrays[i].size for i in piece))
            free = -(-(self.ends[-1] + GAP) // GAP) * GAP
        self.buffer = np.zeros(free + GAP, np.uint8)
        for offset, array in zip(self.offsets, self.arrays, strict=True):
            self.buffer[offset : offset + array.size] = array

    def address(self, i: int) -> int:
        return BASE + self.offsets[i]

    def write_back(self) -> None:
        for offset, array in zip(self.offsets, self.arrays, strict=True):
            if array.size and array.flags.writeable:
                array[:] = self.buffer[offset : offset + array.size]

    def locate(self, addresses: np.ndarray, lanes: np.ndarray | slice, size: int, alignment: int) -> np.ndarray:
        offsets = (addresses - np.uint64(BASE)).view(np.int64)
        if not offsets.size:
            return offsets
        low, high = int(offsets.min()), int(offsets.max()) + size
        piece = bisect.bisect_right(self.starts, low) - 1
        if piece < 0 or high > self.ends[piece]:  # of several pieces, or none
            pieces = np.searchsorted(self.starts, offsets, "right") - 1
            ends = np.array([*self.ends, -1])[pieces]
            outside = (pieces < 0) | (offsets + size > ends)
            if outside.any():
                first = int(addresses[outside.nonzero()[0][0]])
                raise IndexError(self._where(first, size, int(outside.sum())))
        self._aligned(offsets, addresses, alignment)
        return offsets

    def _where(self, address: int, size: int, lanes: int) -> str:
        words = f"out-of-bounds access of {size} bytes of global memory at {address:#x} ({lanes} lanes)"
        before = [i for i, offset in enumerate(self.offsets) if offset <= address - BASE]
        if not before:
            return words
        nearest = max(before, key=lambda i: self.offsets[i])
        offset = address - self.address(nearest)
        return f"{words}: byte {offset} of array {nearest}, which has {self.arrays[nearest].size}"


class Shared(Space):
    """`size` bytes for each CTA; `ctas`: of each lane, int64."""

    name = "shared"

    def __init__(self, size: int, ctas: np.ndarray, count: int):
        self.size = size
        self.stride = -(-max(size, 1) // GAP) * GAP
        self.begins = ctas * self.stride
        self.buffer = np.zeros(self.stride * count, np.uint8)

    def locate(self, addresses: np.ndarray, lanes: np.ndarray | slice, size: int, alignment: int) -> np.ndarray:
        offsets = (addresses & np.uint64(0xFFFFFFFF)).view(np.int64)
        if offsets.size and int(offsets.max()) + size > self.size:
            first = int(offsets[(offsets + size > self.size).nonzero()[0][0]])
            raise IndexError(f"out-of-bounds access of {size} bytes of shared memory at {first:#x}, there are {self.size}")
        self._aligned(offsets, offsets, alignment)
        return offsets + self.begins[lanes]
