"""evaluation/core.py on a made-up bundle of three tasks, with a model whose logits are set by hand, so that every answer and
every accuracy is known; prompts against the layout written out; what may be missing from a bundle."""

import json
import random
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import train
from evaluation import core
from tests.test_train import NVFP4, folder

BOS, V = 256, 257
CHOICE = [{"query": f"Q{n}:", "choices": ["aa", "bb", "cc"], "gold": n % 3} for n in range(6)]
SCHEMA = [{"context_options": [f"x{n}", f"y{n}"], "continuation": "so", "gold": n % 2} for n in range(5)]
LANGUAGE = [{"context": f" say {word} ", "continuation": word} for word in ("ab", "bc", "zz", "ba")]
TASKS = {
    "choose": ("multiple_choice", 2, CHOICE, 33.0),
    "who": ("schema", 0, SCHEMA, 50.0),
    "say": ("language_modeling", 1, LANGUAGE, 0.0),
}


def bundle(path: Path, **changes) -> Path:
    """Writes the layout; `changes`: file name -> its text, or None to leave it out."""
    (path / "eval_data" / "sub").mkdir(parents=True)
    entries = ""
    for name, (kind, shots, rows, _) in TASKS.items():
        (path / "eval_data" / "sub" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries += f"- label: {name}\n  dataset_uri: sub/{name}.jsonl\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n"
        entries += '  continuation_delimiter: "\\nA: "\n' if name == "choose" else ""
    files = {
        "core.yaml": f"icl_tasks:\n{entries}",
        "eval_meta_data.csv": "Eval Task,Task Category,Random baseline\n"
        + "".join(f'{name},"a, b",{baseline}\n' for name, (*_, baseline) in TASKS.items()),
    } | changes
    for name, text in files.items():
        if text is not None:
            (path / name).write_text(text)
    return path


def encode(text: str) -> list[int]:
    return [BOS, *text.encode()]


AB = {"b": " ", " ": "a", "a": "b"}


def bytes_model(prefers: dict[str, str]):
    """Logits of a model that expects the byte `prefers[a]` after the byte a (5 above the others), else nothing."""
    table = torch.zeros(V, V)
    for a, b in prefers.items():
        table[ord(a), ord(b)] = 5.0
    return lambda tokens: table[tokens]


def accuracies(prefers: dict[str, str], path: Path, T: int = 512, limit: int | None = None) -> dict[str, core.Result]:
    return {r.task: r for r in core.evaluate(core.read(path), bytes_model(prefers), encode, T, limit)}


# --- answers that are known ---


def test_accuracies_are_those_of_the_model(tmp_path):
    """After "A: " it expects b, and b after b: "bb" is taken always, which is gold for 2 of 6. Of contexts x0, y0 and the like
    nothing is expected: a tie, so the first, gold for 3 of 5. "say ab" goes on with " ab" where it expects a space after b, a
    after that, then b; then "say ba" does not."""
    path = bundle(tmp_path)
    found = accuracies({" ": "b", "b": "b"}, path)
    assert found["choose"].accuracy == pytest.approx(2 / 6) and found["choose"].count == 6
    assert found["choose"].centred == pytest.approx((1 / 3 - 0.33) / (1 - 0.33))
    assert found["who"].accuracy == 0.6 and found["who"].centred == pytest.approx(0.2)
    assert found["say"].accuracy == 0 and found["say"].cropped == 0
    assert accuracies(AB, path)["say"].accuracy == 0.25
    assert accuracies({"c": " ", " ": "b", "b": "c"}, path)["say"].accuracy == 0.25
    assert accuracies({" ": "a", "a": "b"}, path)["say"].accuracy == 0  # no space after b
    assert accuracies({"A": ":", " ": "a", "a": "a"}, path)["choose"].accuracy == pytest.approx(2 / 6)
    assert core.core([*found.values()]) == pytest.approx((found["choose"].centred + 0.2 + 0) / 3)


def test_a_schema_is_the_context_that_fits(tmp_path):
    """The continuation is scored, not the context: what comes before its common tokens counts for nothing. With the digit
    between, no context says more about "so" than another; without it, "y" does."""
    path = bundle(tmp_path)
    rows = [{"context_options": ["x", "y"], "continuation": "so", "gold": 1}] * 4
    (path / "eval_data" / "sub" / "who.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = (path / "core.yaml").read_text().replace("label: who", 'label: who\n  continuation_delimiter: ""')
    (path / "core.yaml").write_text(entry)
    assert accuracies({"y": "s"}, path)["who"].accuracy == 1
    assert accuracies({"x": "s"}, path)["who"].accuracy == 0
    assert accuracies({"s": "o"}, path)["who"].accuracy == 0  # the same for both: the first


def test_losses_are_means(tmp_path):
    """A choice of many likely tokens beats one of a few: sums would not have it. (5 above the others: a token costs
    ln(e^5 + 256) - 5 = 1.0 where it is expected, ln(257) = 5.5 where nothing is.)"""
    path = bundle(tmp_path)
    rows = [{"query": "?", "choices": ["ababababab", "q"], "gold": 0}] * 3
    (path / "eval_data" / "sub" / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert accuracies({" ": "a", "a": "b", "b": "a"}, path)["choose"].accuracy == 1
    assert accuracies({" ": "q"}, path)["choose"].accuracy == 0


def test_a_choice_that_begins_another(tmp_path):
    """Its last token is compared with the other's rest: each has something to be judged by."""
    path = bundle(tmp_path)
    rows = [{"query": "?", "choices": ["ab", "abc"], "gold": n} for n in (0, 1, 1)]
    (path / "eval_data" / "sub" / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert accuracies({"a": "b"}, path)["choose"].accuracy == pytest.approx(1 / 3)
    assert accuracies({"b": "c"}, path)["choose"].accuracy == pytest.approx(2 / 3)


def test_long_prompts_lose_their_beginning(tmp_path):
    """As many questions as there are: all prompts of "choose" have two examples, of 10 bytes and more each, those of "say" one.
    The answers stay, since this model looks back one byte."""
    path = bundle(tmp_path)
    whole, cropped = (accuracies(AB, path, T) for T in (512, 12))
    assert [r.accuracy for r in cropped.values()] == [r.accuracy for r in whole.values()]
    assert cropped["choose"].cropped == 6 * 3 and cropped["say"].cropped == 4 and cropped["who"].cropped == 0


# --- prompts ---


def test_prompts_are_laid_out_as_in_the_bundle(tmp_path):
    choose, who, say = core.read(bundle(tmp_path))
    assert core.prompts(choose, CHOICE[0], [CHOICE[1], CHOICE[5]]) == [
        f"Q1:\nA: bb\n\nQ5:\nA: cc\n\nQ0:\nA: {choice}" for choice in ("aa", "bb", "cc")
    ]
    assert core.prompts(who, SCHEMA[3], [SCHEMA[0]]) == ["x0 so\n\nx3 so", "x0 so\n\ny3 so"]
    assert core.prompts(say, LANGUAGE[1], [LANGUAGE[0]]) == ["say ab ab\n\nsay bc", "say ab ab\n\nsay bc bc"]


def test_examples_are_other_lines_and_the_same_each_time(tmp_path, monkeypatch):
    """Drawn with random.Random(1234 + index) from the file as random.Random(1337) shuffles it."""
    path, seen = bundle(tmp_path), []
    inner = core.prompts
    monkeypatch.setattr(
        core, "prompts", lambda task, item, examples: seen.append((item, examples)) or inner(task, item, examples)
    )
    core.evaluate(core.read(path)[:1], bytes_model({}), encode, 512)
    rows = list(CHOICE)
    random.Random(1337).shuffle(rows)
    for index, (item, examples) in enumerate(seen):
        others = random.Random(1234 + index).sample([n for n in range(6) if n != index], 2)
        assert item == rows[index] and examples == [rows[n] for n in others] and item not in examples
    assert len(seen) == 6


def test_a_limit_takes_the_first_of_the_shuffled(tmp_path):
    found = accuracies({" ": "b", "b": "b"}, bundle(tmp_path), limit=3)
    rows = list(CHOICE)
    random.Random(1337).shuffle(rows)
    assert found["choose"].accuracy == pytest.approx(sum(row["gold"] == 1 for row in rows[:3]) / 3)
    assert [r.count for r in found.values()] == [3, 3, 3]


# --- the command ---


def test_the_command(small, tmp_path, capsys):
    train.main([NVFP4, *small, "run.name=core", "train.steps=2"])
    run, path = folder(small, "core"), bundle(tmp_path)
    assert evaluate.main([str(run), "--core-bundle", str(path), "--models", "trained,bf16"]) == 0
    found = json.loads((checkpoint.find(run) / "core.json").read_text())
    for name in ("as trained", "bf16"):
        rows = found[name]["tasks"]
        assert [row["task"] for row in rows] == [*TASKS]
        assert found[name]["core"] == pytest.approx(sum(row["centred"] for row in rows) / 3)
    printed = capsys.readouterr().out
    assert f"CORE {found['bf16']['core']:.4f}, the mean of 3 tasks" in printed


# --- mistakes ---

YAML = "icl_tasks:\n- label: {label}\n  dataset_uri: {uri}\n  num_fewshot: {shots}\n  icl_task_type: {kind}\n"
GOOD = {"label": "say", "uri": "sub/say.jsonl", "shots": "[1]", "kind": "language_modeling"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"core.yaml": None}, "it has no core.yaml; a bundle has core.yaml, eval_meta_data.csv, eval_data"),
        ({"eval_meta_data.csv": None}, "it has no eval_meta_data.csv"),
        ({"core.yaml": "icl_tasks: [\n"}, "core.yaml: expected a list icl_tasks"),
        ({"core.yaml": "tasks: []\n"}, "core.yaml: expected a list icl_tasks"),
        ({"core.yaml": "icl_tasks:\n- label: a\n"}, "core.yaml, task 1: no dataset_uri; expected label"),
        ({"core.yaml": YAML.format(**GOOD | {"kind": "language_modelling"})}, "did you mean 'language_modeling'?"),
        ({"core.yaml": YAML.format(**GOOD | {"uri": "sub/sya.jsonl"})}, "sya.jsonl, of task say: No such file or directory"),
        ({"core.yaml": YAML.format(**GOOD | {"label": "sya"})}, "no row for 'sya'; did you mean 'say'?"),
        (
            {"core.yaml": YAML.format(**GOOD | {"shots": "[4]"})},
            "say.jsonl: 4 lines, of which 4 examples and a question cannot",
        ),
        ({"core.yaml": YAML.format(**GOOD | {"shots": "many"})}, "num_fewshot 'many', expected a list of a number"),
        ({"core.yaml": YAML.format(**GOOD | {"kind": "schema"})}, "say.jsonl, line 1: schema has context_options"),
        ({"eval_meta_data.csv": "Eval Task,Baseline\nsay,0\n"}, "expected columns 'Eval Task' and 'Random baseline'"),
        (
            {"eval_meta_data.csv": "Eval Task,Random baseline\nchoose,100\n"},
            "choose has a baseline of 100.0, expected 0 to below",
        ),
    ],
)
def test_mistakes_are_one_sentence(changes, said, tmp_path):
    path = bundle(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        core.read(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "choose.jsonl, line 7: no JSON"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 7: gold is 2, expected the index of one of 2 from 0"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 7: multiple_choice has query, choices, gold"),
    ],
)
def test_a_broken_line(line, said, tmp_path):
    with (bundle(tmp_path) / "eval_data" / "sub" / "choose.jsonl").open("a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match="choose.jsonl") as error:
        core.read(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)
