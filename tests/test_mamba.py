"""mamba.py: the scan against its recurrence, one step after the other; whole hybrids against transformers' Nemotron-H, an
implementation that is not ours; parameters to the digit; training, checkpoints and refusals of a small one."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv1d
from torch.utils.flop_counter import FlopCounterMode

import export
import train
from configs import load
from mamba import Mamba2, MambaConfig, conv, decays, scan
from model import GPT, ModelConfig, flops_per_token
from quant.linear import linears
from tests.test_model import HYBRID, draw
from tests.test_train import ROOT, folder, losses

U = 2.0**-53
TINY = ROOT / "configs/tiny-hybrid.toml"
SMALL_HYBRID = ["model.pattern=M-*M-", "model.blocks=5"]


# --- the scan ---


def recurrence(x, a, b, c, state):
    """The definition. x [B, T, H, P], a [B, T, H], b, c [B, T, G, N], state [B, H, N, P] -> y, state."""
    b, c = (t.repeat_interleave(x.shape[2] // b.shape[2], 2) for t in (b, c))
    ys = []
    for t in range(x.shape[1]):
        state = a[:, t, :, None, None].exp() * state + b[:, t, :, :, None] * x[:, t, :, None, :]
        ys.append((state * c[:, t, :, :, None]).sum(2))
    return torch.stack(ys, 1), state


def operands(seed: int, B: int, T: int, H: int, P: int, G: int, N: int, steep: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, P), (B, T, H), (B, T, G, N), (B, T, G, N), (B, H, N, P)
    x, a, b, c, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x, -steep * a.abs(), b, c, state]


def with_gradients(f, given, weights):
    """What f returns, and the gradients by all it is given."""
    given = [t.clone().requires_grad_() for t in given]
    found = f(*given)
    sum((t * w).sum() for t, w in zip(found, weights, strict=True)).backward()
    return [t.detach() for t in found] + [t.grad for t in given]


sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 24), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)
)


@given(sizes, st.integers(1, 9), st.sampled_from([0.0, 0.1, 4.0]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_scan_is_its_recurrence(size, chunk, steep, seed):
    """Values and all gradients, in fp64. Each entry of them is a sum of terms, a product of at most five numbers and a decay.

    A term takes 6 roundings of u for its product; 3 T for its decay, of at most T exponentials (2 u) and products, and T Z for
    the exponents' sums, Z the largest sum of |a| (their error T u Z is one of the result); and no more additions than there are
    indices: N, P, H, and 3 T over positions, chunks and the sums of gradients. All are relative, so the difference of two such
    programs is within twice their sum of the same entry with every factor made positive, which the recurrence itself gives."""
    B, T, G, ratio, P, N = size
    H = G * ratio
    values = operands(seed, B, T, H, P, G, N, steep)
    weights = [torch.randn_like(values[0]), torch.randn_like(values[4])]
    ours = with_gradients(lambda *each: scan(*each, chunk), values, weights)
    reference = with_gradients(recurrence, values, weights)
    positive = [t if t is values[1] else t.abs() for t in values]
    largest = with_gradients(recurrence, positive, [w.abs() for w in weights])
    Z = float(-values[1].sum(1).min())
    bound = 2 * (6 + 6 * T + T * Z + N + P + H) * U
    for name, found, wanted, size in zip(
        ("y", "state", "dx", "da", "db", "dc", "dstate"), ours, reference, largest, strict=True
    ):
        assert ((found - wanted).abs() <= bound * size).all(), name


def test_the_bound_of_the_scan_would_notice():
    """A decay that is one step late is 10^10 times further away."""
    x, a, b, c, state = operands(0, 1, 12, 2, 3, 1, 4, 0.1)
    y = scan(x, a, b, c, state, 5)[0]
    assert (y - recurrence(x, a.roll(1, 1), b, c, state)[0]).abs().max() > 1e-2


def test_what_is_forgotten_is_no_nan():
    """exp(-1000) is 0, and so is its gradient; the future is exp(-inf)."""
    values = operands(0, 1, 9, 2, 2, 1, 3, 0.0)
    values[1] -= 1000
    for found in with_gradients(lambda *each: scan(*each, 4), values, [torch.ones_like(values[0]), torch.ones_like(values[4])]):
        assert found.isfinite().all()
    x, _, b, c, _ = values
    assert torch.equal(scan(*values, 4)[0], (c * b).sum(-1).repeat_interleave(2, 2)[..., None] * x)


def test_decays():
    a = torch.tensor([-1.0, -2.0, -4.0])
    inf = math.inf
    assert decays(a).tolist() == [[0, -inf, -inf], [-2, 0, -inf], [-6, -4, 0]]


@given(st.integers(2, 5), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_convolution_is_torchs(W, T, seed):
    """Of small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    x, taps, bias = (torch.randint(-9, 10, s, generator=generator).float() for s in ((2, W - 1 + T, 3), (W, 3), (3,)))
    wanted = conv1d(x.mT, taps.T[:, None].contiguous(), bias, groups=3).mT
    assert torch.equal(conv(x, taps, bias), wanted)


