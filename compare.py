"""python compare.py A B [key=value ...] [--steps N] [--from STEP] [--apart D]: why did it diverge?

A and B are configs or run folders. Both train side by side in this process, from one seed and one order of data, from the
beginning or each from its own checkpoint of STEP. For every GEMM of every Linear, in the order in which they run, its operands,
as they are multiplied (but turned back, where they are transformed), and what it gives are compared:

    apart = ||a - b|| / ||b||        error = ||q - x|| / ||x|| of a quantised operand, of each run for itself

Printed: the first place where values are apart by more than D, the first where the errors of both differ by more than that, and
the ten worst of each after it; all goes to out/compare.json too. Nothing is written into the runs.
Left out: what lies between Linears (attention, norms), whose products show it; runs that do not fit into memory together.
"""

import argparse
import io
import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
from configs import Config, load
from quant import Linear
from quant.gemm import Operand
from quant.metrics import STATS
from quant.recipe import OPERANDS
from train import Trainer, open_corpus

NAMES = {gemm: [o for o in OPERANDS if o.startswith(gemm)] for gemm in ("fprop", "dgrad", "wgrad")}


class Found(NamedTuple):
    """At a step and micro-batch: how far values are apart there, and the error of either run (None: not quantised)."""

    step: int
    micro_batch: int
    place: str
    apart: float
    a: float | None
    b: float | None

    def line(self) -> str:
        errors = "  ".join("      -" if e is None else f"{e:7.2%}" for e in (self.a, self.b))
        return f"{self.step:6} {self.micro_batch:5}  {self.place:32} {self.apart:9.3%}    {errors}"

    @property
    def errors_apart(self) -> float:
        a, b = (0.0 if e is None else e for e in (self.a, self.b))
        return 0.0 if a == b else abs(a - b)


HEADER = f"{'step':>6} {'batch':>5}  {'place':32} {'apart':>9}    {'error A':>7}  {'error B':>7}"


def config_of(path: Path, overrides: list[str]) -> Config:
    """Of a config, or of a run folder."""
    return load(path / "config.toml" if path.is_dir() else path, overrides)


def plain(config: Config) -> Config:
    """With each GEMM run once, where it can be seen."""
    if config.train.recompute != "none" or config.train.compile == "model":
        print(f"compare: {config.source} without train.recompute and with train.compile=quantiser, to see each GEMM once")
    return replace(config, train=replace(config.train, recompute="none", compile="quantiser"))


def same_data(a: Config, b: Config) -> None:
    """Raises ValueError if the two do not see the same batches, do not have the same Linears, or round by different rules (of
    which a process has one)."""
    keys = ["train.seed", "train.batch_size", "train.micro_batches", "train.rounding", "data", "model"]
    keys += ["train.steps"] * bool(a.data.phases)  # which are shares of it
    for key in keys:
        x, y = a, b
        for part in key.split("."):
            x, y = getattr(x, part), getattr(y, part)
        if x != y:
            raise ValueError(f"A and B cannot be compared: {key} is {x!r} and {y!r}; overrides apply to both")


