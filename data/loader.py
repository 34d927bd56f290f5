"""Corpus: prepared shards as one long row of tokens, and batches as a pure function of (seed, index).

Window i starts at token i * T and spans T + 1 tokens; x is its first T, y its last T. So n = (tokens - 1) // T windows
predict every token once (a rest below T never). They run across documents (BOS marks their starts) and across shards.

    sample s = index * batch_size + row          epoch e = s // n          window = P[seed, e](s % n)

P is a permutation of 0 .. n-1 that needs no table: a Feistel network over 2h bits, the smallest even number that holds
n, with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): whatever lands at n or above is
sent through again, at most 4 passes on average. Each of the 6 rounds maps (a, b) to (b, a ^ (hash(b ^ key_r) mod 2^h)),
which is invertible for any hash. Ours is splitmix64's finaliser (Steele, Lea & Flood 2014). So each window is seen once
an epoch, in another order each epoch, and any batch costs O(batch_size), on any rank, after any resume. `index` is the
global micro-batch index: the caller counts micro-batches over ranks and steps, the loader counts nothing.

Left out: prefetching (a batch of 32 x 256 takes 0.4 ms from the page cache), document-aligned packing, mixtures.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from . import shards
from .tokenizer import Tokenizer

ROUNDS = 6
Batch = tuple[torch.Tensor, torch.Tensor]  # x, y


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 [...] -> uint64 [...], a bijection that scrambles well; products wrap modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(position: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Positions uint64 [k] below n -> their places uint64 [k] in the permutation of range(n) of (seed, epoch [k])."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = splitmix64(epoch + splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
    keys = [splitmix64(key + np.uint64(r)) for r in range(ROUNDS)]
    place, todo = position.copy(), np.arange(len(position))
    while len(todo):
        a, b = place[todo] >> half, place[todo] & mask
        for round_key in keys:
            a, b = b, a ^ (splitmix64(b ^ round_key[todo]) & mask)
        place[todo] = (a << half) | b
        todo = todo[place[todo] >= n]
    return place


class Corpus:
    """The prepared corpus in `folder`. `tokenizer`, `vocab_size`; `sha256` of the manifest identifies the data.

    Opening compares every shard's size and header with the manifest; `verify` also hashes all tokens. Raises ValueError
    naming the file, what was found, what was expected and what to do.
    """

    def __init__(self, folder: Path | str, verify: bool = False):
        self.folder = Path(folder)
        manifest = shards.read_manifest(self.folder)
        if manifest is None or not manifest["complete"]:
            raise ValueError(f"{self.folder} holds no completely prepared corpus; run prepare to make or finish it")
        self.sha256 = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()
        self.tokenizer = Tokenizer.load(self.folder)
        self.vocab_size = self.tokenizer.vocab_size
        if self.tokenizer.sha256 != manifest["tokenizer_sha256"]:
            raise ValueError(
                f"{self.tokenizer.path}: sha256 is {self.tokenizer.sha256}, expected {manifest['tokenizer_sha256']}; "
                f"{shards.REDO}"
            )
        dtype = shards.token_dtype(self.vocab_size)
        self._shards: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for entry in manifest["shards"]:
            tokens = shards.open_shard(self.folder / entry["file"], entry, self.tokenizer.sha256, dtype, verify)
            self._shards[entry["split"]].append(tokens)
        self._ends = {split: np.cumsum([len(t) for t in tokens]) for split, tokens in self._shards.items()}

    def tokens(self, split: str) -> int:
        """Number of tokens in "train" or "val", BOS tokens included."""
        if split not in self._ends:
            raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
        return int(self._ends[split][-1])

    def batch(self, split: str, seed: int, index: int, batch_size: int, seq_len: int) -> Batch:
        """Micro-batch number `index` (from 0, without end) of the stream `seed`: x, y int64 [batch_size, seq_len].

        Pure: the arguments decide everything. Raises ValueError if the split is shorter than one window.
        """
        if index < 0 or batch_size < 1:
            raise ValueError(f"index={index}, batch_size={batch_size}: expected index >= 0 and batch_size >= 1")
        n = self._windows(split, seq_len)
        sample = index * batch_size + np.arange(batch_size, dtype=np.uint64)
        return self._read(split, permute(sample % np.uint64(n), n, seed, sample // np.uint64(n)), seq_len)

    def val_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches x, y int64 [batch_size, seq_len] of validation windows, in order; always the same ones.

        `limit` is a number of batches: if they hold fewer windows than there are, these are spread evenly over the
        validation set and all batches are full. Without it every window comes once and the last batch may be smaller.
        """
        n = self._windows("val", seq_len)
        count = n if limit is None else min(n, limit * batch_size)
        windows = np.arange(count, dtype=np.uint64) * np.uint64(n) // np.uint64(max(count, 1))
        for start in range(0, count, batch_size):
            yield self._read("val", windows[start : start + batch_size], seq_len)

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """The documents of "train" or "val", in order: token ids, without BOS."""
        self.tokens(split)  # raises if there is no such split
        tokens = np.concatenate(self._shards[split])
        for document in np.split(tokens, np.flatnonzero(tokens == self.tokenizer.bos)):
            if len(document) > 1:
                yield document[1:].astype(np.int64)

    def _windows(self, split: str, seq_len: int) -> int:
        n = (self.tokens(split) - 1) // seq_len if seq_len > 0 else 0
        if n < 1:
            raise ValueError(
                f"the {split} split of {self.folder} has {self.tokens(split):,} tokens, too few for one window of "
                f"seq_len={seq_len} plus 1: choose a seq_len from 1 to {self.tokens(split) - 1} or prepare more text"
            )
        return n

    def _read(self, split: str, windows: np.ndarray, seq_len: int) -> Batch:
        rows = torch.from_numpy(np.stack([self._slice(split, int(w) * seq_len, seq_len + 1) for w in windows]))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _slice(self, split: str, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length of the split as int64, from as many shards as they lie in."""
        number = int(np.searchsorted(self._ends[split], start, side="right"))
        parts = []
        while length > 0:
            tokens = self._shards[split][number]
            offset = start - (int(self._ends[split][number]) - len(tokens))
            parts.append(tokens[offset : offset + length].astype(np.int64))
            start, length, number = start + len(parts[-1]), length - len(parts[-1]), number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
