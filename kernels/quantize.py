"""The quantiser: a matrix [M, K], read once -> codes and scales along K (rows), along M (columns), or both.

    y = hadamard(x) along the side's axis, if it has one        a = max |y| over each block of it
    scale code, enc = scales(a)                                 code = round(fl(y * enc)), saturating

A program takes a tile [BM, BK] as (A, G, W): row r = A g + a, columns 2 w and 2 w + 1, so that a thread holds A rows: then what
goes along M (butterflies, block maxima, pairs of codes) stays in its registers. Pairs along K are the two halves of a word.

Scales, by kind, from a block's amax a (fp32). For `float`, enc is read from a table of what each of the 256 codes makes of a
number, which costs less than a correctly rounded division a block and has the divisions' bits:

    float      code = float(fl(a * f)), or float(fl(fl(a / target) * f)) where `divide`; f = factor[0], the tensor's
    e8m0       code = (bits(a) + add) >> 23, less `less`: every rule is floor or ceil of log2(a / T), T = t 2^k
    fp32       enc = fl(target / a), stored as fl(1 / enc)
    gam        enc = 2^e m, m = factor[0] the tensor's, stored as the code of 2^-e
    tensor     enc = factor[0], line: factor[row] or factor[column]; made elsewhere, since no tile has such a block

Written: codes as pairs, uint8 of 4-bit and int16 of 8-bit codes, [M, K / 2] and [K, M / 2]; scales [M, K / n] and [K, M / n],
[M / n, K / n] of squares, or where `swizzle` in the order of tensor cores: tiles of 128 rows by 4 scales, of which row r,
scale b lies at (r % 32) 16 + (r / 32) 4 + b.

Left out: integers, codebooks, outer scales of rows or of parts of a row.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.numerics import (
    Float,
    Target,
    add_pair,
    bits,
    by_rs,
    encode,
    larger,
    mul_pair,
    pair_of_codes,
    philox,
    sub_pair,
    to_word,
    unpack,
)


class Scale(NamedTuple):
    """How a block's amax becomes a scale; see above. alone: no outer scale, so a block that is not finite says so itself."""

    kind: str  # float, e8m0, fp32, gam, tensor, line
    float: Float | None = None
    alone: bool = False
    target: float = 0.0
    divide: bool = False
    add: int = 0
    less: int = 0
    multiplier: float = 1.0


class Side(NamedTuple):
    """What is made of the tile along one of its axes."""

    element: Float
    block: int  # along the contraction; 0 where the scale is of a line or of the tensor
    square: bool
    scale: Scale
    rounding: str = "nearest"
    random: int = 0  # bits, of "stochastic"
    hadamard: int = 0
    swizzle: bool = False


class Given(NamedTuple):
    """What a side needs beside the tile: fp32 [256], what each code of a scale multiplies elements by; fp32 [1], the scale's
    factor (or [1] or a number for each line, of kinds tensor and line); int64 [5], quant.random.Key.words(); int32 [1], bit i
    set where sign i of the transform is -1."""

    table: Tensor
    factor: Tensor
    words: Tensor
    signs: Tensor


@triton.constexpr_function
def draws(s: Side, t: Target) -> str:
    """What `random_pairs` is to give: "word" for every four elements where cvt.rs takes one; "bytes" in words, where they are
    added to packed halves (`pair_of_codes`); else "ints"."""
    if by_rs(s.element, s.random, t):
        return "word"
    return "bytes" if (t.e2m1 or t.min2) and s.element.name == "e2m1" and s.random == 8 else "ints"


# --- Hadamard ---


@triton.jit
def flip(x, negative):
    """x with its sign turned where `negative` is 1."""
    return (bits(x) ^ (negative << 31)).to(tl.float32, bitcast=True)


