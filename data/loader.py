"""Corpus: prepared shards as one long row of tokens a source, and batches as a pure function of (seed, index).

Window i starts at token i * T and spans T + 1 tokens; x is its first T, y its last T. So n = (tokens - 1) // T windows
predict every token once (a rest below T never). They run across documents (BOS marks their starts) and across shards.

    sequence s = index * batch_size + row        number m of its source: mixture.py, s itself if there is one source
    epoch e = m // n        window = P[seed, e](m % n)

P is a permutation of 0 .. n-1 that needs no table: a Feistel network over 2h bits, the smallest even number that holds
n, with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): whatever lands at n or above is
sent through again, at most 4 passes on average. Each of the 6 rounds maps (a, b) to (b, a ^ (hash(b ^ key_r) mod 2^h)),
which is invertible for any hash. Ours is splitmix64's finaliser (Steele, Lea & Flood 2014). So each window is seen once
an epoch of its source, in another order each epoch, and any batch costs O(batch_size), on any rank, after any resume.
`index` is the global micro-batch index: the caller counts micro-batches over ranks and steps, the loader counts nothing.

Left out: prefetching (a batch of 32 x 256 takes 0.4 ms from the page cache), document-aligned packing.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from . import mixture, shards
from .mixture import ONE, Mixture
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


class Part:
    """One prepared folder: `tokenizer`, `sha256` of the manifest; `source`, the text it is made of."""

    def __init__(self, folder: Path, verify: bool):
        self.folder = folder
        manifest = shards.read_manifest(folder)
        if manifest is None or not manifest["complete"]:
            raise ValueError(f"{folder} holds no completely prepared corpus; run prepare to make or finish it")
        self.source, self.sha256 = manifest["source"], hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        self.tokenizer = Tokenizer.load(folder)
        if self.tokenizer.sha256 != manifest["tokenizer_sha256"]:
            raise ValueError(
                f"{self.tokenizer.path}: sha256 is {self.tokenizer.sha256}, expected {manifest['tokenizer_sha256']}; "
                f"{shards.REDO}"
            )
        dtype = shards.token_dtype(self.tokenizer.vocab_size)
        self.shards: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for entry in manifest["shards"]:
            tokens = shards.open_shard(folder / entry["file"], entry, self.tokenizer.sha256, dtype, verify)
            self.shards[entry["split"]].append(tokens)
        self.ends = {split: np.cumsum([len(t) for t in tokens]) for split, tokens in self.shards.items()}

    def tokens(self, split: str) -> int:
        return int(self.ends[split][-1])

    def windows(self, split: str, seq_len: int) -> int:
        n = (self.tokens(split) - 1) // seq_len if seq_len > 0 else 0
        if n < 1:
            raise ValueError(
                f"the {split} split of {self.folder} has {self.tokens(split):,} tokens, too few for one window of "
                f"seq_len={seq_len} plus 1: choose a seq_len from 1 to {self.tokens(split) - 1} or prepare more text"
            )
        return n

    def read(self, split: str, windows: np.ndarray, seq_len: int) -> np.ndarray:
        """Window numbers [k] -> int64 [k, seq_len + 1]."""
        return np.stack([self.slice(split, int(w) * seq_len, seq_len + 1) for w in windows])

    def slice(self, split: str, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length of the split as int64, from as many shards as they lie in."""
        number = int(np.searchsorted(self.ends[split], start, side="right"))
        parts = []
        while length > 0:
            tokens = self.shards[split][number]
            offset = start - (int(self.ends[split][number]) - len(tokens))
            parts.append(tokens[offset : offset + length].astype(np.int64))
            start, length, number = start + len(parts[-1]), length - len(parts[-1]), number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Corpus:
    """What `prepare` has made: one folder, or several as a Mixture. `tokenizer`, `vocab_size`; `sha256` identifies the data (of
    the manifest, or of all of them), `val_sha256` what `val_batches` takes from it.

    `run` is (steps, sequences a step), which phases are shares of; without it every sequence is as in the last phase. Opening
    compares every shard's size and header with the manifest; `verify` also hashes all tokens. Raises ValueError naming the
    file, what was found, what was expected and what to do.
    """

    def __init__(self, where: Path | str | Mixture, verify: bool = False, run: tuple[int, int] | None = None):
        several, self.run = isinstance(where, Mixture), run
        folders = where.folders if several else {ONE: Path(where)}
        self.parts = {name: Part(folder, verify) for name, folder in folders.items()}
        self.tokenizer = next(iter(self.parts.values())).tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self.plans = {"train": mixture.alone(), "val": mixture.alone()}
        self.sha256 = self.val_sha256 = next(iter(self.parts.values())).sha256
        if several:
            last = mixture.plan(where.phases[-1:], 1, 1)
            self.plans["train"] = mixture.plan(where.phases, *run) if run else last
            self.plans["val"] = mixture.alone(where.validate) if where.validate else last
            self.sha256 = _digest(part.sha256 for part in self.parts.values())
            self.val_sha256 = _digest(f"{self.parts[k].sha256} {f}" for k, f in self.plans["val"].splits[0].shares.items())

    def tokens(self, split: str) -> int:
        """Number of tokens in "train" or "val" of all sources, BOS tokens included."""
        if split not in self.plans:
            raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
        return sum(part.tokens(split) for part in self.parts.values())

    def check(self, seq_len: int) -> None:
        """Raises ValueError if a source has not a single window where the run reads it."""
        for split, plan in self.plans.items():
            for name in plan.before[0]:
                self._windows(name, split, seq_len)

    def batch(self, split: str, seed: int, index: int, batch_size: int, seq_len: int) -> Batch:
        """Micro-batch number `index` (from 0, without end) of the stream `seed`: x, y int64 [batch_size, seq_len].

        Pure: the arguments decide everything. Raises ValueError if a source is shorter than one window.
        """
        if index < 0 or batch_size < 1:
            raise ValueError(f"index={index}, batch_size={batch_size}: expected index >= 0 and batch_size >= 1")
        self.tokens(split)  # raises if there is no such split

        def window(name: str, number: np.ndarray, n: int) -> np.ndarray:
            return permute(number % np.uint64(n), n, walk(seed, name), number // np.uint64(n))

        places = map(self.plans[split].place, range(index * batch_size, (index + 1) * batch_size))
        return self._read(split, list(places), window, seq_len)

    def val_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches x, y int64 [batch_size, seq_len] of validation windows, in order; always the same ones.

        `limit` is a number of batches: if they hold fewer windows than there are, these are spread evenly over the
        validation set and all batches are full. Without it every window comes once and the last batch may be smaller; of
        several sources as many, in their shares, as the one lasts that ends first.
        """
        split = self.plans["val"].splits[0]
        have = {name: self._windows(name, "val", seq_len) for name in split.shares}
        count = min(int(have[name] / share) for name, share in split.shares.items())
        while any(c > have[name] for name, c in split.counts(count).items()):
            count -= 1  # (their counts are rounded)
        count = count if limit is None else min(count, limit * batch_size)
        of = split.counts(count)

        def window(name: str, number: np.ndarray, n: int) -> np.ndarray:
            return number * np.uint64(n) // np.uint64(of[name])

        for start in range(0, count, batch_size):
            places = map(split.place, range(start, min(start + batch_size, count)))
            yield self._read("val", list(places), window, seq_len)

    @property
    def val_folders(self) -> list[str]:
        """Where the texts of validation lie."""
        return [str(self.parts[name].folder) for name in self.plans["val"].before[0]]

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """The documents of "train" or "val", in order, source by source: token ids, without BOS."""
        self.tokens(split)
        for name in self.plans[split].before[0]:
            tokens = np.concatenate(self.parts[name].shards[split])
            for document in np.split(tokens, np.flatnonzero(tokens == self.tokenizer.bos)):
                if len(document) > 1:
                    yield document[1:].astype(np.int64)

    def usage(self, seq_len: int) -> dict:
        """What the run reads: {"sources": name -> its text, training tokens and epochs (how many times it is read), in all and
        by phase; "phases": the steps and shares of each}."""
        steps, per_step = self.run
        plan, phases, taken = self.plans["train"], [], []
        for split, first, end in zip(plan.splits, plan.firsts, [*plan.firsts[1:], steps * per_step], strict=True):
            shares = {name or "all": float(share) for name, share in split.shares.items()}
            phases.append({"steps": [first // per_step, end // per_step], "shares": shares})
            taken.append(split.counts(end - first))
        sources = {}
        for name, part in self.parts.items():
            epochs = [counts.get(name, 0) / self._windows(name, "train", seq_len) for counts in taken]
            about = {"source": part.source, "tokens": part.tokens("train"), "epochs": sum(epochs), "epochs_by_phase": epochs}
            sources[name or part.source] = about
        return {"sources": sources, "phases": phases}

    def _windows(self, name: str, split: str, seq_len: int) -> int:
        try:
            return self.parts[name].windows(split, seq_len)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}" if name else str(error)) from None

    def _read(self, split: str, places: list[tuple[str, int]], window: Callable, seq_len: int) -> Batch:
        """The windows [k] that `window(source, numbers [k], how many it has)` makes of the numbers of its sequences."""
        rows = np.empty((len(places), seq_len + 1), dtype=np.int64)
        for name in dict(places):
            mine = [row for row, place in enumerate(places) if place[0] == name]
            number = np.array([places[row][1] for row in mine], dtype=np.uint64)
            rows[mine] = self.parts[name].read(split, window(name, number, self._windows(name, split, seq_len)), seq_len)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def usage_lines(usage: dict) -> list[str]:
    """`Corpus.usage` for a person."""
    found, many = [], len(usage["phases"]) > 1
    for name, about in usage["sources"].items():
        by_phase = [f"{epochs:.3g} in phase {p}" for p, epochs in enumerate(about["epochs_by_phase"], 1)]
        text = name if name == about["source"] else f"{name} ({about['source']})"
        times = f"read {about['epochs']:.3g} times" + f": {', '.join(by_phase)}" * many
        found.append(f"data: {text}, {about['tokens']:,} tokens, {times}")
    for p, phase in enumerate(usage["phases"], 1):
        begin, end = phase["steps"]
        steps = f"steps {begin + 1} to {end}" if end > begin else "no step: the run is too short for it"
        shares = ", ".join(f"{100 * share:g} % {name}" for name, share in phase["shares"].items())
        found += [f"data: phase {p}, {steps}: {shares}"] * (len(usage["sources"]) > 1)
    return found


def walk(seed: int, name: str) -> int:
    """The seed by which a source is walked: each of several has its own, of its name."""
    return seed if name == ONE else int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()
