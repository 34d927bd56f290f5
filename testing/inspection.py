"""What a compiled kernel is made of: registers, spills, memory, instructions. Nothing here needs a GPU.

registers, spilled bytes        of ptxas -v on the PTX
instructions                    of cuobjdump -sass on the cubin, counted as written: straight-line kernels execute each once
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
    spilled: int  # bytes stored and loaded
    shared: int  # bytes
    tensor: int  # columns
    instructions: Counter  # SASS, by name without modifiers, NOP left out

    @property
    def count(self) -> int:
        return self.instructions.total()


def anatomy(kernel, capability: int) -> Anatomy:
    """Of what Triton has compiled for that capability. Raises ValueError with the words of ptxas if it refuses the PTX."""
    tool = (knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [tool, "-v", f"--gpu-name={name}", "--regAllocOptLevel=2", str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"ptxas for {name}: {done.stderr.strip().splitlines()[:1]}")
        cubin.write_bytes(kernel.asm["cubin"])
        listing = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", str(cubin)], capture_output=True, text=True, check=True)

    def number(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        return int(found[1]) if found else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    tensor = getattr(kernel.metadata, "tmem_size", 0) or 0
    return Anatomy(number(r"Used (\d+) registers"), spilled, kernel.metadata.shared, tensor, _instructions(listing.stdout))


def _instructions(sass: str) -> Counter:
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.M)
    return Counter(name for name in found if name != "NOP")
