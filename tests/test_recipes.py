"""What a Recipe adds to six operands: rotation, clipping, double quantisation, centring, histories. Each against a reference
of its own in fp64, or bit for bit where that is what is promised."""

import math

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from configs import load
from quant import Context, Linear, QuantSpec, Recipe, Scale, quantize
from quant.quantize import quantized_values, rotated
from quant.random import Key, random_ints
from quant.recipe import OPERANDS

T, I, O = 64, 96, 128
SEED, NUMBER, STEP, MICRO = 7, 3, 2, 5
NV = QuantSpec()
MX = QuantSpec("e2m1", (1, 32), Scale("e8m0"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(recipe: Recipe | None, mode: str = "fp32") -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Linear(I, O)
    module.number, module.context = NUMBER, Context(SEED, mode)
    module.context.at(STEP, MICRO)
    module.recipe = recipe
    return module


def run(module: Linear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    module.weight.grad = None
    y = module(x)
    y.backward(g)
    return {"y": y.detach(), "dx": x.grad, "dw": module.weight.grad.clone()}


def close(ours: Tensor, a: Tensor, b: Tensor, what: str, more: float = 0.0) -> None:
    """ours against a b^T of fp64 operands: at most K roundings of 2^-24 of the sum of magnitudes, and `more` of it."""
    bound = ((a.shape[1] + 8) * 2.0**-24 + more) * (a.abs() @ b.abs().T)
    wrong = (ours.double() - a @ b.T).abs() - bound
    assert (wrong <= 0).all(), f"{what}: {float(wrong.max())} beyond its bound"


def hadamard(d: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < d:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(d)


def turned(x: Tensor, d: int) -> Tensor:
    return (x.double().view(*x.shape[:-1], -1, d) @ hadamard(d)).view(x.shape)


# --- rotation, clipping, double quantisation: Quartet ---

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def quest(x: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv:2505.14669 as released: (values, mask) of x [R, K] fp64, rotated already, in blocks of 32."""
    b = x.view(x.shape[0], -1, 32)
    sigma = (b.square().mean(2) - b.mean(2).square()).sqrt()
    X = torch.exp2(torch.floor(torch.log2(0.48708 * sigma)))[..., None]
    z = b / X
    q = GRID[torch.bucketize(z.abs(), (GRID[1:] + GRID[:-1]) / 2, right=False)] * z.sign()  # a tie belongs below
    return (q * X).view(x.shape), (z.abs() < 6).view(x.shape)


def tseng(x: Tensor, operand: str) -> Tensor:
    """T: Hadamard 32 along the contraction, 3/4 of the floored scale, stochastic rounding with the noise of this operand."""
    y = turned(x, 32).bfloat16().double()
    b = y.view(y.shape[0], -1, 32)
    X = torch.exp2(torch.floor(torch.log2(b.abs().amax(2, keepdim=True))) - 2)
    z = (b / X * 0.75).view(y.shape)
    index = STEP if operand.endswith("w") else MICRO
    noise = random_ints(*y.shape, 24, Key(SEED, index, NUMBER, OPERANDS[operand]).words()).double()
    below = torch.bucketize(z.abs(), GRID, right=True) - 1
    above = GRID[(below + 1).clamp(max=7)]
    fraction = (z.abs() - GRID[below]) / (above - GRID[below]).clamp(min=0.5)
    q = torch.where((fraction * 2.0**24).floor() + noise >= 2.0**24, above, GRID[below]) * z.sign()
    return (q.view(b.shape) * X).view(y.shape) * float(torch.tensor(1.0) / torch.tensor(0.75))


def test_quartet_forward_and_backward():
    recipe = load("configs/quartet.toml").recipes["quartet"]
    x, g = normal(T, I), normal(T, O, seed=1)
    module = make(recipe)
    ours = run(module, x, g)
    # The transform is fp32 butterflies; where an element or a scale lies next to a border fp64 may decide otherwise, so the
    # reference starts from what was rotated here, having checked that: 5 additions, a product, of at most 32 numbers.
    rx, rw = module._rotated(x).double(), module._rotated(module.weight.detach()).double()
    for r, t in ((rx, x), (rw, module.weight.detach())):
        assert (r - turned(t, 32)).abs().max() < 8 * 2.0**-24 * t.abs().max() * math.sqrt(32)
    (qx, mx), (qw, mw) = quest(rx), quest(rw)
    assert 0 < (~mx).double().mean() < 0.1
    close(ours["y"], qx, qw, "y")
    dx = tseng(g, "dgrad.g") @ tseng(qw.T.contiguous(), "dgrad.w").T
    dw = tseng(g.T.contiguous(), "wgrad.g") @ tseng(qx.T.contiguous(), "wgrad.x").T
    for name, mine, mask in (("dx", dx, mx), ("dw", dw, mw)):
        expected = turned(torch.where(mask, mine, 0.0), 32)
        # sums of 64 to 128 products in fp32, then the transform: far below 2^-14 of the largest
        assert (ours[name].double() - expected).abs().max() < 2.0**-14 * expected.abs().max(), name


def test_clipping_stops_gradients_where_fprop_clipped_and_nowhere_else():
    spec = QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor"))
    x, g = normal(T, I), normal(T, O, seed=1)
    with_clip, without = (run(make(Recipe(fprop={"x": spec, "w": spec}, clip=clip)), x, g) for clip in (True, False))
    assert_same_bits(with_clip["y"], without["y"], "y")
    for name, source in (("dx", x), ("dw", make(None).weight.detach())):
        scaled = source.double() / quantize(source, spec).scale.float().sub(127).exp2().double().repeat_interleave(32, 1)
        inside = scaled.abs() < 6
        assert 0 < (~inside).double().mean() < 0.1
        assert_same_bits(with_clip[name], torch.where(inside, without[name], 0.0), name)


def test_rotation_alone_cancels():
    fine = QuantSpec("e8m10", scale=Scale("none"))
    x, g = normal(T, I), normal(T, O, seed=1)
    both = [Recipe(fprop={"x": fine, "w": fine}, rotate=rotate) for rotate in (0, 32)]
    plain, turned_ = (run(make(recipe), x, g) for recipe in both)
    for name in plain:  # E8M10 keeps 2^-11 of each of two operands
        assert (plain[name] - turned_[name]).norm() < 2.0**-9 * plain[name].norm()
        assert not torch.equal(plain[name], turned_[name])


@pytest.mark.parametrize("spec", [MX, NV], ids=["mxfp4", "nvfp4"])
def test_source_fprop_quantises_what_fprop_made(spec):
    again = QuantSpec(spec.format, spec.block, spec.scale, source="fprop")
    recipe = Recipe(fprop={"x": spec, "w": spec}, dgrad={"w": again}, wgrad={"x": again})
    x, g = normal(T, I), normal(T, O, seed=1)
    module = make(recipe)
    ours = run(module, x, g)
    w = module.weight.detach()
    x2, w2 = (quantize(quantize(t, spec).dequantize().t(), spec).dequantize() for t in (x, w))
    close(ours["dx"], g.double(), w2.double(), "dx")
    close(ours["dw"], g.t().double(), x2.double(), "dw")
    once = run(make(Recipe(fprop={"x": spec, "w": spec}, dgrad={"w": spec}, wgrad={"x": spec})), x, g)
    assert not torch.equal(once["dx"], ours["dx"]) and not torch.equal(once["dw"], ours["dw"])
    with torch.no_grad():
        module.weight.mul_(1.5)
    w2 = quantize(quantize(module.weight.detach(), spec).dequantize().t(), spec).dequantize()
    close(run(module, x, g)["dx"], g.double(), w2.double(), "dx after a change of the weight")


# --- centring ---


def test_centring_by_its_formula():
    spec = QuantSpec(center=True)
    x, g = normal(T, I) + 5 * normal(1, I, seed=2), normal(T, O, seed=1)
    module = make(Recipe(fprop={"x": spec, "w": NV}, wgrad={"x": spec}))
    ours = run(module, x, g)
    mean = x.double().mean(0, keepdim=True)
    rest = x - mean.float()
    assert (mean - (x - rest).double()).abs().max() < 1e-5
    qw = quantize(module.weight.detach(), NV).dequantize().double()
    # A mean of 64 in fp32 is right to 7 roundings; an element of r next to a border of E2M1 may then go the other way, by a
    # step of at most a third of itself: so the products, not the codes, are compared, against what centring gains.
    for name, a, b, plain in (
        ("y", x.double(), qw, Recipe(fprop={"x": NV, "w": NV})),
        ("dw", g.t().double(), x.t().double(), Recipe(wgrad={"x": NV})),
    ):
        exact, error = a @ b.T, {}
        for what, found in (("centred", ours), ("plain", run(make(plain), x, g))):
            error[what] = float((found[name].double() - exact).norm() / exact.norm())
        # r has 1 / 26 of the energy of x, so its error is 1 / sqrt(26) = 0.196 of that of x: 14 dB
        assert error["centred"] < 0.3 * error["plain"], f"{name}: {error}"
    q = quantize(rest, NV).dequantize().double()
    expected = q @ qw.T + mean @ qw.T
    assert ((ours["y"].double() - expected).abs() > 1e-3 * expected.abs().max()).double().mean() < 0.01
    assert_same_bits(ours["dx"], run(make(Recipe(fprop={"x": NV, "w": NV})), x, g)["dx"], "dx")


# --- histories ---

FP8 = QuantSpec("e4m3", (-1, -1), Scale("fp32", history=2))


def test_a_history_is_the_largest_amax_of_earlier_steps():
    module = make(Recipe(fprop={"x": FP8}))
    seen: dict[int, float] = {}
    for step in range(6):
        for micro in range(2):
            module.context.at(step, 2 * step + micro)
            x = normal(T, I, seed=10 * step + micro) * (1 + step % 3)
            earlier = [seen[s] for s in range(step - 2, step) if s in seen]
            held = torch.tensor(max(earlier, default=0.0))
            values, factor = quantized_values(x, FP8, held=held)
            for _ in range(2):  # a step run again does the same
                y = module(x).detach()
                close(y, (values.double() * factor.double()), module.weight.detach().double(), f"step {step}")
            seen[step] = max(seen.get(step, 0.0), float(x.abs().max()))
            if earlier:
                assert factor == torch.tensor(1.0) / (torch.tensor(448.0) / held)
                assert values.abs().max() <= 448
            else:
                assert values.abs().max() == 448
    assert sorted(module.history_fprop_x[0].tolist()) == [3, 4, 5]
    assert set(module.history_fprop_x[1].tolist()) == {seen[3], seen[4], seen[5]}


def test_evaluation_uses_a_history_and_leaves_it():
    module = make(Recipe(fprop={"x": FP8, "w": FP8}))
    module(normal(T, I))
    module.context.at(STEP + 1, MICRO + 1)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    assert {"history_fprop_x", "history_fprop_w"} < before.keys()
    module.eval()
    y = module(normal(T, I) * 9).detach()
    module.quantized_weight()
    for name, t in module.state_dict().items():
        assert_same_bits(t, before[name], name)
    module.train()
    module.quantized_weight()
    assert_same_bits(module.history_fprop_w, before["history_fprop_w"], "saving a checkpoint notes nothing")
    assert_same_bits(module(normal(T, I) * 9).detach(), y, "the same scale in training")
    assert not torch.equal(module.history_fprop_x, before["history_fprop_x"])


def test_what_is_not_finite_is_not_remembered_and_not_laundered():
    module = make(Recipe(fprop={"x": FP8}))
    module(normal(T, I))
    for bad in (math.nan, math.inf):
        module.context.at(module.context.step + 1, 0)
        x = normal(T, I)
        x[3, 5] = bad
        assert module(x).isnan().all(), "one scale spans all of x"
    module.context.at(module.context.step + 1, 0)
    assert module(normal(T, I)).isfinite().all() and module.history_fprop_x[1].isfinite().any()


# --- together ---

FILES = ("quartet", "ms-eden", "tetrajet", "tetrajet-v2", "nvfp4-centred", "nvfp4-4over6", "if4", "mxfp4-mbs", "fp8-delayed")


@pytest.mark.parametrize("name", FILES)
def test_statistics_change_nothing_and_the_weight_turns_back(name):
    recipe = load(f"configs/{name}.toml").recipes[name]
    shape = (128, 128)
    x, g = normal(*shape).bfloat16(), normal(*shape, seed=1).bfloat16()
    found = []
    for watched in (False, True):
        module = Linear(128, 128)
        with torch.no_grad():
            module.weight.copy_(normal(128, 128, seed=2) * 0.1)
        module.context = Context(SEED)
        module.recipe = recipe
        for step in range(2):
            module.context.at(step, step)
            module.context.stats = {} if watched else None
            found.append(run(module, x, g))
        if watched:
            expected = {f"linear/{operand}" for operand, spec in recipe.operands().items() if spec}
            assert set(module.context.stats) == expected
    for plain, watched in zip(found[:2], found[2:], strict=True):
        for key in plain:
            assert_same_bits(watched[key], plain[key], f"{name}, {key} with statistics")
    w = module.weight.detach()
    error = (module.dequantized(module.quantized_weight()) - w).norm() / w.norm()
    assert error < 0.2, "FP4 of normal numbers is within 0.12, QuEST's within 0.17; another basis would be off by 1.4"
    assert rotated(w, NV) is w
