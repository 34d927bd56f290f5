"""testing/operands.py finds what is planted: a byte, a scale, an element that is no neighbour, a rate that is off."""

from dataclasses import replace

import pytest
import torch

from quant import QuantSpec, Scale
from quant.encode import encode
from quant.random import Key
from testing.operands import astray, beside, difference, frequencies, numbers

KEY = Key(5)
SPEC = QuantSpec("e4m3", (1, 32), Scale("e8m0"), rounding="stochastic8")


def test_a_byte_that_differs_is_named():
    x = numbers("normal", 32, 64)
    a, b = encode(x, SPEC, KEY), encode(x, SPEC, KEY)
    assert difference(a, b) == ""
    a.packed_codes[3, 7] ^= 1
    assert difference(a, b).startswith("packed_codes") and "[3, 7]" in difference(a, b) and "1 of 2048" in difference(a, b)
    assert difference(b, encode(x[:16], SPEC, KEY)).startswith("[32, 64]")
    b = replace(b, scale_codes=b.scale_codes.int())
    assert "torch.uint8 [32, 2], expected torch.int32 [32, 2]" in difference(a, b, ("scale_codes",))


@pytest.mark.parametrize("turned", [False, True])
def test_an_element_that_is_no_neighbour_is_named(turned):
    x = numbers("normal", 64, 32).t() if turned else numbers("normal", 32, 64)
    q, around = encode(x, SPEC, KEY), beside(x, SPEC, KEY)
    assert astray(q, x, KEY) == "" and around.p.shape == x.shape
    i = tuple((around.up > around.down).nonzero()[5].tolist())
    q.packed_codes[i] += 2 if q.packed_codes[i] % 128 < 64 else -2
    assert f"at {list(i)}" in astray(q, x, KEY)
    q = encode(x, SPEC, KEY)
    q.scale_codes[1, 1] += 1
    assert astray(q, x, KEY).startswith("scale_codes")


@pytest.mark.parametrize("rounding", ["nearest", "zero", "stochastic2"])
def test_rates_of_other_roundings_are_out_of_bounds(rounding):
    """Two bits: P(up) is up to 1/4 below the fraction."""
    x = numbers("normal", 256, 512)
    assert all(abs(rate - due) < bound for _, due, rate, bound in frequencies(encode(x, SPEC, KEY), x, KEY))
    other = replace(encode(x, replace(SPEC, rounding=rounding), KEY), spec=SPEC)
    assert not all(abs(rate - due) < bound for _, due, rate, bound in frequencies(other, x, KEY))


def test_kinds_of_numbers():
    assert numbers("nan", 32, 32).isnan().sum() == 1 and numbers("normal", 8, 8, torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="numbers 'odd': expected normal"):
        numbers("odd", 8, 8)
