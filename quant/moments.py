"""AdamW, whose moments are kept between its steps in fp32, or as codes and block scales of a spec: a quarter of it in FP8.

    m, r <- decode                      one matrix [O, I] at a time, fp32, of Q(m |m|^(p-1)) and Q(r^p), r = sqrt v
    r <- max(r, |m| / c)                c = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 1.16 for betas 0.9 and 0.95
    w, m, v <- AdamW(w, g, m, r^2)      torch's own, fused
    keep Q(m |m|^(p-1)), Q(sqrt(v)^p)   p = `power`, 1, 2 or 4

Both moments in units of the gradient, since v has twice as many octaves as they have; and then to a power that makes the most
of the format: a relative error e of x^p is one of e / p of x, as long as p times the octaves of a block fit. Blocks of 128 have
about 9, and E4M3 under its scale 18: p = 2 halves the error (COAT, arXiv:2410.19313, fits a power to each block). E5M2 has 32,
for p = 4. Integers and 4-bit floats have none to spare.

A v that is rounded to 0 beside an m that is not makes an update of m / eps. The maximum forbids it: by Cauchy and Schwarz no
gradients lead Adam to |m| > c sqrt v, so only rounding does, and r = |m| / c is the nearest that could have been. Updates are
then bounded as Adam's are, in any format.

Rounding to nearest can stop a decay: without gradients r^p shrinks by 1 - b2^(p/2) a step, 5 % at 0.95 and p = 2, and half a
step of E4M3 is 3.1 to 6.3 %. An fp32 scale follows the largest of its block, so the grid moves a little in each step, and it
goes on; powers of two (E8M0) do not, and need `rounding = "stochastic8"`, which keeps the mean. That costs noise, the more the
closer b2 is to 1. `python -m studies.moments` measures all of this.

`offload` keeps moments in the memory of the host, pinned: those of one matrix at a time come to the GPU for its update and go
back, 16 bytes a parameter over the link in a step, or those of the codes. The queue of the GPU orders all of it, so the host
waits for nothing, and whoever reads moments there waits for the GPU first. On a CPU they are there anyway.

Vectors (gains) keep fp32 moments, as small tensors do in arXiv:2110.02861. Other sources: arXiv:2309.01507 (zeros of v),
arXiv:2505.00347 (moments that stop to move). Left out: a power for each block, other optimisers.
"""

import math
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quant.qtensor import QTensor
from quant.quantize import decoded_values, quantize
from quant.random import Key
from quant.recipe import Moments
from quant.spec import QuantSpec

