"""python -m studies.metric [--train]: does the backward error of a recipe foretell its loss? (The thesis of arXiv:2408.02897.)

The operands of every GEMM of the tiny model, trained in BF16 for 100 steps, in one micro-batch; what each recipe of configs/
makes of them; BE = |l r - q(l) q(r)| / (|l| |r|) of 256 x 256 elements, in fp64: the median, of which the mean over all GEMMs
that the recipe quantises; and beside it the mean relative error of the operands. Against it the gap of the recipe's final loss
to BF16 (of docs/measured.json, one seed each), and Spearman's rank correlation. --train: first the loss of INT8 with one scale
for each tensor, rounded to nearest, beside which the paper's search is to be seen. Printed, and drawn to docs/metric.png. What
it is not: strong evidence. Nearly all of these gaps are within what seeds do.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from configs import load
from quant.choice import Spec
from quant.gemm import Operand
from quant.linear import Linear
from quant.quantize import quantized_values
from quant.random import Key
from quant.recipe import Recipe
from run import Run
from search import NAMES, Captures, backward_errors
from studies.recipes import BASE, MEASURED, ROOT, SPREAD, measured, outcome

STEP = 100
UNIFORM, OVERRIDES = "int8-tensor", ["specs.i8.block=[-1,-1]", "specs.i8.rounding=nearest", "specs.i8sr.rounding=nearest"]


def losses() -> dict[str, float]:
    """Name -> final loss: the outcomes, and what --train has found."""
    known = measured()
    found = {name: outcome["loss"] for name, outcome in known["outcomes"].items()}
    return found | {UNIFORM: known["metric"][UNIFORM]} if UNIFORM in known.get("metric", {}) else found


def recipes() -> dict[str, Recipe]:
    """Name of a config -> its recipe of most Linears, of those that are operands and nothing else."""
    found = {}
    for name in losses():
        config = load(ROOT / "configs/int8.toml", OVERRIDES) if name == UNIFORM else load(ROOT / f"configs/{name}.toml")
        recipe = config.recipes.get(config.policy[-1].recipe)
        if recipe is None or recipe.rotate or config.weights.store or config.sites.short():
            continue
        specs = [spec for spec in recipe.operands().values() if spec]
        if not any(s.center or s.source == "fprop" or s.scale.history or s.scale.correction == "eden" for s in specs):
            found[name] = recipe
    return found


def dense(x: Tensor, spec: Spec | None, number: int) -> Tensor:
    """fp32, by the spec, in its transform's basis; `number`: 0 or 1, which operand of the GEMM it is."""
    keys = (Key(0, use=number), Key(0, use=16)) if spec and spec.keyed else (None, None)
    return x.float() if spec is None else Operand(*quantized_values(x, spec, *keys)).dense()


def errors(found: dict[str, Recipe]) -> dict[str, tuple[float, float]]:
    """Name -> (mean of the median BE, mean relative error) over GEMMs."""
    captures = Captures(ROOT / f"configs/{BASE}.toml", [f"train.steps={STEP}"])
    be: dict[str, list[float]] = {name: [] for name in found}
    relative: dict[str, list[float]] = {name: [] for name in found}

    def tap(module: Linear, gemm: str, a: Operand, b: Operand, y) -> None:
        if module.name == "head":
            return
        x, w = a.values.detach(), b.values.detach()
        for name, recipe in found.items():
            specs = [recipe.operands()[o] for o in NAMES[gemm]]
            if not any(specs):
                continue
            l, r = (dense(t, spec, i) for i, (t, spec) in enumerate(zip((x, w), specs, strict=True)))  # noqa: E741
            be[name].append(backward_errors(x, l, w, r)[0])
            for q, t, spec in zip((l, r), (x.float(), w.float()), specs, strict=True):
                if spec and not spec.hadamard:  # in another basis only the product compares
                    relative[name].append(float(((q - t).abs() / t.abs())[t != 0].double().mean()))

    for _ in captures.each(lambda *what: None):
        pass
    captures.capture(STEP - 1, tap)
    return {name: (float(np.mean(be[name])), float(np.mean(relative[name] or [np.nan]))) for name in found}


def remember(found: dict) -> None:
    known = measured()
    MEASURED.write_text(json.dumps(known | {"metric": known.get("metric", {}) | found}, indent=1) + "\n")


def spearman(x: list[float], y: list[float]) -> float:
    a, b = (np.argsort(np.argsort(v)) for v in (x, y))
    return float(np.corrcoef(a, b)[0, 1])


def draw(rows: list[tuple[str, float, float, float]], rho: float, path: Path) -> None:
    """A line for each recipe, in the order of their errors, so that no name covers another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.2 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    left.plot([be for _, be, _, _ in rows], places, "o", ms=5)
    left.set(xscale="log", xlabel="median backward error, mean over GEMMs")
    left.set_yticks(places, [name for name, *_ in rows], fontsize=8)
    right.axvspan(-SPREAD, SPREAD, color="0.92", label=f"seeds: ±{SPREAD}")
    right.plot([gap for *_, gap in rows], places, "o", ms=5)
    right.set_xlabel("final validation loss − BF16 (nats/token)")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Measured error and loss of {len(rows)} recipes: Spearman {rho:+.2f}", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args(argv)
    commit = Run.commit()
    if args.train:
        remember({UNIFORM: round(outcome(UNIFORM, "int8", OVERRIDES), 4)})
    loss, found = losses(), recipes()
    measures = errors(found)
    rows = [(name, *measures[name], loss[name] - loss[BASE]) for name in found]
    rows.sort(key=lambda row: row[1])
    print(f"{'recipe':16} {'BE':>9} {'relative':>9} {'loss gap':>9}")
    for name, be, relative, gap in rows:
        print(f"{name:16} {be:9.2e} {'-' if relative != relative else f'{relative:.2%}':>9} {gap:+9.4f}")
    rho = spearman([r[1] for r in rows], [r[3] for r in rows])
    print(f"\nSpearman's rank correlation of BE and loss gap over {len(rows)} recipes: {rho:+.2f}")
    remember({"spearman": round(rho, 3), "recipes": len(rows), "commit": commit})
    draw(rows, rho, ROOT / "docs/metric.png")
    print("written to docs/measured.json and docs/metric.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstudies.metric: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.metric: {error}", file=sys.stderr)
        sys.exit(2)
