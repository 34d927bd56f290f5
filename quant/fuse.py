"""Fusing: run an elementwise function eagerly, or as one torch.compile'd loop, with the same bits.

A unit is a module-level function of tensors and sizes whose keyword arguments are constants, hashable (and no numbers that
matter to speed: torch.compile makes an int a size that it does not know). The C++ (on a
CPU) or Triton (on a GPU) that torch.compile makes of it is cached on disk between runs, and one unit serves all sizes
(`dynamic=True`), so no step recompiles.

Why the bits stay: units are fp32 and int32 arithmetic without sums over more than two terms in any but stated order;
torch.compile contracts no multiply-add by default on a CPU, keeps subnormals, and drops only casts fp32 -> BF16 -> fp32,
which no unit relies on for rounding (formats.to_bfloat16 rounds by integers). tests/test_fused.py compares all of it.
One hazard to know: GCC 12.2 at -O3 on AVX-512 machines inverts the mask of `where(int32 <= c, int, int)` with 32-byte
vectors (the intrinsics it is made of, alone, show it too). Units therefore compare int32 by < and > when they choose ints.
"""

import functools
import platform
import types

import torch
from torch.fx.experimental import _config

# torch.compile's C++ takes a view between fp32 and int32 through memory in 32-byte copies. With 64-byte vectors each then
# waits for two stores to finish; 32-byte vectors made the whole NVFP4 quantiser 1.5 times as fast on an AVX-512 machine.
# Units without such views take what the machine has: Philox then runs 1.6 to 2.4 times as fast, bytes load 4 times as fast.
# `unit.wide`, a function of the unit's constants, says when.
OPTIONS = {"cpp.simdlen": 256} if platform.machine() in ("x86_64", "AMD64") else {}
_on = False


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
    """Why torch.compile cannot be used here, or ""; found by using it."""
    cuda = torch.cuda.is_available()
    try:
        _compiled(_negated, (), ())(torch.ones(32, device="cuda" if cuda else "cpu"))
    except Exception as error:  # of the compiler, of Triton, or of torch: any of them means no
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
        hint = "; install g++ to fuse it" if "compiler" in reason else ""
        return f"since torch.compile fails here ({reason}{hint})"
    return ""


@functools.cache
def _compiled(unit, constants: tuple, kind: tuple):
    # A code object of its own for all that torch.compile specialises on: it counts recompilations per code object.
    clone = types.FunctionType(unit.__code__.replace(co_name=unit.__name__), unit.__globals__)
    clone.__kwdefaults__ = dict(constants)
    wide = getattr(unit, "wide", lambda **_: False)(**dict(constants))
    return torch.compile(clone, fullgraph=True, dynamic=True, options={} if wide else OPTIONS)


def _negated(x):
    return -x


def run(unit, *args, **constants):
    """unit(*args, **constants), fused if that is switched on and we are not being compiled already."""
    if torch.compiler.is_compiling():
        return unit(*args, **constants)
    with torch.no_grad():
        if not _on:
            return unit(*args, **constants)
        # .data: what a tensor is a view of, and whether it has a gradient, would be reasons to compile again.
        args = [a.data if isinstance(a, torch.Tensor) else a for a in args]
        kind = tuple((a.dtype, *(n == 1 for n in a.shape)) for a in args if isinstance(a, torch.Tensor))
        duck, _config.use_duck_shape = _config.use_duck_shape, False
        try:
            return _compiled(unit, tuple(constants.items()), kind)(*args)
        finally:
            _config.use_duck_shape = duck
