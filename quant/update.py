"""How the weights themselves are kept: on the grid of a spec instead of in fp32, and how a step of the optimiser gets there.

    w' = Q(w + u)                                  u = what the optimiser's step in fp32 changed
    Kahan:  y = u + c    w' = Q(w + y)    c = Q(y - (w' - w))          arXiv:2010.06192

With Q to BF16 stochastically, or to nearest with Kahan's compensation c, training needs no fp32 master (arXiv:2010.06192); with
integers under one scale, w' = Q(w + u) under the scale of w, it is direct quantised training (arXiv:2412.04787).
Rounded to nearest, an update smaller than half a step of the grid is lost for good: the control that these are measured
against. The tensors stay fp32 here, with values on the grid: what is emulated is the arithmetic, not the memory.
"""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quant.quantize import quantize
from quant.random import Key
from quant.recipe import Weights
from quant.spec import QuantSpec

USE = 7  # of a stored weight in a random Key, after Sites


class WeightStore:
    """The parameters of a model (or name -> rows of each, under several ranks) that `weights` is about, in the model's order.

    `compensation`: name -> Kahan's c, to be saved and restored with the optimiser. Raises ValueError for a pattern that matches
    no parameter, and for a parameter that cannot be cut into the blocks.
    """

    def __init__(self, model: nn.Module | dict[str, Tensor], weights: Weights, seed: int):
        self.weights, self.seed = weights, seed
        named = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
        for pattern in weights.match if weights.store else ():
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"weights.match: {pattern!r} matches none of the parameters {', '.join(named)}")
        self.numbers = {name: i for i, name in enumerate(named)}
        chosen = (name for name in named if weights.store and any(fnmatchcase(name, p) for p in weights.match))
        self.stored = {name: named[name] for name in chosen}
        self.compensation: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Put freshly initialised weights on the grid, rounded to nearest."""
        for p in self.stored.values():
            p.copy_(quantize(p, self.weights.nearest).dequantize())

    @torch.no_grad()
    def keep(self) -> None:
        """Before a step of the optimiser: remember w."""
        self.before = {name: p.clone() for name, p in self.stored.items()}

    @torch.no_grad()
    def put(self, step: int, skip: Tensor) -> None:
        """After step number `step` of the optimiser: w' from w and w + u. skip: [], 1 where nothing may move."""
        spec = self.weights.store
        for name, p in self.stored.items():
            w, key = self.before[name], Key(self.seed, step, self.numbers[name], USE)
            # The grid of integers is that of w, so that a weight which did not move stays where it is.
            held = w.abs().amax() if spec.leaves else None
            u = p - w
            if self.weights.kahan:
                u = u + self.compensation.setdefault(name, torch.zeros_like(w))
            p.copy_(torch.where(skip > 0, w, self._rounded(w + u, spec, key, held)))
            if self.weights.kahan:
                c = self.compensation[name]
                c.copy_(torch.where(skip > 0, c, self._rounded(u - (p - w), spec, key, held)))
        self.before = {}

    def describe(self) -> str:
        """E.g. `weights: bf16 unscaled sr16, 31 of 31 tensors`; empty where all stay fp32."""
        if not self.stored:
            return ""
        kahan = " with Kahan compensation" * self.weights.kahan
        return f"weights: {self.weights.store.short()}{kahan}, {len(self.stored)} of {len(self.numbers)} tensors"

    @staticmethod
    def _rounded(x: Tensor, spec: QuantSpec, key: Key, held: Tensor | None) -> Tensor:
        return quantize(x, spec, key if spec.keyed else None, held=held).dequantize()
