"""Number formats: what a code means, and how a real number becomes one.

A float format with E exponent bits, M mantissa bits and bias b stores a magnitude as the integer

    code = (field << M) | mantissa          value = (mantissa + [field > 0] 2^M) * 2^(max(field, 1) - b - M)

with the sign above it. Read as a plain integer, the code counts the representable magnitudes upwards from zero. So
rounding is one formula for normals, subnormals and the carry into the next binade alike:

    e = max(floor(log2 |x|), emin)      t = |x| * 2^(M - e)      r = round(t)      code = r + ((e - emin) << M)

`t` is exact (a power of two times x), `r` counts quanta, and a carry (r = 2^(M+1)) lands on the right code by itself.
Every rounding mode is a way to turn `t` into an integer. All of it is fp32 and int32 arithmetic that gives the same
bits on every device; no cast decides a rounding (casts differ between torch, Triton's interpreter and hardware).

Left out: integers with an implicit scale, codebooks, formats wider than 16 bits.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOAT32_EXPONENT = 0x7F800000  # the exponent field of an fp32 bit pattern
ROUNDINGS = {"nearest": 0, "away": 0, "zero": 0, "stochastic": 32, "stochastic8": 8}  # -> random bits per element


@dataclass(frozen=True)
class Format:
    """A signed binary float. `max` is the largest finite value (default: every code is finite).

    Codes above `max` are NaN, but for one Inf directly above it where `max` fills its binade (the IEEE habit).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None  # default 2^(E-1) - 1
    finite_max: float | None = None
    torch_dtype: torch.dtype | None = None  # a torch dtype with the same bit patterns, where there is one

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def emin(self) -> int:
        """Exponent of the smallest normal number, and of all subnormals."""
        return 1 - (2 ** (self.exponent_bits - 1) - 1 if self.bias is None else self.bias)

    @cached_property
    def max_code(self) -> int:
        """Magnitude code of the largest finite value."""
        all_ones = (1 << (self.bits - 1)) - 1
        if self.finite_max is None:
            return all_ones
        exponent = math.floor(math.log2(self.finite_max))
        return int(self.finite_max * 2.0 ** (self.mantissa_bits - exponent)) + (
            (exponent - self.emin) << self.mantissa_bits
        )

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return self._magnitude(self.max_code)

    @property
    def tiny(self) -> float:
        """Smallest positive value (a subnormal)."""
        return self._magnitude(1)

    @cached_property
    def nan_code(self) -> int | None:
        """Magnitude code written for NaN and Inf (the all-ones code), or None where every code is finite."""
        all_ones = (1 << (self.bits - 1)) - 1
        return all_ones if all_ones > self.max_code else None

    @cached_property
    def _saturated(self) -> int:
        """An fp32 bit pattern that is finite, and at least two binades above `max` where fp32 reaches that far."""
        field = (self.max_code >> self.mantissa_bits) + self.emin + 127 + 2
        return min(field << 23, 0x7F7FFFFF)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.uint16

    def _magnitude(self, code: int) -> float:
        field = max(code >> self.mantissa_bits, 1)
        return (code - ((field - 1) << self.mantissa_bits)) * 2.0 ** (field - 1 + self.emin - self.mantissa_bits)

    def encode(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> int32 codes [...], sign bit included; saturates; NaN and Inf give `nan_code`, or `max_code`
        (whoever calls must then carry the NaN in a scale) where there is none. -0.0 keeps its sign.

        rounding: nearest (ties to the even code) | away (ties away from zero) | zero (truncate)
          | stochastic (up with the probability of the fraction, to 2^-24; `random`: int in [0, 2^24), same shape)
          | stochastic8 (`random`: int in [0, 256); up iff floor(256 fraction) + random >= 256: the carry rule
            of TransformerEngine's portable path, specs/nvfp4.md 2.5).
        """
        m, lowest = self.mantissa_bits, (self.emin + 127) << 23  # exponent fields below, of fp32
        bits = x.view(torch.int32)
        a = (bits & 0x7FFFFFFF).clamp(max=self._saturated)  # also makes NaN a number that saturates
        e = (a & FLOAT32_EXPONENT).clamp(min=lowest)
        # 2^(1 - e) rather than 2^-e: its exponent field is 1 ... 254 for every e, so it is always a normal number.
        t = a.view(torch.float32) * ((255 << 23) - e).view(torch.float32) * 2.0 ** (m - 1)
        code = _round(t, rounding, random).to(torch.int32) + ((e - lowest) >> (23 - m))
        code = code.clamp(max=self.max_code)
        if self.nan_code is not None:
            code = torch.where((bits & FLOAT32_EXPONENT) == FLOAT32_EXPONENT, self.nan_code, code)
        return code | ((bits >> 31) & 1) << (self.bits - 1)

    def decode(self, code: Tensor) -> Tensor:
        """int codes [...] -> fp32 values [...], exactly; codes above `max` are NaN (or Inf, see the class)."""
        m, emin = self.mantissa_bits, self.emin
        code = code.to(torch.int32)
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        steps = ((magnitude >> m) - 1).clamp(min=0)  # binades above the lowest
        significand = (magnitude - (steps << m)).to(torch.float32) * 2.0**-m
        value = significand * ((steps + (emin + 127)) << 23).view(torch.float32)
        if self.nan_code is not None:
            value = torch.where(magnitude > self.max_code, math.nan, value)
            if m and (self.max_code + 1) & ((1 << m) - 1) == 0:
                value = torch.where(magnitude == self.max_code + 1, math.inf, value)
        return torch.where(code >= 1 << (self.bits - 1), -value, value)

    def round(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> the fp32 values nearest in this format (saturating); NaN and Inf pass unchanged."""
        return torch.where(x.isfinite(), self.decode(self.encode(x, rounding, random)), x)

    def values(self) -> Tensor:
        """fp32 [2^bits]: the value of every code."""
        return self.decode(torch.arange(2**self.bits, dtype=torch.int32))


def to_bfloat16(x: Tensor) -> Tensor:
    """fp32 -> BF16, nearest even, as three integer operations (FORMATS["bf16"].round is the meaning, but takes 30, and
    the Hadamard transform rounds 16 of them in one loop). Overflow gives Inf, NaN stays NaN."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def _round(t: Tensor, rounding: str, random: Tensor | None) -> Tensor:
    if rounding == "nearest":
        return t.round()  # torch rounds halves to even
    below = t.floor()
    if rounding == "zero":
        return below
    fraction = t - below  # exact: both share t's quantum
    if rounding == "away":
        return below + (fraction >= 0.5)
    n = 2.0**8 if rounding == "stochastic8" else 2.0**24
    return below + ((fraction * n).floor() + random.to(torch.float32) >= n)


FORMATS = {
    f.name: f
    for f in (
        #      name    E  M
        Format("e2m1", 2, 1),  # NVFP4, MXFP4 elements: 0 .5 1 1.5 2 3 4 6
        Format("e2m3", 2, 3),  # MXFP6
        Format("e3m2", 3, 2),  # MXFP6
        Format("e4m3", 4, 3, finite_max=448.0, torch_dtype=torch.float8_e4m3fn),
        Format("e5m2", 5, 2, finite_max=57344.0, torch_dtype=torch.float8_e5m2),
        Format("fp16", 5, 10, finite_max=65504.0, torch_dtype=torch.float16),
        Format("bf16", 8, 7, finite_max=2.0**127 * (2 - 2.0**-7), torch_dtype=torch.bfloat16),
    )
}


def table() -> str:
    """The formats as text, one line each: bits, emin, smallest and largest value, special codes."""
    lines = [f"{'format':8}{'bits':>5}{'emin':>6}{'tiny':>12}{'max':>12}  special codes"]
    for f in FORMATS.values():
        special = "none" if f.nan_code is None else f"{f.nan_code - f.max_code} a sign above 0x{f.max_code:02X}"
        lines.append(f"{f.name:8}{f.bits:5}{f.emin:6}{f.tiny:12.4g}{f.max:12.6g}  {special}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
