"""Random Hadamard transform (RHT) along the contraction axis, in tiles of d.

    out_j = 1/sqrt(d) * sum_k s_k (-1)^popcount(j & k) in_k          out = in (S H) / sqrt(d),  S = diag(s)

S H / sqrt(d) is orthogonal, so (a S H)(b S H)^T / d = a b^T: rotate both operands of a GEMM and nothing needs undoing.
It spreads an outlier over its tile, so that one element no longer dictates the scale of fifteen others
(arXiv:2509.25149, section 4.2; on the wgrad operands only, Fig. 11).

The order of the additions is part of the definition: fp32 butterflies with strides 1, 2, 4, ... (sum above difference),
one product with fl(1/sqrt(d)), one rounding to BF16, as TransformerEngine hands BF16 to its quantiser. For BF16 inputs
whose exponents in a tile span less than 12 binades every fp32 sum is exact, so any order gives these bits.
"""

import torch
from torch import Tensor

from quant.formats import to_bfloat16
from quant.random import LOW, constants, philox

# TransformerEngine's sign vector (its mask 0xD7E8), also torchao's default; longer transforms repeat it, shorter cut it.
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def signs(size: int, kind: str, words: Tensor | None, device) -> Tensor:
    """fp32 [size] of +1 / -1. kind: none | fixed | fresh (bits of Philox at `words` = Key.words())."""
    if kind == "none":
        return torch.ones(size, device=device)
    if kind == "fixed":
        repeated = (FIXED_SIGNS * -(-size // len(FIXED_SIGNS)))[:size]
        return constants(repeated, torch.float32, device)
    index, layer, use, low, high = words.unbind()
    calls = torch.arange(-(-size // 128), device=device)
    drawn = torch.stack(philox((calls & LOW, index, layer, use), (low, high)), -1)  # [calls, 4] words of 32 bits
    bits = (drawn.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits.flatten()[:size]).to(torch.float32)


def hadamard(tiles: Tensor, s: Tensor, dtype: torch.dtype = torch.bfloat16, cast: bool = True) -> Tensor:
    """tiles [A, d, C] of any float dtype, transformed along the middle axis with signs s [d] -> [A, d, C] in `dtype`.
    cast: let torch round to BF16, whose cast is to the nearest, ties to even; else round by integers.

    A non-finite value makes its tile non-finite. The middle axis is the contraction: a contiguous operand [R, K] is
    [R K / d, d, 1], a transposed one, which lies in memory as [K, R], is [K / d, d, R].
    """
    d = tiles.shape[1]
    xs = [tiles[:, i].to(torch.float32) * s[i] for i in range(d)]
    h = 1
    while h < d:
        for i in range(0, d, 2 * h):
            for j in range(i, i + h):
                xs[j], xs[j + h] = xs[j] + xs[j + h], xs[j] - xs[j + h]
        h *= 2
    xs = [v * d**-0.5 for v in xs]
    return torch.stack([v.to(dtype) if cast or dtype != torch.bfloat16 else to_bfloat16(v) for v in xs], 1)
