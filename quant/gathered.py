"""Gathered: a weight fp32 [O, I] of which only codes are here, as an all-gather over ranks has left them (parallel.py).

    operands    "fprop.w", "dgrad.w" -> QTensor; "copy" -> the weight in the compute dtype, where some operand is not quantised

To autograd it is a leaf that takes fp32 gradients; it has no memory of its own. A Linear multiplies by its operands; anything
else that asks for its numbers is refused.
"""

import torch
from torch import Tensor

from quant.qtensor import QTensor

aten = torch.ops.aten


class Gathered(Tensor):
    operands: dict[str, QTensor | Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, size: torch.Size, device: torch.device, operands: dict[str, QTensor | Tensor]) -> "Gathered":
        made = Tensor._make_wrapper_subclass(cls, size, dtype=torch.float32, device=device)
        made.operands = operands
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.as_strided.default, aten.alias.default):
            return Gathered(args[0].shape, args[0].device, args[0].operands)
        if func in (aten.zeros_like.default, aten.ones_like.default):
            return func(torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device), **(kwargs or {}))
        raise NotImplementedError(f"{func}: of a gathered weight only codes are on this rank, for a Linear to multiply by")

    def __repr__(self) -> str:
        return f"Gathered({list(self.shape)}, {', '.join(self.operands)})"


class Copied(torch.autograd.Function):
    """A gathered weight -> its "copy", as a cast of the weight would be: gradients come back in fp32."""

    @staticmethod
    def forward(ctx, weight: Gathered) -> Tensor:
        return weight.operands["copy"].detach()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.to(torch.float32)
