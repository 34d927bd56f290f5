"""Choices between specs (quant/spec.py, quantize.py): four-over-six and IF4 are those of a NumPy version, bit for bit; a
Choice of anything is, block by block, the nearest of its candidates; and what cannot be said in a Scale, a QuantSpec, a
Choice or a Recipe says why.
"""

import json
import math
import re
from dataclasses import asdict

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from quant import Choice, QTensor, QuantSpec, Recipe, Scale, quantize
from quant.encode import decode, rotated, unclipped
from quant.formats import FORMATS
from quant.quantize import quantized_values
from quant.random import Key, random_ints
from quant.recipe import Dgrad, Fprop, Wgrad

BY = ["squared_error", "absolute_error", "largest_error"]
BLOCKS = [(1, 16), (16, 16)]


def choice(*scales: Scale, by: str = "squared_error", formats: tuple[str, ...] = (), **more) -> Choice:
    formats = formats or ("e2m1",) * len(scales)
    return Choice(tuple(QuantSpec(f, scale=s, **more) for f, s in zip(formats, scales, strict=True)), by)


SIX, FOUR = Scale(target=6, outer_target=256), Scale(target=4, outer_target=384)


def four_over_six(by: str = "squared_error", **more) -> Choice:
    return choice(SIX, FOUR, by=by, **more)


def if4(by: str = "squared_error", **more) -> Choice:
    return choice(Scale(), Scale(), by=by, formats=("e2m1", "int4-6"), **more)


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key_for(spec) -> Key | None:
    return Key(1, 2, 3, 4) if spec.keyed else None


def joined(values: Tensor, factor: Tensor | None) -> Tensor:
    return values.float() * (1 if factor is None else factor)


# --- an independent version in NumPy ---

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT4 = (np.arange(-7, 8) * 6 / 7).astype(np.float32)


