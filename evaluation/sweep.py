"""What a checkpoint loses by each way to store its weights: CANDIDATES, a table of (name, family, method, arguments).

    w'[O,I] = method(w, x)      bits = mean over parameters, codes, scales and all      loss of the model with every w' in place

w is the fp32 master of every Linear that is to be quantised, x what it is given in some windows of training text, without
quantisation. w' is rounded to the compute dtype and multiplied in it, as a weight-only kernel does, and as the row "bf16" does
with w itself. Where activations are quantised too, both are operands of the algebra instead (quant/linear.py).

Left out: what must be learned (rounding, scales), GPTQ, a format for each layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data import Corpus
from evaluation import posttrain
from evaluation.posttrain import Coded, Moved
from evaluation.rows import Row, row
from evaluation.specs import NAMED, preset
from model import GPT
from quant import QuantSpec, Recipe, Scale
from quant.linear import Linear, linears
from quant.policy import unquantized


class Candidate(NamedTuple):
    """family, series: its panel and line in the picture."""

    name: str
    family: str
    series: str
    method: Callable[..., Coded]
    arguments: dict[str, Any] = {}


def _rows(name: str) -> QuantSpec:
    return QuantSpec(name, (1, -1), Scale("fp32"))


def _series(name: str) -> str:
    """Of a spec with a name."""
    if not name.startswith("int"):
        return BLOCKS
    return "integers, groups of 128" if name.endswith("-128") else "integers, rows"


BITS = (6, 5, 4, 3, 2)
BLOCKS = "floats and tables"  # of many layouts, so drawn as points with their names
PLAIN = [name for name in NAMED if name not in ("bf16", "int8-tensor")]
CLIPPED = ("int4", "int3", "int2", "int4-128", "int3-128", "int2-128", "mxfp4", "nvfp4")
SPLITS = {6: ("e2m3", "e3m2", "e1m4"), 4: ("e2m1", "e1m2", "e3m0"), 3: ("e1m1", "e2m0")}  # of so many bits
# Weights with a scale a row, activations with one for all tokens, at four bits with one a token.
BOTH = {"w8 x8": ("int8", (-1, -1)), "w6 x6": ("int6", (-1, -1)), "w4 x4": ("int4", (1, -1))}
ENDS = {
    "": ("to nearest", posttrain.nearest, {}),
    ", OS+": ("shifted and scaled (OS+)", posttrain.shifted, {}),
    ", OS+ scale": ("scaled (OS+ without shift)", posttrain.shifted, {"shift": False}),
}
CANDIDATES = [
    *(Candidate(n, "to nearest", _series(n), posttrain.nearest, {"spec": preset(n)}) for n in PLAIN),
    *(Candidate(f"int8 to int{b}", "int8, rounded again", "rows", posttrain.switched, {"bits": b}) for b in BITS),
    *(Candidate(f"{n}, clip", "searched scale", _series(n), posttrain.clipped, {"specs": [preset(n)]}) for n in CLIPPED),
    *(
        Candidate(f"float{b}, by {by}", "searched scale", f"floats, rows, by {by}", posttrain.clipped,
                  {"specs": [*map(_rows, names)], "by": by})
        for by in ("weights", "outputs")
        for b, names in SPLITS.items()
    ),
    *(
        Candidate(f"{n}, power", "power companding", _series(n), posttrain.companded,
                  {"bits": int(n[3]), "block": (1, 128 if n.endswith("-128") else -1)})
        for n in ("int8", *(f"int{b}" for b in BITS), "int4-128", "int3-128", "int2-128")
    ),
    *(
        Candidate(f"{n}{end}", "activations too", series, method,
                  {"spec": _rows(f), "activations": QuantSpec(f, block, Scale("fp32")), **more})
        for end, (series, method, more) in ENDS.items()
        for n, (f, block) in BOTH.items()
    ),
]  # fmt: skip


def targets(model: GPT, everything: bool = False) -> dict[str, Linear]:
    """The Linears that the run quantises at this step, any operand of them; all but the head where it quantises none."""
    modules = linears(model)
    found = {name: m for name, m in modules.items() if everything or m.recipe is not None}
    return found or {name: m for name, m in modules.items() if name != "head"}


@contextmanager
def under(model: GPT, recipe: Recipe, everything: bool = False) -> Iterator[None]:
    """Inside, `targets` follow this recipe and nothing else is quantised. Raises ValueError if a matrix cannot be cut so."""
    modules = targets(model, everything)
    with unquantized(model), torch.no_grad():
        for module in modules.values():
            module.recipe = recipe
            module.check(model.config.seq_len)
        yield


def calibration(model: GPT, modules: dict[str, Linear], corpus: Corpus, windows: int, seed: int = 0) -> dict[str, Tensor]:
    """Linear -> its inputs [windows * T, I] in so many windows of training text, without quantisation."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def noting(name: str):
        return lambda module, inputs: seen[name].append(inputs[0].flatten(0, -2))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(unquantized(model))
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(noting(name)).remove)
        for index in range(windows):
            model(corpus.batch("train", seed, index, 1, model.config.seq_len)[0].to(model.norm.weight.device))
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def _moving(stack: ExitStack, module: Linear, moved: Moved) -> None:
    """Its operands in fp32 until the bias is added, then back in the dtype of x."""
    dtype: list[torch.dtype] = []

    def before(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        dtype[:] = [inputs[0].dtype]
        return ((inputs[0].to(torch.float32) - moved.shift) / moved.scale,)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(lambda module, inputs, y: (y + moved.bias).to(dtype[0])).remove)


