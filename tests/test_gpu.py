"""What only hardware answers (marked `gpu`, run by `make test-gpu`), asked of the emulator too, so that the questions are known
to work: how cvt.rs uses its random bits, what tensor cores make of long sums, and whether lanes that do not run in lock step
make the same bytes every time. Then bench.py's section for a GPU, small and emulated."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import assert_same_bits

import bench
from configs import load
from kernels import capability as current
from quant import Context, Linear, QuantSpec, Scale, fuse, kernel, quantize
from quant.encode import decode, encode
from quant.gemm import Operand, gemm
from quant.native import supports
from quant.random import Key
from studies import steps
from studies.recipes import NAMES, ROOT
from testing import settle
from testing.operands import difference, numbers
from testing.products import bound_of
from tests.test_kernels import INTERPRETED, on
from tests.test_matmul import MX4, MX8, MX8G, NV, ROWS, TENSOR, on_device, product

pytestmark = pytest.mark.skipif(INTERPRETED, reason="of a GPU, or the emulator in its place")


E4M3_TENSOR = QuantSpec("e4m3", (-1, -1), Scale("fp32"))


def engines(emulated: int):
    """The GPU, and an emulated one where there is none."""
    there = torch.cuda.is_available()
    return pytest.mark.parametrize("engine", [emulated] * (not there) + [pytest.param("cuda", marks=pytest.mark.gpu)])


MODELS = {"e2m1": "bytes, those of x1", **dict.fromkeys(("e4m3", "e5m2"), "halves, reversed for x1 and x3")}


def ask(engine, name: str, count: int = 2**16) -> settle.Found:
    if engine == "cuda" and (why := settle.obstacle()):
        pytest.skip(why)
    with on(engine):
        return settle.settle(name, "cuda" if engine == "cuda" else "cpu", count)


@pytest.mark.parametrize("name", MODELS)
@engines(100)
def test_cvt_rs_uses_its_random_bits_as_the_emulator_assumes(engine, name):
    found = ask(engine, name, 2**12 if engine == 100 else 2**20)
    words = "\n".join(settle.report(name, found))
    assert [title for title in found.fits if title.startswith(MODELS[name])], (
        f"testing/conversions.py is to be changed\n{words}"
    )


def test_the_map_finds_what_no_hypothesis_says(monkeypatch):
    """A machine that shares its word otherwise: of E2M1, byte i of the word, each with its bits reversed but for that of x2."""
    from testing import conversions

    def shares(random, target):
        parts = [(random >> np.uint32(8 * i)) & np.uint32(255) for i in (3, 2, 1, 0)]
        return [(part if i == 1 else conversions.reversed16(part << np.uint32(8)), 8) for i, part in enumerate(parts)]

    monkeypatch.setattr(conversions, "random_shares", shares)
    found = ask(100, "e2m1", 2**12)
    assert found.fits == ["what the map says"] and found.finest == [8] * 4
    assert found.places[0][:8].tolist() == list(range(1, 9)) and found.places[2][16:24].tolist() == list(range(8, 0, -1))


def test_a_machine_that_carries_nothing_fits_nothing(monkeypatch):
    from testing import conversions, instructions

    monkeypatch.setitem(conversions.STOCHASTIC, "e2m1x4", (lambda x, *_: settle.to_e2m1(x), 4))  # to nearest
    instructions.decode.cache_clear()
    try:
        found = ask(100, "e2m1", 2**12)
    finally:
        instructions.decode.cache_clear()
    assert not found.fits and settle.report("e2m1", found)[-1].startswith("  none fits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_there_is_nothing_to_ask(capsys):
    assert settle.main([]) == 0
    assert capsys.readouterr().out == "testing.settle: nothing to ask, torch sees no CUDA device\n"


# --- products ---


@pytest.mark.parametrize("specs", [(NV, NV), (MX4, MX4), (MX8, MX8), (MX8G, MX8), (MX8, MX4)], ids=lambda s: s[0].short())
@engines(80)
def test_products_against_emulated_ones(engine, specs):
    """Both are within the bound of fp32 sums in any order (test_matmul.py) of the exact sum, so within twice that of each
    other: tcgen05 on sm_100 and sm_103, mma.sync with block scales on sm_120, wgmma on sm_90."""
    M, N, K = (512, 384, 8192) if engine == "cuda" else (128, 64, 256)
    y, exact, bound = product(engine, specs, M, N, K)
    operands = [Operand(*decode(quantize(numbers("normal", rows, K), spec))) for rows, spec in zip((M, N), specs, strict=True)]
    emulated = gemm(*operands, torch.float32, "fp32").double()
    assert ((emulated - exact).abs() <= bound).all()
    assert ((y - emulated).abs() <= 2 * bound).all(), float(((y - emulated).abs() / bound).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize(
    "specs", [(TENSOR, E4M3_TENSOR), (E4M3_TENSOR, E4M3_TENSOR), (ROWS, ROWS), (MX8, MX8), (NV, NV)], ids=lambda s: s[0].short()
)
def test_scaled_mm(specs):
    """torch's, by the sums of FP8 that this GPU makes, whatever it does to keep more bits of them."""
    M, N, K = 256, 192, 1024
    x, w = (encode(numbers("normal", rows, K), spec) for rows, spec in zip((M, N), specs, strict=True))
    if why := supports("scaled_mm", *specs, (M, N, K), torch.device("cuda")):
        pytest.skip(why)
    y = gemm(*(Operand(packed=on_device(q)) for q in (x, w)), torch.bfloat16, "bf16", "scaled_mm").cpu().double()
    x, w = (q.dequantize().double() for q in (x, w))
    assert ((y - x @ w.t()).abs() <= bound_of(x, w, torch.bfloat16, current() in (89, 90), step=0)).all()


