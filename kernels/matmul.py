"""y[M, N] = alpha a[M, K] b[N, K]^T of operands in blocks along K: E2M1, E4M3 or E5M2 with a scale for each 16 or 32.

    native      tl.dot_scaled: tcgen05.mma with block scales on sm_100 and sm_103, mma.sync with block scales on sm_120. Scales
                lie in the order of tensor cores (`place` in quantize.py), so that they go to tensor memory as they lie
    decoded     code * scale, exact in BF16 (E2M1 has 2 significant bits, E4M3 4, a scale at most 4), and tl.dot: anywhere

Sums are fp32 in the hardware's order; alpha, the product of the outer scales, and one rounding come last. Two codes of E2M1
share a byte: decoded, the even and the odd ones go into two products, which spares putting them in order.

E4M3 scales of groups of 16 are given as float8 and not as bytes: as bytes, sm_120 would take them for powers of two, of groups
of 32, without a word (Triton 3.8). Left out: persistent programs, TMA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """uint8 codes (of E2M1: in the lower four bits) -> fp32. Exponent and mantissa are those of fp32, but for the bias."""
    c = code.to(tl.int32)
    if FORMAT == "e2m1":
        return (((c & 7) << 22) | ((c & 8) << 28)).to(tl.float32, bitcast=True) * 2.0**126
    elif FORMAT == "e4m3":
        value = (((c & 0x7F) << 20) | ((c & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
        return tl.where((c & 0x7F) == 0x7F, float("nan"), value)
    elif FORMAT == "e5m2":
        value = (((c & 0x7F) << 21) | ((c & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**112
        return tl.where((c & 0x7F) > 0x7C, float("nan"), tl.where((c & 0x7F) == 0x7C, value * float("inf"), value))
    else:  # e8m0
        value = tl.where(c == 0, 1 << 22, c << 23).to(tl.float32, bitcast=True)
        return tl.where(c == 255, float("nan"), value)


@triton.jit
def load(at, there, EVEN: tl.constexpr):
    """0 where nothing is there."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=there, other=tl.zeros((), tl.float32).to(at.dtype.element_ty))


