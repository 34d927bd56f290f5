"""Matrices to quantise, and what was made of them compared with what should have been.

    numbers       BF16 by kind: normal, wide, extreme, huge, subnormal, zeros, nan, bits (every pattern there is)
    difference    two QTensors, byte for byte
    astray        one whose elements may be either number next to what is rounded: of cvt.rs, about whose random bits nothing
                  is published
    frequencies   how often it went up, against how often it should

What was made may lie on a GPU; what it is compared with is made on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from quant import encode, kernel
from quant.qtensor import QTensor, logical
from quant.random import Key
from quant.spec import QuantSpec


def numbers(kind: str, rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[rows, k], the same at every call."""
    generator = torch.Generator().manual_seed(rows * k + rows)
    x = torch.randn(rows, k, generator=generator)

    def binades(n: int) -> Tensor:
        return torch.exp2(torch.randint(-n, n, (rows, k), generator=generator).float())

    if kind == "wide":
        x = x * binades(60)
    elif kind == "extreme":
        x = x * binades(120)
        x[0, 0] = 3e38
    elif kind == "huge":
        x = x * 1e38
    elif kind == "subnormal":
        x = x * 1e-38
        x[:, : k // 3], x[: rows // 3] = 0.0, -0.0
    elif kind == "zeros":
        x[:, :32], x[:32] = 0.0, 0.0
        x[:, ::3] = -0.0
    elif kind == "nan":
        x[5, 7], x[rows - 1, 3] = float("nan"), float("inf")
    elif kind == "bits":  # and so NaN in most blocks
        x = torch.randint(-(2**15), 2**15, (rows, k), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    elif kind != "normal":
        raise ValueError(f"numbers {kind!r}: expected normal, wide, extreme, huge, subnormal, zeros, nan or bits")
    return x.to(dtype)


def difference(found: QTensor, wanted: QTensor, parts=("packed_codes", "scale_codes", "outer_codes")) -> str:
    """The first byte of codes, scales or outer scales that differs, or ""; a NaN in fp32 is a NaN."""
    if found.shape != wanted.shape or found.spec != wanted.spec:
        return f"{list(found.shape)} {found.spec.short()}, expected {list(wanted.shape)} {wanted.spec.short()}"
    for name in parts:
        a, b = getattr(found, name), getattr(wanted, name)
        if a is None and b is None:
            continue
        if a is None or b is None:
            shown = [t if t is None else f"{t.dtype} {list(t.shape)}" for t in (a, b)]
            return f"{name} of {found.spec.short()}: {shown[0]}, expected {shown[1]}"
        if words := unequal(f"{name} of {found.spec.short()}", a, b):
            return words
    return ""


def unequal(name: str, a: Tensor, b: Tensor) -> str:
    """The first of their bits that differ, or ""; a NaN is a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t).contiguous().view(ints) for t in (a, b))
    return _first(name, a, b, a != b)


def _first(name: str, a: Tensor, b: Tensor, wrong: Tensor) -> str:
    if not wrong.any():
        return ""
    i = tuple(wrong.nonzero()[0].tolist())
    return f"{name}: {int(a[i]):#x} at {list(i)}, expected {int(b[i]):#x} ({int(wrong.sum())} of {wrong.numel()} differ)"


@contextmanager
def rounded_by(how: str) -> Iterator[None]:
    """Kernels round so within (quant.kernel.round_by), on the GPU that there is or that stands for one."""
    kernel.round_by(how, torch.device("cuda"))
    try:
        yield
    finally:
        kernel.round_by(kernel.EXACT, torch.device("cpu"))


class Beside(NamedTuple):
    """What is rounded, fp32 [R, K], and the numbers next to it, toward zero and away from it; the same where it is one."""

    p: Tensor
    down: Tensor
    up: Tensor


def beside(x: Tensor, spec: QuantSpec, key: Key, held: Tensor | None = None) -> Beside:
    """Of x [R, K] by a stochastic spec. What is nearer to `down` than 2^-24 of a unit counts as being there: no conversion has
    as many random bits, and rounding with 24 of them, all 1, goes up from anything that is further away."""
    made = encode._prepare(x, spec, key, None, held)
    p = encode._scaled(made.blocks, made.enc)
    sides = [spec.element.round(p, "stochastic", torch.full(p.shape, r, dtype=torch.int32)) for r in (0, 2**24 - 1)]
    return Beside(*(logical(t.flatten(2, 3).flatten(0, 1), made.transposed) for t in (p, *sides)))


def astray(found: QTensor, x: Tensor, key: Key, held: Tensor | None = None) -> str:
    """Why `found`, made of x [R, K] by a stochastic spec, is not right, or "": a scale that differs, or the first element that
    is neither number next to what is rounded. Of what is no number the code is that of the reference."""
    spec = found.spec
    reference = encode.encode(x, spec, key, None, held)
    if words := difference(found, reference, ("scale_codes", "outer_codes")):
        return words
    around = beside(x, spec, key, held)
    down, up = (element_codes(spec, t) for t in (around.down, around.up))
    codes = found.codes().cpu().to(torch.int32)
    return _first(f"codes of {spec.short()}", codes, down, (codes != down) & (codes != up))


def element_codes(spec: QuantSpec, values: Tensor) -> Tensor:
    """int32 codes of values of the format, which may be NaN."""
    codes = spec.element.codes_of(values)
    return (codes.view(torch.uint8) if codes.is_floating_point() else codes).to(torch.int32)


def frequencies(found: QTensor, x: Tensor, key: Key, bins: int = 8) -> list[tuple[int, float, float, float]]:
    """By what part of a unit is to be rounded, in bins: how many, how often they should have gone up (the mean of these
    parts), how often they did, and the bound on the difference.

    Where P(up) = floor(2^N f) / 2^N the rate lies up to 2^-N, 1/256 for 8 bits, below f. Beyond that it strays as a mean of n
    independent trials does: P(off by more than t) <= 2 exp(-2 n t^2) (Hoeffding), below 1e-9 for t = sqrt(10.8 / n)."""
    p, down, up = beside(x, found.spec, key)
    codes, above = found.codes().cpu().to(torch.int32), element_codes(found.spec, up)
    parts = (p - down) / (up - down)
    inside = (up != down) & p.isfinite()
    rows = []
    for i in range(bins):
        some = inside & (parts * bins >= i) & (parts * bins < i + 1)
        if n := int(some.sum()):
            rows.append((n, float(parts[some].mean()), float((codes == above)[some].float().mean()), 2**-8 + (10.8 / n) ** 0.5))
    return rows