NAMES = ("exp_avg", "exp_avg_sq")  # torch's, of m and v; as codes they are of powers of m and sqrt v
USES = (8, 9)  # of these in a random Key, after the weights of quant/update.py


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), and nothing else, without `moments.state`; with it, `state[p]` of a matrix has QTensors
    under NAMES. Gradients are dense. seed: of what stochastic rounding draws. offload: see above."""

    def __init__(self, groups: list[dict], moments: Moments, seed: int, offload: bool = False, **options):
        super().__init__(groups, **options, fused=True)
        self.spec, self.power, self.seed, self.offload = moments.state, moments.power, seed, offload
        self.found_inf = self.grad_scale = None
        self.numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for p in self.numbers if self.spec or offload else ():
            self.adopt(p, 0, {name: torch.zeros_like(p) for name in NAMES})

    def spec_of(self, p: Tensor) -> QuantSpec | None:
        """By which its moments are kept; None is fp32."""
        return self.spec if p.ndim >= 2 else None

    @torch.no_grad()
    def step(self, closure=None):
        """As torch's. Where `found_inf`, a tensor on the device, is 1, weights and moments stay what they were, bit for bit."""
        if self.spec is None and not self.offload:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
            (b1, b2), on_device = group["betas"], {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
            for p in (p for p in group["params"] if p.grad is not None):
                m, v = self.moments(p, self.power)
                adamw([p], [p.grad], [m], [v], [], [self.state[p]["step"]], beta1=b1, beta2=b2, **options, **on_device)
                self._keep(p, m, v)
        return loss

    def moments(self, p: Tensor, power: int) -> tuple[Tensor, Tensor]:
        """m and v of a parameter, fp32 of its shape and where it is: what is kept, or what is decoded from that; power: of the
        codes."""
        kept = [_moved(self.state[p][name], p.device) for name in NAMES]
        if not isinstance(kept[0], QTensor):
            return tuple(kept)
        m, r = (_root(_decoded(q), power) for q in kept)
        return m, torch.maximum(r, m.abs() / bound(*self.defaults["betas"])).square_()

    def _keep(self, p: Tensor, m: Tensor, v: Tensor) -> None:
        state, spec = self.state[p], self.spec_of(p)
        for name, x, use in zip(NAMES, (m, v), USES, strict=True):
            if spec:
                key = Key(self.seed, state["step"].long(), self.numbers[p], use) if spec.keyed else None
                found = quantize(_raised(x if name == "exp_avg" else x.sqrt(), self.power), spec, key)
                x = _unless(self.found_inf, _moved(state[name], p.device) if name in state else None, found)
            state[name] = self._home(x)

    def _home(self, x: Tensor | QTensor) -> Tensor | QTensor:
        """Where moments lie between steps."""
        return _moved(x, torch.device("cpu")) if self.offload else x

    @torch.no_grad()
    def adopt(self, p: Tensor, step: int, found: dict[str, Tensor | QTensor], power: int = 1) -> str:
        """Take the moments that a checkpoint has, after so many steps, under NAMES; power: of codes. Those that were kept in
        another way than here are converted; returns how they were kept then, else ""."""
        step = torch.tensor(float(step), device=p.device)
        self.state[p] = {"step": step} | {name: self._home(x) for name, x in found.items()}
        was = found["exp_avg"].spec if isinstance(found["exp_avg"], QTensor) else None
        if was == (spec := self.spec_of(p)) and (spec is None or power == self.power):
            return ""
        m, v = self.moments(p, power)
        self.state[p] = {"step": step}
        self._keep(p, m, v)
        return how(was, power)

    def nbytes(self) -> int:
        """Of all moments."""
        return sum(_bytes(state[name]) for state in self.state.values() for name in NAMES)

    def describe(self) -> str:
        """E.g. `moments in e4m3/1x128 fp32, to the power 2 (8.25 bits), 10.3 MB instead of 39.9, those of vectors in fp32`."""
        away = ", in the host's memory" * self.offload
        if self.spec is None:
            return how(None, 1) + away
        matrices = [p for p in self.numbers if self.spec_of(p)]
        bits = 8 * sum(_bytes(self.state[p][name]) for p in matrices for name in NAMES) / (2 * sum(p.numel() for p in matrices))
        whole = 8 * sum(p.numel() for p in self.numbers)
        return (
            f"{how(self.spec, self.power)} ({bits:.2f} bits), {self.nbytes() / 1e6:.1f} MB instead of {whole / 1e6:.1f}, "
            f"those of vectors in fp32{away}"
        )


def bound(b1: float, b2: float) -> float:
    """The largest |m| / sqrt v that exponential averages of g and g^2 can have; b1^2 < b2.

    m_t = sum (1 - b1) b1^k g, v_t = sum (1 - b2) b2^k g^2, so m^2 <= v sum (1 - b1)^2 b1^2k / ((1 - b2) b2^k)."""
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2))


def _raised(x: Tensor, power: int) -> Tensor:
    """x |x|^(power - 1), by squaring: of products and roots every device makes the same bits."""
    return x if power == 1 else _raised(x * x.abs(), power // 2)


def _root(x: Tensor, power: int) -> Tensor:
    return x if power == 1 else _root(x.abs().sqrt().copysign(x), power // 2)


def _decoded(q: QTensor) -> Tensor:
    """q.dequantize(), by the fused decoder."""
    values, factor = decoded_values(q, q.spec)
    values = values.float()
    return (values if factor is None else values * factor).view(q.shape)


def _parts(q: QTensor) -> dict[str, Tensor]:
    return {f.name: t for f in fields(q) if isinstance(t := getattr(q, f.name), Tensor)}


def _moved(x: Tensor | QTensor, device: torch.device) -> Tensor | QTensor:
    """There, in the order of the GPU's queue: what goes to the host is pinned."""
    if isinstance(x, QTensor):
        return replace(x, **{name: _moved(t, device) for name, t in _parts(x).items()})
    return x.to(device, non_blocking=True)


def _unless(frozen: Tensor | None, old: QTensor | None, new: QTensor) -> QTensor:
    """The new one, or the old where `frozen` is 1, without asking the device which."""
    if old is None or frozen is None:
        return new
    return replace(new, **{name: torch.where(frozen > 0, getattr(old, name), t) for name, t in _parts(new).items()})


def how(spec: QuantSpec | None, power: int) -> str:
    """E.g. `moments in e4m3/1x128 fp32, to the power 2`; without a spec `moments in fp32`."""
    return f"moments in {spec.short()}" + f", to the power {power}" * (power > 1) if spec else "moments in fp32"


def _bytes(x: Tensor | QTensor) -> int:
    return x.nbytes() if isinstance(x, QTensor) else x.nbytes
