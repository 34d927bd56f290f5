"""y[M, N] = a[M, K] b[N, K]^T (f g) of quantised operands, in one of three ways:

    scaled     E2M1, E4M3 or E5M2 in blocks along K, by tl.dot_scaled: tcgen05.mma with block scales on sm_100 and sm_103,
               mma.sync with block scales on sm_120. Scales lie in tiles of 128 rows by 4, the order of tensor cores
    plain      E4M3 and E5M2 without blocks, by tl.dot of the codes: mma.sync on sm_89 and sm_120, wgmma on sm_90, tcgen05.mma
    decoded    code * scale in BF16 and tl.dot: anywhere, any group. Exact: E2M1 has 2 significant bits, E4M3 4, a scale at most
               4, and BF16 8; but for products below 2^-133, which an E8M0 scale near its smallest makes

Scales of a tensor or of rows stay out of the sum: factors f [] or [M, 1] and g [] or [1, N], fp32. y = fl(sum * fl(f g)), then
one rounding to the dtype, as in quant/gemm.py. Sums are fp32 in the hardware's order; wgmma keeps fewer bits of sums of FP8, so
each step of 128 along K is added to an fp32 sum outside of it. Two codes of E2M1 share a byte: decoded, the even and the odd
ones go into two products, which spares putting them in order.

Operands reach shared memory some steps ahead of the product: by TMA on sm_90 and sm_100 where rows are multiples of 16 bytes,
else by cp.async. From there tcgen05.cp brings scales to tensor memory as they lie: the compiler does that for the one form of
`load_scales`, else each step would take them through registers. On sm_120 the scales of MXFP8 are 2 bytes a thread, too few
for cp.async: they are read in the step.

E4M3 scales of groups of 16 are given as float8 and not as bytes: as bytes, sm_120 would take them for powers of two, of groups
of 32, without a word (Triton 3.8). Left out: persistent programs, pairs of CTAs, warps of different tasks.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.numerics import decode

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def load(at, there, EVEN: tl.constexpr):
    """0 where nothing is there."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=there, other=tl.zeros((), tl.float32).to(at.dtype.element_ty))


