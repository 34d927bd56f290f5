"""lm-eval on checkpoints (evaluation/harness.py): its numbers against formulas and against evaluate.py's own, with the network
off; files of JSON lines; the tasks that ship; and every mistake as one sentence."""

import json
import math
import pickle
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import evaluate
import export
import train
from data import Corpus, prepare
from evaluation import harness
from evaluation.tasks.examples import KINDS, heldout, questions
from model import measure
from quant.policy import unquantized
from tests.test_train import NVFP4, folder


@pytest.fixture(scope="module")
def run(small):
    train.main([NVFP4, *small, "run.name=tasks", "policy.tail.last=0"])
    return folder(small, "tasks")


@pytest.fixture(scope="module")
def loaded(run):
    return checkpoint.load_model(run)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"asked the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def uniform(run):
    """Every token has the probability 1 / V."""
    found = checkpoint.load_model(run)
    with torch.no_grad():
        found.model.head.weight.zero_()
    return found


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(loaded, file: Path) -> dict[str, harness.Result]:
    load = harness.load_tasks([str(file)])
    return {r.metric: r for r in harness.run(harness.checkpoint_model(loaded.model, loaded.tokenizer), load, None)}


TEXT = "def f(x):\n    return x * 12345  # three  spaces, and \u2581 é 漢\n" * 12


# --- numbers ---


def test_a_uniform_model_has_log2_v_bits_a_token(uniform, tmp_path):
    """ln 512 in fp32, from a log-softmax of equal logits: a sum of 512 ones is exact, log is within an ulp, 2^-23 below 8."""
    texts, V = [TEXT, "a", TEXT[:100] * 3], uniform.config.model.vocab_size
    found = asked(uniform, lines(tmp_path / "x.jsonl", [{"text": t} for t in texts]))["bits_per_byte"]
    tokens, size = (sum(map(count, texts)) for count in (lambda t: len(uniform.tokenizer.encode(t)), lambda t: len(t.encode())))
    assert found.value == pytest.approx(tokens * math.log2(V) / size, rel=2**-23)
    assert (found.task, found.count, found.chance) == ("x", 3, None)


def test_a_uniform_model_takes_the_shortest_choice(uniform, tmp_path):
    """Its likelihood is V^-n of n tokens, the first of equals; acc_norm divides by characters."""
    rows = [{"context": "x =", "choices": ["12", "1", "345"], "answer": answer} for answer in (0, 1, 1, 2)]
    rows += [{"context": "if", "choices": ["1", "2"], "answer": answer} for answer in (0, 1)]
    found = asked(uniform, lines(tmp_path / "x.jsonl", rows))
    sizes = [[len(uniform.tokenizer.encode(f" {c}")) for c in row["choices"]] for row in rows]
    taken = [each.index(min(each)) for each in sizes]
    assert taken == [1, 1, 1, 1, 0, 0]  # digits are a token each
    assert found["acc"].value == 0.5 and found["acc"].chance == pytest.approx((4 / 3 + 2 / 2) / 6) and found["acc"].count == 6
    assert found["acc"].error == pytest.approx(math.sqrt(0.25 / 5))  # p (1 - p) / (n - 1)


def test_bits_per_byte_are_those_of_measure(loaded, tmp_path):
    """The same windows: a text of a whole number of them, tokens behind BOS. Losses of tokens have the same bits; both sum them
    in fp64, in other orders: n 2^-53 of n positive terms, and a few roundings, so 1e-13 for these 700."""
    tokenizer, T = loaded.tokenizer, loaded.config.model.seq_len
    text = next(TEXT[:n] for n in range(len(TEXT), 0, -1) if len(tokenizer.encode(TEXT[:n])) % T == 0)
    stream = torch.tensor(tokenizer.encode(text, bos=True))
    batches = [(stream[i : i + T][None], stream[i + 1 : i + T + 1][None]) for i in range(0, len(stream) - 1, T)]
    assert len(batches) >= 5
    _, bpb = measure(loaded.model, batches, torch.as_tensor(tokenizer.bytes_per_token))
    file = lines(tmp_path / "x.jsonl", [{"text": text}])
    # (bytes_per_token counts 4 for the 3 bytes of an escaped U+2581, lm-eval what UTF-8 has)
    counted = int(tokenizer.bytes_per_token[stream.numpy()].sum())
    assert asked(loaded, file)["bits_per_byte"].value == pytest.approx(bpb * counted / len(text.encode()), rel=1e-13)
    with unquantized(loaded.model):
        assert asked(loaded, file)["bits_per_byte"].value != pytest.approx(bpb * counted / len(text.encode()), rel=1e-5)


