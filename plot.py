"""python plot.py RUN [RUN ...]: pictures of runs, from their metrics.jsonl.

    RUN/loss.png       loss of every step, validation as trained and not quantised
    RUN/choices.png    of a run with ladders (quant/choice.py): shares of the formats over time; what stayed in 16 bits, as a
                       heat map module x operand; the relative errors of the cheapest format in bins of 0.005, with the
                       bounds; the ten operands that fell back most
    RUN/gap.png        of several: losses of the others as gaps to the first run, step by step and at validations; into the last

`train.py` draws the first two at the end of a run. Left out: what tensorboard shows anyway (`tensorboard --logdir out`).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import Config, load
from quant.choice import Choice
from quant.decisions import BIN, BINS
from quant.formats import FORMATS
from quant.recipe import OPERANDS

SHARE = re.compile(r"quant/(.+)/((?:fprop|dgrad|wgrad)\.[xwg])/share/(.+)")
SMOOTH = 10  # steps over which gaps of training losses are averaged


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without a last line that is still being written. Raises ValueError if there is none."""
    path, lines = run / "metrics.jsonl", []
    if not path.exists():
        raise ValueError(f"{run}: no run (it has no metrics.jsonl)")
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise ValueError(f"{path}: nothing has been logged yet")
    return lines


def over_run(lines: list[dict], value: Callable[[dict], float | None]) -> float | None:
    """The mean over steps of what is logged for all steps since the line before; None where `value` is always None."""
    found = [(v, len(line["losses"])) for line in lines if (v := value(line)) is not None]
    return sum(v * n for v, n in found) / sum(n for _, n in found) if found else None


def high(share: dict[str, float]) -> float:
    """Of the shares of candidates, those of 16 bits and more."""
    return sum(v for name, v in share.items() if FORMATS[name.split("/")[0].split()[0]].bits >= 16)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # half a second to import, and only needed at the end

    return Figure(figsize=(width, height), layout="constrained")


def losses(lines: list[dict]) -> dict[int, float]:
    """Step -> its training loss."""
    ends = [0] + [line["step"] for line in lines]
    return {end + 1 + i: v for end, line in zip(ends, lines, strict=False) for i, v in enumerate(line["losses"])}


def loss(run: Path) -> Path:
    """loss.png."""
    lines, figure = lines_of(run), _figure(7, 4.5)
    axes = figure.subplots()
    points = losses(lines)
    axes.plot(points.keys(), points.values(), lw=0.8, label="training, each step")
    validated = [line for line in lines if "val_loss" in line]
    for key, style, label in (
        ("val_loss", "o-", "validation, as trained"),
        ("val_loss_bf16", "x", "validation, not quantised"),
    ):
        axes.plot([line["step"] for line in validated], [line[key] for line in validated], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats/token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"


def gap(runs: list[Path]) -> Path:
    """gap.png, in the last of the runs: the others against the first."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    first = lines_of(runs[0])
    base, validated = losses(first), {line["step"]: line["val_loss"] for line in first if "val_loss" in line}
    for run in runs[1:]:
        lines = lines_of(run)
        found = {s: 100 * (v / base[s] - 1) for s, v in losses(lines).items() if s in base}
        steps, values = list(found), list(found.values())
        means = [sum(values[max(0, i - SMOOTH + 1) : i + 1]) / min(i + 1, SMOOTH) for i in range(len(values))]
        (drawn,) = axes.plot(steps, means, lw=1, label=run.name)
        points = [(line["step"], 100 * (line["val_loss"] / validated[line["step"]] - 1)) for line in lines
                  if "val_loss" in line and line["step"] in validated]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=drawn.get_color())
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set(
        xlabel="step",
        ylabel=f"loss above that of {runs[0].name} (%)",
        title=f"lines: training, mean of {SMOOTH} steps; dots: validation",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(runs[-1] / "gap.png", dpi=120)
    return runs[-1] / "gap.png"


def shares(line: dict) -> dict[tuple[str, str], dict[str, float]]:
    """(module, operand) -> candidate, cheapest first -> its share, from one line of metrics."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in line.items():
        if match := SHARE.fullmatch(key):
            found.setdefault((match[1], match[2]), {})[match[3]] = value
    return found


def heat_map(axes, fell: dict[tuple[str, str], float], title: str) -> None:
    """module x operand -> share, 0 to 1, written into its cell."""
    modules, operands = list(dict.fromkeys(m for m, _ in fell)), list(OPERANDS)
    grid = [[fell.get((m, o), float("nan")) for o in operands] for m in modules]
    axes.imshow(grid, vmin=0, vmax=1, cmap="Reds", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            text = "" if value != value else f"{value:.0%}" if value else "·"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(operands)), operands, fontsize=8)
    axes.set_yticks(range(len(modules)), modules, fontsize=7)
    axes.set_title(title, fontsize=10)


def fallback_figure(line: dict):
    """The heat map of one line of metrics, for tensorboard; None without ladders."""
    fell = {place: high(found) for place, found in shares(line).items()}
    if not fell:
        return None
    figure = _figure(6, 1.5 + 0.25 * len({m for m, _ in fell}))
    heat_map(figure.subplots(), fell, f"share in 16 bits, up to step {line['step']}")
    return figure


