"""encode(x, spec) -> QTensor, decode(QTensor) -> values: the reference semantics of one operand and one layout, plain torch.

    y = hadamard(x) if the spec says so          a = statistic of y over each block
    scale, enc = scales(a)                       code = round(fl(y * enc)), saturating

A Choice of the nearest block does that with each of its candidates, and keeps for each block the one whose values are the
nearest to y; what picks between layouts, the ladders, is choose.py.

Every step is fp32 arithmetic with a stated order, so eager and compiled, CPU and GPU give the same bits. The steps are
the units below, each of which may run as one fused loop (quant/fuse.py). They are cut where a tensor should be in
memory: fused across the cut, the inverse scale of a block would be computed again for each of its elements.
"""

import sys
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from quant.choice import Choice
from quant.formats import FLT_MAX, FORMATS
from quant.fuse import run
from quant.qtensor import (
    QTensor,
    contraction_axis,
    decode_elements,
    in_memory,
    join,
    join_nibbles,
    logical,
    pack,
    part_nibbles,
    split,
    to_blocks,
)
from quant.random import Key, random_bytes, random_ints
from quant.rounding import random_bits
from quant.scaling import (
    block_scales,
    block_sum,
    decode_outer,
    decode_scale,
    eden,
    repeat,
    scale_codes,
    second,
    sign_of,
    statistic,
)
from quant.spec import QuantSpec
from quant.transform import hadamard, signs

# --- the units: tensors in their memory layout, blocks [P / p, p, Q / q, q]; `spec` and `axis` are constants ---


def _rotate(tiles, s, *, size, dtype, cast):
    return hadamard(tiles, s, dtype, cast)  # `size`, the middle axis, is a constant so that each size compiles by itself


def _scales(blocks, held, noise, *, spec, axis):
    """-> encode factors fp32 and decoded scales fp32, both [P / p, 1, Q / q, 1]; outer scale, see block_scales."""
    enc, decoded, outer = block_scales(statistic(blocks, spec.scale, axis), spec, axis - 1, held, noise)
    if spec.scale.macro:
        outer = outer.to(torch.uint8)
    return enc, decoded, outer


def _scale_codes(decoded, *, spec):
    return scale_codes(decoded, spec.scale)


def _scaled(blocks, enc):
    """y * enc; finite y may become Inf (enc is FLT_MAX for a block whose scale rounds to 0), and what rounds it saturates."""
    return blocks.to(torch.float32) if enc is None else blocks.to(torch.float32) * enc


def _corrected(blocks, enc, decoded, noise, *, spec, axis):
    """MS-EDEN's scales of the blocks, decoded."""
    x = _scaled(blocks, enc).clamp(-FLT_MAX, FLT_MAX)
    return eden(x, spec.element.round(x, spec.rounding), decoded, spec, axis, noise)


def _error(blocks, enc, decoded, outer, noise, *, spec, axis, by):
    """How far the values of each block are from y, [P / p, 1, Q / q, 1]."""
    y = blocks.to(torch.float32)
    error = (spec.element.round(_scaled(blocks, enc), spec.rounding, noise) * decoded * _outer(outer, spec, axis) - y).abs()
    if by == "largest_error":
        return error.amax((1, 3), keepdim=True)
    return block_sum(error * error if by == "squared_error" else error, axis)


def _pick(error, codes, enc, decoded, other_error, other_codes, other_enc, other_decoded, *, flag):
    """The better of two candidates, block by block (the first unless the other is nearer), as `_error`, `_scale_codes` and
    `_scales` gave them; `flag` is added to the other's scale codes."""
    better, stored = other_error < error, codes.dtype
    if not codes.is_floating_point():
        codes, other_codes = (c.to(torch.int32) for c in (codes, other_codes))
    codes = torch.where(better, other_codes + flag, codes)
    values = (torch.where(better, b, a) for a, b in ((error, other_error), (enc, other_enc), (decoded, other_decoded)))
    error, enc, decoded = values
    return error, codes.to(stored), enc, decoded


def _pack(blocks, enc, scale, noise, *, spec, axis, apart):
    """-> codes, packed along `axis`; `apart`: or a byte each. (A float8 has the bytes of its codes.)"""
    x = _scaled(blocks, enc)
    infinite = x if enc is None else None  # unscaled: what is not finite has no other place
    codes = [element.codes_of(element.round(x, spec.rounding, noise), infinite) for element in spec.elements]
    codes = codes[0] if len(codes) == 1 else torch.where(second(scale, spec), _stored(codes[1]), _stored(codes[0]))
    return codes if apart else pack(codes, spec.element.bits, axis)


