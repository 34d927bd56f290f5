"""python evaluate.py RUN [RUN ...] [--weights SPEC] [--activations SPEC] [--sweep] [--exported DIR ...] [a question]

What checkpoints are worth.

A table of each, over the validation set (bits per byte, see model.measure), the same windows in each row:

    as trained     masters, quantised by the policy the checkpoint was saved under
    stored codes   quantized.safetensors alone: bitwise the row above, without the masters (left out where there is none)
    bf16           the same masters in the compute dtype
    w W, x X       the same masters by --weights W and --activations X (evaluation/specs.py has names), to nearest, in the
                   Linears that the run quantises, or, where it quantises none, all but the head (--all: every one); --stored:
                   the values of the stored codes in place of masters
    DIR            a folder of export.py, as transformers loads it: the weights it holds, activations quantised as it says.
                   Those in out/NAME/export that were made of this step, and --exported DIR

and `difference`, the mean over windows of a row's loss minus that of bf16, with its paired standard error: much smaller than
that of either mean. Written to evaluation.json in the step folder too, where rows of other calls stay while they are rows of
the same table (rows.keep).

Several runs or steps (out/A/step_*) give one table more, with differences to bf16 of the first, and a picture: comparison.json
and .png in the run folder of the first. With --sweep: what a checkpoint loses by many ways to store its weights, as bits a
parameter against loss (evaluation/sweep.py, posttrain.py); sweep.json and .png in its step folder.

Or, instead of the table (evaluation/questions.py): --sample PROMPT, --tasks NAMES, --core-bundle DIR, --reproduce.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

import checkpoint
from checkpoint import written
from data import Corpus
from evaluation import draw, questions
from evaluation.exported import Exported
from evaluation.rows import Row, keep, row, shown
from evaluation.specs import named
from evaluation.sweep import chosen, line, sweep, under
from model import GPT
from quant import Recipe
from quant.policy import unquantized
from quant.recipe import Fprop


class Table(NamedTuple):
    """Of one checkpoint. text: the sha256 of tokenizer and data, and the window length: what its losses are losses of."""

    folder: Path
    step: int
    text: tuple[str, str, int]
    rows: dict[str, Row]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} {self.step}"


def whose(args) -> str:
    """What is said of a row that is not of masters, or not of the Linears that the run quantises."""
    return " of stored codes" * args.stored + " in all Linears" * args.all


def given(args, folder: Path) -> tuple[str, Recipe] | None:
    """What --weights and --activations say of a checkpoint: the name of the row, and a recipe. Raises ValueError."""
    texts = {"w": args.weights, "x": args.activations}
    options = {"w": "--weights", "x": "--activations"}
    specs = {o: named(text, options[o], checkpoint.config_file(folder)) for o, text in texts.items() if text}
    words = [f"{o} {spec.short() if texts[o].lstrip().startswith('{') else texts[o]}" for o, spec in specs.items()]
    try:
        return (", ".join(words) + whose(args), Recipe(Fprop(**specs))) if specs else None
    except ValidationError as error:
        raise ValueError(f"--weights, --activations: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def loaded_with_text(folder: Path) -> checkpoint.Loaded:
    """A checkpoint, announced. Raises ValueError if it has no tokenizer."""
    loaded = checkpoint.load_model(folder)
    if loaded.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer (it was imported without one), so there is no text to evaluate it on")
    print(f"{folder}: step {loaded.state['step']}, {loaded.state['tokens']:,} tokens", flush=True)
    return loaded


def exports_of(folder: Path) -> list[Path]:
    """Those in the run's export/ that were made of this step: they have its state.json."""
    state = (folder / "state.json").read_bytes()
    return [f.parent.parent for f in sorted(folder.parent.glob("export/*/narrow/state.json")) if f.read_bytes() == state]


def evaluated(folder: Path, args) -> Table:
    """The rows of a checkpoint, printed and kept."""
    recipe = given(args, folder)
    loaded = loaded_with_text(folder)
    corpus = questions.corpus_of(loaded)
    stored = None
    try:
        stored = checkpoint.load_model(folder, "quantized").model
    except ValueError as error:
        if args.stored:
            raise
        print(f"stored codes are left out: {error}")
    source = stored if args.stored else loaded.model
    if recipe:
        with under(source, recipe[1], args.all):
            pass  # raises before anything is measured
    rows = {"as trained": row(loaded.model, corpus, args.windows)}
    if stored:
        rows["stored codes"] = row(stored, corpus, args.windows)
    with unquantized(loaded.model):
        rows["bf16"] = row(loaded.model, corpus, args.windows)
    if recipe:
        with under(source, recipe[1], args.all):
            rows[recipe[0]] = row(source, corpus, args.windows)
    for export in dict.fromkeys([*args.exported, *exports_of(folder)]):
        try:
            rows[str(export)] = row(Exported(export, loaded.config.model.seq_len), corpus, args.windows)
        except (ValueError, OSError) as error:  # e.g. ModelOpt's layout, which transformers does not load
            if export in args.exported:
                raise
            print(f"an export is left out: {str(error).strip().splitlines()[0]}")
    width = max(14, *(len(name) + 1 for name in rows))
    print(f"{'':{width}}{'loss':>9}{'bits/byte':>11}{'difference to bf16':>24}")
    for name, found in rows.items():
        print(shown(name, found, rows["bf16"], width))
    path = folder / "evaluation.json"
    older = keep(path, args.windows, {name: found.record(rows["bf16"]) for name, found in rows.items()})
    print(f"written to {path}" + (f", where these rows of earlier calls stay: {', '.join(older)}" if older else ""))
    text = loaded.tokenizer.sha256, corpus.val_sha256, loaded.config.model.seq_len
    table = Table(folder, loaded.state["step"], text, rows)
    if args.sweep:
        swept(table, source, corpus, args)
    return table


