"""choose(x, choice): which candidate of a ladder an operand, or each block of it, gets, decided where the numbers are.

For each candidate c but the last, cheapest first, and each bound b of it, over each unit u (choice.py has the metrics):

    ratio[c, u] = max over b of  metric_b(x, Q_c(x)) / b                 (of one that is `enough`: the min with it)
    index[u]    = the first c with ratio[c, u] <= 1, else the last       (without bounds: the smallest metric)

NaN is within no bound, so what is not finite stays what it is (but that a backward error sees 64 rows only). No step waits for
the device.

Sums have no order: each term is rounded to a multiple of 2^-24 (relative errors) or of 2^-30 (errors and values as shares of
the unit's largest magnitude), and fp64 adds up to 2^53 of those exactly. So eager and compiled code, kernels, and any number of
ranks that hold parts of a weight decide alike, and so do x and x^T. (Of the backward error only the operands are exact: its
products are fp64, and two machines could part where a quantile is within 1e-16 of its bound.)

What values of different candidates have in common is a matrix: BF16 where all of them are exact, else fp32, and a factor that
leaves the sum where one decision is for all of it. Left out: a decision by the other operand of the GEMM.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quant import kernel
from quant.choice import Bound, Choice
from quant.encode import check, factor_of, rotated, values_of
from quant.fuse import run
from quant.qtensor import QTensor, in_memory, logical
from quant.random import Key
from quant.spec import QuantSpec

# Terms of relative errors, and of errors and values as shares of the largest, are multiples of 1 / these.
RELATIVE, SHARE = 2.0**24, 2.0**30
ROWS, PROBES = 64, 64  # of a backward error


class Chosen(NamedTuple):
    """What a GEMM multiplies, [R, K] and fp32 [] or [R, 1] (or None); which candidate that is, int64 [] or [R / r, K / k], or
    an int where the host knows; the ratios, fp64 [candidates - 1, ...] (without bounds: the metric of all); and the relative
    error of the first candidate over the whole operand, fp64 [], where it has been measured."""

    values: Tensor
    factor: Tensor | None
    index: Tensor | int
    ratios: Tensor | None
    error: Tensor | None


# --- the units: matrices as they lie in memory, cut into units of decision [P / p, p, Q / q, q] ---


def _sums(y, values, factor, *, by):
    """-> fp64 [P / p, Q / q], two: what a metric is the quotient of."""
    y = y.to(torch.float32)
    v = values.to(torch.float32) if factor is None else values.to(torch.float32) * factor
    there, error, size = y != 0, (v - y).abs(), y.abs()
    if by == "largest_error":
        return error.amax((1, 3)).double(), size.amax((1, 3)).double()
    if by == "relative_error":
        terms = (torch.where(there, error / size, 0.0) * RELATIVE).round(), torch.where(there, RELATIVE, 0.0)
    elif by == "underflow":
        terms = torch.where(there & (v == 0), 1.0, torch.where(v == v, 0.0, torch.nan)), torch.where(there, 1.0, 0.0)
    else:
        top = y.abs().amax((1, 3), keepdim=True)
        error, size = (torch.where(top == 0, 0.0, part / top) for part in (error, size))
        if by == "squared_error":
            error, size = error * error, size * size
        terms = (error * SHARE).round(), (size * SHARE).round()
    first, second = (term.double().sum((1, 3)) for term in terms)
    return first, second


def _range(y):
    """-> fp64 [P / p, Q / q]: the largest magnitude and the smallest but 0."""
    size = y.to(torch.float32).abs()
    return size.amax((1, 3)).double(), torch.where(size > 0, size, torch.inf).amin((1, 3)).double()


def _take(y, index, *tensors, specs, dense, dtype):
    """index (fp32): which of the specs' values each element takes; `tensors`: values of those that have scales, then their
    factors if `dense`, for the values to be multiplied by."""
    y, scaled = y.to(torch.float32), [i for i, spec in enumerate(specs) if spec.scale.format != "none"]
    taken = None
    for i, spec in enumerate(specs):
        if i in scaled:
            k = scaled.index(i)
            value = tensors[k].to(torch.float32)
            if dense and tensors[len(scaled) + k] is not None:
                value = value * tensors[len(scaled) + k]
        else:
            value = torch.where(y.isfinite(), spec.element.round(y), torch.nan)
        taken = value if taken is None else torch.where(index == float(i), value, taken)
    return taken.to(dtype)


# --- the decision ---


class Operands:
    """An operand after its transform, and what specs make of it, each computed once."""

    def __init__(self, x: Tensor, key: Key | None, per: tuple[int, int]):
        self.m, self.transposed = in_memory(x)
        self.x, self.key, self.per = logical(self.m, self.transposed), key, per
        r, k = (whole if size == -1 else size for size, whole in zip(per, x.shape, strict=True))
        self.unit = (k, r) if self.transposed else (r, k)
        self.made: dict[QuantSpec, tuple[Tensor, Tensor | None] | QTensor] = {}
        self.known: dict[tuple[str, QuantSpec | None], tuple[Tensor, Tensor]] = {}
        self.probed: Probed | None = None

    def blocks(self, m: Tensor) -> Tensor:
        p, q = self.unit
        return m.view(m.shape[0] // p, p, m.shape[1] // q, q)

    def values(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """As they lie in memory, and a factor to be broadcast with them, [] or [P, 1] or [1, Q]."""
        if spec not in self.made:
            values, factor = values_of(self.x, spec, self.key if spec.keyed else None)
            if factor is not None and factor.ndim and self.transposed:
                factor = factor.t()
            self.made[spec] = in_memory(values)[0], factor
        return self.made[spec]

    def factor(self, spec: QuantSpec) -> Tensor | None:
        """... to be broadcast with blocks."""
        factor = self.values(spec)[1]
        if factor is None or factor.ndim == 0:
            return factor
        return self.blocks(factor.expand(self.m.shape))

    def metric(self, by: str, spec: QuantSpec) -> Tensor:
        """fp64 [R / r, K / k] of the spec, rounded to nearest."""
        key = by, None if by == "dynamic_range" else replace(spec, rounding="nearest") if spec.stochastic else spec
        if key not in self.known:
            self.known[key] = self._parts(*key)
        return logical(_quotient(*self.known[key]), self.transposed)

    def whole(self, by: str, spec: QuantSpec) -> Tensor | None:
        """fp64 [] over all units, if `metric` has been there; of metrics that are means."""
        spec = replace(spec, rounding="nearest") if spec.stochastic else spec
        if (by, spec) not in self.known:
            return None
        return _quotient(*(part.sum() for part in self.known[by, spec]))

    def _parts(self, by: str, spec: QuantSpec | None) -> tuple[Tensor, Tensor]:
        if by == "backward_error":
            self.probed = self.probed or probed(self.x)
            found = backward_error(self.probed, *self.logical_values(spec)).view(1, 1)
            return found, torch.ones_like(found)
        y = self.blocks(self.m)
        return run(_range, y) if spec is None else run(_sums, y, self.blocks(self.values(spec)[0]), self.factor(spec), by=by)

    def logical_values(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        values, factor = self.values(spec)
        turned = factor is not None and factor.ndim and self.transposed
        return logical(values, self.transposed), factor.t() if turned else factor

    def logical_factor(self, spec: QuantSpec) -> Tensor | None:
        return self.logical_values(spec)[1]

    def mixed(self, specs: tuple[QuantSpec, ...], picked: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, K]: of each unit what has been picked, times its factor; without factors where one decision is for all of it."""
        scaled = [spec for spec in specs if spec.scale.format != "none"]
        tensors, one = [self.blocks(self.values(spec)[0]) for spec in scaled], picked.ndim == 0
        tensors += [] if one else [self.factor(spec) for spec in scaled]
        index = (picked if one else (picked.t() if self.transposed else picked)[:, None, :, None]).float()
        values = run(_take, self.blocks(self.m), index, *tensors, specs=specs, dense=not one, dtype=dtype)
        return logical(values.view(self.m.shape), self.transposed)

    def ratio(self, bounds: tuple[Bound, ...], spec: QuantSpec) -> Tensor:
        enough, needed = [], []
        for b in bounds:
            bound = b.below if b.than is None else b.below * self.metric(b.by, unrotated(b.than))
            (enough if b.enough else needed).append(_quotient(self.metric(b.by, spec), bound))
        found = [torch.stack(needed).amax(0)] * bool(needed) + enough
        return found[0] if len(found) == 1 else torch.stack(found).amin(0)


