"""What becomes of a weight after training: each method the core of its paper, a function (w [O, I], x [T, I], ...) -> Coded.

w is fp32, x what the Linear was given of some training text; y[T,O] = x w^T. Q is `quantize` by a spec, to nearest.

    nearest    w' = Q(w)                                                   the algebra, nothing searched
    switched   c = round(w / s), 8 bits, is all that is stored, and of l   c_l = clip(round(c / 2^(8-l)), -2^(l-1), 2^(l-1) - 1)
               w' = c_l s 2^(8-l)                                          Double Rounding, arXiv:2502.01199
    clipped    w' = Q_f(w), where Q_f maps f * amax of a block, not its amax, to the largest element; f is searched for each
               block by ||w' - w||, or for each row by ||x w'^T - x w^T||; and so is the format, for the matrix
               FP8 Quantization: the Power of the Exponent, arXiv:2208.09225 (by w); LLM-FP4, arXiv:2310.16836 (by x w^T), whose
               real-valued exponent bias b is a scale 2^-b
    companded  w' = e(Q(c(w))), c(w) = sign(w) |w|^a, e its inverse, a searched for the matrix by ||w' - w||
               PowerQuant, arXiv:2301.09858; NUPES, arXiv:2308.05600
    shifted    y = Q((x - z) / s) Q(w s)^T + w z,   z_j = (max x_j + min x_j) / 2,   s_j = max(1, max |x_j - z_j| / t)
               t searched for the matrix by ||y - x w^T||: activations too       Outlier Suppression+, arXiv:2304.09145

Ties go to the even code. `bits` are those of a parameter: codes, scales, and whatever else must be stored beside them.

Where this is not its paper (facts of papers that could not be read here are from their public code or as others report them):
  * switched: the paper learns s while it trains all precisions together; here s is amax / 127 of a finished checkpoint.
  * clipped: the grid is 0.10, 0.11, ... 1.20 of amax, 111 values, as others have it of arXiv:2208.09225. LLM-FP4's code has 100
    from 0.01 to 1.2 of b itself, which depends on the unit of w; it alternates with activations, which stay as they are here,
    and shifts their exponents channel by channel, which is left out.
  * companded: NUPES also learns a and the codes by gradients; a comes from a grid of 0.05 here, as PowerQuant's from a search.
  * shifted: one Linear's output is compared, not that of attention or of the gated product; s and z are applied to x in front
    of each Linear, and are counted as stored, where the paper folds them into a norm; its threshold is also a fixed range of x.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from configs.table import element_bits
from quant import FORMATS, QuantSpec, Scale, quantize
from quant.recipe import Fprop
from quant.scaling import spread, threshold

FACTORS = [i / 100 for i in range(10, 121)]  # of amax; 1 is among them
EXPONENTS = [i / 20 for i in range(4, 21)]  # 0.2 to 1
STEPS, TOKENS = 100, 512  # of t, from the largest |x - z| down; and how many tokens are looked at for each


class Moved(NamedTuple):
    """x -> (x - shift) / scale in front of a Linear, + bias behind it; shift, scale [I], bias [O], fp32."""

    shift: Tensor
    scale: Tensor
    bias: Tensor


class Coded(NamedTuple):
    """weight fp32 [O, I]: what the codes stand for, or, with `fprop`, what these two specs are still to be applied to.
    found: what was searched for, by name."""

    weight: Tensor
    bits: float
    found: dict[str, float] = {}
    fprop: Fprop | None = None
    moved: Moved | None = None


def nearest(w: Tensor, x: Tensor, spec: QuantSpec, activations: QuantSpec | None = None) -> Coded:
    """Q(w), and Q(x) by `activations`."""
    bits = element_bits(spec, *w.shape)
    if activations is not None:
        return Coded(w, bits, fprop=Fprop(activations, spec))
    return Coded(_values(w, spec), bits)


# --- double rounding ---


def switch(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits, -128 to 127 -> of `bits`, as integers."""
    return (codes.to(torch.float32) / 2 ** (8 - bits)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int32)


def switched(w: Tensor, x: Tensor, bits: int, block: tuple[int, int] = (1, -1)) -> Coded:
    q = quantize(w, QuantSpec("int8", block, Scale("fp32")))
    codes = switch(q.codes().view(torch.int8), bits)
    unit = FORMATS["int8"].tiny  # int8 is k 2^-6
    values = codes.to(torch.float32) * (unit * 2 ** (8 - bits)) * spread(q.scale, *w.shape)
    return Coded(values, element_bits(q.spec, *w.shape) - 8 + bits)


# --- searched scales ---


