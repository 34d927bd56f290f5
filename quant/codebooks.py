"""Formats given as a table of values: NF4, posits and the integers of IF4.

    code -> values[code]          x -> the code between whose two edges it lies: edges[i] < x < edges[i + 1], codes by value

The edges of nearest rounding lie half-way between neighbours for NF4. Posits round bit strings (posit standard, section
on rounding): the edge between two neighbours of n bits is the posit of n + 1 bits between them, which is the midpoint
where the exponent has all its bits and the geometric mean where it lost some; and nothing but zero becomes zero.
An edge itself goes to the even code. Toward zero and stochastic rounding are about the values themselves.

The methods are those of formats.Format; a look-up costs more than its arithmetic, and these are formats for study.
Left out: more than 256 values, codebooks that a run learns.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.random import constants
from quant.rounding import random_bits


@dataclass(frozen=True)
class Codebook:
    """`table[code]`: the value of each of 2^bits codes, NaN for a code that is no number; `edges`: for posits, as above, one
    between each two neighbours by value."""

    name: str
    table: tuple[float, ...]
    edges: tuple[float, ...] = ()

    bits: int = field(init=False)
    max: float = field(init=False)
    tiny: float = field(init=False)
    nan_code: int | None = field(init=False)
    ascending: tuple[float, ...] = field(init=False)  # the values in order,
    codes: tuple[int, ...] = field(init=False)  # and their codes
    first: dict[str, tuple[float, ...]] = field(init=False, hash=False)  # rounding -> the first fp32 number above each edge
    significant_bits: int = field(init=False)
    torch_dtype = None
    negative_zero = False

    def __post_init__(self):
        table = torch.tensor(self.table, dtype=torch.float32).tolist()  # the nearest fp32 numbers
        order = sorted((v, code) for code, v in enumerate(table) if not math.isnan(v))
        values, codes = zip(*order, strict=True)
        nan = next((code for code, v in enumerate(self.table) if math.isnan(v)), None)
        edges = self.edges or tuple((a + b) / 2 for a, b in zip(values, values[1:], strict=False))
        even = [code % 2 == 0 for code in codes[1:]]
        away = [edge > 0 or (edge == 0 and up) for edge, up in zip(edges, even, strict=True)]
        inward = [edge < 0 or (edge == 0 and up) for edge, up in zip(edges, even, strict=True)]
        derived = {
            "bits": (len(self.table) - 1).bit_length(),
            "max": values[-1],
            "tiny": min(v for v in values if v > 0),
            "nan_code": nan,
            "significant_bits": max(_odd_part(v).bit_length() for v in values),
            "ascending": values,
            "codes": codes,
            "edges": edges,
            "first": {name: _first_above(edges, up) for name, up in (("nearest", even), ("away", away), ("inward", inward))},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def emax(self) -> int:
        return math.floor(math.log2(self.max))

    def _place(self, x: Tensor, rounding: str, random: Tensor | None) -> Tensor:
        """fp32 [...] -> the place of its value in `ascending`, int64 [...]."""
        if rounding in self.first:
            return torch.bucketize(x.contiguous(), constants(self.first[rounding], torch.float32, x.device), right=True)
        values, last = constants(self.ascending, torch.float32, x.device), len(self.ascending) - 1
        below = (torch.bucketize(x.contiguous(), values, right=True) - 1).clamp(0, last)
        above = (below + 1).clamp(max=last)
        inside = (x > values[below]) & (x < values[above])
        # Of zero: -x goes where x does, negated.
        near, far = torch.where(x < 0, above, below), torch.where(x < 0, below, above)
        if rounding == "zero":
            return torch.where(inside, near, below)
        n = random_bits(rounding)
        fraction = (x - values[near]) / torch.where(inside, values[far] - values[near], 1.0)
        goes = (fraction * 2.0**n).floor() + random.to(torch.float32) >= 2.0**n
        return torch.where(inside, torch.where(goes, far, near), below)

    def encode(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> int32 codes [...]; saturates; NaN and Inf give `nan_code`, or that of `max` where there is none."""
        codes = constants(self.codes, torch.int32, x.device)
        code = codes[self._place(torch.where(x == x, x, 0.0), rounding, random)]
        return torch.where(x.isfinite(), code, self.codes[-1] if self.nan_code is None else self.nan_code)

    def round(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> fp32 values: decode(encode(x)), except that NaN stays NaN and Inf saturates."""
        values = constants(self.ascending, torch.float32, x.device)
        return torch.where(x == x, values[self._place(torch.where(x == x, x, 0.0), rounding, random)], x)

    def codes_of(self, value: Tensor, x: Tensor | None = None) -> Tensor:
        """fp32 values of this format -> uint8 codes; x: what has been rounded, where Inf is to have the code of NaN."""
        return self.encode(value if x is None else torch.where(x.isfinite(), value, math.nan)).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """int codes [...] -> fp32 values [...]."""
        return constants(self.table, torch.float32, code.device)[code.to(torch.int64)]

    def values(self) -> Tensor:
        """fp32 [2^bits]: the value of every code."""
        return self.decode(torch.arange(2**self.bits))


def _first_above(edges: tuple[float, ...], ties: list[bool]) -> tuple[float, ...]:
    """The first fp32 number that lies above each edge, or, where a tie goes up, on it."""
    exact = torch.tensor(edges, dtype=torch.float64)
    near = exact.to(torch.float32)
    above = torch.where(torch.tensor(ties), near.double() >= exact, near.double() > exact)
    return tuple(torch.where(above, near, torch.nextafter(near, torch.tensor(math.inf))).tolist())


def _odd_part(value: float) -> int:
    """The integer that |value| is, times a power of two."""
    numerator = abs(value).as_integer_ratio()[0]
    return numerator // (numerator & -numerator or 1)


def posit_value(code: int, bits: int, es: int) -> float:
    """The posit of `bits` bits with `es` exponent bits, from its definition: sign, a run of equal bits (the regime), the
    exponent, whose missing low bits are zeros, and the fraction. NaN for 100...0."""
    if code == 0:
        return 0.0
    if code == 1 << (bits - 1):
        return math.nan
    if code >> (bits - 1):
        return -posit_value((1 << bits) - code, bits, es)
    body = f"{code:0{bits - 1}b}"
    run = len(body) - len(body.lstrip(body[0]))
    regime = run - 1 if body[0] == "1" else -run
    rest = body[run + 1 :]
    exponent = int((rest[:es]).ljust(es, "0") or "0", 2)
    fraction = rest[es:]
    return 2.0 ** (regime * 2**es + exponent) * (1 + int(fraction or "0", 2) / 2 ** len(fraction))


def posit(bits: int, es: int) -> Codebook:
    """posit8 and the like, with the edges of its own rounding; between zero and its neighbours the edge is zero itself."""
    table = tuple(posit_value(code, bits, es) for code in range(1 << bits))
    half = 1 << (bits - 1)
    # As signed integers, codes are ordered like values, from -maxpos (1 - half) to maxpos (half - 1).
    between = [2 * c + 1 for c in range(1 - half, half - 1)]
    edges = [posit_value(c % (1 << (bits + 1)), bits + 1, es) for c in between]
    edges[half - 2] = edges[half - 1] = 0.0
    return Codebook(f"posit{bits}-es{es}", table, tuple(edges))


# The quantiles of a normal distribution, symmetric about an exact zero (arXiv:2305.14314, appendix E); absmax is 1.
NF4 = Codebook(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip

# int4 stretched to E2M1's largest value, k * 6 / 7, so that both can stand under one block scale (arXiv:2603.28765).
INT4_6 = Codebook("int4-6", tuple(math.nan if k == 8 else (k - 16 * (k > 8)) * 6 / 7 for k in range(16)))