# --- the model ---


def nemotron(c: ModelConfig) -> transformers.NemotronHForCausalLM:
    inner, _, heads = c.mamba.widths(c.d_model)
    config = transformers.NemotronHConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        hybrid_override_pattern=c.pattern,
        intermediate_size=c.ffn,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        mamba_num_heads=heads,
        mamba_head_dim=inner // heads,
        n_groups=c.mamba.groups,
        ssm_state_size=c.mamba.state,
        conv_kernel=c.mamba.conv,
        chunk_size=7,
        layer_norm_epsilon=c.norm_eps,
        attn_implementation="eager",
    )
    model = transformers.NemotronHForCausalLM(config).eval()
    for layer in model.model.layers:  # its time_step_limit is not read from the config (transformers 5.23)
        layer.mixer.time_step_limit = (0.0, math.inf)
    return model


def theirs(model: GPT, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters or gradients of ours by their names and in their shapes there."""
    c, found = model.config, {}
    around = {"embedding": "model.embeddings", "norm": "model.norm_f", "head": "lm_head"}
    inside = {"conv": "conv1d.weight", "conv_bias": "conv1d.bias", "up": "up_proj", "down": "down_proj", "out": "o_proj"}
    for name, t in of.items():
        parts = name.split(".")
        if parts[0] in around:
            found[f"{around[parts[0]]}.weight"] = t
            continue
        place = f"model.layers.{parts[1]}."
        rest = ".".join(inside.get(part, part) for part in parts[3:])
        if parts[2] == "norm":
            found[place + "norm.weight"] = t
        elif parts[3] == "qkv":
            q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
            names = (f"{place}mixer.{each}_proj.weight" for each in "qkv")
            found |= dict(zip(names, t.split([q, kv, kv]), strict=True))
        else:
            found[f"{place}mixer.{rest}"] = t.T[:, None] if rest == "conv1d.weight" else t
    return found


def lively(c: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """Gains other than 1, weights that do something."""
    model, generator = GPT(c, dtype).initialise(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and name.endswith(".weight"):
                p.mul_(4)
            elif name.endswith(("norm.weight", ".D")):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("groups", [1, 4])
def test_it_is_nemotron_h(groups, chunk):
    """Logits and the gradient of every parameter, both in fp32, with copied weights. What differs is the order of sums: over 10
    seeds at most 6.3e-7 of the largest logit and 4.5e-6 of the largest gradient of a tensor. The bounds leave a factor of 10; a
    wrong gate, group, sign or order changes the first digit."""
    c = replace(HYBRID, mamba=MambaConfig(head_dim=8, groups=groups, state=12, chunk=chunk), seq_len=48)
    ours, other = lively(c), nemotron(c)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        copied = theirs(ours, named)
        assert copied.keys() == dict(other.named_parameters()).keys()
        for name, p in other.named_parameters():
            p.copy_(copied[name])
    tokens, weights = draw((2, 37)), torch.randn(2, 37, c.vocab_size, generator=torch.Generator().manual_seed(1))
    logits, wanted = ours(tokens), other(tokens).logits
    assert (logits - wanted).abs().max() <= 6.3e-6 * wanted.abs().max()
    (logits * weights).sum().backward()
    (wanted * weights).sum().backward()
    gradients = theirs(ours, {name: p.grad for name, p in named.items()})
    for name, p in other.named_parameters():
        assert (gradients[name] - p.grad).abs().max() <= 4.5e-5 * p.grad.abs().max(), name


def test_the_chunk_changes_the_order_of_sums_only():
    """In fp64 but for norms, which are fp32: one that rounds the other way is 2^-24 (tests/test_sampling.py)."""
    found = [
        lively(replace(HYBRID, mamba=replace(HYBRID.mamba, chunk=chunk)), torch.float64)(draw((2, 32)))
        for chunk in (1, 5, 8, 99)
    ]
    for a, b in pairwise(found):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_positions():
    """To a last token that attends once, without rotary positions, those before it are a bag; with them, or Mamba-2, a text."""
    tokens = draw((1, 9))
    turned = torch.cat([tokens[:, :8].flip(1), tokens[:, 8:]], 1)
    for pattern, rope in (("-*-", False), ("-*-", True), ("M*-", False)):
        with torch.no_grad():
            model = lively(replace(HYBRID, pattern=pattern, blocks=3, rope=rope), torch.float64)
            a, b = model(tokens)[0, -1], model(turned)[0, -1]
        apart = float((a - b).abs().max() / a.abs().max())
        assert apart > 1e-3 if rope or "M" in pattern else apart < 1e-6, (pattern, rope)  # 1e-6 as above


def test_initialise():
    """Ranges of arXiv:2405.21060's code, and what a seed decides."""
    model = GPT(replace(HYBRID, d_model=1024, mamba=MambaConfig(head_dim=2, groups=1, state=4))).initialise(0)
    block = next(m for m in model.modules() if isinstance(m, Mamba2))
    A, dt = block.A_log.exp(), torch.nn.functional.softplus(block.dt_bias)
    for found, low, high, middle in ((A, 1, 16, 8.5), (dt.log(), math.log(1e-3), math.log(1e-1), math.log(1e-2))):
        assert low - 1e-4 <= found.min() and found.max() <= high + 1e-4
        # 1,024 uniform draws: their mean within five of its standard deviations, (high - low) / sqrt(12 * 1024)
        assert abs(found.mean() - middle) < 5 * (high - low) / math.sqrt(12 * len(found))
    assert block.D.eq(1).all() and block.norm.weight.eq(1).all()
    assert 0.49 < block.conv.abs().max() <= 0.5 and 0.49 < block.conv_bias.abs().max() <= 0.5
    residual = 0.02 / math.sqrt(5)  # five blocks, one residual each
    assert abs(block.out_proj.weight.std() / residual - 1) < 0.01 and abs(block.in_proj.weight.std() / 0.02 - 1) < 0.01


def test_linears_have_the_names_that_policies_use():
    names = [f"blocks.{n}.{kind}" for n, kind in ((0, "mamba.in_proj"), (0, "mamba.out_proj"), (1, "ffn.up"), (1, "ffn.down"))]
    names += [f"blocks.{n}.{k}" for n, k in ((2, "attn.qkv"), (2, "attn.out"), (3, "mamba.in_proj"), (3, "mamba.out_proj"))]
    assert list(linears(GPT(HYBRID))) == [*names, "blocks.4.ffn.up", "blocks.4.ffn.down", "head"]


def test_flops_per_token():
    """Forward and backward under torch's counter: matrices as `mm`; the scan and textbook attention as `bmm`. A scan in chunks
    of L does 3 * 2 L (G N + H P) a token more than the recurrence that is counted; to the zeros before the window, and from the
    state after it, no gradient goes: 6 H N P L a window less. Textbook attention is twice what it needs."""
    c = replace(HYBRID, pattern="M-M-*", mamba=replace(HYBRID.mamba, chunk=8))
    tokens, model = draw((3, c.seq_len)), GPT(c, torch.float32).initialise(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(tokens, tokens).backward()
    found = counter.get_flop_counts()["Global"]
    assert set(found) == {torch.ops.aten.mm, torch.ops.aten.bmm}
    inner, G, N, L = c.mamba.expand * c.d_model, c.mamba.groups, c.mamba.state, c.mamba.chunk
    chunks = 2 * (6 * L * (G * N + inner) - 6 * inner * N * L / c.seq_len)
    attention = 6 * c.seq_len * c.heads * c.head_dim
    assert sum(found.values()) == (flops_per_token(c) + chunks + attention) * tokens.numel()


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": "M-X*-"}, "'X' is no block, expected M (Mamba-2), * (attention) or - (feed-forward)"),
        ({"pattern": "M-"}, "blocks = 5, but pattern 'M-' has 2, one a block"),
        ({"mamba": MambaConfig(head_dim=24, groups=2)}, "expand * d_model = 128 makes 5.33333 heads of head_dim = 24"),
        ({"mamba": MambaConfig(head_dim=8, groups=3)}, "16 heads of head_dim = 8, and should make a multiple of groups = 3"),
    ],
)
def test_sizes_that_cannot_be(changes, sentence):
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        replace(HYBRID, **changes)