def compared(tables: list[Table], plot: Path) -> None:
    """One table of all, and its picture; differences to bf16 of the first."""
    first = tables[0]
    base, alike = first.rows["bf16"], {t.name for t in tables if t.text == first.text}
    places = [(f"{t.name}, {name}", t, found) for t in tables for name, found in t.rows.items()]
    width = max(len(place) for place, *_ in places) + 1
    print(f"\n{'':{width}}{'loss':>9}{'bits/byte':>11}  difference to {first.name}, bf16")
    for place, t, found in places:
        print(shown(place, found, base if t.name in alike else None, width))
    if others := [t.name for t in tables if t.name not in alike]:
        print(
            f"{', '.join(others)}: another tokenizer, text or seq_len than {first.name}, so only bits/byte compare, not losses"
        )
    record = {t.name: {n: r.record(base) if t.name in alike else {"loss": r.loss, "bpb": r.bpb} for n, r in t.rows.items()}
              for t in tables}  # fmt: skip
    written(plot.with_suffix(".json"), json.dumps({"difference to": f"{first.name}, bf16", **record}, indent=1))
    runs = [t.folder.parent for t in tables]
    if len(set(runs)) < len(runs):  # several steps of one run
        picture = draw.over_steps({(run, t.step): t.rows for run, t in zip(runs, tables, strict=True)}, len(alike) == len(runs))
    else:
        picture = draw.side_by_side({t.name: t.rows for t in tables}, base, alike)
    print(f"written to {plot.with_suffix('.json')} and {written(plot, picture)}")


def swept(table: Table, model: GPT, corpus: Corpus, args) -> None:
    """The table of a sweep over the weights of `model`, kept row by row, and the picture of all that is kept."""
    candidates, base, path = chosen(args.only), table.rows["bf16"], table.folder / "sweep.json"
    width = max(len(c.name) for c in candidates) + 1
    print(f"\n{'sweep':{width}}{'bits/w':>7}{'error':>8}{'loss':>9}{'bits/byte':>10}{'difference to bf16':>20}  found")
    records = {"bf16": base.record(base)}
    for found in sweep(model, corpus, candidates, args.windows, args.calibrate, args.all):
        if isinstance(found, str):
            print(found)
            continue
        print(line(found, base, width), flush=True)
        records[found.name + whose(args)] = found.record(base, args.calibrate, whose(args))
        keep(path, args.windows, records)
    if path.exists():
        picture = draw.bits_against_loss(json.loads(path.read_text()), f"{table.name}: bits of weights against loss")
        print(f"kept in {path}, and drawn, with rows of earlier calls: {written(path.with_suffix('.png'), picture)}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Evaluate checkpoints; sample from one.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="out/NAME or out/NAME/step_N; several are compared")
    parser.add_argument("--windows", type=int, default=64, help="validation windows of seq_len tokens (default 64)")
    parser.add_argument(
        "--weights", metavar="SPEC", help="one more row, with weights in this: a name or an inline table of TOML"
    )
    parser.add_argument("--activations", metavar="SPEC", help="... and activations in this")
    parser.add_argument("--stored", action="store_true", help="... of the values that training stored, not of masters")
    parser.add_argument("--all", action="store_true", help="... in every Linear, not only those that the run quantises")
    parser.add_argument("--sweep", action="store_true", help="many ways to store weights: bits a parameter against loss")
    parser.add_argument("--only", metavar="GLOB", action="append", default=[], help="of the sweep, those with such names")
    parser.add_argument("--calibrate", type=int, default=4, help="windows of training text that methods see (default 4)")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="the comparison's picture (default: in the first run's folder)"
    )
    parser.add_argument("--exported", metavar="DIR", type=Path, action="append", default=[], help="an export elsewhere, too")
    questions.arguments(parser)
    args = parser.parse_args(argv)
    if args.windows < 2 or args.calibrate < 1:
        raise ValueError("expected --windows of at least 2, --calibrate of at least 1")
    questions.check(args)
    folders = list(dict.fromkeys(map(checkpoint.find, args.runs)))
    if len(folders) > 1 and (args.exported or questions.asked(args)):
        raise ValueError(f"--exported and questions other than the table are of one checkpoint, not of {len(folders)}")
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: expected a name that ends in .png (the table goes to .json beside it)")
    if questions.asked(args):
        questions.answer(args, loaded_with_text(folders[0]))
        return 0
    for folder in folders:  # what is wrong is said before anything is measured
        given(args, folder)
    chosen(args.only)
    tables = [evaluated(folder, args) for folder in folders]
    if len(tables) > 1:
        compared(tables, args.plot or folders[0].parent / "comparison.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nevaluate.py: interrupted; rows that were printed are kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
