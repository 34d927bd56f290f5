"""model.py: sizes, what attends to what, positions, and that the same place in a run always gives the same bits.

Counts of parameters and FLOPs against the paper's figure and torch's counter; causality, rotary positions, grouped
heads, initialisation, recomputation and sampling on models of a few thousand parameters, without threads.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from configs import load
from mamba import MambaConfig
from model import GPT, Attention, FeedForward, ModelConfig, RMSNorm, _keep, flops_per_token, parameter_count, rope_table
from model import rotate as turn
from quant import Context, QuantSpec, Recipe, assign, attach
from quant.linear import linears
from quant.recipe import Dgrad, Fprop, Rule, Wgrad

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ModelConfig(blocks=2, d_model=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab_size=128, seq_len=32)
VARIANTS = {
    "relu2": {},
    "swiglu": {"activation": "swiglu"},
    "tied": {"tied_head": True},
    "swiglu-tied": {"activation": "swiglu", "tied_head": True},
    "full-heads": {"kv_heads": 4},
    "one-kv-head": {"kv_heads": 1},
    "wide-heads": {"head_dim": 32},
}


HYBRID = replace(SMALL, blocks=5, pattern="M-*M-", rope=False, mamba=MambaConfig(head_dim=8, groups=2, state=12, chunk=8))
MODELS = {name: replace(SMALL, **changes) for name, changes in VARIANTS.items()} | {"hybrid": HYBRID}


@pytest.fixture(params=MODELS)
def variant(request) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(params=VARIANTS)
def transformer(request) -> ModelConfig:
    return MODELS[request.param]


def draw(shape, high: int = SMALL.vocab_size, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- counts ---


def test_the_papers_ablation_model_has_its_parameters():
    config = ModelConfig(blocks=20, d_model=2048, ffn=6144, heads=16, kv_heads=8, head_dim=128, vocab_size=131072, seq_len=8192)
    assert parameter_count(config) == 1_291_929_600
    assert parameter_count(replace(config, tied_head=True)) == 1_291_929_600 - 131072 * 2048


def test_its_file_says_the_same():
    path = CONFIGS / "nvfp4-1.2b.toml"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    assert parameter_count(load(path).model) == 1_291_929_600


def test_parameter_count_is_that_of_the_built_model(variant):
    model = GPT(variant)
    assert parameter_count(variant) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_flops_per_token_are_those_that_run(transformer):
    """Forward and backward under torch's counter, a multiply-add as 2. Matrices appear as `mm`. Attention is run by its
    textbook form, so that its six products (two forward, four backward) appear as `bmm` over all T x T pairs, twice
    what flops_per_token counts: under the causal mask half of the pairs are work."""
    batch, tokens = 3, draw((3, SMALL.seq_len))
    model = GPT(transformer, torch.float32).initialise(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(tokens, tokens).backward()
    found = counter.get_flop_counts()["Global"]
    assert set(found) == {torch.ops.aten.mm, torch.ops.aten.bmm}
    matrices = found[torch.ops.aten.mm] + found[torch.ops.aten.bmm] // 2
    assert matrices == flops_per_token(transformer) * batch * SMALL.seq_len
    attention = 6 * transformer.blocks * transformer.seq_len * transformer.heads * transformer.head_dim
    assert found[torch.ops.aten.bmm] == 2 * attention * batch * SMALL.seq_len


def test_a_config_whose_heads_cannot_be_grouped_is_refused():
    with pytest.raises(ValidationError, match="heads = 4 must be a multiple of kv_heads = 3"):
        ModelConfig(heads=4, kv_heads=3)
    with pytest.raises(ValidationError):
        ModelConfig(head_dim=15)


# --- what a forward pass means ---


def test_the_forward_pass_by_hand(transformer):
    """The whole transformer again, in fp64 and as formulas; ours in fp64 too, but for what it does in fp32 by intent.

    fp32 steps: norm, rotary positions, each with a relative error of a few 2^-24. What they add up to over two blocks
    is measured: at most 3.6e-7 of the largest logit, 6 * 2^-24, over these seven variants with 20 seeds each. The bound
    leaves a factor 10; a wrong scale, sign, mask or order changes the first digit.
    """
    c, tokens = transformer, draw((2, 20))
    model = GPT(c, torch.float64).initialise(3)
    p = {name: w.detach().double() for name, w in model.named_parameters()}
    for name in p:  # gains other than 1, weights that do something
        p[name] = p[name] * 4 if p[name].ndim == 2 else p[name] + 0.3 * normal(*p[name].shape).double()
    model.load_state_dict({k: v.float() for k, v in p.items()}, strict=not c.tied_head)
    p = {name: w.detach().double() for name, w in model.named_parameters()}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"]

    def turned(x):  # [B, H, T, d] as complex numbers
        half = c.head_dim // 2
        angle = torch.arange(x.shape[2]).double()[:, None] / c.rope_base ** (torch.arange(half).double() / half)
        y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([y.real, y.imag], -1)

    h = p["embedding.weight"][tokens]
    for i in range(c.blocks):
        b = f"blocks.{i}"
        x = norm(h, f"{b}.attn_norm") @ p[f"{b}.attn.qkv.weight"].T
        x = x.view(2, 20, -1, c.head_dim).transpose(1, 2)
        q, k, v = x[:, : c.heads], x[:, c.heads : c.heads + c.kv_heads], x[:, c.heads + c.kv_heads :]
        each = [n // (c.heads // c.kv_heads) for n in range(c.heads)]  # query head -> its key-value head
        scores = turned(q) @ turned(k)[:, each].transpose(-1, -2) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v[:, each]).transpose(1, 2).reshape(2, 20, -1)
        h = h + y @ p[f"{b}.attn.out.weight"].T
        u = norm(h, f"{b}.ffn_norm") @ p[f"{b}.ffn.up.weight"].T
        u = u[..., : c.ffn] * u[..., : c.ffn].sigmoid() * u[..., c.ffn :] if c.activation == "swiglu" else u.relu() ** 2
        h = h + u @ p[f"{b}.ffn.down.weight"].T
    head = p["embedding.weight" if c.tied_head else "head.weight"]
    wanted = norm(h, "norm") @ head.T
    found = model(tokens)
    assert found.dtype == torch.float64
    assert (found - wanted).abs().max() <= 3.6e-6 * wanted.abs().max()


def test_the_loss_is_the_mean_of_the_tokens():
    model, tokens, targets = GPT(SMALL).initialise(0), draw((2, 32)), draw((2, 32), seed=1)
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16 and logits.shape == (2, 32, SMALL.vocab_size)
    each = model.loss(tokens, targets, reduction="none")
    wanted = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).flatten()
    # fp32 log-softmax over 128: a sum of 128 positive terms (relative error < 127 * 2^-24 whatever the order), exp and
    # log of a few ulp, and two subtractions of numbers below 8: less than 140 * 2^-24 + 2 * 2^-22 = 148 * 2^-24 in all.
    assert each.dtype == torch.float32 and (each.double() - wanted).abs().max() < 148 * 2**-24
    # And the mean of 64 of them: 64 more roundings, each at most 2^-24 of a value below 8.
    assert abs(model.loss(tokens, targets).item() - wanted.mean().item()) < (148 + 64 * 8) * 2**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_causality_is_exact(variant, dtype):
    model = GPT(variant, dtype).initialise(0)
    tokens = draw((2, variant.seq_len))
    before = model(tokens)
    for t in (0, 1, 7, 16, variant.seq_len - 1):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % variant.vocab_size
        after = model(changed)
        assert torch.equal(after[0, :t], before[0, :t])
        assert torch.equal(after[1], before[1])  # sequences of a batch do not meet
        assert (after[0, t:] != before[0, t:]).any(-1).all()  # while every later position sees the change


# --- positions ---

# Bound for q.k after `rotate`. Each turned component is fl(fl(a c) - fl(b s)) with c, s rounded once (half an ulp below
# 1: 2^-25), so its error is at most (|a| + |b|)(2^-25 + 2^-24 + 2^-24) <= sqrt(2) r 2.5 * 2^-24 for a pair of length r,
# and that of the pair sqrt(2) times as long: 5 * 2^-24 r. Hence |dq| <= 5 * 2^-24 |q|, the same for k, and q.k in fp64
# is off by at most 10 * 2^-24 |q| |k| to first order; 21 where two of them are compared, with room for second order.
ULPS = 2**-24


def scores(q: torch.Tensor, k: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """q, k [d] -> q.k for each pair of positions [T, T], in fp64 of what `model.rotate` returns."""
    table, T = rope_table(config), config.seq_len
    q, k = (turn(v.expand(1, 1, T, -1), table)[0, 0].double() for v in (q, k))
    return q @ k.T


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_scores_depend_on_the_distance_only(base):
    config = replace(SMALL, seq_len=64, rope_base=base)
    q, k = normal(16), normal(16, seed=1)
    s = scores(q, k, config)
    bound = 21 * ULPS * float(q.double().norm() * k.double().norm())
    for distance in range(-63, 64):
        diagonal = s.diagonal(distance)
        assert diagonal.max() - diagonal.min() <= bound
    row = s[32]  # and they do depend on it: no two distances of the same key look alike
    assert row.sort().values.diff().min() > bound


def test_scores_by_formula():
    config = replace(SMALL, seq_len=64, rope_base=500.0)
    q, k = normal(16), normal(16, seed=1)
    pairs = torch.complex(q[:8].double(), q[8:].double()) * torch.complex(k[:8].double(), k[8:].double()).conj()
    distance = torch.arange(64)[:, None] - torch.arange(64)[None, :]
    angle = distance[..., None].double() * 500.0 ** -(torch.arange(8).double() / 8)
    wanted = (pairs * torch.polar(torch.ones_like(angle), angle)).real.sum(-1)
    bound = 11 * ULPS * float(q.double().norm() * k.double().norm())  # one of them exact
    assert (scores(q, k, config) - wanted).abs().max() <= bound


def test_position_zero_is_left_alone_and_lengths_stay():
    x, table = normal(2, 3, 32, 16), rope_table(SMALL)
    y = turn(x, table)
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and not torch.equal(y[:, :, 1], x[:, :, 1])
    before, after = x.double().norm(dim=-1), y.double().norm(dim=-1)
    assert ((after - before).abs() <= 6 * ULPS * before).all()  # 5 as above, and the second order
    assert turn(x.bfloat16(), table).dtype == torch.bfloat16


# --- parts ---


def test_grouped_heads_are_expanded_heads():
    """x in {-1, 0, 1} and weights in multiples of 1/8 make every sum of qkv exact in any order, so q, k, v are the same
    bits in both models, and each head then runs through the same attention: equal, not close."""
    c = SMALL
    grouped, full = Attention(c), Attention(replace(c, kv_heads=c.heads))
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-3, 4, (8, c.head_dim, c.d_model), generator=generator) / 8  # heads: 4 of q, 2 of k, 2 of v
    q, k, v = w[:4], w[4:6], w[6:]
    out = normal(c.d_model, c.heads * c.head_dim)
    with torch.no_grad():
        grouped.qkv.weight.copy_(w.flatten(0, 1))
        full.qkv.weight.copy_(torch.cat([q, k[[0, 0, 1, 1]], v[[0, 0, 1, 1]]]).flatten(0, 1))
        grouped.out.weight.copy_(out)
        full.out.weight.copy_(out)
    x = torch.randint(-1, 2, (2, 32, c.d_model), generator=generator).float()
    a, b = grouped(x, rope_table(c)), full(x, rope_table(c))
    assert torch.equal(a, b)
    with torch.no_grad():  # heads grouped as 0101 instead of 0011 would be something else
        full.qkv.weight.copy_(torch.cat([q, k[[0, 1, 0, 1]], v[[0, 1, 0, 1]]]).flatten(0, 1))
    assert not torch.equal(a, full(x, rope_table(c)))


def test_swiglu_has_its_gate_above_its_value():
    """One hidden unit and exact inputs: silu(2) * 3, not silu(3) * 2."""
    ffn = FeedForward(replace(SMALL, d_model=1, ffn=1, activation="swiglu"))
    with torch.no_grad():
        ffn.up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        ffn.down.weight.fill_(1.0)
    assert ffn(torch.ones(1, 1, 1)).item() == (F.silu(torch.tensor(2.0)) * 3).item()


def test_relu2():
    ffn = FeedForward(replace(SMALL, d_model=1, ffn=2))
    with torch.no_grad():
        ffn.up.weight.copy_(torch.tensor([[3.0], [-5.0]]))
        ffn.down.weight.fill_(1.0)
    assert ffn(torch.ones(1, 1, 1)).item() == 9.0  # -5 is cut, 3 squared


def test_norm_is_computed_in_fp32():
    """In BF16 the squares of 300 and 301 are one number; the result is the fp32 one rounded once."""
    norm, x = RMSNorm(64, 1e-5), (normal(4, 64) * 300).bfloat16()
    wanted = F.rms_norm(x.float(), (64,), eps=1e-5)
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), wanted.bfloat16())


def test_variants_train(variant):
    model, tokens = GPT(variant).initialise(0), draw((2, 32))
    first = model.loss(tokens, tokens.roll(-1, 1))
    first.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.count_nonzero() > 0, name
        assert p.grad.dtype == torch.float32
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad / p.grad.norm()
    assert model.loss(tokens, tokens.roll(-1, 1)) < first


def test_a_tied_head_is_the_embedding():
    model = GPT(replace(SMALL, tied_head=True)).initialise(0)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert model(draw((1, 8))).count_nonzero() == 0


def test_linears_have_the_names_that_policies_and_checkpoints_use():
    names = [f"blocks.{n}.{k}" for n in range(2) for k in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")] + ["head"]
    assert list(linears(GPT(SMALL))) == names
    plain = [m for m in GPT(SMALL).modules() if type(m) is nn.Linear]
    assert not plain  # every matrix that multiplies activations is ours


# --- the same bits again ---


def test_initialise_is_a_function_of_the_seed_alone(variant):
    torch.manual_seed(0)
    a, b, c = GPT(variant), GPT(variant, torch.float32, recompute="full"), GPT(variant)
    state = torch.get_rng_state()
    a.initialise(5)
    torch.manual_seed(99)
    b.initialise(5)
    c.initialise(6)
    torch.manual_seed(0)
    GPT(variant), GPT(variant), GPT(variant)
    assert torch.equal(torch.get_rng_state(), state)  # a.initialise(5) drew nothing from it
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, r) == name.endswith(("norm.weight", ".D")), name


def test_initialise_draws_nothing_from_the_global_generator():
    model, state = GPT(SMALL), torch.get_rng_state()
    model.initialise(0)
    model.sample([1, 2], 2)
    model.loss(draw((1, 8)), draw((1, 8))).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_initialise_scales():
    """Standard deviations. That of n normal draws has a relative error of 1 / sqrt(2 n); five of them are allowed."""
    config = replace(SMALL, blocks=8)
    for name, p in GPT(config).initialise(0).named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        wanted = 0.02 / 4 if name.endswith(("attn.out.weight", "ffn.down.weight")) else 0.02  # sqrt(2 * 8) = 4
        assert abs(p.std().item() / wanted - 1) < 5 / math.sqrt(2 * p.numel()), name


NV = QuantSpec()
SR = replace(NV, rounding="stochastic8")
W2D = replace(NV, block=(16, 16))
RECIPES = {
    "nearest": Recipe(Fprop(NV, W2D), Dgrad(NV, W2D), Wgrad(replace(NV, hadamard=16), replace(NV, hadamard=16))),
    "nvfp4": Recipe(Fprop(NV, W2D), Dgrad(SR, W2D), Wgrad(replace(SR, hadamard=16), replace(NV, hadamard=16))),
    "sr-everywhere": Recipe(
        Fprop(replace(NV, rounding="stochastic"), replace(W2D, rounding="stochastic")),
        Dgrad(SR, replace(W2D, rounding="stochastic8")),
        Wgrad(*[replace(SR, hadamard=16, signs="fresh")] * 2),
    ),
    "fprop-only": Recipe(Fprop(NV, NV)),
    "backward-only": Recipe(dgrad=Dgrad(SR, W2D), wgrad=Wgrad(SR, SR)),
}


def run(recipe: str, recompute: str, activation: str = "relu2", micro_batch: int = 3):
    """(loss, gradients) at a place in a run."""
    model = GPT(replace(SMALL, activation=activation), recompute=recompute).initialise(0)
    context = Context(seed=1)
    attach(model, context)
    assign(model, RECIPES, [Rule(match="head", recipe="bf16"), Rule(recipe=recipe)])
    context.at(step=2, micro_batch=micro_batch)
    loss = model.loss(draw((2, 32)), draw((2, 32), seed=1))
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("level", ["selective", "full"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("recipe", ["bf16", *RECIPES])
def test_recompute_gives_the_same_bits(recipe, activation, level):
    loss, found = run(recipe, "none", activation)
    again, recomputed = run(recipe, level, activation)
    assert torch.equal(loss, again)
    for name, g in found.items():
        assert g.isfinite().all() and torch.equal(g, recomputed[name]), name


@pytest.mark.parametrize("level", ["selective", "full"])
def test_recompute_runs_blocks_twice_and_only_where_gradients_are_wanted(level):
    """Otherwise the test above compares nothing."""
    model, calls = GPT(SMALL, recompute=level).initialise(0), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops early
    loss = model.loss(draw((1, 8)), draw((1, 8)))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(draw((1, 8)))
    assert len(calls) == 3


def test_selective_recomputation_multiplies_once():
    """Where "full" has the products of its blocks once more."""
    found = {}
    for level in ("none", "selective", "full"):
        model = GPT(SMALL, recompute=level).initialise(0)
        with FlopCounterMode(display=False) as counter:
            model.loss(draw((1, 8)), draw((1, 8))).backward()
        counts = counter.get_flop_counts()["Global"]
        found[level] = {op: n for op, n in counts.items() if "mm" in str(op)}
    assert found["selective"] == found["none"] and sum(found["full"].values()) > sum(found["none"].values())


def test_selective_recomputation_keeps_what_kernels_multiply():
    pytest.importorskip("triton")
    import quant.launch  # noqa: F401

    kept, again = (_keep(None, op) for op in (torch.ops.narrow.matmul.default, torch.ops.aten.add.Tensor))
    assert kept == CheckpointPolicy.MUST_SAVE and again == CheckpointPolicy.PREFER_RECOMPUTE


def test_noise_depends_on_the_micro_batch_and_only_where_it_is_used():
    for recipe, draws in (("nearest", False), ("nvfp4", True)):
        (loss, a), (same, b) = run(recipe, "none", micro_batch=3), run(recipe, "none", micro_batch=4)
        assert torch.equal(loss, same)  # no noise in the forward pass of either
        assert all(torch.equal(a[n], b[n]) for n in a) != draws
    assert not torch.equal(run("sr-everywhere", "none", micro_batch=3)[0], run("sr-everywhere", "none", micro_batch=4)[0])


# --- sampling ---


@pytest.fixture(scope="module")
def opinionated() -> GPT:
    """A model whose logits differ by several nats, as an untrained one's do not."""
    model = GPT(SMALL, torch.float32).initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model


