"""How reproducible is a checkpoint's text: the same prompts at several batch sizes and thread counts, in several precisions.

A sum of floats depends on its order, and the order on the shape of a GEMM and on the threads that share it; greedy decoding
turns the last bit of a logit into another word (arXiv:2506.09501, "LayerCast"). Each precision is compared with itself, at
batch size 1 and one thread:

    as trained       what the checkpoint's policy quantises, quantised; scales over a tensor then span the whole batch
    bf16             BF16 weights, BF16 compute
    layercast        the same BF16 matrices, fp32 compute: weights take BF16's memory, activations and sums are fp32

    equal         whether all logits have the same bits: of the prompts (prefill), and of each text's tokens until it parts
    largest       the largest |difference| of a logit, over the same ones
    parts at      the first greedy token, from 0, at which some prompt's text is another one, of N; "-" where none is
    texts         how many of the prompts' texts part

Left out: other devices, other builds of torch. What is equal here may differ there.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from quant.policy import unquantized


class Row(NamedTuple):
    precision: str
    batch: int
    threads: int
    equal: bool
    largest: float
    parts_at: int | None
    texts: int


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads. Raises ValueError where OpenMP says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        line = next((line for line in torch.__config__.parallel_info().splitlines() if "omp_get_max_threads" in line), None)
        found = int(line.split(":")[1]) if line else torch.get_num_threads()
        if found != count:
            raise ValueError(f"--threads {count}: torch computes with {found} here")
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def layercast(model: GPT) -> Iterator[None]:
    """Matrices rounded to BF16, computed with in fp32."""
    matrices, dtype = [p for p in model.parameters() if p.ndim == 2], model.dtype
    kept = [p.detach().clone() for p in matrices]
    try:
        with torch.no_grad(), unquantized(model):
            for p in matrices:
                p.copy_(p.to(torch.bfloat16))
            model.dtype = torch.float32
            yield
    finally:
        model.dtype = dtype
        with torch.no_grad():
            for p, old in zip(matrices, kept, strict=True):
                p.copy_(old)


@contextmanager
def bf16(model: GPT) -> Iterator[None]:
    dtype, model.dtype = model.dtype, torch.bfloat16
    try:
        with unquantized(model):
            yield
    finally:
        model.dtype = dtype


PRECISIONS = {"as trained": nullcontext, "bf16": bf16, "layercast": layercast}


class Found(NamedTuple):
    logits: Tensor  # [N, P, V], of the prompts
    steps: Tensor  # [N, count, V], of each greedy token
    tokens: Tensor  # int64 [N, count]


@torch.no_grad()
def texts(model: GPT, prompts: Tensor, count: int, batch: int) -> Found:
    """prompts int64 [N, P], `batch` of them at a time."""
    logits, steps, tokens = [], [], []
    for some in prompts.split(batch):
        logits.append(model(some))
        decode, sent, found = model.decode(some), None, []
        for _ in range(count):
            found.append(decode.send(sent))
            sent = found[-1].argmax(-1)
        steps.append(torch.stack(found, 1))
        tokens.append(steps[-1].argmax(-1))
    return Found(*map(torch.cat, (logits, steps, tokens)))


def compare(precision: str, batch: int, count: int, found: Found, base: Found) -> Row:
    """One row: what was found against the base."""
    other = found.tokens != base.tokens  # [N, count]
    parted = torch.cat([torch.zeros_like(other[:, :1]), other], 1).cumsum(1)[:, :-1] > 0  # before this token
    differences = [(a.double() - b.double()).abs() for a, b in zip(found[:2], base[:2], strict=True)]
    differences[1] = differences[1].masked_fill(parted[..., None], 0)
    largest, first = max(float(d.max()) for d in differences), other.any(0).nonzero()
    where = int(first[0]) if len(first) else None
    return Row(precision, batch, count, largest == 0, largest, where, int(other.any(1).sum()))


def reproduce(model: GPT, prompts: Tensor, count: int, batches: list[int], cores: list[int]) -> list[Row]:
    """Rows for each precision, batch size and number of threads; the first of each precision is its base."""
    rows, quantised = [], any(getattr(m, "recipe", None) is not None for m in model.modules())
    for name, precision in PRECISIONS.items():
        if name == "as trained" and not quantised and model.dtype == torch.bfloat16:
            continue  # the next one
        with precision(model):
            base = None
            for n in cores:
                for b in batches:
                    with threads(n):
                        found = texts(model, prompts, count, b)
                    base = base or found
                    rows.append(compare(name, b, n, found, base))
    return rows


def table(rows: list[Row], count: int, prompts: int) -> list[str]:
    head = f"{'precision':12}{'batch':>7}{'threads':>9}{'equal':>7}{'largest':>12}{f'parts at (of {count})':>20}"
    lines = [head + f"{f'texts (of {prompts})':>17}"]
    for r in rows:
        where = "-" if r.parts_at is None else str(r.parts_at)
        equal = "yes" if r.equal else "no"
        lines.append(f"{r.precision:12}{r.batch:7}{r.threads:9}{equal:>7}{r.largest:12.3g}{where:>20}{r.texts:17}")
    return lines
