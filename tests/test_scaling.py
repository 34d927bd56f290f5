"""quant/scaling.py and the specs it serves: E8M0 scales are those of torchao in all four modes and of two documented
arithmetics written here in fp64; other scales are those of a plain fp64 reading; what is special stays special.

NVFP4's scales have their golden values in tests/test_quantize.py.
"""

import logging
import math

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from quant import QuantSpec, Scale, quantize
from quant.formats import FORMATS, code_dtype
from quant.gemm import Operand, gemm
from quant.quantize import decoded_values, quantized_values
from quant.random import Key
from quant.scaling import inverse_power, power_of_two

MX = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
RULES = ["floor", "ceil", "rceil", "even"]


def mx(format: str, rule: str, **more) -> QuantSpec:
    return QuantSpec(format, (1, 32), Scale("e8m0", rule=rule), **more)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> dict[str, Tensor]:
    x = normal(64, 256)
    wide = torch.exp(3 * normal(64, 256, seed=1)) * x.sign()
    step = normal(64, 256, seed=2).bfloat16().float()
    powers = 2.0 ** torch.randint(-100, 100, (64, 8), generator=torch.Generator().manual_seed(3)).repeat_interleave(32, 1)
    # every significand of BF16 as the largest of a block, all else below it
    tops = (1 + torch.arange(128) / 128).repeat(4).reshape(64, 8, 1)
    edges = torch.cat([tops, normal(64, 8, 31).clamp(-1, 1)], 2).reshape(64, 256)
    return {"normal": x, "lognormal": wide, "bf16": step, "every binade": x * powers, "small": x * 1e-30, "tops": edges}


# --- E8M0 ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", MX)
def test_equal_to_torchao(format, rule):
    logging.disable(logging.WARNING)  # about kernels for GPUs that it cannot load here
    try:
        from torchao.prototype.mx_formats import mx_tensor
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
    except ImportError as error:
        pytest.skip(f"torchao cannot be imported here: {error}")
    finally:
        logging.disable(logging.NOTSET)
    kind = {"e2m3": mx_tensor.DTYPE_FP6_E2M3, "e3m2": mx_tensor.DTYPE_FP6_E3M2, "e2m1": torch.float4_e2m1fn_x2}
    kind = kind.get(format, FORMATS[format].torch_dtype)
    for what, x in data().items():
        for dtype in (torch.float32, torch.bfloat16):
            x = x.to(dtype)
            scales, theirs = mx_tensor.to_mx(x, kind, 32, ScaleCalculationMode(rule))
            q = quantize(x, mx(format, rule))
            assert_same_bits(q.scale, scales.view(torch.uint8), f"scales of {what}, {dtype}")
            assert_same_bits(q.packed(), theirs.view(torch.uint8), f"codes of {what}, {dtype}")


def exponents(a: np.ndarray, format: str, rule: str) -> np.ndarray:
    """OCP MX and its variants, by logarithm in fp64, for amaxes not within a rounding error of a threshold."""
    fmt = FORMATS[format]
    emax, m = math.floor(math.log2(fmt.max)), fmt.significant_bits - 1
    if rule == "rceil":
        return np.ceil(np.log2(a / fmt.max))
    if rule == "ceil":
        return np.ceil(np.log2(a)) - emax
    if rule == "even":
        exponent = np.floor(np.log2(a))
        a = np.floor(a / 2.0**exponent * 2.0**m + 0.5) / 2.0**m * 2.0**exponent
    return np.floor(np.log2(a)) - emax


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", [*MX, "int8", "int4", "e5m1", "posit8-es1"])
def test_every_significand_of_an_amax(format, rule):
    """All 2^23, in one binade, against the definitions; then that other binades only shift the code."""
    if rule == "even" and format == "posit8-es1":
        pytest.skip("a posit has no number of mantissa bits")
    a = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    spec = QuantSpec(format, (1, 32), Scale("e8m0", rule=rule))
    from quant.scaling import threshold

    code = power_of_two(a, *threshold(spec))
    expected = exponents(a.double().numpy(), format, rule) + 127
    assert_same_bits(code, torch.from_numpy(expected).to(torch.int32), f"{format}, {rule}")
    some = a[:: 2**9 + 1]
    for k in (-149, -140, -126, -125, -30, 30, 126, 127):
        shifted = (some.double() * 2.0**k).float()
        whole = shifted.double() == some.double() * 2.0**k  # where a subnormal number can hold it
        expected = (code[:: 2**9 + 1] + k).clamp(0, 254)
        ours = power_of_two(shifted, *threshold(spec))
        assert_same_bits(ours[whole], expected[whole], f"{format}, {rule}, 2^{k}")


