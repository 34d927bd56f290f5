"""quant/quantize.py and qtensor.py: the golden values and statistics of TransformerEngine's reference; an independent
NumPy version of its arithmetic on matrices with wild exponents, bit for bit; special values; layout, packing, keys and
messages; and that the three ways to a quantised operand (codes, values without codes, decoded codes) are one.
"""

import hashlib
import json
import math
import random
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from quant import FORMATS, QTensor, QuantSpec, Scale, quantize
from quant.encode import check, decode, rotated
from quant.quantize import quantized_values
from quant.random import Key, random_ints

ROW = QuantSpec()  # NVFP4 as it is the default: e2m1, 1x16, e4m3 scales under a tensor scale, order g2
ROW_G1 = QuantSpec(scale=Scale(order="g1"))
SQUARE = QuantSpec(block=(16, 16))
RHT = QuantSpec(hadamard=16)
SR8 = QuantSpec(rounding="stochastic8")
SR24 = QuantSpec(rounding="stochastic")
ALL = [ROW, ROW_G1, SQUARE, RHT, SR8, SR24,
       QuantSpec(hadamard=16, signs="fresh", rounding="stochastic8"),
       QuantSpec(block=(16, 16), rounding="stochastic"),
       QuantSpec(block=(2, 32), rounding="away"),
       QuantSpec(block=(1, 16), rounding="zero", hadamard=4),
       QuantSpec(format="e4m3"), QuantSpec(format="e2m3", block=(1, 32)), QuantSpec(format="e3m2")]  # fmt: skip
every_spec = pytest.mark.parametrize("spec", ALL, ids=lambda s: f"{s.format} {s.short()} {s.scale.order}")


