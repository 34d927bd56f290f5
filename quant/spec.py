"""The vocabulary of recipes, as data.

    y[T,O] = x[T,I] w[O,I]^T        fprop { x, w }      contraction I
    dx     = g[T,O] w               dgrad { g, w }      contraction O
    dw     = g^T x                  wgrad { g, x }      contraction T

A QuantSpec says what happens to ONE operand of one GEMM; a Recipe is six of them; a Rule gives Linears a recipe.
An operand left out stays in the compute dtype. No spec names an axis: blocks run along the contraction.

Left out for now: e8m0/e5m3/fp32 scales, Choice (several specs and a rule that picks one), `source`, `center`, `rotate`.
"""

import difflib
from dataclasses import fields
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from quant.formats import FORMATS, NAMED
from quant.random import per_call
from quant.rounding import ROUNDINGS, random_bits

frozen = dataclass(frozen=True, config=ConfigDict(extra="forbid"))


def known(value: str, choices, what: str) -> str:
    """`value` if it is among `choices`; else a ValueError that names the nearest one."""
    if value in choices:
        return value
    near = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(map(repr, choices))}{hint}")


@frozen
class Scale:
    """How a block's scale is made. value = code * scale (* global scale): scales are decode scales.

    format: of the block scale. outer: "tensor" = an fp32 scale over the whole operand, which maps the operand's amax
    to element max * scale max. order: the two published orders of the fp32 operations, TransformerEngine v2.14 and
    later ("g2") or v2.8 to v2.13, which is the paper's Eqs. 2-3 ("g1"); they differ in about 1 scale of 1000 on BF16
    data.
    """

    format: Literal["e4m3"] = "e4m3"
    outer: Literal["tensor"] = "tensor"
    order: Literal["g2", "g1"] = "g2"


@frozen
class QuantSpec:
    """What happens to one operand, contraction axis last.

    format: of the elements, a name in FORMATS. block: [rows, contraction] that share a scale.
    rounding: nearest | away | zero | stochastic (24 bits) | stochastic8 (8 bits, carry rule).
    hadamard: 0, or the size of the Hadamard transform along the contraction (a power of two);
    signs: none | fixed (the published vector) | fresh (drawn for every micro-batch and GEMM).
    """

    format: str = "e2m1"
    block: tuple[int, int] = (1, 16)
    scale: Scale = Scale()
    rounding: str = "nearest"
    hadamard: int = 0
    signs: Literal["none", "fixed", "fresh"] = "fixed"

    def __post_init__(self):
        if self.format not in FORMATS:
            known(self.format, NAMED, "format")
        try:
            random_bits(self.rounding)
        except ValueError:
            known(self.rounding, ROUNDINGS, "rounding")
        if min(self.block) < 1:
            raise ValueError(f"block {list(self.block)}: expected two positive sizes, [rows, contraction]")
        if self.block[1] % 2:
            raise ValueError(f"block {list(self.block)}: the contraction size must be even (two codes share a byte)")
        if self.hadamard and (self.hadamard < 2 or self.hadamard & (self.hadamard - 1)):
            raise ValueError(f"hadamard {self.hadamard}: expected 0 (off) or a power of two")

    @property
    def stochastic(self) -> bool:
        return random_bits(self.rounding) > 0

    @property
    def multiple(self) -> tuple[int, int]:
        """(rows, contraction): what the operand's sizes must be multiples of."""
        calls = per_call(random_bits(self.rounding)) if self.stochastic else 1
        return self.block[0], max(self.block[1], self.hadamard, calls)

    @property
    def keyed(self) -> bool:
        """Whether quantising needs a Key."""
        return self.stochastic or bool(self.hadamard and self.signs == "fresh")

    @property
    def transposes(self) -> bool:
        """Whether the codes of x^T are the codes of x, transposed."""
        return self.block[0] == self.block[1] and not self.hadamard and not self.stochastic

    def short(self) -> str:
        """E.g. `e2m1/1x16 rht16 sr8`, for tables."""
        words = [f"{self.format}/{self.block[0]}x{self.block[1]}"]
        if self.hadamard:
            words.append(f"rht{self.hadamard}" + {"none": "-nosigns", "fixed": "", "fresh": "-fresh"}[self.signs])
        if self.rounding != "nearest":
            words.append({"stochastic": "sr", "stochastic8": "sr8"}.get(self.rounding, self.rounding))
        return " ".join(words)


@frozen
class Fprop:
    x: QuantSpec | None = None
    w: QuantSpec | None = None


@frozen
class Dgrad:
    g: QuantSpec | None = None
    w: QuantSpec | None = None


@frozen
class Wgrad:
    g: QuantSpec | None = None
    x: QuantSpec | None = None


@frozen
class Recipe:
    """Six operands. `weights`: quantise W from the fp32 "master" or from its "bf16" copy (TransformerEngine's habit)."""

    fprop: Fprop = Fprop()
    dgrad: Dgrad = Dgrad()
    wgrad: Wgrad = Wgrad()
    weights: Literal["master", "bf16"] = "master"

    def __post_init__(self):
        for name in ("fprop", "dgrad", "wgrad"):
            gemm = getattr(self, name)
            (a, p), (b, q) = ((f.name, getattr(gemm, f.name)) for f in fields(gemm))
            rotation = [(s.hadamard, s.signs) if s and s.hadamard else None for s in (p, q)]
            if rotation[0] != rotation[1]:
                what = " and ".join(
                    f"{name}.{o} " + (f"has hadamard {r[0]} with signs {r[1]}" if r else "has none")
                    for o, r in zip((a, b), rotation, strict=True)
                )
                raise ValueError(f"{what}: both operands of a GEMM must be rotated alike, or the product changes")

    def operands(self) -> dict[str, QuantSpec | None]:
        """`fprop.x`, ... -> its spec, in the order of OPERANDS."""
        return {name: getattr(getattr(self, name[:5]), name[6:]) for name in OPERANDS}

    def short(self) -> dict[str, str]:
        return {name: spec.short() if spec else "-" for name, spec in self.operands().items()}


# The number of an operand is its `use` in a random Key; 16 + the number of the GEMM's first operand is that of its signs.
OPERANDS = {"fprop.x": 0, "fprop.w": 1, "dgrad.g": 2, "dgrad.w": 3, "wgrad.g": 4, "wgrad.x": 5}
SIGNS = {"fprop": 16, "dgrad": 18, "wgrad": 20}


@frozen
class Rule:
    """One line of a policy; the first rule that matches a Linear gives it its recipe.

    match: a glob over module names ("head", "blocks.*.ffn.*"). first / last: that many blocks at either end
    (0 switches the rule off). after / until: only from / up to this share of the run (after = 1 switches it off).
    Conditions combine by "and".
    name: makes the rule overridable from the command line (policy.NAME.last=4).
    """

    recipe: str
    match: str = "*"
    first: int | None = None
    last: int | None = None
    after: float = 0.0
    until: float = 1.0
    name: str = ""

    def __post_init__(self):
        for key in ("first", "last"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} = {getattr(self, key)}: expected a number of blocks, 0 or more")
        if not 0.0 <= self.after <= self.until <= 1.0 or self.after == self.until < 1.0:
            raise ValueError(
                f"after = {self.after}, until = {self.until}: expected 0 <= after <= until <= 1 (shares of the run), and "
                "both alike only at 1, which switches the rule off"
            )