def test_inverse_power():
    codes = torch.arange(256, dtype=torch.int32)
    expected = 1 / FORMATS["e8m0"].values().double()
    assert_same_bits(inverse_power(codes), expected.float(), "1 / 2^k")
    assert inverse_power(codes[254:255]).item() == 2.0**-127, "an fp32 subnormal"


@pytest.mark.parametrize("rounding", ["away", "nearest", "zero"])
@pytest.mark.parametrize("format", [*MX, "int8"])
def test_the_documented_arithmetic_of_microxcaling(format, rounding):
    """arXiv:2310.10537's library: floor of the exponent, x / X, then to the element at its own exponent; half away from zero
    is its default. In fp64, where all of it is exact."""
    fmt = FORMATS[format]
    emax, bits = math.floor(math.log2(fmt.max)), fmt.significant_bits - (not fmt.integer)
    for what, x in data().items():
        x = x.bfloat16()
        A = x.double().numpy().reshape(-1, 32)
        shared = np.floor(np.log2(np.abs(A).max(1, keepdims=True))) - emax
        v = A / 2.0 ** np.maximum(shared, -127)
        if fmt.integer:
            step = np.full_like(v, 2.0**-6)
        else:
            own = np.floor(np.log2(np.abs(v) + (v == 0)))
            step = 2.0 ** (np.maximum(own, fmt.emin) - bits)
        quanta = np.abs(v) / step
        quanta = {"away": np.floor(quanta + 0.5), "nearest": np.rint(quanta), "zero": np.floor(quanta)}[rounding]
        v = np.sign(v) * np.minimum(quanta * step, fmt.max) * 2.0 ** np.maximum(shared, -127)
        ours = quantize(x, mx(format, "floor", rounding=rounding)).dequantize()
        expected = torch.from_numpy(v.reshape(x.shape)).float()
        assert torch.equal(ours, expected), f"{what}: {int((ours != expected).sum())} elements differ"


def test_mxfp8_of_transformer_engine():
    """byte = e8m0 of fl(amax * fl(1/448)), rounded up; element fl(x * 2^(127 - byte)), nearest, saturating."""
    for what, x in data().items():
        a = x.reshape(-1, 32).abs().amax(1)
        descale = a * torch.tensor(1 / 448)
        bits = descale.view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        up = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
        byte = (exponent + (up & (exponent != 254))).to(torch.uint8)
        q = quantize(x, mx("e4m3", "rceil"))
        assert_same_bits(q.scale.flatten(), byte, f"bytes of {what}")
        scaled = (x.reshape(-1, 32).double() * 2.0 ** (127 - byte.double())[:, None]).clamp(-448, 448).float()
        assert_same_bits(q.codes().reshape(-1, 32), scaled.to(torch.float8_e4m3fn).view(torch.uint8), f"codes of {what}")


def test_special_values_of_e8m0():
    x = torch.zeros(8, 32)
    x[1, 3], x[2, 3], x[3, 3] = math.nan, math.inf, -math.inf
    x[4, 3] = 2.0**-140
    x[5, 3], x[6, :] = 1.5 * 2.0**127, -0.0
    x[1:4, 5] = 1.0
    for rule in RULES:
        q = quantize(x, mx("e4m3", rule))
        bytes = q.scale.flatten().tolist()
        assert bytes[0] == bytes[4] == bytes[6] == bytes[7] == 0, "zeros and subnormals: 2^-127"
        assert bytes[1:4] == [255] * 3, "NaN and Inf make their block NaN"
        assert bytes[5] == {"floor": 246, "ceil": 247, "rceil": 246, "even": 246}[rule]
        values = q.dequantize()
        assert values[1:4].isnan().all() and values[[0, 4, 5, 6, 7]].isfinite().all()
        assert_same_bits(values[6], x[6], "-0.0")
    huge = quantize(torch.full((1, 32), torch.finfo(torch.float32).max), QuantSpec("int8", (1, 32), Scale("e8m0", rule="ceil")))
    assert huge.scale.item() == 254, "2^128 does not exist: clamped, and the elements saturate"


# --- other scales, each against a plain reading in numpy fp32 ---


