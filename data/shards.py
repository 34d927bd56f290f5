"""The files of a prepared corpus: shards of tokens and the manifest that lists them.

    folder/tokenizer.model     the SentencePiece model
    folder/train_00000.bin     shard: 1,024 bytes of header, then the tokens, little endian
    folder/val_00000.bin       the validation documents that lie between the same two document numbers
    folder/manifest.json       settings, one entry per shard, "complete": true at the end

Header: magic "narrow\\0\\0" | version u32 | bytes per token u32 (2 or 4) | count u64 | sha256 of the tokenizer (32)
| sha256 of the tokens (32) | zeros. The second hash, also in the manifest, tells a shard of another corpus from ours
without reading its tokens; reading them is `verify`. Tokens are uint16 where the vocabulary is below 65,536,
else uint32 (the layout follows llm.c's and modded-nanogpt's shards, which lack dtype and hashes).

Every file is written beside its place and moved there, so a killed process leaves an old file or a whole one. Left out:
an index of documents (BOS marks them), compression, and fsync of the folder: a rename lost in a power cut is noticed
by the checks on opening.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = b"narrow\0\0", 1, 1024
HEADER = struct.Struct("<8sIIQ32s32s")
REDO = "delete the folder and prepare again"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size < 65_536 else "<u4")


def write_atomic(path: Path, *chunks: bytes | np.ndarray) -> None:
    """The chunks, one after another, as the file `path`: wholly or not at all. Raises OSError (disk full)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def place_for(folder: Path, key: str) -> Path:
    """The nearest folder that exists at or above one to be made. Raises ValueError, naming the config key, if a file is in
    the way."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir():
        raise ValueError(f"{key}: {place} is a file, expected a folder")
    return place


def write_shard(path: Path, tokens: np.ndarray, tokenizer_sha256: str) -> str:
    """`tokens` [count] uint16 or uint32 as a shard; returns the sha256 of the tokens, hex."""
    digest = hashlib.sha256(tokens)
    header = HEADER.pack(MAGIC, VERSION, tokens.itemsize, len(tokens), bytes.fromhex(tokenizer_sha256), digest.digest())
    write_atomic(path, header.ljust(HEADER_BYTES, b"\0"), tokens)
    return digest.hexdigest()


def open_shard(path: Path, entry: dict, tokenizer_sha256: str, dtype: np.dtype, verify: bool = False) -> np.ndarray:
    """The tokens of a shard [count], a read-only memmap, after comparing it with its manifest entry.

    Raises ValueError, naming the file, what was found and what was expected. `verify` reads and hashes every token.
    """

    def check(what: str, found, expected) -> None:
        if found != expected:
            raise ValueError(f"{path}: {what} is {found}, expected {expected}; {REDO}")

    if not path.is_file():
        raise ValueError(f"{path}: the shard is missing; {REDO}")
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    check("size in bytes", path.stat().st_size, HEADER_BYTES + entry["tokens"] * dtype.itemsize)
    magic, version, itemsize, count, tokenizer, digest = HEADER.unpack(raw)
    check("magic", magic, MAGIC)
    check("format version", version, VERSION)
    check("bytes per token", itemsize, dtype.itemsize)
    check("token count", count, entry["tokens"])
    check("tokenizer sha256", tokenizer.hex(), tokenizer_sha256)
    check("sha256 in the header", digest.hex(), entry["sha256"])
    tokens = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    if verify:
        check("sha256 of the tokens", hashlib.sha256(tokens).hexdigest(), entry["sha256"])
    return tokens


def write_manifest(folder: Path, manifest: dict) -> None:
    write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None if there is none. Raises ValueError if it is not ours."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["version"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of a prepared corpus; {REDO}") from error
    if found != VERSION:
        raise ValueError(f"{path}: format version is {found}, expected {VERSION}; {REDO}")
    return manifest