@triton.jit
def load_codes(codes, r0, k0, R, row, FORMAT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
               EVEN: tl.constexpr):  # fmt: skip
    """(BR, BK), or (BR, BK / 2) bytes of E2M1: rows from r0, columns from k0. row: bytes of one."""
    PER: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    if TMA:
        return codes.load([r0, k0 // PER])
    else:
        r, k = tl.arange(0, BR)[:, None], k0 // PER + tl.arange(0, BK // PER)[None, :]
        return load(codes + r0.to(tl.int64) * row + r * row + k, (r0 + r < R) & (k < row), EVEN)


@triton.jit
def load_scales(scales, r0, k0, R, K, GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
                EVEN: tl.constexpr):  # fmt: skip
    """(BR, BK / GROUP) of scales in tiles of 128 x 4. The compiler knows this form: what is loaded so and put in order so goes
    from shared to tensor memory as it lies."""
    T: tl.constexpr = BK // GROUP // 4
    i, j = r0 // 128, k0 // GROUP // 4
    if TMA:
        scale = scales.load([0, i, j, 0, 0])  # (1, BR / 128, T, 2, 256)
    else:
        row = (K // GROUP + 3) // 4 * 512  # bytes of the tiles of 128 rows
        i, w = i + tl.arange(0, BR // 128)[:, None], j * 512 + tl.arange(0, T * 512)[None, :]
        scale = load(scales + i.to(tl.int64) * row + w, (i < (R + 127) // 128) & (w < row), EVEN)
    scale = tl.permute(tl.reshape(scale, (BR // 128, T, 32, 4, 4)), (0, 3, 2, 1, 4))
    return tl.reshape(scale, (BR, BK // GROUP))


@triton.jit
def decoded(
    codes, scales, r0, k0, R, K, row,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """-> BF16 values, (BR, BK), twice; APART: those of even and of odd columns, (BR, BK / 2). Scales are plain."""
    PER: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    code = load_codes(codes, r0, k0, R, row, FORMAT, BR, BK, False, EVEN)
    if SCALE != "none":
        r, b = tl.arange(0, BR)[:, None], k0 // GROUP + tl.arange(0, BK // GROUP)[None, :]
        at = scales + r0.to(tl.int64) * (K // GROUP) + r * (K // GROUP) + b
        scale = decode(load(at, (r0 + r < R) & (b < K // GROUP), EVEN), SCALE)  # (BR, BK / GROUP)
        scale = tl.broadcast_to(scale[:, :, None], (BR, BK // GROUP, GROUP // PER))
        scale = tl.reshape(scale, (BR, BK // PER))
    else:
        scale = 1.0
    if FORMAT == "e2m1":
        return (decode(code & 15, "e2m1") * scale).to(tl.bfloat16), (decode(code >> 4, "e2m1") * scale).to(tl.bfloat16)
    else:
        value = (decode(code, FORMAT) * scale).to(tl.bfloat16)
        if APART:
            return tl.split(tl.reshape(value, (BR, BK // 2, 2)))
        else:
            return value, value


@triton.jit
def factor(ptr, r, R, EACH: tl.constexpr):
    """Of rows r, or of all."""
    if EACH:
        return tl.load(ptr + r, mask=r < R, other=0.0)
    else:
        return tl.broadcast_to(tl.load(ptr), r.shape)


@triton.jit
def finish(
    acc, a_factor_ptr, b_factor_ptr, y_ptr, m0, n0, M, N, A_EACH: tl.constexpr, B_EACH: tl.constexpr, EVEN: tl.constexpr
):
    """Factors, the one rounding, and y."""
    m, n = m0 + tl.arange(0, acc.shape[0]), n0 + tl.arange(0, acc.shape[1])
    f, g = factor(a_factor_ptr, m, M, A_EACH), factor(b_factor_ptr, n, N, B_EACH)
    y = (acc * (f[:, None] * g[None, :])).to(y_ptr.dtype.element_ty)
    there = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], y, mask=None if EVEN else there)


@triton.jit
def scaled_dot(
    a, s, A_FORMAT: tl.constexpr, b, t, B_FORMAT: tl.constexpr, acc, SCALE: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """tl.dot_scaled, of scales that it takes for what they are."""
    K: tl.constexpr = a.shape[1] * (2 if A_FORMAT == "e2m1" else 1)
    tl.static_assert(s.shape[1] * GROUP == K and t.shape[1] * GROUP == K, "scales of another group")
    E4M3: tl.constexpr = SCALE == "e4m3"
    tl.static_assert(s.dtype == t.dtype and (s.dtype == tl.float8e4nv) == E4M3 and GROUP == (16 if E4M3 else 32),
                     "scales: float8e4nv of groups of 16, or uint8 (e8m0) of groups of 32")  # fmt: skip
    return tl.dot_scaled(a, s, A_FORMAT, b, t, B_FORMAT, acc=acc)


@triton.jit
def matmul_kernel(
    a_codes, a_scales, a_factor_ptr, a_row, b_codes, b_scales, b_factor_ptr, b_row, y_ptr, M, N, K,
    A_EACH: tl.constexpr, B_EACH: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, HOW: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """a [M, K], b [N, K] codes, a_row and b_row units of UNIT bytes a row; scales plain, or in tiles where HOW is "scaled";
    TMA: codes and scales as descriptors. Factors fp32 of each row or of all. y [M, N] BF16 or fp32."""
    a_row, b_row = a_row * UNIT, b_row * UNIT  # so that the compiler knows how many bytes it may read at a time
    # Strips of 8 tiles along M, so that programs that run at a time share operands in the L2 cache.
    width = 8 * tl.cdiv(N, BN)
    strip, i = tl.program_id(0) // width * 8, tl.program_id(0) % width
    height = tl.minimum(tl.cdiv(M, BM) - strip, 8)
    m0, n0 = (strip + i % height) * BM, i // height * BN
    acc = tl.zeros((BM, BN), tl.float32)
    APART: tl.constexpr = A_FORMAT == "e2m1" or B_FORMAT == "e2m1"
    for k0 in tl.range(0, K, BK):
        if HOW == "decoded":
            a, c = decoded(a_codes, a_scales, m0, k0, M, K, a_row, A_FORMAT, SCALE, GROUP, BM, BK, EVEN, APART)
            b, d = decoded(b_codes, b_scales, n0, k0, N, K, b_row, B_FORMAT, SCALE, GROUP, BN, BK, EVEN, APART)
            acc = tl.dot(a, tl.trans(b), acc)
            if APART:
                acc = tl.dot(c, tl.trans(d), acc)
        else:
            a = load_codes(a_codes, m0, k0, M, a_row, A_FORMAT, BM, BK, TMA, EVEN)
            b = load_codes(b_codes, n0, k0, N, b_row, B_FORMAT, BN, BK, TMA, EVEN)
            if HOW == "scaled":
                s = load_scales(a_scales, m0, k0, M, K, GROUP, BM, BK, TMA, EVEN)
                t = load_scales(b_scales, n0, k0, N, K, GROUP, BN, BK, TMA, EVEN)
                acc = scaled_dot(a, s, A_FORMAT, tl.trans(b), t, B_FORMAT, acc, SCALE, GROUP)
            else:
                acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=BK)
    if BN > 128:  # half of the columns at a time takes half of the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        finish(left, a_factor_ptr, b_factor_ptr, y_ptr, m0, n0, M, N, A_EACH, B_EACH, EVEN)
        finish(right, a_factor_ptr, b_factor_ptr, y_ptr, m0, n0 + BN // 2, M, N, A_EACH, B_EACH, EVEN)
    else:
        finish(acc, a_factor_ptr, b_factor_ptr, y_ptr, m0, n0, M, N, A_EACH, B_EACH, EVEN)


# --- the host ---


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def per(fmt: str) -> int:
    """Codes in a byte."""
    return 2 if fmt == "e2m1" else 1


def native(formats: tuple[str, str], scale: str, group: int, capability: int) -> bool:
    """Whether the GPU multiplies these with their scales, which then lie in tiles. Of E2M1 with 8 bits sm_120 would
    make BF16 products, spilling registers; other groups than these no GPU has."""
    fours = [fmt == "e2m1" for fmt in formats]
    if (scale, group) != ("e8m0", 32) and not ((scale, group) == ("e4m3", 16) and all(fours)):
        return False
    return capability in (100, 103) or (capability in (120, 121) and fours[0] == fours[1])


def way(formats: tuple[str, str], scale: str, group: int, capability: int) -> str:
    """ "scaled", "plain" or "decoded"."""
    if native(formats, scale, group, capability):
        return "scaled"
    return "plain" if scale == "none" and capability >= 89 and "e2m1" not in formats else "decoded"


def obstacle(formats: tuple[str, str], scale: str, group: int, M: int, N: int, K: int, capability: int) -> str:
    """Why `matmul` cannot multiply these, or "". capability 0: in the interpreter."""
    if unknown := [fmt for fmt in formats if fmt not in ("e2m1", *FLOATS)]:
        return f"elements {unknown[0]}, expected e2m1, e4m3 or e5m2"
    if scale not in ("e4m3", "e8m0", "none"):
        return f"scales {scale}, expected e4m3, e8m0 or none"
    if scale != "none" and group not in (16, 32, 64):
        return f"groups of {group}, expected 16, 32 or 64"
    if min(M, N, K) < 1:
        return f"sizes {M} x {N} x {K}, expected at least 1"
    unit = max(group if scale != "none" else 1, *map(per, formats))
    if K % unit:
        return f"K = {K}, expected a multiple of {unit}"
    if 0 < capability < 80:
        return f"sm_{capability}, expected sm_80 or later, which multiply BF16"
    return ""


def tile(how: str, tma: bool, formats: tuple[str, str], M: int, N: int, capability: int) -> Tile:
    """The largest that spills no register (`make kernels-check`); on sm_100 two of the smaller ones share an SM."""
    if how == "decoded":
        return Tile(128, 128, 64, 8, 3) if capability == 90 else Tile(128, 64, 64, 8, 3)
    BK = 256 if formats == ("e2m1", "e2m1") else 128
    if capability in (100, 103):
        large = tma and triton.cdiv(M, 128) * triton.cdiv(N, 256) >= 132  # one for each SM
        return Tile(128, 256, BK, 8, 4) if large else Tile(128, 128, BK, 8, 3)
    if how == "plain":
        return Tile(128, 128, 128, 8, 4) if capability == 90 else Tile(128, 128, 64, 8, 4)
    return Tile(128, 128, BK, 8, 3)


def matmul(
    a: tuple[Tensor, Tensor | None],
    b: tuple[Tensor, Tensor | None],
    factors: tuple[Tensor | None, Tensor | None],
    formats: tuple[str, str],
    scale: str,
    group: int,
    K: int,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """-> [M, N] in BF16 or fp32. a [M, K], b [N, K]: uint8 codes, [R, K] or of E2M1 in pairs [R, K / 2], and uint8 scales,
    [R, K / group], or where `native` in tiles, [tiles, 512], 0 where there is none; None where `scale` is "none". factors: of a
    and of b, fp32 of one element or [R, 1]; None is 1. Raises ValueError with the obstacle, or for another shape or dtype."""
    M, N = a[0].shape[0], b[0].shape[0]
    if why := obstacle(formats, scale, group, M, N, K, capability):
        raise ValueError(f"no product of these: {why}")
    how = way(formats, scale, group, capability)
    spread = formats.count("e2m1") == 1
    tma = capability in (90, 100, 103) and how != "decoded" and aligned(a, spread) and aligned(b, spread)
    cut = tile(how, tma, formats, M, N, capability)
    y = torch.empty(M, N, dtype=dtype, device=a[0].device)
    given, unit = [], math.gcd(16, *(K // per(fmt) for fmt in formats))
    for name, operand, factor, fmt, R, BR in zip("ab", (a, b), factors, formats, (M, N), cut[:2], strict=True):
        given += prepared(name, *operand, factor, fmt, scale, group, R, K, how, tma, (BR, cut.BK)) + [K // per(fmt) // unit]
    each = [factor is not None and factor.numel() > 1 for factor in factors]
    EVEN = not M % cut.BM and not N % cut.BN and (tma or not K % cut.BK)
    matmul_kernel[(triton.cdiv(M, cut.BM) * triton.cdiv(N, cut.BN),)](
        *given, y, M, N, K, *each, *formats, scale, group, how, tma, EVEN, cut.BM, cut.BN, cut.BK, unit,
        num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def aligned(operand: tuple[Tensor, Tensor | None], spread: bool) -> bool:
    """Whether TMA takes it: rows and addresses at multiples of 16 bytes; spread, as E2M1 is beside 8 bits, rows of 64."""
    return not operand[0].shape[1] % (64 if spread else 16) and not any(x.data_ptr() % 16 for x in operand if x is not None)


def prepared(
    name: str, codes: Tensor, scales: Tensor | None, factor: Tensor | None, fmt: str, scale: str, group: int, R: int, K: int,
    how: str, tma: bool, block: tuple[int, int],
) -> list:  # fmt: skip
    """An operand as the kernel takes it: codes, scales, factor."""
    row = K // per(fmt)
    count = 0 if scale == "none" else K // group
    tiles = -(-R // 128), -(-count // 4)
    expect(f"codes of {name}", codes, torch.uint8, (R, row))
    if scale == "none":
        scales = one(codes.device)
    else:
        expect(f"scales of {name}", scales, torch.uint8, (tiles[0] * tiles[1], 512) if how == "scaled" else (R, count))
    if factor is not None:
        expect(f"factor of {name}", factor, torch.float32, tuple(factor.shape) if factor.numel() == 1 else (R, 1))
    factor = one(codes.device) if factor is None else factor.reshape(-1)
    if how != "decoded":
        codes = codes if fmt == "e2m1" else codes.view(FLOATS[fmt])
        scales = scales.view(FLOATS["e4m3"]) if scale == "e4m3" else scales
    if tma:
        codes = TensorDescriptor.from_tensor(codes, [block[0], block[1] // per(fmt)])
    if tma and how == "scaled":
        shape = [1, block[0] // 128, block[1] // group // 4, 2, 256]
        scales = TensorDescriptor.from_tensor(scales.view(1, *tiles, 2, 256), shape)
    return [codes, scales, factor]


def expect(what: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another, or one that is not contiguous."""
    if x is None or x.dtype != dtype or tuple(x.shape) != shape or not x.is_contiguous():
        found = "none" if x is None else f"{x.dtype} {list(x.shape)}{'' if x.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{what}: {found}, expected {dtype} {list(shape)}, contiguous")


@functools.cache
def one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)