def blocks(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    b0, b1 = (n if b == -1 else b for b, n in zip(block, x.shape, strict=True))
    return x.reshape(x.shape[0] // b0, b0, x.shape[1] // b1, b1)


def plain(x: Tensor, spec: QuantSpec) -> Tensor:
    """value = code * scale * outer with everything in fp32, block by block: no code of ours but Format.encode and decode."""
    s, fmt, one = spec.scale, spec.element, np.float32(1)
    b = blocks(x.numpy(), spec.block)
    a = np.abs(b).max((1, 3), keepdims=True)
    target = np.float32(s.target or fmt.max)
    outer = one
    with np.errstate(divide="ignore", over="ignore"):
        if s.format == "fp32":
            enc = np.where(a == 0, one, target / a)
            dec = one / enc
        else:
            scale_format = FORMATS[s.format]
            s_enc = one
            if s.outer != "none":
                axes = {"tensor": (0, 2), "row": (2,)}.get(s.outer)
                if axes:
                    top = a.max(axes, keepdims=True)
                else:
                    n = int(s.outer[2:]) // spec.block[1]
                    top = a.reshape(a.shape[0], 1, -1, n, 1).max(3).repeat(n, 2)
                full = np.float32(float(s.target or fmt.max) * (s.outer_target or scale_format.max))
                s_enc = np.where(top == 0, one, full / top)
                outer = one / s_enc
            wanted = torch.from_numpy(np.asarray(a * (s_enc * np.float32(1 / target)), dtype=np.float32))
            dec = scale_format.decode(scale_format.encode(wanted)).numpy()
            enc = np.minimum(one / (dec * outer), np.finfo(np.float32).max)
        scaled = torch.from_numpy((b * enc).astype(np.float32))
    codes = fmt.decode(fmt.encode(scaled)).numpy()
    return torch.from_numpy(((codes * dec) * outer).astype(np.float32).reshape(x.shape))


SPECS = {
    "ue5m3": QuantSpec("e2m1", (1, 16), Scale("e5m3")),
    "ue5m3 of AMD": QuantSpec("e2m1", (1, 16), Scale("e5m3-amd")),
    "bf16 scales": QuantSpec("int4", (1, 32), Scale("bf16")),
    "fp8 tensorwise": QuantSpec("e5m2", (-1, -1), Scale("fp32")),
    "fp8 128x128": QuantSpec("e4m3", (128, 128), Scale("fp32")),
    "int8 per vector": QuantSpec("int8", (1, -1), Scale("fp32")),
    "nvfp4 per row": QuantSpec("e2m1", (1, 16), Scale("e4m3", "row")),
    "nvfp4 per 1x128": QuantSpec("e2m1", (1, 16), Scale("e4m3", "1x128")),
    "nvfp4, 256": QuantSpec("e2m1", (1, 16), Scale("e4m3", "tensor", outer_target=256)),
    "nvfp4, static 4": QuantSpec("e2m1", (1, 16), Scale("e4m3", "tensor", target=4)),
    "e4m3 alone": QuantSpec("e3m2", (1, 32), Scale("e4m3", "none")),
    "16x16 under rows": QuantSpec("e2m3", (16, 16), Scale("e4m3", "row")),
    "nf4": QuantSpec("nf4", (1, 64), Scale("fp32")),
    "posit": QuantSpec("posit8-es1", (-1, -1), Scale("fp32", target=1.0)),
    "e2m5 in 2x64": QuantSpec("e2m5", (2, 64), Scale("e5m2")),
}  # fmt: skip
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MORE = {
    **SPECS,
    "mxfp8": mx("e4m3", "rceil"),
    "mxint8": mx("int8", "floor"),
    "dfp16": QuantSpec("int16", (-1, -1), Scale("e8m0", rule="ceil")),
    "mxfp4, 3/4, sr": QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75), "stochastic"),
    "quest": QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", statistic="std", target=2.05305), hadamard=32),
    "e8m3 unscaled": QuantSpec("e8m3", (1, 16), Scale("none")),
    "e8m10 unscaled": QuantSpec("e8m10", (1, 16), Scale("none")),
    "bf16 unscaled": QuantSpec("bf16", (1, 16), Scale("none"), "stochastic16"),
    "3 bits, sr 5": QuantSpec("int3", (1, -1), Scale("fp32"), "stochastic5"),
}
more = pytest.mark.parametrize("spec", MORE.values(), ids=MORE)


