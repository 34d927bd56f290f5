"""The largest magnitudes of a matrix [M, K], after a Hadamard transform along K (rows), along M (columns), or neither.

    kind tensor: one number, kind line: one for each row (side rows) or column (side cols); as bits of fp32, in which NaN is
    above Inf is above every number, so that nothing is laundered, and which integer maxima put together in any order.

Both sides share one read of the matrix. Tiles and pairs as in quantize.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.numerics import Target, unpack
from kernels.quantize import Tile, block_max_k, block_max_m, hadamard, interpreted, load_tile


class Look(NamedTuple):
    kind: str  # tensor, line
    hadamard: int = 0


@triton.jit
def amax_kernel(
    x_ptr, row_ptr, row_signs_ptr, col_ptr, col_signs_ptr, M, K,
    rows: tl.constexpr, cols: tl.constexpr, t: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    A: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Into int32 row_ptr and col_ptr, [1] or [M] and [K], which start at 0."""
    m0, k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    G: tl.constexpr = BM // A
    x, y, z = load_tile(x_ptr, m0, k0, M, K, WORDS, EVEN, A, G, BK // 2, V)
    if rows is not None:
        lo, hi, word = x, y, z
        if rows.hadamard:
            word = hadamard(lo, hi, row_signs_ptr, rows.hadamard, False, t)
            lo, hi = unpack(word)
        a = block_max_k(word, lo, hi, WORDS or rows.hadamard > 0, BK, t)  # (A, G, 1)
        if rows.kind == "tensor":
            tl.atomic_max(row_ptr, tl.max(tl.reshape(a, (BM,)), 0))
        else:
            r = m0 + tl.arange(0, G)[None, :, None] * A + tl.arange(0, A)[:, None, None]
            tl.atomic_max(row_ptr + r, a, mask=r < M)
    if cols is not None:
        lo, hi, word = x, y, z
        if cols.hadamard:
            word = hadamard(lo, hi, col_signs_ptr, cols.hadamard, True, t)
            lo, hi = unpack(word)
        a, b = block_max_m(word, lo, hi, WORDS or cols.hadamard > 0, BM, t)  # (1, W)
        if cols.kind == "tensor":
            tl.atomic_max(col_ptr, tl.max(tl.reshape(tl.maximum(a, b), (BK // 2,)), 0))
        else:
            k = k0 + 2 * tl.arange(0, BK // 2)[None, :]
            tl.atomic_max(col_ptr + k, a, mask=k < K)
            tl.atomic_max(col_ptr + k + 1, b, mask=k < K)


def amax(x: Tensor, rows: Look | None, row_signs: Tensor | None, cols: Look | None, col_signs: Tensor | None, t: Target):
    """x [M, K] as for `quantize` -> fp32 [1], or [M] (rows) and [K] (columns), of each side, or None. NaN where one is, Inf
    too."""
    M, K = x.shape
    wide = max(look.hadamard for look in (rows, cols) if look) > 16
    A, WORDS = 32 if wide else 16, x.dtype == torch.bfloat16
    cut = interpreted(M, K, A) if triton.knobs.runtime.interpret else Tile(A, 64, 128, 2 if wide else 4, 2)
    made = [
        torch.zeros(1 if look is None or look.kind == "tensor" else size, dtype=torch.int32, device=x.device)
        for look, size in ((rows, M), (cols, K))
    ]
    signs = [made[0] if s is None else s for s in (row_signs, col_signs)]
    amax_kernel[triton.cdiv(M, cut.BM), triton.cdiv(K, cut.BK)](
        x.view(torch.int32) if WORDS else x, made[0], signs[0], made[1], signs[1], M, K, rows, cols, t, WORDS,
        M % cut.BM == 0 and K % cut.BK == 0, cut.A, cut.BM, cut.BK, cut.V, num_warps=cut.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return [look and bits.view(torch.float32) for look, bits in zip((rows, cols), made, strict=True)]
