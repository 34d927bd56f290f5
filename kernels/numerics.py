"""Numbers in kernels: codes of small floats, scales, random bits, each in exact integer arithmetic; and, where a GPU has an
instruction that gives the same bits, that instruction.

A format is a few numbers (`Float`): E exponent and M mantissa bits, e0 the fp32 exponent field of its smallest normal number,
the largest code, the code of NaN, whether it has a sign.

    codes      a fp32 number p is the bits of |p|, u. Normal:     code = (u + add) >> (23 - M), less (e0 - 1) << M
               below 2^(e0 - 127):                                code = (q + add) >> 24,  q = floor(|p| 2^24 / unit)
               where `add` is what rounding is: nearest even      half - 1 + (the last bit kept)
                                                away, inward      half, half - 1        zero     0
                                                stochastic, N     a random number of N bits, at the top of what is dropped
               q has all bits of |p| where |p| is at least half a unit, and below that only `stochastic` can round up, which
               compares floors.
    random     Philox4x32-10 at the counters of quant/random.py: 16 bytes serve 16 elements
    cvt.rs     an instruction of sm_100a and sm_103a: four codes, of four numbers and a 32-bit word. Which bits serve which
               number is published nowhere: a code is one of the two next to the number, about as often the upper one as it
               should be, and no more is known. So it is taken by name only (`Target.rs`), and nowhere called exact
    Hadamard   butterflies of strides 1, 2, 4, ... in fp32, sum above difference, times d^-1/2, rounded to BF16

No multiply-add is fused (all kernels are compiled with enable_fp_fusion=False) and divisions are div_rn, so a reference in
torch, the interpreter and every GPU give the same bits. Pairs: two neighbours of a matrix [M, K] along K travel as (lo, hi),
the halves of a 32-bit word where the matrix is BF16.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Float(NamedTuple):
    """A small float. lowest: the fp32 exponent field of its smallest normal number; top: its largest code; nan: of NaN;
    parts: 2^24 / unit of the smallest, by which `encode` turns subnormal numbers into integers."""

    name: str
    bits: int
    exponent: int
    mantissa: int
    lowest: int
    top: int
    nan: int
    signed: bool
    parts: float


# Those that products have (kernels/matmul.py), which knows them by name.
FLOATS = {
    "e2m1": Float("e2m1", 4, 2, 1, 127, 7, 7, True, 2.0**25),
    "e4m3": Float("e4m3", 8, 4, 3, 121, 0x7E, 0x7F, True, 2.0**33),
    "e5m2": Float("e5m2", 8, 5, 2, 113, 0x7B, 0x7F, True, 2.0**40),
    "e8m0": Float("e8m0", 8, 8, 0, 1, 254, 255, False, 2.0**150),
}


class Target(NamedTuple):
    """What the GPU has: f32x2 arithmetic, cvt to e2m1x2, cvt to e4m3x2 and e5m2x2 that rounds right, max of bf16x2, min of
    f16x2. rs: cvt.rs is to round stochastically (8 bits) in place of exact arithmetic."""

    f32x2: bool = False
    e2m1: bool = False
    fp8: bool = False
    max2: bool = False
    min2: bool = False
    rs: bool = False


# --- pairs: two fp32 numbers at a time (f32x2: sm_100 and later) ---


@triton.jit
def add_pair(a, b, c, d, F32X2: tl.constexpr):
    """(a, b) + (c, d)"""
    if F32X2:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 x, y; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; add.rn.f32x2 x, x, y; mov.b64 {$0, $1}, x; }",
            "=f,=f,f,f,f,f", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)  # fmt: skip
    else:
        return a + c, b + d


@triton.jit
def sub_pair(a, b, c, d, F32X2: tl.constexpr):
    """(a, b) - (c, d)"""
    if F32X2:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 x, y; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; sub.rn.f32x2 x, x, y; mov.b64 {$0, $1}, x; }",
            "=f,=f,f,f,f,f", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)  # fmt: skip
    else:
        return a - c, b - d


@triton.jit
def mul_pair(a, b, c, d, F32X2: tl.constexpr):
    """(a, b) * (c, d)"""
    if F32X2:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 x, y; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; mul.rn.f32x2 x, x, y; mov.b64 {$0, $1}, x; }",
            "=f,=f,f,f,f,f", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)  # fmt: skip
    else:
        return a * c, b * d


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def unpack(word):
    """A word of two BF16 -> fp32 (lo, hi)."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """fp32 -> the bits of BF16, nearest even, in the upper half of an int32; NaN stays one."""
    u = bits(x)
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, u + 0x7FFF + ((u >> 16) & 1)) & -65536


@triton.jit
def to_word(lo, hi, CVT: tl.constexpr):
    """fp32 (lo, hi) -> a word of two BF16, nearest even."""
    if CVT:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [lo, hi], dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        return bf16_bits(hi) | ((bf16_bits(lo) >> 16) & 0xFFFF)


# --- codes ---

# $5 {$4, $3, $2, $1}: the word and the four numbers, the last one in the upper bits of the result.
RS = {
    "e2m1": "{ .reg .b16 h; cvt.rs.satfinite.e2m1x4.f32 h, {$4, $3, $2, $1}, $5; cvt.u32.u16 $0, h; }",
    "e4m3": "cvt.rs.satfinite.e4m3x4.f32 $0, {$4, $3, $2, $1}, $5;",
    "e5m2": "cvt.rs.satfinite.e5m2x4.f32 $0, {$4, $3, $2, $1}, $5;",
}  # fmt: skip


@triton.constexpr_function
def by_rs(f: Float, N: int, t: Target) -> bool:
    """Whether cvt.rs makes codes that are rounded with N random bits."""
    return t.rs and N == 8 and f.name in RS


@triton.constexpr_function
def rs_text(f: Float) -> str:
    return RS[f.name]


@triton.jit
def fours_of_codes(a, b, word, f: tl.constexpr):
    """fp32 a and b, neighbours, (..., n), and a random word for two of these pairs, (..., n / 2) -> as `pair_of_codes`."""
    shape: tl.constexpr = word.shape + (2,)
    TEXT: tl.constexpr = rs_text(f)
    p, r = tl.split(tl.reshape(a, shape))
    q, s = tl.split(tl.reshape(b, shape))
    four = tl.inline_asm_elementwise(TEXT, "=r,f,f,f,f,r", [p, q, r, s, word], dtype=tl.int32, is_pure=True, pack=1)
    if f.bits <= 4:
        return tl.reshape(tl.join(four.to(tl.uint8), (four >> 8).to(tl.uint8)), a.shape)
    else:
        return tl.reshape(tl.join(four.to(tl.int16), (four >> 16).to(tl.int16)), a.shape)


@triton.jit
def encode(p, rand, f: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr):
    """fp32 p -> codes of a small float, int32; saturates. rand: ints of N bits where ROUNDING is "stochastic"."""
    E: tl.constexpr = f.exponent
    M: tl.constexpr = f.mantissa
    E0: tl.constexpr = f.lowest
    S: tl.constexpr = 23 - M
    u = bits(p)
    a = u & 0x7FFFFFFF
    q = (tl.abs(p) * f.parts).to(tl.int32)
    if ROUNDING == "nearest":
        normal, small = a + ((1 << (S - 1)) - 1) + ((a >> S) & 1), q + 0x7FFFFF + ((q >> 24) & 1)
    elif ROUNDING == "away":
        normal, small = a + (1 << (S - 1)), q + 0x800000
    elif ROUNDING == "inward":
        normal, small = a + ((1 << (S - 1)) - 1), q + 0x7FFFFF
    elif ROUNDING == "zero":
        normal, small = a, q
    else:
        small = q + (rand << (24 - N))
        if N <= S:
            normal = a + (rand << (S - N))
        else:
            normal = a + (rand >> (N - S))
    code = tl.where(a < (E0 << 23), small >> 24, (normal >> S) - ((E0 - 1) << M))
    code = tl.minimum(code, f.top)
    if f.signed:
        code = code | ((u >> (31 - E - M)) & (1 << (E + M)))
    return tl.where(a > 0x7F800000, f.nan, code)


@triton.constexpr_function
def float_named(f):
    """A Float, given itself or the name of one of FLOATS."""
    return FLOATS[f] if isinstance(f, str) else Float(*f)


@triton.jit
def decode(code, f: tl.constexpr):
    """Codes of a small float (of four bits: in the lower four) or of e8m0 -> fp32, exactly. f: a Float, or the name of one of
    FLOATS. Exponent and mantissa are those of fp32 but for the bias, of subnormal numbers too: a product puts it right."""
    g: tl.constexpr = float_named(f)
    c = code.to(tl.int32)
    if g.name == "e8m0":
        value = tl.where(c == 0, 1 << 22, c << 23).to(tl.float32, bitcast=True)
        return tl.where(c == 255, float("nan"), value)
    else:
        N: tl.constexpr = g.exponent + g.mantissa
        magnitude = c & ((1 << N) - 1)
        u = magnitude << (23 - g.mantissa)
        if g.signed:
            u = u | ((c << (31 - N)) & -2147483648)
        value = u.to(tl.float32, bitcast=True) * 2.0 ** (g.lowest - 1 if g.lowest < 129 else 127)
        if g.lowest > 128:
            value = value * 2.0 ** (g.lowest - 128)
        INFINITE: tl.constexpr = g.nan > g.top and (g.top + 1) % (1 << g.mantissa) == 0  # (as in IEEE: one Inf, then NaN)
        if INFINITE:
            value = tl.where(magnitude == g.top + 1, value * float("inf"), value)
        if g.nan > g.top:
            value = tl.where(magnitude > g.top + INFINITE, float("nan"), value)
        return value


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Counter words c0 ... c3 (uint32), key words k0, k1 (int64 of 32 bits) -> four uint32 words (Salmon et al., SC 2011)."""
    for i in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ (k0 + i * 0x9E3779B9).to(tl.uint32), b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ (k1 + i * 0xBB67AE85).to(tl.uint32), a.to(tl.uint32)
    return c0, c1, c2, c3