def _bounds(config: Config) -> set[float]:
    specs = [spec for recipe in config.recipes.values() for spec in recipe.operands().values() if isinstance(spec, Choice)]
    return {b.below for spec in specs for b in spec.rungs[:1] for b in b if b.by == "relative_error" and b.than is None}


def choices(run: Path) -> Path | None:
    """choices.png, or None for a run without ladders."""
    lines = lines_of(run)
    seen = [(line["step"], found) for line in lines if (found := shares(line))]
    if not seen:
        return None
    figure = _figure(15, 4.6 + 0.26 * len({m for m, _ in seen[-1][1]}))
    (over_time, where), (errors, worst) = figure.subplots(2, 2, height_ratios=[1.2, 1])

    names = list(dict.fromkeys(name for _, found in seen for each in found.values() for name in each))
    stacked = [[sum(each.get(name, 0.0) for each in found.values()) / len(found) for _, found in seen] for name in names]
    steps = [step for step, _ in seen]
    over_time.stackplot(steps, stacked, labels=[f"{name}, of operands" for name in names], alpha=0.6)
    for key, style in (("tensors", "-"), ("elements", "--"), ("flops", ":")):
        points = [(line["step"], line[f"quant/share_{key}"]) for line in lines if f"quant/share_{key}" in line]
        label = {"tensors": "tensors", "elements": "elements", "flops": "GEMM FLOPs"}[key]
        over_time.plot(*zip(*points, strict=True), style, color="black", lw=1.2, label=f"{label} below 16 bits")
    over_time.set(xlabel="step", ylim=(0, 1.01), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    over_time.set_title("which formats are used", fontsize=10)
    over_time.legend(fontsize=8, loc="lower left")

    places = list(dict.fromkeys(place for _, found in seen for place in found))
    by_line = {line["step"]: shares(line) for line in lines}

    def share_of(place: tuple[str, str], what: Callable[[dict], float]) -> float:
        return over_run(lines, lambda line: what(found) if (found := by_line[line["step"]].get(place)) else None)

    fell = {place: share_of(place, lambda found: 1 - next(iter(found.values()))) for place in places}
    heat_map(where, {place: share_of(place, high) for place in places}, "share in 16 bits, over the run")

    counts: dict[str, list[int]] = {}
    for line in lines:
        for key, value in line.items():
            if key.endswith("/errors") and key.startswith("quant/"):
                operand = key.split("/")[-2]
                counts[operand] = [a + b for a, b in zip(counts.get(operand, [0] * (BINS + 1)), value, strict=True)]
    left = [100 * BIN * i for i in range(BINS + 1)]
    bottom = [0.0] * (BINS + 1)
    total = sum(map(sum, counts.values())) or 1
    for operand in sorted(counts):
        heights = [100 * c / total for c in counts[operand]]
        errors.bar(left, heights, width=100 * BIN * 0.92, bottom=bottom, align="edge", label=operand)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for bound in _bounds(load(run / "config.toml")):
        errors.axvline(100 * bound, color="black", ls="--", lw=1, label=f"bound {100 * bound:g} %")
    errors.set(xlabel="mean relative error of an operand in the cheapest format (%; the last bin has all above)",
               ylabel="of all measured (%)")  # fmt: skip
    errors.set_title("errors of the cheapest format", fontsize=10)
    if counts:
        errors.legend(fontsize=8)

    def mean(place: tuple[str, str], what: str) -> str:
        found = [v for line in lines for k, v in line.items() if k.startswith(f"quant/{place[0]}/{place[1]}/{what}")]
        return f"{sum(found) / len(found):.2%}" if found else "-"

    ten = sorted((place for place in fell if fell[place]), key=lambda place: -fell[place])[:10]
    rows = [[f"{m} {o}", f"{fell[m, o]:.1%}", mean((m, o), "error/"), mean((m, o), "underflow"), mean((m, o), "saturated")]
            for m, o in ten]  # fmt: skip
    worst.axis("off")
    heads = ["operand", "fell back", "error of cheapest", "underflow", "saturated"]
    shape = dict(colWidths=[0.4, 0.13, 0.19, 0.14, 0.14], loc="upper center", cellLoc="left")
    table = worst.table(rows or [["none", "", "", "", ""]], colLabels=heads, **shape)
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    worst.set_title("the ten that fell back most (last two columns: with train.stats_every)", fontsize=10)
    figure.suptitle(run.name)
    figure.savefig(run / "choices.png", dpi=110)
    return run / "choices.png"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw runs.", epilog="see README.md")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, e.g. out/NAME; the first is what others are compared with",
    )
    args = parser.parse_args(argv)
    for run in args.runs:
        lines_of(run)
    made = [path for run in args.runs for path in (loss(run), choices(run)) if path]
    made += [gap(args.runs)] if len(args.runs) > 1 else []
    print("\n".join(f"drawn: {path}" for path in made))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