def test_an_in_proj_that_no_block_divides_is_named():
    """Its width depends on the number of heads. In NVFP4 the tiny one fits, in blocks of 128 it does not with 64 heads."""
    load(TINY, ["model.mamba.head_dim=8"])
    with pytest.raises(ValueError) as error:
        load(ROOT / "configs/fp8-blockwise.toml", [*SMALL_HYBRID, "model.mamba.state=16", "model.mamba.head_dim=8"])
    assert "blocks.0.mamba.in_proj" in str(error.value) and "of model.mamba = 1344" in str(error.value)


# --- a small one, trained ---


@pytest.fixture(scope="module")
def finished(small):
    train.main([str(TINY), *small, *SMALL_HYBRID, "run.name=hybrid", "policy.tail.last=0", "train.steps=2"])
    return folder(small, "hybrid")


def test_an_export_is_refused(finished):
    with pytest.raises(
        ValueError, match=re.escape("model.pattern = 'M-*M-': an export is an Arcee or a Llama, of transformer")
    ):
        export.export(str(finished), "nvfp4", "compressed-tensors", None, 1)


def test_its_parts_between_the_linears_are_kept_in_fp32(finished):
    """Also in quantized.safetensors, since the scan computes in it (tests/test_train.py: the packed file is the model)."""
    with safe_open(finished / "step_000002/quantized.safetensors", "pt") as f:
        names = [name for name in f.keys() if ".mamba." in name and "_proj" not in name]
        assert len(names) == 2 * 6 and {f.get_slice(name).get_dtype() for name in names} == {"F32"}