def _halves(round_: str, names: int) -> tl.constexpr:
    """Inline PTX: codes of E2M1 of four pairs, 2^-14 times numbers, $1 to $4 and $5 to $8, in packed halves.

    2^-14 times a number, the smallest normal number of E2M1 is that of fp16, so its code is bits 9 to 11 of the half, of
    subnormal numbers too. Truncated to halves and clamped to 6 (NaN too), they are rounded by adding what `round_` adds below
    bit 9 to m: of half h, $a and $b the two numbers, $c ... further operands."""
    pairs = []
    for i in range(4):
        given = {letter: f"${1 + 4 * j + i}" for j, letter in enumerate("abcd"[:names])}
        text = f"cvt.rz.f16x2.f32 h, $b, $a; and.b32 m, h, 0x7FFF7FFF; min.f16x2 m, m, six; {round_} "
        text += f"and.b32 m, m, 0x0E000E00; and.b32 h, h, 0x80008000; or.b32 c{i}, m, h;"
        for letter, name in given.items():
            text = text.replace(f"${letter}", name)
        pairs.append(text)
    gather = (  # bytes 1 and 3 of each pair, sign at bit 7 and code at bit 1, to nibbles
        "prmt.b32 c0, c0, c1, 0x7351; prmt.b32 c2, c2, c3, 0x7351; prmt.b32 c1, c0, c2, 0x5410; prmt.b32 c3, c0, c2, 0x7632; "
        "shr.b32 m, c1, 1; and.b32 m, m, 0x07070707; shr.b32 h, c1, 4; and.b32 h, h, 0x08080808; or.b32 m, m, h; "
        "shl.b32 h, c3, 3; and.b32 h, h, 0x70707070; or.b32 m, m, h; and.b32 h, c3, 0x80808080; or.b32 $0, m, h;"
    )
    registers = ".reg .b32 c<4>, h, l, m, s, one, six; mov.b32 one, 0x00010001; mov.b32 six, 0x0E000E00;"
    return tl.constexpr(f"{{ {registers} {' '.join(pairs)} {gather} }}")


