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
