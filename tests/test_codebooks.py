"""quant/codebooks.py: posits have the values and the rounding of the posit standard's own construction, NF4 those of its
quantiles, IF4's integers those of exact fractions; every mode of rounding goes where a search over all values in fp64 says.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from quant.codebooks import Codebook
from quant.formats import FORMATS
from quant.rounding import ROUNDINGS, random_bits

NAMES = ["nf4", "int4-6", "posit8-es0", "posit8-es1", "posit8-es2"]
codebooks = pytest.mark.parametrize("fmt", [FORMATS[name] for name in NAMES], ids=NAMES)
posits = pytest.mark.parametrize("es", [0, 1, 2])


def grown(bits: int, es: int) -> list[float]:
    """The positive posits, ascending, as Gustafson grows them: from those of a bit less, with one more beyond either end and
    one between each two: their geometric mean while that halves a power of two, else the arithmetic one."""
    useed = 2.0 ** (2**es)
    values = [1.0]
    for _ in range(bits - 2):
        between = []
        for a, b in zip(values, values[1:], strict=False):
            exponents = math.log2(a), math.log2(b)
            apart = all(e == int(e) for e in exponents) and exponents[1] - exponents[0] > 1
            between += [a, 2.0 ** (sum(exponents) / 2) if apart else (a + b) / 2]
        values = [values[0] / useed, *between, values[-1], values[-1] * useed]
    return values


@posits
def test_posits_are_those_of_the_construction(es):
    fmt = FORMATS[f"posit8-es{es}"]
    positive = grown(8, es)
    expected = [0.0, *positive, math.nan, *(-v for v in reversed(positive))]
    assert_same_bits(fmt.values(), torch.tensor(expected), fmt.name)
    assert (fmt.max, fmt.tiny, fmt.bits, fmt.nan_code) == (positive[-1], positive[0], 8, 0x80)
    assert fmt.max == 2.0 ** (6 * 2**es) and fmt.tiny == 1 / fmt.max  # useed^(n - 2)


@posits
def test_posits_round_at_the_posits_of_a_bit_more(es):
    fmt, finer, positive = FORMATS[f"posit8-es{es}"], grown(9, es), grown(8, es)
    edges = finer[2:-2:2]
    assert all(a < e < b for a, e, b in zip(positive, edges, positive[1:], strict=False))
    edges = np.array(edges, dtype=np.float32)
    codes = torch.arange(1, 127)
    for sign in (1, -1):
        negated = codes if sign > 0 else 256 - codes
        above = (codes + 1) if sign > 0 else 255 - codes
        x = torch.from_numpy(edges) * sign
        assert_same_bits(fmt.encode(x), torch.where(codes % 2 == 0, negated, above).to(torch.int32), "an edge: the even code")
        for other, expected in ((-np.inf, negated), (np.inf, above)):
            x = torch.from_numpy(np.nextafter(edges, np.float32(other if other > 0 else 0))) * sign
            assert_same_bits(fmt.encode(x), expected.to(torch.int32), f"beside an edge, sign {sign}")


@posits
def test_only_zero_becomes_zero_and_nothing_infinite(es):
    fmt = FORMATS[f"posit8-es{es}"]
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, fmt.tiny / 2, 3e38, -3e38, math.inf, math.nan])
    assert fmt.encode(x).tolist() == [0, 0, 1, 255, 1, 127, 129, 128, 128]


def test_nf4_is_the_quantiles_of_a_normal_distribution():
    """arXiv:2305.14314, appendix E: evenly spaced quantiles of either half, with a shared zero, over their absmax."""
    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    quantile = torch.distributions.Normal(0, 1).icdf
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]) / positive.max()
    # The published constants were made in fp32, whose erfinv is good to a few 1e-7.
    torch.testing.assert_close(FORMATS["nf4"].values().double(), values, rtol=0, atol=1e-6)


def some(fmt: Codebook) -> Tensor:
    """Numbers everywhere in the range and on every value and midpoint, within it."""
    values = np.array(fmt.ascending)
    g = np.random.default_rng(0)
    x = np.concatenate([values, (values[:-1] + values[1:]) / 2, g.normal(size=2000), g.normal(size=2000) * values[-1] / 3])
    x = x[(x >= values[0]) & (x <= values[-1])]
    return torch.from_numpy(x.astype(np.float32))


@codebooks
def test_every_code_survives(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    codes = codes[fmt.decode(codes).isfinite()]
    for rounding in ROUNDINGS:
        noise = torch.full_like(codes, 2 ** random_bits(rounding) - 1)
        assert_same_bits(fmt.encode(fmt.decode(codes), rounding, noise), codes, rounding)


@codebooks
@pytest.mark.parametrize("rounding", [*ROUNDINGS, "stochastic3"])
def test_rounding(fmt, rounding):
    x = some(fmt)
    values = np.array(fmt.ascending)
    exact = x.double().numpy()
    below = np.clip(np.searchsorted(values, exact, side="right") - 1, 0, len(values) - 2)
    low, high = values[below], values[below + 1]
    near, far = np.where(exact < 0, high, low), np.where(exact < 0, low, high)  # of zero
    n = random_bits(rounding)
    noise = torch.randint(0, 2**n, x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    # The fraction as the definition has it: an fp32 quotient, of an exact difference where |x| is not far from its neighbours.
    fraction = ((x - torch.from_numpy(near).float()) / torch.from_numpy(far - near).float()).double().numpy()
    if rounding == "zero":
        expected = np.where(exact == far, far, near)
    elif n:
        expected = np.where(np.floor(fraction * 2.0**n) + noise.numpy() >= 2.0**n, far, near)
    else:
        edges = np.array(fmt.edges)[below]
        even = np.array(fmt.codes)[below + 1] % 2 == 0
        ties = {"nearest": even, "away": (exact > 0) | (exact == 0) & even, "inward": (exact < 0) | (exact == 0) & even}
        up = (exact > edges) | ((exact == edges) & ties[rounding])
        expected = np.where(up | (exact == high), high, low)
    expected = torch.from_numpy(expected).float()
    assert_same_bits(fmt.round(x, rounding, noise), expected + 0.0, f"{fmt.name}, {rounding}")
    assert_same_bits(fmt.decode(fmt.encode(x, rounding, noise)), expected + 0.0, f"codes of {fmt.name}, {rounding}")


# --- int4-6, the integers of IF4 (arXiv:2603.28765) ---


def test_int4_6_is_int4_stretched_to_the_range_of_e2m1():
    fmt = FORMATS["int4-6"]
    for code, value in enumerate(fmt.values().tolist()):
        k = code - 16 * (code >= 8)
        if k == -8:  # has no opposite: INT4's other 15 codes are a grid about zero
            assert math.isnan(value)
            continue
        around = [float(np.nextafter(np.float32(value), np.float32(end))) for end in (-np.inf, np.inf)]
        errors = [abs(Fraction(v) - Fraction(6 * k, 7)) for v in (value, *around)]
        assert errors[0] == min(errors), f"{value!r} is not the fp32 number nearest to {6 * k} / 7"
        assert fmt.decode(torch.tensor(-k & 15)).item() == -value, "odd"
    assert (fmt.bits, fmt.max, fmt.nan_code) == (4, FORMATS["e2m1"].max, 8)


def test_every_edge_of_int4_6():
    """64 fp32 numbers to either side of each midpoint of neighbouring values; sums and differences of two are exact in fp64."""
    fmt = FORMATS["int4-6"]
    grid = fmt.values().double().numpy()[[*range(9, 16), *range(8)]]
    ks = np.arange(-7, 8)
    middle = ((grid[:-1] + grid[1:]) / 2).astype(np.float32)
    x = (middle[:, None].view(np.int32) + np.arange(-64, 65, dtype=np.int32)).view(np.float32)
    doubled, edges = 2 * x.astype(np.float64), (grid[:-1] + grid[1:])[:, None]
    up = (doubled > edges) | ((doubled == edges) & (ks[1:, None] % 2 == 0))
    expected = np.where(up, ks[1:, None], ks[:-1, None]) & 15
    assert_same_bits(fmt.encode(torch.from_numpy(x)), torch.from_numpy(expected).to(torch.int32), "beside the edges")
    assert fmt.encode(torch.tensor([3.0, -3.0])).tolist() == [4, 12], "3 is half-way between 18/7 and 24/7: the even one"


def test_ends_and_what_is_special_of_int4_6():
    x = torch.tensor([6.0, 6.5, 3e38, -6.0, -7.0, -3e38, 0.0, -0.0, 1e-45, -0.4, math.nan, math.inf, -math.inf])
    fmt = FORMATS["int4-6"]
    assert fmt.encode(x).tolist() == [7, 7, 7, 9, 9, 9, 0, 0, 0, 0, 8, 8, 8]
    ends = torch.tensor([6.0, 6.0, 6.0, -6.0, -6.0, -6.0, 0.0, 0.0, 0.0, 0.0, math.nan, 6.0, -6.0])
    assert_same_bits(fmt.round(x), ends, "values: NaN stays, Inf saturates, zero has no sign")
