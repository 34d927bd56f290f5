"""Context: where in the run all Linears of a model are, how they multiply, and what is watched of them; nothing is computed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quant.choice import Choice
from quant.gemm import Operand
from quant.random import Key
from quant.recipe import OPERANDS, SIGNS


class Decision(NamedTuple):
    """What a ladder decided of an operand: the candidate (choose.Chosen), the relative error of the first one where it was
    measured, and of how many elements."""

    spec: Choice
    index: Tensor | int
    error: Tensor | None
    elements: int


class Context:
    """What all Linears of a model share during a run: where in the run we are, the mode of emulated GEMMs and the backend.

    The counters also live in int64 tensors, so that advancing them recompiles nothing and waits for nothing.
    `stats`: None, or a dict that collects `operand_stats` of every operand under "module/gemm.operand".
    `decisions`: None, or what ladders decided (decisions.py): under "module/gemm.operand" a `Decision` of each micro-batch, of
    each step for a weight; and under "module/gemm", of each micro-batch, spec and index of both operands of a GEMM.
    `tap`: None, or what is called after every GEMM with the Linear, "fprop", "dgrad" or "wgrad", both operands (`Linear.plain`)
    and y, dx or dw; also of Linears without a recipe, whose backward is then that of this file and not autograd's.
    `amaxes`: None, or fp32 [Linears], by their numbers: the largest magnitude that training has lately quantised in fprop.x of
    each, 0: none yet. Training makes it forget (train.py), evaluations leave it alone, and it changes no number but itself.
    """

    def __init__(self, seed: int = 0, gemm: str = "bf16", device: str | torch.device = "cpu", backend: str = "emulate"):
        self.seed, self.gemm, self.backend = seed, gemm, backend
        self.step = self.micro_batch = 0
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)  # global micro-batch, step
        self.stats: dict[str, Tensor] | None = None
        self.decisions: dict[str, dict[tuple[int, int], tuple]] | None = None
        self.last: dict[str, Decision] = {}  # of `decisions` that have been read, for what comes after them
        self.amaxes: Tensor | None = None
        self.tap: Callable[[nn.Module, str, Operand, Operand, Tensor], None] | None = None

    def at(self, step: int, micro_batch: int) -> None:
        """Move to a place in the run; both counts are global, from 0."""
        self.step, self.micro_batch = step, micro_batch
        self.counters[0] = micro_batch
        self.counters[1] = step

    def key(self, operand: str, layer: int) -> Key:
        """Randomness of weights depends on the step, that of activations and gradients on the micro-batch."""
        return Key(self.seed, self.counters[int(operand.endswith(".w"))], layer, OPERANDS[operand])

    def sign_key(self, operand: str, layer: int) -> Key:
        """Fresh Hadamard signs, the same for both operands of a GEMM; GEMMs with a weight change them once a step."""
        gemm = operand[:5]
        return Key(self.seed, self.counters[int(gemm != "wgrad")], layer, SIGNS[gemm])
