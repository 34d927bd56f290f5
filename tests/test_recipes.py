"""What a Recipe adds to six quantised operands (quant/linear.py): `rotate`, `clip`, `source`, `center`, `history`, each beside
a version in NumPy that is written from its definition; Quartet, TetraJet, centred NVFP4 and delayed FP8 as their configs have
them. Statistics change nothing, caches follow weights, steps and recipes, and `dequantized` finds the way back.

Bit for bit wherever a GEMM's sum is exact in fp32 (`product` makes sure), which sums of E2M1 times powers of two are.
"""

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from configs import load
from quant import Choice, Context, Linear, QuantSpec, Recipe, Scale, quantize
from quant.metrics import STATS
from quant.random import Key, random_ints
from quant.recipe import OPERANDS, SIGNS

CONFIGS = Path(__file__).parent.parent / "configs"
QUARTET, TETRAJET, CENTRED = (load(CONFIGS / f"{n}.toml").recipes[n] for n in ("quartet", "tetrajet", "nvfp4-centred"))
DELAYED = load(CONFIGS / "fp8-delayed.toml", ["specs.f8.scale.history=3"]).recipes["fp8-delayed"]

NV, NVSR = QuantSpec(), QuantSpec(rounding="stochastic8")
MX = QuantSpec("e2m1", (1, 32), Scale("e8m0"))
FLOOR = QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor"))
BF16 = QuantSpec("bf16", scale=Scale("none"))
FINE = QuantSpec("e8m10", scale=Scale("none"))
REMEMBER = 2  # steps of these two:
F8_HELD = QuantSpec("e4m3", (-1, -1), Scale("fp32", history=REMEMBER))
NV_HELD = QuantSpec(scale=Scale(history=REMEMBER))
SIX_OR_FOUR = Choice(tuple(QuantSpec(scale=Scale(target=t, outer_target=1536 / t)) for t in (6, 4)))

RECIPES = {
    "quartet": QUARTET,
    "tetrajet": TETRAJET,
    "nvfp4-centred": CENTRED,
    "fp8-delayed": DELAYED,
    "nvfp4-delayed": Recipe({"x": NV_HELD, "w": NV_HELD}, {"g": NV_HELD, "w": NV_HELD}, {"g": NV_HELD, "x": NV_HELD}),
    "all at once": Recipe(
        fprop={"x": replace(NV_HELD, center=True), "w": NV_HELD},
        dgrad={"g": replace(NV_HELD, hadamard=16), "w": replace(NV_HELD, hadamard=16, source="fprop")},
        wgrad={"g": replace(NV_HELD, hadamard=16, signs="fresh"), "x": QuantSpec(hadamard=16, signs="fresh", center=True)},
        rotate=16,
    ),
}

T, I, O = 64, 96, 128
SEED, NUMBER = 7, 5
PLACE = (2, 5)  # step, micro-batch


def make(recipe: Recipe | None, mode: str = "fp32", at: tuple[int, int] = PLACE, weight: Tensor | None = None) -> Linear:
    weight = weights() if weight is None else weight
    module = Linear(*reversed(weight.shape), device="meta")
    module.weight = torch.nn.Parameter(weight.clone())
    module.recipe, module.number, module.context = recipe, NUMBER, Context(SEED, mode)
    module.context.at(*at)
    return module


def weights(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(O, I, generator=g) * 0.05 * 2.0 ** torch.randint(-1, 2, (O, 1), generator=g)


def data(dtype=torch.bfloat16, seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor]:
    """x [T, I], g [T, O], rows of different size."""
    g = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-2, 2, (2, tokens, 1), generator=g)
    x, gy = (torch.randn(tokens, k, generator=g) * s for k, s in zip((I, O), size, strict=True))
    return x.to(dtype), (gy * 1e-3).to(dtype)


