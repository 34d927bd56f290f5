"""Rows of a table: one model on validation windows, how far it is from another on the same ones, and the file that keeps them.

    loss                 nats a token, mean over windows of T tokens
    bits/byte            sum of the nats of text / (ln 2 * its UTF-8 bytes), see model.measure
    difference           mean over windows of (loss of a row - loss of another on the same window)
    standard error       deviation of these differences / sqrt(windows): paired, and much smaller than that of either loss,
                         since windows are hard or easy for both alike

Losses of models with different tokenizers, texts or T are losses of different things: there is no paired difference then.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import written
from data import Corpus
from model import measure


@dataclass(frozen=True)
class Row:
    """windows: fp64 [windows], the loss of each."""

    loss: float
    bpb: float
    windows: Tensor

    def against(self, base: "Row") -> tuple[float, float]:
        """(difference, its standard error) to a row over the same windows."""
        delta = self.windows - base.windows
        return float(delta.mean()), float(delta.std()) / math.sqrt(len(delta))

    def record(self, base: "Row") -> dict[str, float]:
        difference, error = self.against(base)
        return {"loss": self.loss, "bpb": self.bpb, "difference": difference, "standard_error": error}


def row(model, corpus: Corpus, count: int) -> Row:
    """`model` over `count` windows of the validation set, evenly spread, each of them a batch of its own."""
    sizes = torch.as_tensor(corpus.tokenizer.bytes_per_token)
    losses, nats, size = [], 0.0, 0
    for x, y in corpus.val_batches(1, model.config.seq_len, count):
        loss, bpb = measure(model, [(x, y)], sizes)
        here = int(sizes[y].sum())
        losses, nats, size = [*losses, loss], nats + bpb * here, size + here
    return Row(sum(losses) / len(losses), nats / size, torch.tensor(losses, dtype=torch.float64))


def shown(name: str, found: Row, base: Row | None, width: int) -> str:
    """A line; `base`: None where there is nothing to differ from."""
    text = "" if base is None or base is found else "{:+14.4f} +- {:.4f}".format(*found.against(base))
    return f"{name:{width}}{found.loss:9.4f}{found.bpb:11.4f}  {text}".rstrip()


def keep(path: Path, windows: int, rows: dict[str, dict]) -> list[str]:
    """Write rows, "bf16" among them, into an evaluation.json or sweep.json -> the names of older rows that stay in it.

    A row that an earlier call has written stays where it is a row of this table: over as many windows, beside the same loss
    in BF16, to the last bit (so: of the same weights, text and arithmetic). Rows of another table, with which nothing here
    would compare, are set aside, the whole file as .old.json, and a line says so. What is no row (it has no loss) is not ours
    and stays.
    """
    text = path.read_text() if path.exists() else "{}"
    try:
        old = dict(json.loads(text))
        same = old.get("windows") == windows and old.get("bf16", {}).get("loss") == rows["bf16"]["loss"]
    except (ValueError, TypeError, AttributeError):
        old, same = {text: {"loss": None}}, False  # what is no table is set aside too
    rest = {name: v for name, v in old.items() if name not in rows and name != "windows"}
    others = [name for name, v in rest.items() if isinstance(v, dict) and "loss" in v]
    if others and not same:
        rest = {name: v for name, v in rest.items() if name not in others}
        print(f"{path} has rows of another table; they are in {written(path.with_suffix('.old.json'), text)} now")
    written(path, json.dumps({"windows": windows, **rows, **rest}, indent=1))
    return others if same else []