def to_e2m1(v: np.ndarray, noise: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """fp32 within 6 -> codes, values. noise: 8 random bits each; then up iff floor(256 fraction) + noise >= 256."""
    if noise is None:
        q = v.astype(ml_dtypes.float4_e2m1fn)
        return q.view(np.uint8), q.astype(np.float32)
    a = np.abs(v).astype(np.float64)
    low = np.searchsorted(E2M1, a, side="right") - 1
    high = np.minimum(low + 1, 7)
    fraction = (a - E2M1[low]) / np.where(high > low, E2M1[high] - E2M1[low], 1)
    code = low + (np.floor(256 * fraction) + noise >= 256)
    return (code + 8 * np.signbit(v)).astype(np.uint8), np.copysign(E2M1[code], v).astype(np.float32)


def to_int4(v: np.ndarray, noise: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """fp32 within 6 -> codes (two's complement), values: the nearest of INT4, ties to the even integer."""
    assert noise is None
    distance = np.abs(v.astype(np.float64)[..., None] - INT4.astype(np.float64))
    k = distance.argmin(-1)  # the lower of two as near
    above = np.minimum(k + 1, 14)
    tie = np.take_along_axis(distance, k[..., None], -1) == np.take_along_axis(distance, above[..., None], -1)
    k = np.where(tie[..., 0] & (above > k) & ((k - 7) % 2 == 1), above, k)
    return ((k - 7) & 15).astype(np.uint8), INT4[k]


def halves(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis, a power of two long, halves onto halves."""
    while (n := x.shape[-1]) > 1:
        x = x[..., : n // 2] + x[..., n // 2 :]
    return x[..., 0]


def total(error: np.ndarray, by: str) -> np.ndarray:
    """|errors| of blocks [R / b0, b0, K / b1, b1] -> [R / b0, 1, K / b1, 1]; along the contraction first."""
    if by == "largest_error":
        return error.max((1, 3), keepdims=True)
    error = error * error if by == "squared_error" else error
    return halves(np.moveaxis(halves(error), 1, -1))[:, None, :, None]


def to_blocks(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    return x.reshape(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1])


def oracle(x: np.ndarray, block: tuple[int, int], candidates: list[tuple], top: float, by: str, noise=None) -> tuple:
    """x fp32 [R, K], finite -> codes, scale bytes, S_dec, values. candidates: (elements, target, what is added to scale bytes).
    S_enc = top / amax; each block under each candidate's E4M3 scale; the first with the smallest error of the values."""
    one, flt_max = np.float32(1), np.finfo(np.float32).max
    b = to_blocks(x, block)
    noise = None if noise is None else noise.reshape(b.shape)
    with np.errstate(all="ignore"):
        amax = np.abs(x).max()
        s_enc = one if amax == 0 else min(np.float32(top) / amax, flt_max)
        s_dec = one / s_enc
        best = None
        for elements, target, flag in candidates:
            s = np.abs(b).max((1, 3), keepdims=True) * (s_enc * (one / np.float32(target)))
            s8 = np.minimum(s, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
            dec = s8.astype(np.float32)
            codes, values = elements(np.clip(b * np.minimum(one / (dec * s_dec), flt_max), -6, 6), noise)
            values = (values * dec) * s_dec
            error = total(np.abs(values - b), by)
            assert values.dtype == error.dtype == np.float32
            found = error, codes, s8.view(np.uint8) + np.uint8(flag), values
            if best is not None:
                better = error < best[0]
                found = [np.where(better, new, old) for new, old in zip(found, best, strict=True)]
            best = found
    _, codes, scales, values = best
    return codes.reshape(x.shape), scales[:, 0, :, 0], s_dec, values.reshape(x.shape)


KINDS = {
    "four-over-six": (four_over_six, [(to_e2m1, 6, 0), (to_e2m1, 4, 0)], 1536),
    "if4": (if4, [(to_e2m1, 6, 0), (to_int4, 6, 128)], 2688),
    "four over six over five": (
        lambda by, **more: choice(FOUR, SIX, Scale(target=5, outer_target=1536 / 5), by=by, **more),
        [(to_e2m1, 4, 0), (to_e2m1, 6, 0), (to_e2m1, 5, 0)],
        1536,
    ),
}  # fmt: skip


def compare(x: Tensor, kind: str, block: tuple[int, int], by: str, rounding: str = "nearest") -> Tensor:
    """-> q's scale bytes."""
    make, candidates, top = KINDS[kind]
    spec = make(by, block=block, rounding=rounding)
    noise = random_ints(*x.shape, 8, key_for(spec).words()).numpy() if spec.stochastic else None
    codes, scales, s_dec, values = oracle(x.float().numpy(), block, candidates, top, by, noise)
    q = quantize(x, spec, key_for(spec))
    what = f"{kind} {block} by {by}, {rounding}"
    assert_same_bits(q.global_scale, torch.tensor(s_dec), f"{what}: global scale")
    assert_same_bits(q.scale_codes, torch.from_numpy(scales), f"{what}: scales")
    assert_same_bits(q.codes(), torch.from_numpy(codes), f"{what}: codes")
    assert_same_bits(q.dequantize(), torch.from_numpy(values), f"{what}: values")
    assert_same_bits(joined(*quantized_values(x, spec, key_for(spec))), q.dequantize(), f"{what}: values without codes")
    assert_same_bits(joined(*decode(q)), q.dequantize(), f"{what}: decoded for a GEMM")
    return q.scale_codes


def wild(seed: int) -> Tensor:
    """Blocks from one far below the tensor's largest, to a few of very few numbers, to some on the grid of E2M1."""
    x = normal(64, 128, seed=seed) * torch.exp(2 * normal(64, 1, seed=seed + 1)).repeat(1, 128)
    x[:16, :32] *= 1e-5
    x[16:32, 64:80] = 0
    x[5, ::2], x[6, 3] = 0, -0.0
    x[32:48] = (2 * x[32:48]).round() / 2
    return x


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("block", BLOCKS, ids=["1x16", "16x16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_an_independent_version(kind, block, by):
    x = wild(3)
    seen = [compare(x, kind, block, by)]
    seen.append(compare(x.bfloat16(), kind, block, by))
    seen.append(compare(x.t(), kind, block, by))
    seen.append(compare(x.bfloat16().t(), kind, block, by))
    if kind == "if4":
        share = torch.cat([s.flatten() for s in seen]).ge(128).float().mean()
        assert 0.05 < share < 0.95, "one of the candidates is hardly ever taken"


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("block", BLOCKS, ids=["1x16", "16x16"])
def test_equal_to_an_independent_version_with_noise(block, by):
    """The candidates share the random bits, so the error is that of the values which are kept."""
    for x in (wild(5), wild(6).bfloat16(), wild(7).t(), wild(8).bfloat16().t()):
        compare(x, "four-over-six", block, by, "stochastic8")


@settings(max_examples=25, deadline=None)
@given(
    exponents=hnp.arrays(np.int64, (16, 3), elements=st.integers(0, 254)),
    spread=st.sampled_from([0, 1, 4, 30]),
    seed=st.integers(0, 2**31 - 1),
    kind=st.sampled_from([*KINDS]),
    by=st.sampled_from(BY),
)
def test_equal_to_an_independent_version_on_any_exponents(exponents, spread, seed, kind, by):
    """A biased exponent for every 1x16 block, 0 being the subnormals: errors that vanish and that overflow when squared."""
    rng = np.random.default_rng(seed)
    e = np.repeat(exponents, 16, 1) - rng.integers(0, spread + 1, (16, 48))
    bits = np.clip(e, 0, 254) << 23 | rng.integers(0, 2**23, (16, 48)) | rng.integers(0, 2, (16, 48)) << 31
    x = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    for block in BLOCKS:
        compare(x, kind, block, by)


def test_the_first_of_two_that_come_as_close():
    """S_enc = 1, and one element of 384: 6 * 64 and 4 * 96 are both exact."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1536, 384
    for by in BY:
        assert quantize(x, choice(SIX, FOUR, by=by)).scale[0, 1] == 64
        assert quantize(x, choice(FOUR, SIX, by=by)).scale[0, 1] == 96
        x[0, 17] = 96  # 1.5 * 64, and 1 * 96
        assert quantize(x, choice(FOUR, SIX, by=by)).scale[0, 1] == 96
        x[0, 17] = 320  # 5 * 64 is half-way between two values, 3.33 * 96 a third of the way
        assert quantize(x, choice(SIX, FOUR, by=by)).scale[0, 1] == 96
        x[0, 17] = 0


# --- any choice is the nearest of its candidates ---

CHOICES = {
    "four-over-six": four_over_six(),
    "by absolute error": four_over_six("absolute_error"),
    "by largest error": four_over_six("largest_error"),
    "order g1": choice(Scale(target=6, outer_target=256, order="g1"), Scale(target=4, outer_target=384, order="g1")),
    "16x16": four_over_six(block=(16, 16)),
    "sr8": four_over_six(rounding="stochastic8"),
    "rotated": four_over_six(hadamard=32, signs="fresh", by="absolute_error"),
    "per row": choice(*(Scale(outer="row", target=t, outer_target=1536 / t) for t in (6, 4))),
    "per 1x64": choice(*(Scale(outer="1x64", target=t, outer_target=1536 / t) for t in (6, 4, 3))),
    "e5m3": choice(Scale("e5m3", target=6), Scale("e5m3", target=4)),
    "scales rounded stochastically": choice(*(Scale("e5m3", target=t, rounding="stochastic") for t in (6, 4))),
    "bf16 scales": choice(Scale("bf16", target=7 / 4), Scale("bf16", target=1.5), formats=("int4", "int4"), block=(1, 32)),
    "fp32 scales": choice(Scale("fp32"), Scale("fp32", target=400), formats=("e4m3",) * 2, block=(4, 32)),
    "rules of e8m0": choice(Scale("e8m0", rule="floor"), Scale("e8m0", rule="rceil"), block=(1, 32), rounding="away"),
    "absmax and std": choice(Scale("e8m0"), Scale("e8m0", rule="floor", statistic="std", target=2.05), block=(1, 32)),
    "macro-blocks": choice(*(Scale("e8m0", "1x64", rule=r, outer_format="m8") for r in ("floor", "rceil")), block=(1, 32)),
    "if4": if4(),
    "if4 the other way round": choice(Scale(), Scale(), formats=("int4-6", "e2m1")),
    "if4, 16x16": if4(block=(16, 16)),
    "if4, e5m2 scales": choice(Scale("e5m2"), Scale("e5m2"), formats=("e2m1", "int4-6"), by="absolute_error"),
    "if4, e3m4 scales": choice(Scale("e3m4", "row"), Scale("e3m4", "row"), formats=("e2m1", "int4-6")),
    "e2m1 and e1m2": choice(Scale("e4m3", "none"), Scale("e4m3", "none"), formats=("e2m1", "e1m2")),
    "e4m3 and e5m2": choice(Scale("e4m3", "none"), Scale("e4m3", "none", target=448), formats=("e4m3", "e5m2")),
    "nf4 and e2m1, rotated": choice(
        Scale(outer="1x64"), Scale(outer="1x64", target=1), formats=("nf4", "e2m1"), hadamard=16, signs="none"
    ),
    "if4, bf16 scales": choice(Scale("bf16"), Scale("bf16"), formats=("e2m1", "int4-6")),
}  # fmt: skip
choices = pytest.mark.parametrize("spec", CHOICES.values(), ids=CHOICES)


@choices
def test_a_choice_is_block_by_block_the_nearest_of_its_candidates(spec):
    """Each candidate quantised alone, as test_quantize.py and test_scaling.py check it; here only which of them is taken."""
    k, seen = key_for(spec), set()
    for x in (normal(64, 128), wild(1).bfloat16(), wild(2).t()):
        y = rotated(x, spec, k and k.at(use=k.use + 16)).float().numpy()
        alone = [quantize(x, candidate, k) for candidate in spec.candidates]
        errors = [total(to_blocks(np.abs(q.dequantize().numpy() - y), spec.block), spec.by)[:, 0, :, 0] for q in alone]
        taken = np.argmin(errors, 0)  # the first of the smallest
        seen |= {*taken.flatten().tolist()}
        q = quantize(x, spec, k)

        per_block = torch.from_numpy(taken)
        per_element = per_block.repeat_interleave(spec.block[0], 0).repeat_interleave(spec.block[1], 1)
        expected = torch.stack([a.dequantize() for a in alone]).gather(0, per_element[None])[0]
        assert_same_bits(q.dequantize(), expected, "values")
        codes = torch.stack([a.codes() for a in alone]).gather(0, per_element[None])[0]
        assert_same_bits(q.codes(), codes, "codes")
        scales = torch.stack([a.scales()[0] for a in alone]).gather(0, per_block[None])[0]
        assert_same_bits(q.scales()[0], scales, "decode scales")
        if (outer := alone[0].global_scale) is not None:
            assert_same_bits(q.global_scale, outer, "the outer scale, which all candidates share")
            assert_same_bits(alone[-1].global_scale, outer, "the outer scale of the last")
        if len(spec.elements) > 1:
            sign = FORMATS[spec.scale.format].bits - 1
            assert_same_bits((q.scale_codes.int() >> sign).bool(), per_block == 1, "the sign of the scale")
        assert_same_bits(joined(*quantized_values(x, spec, k)), expected, "values without codes")
        assert_same_bits(joined(*decode(q)), expected, "values for a GEMM")

        error = total(to_blocks(np.abs(q.dequantize().numpy() - y), spec.block), spec.by)[:, 0, :, 0]
        assert all((error <= other).all() for other in errors), "a candidate alone is nearer"
        assert q.nbytes() == alone[0].nbytes(), "which one costs no bits"
    assert len(seen) == len(spec.candidates), "a candidate is never taken"


@choices
def test_layouts_and_checkpoints(spec):
    x, k = wild(4), key_for(spec)
    for view in (x, x.t(), x[::2, 64:], x.bfloat16()[:, :64].t()):
        q = quantize(view, spec, k)
        copy = quantize(view.clone(memory_format=torch.contiguous_format), spec, k)
        assert_same_bits(q.packed(), copy.packed(), "codes wherever it lies in memory")
        assert_same_bits(q.scale_codes, copy.scale_codes, "scales wherever it lies in memory")
        assert_same_bits(q.dequantize(), copy.dequantize(), "values wherever it lies in memory")
        assert_same_bits(joined(*quantized_values(view, spec, k)), q.dequantize(), "values without codes")
        assert_same_bits(joined(*decode(q)), q.dequantize(), "values for a GEMM")
        tensors, description = q.state("w")
        back = QTensor.from_state("w", tensors, json.loads(json.dumps(description)))
        assert back.spec == spec and back.shape == q.shape
        for part in ("packed_codes", "scale_codes", "outer_codes"):
            ours, theirs = getattr(back, part), getattr(q, part)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_same_bits(ours, theirs, part)
        assert_same_bits(back.dequantize(), q.dequantize(), "values of a checkpoint")
    leading = quantize(x.view(4, 16, 128), spec, k)
    assert_same_bits(leading.dequantize(), quantize(x, spec, k).dequantize().view(4, 16, 128), "leading axes")


def test_a_near_tie_is_decided_alike_wherever_it_lies_in_memory():
    """S_enc = 1, so scales of 64 and 96. Of 48 and 64 each is exact in one grid and 16 off in the other: 256 for both. Two
    more elements are t off in both, t^2 below half a unit of 256, and 2 t^2 above it: what they add depends on the order."""
    x = torch.zeros(16, 32)
    x[0, 16], x[15, 15] = 1536, 384
    x[0, 0], x[8, 8] = 48, 64
    x[0, 8] = x[4, 8] = 192 + 0.75**0.5 * 2.0**-8
    spec = four_over_six(block=(16, 16))
    views = [quantize(view, spec) for view in (x, x.t().contiguous().t())]
    assert_same_bits(views[1].scale_codes, views[0].scale_codes, "scales")


@pytest.mark.parametrize("name", ["four-over-six", "16x16", "if4", "e5m3"])
def test_what_is_not_clipped(name):
    """|y enc| < 6 with the encode factor of the candidate that was taken: of those mapped to 4, nothing is clipped."""
    spec, x = CHOICES[name], wild(9)
    q = quantize(x, spec)
    outer = np.float32(1) if q.global_scale is None else q.global_scale.numpy()
    with np.errstate(all="ignore"):
        dec = np.abs(q.scale.float().numpy()) if name != "e5m3" else q.scales()[0].numpy()
        enc = np.minimum(np.float32(1) / (dec * outer), np.finfo(np.float32).max)
        enc = enc.repeat(spec.block[0], 0).repeat(spec.block[1], 1)
        expected = torch.from_numpy(np.abs(x.numpy() * enc) < 6)
    assert_same_bits(unclipped(x, spec), expected, name)
    assert not expected.all()


# --- special values ---


@choices
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_laundered(spec, bad):
    x, k = normal(64, 128), key_for(spec)
    x[5, 70] = bad
    b0, b1 = spec.block
    spoilt = torch.zeros(64, 128, dtype=torch.bool)
    if spec.scale.outer == "tensor":
        b0, b1 = x.shape
    elif spec.scale.outer == "row":
        b1 = x.shape[1]
    b1 = max(b1, spec.scale.group, spec.hadamard)
    spoilt[5 // b0 * b0 :, 70 // b1 * b1 :][:b0, :b1] = True
    for view in (x, x.t().contiguous().t()):
        q = quantize(view, spec, k)
        for found in (q.dequantize(), joined(*quantized_values(view, spec, k)), joined(*decode(q))):
            assert (found.isnan() == spoilt).all()
        scales = q.scales()[0]
        assert (scales.isnan().repeat_interleave(spec.block[0], 0).repeat_interleave(spec.block[1], 1) == spoilt).all()


@choices
def test_zeros(spec):
    x, k = normal(64, 128), key_for(spec)
    x[:32] = 0
    x[3] = -0.0
    for view in (x, torch.zeros(64, 128), x.t().contiguous().t()):
        q = quantize(view, spec, k)
        first = quantize(view, spec.candidates[0], k)
        assert_same_bits(q.dequantize()[:32], first.dequantize()[:32], "zeros, with the signs that the first candidate keeps")
        assert_same_bits(q.scale_codes[: 32 // spec.block[0]], first.scale_codes[: 32 // spec.block[0]], "its scale")
        assert not q.dequantize()[:32].any() and q.dequantize().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [four_over_six(by) for by in BY] + [if4(), four_over_six(block=(16, 16))], ids=Choice.short)
def test_the_largest_finite_values_stay_finite(spec, dtype):
    x = torch.full((16, 32), torch.finfo(dtype).max, dtype=dtype)
    x[:, ::2] *= -1
    value = quantize(x, spec).dequantize()
    # The amax comes back as target * outer_target S_dec, exact but for S_dec and the product: three roundings.
    assert float((value.double() / x.double() - 1).abs().max()) <= 3.01 * 2**-24


# --- IF4 ---


def test_the_sign_of_an_if4_scale_says_which_grid():
    spec, x = if4(), normal(128, 256)
    q = quantize(x, spec)
    assert q.scale.dtype == torch.float8_e4m3fn
    scale = q.scale.float().numpy().repeat(16, 1)
    codes = q.codes().numpy()
    e2m1 = np.where(codes < 8, 1, -1) * E2M1[codes & 7]
    integers = (codes.astype(np.int64) ^ 8) - 8
    int4 = INT4[np.maximum(integers, -7) + 7]
    assert not ((integers == -8) & (scale < 0)).any(), "a code that is no number"
    values = np.where(scale < 0, int4, e2m1).astype(np.float32) * np.abs(scale) * q.global_scale.numpy()
    assert_same_bits(q.dequantize() + 0.0, torch.from_numpy(values) + 0.0, "decoded by hand")
    tops = (x.view(128, 16, 16).abs().amax(2) * (np.float32(2688) / x.abs().max() * np.float32(1 / 6))).to(torch.float8_e4m3fn)
    assert_same_bits(q.scale.float().abs(), tops.float(), "both grids end at 6, so they have one scale")
    assert q.nbytes() * 8 == x.numel() * (4 + 8 / 16) + 32, "no bit more than NVFP4"
    # Each grid's own numbers go to it; 6 gives all blocks one scale, and grid[1] is on the other's grid in neither case.
    g = torch.Generator().manual_seed(1)
    for grid, share in ((torch.from_numpy(E2M1).float(), 0.0), (torch.from_numpy(INT4), 1.0)):
        own = grid[torch.randint(0, len(grid), (128, 256), generator=g)]
        own[:, ::16] = 6
        own[:, 1::16] = grid[1]
        assert (quantize(own, spec).scale_codes >= 128).float().mean() == share


# --- published constants, on N(0, 1) ---


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(four_over_six(), 3.524), (four_over_six(block=(16, 16)), 3.168), (if4(), 22.1 / (20 * math.log10(2)))],
    ids=["four-over-six, 1x16", "four-over-six, 16x16", "if4"],
)
def test_rates(spec, bits):
    """-log2 of the relative root mean square error: Quartet II's table of four-over-six (arXiv:2601.22813), and IF4's -22.1 dB,
    of which half a unit is 0.008 bits. 2^22 draws are good to 5e-4, and half a unit of three digits is as much; in blocks
    of 16x16 the share that takes 4 is small, and 3.166 is what we find for 3.168."""
    x = normal(2048, 2048)
    error = (quantize(x, spec).dequantize() - x).square().mean() / x.square().mean()
    assert float(-0.5 * torch.log2(error)) == pytest.approx(bits, abs=8e-3 if spec == if4() else 2.5e-3)


# --- what cannot be said ---


def spec(scale: dict | None = None, **kw) -> QuantSpec:
    return QuantSpec(scale=Scale(**(scale or {})), **kw)


M8 = {"format": "e8m0", "outer": "1x64", "outer_format": "m8"}
CORRECTED = {"correction": "eden", "rounding": "stochastic"}
WRONG_SCALES = [
    (M8 | {"outer": "tensor"}, "outer_format 'm8' is over scales 'e8m0' and an outer '1xN', not 'e8m0', 'tensor'"),
    (M8 | {"outer": "none"}, "outer_format 'm8' is over scales 'e8m0' and an outer '1xN', not 'e8m0', 'none'"),
    ({"outer_format": "m8"}, "outer_format 'm8' is over scales 'e8m0' and an outer '1xN', not 'e4m3', 'tensor'"),
    ({"outer": "1x64", "outer_format": "m8"}, "outer_format 'm8' is over scales 'e8m0' and an outer '1xN', not 'e4m3', '1x64'"),
    ({"format": "e8m0", "outer": "1x64"}, "outer '1x64': scales of format 'e8m0' have the range to do without"),
    ({"outer_format": "m7"}, "outer_format"),
    (M8 | {"outer_target": 3.0}, "outer_target 3.0 is for an outer scale in fp32, and outer is '1x64' in 'm8'"),
    (M8 | {"multiplier": 0.75}, "multiplier 0.75 is for scales 'e8m0' without an outer one; others take a target"),
    (M8 | {"statistic": "std"}, "statistic 'std' and outer '1x64': an outer scale is made from an amax"),
    (M8 | {"rounding": "stochastic"}, "scale rounding 'stochastic': a scale of format 'e8m0' has nothing to round"),
    (M8 | {"history": 4}, "history 4: expected one absmax for the operand, of scale 'fp32' or outer 'tensor'"),
    ({"outer": "row", "history": 4}, "history 4: expected one absmax for the operand, of scale 'fp32' or outer 'tensor'"),
    ({"format": "e5m3", "history": 4}, "history 4: expected one absmax for the operand, of scale 'fp32' or outer 'tensor'"),
    ({"format": "fp32", "history": 2, "statistic": "std"}, "history 2: expected one absmax for the operand"),
    ({"history": -1}, "greater than or equal to 0"),
    ({"rounding": "away"}, "scale rounding 'away': expected 'nearest' or 'stochastic', with a number of bits"),
    ({"rounding": "zero"}, "scale rounding 'zero': expected 'nearest' or 'stochastic', with a number of bits"),
    ({"rounding": "stochastic25"}, "unknown scale rounding 'stochastic25', expected one of 'nearest'"),
    ({"rounding": "stochstic"}, "unknown scale rounding 'stochstic', expected one of .* did you mean 'stochastic'?"),
    ({"format": "fp32", "rounding": "stochastic"}, "'stochastic': a scale of format 'fp32' has nothing to round"),
    ({"format": "none", "rounding": "stochastic8"}, "'stochastic8': a scale of format 'none' has nothing to round"),
    ({"correction": "eden"}, "correction 'eden' needs scales with rounding 'stochastic': rounded to nearest they are biased"),
    (M8 | {"correction": "eden"}, "correction 'eden' needs scales with rounding 'stochastic'"),
    ({"correction": "edne"}, "correction"),
    ({"format": "e5m3", "outer_target": 100.0}, "outer_target 100.0 is for an outer scale in fp32, and outer is 'none'"),
    ({"outer": "1x0"}, "outer"),
]  # fmt: skip
WRONG_SPECS = [
    ({"format": "e8m0", "scale": {"format": "fp32"}}, "format 'e8m0' has neither zero nor signs: it is for scales"),
    ({"block": (1, -1), "scale": {"format": "bf16", "rounding": "stochastic8"}}, "expected blocks along a row, not [1, -1]"),
    ({"scale": CORRECTED}, "correction 'eden' needs a Hadamard transform with signs 'fresh': with fixed ones the same error"),
    ({"scale": CORRECTED, "hadamard": 32}, "correction 'eden' needs a Hadamard transform with signs 'fresh'"),
    ({"scale": CORRECTED, "hadamard": 32, "signs": "none"}, "correction 'eden' needs a Hadamard transform with signs 'fresh'"),
    ({"scale": CORRECTED, "signs": "fresh"}, "correction 'eden' needs a Hadamard transform with signs 'fresh'"),
    (
        {"scale": CORRECTED, "hadamard": 32, "signs": "fresh", "rounding": "stochastic8"},
        "correction 'eden' is for elements rounded to nearest, in blocks [1, N] within a tile of hadamard 32, "
        "not 'stochastic8' in [1, 16]",
    ),
    (
        {"scale": CORRECTED | {"format": "bf16"}, "hadamard": 32, "signs": "fresh"},
        "correction 'eden': squares of scales 'bf16' leave fp32's range, expected e4m3 or e5m3",
    ),
    (
        {"scale": CORRECTED | {"outer": "1x16"}, "hadamard": 32, "signs": "fresh"},
        "correction 'eden': outer '1x16' must be a multiple of hadamard 32",
    ),
    ({"scale": CORRECTED, "hadamard": 32, "signs": "fresh", "block": (1, 64)}, "of hadamard 32, not 'nearest' in [1, 64]"),
    ({"scale": CORRECTED, "hadamard": 32, "signs": "fresh", "block": (16, 16)}, "of hadamard 32, not 'nearest' in [16, 16]"),
    ({"scale": CORRECTED, "hadamard": 32, "signs": "fresh", "block": (1, -1)}, "of hadamard 32, not 'nearest' in [1, -1]"),
    ({"scale": M8, "block": (1, 48)}, "outer '1x64' must be a multiple of the block's contraction size 48"),
    ({"scale": M8, "block": (1, -1)}, "outer '1x64' must be a multiple of the block's contraction size -1"),
    ({"scale": M8, "block": (1, 128)}, "outer '1x64' must be a multiple of the block's contraction size 128"),
    ({"scale": {"format": "fp32", "history": 3}}, "history 3 is of one scale for the operand, so block must be [-1, -1]"),
    ({"source": "bprop"}, "source"),
    ({"hadamard": 48}, "hadamard 48: expected 0 (off) or a power of two"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG_SCALES, ids=lambda v: None if isinstance(v, str) else str(v))
def test_scales_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        Scale(**wrong)


@pytest.mark.parametrize(("wrong", "message"), WRONG_SPECS, ids=lambda v: None if isinstance(v, str) else str(v))
def test_specs_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        spec(**wrong)


def pair(first: dict, second: dict, **both) -> tuple[QuantSpec, QuantSpec]:
    return spec(**both, **first), spec(**both, **second)


NV = QuantSpec()
EDEN = spec(CORRECTED, hadamard=32, signs="fresh")
WRONG_CHOICES = [
    ((), "candidates: expected at least two specs to choose from, got 0"),
    ((NV,), "candidates: expected at least two specs to choose from, got 1"),
    (pair({"block": (1, 16)}, {"block": (1, 32)}), "candidates must have the same block, not (1, 16) and (1, 32)"),
    (pair({"scale": {}}, {"scale": {"format": "e5m3"}}), "must have the same scale.format, not 'e4m3' and 'e5m3'"),
    (pair({"scale": {}}, {"scale": {"outer": "row"}}), "must have the same scale.outer, not 'tensor' and 'row'"),
    (pair({"scale": {}}, {"scale": {"order": "g1"}}), "must have the same scale.order, not 'g2' and 'g1'"),
    (pair({"scale": {}}, {"scale": {"rounding": "stochastic"}}), "must have the same scale.rounding, not 'nearest' and 'stoch"),
    (
        pair({"scale": {"format": "e8m0"}}, {"scale": {"format": "e8m0", "multiplier": 0.75}}),
        "must have the same scale.multiplier, not 1.0 and 0.75",
    ),
    (pair({"scale": {"history": 2}}, {"scale": {"history": 3}}), "must have the same scale.history, not 2 and 3"),
    (pair({"rounding": "nearest"}, {"rounding": "away"}), "must have the same rounding, not 'nearest' and 'away'"),
    (pair({"hadamard": 16}, {"hadamard": 32}), "must have the same hadamard, not 16 and 32"),
    (pair({"signs": "fixed"}, {"signs": "fresh"}, hadamard=16), "must have the same signs, not 'fixed' and 'fresh'"),
    (pair({"source": "original"}, {"source": "fprop"}), "must have the same source, not 'original' and 'fprop'"),
    (pair({"center": False}, {"center": True}), "must have the same center, not False and True"),
    (pair({"format": "e2m1"}, {"format": "e4m3"}), "must have the same element.bits, not 4 and 8"),
    ((NV, spec({"target": 4})), "must have the same target * outer_target, not 2688.0 and 1792.0"),
    ((spec(asdict(SIX)), NV), "must have the same target * outer_target, not 1536.0 and 2688.0"),
    ((spec(asdict(SIX)), spec(asdict(FOUR)), NV), "must have the same target * outer_target, not 1536.0 and 2688.0"),
    ((NV, spec(format="int4")), "must have the same target * outer_target, not 2688.0 and 784.0"),
    (
        (NV, spec(format="int4-6"), spec({"target": 6}, format="e1m2")),
        "candidates of different element formats, e2m1, int4-6, e1m2: expected two, and block scales of a signed format, "
        "whose sign bit says which; not 3 with 'e4m3'",
    ),
    (
        (NV, spec(format="int4-6"), NV),
        "candidates of different element formats, e2m1, int4-6: expected two, and block scales of a signed format, "
        "whose sign bit says which; not 3 with 'e4m3'",
    ),
    (pair({"format": "e2m1"}, {"format": "int4-6"}, scale={"format": "e5m3"}), "whose sign bit says which; not 2 with 'e5m3'"),
    (pair({"format": "e2m1"}, {"format": "int4-6"}, scale={"format": "e8m0"}), "whose sign bit says which; not 2 with 'e8m0'"),
    (pair({"format": "e2m1"}, {"format": "int4-6"}, scale={"format": "fp32"}), "whose sign bit says which; not 2 with 'fp32'"),
    (
        pair({"format": "e2m1"}, {"format": "int4-6"}, scale={"format": "e4m3-fnuz"}),  # whose NaN is the negative zero
        "whose sign bit says which; not 2 with 'e4m3-fnuz'",
    ),
    ((EDEN, EDEN), "candidates need block scales without a history or a correction, not " + EDEN.short()),
    ((spec({"history": 3}),) * 2, "candidates need block scales without a history or a correction, not "),
    ((spec({"format": "fp32"}, block=(1, -1)),) * 2, "candidates need block scales without a history or a correction, not "),
    ((spec({"format": "none"}, format="e8m3"),) * 2, "candidates need block scales without a history or a correction, not e8"),
]  # fmt: skip


@pytest.mark.parametrize(("candidates", "message"), WRONG_CHOICES, ids=[message for _, message in WRONG_CHOICES])
def test_choices_that_cannot_be(candidates, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Choice(candidates)


def test_a_choice_by_something_else():
    with pytest.raises(ValueError, match=r"'squared_error', 'absolute_error', 'largest_error', .*'mse'"):
        Choice((NV, NV), "mse")


FOS, H32 = four_over_six(), QuantSpec(hadamard=32)
RE, CENTRED, ROTATED = QuantSpec(source="fprop"), QuantSpec(center=True), QuantSpec(hadamard=32, source="fprop")
BIASED = "is a choice by squared_error, which is biased"
WRONG_RECIPES = [
    ({"dgrad": Dgrad(g=FOS)}, f"dgrad.g {BIASED}"),
    ({"dgrad": Dgrad(w=FOS)}, f"dgrad.w {BIASED}"),
    ({"wgrad": Wgrad(g=FOS)}, f"wgrad.g {BIASED}"),
    ({"wgrad": Wgrad(x=if4("largest_error"))}, "wgrad.x is a choice by largest_error, which is biased"),
    *(
        ({gemm.__name__.lower(): gemm(**{operand: RE})}, f"{gemm.__name__.lower()}.{operand}: source 'fprop' is for dgrad.w")
        for gemm, operand in ((Fprop, "x"), (Fprop, "w"), (Dgrad, "g"), (Wgrad, "g"), (Dgrad, "w"), (Wgrad, "x"))
    ),
    ({"fprop": Fprop(x=NV), "dgrad": Dgrad(w=RE)}, "dgrad.w: source 'fprop' is for dgrad.w and wgrad.x whose fprop op"),
    ({"fprop": Fprop(w=NV), "wgrad": Wgrad(x=RE)}, "wgrad.x: source 'fprop' is for dgrad.w and wgrad.x whose fprop op"),
    (
        {"fprop": Fprop(x=H32, w=H32), "dgrad": Dgrad(w=RE)},
        "dgrad.w: source 'fprop' of what is centred or transformed there; `rotate` is for that",
    ),
    ({"fprop": Fprop(x=CENTRED), "wgrad": Wgrad(x=RE)}, "wgrad.x: source 'fprop' of what is centred or transformed there"),
    (
        {"fprop": Fprop(x=NV), "wgrad": Wgrad(x=QuantSpec(source="fprop", center=True))},
        "wgrad.x: source 'fprop' of what is centred or transformed there",
    ),
    *(
        ({gemm.__name__.lower(): gemm(**{operand: CENTRED})}, f"{gemm.__name__.lower()}.{operand}: center is for activations, ")
        for gemm, operand in ((Fprop, "w"), (Dgrad, "g"), (Dgrad, "w"), (Wgrad, "g"))
    ),
    ({"rotate": 48}, "rotate 48: expected 0 (off) or a power of two"),
    ({"rotate": 1}, "rotate 1: expected 0 (off) or a power of two"),
    ({"rotate": -2}, "greater than or equal to 0"),
    ({"rotate": 32}, "rotate = 32, clip = False are about quantised operands of fprop, and there is no spec for"),
    ({"rotate": 32, "fprop": Fprop(x=NV)}, "and there is no spec for fprop.w"),
    ({"clip": True, "fprop": Fprop(w=NV)}, "clip = True are about quantised operands of fprop, and there is no spec"),
    (
        {"fprop": Fprop(x=four_over_six(hadamard=32), w=NV)},
        "fprop.x has hadamard 32 with signs fixed and fprop.w has none: both operands of a GEMM must be rotated alike",
    ),
    (
        {"wgrad": Wgrad(g=EDEN, x=H32)},
        "wgrad.g has hadamard 32 with signs fresh and wgrad.x has hadamard 32 with signs fixed: both operands",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG_RECIPES, ids=[message for _, message in WRONG_RECIPES])
def test_recipes_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**wrong)


def test_what_stands_next_to_them_can_be():
    """The nearest neighbours of the errors above, so that none is refused for another reason."""
    fresh = QuantSpec(hadamard=32, signs="fresh", source="fprop")
    Recipe(Fprop(FOS, if4()), Dgrad(NV, RE), Wgrad(EDEN, fresh))
    Recipe(Fprop(CENTRED, NV), Dgrad(EDEN, fresh), Wgrad(x=CENTRED))
    Recipe(Fprop(NV, NV), rotate=32, clip=True)
    Recipe(Fprop(NV, NV), wgrad=Wgrad(H32, ROTATED))
    Scale("fp32", history=4), Scale(history=4), Scale("bf16", rounding="stochastic16"), Scale(**M8)
    (
        spec({"format": "fp32", "history": 3}, block=(-1, -1)),
        spec(M8, block=(16, 64)),
        spec(CORRECTED, hadamard=16, signs="fresh"),
    )
    for chosen in CHOICES.values():
        assert chosen == Choice(chosen.candidates, chosen.by) and hash(chosen) == hash(Choice(chosen.candidates, chosen.by))
        assert chosen.short() == f"[{' | '.join(c.short() for c in chosen.candidates)}] by {chosen.by}"
