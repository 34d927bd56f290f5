"""Number formats: what a code means, and how a real number becomes one.

A format with E exponent bits, M mantissa bits and bias b stores a magnitude as the integer

    code = (field << M) | mantissa          value = (mantissa + [field > 0] 2^M) * 2^(max(field, 1) - b - M)

Read as a plain integer, the code counts the representable magnitudes upwards from zero. So rounding is one formula for
normals, subnormals and the carry into the next binade alike:

    e = max(floor(log2 |x|), emin)      unit = 2^(e - M)      value = unit * round(|x| / unit)

and every rounding mode is a way to choose between the two multiples of the unit next to |x| (rounding.py). An integer of n
bits is the case E = 0: one binade, M = n - 1, in two's complement, with an implicit scale of 2^(2 - n), as MXINT8 has it; the
most negative code is never written. All of it is fp32 and int32 arithmetic that gives the same bits on every device; no cast
decides one of these roundings (casts differ between torch, Triton's interpreter and hardware): what is cast lies on the grid.

There are two ways to 2^e, and to a code from its value and back, of the same bits. Eager code takes the exponent from the bit
pattern of x. Compiled C++ takes a view between fp32 and int32 through memory, at the cost of ten operations; there, with
u = 3/4 max(|x|, 2^emin), whose nearest power of two is 2^e, one bit of u is kept (Veltkamp's splitting; all 2^23 significands
are tested),

    2^e = g - (g - u)        g = (2^23 + 1) u        every operation rounded to fp32

and between values and codes lies a line that bends at each binade k = 1, 2, ... above emin, with c+ for max(c, 0)

    code  = 2^(M - emin) value - sum_k 2^(M - emin - k) (value - 2^(emin + k))+
    value = 2^(emin - M) code + sum_k 2^(emin + k - 1 - M) (code - (k + 1) 2^M)+

A format that is a table of values instead is in codebooks.py, with the same methods. Left out: formats wider than 19 bits.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.codebooks import INT4_6, NF4, Codebook, posit
from quant.fuse import compiling
from quant.rounding import round_to

FLOAT32_EXPONENT = 0x7F800000  # the exponent field of an fp32 bit pattern
FLT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Format:
    """A binary float, or a fixed-point number (E = 0). `finite_max` is the largest finite value; left out, every code is
    finite (but for field 255 of 8 exponent bits, whose values are beyond fp32).

    Codes above `max` are NaN, but for one Inf directly above it where `max` fills its binade (the IEEE habit).
    signed: without a sign, negative numbers become 0. negative_zero: without one its code is the only NaN (FNUZ).
    zero: what code 0 means; E8M0 has 2^-127 there and no zero.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None  # default 2^(E-1) - 1
    finite_max: float | None = None
    torch_dtype: torch.dtype | None = None  # a torch dtype with the same bit patterns, where there is one
    signed: bool = True
    negative_zero: bool = True
    zero: float = 0.0

    # Derived (set once: torch.compile cannot trace the first use of a cached_property):
    bits: int = field(init=False)
    emin: int = field(init=False)  # exponent of the smallest normal number, and of all subnormals
    max_code: int = field(init=False)  # magnitude code of the largest finite value
    max: float = field(init=False)
    tiny: float = field(init=False)  # smallest positive value, a subnormal
    nan_code: int | None = field(init=False)  # what is written for NaN and Inf, None if all codes are finite
    # What compiled code may do, see above:
    plain: bool = field(init=False)  # round without views; e8mY cannot, where 2^23 u leaves fp32's range
    bends: tuple[int, ...] | None = field(init=False)  # the k of the line between values and codes; None where they are many
    cast: bool = field(init=False)  # values to codes and back by torch's casts, which are fast for these dtypes

    def __post_init__(self):
        E, M = self.exponent_bits, self.mantissa_bits
        emin = 1 - (2**E // 2 - (E > 0) if self.bias is None else self.bias)
        all_ones = (1 << (E + M)) - 1
        finite_max = self.finite_max
        if finite_max is None and E == 8 and emin == -126:
            finite_max = 2.0**127 * (2 - 2.0**-M)
        top = all_ones
        if finite_max is not None:
            exponent = math.floor(math.log2(finite_max))
            top = int(finite_max * 2.0 ** (M - exponent)) + ((exponent - emin) << M)
        bits = E + M + self.signed
        nan = all_ones if top < all_ones else None
        if not self.negative_zero:
            nan = 1 << (bits - 1)
        derived = {"bits": bits, "emin": emin, "max_code": top, "nan_code": nan}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "max", self._magnitude(top))
        object.__setattr__(self, "tiny", self.zero or self._magnitude(1))
        binades = 1 if self.integer else self.emax - emin + 1
        # (2^24 parts of a unit, which 24 random bits tell apart, are numbers of fp32 down to a unit of 2^-125.)
        object.__setattr__(self, "plain", self.emax + 24 <= 127 and emin - M >= -125)
        object.__setattr__(self, "bends", tuple(range(1, binades)) if binades <= 8 and self.plain else None)
        object.__setattr__(self, "cast", self.torch_dtype in (torch.float8_e4m3fn, torch.float8_e5m2))

    def _magnitude(self, code: int) -> float:
        field = max(code >> self.mantissa_bits, 1)
        return (code - ((field - 1) << self.mantissa_bits)) * 2.0 ** (field - 1 + self.emin - self.mantissa_bits)

    @property
    def integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def significant_bits(self) -> int:
        """Of the longest significand: a product of two of 8 together is exact in BF16."""
        return self.mantissa_bits + (not self.integer)

    @property
    def emax(self) -> int:
        """floor(log2(max)), which the E8M0 scale rules of OCP MX are about."""
        return math.floor(math.log2(self.max))

    def encode(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> int32 codes [...], sign bit included; saturates. NaN and Inf give `nan_code`; where there is none,
        whoever calls must carry them in a scale. -0.0 keeps its sign where the format has one for zero.

        rounding: see quant/rounding.py; ties go to the even code, without mantissa bits upwards (IEEE 754-2019, 4.3.1).
        random: int in [0, 2^N), same shape, for stochasticN.
        """
        codes = self.codes_of(self.round(x, rounding, random), x)
        return (codes.view(torch.uint8) if codes.is_floating_point() else codes).to(torch.int32)

    def round(self, x: Tensor, rounding: str = "nearest", random: Tensor | None = None) -> Tensor:
        """fp32 [...] -> fp32 values of this format: decode(encode(x)), except that NaN stays NaN and Inf saturates."""
        m, emin = self.mantissa_bits, self.emin
        a = x.abs().clamp(max=self.max)
        if self.integer:
            value = round_to(a, 2.0 ** (emin - m), rounding, random)
        elif self.plain:
            value = round_to(a, self._binade(a) * 2.0**-m, rounding, random)
        else:
            e = self._binade(a)
            # 2^(1 - e) rather than 2^-e: its exponent field is 1 ... 254 for every e, so it is always a normal number.
            t = a * ((255 << 23) - e.view(torch.int32)).view(torch.float32) * 2.0 ** (m - 1)
            value = round_to(t, 1.0, rounding, random) * 2.0**-m * e
        if not self.signed:
            return torch.where(torch.copysign(torch.ones_like(x), x) < 0, torch.where(x == x, 0.0, x), value)
        if self.integer or not self.negative_zero:  # no zero with a sign
            return torch.where(x < 0, torch.where(value != 0, -value, value), value)
        return torch.copysign(value, x)

    def _binade(self, a: Tensor) -> Tensor:
        """fp32 a >= 0 -> 2^e, fp32."""
        if self.plain and compiling():
            return binade((a - 2.0**self.emin).relu() + 2.0**self.emin)
        if self.plain:
            return binade(a.clamp(min=2.0**self.emin))
        return (a.view(torch.int32) & FLOAT32_EXPONENT).clamp((self.emin + 127) << 23).view(torch.float32)

    def codes_of(self, value: Tensor, x: Tensor | None = None) -> Tensor:
        """fp32 values of this format, as `round` gives them -> their codes: uint8, int32 for formats over 8 bits, or, where
        `cast`, torch's own float8 with these bytes. x: what has been rounded; where it is Inf, the code is that of NaN.

        NaN and Inf as in `encode`. (Fast in compiled code, where fp32 to uint8 is one conversion and int32 to uint8 is not.)
        """
        m, emin = self.mantissa_bits, self.emin
        # The sign of a NaN that arithmetic made differs between CPUs and compilers: no code depends on it.
        good = value == value if x is None or self.nan_code is None else x.isfinite()
        if self.cast:
            return torch.where(good, value, math.nan).to(self.torch_dtype)
        a = value.abs()
        if self.bends is not None and compiling():
            code = a * 2.0 ** (m - emin)
            for k in self.bends:
                code = code - (a - 2.0 ** (emin + k)).relu() * 2.0 ** (m - emin - k)
        else:
            bits = (a.view(torch.int32) >> (23 - m)) - ((emin + 126) << m)
            subnormal = self.integer | (a < 2.0**emin) if emin > -126 else a < 0
            code = torch.where(subnormal, a * 2.0**-emin * 2.0**m, bits.to(torch.float32))
        if self.zero:
            good = good & (torch.copysign(torch.ones_like(value), value if x is None else x) > 0)
        elif self.integer:
            code = torch.where(value < 0, 2.0**self.bits - code, code)
        elif self.signed:
            half = 2.0 ** (self.bits - 2)
            code = code + half - torch.copysign(torch.full_like(value, half), value)
        code = torch.where(good, code, float(self.max_code if self.nan_code is None else self.nan_code))
        return code.to(torch.uint8 if self.bits <= 8 else torch.int32)

    def decode(self, code: Tensor) -> Tensor:
        """int codes [...] (or float8 of the same bytes, where `cast`) -> fp32 values [...], exactly; codes above `max` are NaN
        (or Inf, see the class)."""
        m, emin = self.mantissa_bits, self.emin
        if code.is_floating_point():
            return code.to(torch.float32)
        if self.bends is not None and self.nan_code is None and compiling():
            return self._decode_along_the_line(code.to(torch.float32))
        code = code.to(torch.int32)
        if self.integer:
            half = 1 << (self.bits - 1)
            return ((code ^ half) - half).to(torch.float32) * 2.0 ** (emin - m)
        sign = 1 << (self.bits - 1) if self.signed else 1 << self.bits
        magnitude = code & (sign - 1)
        steps = ((magnitude >> m) - 1).clamp(min=0)  # binades above the lowest
        significand = (magnitude - (steps << m)).to(torch.float32) * 2.0**-m
        value = significand * ((steps + (emin + 127)) << 23).view(torch.float32)
        if self.nan_code is not None and self.negative_zero:
            value = torch.where(magnitude > self.max_code, math.nan, value)
            if m and self.signed and (self.max_code + 1) & ((1 << m) - 1) == 0:
                value = torch.where(magnitude == self.max_code + 1, math.inf, value)
        if self.zero:
            value = torch.where(magnitude < 1, self.zero, value)
        if not self.signed:
            return value
        value = torch.where(code > sign - 1, -value, value)
        return value if self.negative_zero else torch.where(code == self.nan_code, math.nan, value)

    def _decode_along_the_line(self, code: Tensor) -> Tensor:
        """fp32 codes -> values, of a format without NaN."""
        m, emin, sign = self.mantissa_bits, self.emin, 2.0 ** (self.bits - 1)
        negative = code >= (sign if self.signed else 2 * sign)
        if self.integer:
            return torch.where(negative, code - 2 * sign, code) * 2.0 ** (emin - m)
        code = torch.where(negative, code - sign, code)
        value = code * 2.0 ** (emin - m)
        for k in self.bends:
            value = value + (code - float((k + 1) << m)).relu() * 2.0 ** (emin + k - 1 - m)
        return torch.where(negative, -value, value)

    def values(self) -> Tensor:
        """fp32 [2^bits]: the value of every code."""
        return self.decode(torch.arange(2**self.bits, dtype=torch.int32))


def binade(a: Tensor) -> Tensor:
    """fp32 a, 0 or normal and below 2^104 -> 2^floor(log2 a), or 0."""
    if compiling() and a.device.type == "cpu":
        u = a * 0.75
        g = u * (2.0**23 + 1)
        return g - (g - u)
    return (a.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)


def code_dtype(bits: int) -> torch.dtype:
    """What stores codes of so many bits, one each."""
    return torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32


def to_bfloat16(x: Tensor) -> Tensor:
    """fp32 -> BF16, nearest even, as three integer operations (FORMATS["bf16"].round is the meaning, but takes 30, and
    a Hadamard transform within a larger compiled graph rounds 16 of them in one loop). Overflow gives Inf, NaN stays NaN."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", 0, bits - 1)