# --- races ---


@engines(100)
def test_every_launch_makes_the_same_bytes(engine):
    M, K = (4096, 8192) if engine == "cuda" else (128, 256)
    x, specs = numbers("normal", M, K), (QuantSpec(rounding="stochastic8"), QuantSpec(rounding="stochastic8", hadamard=16))
    keys = Key(1, use=0), Key(1, use=4)
    wanted = encode(x, specs[0], keys[0]), encode(x.t(), specs[1], keys[1])
    for _ in range(10 if engine == "cuda" else 1):
        with on(engine):
            made = kernel.encode_pair(x.cuda() if engine == "cuda" else x, specs, keys, (None, None), (None, None))
        for a, b in zip(made, wanted, strict=True):
            assert not difference(a, b)


# --- recipes ---


def multiplied(name: str, device: str, backend: str) -> dict[str, torch.Tensor]:
    """What the GEMMs of a Linear multiply under each recipe of a config, fp32. No product is in it, and of sums only those that
    a recipe quantises by: means of tokens, and errors that decide."""
    config, found = load(ROOT / f"configs/{name}.toml"), {}
    T, I, O = 256, 128, 384
    for recipe, operands in config.recipes.items():
        module = Linear(I, O)
        module.weight.data.copy_(numbers("normal", O, I, torch.float32))
        module.to(device)
        module.context = Context(3, "fp32", torch.device(device), backend)
        module.context.at(2, 5)
        module.recipe = operands

        def tap(_, gemm_name, a, b, y, recipe=recipe):
            found.update({f"{recipe} {gemm_name} {i}": operand.dense().float().cpu() for i, operand in enumerate((a, b))})

        module.context.tap = tap
        x = numbers("normal", T, I).to(device).requires_grad_()
        module(x).backward(numbers("normal", T, O).to(device))
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU against the CPU beside it")
@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "fused", "auto"])
@pytest.mark.parametrize("name", [name for name in NAMES if load(ROOT / f"configs/{name}.toml").recipes])
def test_every_recipe_multiplies_the_numbers_of_the_cpu(name, how):
    """By kernels, and where there are none eagerly or as torch.compile fuses it; `auto`: as packed codes that are decoded."""
    fuse(False)
    wanted = multiplied(name, "cpu", "emulate")
    said = fuse(how != "eager")
    assert how == "eager" or "fused" in said, said
    found = multiplied(name, "cuda", "auto" if how == "auto" else "emulate")
    fuse(False)
    assert found.keys() == wanted.keys() and len(found) >= 2
    for place in wanted:
        assert_same_bits(found[place], wanted[place], place)


