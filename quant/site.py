"""Site: a place outside of the GEMMs where a tensor may be quantised too: norm gains, attention scores, the residual stream.

    forward    Q(x), decoded, in x's dtype; blocks along the last axis, rows are all others      backward    g, straight through

Without a spec a Site is nothing. The model is built with its Sites; `[sites]` of a config gives them specs.
"""

import torch
from torch import Tensor, nn

from quant.choice import Spec
from quant.context import Context
from quant.encode import filled
from quant.linear import linears
from quant.quantize import quantize
from quant.random import Key

USE = 6  # of a Site in a random Key, after the operands of a Linear (quant/recipe.py)


class Site(nn.Module):
    """kind: which key of `recipe.Sites` is about it. x [..., K] -> [..., K]."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.spec, self.number = kind, None, 0
        self.context = Context()
        self.spec: Spec | None

    def forward(self, x: Tensor) -> Tensor:
        if self.spec is None:
            return x
        if self.training:
            return _Straight.apply(x, self)
        rows = x.reshape(-1, x.shape[-1])
        return _Straight.apply(filled(rows, self.spec), self)[: len(rows)].view(x.shape)  # as in a Linear

    def extra_repr(self) -> str:
        return f"{self.kind}: {self.spec.short() if self.spec else '-'}"

    def key(self) -> Key | None:
        """Fresh in every micro-batch."""
        return Key(self.context.seed, self.context.counters[0], self.number, USE) if self.spec.keyed else None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, site: Site) -> Tensor:
        return quantize(x, site.spec, site.key()).dequantize(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None


def sites(model: nn.Module) -> list[Site]:
    """Every Site of a model, in order."""
    return [m for m in model.modules() if isinstance(m, Site)]


def attach(model: nn.Module, context: Context) -> None:
    """Give every Linear of a model its name, its number and the shared context; then every Site the numbers after those."""
    modules = linears(model)
    for number, (name, module) in enumerate(modules.items()):
        module.name, module.number, module.context = name, number, context
    for number, site in enumerate(sites(model), len(modules)):
        site.number, site.context = number, context
