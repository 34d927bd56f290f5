"""QTensor: a quantised operand as plain tensors.

    value[r, k] = fl(fl(code[r, k] * scale[r / b0, k / b1]) * global_scale)        all three are decode factors

Codes of up to 4 bits share a byte, even index along the contraction in the low nibble; wider ones take a byte or two. The same
packed tensors serve GEMMs, the activations kept for backward, and checkpoints. It is not a tensor subclass: nothing of
it can reach a checkpoint but the tensors themselves.

An operand reaches the quantiser with its contraction last, but a transposed view of a row-major matrix stays where it
is in memory: `Layout` is the matrix as it lies there, cut into blocks, and everything elementwise works on that.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import pad

from quant.choice import Choice, Spec
from quant.formats import FORMATS, Format, code_dtype
from quant.fuse import compiling
from quant.scaling import decode_outer, decode_scale, second, spread
from quant.spec import QuantSpec

SPECS = TypeAdapter(Spec)


def in_memory(x: Tensor) -> tuple[Tensor, bool]:
    """x [R, K] -> (x or its transpose, whichever is contiguous; True if transposed). Copies if neither is."""
    if x.stride(1) == 1 or x.shape[0] == 1:
        return x.contiguous(), False
    if x.stride(0) == 1:
        return x.t().contiguous(), True
    return x.contiguous(), False


def logical(x: Tensor, transposed: bool) -> Tensor:
    """The inverse of `in_memory`: contraction last."""
    return x.t() if transposed else x


def to_blocks(m: Tensor, block: tuple[int, int], transposed: bool) -> Tensor:
    """m [P, Q] as it lies in memory -> a view [P / p, p, Q / q, q]; a block is axes 1 and 3, whatever the layout."""
    p, q = block[::-1] if transposed else block
    return m.view(m.shape[0] // p, p, m.shape[1] // q, q)


def pack(codes: Tensor, bits: int, axis: int) -> Tensor:
    """codes -> uint8, two of up to 4 bits to a byte along `axis`; uint16 or int32 for wider ones; a float8 stays one."""
    if bits > 4:
        return codes if codes.itemsize == 1 else codes.to(code_dtype(bits))
    low, high = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return (low | high << 4).to(torch.uint8)


def join_nibbles(codes: Tensor, axis: int) -> Tensor:
    """int64 [P, Q / 8], eight codes of up to 4 bits in as many bytes -> int64 [P / 2, Q / 8] along rows (`axis` 1), or int32
    [P, Q / 8] (`axis` 3): the bytes of `pack`, eight at a time and not at a stride of two, which vector units dislike."""
    if axis == 1:
        low, high = codes.unflatten(0, (-1, 2)).unbind(1)
        return low | high << 4
    codes = (codes | codes >> 4) & 0x00FF00FF00FF00FF
    codes = (codes | codes >> 8) & 0x0000FFFF0000FFFF
    return (codes | codes >> 16).to(torch.int32)


def part_nibbles(packed: Tensor, axis: int) -> Tensor:
    """The inverse of `join_nibbles`."""
    if axis == 1:
        return torch.stack([packed & 0x0F0F0F0F0F0F0F0F, packed >> 4 & 0x0F0F0F0F0F0F0F0F], 1).flatten(0, 1)
    codes = packed.to(torch.int64) & 0xFFFFFFFF
    codes = (codes | codes << 16) & 0x0000FFFF0000FFFF
    codes = (codes | codes << 8) & 0x00FF00FF00FF00FF
    return (codes | codes << 4) & 0x0F0F0F0F0F0F0F0F


join_nibbles.wide = part_nibbles.wide = lambda **_: True  # (quant/fuse.py)


def split(packed: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The codes of `packed` as int32, one tensor for each code of a byte, the even ones first."""
    packed = packed.to(torch.int32)
    return (packed,) if bits > 4 else (packed & 0xF, packed >> 4)


def join(parts: Sequence[Tensor], axis: int) -> Tensor:
    """What `split` has split, interleaved again along `axis`."""
    return torch.stack(tuple(parts), axis + 1).flatten(axis, axis + 1)


def decode_elements(codes: Tensor, flag: Tensor | None, spec: QuantSpec | Choice) -> Tensor:
    """Codes, ints or float8 -> fp32 values; `flag` (`scaling.second`): where they are of the second of two element formats."""
    found = [_decoded(codes, element) for element in spec.elements[: 1 if flag is None else 2]]
    return found[0] if flag is None else torch.where(flag, found[1], found[0])


def _decoded(codes: Tensor, element: Format) -> Tensor:
    """element.decode(codes); eagerly by a table of all codes, 20 times as fast as arithmetic (E2M1, CPU)."""
    if codes.is_floating_point() or element.bits > 8 or codes.numel() < 1 << 12 or compiling():
        return element.decode(codes)
    table = element.decode(torch.arange(1 << element.bits, dtype=torch.int32, device=codes.device))
    return table.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)


