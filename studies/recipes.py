"""python -m studies.recipes [NAME ...] [--jobs N]: how every recipe of configs/ ends on the small model.

Trains each config as it stands, at its own seed, in a process of its own with one thread: then the numbers do not depend on how
many cores there are or what else runs, and N of them may run side by side. The last validation loss of each, as trained, goes
to docs/measured.json, from which `make table` makes the table in README.md, and all that are known to the picture
docs/recipes.png. About 4 minutes a recipe on one core of a server.

What it is not: a ranking. Seeds alone move these losses by SPREAD, so a gap below that says nothing; what shows is a recipe
that does not train. It is also a check: on one machine the same commit gives the same losses again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

from configs import load
from configs.table import small_files
from run import Run

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs/measured.json"
BASE = "tiny-bf16"
SPREAD = 0.02  # nats/token: half the range of seeds 0, 1, 2 of tiny-bf16 (README.md)
NAMES = sorted(path.stem for path in small_files() if path.stem != "tiny-phases")  # (which reads other text)


def outcome(name: str, config: str = "", overrides: Sequence[str] = ()) -> float:
    """Train the config of that name, or another, in out/recipes/NAME, anew -> its last validation loss. ValueError: the last
    words of a run that fails."""
    own = [f"run.name={name}", "run.out=out/recipes", "run.overwrite=true", "run.samples=0"]
    command = [sys.executable, "train.py", f"configs/{config or name}.toml", *overrides, *own]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    metrics = (ROOT / "out/recipes" / name / "metrics.jsonl").read_text()
    return [line["val_loss"] for line in map(json.loads, metrics.splitlines()) if "val_loss" in line][-1]


def measured() -> dict:
    return json.loads(MEASURED.read_text())


def keep(name: str, found: dict) -> None:
    """One entry of docs/measured.json, at once: the whole takes an hour and may be interrupted."""
    known = measured()
    known["outcomes"] = dict(sorted((known["outcomes"] | {name: found}).items()))
    MEASURED.write_text(json.dumps(known, indent=1) + "\n")


def draw(outcomes: dict, path: Path) -> None:
    """Gaps to BASE, sorted, beside what seeds do."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gaps = sorted((found["loss"] - outcomes[BASE]["loss"], name) for name, found in outcomes.items() if name != BASE)
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.2 * len(gaps)))
    axes.axvspan(-SPREAD, SPREAD, color="0.9", label=f"seeds of {BASE}: ±{SPREAD}")
    axes.axvline(0, color="0.6", lw=1)
    axes.plot([gap for gap, _ in gaps], range(len(gaps)), "o", ms=5)
    axes.set_yticks(range(len(gaps)), [name for _, name in gaps], fontsize=8)
    axes.set_ylim(-1, len(gaps))
    axes.set_xlabel(f"final validation loss − that of {BASE} (nats/token)")
    axes.set_title("Every recipe on the small model: 200 steps, seed 0", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many side by side; default 1")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"{', '.join(unknown)}: expected names of {', '.join(NAMES)}")
    if args.jobs < 1:
        parser.error("--jobs is at least 1")
    names = args.names or [BASE, *(name for name in NAMES if name != BASE)]
    for name in names:
        load(ROOT / f"configs/{name}.toml")  # before an hour of the others
    failed, commit = 0, Run.commit()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: pool.submit(outcome, name) for name in names}
        for name, run in runs.items():
            try:
                loss = round(run.result(), 4)
            except ValueError as error:
                print(f"studies.recipes: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            keep(name, {"loss": loss, "commit": commit})
            base = measured()["outcomes"].get(BASE)
            print(f"{name:16} {loss:.4f}" + f"   {loss - base['loss']:+.4f} to {BASE}" * bool(base), flush=True)
    if BASE in measured()["outcomes"]:
        draw(measured()["outcomes"], ROOT / "docs/recipes.png")
        print("written to docs/measured.json and docs/recipes.png; make table brings README.md up to date")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstudies.recipes: interrupted; what has ended is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.recipes: {error}", file=sys.stderr)
        sys.exit(2)
