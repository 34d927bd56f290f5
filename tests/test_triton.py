"""Traps of Triton 3.8, each with what keeps us out of it. A trap that is no longer there fails its test, on purpose: then what
was written around it can go (Triton's issue 8322 and pull request 11753, open in September 2026, know of the casts).

    casts      fp32 -> E4M3 and E5M2 on sm_89 round twice, by way of FP16; -> E5M2 on sm_80 does not tie to even
    scales     of NVFP4, given as bytes: sm_120 takes them for powers of two, of groups of 32, without a word
"""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError

from kernels import target_at
from kernels.matmul import matmul, matmul_kernel
from quant import QuantSpec, Scale, kernel
from quant.encode import encode
from testing import numbers
from testing.operands import difference

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
FORMATS = {"e4m3": (numbers.to_e4m3, numbers.from_e4m3, 0x7E), "e5m2": (numbers.to_e5m2, numbers.from_e5m2, 0x7B)}


def ties(name: str) -> np.ndarray:
    """fp32: all numbers of a format, what is halfway between two, and its neighbours on both sides; and their negatives."""
    _, decode, top = FORMATS[name]
    values = decode(np.arange(top + 1, dtype=np.uint8))
    halfway = (values[1:] + values[:-1]) / np.float32(2)
    near = [np.nextafter(halfway, np.float32(end)) for end in (0, np.inf)]
    x = np.concatenate([values, halfway, *near])
    return np.concatenate([x, -x])


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr, E4M3: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x_ptr + i).to(tl.float8e4nv if E4M3 else tl.float8e5)
    tl.store(y_ptr + i, y.to(tl.uint8, bitcast=True))


def cast(capability: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The codes that Triton's own cast makes of `ties`, and the right ones."""
    from testing.device import emulated

    x = np.resize(ties(name), 1024)
    y = torch.zeros(1024, dtype=torch.uint8)
    with emulated(capability):
        cast_kernel[(1,)](torch.from_numpy(x), y, 1024, name == "e4m3")
    return y.numpy(), FORMATS[name][0](x)


@pytest.mark.parametrize(("capability", "name"), [(89, "e4m3"), (89, "e5m2"), (80, "e5m2")])
def test_casts_that_triton_rounds_wrong(capability, name):
    found, right = cast(capability, name)
    assert (found != right).sum() > 100, f"Triton's cast to {name} is right on sm_{capability} now: see target_at in kernels/"
    assert not target_at(capability).fp8


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("capability", [90, 100])
def test_casts_that_it_rounds_right(capability, name):
    """So the emulator does not make the errors above."""
    found, right = cast(capability, name)
    assert found.tolist() == right.tolist() and target_at(capability).fp8


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("name", [*FORMATS, "e2m1"])
def test_the_quantiser_is_exact_there(name, capability):
    """Of fp32 in MX blocks whose scale is 1, so that elements are numbers that casts miss; of E2M1, blocks whose E4M3 scales
    are rounded from numbers that casts miss: the tensor's amax is 448 * 6, so they are a sixth of those of the blocks."""
    from testing.device import emulated

    if name == "e2m1":
        x = torch.from_numpy(ties("e4m3")).abs()[:, None].repeat(1, 16) * 6
        spec = QuantSpec()
    else:
        x = torch.from_numpy(np.resize(ties(name), (64, 31)))
        top = float(FORMATS[name][1](np.uint8(FORMATS[name][2])))
        x = torch.cat([x, torch.full((64, 1), top)], 1)
        spec = QuantSpec(name, (1, 32), Scale("e8m0"))
    with emulated(capability) as launches:
        found = kernel.encode(x.contiguous(), spec)
    assert not difference(found, encode(x, spec))
    assert not any("cvt.rn.satfinite" in launch.kernel.asm["ptx"] for launch in launches)
    if name == "e2m1":
        assert found.scale_codes.unique().numel() > 100
    else:
        assert (found.scale_codes == 127).all()


def operand(scale: torch.dtype) -> tuple:
    """Codes and scales of 128 x 128 in NVFP4."""
    return torch.zeros(128, 64, dtype=torch.uint8), torch.zeros(2, 512, dtype=torch.uint8).view(scale)


@pytest.mark.parametrize(("capability", "words"), [(120, ["scale_vec::4X", "ue4m3"]), (100, ["mxf4nvf4.block_scale.block16"])])
def test_nvfp4_is_multiplied_as_nvfp4(capability, words):
    from testing.device import compiled

    a = operand(torch.uint8)
    with compiled(capability) as launches:
        matmul(a, a, (None, None), ("e2m1", "e2m1"), "e4m3", 16, 128, capability)
    ptx = launches[0].kernel.asm["ptx"]
    assert [word for word in [*words, "kind::mxf4nvf4"] if word not in ptx] == []
    assert "ue8m0" not in ptx and "scale_vec::2X" not in ptx


@pytest.mark.parametrize(("dtype", "group"), [(torch.uint8, 16), (torch.float8_e4m3fn, 32)])
def test_scales_that_tensor_cores_would_misread_do_not_compile(dtype, group):
    from testing.device import compiled

    a = [*operand(dtype), torch.ones(1), 4] * 2 + [torch.empty(128, 128)]
    with compiled(120), pytest.raises(CompilationError, match="scales"):
        matmul_kernel[(1, 1)](
            *a, 128, 128, 128, False, False, "e2m1", "e2m1", "e4m3", group, "scaled", False, True, 128, 128, 128, 16,
            num_warps=8,
        )  # fmt: skip


@triton.jit
def unguarded_kernel(a_ptr, s_ptr, y_ptr, BK: tl.constexpr):
    r = tl.arange(0, 128)[:, None]
    a = tl.load(a_ptr + r * (BK // 2) + tl.arange(0, BK // 2)[None, :])
    s = tl.load(s_ptr + r * (BK // 16) + tl.arange(0, BK // 16)[None, :])
    y = tl.dot_scaled(a, s, "e2m1", tl.trans(a), s, "e2m1")
    tl.store(y_ptr + r * 128 + tl.arange(0, 128)[None, :], y)


def test_the_trap_is_still_there():
    from testing.device import compiled

    with compiled(120) as launches:
        unguarded_kernel[(1,)](operand(torch.uint8)[0], torch.zeros(128, 8, dtype=torch.uint8), torch.empty(128, 128), 128)
    assert "ue8m0" in launches[0].kernel.asm["ptx"], "Triton takes bytes of groups of 16 for E4M3 now, or refuses them"
