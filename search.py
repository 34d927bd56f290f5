"""python search.py RUN [key=value ...] [--specs FILE] [--out FILE]: a static policy from measured errors, operand by operand.

RUN: a config, which is trained in its compute dtype here and captured at 1, 10, 50 and 100 % of its steps; or a run folder,
captured at each of its checkpoints; or one checkpoint. Captured are the two operands of every GEMM of every Linear (but --skip)
in one micro-batch each time, and measured on the spot, so that no more than those of one GEMM are held. For every candidate,
the cheapest first, put in place of ONE operand, the other exact (the metric is that of arXiv:2408.02897, section IV-A; the
rules are this project's, since the paper's are not known here):

    BE = |l r - q(l) r| / (|l| |r|)     of 256 x 256 elements of the product, in fp64: its median and 99th percentile
    relative error, underflow           as in quant/choice.py
    bias                                ||mean q(x) - x|| / ||x||, the mean over 16 draws where rounding is stochastic

An operand gets the first candidate whose median and 99th percentile, the worst of all captures, are within SLACK times a bound,
else the compute dtype. The bound is what E4M3 with one scale has on normal numbers with the same contraction; or, with --bound
own, what E4M3 within its range has in place of this very operand, which is a fairer measure where few products make up the sum,
as of squared ReLUs: a backward error shrinks with the number of like products. Then both operands of each GEMM are
replaced together, at the last capture: where the median is above JOINT times the root of the sum of their squares, the
worse of the two is promoted to the next candidate, until it fits. BE never chooses a rounding, since it punishes the one
without bias: weights and activations are rounded to nearest, gradients stochastically (--gradients nearest: those too).

Written: FILE, a config that train.py takes as it is, and beside it a table of why, FILE with .txt for .toml.
Left out: a measure of cost but the order of candidates; formats of several layers weighed against each other; a second look
while the policy trains, to promote what has become worse.
"""

import argparse
import io
import itertools
import json
import math
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
from configs import load
from quant import QuantSpec, Recipe, Rule, Scale, quantize
from quant.choose import Operands
from quant.gemm import Operand
from quant.linear import Linear
from quant.policy import unquantized
from quant.quantize import quantized_values
from quant.random import Key
from quant.recipe import OPERANDS, Dgrad, Fprop, Wgrad
from train import Trainer, open_corpus

SLACK, JOINT, SIDE, DRAWS = 1.25, 1.2, 256, 16
SHARES = 0.01, 0.1, 0.5, 1.0  # of a run that is trained here, where it is captured if --at says nothing
GRANULARITIES = {"tensor": (-1, -1), "vector": (1, -1), "128": (1, 128)}
DEFAULT = {f"{fmt}-{name}": QuantSpec(fmt, block, Scale("fp32"))
           for name, block in GRANULARITIES.items() for fmt in ("int8", "e4m3", "e5m2")}  # fmt: skip
IN_RANGE = QuantSpec("e8m3", scale=Scale("none"))  # E4M3 whose range never ends
NAMES = {gemm: [o for o in OPERANDS if o.startswith(gemm)] for gemm in ("fprop", "dgrad", "wgrad")}


class Errors(NamedTuple):
    """Of one candidate for one operand."""

    median: float
    p99: float
    relative: float
    underflow: float

    def worst(self, other: "Errors | None") -> "Errors":
        """Of each the larger, or what is no number: that is within no bound."""
        return self if other is None else Errors(*(max(a, b, key=lambda v: math.inf if math.isnan(v) else v)
                                                   for a, b in zip(self, other, strict=True)))  # fmt: skip


Measured = dict[tuple[str, str], dict[str, Errors]]  # (module, operand) -> candidate -> its errors


def some(rows: int, device=None) -> Tensor:
    """At most SIDE of the rows, evenly."""
    return torch.arange(min(rows, SIDE), device=device) * rows // min(rows, SIDE)


def backward_errors(l: Tensor, q: Tensor, r: Tensor, p: Tensor | None = None) -> tuple[float, float]:  # noqa: E741
    """l, q [M, K], r, p [N, K], q and p what stands for l and r (None: itself) -> median and 99th percentile of the BE."""
    i, j = some(len(l), l.device), some(len(r), l.device)
    l, q, r = (t[k].double() for t, k in ((l, i), (q, i), (r, j)))  # noqa: E741
    if p is None:
        return spread_of((l - q) @ r.t(), l.abs() @ r.abs().t())
    return spread_of(l @ r.t() - q @ p[j].double().t(), l.abs() @ r.abs().t())


