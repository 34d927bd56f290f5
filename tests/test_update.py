"""quant/update.py: weights on a grid. Stochastic and compensated BF16 updates and direct quantised training against their
formulas, bit for bit, and what they are for: small updates that nearest rounding loses arrive."""

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor, nn

from quant import QuantSpec, Scale, Weights, WeightStore
from quant.random import Key, random_ints
from quant.update import USE

BF16 = QuantSpec("bf16", scale=Scale("none"))
SR = QuantSpec("bf16", scale=Scale("none"), rounding="stochastic16")
INT8 = QuantSpec("int8", (-1, -1), Scale("fp32"), "stochastic")
GO = torch.zeros(())


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleDict({"a": nn.Linear(64, 32, bias=False), "b": nn.LayerNorm(64, bias=False)})


def moved(store: WeightStore, step: int, update: float | Tensor, skip: Tensor = GO) -> None:
    store.keep()
    with torch.no_grad():
        for p in store.stored.values():
            p.add_(update)
    store.put(step, skip)


def test_stochastic_bf16_is_the_published_bit_trick():
    """arXiv:2010.06192 as torchao and others have it: (bits + 16 random bits) with the lower 16 cleared. On magnitudes, so that
    it is the same for either sign."""
    m = model()
    store = WeightStore(m, Weights(SR), seed=5)
    store.begin()
    before = m["a"].weight.detach().clone()
    assert_same_bits(before, model()["a"].weight.detach().bfloat16().float(), "begun on the grid, to nearest")
    moved(store, 7, 1e-4)
    noise = random_ints(32, 64, 16, Key(5, 7, store.numbers["a.weight"], USE).words())
    expected = ((before + 1e-4).view(torch.int32) + noise & -0x10000).view(torch.float32)
    assert_same_bits(m["a"].weight.detach(), expected, "w'")


def test_small_updates_arrive_but_for_nearest():
    """1000 steps of 2^-12 from 1, where BF16's next number is 2^-7 away: nearest stays at 1 for good. Kahan's sum is right to
    the compensation's own rounding; the mean of 2048 stochastic sums, of 1000 steps with a variance below 2^-7 * 2^-12 each, is
    right to five standard errors: 5 sqrt(1000 * 2^-19 / 2048) = 0.0049."""
    ends = {}
    for name, weights in {"nearest": Weights(BF16), "sr": Weights(SR), "kahan": Weights(BF16, kahan=True)}.items():
        m = model()
        with torch.no_grad():
            m["a"].weight.fill_(1.0)
        store = WeightStore(m, Weights(weights.store, weights.kahan, ("a.weight",)), 0)
        for step in range(1000):
            moved(store, step, 2.0**-12)
        ends[name] = m["a"].weight.detach().double()
    exact = 1 + 1000 * 2.0**-12
    assert (ends["nearest"] == 1).all()
    assert abs(float(ends["sr"].mean()) - exact) < 0.0049 and ends["sr"].std() > 0
    assert (ends["kahan"] - exact).abs().max() <= 2.0**-7


def test_kahan_by_its_formula():
    m = model()
    store = WeightStore(m, Weights(BF16, kahan=True), 0)
    store.begin()
    w, c = m["a"].weight.detach().clone(), torch.zeros(32, 64)
    g = torch.Generator().manual_seed(1)
    for step in range(20):
        update = torch.randn(32, 64, generator=g) * 1e-3
        store.keep()
        with torch.no_grad():
            m["a"].weight.add_(update)
        store.put(step, GO)
        y = ((w + update) - w) + c
        new = (w + y).bfloat16().float()
        c = (y - (new - w)).bfloat16().float()
        w = new
        assert_same_bits(m["a"].weight.detach(), w, f"w, step {step}")
        assert_same_bits(store.compensation["a.weight"], c, f"c, step {step}")


def test_integers_keep_the_grid_of_the_weights_before():
    """arXiv:2412.04787: the scale of a step is that of the weights before it, so what does not move stays where it is; every
    other weight lands on one of its two neighbours, and beyond the largest on that."""
    m = model()
    store = WeightStore(m, Weights(INT8, match=("a.weight",)), 0)
    gain = m["b"].weight.detach().clone()
    store.begin()
    w = m["a"].weight
    for step in range(3):
        before = w.detach().clone()
        grid = float(before.abs().max()) / 127
        update = torch.zeros(32, 64)
        update[:16] = torch.linspace(-0.05, 0.05, 16 * 64).view(16, 64)
        moved(store, step, update)
        assert_same_bits(w.detach()[16:], before[16:], "what did not move")
        k = w.detach().double() / grid
        # values are code * scale in fp32, the scale a reciprocal of a quotient: 4 roundings of 2^-24 of at most 127
        assert (k - k.round()).abs().max() < 127 * 4 * 2.0**-24 and k.abs().max() < 127.001
        exact = ((before + update).double() / grid).clamp(-127, 127)
        assert ((k - exact).abs() < 1.001).all() and (k - exact).abs().max() > 0.5
    assert_same_bits(m["b"].weight.detach(), gain, "what no pattern matches")


@pytest.mark.parametrize(
    "weights", [Weights(SR), Weights(BF16, kahan=True), Weights(INT8, match=("a.*",))], ids=["sr", "k", "i"]
)
def test_a_frozen_step_moves_nothing(weights):
    m = model()
    store = WeightStore(m, weights, 0)
    store.begin()
    moved(store, 0, 1e-3)
    before, c = m["a"].weight.detach().clone(), {n: t.clone() for n, t in store.compensation.items()}
    moved(store, 1, 1e-3, torch.ones(()))
    assert_same_bits(m["a"].weight.detach(), before, "w")
    for name, t in c.items():
        assert_same_bits(store.compensation[name], t, "c")


def test_nothing_is_stored_by_default():
    store = WeightStore(model(), Weights(), 0)
    assert not store.stored and store.describe() == ""
    assert WeightStore(model(), Weights(SR), 0).describe() == "weights: bf16 unscaled sr16, 2 of 2 tensors"


def test_wrong_weights():
    with pytest.raises(ValueError, match="'blocks.' matches none of the parameters a.weight, b.weight"):
        WeightStore(model(), Weights(SR, match=("blocks.",)), 0)
    with pytest.raises(ValueError, match="kahan: expected a store of an unscaled format"):
        Weights(INT8, kahan=True)
    with pytest.raises(ValueError, match="in their own basis, not hadamard 16"):
        Weights(QuantSpec(hadamard=16))
    with pytest.raises(ValueError, match="store: history, center, source and ladders are for operands of a Linear"):
        Weights(QuantSpec(source="fprop"))
