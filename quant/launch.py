"""The operators that launch the kernels, and specs as what these take. They need Triton; quant/kernel.py and quant/native.py,
which do not, import them when there is something to launch.

    narrow::quantize(x, rows, cols, ...)    specs as JSON, since an operator takes tensors, numbers and strings only; -> codes,
                                            scale and outer scale of each side that is not ""
    narrow::dequantise(x, index, ...)       codes of one or more specs -> values, of each unit by the one that index names
    narrow::errors(x, codes, ...)           how far they are from x, two fp64 numbers for each unit
    narrow::matmul(a, b, ...)               the product of two quantised operands, each codes, scales, factor
"""

import json
import struct
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kernels import capability, target_at
from kernels.amax import Look, amax
from kernels.dequantise import Candidate, Layout, dequantise
from kernels.errors import errors
from kernels.matmul import matmul, native, obstacle, way
from kernels.numerics import Float
from kernels.prepare import prepare
from kernels.quantize import Given, Scale, Side, quantize
from quant.formats import FORMATS
from quant.fuse import compiling
from quant.qtensor import SPECS, tiled
from quant.random import constants
from quant.rounding import random_bits
from quant.scaling import Scales, block_scales, scale_codes, threshold
from quant.spec import QuantSpec
from quant.transform import signs


@lru_cache
def float_of(name: str) -> Float:
    f = FORMATS[name]
    nan = f.max_code if f.nan_code is None else f.nan_code
    parts = 2.0 ** (24 - (f.emin - f.mantissa_bits))
    return Float(name, f.bits, f.exponent_bits, f.mantissa_bits, f.emin + 127, f.max_code, nan, f.signed, parts)


@lru_cache
def side_of(spec: QuantSpec) -> Side:
    """The spec, one without an `obstacle` (quant/kernel.py), as the kernels take it."""
    scale, target = spec.scale, spec.scale.target or spec.element.max
    if spec.block[1] == -1:
        made = Scale("line" if spec.block[0] == 1 else "tensor")
    elif scale.rule == "gam":
        made = Scale("gam", target=target)
    elif scale.format == "e8m0":
        T, up = threshold(spec)
        (bits,) = struct.unpack("<i", struct.pack("<f", T))
        mantissa = bits & 0x7FFFFF
        made = Scale("e8m0", add=0x7FFFFF - mantissa if up else -mantissa, less=(bits >> 23) - 127, multiplier=scale.multiplier)
    elif scale.format == "fp32":
        made = Scale("fp32", target=target)
    else:
        made = Scale("float", float_of(scale.format), scale.outer == "none", target, scale.order == "g1")
    rounding = "stochastic" if spec.stochastic else spec.rounding
    block, square = max(spec.block[1], 0), spec.block[0] == spec.block[1] > 0
    return Side(float_of(spec.format), block, square, made, rounding, random_bits(spec.rounding), spec.hadamard)


@lru_cache
def _known_bits(size: int, kind: str) -> int:
    """`_sign_bits` of signs that are the same in every step, as one int32."""
    bits = sum(1 << i for i, s in enumerate(signs(size, kind, None, "cpu").tolist()) if s < 0)
    return bits - (bits >> 31 << 32)


def _sign_bits(spec: QuantSpec, words: Tensor | None, device) -> Tensor:
    """int32 [1], bit i set where sign i is -1."""
    if not spec.hadamard or spec.signs != "fresh":
        return constants((_known_bits(spec.hadamard or 1, spec.signs if spec.hadamard else "none"),), torch.int32, device)
    s = signs(spec.hadamard, spec.signs, words, device) < 0
    powers = constants(tuple(1 << i if i < 31 else -(1 << 31) for i in range(s.numel())), torch.int32, s.device)
    return torch.where(s, powers, 0).sum(dtype=torch.int32).reshape(1)


