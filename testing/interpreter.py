"""Repairs of Triton 3.8's interpreter, so that a kernel means there what it means on a GPU. For tests; importing it applies
them.

TRITON_INTERPRET=1 must be set before triton is imported: in such a process kernels are interpreted, in any other compiled.
What the interpreter does, what it should do, as found by running both (triton issue 8322, open in September 2026, knows of
the casts):

    fp32 -> bf16                   truncated                      nearest even
    bf16, fp8 arithmetic, dot      on the bit patterns            in fp32, rounded once
    fp32 -> e4m3, e5m2             ties away, carries lost,       nearest even, saturating, as cvt.rn.satfinite
                                   no subnormals, no saturation
    e4m3, e5m2 -> fp32             NaN codes become numbers       NaN
    dot_scaled, e4m3 scales        read as e8m0                   as e4m3
    fma                            two roundings                  one
    inline PTX                     refused                        executed (machine.py)
    integers that wrap             an assertion                   wrap, as everywhere
    device_assert                  ignored                        raises AssertionError

Left out: libdevice; autotuning over more than one configuration; pointers to e8m0 and e2m1 (pass uint8 views).
"""

import dataclasses
import os

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from testing.machine import run_asm
from testing.numbers import (
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    fma32,
    from_e4m3,
    from_e5m2,
    to_e4m3,
    to_e5m2,
)

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("testing.interpreter: set TRITON_INTERPRET=1 before triton is imported, in a process of its own")

ir = interpreter._ir
SMALL = tl.bfloat16, tl.float8e4nv, tl.float8e5
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def widened(data: np.ndarray, dtype) -> np.ndarray:
    """What the bit patterns of a tile stand for, fp32."""
    data = np.ascontiguousarray(data)
    if dtype.scalar in SMALL:
        return {tl.bfloat16: bf16_to_f32, tl.float8e4nv: from_e4m3, tl.float8e5: from_e5m2}[dtype.scalar](data)
    return data.astype(np.float32)


def narrowed(x: np.ndarray, dtype, toward_zero: bool = False) -> np.ndarray:
    """fp32 -> what the interpreter keeps of a tile of this dtype."""
    if dtype == tl.bfloat16:
        return f32_to_bf16(x, toward_zero)
    if dtype == tl.float8e4nv:
        return to_e4m3(x)
    if dtype == tl.float8e5:
        return to_e5m2(x)
    if dtype == tl.float16:
        return f32_to_f16(x, toward_zero).view(np.float16)
    return x.astype(interpreter._get_np_dtype(dtype))


def cast_impl(self, source, dtype, toward_zero: bool = False):
    old, new = source.dtype.scalar, dtype.scalar
    with np.errstate(all="ignore"):
        if old in SMALL or new in SMALL:
            x = widened(source.data, old) if old.is_floating() else source.data.astype(np.float32)
            return TensorHandle(narrowed(x, new, toward_zero).reshape(source.data.shape), new)
        return TensorHandle(source.data.astype(interpreter._get_np_dtype(dtype)), new)


def create_fp_to_fp(self, source, dtype, mode):
    return cast_impl(self, source, dtype, mode == ir.ROUNDING_MODE.RTZ)


def binary_op(self, a, b, op):
    dtype = a.dtype.scalar
    with np.errstate(all="ignore"):
        if dtype not in SMALL or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return _binary_op(self, a, b, op)
        found = op(widened(a.data, dtype), widened(b.data, b.dtype))
        if found.dtype == bool:
            return TensorHandle(found, tl.int1)
        return TensorHandle(narrowed(found, dtype), dtype)


def unary_op(self, a, op):
    dtype = a.dtype.scalar
    if dtype not in SMALL:
        return _unary_op(self, a, op)
    return TensorHandle(narrowed(op(widened(a.data, dtype)), dtype), dtype)


def create_fma(self, x, y, z):
    if z.data.dtype != np.float32:
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    return TensorHandle(fma32(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)


def create_dot(self, a, b, d, precision, imprecise):
    x, y = (widened(t.data, t.dtype) if t.dtype.is_floating() else t.data.astype(np.int32) for t in (a, b))
    return TensorHandle((np.matmul(x, y) + d.data).astype(d.data.dtype), d.dtype.scalar)


def create_dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, fast_math, lhs_k, rhs_k, acc):
    def values(tile, fmt, axis):
        if fmt == ir.ScaleDotElemTypeTY.E2M1:
            return interpreter._unpack_e2m1(tile.data, axis)
        return widened(tile.data, tile.dtype)

    def scales(tile):
        if tile.dtype.scalar == tl.float8e4nv:
            return from_e4m3(tile.data)
        return np.ldexp(np.float32(1), tile.data.view(np.uint8).astype(np.int32) - 127)

    x, y = values(lhs, lhs_format, -1 if lhs_k else -2), values(rhs, rhs_format, -2 if rhs_k else -1)
    if lhs_scale is not None:
        s = scales(lhs_scale)
        x = x * np.repeat(s, x.shape[-1] // s.shape[-1], -1)
    if rhs_scale is not None:
        s = scales(rhs_scale)
        y = y * np.repeat(s, y.shape[-2] // s.shape[-1], -1).swapaxes(-1, -2)
    return TensorHandle((np.matmul(x, y) + acc.data).astype(np.float32), tl.float32)


class Results:
    """What Triton expects of an operation with several results."""

    def __init__(self, handles: list):
        self.handles = handles

    def get_result(self, i: int):
        return self.handles[i]


def create_inline_asm(self, asm, constraints, values, types, pure, pack):
    shape = np.broadcast_shapes(*[v.data.shape for v in values])
    arrays = [np.ascontiguousarray(np.broadcast_to(v.data, shape)).reshape(-1) for v in values]
    arrays = [a.astype(np.uint8) if a.dtype == bool else a.view(UNSIGNED[a.dtype.itemsize]) for a in arrays]
    count, dtypes = arrays[0].size, [t.scalar for t in types]
    if rest := -count % pack:
        arrays = [np.concatenate([a, np.zeros(rest, a.dtype)]) for a in arrays]
    made = run_asm(asm, constraints, arrays, [max(8, t.primitive_bitwidth) for t in dtypes], pack)
    kept = [m[:count].view(interpreter._get_np_dtype(t)).reshape(shape) for m, t in zip(made, dtypes, strict=True)]
    return Results([TensorHandle(m, t) for m, t in zip(kept, dtypes, strict=True)])


def reduce(self, tiles):
    """Of bf16 and fp8 tiles on their values."""
    if not any(t.dtype in SMALL for t in tiles):
        return _reduce(self, tiles)

    def up(t):
        handle = TensorHandle(widened(t.handle.data, t.dtype), tl.float32)
        return tl.core.tensor(handle, tl.block_type(tl.float32, list(t.shape)))

    made = _reduce(self, tuple(up(t) if t.dtype in SMALL else t for t in tiles))
    back = []
    for out, t in zip(made if isinstance(made, list | tuple) else (made,), tiles, strict=True):
        if t.dtype in SMALL and out.dtype == tl.float32:
            shape = tl.block_type(t.dtype, list(out.shape)) if out.type.is_block() else t.dtype
            out = tl.core.tensor(TensorHandle(narrowed(out.handle.data, t.dtype), t.dtype), shape)
        back.append(out)
    return back


_binary_op, _unary_op, _reduce = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, ReduceOps.apply_impl
for repair in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot, create_dot_scaled, create_inline_asm):
    setattr(InterpreterBuilder, repair.__name__, repair)
ReduceOps.apply_impl = reduce
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.InterpreterOptions(), debug=True, sanitize_overflow=False
)