@contextmanager
def given(model: GPT, coded: dict[str, Coded]) -> Iterator[None]:
    """Inside, these Linears have what is coded, and nothing else is quantised."""
    modules = linears(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(unquantized(model))
        if model.config.tied_head and "head" in coded:  # the embedding stays as it is
            stack.callback(setattr, model.head, "weight", model.head.weight)
            model.head.weight = nn.Parameter(model.head.weight.clone(), requires_grad=False)
        for name, each in coded.items():
            weight = modules[name].weight
            stack.callback(weight.copy_, weight.clone())  # (in place: a new tensor could have the address of a cached one)
            weight.copy_(each.weight)
            if each.fprop:
                modules[name].recipe = Recipe(each.fprop)
            if each.moved:
                _moving(stack, modules[name], each.moved)
        yield


class Result(NamedTuple):
    name: str
    family: str
    series: str
    bits: float
    row: Row
    error: float | None  # ||w' - w|| / ||w||, over all; None where w' is not to be compared with w
    found: dict[str, list[float]]  # what was searched for: the least and the largest over Linears

    def record(self, base: Row, calibrate: int, whose: str) -> dict:
        """whose: of what, if not of the masters of the Linears that the run quantises."""
        what = {"family": self.family, "series": self.series + whose, "bits": self.bits, **self.row.record(base)}
        return what | {"error": self.error, "found": self.found, "calibration windows": calibrate}


def one(model: GPT, modules: dict[str, Linear], x: dict[str, Tensor], candidate: Candidate, corpus: Corpus, windows: int):
    """-> Result. Raises ValueError if a matrix cannot be coded so."""
    coded = {name: candidate.method(m.weight.detach(), x[name], **candidate.arguments) for name, m in modules.items()}
    sizes = {name: m.weight.numel() for name, m in modules.items()}
    bits = sum(coded[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    error = None
    if not any(each.fprop for each in coded.values()):
        gaps, whole = (
            sum(float(t(name).square().sum()) for name in modules)
            for t in (lambda name: coded[name].weight - modules[name].weight, lambda name: modules[name].weight)
        )
        error = (gaps / whole) ** 0.5
    keys = {key for each in coded.values() for key in each.found}
    found = {key: sorted(each.found.get(key, 0.0) for each in coded.values()) for key in sorted(keys)}
    with given(model, coded):
        measured = row(model, corpus, windows)
    ends = {key: [values[0], values[-1]] for key, values in found.items()}
    return Result(candidate.name, candidate.family, candidate.series, bits, measured, error, ends)


def chosen(globs: list[str]) -> list[Candidate]:
    """Those whose names match one of the globs. Raises ValueError for one that matches none."""
    for glob in globs:
        if not any(fnmatchcase(c.name, glob) for c in CANDIDATES):
            names = ", ".join(repr(c.name) for c in CANDIDATES)
            raise ValueError(f"--only {glob!r} matches no candidate of the sweep; there are {names}")
    return [c for c in CANDIDATES if not globs or any(fnmatchcase(c.name, glob) for glob in globs)]


def line(result: Result, base: Row, width: int) -> str:
    difference, error = result.row.against(base)
    shown = "       -" if result.error is None else f"{result.error:8.2%}"
    found = ", ".join(f"{key} {low:.3g} to {high:.3g}" for key, (low, high) in result.found.items())
    text = f"{result.name:{width}}{result.bits:7.3f}{shown}{result.row.loss:9.4f}{result.row.bpb:10.4f}"
    return f"{text}{difference:+10.4f} +- {error:.4f}  {found}".rstrip()


def sweep(
    model: GPT, corpus: Corpus, candidates: list[Candidate], windows: int, calibrate: int, everything: bool
) -> Iterator[Result | str]:
    """A Result of each candidate, or a line about why there is none."""
    modules = targets(model, everything)
    x = calibration(model, modules, corpus, calibrate)
    for candidate in candidates:
        try:
            yield one(model, modules, x, candidate, corpus, windows)
        except ValueError as error:
            yield f"{candidate.name} is left out: {error}"