def _given(spec: QuantSpec, found: Tensor | None, keys: list[Tensor], sign: Tensor) -> tuple[Given, Tensor, Tensor]:
    """-> what the kernel needs; scale codes and outer scale where they are made here, else empty."""
    side, device = side_of(spec), sign.device
    words, _, held = keys
    empty = torch.empty(0, device=device)
    factor = table = constants((0.0,), torch.float32, device)
    made = outer = empty
    if side.scale.kind == "float" or side.scale.kind == "gam":
        fmt = FORMATS[spec.scale.format]
        target = 1.0 if side.scale.alone else spec.scale.outer_target or fmt.max
        amax_ = constants((1.0,), torch.float32, device) if found is None else found
        table, factor, outer = prepare(amax_, side.scale, target, held if held.numel() else None)
        outer = empty if side.scale.alone else outer.reshape(())
    elif side.scale.kind in ("tensor", "line"):
        a = found.reshape(-1, 1, 1, 1)
        enc, decoded, whole = Scales(*block_scales(a, spec, 2, held if held.numel() else None))
        factor, made = enc.reshape(-1), scale_codes(decoded, spec.scale).reshape(-1, 1)
        made = made.view(torch.uint8) if made.is_floating_point() and made.itemsize == 1 else made
        outer = empty if whole is None else whole
    elif spec.scale.multiplier != 1:
        outer = torch.full((), 1 / spec.scale.multiplier, device=device)
    return Given(table, factor.contiguous(), words, sign), made, outer


def look_of(spec: QuantSpec | None) -> Look | None:
    """What must be known of the whole operand before its blocks."""
    if spec is None:
        return None
    kind = side_of(spec).scale.kind
    if kind == "line":
        return Look("line", spec.hadamard)
    return Look("tensor", spec.hadamard) if kind in ("tensor", "gam") or spec.scale.outer == "tensor" else None


@lru_cache
def _spec(text: str) -> QuantSpec | None:
    return SPECS.validate_python(json.loads(text)) if text else None


_functions: dict[Callable, Callable] = {}  # operator -> what it is made of


def operator(name: str) -> Callable:
    """Registers a function as an operator."""

    def register(function: Callable):
        made = torch.library.custom_op(f"narrow::{name}", mutates_args=())(function)
        _functions[made] = function
        return made

    return register


def call(made: Callable, *given):
    """The operator where something is traced, else its function: dispatching costs the host a quarter of a launch."""
    if compiling():
        return made(*given)
    with torch.no_grad():
        return _functions[made](*given)


@operator("quantize")
def quantize_op(
    x: Tensor, rows: str, cols: str, row_keys: list[Tensor], col_keys: list[Tensor], rs: bool = False
) -> list[Tensor]:
    """x [M, K] -> codes, scale codes and outer scale (empty where there is none) of each side. keys: words (int64 [5]), those
    of the signs, an amax held in place of the operand's own; empty where there is none. rs: round by cvt.rs, see kernel.py."""
    x = (x if x.dtype == torch.bfloat16 else x.to(torch.float32)).contiguous()
    x = x.clone() if x.storage_offset() % 2 else x  # (BF16 is read as words of two)
    specs, keys, t = (_spec(rows), _spec(cols)), (row_keys, col_keys), target_at(capability(), rs)
    sign = [spec and _sign_bits(spec, k[1] if k[1].numel() else None, x.device) for spec, k in zip(specs, keys, strict=True)]
    looks = [look_of(spec) for spec in specs]
    same = looks[0] is not None and looks[0] == looks[1] == Look("tensor")  # one amax is that of both
    found = amax(x, looks[0], sign[0], None if same else looks[1], sign[1], t) if any(looks) else [None, None]
    given, out = [], []
    for spec, s, a, k in zip(specs, sign, [found[0], found[0] if same else found[1]], keys, strict=True):
        given.append(_given(spec, a, k, s) if spec else (None, None, None))
    sides = [side_of(spec) if spec else None for spec in specs]
    made = quantize(x, sides[0], given[0][0], sides[1], given[1][0], t)
    for turned, spec, (_, lines, outer), pair in zip((False, True), specs, given, made, strict=True):
        if spec is None:
            continue
        codes, scale = pair
        square = turned and side_of(spec).square  # (its scales are those of the rows, and an operator gives no tensor twice)
        scale = lines if lines.numel() else scale.t().clone(memory_format=torch.contiguous_format) if square else scale
        out += [codes, scale, outer]
    return out


