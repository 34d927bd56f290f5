"""QTensor: a quantised operand as plain tensors.

    value[r, k] = fl(fl(code[r, k] * scale[r / b0, k / b1]) * global_scale)        all three are decode factors

Codes of 4 bits share a byte, even index along the contraction in the low nibble; wider ones take a byte each. The same
packed tensors serve GEMMs, the activations kept for backward, and checkpoints. It is not a tensor subclass: nothing of
it can reach a checkpoint but the tensors themselves.

An operand reaches the quantiser with its contraction last, but a transposed view of a row-major matrix stays where it
is in memory: `Layout` is the matrix as it lies there, cut into blocks, and everything elementwise works on that.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quant.formats import FORMATS
from quant.spec import QuantSpec, Scale


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
    """int codes -> uint8, two of 4 bits to a byte along `axis`."""
    if bits > 4:
        return codes.to(torch.uint8)
    low, high = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return (low | high << 4).to(torch.uint8)


def split(packed: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The codes of `packed` as int32, one tensor for each code of a byte, the even ones first."""
    packed = packed.to(torch.int32)
    return (packed,) if bits > 4 else (packed & 0xF, packed >> 4)


def join(parts: Sequence[Tensor], axis: int) -> Tensor:
    """What `split` has split, interleaved again along `axis`."""
    return torch.stack(tuple(parts), axis + 1).flatten(axis, axis + 1)


def contraction_axis(transposed: bool) -> int:
    """Which axis of blocks [P / p, p, Q / q, q] runs along the contraction inside a block."""
    return 1 if transposed else 3


@dataclass
class QTensor:
    """packed_codes uint8 [R, K / 2 or K], scale_codes uint8 [R / b0, K / b1], global_scale fp32 [], all with the
    contraction last (views, where the operand was a transposed view); shape [..., K] of the operand."""

    packed_codes: Tensor
    scale_codes: Tensor
    global_scale: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]

    def packed(self) -> Tensor:
        """uint8 [..., K / 2] (two codes a byte, even index low) or [..., K]."""
        return self.packed_codes.reshape(*self.shape[:-1], -1)

    def codes(self) -> Tensor:
        """uint8 [..., K], one code each: sign, exponent, mantissa from the top bit down."""
        return join(split(self.packed_codes, FORMATS[self.spec.format].bits), 1).to(torch.uint8).reshape(self.shape)

    @property
    def scale(self) -> Tensor:
        """Decode scale of each block, [R / b0, K / b1], in the scale's own torch dtype."""
        return self.scale_codes.view(FORMATS[self.spec.scale.format].torch_dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., K]: fl(fl(code * scale) * global_scale), in the rotated basis if the spec has a Hadamard transform."""
        codes = FORMATS[self.spec.format].decode(self.codes().reshape(-1, self.shape[-1]))
        scale = FORMATS[self.spec.scale.format].decode(self.scale_codes)
        values = to_blocks(codes, self.spec.block, False) * scale[:, None, :, None] * self.global_scale
        return values.reshape(self.shape).to(dtype)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed_codes, self.scale_codes, self.global_scale))

    def state(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """(tensors `name.codes`, `name.scale`, `name.global_scale`; a JSON-able description) for a checkpoint."""
        tensors = {"codes": self.packed_codes, "scale": self.scale_codes, "global_scale": self.global_scale}
        description = {"spec": asdict(self.spec), "shape": list(self.shape)}
        return {f"{name}.{k}": t.contiguous() for k, t in tensors.items()}, description

    @classmethod
    def from_state(cls, name: str, tensors: dict[str, Tensor], description: dict) -> "QTensor":
        spec = dict(description["spec"])
        spec = QuantSpec(**{**spec, "scale": Scale(**spec["scale"]), "block": tuple(spec["block"])})
        parts = (tensors[f"{name}.{k}"] for k in ("codes", "scale", "global_scale"))
        return cls(*parts, spec, tuple(description["shape"]))
