"""What several test files share: one comparison, which says what it found instead of only that it found something."""

import torch
from torch import Tensor

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _shown(x: Tensor) -> str:
    width = 2 * x.element_size()
    pattern = x.reshape(1).view(INTS[x.element_size()]).item() & (16**width - 1)
    return f"{x.item()!r} (0x{pattern:0{width}X})"


def assert_same_bits(ours: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same dtype, same shape, same bit patterns, so -0.0 is not 0.0; any NaN equals any other NaN.

    (Its sign and payload differ between x86 and Arm, scalar and vector code: no promise of ours.)
    """
    assert ours.dtype == expected.dtype, f"{what}: dtype {ours.dtype}, expected {expected.dtype}"
    assert ours.shape == expected.shape, f"{what}: shape {list(ours.shape)}, expected {list(expected.shape)}"
    a, b = (t.detach().contiguous() for t in (ours, expected))
    ints = INTS[a.element_size()]
    wrong = a.view(ints) != b.view(ints)
    if a.is_floating_point():
        wrong &= ~(a.isnan() & b.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ; first at {list(at)}: "
            f"{_shown(a[at])}, expected {_shown(b[at])}"
        )


def assert_product(ours: Tensor, a: Tensor, b: Tensor, bf16_roundings: int, what: str = "product") -> None:
    """ours [M, N] against a [M, K] b [N, K]^T of fp64 operands, each of at most 12 significant bits, or of fp32.

    Products of decoded E2M1 x E4M3 operands are exact in fp32 (24 bits hold 2 * 6), those of BF16 too, so the sum of K takes
    at most K - 1 roundings of u = 2^-24 of the sum of magnitudes, in any order (Higham, section 4.2); products of fp32 operands
    add one: K u S. Then alpha, itself a product of two scales: two roundings; and each rounding to BF16, 2^-8, half of the
    2^-7 between neighbours. 1.01 stands for products of these.
    """
    exact, magnitudes = a @ b.t(), a.abs() @ b.abs().t()
    bound = 1.01 * ((a.shape[1] + 2) * 2.0**-24 * magnitudes + bf16_roundings * 2.0**-8 * exact.abs())
    wrong = (ours.double() - exact).abs() > bound
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} are off; first at {list(at)}: {ours[at].item()!r}, "
            f"expected {exact[at].item()!r} +- {bound[at].item():.2g}"
        )
