"""What happens to ONE operand of one GEMM, as data: a QuantSpec with its Scale. choice.py chooses between several.

No spec names an axis: an operand comes with its contraction last, and blocks run along it. recipe.py puts six together.

Left out: scales that are searched for.
"""

import difflib
import math
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


def rounding_bits(rounding: str, what: str) -> int:
    """`random_bits`, with an error that says what the rounding is of."""
    try:
        return random_bits(rounding)
    except ValueError:
        known(rounding, ROUNDINGS, what)
        raise


@frozen
class Scale:
    """How a block's scale is made (quant/scaling.py). value = code * scale (* outer scale): scales are decode scales.

    format: e8m0 | any float of at most 8 bits with a NaN (e4m3, e5m3, ...) | bf16 | fp32 | none.
    outer: none | tensor | row | 1xN: a scale over the whole operand, each of its rows or N elements of a row, which maps
      the amax there to target * outer_target. Default: tensor for e4m3, whose range needs it, else none.
    outer_format: fp32; or, over e8m0, m8: a significand of eight bits, for the largest element of N to come out at the top of
      its binade (macro-block scaling, arXiv:2603.08713).
    order: the two published orders of the fp32 operations, TransformerEngine v2.14 and later ("g2") or v2.8 to v2.13, which
      is the paper's Eqs. 2-3 ("g1"); they differ in about 1 scale of 1000 on BF16 data.
    rule: of e8m0, floor | ceil | rceil | even (default rceil), or gam: under an outer significand of the whole tensor, that
      of max / amax, so that nothing saturates and its largest element becomes exactly the format's (arXiv:2512.22804).
    statistic: absmax | std, of the elements of a block.
    history: 0, or take the largest amax of so many earlier steps in place of the operand's own (delayed scaling), where one
      scale spans it: fp32 over the block [-1, -1], or outer "tensor".
    target: what the statistic is mapped to; default the largest element (and for e8m0 what the rule says).
    outer_target: what the largest block scale is mapped to; default the largest of its format.
    multiplier: of e8m0; elements are multiplied by it once more, and values divided (3/4: nothing saturates under floor).
    rounding: of the block scale: nearest, or stochasticN where the format has a significand to round.
    correction: none | eden: the scale is multiplied by <y, y> / <y, q> of its Hadamard tile before it is rounded
      (MS-EDEN, arXiv:2601.22813): over fresh signs that makes an operand unbiased whose elements are rounded to nearest.
    """

    format: str = "e4m3"
    outer: str | None = Field(None, pattern=r"^(none|tensor|row|1x[1-9]\d*)$")
    order: Literal["g2", "g1"] = "g2"
    rule: Literal["floor", "ceil", "rceil", "even", "gam"] | None = None
    statistic: Literal["absmax", "std"] = "absmax"
    target: float | None = Field(None, ge=1e-30, le=1e30)
    outer_target: float | None = Field(None, ge=1e-30, le=1e30)
    multiplier: float = Field(1.0, ge=1e-30, le=1e30)
    outer_format: Literal["fp32", "m8"] = "fp32"
    history: int = Field(0, ge=0)
    rounding: str = "nearest"
    correction: Literal["none", "eden"] = "none"

    def __post_init__(self):
        if self.format not in ("bf16", "fp32", "none"):
            fmt = FORMATS[self.format] if self.format in FORMATS else None
            if fmt is None:
                floats = [f.name for f in NAMED.values() if isinstance(f, Format) and f.bits <= 8 and f.nan_code is not None]
                known(self.format, [*floats, "bf16", "fp32", "none"], "scale format")
            if not isinstance(fmt, Format) or fmt.bits > 8 or fmt.nan_code is None:
                raise ValueError(f"scale format {self.format!r}: expected a float of at most 8 bits that has a NaN")
        if self.outer is None:
            object.__setattr__(self, "outer", "tensor" if self.format == "e4m3" or self.rule == "gam" else "none")
        if self.rule is None and self.format == "e8m0":
            object.__setattr__(self, "rule", "rceil")
        if self.rule and self.format != "e8m0":
            raise ValueError(f"rule {self.rule!r} is for scales of format 'e8m0', not {self.format!r}")
        if self.macro and not (self.format == "e8m0" and self.group):
            raise ValueError(f"outer_format 'm8' is over scales 'e8m0' and an outer '1xN', not {self.format!r}, {self.outer!r}")
        if self.rule == "gam" and (self.outer != "tensor" or self.multiplier != 1 or self.statistic == "std"):
            raise ValueError(
                f"rule 'gam' takes the significand of the whole tensor's amax: outer 'tensor', not {self.outer!r}, with "
                f"multiplier 1, not {self.multiplier:g}, and statistic 'absmax', not {self.statistic!r}"
            )
        if self.outer != "none" and self.format in ("e8m0", "bf16", "fp32", "none") and not self.macro and self.rule != "gam":
            raise ValueError(f"outer {self.outer!r}: scales of format {self.format!r} have the range to do without")
        if self.outer_target and (self.outer == "none" or self.format == "e8m0"):
            outer = repr(self.outer) + " in 'm8'" * self.macro + " of rule 'gam'" * (self.rule == "gam")
            raise ValueError(f"outer_target {self.outer_target} is for an outer scale in fp32, and outer is {outer}")
        if self.multiplier != 1 and (self.format != "e8m0" or self.macro):
            raise ValueError(f"multiplier {self.multiplier} is for scales 'e8m0' without an outer one; others take a target")
        if self.statistic == "std" and self.outer != "none":
            raise ValueError(f"statistic 'std' and outer {self.outer!r}: an outer scale is made from an amax")
        if self.history and (self.statistic == "std" or not (self.outer == "tensor" or self.format == "fp32")):
            raise ValueError(f"history {self.history}: expected one absmax for the operand, of scale 'fp32' or outer 'tensor'")
        if rounding_bits(self.rounding, "scale rounding") == 0 and self.rounding != "nearest":
            raise ValueError(f"scale rounding {self.rounding!r}: expected 'nearest' or 'stochastic', with a number of bits")
        if self.stochastic and self.format in ("e8m0", "fp32", "none"):
            raise ValueError(f"scale rounding {self.rounding!r}: a scale of format {self.format!r} has nothing to round")
        if self.correction == "eden" and not self.stochastic:
            raise ValueError("correction 'eden' needs scales with rounding 'stochastic': rounded to nearest they are biased")

    def short(self) -> str:
        """E.g. `e8m0-rceil`, for tables."""
        outer = None if self.outer == "none" or self.rule == "gam" else self.outer
        words = [self.format, self.rule, outer, "m8" if self.macro else None]
        words += [f"{name}={value:g}" for name in ("target", "outer_target") if (value := getattr(self, name))]
        words += [self.statistic] * (self.statistic != "absmax") + [f"x{self.multiplier:g}"] * (self.multiplier != 1)
        words += [f"history{self.history}"] * (self.history > 0) + [self.correction] * (self.correction != "none")
        words += [self.rounding.replace("stochastic", "sr")] * self.stochastic
        return "-".join(filter(None, words)) if self.format != "none" else "unscaled"

    @property
    def group(self) -> int:
        """How many elements along the contraction share an outer scale; 0 where it is the whole tensor or row, or none."""
        return int(self.outer[2:]) if self.outer.startswith("1x") else 0

    @property
    def macro(self) -> bool:
        return self.outer_format == "m8"

    @property
    def stochastic(self) -> bool:
        return random_bits(self.rounding) > 0

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
    rounding: nearest | away | inward | zero | stochastic (24 bits) | stochastic8 (8 bits, carry rule) | stochasticN.
    hadamard: 0, or the size of the Hadamard transform along the contraction (a power of two);
    signs: none | fixed (the published vector) | fresh (drawn for every micro-batch and GEMM).
    source: original | fprop: quantise what fprop made of this tensor (double quantisation; dgrad.w and wgrad.x only).
    center: subtract the mean over the tokens first, and add its product back in high precision (fprop.x and wgrad.x only).
    """

    format: str = "e2m1"
    block: tuple[int, int] = (1, 16)
    scale: Scale = Scale()
    rounding: str = "nearest"
    hadamard: int = 0
    signs: Literal["none", "fixed", "fresh"] = "fixed"
    source: Literal["original", "fprop"] = "original"
    center: bool = False

    def __post_init__(self):
        if self.format not in FORMATS:
            known(self.format, NAMED, "format")
        rounding_bits(self.rounding, "rounding")
        if any(size < 1 and size != -1 for size in self.block):
            raise ValueError(f"block {list(self.block)}: expected two sizes, [rows, contraction], -1 for the whole axis")
        if self.element.bits <= 4 and self.block[1] % 2 and self.block[1] != -1:
            raise ValueError(f"block {list(self.block)}: the contraction size must be even (two codes share a byte)")
        if self.hadamard and (self.hadamard < 2 or self.hadamard & (self.hadamard - 1)):
            raise ValueError(f"hadamard {self.hadamard}: expected 0 (off) or a power of two")
        scale = self.scale
        if isinstance(self.element, Format) and self.element.zero:
            raise ValueError(f"format {self.format!r} has neither zero nor signs: it is for scales, not for elements")
        if scale.format == "none":
            object.__setattr__(self, "block", (-1, -1))
        if scale.format == "none" and self.element.nan_code is None:
            raise ValueError(f"format {self.format!r} has no code for NaN, so it needs a scale to carry one")
        if scale.group and (self.block[1] < 1 or scale.group % self.block[1]):
            raise ValueError(f"outer {scale.outer!r} must be a multiple of the block's contraction size {self.block[1]}")
        if scale.history and scale.format == "fp32" and self.block != (-1, -1):
            raise ValueError(f"history {scale.history} is of one scale for the operand, so block must be [-1, -1]")
        if scale.correction == "eden" and not (self.hadamard and self.signs == "fresh"):
            raise ValueError(
                "correction 'eden' needs a Hadamard transform with signs 'fresh': with fixed ones the same error comes back "
                "in every micro-batch, and averaging 64 of them gains 0.06 bits, not 3"
            )
        if scale.correction == "eden" and FORMATS[scale.format].exponent_bits > 6:
            raise ValueError(f"correction 'eden': squares of scales {scale.format!r} leave fp32's range, expected e4m3 or e5m3")
        if scale.correction == "eden" and scale.group % (self.hadamard or 1):
            raise ValueError(f"correction 'eden': outer {scale.outer!r} must be a multiple of hadamard {self.hadamard}")
        if scale.correction == "eden" and (self.block[0] != 1 or not 1 <= self.block[1] <= self.hadamard or self.stochastic):
            raise ValueError(
                f"correction 'eden' is for elements rounded to nearest, in blocks [1, N] within a tile of hadamard "
                f"{self.hadamard}, not {self.rounding!r} in {list(self.block)}"
            )
        if scale.stochastic and self.block[1] == -1:
            raise ValueError(f"scale rounding {scale.rounding!r}: expected blocks along a row, not {list(self.block)}")

    @property
    def candidates(self) -> "tuple[QuantSpec, ...]":
        """As a Choice between one."""
        return (self,)

    @property
    def ladder(self) -> bool:
        """As of a Choice."""
        return False

    @property
    def element(self) -> Format | Codebook:
        return FORMATS[self.format]

    @property
    def elements(self) -> tuple[Format | Codebook, ...]:
        """The element formats there may be in one operand."""
        return (self.element,)

    def blocks_of(self, rows: int, k: int) -> tuple[int, int]:
        """The block of an operand [rows, k]."""
        return tuple(whole if size == -1 else size for size, whole in zip(self.block, (rows, k), strict=True))

    @property
    def leaves(self) -> bool:
        """Whether the block scale is the same along the whole contraction, and so leaves a GEMM's sum as a factor."""
        return self.block[1] == -1 and self.scale.outer == "none" and self.scale.format != "none"

    @property
    def exact(self) -> bool:
        """Whether what a GEMM multiplies, code * scale or the code alone, is always a BF16 number (but for scales so small
        that the product leaves BF16's normal range, below 2^-126)."""
        bits = self.element.significant_bits, 1 if self.leaves else self.scale.significant_bits
        return (max(bits) if min(bits) == 1 else sum(bits)) <= 8

    @property
    def stochastic(self) -> bool:
        return random_bits(self.rounding) > 0

    @property
    def multiple(self) -> tuple[int, int]:
        """(rows, contraction): what the operand's sizes must be multiples of."""
        width = max(self.block[1], 1)
        calls = per_call(random_bits(self.rounding)) if self.stochastic else 1
        scale_calls = per_call(random_bits(self.scale.rounding)) * width if self.scale.stochastic else 1
        per_byte = 2 if self.element.bits <= 4 else 1
        k = math.lcm(width, self.hadamard or 1, calls, scale_calls, per_byte, self.scale.group or 1)
        return max(self.block[0], 1), k

    @property
    def keyed(self) -> bool:
        """Whether quantising needs a Key."""
        return self.stochastic or self.scale.stochastic or bool(self.hadamard and self.signs == "fresh")

    @property
    def transposes(self) -> bool:
        """Whether the codes of x^T are the codes of x, transposed."""
        return (
            self.block[0] == self.block[1]
            and not (self.hadamard or self.stochastic or self.scale.stochastic)
            and self.scale.outer in ("none", "tensor")
            and self.source == "original"
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
        words += ["of-fprop"] * (self.source == "fprop") + ["centred"] * self.center
        return " ".join(words)
