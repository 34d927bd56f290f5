"""What a compiled kernel is made of: registers, spills, memory, instructions. Nothing here needs a GPU.

registers, spilled bytes        of cuobjdump -res-usage on the cubin: a stack, which our kernels have for spills alone
instructions                    of cuobjdump -sass, counted as written: straight-line kernels execute each once
shared, tensor memory           of Triton's metadata; limits are the chips', which a driver would check and nobody does here
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from triton import knobs

# Shared memory a block may have, bytes; tensor memory, columns (CUDA C++ programming guide, technical specifications).
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TENSOR_COLUMNS = 512


class Anatomy(NamedTuple):
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    tensor: int  # columns
    instructions: Counter  # SASS, by name without modifiers, NOP left out

    @property
    def count(self) -> int:
        return self.instructions.total()


def anatomy(kernel) -> Anatomy:
    """Of what Triton has compiled."""
    tensor = getattr(kernel.metadata, "tmem_size", 0) or 0
    return Anatomy(*resources(kernel), kernel.metadata.shared, tensor, _instructions(_dumped(kernel, "-sass")))


def resources(kernel) -> tuple[int, int]:
    """Registers, and bytes of a thread's stack: hundred times as fast as the instructions."""
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", _dumped(kernel, "-res-usage"))}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _dumped(kernel, what: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> Counter:
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.M)
    return Counter(name for name in found if name != "NOP")
