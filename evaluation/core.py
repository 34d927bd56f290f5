"""DCLM CORE (arXiv:2406.11794): one number from 22 tasks asked in context, from a bundle of files that the user has.

    centred = (accuracy - 0.01 baseline) / (1 - 0.01 baseline)      per task, baseline in percent: 0 is a guess, 1 is perfect
    CORE    = mean of the tasks

    DIR/core.yaml             icl_tasks: [{label, dataset_uri, num_fewshot: [n], icl_task_type, continuation_delimiter: " "}]
    DIR/eval_meta_data.csv    columns "Eval Task", "Random baseline"
    DIR/eval_data/URI         JSON lines, by icl_task_type:
        multiple_choice       {query, choices, gold}                  taken is the choice of the smallest mean loss a token
        schema                {context_options, continuation, gold}   the context after which the continuation has it
        language_modeling     {context, continuation}                 every token of the continuation must be the likeliest

A prompt is examples, each followed by a blank line, then the question; the examples are other lines of the file, drawn with
random.Random(1234 + index) after the file was shuffled with random.Random(1337), as nanochat does, so that both see the same
ones (read in its scripts/base_eval.py and nanochat/core_eval.py; a bundle itself was never seen by us).

Where we differ: a prompt longer than seq_len loses its beginning, and the table says how often; where the tokens of a context
are no prefix of those of context and continuation, the continuation begins where they part; ties go to the first.
"""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import near

FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
FILES = "core.yaml", "eval_meta_data.csv", "eval_data"


class Task(NamedTuple):
    label: str
    kind: str  # one of FIELDS
    shots: int
    delimiter: str
    baseline: float  # percent
    items: list[dict]


class Result(NamedTuple):
    task: str
    accuracy: float
    baseline: float  # as a share
    centred: float
    count: int
    cropped: int  # prompts that lost their beginning


# --- the bundle ---


def read(folder: Path) -> list[Task]:
    """The tasks of a bundle. Raises ValueError, with file and place, for whatever is missing or of another kind."""
    import yaml

    for name in FILES:
        if not (folder / name).exists():
            raise ValueError(f"--core-bundle {folder}: it has no {name}; a bundle has {', '.join(FILES)}")
    place = folder / "core.yaml"
    try:
        listed = yaml.safe_load(place.read_text("utf-8"))
        entries = listed["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: expected a list icl_tasks: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place}: expected a list icl_tasks with tasks in it, not {str(entries)[:60]}")
    baselines = _baselines(folder / "eval_meta_data.csv")
    return [_task(folder, entry, f"{place}, task {number}", baselines) for number, entry in enumerate(entries, 1)]


def _baselines(file: Path) -> dict[str, float]:
    with file.open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    try:
        return {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected columns 'Eval Task' and 'Random baseline', a number in percent: {error}") from None


def _task(folder: Path, entry: Any, place: str, baselines: dict[str, float]) -> Task:
    wanted = "label", "dataset_uri", "num_fewshot", "icl_task_type"
    for key in wanted:
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f"{place}: no {key}; expected {', '.join(wanted)}, not {str(entry)[:80]}")
    label, kind = str(entry["label"]), entry["icl_task_type"]
    if kind not in FIELDS:
        raise ValueError(f"{place} ({label}): icl_task_type {kind!r}{near(kind, FIELDS)}")
    if label not in baselines:
        raise ValueError(f"{folder / 'eval_meta_data.csv'}: no row for {label!r}{near(label, baselines)}")
    if not 0 <= baselines[label] < 100:
        raise ValueError(
            f"{folder / 'eval_meta_data.csv'}: {label} has a baseline of {baselines[label]}, expected 0 to below 100"
        )
    shots = entry["num_fewshot"][0] if isinstance(entry["num_fewshot"], list) and entry["num_fewshot"] else entry["num_fewshot"]
    if type(shots) is not int or shots < 0:
        raise ValueError(f"{place} ({label}): num_fewshot {entry['num_fewshot']!r}, expected a list of a number from 0")
    file = folder / "eval_data" / str(entry["dataset_uri"])
    items = _items(file, kind, label)
    if len(items) <= shots:
        raise ValueError(f"{file}: {len(items)} lines, of which {shots} examples and a question cannot be taken")
    return Task(label, kind, shots, str(entry.get("continuation_delimiter", " ")), baselines[label], items)


