"""quant/moments.py: AdamW with moments in codes, against torch.optim.AdamW, `quantize` and `QTensor.dequantize`, bit for bit;
the bound on updates; frozen steps; bytes. Resuming is in test_train.py."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoint
import contents
import train
from configs import load
from quant import Moments, QTensor, QuantSpec, Scale, WeightStore, quantize
from quant.moments import NAMES, USES, AdamW, bound
from quant.random import Key
from studies.moments import measure

CONFIG = str(Path(__file__).parent.parent / "configs/fp8-adam.toml")
E4M3 = QuantSpec("e4m3", (1, 32), Scale("fp32"))
KINDS = {
    "e4m3": Moments(E4M3, 2),
    "e4m3-sr": Moments(QuantSpec("e4m3", (1, 32), Scale("fp32"), "stochastic8")),
    "mxfp8-tiles": Moments(QuantSpec("e5m2", (32, 32), Scale("e8m0")), 4),
    "nvfp4-sr": Moments(QuantSpec(rounding="stochastic8")),
    "int8-rows": Moments(QuantSpec("int8", (1, -1), Scale("fp32"))),
    "bf16-sr": Moments(QuantSpec("bf16", scale=Scale("none"), rounding="stochastic16")),
}
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def parameters(seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=g)) for size in ((32, 64), (64, 32), (64,))]


def gradients(step: int, wild: bool = False) -> list[Tensor]:
    """Of parameters(); `wild`: over twelve orders of magnitude, with zeros."""
    g = torch.Generator().manual_seed(step)
    found = [torch.randn(p.shape, generator=g) for p in parameters()]
    if wild:
        sizes = [10 ** (12 * torch.rand(x.shape, generator=g) - 12) * (torch.rand(x.shape, generator=g) < 0.7) for x in found]
        found = [x * size for x, size in zip(found, sizes, strict=True)]
    return found


def made(params: list[nn.Parameter], moments: Moments | None = None, seed: int = 0, lr: float = LR, **more) -> AdamW:
    groups = [{"params": params[:2], "weight_decay": DECAY}, {"params": params[2:], "weight_decay": 0.0}]
    return AdamW(groups, moments or Moments(), seed, lr=lr, betas=BETAS, eps=EPS, **more)


def stepped(optimizer: AdamW, grads: list[Tensor]) -> None:
    for p, g in zip(optimizer.numbers, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def test_without_a_spec_it_is_torchs():
    ours, theirs = parameters(), parameters()
    a = made(ours)
    groups = [{"params": theirs[:2], "weight_decay": DECAY}, {"params": theirs[2:], "weight_decay": 0.0}]
    b = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    for step in range(5):
        for q, g in zip(theirs, gradients(step), strict=True):
            q.grad = g.clone()
        stepped(a, gradients(step))
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p.detach(), q.detach(), "w")
            assert_same_bits(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"], "v")
    assert a.describe() == "moments in fp32"


@pytest.mark.parametrize("name", KINDS)
def test_moments_are_quantised_of_what_torch_made(name):
    """One torch.optim.AdamW a parameter, which is given decoded moments in each step, and whose moments are then quantised."""
    spec, power, seed = KINDS[name].state, KINDS[name].power, 3
    ours, theirs = parameters(), parameters()
    optimizer = made(ours, KINDS[name], seed)
    kept = [[torch.zeros_like(p), torch.zeros_like(p)] for p in theirs]
    powers = {1: lambda x: x, 2: lambda x: x * x.abs(), 4: lambda x: (x * x) * (x * x).copysign(x)}
    roots = {1: lambda x: x, 2: lambda x: x.abs().sqrt() * x.sign(), 4: lambda x: x.abs().sqrt().sqrt() * x.sign()}
    (b1, b2), limit = BETAS, bound(*BETAS)
    for step in range(1, 5):
        stepped(optimizer, grads := gradients(step, wild=step % 2 == 0))
        for number, (p, q, g) in enumerate(zip(ours, theirs, grads, strict=True)):
            decay = DECAY if q.ndim == 2 else 0.0
            one = torch.optim.AdamW([q], lr=LR, betas=(b1, b2), eps=EPS, weight_decay=decay, fused=True)
            m, v = kept[number]
            one.state[q] = {"step": torch.tensor(step - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            q.grad = g
            one.step()
            m, v = (one.state[q][key] for key in NAMES)
            assert_same_bits(p.detach(), q.detach(), f"w {number} after step {step}")
            if q.ndim == 1:
                kept[number] = [m, v]
                assert_same_bits(optimizer.state[p]["exp_avg_sq"], v, "v of a vector")
                continue
            keys = [Key(seed, step, number, use) if spec.keyed else None for use in USES]
            raised = [powers[power](x) for x in (m, v.sqrt())]
            stored = [quantize(x, spec, key) for x, key in zip(raised, keys, strict=True)]
            for key, expected in zip(NAMES, stored, strict=True):
                ours_now, parts = optimizer.state[p][key].state("")[0], expected.state("")[0]
                assert ours_now.keys() == parts.keys()
                for part in parts:
                    assert_same_bits(ours_now[part], parts[part], f"{key}{part} {number} after step {step}")
            m, r = (roots[power](x.dequantize()) for x in stored)
            kept[number] = [m, torch.maximum(r * r, (m.abs() / limit) ** 2)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", [None, *KINDS])
def test_moments_in_the_host_s_memory_change_no_bit(name, device):
    """Also where a step was not finite, and after moments have been taken from a checkpoint; they lie on the CPU then."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    moments, found = KINDS[name] if name else None, []
    for offload in (False, True):
        params = [nn.Parameter(p.detach().to(device)) for p in parameters()]
        optimizer = made(params, moments, offload=offload)
        for step in range(4):
            optimizer.found_inf = torch.full((), float(step == 2), device=device)
            stepped(optimizer, [g.to(device) for g in gradients(step)])
            if step == 1:
                for p in params:
                    optimizer.adopt(p, step, {key: optimizer.state[p][key] for key in NAMES}, (moments or Moments()).power)
        state = [optimizer.state[p][key] for p in params for key in NAMES]
        parts = [t for x in state for t in (x.state("")[0].values() if isinstance(x, QTensor) else [x])]
        assert not offload or all(t.device.type == "cpu" for t in parts)
        found.append([t.cpu() for t in (*(p.detach() for p in params), *parts)])
        assert optimizer.describe().endswith("in the host's memory") == offload
    for a, b in zip(*found, strict=True):
        assert_same_bits(b, a)


