"""What ladders have decided since it was last asked, as numbers.

    module/gemm.operand   share/CANDIDATE   of its elements, over all calls (where one decision is for all of it: of its calls)
                          error/CANDIDATE   relative error of the first candidate, mean over the calls that measured it
                          errors            in how many of them it was in [0, 0.005), [0.005, 0.01) ... [0.055, 0.06), above
                          flips             decisions that were another in the call before, by elements
    module/gemm           below_16          of its multiplications, those whose operands both have less than 16 bits
    all                   share_tensors     calls in which no part was left at 16 bits or more (what the paper counts)
                          share_elements    elements with less than 16 bits
                          share_flops       multiplications of GEMMs with a ladder, both operands below 16 bits

The bins are those of the authors' tools (arXiv:2512.22804). A weight decides once a step, x and g in every micro-batch.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from quant.choice import Choice, Spec
from quant.context import Context
from quant.linear import linears
from quant.recipe import OPERANDS
from quant.spec import QuantSpec

BIN, BINS = 0.005, 12


def labels(candidates: tuple[QuantSpec, ...]) -> list[str]:
    """A name for each: its format, with what tells it from others of that format."""
    formats = [spec.format for spec in candidates]
    return [spec.format if formats.count(spec.format) == 1 else spec.short() for spec in candidates]


def _shares(index: Tensor | int, count: int) -> Tensor:
    """fp64 [count]: of the elements that a decision is about, those of each candidate."""
    index = torch.as_tensor(index).cpu()
    return torch.bincount(index.flatten(), minlength=count).double() / index.numel()


def _low(spec: Spec | None, index: Tensor | int | None) -> Tensor:
    """fp64 [K / k]: of the rows of an operand, those below 16 bits, along the contraction."""
    if index is None:  # not a ladder
        return torch.tensor([float(spec is not None and spec.element.bits < 16)], dtype=torch.float64)
    found = _below_16(spec)[torch.as_tensor(index).cpu()]
    return found.mean(0) if found.ndim else found.view(1)


def _below_16(spec: Choice) -> Tensor:
    return torch.tensor([float(c.element.bits < 16) for c in spec.candidates], dtype=torch.float64)


def _joint(a: Tensor, b: Tensor) -> float:
    """Of the products of two operands, those where both are low; their units along the contraction may differ."""
    n = math.lcm(len(a), len(b))
    return float((a.repeat_interleave(n // len(a)) * b.repeat_interleave(n // len(b))).mean())


def metrics(model: nn.Module, context: Context) -> dict[str, float | list[int]]:
    """The names above -> numbers, from `context.decisions`, which is emptied. (Where the policy has changed on the way, shares
    are of the ladder in use at the end. Of flips a run that was continued does not know what came before.)"""
    found: dict[str, float | list[int]] = {}
    tensors, elements, flops = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for name, module in linears(model).items():
        for operand in OPERANDS:
            every = list(context.decisions.pop(f"{name}/{operand}", {}).values())
            seen = [decision for decision in every if decision.spec == every[-1].spec]
            if not seen:
                continue
            key, candidates, sizes = f"quant/{name}/{operand}", seen[-1].spec.candidates, [d.elements for d in seen]
            shares = torch.stack([_shares(d.index, len(candidates)) for d in seen])
            found |= {f"{key}/share/{c}": s for c, s in zip(labels(candidates), shares.mean(0).tolist(), strict=True)}
            if errors := [d.error for d in seen if d.error is not None]:
                errors = torch.stack(errors).cpu()
                bins = (errors / BIN).nan_to_num(BINS, BINS).clamp(max=BINS).long()
                found[f"{key}/error/{labels(candidates)[0]}"] = float(errors.mean())
                found[f"{key}/errors"] = torch.bincount(bins, minlength=BINS + 1).tolist()
            before = [d for d in [context.last.get(f"{name}/{operand}")] if d is not None and d.spec == seen[-1].spec]
            indices = [torch.as_tensor(d.index).cpu() for d in [*before, *seen]]
            found[f"{key}/flips"] = float(sum((i != j).double().mean() for i, j in pairwise(indices)))
            context.last[f"{name}/{operand}"] = seen[-1]
            share, size = shares @ _below_16(seen[-1].spec), torch.tensor(sizes, dtype=torch.float64)
            tensors = [tensors[0] + float((share == 1).sum()), tensors[1] + len(seen)]
            elements = [elements[0] + float(share @ size), elements[1] + float(size.sum())]
        for gemm in ("fprop", "dgrad", "wgrad"):
            if seen := context.decisions.pop(f"{name}/{gemm}", {}):
                both = [_joint(_low(*a), _low(*b)) for a, b in seen.values()]
                found[f"quant/{name}/{gemm}/below_16"] = sum(both) / len(both)
                flops = [flops[0] + sum(both) * module.weight.numel(), flops[1] + len(both) * module.weight.numel()]
    context.decisions.clear()
    for name, (part, whole) in {"tensors": tensors, "elements": elements, "flops": flops}.items():
        if whole:
            found[f"quant/share_{name}"] = part / whole
    return found
