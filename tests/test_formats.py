"""quant/formats.py: codes and values are those of the published tables, of ml_dtypes where it has the format and of gfloat
elsewhere, for every code; rounding is checked where it decides (every midpoint and its fp32 neighbours, every BF16 number),
in every mode; beyond the largest value it saturates; NaN, Inf and -0.0 do what the docstrings say.
"""

import functools
import math

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo
from helpers import assert_same_bits
from torch import Tensor

from quant.formats import FORMATS, NAMED, Format, table, to_bfloat16
from quant.rounding import ROUNDINGS, random_bits

# Somebody else's implementation of each format: a numpy dtype,
THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3-fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2-fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}


def described(name: str, E: int, M: int, nans=0, signed=True, infinite=False, bias: int | None = None) -> FormatInfo:
    """... or gfloat's description: `nans` codes at the top are no numbers, and one more is Inf if `infinite`."""
    bias = 2 ** (E - 1) - 1 if bias is None else bias
    return FormatInfo(name, E + M + signed, M + 1, bias=bias, is_signed=signed,
                      domain=Domain.Extended if infinite else Domain.Finite, has_nz=signed, num_high_nans=nans,
                      has_subnormals=True, is_twos_complement=False)  # fmt: skip


def integer(bits: int) -> FormatInfo:
    return FormatInfo(f"int{bits}", bits, bits, bias=0, is_signed=True, domain=Domain.Finite, has_nz=False, num_high_nans=0,
                      has_subnormals=True, is_twos_complement=True)  # fmt: skip


DESCRIBED = {
    "e5m3": described("e5m3", 5, 3, nans=8, signed=False),
    "e5m3-amd": described("e5m3-amd", 5, 3, nans=1, signed=False),
    "e8m3": described("e8m3", 8, 3, nans=7, infinite=True),
    **{f"int{n}": integer(n) for n in (2, 3, 4, 8, 16)},
    **{f"e{E}m{M}": described(f"e{E}m{M}", E, M) for E, M in ((1, 2), (2, 0), (2, 5), (3, 3), (5, 1), (5, 10), (6, 9), (7, 2))},
    "e8m1": described("e8m1", 8, 1, nans=1, infinite=True),
    "e8m10": described("e8m10", 8, 10, nans=1023, infinite=True),
    "ue4m4": described("ue4m4", 4, 4, signed=False),
    "e3m4b5": described("e3m4b5", 3, 4, bias=5),
    "ue2m5b-3": described("ue2m5b-3", 2, 5, bias=-3, signed=False),
    "e5m2b120": described("e5m2b120", 5, 2, bias=120),
    "e3m3b126": described("e3m3b126", 3, 3, bias=126),
    "e4m3b124": described("e4m3b124", 4, 3, bias=124),
    "e1m0b127": described("e1m0b127", 1, 0, bias=127),
}
ALL = [FORMATS[name] for name in [*THEIRS, *DESCRIBED]]
NARROW = ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e4m3-fnuz", "e5m3", "int4", "e7m2", "e3m4b5", "ue4m4", "e4m3b124"]
SIGNED_ZERO = [f for f in ALL if f.signed and f.negative_zero and not f.integer]
formats = pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
narrow = pytest.mark.parametrize("fmt", [FORMATS[n] for n in NARROW], ids=NARROW)
SOME = [*ROUNDINGS, "stochastic3", "stochastic16"]


def code_dtype(fmt: Format):
    return np.uint8 if fmt.bits <= 8 else np.uint16 if fmt.bits <= 16 else np.uint32


def their_codes(x: Tensor, fmt: Format) -> Tensor:
    """Nearest even; of |x| <= max."""
    if fmt.name in THEIRS:
        with np.errstate(over="ignore"):
            codes = x.numpy().astype(THEIRS[fmt.name]).view(code_dtype(fmt))
    else:
        values = gfloat.round_ndarray(DESCRIBED[fmt.name], x.double().numpy(), sat=True)
        codes = gfloat.encode_ndarray(DESCRIBED[fmt.name], values)
    return torch.from_numpy(codes.astype(np.int32))