@given(
    b1=st.floats(0, 0.99),
    gap=st.floats(0.01, 0.99),
    g=st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=50),
)
@settings(max_examples=200, deadline=None)
def test_the_bound_holds_for_all_gradients(b1, gap, g):
    """In fp64; 1e-9 is for 50 steps' rounding errors."""
    b2 = b1 * b1 + (1 - b1 * b1) * gap
    m = v = 0.0
    for x in g:
        m, v = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x * x
    assert abs(m) <= bound(b1, b2) * math.sqrt(v) * (1 + 1e-9)


def test_the_bound_is_reached():
    """By gradients that grow by b2 / b1 a step (where Cauchy and Schwarz's two sequences are parallel)."""
    (b1, b2), m, v = BETAS, 0.0, 0.0
    for step in range(300):
        x = (b2 / b1) ** step
        m, v = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x * x
    assert m / math.sqrt(v) == pytest.approx(bound(b1, b2), rel=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_no_update_is_larger_than_adams_can_be(name):
    """|m^| / sqrt(v^) <= bound * sqrt(1 - b2^t) / (1 - b1^t), whatever was rounded to zero: without the maximum in
    moments() most of these exceed it. 1e-5 and 2^-22: fp32."""
    params = parameters()
    optimizer = made(params, KINDS[name])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(1, 30):
        before = [p.detach().clone() for p in params]
        stepped(optimizer, gradients(step, wild=True))
        limit = LR * bound(*BETAS) * math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
        for p, was in zip(params, before, strict=True):
            assert (p.detach() - was).abs().max() <= limit * (1 + 1e-5) + 2.0**-22 * was.abs().max()


def test_a_slow_decay_arrives_on_average():
    """Without gradients v falls by 0.95 a step, its root by 0.975: less than half a step of E4M3 on a fixed grid, so to
    nearest it stays where it is, or falls once. Stochastic rounding is right to five standard errors: the variance of 20
    roundings is at most 20 * (1/4) * (1/8)^2 of the square, so 5 sqrt(0.078 / 2048) = 0.031."""
    ends = {}
    for rounding in ("nearest", "stochastic8"):
        params = parameters()
        optimizer = made(params, Moments(QuantSpec("e4m3", (1, 32), Scale("e8m0"), rounding)), lr=0.0)
        stepped(optimizer, [torch.full_like(p, 0.7) for p in params])
        start = optimizer.moments(params[0], 1)[1].sqrt().mean()
        for _ in range(20):
            stepped(optimizer, [torch.zeros_like(p) for p in params])
        ends[rounding] = float(optimizer.state[params[0]]["exp_avg_sq"].dequantize().mean() / start)
    assert ends["nearest"] > 0.9 and ends["stochastic8"] == pytest.approx(0.95**10, abs=0.031), ends


def bits(optimizer: AdamW) -> dict[str, Tensor]:
    """A copy of every tensor it has or changes, codes and scales apart."""
    found = {}
    for i, p in enumerate(optimizer.numbers):
        found[f"w{i}"] = p.detach().clone()
        for key, x in optimizer.state[p].items():
            parts = x.state("")[0] if isinstance(x, QTensor) else {"": x}
            found |= {f"{key} {i}{part}": t.clone() for part, t in parts.items()}
    return found


@pytest.mark.parametrize("name", ["e4m3", "nvfp4-sr", "bf16-sr"])
def test_a_frozen_step_changes_no_bit(name):
    optimizer = made(parameters(), KINDS[name])
    optimizer.found_inf = torch.zeros(())
    stepped(optimizer, gradients(0))
    before = bits(optimizer)
    optimizer.found_inf.fill_(1)
    stepped(optimizer, [g * math.nan for g in gradients(1)])
    stepped(optimizer, gradients(2))
    for part, t in bits(optimizer).items():
        assert_same_bits(t, before[part], part)
    optimizer.found_inf.fill_(0)
    stepped(optimizer, gradients(2))
    assert all((t != before[part]).any() for part, t in bits(optimizer).items())


def test_bytes_are_those_of_the_tensors():
    """By hand: 2 x 4096 codes, a scale of four bytes for each 32; 2 x 64 fp32 numbers of the vector."""
    optimizer = made(parameters(), KINDS["e4m3"])
    assert optimizer.nbytes() == 2 * (4096 + 4 * 4096 // 32) + 2 * 64 * 4 == 9728
    said = "moments in e4m3/1x32 fp32, to the power 2 (9.00 bits), 0.0 MB instead of 0.0, those of vectors in fp32"
    assert optimizer.describe() == said
    plain = made(parameters())
    assert plain.nbytes() == 0, "torch makes fp32 moments in the first step"
    stepped(plain, gradients(0))
    assert plain.nbytes() == 8 * (2 * 2048 + 64)


def test_moments_of_another_kind_are_converted():
    """fp32 into codes is `quantize`, codes into fp32 the decoded numbers, and of the same spec nothing changes."""
    params = parameters()
    narrow, wide = made(params, Moments(E4M3)), made(params)
    m, v = torch.randn(32, 64), torch.rand(32, 64)
    p = params[0]
    assert narrow.adopt(p, 7, {"exp_avg": m, "exp_avg_sq": v}) == "moments in fp32"
    found = {key: x for key, x in narrow.state[p].items() if key != "step"}
    assert_same_bits(found["exp_avg_sq"].packed_codes, quantize(v.sqrt(), E4M3).packed_codes, "root")
    assert narrow.adopt(p, 7, found) == "" and narrow.state[p]["exp_avg"] is found["exp_avg"]
    assert wide.adopt(p, 7, found) == "moments in e4m3/1x32 fp32" and float(wide.state[p]["step"]) == 7
    assert_same_bits(wide.state[p]["exp_avg"], quantize(m, E4M3).dequantize(), "m")
    other = made(params, KINDS["int8-rows"])
    assert other.adopt(p, 7, found) == "moments in e4m3/1x32 fp32" and other.state[p]["exp_avg"].spec.format == "int8"
    squares, twice = made(params, KINDS["e4m3"]), quantize(m, E4M3).dequantize()
    twice = twice * twice.abs()
    assert squares.adopt(p, 7, found) == "moments in e4m3/1x32 fp32", "the spec is the same, the power is not"
    assert_same_bits(squares.state[p]["exp_avg"].dequantize(), quantize(twice, E4M3).dequantize(), "m^2")
    vector = {"exp_avg": torch.ones(64), "exp_avg_sq": torch.ones(64)}
    assert narrow.adopt(params[2], 7, vector) == "", "vectors are fp32 in both"


def test_the_study(small):
    """By the definitions: no error of fp32 moments, a small one of E4M3 codes."""
    kinds = {"fp32": Moments(), "e4m3": Moments(QuantSpec("e4m3", (1, 128), Scale("fp32")), 2)}
    found = measure(load(CONFIG.replace("fp8-adam", "tiny-bf16"), small), kinds, steps=4, first=1)
    errors, largest, root = found["fp32"]
    assert errors == [0.0] * 4 and root == 1 and 0.5 < largest <= 1.5
    errors, largest, root = found["e4m3"]
    assert all(0.001 < error < 0.1 for error in errors) and 0.5 < largest <= 1.5 and 0.9 < root < 1.1


def final_loss(small, name: str, *overrides: str) -> float:
    train.main([CONFIG, *small, f"run.name=moments-{name}", "run.overwrite=true", *overrides])
    metrics = (Path(load(CONFIG, small).run.out) / f"moments-{name}/metrics.jsonl").read_text()
    return json.loads(metrics.splitlines()[-1])["val_loss"]


@pytest.mark.slow
def test_the_loss_is_that_of_fp32_moments(small):
    """Within 0.5 % on two seeds, at the end of 100 steps of the small model; moments that never decay (E8M0 scales, to
    nearest) end further away, and so would be noticed."""
    for seed in (0, 1):
        long = ["train.steps=100", f"train.seed={seed}"]
        fp32 = final_loss(small, "fp32", *long, "optimizer={}")
        assert final_loss(small, "fp8", *long) == pytest.approx(fp32, rel=0.005)
    stuck = final_loss(small, "stuck", *long, 'specs.adam.rounding="nearest"', 'specs.adam.scale={format="e8m0"}')
    assert stuck != pytest.approx(fp32, rel=0.005)


def test_checkpoints_hold_what_is_said(small, capsys):
    """The bytes of the line at the start are those of optimizer.safetensors; all files are below the estimate for the disk."""
    train.main([CONFIG, *small, "run.name=moments", "train.steps=2"])
    out, config = capsys.readouterr().out, load(CONFIG, small)
    step = Path(config.run.out) / "moments/step_000002"
    tensors = load_file(step / "optimizer.safetensors")
    size = sum(t.nbytes for t in tensors.values())
    assert re.search(
        rf"optimizer: moments in e4m3/1x128 fp32, to the power 2 \(8\.25 bits\), {size / 1e6:.1f} MB instead of", out
    )
    assert "8.25 bits" in json.loads((step.parent / "run.json").read_text())["optimizer"]
    codes = [t for name, t in tensors.items() if name.endswith(".codes")]
    assert codes and all(t.dtype == torch.uint8 for t in codes)
    assert contents.main([str(step)]) == 0 and "; moments in e4m3/1x128 fp32, to the power 2\n" in capsys.readouterr().out
    model = checkpoint.load_model(step).model
    optimizer = train.make_optimizer(model.parameters(), config)
    assert size == optimizer.nbytes()
    files = sum(f.stat().st_size for f in step.glob("*.safetensors"))
    assert files < checkpoint.size_estimate(model, optimizer, WeightStore(model, config.weights, 0))
