"""Fusing: run an elementwise function eagerly, or as one compiled loop, with the same bits.

A unit is a module-level function of tensors and sizes whose keyword arguments are constants, hashable. It is traced once, with
sizes as symbols, and compiled by Inductor, the compiler of torch.compile, to C++ (on a CPU) or Triton (on a GPU), which is
cached on disk between runs. One trace serves all sizes, or all for which the unit takes the same way: no step compiles again.
(torch.compile does that too, but takes 45 us a call to make sure of it where this takes 15, and an NVFP4 Linear makes 22 calls
a step: it was 0.8 ms of the 25 ms that one of 1024 x 1024 took with 2048 tokens.)

Why the bits stay: units are fp32 and int32 arithmetic without sums over more than two terms in any but stated order;
Inductor contracts no multiply-add by default on a CPU, keeps subnormals, and drops only casts fp32 -> BF16 -> fp32 within a
loop, which no unit relies on for rounding. tests/test_fused.py compares all of it.
One hazard to know: GCC 12.2 at -O3 on AVX-512 machines inverts the mask of `where(int32 <= c, int, int)` with 32-byte
vectors (the intrinsics it is made of, alone, show it too). Units therefore compare int32 by < and > when they choose ints.
"""

import functools
import platform
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental import _config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

# Inductor's C++ takes a view between fp32 and int32 through memory in 32-byte copies. With 64-byte vectors each then
# waits for two stores to finish; 32-byte vectors made the whole NVFP4 quantiser 1.5 times as fast on an AVX-512 machine.
# Units without such views take what the machine has: Philox then runs 1.6 to 2.4 times as fast, bytes load 4 times as fast.
# `unit.wide`, a function of the unit's constants, says when.
NARROW = {"cpp.simdlen": 256} if platform.machine() in ("x86_64", "AMD64") else {}
# Of its Triton: IEEE divisions, and no multiply-add where there are a product and a sum (as documented).
OPTIONS = {"eager_numerics.division_rounding": True, "emulate_precision_casts": True} if torch.cuda.is_available() else {}
_on = False
_here = threading.local()  # .tracing: whether this thread traces a unit
_lock = threading.RLock()


def compiling() -> bool:
    """Whether what runs is being traced: as a unit, or within a larger graph by torch.compile."""
    return torch.compiler.is_compiling() or getattr(_here, "tracing", False)


def fuse(on: bool) -> str:
    """Compile units from now on, or stop doing so. Returns one line that says what runs and why.

    A process-wide switch that changes speed only; where nothing can be compiled the answer is eager.
    """
    global _on
    obstacle = _obstacle() if on else "as asked"
    _on = not obstacle
    if obstacle:
        return f"quantiser: eager, {obstacle}"
    return f"quantiser: fused by torch.compile ({'Triton' if torch.cuda.is_available() else 'C++'}), bit-equal to eager"


@functools.cache
def _obstacle() -> str:
    """Why nothing can be compiled here, or ""; found by trying."""
    ones = torch.ones(32, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        _trace(_negated, [ones], {}).call(ones)
    except Exception as error:  # of the compiler, of Triton, or of torch: any of them means no
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
        hint = "; install g++ to fuse it" if "compiler" in reason else ""
        return f"since torch.compile fails here ({reason}{hint})"
    return ""


def _negated(x):
    return -x


def run(unit, *args, **constants):
    """unit(*args, **constants), fused if that is switched on and we are not being compiled already."""
    if compiling():
        return unit(*args, **constants)
    with torch.no_grad():
        if not _on:
            return unit(*args, **constants)
        args = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        place = unit, tuple(constants.items()), tuple(map(_kind, args))
        call = _fitting.get(place)
        if call is None:
            with _lock:
                call = _fitting[place] = _fit(*place, args)
        return call(*args)


class _Traced(NamedTuple):
    """A unit, compiled. fits: (sizes) -> whether they are those that the trace was made for."""

    fits: Callable[[list[int]], bool]
    call: Callable


_fitting: dict[tuple, Callable] = {}  # unit, constants, kinds of its arguments -> what was compiled for them
_traces: dict[tuple, list[_Traced]] = {}  # the same but for sizes -> all that have been traced


def _kind(a: Tensor | int | None) -> tuple | int | None:
    """All that a compiled unit may depend on of an argument, which is contiguous, but for its elements."""
    return (a.dtype, a.device, a.shape) if isinstance(a, Tensor) else a


def _fit(unit, constants: tuple, kinds: tuple, args: list) -> Callable:
    """A trace that fits these sizes, made now if there is none. (0 and 1 are no symbols to a trace, but numbers.)"""
    rough = ((*k[:2], *(min(n, 2) for n in k[2])) if isinstance(k, tuple) else k if k is None else min(k, 2) for k in kinds)
    traces = _traces.setdefault((unit, constants, *rough), [])
    for trace in traces:
        if trace.fits(_sizes([args[i] for i in _given(args)])):
            return trace.call
    traces.append(_trace(unit, args, dict(constants)))
    return traces[-1].call


def _given(args: list) -> list[int]:
    """Which arguments a trace has as inputs; the others are constants of it."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) or a not in (None, 0, 1)]


def _sizes(inputs: list) -> list[int]:
    return [n for a in inputs for n in (a.shape if isinstance(a, Tensor) else (a,))]


def _trace(unit, args: list, constants: dict) -> _Traced:
    given = _given(args)
    examples = [args[i].detach() if isinstance(args[i], Tensor) else args[i] for i in given]  # (no tensor twice: two inputs)

    def function(*inputs):
        filled = dict(enumerate(args)) | dict(zip(given, inputs, strict=True))
        return unit(*filled.values(), **constants)

    # (Sizes that are equal now need not be so later: no duck shapes.)
    duck, _config.use_duck_shape, _here.tracing = _config.use_duck_shape, False, True
    try:
        graph = make_fx(function, tracing_mode="symbolic")(*examples)
    finally:
        _config.use_duck_shape, _here.tracing = duck, False
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    wide = getattr(unit, "wide", lambda **_: False)(**constants)
    compiled = torch._inductor.compile(graph, inputs, OPTIONS | ({} if wide else NARROW))
    sizes = _sizes(inputs)
    symbols = [i for i, n in enumerate(sizes) if isinstance(n, torch.SymInt)]
    guards = graph.shape_env.produce_guards_expression([sizes[i] for i in symbols]) or "True"
    guards = re.sub(r"L\['t(\d+)'\]", lambda found: f"sizes[{symbols[int(found[1])]}]", guards)
    single = not isinstance(graph.graph.output_node().args[0], tuple | list)

    def call(*args):
        found = compiled(*[args[i] for i in given])
        return found[0] if single else found

    return _Traced(eval(f"lambda sizes: {guards}", dict(SYMPY_INTERP)), call)