def test_a_rest_is_scored_with_a_full_window(loaded, tmp_path):
    """What does not fill a window has the tokens before it as context: T inputs, of which the last are scored."""
    tokenizer, T = loaded.tokenizer, loaded.config.model.seq_len
    ids = tokenizer.encode(TEXT[:200], bos=True)[: T + 10]
    text = tokenizer.decode(ids)
    ids = tokenizer.encode(text, bos=True)
    rest = len(ids) - 1 - T
    assert 0 < rest < T
    with torch.no_grad():
        logp = [loaded.model(torch.tensor([x])).float().log_softmax(-1)[0] for x in (ids[:T], ids[-T - 1 : -1])]
    nats = sum(-float(logp[0][i, ids[i + 1]]) for i in range(T))
    nats += sum(-float(logp[1][i, ids[rest + 1 + i]]) for i in range(T - rest, T))
    found = asked(loaded, lines(tmp_path / "x.jsonl", [{"text": text}]))["bits_per_byte"].value
    assert found == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)


def test_choices_are_scored_behind_their_context(loaded, tmp_path):
    """acc by hand: sums of ln p of the tokens after the context, in one pass over both."""
    rows = [{"context": f"import {a}", "choices": ["os", "re, sys", "x = 1"], "answer": n % 3} for n, a in enumerate("abcdef")]
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            ids, start = loaded.tokenizer.encode(f"{row['context']} {choice}", bos=True), len(row["context"])
            start = len(loaded.tokenizer.encode(row["context"], bos=True))
            with torch.no_grad():
                logp = loaded.model(torch.tensor([ids[:-1]])).float().log_softmax(-1)[0]
            sums.append(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))))
        right += sums.index(max(sums)) == row["answer"]
    assert asked(loaded, lines(tmp_path / "x.jsonl", rows))["acc"].value == right / 6


def test_text_is_generated_up_to_a_stop(loaded):
    tokenizer, model = loaded.tokenizer, loaded.model
    prompt = tokenizer.encode("def ", bos=True)
    whole = tokenizer.decode(model.sample(prompt, 40, 0, end=tokenizer.bos)[len(prompt) :])
    options = {"until": [], "max_gen_toks": 40, "do_sample": False}
    assert harness.generated(model, tokenizer, "def ", options) == whole and len(whole) > 10
    stop = whole[4:6]
    assert harness.generated(model, tokenizer, "def ", {**options, "until": [stop, "\x00"]}) == whole[: whole.index(stop)]
    assert harness.generated(model, tokenizer, "def ", {**options, "until": whole[0]}) == ""


def test_what_the_window_cannot_hold(loaded):
    T = loaded.config.model.seq_len
    context, tokens = list(range(3, 3 + T)), [5, 6]
    assert harness.scored(loaded.model, context, tokens) == harness.scored(loaded.model, context[-T + 1 :], tokens)
    with pytest.raises(ValueError, match=f"a continuation of {T + 1} tokens is longer than the model's window of {T}"):
        harness.scored(loaded.model, [1], [2] * (T + 1))


# --- the command ---


