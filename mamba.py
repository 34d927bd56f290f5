"""Mamba-2 (arXiv:2405.21060), the block that stands for attention in most places of a hybrid.

    z, u, dt = split(x Win)                                   D -> E + (E + 2 G N) + H            in_proj, a quant.Linear
    v, b, c  = split(silu(conv(u)))                           E, G N, G N: each channel its own W taps, over time, and a bias
    dt       = softplus(dt + dt_bias)                         H: how long a step is, of each head
    S_t = exp(dt A) S_{t-1} + b_t (dt v_t)^T                  [N, P] a head, A = -exp(A_log) < 0
    y_t = S_t^T c_t + D v_t
    x   + norm(y silu(z)) Wout                                RMS over each of G groups, a gain     out_proj, a quant.Linear

H heads of P values, E = H P = expand D; the heads of a group, H / G of them next to each other, share b and c. Sizes, the order
of z, v, b, c, dt in in_proj and most names are those of Nemotron-H (arXiv:2504.03624), a hybrid like that of arXiv:2509.25149.
What lies between the two Linears is in fp32 and never quantised: convolution and scan are no Linears (there, appendix A).

The scan runs in chunks (section 6, the state space dual): inside a chunk all pairs of positions at once, as attention with
decays for a mask, and a state from chunk to chunk. Every decay is exp of a sum of negative numbers, made anew for each pair and
not as a difference of two longer sums, so it is at most 1 and its exponent as exact as a sum of that length is.

Left out: kernels (this is a loop over chunks), documents that end inside a window, a limit of dt, `D` of a head's width.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from quant import Linear, Site


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MambaConfig:
    """Sizes of the Mamba-2 blocks in model.pattern. Defaults are those of the hybrids of arXiv:2509.25149.

    expand: E, the width inside, as a multiple of d_model. head_dim: P; there are E / P heads. groups: G, of heads that share b
    and c. state: N, the width of b and c. conv: W, the taps. chunk: of the scan, which changes only the order of its sums.
    """

    expand: int = Field(2, ge=1)
    head_dim: int = Field(64, ge=1)
    groups: int = Field(8, ge=1)
    state: int = Field(128, ge=1)
    conv: int = Field(4, ge=2)
    chunk: int = Field(128, ge=1)

    def widths(self, d_model: int) -> tuple[int, int, int]:
        """(E, E + 2 G N: the channels of the convolution, H); in_proj has the sum of E and these for outputs. Raises ValueError
        if heads or groups do not come out even."""
        inner = self.expand * d_model
        heads = inner // self.head_dim
        if inner % self.head_dim or heads % self.groups:
            raise ValueError(
                f"mamba: expand * d_model = {inner} makes {inner / self.head_dim:g} heads of head_dim = {self.head_dim}, and "
                f"should make a multiple of groups = {self.groups}"
            )
        return inner, inner + 2 * self.groups * self.state, heads


def conv(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Causal, each channel for itself: x [B, W - 1 + T, C], the first W - 1 from before, taps [W, C], bias [C] -> [B, T, C]."""
    T = x.shape[1] - len(taps) + 1
    return sum((tap * x[:, k : k + T] for k, tap in enumerate(taps)), bias)


def decays(a: Tensor) -> Tensor:
    """a [..., L], the log of a decay at each step -> [..., L, L]: the log of that from j to i, a_{j+1} + ... + a_i; for the
    future, j > i, -inf."""
    L = a.shape[-1]
    future = torch.ones(L, L, dtype=torch.bool, device=a.device).triu(1)
    return a[..., None].expand(*a.shape, L).tril(-1).cumsum(-2).masked_fill(future, -torch.inf)