@specs
def test_scales_are_those_of_a_plain_reading(spec):
    for what, x in data().items():
        x = x.repeat(2, 1)
        # With fp32's tiny numbers divided in numpy, `small` would meet NumPy's own subnormals; all else is the same arithmetic.
        assert_same_bits(quantize(x, spec).dequantize(), plain(x, spec), what)


def key(spec: QuantSpec) -> Key | None:
    return Key(1, 2, 3, 4) if spec.keyed else None


@more
def test_what_a_gemm_multiplies_is_the_quantised_value(spec):
    """quantized_values never sees a code, decoded_values nothing else; value times factor is what dequantize says."""
    x = normal(128, 256).bfloat16()
    x[7, 32:64] = 0
    x[9, 5] = -0.0
    for view in (x, x.t(), x[:, :128]):
        q = quantize(view, spec, key(spec))
        values, factor = quantized_values(view, spec, key(spec))
        again, again_factor = decoded_values(q)
        assert_same_bits(values, again, "values")
        assert (factor is None) == (again_factor is None)
        assert values.dtype == (torch.bfloat16 if spec.exact else torch.float32)
        whole = values.float()
        if factor is not None:
            assert_same_bits(factor, again_factor, "factor")
            assert factor.shape in ((), (view.shape[0], 1))
            whole = whole * factor
        assert_same_bits(whole, q.dequantize(), "value")
        copy = quantize(view.clone(memory_format=torch.contiguous_format), spec, key(spec))
        assert_same_bits(q.codes(), copy.codes(), "codes wherever it lies in memory")
        assert_same_bits(q.dequantize(), copy.dequantize(), "values wherever it lies in memory")


@more
def test_a_checkpoint_gives_it_back(spec):
    from quant import QTensor

    q = quantize(normal(128, 256), spec, key(spec))
    tensors, description = q.state("w")
    back = QTensor.from_state("w", tensors, description)
    assert back.spec == spec and q.nbytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    assert_same_bits(back.dequantize(), q.dequantize(), "value")
    assert q.codes().dtype == code_dtype(spec.element.bits)


@more
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nowhere_finite_again(spec, bad):
    x = normal(128, 256)
    x[5, 70] = bad
    if spec.hadamard:
        spec = QuantSpec(spec.format, spec.block, spec.scale)
    q = quantize(x, spec, key(spec))
    value = q.dequantize()
    values, factor = quantized_values(x, spec, key(spec))
    assert_same_bits(values.float() * (1 if factor is None else factor), value, "value")
    assert not value[5, 70].isfinite()
    b0, b1 = spec.blocks_of(*x.shape)
    if spec.scale.format == "none":
        b0 = b1 = 1
    if spec.scale.outer == "tensor":
        b0, b1 = x.shape
    elif spec.scale.outer == "row":
        b1 = x.shape[1]
    elif spec.scale.group:
        b1 = spec.scale.group
    spanned = torch.zeros(x.shape, dtype=torch.bool)
    r, c = 5 // b0 * b0, 70 // b1 * b1
    spanned[r : r + b0, c : c + b1] = True
    assert (value.isfinite() == ~spanned).all(), "more, or less, than its scale spans"


@more
def test_a_gemm_of_it(spec):
    """Against fp64 over the dequantised operands, within fp32's sum of 256 terms or BF16's two roundings of the sum."""
    if spec.keyed or spec.hadamard:
        spec = QuantSpec(spec.format, spec.block, spec.scale)
    x, w = normal(128, 256).bfloat16(), normal(256, 256, seed=1).bfloat16()
    a, b = (quantize(t, spec).dequantize().double() for t in (x, w))
    operands = [Operand(*quantized_values(t, spec)) for t in (x, w)]
    for mode, relative in (("fp32", 256 * 2.0**-24), ("bf16", 256 * 2.0**-24 + 2 * 2.0**-8)):
        y = gemm(*operands, torch.float32, mode)
        error = (y.double() - a @ b.T).abs()
        assert (error <= relative * (a.abs() @ b.abs().T)).all(), f"{mode}: {float(error.max())}"