def test_the_tasks_that_ship(run, capsys):
    """Every one of them; a model of 20 steps guesses."""
    names = "heldout_bpb,made_up"
    assert evaluate.main([str(run), "--tasks", names, "--limit", "12", "--models", "trained,stored,bf16"]) == 0
    found = json.loads((checkpoint.find(run) / "tasks.json").read_text())
    assert found["as trained"] == found["stored codes"] and found["step"] == 20 and found["limit"] == 12
    tasks = {row["task"]: row for row in found["as trained"]}
    assert [*tasks] == ["heldout_bpb", *sorted(KINDS)]
    assert all(tasks[name]["chance"] == 0.25 and tasks[name]["count"] == 12 for name in KINDS)
    assert 0.5 < tasks["heldout_bpb"]["value"] < 8 and found["bf16"][0]["value"] != tasks["heldout_bpb"]["value"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["task", "metric", "documents", "chance", "as", "trained", "stored", "codes", "bf16"]
    assert printed[2].split()[0] == "heldout_bpb" and printed[2].split()[-1] == f"{found['bf16'][0]['value']:.4f}"


def test_an_export_by_lm_evals_own_route(run, tmp_path, capsys):
    """BF16 here and in transformers: the same tokens and windows, roundings in other places (norms). Measured: 4e-5 of the
    loss; a second BOS before each text (3e-3) or ln p in BF16 (8e-4), both lm-eval's defaults here, would be seen."""
    out = export.export(run, "bf16", "compressed-tensors", tmp_path / "bf16", 2)
    file = lines(tmp_path / "held.jsonl", [{"text": TEXT}, {"text": "import os\n\nclass A:\n    pass\n"}])
    told = ["--tasks", f"{file},copy_words", "--limit", "10", "--models", "bf16", "--exported", str(out)]
    assert evaluate.main([str(run), *told]) == 0
    found = json.loads((checkpoint.find(run) / "tasks.json").read_text())
    ours, theirs = found["bf16"], found[str(out)]
    assert [r["task"] for r in ours] == [r["task"] for r in theirs] == ["held", "copy_words"]
    assert theirs[0]["value"] == pytest.approx(ours[0]["value"], rel=2e-4)
    assert abs(theirs[1]["value"] - ours[1]["value"]) <= 0.1  # one of ten, nearly tied
    assert f"...{str(out)[-17:]}" in capsys.readouterr().out


def test_a_folder_of_tasks(run, tmp_path):
    tasks = tmp_path / "mine"
    tasks.mkdir()
    data = lines(tmp_path / "held.jsonl", [{"q": "import", "a": ["os", "!"], "n": 0}] * 3)
    (tasks / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: n\n"
    )
    assert evaluate.main([str(run), "--tasks", "mine,copy_words", "--task-dir", str(tasks), "--limit", "2"]) == 0
    found = json.loads((checkpoint.find(run) / "tasks.json").read_text())["bf16"]
    assert {row["task"] for row in found} == {"mine", "copy_words"} and all(row["count"] == 2 for row in found)


# --- mistakes ---


def test_mistakes_are_one_sentence_and_overwrite_nothing(run, tmp_path):
    kept = checkpoint.find(run) / "tasks.json"
    kept.write_text("kept")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.yaml").write_text("task: a\noutput_type: multiple_choice\ndoc_to_txt: q\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "b.yaml").write_text("task: [b\n")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in "ab":
        (twice / f"{name}.yaml").write_text("task: same\noutput_type: multiple_choice\n")
    files = {
        "form": ['{"context": "a", "choises": ["b", "c"], "answer": 0}'],
        "json": ['{"text": "a"}', "{text}"],
        "two": ['{"text": "a"}', '{"context": "a", "choices": ["b", "c"], "answer": 0}'],
        "answer": ['{"context": "a", "choices": ["b", "c"], "answer": 2}'],
        "empty": [""],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    cases = [
        (["copy_word"], r"--tasks copy_word: no such task .*; did you mean 'copy_words'\?"),
        (["copy_words", "--task-dir", f"{tmp_path}/none"], "--task-dir .*none: no such folder"),
        (["b", "--task-dir", str(broken)], "b.yaml: .*while parsing a flow sequence"),
        (["a", "--task-dir", str(bad)], r"task 'a' \(.*a.yaml\): TypeError: .*doc_to_txt.*; did you mean 'doc_to_text'\?"),
        ([f"{tmp_path}/none.jsonl"], "none.jsonl: No such file or directory"),
        ([f"{tmp_path}/form.jsonl"], r"form.jsonl, line 1: expected .*; did you mean 'choices'\?"),
        ([f"{tmp_path}/json.jsonl"], r"json.jsonl, line 2: no JSON"),
        ([f"{tmp_path}/two.jsonl"], r"two.jsonl, line 2: has .*; a file is one task"),
        ([f"{tmp_path}/answer.jsonl"], r"answer.jsonl, line 1: expected a context, two or more choices"),
        ([f"{tmp_path}/empty.jsonl"], r"empty.jsonl: no line in it"),
        (["same", "--task-dir", str(twice)], r"b.yaml: the task 'same' is that of .*a.yaml too"),
        (["copy_words,copy_words"], "'copy_words' is asked twice"),
        (["copy_words,"], r"--tasks : no such task"),
        (["copy_words", "--models", "train"], r"--models train: no such model; did you mean 'trained'\?"),
        (["copy_words", "--limit", "0"], "--limit 0: expected at least 1"),
        (["copy_words", "--exported", f"{tmp_path}/none"], "--exported .*none: no folder that export.py has written"),
        (["copy_words", "--top-p", "1.5"], "--top-p 1.5: expected more than 0 and at most 1"),
        (["copy_words", "--batches", "2,x"], "--batches 2,x: expected whole numbers from 1"),
    ]
    for words, said in cases:
        with pytest.raises(ValueError, match=said) as error:
            evaluate.main([str(run), "--tasks", *words])
        assert "\n" not in str(error.value), words
    assert kept.read_text() == "kept"


FORMS = st.one_of(
    st.fixed_dictionaries({"text": st.text(min_size=1)}),
    st.fixed_dictionaries({"context": st.text(), "choices": st.lists(st.text(min_size=1), min_size=2), "answer": st.just(1)}),
)


@given(st.lists(FORMS, min_size=1, max_size=4), st.integers(0, 3), st.sampled_from(["text", "context", "choices", "answer"]))
@settings(max_examples=60, deadline=None)
def test_lines_are_read_as_they_are_or_refused(tmp_path_factory, rows, place, key):
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    alike = [row for row in rows if row.keys() == rows[0].keys()]
    assert harness.rows_of(lines(file, alike)) == alike
    broken = [dict(row) for row in alike]
    broken[place % len(alike)][key] = [] if key == "text" or key in broken[0] else "x"
    with pytest.raises(ValueError, match=r"x.jsonl, line \d+: (expected|has) "):
        harness.rows_of(lines(file, broken))


# --- the questions that are made up ---


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_questions(kind):
    """A function of kind and seed; four different choices; the answer is right by a rule of its own, and lies anywhere."""
    found = questions(kind)
    assert found == questions(kind) != questions(kind, seed=1) and len(found) == 200
    for q in found:
        right = q["choices"][q["answer"]]
        assert len({*q["choices"]}) == 4
        head, asked = q["context"].rsplit("; ", 1)
        if kind == "copy_words":
            assert f"{asked} {right}" == head
        elif kind == "recall_pairs":
            assert f"{asked} {right}" in head.split(", ")
        else:
            a, b = (int(n) for n in asked.removesuffix(" =").split(" + "))
            assert a + b == int(right)
    places = torch.bincount(torch.tensor([q["answer"] for q in found]), minlength=4)
    assert (places - 50).abs().max() < 5 * math.sqrt(200 * 0.25 * 0.75)  # five standard deviations


def test_held_out_documents_are_all_of_them(loaded):
    corpus = Corpus(prepare(loaded.config.data, quiet=True))
    documents = [d.tolist() for d in corpus.documents("val")]
    bos = corpus.tokenizer.bos
    assert len(documents) > 2 and not any(bos in d for d in documents)
    assert sum(([bos, *d] for d in documents), []) == corpus.parts[""].slice("val", 0, corpus.tokens("val")).tolist()
    texts = [row["text"] for row in heldout(corpus=corpus.val_folders, characters=100)["test"]]
    assert texts == [corpus.tokenizer.decode(d)[:100] for d in documents]
    with pytest.raises(ValueError, match="takes its text from the checkpoint's corpus"):
        heldout()


# --- pickles ---


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "a.pkl", "plain", "torch"])
def test_pickles_are_refused(name, tmp_path):
    """Without being loaded, by name or by their first bytes, alone or in a folder."""
    file = tmp_path / "folder" / name
    file.parent.mkdir()
    if name in ("plain", "a.pkl"):
        file.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": torch.zeros(2)}, file)
    for path in (file, file.parent)[: 1 if "." not in name else 2]:
        with pytest.raises(ValueError, match=f"{name} is a pickle, which may run any code") as error:
            evaluate.main([str(path)])
        assert "\n" not in str(error.value)


def test_what_is_no_pickle(tmp_path, run):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.txt", "a")
    for path in (tmp_path / "x", tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
            checkpoint.find(path)
    (run / "notes.bin").write_bytes(b"x")  # beside its steps a run may have anything
    assert checkpoint.find(run).name == "step_000020"
