"""Number formats of the PTX ISA in numpy, exact, and the fp32 arithmetic that numpy does not have.

A small format is the list of its magnitudes, in the order of their codes. Between neighbours k and k + 1 lies one midpoint,
which is a fp32 number; rounding to nearest is a search among the midpoints:

    code(x) = #{k : |x| above midpoint k}, a midpoint itself belonging to the even one of k and k + 1

so normals, subnormals and saturation (no midpoint lies above the largest code) are one case. Toward zero, and stochastic, are
integers on the bits of x. Codes are unsigned integers with the sign in their top bit.

Arithmetic: a fp32 product is exact in fp64 (48 bits); a sum in fp64 is made exact enough by rounding it to odd (the truncated
sum with its last bit set if anything was dropped; Boldo and Melquiond, IEEE TC 2008), whence any rounding to at most 51 bits
is that of the exact sum. The NaN that fp32 arithmetic gives is 0x7FFFFFFF (CUDA C++ Programming Guide, floating-point
standard).

Left out: fp64 fma, rounding toward infinities but for ue8m0, the 6-bit formats, tf32.
"""

import numpy as np

NAN32 = np.uint32(0x7FFFFFFF)
INFINITY32 = 0x7F800000  # as bits; above it lie the NaNs


def _magnitudes(exponent: int, mantissa: int, count: int) -> np.ndarray:
    """The first `count` magnitudes of a format with that many bits of each, bias 2^(exponent - 1) - 1; float32."""
    codes = np.arange(count)
    field = codes >> mantissa
    significand = (codes & (2**mantissa - 1)) + (field > 0) * 2**mantissa
    return np.ldexp(significand, np.maximum(field, 1) - (2 ** (exponent - 1) - 1) - mantissa).astype(np.float32)