def test_exactness_is_what_it_claims():
    """Where a spec says that code * scale is a BF16 number, it is, of every code and scale."""
    for spec in MORE.values():
        if spec.scale.format in ("none", "fp32") or spec.scale.group:
            continue
        codes, scales = spec.element.values(), FORMATS[spec.scale.format].values()
        codes, scales = codes[codes.isfinite()], scales[scales.isfinite() & (scales >= 2.0**-60) & (scales <= 2.0**60)]
        product = codes[:, None].double() * (torch.ones(1) if spec.leaves else scales).double()
        assert not spec.exact or (product.bfloat16().double() == product).all(), spec.short()
    exact = {name for name, spec in MORE.items() if spec.exact}
    wide = {"bf16 scales", "fp8 128x128", "nvfp4 per 1x128", "nf4", "dfp16", "e2m5 in 2x64", "e8m10 unscaled"}
    assert exact == {*MORE} - wide


# --- statistics and targets ---


def test_std_is_the_standard_deviation():
    from quant.scaling import statistic

    x = normal(64, 96)
    found = statistic(x.view(64, 1, 3, 32), Scale("e8m0", statistic="std")).flatten()
    expected = x.double().view(64, 3, 32).std(2, correction=0).flatten()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # 32 squares summed in fp32: 6 levels of 2^-24


def test_a_multiplier_of_three_quarters_keeps_floor_from_saturating():
    """arXiv:2502.20586: under floor, E2M1 elements reach up to 8, and 3/4 of that is 6."""
    spec = QuantSpec("e2m1", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75))
    x = normal(64, 256)
    scaled = x / quantize(x, spec).dequantize()
    assert quantize(x, spec).global_scale.item() == pytest.approx(4 / 3, rel=2.0**-23)
    a = x.view(64, 8, 32).abs().amax(2)
    X = quantize(x, spec).scale.float().sub(127).exp2()
    assert (a / X * 0.75 < 6).all() and (a / X > 6).any() and scaled.isfinite().any()


def test_stochastic_rounding_under_an_unbiased_target():
    """NVFP4's E4M3 scale may round down by 1/17, and then the largest elements saturate; a target of 6 * 16/17 leaves room
    (fouroversix' stochastic_unbiased). Mean over 400 draws; the noise of the mean is 1/20 of one rounding step of 0.29 rms."""
    x = normal(64, 64)
    biases = []
    for target in (None, 6 * 16 / 17):
        spec = QuantSpec(scale=Scale(target=target), rounding="stochastic")
        mean = sum(quantize(x, spec, Key(0, i)).dequantize() for i in range(400)) / 400
        block = x.view(64, 4, 16)
        top = block.abs() == block.abs().amax(2, keepdim=True)
        biases.append(float(((mean.view_as(block) - block) * block.sign())[top].mean()))
    assert biases[0] < -0.02 and abs(biases[1]) < 0.01


# --- published constants, on N(0, 1) ---


def rate(spec: QuantSpec, x: Tensor) -> float:
    """-log2 of the relative root mean square error, the bits of an ideal quantiser of a normal variable."""
    e = (quantize(x, spec).dequantize() - x).square().mean() / x.square().mean()
    return float(-0.5 * torch.log2(e))


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(QuantSpec(), 3.394), (QuantSpec(block=(16, 16)), 3.167)],
    ids=["1x16", "16x16"],
)
def test_rates_of_quartet_ii(spec, bits):
    """The table of Quartet II (arXiv:2601.22813): to its three digits, on 2^22 draws, whose rate is good to 5e-4."""
    assert rate(spec, normal(2048, 2048)) == pytest.approx(bits, abs=1.5e-3)


def test_mse_ratio_of_mxfp4_to_nvfp4():
    """HiF4's paper (arXiv:2602.11287) has 1.89 / 1.32 = 1.43; its MXFP4 floors, as OCP does."""
    x = normal(2048, 2048)
    mse = [float((quantize(x, spec).dequantize() - x).square().mean()) for spec in (mx("e2m1", "floor"), QuantSpec())]
    assert mse[0] / mse[1] == pytest.approx(1.45, abs=0.02)


def test_share_of_blocks_that_floor_saturates():
    """16.9 % of blocks of 32 normal numbers for the formats whose top significand is 1.75, 29.7 % for E2M1; 2^17 blocks."""
    x = normal(2048, 2048)
    a = x.view(-1, 32).abs().amax(1)
    for format, share in (("e4m3", 0.169), ("e5m2", 0.169), ("e2m1", 0.297)):
        X = quantize(x, mx(format, "floor")).scale.flatten().float().sub(127).exp2()
        assert float((a / X > FORMATS[format].max).float().mean()) == pytest.approx(share, abs=0.004)
