"""quant/transform.py: the published RHT of (0 ... 15); rotating both operands of a product leaves it alone, exactly;
each output is the fp64 sum rounded as documented; signs; non-finite input.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from quant.encode import rotated
from quant.random import Key
from quant.recipe import SIGNS
from quant.spec import QuantSpec
from quant.transform import FIXED_SIGNS, hadamard, signs

SIZES = [2, 4, 8, 16, 32, 64, 128]


def sylvester(d: int) -> np.ndarray:
    """H[i][j] = (-1)^popcount(i & j), from the definition."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)])


def rht(x: Tensor, d: int, s: Tensor) -> Tensor:
    return hadamard(x.reshape(-1, d, 1), s).reshape(x.shape)


def test_published_vector():
    x = torch.arange(16.0, dtype=torch.bfloat16).view(1, 16)
    expected = [-14.5, -7.5, 6.5, -0.5, 6.5, -0.5, -14.5, 8.5, 7.5, 14.5, 0.5, 1.5, 0.5, -2.5, 9.5, -15.5]
    ours = rotated(x, QuantSpec(hadamard=16))
    assert_same_bits(ours, torch.tensor([expected], dtype=torch.bfloat16), "RHT of 0 ... 15")


def test_published_mask():
    assert sum((s < 0) << k for k, s in enumerate(FIXED_SIGNS)) == 0xD7E8, "TransformerEngine's mask, bit k = s_k"


@pytest.mark.parametrize("d", [4, 16, 64])
@pytest.mark.parametrize("kind", ["none", "fixed", "fresh"])
def test_rotating_both_operands_leaves_the_product_exactly(d, kind):
    """Integers below 128 / d: every output is an integer below 128 over sqrt(d), a BF16 number, so nothing rounds."""
    g = torch.Generator().manual_seed(d)
    top = max(128 // d, 2)
    a, b = (torch.randint(-top, top + 1, (8, 2 * d), generator=g).bfloat16() for _ in range(2))
    s = signs(d, kind, Key(5).words(), a.device)
    product = rht(a, d, s).double() @ rht(b, d, s).double().t()
    assert_same_bits(product, a.double() @ b.double().t(), f"product of operands rotated by {d}")
    assert not torch.equal(rht(a, d, s), a)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_are_exact_sums_rounded_as_documented(d, dtype):
    """Inputs k * 2^e with |k| <= 255 and e spread over 8 binades: 8 + 8 + 7 bits at most, so every fp32 sum is exact,
    and what remains is one product with fl(1 / sqrt(d)) and one rounding to BF16 (which ml_dtypes does here)."""
    g = torch.Generator().manual_seed(d)
    integers = torch.randint(-255, 256, (64, d), generator=g)
    x = (integers * 2.0 ** torch.randint(-6, 2, (64, d), generator=g)).to(dtype)
    s = signs(d, "fixed", None, x.device)
    exact = (x.double().numpy() * s.double().numpy()) @ sylvester(d)
    sums = exact.astype(np.float32)
    assert (sums == exact).all()
    expected = (sums * np.float32(1 / math.sqrt(d))).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(rht(x, d, s).float(), torch.from_numpy(expected), f"RHT of {d}")


@pytest.mark.parametrize("d", SIZES)
def test_energy_is_kept(d):
    """Orthogonal: the norm stays, up to a BF16 rounding of each output (relative 2^-8 at most, so 2^-8 of the norm) and
    the fp32 sums (log2(d) + 1 roundings of 2^-24 of the tile's norm each: nothing beside it)."""
    x = torch.randn(16, d, generator=torch.Generator().manual_seed(d)).double()
    y = rht(x.float(), d, signs(d, "fixed", None, x.device)).double()
    for before, after in zip(x.norm(dim=1).tolist(), y.norm(dim=1).tolist(), strict=True):
        assert abs(after - before) <= 1.01 * 2**-8 * before


@pytest.mark.parametrize("d", [2, 16, 128])
def test_a_transposed_view_gives_the_same_bits(d):
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = QuantSpec(hadamard=d)
    ours = rotated(x.t(), spec)
    assert_same_bits(ours, rotated(x.t().contiguous(), spec), f"RHT of {d}")
    assert ours.stride() == x.t().stride(), "a transposed operand stays where it is in memory"


def test_no_hadamard_leaves_the_operand_alone():
    x = torch.randn(4, 16)
    assert rotated(x, QuantSpec()) is x


# --- signs ---


def test_fixed_signs_repeat_and_cut():
    assert signs(4, "fixed", None, "cpu").tolist() == list(FIXED_SIGNS[:4])
    assert signs(32, "fixed", None, "cpu").tolist() == list(FIXED_SIGNS * 2)
    assert signs(8, "none", None, "cpu").tolist() == [1.0] * 8


@pytest.mark.parametrize("d", [2, 16, 128, 256])
def test_fresh_signs_are_signs_and_a_function_of_the_key(d):
    key = Key(3, 1, 2, SIGNS["wgrad"])
    s = signs(d, "fresh", key.words(), "cpu")
    assert s.dtype == torch.float32 and s.shape == (d,) and set(s.tolist()) <= {1.0, -1.0}
    assert_same_bits(s, signs(d, "fresh", key.words(), "cpu"), "the same key again")
    if d >= 128:  # so long that two independent vectors differ for certain: 2^-128
        for other in (key.at(seed=4), key.at(index=2), key.at(layer=3), key.at(use=SIGNS["dgrad"])):
            assert not torch.equal(s, signs(d, "fresh", other.words(), "cpu")), f"{other} gives the signs of {key}"


def test_fresh_signs_are_balanced():
    total = sum(signs(128, "fresh", Key(0, i).words(), "cpu") for i in range(200))
    assert abs(total.sum()) < 5 * (128 * 200) ** 0.5, "n fair signs sum to 0 +- sqrt(n); 5 of those"
    assert total.abs().max() < 6 * 200**0.5, "a sign that never changes"  # 6 sigma, for the largest of 128


# --- special values ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_nonfinite_value_makes_its_tile_nonfinite_and_no_other(bad, place):
    x = torch.ones(3, 16)
    x[1, place] = bad
    y = rotated(x, QuantSpec(hadamard=16))
    assert not y[1].isfinite().any(), "somewhere in its tile the value was lost"
    assert y[0].isfinite().all() and y[2].isfinite().all()


def test_overflow_is_loud():
    """Sums of large finite values overflow fp32: the tile must not come out finite and wrong."""
    x = torch.full((1, 16), torch.finfo(torch.float32).max)
    y = rotated(x, QuantSpec(hadamard=16, signs="none"))
    assert not y[0, 0].isfinite()


def test_subnormal_inputs_are_not_flushed():
    x = torch.zeros(1, 16)
    x[0, 0] = 2.0**-130
    y = rotated(x, QuantSpec(hadamard=16, signs="none"))
    assert_same_bits(y, torch.full((1, 16), 2.0**-132).bfloat16(), "RHT of a subnormal")
