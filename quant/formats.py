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
from dataclasses import dataclass, field

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

    # Derived (set once: torch.compile cannot trace the first use of a cached_property):
    bits: int = field(init=False)
    emin: int = field(init=False)  # exponent of the smallest normal number, and of all subnormals
    max_code: int = field(init=False)  # magnitude code of the largest finite value
    max: float = field(init=False)
    tiny: float = field(init=False)  # smallest positive value, a subnormal
    nan_code: int | None = field(init=False)  # magnitude code written for NaN and Inf, None if all codes are finite

    def __post_init__(self):
        E, M = self.exponent_bits, self.mantissa_bits
        emin = 1 - (2 ** (E - 1) - 1 if self.bias is None else self.bias)
        top = all_ones = (1 << (E + M)) - 1
        if self.finite_max is not None:
            exponent = math.floor(math.log2(self.finite_max))
            top = int(self.finite_max * 2.0 ** (M - exponent)) + ((exponent - emin) << M)
        derived = {"bits": 1 + E + M, "emin": emin, "max_code": top, "nan_code": all_ones if top < all_ones else None}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "max", self._magnitude(top))
        object.__setattr__(self, "tiny", self._magnitude(1))

    def _magnitude(self, code: int) -> float:
        field = max(code >> self.mantissa_bits, 1)
        return (code - ((field - 1) << self.mantissa_bits)) * 2.0 ** (field - 1 + self.emin - self.mantissa_bits)

    def encode(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> int32 codes [...], sign bit included; saturates; NaN and Inf give `nan_code`, or `max_code`
        (whoever calls must then carry the NaN in a scale) where there is none, a NaN without a sign. -0.0 keeps its sign.

        rounding: nearest (ties to the even code) | away (ties away from zero) | zero (truncate)
          | stochastic (up with the probability of the fraction, to 2^-24; `random`: int in [0, 2^24), same shape)
          | stochastic8 (`random`: int in [0, 256); up iff floor(256 fraction) + random >= 256: the carry rule
            of TransformerEngine's portable path).
        """
        bits = x.view(torch.int32)
        quanta, e = self._quanta(x, bits, rounding, random)
        quanta = torch.where(quanta == quanta, quanta, 0.0)  # the int of a NaN is not defined
        code = quanta.to(torch.int32) + ((e - ((self.emin + 127) << 23)) >> (23 - self.mantissa_bits))
        code = code.clamp(max=self.max_code)
        if self.nan_code is not None:
            code = torch.where((bits & FLOAT32_EXPONENT) == FLOAT32_EXPONENT, self.nan_code, code)
        code = torch.where(bits < 0, code + (1 << (self.bits - 1)), code)
        # The sign of a NaN that arithmetic made differs between CPUs and compilers: no code depends on it.
        return torch.where(x == x, code, self.max_code if self.nan_code is None else self.nan_code)

    def round(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> fp32 values of this format: decode(encode(x)), except that NaN stays NaN and Inf saturates.

        A third of the operations of going through the codes, and what an emulated GEMM needs.
        """
        bits = x.view(torch.int32)
        quanta, e = self._quanta(x, bits, rounding, random)
        value = (quanta * 2.0**-self.mantissa_bits * e.view(torch.float32)).clamp(max=self.max)
        return torch.where(bits < 0, -value, value)

    def _quanta(self, x: Tensor, bits: Tensor, rounding: str, random: Tensor | None) -> tuple[Tensor, Tensor]:
        """x fp32, its bit patterns -> (fp32: |x| in quanta, rounded to an integer; 2^e as an fp32 bit pattern).

        Views between fp32 and int32 are few on purpose: compiled C++ takes them through memory, and each costs as much
        as ten operations.
        """
        top = min(math.floor(math.log2(self.max)) + 2, 127)  # a binade that saturates, where fp32 has one
        a = x.abs().clamp(max=2.0**top * (2 - 2.0**-23))
        e = (bits & FLOAT32_EXPONENT).clamp((self.emin + 127) << 23, (top + 127) << 23)
        # 2^(1 - e) rather than 2^-e: its exponent field is 1 ... 254 for every e, so it is always a normal number.
        t = a * ((255 << 23) - e).view(torch.float32) * 2.0 ** (self.mantissa_bits - 1)
        return _round(t, rounding, random), e

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
        return torch.where(code > (1 << (self.bits - 1)) - 1, -value, value)

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
    if rounding == "stochastic8":  # floor(256 fraction) + random >= 256, in fewer steps; every sum is an exact integer
        return (((t * 256.0).floor() + random.to(torch.float32)) * 2.0**-8).floor()
    below = t.floor()
    if rounding == "zero":
        return below
    fraction = t - below  # exact: both share t's quantum
    if rounding == "away":
        return below + (fraction >= 0.5)
    return below + ((fraction * 2.0**24).floor() + random.to(torch.float32) >= 2.0**24)


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