def ranged(spec: QuantSpec, factor: float) -> QuantSpec:
    """`spec` whose largest element stands for factor * amax. Outer scales are left alone: they are those of the largest factor,
    so that blocks with different factors can stand under one (as in four-over-six, arXiv:2512.02010)."""
    s = spec.scale
    target = threshold(spec)[0] if s.format == "e8m0" else s.target or spec.element.max
    outer = None if s.outer == "none" else (s.outer_target or FORMATS[s.format].max) * factor / FACTORS[-1]
    return replace(spec, scale=replace(s, target=target if factor == 1 else target / factor, outer_target=outer))


def clipped(w: Tensor, x: Tensor, specs: Sequence[QuantSpec], by: str = "weights") -> Coded:
    """The best of `specs`, whose exponent bits are E. by: "weights", or "outputs", for scales that span whole rows."""
    gram = x.to(torch.float32).t() @ x.to(torch.float32) if by == "outputs" else None
    best: tuple[float, Coded] | None = None
    for spec in specs:
        b0, b1 = spec.blocks_of(*w.shape)
        if by == "outputs" and (b0, b1) != (1, w.shape[1]):
            raise ValueError(f"clipped by outputs: expected scales of whole rows, block [1, -1], not {list(spec.block)}")

        def errors(values: Tensor, b0: int = b0, b1: int = b1) -> Tensor:
            """Squared, of each block."""
            gap = values - w
            each = gap * gap if gram is None else (gap @ gram) * gap
            return each.unflatten(1, (-1, b1)).unflatten(0, (-1, b0)).sum((1, 3))

        plain = _values(w, spec)
        found, error, factors = plain, errors(plain), torch.ones(w.shape[0] // b0, w.shape[1] // b1)
        total = float(error.sum())
        if spec.scale.outer != "none":  # the plain one has another outer scale, so it stands alone
            error = torch.full_like(error, torch.inf)
        for factor in FACTORS:
            values = _values(w, ranged(spec, factor))
            now = errors(values)
            better = now < error
            error, factors = torch.where(better, now, error), factors.masked_fill(better, factor)
            found = torch.where(spread(better, *w.shape), values, found)
        if float(error.sum()) > total:
            found, error, factors = plain, errors(plain), torch.ones_like(factors)
        if best is None or float(error.sum()) < best[0]:
            which = {"E": float(getattr(spec.element, "exponent_bits", 0))} if len(specs) > 1 else {}
            best = float(error.sum()), Coded(found, element_bits(spec, *w.shape), {"factor": float(factors.mean())} | which)
    return best[1]


# --- companding ---


def compand(w: Tensor, a: float) -> Tensor:
    """sign(w) |w|^a."""
    return w if a == 1 else torch.copysign(w.abs() ** a, w)


def companded(
    w: Tensor, x: Tensor, bits: int, block: tuple[int, int] = (1, -1), exponents: Iterable[float] = EXPONENTS
) -> Coded:
    spec = QuantSpec(f"int{bits}", block, Scale("fp32"))

    def values(a: float) -> Tensor:
        return compand(_values(compand(w, a), spec), 1 / a)

    a = min(exponents, key=lambda a: float((values(a) - w).square().sum()))
    return Coded(values(a), element_bits(spec, *w.shape) + 32 / w.numel(), {"a": a})


# --- shift and scale ---


def shifted(w: Tensor, x: Tensor, spec: QuantSpec, activations: QuantSpec, shift: bool = True) -> Coded:
    """shift: or with z = 0, as the paper's public code has it where RMSNorm comes before."""
    x = x.to(torch.float32)
    z = (x.amax(0) + x.amin(0)) / 2 if shift else torch.zeros_like(x[0])
    high = (x - z).abs().amax(0)
    rest = x[:: -(-len(x) // TOKENS)] - z
    exact = rest @ w.t()

    def scales(t: float) -> Tensor:
        return (high / t).clamp(min=1)

    def error(t: float) -> float:
        s = scales(t)
        return float((_values(rest / s, activations) @ _values(w * s, spec).t() - exact).square().sum())

    whole = float(high.amax()) or 1.0
    t = min((whole * (1 - i / STEPS) for i in range(STEPS)), key=error)
    s, (O, I) = scales(t), w.shape
    bits = element_bits(spec, O, I) + ((64 / O + 32 / I) if shift else 32 / O)  # s and z of I, the bias of O, in fp32
    return Coded(w * s, bits, {"t": t / whole}, Fprop(activations, spec), Moved(z, s, w @ z))


def _values(w: Tensor, spec: QuantSpec) -> Tensor:
    if spec.hadamard:
        raise ValueError(f"{spec.short()}: values in a rotated basis are no weight; expected a spec without hadamard")
    return quantize(w, spec).dequantize()
