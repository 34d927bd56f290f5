"""quant/linear.py and gemm.py: each of the three GEMMs is the exact product of its two quantised operands within the
error of its accumulation; what is kept for backward is packed; weights are quantised once per change; noise follows
the micro-batch. Without a recipe a Linear is F.linear.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_product, assert_same_bits
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import quant.linear
from quant import Bound, Choice, Context, Linear, Memory, QuantSpec, Recipe, Scale, attach, quantize
from quant.gemm import pick_mode
from quant.metrics import STATS
from quant.random import Key
from quant.recipe import OPERANDS, SIGNS, Dgrad, Fprop, Wgrad

NV, SQUARE, SR = QuantSpec(), QuantSpec(block=(16, 16)), QuantSpec(rounding="stochastic8")
NVFP4 = Recipe(
    fprop={"x": NV, "w": SQUARE},
    dgrad={"g": SR, "w": SQUARE},
    wgrad={"g": QuantSpec(rounding="stochastic8", hadamard=16), "x": QuantSpec(hadamard=16)},
)
ROWS = Recipe(fprop={"x": NV, "w": NV}, dgrad={"g": NV, "w": NV}, wgrad={"g": NV, "x": NV})
FRESH = Recipe(
    fprop={"x": QuantSpec(hadamard=32, signs="fresh"), "w": QuantSpec(hadamard=32, signs="fresh")},
    dgrad={
        "g": QuantSpec(hadamard=16, signs="fresh"),
        "w": QuantSpec(hadamard=16, signs="fresh", rounding="stochastic"),
    },
    wgrad={"g": QuantSpec(hadamard=64, signs="fresh"), "x": QuantSpec(hadamard=64, signs="fresh")},
)
BACKWARD = Recipe(dgrad=NVFP4.dgrad, wgrad=NVFP4.wgrad)
FORWARD = Recipe(fprop=NVFP4.fprop)
ONE_SIDED = {name: Recipe(**{name[:5]: {name[6:]: NV}}) for name in OPERANDS}
RECIPES = {"nvfp4": NVFP4, "rows": ROWS, "fresh": FRESH, "backward only": BACKWARD, "forward only": FORWARD} | ONE_SIDED

BF16, E4M3 = QuantSpec("bf16", scale=Scale("none")), QuantSpec("e4m3", (32, 32), Scale("e8m0", rule="gam"))
MOR = Choice((E4M3, BF16), "relative_error", 0.045, "tensor")
LADDERS = {
    "mor": MOR,
    "blocks": Choice((E4M3, BF16), per=(32, 32), bounds=((Bound("relative_error", than=replace(E4M3, format="e5m2")),),)),
    "nvfp4": Choice(
        (NV, E4M3, BF16), per="tensor", bounds=((Bound("backward_error", 4, than=E4M3),), (Bound("underflow", 0.1),))
    ),
    "memory": replace(MOR, memory=Memory(every=2, patience=2, margin=0.1)),
}
LADDERS = {name: Recipe(Fprop(c, c), Dgrad(c, c), Wgrad(c, c)) for name, c in LADDERS.items()}

T, I, O = 64, 96, 128
SEED, NUMBER, MICRO_BATCH, STEP = 7, 5, 3, 2


def make(recipe: Recipe | None, mode: str = "bf16", shape: tuple[int, int] = (I, O)) -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Linear(*shape)
    module.recipe, module.number = recipe, NUMBER
    module.context = Context(SEED, mode)
    module.context.at(STEP, MICRO_BATCH)
    return module


def data(dtype=torch.bfloat16, seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor]:
    """x [T, I], g [T, O] with spread scales: rows and 16-blocks of very different size."""
    g = torch.Generator().manual_seed(seed)
    x, gy = (
        torch.randn(tokens, k, generator=g)
        * 2.0 ** torch.randint(-4, 3, (tokens, 1), generator=g)
        * 2.0 ** torch.randint(-3, 1, (k // 16,), generator=g).repeat_interleave(16)
        for k in (I, O)
    )
    return x.to(dtype).requires_grad_(), (gy * 1e-3).to(dtype)


def passes(module: torch.nn.Module, x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, dx, dw of one forward and backward pass."""
    x = x.detach().requires_grad_()
    weight.grad = None
    y = module(x)
    y.backward(g)
    return y.detach(), x.grad, weight.grad.clone()