def _items(file: Path, kind: str, label: str) -> list[dict]:
    try:
        lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}, of task {label}: {getattr(error, 'strerror', None) or error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        place = f"{file}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: no JSON ({error})") from None
        if not isinstance(item, dict) or not item.keys() >= {*FIELDS[kind]}:
            raise ValueError(f"{place}: {kind} has {', '.join(FIELDS[kind])}, this line {line[:60]}")
        options = item.get("choices", item.get("context_options"))
        if "gold" in FIELDS[kind] and not (type(item["gold"]) is int and 0 <= item["gold"] < len(options)):
            raise ValueError(f"{place}: gold is {item['gold']!r}, expected the index of one of {len(options)} from 0")
        items.append(item)
    return items


# --- prompts ---


def prompts(task: Task, item: dict, examples: list[dict]) -> list[str]:
    """The texts to compare; of language_modeling the one without its continuation and the one with it."""
    d = task.delimiter
    if task.kind == "multiple_choice":
        shown = [f"{e['query']}{d}{e['choices'][e['gold']]}\n\n" for e in examples]
        asked = [f"{item['query']}{d}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        shown = [f"{e['context_options'][e['gold']]}{d}{e['continuation']}\n\n" for e in examples]
        asked = [f"{context}{d}{item['continuation']}" for context in item["context_options"]]
    else:
        shown = [f"{e['context'].strip()}{d}{e['continuation']}\n\n" for e in examples]
        before = f"{item['context'].strip()}{d}"
        asked = [before.rstrip(), before + item["continuation"]]  # the delimiter's space is part of the next token
    return ["".join(shown) + each for each in asked]


def common(sequences: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    same = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        same += 1
    return same


# --- answers ---


def right(task: Task, index: int, logits: Callable[[Tensor], Tensor], encode: Callable[[str], list[int]], T: int) -> tuple:
    """(whether a question is answered as it should be, how many of its prompts were cropped to T tokens)."""
    item = task.items[index]
    rng, others = random.Random(1234 + index), [i for i in range(len(task.items)) if i != index]
    examples = [task.items[i] for i in rng.sample(others, task.shots)]
    ids = [encode(text) for text in prompts(task, item, examples)]
    if task.kind == "schema":
        suffix = common([each[::-1] for each in ids])
        starts = [len(each) - suffix for each in ids]
    else:  # (of a choice that is the beginning of another the last token counts, so that each has one)
        starts = [min(common(ids), min(map(len, ids)) - 1)] * len(ids)
    if task.kind == "language_modeling":
        ids, starts = ids[1:], starts[1:]
    losses, all_likeliest = [], False
    for each, start in zip(ids, starts, strict=True):
        x = torch.tensor(each[-T - 1 :])
        n = min(len(each) - max(start, 1), len(x) - 1)  # tokens that are scored
        y = logits(x[None, :-1])[0, -n:].to(torch.float32).cpu()
        losses.append(float(F.cross_entropy(y, x[-n:])))
        all_likeliest = bool((y.argmax(-1) == x[-n:]).all())
    cropped = sum(len(each) > T + 1 for each in ids)
    if task.kind == "language_modeling":
        return all_likeliest, cropped
    return losses.index(min(losses)) == item["gold"], cropped


@torch.no_grad()
def evaluate(
    tasks: list[Task],
    logits: Callable[[Tensor], Tensor],
    encode: Callable[[str], list[int]],
    seq_len: int,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """logits: tokens int64 [1, n <= seq_len] -> [1, n, V]; encode: a text -> its tokens, BOS first; limit: questions a task."""
    results = []
    for task in tasks:
        items = list(task.items)
        random.Random(1337).shuffle(items)
        task = task._replace(items=items[: max(limit, task.shots + 1)] if limit else items)
        count = min(limit or len(task.items), len(task.items))
        answers = [right(task, index, logits, encode, seq_len) for index in range(count)]
        accuracy, baseline = sum(good for good, _ in answers) / count, task.baseline / 100
        centred, cropped = (accuracy - baseline) / (1 - baseline), sum(n for _, n in answers)
        results.append(Result(task.label, accuracy, baseline, centred, count, cropped))
        say(line(results[-1]))
    return results


HEAD = f"{'task':36}{'questions':>10}{'accuracy':>10}{'chance':>8}{'centred':>9}{'cropped':>9}"


def line(r: Result) -> str:
    return f"{r.task:36}{r.count:10}{r.accuracy:10.4f}{r.baseline:8.3f}{r.centred:9.4f}{r.cropped:9}"


def core(results: list[Result]) -> float:
    return sum(r.centred for r in results) / len(results)