class Quantised(Operands):
    """The same by kernels, where they take all specs (kernel.decides): codes in place of values, which are decoded where they
    are taken, and lie in rows whichever way the operand does."""

    def codes(self, spec: QuantSpec) -> QTensor | None:
        """None of BF16 unscaled, which is the operand itself."""
        if spec.scale.format == "none":
            return None
        if spec not in self.made:
            self.made[spec] = kernel.encode(self.x, spec, self.key if spec.keyed else None)
        return self.made[spec]

    def logical_values(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        q = self.codes(spec)
        return values_of(self.x, spec) if q is None else kernel.decode(q)

    def logical_factor(self, spec: QuantSpec) -> Tensor | None:
        q = self.codes(spec)
        return None if q is None else factor_of(q)

    def mixed(self, specs: tuple[QuantSpec, ...], picked: Tensor, dtype: torch.dtype) -> Tensor:
        return kernel.values(self.x, specs, list(map(self.codes, specs)), dtype, picked, self.per, dense=picked.ndim > 0)

    def _parts(self, by: str, spec: QuantSpec | None) -> tuple[Tensor, Tensor]:
        if by == "backward_error":
            return super()._parts(by, spec)
        first, second = kernel.errors(self.x, spec, spec and self.codes(spec), by, self.per)
        return logical(first, self.transposed), logical(second, self.transposed)


def _quotient(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.where(a == 0, a, a / b)


@cache
def _probes(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """p fp64 [K, PROBES], standard normal, the same in every call, and |p|."""
    p = torch.randn(k, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).to(device)
    return p, p.abs()


def _sampled(x: Tensor) -> Tensor:
    """fp64 [R, K] or [ROWS, K], evenly spread."""
    rows = torch.arange(ROWS, device=x.device) * x.shape[0] // ROWS if x.shape[0] > ROWS else slice(None)
    return x[rows].double()


class Probed(NamedTuple):
    """What backward errors of an operand have in common: its sample y, and |y| |p|."""

    y: Tensor
    size: Tensor


def probed(x: Tensor) -> Probed:
    """x [R, K]"""
    y = _sampled(x)
    return Probed(y, y.abs() @ _probes(x.shape[1], x.device)[1])


def backward_error(of: Probed, values: Tensor, factor: Tensor | None = None) -> Tensor:
    """fp64 [], the 99th percentile over the rows of the sample and 64 probes."""
    v = _sampled(values)
    if factor is not None:
        v = v * (_sampled(factor) if factor.ndim else factor.double())
    errors = _quotient(((v - of.y) @ _probes(v.shape[1], v.device)[0]).abs(), of.size).flatten()
    return errors.topk(errors.numel() - (errors.numel() * 99) // 100).values[-1]


def unrotated(spec: QuantSpec) -> QuantSpec:
    """The spec for an operand that has been transformed already."""
    return replace(spec, hadamard=0) if spec.hadamard else spec


def _readable(x: Tensor) -> bool:
    """Whether a decision is there at once, so that what is not taken need not be made: on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def choose(
    x: Tensor,
    choice: Choice,
    key: Key | None = None,
    sign_key: Key | None = None,
    index: int | Tensor | None = None,
    measure: bool = True,
    picker=None,
) -> Chosen:
    """x [R, K] -> what the choice makes of it.

    index: the candidate, where that is decided already; errors are then measured only if `measure`. picker: in place of `pick`.
    """
    check(x.shape, choice)
    x = rotated(x, choice, sign_key or (key and key.at(use=key.use + 16)))
    o = (Quantised if kernel.decides(x, choice) else Operands)(x, key, choice.unit)
    specs = tuple(map(unrotated, choice.candidates))
    dtype, one = torch.bfloat16 if choice.exact else torch.float32, choice.per == "tensor"
    ratios = decide(o, choice, specs) if measure or index is None else None
    if index is None:
        index = (picker or pick)(ratios.view(-1) if one else ratios, bool(choice.rungs))
    error = o.whole("relative_error", specs[0])
    if one and isinstance(index, Tensor) and _readable(x):
        index = int(index)
    if isinstance(index, int):
        values, factor = o.logical_values(specs[index])
        return Chosen(values.to(dtype), factor, index, ratios, error)
    return Chosen(*_mixed(o, specs, index, dtype, one), index, ratios, error)


def decide(o: Operands, choice: Choice, specs: tuple[QuantSpec, ...]) -> Tensor:
    if not choice.rungs:
        return torch.stack([o.metric(choice.by, spec) for spec in specs])
    return torch.stack([o.ratio(rung, spec) for rung, spec in zip(choice.rungs, specs, strict=False)])


def pick(ratios: Tensor, bounded: bool = True) -> Tensor:
    """fp64 [n, ...] -> int64 [...]: the first ratio of at most 1, else n; or the smallest, the first of those."""
    if bounded:
        return (~(ratios <= 1)).long().cumprod(0).sum(0)
    return (~(ratios <= ratios.amin(0))).long().cumprod(0).sum(0).clamp(max=len(ratios) - 1)


def _mixed(o: Operands, specs: tuple[QuantSpec, ...], picked: Tensor, dtype: torch.dtype, one: bool):
    """-> (values, factor) of whatever has been picked."""
    factors = {i: f for i, spec in enumerate(specs) if (f := o.logical_factor(spec)) is not None} if one else {}
    factor = None
    for i, f in factors.items():
        factor = torch.where(picked == i, f, 1.0 if factor is None else factor)
    return o.mixed(specs, picked, dtype), factor
