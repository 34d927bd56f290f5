"""The vocabulary of recipes, as data.

    y[T,O] = x[T,I] w[O,I]^T        fprop { x, w }      contraction I
    dx     = g[T,O] w               dgrad { g, w }      contraction O
    dw     = g^T x                  wgrad { g, x }      contraction T

A QuantSpec says what happens to ONE operand of one GEMM; a Recipe is six of them; a Rule gives Linears a recipe.
An operand left out stays in the compute dtype. No spec names an axis: blocks run along the contraction.

Left out for now: Choice (several specs and a rule that picks one), scales with a history, `source`, `center`, `rotate`.
"""

import difflib
import math
from dataclasses import fields
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from quant.codebooks import Codebook
from quant.formats import FORMATS, NAMED, Format
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
    """How a block's scale is made (quant/scaling.py). value = code * scale (* outer scale): scales are decode scales.

    format: e8m0 | any float of at most 8 bits with a NaN (e4m3, e5m3, ...) | bf16 | fp32 | none.
    outer: none | tensor | row | 1xN: an fp32 scale over the whole operand, each of its rows or N elements of a row, which maps
      the amax there to target * outer_target. Default: tensor for e4m3, whose range needs it, else none.
    order: the two published orders of the fp32 operations, TransformerEngine v2.14 and later ("g2") or v2.8 to v2.13, which
      is the paper's Eqs. 2-3 ("g1"); they differ in about 1 scale of 1000 on BF16 data.
    rule: of e8m0, floor | ceil | rceil | even (default rceil). statistic: absmax | std, of the elements of a block.
    target: what the statistic is mapped to; default the largest element (and for e8m0 what the rule says).
    outer_target: what the largest block scale is mapped to; default the largest of its format.
    multiplier: of e8m0; elements are multiplied by it once more, and values divided (3/4: nothing saturates under floor).
    """

    format: str = "e4m3"
    outer: str | None = Field(None, pattern=r"^(none|tensor|row|1x[1-9]\d*)$")
    order: Literal["g2", "g1"] = "g2"
    rule: Literal["floor", "ceil", "rceil", "even"] | None = None
    statistic: Literal["absmax", "std"] = "absmax"
    target: float | None = Field(None, gt=0, allow_inf_nan=False)
    outer_target: float | None = Field(None, gt=0, allow_inf_nan=False)
    multiplier: float = Field(1.0, gt=0, allow_inf_nan=False)

    def __post_init__(self):
        if self.format not in ("bf16", "fp32", "none"):
            floats = {f.name for f in FORMATS.values() if isinstance(f, Format) and f.bits <= 8 and f.nan_code is not None}
            if self.format not in floats:
                if self.format in FORMATS:
                    raise ValueError(f"scale format {self.format!r}: expected a float of at most 8 bits that has a NaN")
                known(self.format, [*(name for name in NAMED if name in floats), "bf16", "fp32", "none"], "scale format")
        if self.outer is None:
            object.__setattr__(self, "outer", "tensor" if self.format == "e4m3" else "none")
        if self.rule is None and self.format == "e8m0":
            object.__setattr__(self, "rule", "rceil")
        if self.rule and self.format != "e8m0":
            raise ValueError(f"rule {self.rule!r} is for scales of format 'e8m0', not {self.format!r}")
        if self.outer != "none" and self.format in ("e8m0", "bf16", "fp32", "none"):
            raise ValueError(f"outer {self.outer!r}: scales of format {self.format!r} have the range to do without")
        if self.outer_target and self.outer == "none":
            raise ValueError(f"outer_target {self.outer_target} is for an outer scale, and outer is 'none'")
        if self.multiplier != 1 and self.format != "e8m0":
            raise ValueError(f"multiplier {self.multiplier} is for scales of format 'e8m0'; others take a target")
        if self.statistic == "std" and self.outer != "none":
            raise ValueError(f"statistic 'std' and outer {self.outer!r}: an outer scale is made from an amax")

    def short(self) -> str:
        """E.g. `e8m0-rceil`, for tables."""
        words = [self.format, self.rule, self.outer if self.outer != "none" else None]
        words += [f"{name}={value:g}" for name in ("target", "outer_target") if (value := getattr(self, name))]
        words += [self.statistic] * (self.statistic != "absmax") + [f"x{self.multiplier:g}"] * (self.multiplier != 1)
        return "-".join(filter(None, words)) if self.format != "none" else "unscaled"

    @property
    def group(self) -> int:
        """How many elements along the contraction share an outer scale; 0 where it is the whole tensor or row, or none."""
        return int(self.outer[2:]) if self.outer.startswith("1x") else 0

    @property
    def significant_bits(self) -> int:
        """Of the part of the scale that differs along the contraction."""
        if self.group or self.format == "fp32":
            return 24
        return 1 if self.format == "none" else FORMATS[self.format].significant_bits