@functools.cache
def their_values(fmt: Format) -> np.ndarray:
    """fp64 [2^bits]: the value of every code, by no code of ours."""
    codes = np.arange(2**fmt.bits).astype(code_dtype(fmt))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if fmt.name in THEIRS:
            return codes.view(THEIRS[fmt.name]).astype(np.float64)
        return gfloat.decode_ndarray(DESCRIBED[fmt.name], codes.astype(np.int64))


@functools.cache
def grid(fmt: Format) -> np.ndarray:
    """Every finite magnitude of the format, ascending, in fp64."""
    values = their_values(fmt)[: 2 ** (fmt.bits - fmt.signed)]
    return values[np.isfinite(values)]


def every_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


@functools.cache
def deciding(fmt: Format) -> Tensor:
    """Every value and midpoint of the format, with the fp32 numbers next to them, of both signs; all within range."""
    values = grid(fmt)
    centres = np.concatenate([values, (values[:-1] + values[1:]) / 2])
    near = centres.astype(np.float32)
    assert (near.astype(np.float64) == centres).all(), "a midpoint is not an fp32 number: the test would miss it"
    infinity = np.float32(np.inf)
    near = np.concatenate([near, np.nextafter(near, infinity), np.nextafter(near, -infinity)])
    near = near[(near >= 0) & (near <= values[-1])]
    return torch.from_numpy(np.concatenate([near, -near] if fmt.signed else [near]))


def inputs(fmt: Format) -> Tensor:
    """`deciding`, every BF16 number and 10^5 fp32 bit patterns, those within the finite range of the format."""
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([deciding(fmt), every_bf16(), random.view(torch.float32)])
    x = x if fmt.signed else x.abs()
    return x[x.abs() <= grid(fmt)[-1]]