def apart(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinite where only one of them is finite."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    gap, size = (float(t.nan_to_num(0, 0, 0).norm()) for t in (a - b, b))
    return gap / size if size else 0.0 if gap == 0 else math.inf


def error_of(stats: Tensor | None) -> float | None:
    """||q - x|| / ||x||, from what metrics.operand_stats has measured; infinite where that is not finite."""
    if stats is None:
        return None
    found = 10 ** (-float(stats[STATS.index("sqnr_db")]) / 20)
    return math.inf if math.isnan(found) else found


def places(module: Linear, gemm: str, a: Operand, b: Operand, y: Tensor) -> dict[str, Tensor]:
    """Place -> what is there, fp32."""
    operands = {f"{module.name}/{o}": module.plain(o, x) for o, x in zip(NAMES[gemm], (a, b), strict=True)}
    return operands | {f"{module.name}/{gemm}": y.float()}


def trainer_for(config: Config, path: Path, start: int, corpus) -> Trainer:
    with redirect_stdout(io.StringIO()):
        trainer = Trainer(config, SimpleNamespace(start=start), corpus)
        if start:
            folder = checkpoint.find(checkpoint.step_folder(path, start))
            checkpoint.intact(folder)
            checkpoint.restore(folder, trainer.shards, trainer.optimizer, trainer.store)
        trainer.context.decisions = None
    return trainer


def step(trainer: Trainer, number: int, tap) -> float:
    """One training step, what its GEMMs multiply given to `tap(micro-batch, places)` -> its loss."""
    per_step = trainer.config.train.micro_batches
    context = trainer.context
    context.tap = lambda *what: tap(int(context.counters[0]) % per_step, places(*what))
    with redirect_stdout(io.StringIO()):
        trainer.set_policy(number)
    return float(trainer.step(number)[0])


def compare(a: Trainer, b: Trainer, steps: range, report=print) -> list[Found]:
    """Train both, in step. -> what was found at every place, in order."""
    found: list[Found] = []
    for number in steps:
        first, losses = len(found), []
        seen: dict[tuple[int, str], tuple[Tensor, float | None]] = {}

        def keep(micro_batch: int, there: dict[str, Tensor], seen=seen) -> None:
            for place, x in there.items():
                seen[micro_batch, place] = x, error_of(a.context.stats.pop(place, None))

        def check(micro_batch: int, there: dict[str, Tensor], seen=seen, number=number) -> None:
            for place, x in there.items():
                ours, error = seen.pop((micro_batch, place))
                other = error_of(b.context.stats.pop(place, None))
                found.append(Found(number + 1, micro_batch, place, apart(ours, x), error, other))

        for trainer, tap in ((a, keep), (b, check)):
            trainer.context.stats = {}
            losses.append(step(trainer, number, tap))
        worst = max(found[first:], key=lambda f: f.apart)
        parted = f"furthest apart {worst.apart:.2%} at {worst.place}"
        report(f"step {number + 1:5}  loss A {losses[0]:.4f}  B {losses[1]:.4f}  {parted}")
    return found


def summary(found: list[Found], bound: float) -> dict[str, list[Found]]:
    """What -> the first beyond the bound, and the ten worst after it (the worst time of each place)."""
    sections = {}
    for what, size in (("values", lambda f: f.apart), ("errors", lambda f: f.errors_apart)):
        first = next((i for i, f in enumerate(found) if size(f) > bound), None)
        worst: dict[str, Found] = {}
        for f in found[first + 1 :] if first is not None else ():
            if f.place not in worst or size(f) > size(worst[f.place]):
                worst[f.place] = f
        ten = sorted(worst.values(), key=size, reverse=True)[:10]
        sections[what] = [found[first], *ten] if first is not None else []
    return sections


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("override", nargs="*", default=[], help="key=value, for both")
    parser.add_argument("--steps", type=int, default=5, help="how many; default 5")
    parser.add_argument(
        "--from", type=int, default=0, dest="start", metavar="STEP", help="checkpoints of this step; default 0: the beginning"
    )
    parser.add_argument("--apart", type=float, default=0.2, metavar="D", help="the bound; default 0.2")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 1 or args.start < 0 or args.apart < 0:
        parser.error("--steps is at least 1, --from and --apart at least 0")
    configs = [plain(config_of(path, args.override)) for path in (args.a, args.b)]
    same_data(*configs)
    end = min(args.start + args.steps, *(c.train.steps for c in configs))
    if end <= args.start:
        raise ValueError(f"--from {args.start}: both have {end} steps, so none is left to compare")
    corpus = open_corpus(configs[0])
    a, b = (
        trainer_for(replace(c, source=str(p)), p, args.start, corpus) for c, p in zip(configs, (args.a, args.b), strict=True)
    )
    print(f"A {args.a}, B {args.b}: seed {configs[0].train.seed}, steps "
          f"{args.start + 1} to {end}")  # fmt: skip
    found = compare(a, b, range(args.start, end))
    sections = summary(found, args.apart)
    for what, rows in sections.items():
        named = {"values": "values are apart", "errors": "errors of A and B differ"}[what]
        if not rows:
            print(f"\nnowhere {named} by more than {args.apart:g}")
            continue
        print(
            f"\nthe first place where {named} by more than {args.apart:g}, and the worst after it\n{HEADER}\n{rows[0].line()}"
        )
        print("\n".join(["", *(row.line() for row in rows[1:])]))
    path = Path("out/compare.json")
    path.parent.mkdir(exist_ok=True)
    kept = {what: [row._asdict() for row in rows] for what, rows in sections.items()}
    path.write_text(json.dumps({"a": str(args.a), "b": str(args.b), "apart": args.apart, **kept}, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ncompare.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
