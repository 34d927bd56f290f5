"""quantize(x, spec) -> QTensor: the reference semantics of quantising one operand, in plain torch.

    y = hadamard(x) if the spec says so          bmax = max |y| over each block, amax = max bmax
    scale, enc = scales(bmax, amax)              code = round(fl(y * enc)), saturating

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
from quant.scaling import FLT_MAX, block_scale, tensor_scale
from quant.spec import QuantSpec
from quant.transform import hadamard, signs

# --- the units: tensors in their memory layout, blocks [P / p, p, Q / q, q]; `spec` and `axis` are constants ---


def _rotate(tiles, s, *, size):
    return hadamard(tiles, s)  # `size`, the middle axis, is a constant so that each size compiles by itself


def _scales(blocks, *, format, scale):
    """-> scale codes uint8, encode factors fp32 and decoded scales fp32, all [P / p, 1, Q / q, 1]; global scale []."""
    bmax = blocks.abs().amax((1, 3), keepdim=True).to(torch.float32)
    s_enc, s_dec = tensor_scale(bmax.amax(), format, scale)
    codes, enc = block_scale(bmax, s_enc, s_dec, format, scale)
    return codes.to(torch.uint8), enc, FORMATS[scale.format].decode(codes), s_dec


def _scaled(blocks, enc):
    """y * enc, finite where y and enc are (enc is FLT_MAX for a block whose scale rounds to 0)."""
    return (blocks.to(torch.float32) * enc).clamp(-FLT_MAX, FLT_MAX)


def _pack(blocks, enc, noise, *, spec, axis):
    element = FORMATS[spec.format]
    return pack(element.encode(_scaled(blocks, enc), spec.rounding, noise), element.bits, axis)


def _values(blocks, enc, decoded, noise, *, spec):
    """-> BF16 code * scale, without the detour through codes. For E2M1 (2 significant bits) and E4M3 (4) the product is
    exact in BF16 (8), so the GEMM's operand is the quantised value itself, but for the global scale."""
    return (FORMATS[spec.format].round(_scaled(blocks, enc), spec.rounding, noise) * decoded).to(torch.bfloat16)


def _decode(packed, scale, *, spec, axis):
    """-> BF16 code * scale of packed codes. (Joined as BF16: three times as fast as joining the codes.)"""
    element, scale = FORMATS[spec.format], FORMATS[spec.scale.format].decode(scale)
    return join([(element.decode(codes) * scale).to(torch.bfloat16) for codes in split(packed, element.bits)], axis)


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
    blocks = to_blocks(m, spec.block, transposed)
    noise = None
    if spec.stochastic:
        noise = run(_noise, *x.shape, key.words(x.device), spec=spec, axis=axis).view(blocks.shape)
    return blocks, noise, run(_scales, blocks, format=spec.format, scale=spec.scale), transposed, axis


def quantize(x: Tensor, spec: QuantSpec, key: Key | None = None, sign_key: Key | None = None) -> QTensor:
    """Quantise x [..., K] along its last axis, the contraction; rows are all other axes flattened.

    x: fp32, BF16 or FP16, any strides. key: where randomness is used, needed by stochastic rounding and fresh signs;
    sign_key: the one both operands of a GEMM share for fresh signs (default: the key with use + 16).
    A non-finite element makes the whole tensor NaN, since a tensor scale spans it.
    Raises ValueError if x cannot be cut into blocks, or a key is missing.
    Source: arXiv:2509.25149 section 2.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    blocks, noise, (codes, enc, _, global_scale), transposed, axis = _prepare(rows, spec, key, sign_key)
    packed = run(_pack, blocks, enc, noise, spec=spec, axis=axis).flatten(2, 3).flatten(0, 1)
    scale = codes.view(codes.shape[0], codes.shape[2])
    return QTensor(logical(packed, transposed), logical(scale, transposed), global_scale, spec, tuple(x.shape))


def quantized_values(x: Tensor, spec: QuantSpec, key: Key | None = None, sign_key: Key | None = None):
    """As `quantize`, for x [R, K]: (BF16 code * scale [R, K], global scale []), bit-equal to decoding its QTensor."""
    blocks, noise, (_, enc, decoded, global_scale), transposed, axis = _prepare(x, spec, key, sign_key)
    values = run(_values, blocks, enc, decoded, noise, spec=spec)
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), global_scale


def decoded_values(q: QTensor) -> tuple[Tensor, Tensor]:
    """(BF16 code * scale [R, K], global scale []) of a QTensor."""
    packed, transposed = in_memory(q.packed_codes)
    axis = contraction_axis(transposed)
    b0, b1 = q.spec.block
    per_byte = 2 if FORMATS[q.spec.format].bits <= 4 else 1
    blocks = to_blocks(packed, (b0, b1 // per_byte), transposed)
    scale = q.scale_codes.t() if transposed else q.scale_codes
    values = run(_decode, blocks, scale[:, None, :, None], spec=q.spec, axis=axis)
    return logical(values.flatten(2, 3).flatten(0, 1), transposed), q.global_scale
