"""A machine for PTX on a CPU.

    run_kernel(ptx, grid, arrays and numbers, bytes of shared memory)     a kernel as compiled for any architecture
    run_asm(text, constraints, arrays, ...)                               a string of inline assembly

Checked: bounds and alignment of every access, barriers and warp instructions that a part of the lanes reaches, and whatever is
not implemented, when it is reached. Not modelled: wgmma, tcgen05, TMA, mbarriers, clusters, timing, how much memory and how
many registers a chip has, and what ptxas makes of the PTX; races, since lanes run in lock step (lanes.py); the order of sums
inside mma, which are fp64 and rounded once.
"""

import numpy as np

from testing.lanes import PREDICATE, Lanes
from testing.memory import Global, Shared
from testing.opcode import UNSIGNED
from testing.ptx import Kernel, Program, parse_assembly, parse_kernel


def run_kernel(ptx: str, grid: tuple[int, ...], args: list, smem: int, nwarps: int | None = None, steps: int = 10**7) -> Lanes:
    """Launches the one kernel of a PTX module; arrays are changed in place.

    grid: one to three sizes. args: of each parameter in order, a C-contiguous numpy array (a pointer to it; arrays may
    overlap), an int or a float. Triton's last two parameters, pointers to scratch memory, may be left out. smem: bytes of
    dynamic shared memory. nwarps: of a CTA, where the module has no .reqntid.

    Gives the machine at the end: `.approx` and `.count` say what was executed (see Lanes). Raises NotImplementedError with the
    text of an instruction that is not implemented; IndexError and ValueError for accesses (memory.py); RuntimeError for
    barriers and warp instructions reached by a part of the lanes, and after `steps` instructions; TypeError, ValueError and
    OverflowError for arguments.
    """
    kernel = parse_kernel(ptx)
    if not kernel.threads and not nwarps:
        raise ValueError("no .reqntid in this PTX: give nwarps")
    threads = kernel.threads or 32 * nwarps
    if nwarps and threads != 32 * nwarps:
        raise ValueError(f"{nwarps} warps, the kernel has {threads} threads")
    shape = (*map(int, grid), 1, 1)[:3]
    memory = Global([arg for arg in args if isinstance(arg, np.ndarray)])
    lanes = Lanes(kernel.program, shape[0] * shape[1] * shape[2] * threads, threads)
    lanes.parameters = _parameters(kernel, args, memory)
    if not lanes.size:
        return lanes
    ctas = lanes.place(shape)
    addresses, static = _shared(kernel.program)
    lanes.registers |= {name: np.full(lanes.size, address, np.uint64) for name, address in addresses.items()}
    lanes.spaces = {"global": memory, "shared": Shared(static + smem, ctas, lanes.size // threads)}
    lanes.run(steps)
    memory.write_back()
    return lanes


def _parameters(kernel: Kernel, args: list, memory: Global) -> dict[str, int]:
    """Name -> bits."""
    missing = kernel.parameters[len(args) :]
    if len(args) > len(kernel.parameters) or len(missing) > 2 or any(kind not in ("u64", "b64") for kind, _ in missing):
        raise TypeError(f"{len(args)} arguments for {len(kernel.parameters)} parameters of {kernel.name}")
    bits = {name: 0 for _, name in missing}
    arrays = 0
    for (kind, name), arg in zip(kernel.parameters, args, strict=False):
        width = int(kind[1:])
        if isinstance(arg, np.ndarray):
            if width != 64:
                raise TypeError(f"an array for {name} of type {kind}")
            bits[name] = memory.address(arrays)
            arrays += 1
        elif isinstance(arg, float | np.floating):
            if width not in (32, 64) or kind[0] in "us":
                raise TypeError(f"a float for {name} of type {kind}")
            bits[name] = int((np.float32(arg) if width == 32 else np.float64(arg)).view(UNSIGNED[width]))
        else:
            if not -(2 ** (width - 1)) <= int(arg) < 2**width:
                raise OverflowError(f"{arg} for {name} of type {kind}")
            bits[name] = int(arg) & (2**width - 1)
    return bits


def _shared(program: Program) -> tuple[dict[str, int], int]:
    """Addresses of the shared arrays, and where those of fixed size end: there begins the one whose size the launch gives."""
    addresses, end = {}, 0
    for name, (size, alignment) in sorted(program.shared.items(), key=lambda item: not item[1][0]):
        end = -(-end // alignment) * alignment
        addresses[name] = end
        end += size
    return addresses, end


REGISTER = {"r": 32, "f": 32, "h": 16, "l": 64, "d": 64, "b": 1}


def run_asm(asm: str, constraints: str, args: list[np.ndarray], out_bits: list[int], pack: int) -> list[np.ndarray]:
    """What tl.inline_asm_elementwise makes of arrays: outputs [n] of those widths, unsigned.

    constraints: as there, "=r,f,f"; outputs first. args: unsigned arrays [n] of 8 to 64 bits, n a multiple of `pack`, the
    number of elements a lane takes; those of fewer than 32 bits share registers, the first one in the lowest bits.

    Raises ValueError where the constraints do not fit, NotImplementedError with the text of an instruction that is not
    implemented.
    """
    letters = [letter.strip().lstrip("=&") for letter in constraints.split(",")]
    outputs = constraints.count("=")
    if any(letter not in REGISTER for letter in letters) or any("=" in c for c in constraints.split(",")[outputs:]):
        raise ValueError(f"constraints {constraints!r}")
    widths = tuple(REGISTER[letter] for letter in letters)
    if not args or any(arg.size % pack or arg.size != args[0].size for arg in args):
        raise ValueError(f"arrays of {[arg.size for arg in args]} elements, {pack} at a time")
    lanes = Lanes(parse_assembly(asm, widths), args[0].size // pack)
    groups = [(arg, some) for arg in args for some in _groups(8 * arg.dtype.itemsize, pack)]
    given = [(bits, some) for bits in out_bits for some in _groups(bits, pack)]
    if len(given) != outputs or len(groups) != len(letters) - outputs:
        raise ValueError(f"{len(given)} registers out and {len(groups)} in for constraints {constraints!r}")
    for i, (arg, some) in enumerate(groups, outputs):
        lanes.registers[f"%op{i}"] = _packed(arg.reshape(lanes.size, pack)[:, some], widths[i])
    lanes.run(10**7)
    found = [_unpacked(lanes.registers[f"%op{i}"], bits)[:, : some.stop - some.start] for i, (bits, some) in enumerate(given)]
    results = []
    for bits in out_bits:
        count = len(_groups(bits, pack))
        results.append(np.concatenate(found[:count], 1).reshape(-1))
        found = found[count:]
    return results


def _groups(bits: int, pack: int) -> list[slice]:
    """Which of `pack` elements share a register."""
    size = max(1, 32 // bits)
    return [slice(i, min(i + size, pack)) for i in range(0, pack, size)]


def _packed(elements: np.ndarray, width: int) -> np.ndarray:
    """[lanes, several] unsigned -> a register of that width, the first in the lowest bits."""
    if width == 1:
        return elements[:, 0].astype(bool)
    bits = 8 * elements.dtype.itemsize
    if elements.shape[1] * bits > width:
        raise ValueError(f"{elements.shape[1]} elements of {bits} bits for a register of {width}")
    register = np.zeros((len(elements), width // bits), UNSIGNED[bits])
    register[:, : elements.shape[1]] = elements.view(UNSIGNED[bits])
    return register.view(UNSIGNED[width])[:, 0]


def _unpacked(register: np.ndarray, bits: int) -> np.ndarray:
    """Its elements of that width, unsigned [lanes, several]."""
    if register.dtype == PREDICATE:
        return register[:, None].astype(UNSIGNED[bits])
    if 8 * register.dtype.itemsize < bits:
        raise ValueError(f"elements of {bits} bits from a register of {8 * register.dtype.itemsize}")
    return np.ascontiguousarray(register).view(UNSIGNED[bits]).reshape(len(register), -1)
