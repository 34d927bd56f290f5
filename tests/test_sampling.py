"""Sampling with a cache: what one token sees, alone after the others, is what it sees among them; and what is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, ModelConfig, Past, draw
from quant import Context, Linear, QuantSpec, Recipe, Scale, assign, attach, quantize
from quant.policy import assign_sites
from quant.recipe import Fprop, Rule, Sites
from tests.helpers import assert_same_bits
from tests.test_model import HYBRID, MODELS, SMALL
from tests.test_model import draw as ids

T = SMALL.seq_len
MX = QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="rceil"))
TILES = QuantSpec("e4m3", (16, 16), Scale("e8m0", rule="rceil"))
SITES = {"": Sites(), "scores": Sites(scores=MX, residual=MX)}


def build(config: ModelConfig = SMALL, dtype=torch.float32, spec: QuantSpec | None = None, sites: str = "") -> GPT:
    model = GPT(config, dtype).initialise(0).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # logits that differ by several nats
    attach(model, Context(gemm="te16" if spec else "fp32"))
    if spec:
        assign(model, {"x": Recipe(Fprop(spec, MX))}, [Rule(recipe="x")])
    assign_sites(model, SITES[sites])
    return model


@torch.no_grad()
def piecewise(model: GPT, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = model.cache(len(tokens))
    return torch.cat([model(part, cache) for part in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_a_cache_logits_are_the_same(name, dtype):
    """Nothing differs but the order of sums. Over these variants with 20 seeds each the largest difference was 6.1e-7 of the
    largest logit in fp32 (10 * 2^-24): the bound leaves a factor 10. In fp64 it was 7e-16 (3 * 2^-52), but a norm, which is
    always fp32, may round the other way, by 2^-24. A wrong position, mask or head changes the first digit."""
    model, tokens = build(MODELS[name], dtype), ids((2, T), seed=3)
    bound = 6.1e-6 if dtype == torch.float32 else 1e-6
    with torch.no_grad():
        whole = model(tokens)
    for sizes in ([5] + [1] * 27, [1] * T, [31, 1], [8, 16, 8]):
        assert (piecewise(model, tokens, sizes) - whole).abs().max() <= bound * whole.abs().max(), sizes
    shifted = piecewise(model, tokens.roll(1, 1), [5] + [1] * 27)
    assert (shifted - whole).abs().max() > 0.1 * whole.abs().max(), "the bound would notice"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 9), st.sampled_from([SMALL, HYBRID]))
@settings(max_examples=25, deadline=None)
def test_however_it_is_cut(sizes, seed, config):
    model, total = build(config, torch.float64), min(sum(sizes), T)
    sizes = [*sizes] if sum(sizes) <= T else [T]
    tokens = ids((1, total), seed=seed)
    with torch.no_grad():
        whole = model(tokens)
    assert (piecewise(model, tokens, sizes) - whole).abs().max() <= 1e-6 * whole.abs().max()  # as above


@pytest.mark.parametrize(("config", "sites"), [(SMALL, ""), (SMALL, "scores"), (HYBRID, "scores")], ids=["", "sites", "hybrid"])
def test_mxfp8_one_token_at_a_time_is_mxfp8(config, sites):
    """Blocks of a row, nothing shared by rows: each row has the codes it has in the window (exactly, first assertion). With
    GEMMs that add in a stated order (te16) only attention and norms may round otherwise, in fp64 by 2^-52, so that a code flips
    in one case of 10^12: with 20 seeds no bit differed, and 1e-6 of the largest logit leaves room for a norm's rounding. (A
    flipped code alone is 2^-4 of an element.)"""
    x = torch.randn(T, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([quantize(row[None], MX).dequantize() for row in x])
    assert_same_bits(rows, quantize(x, MX).dequantize())
    model, tokens = build(config, torch.float64, MX, sites), ids((1, T))
    with torch.no_grad():
        whole = model(tokens)
    assert (piecewise(model, tokens, [5] + [1] * 27) - whole).abs().max() <= 1e-6 * whole.abs().max()
    plain = build(config, torch.float64)
    with torch.no_grad():
        assert (plain(tokens) - whole).abs().max() > 1e-3 * whole.abs().max(), "it is quantised"


def test_an_evaluation_fills_up_blocks_of_several_rows():
    """With zeros, so that the rows that are there have the codes they have with zeros below them. In training it is refused."""
    linear = Linear(64, 32)
    linear.recipe, x = Recipe(Fprop(TILES, MX)), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="its rows, 5, must be a multiple of 16"):
        linear(x)
    linear.eval()
    assert_same_bits(linear(x), linear(torch.cat([x, torch.zeros(11, 64)]))[:5])
    model = build(spec=TILES)
    assert model.sample([1], 3, seed=2) == model.sample([1], 3, seed=2)


def test_a_cache_holds_seq_len_tokens():
    past = Past(SMALL, 1, torch.float32, torch.device("cpu"))
    part = torch.zeros(1, SMALL.kv_heads, 20, SMALL.head_dim)
    past.add(part, part)
    with pytest.raises(ValueError, match="a cache of 32 positions holds 20, and 20 more were given"):
        past.add(part, part)


def greedy(model: GPT, tokens: list[int], count: int) -> list[int]:
    """The rule of `decode`, without a cache."""
    window = tokens[-T:]
    for _ in range(count):
        with torch.no_grad():
            tokens = [*tokens, int(model(torch.tensor([window]))[0, -1].argmax())]
        window = [*window, tokens[-1]] if len(window) < T else [*window, tokens[-1]][-T // 2 :]
    return tokens


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["transformer", "hybrid"])
@pytest.mark.parametrize("prompt", [1, 5, T - 1, T, T + 9])
def test_greedy_text_is_that_without_a_cache(prompt, config):
    """Also beyond the window, where it is filled anew with its last half: 70 tokens pass that three times and more."""
    model, tokens = build(config), ids((prompt,)).tolist()
    assert model.sample(tokens, 70, temperature=0) == greedy(model, tokens, 70)


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["transformer", "hybrid"])
def test_a_batch_is_its_prompts(config):
    model, prompts = build(config), ids((3, 7))
    steps, sent, found = model.decode(prompts), None, []
    for _ in range(40):
        sent = steps.send(sent).argmax(-1)
        found.append(sent)
    together = torch.stack(found, 1).tolist()
    assert together == [model.sample(p, 40, temperature=0)[7:] for p in prompts.tolist()]


def test_a_text_ends_where_a_document_does():
    model = build()
    text = model.sample([1, 2, 3], 12, seed=0)
    end = text[8]
    assert model.sample([1, 2, 3], 12, seed=0, end=end) == text[: text.index(end, 3)]
    model.train()
    model.sample([1], 2)
    assert model.training, "it is left as it was"


# --- what is drawn ---


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20), st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_nucleus(logits, top_p, seed):
    """What is drawn is among the fewest likeliest tokens that have the share; the softmax of 20 is right to 1e-6."""
    logits = torch.tensor(logits)
    p = logits.double().softmax(-1)
    token = draw(logits, 1.0, top_p, torch.Generator().manual_seed(seed))
    before = float(p[p > p[token] + 1e-6].sum())  # likelier than it, all of them kept
    assert before < top_p + 1e-6
    if top_p == 1:
        expected = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
        assert token == int(expected)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2})])
def test_the_nucleus_by_hand(top_p, kept):
    """p = 1/2, 1/4, 1/8, 1/8, exact in fp32 up to the softmax; of equals the first is kept."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2() * torch.tensor(2.0).log()
    logits = logits + 2**-20 * torch.tensor([1.0, 0, 0, 0])  # so that 0.5 is reached whatever the last bit
    found = {draw(logits, 1.0, top_p, torch.Generator().manual_seed(seed)) for seed in range(200)}
    assert found == kept


def test_seeds():
    model = build()
    texts = [model.sample([1], 12, seed=seed, top_p=0.9) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert model.sample([1], 12, seed=5, top_p=1e-6) == model.sample([1], 12, temperature=0)