@triton.jit
def butterfly_m(lo, hi, H: tl.constexpr, t: tl.constexpr):
    """One stage of stride H along axis 0 of (A, G, W)."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    a, c = tl.split(tl.permute(tl.reshape(lo, (A // (2 * H), 2, H, G * W)), (0, 2, 3, 1)))
    b, d = tl.split(tl.permute(tl.reshape(hi, (A // (2 * H), 2, H, G * W)), (0, 2, 3, 1)))
    p, q = add_pair(a, b, c, d, t.f32x2)
    r, s = sub_pair(a, b, c, d, t.f32x2)
    lo = tl.reshape(tl.permute(tl.join(p, r), (0, 3, 1, 2)), (A, G, W))
    hi = tl.reshape(tl.permute(tl.join(q, s), (0, 3, 1, 2)), (A, G, W))
    return lo, hi


@triton.jit
def butterfly_k(lo, hi, H: tl.constexpr, t: tl.constexpr):
    """One stage of stride 2 H along K: H words."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    a, c = tl.split(tl.permute(tl.reshape(lo, (A * G, W // (2 * H), 2, H)), (0, 1, 3, 2)))
    b, d = tl.split(tl.permute(tl.reshape(hi, (A * G, W // (2 * H), 2, H)), (0, 1, 3, 2)))
    p, q = add_pair(a, b, c, d, t.f32x2)
    r, s = sub_pair(a, b, c, d, t.f32x2)
    lo = tl.reshape(tl.permute(tl.join(p, r), (0, 1, 3, 2)), (A, G, W))
    hi = tl.reshape(tl.permute(tl.join(q, s), (0, 1, 3, 2)), (A, G, W))
    return lo, hi


@triton.jit
def hadamard(lo, hi, signs_ptr, D: tl.constexpr, ALONG_M: tl.constexpr, t: tl.constexpr):
    """(A, G, W) -> words of BF16. signs_ptr: int32, bit i set where sign i is -1."""
    A: tl.constexpr = lo.shape[0]
    W: tl.constexpr = lo.shape[2]
    signs = tl.load(signs_ptr)
    if ALONG_M:
        n = (signs >> (tl.arange(0, A)[:, None, None] % D)) & 1
        lo, hi = flip(lo, n), flip(hi, n)
        if D >= 2:
            lo, hi = butterfly_m(lo, hi, 1, t)
        if D >= 4:
            lo, hi = butterfly_m(lo, hi, 2, t)
        if D >= 8:
            lo, hi = butterfly_m(lo, hi, 4, t)
        if D >= 16:
            lo, hi = butterfly_m(lo, hi, 8, t)
        if D >= 32:
            lo, hi = butterfly_m(lo, hi, 16, t)
    else:
        k = 2 * tl.arange(0, W)[None, None, :] % D
        lo, hi = flip(lo, (signs >> k) & 1), flip(hi, (signs >> (k + 1)) & 1)
        lo, hi = lo + hi, lo - hi
        if D >= 4:
            lo, hi = butterfly_k(lo, hi, 1, t)
        if D >= 8:
            lo, hi = butterfly_k(lo, hi, 2, t)
        if D >= 16:
            lo, hi = butterfly_k(lo, hi, 4, t)
        if D >= 32:
            lo, hi = butterfly_k(lo, hi, 8, t)
    root = tl.full(lo.shape, D**-0.5, tl.float32)
    lo, hi = mul_pair(lo, hi, root, root, t.f32x2)
    return to_word(lo, hi, t.f32x2)


# --- scales ---


@triton.jit
def scale_of(a, table_ptr, factor_ptr, scale: tl.constexpr, t: tl.constexpr):
    """Bits of the amax of blocks -> what is stored (uint8, or fp32), and what elements are multiplied by (fp32)."""
    amax = a.to(tl.float32, bitcast=True)
    if scale.kind == "float":
        s = tl.div_rn(amax, tl.full(amax.shape, scale.target, tl.float32)) if scale.divide else amax
        s = s * tl.load(factor_ptr)
        if scale.alone:
            s = tl.where(a < 0x7F800000, s, float("nan"))
        if scale.float.name == "e4m3" and t.fp8:
            code = s.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        else:
            code = encode(s, 0, scale.float, "nearest", 0)
        return code.to(tl.uint8), tl.load(table_ptr + code)
    elif scale.kind == "e8m0":
        code = tl.minimum(tl.maximum(((a + scale.add) >> 23) - scale.less, 0), 254)
        enc = tl.where(code == 254, 1 << 22, (254 - code) << 23)  # 2^-127 is subnormal
        enc = tl.where(a > 0x7F7FFFFF, 0x7FC00000, enc).to(tl.float32, bitcast=True)
        return tl.where(a > 0x7F7FFFFF, 255, code).to(tl.uint8), enc * scale.multiplier if scale.multiplier != 1 else enc
    elif scale.kind == "fp32":
        s = tl.minimum(tl.div_rn(tl.full(amax.shape, scale.target, tl.float32), amax), 3.4028234663852886e38)
        s = tl.where(a < 0x7F800000, tl.where(a == 0, 1.0, s), float("nan"))
        return tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s), s
    else:
        s = bits(tl.minimum(tl.div_rn(tl.full(amax.shape, scale.target, tl.float32), amax), 3.4028234663852886e38))
        whole = tl.load(factor_ptr)
        p = (s & 0x7F800000) - tl.where((bits(whole) & 0x7FFFFF) > (s & 0x7FFFFF), 1 << 23, 0)
        enc = tl.where(whole == whole, p.to(tl.float32, bitcast=True) * whole, float("nan"))
        return tl.where(whole == whole, 254 - (p >> 23), 255).to(tl.uint8), enc


@triton.jit
def place(row, b, scales, SWIZZLE: tl.constexpr):
    """Where the scale of block b of a row lies, of so many in a row."""
    if SWIZZLE:
        tiles = (scales + 3) // 4
        return ((row // 128) * tiles + b // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + b % 4
    else:
        return row * scales + b


# --- random ---


@triton.jit
def twice(word, shape: tl.constexpr):
    """Four words in (..., 2, 2) -> (..., 8), each one two times."""
    word = tl.reshape(word, shape + (4, 1))
    return tl.reshape(tl.broadcast_to(word, shape + (4, 2)), shape + (8,))


@triton.jit
def random_pairs(number, words_ptr, N: tl.constexpr, KIND: tl.constexpr):
    """number: of the first element of 16 (N <= 8) or of 4 (N = 24) along the last axis, (...) -> "ints" of N bits for the two
    elements of each pair of these, (..., 8) or (..., 2); "bytes": the word that has both, and which they are; "word": that of
    two pairs, (..., 4), twice."""
    index, layer, use = tl.load(words_ptr), tl.load(words_ptr + 1), tl.load(words_ptr + 2)
    low, high = tl.load(words_ptr + 3), tl.load(words_ptr + 4)
    c = (number // (16 if N <= 8 else 4)).to(tl.uint32)
    a, b, c, d = philox(c, index.to(tl.uint32), layer.to(tl.uint32), use.to(tl.uint32), low, high)
    if N > 8:
        return (tl.join(a, c) >> (32 - N)).to(tl.int32), (tl.join(b, d) >> (32 - N)).to(tl.int32)
    else:
        word = tl.join(tl.join(a, c), tl.join(b, d))  # (..., n / 2, n % 2) is word n
        odd = tl.arange(0, 8) & 1
        for _ in tl.static_range(len(number.shape)):
            odd = tl.expand_dims(odd, 0)
        if KIND == "word":
            word = tl.reshape(word, number.shape + (4,)).to(tl.int32, bitcast=True)
            return word, word
        elif KIND == "bytes":
            word = twice(word, number.shape)
            return word.to(tl.int32, bitcast=True), tl.broadcast_to(tl.where(odd > 0, 0x4342, 0x4140), word.shape)
        else:
            word = twice(word, number.shape)
            word = word >> (odd * 16).to(tl.uint32)
            return ((word >> (8 - N)) & ((1 << N) - 1)).to(tl.int32), ((word >> (16 - N)) & ((1 << N) - 1)).to(tl.int32)


# --- blocks ---


@triton.jit
def largest(x, axis: tl.constexpr, WORDS: tl.constexpr, t: tl.constexpr):
    """Along an axis: of words of two BF16, both halves of each; else of bits of magnitudes."""
    if WORDS and t.max2:
        return tl.reduce(x, axis, larger)
    elif WORDS:
        return tl.max(x & 0x7FFF, axis) | tl.max(x & 0x7FFF0000, axis)
    else:
        return tl.max(x, axis)


@triton.jit
def block_max_k(word, lo, hi, WORDS: tl.constexpr, n: tl.constexpr, t: tl.constexpr):
    """(A, G, W) -> bits of the largest magnitudes of n neighbours along K, (A, G, BK / n). From words if WORDS, else lo, hi."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    if WORDS:
        blocks = tl.reshape(word, (A, G, 2 * W // n, n // 2))
        a, b = unpack(largest(blocks, 3, True, t) & 0x7FFF7FFF)
        return tl.maximum(bits(a), bits(b))
    else:
        return tl.max(tl.reshape(tl.maximum(bits(lo) & 0x7FFFFFFF, bits(hi) & 0x7FFFFFFF), (A, G, 2 * W // n, n // 2)), 3)


@triton.jit
def fold_m(x, n: tl.constexpr, WORDS: tl.constexpr, t: tl.constexpr):
    """(A, G, W) -> (BM / n, W): the largest of n neighbours along M."""
    A: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    if n <= A:
        x = largest(tl.reshape(x, (A // n, n, G, W)), 1, WORDS, t)
        return tl.reshape(tl.permute(x, (1, 0, 2)), (A * G // n, W))
    else:
        return largest(tl.reshape(largest(x, 0, WORDS, t), (A * G // n, n // A, W)), 1, WORDS, t)


@triton.jit
def spread_m(x, n: tl.constexpr, A: tl.constexpr, G: tl.constexpr):
    """(BM / n, W) -> (A, G, W), the inverse of `fold_m`."""
    W: tl.constexpr = x.shape[1]
    if n <= A:
        x = tl.permute(tl.reshape(x, (G, A // n, W)), (1, 0, 2))
        return tl.reshape(tl.broadcast_to(x[:, None], (A // n, n, G, W)), (A, G, W))
    else:
        x = tl.reshape(tl.broadcast_to(x[:, None], (A * G // n, n // A, W)), (G, W))
        return tl.broadcast_to(x[None], (A, G, W))


@triton.jit
def pairs_m(x):
    """(A, G, W) -> the even and the odd rows, (G, W, A / 2)."""
    A: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    return tl.split(tl.permute(tl.reshape(x, (A // 2, 2, G, W)), (2, 3, 0, 1)))


@triton.jit
def block_max_m(word, lo, hi, WORDS: tl.constexpr, n: tl.constexpr, t: tl.constexpr):
    """(A, G, W) -> bits of the largest magnitudes of n neighbours along M, of even and of odd columns, (BM / n, W)."""
    if WORDS:
        a, b = unpack(fold_m(word, n, True, t) & 0x7FFF7FFF)
        return bits(a), bits(b)
    else:
        return fold_m(bits(lo) & 0x7FFFFFFF, n, False, t), fold_m(bits(hi) & 0x7FFFFFFF, n, False, t)


# --- the two sides of a tile ---


@triton.jit
def load_tile(
    x_ptr, m0, k0, M, K,
    WORDS: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """-> fp32 lo, hi and the words they are of, (A, G, W); 0 outside of the matrix."""
    start = m0.to(tl.int64) * K + k0
    r = tl.arange(0, G)[None, :, None, None] * A + tl.arange(0, A)[:, None, None, None]  # (A, G, 1, 1)
    if WORDS:
        w = tl.arange(0, W // V)[None, None, :, None] * V + tl.arange(0, V)[None, None, None, :]
        at = x_ptr + start // 2 + r * (K // 2) + w
        word = tl.load(at) if EVEN else tl.load(at, mask=(m0 + r < M) & (k0 + 2 * w < K), other=0)  # (A, G, W / V, V)
        word = tl.reshape(word, (A, G, W))
        lo, hi = unpack(word)
    else:
        k = tl.arange(0, W // 2)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
        at = x_ptr + start + r * K + k
        x = tl.load(at) if EVEN else tl.load(at, mask=(m0 + r < M) & (k0 + k < K), other=0.0)  # (A, G, W / 2, 4)
        lo, hi = tl.split(tl.reshape(x, (A, G, W, 2)))
        word = bits(lo)
    return lo, hi, word


@triton.jit
def row_factors(
    lo, hi, word, scales_ptr, table_ptr, factor_ptr, m0, k0, M, K,
    s: tl.constexpr, t: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes the scales of blocks along K; -> what each pair is to be multiplied by, (A, G, W)."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    n: tl.constexpr = s.block
    r = m0 + tl.arange(0, G)[None, :, None] * A + tl.arange(0, A)[:, None, None]  # (A, G, 1)
    if s.scale.kind == "tensor":
        return tl.broadcast_to(tl.load(factor_ptr + tl.zeros((1, 1, 1), tl.int32)), (A, G, W))
    elif s.scale.kind == "line":
        return tl.broadcast_to(tl.load(factor_ptr + r, mask=r < M, other=0.0), (A, G, W))
    else:
        B: tl.constexpr = 2 * W // n
        a = block_max_k(word, lo, hi, WORDS, n, t)  # (A, G, B)
        b = k0 // n + tl.arange(0, B)
        if s.square:
            code, enc = scale_of(fold_m(a, n, False, t), table_ptr, factor_ptr, s.scale, t)  # (BM / n, B)
            block = m0 // n + tl.arange(0, A * G // n)[:, None]
            tl.store(scales_ptr + block * (K // n) + b[None, :], code,
                     mask=None if EVEN else (block < M // n) & (b[None, :] < K // n))  # fmt: skip
            enc = spread_m(enc, n, A, G)  # (A, G, B)
        else:
            code, enc = scale_of(a, table_ptr, factor_ptr, s.scale, t)
            b = b[None, None, :]
            tl.store(scales_ptr + place(r, b, K // n, s.swizzle), code,
                     mask=None if EVEN else (r < M) & (b < K // n))  # fmt: skip
        return tl.reshape(tl.broadcast_to(enc[:, :, :, None], (A, G, B, n // 2)), (A, G, W))


@triton.jit
def store_rows(
    lo, hi, e, codes_ptr, words_ptr, m0, k0, M, K, s: tl.constexpr, t: tl.constexpr, EVEN: tl.constexpr, V: tl.constexpr
):
    """Writes the codes of pairs along K, multiplied by e (A, G, W)."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    r = tl.arange(0, G)[None, :, None] * A + tl.arange(0, A)[:, None, None]  # (A, G, 1)
    ra, rb = 0, 0
    if s.random > 0:
        C: tl.constexpr = 16 if s.random <= 8 else 4
        number = (m0 + r) * K + k0 + tl.arange(0, 2 * W // C)[None, None, :] * C  # (A, G, BK / C)
        ra, rb = random_pairs(number, words_ptr, s.random, draws(s, t))
        P: tl.constexpr = 2 if draws(s, t) == "word" else 1  # pairs that one of them serves
        ra, rb = tl.reshape(ra, (A, G, W // P)), tl.reshape(rb, (A, G, W // P))
    out = pair_of_codes(lo, hi, e, ra, rb, s.element, s.rounding, s.random, t)
    r = r[:, :, :, None]
    w = tl.arange(0, W // V)[None, None, :, None] * V + tl.arange(0, V)[None, None, None, :]
    at = codes_ptr + (m0.to(tl.int64) * K + k0) // 2 + r * (K // 2) + w
    tl.store(at, tl.reshape(out, (A, G, W // V, V)), mask=None if EVEN else (m0 + r < M) & (k0 + 2 * w < K))


@triton.jit
def column_factors(
    lo, hi, word, scales_ptr, table_ptr, factor_ptr, m0, k0, M, K,
    s: tl.constexpr, t: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes the scales of blocks along M; -> what even and odd columns are to be multiplied by, (A, G, W)."""
    A: tl.constexpr = lo.shape[0]
    G: tl.constexpr = lo.shape[1]
    W: tl.constexpr = lo.shape[2]
    n: tl.constexpr = s.block
    k = k0 + 2 * tl.arange(0, W)[None, :]
    if s.scale.kind == "tensor":
        e = tl.broadcast_to(tl.load(factor_ptr + tl.zeros((1, 1, 1), tl.int32)), (A, G, W))
        return e, e
    elif s.scale.kind == "line":
        e, d = tl.load(factor_ptr + k, mask=k < K, other=0.0), tl.load(factor_ptr + k + 1, mask=k < K, other=0.0)
        return tl.broadcast_to(e[None], (A, G, W)), tl.broadcast_to(d[None], (A, G, W))
    else:
        a, b = block_max_m(word, lo, hi, WORDS, n, t)  # (BM / n, W)
        block = m0 // n + tl.arange(0, A * G // n)[:, None]
        there = None if EVEN else (block < M // n) & (k < K)
        code, e = scale_of(a, table_ptr, factor_ptr, s.scale, t)
        tl.store(scales_ptr + place(k, block, M // n, s.swizzle), code, mask=there)
        code, d = scale_of(b, table_ptr, factor_ptr, s.scale, t)
        tl.store(scales_ptr + place(k + 1, block, M // n, s.swizzle), code, mask=there)
        return spread_m(e, n, A, G), spread_m(d, n, A, G)


@triton.jit
def store_columns(p, e, k, codes_ptr, words_ptr, m0, M, K, s: tl.constexpr, t: tl.constexpr, EVEN: tl.constexpr):
    """Writes the codes of p (A, G, W), the columns k (1, W), multiplied by e."""
    A: tl.constexpr = p.shape[0]
    G: tl.constexpr = p.shape[1]
    W: tl.constexpr = p.shape[2]
    ra, rb = 0, 0
    if s.random > 0:
        C: tl.constexpr = 16 if s.random <= 8 else 4
        number = k * M + m0 + tl.arange(0, A * G // C)[:, None] * C  # (BM / C, W)
        ra, rb = random_pairs(number, words_ptr, s.random, draws(s, t))  # (BM / C, W, C / 2 or C / 4)
        P: tl.constexpr = 4 if draws(s, t) == "word" else 2  # elements that one of them serves
        ra = tl.reshape(tl.permute(tl.reshape(ra, (G, A // C, W, C // P)), (0, 2, 1, 3)), (G, W, A // P))
        rb = tl.reshape(tl.permute(tl.reshape(rb, (G, A // C, W, C // P)), (0, 2, 1, 3)), (G, W, A // P))
    a, b = pairs_m(p)
    e, _ = pairs_m(e)
    out = pair_of_codes(a, b, e, ra, rb, s.element, s.rounding, s.random, t)  # (G, W, A / 2)
    m = m0 // 2 + tl.arange(0, G)[:, None, None] * (A // 2) + tl.arange(0, A // 2)[None, None, :]
    k = k[:, :, None]
    tl.store(codes_ptr + k.to(tl.int64) * (M // 2) + m, out, mask=None if EVEN else (m < M // 2) & (k < K))


@triton.jit
def quantize_kernel(
    x_ptr,
    row_codes_ptr, row_scales_ptr, row_table_ptr, row_factor_ptr, row_words_ptr, row_signs_ptr,
    col_codes_ptr, col_scales_ptr, col_table_ptr, col_factor_ptr, col_words_ptr, col_signs_ptr,
    M, K,
    rows: tl.constexpr, cols: tl.constexpr, t: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """x: BF16 as int32 words [M, K / 2] where WORDS, else fp32 [M, K]. EVEN: tiles cover it without rest. V: words of a row
    that a thread has next to each other."""
    m0, k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    x, y, z = load_tile(x_ptr, m0, k0, M, K, WORDS, EVEN, A, BM // A, BK // 2, V)
    e = None
    if rows is None and cols.square:  # (squares have their scales along rows)
        e = row_factors(x, y, z, col_scales_ptr, col_table_ptr, col_factor_ptr, m0, k0, M, K, cols, t, WORDS, EVEN)
    if rows is not None:
        lo, hi, word = x, y, z
        if rows.hadamard:
            word = hadamard(lo, hi, row_signs_ptr, rows.hadamard, False, t)
            lo, hi = unpack(word)
        e = row_factors(lo, hi, word, row_scales_ptr, row_table_ptr, row_factor_ptr, m0, k0, M, K,
                        rows, t, WORDS or rows.hadamard > 0, EVEN)  # fmt: skip
        store_rows(lo, hi, e, row_codes_ptr, row_words_ptr, m0, k0, M, K, rows, t, EVEN, V)
    if cols is not None:
        lo, hi, word = x, y, z
        if AGAIN:  # read the tile from the cache: kept, it would take 64 registers a thread that random bits need
            tl.debug_barrier()
            lo, hi, word = load_tile(x_ptr, m0, k0, M, K, WORDS, EVEN, A, BM // A, BK // 2, V)
        if cols.hadamard:
            word = hadamard(lo, hi, col_signs_ptr, cols.hadamard, True, t)
            lo, hi = unpack(word)
        d = e
        if not cols.square:
            e, d = column_factors(lo, hi, word, col_scales_ptr, col_table_ptr, col_factor_ptr, m0, k0, M, K,
                                  cols, t, WORDS or cols.hadamard > 0, EVEN)  # fmt: skip
        k = k0 + 2 * tl.arange(0, BK // 2)[None, :]
        store_columns(lo, e, k, col_codes_ptr, col_words_ptr, m0, M, K, cols, t, EVEN)
        store_columns(hi, d, k + 1, col_codes_ptr, col_words_ptr, m0, M, K, cols, t, EVEN)


# --- the host ---


class Tile(NamedTuple):
    """How a kernel cuts its matrix; see above. again: the columns read the tile anew."""

    A: int
    BM: int
    BK: int
    V: int
    warps: int
    again: bool = False


def quick(side: Side, t: Target) -> bool:
    """Whether few instructions make the codes (`pair_of_codes`), so that a thread has registers for more of them."""
    if by_rs(side.element, side.random, t):
        return True
    if side.element.name == "e2m1":
        return (t.e2m1 or t.min2) and (side.rounding == "nearest" or side.random == 8)
    return t.fp8 and side.rounding == "nearest" and side.element.name in ("e4m3", "e5m2")


@functools.lru_cache
def tile(M: int, K: int, rows: Side | None, cols: Side | None, t: Target) -> Tile:
    """The one with the fewest instructions of those that spill no register (docs/kernels.md), or what the interpreter likes."""
    sides = [side for side in (rows, cols) if side]
    large = max(side.block for side in sides) > 64
    wide = max(side.hadamard for side in sides) > 16
    A, BM, random = 32 if wide else 16, 128 if large else 64, all(side.random for side in sides)
    if triton.knobs.runtime.interpret:
        return interpreted(M, K, A)
    fours = all(side.element.name == "e2m1" for side in sides)
    if not (t.f32x2 or fours) or not all(quick(side, t) for side in sides):
        return Tile(A, BM, 128, 1 if wide else 2, BM // 16, again=True)
    slim = all(side.block == 32 and not side.hadamard and not side.random for side in sides)  # (16 elements share a draw)
    if t.f32x2 and slim:
        return Tile(8, 64, 128, 8, 2)
    return Tile(A, BM, 128, 2 if wide else 4, BM // 32, again=random or large or not t.f32x2)


def interpreted(M: int, K: int, A: int) -> Tile:
    """As few programs as may be: each takes the interpreter as long as a thousand elements."""
    BM, BK = (max(128, min(256, triton.next_power_of_2(size))) for size in (M, K))
    return Tile(A, BM, BK, 2, 4)


def quantize(
    x: Tensor, rows: Side | None, row_given: Given | None, cols: Side | None, col_given: Given | None, t: Target
) -> list[tuple[Tensor, Tensor] | None]:
    """x [M, K], BF16 or fp32, contiguous -> (codes, scales) of each side, or None. Codes of rows uint8 [M, K / 2] or [M, K], of
    columns [K, M / 2] or [K, M]; scales uint8 or fp32, [M, K / n] and [K, M / n], [M / n, K / n] of squares on both
    sides, empty where they are of a line or of the tensor; or, swizzled, uint8 [tiles, 512].

    Both sides must divide: K by the block of rows, M by that of columns, both by those of squares."""
    M, K = x.shape
    WORDS, cut = x.dtype == torch.bfloat16, tile(M, K, rows, cols, t)
    made = [_outputs(M, K, rows, x.device), _outputs(K, M, cols, x.device)]
    if cols and cols.square:  # scales as they lie along rows, once
        made[1] = made[1][0], (made[0] or _outputs(M, K, cols, x.device))[1]
    given = [g or _nothing(x.device) for g in (row_given, col_given)]
    sides = [(*(out or (g.signs, g.signs)), *g) for out, g in zip(made, given, strict=True)]
    grid = triton.cdiv(M, cut.BM), triton.cdiv(K, cut.BK)
    quantize_kernel[grid](
        x.view(torch.int32) if WORDS else x, *sides[0], *sides[1], M, K, rows, cols, t, WORDS,
        M % cut.BM == 0 and K % cut.BK == 0, cut.A, cut.BM, cut.BK, cut.V, cut.again,
        num_warps=cut.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return [out and (out[0].view(torch.uint8), out[1]) for out in made]


def _outputs(R: int, K: int, side: Side | None, device) -> tuple[Tensor, Tensor] | None:
    """Codes in pairs and scales of an operand [R, K]."""
    if side is None:
        return None
    codes = torch.empty(R, K // 2, dtype=torch.uint8 if side.element.bits <= 4 else torch.int16, device=device)
    dtype = torch.float32 if side.scale.kind == "fp32" else torch.uint8
    if not side.block:
        shape = (0,)
    elif side.swizzle:
        shape = (triton.cdiv(R, 128) * triton.cdiv(K // side.block, 4), 512)
    else:
        shape = (R // side.block if side.square else R, K // side.block)
    return codes, (torch.zeros if side.swizzle else torch.empty)(shape, dtype=dtype, device=device)


_none: dict[str, Given] = {}


def _nothing(device) -> Given:
    """What stands for a side that is not there."""
    if str(device) not in _none:
        dtypes = torch.float32, torch.float32, torch.int64, torch.int32
        _none[str(device)] = Given(*(torch.zeros(5, dtype=dtype, device=device) for dtype in dtypes))
    return _none[str(device)]
