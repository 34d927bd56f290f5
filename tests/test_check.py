"""testing/check.py: what it is there to see, it sees."""

import os

import pytest

from quant import QuantSpec, kernel
from testing import check
from testing.variants import Variant

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
NV = Variant(QuantSpec(), None)


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(kernel, "DEVICES", {"cpu", "cuda"})


def test_a_budget_that_is_too_small_fails(there):
    row = check.check(NV, 100, 1.0)
    assert row.instructions > 4 and row.elements > 0 and row.spilled == 0
    assert row.failures == [f"{row.instructions:.2f} instructions an element, the budget is 1.0"]
    assert check.check(NV, 100, row.instructions + 0.1).failures == []


def test_a_byte_that_differs_fails(there, monkeypatch):
    """The kernel rounds as the reference of another spec does not."""
    encode = check.encode
    monkeypatch.setattr(check, "encode", lambda x, spec, *rest: encode(x.flip(0), spec, *rest))
    assert any(words.startswith("normal: packed_codes of e2m1/1x16") for words in check.check(NV, 100, None).failures)


def test_a_stack_fails(there):
    """A Hadamard transform on both sides with random bits is more than a thread has registers for."""
    spec = QuantSpec(hadamard=16, rounding="stochastic8")
    assert any("bytes spilled" in words for words in check.check(Variant(spec, spec), 100, None).failures)