def normal(*shape: int, seed: int = 0, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key_for(spec: QuantSpec) -> Key | None:
    return Key(1, 2, 3, 4) if spec.keyed else None


# --- golden values, made with TransformerEngine's Python reference ---


def golden_row() -> Tensor:
    first = [(-1) ** i * (i + 1) / 10 for i in range(16)]
    return torch.tensor([first + [0.01 * k for k in range(-8, 8)]]).bfloat16()


@pytest.mark.parametrize("spec", [ROW, ROW_G1], ids=["g2", "g1"])
def test_golden_row(spec):
    x = golden_row()
    assert x.abs().max().item() == 1.6015625
    q = quantize(x, spec)
    codes = "1 9 2 11 4 12 5 13 5 14 6 14 6 15 7 15 15 15 14 14 13 12 11 10 0 2 3 4 5 6 6 7"
    assert_same_bits(q.codes(), torch.tensor([list(map(int, codes.split()))], dtype=torch.uint8), "codes")
    packed = bytes.fromhex("91b2c4d5e5e6f6f7ffeecdab20436576")
    assert_same_bits(q.packed(), torch.tensor([list(packed)], dtype=torch.uint8), "packed bytes")
    assert q.scale_codes.tolist() == [[0x7E, 0x5B]]
    assert_same_bits(q.scale, torch.tensor([[448.0, 22.0]]).to(torch.float8_e4m3fn), "scales")
    s_enc = np.float32(2688) / np.float32(1.6015625)
    assert abs(s_enc - 1678.36096) < 5e-6, "the printed digits of S_enc, half a unit of the last"
    assert_same_bits(q.global_scale, torch.tensor(np.float32(1) / s_enc), "global scale")


def golden_matrix() -> Tensor:
    i, j = torch.arange(128)[:, None], torch.arange(256)[None, :]
    k = (7919 * i + 104729 * j + 31 * i * j) % 2003 - 1001
    return (k * 2.0 ** ((3 * i + 5 * (j // 16)) % 11 - 9)).bfloat16()


def sha256(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def g1(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(block=spec.block, hadamard=spec.hadamard, scale=Scale(order="g1"))


# spec, transposed: amax, sha256 of the codes (a byte each) and of the scale bytes; the same for g1 and g2 without RHT
GOLDEN = {
    "1x16": (ROW, False, 2000, "e38bfc664004caf0", "2e1098022f4aa0c6"),
    "1x16 g1": (ROW_G1, False, 2000, "e38bfc664004caf0", "2e1098022f4aa0c6"),
    "1x16 of x.T": (ROW, True, 2000, "f980cbb4b45e1304", "3a3d4efe10178888"),
    "1x16 g1 of x.T": (ROW_G1, True, 2000, "f980cbb4b45e1304", "3a3d4efe10178888"),
    "16x16": (SQUARE, False, 2000, "86132367f80c2721", "3f0d197d8f66544c"),
    "16x16 g1": (g1(SQUARE), False, 2000, "86132367f80c2721", "3f0d197d8f66544c"),
    "RHT of x.T": (RHT, True, 1504, "57602cfba452eab4", "aacad71c914dd430"),
    "RHT g1 of x.T": (g1(RHT), True, 1504, "4055b285ed248f2b", "539ab310313ee3b3"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_matrix(case):
    spec, transposed, amax, codes, scales = GOLDEN[case]
    x = golden_matrix()
    assert sha256(x) == "14e66167895402ce", "the input itself"
    x = x.t() if transposed else x
    assert rotated(x, spec).abs().max().item() == amax
    q = quantize(x, spec)
    assert sha256(q.codes()) == codes, f"codes of {case}"
    # The published bytes of a 16x16 tile are repeated for its 16 rows, as the tensor core wants them.
    assert sha256(q.scale_codes.repeat_interleave(spec.block[0], 0)) == scales, f"scales of {case}"


def test_the_two_orders_differ_where_the_spec_says():
    x = golden_matrix().t()
    a, b = quantize(x, RHT), quantize(x, g1(RHT))
    assert int((a.scale_codes != b.scale_codes).sum()) == 20 and a.scale_codes.numel() == 2048
    assert int((a.codes() != b.codes()).sum()) == 79


def test_exact_tie_tells_g1_from_g2():
    """amax 1504, bmax 282: exactly s = 84, a tie of E4M3; g2's association lands just above it."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 16] = 1504, 282
    assert quantize(x, ROW).scale_codes.tolist() == [[0x7E, 0x6B]]
    assert quantize(x, ROW_G1).scale_codes.tolist() == [[0x7E, 0x6A]]


# --- published statistics ---


@pytest.mark.parametrize("spec, transposed, published", [(ROW, False, 0.09505), (SQUARE, False, 0.11130), (RHT, True, 0.09515)])
def test_relative_error_is_the_published_one(spec, transposed, published):
    x = normal(1024, 2048, seed=1234)
    y = rotated(x.t() if transposed else x, spec)
    error = (quantize(x.t() if transposed else x, spec).dequantize() - y.float()).norm() / y.float().norm()
    # One unit of the last printed digit: 0.0950565 is printed as 0.09505. Everything before the norm is deterministic.
    assert abs(error.item() - published) <= 1e-5


@pytest.mark.parametrize("spec, everything, inside", [(SR8, 0.99599, 0.99937), (SR24, 0.99654, 1.00002)])
def test_stochastic_rounding_has_the_published_gain(spec, everything, inside):
    """gain = <E[q], v> / <v, v>, v scaled into the range of E2M1.

    E[q] of an element is the mean of 16 roundings whose noise is 1/16 of its range apart, from where Philox begins:
    each is uniform, so the mean is unbiased, but 13 times closer to E[q] than independent draws would get. The standard
    error of the ratio is sqrt(sum (v (q - gain v))^2) / sum v^2. The table came from a draw of its own whose size is
    not given: say as good as this one, hence twice the variance; plus half a unit of its last digit. At 5 sigma that is
    below 5e-4 (3e-4 inside the range), and 8 bits are 6.5e-4 from 24.
    """
    x = normal(512, 512)
    bits = 8 if spec is SR8 else 32
    levels = 2 ** min(bits, 24)
    noise = random_ints(512, 512, bits, Key(0).words()).to(torch.int32)
    q = quantize(x, ROW)
    scale = (q.scale.float() * q.global_scale)[:, None, :, None]
    v = (x.float().view(512, 1, -1, 16) / scale).view(512, 512)
    rounded = [FORMATS["e2m1"].round(v, spec.rounding, (noise + k * levels // 16) % levels).double() for k in range(16)]
    mean, v = sum(rounded) / 16, v.double()
    for what, mask, published, most in (
        ("all elements", v.abs() < math.inf, everything, 5e-4),
        ("|v| <= 6", v.abs() <= 6, inside, 3e-4),
    ):
        a, b = mean[mask], v[mask]
        gain = ((a * b).sum() / (b * b).sum()).item()
        error = ((b * (a - gain * b)).square().sum().sqrt() / (b * b).sum()).item()
        bound = 5 * 2**0.5 * error + 5e-6
        assert bound < most, f"{what}: the sample is too small to tell, bound {bound:.1e}"
        assert abs(gain - published) < bound, f"{what}: gain {gain:.5f}, published {published} +- {bound:.1e}"


def test_one_stochastic_draw_has_the_published_error():
    x = normal(512, 512, seed=1234).float()
    error = (quantize(x, SR8, Key(0)).dequantize() - x).norm() / x.norm()
    assert abs(error.item() - 0.138) < 1e-3, "published to three digits"


# --- an independent version in NumPy ---


def oracle(x: np.ndarray, block: tuple[int, int], order: str) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """fp32 [R, K], finite -> codes [R, K], scale bytes [R / b0, K / b1], S_dec; one block at a time."""
    one, six, top = np.float32(1), np.float32(6), np.finfo(np.float32).max
    rows, columns = x.shape[0] // block[0], x.shape[1] // block[1]
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((rows, columns), np.uint8)
    with np.errstate(all="ignore"):
        amax = np.abs(x).max()
        s_enc = one if amax == 0 else min(np.float32(2688) / amax, top)
        s_dec = one / s_enc
        for i in range(rows):
            for j in range(columns):
                place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                bmax = np.abs(x[place]).max()
                s = bmax * (s_enc * (one / six)) if order == "g2" else bmax / six * s_enc
                s8 = np.float32(min(s, np.float32(448))).astype(ml_dtypes.float8_e4m3fn)
                enc = min(one / (s8.astype(np.float32) * s_dec), top)
                v = np.clip(x[place] * enc, -six, six)
                assert v.dtype == np.float32 and s.dtype == np.float32 and enc.dtype == np.float32
                codes[place] = v.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
                scales[i, j] = s8.view(np.uint8)
    return codes, scales, s_dec


def compare_with_oracle(x: np.ndarray) -> None:
    for block in ((1, 16), (16, 16)):
        for order in ("g2", "g1"):
            codes, scales, s_dec = oracle(x, block, order)
            q = quantize(torch.from_numpy(x), QuantSpec(block=block, scale=Scale(order=order)))
            what = f"{block} {order}"
            assert_same_bits(q.global_scale, torch.tensor(s_dec), f"{what}: global scale")
            assert_same_bits(q.scale_codes, torch.from_numpy(scales), f"{what}: scales")
            assert_same_bits(q.codes(), torch.from_numpy(codes), f"{what}: codes")


@settings(max_examples=25, deadline=None)
@given(
    exponents=hnp.arrays(np.int64, (16, 3), elements=st.integers(0, 254)),
    spread=st.sampled_from([0, 1, 4, 30]),
    seed=st.integers(0, 2**31 - 1),
    bf16=st.booleans(),
)
def test_equal_to_an_independent_version_on_any_exponents(exponents, spread, seed, bf16):
    """A biased exponent for every 1x16 block, 0 being the subnormals, and random significands and signs around it."""
    rng = np.random.default_rng(seed)
    e = np.repeat(exponents, 16, 1) - rng.integers(0, spread + 1, (16, 48))
    bits = np.clip(e, 0, 254) << 23 | rng.integers(0, 2**23, (16, 48)) | rng.integers(0, 2, (16, 48)) << 31
    if bf16:
        bits &= 0xFFFF0000
    x = bits.astype(np.uint32).view(np.float32)
    x[rng.random(x.shape) < 0.05] = -0.0
    compare_with_oracle(x)


@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.uint32, (16, 32), elements=st.integers(0, 2**32 - 1)))
def test_equal_to_an_independent_version_on_any_bits(bits):
    x = bits.view(np.float32)
    compare_with_oracle(np.where(np.isfinite(x), x, np.float32(0)))


@pytest.mark.parametrize("top", [1.0, 1504.0, 2.0**-100, 2.0**100])
def test_equal_to_an_independent_version_at_scale_ties(top):
    """Block maxima at and next to where the E4M3 scale rounds up: all that g1 and g2 can disagree on."""
    e4m3 = np.unique(np.abs(np.arange(127).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)))
    ties = (e4m3[:-1] + e4m3[1:]) / 2 / 448 * top
    ties = ties.astype(np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    x = np.zeros((len(near) // 16 * 16, 32), np.float32)
    x[:, 16] = near[: len(x)]
    x[:, 17:] = x[:, 16:17] * np.linspace(-1, 1, 15, dtype=np.float32)
    x[0, 0] = top
    compare_with_oracle(x)


# --- special values (README: nothing is laundered) ---


def test_all_zero():
    x = torch.zeros(16, 32)
    x[3, 5] = -0.0
    for spec in (ROW, SQUARE):
        q = quantize(x, spec)
        assert q.global_scale.item() == 1.0 and not q.scale_codes.any()
        expected = torch.zeros(16, 32, dtype=torch.uint8)
        expected[3, 5] = 8
        assert_same_bits(q.codes(), expected, "codes of zeros")
        assert_same_bits(q.dequantize(), x, "zeros, one of them negative")


def test_zero_block_beside_others():
    x = normal(2, 48)
    x[0, 16:32] = 0
    x[0, 20] = -0.0
    q = quantize(x, ROW)
    assert q.scale_codes[0, 1] == 0 and q.codes()[0, 16:32].tolist() == [0, 0, 0, 0, 8] + [0] * 11
    assert_same_bits(q.dequantize()[0, 16:32], x[0, 16:32].float(), "the zero block")
    rest = torch.cat([x[:, :16], x[:, 32:]], 1)
    assert_same_bits(q.codes()[:, list(range(16)) + list(range(32, 48))], quantize(rest, ROW).codes(), "the others")


def test_a_block_whose_scale_rounds_to_zero_saturates_and_decodes_to_zero():
    x = torch.zeros(1, 32)
    x[0, 0] = 1.0
    x[0, 16:20] = torch.tensor([2.0**-20, -(2.0**-20), 2.0**-140, -(2.0**-140)])  # s = 448 / 2^20 < 2^-10
    q = quantize(x, ROW)
    assert q.scale_codes.tolist() == [[0x7E, 0]]
    # enc = FLT_MAX: 2^-20 FLT_MAX is far above 6, and 2^-140 FLT_MAX far below 0.25.
    assert q.codes()[0, 16:].tolist() == [7, 15, 0, 8] + [0] * 12
    assert_same_bits(q.dequantize()[0, 16:], torch.tensor([0.0, -0.0, 0.0, -0.0] + [0.0] * 12), "decoded")


def test_the_smallest_scale_that_stays():
    """s ties at 2^-10 between 0 and the smallest E4M3 subnormal, and goes to 0; a bit above it goes up."""
    for ratio, code in ((1.0, 0), (1 + 2.0**-20, 1)):
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 16] = 2688.0, 6 * 2.0**-10 * ratio  # S_enc = 1, so s = bmax / 6
        assert quantize(x, ROW_G1).scale_codes.tolist() == [[0x7E, code]], f"ratio {ratio}"


@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-133, 2.0**-126, 2.0**-117, 1e-38], ids=str)
def test_subnormal_operands(amax):
    """S_enc stops at FLT_MAX, S_dec is a subnormal itself: a machine that flushes them would give zeros or NaN."""
    x = torch.zeros(16, 32)
    x[0, 0], x[1, 1] = amax, -amax / 2
    for spec in (ROW, ROW_G1, SQUARE):
        q = quantize(x, spec)
        codes, scales, s_dec = oracle(x.numpy(), spec.block, spec.scale.order)
        assert_same_bits(q.codes(), torch.from_numpy(codes), f"codes of {spec.short()}")
        assert_same_bits(q.scale_codes, torch.from_numpy(scales), f"scales of {spec.short()}")
        assert q.global_scale.item() == s_dec > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_finite_values(dtype):
    x = torch.full((16, 32), torch.finfo(dtype).max, dtype=dtype)
    x[:, ::2] *= -1
    for spec in (ROW, ROW_G1, SQUARE, SR8):
        value = quantize(x, spec, key_for(spec)).dequantize()
        assert value.isfinite().all(), spec.short()
        # code * scale = 6 * 448 exactly, and S_dec is within two roundings of amax / 2688, the product one more.
        error = ((value.double() - x.double()) / x.double()).abs().max().item()
        assert error <= 3.01 * 2**-24, f"{spec.short()}: relative error {error}"


@every_spec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nonfinite_element_makes_the_tensor_nan(spec, bad, dtype):
    for place in ((0, 0), (17, 33), (31, 63)):
        x = normal(32, 64, dtype=dtype)
        x[place] = bad
        for view in (x, x.t()):
            q = quantize(view, spec, key_for(spec))
            values, scale = quantized_values(view, spec, key_for(spec))
            assert q.dequantize().isnan().all(), f"{bad} at {place}: codes"
            assert (values.float() * scale).isnan().all(), f"{bad} at {place}: values"
            assert scale.isnan() and q.scale.float().isnan().all()


@pytest.mark.parametrize("spec", [ROW, SQUARE, SR8], ids=QuantSpec.short)
def test_negative_zero_and_small_negatives_keep_their_sign(spec):
    x = normal(16, 32).float()
    x[0, 3], x[0, 4] = -0.0, -1e-30
    q = quantize(x, spec, key_for(spec))
    assert q.codes()[0, 3:5].tolist() == [8, 8]
    assert_same_bits(q.dequantize()[0, 3:5], torch.tensor([-0.0, -0.0]), "decoded")
    assert (q.codes() >> 3 == x.signbit()).all(), "a sign was lost"


# --- layout ---


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_strides_do_not_matter(spec, dtype):
    big = normal(96, 192, seed=5, dtype=dtype)
    views = {"transposed": big.t(), "every second column": big[:, ::2], "every third row": big[::3],
             "a corner": big[32:64, 64:128], "its transpose": big[32:64, 64:128].t(),
             "a broadcast row": big[:1, :64].expand(32, 64), "flipped": big.flip(0).t()[::2]}  # fmt: skip
    for what, x in views.items():
        ours = quantize(x, spec, key_for(spec))
        copy = quantize(x.clone(memory_format=torch.contiguous_format), spec, key_for(spec))
        assert_same_bits(ours.codes(), copy.codes(), f"codes, {what}")
        assert_same_bits(ours.packed(), copy.packed(), f"packed, {what}")
        assert_same_bits(ours.scale_codes, copy.scale_codes, f"scales, {what}")
        assert_same_bits(ours.global_scale, copy.global_scale, f"global scale, {what}")
        assert_same_bits(ours.dequantize(), copy.dequantize(), f"dequantised, {what}")


@every_spec
def test_values_are_the_decoded_codes(spec):
    """quantized_values never sees a code, decode nothing else, and both are BF16: exact, so the same bits as
    code * scale in fp64."""
    x = normal(64, 96, seed=6)
    x[:, :16] = 0
    x[5, 16:32], x[0, 0] = 1e-9, -0.0
    for view in (x, x.t(), x.float(), x.float().t()):
        q = quantize(view, spec, key_for(spec))
        values, scale = quantized_values(view, spec, key_for(spec))
        decoded, decoded_scale = decode(q)
        assert_same_bits(values, decoded, "values against decoded codes")
        assert_same_bits(scale, decoded_scale, "global scale")
        codes = FORMATS[spec.format].decode(q.codes()).double()
        repeated = q.scale.float().double().repeat_interleave(spec.block[0], 0).repeat_interleave(spec.block[1], 1)
        assert_same_bits(values.double(), codes * repeated, "values against code * scale in fp64")


@every_spec
def test_dequantize_is_the_documented_formula(spec):
    q = quantize(normal(32, 64, seed=7), spec, key_for(spec))
    codes = FORMATS[spec.format].decode(q.codes()).numpy()
    scale = q.scale.float().numpy().repeat(spec.block[0], 0).repeat(spec.block[1], 1)
    expected = torch.from_numpy((codes * scale) * q.global_scale.numpy())
    assert_same_bits(q.dequantize(), expected, "fl(fl(code * scale) * global scale)")
    assert_same_bits(q.dequantize(torch.bfloat16), expected.bfloat16(), "in BF16")


@pytest.mark.parametrize("spec", [SQUARE, g1(SQUARE), QuantSpec(block=(16, 16), format="e4m3")])
def test_codes_of_a_transpose_are_the_transposed_codes(spec):
    assert spec.transposes
    w = normal(48, 96, seed=8, dtype=torch.float32)
    q, t = quantize(w, spec), quantize(w.t().contiguous(), spec)
    assert_same_bits(t.codes(), q.codes().t(), "codes")
    assert_same_bits(t.scale_codes, q.scale_codes.t(), "scales")
    assert_same_bits(t.dequantize(), q.dequantize().t(), "values")


def test_only_square_blocks_transpose():
    assert not any(spec.transposes for spec in (ROW, RHT, SR8, QuantSpec(block=(16, 16), hadamard=16)))


@every_spec
def test_leading_axes_are_rows(spec):
    x = normal(2, 16, 64, seed=9)
    q, flat = quantize(x, spec, key_for(spec)), quantize(x.view(32, 64), spec, key_for(spec))
    assert q.codes().shape == q.dequantize().shape == x.shape and q.shape == (2, 16, 64)
    assert_same_bits(q.codes(), flat.codes().view(2, 16, 64), "codes")
    assert_same_bits(q.packed(), flat.packed().view(2, 16, -1), "packed")
    assert_same_bits(q.scale_codes, flat.scale_codes, "scales")


@every_spec
def test_packing(spec):
    q = quantize(normal(32, 64).t(), spec, key_for(spec))
    codes, packed = q.codes(), q.packed()
    assert codes.dtype == packed.dtype == torch.uint8 and int(codes.max()) < 2 ** FORMATS[spec.format].bits
    four_bits = FORMATS[spec.format].bits == 4
    expected = codes[:, 0::2] + 16 * codes[:, 1::2] if four_bits else codes
    assert_same_bits(packed, expected, "two codes a byte, even index low" if four_bits else "one code a byte")
    assert q.nbytes() == packed.numel() + 64 * 32 // (spec.block[0] * spec.block[1]) + 4


@pytest.mark.parametrize("spec", [ROW, SQUARE, SR8], ids=QuantSpec.short)
def test_fp16_and_bf16_are_quantised_as_their_fp32_values(spec):
    for dtype in (torch.bfloat16, torch.float16):
        x = normal(32, 64, seed=10, dtype=dtype)
        ours, wide = quantize(x, spec, key_for(spec)), quantize(x.float(), spec, key_for(spec))
        assert_same_bits(ours.codes(), wide.codes(), f"codes from {dtype}")
        assert_same_bits(ours.global_scale, wide.global_scale, f"global scale from {dtype}")


@pytest.mark.parametrize("spec", [ROW, SQUARE], ids=QuantSpec.short)
def test_blocks_know_nothing_of_each_other_but_amax(spec):
    x = normal(64, 64, seed=11)
    x[::16, ::16] = 5.0  # every 16x16 tile has the amax of the whole
    whole = quantize(x, spec)
    for i, j in ((0, 0), (16, 48), (48, 32)):
        part = quantize(x[i : i + 16, j : j + 16], spec)
        assert_same_bits(whole.codes()[i : i + 16, j : j + 16], part.codes(), f"tile at {i}, {j}")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) if spec is ROW else torch.arange(63, -1, -1)
    assert_same_bits(quantize(x[order], spec).codes(), whole.codes()[order], "rows in another order")


# --- randomness ---


@pytest.mark.parametrize("spec", [s for s in ALL if s.keyed], ids=QuantSpec.short)
def test_noise_is_a_function_of_the_key(spec):
    x = normal(32, 64, seed=12)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    key = Key(1, 2, 3, 4)
    first = quantize(x, spec, key)
    assert_same_bits(quantize(x, spec, key).codes(), first.codes(), "the same key again")
    for other in (key.at(seed=2), key.at(index=3), key.at(layer=4), key.at(use=5)):
        assert not torch.equal(quantize(x, spec, other).codes(), first.codes()), f"{other} gives the codes of {key}"
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all(), "a global generator moved"


def test_noise_is_numbered_by_element():
    """Element (r, i) takes number r K + i, also of a transposed view: so the first rows of a longer operand draw what
    they draw alone (their amax being the same)."""
    x = normal(64, 64, seed=13)
    x[0, 0] = 9.0
    for spec in (SR8, SR24):
        whole, part = quantize(x, spec, Key(4)), quantize(x[:16], spec, Key(4))
        assert_same_bits(whole.codes()[:16], part.codes(), spec.short())


def test_sign_key_is_shared_and_defaults_to_use_plus_16():
    spec = QuantSpec(hadamard=128, signs="fresh")
    x, key = normal(4, 128, seed=14), Key(1, 2, 3, 4)
    default = quantize(x, spec, key)
    assert_same_bits(quantize(x, spec, key, key.at(use=20)).codes(), default.codes(), "use + 16")
    other = quantize(x, spec, key.at(use=5), key.at(use=20))
    assert_same_bits(other.codes(), default.codes(), "the sign key decides the signs, alone")
    assert not torch.equal(quantize(x, spec, key, key.at(use=21)).codes(), default.codes())


def test_stochastic_codes_are_next_to_the_scaled_value():
    x = normal(64, 64, seed=15, dtype=torch.float32)
    low, nearest = (quantize(x, s).codes() & 7 for s in (QuantSpec(rounding="zero"), ROW))
    assert ((nearest == low) | (nearest == low + 1)).all()
    for spec in (SR8, SR24):
        q = quantize(x, spec, Key(0))
        assert_same_bits(q.scale_codes, quantize(x, ROW).scale_codes, "block scales are never rounded stochastically")
        step = (q.codes() & 7).int() - low.int()
        assert set(step.unique().tolist()) == {0, 1}, spec.short()


# --- messages ---


@pytest.mark.parametrize(
    "shape, spec, size, multiple",
    [
        ((4, 24), ROW, "contraction, 24", 16),
        ((4, 0), ROW, "contraction, 0", 16),
        ((24, 32), SQUARE, "rows, 24", 16),
        ((3, 5, 16), SQUARE, "rows, 15", 16),
        ((4, 48), QuantSpec(hadamard=32), "contraction, 48", 32),
        ((4, 8), QuantSpec(block=(1, 2), rounding="stochastic8"), "contraction, 8", 16),
    ],
)
def test_sizes_that_cannot_be_cut_say_so(shape, spec, size, multiple):
    message = re.escape(f": its {size}, must be a multiple of {multiple} for {spec.short()}")
    with pytest.raises(ValueError, match=r"^operand of shape \[.*" + message):
        quantize(torch.zeros(shape), spec, Key(0))
    with pytest.raises(ValueError, match="^" + re.escape(f"head fprop.x of shape {list(shape)}") + message):
        check(shape, spec, "head fprop.x")


@pytest.mark.parametrize("spec", [SR8, SR24, QuantSpec(hadamard=16, signs="fresh")], ids=QuantSpec.short)
def test_a_missing_key_says_so(spec):
    message = re.escape(f"{spec.short()} draws random bits: pass key=quant.random.Key")
    for function in (quantize, quantized_values):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(16, 32), spec)


# --- checkpoints ---


@every_spec
def test_state_round_trip(spec, tmp_path):
    q = quantize(normal(32, 64, seed=16).t(), spec, key_for(spec))
    tensors, description = q.state("blocks.0.w")
    safetensors.torch.save_file(tensors, tmp_path / "q.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "q.safetensors")
    assert set(loaded) == {"blocks.0.w.codes", "blocks.0.w.scale", "blocks.0.w.global_scale"}
    back = QTensor.from_state("blocks.0.w", loaded, description)
    assert back.spec == spec and back.shape == q.shape
    for what in ("packed_codes", "scale_codes", "outer_codes"):
        assert_same_bits(getattr(back, what), getattr(q, what), what)
    assert_same_bits(back.dequantize(), q.dequantize(), "values")
    assert_same_bits(decode(back)[0], decode(q)[0], "values for a GEMM")


def test_a_state_survives_json():
    q = quantize(normal(32, 64), QuantSpec(block=(16, 16), scale=Scale(order="g1")))
    tensors, description = q.state("w")
    back = QTensor.from_state("w", tensors, json.loads(json.dumps(description)))
    assert back.spec == q.spec and back.shape == q.shape
