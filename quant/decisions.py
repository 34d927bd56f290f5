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

from itertools import pairwise

import torch
from torch import Tensor, nn

from quant.linear import Context, linears
from quant.spec import QuantSpec

BIN, BINS = 0.005, 12


def labels(candidates: tuple[QuantSpec, ...]) -> list[str]:
    """A name for each: its format, with what tells it from others of that format."""
    formats = [spec.format for spec in candidates]
    return [spec.format if formats.count(spec.format) == 1 else spec.short() for spec in candidates]


def _shares(index: Tensor | int, count: int) -> Tensor:
    """fp64 [count]: of the elements that a decision is about, those of each candidate."""
    index = torch.as_tensor(index)
    return torch.bincount(index.flatten(), minlength=count).double() / index.numel()


def _low(index: Tensor | int | None, low: list[bool]) -> Tensor:
    """fp64 [K / k]: of the rows of an operand, those below 16 bits, along the contraction."""
    if index is None:  # not a ladder
        return torch.tensor([float(low[0])], dtype=torch.float64)
    found = torch.tensor(low, dtype=torch.float64)[torch.as_tensor(index).cpu()]
    return found.mean(0) if found.ndim else found.view(1)


def _joint(a: Tensor, b: Tensor) -> float:
    """Of the products of two operands, those where both are low; their units along the contraction may differ."""
    n = torch.lcm(torch.tensor(len(a)), torch.tensor(len(b)))
    return float((a.repeat_interleave(int(n) // len(a)) * b.repeat_interleave(int(n) // len(b))).mean())


def metrics(model: nn.Module, context: Context) -> dict[str, float | list[int]]:
    """The names above -> numbers, from `context.decisions`, which is emptied."""
    found: dict[str, float | list[int]] = {}
    tensors, elements, flops = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for name, module in linears(model).items():
        operands = module.recipe.operands() if module.recipe else {}
        lows = {o: [c.element.bits < 16 for c in spec.candidates] if spec else [False] for o, spec in operands.items()}
        for operand, spec in operands.items():
            seen = context.decisions.pop(f"{name}/{operand}", [])
            if not seen or not spec.ladder:
                continue
            key, low = f"quant/{name}/{operand}", torch.tensor(lows[operand], dtype=torch.float64)
            indices, errors, sizes = zip(*seen, strict=True)
            shares = torch.stack([_shares(index, len(spec.candidates)) for index in indices])
            found |= {f"{key}/share/{c}": s for c, s in zip(labels(spec.candidates), shares.mean(0).tolist(), strict=True)}
            if errors := [e for e in errors if e is not None]:
                errors = torch.stack(errors)
                bins = (errors / BIN).nan_to_num(BINS).clamp(max=BINS).long().cpu()
                found[f"{key}/error/{labels(spec.candidates)[0]}"] = float(errors.mean())
                found[f"{key}/errors"] = torch.bincount(bins, minlength=BINS + 1).tolist()
            flips = [(torch.as_tensor(i) != torch.as_tensor(j)).double().mean() for i, j in pairwise(indices)]
            found[f"{key}/flips"] = float(sum(flips))
            share, size = shares @ low, torch.tensor(sizes, dtype=torch.float64)
            tensors = [tensors[0] + float((share == 1).sum()), tensors[1] + len(seen)]
            elements = [elements[0] + float(share @ size), elements[1] + float(size.sum())]
        for gemm in ("fprop", "dgrad", "wgrad"):
            seen = context.decisions.pop(f"{name}/{gemm}", [])
            if seen:
                a, b = (o for o in operands if o.startswith(gemm))
                both = [_joint(_low(i, lows[a]), _low(j, lows[b])) for i, j in seen]
                found[f"quant/{name}/{gemm}/below_16"] = sum(both) / len(both)
                flops = [flops[0] + sum(both) * module.weight.numel(), flops[1] + len(both) * module.weight.numel()]
    context.decisions.clear()
    for name, (part, whole) in {"tensors": tensors, "elements": elements, "flops": flops}.items():
        if whole:
            found[f"quant/share_{name}"] = part / whole
    return found
