"""Pictures, as bytes of a PNG: several checkpoints beside each other, and a sweep. Bars are two standard errors either way.

Rows with the very losses of an earlier row of their checkpoint (stored codes, as a rule) are not drawn again.
"""

import io
from collections import defaultdict
from pathlib import Path

from evaluation.rows import Row
from evaluation.sweep import BLOCKS, CANDIDATES

STYLES = {"as trained": "o-", "bf16": "x--"}
MARKERS = "os^DvP*"
BARS = {"bits": 1, "difference": 1, "standard_error": 2}  # what is drawn of a row of a sweep, and how many of it


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # half a second to import

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure, dpi: int = 100) -> bytes:
    place = io.BytesIO()
    figure.savefig(place, dpi=dpi, format="png")
    return place.getvalue()


def _distinct(rows: dict[str, Row]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for name, each in rows.items():
        if name == "bf16" or not any(each.windows.equal(other.windows) for other in found.values()):
            found[name] = each
    return found


def over_steps(tables: dict[tuple[Path, int], dict[str, Row]], alike: bool) -> bytes:
    """(run, step) -> rows; against steps, loss, and how far other rows are from BF16 of the same step. alike: whether losses
    compare, else bits/byte are drawn."""
    figure = _figure(11, 4.5)
    (left, right), colours = (
        figure.subplots(1, 2),
        {run: f"C{i % 10}" for i, run in enumerate(dict.fromkeys(r for r, _ in tables))},
    )
    lines: dict[tuple[Path, str], list[tuple[int, Row, Row]]] = defaultdict(list)
    for (run, step), rows in sorted(tables.items(), key=lambda item: item[0][1]):
        for name, found in _distinct(rows).items():
            lines[run, name].append((step, found, rows["bf16"]))
    for (run, name), points in lines.items():
        style = dict(fmt=STYLES.get(name, ".-."), lw=1, ms=5, color=colours[run], label=f"{run.name}, {name}")
        steps = [step for step, *_ in points]
        left.errorbar(steps, [found.loss if alike else found.bpb for _, found, _ in points], **style)
        if name != "bf16":
            gaps = [found.against(base) for _, found, base in points]
            right.errorbar(steps, [gap for gap, _ in gaps], yerr=[2 * error for _, error in gaps], capsize=3, **style)
    left.set(xlabel="step", ylabel="validation loss (nats/token)" if alike else "validation bits/byte")
    right.axhline(0, color="0.5", lw=0.8)
    right.set(xlabel="step", ylabel="loss − that of the same weights in BF16")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _png(figure)


def side_by_side(rows: dict[str, dict[str, Row]], base: Row, alike: set[str]) -> bytes:
    """Checkpoint -> rows: bits/byte, and, for those `alike` to the first, losses less `base`."""
    places = [(name, each, found) for name, table in rows.items() for each, found in _distinct(table).items()]
    figure = _figure(9, 1.3 + 0.24 * len(places))
    left, right = figure.subplots(1, 2, sharey=True)
    for y, (name, _, found) in enumerate(places):
        colour = f"C{list(rows).index(name) % 10}"
        left.plot([found.bpb], [y], "o", color=colour, ms=5)
        if name in alike and found is not base:
            difference, error = found.against(base)
            right.errorbar([difference], [y], xerr=[2 * error], fmt="o", color=colour, ms=5, capsize=3)
    left.set_yticks(range(len(places)), [f"{name}, {each}" for name, each, _ in places], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("validation bits/byte")
    right.axvline(0, color="0.5", lw=0.8)
    right.set_xlabel("loss − the first's in BF16 (nats/token)")
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    return _png(figure)


def bits_against_loss(records: dict[str, dict], title: str) -> bytes:
    """Rows of sweep.json by name: bits a parameter against the difference to BF16, a panel for each family; in grey the lines
    of the first."""
    families: dict[str, dict[str, list[tuple[str, dict]]]] = defaultdict(lambda: defaultdict(list))
    order, drawn = [c.family for c in CANDIDATES], []
    for name, r in sorted(records.items(), key=lambda item: item[1].get("bits", 0) if isinstance(item[1], dict) else 0):
        if isinstance(r, dict) and "family" in r:
            families[r["family"]][r["series"]].append((name, r))
            drawn.append(r)
    names = sorted(families, key=order.index)
    across = min(len(names), 3)
    figure = _figure(1 + 4 * across, 0.6 + 3.6 * -(-len(names) // across))
    panels = figure.subplots(-(-len(names) // across), across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, family in zip(panels, names, strict=False):
        for series, members in families[names[0]].items() if family != names[0] else ():
            if not series.startswith(BLOCKS):
                axes.plot([r["bits"] for _, r in members], [r["difference"] for _, r in members], color="0.75", lw=1, zorder=1)
        for number, (series, members) in enumerate(families[family].items()):
            x, y, bars = ([factor * r[key] for _, r in members] for key, factor in BARS.items())
            labelled = series.startswith(BLOCKS)  # points with names, not a line
            style = dict(fmt=MARKERS[number % len(MARKERS)] + ("" if labelled else "-"), color=f"C{number}", ms=4, lw=0.9)
            axes.errorbar(x, y, yerr=bars, capsize=2, elinewidth=0.7, label=series, **style)
            for i, (name, r) in enumerate(members if labelled else ()):
                if r["bits"] < 7:  # (above, all of them are one heap)
                    away = (5, 4 if i % 2 else -8)
                    axes.annotate(name, (r["bits"], r["difference"]), away, textcoords="offset points", fontsize=6.5)
        axes.axhline(0, color="0.5", lw=0.8)
        axes.grid(alpha=0.3)
        axes.set_title(family, fontsize=10)
        axes.legend(fontsize=7)
    for axes in panels[len(names) :]:
        axes.axis("off")
    panels[0].set_yscale("symlog", linthresh=1e-3)
    panels[0].set_ylim(bottom=min(-1e-3, *(1.1 * (r["difference"] - 2 * r["standard_error"]) for r in drawn)))
    figure.supxlabel("bits a quantised parameter, scales included", fontsize=9)
    figure.supylabel("loss − that of BF16 (nats/token)", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return _png(figure, 90)