def _decoder(magnitudes: np.ndarray, size: int, infinity: bool = False) -> np.ndarray:
    """Code -> value, float32, NaN where there is no number."""
    positive = np.full(size // 2, np.nan, np.float32)
    positive[: magnitudes.size] = magnitudes
    if infinity:
        positive[magnitudes.size] = np.inf
    return np.concatenate([positive, -positive])


def _thresholds(magnitudes: np.ndarray) -> np.ndarray:
    """The bits of the smallest fp32 number that rounds to code 1, 2, ..."""
    middle = ((magnitudes[:-1].astype(np.float64) + magnitudes[1:]) / 2).astype(np.float32).view(np.uint32)
    return middle + (np.arange(middle.size) % 2 == 0).astype(np.uint32)


_E2M1 = _magnitudes(2, 1, 8)
_E4M3 = _magnitudes(4, 3, 0x7F)
_E5M2 = _magnitudes(5, 2, 0x7C)
_FROM_E2M1 = _decoder(_E2M1, 16)
_FROM_E4M3 = _decoder(_E4M3, 256)
_FROM_E5M2 = _decoder(_E5M2, 256, infinity=True)
_TO_E2M1, _TO_E4M3, _TO_E5M2 = map(_thresholds, (_E2M1, _E4M3, _E5M2))


# --- small formats ---


def _nearest(x: np.ndarray, thresholds: np.ndarray, bits: int, nan: int) -> np.ndarray:
    u = np.asarray(x, np.float32).view(np.uint32)
    magnitude = u & np.uint32(0x7FFFFFFF)
    sign = (u >> np.uint32(31)).astype(np.uint8) << np.uint8(bits - 1)
    code = np.searchsorted(thresholds, magnitude, "right").astype(np.uint8) | sign
    return np.where(magnitude > INFINITY32, np.uint8(nan), code)


def _stochastic(x: np.ndarray, random: np.ndarray, count: int, exponent: int, mantissa: int, top: int, nan: int) -> np.ndarray:
    """Adds `count` random bits to what is dropped, at its top, and truncates; saturates."""
    u = np.asarray(x, np.float32).view(np.uint32)
    magnitude = (u & np.uint32(0x7FFFFFFF)).astype(np.int64)
    field = np.maximum(magnitude >> 23, 1)
    significand = (magnitude & 0x7FFFFF) + np.where(magnitude >> 23, 1 << 23, 0)  # |x| = significand 2^(field - 150)
    lowest = 127 + 2 - 2 ** (exponent - 1)  # the fp32 field of the smallest normal number
    dropped = np.minimum(23 - mantissa + np.maximum(lowest - field, 0), 40)  # at 40 nothing can round up
    random = np.asarray(random).astype(np.int64)
    added = np.where(dropped >= count, random << np.maximum(dropped - count, 0), random >> np.maximum(count - dropped, 0))
    kept = (significand + added) >> dropped  # with the implicit bit of a normal number, which counts one binade
    code = np.minimum(kept + np.where(field >= lowest, (field - lowest) << mantissa, 0), top)
    code = code | (u >> 31).astype(np.int64) << (exponent + mantissa)
    return np.where(magnitude > INFINITY32, nan, code).astype(np.uint8)


def to_e2m1(x: np.ndarray, random: np.ndarray | None = None, count: int = 8) -> np.ndarray:
    """float32 -> codes of E2M1, uint8: nearest even, or stochastic with `count` random bits; saturates, NaN is 0x7 (+6)."""
    if random is None:
        return _nearest(x, _TO_E2M1, 4, 0x7)
    return _stochastic(x, random, count, 2, 1, 0x7, 0x7)


def to_e4m3(x: np.ndarray, random: np.ndarray | None = None, count: int = 16) -> np.ndarray:
    """float32 -> codes of E4M3, uint8: nearest even, or stochastic with `count` random bits; saturates, NaN is 0x7F."""
    if random is None:
        return _nearest(x, _TO_E4M3, 8, 0x7F)
    return _stochastic(x, random, count, 4, 3, 0x7E, 0x7F)


def to_e5m2(x: np.ndarray, random: np.ndarray | None = None, count: int = 16) -> np.ndarray:
    """float32 -> codes of E5M2, uint8: nearest even, or stochastic with `count` random bits; saturates, NaN is 0x7F."""
    if random is None:
        return _nearest(x, _TO_E5M2, 8, 0x7F)
    return _stochastic(x, random, count, 5, 2, 0x7B, 0x7F)


def to_ue8m0(x: np.ndarray, up: bool) -> np.ndarray:
    """float32 -> k of 2^(k - 127), uint8, toward zero or up; saturates at 254, NaN is 255.

    Below 2^-127 it is 0. Of a negative number the magnitude is taken, as cuda_fp8.hpp does on the host; the ISA does not say.
    """
    magnitude = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    field, rest = (magnitude >> 23).astype(np.int64), magnitude & np.uint32(0x7FFFFF)
    if up:  # 2^-127 is the subnormal 0x400000
        field = field + np.where(field > 0, rest > 0, rest > 0x400000)
    return np.where(magnitude > INFINITY32, 255, np.minimum(field, 254)).astype(np.uint8)


def from_e2m1(code: np.ndarray) -> np.ndarray:
    """Codes of E2M1, integers whose upper bits are ignored -> float32."""
    return _FROM_E2M1[code & 15]


def from_e4m3(code: np.ndarray) -> np.ndarray:
    """Codes of E4M3, integers 0 ... 255 -> float32; 0x7F and 0xFF are NaN."""
    return _FROM_E4M3[code]


def from_e5m2(code: np.ndarray) -> np.ndarray:
    """Codes of E5M2, integers 0 ... 255 -> float32, with infinities and NaN as in IEEE."""
    return _FROM_E5M2[code]


def from_ue8m0(code: np.ndarray) -> np.ndarray:
    """Codes of UE8M0, integers 0 ... 255 -> float32 2^(code - 127); 255 is NaN."""
    power = np.ldexp(np.float32(1), np.asarray(code).astype(np.int32) - 127)
    return np.where(np.equal(code, 255), np.float32(np.nan), power).astype(np.float32)


# --- 16 bits ---


def f32_to_bf16(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 -> BF16 bits, uint16, nearest even or toward zero; NaN is 0x7FFF."""
    x = np.asarray(x, np.float32)
    u = x.view(np.uint32)
    if not toward_zero:
        u = u + (((u >> 16) & np.uint32(1)) + np.uint32(0x7FFF))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (u >> 16).astype(np.uint16))


def bf16_to_f32(code: np.ndarray) -> np.ndarray:
    """BF16 bits, uint16 -> float32."""
    return (code.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_f16(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 or float64 -> FP16 bits, uint16, nearest even or toward zero; NaN is 0x7FFF, nearest overflows to infinity."""
    x = np.asarray(x)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    bits = half.view(np.uint16)
    if toward_zero:
        above = np.isfinite(x) & (np.abs(half.astype(x.dtype)) > np.abs(x))
        bits = bits - above.astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def f16_to_f32(code: np.ndarray) -> np.ndarray:
    """FP16 bits, uint16 -> float32; the NaN is 0x7FFFFFFF."""
    return canonical(code.view(np.float16).astype(np.float32))


# --- fp64 to fewer bits ---


def f64_to_f32(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float64 -> float32, nearest even or toward zero (then finite numbers stay finite); the NaN is 0x7FFFFFFF."""
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    if toward_zero:
        above = np.isfinite(x) & (np.abs(single.astype(np.float64)) > np.abs(x))
        single = (single.view(np.uint32) - above.astype(np.uint32)).view(np.float32)
    return canonical(single)


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    """float64 -> BF16 bits, uint16, nearest even, by way of fp32 rounded to odd."""
    single = f64_to_f32(x, toward_zero=True)
    inexact = single.astype(np.float64) != x
    return f32_to_bf16((single.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32))


def canonical(x: np.ndarray) -> np.ndarray:
    """float32 with every NaN made 0x7FFFFFFF."""
    # A sum of squares is NaN if and only if a term is; it costs less than looking at each.
    if x.ndim == 1 and not np.isnan(np.dot(x, x)):
        return x
    return np.where(np.isnan(x), NAN32, x.view(np.uint32)).view(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 with subnormal numbers made zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# --- arithmetic ---


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 a + b rounded to odd, float64. The error of the sum is exact (Knuth's two-sum); no sum may overflow."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    bits = total.view(np.int64)
    even = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    outward = (error > 0) == (total > 0)  # what is missing points away from zero
    return (bits + np.where(even, np.where(outward, 1, -1), 0)).view(np.float64)


def add32(a: np.ndarray, b: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 a + b, float32, nearest even or toward zero."""
    if toward_zero:
        return f64_to_f32(sum_to_odd(a.astype(np.float64), b.astype(np.float64)), toward_zero=True)
    return canonical(a + b)


def mul32(a: np.ndarray, b: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 a b, float32, nearest even or toward zero."""
    if toward_zero:
        return f64_to_f32(a.astype(np.float64) * b.astype(np.float64), toward_zero=True)
    return canonical(a * b)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 a b + c, float32, rounded once: nearest even or toward zero."""
    with np.errstate(invalid="ignore"):
        return f64_to_f32(sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)), toward_zero)