def run(module: Linear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    module.weight.grad = None
    y = module(x)
    y.backward(g)
    return {"y": y.detach(), "dx": x.grad, "dw": module.weight.grad.clone()}


def same(ours: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    for name in expected:
        assert_same_bits(ours[name], expected[name], f"{what} {name}")


def buffers(module: Linear) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


# --- the same in NumPy ---

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLT_MAX = np.finfo(np.float32).max


def fp32(x) -> np.ndarray:
    return x.detach().float().numpy() if isinstance(x, Tensor) else np.asarray(x).astype(np.float32)


def bf16(x) -> np.ndarray:
    return fp32(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def tensor(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(fp32(x))).to(dtype)


ROUND = {torch.bfloat16: bf16, torch.float32: fp32, torch.float16: lambda x: fp32(fp32(x).astype(np.float16))}


def turned(x, size: int) -> np.ndarray:
    """x [..., K] -> x H / sqrt(size) in tiles of K, fp32: butterflies of strides 1, 2, 4, ..., then one product."""
    y, h = fp32(x).reshape(-1, size), 1
    while h < size:
        a, b = np.moveaxis(y.reshape(-1, size // (2 * h), 2, h), 2, 0)
        y, h = np.stack([a + b, a - b], 2).reshape(-1, size), 2 * h
    return (y * np.float32(size**-0.5)).reshape(x.shape)


def matrix(size: int) -> np.ndarray:
    """H / sqrt(size), fp64, from the definition."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / math.sqrt(size)


def in_tiles(x, m: np.ndarray) -> np.ndarray:
    """x [R, K] times the block-diagonal matrix of m, fp64."""
    x = fp32(x).astype(np.float64) if isinstance(x, Tensor) else x
    return (x.reshape(x.shape[0], -1, len(m)) @ m).reshape(x.shape)


def to_e2m1(v: np.ndarray, rounding: str = "nearest", noise: np.ndarray | None = None) -> np.ndarray:
    """Values, saturating; noise: 24 bits each, up iff floor(2^24 fraction) + noise >= 2^24."""
    a = np.minimum(np.abs(v).astype(np.float64), 6)
    low = np.minimum(np.searchsorted(E2M1, a, "right") - 1, 6)
    fraction = (a - E2M1[low]) / (E2M1[low + 1] - E2M1[low])
    if noise is not None:
        up = np.floor(fraction * 2**24) + noise >= 2**24
    else:
        up = (fraction > 0.5) | (fraction == 0.5) & (low % 2 == 1) & (rounding == "nearest")
    return np.copysign(E2M1[low + up], v)


def mx(y: np.ndarray, rule: str, noise: np.ndarray | None = None, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 under 2^floor(log2(amax / 4)) or 2^ceil(log2(amax / 6)) of 32 -> (code * scale fp64, y / scale * factor)."""
    blocks = y.reshape(-1, 32).astype(np.float64)
    m, e = np.frexp(np.abs(blocks).max(1, keepdims=True) / {"floor": 4, "rceil": 6}[rule])  # m 2^e, 0.5 <= m < 1
    e = e - 1 + ((m > 0.5) & (rule == "rceil"))
    v = blocks * 2.0**-e * factor
    noise = noise if noise is None else noise.reshape(v.shape)
    return (to_e2m1(v, noise=noise) * 2.0**e).reshape(y.shape), v.reshape(y.shape)


def quest(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1, ties toward zero, under 2^floor(log2(0.48708 sigma)) of 32 -> (code * scale fp64, y / scale)."""
    blocks = y.reshape(-1, 32).astype(np.float64)
    sigma = np.sqrt((blocks**2).mean(1, keepdims=True) - blocks.mean(1, keepdims=True) ** 2)
    exponent = np.log2(0.48708 * sigma)
    # The config's 2.05305 is 1 / 0.48708 to a relative 4e-7, and fp32 sums of 32 are off by a few 2^-24: 1e-5 covers both.
    assert np.abs(exponent - np.round(exponent)).min() > 1e-5, "the data has a sigma on the edge between two scales"
    e = np.floor(exponent)
    v = blocks * 2.0**-e
    return (to_e2m1(v, "inward") * 2.0**e).reshape(y.shape), v.reshape(y.shape)


def nvfp4(x, held: float = 0.0, block: tuple[int, int] = (1, 16)) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """-> (code * block scale, the tensor's scale, x / scales), fp32, in the order of operations that scaling.py documents.
    held: an amax in place of that of x."""
    x, (p, q) = fp32(x), block
    blocks = x.reshape(x.shape[0] // p, p, x.shape[1] // q, q)
    a = np.abs(blocks).max((1, 3), keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        s_enc = min(np.float32(2688) / np.float32(held or a.max()), FLT_MAX) if held or a.max() else np.float32(1)
        s_dec = np.float32(1) / s_enc
        s8 = fp32(np.minimum(a * (s_enc * np.float32(1 / 6)), 448).astype(ml_dtypes.float8_e4m3fn))
        v = np.clip(blocks * np.minimum(np.float32(1) / (s8 * s_dec), FLT_MAX), -FLT_MAX, FLT_MAX)
    return (fp32(to_e2m1(v)) * s8).reshape(x.shape), s_dec, v.reshape(x.shape)


def fp8(x, held: float = 0.0, name: str = "e4m3") -> tuple[np.ndarray, np.float32, np.ndarray]:
    """As `nvfp4`: (code, scale, x / scale)."""
    x, (top, dtype) = fp32(x), {"e4m3": (448, ml_dtypes.float8_e4m3fn), "e5m2": (57344, ml_dtypes.float8_e5m2)}[name]
    whole = np.float32(held or np.abs(x).max())
    enc = min(np.float32(top) / whole, FLT_MAX) if whole else np.float32(1)
    v = x * enc
    return fp32(np.clip(v, -top, top).astype(dtype)), np.float32(1) / enc, v


def noise(name: str, shape: tuple[int, ...], at: tuple[int, int] = PLACE, bits: int = 24) -> np.ndarray:
    index = at[0] if name.endswith(".w") else at[1]
    return random_ints(*shape, bits, Key(SEED, index, NUMBER, OPERANDS[name]).words()).numpy()


def lowest_bit(x: np.ndarray) -> np.ndarray:
    """The largest power of two that all elements of a row are multiples of, [R, 1]."""
    m, e = np.frexp(x.astype(np.float64))
    integers = (np.abs(m) * 2.0**53).astype(np.int64)
    return np.where(x != 0, (integers & -integers) * 2.0 ** (e - 53), np.inf).min(1, keepdims=True)


def product(a: np.ndarray, b: np.ndarray, dtype: torch.dtype, mode: str, alpha: np.float32 | None = None) -> np.ndarray:
    """a [M, K] b [N, K]^T as gemm.py has it, where the sum is exact in fp32 in any order: all its terms are multiples of one
    power of two, and their magnitudes add up to at most 2^24 of it."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    terms = np.abs(a) @ np.abs(b).T / (lowest_bit(a) * lowest_bit(b).T)
    assert terms.max() <= 2**24, f"the data has sums of {np.log2(terms.max()):.1f} bits"
    y = fp32(a @ b.T)
    y = bf16(y) if mode == "bf16" else y
    return ROUND[dtype](y if alpha is None else y * alpha)


def off(ours: Tensor, expected: np.ndarray, bound: np.ndarray) -> float:
    """The largest error as a share of its bound."""
    return float((np.abs(fp32(ours).astype(np.float64) - expected) / bound).max())


@pytest.mark.parametrize("size", [2, 16, 32])
def test_the_reference_turns_by_the_hadamard_matrix(size):
    """fp32 butterflies: log2(size) additions and a product, each with an error of 2^-24 of the tile's sum of magnitudes."""
    x = np.random.default_rng(0).standard_normal((8, 64))
    exact, magnitudes = in_tiles(fp32(x).astype(np.float64), matrix(size)), in_tiles(np.abs(x), np.abs(matrix(size)))
    assert (np.abs(turned(x, size) - exact) <= (math.log2(size) + 3) * 2.0**-24 * magnitudes).all()


# --- rotate ---

ROTATED = {
    "forward only": Recipe({"x": MX, "w": MX}),
    "backward too": Recipe({"x": FLOOR, "w": FLOOR}, {"g": NVSR, "w": replace(NVSR, source="fprop")}, {"g": NVSR, "x": NV}),
    "unlike": Recipe({"x": NV, "w": QuantSpec(block=(16, 16))}, {"g": MX}, {"x": replace(MX, source="fprop")}),
    "bf16 weights": Recipe({"x": NV, "w": NV}, {"w": NV}, {"g": NV}, weights="bf16"),
    "a second rotation": Recipe(
        {"x": replace(NV, hadamard=16), "w": replace(NV, hadamard=16)},
        wgrad={"g": replace(NVSR, hadamard=32, signs="fresh"), "x": replace(NV, hadamard=32, signs="fresh")},
    ),
    "centred": CENTRED,
}


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "size"), [(n, 32) for n in ROTATED] + [("forward only", 4), ("backward too", 16)])
def test_rotated_it_is_a_linear_of_rotated_tensors(name, size, dtype, mode):
    """y, dx H and dw H are those of x H and w H: x turned and rounded to the compute dtype, w in fp32 (or, from its BF16 copy,
    rounded to BF16); and so is dx on the way back."""
    recipe, (x, g) = ROTATED[name], data(dtype)
    ours = run(make(replace(recipe, rotate=size), mode), x, g)
    w = bf16(turned(bf16(weights()), size)) if recipe.weights == "bf16" else turned(weights(), size)
    plain = run(make(recipe, mode, weight=tensor(w, torch.float32)), tensor(ROUND[dtype](turned(x, size)), dtype), g)
    expected = {
        "y": plain["y"],
        "dx": tensor(ROUND[dtype](turned(plain["dx"], size)), dtype),
        "dw": tensor(turned(plain["dw"], size), torch.float32),
    }
    same(ours, expected, f"{name}, rotated by {size}:")
    assert not torch.equal(ours["y"], run(make(recipe, mode), x, g)["y"]), "nothing was rotated"


def test_rotated_in_fp16():
    """No compute dtype of configs, but one that a Linear takes without a rotation."""
    x, g = data(torch.float16)
    recipe = ROTATED["forward only"]
    ours = run(make(replace(recipe, rotate=32)), x, g)
    x, w = tensor(turned(x, 32), torch.float16), tensor(turned(weights(), 32), torch.float32)
    assert_same_bits(ours["y"], run(make(recipe, weight=w), x, g)["y"], "y")


@pytest.mark.parametrize(("spec", "u"), [(BF16, 2.0**-8), (FINE, 2.0**-11)])
@pytest.mark.parametrize("size", [2, 32])
def test_a_rotation_cancels(spec, u, size):
    """Of fp32 x and w. Turning takes at most log2(32) + 1 = 6 roundings of 2^-24 of the tile's magnitudes, the format one of u
    of the turned element, a sum of K terms K roundings and its way out one more; and turning back what is left. 1.01 stands
    for products of these."""
    x, g = data(torch.float32)
    w, h = weights(), matrix(size)
    module = make(Recipe({"x": spec, "w": spec}, rotate=size))
    ours = run(module, x, g)
    x, w, g = (fp32(t).astype(np.float64) for t in (x, w, g))
    (xh, ax), (wh, aw) = ((np.abs(in_tiles(t, h)), in_tiles(np.abs(t), np.abs(h))) for t in (x, w))
    bound = (2 * u + u * u) * xh @ wh.T + (I + 14) * 2.0**-24 * ax @ aw.T
    assert off(ours["y"], x @ w.T, 1.01 * bound) <= 1
    # The backward operands are not quantised.
    bound = (O + 14) * 2.0**-24 * in_tiles(np.abs(g) @ aw, np.abs(h))
    assert off(ours["dx"], g @ w, 1.01 * bound) <= 1
    bound = (T + 14) * 2.0**-24 * in_tiles(np.abs(g).T @ ax, np.abs(h))
    assert off(ours["dw"], g.T @ x, 1.01 * bound) <= 1


def test_sizes_that_do_not_fit_a_rotation_say_so():
    module = make(Recipe({"x": NV, "w": NV}, rotate=64))  # I = 96
    module.name = "blocks.0.up"
    with pytest.raises(ValueError, match=r"blocks\.0\.up: its inputs, 96, must be a multiple of rotate = 64"):
        module.check(T)


# --- Quartet and TetraJet, whole ---

FOUR_THIRDS = np.float32(1 / 0.75)


def quartet(x: Tensor, w: Tensor, g: Tensor, mode: str, at: tuple[int, int] = PLACE):
    """-> ({y, dx, dw}, {operand: (what is quantised, its values)}) of one pass."""
    dtype, round_ = x.dtype, ROUND[x.dtype]
    x, w = round_(turned(x, 32)), turned(w, 32)
    (qx, vx), (qw, vw) = quest(x), quest(w)
    seen = {"fprop.x": (x, qx), "fprop.w": (w, qw)}

    def again(name: str, t: np.ndarray) -> np.ndarray:
        """Rotated along its contraction (no signs) and rounded to BF16, 3/4 of it stochastically."""
        t = bf16(turned(np.ascontiguousarray(t), 32))
        values, scaled = mx(t, "floor", noise(name, t.shape, at), factor=0.75)
        assert np.abs(scaled).max() < 6, "3/4 under floor does not saturate"
        seen[name] = t, values * FOUR_THIRDS
        return values

    g = fp32(g)
    dx = product(again("dgrad.g", g), again("dgrad.w", qw.T), dtype, mode, FOUR_THIRDS * FOUR_THIRDS)
    dw = product(again("wgrad.g", g.T), again("wgrad.x", qx.T), torch.float32, mode, FOUR_THIRDS * FOUR_THIRDS)
    dx = round_(turned(np.where(np.abs(vx) < 6, dx, 0), 32))
    dw = turned(np.where(np.abs(vw) < 6, dw, 0), 32)
    for v in (vx, vw):  # 1.46 to 2.92 sigma: 14 % to 0.4 % of a normal distribution
        assert 0.004 < (np.abs(v) >= 6).mean() < 0.14, "hardly anything is clipped, or most of it"
    results = {"y": (product(qx, qw, dtype, mode), dtype), "dx": (dx, dtype), "dw": (dw, torch.float32)}
    return {name: tensor(*parts) for name, parts in results.items()}, seen


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quartet(dtype, mode):
    module = make(QUARTET, mode)
    for at in (PLACE, (PLACE[0], PLACE[1] + 1), (PLACE[0] + 1, PLACE[1] + 2)):
        x, g = data(dtype, seed=at[1])
        module.context.at(*at)
        same(run(module, x, g), quartet(x, weights(), g, mode, at)[0], f"Quartet at {at}:")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tetrajet(dtype, mode):
    """MXFP4 under rounded-up scales in all GEMMs; backward operands rounded stochastically, of W and x fprop's values."""
    x, g = data(dtype)
    qx, qw = (mx(fp32(t), "rceil")[0] for t in (x, weights()))

    def rounded(name: str, t: np.ndarray) -> np.ndarray:
        return mx(np.ascontiguousarray(t), "rceil", noise(name, t.shape))[0]

    expected = {
        "y": (product(qx, qw, dtype, mode), dtype),
        "dx": (product(rounded("dgrad.g", fp32(g)), rounded("dgrad.w", qw.T), dtype, mode), dtype),
        "dw": (product(rounded("wgrad.g", fp32(g).T), rounded("wgrad.x", qx.T), torch.float32, mode), torch.float32),
    }
    same(run(make(TETRAJET, mode), x, g), {name: tensor(*parts) for name, parts in expected.items()}, "TetraJet:")


# --- clip ---

CLIPPED = {
    "floor": (FLOOR, lambda x: mx(fp32(x), "floor")[1]),
    "rceil": (MX, lambda x: mx(fp32(x), "rceil")[1]),
    "std": (QUARTET.fprop.x, lambda x: quest(fp32(x))[1]),
    "nvfp4": (NV, lambda x: nvfp4(x)[2]),
}
BACKWARD = {"dgrad": {"g": NVSR, "w": NVSR}, "wgrad": {"g": NVSR, "x": NVSR}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backward", [{}, BACKWARD], ids=["plain backward", "quantised backward"])
@pytest.mark.parametrize("name", CLIPPED)
def test_no_gradient_where_fprop_clipped(name, backward, dtype):
    spec, scaled = CLIPPED[name]
    recipe, (x, g) = Recipe({"x": spec, "w": spec}, **backward), data(dtype)
    without, ours = run(make(recipe), x, g), run(make(replace(recipe, clip=True)), x, g)
    free = {"dx": np.abs(scaled(x)) < 6, "dw": np.abs(scaled(weights())) < 6}
    expected = {name: torch.where(torch.from_numpy(mask), without[name], 0) for name, mask in free.items()}
    same(ours, {"y": without["y"]} | expected, f"{name}:")
    for mask in free.values():
        # floor: a block's amax is at 4 to 8 times its scale, from 6 on it is clipped, and every block has one of 32.
        # rceil: none is, but where an amax is 6 2^k exactly. NVFP4: where a block scale was rounded down, one of 16.
        low, high = {"floor": (1 / 128, 1 / 8), "rceil": (0, 0.01), "std": (0.004, 0.14), "nvfp4": (1 / 64, 1 / 8)}[name]
        assert low <= (~mask).mean() < high, f"{(~mask).mean():.2%} of the elements are clipped"


def test_the_largest_value_itself_counts_as_clipped():
    """|x / scale| < 6: under floor the amax 7 has the scale 1."""
    x = torch.zeros(1, 32)
    x[0, :8] = torch.tensor([7, -7, 6, -6, 5.96875, -5.96875, 4, 0])
    module = make(Recipe({"x": FLOOR, "w": FLOOR}, clip=True), weight=torch.ones(2, 32))
    dx = run(module, x, torch.ones(1, 2))["dx"]
    assert dx[0, :8].tolist() == [0, 0, 0, 0, 2, 2, 2, 2] and (dx[0, 8:] == 2).all()


def test_clipping_is_that_of_the_held_amax():
    """With a history: 448 stands for the amax of an earlier step, and what is larger has no gradient."""
    module = make(Recipe({"x": F8_HELD, "w": F8_HELD}, clip=True), at=(0, 0), weight=torch.ones(2, 4))
    x, g = torch.tensor([[1.0, -0.5, 0.25, 0.0]]), torch.ones(1, 2)
    assert run(module, x, g)["dx"].tolist() == [[0, 2, 2, 2]], "the amax itself is not below the largest value"
    module.context.at(1, 1)
    assert run(module, 4 * x, g)["dx"].tolist() == [[0, 0, 0, 2]]
    module.context.at(2, 2)
    assert run(module, x, g)["dx"].tolist() == [[2, 2, 2, 2]]


def test_clipping_of_centred_activations_is_that_of_what_is_quantised():
    """x = 1 m^T + r: fprop clips elements of r, not of x."""
    spec, (x, g) = replace(FLOOR, center=True), data(torch.float32)
    x = x + 4 * torch.randn(I, generator=torch.Generator().manual_seed(1))
    recipe = Recipe({"x": spec, "w": FLOOR})
    without, ours = run(make(recipe), x, g)["dx"], run(make(replace(recipe, clip=True)), x, g)["dx"]
    free = np.abs(mx(fp32(x) - mean_of(fp32(x)), "floor")[1]) < 6
    assert_same_bits(ours, torch.where(torch.from_numpy(free), without, 0), "dx of a centred, clipped x")


def test_clipping_needs_the_basis_of_the_gradient():
    """A Hadamard transform of a spec clips elements of x H, while dx is in the basis of x: `rotate` is what can be clipped."""
    spec = replace(FLOOR, hadamard=32)
    with pytest.raises(ValueError, match="clip"):
        Recipe({"x": spec, "w": spec}, clip=True)


# --- source ---

N = 64  # tokens, inputs and outputs of a Linear whose operands can be read: the other operand of the GEMM is the identity
ONE = torch.eye(N)


def square(seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(seed)) * size


def read(module: Linear, name: str, t: Tensor) -> Tensor:
    """What an operand's GEMM multiplies, laid out as t (x, w or g), if t is that tensor and the others are the identity. One
    product is not zero in each sum, and all is fp32: these are the operand's bits, but for the sign of a zero."""
    w = t if name.endswith(".w") else ONE
    if not torch.equal(module.weight, w):
        with torch.no_grad():
            module.weight.copy_(w)
    found = run(module, t if name.endswith(".x") else ONE, t if name.endswith(".g") else ONE)
    result = found[{"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[name[:5]]]
    return result.t() if name in ("fprop.w", "wgrad.g") else result


def alone(name: str, spec: QuantSpec, **others) -> Recipe:
    """Only one operand (and those of `others`) quantised."""
    gemms = {gemm: dict(operands) for gemm, operands in others.items()}
    gemms.setdefault(name[:5], {})[name[6:]] = spec
    return Recipe(**gemms)


def assert_same_values(ours: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit, but for the sign of zeros."""
    assert_same_bits(ours + 0.0, expected + 0.0, what)


@pytest.mark.parametrize("place", [PLACE, (3, 9)])
def test_tetrajet_quantises_what_fprop_made(place):
    """All six operands are quantised; the identity is exact in MXFP4 under rounded-up scales, also rounded stochastically."""
    for name in ("dgrad.w", "wgrad.x"):
        t = square()
        values = mx(np.ascontiguousarray(mx(fp32(t), "rceil")[0].T), "rceil", noise(name, t.shape, place))[0].T
        module = make(TETRAJET, at=place, weight=ONE)
        assert_same_values(read(module, name, t), tensor(values, torch.float32), f"TetraJet's {name}")


SOURCES = {
    "mxfp4": (MX, replace(MX, rounding="stochastic")),
    "nvfp4": (NV, NVSR),
    "square blocks": (QuantSpec(block=(16, 16)), NV),
    "a choice": (SIX_OR_FOUR, NVSR),
    "fp8": (QuantSpec("e4m3", (-1, -1), Scale("fp32")), QuantSpec("e5m2", (1, -1), Scale("fp32"))),
    "fp8 by blocks": (QuantSpec("e4m3", (1, 32), Scale("fp32")), QuantSpec("e4m3", (1, 16), Scale("fp32"))),
}


def keys(name: str, at: tuple[int, int] = PLACE) -> tuple[Key, Key]:
    index, sign_index = at[not name.endswith(".w")], at[name.startswith("wgrad")]
    return Key(SEED, index, NUMBER, OPERANDS[name]), Key(SEED, sign_index, NUMBER, SIGNS[name[:5]])


@pytest.mark.parametrize("name", ["dgrad.w", "wgrad.x"])
@pytest.mark.parametrize("kind", SOURCES)
def test_quantised_again(kind, name):
    (first, second), t = SOURCES[kind], square()
    other = {name[6:]: first}
    expected = quantize(quantize(t, first).dequantize().t(), second, *keys(name)).dequantize().t()
    again = make(alone(name, replace(second, source="fprop"), fprop=other), weight=ONE)
    assert_same_values(read(again, name, t), expected, f"{kind}, {name} of what fprop made")
    direct = quantize(t.t(), second, *keys(name)).dequantize().t()
    assert_same_values(read(make(alone(name, second, fprop=other), weight=ONE), name, t), direct, f"{kind}, {name}")
    assert (direct != expected).float().mean() > 0.02, "both sources are one"


def test_ms_eden_quantises_again_what_was_chosen():
    """Turned by fresh signs, so not to be read one by one: y, dx and dw are the products of operands quantised by hand. A sum
    of K takes K roundings of 2^-24 of its magnitudes (scales of E4M3 times E2M1 are exact), alpha and the result three."""
    recipe = load(CONFIGS / "ms-eden.toml").recipes["ms-eden"]
    tokens = 128
    x, g = data(torch.float32, tokens=tokens)
    ours, w = run(make(recipe), x, g), weights()
    specs = recipe.operands()
    qx, qw = (quantize(t, specs["fprop.x"]).dequantize() for t in (x, w))
    pairs = {"dx": ("dgrad.g", g, "dgrad.w", qw.t()), "dw": ("wgrad.g", g.t(), "wgrad.x", qx.t())}
    found = {"y": (qx.double(), qw.double())}
    for result, (a, av, b, bv) in pairs.items():
        found[result] = tuple(quantize(t, specs[n], *keys(n)).dequantize().double() for n, t in ((a, av), (b, bv)))
    for result, (a, b) in found.items():
        bound = 1.01 * (a.shape[1] + 3) * 2.0**-24 * (a.abs() @ b.abs().t())
        assert off(ours[result], (a @ b.t()).numpy(), bound.numpy()) <= 1, f"{result} of MS-EDEN"


def test_quantising_again_costs_fp4_something_and_mxfp8_nothing():
    """Scales of MXFP8 are powers of two that saturate nothing, so an element of it is rounded to 4 significant bits wherever
    its block lies, unless it is below 2^-6 of its scale: 448 = 1.75 2^8, so of less than 2^-14 / 1.75 of its block's amax;
    quantised again along the other axis nothing changes. E2M1 has 2 bits only down to a sixth of the largest: elements
    rounded under one scale are not where another one would have put them."""
    x = square()
    x = torch.copysign(x.abs().clamp(min=2.0**-11), x)  # amaxes are below 2^2.5, so all have 4 significant bits
    differ = {}
    for name, spec in {"mxfp8": QuantSpec("e4m3", (1, 32), Scale("e8m0")), "mxfp4": MX}.items():
        for operand in ("dgrad.w", "wgrad.x"):
            found = [
                read(make(alone(operand, replace(spec, source=s), fprop={operand[6:]: spec}), weight=ONE), operand, x)
                for s in ("original", "fprop")
            ]
            differ[name, operand] = (found[0] != found[1]).float().mean().item()
    assert differ["mxfp8", "dgrad.w"] == differ["mxfp8", "wgrad.x"] == 0, differ
    assert min(differ["mxfp4", "dgrad.w"], differ["mxfp4", "wgrad.x"]) > 0.02, differ


# --- center ---


def mean_of(x: np.ndarray) -> np.ndarray:
    """[1, I] in the stated order: halves onto halves, an odd last row behind them; then times fl(1 / T)."""
    rows, total = len(x), x
    while (n := len(total)) > 1:
        total = np.concatenate([total[: n // 2] + total[n // 2 : n // 2 * 2], total[n // 2 * 2 :]])
    return total * np.float32(1 / rows)


def shifted(dtype=torch.float32, tokens: int = T, size: float = 4.0) -> tuple[Tensor, Tensor]:
    """Normal x [tokens, I] around a mean of `size` in rms, which differs from column to column; g."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, I, generator=g) + size * torch.randn(I, generator=g)
    return x.to(dtype), torch.randn(tokens, O, generator=g).to(dtype)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [T, 48])
def test_centred_nvfp4(tokens, dtype, mode):
    """y = Q(r) Q(w)^T + m Q(w)^T, dw = Q(g^T) Q(r^T)^T + (g^T 1) m; the operands are NumPy's (r^T turned with the fixed signs),
    but for the stochastic g^T, which is that of `quantize`. Bounds: a sum of K terms takes K roundings of 2^-24 of its
    magnitudes, the second sum as many, alpha and the last addition four; mode "bf16" rounds the first sum to BF16, and so does
    the result."""
    x, g = shifted(dtype, tokens)
    ours = run(make(CENTRED, mode), x, g)
    m = mean_of(fp32(x))
    r, signs = fp32(x) - m, np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float32)
    turned_r = bf16(turned(r.T * np.tile(signs, tokens // 16), 16))
    values = [q * np.float64(s) for q, s, _ in (nvfp4(r), nvfp4(weights(), block=(16, 16)), nvfp4(turned_r))]
    qg = quantize(g.t(), CENTRED.wgrad.g, *keys("wgrad.g")).dequantize().double().numpy()
    m, total = m.astype(np.float64), fp32(g).astype(np.float64).sum(0, keepdims=True).T
    for name, a, b, more, magnitude in (
        ("y", values[0], values[1], m @ values[1].T, np.abs(m) @ np.abs(values[1]).T),
        ("dw", qg, values[2], total * m, np.abs(fp32(g)).sum(0, keepdims=True).T * np.abs(m)),
    ):
        exact = a @ b.T
        bound = (max(a.shape[1], I, tokens) + 6) * 2.0**-24 * (np.abs(a) @ np.abs(b).T + magnitude)
        bound += 2.0**-8 * ((mode == "bf16") * np.abs(exact) + (ours[name].dtype == torch.bfloat16) * np.abs(exact + more))
        assert off(ours[name], exact + more, 1.01 * bound) <= 1, name
    assert_same_bits(ours["dx"], run(make(uncentred(CENTRED), mode), x, g)["dx"], "dx, which has no x in it")


def uncentred(recipe: Recipe) -> Recipe:
    gemms: dict[str, dict] = {}
    for name, spec in recipe.operands().items():
        gemms.setdefault(name[:5], {})[name[6:]] = spec and replace(spec, center=False)
    return Recipe(**gemms)


def test_centring_takes_the_mean_out_of_the_error():
    """A mean of rms 4 around which x is normal: x has 17 times the energy of r, and the error of NVFP4 goes with the energy of
    its blocks, so that of a product with an exact w is sqrt(17) = 4.1 times as large without centring, 12 dB; half of that is
    asked for. An NVFP4 w errs by as much as x, relatively, and that error is multiplied by the mean, centred or not: of two
    equal errors one goes, and what is left is within a tenth of 1 / sqrt(2)."""
    x, g = shifted()
    w = tensor(bf16(weights()), torch.float32)
    centred = replace(NV, center=True)
    cases = {
        "y": ("y", {"fprop": {"x": centred}}, x.double() @ w.double().t(), (0, 0.5)),
        "dw": ("dw", {"wgrad": {"x": centred}}, g.double().t() @ x.double(), (0, 0.5)),
        "y of a quantised w": ("y", {"fprop": {"x": centred, "w": NV}}, x.double() @ w.double().t(), (0.6, 0.8)),
    }
    for what, (name, gemms, exact, (low, high)) in cases.items():
        recipe = Recipe(**gemms)
        errors = [float((run(make(r, weight=w), x, g)[name] - exact).norm()) for r in (recipe, uncentred(recipe))]
        assert low < errors[0] / errors[1] < high, f"{what}: error {errors[0]:.3g} centred, {errors[1]:.3g} without"


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_centring_does_nothing_to_what_has_no_mean(dtype, mode):
    """The second half of x is minus the first, so that in the stated order each column sums to 0 exactly."""
    x, g = data(dtype)
    x = torch.cat([x[: T // 2], -x[: T // 2]])
    ours, plain = (run(make(recipe, mode), x, g) for recipe in (CENTRED, uncentred(CENTRED)))
    for name in plain:
        assert_same_values(ours[name], plain[name], f"{name}, centred")


@pytest.mark.parametrize("which", ["fprop", "wgrad"])
def test_either_operand_is_centred_alone(which):
    x, g = shifted()
    both, neither = run(make(CENTRED), x, g), run(make(uncentred(CENTRED)), x, g)
    other = {"fprop": "wgrad", "wgrad": "fprop"}[which]
    one = run(make(replace(uncentred(CENTRED), **{which: getattr(CENTRED, which)})), x, g)
    result = {"fprop": "y", "wgrad": "dw"}
    assert_same_bits(one[result[which]], both[result[which]], f"{which} centred alone")
    assert_same_bits(one[result[other]], neither[result[other]], f"{other}, which is not centred")
    assert_same_bits(one["dx"], neither["dx"], "dx")


# --- history ---


class Held:
    """What delayed scaling remembers of one operand, as a dict."""

    def __init__(self, steps: int):
        self.steps, self.amax = steps, {}

    def at(self, step: int) -> float:
        return max((a for s, a in self.amax.items() if step - self.steps <= s < step), default=0.0)

    def note(self, step: int, x) -> None:
        found = float(np.abs(fp32(x)).max())
        self.amax[step] = max(self.amax.get(step, 0.0), found if math.isfinite(found) else 0.0)

    def buffer(self) -> Tensor:
        """fp64 [2, steps + 1]: steps and amaxes, each at the step's number modulo steps + 1; -inf where there is none."""
        expected = torch.full((2, self.steps + 1), -torch.inf, dtype=torch.float64)
        for step in sorted(self.amax):
            expected[:, step % (self.steps + 1)] = torch.tensor([step, self.amax[step]], dtype=torch.float64)
        return expected


def value(found: tuple[np.ndarray, np.float32, np.ndarray]) -> Tensor:
    """fl(code * scale of its block * scale of the tensor), fp32."""
    return tensor(found[0] * found[1], torch.float32)


FAMILIES = {"fp8": (F8_HELD, fp8), "nvfp4": (NV_HELD, nvfp4)}
# Growth, a fall that is noticed when the growth is forgotten, zeros, steps that are left out: (step, size of the operand)
COURSE = [(0, 1.0), (1, 3.0), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.0), (6, 20.0), (7, 0.25), (11, 0.125), (12, 1.0), (13, 1.0)]


def transposed(name: str, t: Tensor) -> Tensor:
    """The operand of a tensor, its contraction last."""
    return t.t() if name in ("dgrad.w", "wgrad.g", "wgrad.x") else t


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPERANDS)
def test_the_largest_amax_of_earlier_steps_stands_for_the_operands_own(name, family):
    """Three micro-batches a step (of weights: the same one), the second the largest; bit for bit, the buffer too."""
    spec, reference = FAMILIES[family]
    module, held = make(alone(name, spec), at=(0, 0), weight=ONE), Held(REMEMBER)
    for step, size in COURSE:
        for i, share in enumerate((1.0, 1.0, 1.0) if name.endswith(".w") else (0.5, 1.0, 0.75)):
            t = square(seed=step if name.endswith(".w") else 3 * step + i, size=size * share)
            module.context.at(step, 3 * step + i)
            expected = value(reference(transposed(name, t).contiguous(), held.at(step)))
            held.note(step, t)
            assert_same_values(read(module, name, t), transposed(name, expected), f"step {step}, micro-batch {i}")
            assert_same_bits(module.get_buffer(f"history_{name.replace('.', '_')}"), held.buffer(), f"buffer at step {step}")


@pytest.mark.parametrize(("family", "top"), [("fp8", 448), ("nvfp4", 448 * 6)])
def test_what_has_grown_saturates_at_the_held_amax(family, top):
    """fl(top * fl(1 / fl(top / held))) is the held amax but for its roundings, three of 2^-24."""
    spec, _ = FAMILIES[family]
    module = make(alone("fprop.x", spec), at=(0, 0), weight=ONE)
    x = torch.full((N, N), 1.5)
    read(module, "fprop.x", x)
    module.context.at(1, 1)
    expected = np.float32(top) * (np.float32(1) / (np.float32(top) / np.float32(1.5)))
    assert abs(expected / 1.5 - 1) < 3.01 * 2.0**-24
    assert_same_bits(read(module, "fprop.x", -100 * x), torch.full((N, N), -float(expected)), "-150 under an amax of 1.5")


def test_delayed_fp8():
    """The whole recipe over steps with growing and falling operands. Codes are NumPy's; sums of K products of E4M3 and E5M2,
    exact in fp32, take K roundings of 2^-24 of their magnitudes; alpha and the result three."""
    module, histories = make(DELAYED, at=(0, 0)), {name: Held(3) for name in OPERANDS}
    for step, size in enumerate((1.0, 2.0, 8.0, 0.25, 0.25, 0.25, 0.25, 1.0)):
        if step:
            with torch.no_grad():
                module.weight.mul_(1.25 if step % 2 else 0.5)
        for i in range(2):
            module.context.at(step, 2 * step + i)
            x, g = (t * size for t in data(torch.float32, seed=2 * step + i))
            w, made = module.weight.detach(), {}
            for name, t in {"fprop.x": x, "fprop.w": w, "dgrad.g": g, "dgrad.w": w, "wgrad.g": g, "wgrad.x": x}.items():
                # dgrad.w is fprop.w transposed, codes and all, so what fprop.w remembers serves both.
                history = histories["fprop.w" if name == "dgrad.w" else name]
                code, scale, _ = fp8(t, history.at(step), "e5m2" if name.endswith(".g") else "e4m3")
                made[name] = code.astype(np.float64) * np.float64(scale)
                history.note(step, t)
            ours = run(module, x, g)
            for name, a, b in (
                ("y", made["fprop.x"], made["fprop.w"].T),
                ("dx", made["dgrad.g"], made["dgrad.w"]),
                ("dw", made["wgrad.g"].T, made["wgrad.x"]),
            ):
                bound = 1.01 * (a.shape[1] + 3) * 2.0**-24 * (np.abs(a) @ np.abs(b))
                assert off(ours[name], a @ b, bound) <= 1, f"{name} of step {step}, micro-batch {i}"
            for name in set(OPERANDS) - {"dgrad.w"}:
                ours_ = module.get_buffer(f"history_{name.replace('.', '_')}")
                assert_same_bits(ours_, histories[name].buffer(), f"what {name} remembers at step {step}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_amax_of_a_rotated_operand_is_that_after_its_rotation(family):
    """Both rotations: the recipe's and the spec's own, whose output is BF16."""
    spec = replace(FAMILIES[family][0], hadamard=16, signs="none")
    x, g = data(torch.float32)
    module = make(Recipe({"x": spec, "w": spec}, wgrad={"g": spec, "x": spec}, rotate=32))
    run(module, x, g)
    xr, wr = turned(x, 32), turned(weights(), 32)
    for name, t in (("fprop_x", xr), ("fprop_w", wr), ("wgrad_g", fp32(g).T), ("wgrad_x", xr.T)):
        amax = np.abs(bf16(turned(np.ascontiguousarray(t), 16))).max()
        slot = PLACE[0] % (REMEMBER + 1)
        assert module.get_buffer(f"history_{name}")[:, slot].tolist() == [PLACE[0], amax], name


def course(module: Linear, steps, factor: float = 1.0) -> list[dict[str, Tensor]]:
    """Steps of two micro-batches, each with its own weight, data and size."""
    found = []
    for step in steps:
        with torch.no_grad():
            module.weight.copy_(weights(seed=step) * (1 + step % 3))
        for i in range(2):
            module.context.at(step, 2 * step + i)
            x, g = (t * factor * 2.0 ** (step * 5 % 4) for t in data(seed=2 * step + i))
            found.append(run(module, x, g))
    return found


HISTORIES = {name: recipe for name, recipe in RECIPES.items() if any(s.scale.history for s in recipe.operands().values())}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_step_run_again_is_the_same_step(name):
    module = make(HISTORIES[name])
    first, before = course(module, range(4))[-2:], buffers(module)
    for ours, expected in zip(course(module, [3]), first, strict=True):
        same(ours, expected, "step 3 again:")
    same(buffers(module), before, "after step 3 again:")
    assert any((b > -torch.inf).all() for b in before.values()), "nothing was remembered"


@pytest.mark.parametrize("name", HISTORIES)
def test_buffers_in_a_state_dict_resume_bit_for_bit(name):
    module = make(HISTORIES[name])
    course(module, range(3))
    state = {key: t.clone() for key, t in module.state_dict().items()}
    remembered = {f"history_{n.replace('.', '_')}" for n, s in HISTORIES[name].operands().items() if s.scale.history}
    assert set(state) == {"weight"} | remembered
    expected, after = course(module, range(3, 6)), buffers(module)
    resumed, forgot = make(HISTORIES[name]), make(HISTORIES[name])
    resumed.load_state_dict(state)
    forgot.load_state_dict(state | buffers(forgot))
    for ours, theirs in zip(course(resumed, range(3, 6)), expected, strict=True):
        same(ours, theirs, "resumed:")
    same(buffers(resumed), after, "resumed:")
    assert not torch.equal(course(forgot, [3])[0]["y"], expected[0]["y"]), "what was remembered makes no difference"


@pytest.mark.parametrize("name", HISTORIES)
def test_evaluation_uses_what_is_remembered_and_adds_nothing(name):
    module = make(HISTORIES[name])
    course(module, range(3))
    before = buffers(module)
    module.context.at(3, 6)
    x, g = (100 * t for t in data(seed=1))
    module.eval()
    run(module, x, g)
    module.quantized_weight()
    with torch.inference_mode():
        y = module(x)
    same(buffers(module), before, "after evaluation:")
    module.train()
    module.quantized_weight()
    same(buffers(module), before, "after asking for the codes of the weight:")
    assert_same_bits(y.clone(), run(module, x, g)["y"], "evaluation and training at the same step")
    assert not torch.equal(module.history_fprop_x, before["history_fprop_x"])


@pytest.mark.parametrize("name", HISTORIES)
def test_evaluation_leaves_no_trace_in_training(name):
    """Validation between two steps, or before the first one, changes neither results nor what is remembered."""
    plain, validated = make(HISTORIES[name]), make(HISTORIES[name])
    found = []
    for module in (plain, validated):
        module.context.at(0, 0)
        with torch.no_grad():
            module.weight.copy_(weights(seed=0))
        for step in range(3):
            if module is validated:
                module.eval()
                with torch.no_grad():
                    module(data(seed=9)[0])
                module.train()
            module.context.at(step, step)
            found.append(run(module, *data(seed=step)))
            with torch.no_grad():
                module.weight.mul_(1.5)
    for step, (ours, expected) in enumerate(zip(found[3:], found[:3], strict=True)):
        same(ours, expected, f"step {step}:")
    same(buffers(validated), buffers(plain), "after validation:")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPERANDS)
def test_what_is_not_finite_is_nan_and_not_remembered(name, family, bad):
    spec, reference = FAMILIES[family]
    module, held = make(alone(name, spec), at=(0, 0), weight=ONE), Held(REMEMBER)
    for step in range(4):
        t = square(seed=step)
        spoilt = t.clone()
        spoilt[3, 7] = bad
        module.context.at(step, 2 * step)
        if step < 3:
            assert read(module, name, spoilt).isnan().all(), f"laundered in step {step}"
            held.note(step, spoilt)
        if step != 1:  # which has nothing else
            expected = value(reference(transposed(name, t).contiguous(), held.at(step)))
            module.context.at(step, 2 * step + 1)
            assert_same_values(read(module, name, t), transposed(name, expected), f"step {step}")
            held.note(step, t)
        assert_same_bits(module.get_buffer(f"history_{name.replace('.', '_')}"), held.buffer(), f"buffer at step {step}")


def test_another_length_begins_anew_and_the_same_one_goes_on():
    module = make(alone("fprop.x", F8_HELD), at=(0, 0), weight=ONE)
    t = square()
    read(module, "fprop.x", 8 * t)
    remembered = buffers(module)
    for recipe in (None, Recipe(), alone("fprop.x", replace(F8_HELD, format="e5m2")), alone("fprop.x", F8_HELD)):
        module.recipe = recipe
        same(buffers(module), remembered, f"under {recipe}:")
    module.context.at(1, 1)
    assert_same_values(read(module, "fprop.x", t), value(fp8(t, float((8 * t).abs().max()))), "after a while without")
    module.recipe = alone("fprop.x", replace(F8_HELD, scale=Scale("fp32", history=5)))
    assert module.history_fprop_x.shape == (2, 6) and (module.history_fprop_x == -torch.inf).all()
    module.context.at(2, 2)
    assert_same_values(read(module, "fprop.x", t), value(fp8(t)), "under another length")


# --- statistics ---

FILES = ("quartet", "ms-eden", "tetrajet", "tetrajet-v2", "nvfp4-4over6", "if4", "mxfp4-mbs")
WATCHED = RECIPES | {name: load(CONFIGS / f"{name}.toml").recipes[name] for name in FILES}


def large(recipe: Recipe) -> tuple[Linear, list[tuple[Tensor, Tensor]]]:
    """128 by 128 by 128, which all recipes can cut, and x, g of two micro-batches."""
    w, *tensors = torch.randn(5, 128, 128, generator=torch.Generator().manual_seed(0))
    x, gx, y, gy = (t.bfloat16() for t in tensors)
    return make(recipe, mode="bf16", weight=w), [(x, gx), (y, gy)]


@pytest.mark.parametrize("name", WATCHED)
def test_statistics_change_nothing_and_cover_all_operands(name):
    """Over two steps of two micro-batches, in the second of which weights come from the cache."""
    found = []
    for watched in (False, True):
        module, batches = large(WATCHED[name])
        for step in range(2):
            for i, (x, g) in enumerate(batches):
                module.context.at(step, 2 * step + i)
                module.context.stats = {} if watched else None
                found.append(run(module, (1 + step) * x, g) | buffers(module))
                if watched:
                    stats = module.context.stats
                    assert set(stats) == {f"linear/{operand}" for operand, spec in WATCHED[name].operands().items() if spec}
                    for operand, values in stats.items():
                        assert values.isfinite().all() and values[STATS.index("sqnr_db")] > 10, f"{operand}: {values}"
    for plain, watched in zip(found[:4], found[4:], strict=True):
        same(watched, plain, f"{name} with statistics:")


def check_stats(module: Linear, seen: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for name, (y, q) in seen.items():
        y, q = y.astype(np.float64), q.astype(np.float64)
        expected = 10 * np.log10((y**2).sum() / ((y - q) ** 2).sum())
        ours = module.context.stats[f"linear/{name}"][STATS.index("sqnr_db")].item()
        # two fp32 sums of n <= 12288 squares, each off by n 2^-24 = 7e-4 at worst, below 0.0035 dB
        assert abs(ours - expected) < 0.007, f"{name}: {ours} dB, expected {expected} dB"


def test_statistics_are_of_what_is_quantised():
    """Rotated, centred, or what fprop made: each operand as its quantiser saw it."""
    x, g = data()
    module = make(QUARTET)
    module.context.stats = {}
    run(module, x, g)
    check_stats(module, quartet(x, weights(), g, "fp32")[1])
    x, g = shifted()
    module = make(CENTRED)
    module.context.stats = {}
    run(module, x, g)
    rest = fp32(x) - mean_of(fp32(x))
    check_stats(module, {"fprop.x": (rest, value(nvfp4(rest)).numpy())})


# --- caches ---


def test_an_operand_made_of_fprops_follows_the_weight():
    for name, (first, second) in SOURCES.items():
        module = make(alone("dgrad.w", replace(second, source="fprop"), fprop={"w": first}), weight=ONE)
        for seed in range(2):  # `read` writes into the weight
            w = square(seed)
            expected = quantize(quantize(w, first).dequantize().t(), second, *keys("dgrad.w")).dequantize().t()
            assert_same_values(read(module, "dgrad.w", w), expected, f"{name}, weight {seed}")


@pytest.mark.parametrize("name", RECIPES)
def test_caches_follow_weights_steps_and_recipes(name):
    """A module that has seen other weights, steps and recipes does what a new one does. (Histories begin anew each time.)"""
    old = make(RECIPES[name])
    empty = buffers(old)
    x, g = data()

    def check(what: str) -> dict[str, Tensor]:
        new = make(RECIPES[name], weight=old.weight.detach(), at=(old.context.step, int(old.context.counters[0])))
        expected = run(new, x, g)
        for key, buffer in empty.items():
            old.get_buffer(key).copy_(buffer)
        same(run(old, x, g), expected, what)
        return expected

    first = check("new:")
    with torch.no_grad():
        old.weight.mul_(-1.5)
    assert not torch.equal(check("after an in-place change:")["dx"], first["dx"])
    old.context.at(PLACE[0] + 1, PLACE[1] + 1)
    check("in the next step:")
    for recipe in (None, Recipe(), *RECIPES.values()):
        old.recipe = recipe
        run(old, x, g)
        empty |= {key: torch.full_like(b, -torch.inf) for key, b in old.named_buffers()}
        old.recipe = RECIPES[name]
        empty |= {key: torch.full_like(b, -torch.inf) for key, b in old.named_buffers()}
        check(f"after {recipe and recipe.short()}:")


def test_recipes_of_the_same_specs_share_no_cache():
    """What is cached of a weight depends on more than its own spec: on the rotation, the copy, and on fprop's spec."""
    again = {"dgrad": {"w": replace(NV, source="fprop")}}
    recipes = [
        Recipe({"x": NV, "w": NV}, clip=True, rotate=size, weights=w, **again) for size in (0, 32) for w in ("bf16", "master")
    ]
    recipes += [Recipe({"x": NV, "w": MX}, clip=True, **again), Recipe({"x": NV, "w": NV})]
    old, (x, g) = make(None), data()
    for recipe in recipes:
        old.recipe = recipe
        same(run(old, x, g), run(make(recipe), x, g), f"rotate {recipe.rotate}, {recipe.weights}, {recipe.short()}:")


def test_fresh_signs_of_a_weight_change_with_the_step_and_only_then():
    """(What is quantised after them differs, though the weight is the same.)"""
    fresh = replace(NV, hadamard=32, signs="fresh")
    recipe = Recipe({"x": fresh, "w": fresh}, {"g": fresh, "w": fresh}, rotate=32)
    module, (x, g) = make(recipe), data()
    first = run(module, x, g)
    module.context.at(PLACE[0], PLACE[1] + 1)
    same(run(module, x, g), first, "another micro-batch of the step:")
    module.context.at(PLACE[0] + 1, PLACE[1] + 1)
    later = run(module, x, g)
    same(later, run(make(recipe, at=(PLACE[0] + 1, 0)), x, g), "the next step:")
    assert not torch.equal(later["y"], first["y"]) and not torch.equal(later["dx"], first["dx"])


CHANGING = {
    "noise": NVSR,
    "noise of scales": replace(NV, scale=Scale(rounding="stochastic")),
    "a history": NV_HELD,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_an_operand_made_of_fprops_changes_with_it_from_step_to_step(kind):
    """fprop.w is another one in each step, of the same weight: so is what dgrad makes of it."""
    w, first = square(), CHANGING[kind]
    recipe = alone("dgrad.w", replace(NV, source="fprop"), fprop={"w": first})
    module = make(recipe, at=(0, 0), weight=square(1, size=4.0))
    run(module, ONE, ONE)  # something larger to remember
    module.context.at(1, 1)
    for step in (1, 2, 3, 4):
        module.context.at(step, step)
        held = Held(REMEMBER)
        held.note(0, square(1, size=4.0))
        for earlier in range(1, step):
            held.note(earlier, w)
        amax = torch.tensor(held.at(step)) if first.scale.history else None
        made = quantize(w, first, *keys("fprop.w", (step, step)), held=amax).dequantize()
        expected = quantize(made.t(), NV).dequantize().t()
        assert_same_values(read(module, "dgrad.w", w), expected, f"dgrad.w of step {step}")


@pytest.mark.parametrize("before", [False, True], ids=["before the first pass", "after a pass"])
def test_loaded_codes_are_what_dgrad_is_made_of(before):
    recipe = Recipe({"x": NV, "w": NV}, {"g": NV, "w": replace(NV, source="fprop")})
    module, donor, (x, g) = make(recipe), make(recipe, weight=-3 * weights(1)), data()
    if before:
        run(module, x, g)
    module.use(donor.quantized_weight())
    expected = run(donor, x, g)
    same(run(module, x, g), {key: expected[key] for key in ("y", "dx")}, "with the codes of another weight:")


# --- the way back ---

BASES = {
    "its own": ({}, 0),
    "rotated": ({}, 32),
    "fixed signs": ({"hadamard": 16}, 0),
    "no signs": ({"hadamard": 32, "signs": "none"}, 0),
    "fresh signs": ({"hadamard": 32, "signs": "fresh"}, 0),
    "fresh signs, rotated": ({"hadamard": 16, "signs": "fresh"}, 32),
}


@pytest.mark.parametrize(("fine", "u"), [(BF16, 2.0**-8), (FINE, 2.0**-11)])
@pytest.mark.parametrize("basis", BASES)
def test_a_dequantised_weight_is_turned_back(basis, fine, u):
    """Of a fine format: each element in its basis is off by u of itself (and 2^-8 where a spec's transform made it BF16), and
    turning back by the sum of that over its tile. fp32 transforms add 12 or 24 roundings of 2^-24 of the tile's magnitudes."""
    change, size = BASES[basis]
    spec, w = replace(fine, **change), weights()
    module = make(Recipe({"x": spec, "w": spec}, rotate=size))
    q = module.quantized_weight()
    ours = module.dequantized(q)
    assert ours.dtype == torch.float32 and ours.shape == w.shape
    values, magnitudes = q.dequantize().double().abs().numpy(), np.abs(fp32(w)).astype(np.float64)
    for tile in filter(None, (spec.hadamard, size)):
        h = np.abs(matrix(tile))
        values, magnitudes = in_tiles(values, h), in_tiles(magnitudes, h @ h)
    per_element = u + 2.0**-8 * bool(spec.hadamard)
    bound = 1.02 * per_element * values + 24 * 2.0**-24 * magnitudes
    assert off(ours, fp32(w).astype(np.float64), bound) <= 1, basis
    if change or size:
        assert (q.dequantize() - w).norm() > w.norm(), "it was never in another basis"
    module.context.at(PLACE[0], PLACE[1] + 1)
    assert_same_bits(module.dequantized(q), ours, "in another micro-batch of the step")


@pytest.mark.parametrize("name", WATCHED)
def test_the_weight_of_a_recipe_is_turned_back(name):
    """FP4 of normal numbers is within 0.12, Quartet's within 0.17; another basis would be off by sqrt(2)."""
    module, _ = large(WATCHED[name])
    w = module.weight.detach()
    assert (module.dequantized(module.quantized_weight()) - w).norm() < 0.2 * w.norm()


# --- composition ---


@pytest.mark.parametrize("name", RECIPES)
def test_activation_checkpointing_changes_nothing(name):
    """The forward pass runs twice: what it remembers, too."""
    x, g = data()
    plain, again = make(RECIPES[name]), make(RECIPES[name])
    for step in range(3):
        found = []
        for module in (plain, again):
            module.context.at(step, step)
            module.weight.grad, x_ = None, ((1 + step) * x).requires_grad_()
            y = module(x_) if module is plain else checkpoint(module, x_, use_reentrant=False)
            y.backward(g)
            found.append({"y": y.detach(), "dx": x_.grad, "dw": module.weight.grad} | buffers(module))
        same(found[1], found[0], f"step {step}, checkpointed:")


@pytest.mark.parametrize("name", RECIPES)
def test_only_what_is_asked_for(name):
    """A frozen weight, an input without a gradient: the other results are the same."""
    x, g = data()
    expected = run(make(RECIPES[name]), x, g)
    module = make(RECIPES[name])
    module(x).backward(g)
    assert_same_bits(module.weight.grad, expected["dw"], "dw alone")
    frozen, x_ = make(RECIPES[name]), x.clone().requires_grad_()
    frozen.weight.requires_grad_(False)
    y = frozen(x_)
    y.backward(g)
    same({"y": y.detach(), "dx": x_.grad}, {key: expected[key] for key in ("y", "dx")}, "frozen weight:")


class OneDevice(TorchDispatchMode):
    """Raises when an operation touches a tensor that is not on the meta device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        seen = {t.device.type for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)}
        assert seen <= {"meta"}, f"{operation} touches {seen}"
        return out


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_stays_on_the_device(name, monkeypatch):
    """As in test_linear.py: a later micro-batch neither reads a value back nor makes tensors of the host's numbers."""
    module = Linear(I, O, device="meta")
    module.context, module.recipe = Context(SEED, device="meta"), RECIPES[name]
    x = torch.empty(T, I, dtype=torch.bfloat16, device="meta", requires_grad=True)
    module(x).sum().backward()  # makes the constants

    def from_numbers(*args, **kwargs):
        raise AssertionError(f"a tensor made of {args} in the middle of a run")

    for maker in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, maker, from_numbers)
    with OneDevice():
        module.context.at(*PLACE)
        module(x).sum().backward()
    assert module.weight.grad.shape == (O, I) and x.grad.shape == (T, I)