def test_what_decays():
    """Matrices and the taps of the convolution (Megatron's megatron/core/optimizer: all but what has one axis)."""
    config = load(TINY)
    model = GPT(config.model)
    decayed = {id(p) for p in train.make_optimizer(model.parameters(), config).param_groups[0]["params"]}
    spared = [n for n, p in model.named_parameters() if ".mamba." in n and id(p) not in decayed]
    assert {name.rsplit("mamba.")[1] for name in spared} == {"conv_bias", "dt_bias", "A_log", "D", "norm.weight"}


RECIPES = ["mxfp8", "mor-tensor", "fp8-blockwise", "fp8-adam", "bf16-kahan", "mxfp8-gains", "dqt"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in RECIPES[:2])) for n in RECIPES])
def test_it_trains_under_other_recipes(small, name):
    """A few steps and a checkpoint. With a vocabulary of 512 a loss begins at ln 512."""
    sizes = ["model.rope=false", "model.mamba={head_dim=2,state=16,chunk=16}", "model.seq_len=128"]
    steps = ["train.steps=8", "train.batch_size=2", "train.val_batches=1", "train.warmup=0", "train.lr=5e-3"]
    train.main([str(ROOT / f"configs/{name}.toml"), *small, *SMALL_HYBRID, *sizes, *steps, f"run.name=hybrid-{name}"])
    found = losses(folder(small, f"hybrid-{name}"))
    assert len(found) == 8 and found[-1] < found[0] - 0.5 and abs(found[0] - math.log(512)) < 0.2