@frozen
class QuantSpec:
    """What happens to one operand, contraction axis last.

    format: of the elements, a name in FORMATS. block: [rows, contraction] that share a scale, -1 for the whole axis.
    rounding: nearest | away | zero | stochastic (24 bits) | stochastic8 (8 bits, carry rule) | stochasticN.
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
        if any(size < 1 and size != -1 for size in self.block):
            raise ValueError(f"block {list(self.block)}: expected two sizes, [rows, contraction], -1 for the whole axis")
        if self.element.bits <= 4 and self.block[1] % 2 and self.block[1] != -1:
            raise ValueError(f"block {list(self.block)}: the contraction size must be even (two codes share a byte)")
        if self.hadamard and (self.hadamard < 2 or self.hadamard & (self.hadamard - 1)):
            raise ValueError(f"hadamard {self.hadamard}: expected 0 (off) or a power of two")
        if self.scale.format == "none":
            object.__setattr__(self, "block", (-1, -1))
        if self.scale.format == "none" and self.element.nan_code is None:
            raise ValueError(f"format {self.format!r} has no code for NaN, so it needs a scale to carry one")
        if self.scale.group and (self.block[1] < 1 or self.scale.group % self.block[1]):
            raise ValueError(f"outer {self.scale.outer!r} must be a multiple of the block's contraction size {self.block[1]}")

    @property
    def element(self) -> Format | Codebook:
        return FORMATS[self.format]

    def blocks_of(self, rows: int, k: int) -> tuple[int, int]:
        """The block of an operand [rows, k]."""
        return tuple(whole if size == -1 else size for size, whole in zip(self.block, (rows, k), strict=True))

    @property
    def leaves(self) -> bool:
        """Whether the block scale is the same along the whole contraction, and so leaves a GEMM's sum as a factor."""
        return self.block[1] == -1 and self.scale.outer == "none" and self.scale.format != "none"

    @property
    def exact(self) -> bool:
        """Whether what a GEMM multiplies, code * scale or the code alone, is always a BF16 number."""
        bits = self.element.significant_bits, 1 if self.leaves else self.scale.significant_bits
        return (max(bits) if min(bits) == 1 else sum(bits)) <= 8

    @property
    def stochastic(self) -> bool:
        return random_bits(self.rounding) > 0

    @property
    def multiple(self) -> tuple[int, int]:
        """(rows, contraction): what the operand's sizes must be multiples of."""
        calls = per_call(random_bits(self.rounding)) if self.stochastic else 1
        per_byte = 2 if self.element.bits <= 4 else 1
        k = math.lcm(max(self.block[1], 1), self.hadamard or 1, calls, per_byte, self.scale.group or 1)
        return max(self.block[0], 1), k

    @property
    def keyed(self) -> bool:
        """Whether quantising needs a Key."""
        return self.stochastic or bool(self.hadamard and self.signs == "fresh")

    @property
    def transposes(self) -> bool:
        """Whether the codes of x^T are the codes of x, transposed."""
        return (
            self.block[0] == self.block[1]
            and not (self.hadamard or self.stochastic)
            and self.scale.outer in ("none", "tensor")
        )

    def short(self) -> str:
        """E.g. `e2m1/1x16 rht16 sr8`, for tables."""
        block = "x".join("all" if size == -1 else str(size) for size in self.block)
        words = [f"{self.format}/{block}" if self.scale.format != "none" else self.format]
        if self.scale != Scale() and self.scale != Scale(order="g1"):
            words.append(self.scale.short())
        if self.hadamard:
            words.append(f"rht{self.hadamard}" + {"none": "-nosigns", "fixed": "", "fresh": "-fresh"}[self.signs])
        if self.rounding != "nearest":
            words.append(self.rounding.replace("stochastic", "sr"))
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