def scan(x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """S_t = exp(a_t) S_{t-1} + b_t x_t^T, y_t = S_t^T c_t, from the state before: (y, the state after).

    x [B, T, H, P], a [B, T, H] <= 0, b and c [B, T, G, N], state [B, H, N, P] -> y [B, T, H, P]; all of one dtype.
    """
    groups = b.shape[2]
    x, a = (t.unflatten(2, (groups, -1)).movedim(1, 3) for t in (x, a))  # [B, G, H / G, T, P], [B, G, H / G, T]
    b, c = (t.transpose(1, 2)[:, :, None] for t in (b, c))  # [B, G, 1, T, N]
    state, ys = state.unflatten(1, (groups, -1)), []
    for xs, steps, bs, cs in zip(x.split(chunk, 3), a.split(chunk, 3), b.split(chunk, 3), c.split(chunk, 3), strict=True):
        between, since = decays(steps), steps.cumsum(-1)[..., None]  # [..., L, L]; [..., L, 1], from before the chunk
        left = between[..., -1, :, None]  # [..., L, 1], to the end of it
        ys.append((cs @ bs.mT * between.exp()) @ xs + since.exp() * (cs @ state))
        state = since[..., -1:, :].exp() * state + (left.exp() * bs).mT @ xs
    return torch.cat(ys, 3).movedim(3, 1).flatten(2, 3), state.flatten(1, 2)


class State:
    """A cache for one block, of any number of positions: the last W - 1 inputs of the convolution [B, W - 1, C], in the compute
    dtype, and the states [B, H, N, P], in fp32. A new one is what is before a text: zeros."""

    def __init__(self, c: MambaConfig, d_model: int, batch: int, dtype: torch.dtype, device: torch.device):
        _, channels, heads = c.widths(d_model)
        self.inputs = torch.zeros(batch, c.conv - 1, channels, dtype=dtype, device=device)
        self.ssm = torch.zeros(batch, heads, c.state, c.head_dim, dtype=wide(dtype), device=device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of what lies between the Linears: fp32, or fp64 in an fp64 model."""
    return torch.promote_types(dtype, torch.float32)


class GatedNorm(nn.Module):
    """y, z [..., E] -> y silu(z) / rms * gain, the rms of each of `groups` parts of E."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(size)), groups, eps
        self.gain = Site("norm_gain")

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(-2) * self.gain(self.weight)


class Mamba2(nn.Module):
    """x [B, T, D] -> [B, T, D] in x's dtype; with a State of the tokens before, x are the T after these, and it moves on."""

    def __init__(self, d_model: int, c: MambaConfig, eps: float):
        super().__init__()
        self.c = c
        self.inner, channels, self.heads = c.widths(d_model)
        self.in_proj = Linear(d_model, self.inner + channels + self.heads)
        self.conv, self.conv_bias = nn.Parameter(torch.zeros(c.conv, channels)), nn.Parameter(torch.zeros(channels))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(self.heads)) for _ in range(3))
        self.norm = GatedNorm(self.inner, c.groups, eps)
        self.out_proj = Linear(self.inner, d_model)

    def initial(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of all but the two Linears and the norm, as in the code of the paper's authors: A from 1 to 16;
        softplus(dt_bias) from 0.001 to 0.1, evenly in its logarithm; D = 1; the convolution as torch's Conv1d, within
        1 / sqrt(W)."""

        def uniform(p: Tensor, low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(p.shape, generator=generator)

        edge = self.c.conv**-0.5
        yield "conv", uniform(self.conv, -edge, edge)
        yield "conv_bias", uniform(self.conv_bias, -edge, edge)
        dt = uniform(self.dt_bias, math.log(1e-3), math.log(1e-1)).exp()
        yield "dt_bias", dt + (-(-dt).expm1()).log()  # the inverse of softplus
        yield "A_log", uniform(self.A_log, 1, 16).log()
        yield "D", torch.ones(self.heads)

    def forward(self, x: Tensor, past: State | None = None) -> Tensor:
        dtype, fp, c = x.dtype, wide(x.dtype), self.c
        past = past or State(c, x.shape[-1], len(x), dtype, x.device)
        z, u, dt = self.in_proj(x).split([self.inner, self.conv.shape[1], self.heads], -1)
        u = torch.cat([past.inputs, u], 1)
        v = F.silu(conv(u.to(fp), self.conv.to(fp), self.conv_bias.to(fp)))
        v, b, c_ = v.split([self.inner, c.groups * c.state, c.groups * c.state], -1)
        v, b, c_ = v.unflatten(-1, (self.heads, -1)), b.unflatten(-1, (c.groups, -1)), c_.unflatten(-1, (c.groups, -1))
        dt = F.softplus(dt.to(fp) + self.dt_bias)  # [B, T, H]
        y, state = scan(v * dt[..., None], dt * -self.A_log.to(fp).exp(), b, c_, past.ssm, c.chunk)
        past.inputs, past.ssm = u[:, 1 - c.conv :], state
        y = (y + v * self.D[:, None]).flatten(-2)
        return self.out_proj(self.norm(y, z.to(fp)).to(dtype))