@triton.jit
def load_operand(
    codes_ptr, scales_ptr, r, k0, R, K,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Rows r of an operand, plain scales -> BF16 values, (BR, BK), twice; APART: the even ones and the odd, (BR, BK / 2)."""
    BR: tl.constexpr = r.shape[0]
    b = k0 // GROUP + tl.arange(0, BK // GROUP)[None, :]
    there = (r[:, None] < R) & (b < K // GROUP)
    scale = load(scales_ptr + r[:, None] * (K // GROUP) + b, there, EVEN)
    scale = decode(scale, SCALE)  # (BR, BK / GROUP)
    PER: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    k = k0 // PER + tl.arange(0, BK // PER)[None, :]
    there = (r[:, None] < R) & (k < K // PER)
    code = load(codes_ptr + r[:, None] * (K // PER) + k, there, EVEN)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BR, BK // GROUP, GROUP // PER)), (BR, BK // PER))
    if FORMAT == "e2m1":
        return (decode(code & 15, "e2m1") * scale).to(tl.bfloat16), (decode(code >> 4, "e2m1") * scale).to(tl.bfloat16)
    else:
        value = (decode(code, FORMAT) * scale).to(tl.bfloat16)
        if APART:
            return tl.split(tl.reshape(value, (BR, BK // 2, 2)))
        else:
            return value, value


@triton.jit
def load_native(
    codes_ptr, scales_ptr, r0, k0, R, K,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes (BR, BK or BK / 2) and scales (BR, BK / GROUP) as tl.dot_scaled takes them; scales lie in tiles of 128 x 4."""
    PER: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    r = r0 + tl.arange(0, BR)[:, None]
    k = k0 // PER + tl.arange(0, BK // PER)[None, :]
    code = load(codes_ptr + r * (K // PER) + k, (r < R) & (k < K // PER), EVEN)
    tiles = (K // GROUP + 3) // 4
    T: tl.constexpr = BK // GROUP // 4
    i = r0 // 128 + tl.arange(0, BR // 128)[:, None, None, None, None]
    j = k0 // GROUP // 4 + tl.arange(0, T)[None, :, None, None, None]
    within = (tl.arange(0, 32)[None, None, :, None, None] * 16 + tl.arange(0, 4)[None, None, None, :, None] * 4
              + tl.arange(0, 4)[None, None, None, None, :])  # fmt: skip
    there = (i < (R + 127) // 128) & (j < tiles)
    scale = load(scales_ptr + (i * tiles + j) * 512 + within, there, EVEN)  # (BR / 128, T, 32, 4, 4)
    scale = tl.reshape(tl.permute(scale, (0, 3, 2, 1, 4)), (BR, BK // GROUP))
    if FORMAT == "e4m3":
        code = code.to(tl.float8e4nv, bitcast=True)
    elif FORMAT == "e5m2":
        code = code.to(tl.float8e5, bitcast=True)
    return code, scale


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
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, alpha_ptr, y_ptr, M, N, K,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a [M, K], b [N, K] codes; scales plain, or swizzled where NATIVE; alpha fp32 [1]; y [M, N] BF16 or fp32."""
    m0, n0 = tl.program_id(0) * BM, tl.program_id(1) * BN
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    APART: tl.constexpr = A_FORMAT == "e2m1" or B_FORMAT == "e2m1"
    for k0 in tl.range(0, K, BK):
        if NATIVE:
            a, s = load_native(a_ptr, a_scale_ptr, m0, k0, M, K, A_FORMAT, SCALE, GROUP, BM, BK, EVEN)
            b, t = load_native(b_ptr, b_scale_ptr, n0, k0, N, K, B_FORMAT, SCALE, GROUP, BN, BK, EVEN)
            acc = scaled_dot(a, s, A_FORMAT, tl.trans(b), t, B_FORMAT, acc, SCALE, GROUP)
        else:
            a, c = load_operand(a_ptr, a_scale_ptr, m, k0, M, K, A_FORMAT, SCALE, GROUP, BK, EVEN, APART)
            b, d = load_operand(b_ptr, b_scale_ptr, n, k0, N, K, B_FORMAT, SCALE, GROUP, BK, EVEN, APART)
            acc = tl.dot(a, tl.trans(b), acc)
            if APART:
                acc = tl.dot(c, tl.trans(d), acc)
    y = acc * tl.load(alpha_ptr)
    there = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=None if EVEN else there)


def native(capability: int, a_format: str, b_format: str) -> bool:
    """Whether the GPU multiplies these with their scales. (Of mixed formats sm_120 makes BF16 products, spilling registers.)"""
    return capability in (100, 103) or (capability in (120, 121) and (a_format == "e2m1") == (b_format == "e2m1"))


def matmul(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    alpha: Tensor,
    formats: tuple[str, str],
    scale: str,
    group: int,
    K: int,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a, b: codes uint8 [M or N, K or K / 2] and scales uint8: plain [M or N, K / group], or, where `native`, in the order of
    tensor cores, [tiles, 512]. alpha fp32 [1]; formats of a and b; scale: "e4m3" or "e8m0". -> [M, N] in BF16 or fp32.

    Raises ValueError where `native` and the scales are of groups that the hardware has not."""
    (x, s), (w, t) = a, b
    M, N = x.shape[0], w.shape[0]
    fast = native(capability, *formats)
    if fast and (scale, group) not in (("e4m3", 16), ("e8m0", 32)):
        raise ValueError(f"matmul: {scale} scales of groups of {group}: tensor cores take e4m3 of 16 or e8m0 of 32")
    if fast and scale == "e4m3":
        s, t = s.view(torch.float8_e4m3fn), t.view(torch.float8_e4m3fn)
    BM, BN, BK, warps = (128, 128, 256, 4) if fast and capability < 120 else (128, 128, 128, 8) if fast else (128, 64, 64, 8)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    matmul_kernel[triton.cdiv(M, BM), triton.cdiv(N, BN)](
        x, s, w, t, alpha, y, M, N, K, *formats, scale, group, fast,
        M % BM == 0 and N % BN == 0 and K % BK == 0, BM, BN, BK, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return y