#      name  E  M
NAMED: dict[str, Format | Codebook] = {
    f.name: f
    for f in (
        Format("e2m1", 2, 1),  # NVFP4, MXFP4 elements: 0 .5 1 1.5 2 3 4 6
        Format("e2m3", 2, 3),  # MXFP6
        Format("e3m2", 3, 2),  # MXFP6
        Format("e4m3", 4, 3, finite_max=448.0, torch_dtype=torch.float8_e4m3fn),
        Format("e5m2", 5, 2, finite_max=57344.0, torch_dtype=torch.float8_e5m2),
        Format("e3m4", 3, 4, finite_max=15.5),
        Format("e4m3-fnuz", 4, 3, bias=8, negative_zero=False, torch_dtype=torch.float8_e4m3fnuz),  # 1.4.3, arXiv:2206.02915
        Format("e5m2-fnuz", 5, 2, bias=16, negative_zero=False, torch_dtype=torch.float8_e5m2fnuz),  # 1.5.2
        Format("e5m3", 5, 3, finite_max=61440.0, signed=False),  # UE5M3 as Graphcore has it: exponent 31 is reserved
        Format("e5m3-amd", 5, 3, finite_max=114688.0, signed=False),  # as AMD has it: only the last code is NaN
        Format("e8m0", 8, 0, bias=127, finite_max=2.0**127, signed=False, zero=2.0**-127),
        Format("e8m3", 8, 3),  # arXiv:2405.18710
        Format("fp16", 5, 10, finite_max=65504.0, torch_dtype=torch.float16),
        Format("bf16", 8, 7, torch_dtype=torch.bfloat16),
        *map(_integer, (4, 8, 16)),
        NF4,
        INT4_6,
        *(posit(8, es) for es in (0, 1, 2)),  # arXiv:2105.00053
    )
}