def _values(blocks, enc, scale, decoded, outer, noise, *, spec, axis):
    """-> what a GEMM multiplies (`_product`), without the detour through codes."""
    x = _scaled(blocks, enc)
    codes = [element.round(x, spec.rounding, noise) for element in spec.elements]
    codes = codes[0] if len(codes) == 1 else torch.where(second(scale, spec), codes[1], codes[0])
    if decoded is None:  # unscaled: what is not finite has no other place
        codes = torch.where(x.isfinite(), codes, torch.nan)
    return _product(codes, decoded, outer, spec, axis)


def _decode(packed, scale, decoded, outer, *, spec, axis, apart):
    """-> what a GEMM multiplies, of packed codes (joined as BF16: three times as fast as joining codes), or codes `apart`."""
    flag = None if scale is None else second(scale, spec)
    found = (packed,) if apart else split(packed, spec.element.bits)
    return join([_product(decode_elements(codes, flag, spec), decoded, outer, spec, axis) for codes in found], axis)


def _decode_scales(scale, *, spec):
    return decode_scale(scale, spec)


def _product(codes, decoded, outer, spec, axis):
    """code * scale, but for what leaves the sum as a factor: the scale of a tensor or of rows. BF16 where that is exact:
    E2M1 has 2 significant bits, E4M3 4, so their product is one of BF16's 8."""
    if decoded is not None:
        codes = torch.where(decoded == decoded, codes, torch.nan) if spec.leaves else codes * decoded
    if spec.scale.group:
        codes = codes * _outer(outer, spec, axis)
    return codes.to(torch.bfloat16 if spec.exact else torch.float32)


