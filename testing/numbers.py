"""Floats of 4 to 32 bits in numpy, as the conversions of the PTX ISA (9.7.9, cvt) make them of fp32.

    code = (m + add) >> s      m the significand with its leading bit, s the bits that the format drops, more of subnormals
           nearest even        add = half of the last bit kept, less what a tie to even takes
           stochastic          add = the random bits, at the top of what is dropped

.satfinite: what is above the largest number becomes it. NaN: of E2M1, which has none, the largest number.

The layout of the random bits of cvt.rs among the elements of one instruction is in a figure of the ISA only; instructions.py
says what it takes for it."""

import numpy as np


def to_small(x, bits: tuple[int, int], bias: int, top: int, nan: int, random=None, random_bits: int = 8) -> np.ndarray:
    """fp32 -> uint8 codes of a float of (exponent, mantissa) bits, saturating. random: ints of so many bits, or None:
    nearest."""
    exponent_bits, mantissa = bits
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    a = (u & 0x7FFFFFFF).astype(np.int64)
    exponent = np.maximum(a >> 23, 1)
    significand = np.where(a >> 23 > 0, (a & 0x7FFFFF) | 0x800000, a & 0x7FFFFF)  # value = significand 2^(exponent - 150)
    lowest = 128 - bias  # the fp32 exponent field of the smallest normal number
    dropped = np.minimum(23 - mantissa + np.maximum(lowest - exponent, 0), 40)
    if random is None:
        kept, rest, half = significand >> dropped, significand & ((np.int64(1) << dropped) - 1), np.int64(1) << (dropped - 1)
        kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    else:
        r, n = random.astype(np.int64), random_bits
        add = np.where(dropped >= n, r << np.maximum(dropped - n, 0), r >> np.maximum(n - dropped, 0))
        kept = (significand + add) >> dropped
    code = np.where(exponent >= lowest, (exponent - lowest) << mantissa, 0) + kept  # (kept has the leading bit of normal ones)
    code = np.minimum(code, top) | (u >> 31).astype(np.int64) << (exponent_bits + mantissa)
    return np.where(a > 0x7F800000, nan, code).astype(np.uint8)


def to_e2m1(x, random=None, random_bits: int = 8) -> np.ndarray:
    return to_small(x, (2, 1), 1, 7, 7, random, random_bits)


def to_e4m3(x, random=None, random_bits: int = 16) -> np.ndarray:
    return to_small(x, (4, 3), 7, 0x7E, 0x7F, random, random_bits)


def to_e5m2(x, random=None, random_bits: int = 16) -> np.ndarray:
    return to_small(x, (5, 2), 15, 0x7B, 0x7F, random, random_bits)


def to_ue8m0(x, up: bool) -> np.ndarray:
    """fp32 -> 127 + floor(log2 |x|), or ceil where `up` (.rz, .rp), within 0 ... 254; NaN 255."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32) & 0x7FFFFFFF
    exponent, mantissa = (u >> 23).astype(np.int64), u & 0x7FFFFF
    if up:
        exponent = np.where(exponent > 0, exponent + (mantissa > 0), (mantissa > 0x400000).astype(np.int64))
    return np.where(u > 0x7F800000, 255, np.minimum(exponent, 254)).astype(np.uint8)


def from_e2m1(code) -> np.ndarray:
    value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[code & 7]
    return np.where(code & 8, -value, value)


def from_e4m3(code) -> np.ndarray:
    c = code.astype(np.int64)
    exponent, mantissa = (c >> 3) & 15, c & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    value = np.where(c & 0x7F == 0x7F, np.nan, value)
    return np.where(c & 0x80, -value, value).astype(np.float32)


def from_e5m2(code) -> np.ndarray:
    return (code.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def from_ue8m0(code) -> np.ndarray:
    return np.where(code == 255, np.nan, np.ldexp(np.float32(1), code.astype(np.int32) - 127)).astype(np.float32)


def f32_to_bf16(x, toward_zero: bool = False) -> np.ndarray:
    """fp32 -> the bits of BF16, uint16."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = u if toward_zero else u + (0x7FFF + ((u >> 16) & 1)).astype(np.uint32)
    return np.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded >> 16).astype(np.uint16)


def bf16_to_f32(code) -> np.ndarray:
    return (code.astype(np.uint32) << 16).view(np.float32)


def f32_to_f16(x, toward_zero: bool = False) -> np.ndarray:
    """fp32 -> the bits of FP16, uint16; what is finite and toward zero stays finite."""
    half = x.astype(np.float16)
    u = half.view(np.uint16)
    if toward_zero:
        u = np.where(np.isfinite(x) & (np.abs(half.astype(np.float32)) > np.abs(x)), u - 1, u).astype(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, u).astype(np.uint16)


def fma32(a, b, c) -> np.ndarray:
    """fp32 a b + c, rounded once: the product is exact in fp64, the sum is rounded to odd there, and then to fp32."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64).copy()
    even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits = np.where(even, np.where((error > 0) == (total > 0), bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)