def run(module: Linear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    return dict(zip(("y", "dx", "dw"), passes(module, x, g, module.weight), strict=True))


def same(ours: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    for name in expected:
        assert_same_bits(ours[name], expected[name], f"{what} {name}")


# --- no recipe ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_recipe_it_is_f_linear(dtype):
    x, g = data(dtype)
    module = make(None)
    w = module.weight.detach().clone().requires_grad_()
    expected = passes(lambda t: linear(t, w.to(dtype)), x, g, w)
    for name, ours, theirs in zip(("y", "dx", "dw"), run(module, x, g).values(), expected, strict=True):
        assert_same_bits(ours, theirs, name)
    with torch.no_grad():
        assert_same_bits(module(x), expected[0], "y without gradients, from the cached copy")
        assert_same_bits(module(x.view(4, -1, I)), expected[0].view(4, -1, O), "3 axes")


def test_a_recipe_of_nothing_is_f_linear():
    """dw, too: it leaves a BF16 GEMM in fp32 by way of BF16, as it does when autograd casts the gradient of a copy."""
    x, g = data()
    same(run(make(Recipe()), x, g), run(make(None), x, g), "empty recipe:")


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="no bias"):
        Linear(16, 16, bias=True)


# --- the three GEMMs ---


def operand(name: str, spec: QuantSpec | None, x: Tensor) -> Tensor:
    """What the GEMM should multiply, in fp64: the decoded operand, or x in the compute dtype. Keys as documented."""
    if spec is None:
        return x.detach().double()
    index = STEP if name.endswith(".w") else MICRO_BATCH
    sign_index = MICRO_BATCH if name.startswith("wgrad") else STEP
    key, sign_key = Key(SEED, index, NUMBER, OPERANDS[name]), Key(SEED, sign_index, NUMBER, SIGNS[name[:5]])
    q = quantize(x.detach(), spec, key, sign_key)
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    scale = q.scale.float().double().repeat_interleave(spec.block[0], 0).repeat_interleave(spec.block[1], 1)
    return codes[q.codes().long()] * scale * q.global_scale.double()


def check_gemm(what: str, ours: Tensor, a: Tensor, b: Tensor, mode: str, quantised: int) -> None:
    """A GEMM of BF16 operands in mode "bf16" rounds its sum to BF16, and so does the result unless it is fp32."""
    assert_product(ours, a, b, int(ours.dtype == torch.bfloat16) + int(mode == "bf16" or not quantised), what)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_each_gemm_multiplies_its_quantised_operands(name, dtype, mode):
    recipe, module = RECIPES[name], make(RECIPES[name], mode)
    x, g = data(dtype)
    w, x_ = module.weight.detach(), x.detach()
    results = run(module, x, g)
    assert results["y"].dtype == results["dx"].dtype == dtype and results["dw"].dtype == torch.float32
    pairs = {
        "y": ("fprop.x", x_, "fprop.w", w),
        "dx": ("dgrad.g", g, "dgrad.w", w.t()),
        "dw": ("wgrad.g", g.t(), "wgrad.x", x_.t()),
    }
    specs = recipe.operands()
    for result, (a, av, b, bv) in pairs.items():
        # A weight that is not quantised is multiplied in the compute dtype; one that is comes from the fp32 master.
        bv = bv.to(dtype) if specs[b] is None else bv
        quantised = (specs[a] is not None) + (specs[b] is not None)
        check = check_gemm if dtype == torch.bfloat16 else check_wider_gemm
        check(f"{name} {result}", results[result], operand(a, specs[a], av), operand(b, specs[b], bv), mode, quantised)


def check_wider_gemm(what: str, ours: Tensor, a: Tensor, b: Tensor, mode: str, quantised: int) -> None:
    """As `check_gemm` for other compute dtypes, with the coarsest rounding that mode "bf16" may do: whether it
    multiplies in BF16 or in the compute dtype is its choice, but an operand that is rounded on the way in (2^-8 of each
    product, for either operand) is the most there may be. In mode "fp32" nothing is BF16."""
    exact, magnitudes = a @ b.t(), a.abs() @ b.abs().t()
    output = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}[ours.dtype]
    coarse = 2.0**-8 * (2 * magnitudes + exact.abs()) if mode == "bf16" and quantised else 2.0**-11 * exact.abs()
    # fp16 subnormals: an absolute step of 2^-24, half of it lost in each of two roundings
    bound = 1.01 * ((a.shape[1] + 3) * 2.0**-24 * magnitudes + output * exact.abs() + coarse) + 2.0**-24
    worst = ((ours.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"{what} in {ours.dtype}: error {worst:.3g} times its bound"


def test_weights_from_the_bf16_copy():
    x, g = data()
    module, copied = make(NVFP4), make(Recipe(NVFP4.fprop, NVFP4.dgrad, NVFP4.wgrad, weights="bf16"))
    with torch.no_grad():
        rounded = make(NVFP4)
        rounded.weight.copy_(rounded.weight.bfloat16())
    same(run(copied, x, g), run(rounded, x, g), "weights = bf16:")
    assert not torch.equal(run(copied, x, g)["y"], run(module, x, g)["y"]), "the two sources are one"


def test_leading_axes_are_tokens():
    x, g = data()
    flat = run(make(NVFP4), x, g)
    deep = run(make(NVFP4), x.view(2, 4, 8, I), g.view(2, 4, 8, O))
    same({k: v.reshape(flat[k].shape) for k, v in deep.items()}, flat, "x of 4 axes:")


@pytest.mark.parametrize("name", ["nvfp4", "fresh"])
def test_a_gradient_that_is_not_contiguous(name):
    x, g = data()
    expected = run(make(RECIPES[name]), x, g)
    same(run(make(RECIPES[name]), x, g.t().contiguous().t()), expected, "column-major g:")
    same(run(make(RECIPES[name]), x.detach().t().contiguous().t(), g), expected, "column-major x:")


def test_quantized_weight_is_what_fprop_multiplies():
    module = make(NVFP4)
    q = module.quantized_weight()
    assert_same_bits(q.dequantize(), quantize(module.weight.detach(), SQUARE).dequantize(), "decoded weight")
    assert make(BACKWARD).quantized_weight() is None and make(None).quantized_weight() is None


# --- what is not computed, what is kept ---


def saved_bytes(module: Linear, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


def test_x_is_kept_packed():
    """4.5 bits an element and one fp32 scale: 0.28125 of the bytes of BF16; the storage counts, not the view."""
    x, _ = data()
    full = x.numel() * 2
    assert saved_bytes(make(NVFP4), x) == full * 0.28125 + 4
    assert saved_bytes(make(ROWS), x) <= 0.29 * full
    assert saved_bytes(make(FORWARD), x) == full, "wgrad.x is not quantised: the BF16 x itself"


def test_nothing_is_kept_of_x_for_a_frozen_weight():
    x, g = data()
    module = make(NVFP4)
    expected = run(module, x, g)
    module.weight.requires_grad_(False)
    module.weight.grad = None
    assert saved_bytes(module, x) == 0
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, g)
    same({"y": y.detach(), "dx": dx}, {k: expected[k] for k in ("y", "dx")}, "frozen weight:")
    assert module.weight.grad is None


def test_an_input_without_gradient_gets_none(monkeypatch):
    module = make(NVFP4)
    x, g = data()
    expected = run(module, x, g)["dw"]
    seen = observe_quantiser(monkeypatch)
    module.weight.grad = None
    module(x.detach()).backward(g)
    assert_same_bits(module.weight.grad, expected, "dw")
    assert [spec for _, spec in seen] == [NV, NVFP4.wgrad.g], "dgrad.g was quantised for nothing"


# --- the weight is quantised once per change ---


def observe_quantiser(monkeypatch) -> list[tuple[int, QuantSpec]]:
    """(data_ptr, spec) of every operand that is quantised to values from now on."""
    calls = []
    real = quant.linear.quantized_values

    def counted(x, spec, *keys):
        calls.append((x.data_ptr(), spec))
        return real(x, spec, *keys)

    monkeypatch.setattr(quant.linear, "quantized_values", counted)
    return calls


def of_weight(calls: list, module: Linear) -> int:
    count = sum(pointer == module.weight.data_ptr() for pointer, _ in calls)
    calls.clear()
    return count


@pytest.mark.parametrize("name, times", [("nvfp4", 1), ("rows", 2), ("backward only", 1), ("fprop.x", 0)])
def test_weights_are_quantised_once_per_change(name, times, monkeypatch):
    module = make(RECIPES[name])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    calls = observe_quantiser(monkeypatch)
    for micro_batch in range(3):
        module.context.at(STEP, micro_batch)
        run(module, *data(seed=micro_batch))
    assert of_weight(calls, module) == times, "3 micro-batches of a step"
    optimizer.step()
    ours = run(module, *data())
    assert of_weight(calls, module) == times, "after an optimiser step"
    fresh = make(RECIPES[name])
    fresh.load_state_dict(module.state_dict())
    fresh.context = module.context
    same(ours, run(fresh, *data()), "after an optimiser step:")


def test_other_changes_of_the_weight_are_noticed():
    x, g = data()
    module, expected = make(NVFP4), make(NVFP4)
    first = run(module, x, g)
    doubled = module.weight.detach() * 2

    def notices(what: str) -> None:
        ours = run(module, x, g)
        assert not torch.equal(ours["y"], first["y"]), f"{what}: the old weight is still multiplied"
        fresh = make(NVFP4)
        fresh.weight = torch.nn.Parameter(module.weight.detach().clone())
        same(ours, run(fresh, x, g), what)

    module.weight.data = doubled
    notices("a swap of .data")
    with torch.no_grad():
        module.weight.add_(0.01)
    notices("an in-place change")
    module.load_state_dict({"weight": expected.weight.detach() * 3})
    notices("load_state_dict")
    module.load_state_dict({"weight": expected.weight.detach() * 5}, assign=True)
    notices("load_state_dict(assign=True)")


def test_another_recipe_is_noticed():
    x, g = data()
    module = make(NVFP4)
    first = run(module, x, g)
    for recipe in (ROWS, FRESH, None, BACKWARD, Recipe(NVFP4.fprop, NVFP4.dgrad, NVFP4.wgrad, weights="bf16"), NVFP4):
        module.recipe = recipe
        same(run(module, x, g), run(make(recipe), x, g), f"{recipe and recipe.short()}:")
    same(run(module, x, g), first, "back again:")


@pytest.mark.parametrize("name", ["nvfp4", "fprop.x", None])
def test_evaluation_in_inference_mode_leaves_nothing_that_training_cannot_use(name):
    x, g = data()
    module = make(RECIPES[name] if name else None)
    with torch.inference_mode():
        y = module(x)
    ours = run(module, x, g)
    assert_same_bits(y.clone(), ours["y"], "evaluation and training")
    same(ours, run(make(module.recipe), x, g), "after evaluation:")


def test_loaded_codes_are_used_until_the_weight_changes():
    """How quantised weights come from a checkpoint: codes of another weight, so that using them shows."""
    x, g = data()
    donor, module = make(NVFP4), make(NVFP4)
    with torch.no_grad():
        donor.weight.mul_(-3)
    module.use(donor.quantized_weight())
    expected = run(donor, x, g)
    same(run(module, x, g), expected, "with the codes of another weight:")
    with torch.no_grad():
        module.weight.add_(0)
    same(run(module, x, g), run(make(NVFP4), x, g), "after a change of the weight:")


# --- randomness ---


def test_noise_follows_the_micro_batch():
    x, g = data()
    module = make(NVFP4)
    first = run(module, x, g)
    same(run(module, x, g), first, "the same micro-batch again:")
    module.context.at(STEP + 1, MICRO_BATCH)
    same(run(module, x, g), first, "another step, the same micro-batch (no weight is rounded stochastically):")
    module.context.at(STEP, MICRO_BATCH + 1)
    other = run(module, x, g)
    assert_same_bits(other["y"], first["y"], "y, in which nothing is stochastic")
    for name in ("dx", "dw"):
        assert not torch.equal(other[name], first[name]), f"{name}: two micro-batches share their noise"
    module.context.at(STEP, MICRO_BATCH)
    same(run(module, x, g), first, "back again:")
    module.number += 1
    for name in ("dx", "dw"):
        assert not torch.equal(run(module, x, g)[name], first[name]), f"{name}: two layers share their noise"


def test_noise_of_weights_follows_the_step(monkeypatch):
    recipe = Recipe(fprop={"w": SR})
    x, g = data()
    module = make(recipe)
    first = run(module, x, g)["y"]
    module.context.at(STEP, MICRO_BATCH + 1)
    calls = observe_quantiser(monkeypatch)
    assert_same_bits(run(module, x, g)["y"], first, "another micro-batch of the step")
    assert not calls, "quantised again within a step"
    module.context.at(STEP + 1, MICRO_BATCH + 1)
    assert not torch.equal(run(module, x, g)["y"], first), "the next step has the noise of the last"


def test_the_two_draws_of_g_are_independent():
    """g = g^T under one spec: with shared noise dgrad.g and wgrad.g would be the same codes. (`use` tells them apart;
    test_each_gemm_... that Linear goes by it.)"""
    g = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    g = (g + g.t()).bfloat16()
    down = quantize(g, QuantSpec(rounding="zero")).codes()

    def ups(index: int, name: str) -> Tensor:
        q = quantize(g if name == "dgrad.g" else g.t(), SR, Key(SEED, index, NUMBER, OPERANDS[name]))
        return (q.codes() != down).double()

    draws = [(ups(i, "dgrad.g"), ups(i, "wgrad.g")) for i in range(32)]
    p = sum(a + b for a, b in draws) / 64
    # Shared noise has the covariance E[p (1 - p)]; independent noise 0, less what `p`, itself of these 64 draws, takes
    # away: 1/64 of it. The products of n = 32 * 4096 pairs are below 1 with a mean square below 1/16: 5 sigma.
    covariance = (sum((a - p) * (b - p) for a, b in draws) / 32).mean().item()
    shared = (p * (1 - p)).mean().item()
    assert shared > 0.08, "hardly anything was drawn"
    assert abs(covariance) < shared / 63 + 5 * (32 * 4096) ** -0.5 / 4, f"covariance {covariance}, shared {shared}"


def test_context_keys_are_the_documented_ones(monkeypatch):
    module = make(NVFP4)
    for name, use in OPERANDS.items():
        index = STEP if name.endswith(".w") else MICRO_BATCH
        assert module.context.key(name, 9).words().tolist() == [index, 9, use, SEED, 0]
    for gemm, use in SIGNS.items():
        index = MICRO_BATCH if gemm == "wgrad" else STEP
        for name in OPERANDS:
            if name.startswith(gemm):
                assert module.context.sign_key(name, 9).words().tolist() == [index, 9, use, SEED, 0]


@pytest.mark.parametrize("name", ["nvfp4", "fresh"])
def test_no_global_generator_is_drawn_from(name):
    module, (x, g) = make(RECIPES[name]), data()
    before = torch.get_rng_state()
    run(module, x, g)
    assert torch.equal(torch.get_rng_state(), before)


# --- composition ---


class Stack(torch.nn.Module):
    def __init__(self, recipe: Recipe, again: bool):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.a, self.b = Linear(I, O), Linear(O, I)
        self.again = again
        context = Context(SEED)
        context.at(STEP, MICRO_BATCH)
        attach(self, context)
        self.a.recipe = self.b.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        def f(t):
            return self.b(torch.relu(self.a(t)).square())

        return checkpoint(f, x, use_reentrant=False) if self.again else f(x)


@pytest.mark.parametrize("name", ["nvfp4", "fresh"])
def test_activation_checkpointing_changes_nothing(name):
    x, _ = data()
    results = []
    for again in (False, True):
        model, x_ = Stack(RECIPES[name], again), x.detach().requires_grad_()
        y = model(x_)
        y.backward(x.detach())
        results.append({"y": y.detach(), "dx": x_.grad, "dw a": model.a.weight.grad, "dw b": model.b.weight.grad})
    same(results[1], results[0], "checkpointed:")


def test_attach_names_numbers_and_shares():
    model = Stack(NVFP4, False)
    assert [(m.name, m.number) for m in (model.a, model.b)] == [("a", 0), ("b", 1)]
    assert model.a.context is model.b.context


def test_micro_batches_add_up():
    """dw of two micro-batches into one .grad is the fp32 sum of the two, each with the noise of its own."""
    module = make(NVFP4)
    parts = []
    for micro_batch in (0, 1):
        module.context.at(STEP, micro_batch)
        parts.append(run(module, *data(seed=micro_batch))["dw"])
    module.weight.grad = None
    for micro_batch in (0, 1):
        module.context.at(STEP, micro_batch)
        x, g = data(seed=micro_batch)
        module(x).backward(g)
    assert_same_bits(module.weight.grad, parts[0] + parts[1], "accumulated dw")


@pytest.mark.parametrize("name", ["nvfp4", "fresh"])
def test_statistics_cover_all_six_operands_and_change_nothing(name):
    x, g = data()
    expected = run(make(RECIPES[name]), x, g)
    module = make(RECIPES[name])
    module.name = "blocks.0.up"
    for _ in range(2):  # the second time the weight comes from the cache
        module.context.stats = {}
        same(run(module, x, g), expected, "with statistics:")
        assert set(module.context.stats) == {f"blocks.0.up/{operand}" for operand in OPERANDS}
    for operand_name, stats in module.context.stats.items():
        assert stats.shape == (len(STATS),) and stats.isfinite().all(), f"{operand_name}: {stats}"
        # NVFP4 of near-normal data: relative errors of 0.09 to 0.14, that is 17 to 21 dB, and of
        # blocks with a wide spread somewhat less. 10 and 30 would mean another format or another tensor.
        assert 10 < stats[STATS.index("sqnr_db")] < 30, f"{operand_name}: {stats}"


def test_statistics_are_those_of_the_operand():
    x, g = data()
    module = make(NVFP4)
    module.context.stats = {}
    run(module, x, g)
    for name, spec, tensor in (("fprop.x", NV, x), ("dgrad.w", SQUARE, module.weight.t())):
        y = tensor.detach().double()
        noise = y - operand(name, spec, tensor)
        expected = 10 * torch.log10(y.square().sum() / noise.square().sum())
        ours = module.context.stats[f"linear/{name}"][STATS.index("sqnr_db")]
        # fp32 sums of n <= 12288 squares: each off by n 2^-24 = 7e-4 at worst, below 0.0035 dB; two of them
        assert abs(ours - expected) < 0.007, f"{name}: {ours} dB, expected {expected} dB"


def test_nan_is_not_laundered():
    for place, spoilt in (("x", ("y", "dw")), ("g", ("dx", "dw")), ("w", ("y", "dx"))):
        x, g = data()
        module = make(NVFP4)
        with torch.no_grad():
            {"x": x, "g": g, "w": module.weight}[place][3, 7] = torch.nan
        results = run(module, x, g)
        for name, value in results.items():
            assert value.isnan().all() if name in spoilt else value.isfinite().all(), f"NaN in {place}: {name}"


# --- messages ---


def test_sizes_are_checked_before_a_run():
    module = make(NVFP4, shape=(96, 120))
    module.name = "blocks.3.ffn.up"
    with pytest.raises(ValueError, match=r"blocks\.3\.ffn\.up fprop\.w of shape \[120, 96\]: its rows, 120, .* of 16"):
        module.check(64)
    with pytest.raises(ValueError, match=r"wgrad\.g of shape \[128, 40\]: its contraction, 40, .* multiple of 16"):
        make(NVFP4).check(40)
    make(NVFP4).check(64)
    make(None).check(1)


@pytest.mark.parametrize("name", RECIPES)
def test_check_agrees_with_what_runs(name):
    """A size that `check` lets pass must run, and the other way round."""
    recipe = RECIPES[name]
    for tokens, i, o in itertools.product((16, 24, 64), (16, 24, 64), (16, 24, 64)):
        module = make(recipe, shape=(i, o))
        try:
            module.check(tokens)
            fits = True
        except ValueError:
            fits = False
        try:
            run(module, torch.ones(tokens, i, dtype=torch.bfloat16), torch.ones(tokens, o, dtype=torch.bfloat16))
            runs = True
        except ValueError:
            runs = False
        assert fits == runs, f"T {tokens}, I {i}, O {o}: check says {fits}, a run says {runs}"


def test_the_mode_says_why():
    assert pick_mode("fp32", torch.device("cpu")) == ("fp32", "emulated GEMMs: fp32, as asked")
    mode, line = pick_mode("auto", torch.device("cpu"))
    assert mode in ("bf16", "fp32") and line.startswith(f"emulated GEMMs: {mode}")


class OneDevice(TorchDispatchMode):
    """Raises when an operation touches a tensor that is not on the meta device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        seen = {t.device.type for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)}
        assert seen <= {"meta"}, f"{operation} touches {seen}"
        return out


@pytest.mark.parametrize("name", [*RECIPES, *(f"ladder {name}" for name in LADDERS)])
def test_a_step_stays_on_the_device(name, monkeypatch):
    """Forward and backward of a later micro-batch neither read a value back (meta tensors have none) nor make tensors of
    numbers from the host (a copy that waits for a GPU). The meta device stands in for one, on any machine."""
    module = Linear(I, O, device="meta")
    recipes = RECIPES | {f"ladder {name}": recipe for name, recipe in LADDERS.items()}
    module.recipe, module.context = recipes[name], Context(SEED, device="meta")
    module.context.decisions = {}
    x = torch.empty(T, I, dtype=torch.bfloat16, device="meta", requires_grad=True)
    module(x).sum().backward()  # makes the constants

    def from_numbers(*args, **kwargs):
        raise AssertionError(f"a tensor made of {args} in the middle of a run")

    for maker in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, maker, from_numbers)
    with OneDevice():
        module.context.at(STEP, MICRO_BATCH)
        module(x).sum().backward()
    assert module.weight.grad.shape == (O, I) and x.grad.shape == (T, I)