# --- bench.py gpu ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="make bench-gpu runs it there")
def test_the_bench_of_a_gpu_runs(monkeypatch, capsys):
    """Emulated on sm_120, whose products the emulator knows, at a size that says nothing about time."""
    from testing.device import emulated

    monkeypatch.setattr(kernel, "DEVICES", {"cpu"})
    monkeypatch.setattr(bench, "fuse", lambda on: "")
    monkeypatch.setattr(bench, "MODELS", {"tiny": (128, 1, 1, 128, "nothing")})
    table = bench.Table()
    with emulated(120) as launches:
        bench.gpu(table, bench.arguments(["gpu", "--tokens", "128", "--repeats", "1"]), torch.device("cpu"))
        assert current() == 120
    assert {launch.name for launch in launches} >= {"quantize_kernel", "matmul_kernel"}
    rows = [re.match(r"  (tiny \w+, .*?)  +([\d.]+) ms +([\d.]+) x", line) for line in table.lines]
    found = {row[1]: float(row[2]) for row in rows if row}
    rows = "bf16", "triton", "emulate", "quantise", "copy"
    assert list(found) == [f"tiny {name}, {what}" for name in ("qkv", "out", "up", "down") for what in rows]
    assert all(math.isfinite(t) for t in found.values()) and max(found.values()) > 0
    assert any("GB/s" in line for line in table.lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_bench_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert bench.main(["gpu"]) == 0
    assert capsys.readouterr().out == f"gpu: not measured, torch {torch.__version__} sees no CUDA device\n"
    assert list(tmp_path.iterdir()) == []


# --- studies/steps.py ---


def test_kernels_are_told_apart_by_their_names():
    """Names as an H200 has them."""
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1_kernel0": "attention",
        "void cudnn::fusion::fmha_reduce_head<true>(void const*, void*, unsigned int)": "attention",
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "products",
        "matmul_kernel": "products",
        **dict.fromkeys(("quantize_kernel", "amax_kernel", "prepare_kernel", "dequantise_kernel"), "quantisers"),
        "triton_poi_fused__to_copy_mul_0": "quantisers",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::Fused": "optimiser",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float>": "elementwise",
    }
    assert {name: steps.kind(name) for name in names} == names


def test_the_report_of_steps_has_a_line_for_each_part():
    got = {"seconds": 0.5, "live": 30.0, "reserved": 33.0, "losses": [9.0, 8.5], "kernels": {"products": 0.2, "attention": 0.1}}
    said = {"seconds": 0.6, "live": 30.3, "reserved": 33.0, "parts": {"products": 0.25, "optimiser": 0.01}}
    first, *rows = steps.report("tiny", got, said, 1000)
    assert first == "tiny: 2,000 tokens/s; losses 9.0000, 8.5000"
    found = {row[:19].strip(): row[19:].split() for row in rows[1:]}
    assert found["live GiB"] == ["30.300", "30.000", "+1.0%"] and found["step s"] == ["0.600", "0.500", "+20.0%"]
    assert found["products s"] == ["0.250", "0.200", "+25.0%"] and found["optimiser s"] == ["0.010", "0.000"]
    assert found["idle s"] == ["0.000", "0.200"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_steps_say_so(capsys):
    assert steps.main([]) == 0
    assert capsys.readouterr().out == f"studies.steps: not measured, torch {torch.__version__} sees no CUDA device\n"