@quantize_op.register_fake
def _(x, rows, cols, row_keys, col_keys, rs=False):
    out = []
    for spec, (R, K) in ((_spec(rows), x.shape), (_spec(cols), x.shape[::-1])):
        if spec is None:
            continue
        (b0, b1), scale = spec.blocks_of(R, K), spec.scale
        outer = scale.outer == "tensor" or scale.multiplier != 1
        out += [
            x.new_empty(R, K // 2 if spec.element.bits <= 4 else K, dtype=torch.uint8),
            x.new_empty(R // b0, K // b1, dtype=torch.float32 if scale.format == "fp32" else torch.uint8),
            x.new_empty(() if outer else (0,), dtype=torch.float32),
        ]
    return out


@lru_cache
def layout_of(spec: QuantSpec) -> Layout:
    """How the codes of a spec without an `obstacle` lie, or BF16 unscaled."""
    scale, (rows, block) = spec.scale, spec.block
    if scale.format == "none":
        return Layout()
    left = spec.leaves or scale.outer == "tensor" or scale.multiplier != 1
    factor = "line" if spec.leaves and rows != -1 else "tensor" if left else "none"
    made = None if scale.format == "fp32" else float_of(scale.format)
    return Layout(float_of(spec.format), made, max(rows, 0), max(block, 0), spec.leaves, spec.exact, factor)


@lru_cache
def _specs(text: str) -> tuple[QuantSpec, ...]:
    return tuple(map(SPECS.validate_python, json.loads(text)))


def _candidate(spec: QuantSpec, *parts: Tensor) -> Candidate:
    return Candidate(layout_of(spec), *(part if part.numel() else None for part in parts))


def _as_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bfloat16 else x.to(torch.float32)


def _shape(codes: Tensor, spec: QuantSpec):
    """[R, K] of an operand."""
    return codes.shape[0], codes.shape[1] * (2 if spec.element.bits <= 4 else 1)


@operator("dequantise")
def dequantise_op(
    x: Tensor, index: Tensor, codes: list[Tensor], scales: list[Tensor], factors: list[Tensor],
    specs: str, unit: list[int], dense: bool, bf16: bool,
) -> Tensor:  # fmt: skip
    """-> [R, K] as kernels.dequantise; codes, scales, factors of each of the specs, x and index empty where there are none."""
    parts = zip(_specs(specs), codes, scales, factors, strict=True)
    given, dtype = [_candidate(*each) for each in parts], torch.bfloat16 if bf16 else torch.float32
    shape = tuple(x.shape) if x.numel() else _shape(codes[0], _specs(specs)[0])
    x, index = (t if t.numel() else None for t in (x, index))
    return dequantise(shape, given, dtype, x if x is None else _as_fp32(x), index, tuple(unit), dense)


@dequantise_op.register_fake
def _(x, index, codes, scales, factors, specs, unit, dense, bf16):
    shape = x.shape if x.ndim == 2 else _shape(codes[0], _specs(specs)[0])
    return codes[0].new_empty(shape, dtype=torch.bfloat16 if bf16 else torch.float32)


@operator("errors")
def errors_op(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], factors: list[Tensor], spec: str, by: str, unit: list[int]
) -> Tensor:
    """x [R, K] and what a spec ("": none) made of it -> fp64 [2, R / unit, K / unit] as kernels.errors."""
    given = _candidate(_spec(spec), codes[0], scales[0], factors[0]) if spec else None
    return errors(_as_fp32(x), given, by, tuple(unit))


@errors_op.register_fake
def _(x, codes, scales, factors, spec, by, unit):
    units = (size // part if part else 1 for size, part in zip(x.shape, unit, strict=True))
    return x.new_empty((2, *units), dtype=torch.float64)


def matmul_obstacle(formats: tuple[str, str], scale: str, group: int, M: int, N: int, K: int, on: int | None) -> str:
    """Why narrow::matmul cannot multiply these (kernels/matmul.py), or ""; by default on the GPU that there is."""
    has = capability() if on is None else on
    return obstacle(formats, scale, group, M, N, K, has)


def matmul_way(formats: tuple[str, str], scale: str, group: int, on: int | None) -> str:
    """How narrow::matmul multiplies these (kernels/matmul.py); by default on the GPU that there is."""
    return way(formats, scale, group, capability() if on is None else on)


@torch.library.custom_op("narrow::matmul", mutates_args=())  # always as one: "selective" keeps its result (model.py)
def matmul_op(
    a: list[Tensor], b: list[Tensor], a_format: str, b_format: str, scale: str, group: int, K: int, dtype: torch.dtype
) -> Tensor:
    """a, b: codes uint8 [R, K or K / 2], scales uint8 [R, K / group], factor fp32 [] or [R, 1]; empty where there is none."""
    formats, has, given = (a_format, b_format), capability(), []
    tiles = native(formats, scale, group, has)
    for codes, scales, factor in (a, b):
        scales = None if scale == "none" else tiled(scales) if tiles else scales
        given.append(((codes, scales), factor if factor.numel() else None))
    return matmul(given[0][0], given[1][0], (given[0][1], given[1][1]), formats, scale, group, K, has, dtype)


@matmul_op.register_fake
def _(a, b, a_format, b_format, scale, group, K, dtype):
    return a[0].new_empty(a[0].shape[0], b[0].shape[0], dtype=dtype)