def test_sample_is_a_function_of_its_seed(opinionated):
    prompt = [1, 2, 3]
    texts = [opinionated.sample(prompt, 12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert prompt == [1, 2, 3] and all(len(t) == 15 and t[:3] == prompt for t in texts)
    assert all(type(token) is int and 0 <= token < SMALL.vocab_size for token in texts[0])
    torch.manual_seed(123)
    assert opinionated.sample(prompt, 12) == texts[0]
    assert opinionated.sample(prompt, 0) == prompt


def test_temperature_zero_takes_the_likeliest(opinionated):
    text = opinionated.sample([5, 9], 10, temperature=0, seed=0)
    assert text == opinionated.sample([5, 9], 10, temperature=0, seed=1)
    assert text == opinionated.sample([5, 9], 10, temperature=1e-4)  # probabilities 0 and 1: softmax must not overflow
    with torch.no_grad():
        padded = torch.tensor([text + [0] * (SMALL.seq_len - len(text))])
        likeliest = opinionated(padded)[0].argmax(-1).tolist()
    assert text[2:] == likeliest[1:11]


def test_temperature_spreads(opinionated):
    firsts = {t: {opinionated.sample([5], 1, temperature=t, seed=s)[1] for s in range(40)} for t in (0.05, 1.0, 100.0)}
    assert len(firsts[0.05]) < len(firsts[1.0]) < len(firsts[100.0])


def test_samples_follow_the_probabilities(opinionated):
    """Of 600 draws at temperature 2 the share of the likeliest token: within five standard deviations of its p."""
    n = 600
    with torch.no_grad():
        p = (opinionated(torch.tensor([[5] + [0] * 31]))[0, 0] / 2.0).softmax(-1)
    best, share = int(p.argmax()), float(p.max())
    hits = sum(opinionated.sample([5], 1, temperature=2.0, seed=s)[1] == best for s in range(n))
    assert abs(hits / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_sample_looks_back_seq_len_tokens(opinionated):
    """Beyond the window only the last seq_len tokens count, and padding after the last token does not."""
    prompt = draw((40,)).tolist()
    long = opinionated.sample(prompt, 4, seed=3)
    assert long[:40] == prompt and long[40:] == opinionated.sample(prompt[-32:], 4, seed=3)[32:]
    assert opinionated.sample([7] * 8 + prompt, 1, temperature=0)[-1] == long_argmax(opinionated, prompt[-32:])


def long_argmax(model: GPT, window: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([window]))[0, -1].argmax())


def test_sample_needs_something_to_continue(opinionated):
    with pytest.raises(ValueError, match="token"):
        opinionated.sample([], 1)


def test_sample_runs_quantised():
    model = GPT(SMALL).initialise(0)
    attach(model, Context())
    assign(model, RECIPES, [Rule(recipe="sr-everywhere")])
    assert model.sample([1], 3, seed=2) == model.sample([1], 3, seed=2)