def neighbours(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """|x| <= max -> (number of the grid value at or below |x|, exact fraction of the way to the next, sign bit)."""
    values = grid(fmt)
    a = x.double().abs().numpy()
    below = np.searchsorted(values, a, side="right") - 1
    step = np.append(np.diff(values), 1.0)[below]  # (no step above the largest value; its fraction is 0)
    fraction = (a - values[below]) / step  # exact: a power of two divides a difference of two close numbers
    return torch.from_numpy(below), torch.from_numpy(fraction), x.signbit()


def with_sign(magnitude: Tensor, negative: Tensor, fmt: Format) -> Tensor:
    """The codes of these magnitudes, some negative."""
    if fmt.integer:
        codes = torch.where(negative, -magnitude, magnitude) & (2**fmt.bits - 1)
    else:
        codes = magnitude + (negative & ((magnitude > 0) | fmt.negative_zero)) * (1 << (fmt.bits - 1))
    return codes.to(torch.int32)


# --- tables ---


def test_e2m1_is_the_published_table():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert_same_bits(FORMATS["e2m1"].values(), torch.cat([values, -values]), "the 16 values of E2M1")


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert_same_bits(FORMATS["e2m1"].round(ties), expected, "ties of E2M1")
    assert_same_bits(FORMATS["e2m1"].round(-ties), -expected, "negative ties of E2M1")


@formats
def test_every_code_has_its_value(fmt):
    expected = torch.from_numpy(their_values(fmt)).float()
    assert_same_bits(fmt.values(), expected, f"values of {fmt.name}")
    if fmt.torch_dtype is not None:
        patterns = torch.arange(2**fmt.bits).to(torch.int8 if fmt.bits == 8 else torch.int16)
        assert_same_bits(fmt.values(), patterns.view(fmt.torch_dtype).float(), f"values of {fmt.torch_dtype}")


@formats
def test_every_finite_code_survives_decode_and_encode(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    codes = codes[fmt.decode(codes).isfinite()]
    if fmt.integer:
        codes = codes[codes != 1 << (fmt.bits - 1)]  # the most negative one is never written
    for rounding in SOME:
        noise = torch.full_like(codes, 2 ** random_bits(rounding) - 1)  # as large as it can be: a value stays where it is
        assert_same_bits(fmt.encode(fmt.decode(codes), rounding, noise), codes, f"{fmt.name}, {rounding}")


@formats
def test_derived_numbers(fmt):
    values = grid(fmt)
    assert (fmt.max, fmt.tiny, fmt.max_code) == (values[-1], values[1], len(values) - 1)
    assert fmt.decode(torch.tensor(fmt.max_code)).item() == fmt.max
    assert 2.0**fmt.emax <= fmt.max < 2.0 ** (fmt.emax + 1)
    longest = max((int(v * 2.0**160) // (int(v * 2.0**160) & -int(v * 2.0**160))).bit_length() for v in values[1:])
    assert fmt.significant_bits == longest
    if fmt.torch_dtype is not None:
        info = torch.finfo(fmt.torch_dtype)
        assert (fmt.bits, fmt.max, 2.0**fmt.emin) == (info.bits, info.max, info.tiny)


def test_formats_by_name():
    names = {f"e{E}m{M}" for E in range(1, 9) for M in range(11)} | {f"int{n}" for n in range(2, 17)} | set(NAMED)
    assert all(name in FORMATS and FORMATS[name].name == name for name in names)
    assert (FORMATS["e3m4b5"].max, FORMATS["ue4m4"].bits, FORMATS["e4m3b7"].max) == (7.75, 8, 480)
    for name in ("e9m1", "e0m3", "e1m11", "int1", "int17", "e4m3b", "e4m3b+1", "e8m3b130", "e8m3b100", "e4m3b150", ""):
        assert name not in FORMATS
        with pytest.raises(KeyError):
            FORMATS[name]
    assert all(name in table() for name in NAMED)
    assert (FORMATS["e5m3"].max, FORMATS["e5m3-amd"].max, FORMATS["int8"].max) == (61440, 114688, 127 / 64)
    assert all(f.nan_code is None for name, f in FORMATS.items() if name not in NAMED and not name.startswith("e8"))


# --- E8M0: a power of two, and no zero ---


def test_e8m0():
    fmt = FORMATS["e8m0"]
    codes = torch.arange(256).to(torch.uint8)
    assert_same_bits(fmt.values(), codes.view(torch.float8_e8m0fnu).float(), "values of E8M0")
    theirs = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert_same_bits(fmt.values(), theirs, "values of E8M0")
    values = fmt.values()[:255]
    assert_same_bits(fmt.encode(values), codes[:255].to(torch.int32), "codes of E8M0")
    x = torch.cat([values[1:-1] * m for m in (1.25, 1.4999, 1.5, 1.5001, 1.99)])
    theirs = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)).to(torch.int32)
    assert_same_bits(fmt.encode(x), theirs, "nearest power of two, halves up")
    assert fmt.encode(torch.tensor([0.0, -1.0, math.nan, math.inf, 3e38])).tolist() == [0, 255, 255, 255, 254]


# --- rounding ---


@formats
def test_nearest_is_theirs(fmt):
    x = inputs(fmt)
    if fmt.mantissa_bits == 0:  # halves go up (IEEE 754-2019, 4.3.1; ml_dtypes' E8M0), in gfloat to the even code
        x = x[neighbours(x, fmt)[1] != 0.5]
    assert_same_bits(fmt.encode(x), their_codes(x, fmt), f"codes of {fmt.name}")


@narrow
@pytest.mark.parametrize("rounding", ["zero", "away", "inward"])
def test_away_inward_and_zero(fmt, rounding):
    x = inputs(fmt)
    below, fraction, negative = neighbours(x, fmt)
    up = {"zero": fraction >= 1, "away": fraction >= 0.5, "inward": fraction > 0.5}[rounding]
    expected = with_sign(below + up, negative, fmt)
    assert_same_bits(fmt.encode(x, rounding), expected, f"{fmt.name}, {rounding}")


def fractions(fmt: Format) -> tuple[Tensor, Tensor]:
    """x at chosen fractions of every gap of the grid, so in subnormals and next to binade borders too -> (x, fraction).

    The fractions sit on both sides of multiples of 1/256 and 2^-24, and fill the space between.
    """
    steps = [0, 1, 127, 128, 129, 255]
    chosen = [k / 256 + d for k in steps for d in (0.0, 2.0**-20, -(2.0**-20), 2.0**-9)]
    chosen += np.random.default_rng(0).random(12).tolist()
    values = grid(fmt)
    x = values[:-1, None] + np.diff(values)[:, None] * np.array([f for f in chosen if 0 <= f < 1])
    x = torch.from_numpy(x.astype(np.float32).ravel())
    x = torch.cat([x, -x]) if fmt.signed else x
    return x, neighbours(x, fmt)[1]


@narrow
def test_stochastic8_goes_up_in_floor_256_fraction_of_256_cases(fmt):
    x, fraction = fractions(fmt)
    below, _, negative = neighbours(x, fmt)
    noise = torch.arange(256, dtype=torch.uint8).repeat(len(x), 1)  # all there is: a probability, not a sample
    codes = fmt.encode(x[:, None].expand(-1, 256).contiguous(), "stochastic8", noise)
    down, up = (codes == with_sign(below + k, negative, fmt)[:, None] for k in (0, 1))
    assert (down | up).all(), "a stochastic rounding went to a value that is not next to x"
    assert_same_bits(up.sum(1), (fraction * 256).floor().long(), f"{fmt.name}: times up of 256")


@narrow
def test_stochastic_goes_up_from_its_threshold_on(fmt):
    x, fraction = fractions(fmt)
    below, _, negative = neighbours(x, fmt)
    down = with_sign(below, negative, fmt)
    share = (fraction * 2**24).floor().to(torch.int32)  # of 2^24 random numbers, this many go up
    last_down = 2**24 - 1 - share
    assert_same_bits(fmt.encode(x, "stochastic", last_down), down, f"{fmt.name}: the largest noise that goes down")
    some = share > 0
    up = fmt.encode(x[some], "stochastic", last_down[some] + 1)
    assert_same_bits(up, with_sign(below + 1, negative, fmt)[some], f"{fmt.name}: the smallest noise that goes up")
    assert_same_bits(fmt.encode(x, "stochastic", torch.zeros_like(down)), down, f"{fmt.name}: no noise")


@formats
@pytest.mark.parametrize("rounding", SOME)
def test_round_is_decode_of_encode(fmt, rounding):
    x = torch.cat([deciding(fmt), every_bf16()])  # beyond the range, too
    x = x[x.isfinite()]
    if rounding != "nearest":
        x = x[:: 1 + len(x) // 40_000]  # the full set once is enough: modes differ in one small function
    noise = torch.randint(0, 2 ** random_bits(rounding), x.shape, generator=torch.Generator().manual_seed(1))
    ours = fmt.round(x, rounding, noise)
    assert_same_bits(ours, fmt.decode(fmt.encode(x, rounding, noise)), f"{fmt.name}, {rounding}")


# --- the edges ---


@formats
@pytest.mark.parametrize("rounding", SOME)
def test_beyond_the_largest_value_it_saturates(fmt, rounding):
    top = np.float32(fmt.max)
    beyond = [np.nextafter(top, np.float32(np.inf)), *(top * np.array([1.01, 1.04, 1.5, 1.99, 2.0, 3.99, 4.0, 1e9]))]
    x = torch.tensor(beyond + [torch.finfo(torch.float32).max]).float()
    x = x[x.isfinite()]
    x = torch.cat([x, -x])
    lowest = -fmt.max if fmt.signed else 0.0
    for noise in (0, 2 ** random_bits(rounding) - 1):
        ours = fmt.round(x, rounding, torch.full(x.shape, noise))
        assert_same_bits(ours, torch.where(x < 0, lowest, fmt.max), f"{fmt.name}, {rounding}, noise {noise}")


@formats
def test_just_below_the_largest_value(fmt):
    """The clamp inside must not reach down into the range (bf16's top binade ends where fp32's does)."""
    values = torch.from_numpy(grid(fmt)[-200:]).float()
    assert_same_bits(fmt.round(values), values, f"largest values of {fmt.name}")


@formats
@pytest.mark.parametrize("rounding", SOME)
def test_nan_and_inf(fmt, rounding):
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    noise = torch.zeros(4, dtype=torch.int32)
    codes = fmt.encode(x, rounding, noise)
    if fmt.nan_code is None:
        assert codes[:2].tolist() == [fmt.max_code] * 2  # a scale must carry the NaN
    else:
        assert fmt.decode(codes).isnan().all(), "a special value became a number"
        assert codes.tolist() == [fmt.nan_code] * 4
    lowest = -fmt.max if fmt.signed else 0.0
    expected = torch.tensor([math.nan, math.nan, fmt.max, lowest])
    assert_same_bits(fmt.round(x, rounding, noise), expected, f"round of {fmt.name}, {rounding}")


@formats
@pytest.mark.parametrize("rounding", SOME)
def test_zeros_keep_their_sign_where_there_is_one(fmt, rounding):
    small = fmt.tiny / 8
    x = torch.tensor([0.0, -0.0, small, -small])
    zeros = torch.zeros(4, dtype=torch.int32)
    negative = (1 << (fmt.bits - 1), -0.0) if fmt in SIGNED_ZERO else (0, 0.0)
    assert fmt.encode(x, rounding, zeros).tolist() == [0, negative[0], 0, negative[0]]
    expected = torch.tensor([0.0, negative[1], 0.0, negative[1]])
    assert_same_bits(fmt.round(x, rounding, zeros), expected, f"{fmt.name}, {rounding}")


@formats
def test_negative_numbers_without_a_sign_are_zero(fmt):
    if not fmt.signed:
        x = torch.tensor([-fmt.tiny, -1.0, -fmt.max, -1e30])
        assert fmt.encode(x).tolist() == [0] * 4
        assert_same_bits(fmt.round(x), torch.zeros(4), fmt.name)


def test_strides_do_not_matter():
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    for fmt in FORMATS.values():
        for view in (x.t(), x[::2, ::3], x[:, 1:]):
            assert_same_bits(fmt.encode(view), fmt.encode(view.clone(memory_format=torch.contiguous_format)), fmt.name)


# --- fp32 -> BF16 as integer arithmetic ---


def fp32_patterns() -> Tensor:
    g = torch.Generator().manual_seed(3)
    anything = torch.randint(-(2**31), 2**31, (300_000,), generator=g)
    subnormal = torch.randint(0, 2**23, (50_000,), generator=g) - torch.randint(0, 2, (50_000,), generator=g) * 2**31
    top = torch.randint(0x7F000000, 0x7F800000, (50_000,), generator=g)  # where rounding up may overflow
    return torch.cat([anything, subnormal, top]).to(torch.int32).view(torch.float32)


def test_to_bfloat16_is_torchs_cast():
    """torch's cast on a CPU rounds to nearest even; what this finds would be a torch whose cast does not."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    for what, x in (("fp16", halves), ("bf16", every_bf16()), ("fp32", fp32_patterns())):
        assert_same_bits(to_bfloat16(x), x.to(torch.bfloat16), f"every {what} number")


def test_to_bfloat16_is_the_format():
    x = torch.cat([every_bf16(), fp32_patterns(), deciding(FORMATS["bf16"])])
    x = x[x.abs() <= FORMATS["bf16"].max]
    assert_same_bits(to_bfloat16(x).float(), FORMATS["bf16"].round(x), "rounding to BF16")


def test_to_bfloat16_beyond_the_range():
    half_step = torch.tensor(FORMATS["bf16"].max) + 2.0**119
    x = torch.tensor([half_step, torch.finfo(torch.float32).max, math.inf, math.nan])
    x = torch.cat([x, -x])
    assert to_bfloat16(x).isfinite().sum() == 0, "from max + half a step on, overflow is Inf and NaN stays NaN"
    below = torch.nextafter(half_step, torch.tensor(0.0))
    assert to_bfloat16(below).item() == FORMATS["bf16"].max
