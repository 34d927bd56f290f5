"""The transformer, read from top to bottom.

    h = embedding[tokens]                                                            [B, T, D]
    for each block:   h = h + attention(norm(h))        h = h + ffn(norm(h))
    logits = head(norm(h))                                                           [B, T, V]

    a hybrid:         h = h + mixer(norm(h)), one a block: `pattern` says which      M Mamba-2 (mamba.py), * attention, - ffn

RMSNorm, rotary positions (or none), grouped-query attention, squared ReLU or SwiGLU, no biases, no dropout, untied head. Every
matrix that multiplies activations is a quant.Linear; norms, embedding, softmax and the two attention products stay in
the compute dtype (arXiv:2509.25149, section 3 and appendix A). Parameters are fp32 masters and the compute dtype is an
explicit argument: there is no autocast.

    with a cache:  keys and values of the positions before come from `Past`, and tokens [B, T] are those after them

In a quantised model one token alone is another tensor than a window: its activations are quantised by the same specs, but what
several rows share (a tensor-wide amax, a block of several rows, filled up with rows of zeros) is that of its row alone.
Where blocks lie within rows and nothing is tensor-wide (MXFP8, MXFP4), a row has the same codes in both.

Left out: mixture of experts, dropout.
"""

import math
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mamba import Mamba2, MambaConfig, State
from quant import Linear, Site


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelConfig:
    """Sizes. Defaults are the tiny model; every width is a real multiple of 128.

    pattern: of a hybrid, one letter for each of `blocks`: M Mamba-2, * attention, - feed-forward. Empty: transformer blocks, of
      attention and feed-forward each. rope: rotary positions in attention; without, a hybrid has its order from Mamba's states.
    """

    blocks: int = Field(4, ge=1)
    d_model: int = Field(256, ge=1)
    ffn: int = Field(1024, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(64, ge=2, multiple_of=2)
    vocab_size: int = Field(2048, ge=1)
    seq_len: int = Field(256, ge=2)
    activation: Literal["relu2", "swiglu"] = "relu2"
    tied_head: bool = False
    rope: bool = True
    rope_base: float = Field(10000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    pattern: str = ""
    mamba: MambaConfig = MambaConfig()

    @property
    def mixers(self) -> str:
        """What writes to the residual stream, in order, in the letters of `pattern`."""
        return self.pattern or "*-" * self.blocks

    def __post_init__(self):
        if wrong := sorted(set(self.pattern) - set("M*-")):
            raise ValueError(f"pattern: {wrong[0]!r} is no block, expected M (Mamba-2), * (attention) or - (feed-forward)")
        if self.pattern and len(self.pattern) != self.blocks:
            raise ValueError(f"blocks = {self.blocks}, but pattern {self.pattern!r} has {len(self.pattern)}, one a block")
        if "M" in self.pattern:
            self.mamba.widths(self.d_model)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")


class RMSNorm(nn.Module):
    """x [..., D] -> x / rms(x) * gain, in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps, self.gain = nn.Parameter(torch.ones(size)), eps, Site("norm_gain")

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(torch.float32), x.shape[-1:], self.gain(self.weight), self.eps).to(x.dtype)


def rope_table(config: ModelConfig, device=None) -> Tensor:
    """fp32 [2, seq_len, head_dim / 2]: cos and sin of position / base^(2 i / head_dim)."""
    half = config.head_dim // 2
    frequency = config.rope_base ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.arange(config.seq_len, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).to(torch.float32)


def rotate(x: Tensor, table: Tensor, start: int = 0) -> Tensor:
    """Rotary positions start, start + 1, ...: x [B, H, T, d], pairs (i, i + d/2) turned by the angle of their position."""
    cos, sin = table[:, start : start + x.shape[2]]
    a, b = x.to(torch.float32).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Past:
    """A cache for one block: keys and values [B, KV, seq_len, d] in the compute dtype, the first `length` of them known."""

    def __init__(self, c: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device):
        self.k, self.v = torch.zeros(2, batch, c.kv_heads, c.seq_len, c.head_dim, dtype=dtype, device=device)
        self.length = 0

    def add(self, k: Tensor, v: Tensor) -> None:
        """k, v [B, KV, T, d] of the next T positions. Raises ValueError beyond seq_len."""
        here = slice(self.length, self.length + k.shape[2])
        if here.stop > self.k.shape[2]:
            raise ValueError(f"a cache of {self.k.shape[2]} positions holds {self.length}, and {k.shape[2]} more were given")
        self.k[:, :, here], self.v[:, :, here], self.length = k, v, here.stop


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.qkv = Linear(c.d_model, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.out = Linear(c.heads * c.head_dim, c.d_model)
        self.scores = Site("scores")

    def forward(self, x: Tensor, rope: Tensor | None, past: Past | None = None) -> Tensor:
        B, T, _ = x.shape
        start = past.length if past else 0
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H + 2 KV, T, d]
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if rope is not None:
            q, k = rotate(q, rope, start), rotate(k, rope, start)
        if past:
            past.add(k, v)
            known = past.length if self.scores.spec is None else None  # blocks of scores span all positions
            k, v = past.k[:, :, :known], past.v[:, :, :known]
        if self.scores.spec is None:
            seen = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(start) if start else None
            gqa = self.heads != self.kv_heads
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=gqa)
        else:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            future = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).triu(start + 1)
            scores = (q @ k.mT * self.head_dim**-0.5).masked_fill(future, 0)  # before a block's scale could see the future
            scores = self.scores(scores).to(torch.float32)
            y = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated = c.activation == "swiglu"
        self.up = Linear(c.d_model, 2 * c.ffn if self.gated else c.ffn)  # swiglu: gate above value
        self.down = Linear(c.ffn, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, value = h.chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.relu(h).square())


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.d_model, c.norm_eps), Attention(c)
        self.ffn_norm, self.ffn = RMSNorm(c.d_model, c.norm_eps), FeedForward(c)
        self.residual = Site("residual")

    def forward(self, h: Tensor, rope: Tensor | None, past: Past | None = None) -> Tensor:
        h = self.residual(h + self.attn(self.attn_norm(h), rope, past))
        return self.residual(h + self.ffn(self.ffn_norm(h)))


class HybridBlock(nn.Module):
    """A block of a hybrid: one norm, one mixer, one residual. kind: a letter of the pattern."""

    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.kind, self.norm = kind, RMSNorm(c.d_model, c.norm_eps)
        if kind == "M":
            self.mamba = Mamba2(c.d_model, c.mamba, c.norm_eps)
        elif kind == "*":
            self.attn = Attention(c)
        else:
            self.ffn = FeedForward(c)
        self.residual = Site("residual")

    def forward(self, h: Tensor, rope: Tensor | None, past: Past | State | None = None) -> Tensor:
        x = self.norm(h)
        if self.kind == "M":
            x = self.mamba(x, past)
        else:
            x = self.attn(x, rope, past) if self.kind == "*" else self.ffn(x)
        return self.residual(h + x)


aten = torch.ops.aten
# What "selective" keeps: the results of products and of attention, on any device.
KEPT = [aten.mm.default, aten.bmm.default, aten._scaled_mm.default, aten._scaled_mm_v2.default]
KEPT += [getattr(aten, f"_scaled_dot_product_{name}").default for name in (
    "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")]  # fmt: skip


def _keep(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op in KEPT or str(op) == "narrow.matmul.default"  # (registered where there is Triton)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE = {"selective": partial(create_selective_checkpoint_contexts, _keep), "full": noop_context_fn}


class GPT(nn.Module):
    """GPT(config)(tokens int64 [B, T], T <= seq_len) -> logits [B, T, V] in the compute dtype; with `cache()` of the tokens
    before, tokens are the T after these, and the cache then knows them too.

    `recompute`: what a block runs again in backward instead of keeping it. "full": all, only its input is kept. "selective":
    all but products and attention, whose results are kept.
    Noise and formats replay exactly, since they are functions of the position in the run, not of a generator.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, recompute: str = "none"):
        super().__init__()
        self.config, self.dtype, self.recompute = config, dtype, recompute
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        hybrid = (HybridBlock(config, kind) for kind in config.pattern)
        self.blocks = nn.ModuleList(hybrid if config.pattern else (Block(config) for _ in range(config.blocks)))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        table = rope_table(config, self.norm.weight.device) if config.rope else None
        self.register_buffer("rope", table, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int, put: Callable[[str, Tensor], object] | None = None) -> "GPT":
        """Normal(0, 0.02), and 0.02 / sqrt(n) for the n matrices that write to the residual stream, two in a block, one in that
        of a hybrid (GPT-2's rule); gains are 1; then what Mamba-2 has besides. Draws from a generator of its own.

        put(name, on the CPU): where a value does not go into the parameter itself."""
        generator, found = torch.Generator().manual_seed(seed), dict(self.named_parameters())
        put = put or (lambda name, x: found[name].copy_(x))
        for name, p in found.items():
            if p.ndim == 2 and name.endswith(".weight"):
                residual = name.endswith(("attn.out.weight", "ffn.down.weight", "mamba.out_proj.weight"))
                std = 0.02 / len(self.config.mixers) ** 0.5 if residual else 0.02
                put(name, torch.randn(p.shape, generator=generator) * std)
            elif name.endswith("norm.weight"):
                put(name, torch.ones(p.shape))
        for place, module in self.named_modules():
            for name, x in module.initial(generator) if isinstance(module, Mamba2) else ():
                put(f"{place}.{name}", x)
        return self

    def forward(self, tokens: Tensor, cache: list[Past | State | None] | None = None) -> Tensor:
        h = self.embedding(tokens).to(self.dtype)
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            if self.recompute != "none" and torch.is_grad_enabled():
                how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": RECOMPUTE[self.recompute]}
                h = checkpoint(block, h, self.rope, **how)
            else:
                h = block(h, self.rope, past)
        return self.head(self.norm(h))

    def cache(self, batch: int = 1) -> list[Past | State | None]:
        """One for each block, empty: 2 KV seq_len d numbers a sequence for attention, H N P and the last inputs for Mamba-2,
        nothing for a feed-forward block of a hybrid."""
        c, of = self.config, (batch, self.dtype, self.norm.weight.device)
        made = {"*": lambda: Past(c, *of), "M": lambda: State(c.mamba, c.d_model, *of), "-": lambda: None}
        return [made[kind]() for kind in c.pattern or "*" * c.blocks]

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats, in fp32: a mean, or with reduction="none" one number a token [B T]."""
        logits = self(tokens).to(torch.float32)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)

    @torch.no_grad()
    def decode(self, prompts: Tensor) -> Generator[Tensor, Tensor, None]:
        """Logits [B, V] of what follows prompts int64 [B, P >= 1]; send(tokens [B]) what was taken, and it yields the next.

        Each token costs a pass over itself alone. When the cache is full, at seq_len, it is filled anew with the last
        seq_len / 2 tokens, so that a window never has fewer and a pass over many is rare; of a longer prompt the last seq_len
        count.
        """
        T = self.config.seq_len
        window = new = prompts[:, -T:]
        cache = self.cache(len(prompts))
        while True:
            tokens = yield self(new, cache)[:, -1]
            window = torch.cat([window, tokens[:, None]], 1)
            new = window[:, -1:]
            if window.shape[1] > T:  # the cache has all of it but the newest
                window = new = window[:, -(T // 2) :]
                cache = self.cache(len(prompts))

    def sample(
        self,
        tokens: list[int],
        count: int,
        temperature: float = 0.8,
        seed: int = 0,
        top_p: float = 1.0,
        end: int | None = None,
    ) -> list[int]:
        """`tokens` continued by `count` more, drawn with a generator of its own; temperature 0 takes the likeliest. Drawn are
        only the likeliest tokens whose probabilities sum to `top_p` (arXiv:1904.09751, section 3.1). The token `end` ends the
        text, and is not part of it. `decode` says what a step sees. Raises ValueError without tokens.
        """
        generator, training = torch.Generator().manual_seed(seed), self.training
        if not (tokens := list(tokens)):
            raise ValueError("nothing to continue: expected at least one token, e.g. that of the beginning of a document")
        device, sent = self.norm.weight.device, None
        steps = self.eval().decode(torch.tensor([tokens], device=device))
        for _ in range(count):
            token = draw(steps.send(sent)[0].float().cpu(), temperature, top_p, generator)
            if token == end:
                break
            tokens.append(token)
            sent = torch.tensor([token], device=device)
        self.train(training)
        return tokens


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from logits fp32 [V], as `GPT.sample` says."""
    if temperature == 0:
        return int(logits.argmax())
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        p[order[ordered.cumsum(0) - ordered >= top_p]] = 0  # those before it suffice
    return int(torch.multinomial(p, 1, generator=generator))


@torch.no_grad()
def measure(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    bytes_per_token: Tensor,
    gathered: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[float, float]:
    """(loss in nats a token, bits per byte) of a model over batches of x, y int64 [B, T].

    gathered: makes of the sums fp64 [batches, 4] of this rank those of all batches, in their order.

    Bits per byte = nats of all tokens that stand for text, over ln 2 times their UTF-8 bytes; special tokens count in
    neither sum, so that models with different tokenizers compare (nanochat's definition).
    """
    device, training = model.norm.weight.device, model.training
    size_of = bytes_per_token.to(device)
    found = []
    model.eval()
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        losses, sizes = model.loss(x, y, reduction="none").double(), size_of[y].flatten()
        count = torch.full((), losses.numel(), device=device)
        found.append(torch.stack([losses.sum(), losses[sizes > 0].sum(), sizes.sum().double(), count.double()]))
    model.train(training)
    nats, text_nats, size, count = map(sum, gathered(torch.stack(found)).t().tolist())
    return nats / count, text_nats / size / math.log(2)


def parameter_count(config: ModelConfig) -> int:
    """Parameters, embedding and head included; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(config: ModelConfig) -> float:
    """Of forward and backward, counting a multiply-add as 2: 6 for each parameter of a matrix (the embedding is a
    look-up), 6 T H d for causal attention, half of the full T x T products, and 12 H N P for the recurrence of Mamba-2 (b x^T
    into the state, c out of it; what chunks do besides is no part of the model, and its convolution is left out)."""
    c = config
    attention = 6 * c.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 6 * c.seq_len * c.heads * c.head_dim
    flops = {"*": attention, "-": 6 * c.d_model * c.ffn * (3 if c.activation == "swiglu" else 2)}
    if "M" in c.pattern:
        inner, channels, heads = c.mamba.widths(c.d_model)
        flops["M"] = 6 * c.d_model * (2 * inner + channels + heads) + 12 * inner * c.mamba.state
    return sum(flops[kind] for kind in c.mixers) + 6 * c.d_model * c.vocab_size
