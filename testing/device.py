"""A GPU that is not there: kernels that are launched are compiled for an architecture, and their PTX is executed (machine.py).

    with emulated(100) as launches:
        host_function(cpu_tensors)      every kernel[grid](...) within runs as on an sm_100a; the tensors get the numbers

Arguments are specialised (alignment, sizes that are 1) and options chosen by Triton itself, as on a real launch, and host
code that asks for the architecture is told this one. compiled(100) only compiles: for what the machine cannot execute, and
for inspection.

A process is either that or Triton's interpreter (interpreter.py): TRITON_INTERPRET must not be set.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver, jit

from testing.machine import run_kernel


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    kernel: Any  # triton's CompiledKernel
    constants: dict[str, Any]
    lanes: Any  # what run_kernel gives, or None


class Absent(DriverBase):
    """A driver of a GPU of that compute capability which is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("no timing without a GPU")

    def get_current_device(self):  # kernels are cached by device: one for each architecture
        return self.capability

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiled(capability: int, execute: bool = False) -> Iterator[list[Launch]]:
    """Launches within are compiled for this compute capability (80, 90, 100, ...) and listed, and executed where asked.

    Raises RuntimeError in the interpreter, whose functions cannot be compiled."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels of this process are the interpreter's and cannot be compiled")
    launches: list[Launch] = []
    run, before = jit.JITFunction.run, driver._active

    def launch(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        names = inspect.signature(self.fn).bind(*args, **{k: v for k, v in options.items() if k in self.arg_names}).arguments
        constants = {name: names[name] for name, kind in kernel.src.signature.items() if kind == "constexpr"}
        shape = grid(names) if callable(grid) else grid
        lanes = None
        if execute:
            passed = [_argument(names[n]) for n, kind in kernel.src.signature.items() if kind != "constexpr"]
            lanes = run_kernel(kernel.asm["ptx"], tuple(shape), passed, kernel.metadata.shared)
        launches.append(Launch(self.__name__, tuple(shape), kernel, constants, lanes))
        return kernel

    jit.JITFunction.run = launch
    driver.set_active(Absent(capability))
    try:
        yield launches
    finally:
        jit.JITFunction.run = run
        driver._active = before


def emulated(capability: int):
    """`compiled`, and executed."""
    return compiled(capability, execute=True)


def _argument(value) -> np.ndarray | int | float:
    """A tensor as an array that shares its memory: its bits, where numpy has no such floats."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_contiguous():
        raise ValueError(f"tensor {tuple(value.shape)} with strides {value.stride()}: kernels are given contiguous ones")
    small = value.dtype.is_floating_point and value.dtype not in (torch.float16, torch.float32, torch.float64)
    return value.detach().view((torch.uint8 if value.itemsize == 1 else torch.int16) if small else value.dtype).numpy()
