"""quantize(x, spec) -> QTensor: the reference semantics of quantising one operand, in plain torch.

    y = hadamard(x) if the spec says so          a = statistic of y over each block
    scale, enc = scales(a)                       code = round(fl(y * enc)), saturating

Every step is fp32 arithmetic with a stated order, so eager and compiled, CPU and GPU give the same bits. The steps are
the units below, each of which may run as one fused loop (quant/fuse.py). They are cut where a tensor should be in
memory: fused across the cut, the inverse scale of a block would be computed again for each of its elements.
"""

from math import prod

import torch
from torch import Tensor

from quant.formats import FORMATS
from quant.fuse import run
from quant.qtensor import QTensor, contraction_axis, in_memory, join, logical, pack, split, to_blocks
from quant.random import Key, random_ints
from quant.rounding import random_bits
from quant.scaling import FLT_MAX, block_scales, decode_scale, repeat, scale_dtype, statistic
from quant.spec import QuantSpec
from quant.transform import hadamard, signs

# --- the units: tensors in their memory layout, blocks [P / p, p, Q / q, q]; `spec` and `axis` are constants ---


def _rotate(tiles, s, *, size):
    return hadamard(tiles, s)  # `size`, the middle axis, is a constant so that each size compiles by itself


def _scales(blocks, *, spec, axis):
    """-> scale codes, encode factors fp32 and decoded scales fp32, all [P / p, 1, Q / q, 1]; outer scale, see block_scales."""
    codes, enc, decoded, outer = block_scales(statistic(blocks, spec.scale), spec, axis - 1)
    return codes.to(scale_dtype(spec.scale)), enc, decoded, outer


def _scaled(blocks, enc):
    """y * enc, finite where y and enc are (enc is FLT_MAX for a block whose scale rounds to 0)."""
    return blocks.to(torch.float32) if enc is None else (blocks.to(torch.float32) * enc).clamp(-FLT_MAX, FLT_MAX)


def _pack(blocks, enc, noise, *, spec, axis):
    element = FORMATS[spec.format]
    return pack(element.encode(_scaled(blocks, enc), spec.rounding, noise), element.bits, axis)


def _values(blocks, enc, decoded, outer, noise, *, spec, axis):
    """-> what a GEMM multiplies (`_product`), without the detour through codes."""
    x = _scaled(blocks, enc)
    codes = FORMATS[spec.format].round(x, spec.rounding, noise)
    if decoded is None:  # unscaled: what is not finite has no other place
        codes = torch.where(x.isfinite(), codes, torch.nan)
    return _product(codes, decoded, outer, spec, axis)


def _decode(packed, scale, outer, *, spec, axis):
    """-> what a GEMM multiplies, of packed codes. (Joined as BF16: three times as fast as joining the codes.)"""
    element, decoded = FORMATS[spec.format], None if scale is None else decode_scale(scale, spec.scale)
    return join([_product(element.decode(codes), decoded, outer, spec, axis) for codes in split(packed, element.bits)], axis)