def spread_of(gap: Tensor, size: Tensor) -> tuple[float, float]:
    """Median and 99th percentile of |gap| / size, 0 where both are."""
    ordered = torch.where(gap == 0, 0.0, gap.abs() / size).flatten().sort().values
    return float(ordered[len(ordered) // 2]), float(ordered[len(ordered) * 99 // 100])


@cache
def reference(k: int) -> tuple[float, float]:
    """Median and 99th percentile of E4M3 with one scale on normal numbers [1024, K]."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1024, k, generator=g), torch.randn(SIDE, k, generator=g)
    return backward_errors(x, quantize(x, DEFAULT["e4m3-tensor"]).dequantize(), w)


def dense(x: Tensor, spec: QuantSpec, key: Key | None = None) -> Tensor:
    return Operand(*quantized_values(x, spec, key)).dense()


class Measure:
    """The errors of candidates for x [M, K], other [N, K] exact."""

    def __init__(self, x: Tensor, other: Tensor):
        i, j = some(len(x), x.device), some(len(other), x.device)
        self.x, self.rows, self.some, self.other = x, i, x[i].double(), other[j].double().t()
        self.size = self.some.abs() @ self.other.abs()
        self.own = Operands(x, None, (-1, -1))

    def errors(self, spec: QuantSpec) -> Errors:
        q = Operand(*self.own.logical_values(spec)).dense()
        relative, underflow = (float(self.own.metric(by, spec)) for by in ("relative_error", "underflow"))
        return Errors(*spread_of((self.some - q[self.rows].double()) @ self.other, self.size), relative, underflow)


def bias(x: Tensor, spec: QuantSpec) -> float:
    """||mean q(x) - x|| / ||x||, over DRAWS if the spec is stochastic."""
    draws = [dense(x, spec, Key(draw)).double() for draw in range(DRAWS if spec.stochastic else 1)]
    return float((sum(draws) / len(draws) - x.double()).norm()) / (float(x.double().norm()) or 1.0)


def fits(x: Tensor, spec: QuantSpec) -> bool:
    rows, k = spec.multiple
    return x.shape[0] % rows == 0 and x.shape[1] % k == 0


# --- where operands come from ---


Tap = Callable[[Linear, str, Operand, Operand, Tensor], None]


class Captures:
    """A model at several places of a run; `each(tap)` lets tap see the operands of a micro-batch at every one."""

    def __init__(self, run: Path, overrides: list[str], at: list[int] | None = None):
        self.path, self.folders = run, []
        if not run.is_dir():
            self.config = load(run, overrides)
        else:
            found = checkpoint.find(run)
            steps = checkpoint.steps(run) if found != run else []
            if wrong := [step for step in at or [] if step not in steps]:
                there = ", ".join(map(str, steps)) or "itself only"
                raise ValueError(f"--at {wrong[0]}: {run} has checkpoints of steps {there}")
            self.folders = [checkpoint.step_folder(run, step) for step in at or steps] or [found]
            self.config = load(checkpoint.config_file(found), overrides)
        steps = self.config.train.steps
        self.at = sorted(set(at or (max(1, math.ceil(share * steps)) for share in SHARES)))
        if not self.folders and not 1 <= self.at[0] <= self.at[-1] <= steps:
            raise ValueError(f"--at {' '.join(map(str, self.at))}: expected steps from 1 to train.steps = {steps}")
        self.last = False  # whether the capture is the last one
        self.source = checkpoint.config_file(self.folders[0]) if self.folders else run
        if self.config.train.recompute != "none" or self.config.train.compile == "model":
            print(f"search: {run} without train.recompute and with train.compile=quantiser, to see each GEMM once")
        once = replace(self.config.train, recompute="none", compile="quantiser")  # each GEMM once, where it can be seen
        plain = replace(self.config, train=once, policy=(Rule(recipe="bf16"),), weights=type(self.config.weights)())
        self.corpus = open_corpus(plain)
        with redirect_stdout(io.StringIO()):
            self.trainer = Trainer(plain, SimpleNamespace(start=0), self.corpus)
            self.trainer.set_policy(0)

    def each(self, tap: Tap) -> Iterator[int]:
        """-> the steps, after the capture of each, while the model is still as it was then."""
        steps = self.config.train.steps
        for step in range(0 if self.folders else self.at[-1]):
            if step + 1 in self.at:
                self.last = step + 1 == self.at[-1]
                self.capture(step, tap)
                yield step + 1
            loss = self.trainer.step(step)[0]
            if (step + 1) % 20 == 0:
                print(f"step {step + 1:5}/{steps}  loss {float(loss):.4f}", flush=True)
        for folder in self.folders:
            checkpoint.intact(folder)
            state = checkpoint.restore(folder, self.trainer.shards, self.trainer.optimizer, self.trainer.store)
            self.last = folder == self.folders[-1]
            self.capture(state["step"], tap)
            yield state["step"]

    def capture(self, step: int, tap: Tap) -> None:
        """Forward and backward of the first micro-batch of a step; nothing changes but the gradients, which are dropped."""
        self.step = step
        trainer, t = self.trainer, self.config.train
        number = step * t.micro_batches
        trainer.context.at(step, number)
        trainer.context.tap = tap
        with unquantized(trainer.model):
            trainer.loss(*self.corpus.batch("train", t.seed, number, t.batch_size, self.config.model.seq_len)).backward()
        trainer.context.tap = None
        trainer.optimizer.zero_grad(set_to_none=True)


# --- the search ---


class Search:
    def __init__(self, candidates: dict[str, QuantSpec], stochastic: bool, skip: list[str], bound: str = "normal"):
        self.candidates, self.stochastic, self.skip, self.bound = candidates, stochastic, skip, bound
        self.measured: Measured = {}
        self.bounds: dict[tuple[str, str], Errors] = {}
        self.biases: dict[tuple[str, str], float] = {}
        self.chosen: dict[tuple[str, str], str] = {}  # candidate, "" for the compute dtype
        self.joint: dict[tuple[str, str], tuple[float, float]] = {}  # (module, gemm) -> median together, bound

    def skips(self, module: Linear) -> bool:
        return any(fnmatchcase(module.name, glob) for glob in self.skip)

    def measure(self, module: Linear, gemm: str, a: Operand, b: Operand, y: Tensor) -> None:
        if self.skips(module):
            return
        pair = a.values.detach(), b.values.detach()
        for operand, x, other in zip(NAMES[gemm], pair, pair[::-1], strict=True):
            place, measure = (module.name, operand), Measure(x, other)
            found = self.measured.setdefault(place, {})
            for name, spec in self.candidates.items():
                if fits(x, replace(spec, rounding="stochastic") if self.stochastic and operand[-1] == "g" else spec):
                    found[name] = measure.errors(spec).worst(found.get(name))
            bound = Errors(*reference(x.shape[1]), 0, 0) if self.bound == "normal" else measure.errors(IN_RANGE)
            self.bounds[place] = bound.worst(self.bounds.get(place))

    def passes(self, place: tuple[str, str], name: str) -> bool:
        found, bound = self.measured[place][name], self.bounds[place]
        return found.median <= SLACK * bound.median and found.p99 <= SLACK * bound.p99

    def choose(self) -> None:
        for place, found in self.measured.items():
            self.chosen[place] = next((name for name in found if self.passes(place, name)), "")

    def promote(self, place: tuple[str, str]) -> None:
        """To the next candidate with a smaller median, or the compute dtype."""
        found, names = self.measured[place], list(self.measured[place])
        rest = names[names.index(self.chosen[place]) + 1 :]
        now = found[self.chosen[place]].median
        self.chosen[place] = next((n for n in rest if self.passes(place, n) and found[n].median < now), "")

    def check(self, module: Linear, gemm: str, a: Operand, b: Operand, y: Tensor) -> None:
        """Both operands of a GEMM together."""
        if self.skips(module):
            return
        places = [(module.name, operand) for operand in NAMES[gemm]]
        x, w = a.values.detach(), b.values.detach()
        self.fit(places, module, gemm, x, w)
        for place, t in zip(places, (x, w), strict=True):
            if spec := self.spec(place):
                self.biases[place] = bias(t, spec)

    def spec(self, place: tuple[str, str]) -> QuantSpec | None:
        """What was chosen, with its rounding."""
        name = self.chosen[place]
        spec = self.candidates[name] if name else None
        return replace(spec, rounding="stochastic") if spec and place[1][-1] == "g" and self.stochastic else spec

    def fit(self, places: list[tuple[str, str]], module: Linear, gemm: str, x: Tensor, w: Tensor) -> None:
        while all(self.chosen[place] for place in places):
            q, p = (dense(t, self.candidates[self.chosen[place]]) for t, place in zip((x, w), places, strict=True))
            singles = [backward_errors(x, q, w)[0], backward_errors(w, p, x)[0]]
            median, bound = backward_errors(x, q, w, p)[0], JOINT * math.hypot(*singles)
            self.joint[module.name, gemm] = median, bound
            if median <= bound:
                return
            del self.joint[module.name, gemm]
            self.promote(places[singles.index(max(singles))])

    def recipes(self) -> dict[str, tuple[Recipe, list[str]]]:
        """Name -> a recipe and the modules that have it."""
        groups: dict[Recipe, list[str]] = {}
        for module in dict.fromkeys(module for module, _ in self.chosen):
            o = {operand: self.spec((module, operand)) for operand in OPERANDS if (module, operand) in self.chosen}
            o = dict.fromkeys(OPERANDS) | o
            recipe = Recipe(
                Fprop(o["fprop.x"], o["fprop.w"]), Dgrad(o["dgrad.g"], o["dgrad.w"]), Wgrad(o["wgrad.g"], o["wgrad.x"])
            )
            groups.setdefault(recipe, []).append(module)
        return {f"search-{i}": group for i, group in enumerate(groups.items(), 1)}

    def why(self) -> list[str]:
        """A line for each operand: what it got, its errors, and what the candidate before it failed by."""
        heads = ("BE median", "bound", "p99", "bound", "relative", "underflow", "bias")
        lines = [f"{'operand':30} {'got':12}" + "".join(f"{head:>11}" for head in heads) + "   cheaper ones, how far above"]
        for (module, operand), name in self.chosen.items():
            found, bound = self.measured[module, operand], self.bounds[module, operand]
            bounds = SLACK * bound.median, SLACK * bound.p99
            row = f"{module + ' ' + operand:30} {name or 'bf16':12}"
            if name:
                e = found[name]
                row += "".join(f"{v:11.2e}" for v in (e.median, bounds[0], e.p99, bounds[1]))
                row += "".join(f"{v:11.2%}" for v in (e.relative, e.underflow, self.biases.get((module, operand), math.nan)))
            failed = [n for n in found if n != name][: list(found).index(name) if name else None]
            words = [f"{n} ({max(found[n].median / bounds[0], found[n].p99 / bounds[1]):.1f} x)" for n in failed]
            lines.append(f"{row}  {', '.join(words[:3])}{' ...' * (len(words) > 3)}")
        together = [f"{m} {g}: {median:.2e} together, bound {bound:.2e}" for (m, g), (median, bound) in self.joint.items()]
        return [*lines, "", *together]

    def counts(self) -> list[str]:
        """A line for each operand: how many Linears got what."""
        lines = []
        for operand in OPERANDS:
            got = [name or "bf16" for (_, o), name in self.chosen.items() if o == operand]
            lines.append(f"{operand}  " + ", ".join(f"{got.count(name)} {name}" for name in dict.fromkeys(got)))
        return lines


def config_text(search: Search, captures: Captures, out: Path, command: str, overrides: list[str], steps: list[int]) -> str:
    """The config, as TOML: what is new over the one that was searched, under names that that one has not."""
    given = {key.strip(): value for key, _, value in (o.partition("=") for o in overrides) if not key.startswith("run.")}
    head = [
        "#:schema schema.json",
        "# A policy by measured errors: each operand in the cheapest format that passes (search.py, arXiv:2408.02897). Made by",
        f"#   {command}",
        f"# from captures at steps {', '.join(map(str, steps))}; why, of each: {out.with_suffix('.txt').name}. Operands of "
        f"{len({m for m, _ in search.chosen})} Linears:",
        *(f"#   {line}" for line in search.counts()),
        f'extends = "{os.path.relpath(captures.source.resolve(), out.resolve().parent)}"',
        *(f"{key} = {toml(value)}" for key, value in given.items()),
    ]
    groups, names, taken = search.recipes(), {}, captures.config
    lines = ["", "[specs]"]
    for spec in dict.fromkeys(spec for recipe, _ in groups.values() for spec in recipe.operands().values() if spec):
        near = replace(spec, rounding="nearest")
        base = next(name for name, c in search.candidates.items() if replace(c, rounding="nearest") == near)
        names[spec] = unused(base + "-sr" * spec.stochastic, {*taken.specs, *names.values()})
        lines.append(f"{names[spec]} = {spec_text(spec)}")
    called = {name: unused(name, taken.recipes) for name in groups}
    for name, (recipe, _) in groups.items():
        lines += ["", f"[recipes.{called[name]}]"]
        for gemm, operands in NAMES.items():
            found = {o[6:]: recipe.operands()[o] for o in operands}
            if any(found.values()):
                lines.append(f"{gemm} = {{ " + ", ".join(f'{o} = "{names[s]}"' for o, s in found.items() if s) + " }")
    for name, (_, modules) in groups.items():
        for module in modules:
            lines += ["", "[[policy]]", f'match = "{module}"', f'recipe = "{called[name]}"']
    return "\n".join([*head, *lines, "", "[[policy]]", 'recipe = "bf16"', ""])


def unused(name: str, taken: Iterable[str]) -> str:
    """The name, or with a number, if that one is taken."""
    taken = set(taken)
    return next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)


def toml(value: str) -> str:
    """The value of an override as it stands in a file: what is no TOML is a string."""
    try:
        tomllib.loads(f"value = {value}")
        return value
    except tomllib.TOMLDecodeError:
        return json.dumps(value.strip())


def spec_text(spec: QuantSpec) -> str:
    """A spec as an inline table, without what is the default."""

    def text(value) -> str:
        if isinstance(value, Scale):
            return table(value, Scale(value.format), {"format"})
        if isinstance(value, str | bool):
            return json.dumps(value)
        return str(list(value)) if isinstance(value, tuple) else repr(value)

    def table(value, default, always: set[str]) -> str:
        names = [n for n in vars(value) if n in always or getattr(value, n) != getattr(default, n)]
        return "{ " + ", ".join(f"{n} = {text(getattr(value, n))}" for n in names) + " }"

    return table(spec, QuantSpec(), {"format", "block", "scale"})


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("override", nargs="*", default=[], help="key=value of its config")
    parser.add_argument("--specs", type=Path, metavar="FILE", help="a config whose [specs] are the candidates, cheapest first; "
                        "default: INT8, E4M3, E5M2 with fp32 scales of a tensor, a vector, 128 elements")  # fmt: skip
    parser.add_argument("--at", type=int, nargs="*", metavar="STEP", help="where to capture; default: see above")
    parser.add_argument("--bound", choices=["normal", "own"], default="normal", help="what errors are compared with")
    parser.add_argument("--gradients", choices=["stochastic", "nearest"], default="stochastic", help="their rounding")
    parser.add_argument(
        "--skip", nargs="*", default=["head"], metavar="GLOB", help="Linears that stay as they are; default: head"
    )
    parser.add_argument("--out", type=Path, default=Path("out/search.toml"), metavar="FILE", help="default out/search.toml")
    args = parser.parse_intermixed_args(argv)
    if args.out.suffix != ".toml":
        raise ValueError(f"--out {args.out}: expected a file that ends in .toml")
    if wrong := [o for o in args.override if o.split(".")[0].strip() in ("specs", "recipes", "policy")]:
        raise ValueError(f"override {wrong[0]!r}: specs, recipes and policy are what is searched for; --specs names candidates")
    candidates = {n: s for n, s in load(args.specs).specs.items() if isinstance(s, QuantSpec)} if args.specs else DEFAULT
    if not candidates:
        raise ValueError(f"--specs {args.specs}: it has no [specs], so there are no candidates")
    for name, c in candidates.items():
        if c.keyed or c.hadamard or c.scale.history or c.center or c.source != "original":
            what = "expected a spec rounded to nearest, without hadamard, history, center and source"
            raise ValueError(f"--specs {args.specs}: {name} is {c.short()}: {what}")
    captures = Captures(args.run, args.override, args.at)
    search, steps = Search(candidates, args.gradients == "stochastic", args.skip, args.bound), []
    print(f"search: {args.run}, {len(candidates)} candidates: {', '.join(candidates)}", flush=True)
    for step in captures.each(search.measure):
        steps.append(step)
        print(f"search: step {step}: {len(search.measured)} operands measured", flush=True)
        if captures.last:
            search.choose()
            captures.capture(captures.step, search.check)
    if not search.chosen:
        raise ValueError(f"--skip {' '.join(args.skip)}: no Linear is left to search for")
    command = " ".join(["python search.py", *map(shlex.quote, argv)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(config_text(search, captures, args.out, command, args.override, steps))
    table = args.out.with_suffix(".txt")
    table.write_text("\n".join(search.why()) + "\n")
    made = load(args.out)
    found = {m: made.recipes[rule.recipe] for rule in made.policy[:-1] for m in [rule.match]}
    assert found == {m: recipe for recipe, modules in search.recipes().values() for m in modules}
    print("\n".join(["", *search.counts(), "", f"policy   {args.out}  (make train CONFIG={args.out})", f"why      {table}"]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nsearch.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"search.py: {error}", file=sys.stderr)
        sys.exit(2)
