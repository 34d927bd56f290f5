"""quant/site.py: operands outside of the GEMMs. What they make of a tensor, what passes back, and where the model has them."""

import pytest
import torch
from helpers import assert_same_bits

from configs import load
from model import GPT, ModelConfig
from quant import Context, QuantSpec, Scale, Site, Sites, assign_sites, attach, quantize
from quant.policy import unquantized
from quant.random import Key
from quant.site import USE, sites

SMALL = ModelConfig(blocks=2, d_model=128, ffn=256, heads=2, kv_heads=1, head_dim=64, vocab_size=256, seq_len=32)
FLOOR = QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="floor"), "away")
FINE = QuantSpec("e8m10", scale=Scale("none"))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gpt(specs: Sites, dtype=torch.float32) -> GPT:
    model = GPT(SMALL, dtype).initialise(0)
    attach(model, Context(3))
    assign_sites(model, specs)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_quantised_tensor_forward_and_nothing_backward(dtype):
    site, x = Site("residual"), normal(2, 8, 64).to(dtype).requires_grad_()
    assert site(x) is x
    site.spec = FLOOR
    g = normal(2, 8, 64).to(dtype)
    y = site(x)
    y.backward(g)
    assert_same_bits(y.detach(), quantize(x.detach(), FLOOR).dequantize(dtype), "y")
    assert_same_bits(x.grad, g, "g")


def test_noise_is_that_of_the_micro_batch():
    site = Site("residual")
    site.spec, site.number = QuantSpec(rounding="stochastic"), 9
    site.context = Context(4)
    site.context.at(2, 5)
    x = normal(4, 64)
    assert_same_bits(site(x), quantize(x, site.spec, Key(4, 5, 9, USE)).dequantize(), "y")


def test_gains_in_a_narrow_band_come_out_as_one_under_floor():
    """The mechanism that arXiv:2506.20752 describes: significands of 1.75 to 2 all saturate. Rounded up, they stay apart."""
    gains = torch.linspace(0.876, 0.999, 128)
    for rule, distinct in (("floor", 1), ("rceil", 3)):
        site = Site("norm_gain")
        site.spec = QuantSpec("e4m3", (1, 32), Scale("e8m0", rule=rule))
        assert len(site(gains).unique()) == distinct
    assert site(gains).amax() == 1.0


def test_the_model_has_them():
    found = [site.kind for site in sites(GPT(SMALL))]
    assert sorted(found) == ["norm_gain"] * 5 + ["residual"] * 2 + ["scores"] * 2
    model = gpt(Sites())
    assert len({site.number for site in sites(model)} | {m.number for m in model.modules() if hasattr(m, "number")}) == 9 + 9


def test_without_specs_the_model_is_what_it_was_and_fine_ones_hardly_change_it():
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    plain = gpt(Sites())(tokens).detach()
    for kind in ("norm_gain", "scores", "residual"):
        fine, coarse = (gpt(Sites(**{kind: spec}))(tokens).detach() for spec in (FINE, FLOOR))
        # Gains are 1 at the start, so both formats have them; else E8M10 keeps 2^-11 of each number, E4M3 2^-4.
        scale = plain.abs().max()
        assert (fine - plain).abs().max() < 0.01 * scale
        assert (coarse - plain).abs().max() >= (fine - plain).abs().max()
        model = gpt(Sites(**{kind: FLOOR}))
        with unquantized(model):
            assert_same_bits(model(tokens).detach(), plain, f"{kind} switched off")
        assert all(site.spec == (FLOOR if site.kind == kind else None) for site in sites(model))


def test_scores_see_no_future():
    model = gpt(Sites(scores=FLOOR))
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 20:] = 7
    assert_same_bits(model(tokens)[:, :20].detach(), model(other)[:, :20].detach(), "the past")


def test_gradients_reach_what_is_quantised():
    model = gpt(Sites(norm_gain=FLOOR, scores=FLOOR, residual=FLOOR))
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    model.loss(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_wrong_sites():
    for override, said in {
        "sites.gain='mx'": "sites.gain: unknown key 'gain'; did you mean 'norm_gain'?",
        "sites.residual='mxx'": "sites.residual: no spec is named 'mxx'; did you mean 'mx'?",
        "sites.residual={like='mx',center=true}": "residual: history, center, source and ladders are for operands of a Linear",
        "sites.scores={like='mx',block=[1,96]}": "sites.scores of shape",
        "weights.store={format='e2m1',block=[1,48]}": "weights.store of",
        "weights.stored='mx'": "weights.stored: unknown key 'stored'; did you mean 'store'?",
    }.items():
        with pytest.raises(ValueError) as caught:
            load("configs/mxfp8.toml", [override])
        assert said in str(caught.value) and override in str(caught.value), str(caught.value)
