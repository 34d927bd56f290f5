"""Mixed: an operand whose blocks have different specs, packed: of each candidate of a ladder the blocks it got, and the map.

    index uint8 [R / r, K / k]        part i: a QTensor [n_i r, k], the n_i blocks with index i one under the other, in order

It is what checkpoints hold. To gather blocks one must know how many there are, so making one waits for the device.
"""

from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor

from quant.choice import Choice
from quant.qtensor import SPECS, QTensor


def _taken(m: Tensor | None, index: Tensor, i: int) -> Tensor | None:
    """Of m [R, K] the units with that index, one under the other. (uint16 as int16: CUDA indexes no uint16.)"""
    if m is None:
        return None
    seen = m.view(torch.int16) if m.dtype == torch.uint16 else m
    return _units(seen, index.shape)[index == i].flatten(0, 1).view(m.dtype)


def _units(m: Tensor, grid: tuple[int, int]) -> Tensor:
    """[R, K] -> a view [R / r, K / k, r, k] of so many units."""
    return m.unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1)).transpose(1, 2)


@dataclass
class Mixed:
    index: Tensor
    parts: dict[int, QTensor]  # of the candidates that any block has
    spec: Choice
    shape: tuple[int, ...]

    @classmethod
    def gather(cls, index: Tensor, whole: dict[int, QTensor], spec: Choice, shape: tuple[int, ...]) -> "Mixed":
        """index int64 [R / r, K / k]; `whole`: the operand [R, K], all of it, by every candidate that occurs."""
        parts = {}
        for i, q in whole.items():
            codes, scale = (_taken(t, index, i) for t in (q.packed_codes, q.scale_codes))
            parts[i] = QTensor(codes, scale, q.outer_codes, q.spec, (len(codes), spec.unit[1]))
        return cls(index.to(torch.uint8), parts, spec, shape)

    @property
    def rows_and_k(self) -> tuple[int, int]:
        return prod(self.shape[:-1]), self.shape[-1]

    def _scatter(self, what) -> Tensor:
        """`what` of each part, [n r, k], where its blocks belong: [R, K]."""
        grid, (r, k) = self.index.shape, self.spec.unit
        out = torch.empty(*grid, r, k, device=self.index.device)
        for i, part in self.parts.items():
            out[self.index == i] = what(part).view(-1, r, k)
        return out.transpose(1, 2).reshape(self.rows_and_k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., K], as QTensor.dequantize."""
        return self._scatter(QTensor.dequantize).reshape(self.shape).to(dtype)

    def largest(self) -> Tensor:
        """As QTensor.largest."""
        return self._scatter(QTensor.largest)

    def nbytes(self) -> int:
        return self.index.nbytes + sum(part.nbytes() for part in self.parts.values())

    def shares(self) -> dict[str, float]:
        """Of elements: `short()` of each candidate that any block has -> how many of all."""
        sizes = {part.spec.short(): prod(part.shape) for part in self.parts.values()}
        return {name: size / prod(self.shape) for name, size in sizes.items()}

    def state(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """As QTensor.state: `name.index`, and of candidate i `name.i.codes` and so on."""
        tensors, parts = {f"{name}.index": self.index.contiguous()}, {}
        for i, part in self.parts.items():
            found, parts[str(i)] = part.state(f"{name}.{i}")
            tensors |= found
        return tensors, {"spec": asdict(self.spec), "shape": list(self.shape), "parts": parts}

    @classmethod
    def from_state(cls, name: str, tensors: dict[str, Tensor], description: dict) -> "Mixed":
        parts = {int(i): QTensor.from_state(f"{name}.{i}", tensors, part) for i, part in description["parts"].items()}
        spec = SPECS.validate_python(description["spec"])
        return cls(tensors[f"{name}.index"], parts, spec, tuple(description["shape"]))


def from_state(name: str, tensors: dict[str, Tensor], description: dict) -> QTensor | Mixed:
    """What `state` of either has written."""
    return (Mixed if "parts" in description else QTensor).from_state(name, tensors, description)