def tiled(scale: Tensor) -> Tensor:
    """uint8 [R, B] -> [R / 128 * B / 4, 512], up: tiles of 128 x 4 in the order of tensor cores (cuBLAS, 1-D block scaling
    factors layout): byte (r, b) of a tile lies at r % 32 * 16 + r // 32 * 4 + b. What is not there is 0."""
    R, B = scale.shape
    tiles = pad(scale, (0, -B % 4, 0, -R % 128)).view(-(-R // 128), 4, 32, -(-B // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, 512)


def contraction_axis(transposed: bool) -> int:
    """Which axis of blocks [P / p, p, Q / q, q] runs along the contraction inside a block."""
    return 1 if transposed else 3


@dataclass
class QTensor:
    """packed_codes uint8 [R, K / 2 or K] (uint16 or int32 for formats above 8 or 16 bits), scale_codes [R / b0, K / b1] (uint8,
    uint16 for bf16, fp32 itself), outer_codes (fp32, or uint8 of m8) [], [R / b0, 1] or [R / b0, K / N]; the last two None
    where there are none. The contraction is last (in views, where the operand was a transposed view); shape [..., K] is the
    operand's."""

    packed_codes: Tensor
    scale_codes: Tensor | None
    outer_codes: Tensor | None
    spec: QuantSpec | Choice
    shape: tuple[int, ...]

    def packed(self) -> Tensor:
        """uint8 [..., K / 2] (two codes a byte, even index low) or [..., K] (uint16, int32 for wide formats)."""
        return self.packed_codes.reshape(*self.shape[:-1], -1)

    def codes(self) -> Tensor:
        """uint8 [..., K] (uint16, int32 for wide formats), one code each: sign, exponent, mantissa from the top bit down."""
        bits = self.spec.element.bits
        return join(split(self.packed_codes, bits), 1).to(code_dtype(bits)).reshape(self.shape)

    @property
    def rows_and_k(self) -> tuple[int, int]:
        return prod(self.shape[:-1]), self.shape[-1]

    @property
    def scale(self) -> Tensor | None:
        """Decode scale of each block, [R / b0, K / b1], in the scale's own torch dtype; codes where there is no such dtype
        (uint8: of e8m0 the biased exponents). None if unscaled. Under a Choice of two element formats a negative one means
        that the block is of the second."""
        name = self.spec.scale.format
        fmt = FORMATS[name] if name in FORMATS else None
        return self.scale_codes if fmt is None or fmt.torch_dtype is None else self.scale_codes.view(fmt.torch_dtype)

    @property
    def global_scale(self) -> Tensor | None:
        """The outer decode scale, fp32 [], [R / b0, 1] or [R / b0, K / N], or None."""
        return None if self.outer_codes is None else decode_outer(self.outer_codes, self.spec.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., K]: fl(fl(code * scale) * global_scale), in the rotated basis if the spec has a Hadamard transform."""
        flag = None if self.scale_codes is None else second(self.scale_codes, self.spec)
        flag = None if flag is None else spread(flag, *self.rows_and_k)
        values = decode_elements(join(split(self.packed_codes, self.spec.element.bits), 1), flag, self.spec)
        for part in self.scales():
            units = values.unflatten(1, (part.shape[-1], -1)).unflatten(0, (len(part), -1)) if part.ndim else values
            values = (units * (part[:, None, :, None] if part.ndim else part)).reshape(values.shape)
        return values.reshape(self.shape).to(dtype)

    def scales(self) -> list[Tensor]:
        """The decode scales there are, fp32, as stored: [R / b0, K / b1], then the global one."""
        found = [] if self.scale_codes is None else [decode_scale(self.scale_codes, self.spec)]
        return found + [self.global_scale] * (self.global_scale is not None)

    def largest(self) -> Tensor:
        """fp32 [R, K]: the largest magnitude that each element could have, max * scale * global_scale."""
        return (spread(self.block_scale(), *self.rows_and_k) * self.spec.element.max).expand(self.rows_and_k)

    def block_scale(self) -> Tensor:
        """fp32, [] or [R / b0, K / b1]: scale * global_scale of each block."""
        whole = torch.ones((), device=self.packed_codes.device)
        for part in self.scales():
            whole = whole * (part if whole.ndim == 0 else spread(part, *whole.shape))
        return whole

    def turned(self) -> "QTensor":
        """The QTensor of the transpose, where it has the same codes (`spec.transposes`)."""
        codes = join(split(self.packed_codes, self.spec.element.bits), 1)
        scale = None if self.scale_codes is None else self.scale_codes.t()
        packed = pack(codes.t().contiguous(), self.spec.element.bits, 1)
        return QTensor(packed, scale, self.outer_codes, self.spec, self.shape[::-1])

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._parts().values())

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self.packed_codes, "scale": self.scale_codes, "global_scale": self.outer_codes}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """(tensors `name.codes`, `name.scale`, `name.global_scale`; a JSON-able description) for a checkpoint."""
        description = {"spec": asdict(self.spec), "shape": list(self.shape)}
        return {f"{name}.{k}": t.contiguous() for k, t in self._parts().items()}, description

    @classmethod
    def from_state(cls, name: str, tensors: dict[str, Tensor], description: dict) -> "QTensor":
        spec = SPECS.validate_python(description["spec"])
        parts = (tensors.get(f"{name}.{k}") for k in ("codes", "scale", "global_scale"))
        return cls(*parts, spec, tuple(description["shape"]))