def _outer(outer, spec, axis):
    """An outer decode scale as something to multiply blocks with."""
    if outer is None:
        return 1.0
    outer = decode_outer(outer, spec.scale)
    return repeat(outer, axis - 1, spec.scale.group // spec.block[1]) if spec.scale.group else outer


def _noise(rows, k, words, *, rounding, axis):
    ints = random_ints(rows, k, random_bits(rounding), words, transposed=axis == 1)
    return ints if ints.itemsize == 1 else ints.to(torch.float32)  # exact, and what rounding would make of them


def _rounds_without_views(*, spec, **_):
    return all(getattr(element, "plain", False) for element in spec.elements)


def _scales_without_views(*, spec, axis):
    """... where they are long enough to matter: along rows a block's amax is faster found in narrow vectors."""
    s = spec.scale
    return axis == 1 and not s.macro and (s.format in ("e8m0", "fp32") or getattr(FORMATS[s.format], "plain", False))


def _codes_without_views(*, spec, **_):
    formats = [element for element in spec.elements if getattr(element, "plain", False)]
    return formats == list(spec.elements) and all(f.cast or (f.bends is not None and f.nan_code is None) for f in formats)


_noise.wide = lambda **_: True
_values.wide = _error.wide = _rounds_without_views
_pack.wide = _decode.wide = _codes_without_views
_scales.wide = _scales_without_views
_rotate.wide = lambda *, cast, **_: cast


def _unclipped(blocks, enc, *, spec):
    return _scaled(blocks, enc).abs() < spec.element.max


# --- what the rest of the house calls ---


def check(shape, spec: QuantSpec | Choice, what: str = "operand") -> None:
    """Raises ValueError if an operand of this shape cannot be cut into the spec's blocks."""
    sizes = ("rows", prod(shape[:-1]), spec.multiple[0]), ("contraction", shape[-1], spec.multiple[1])
    for name, size, multiple in sizes:
        if size % multiple or not size:
            raise ValueError(
                f"{what} of shape {list(shape)}: its {name}, {size}, must be a multiple of {multiple} for {spec.short()}"
            )


def filled(x: Tensor, spec: QuantSpec | Choice) -> Tensor:
    """x [R, K] with rows of zeros below it, as many as its blocks need: they change no amax, and no code of the others."""
    short = -len(x) % spec.multiple[0]
    return torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x


def transform(x: Tensor, size: int, s: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [R, K] after a Hadamard transform of `size` along K with signs s [size], in `dtype` (transform.py)."""
    m, transposed = in_memory(x)
    tiles = m.view(-1, size, x.shape[0] if transposed else 1)
    cast = not torch.compiler.is_compiling()  # within a larger graph torch.compile drops a cast to BF16 and back
    return logical(run(_rotate, tiles, s, size=size, dtype=dtype, cast=cast).view(m.shape), transposed)


def rotated(x: Tensor, spec: QuantSpec | Choice, sign_key: Key | None = None) -> Tensor:
    """x [R, K] as the quantiser sees it: after the spec's Hadamard transform (BF16), or unchanged."""
    if not spec.hadamard:
        return x
    return transform(x, spec.hadamard, signs(spec.hadamard, spec.signs, sign_key and sign_key.words(x.device), x.device))


class _Prepared(NamedTuple):
    """Everything before the elements: blocks, the noise of their rounding, scales as in scaling.Scales, the layout."""

    blocks: Tensor
    noise: Tensor | None
    codes: Tensor | None  # of scales, where there was a choice (they may say which)
    enc: Tensor | None
    decoded: Tensor | None
    outer: Tensor | None
    transposed: bool
    axis: int


def _prepare(x: Tensor, spec: QuantSpec | Choice, key: Key | None, sign_key: Key | None, held: Tensor | None) -> _Prepared:
    check(x.shape, spec)
    if spec.keyed and key is None:
        raise ValueError(f"{spec.short()} draws random bits: pass key=quant.random.Key(seed, ...)")
    m, transposed = in_memory(rotated(x, spec, sign_key or (key and key.at(use=key.use + 16))))
    axis, (b0, b1) = contraction_axis(transposed), spec.blocks_of(*x.shape)
    blocks = to_blocks(m, (b0, b1), transposed)
    p, q = blocks.shape[0], blocks.shape[2]
    noise = scale_noise = None
    if spec.stochastic:
        noise = _noise_for(*x.shape, key.words(x.device), spec.rounding, axis).view(blocks.shape)
    if spec.scale.stochastic:
        words, sizes = key.at(use=key.use + 32).words(x.device), (x.shape[0] // b0, x.shape[1] // b1)
        scale_noise = _noise_for(*sizes, words, spec.scale.rounding, axis).view(p, 1, q, 1)
    codes = enc = decoded = outer = None
    if spec.scale.format != "none":
        enc, decoded, outer = run(_scales, blocks, held, scale_noise, spec=spec.candidates[0], axis=axis)
    if spec.scale.correction == "eden":
        decoded = run(_corrected, blocks, enc, decoded, scale_noise, spec=spec, axis=axis)
    if len(spec.candidates) > 1:
        error = run(_error, blocks, enc, decoded, outer, noise, spec=spec.candidates[0], axis=axis, by=spec.by)
        best = error, _codes_of_scales(decoded, spec), enc, decoded
        for other in spec.candidates[1:]:
            enc, decoded, _ = run(_scales, blocks, held, scale_noise, spec=other, axis=axis)
            error = run(_error, blocks, enc, decoded, outer, noise, spec=other, axis=axis, by=spec.by)
            flag = 0 if other.element == spec.elements[0] else sign_of(spec.scale)
            best = run(_pick, *best, error, _codes_of_scales(decoded, spec), enc, decoded, flag=flag)
        _, codes, enc, decoded = best
    return _Prepared(blocks, noise, codes, enc, decoded, outer, transposed, axis)


def _noise_for(rows: int, k: int, words: Tensor, rounding: str, axis: int) -> Tensor:
    """`random_ints` of an operand as it lies in memory."""
    if random_bits(rounding) == 8 and axis == 3 and sys.byteorder == "little":
        return run(random_bytes, rows, k, words).view(torch.uint8)
    return run(_noise, rows, k, words, rounding=rounding, axis=axis)


def _codes_of_scales(decoded: Tensor, spec: QuantSpec | Choice) -> Tensor:
    return decoded if spec.scale.format == "fp32" else _stored(run(_scale_codes, decoded, spec=spec.candidates[0]))


def _stored(codes: Tensor) -> Tensor:
    """Codes as they are kept: the bytes of a float8."""
    return codes.view(torch.uint8) if codes.is_floating_point() and codes.itemsize == 1 else codes


def _as_floats(codes: Tensor, formats) -> Tensor:
    """The inverse of `_stored`, where the one format there is has a dtype to be cast from."""
    return codes.view(formats[0].torch_dtype) if len(formats) == 1 and getattr(formats[0], "cast", False) else codes


def encode(
    x: Tensor, spec: QuantSpec | Choice, key: Key | None = None, sign_key: Key | None = None, held: Tensor | None = None
) -> QTensor:
    """`quantize` of quant/quantize.py, but for ladders."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    blocks, noise, codes, enc, decoded, outer, transposed, axis = _prepare(rows, spec, key, sign_key, held)
    apart = spec.element.bits <= 4 and blocks.shape[2] * blocks.shape[3] % 8 == 0
    packed = _stored(run(_pack, blocks, enc, codes, noise, spec=spec, axis=axis, apart=apart)).flatten(2, 3).flatten(0, 1)
    if apart:
        packed = run(join_nibbles, packed.view(torch.int64), axis=axis).view(torch.uint8)
    if codes is None and decoded is not None:
        codes = _codes_of_scales(decoded, spec)
    scale, outer = (
        part if part is None or part.ndim == 0 else logical(part.view(part.shape[0], part.shape[2]), transposed)
        for part in (codes, outer)
    )
    return QTensor(logical(packed, transposed), scale, outer, spec, tuple(x.shape))


def values_of(
    x: Tensor, spec: QuantSpec | Choice, key: Key | None = None, sign_key: Key | None = None, held: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`quantized_values` of quant/quantize.py, but for ladders."""
    blocks, noise, codes, enc, decoded, outer, transposed, axis = _prepare(x, spec, key, sign_key, held)
    values = run(_values, blocks, enc, codes, decoded, outer, noise, spec=spec, axis=axis)
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), _factor(decoded, outer, spec, x.shape[0])


def unclipped(
    x: Tensor, spec: QuantSpec | Choice, key: Key | None = None, sign_key: Key | None = None, held: Tensor | None = None
) -> Tensor:
    """bool [R, K]: the elements of x that `quantize` does not clip, |y * enc| < max."""
    p = _prepare(x, spec, key, sign_key, held)
    return logical(run(_unclipped, p.blocks, p.enc, spec=spec).flatten(2, 3).flatten(0, 1), p.transposed)


def decode(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """`values_of` a QTensor."""
    packed, transposed = in_memory(q.packed_codes)
    axis = contraction_axis(transposed)
    rows, k = q.rows_and_k
    b0, b1 = q.spec.blocks_of(rows, k)
    eight = torch.int64 if transposed else torch.int32  # codes, packed
    aligned = torch.compiler.is_compiling() or packed.storage_offset() % eight.itemsize == 0
    apart = q.spec.element.bits > 4 or (aligned and packed.shape[1] % eight.itemsize == 0)
    if apart and q.spec.element.bits <= 4:
        packed = run(part_nibbles, packed.view(eight), axis=axis).view(torch.uint8)
    packed = _as_floats(packed, q.spec.elements)
    blocks = to_blocks(packed, (b0, b1 * packed.numel() // (rows * k)), transposed)
    scale, outer = (
        part if part is None or part.ndim == 0 else (part.t() if transposed else part)[:, None, :, None]
        for part in (q.scale_codes, q.outer_codes)
    )
    decoded = scale
    if scale is not None and q.spec.scale.format != "fp32":
        formats = [FORMATS[q.spec.scale.format]] * len(q.spec.elements)  # (if there are two, the sign is a flag)
        decoded = run(_decode_scales, _as_floats(scale, formats), spec=q.spec)
    values = run(_decode, blocks, scale, decoded, outer, spec=q.spec, axis=axis, apart=apart)
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), _factor(decoded, outer, q.spec, rows)


def factor_of(q: QTensor) -> Tensor | None:
    """What leaves the sum of a GEMM of its codes and scales: fp32 [], or [R, 1], or None if nothing does."""
    scale, outer = q.scale_codes, q.outer_codes
    decoded = decode_scale(scale, q.spec) if q.spec.leaves else None
    return _factor(decoded, outer, q.spec, q.rows_and_k[0])


def _factor(decoded: Tensor | None, outer: Tensor | None, spec: QuantSpec | Choice, rows: int) -> Tensor | None:
    """`factor_of`, of what has been decoded."""
    parts = [decoded] * spec.leaves + [outer] * (outer is not None and not spec.scale.group)
    if not parts:
        return None
    factor = parts[0] if len(parts) == 1 else parts[0] * parts[1]
    if factor.numel() == 1:
        return factor.reshape(())
    return repeat(factor.reshape(-1, 1), 0, rows // factor.numel())