def _product(codes, decoded, outer, spec, axis):
    """code * scale, but for what leaves the sum as a factor: the scale of a tensor or of rows. BF16 where that is exact:
    E2M1 has 2 significant bits, E4M3 4, so their product is one of BF16's 8."""
    if decoded is not None:
        codes = torch.where(decoded == decoded, codes, torch.nan) if spec.leaves else codes * decoded
    if outer is not None and spec.scale.group:
        codes = codes * repeat(outer, axis - 1, spec.scale.group // spec.block[1])
    return codes.to(torch.bfloat16 if spec.exact else torch.float32)


def _noise(rows, k, words, *, spec, axis):
    return random_ints(rows, k, random_bits(spec.rounding), words, transposed=axis == 1)


_noise.wide = True  # integers only


# --- what the rest of the house calls ---


def check(shape, spec: QuantSpec, what: str = "operand") -> None:
    """Raises ValueError if an operand of this shape cannot be cut into the spec's blocks."""
    sizes = ("rows", prod(shape[:-1]), spec.multiple[0]), ("contraction", shape[-1], spec.multiple[1])
    for name, size, multiple in sizes:
        if size % multiple or not size:
            raise ValueError(
                f"{what} of shape {list(shape)}: its {name}, {size}, must be a multiple of {multiple} for {spec.short()}"
            )


def rotated(x: Tensor, spec: QuantSpec, sign_key: Key | None = None) -> Tensor:
    """x [R, K] as the quantiser sees it: after the spec's Hadamard transform (BF16), or unchanged."""
    if not spec.hadamard:
        return x
    s = signs(spec.hadamard, spec.signs, sign_key and sign_key.words(x.device), x.device)
    m, transposed = in_memory(x)
    tiles = m.view(-1, spec.hadamard, x.shape[0] if transposed else 1)
    return logical(run(_rotate, tiles, s, size=spec.hadamard).view(m.shape), transposed)


def _prepare(x: Tensor, spec: QuantSpec, key: Key | None, sign_key: Key | None):
    """Everything before the elements: (blocks, noise, scales as `_scales`, transposed, axis)."""
    check(x.shape, spec)
    if spec.keyed and key is None:
        raise ValueError(f"{spec.short()} draws random bits: pass key=quant.random.Key(seed, ...)")
    m, transposed = in_memory(rotated(x, spec, sign_key or (key and key.at(use=key.use + 16))))
    axis = contraction_axis(transposed)
    blocks = to_blocks(m, spec.blocks_of(*x.shape), transposed)
    noise = None
    if spec.stochastic:
        noise = run(_noise, *x.shape, key.words(x.device), spec=spec, axis=axis).view(blocks.shape)
    scales = (None,) * 4 if spec.scale.format == "none" else run(_scales, blocks, spec=spec, axis=axis)
    return blocks, noise, scales, transposed, axis


def quantize(x: Tensor, spec: QuantSpec, key: Key | None = None, sign_key: Key | None = None) -> QTensor:
    """Quantise x [..., K] along its last axis, the contraction; rows are all other axes flattened.

    x: fp32, BF16 or FP16, any strides. key: where randomness is used, needed by stochastic rounding and fresh signs;
    sign_key: the one both operands of a GEMM share for fresh signs (default: the key with use + 16).
    A non-finite element makes its block NaN, or all that an outer scale spans; unscaled, only itself.
    Raises ValueError if x cannot be cut into blocks, or a key is missing.
    Source: arXiv:2509.25149 section 2; OCP MX v1.0.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    blocks, noise, (codes, enc, _, outer), transposed, axis = _prepare(rows, spec, key, sign_key)
    packed = run(_pack, blocks, enc, noise, spec=spec, axis=axis).flatten(2, 3).flatten(0, 1)
    scale, outer = (
        part if part is None or part.ndim == 0 else logical(part.view(part.shape[0], part.shape[2]), transposed)
        for part in (codes, outer)
    )
    return QTensor(logical(packed, transposed), scale, outer, spec, tuple(x.shape))


def quantized_values(x: Tensor, spec: QuantSpec, key: Key | None = None, sign_key: Key | None = None):
    """As `quantize`, for x [R, K]: (code * scale [R, K], what leaves the sum as a factor: fp32 [] or [R, 1], or None).
    BF16 where that is exact, else fp32; bit-equal to decoding its QTensor."""
    blocks, noise, (_, enc, decoded, outer), transposed, axis = _prepare(x, spec, key, sign_key)
    values = run(_values, blocks, enc, decoded, outer, noise, spec=spec, axis=axis)
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), _factor(decoded, outer, spec, x.shape[0])


def decoded_values(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """`quantized_values` of a QTensor."""
    packed, transposed = in_memory(q.packed_codes)
    axis = contraction_axis(transposed)
    rows, k = q.rows_and_k
    b0, b1 = q.spec.blocks_of(rows, k)
    blocks = to_blocks(packed, (b0, b1 * packed.numel() // (rows * k)), transposed)
    scale, outer = (
        part if part is None or part.ndim == 0 else (part.t() if transposed else part)[:, None, :, None]
        for part in (q.scale_codes, q.global_scale)
    )
    values = run(_decode, blocks, scale, outer, spec=q.spec, axis=axis)
    decoded = decode_scale(scale, q.spec.scale) if q.spec.leaves else None
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), _factor(decoded, outer, q.spec, rows)


def _factor(decoded: Tensor | None, outer: Tensor | None, spec: QuantSpec, rows: int) -> Tensor | None:
    """What leaves the sum of a GEMM: fp32 [], or [R, 1], or None if nothing does."""
    parts = [decoded] * spec.leaves + [outer] * (outer is not None and not spec.scale.group)
    if not parts:
        return None
    factor = parts[0] if len(parts) == 1 else parts[0] * parts[1]
    if factor.numel() == 1:
        return factor.reshape(())
    return repeat(factor.reshape(-1, 1), 0, rows // factor.numel())