# Nearest even: half a unit less one, and one if the last bit kept is 1 or any bit is set below those that a half has. Only at
# halves of units does that count, where the halves have the upper 8 bits of the significand: of the lower 15, bits 0 to 14,
# the smaller of them, as a half, and the smallest half is 1 or 0.
NEAREST_HALVES: tl.constexpr = _halves(
    "prmt.b32 s, $a, $b, 0x5410; and.b32 s, s, 0x7FFF7FFF; min.f16x2 s, s, one; shr.b32 l, m, 9; "
    "and.b32 l, l, 0x00010001; or.b32 s, s, l; add.u32 m, m, 0x00FF00FF; add.u32 m, m, s;",
    2,
)
# Stochastic, 8 bits: the random bytes $d of word $c, at bits 1 to 8.
DITHERED_HALVES: tl.constexpr = _halves("prmt.b32 s, $c, 0, $d; mad.lo.u32 m, s, 2, m;", 4)


@triton.jit
def pair_of_codes(a, b, e, ra, rb, f: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr, t: tl.constexpr):
    """fp32 a and b, neighbours along the contraction, and what both are multiplied by -> their codes, a in the lower bits:
    uint8 of 4-bit codes, else int16. ra, rb: random ints for "stochastic", as `random_pairs` gives them."""
    a, b = mul_pair(a, b, e, e, t.f32x2)
    if ROUNDING == "stochastic" and by_rs(f, N, t):
        return fours_of_codes(a, b, ra, f)
    elif ROUNDING == "stochastic" and N == 8 and f.name == "e2m1" and t.e2m1:
        # 2^-14 times a number, its smallest normal is that of fp16, so a code of E2M1 is bits 9 to 11, everywhere: truncate to
        # fp16, add 2 r (8 bits below bit 9 and one to spare), cut at bit 9, and convert what is a number of E2M1 now.
        small = tl.full(a.shape, 2.0**-14, tl.float32)
        a, b = mul_pair(a, b, small, small, t.f32x2)
        back = tl.where(e == e, 0x74007400, 0x7FFF7FFF)  # two of fp16 2^14, or NaN, which the sum may have lost
        return tl.inline_asm_elementwise(
            "{ .reg .b8 c<4>; .reg .b32 h, r; "
            "cvt.rz.f16x2.f32 h, $5, $1; prmt.b32 r, $9, 0, $13; mad.lo.u32 h, r, 2, h; and.b32 h, h, 0xFE00FE00; "
            "mul.rn.f16x2 h, h, $17; cvt.rn.satfinite.e2m1x2.f16x2 c0, h; "
            "cvt.rz.f16x2.f32 h, $6, $2; prmt.b32 r, $10, 0, $14; mad.lo.u32 h, r, 2, h; and.b32 h, h, 0xFE00FE00; "
            "mul.rn.f16x2 h, h, $18; cvt.rn.satfinite.e2m1x2.f16x2 c1, h; "
            "cvt.rz.f16x2.f32 h, $7, $3; prmt.b32 r, $11, 0, $15; mad.lo.u32 h, r, 2, h; and.b32 h, h, 0xFE00FE00; "
            "mul.rn.f16x2 h, h, $19; cvt.rn.satfinite.e2m1x2.f16x2 c2, h; "
            "cvt.rz.f16x2.f32 h, $8, $4; prmt.b32 r, $12, 0, $16; mad.lo.u32 h, r, 2, h; and.b32 h, h, 0xFE00FE00; "
            "mul.rn.f16x2 h, h, $20; cvt.rn.satfinite.e2m1x2.f16x2 c3, h; "
            "mov.b32 $0, {c0, c1, c2, c3}; }",
            "=r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r", [a, b, ra, rb, back], dtype=tl.uint8, is_pure=True, pack=4
        )  # fmt: skip
    elif ROUNDING == "nearest" and f.name == "e2m1" and t.e2m1:
        return tl.inline_asm_elementwise(
            "{ .reg .b8 c<4>; cvt.rn.satfinite.e2m1x2.f32 c0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 c1, $6, $2; "
            "cvt.rn.satfinite.e2m1x2.f32 c2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 c3, $8, $4; mov.b32 $0, {c0, c1, c2, c3}; }",
            "=r,f,f,f,f,f,f,f,f", [a, b], dtype=tl.uint8, is_pure=True, pack=4)  # fmt: skip
    elif ROUNDING == "nearest" and f.name == "e2m1" and t.min2:
        small = tl.full(a.shape, 2.0**-14, tl.float32)
        a, b = mul_pair(a, b, small, small, t.f32x2)
        return tl.inline_asm_elementwise(
            NEAREST_HALVES, "=r,f,f,f,f,f,f,f,f", [a, b], dtype=tl.uint8, is_pure=True, pack=4)  # fmt: skip
    elif ROUNDING == "stochastic" and N == 8 and f.name == "e2m1" and t.min2:
        small = tl.full(a.shape, 2.0**-14, tl.float32)
        a, b = mul_pair(a, b, small, small, t.f32x2)
        return tl.inline_asm_elementwise(
            DITHERED_HALVES, "=r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r", [a, b, ra, rb], dtype=tl.uint8, is_pure=True, pack=4
        )  # fmt: skip
    elif ROUNDING == "nearest" and f.name == "e4m3" and t.fp8:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 c<2>; cvt.rn.satfinite.e4m3x2.f32 c0, $3, $1; cvt.rn.satfinite.e4m3x2.f32 c1, $4, $2; "
            "mov.b32 $0, {c0, c1}; }",
            "=r,f,f,f,f", [a, b], dtype=tl.int16, is_pure=True, pack=2)  # fmt: skip
    elif ROUNDING == "nearest" and f.name == "e5m2" and t.fp8:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 c<2>; cvt.rn.satfinite.e5m2x2.f32 c0, $3, $1; cvt.rn.satfinite.e5m2x2.f32 c1, $4, $2; "
            "mov.b32 $0, {c0, c1}; }",
            "=r,f,f,f,f", [a, b], dtype=tl.int16, is_pure=True, pack=2)  # fmt: skip
    elif f.bits <= 4:
        return (encode(a, ra, f, ROUNDING, N) | (encode(b, rb, f, ROUNDING, N) << 4)).to(tl.uint8)
    else:
        return (encode(a, ra, f, ROUNDING, N) | (encode(b, rb, f, ROUNDING, N) << 8)).to(tl.int16)


@triton.jit
def larger(a, b):
    """Words of two BF16 each: the larger magnitudes, of both halves, NaN if there is one. Signs are noise."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