class Formats(dict[str, Format | Codebook]):
    """NAMED, and every other integer (int2 to int16) and float (e1m0 to e8m10) by its name, finite throughout:
    [u]eXmY[bB], unsigned and with a bias of its own if it says so (FFP8, arXiv:2104.07329). A float whose numbers are not
    all numbers of fp32 is in no table."""

    def __missing__(self, name: str) -> Format:
        if found := re.fullmatch(r"int([2-9]|1[0-6])", name):
            self[name] = _integer(int(found[1]))
        elif found := re.fullmatch(r"(u?)e([1-8])m(\d|10)(?:b(0|-?[1-9]\d{0,2}))?", name):
            unsigned, E, M, bias = found.groups()
            fmt = Format(name, int(E), int(M), None if bias is None else int(bias), signed=not unsigned)
            if fmt.emin < -126 or fmt.max > FLT_MAX:
                raise KeyError(name)
            self[name] = fmt
        else:
            raise KeyError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        try:
            return self[name] is not None
        except (KeyError, TypeError):
            return False


FORMATS = Formats(NAMED)


def table() -> str:
    """The named formats as text, one line each: bits, smallest and largest value, how many codes are no numbers."""
    lines = [f"{'format':11}{'bits':>4}{'tiny':>12}{'max':>12}  codes that are no numbers"]
    for f in NAMED.values():
        special = 2**f.bits - int(f.values().isfinite().sum())
        lines.append(f"{f.name:11}{f.bits:4}{f.tiny:12.4g}{f.max:12.6g}  {special or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
