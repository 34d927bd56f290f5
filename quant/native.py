"""What hardware multiplies: GEMMs of packed operands by torch's scaled_mm and by the Triton kernel, and why not.

    y[M, N] = round( alpha * sum over k of (code * scale)[M, k] (code * scale)[N, k] )         one rounding, of an fp32 sum

An operand is one of three kinds: `whole`, FP8 with a scale of the tensor or of each row, which leaves the sum; `mx`, a power of
two for each 32 along k; `nv`, E2M1 with an E4M3 number for each 16. Squares of these are read as rows. What else leaves the
sum is alpha.

    scaled_mm   torch.nn.functional.scaled_mm: whole on CPUs and from sm_89 on, mx of FP8 and nv from sm_100 on. FP8 is
                tested on CPUs and has run on an H200; of the others only shapes are tested, on `meta`
    triton      kernels/matmul.py: all kinds, natively where there are block scales, else by decoding

Sums are in an order of the hardware's own; Hopper's FP8 tensor cores also keep fewer bits of a sum than fp32 (arXiv:2412.19437
section 3.5.2; use_fast_accum stays off). Left out: fp32 scales in the sum (1x128, 128x128), INT8, two formats in an operand.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from quant import kernel
from quant.choice import Choice
from quant.encode import factor_of
from quant.qtensor import QTensor, tiled
from quant.spec import QuantSpec

Spec = QuantSpec | Choice
Sizes = tuple[int, int, int]  # M, N, K
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALES = {"whole": ("none", 1), "mx": ("e8m0", 32), "nv": ("e4m3", 16)}  # format of a scale, and for how many


class Kind(NamedTuple):
    element: str
    scale: str  # "whole", "mx" or "nv"

    @property
    def name(self) -> str:
        return {"whole": "FP8 by tensor or row", "mx": "MX", "nv": "NVFP4"}[self.scale]


@lru_cache
def kind(spec: Spec) -> Kind | str:
    """Of what a spec makes; or why it is of none, in words."""
    if spec.ladder:
        return f"{spec.short()}: a ladder's format is known only when it has decided"
    scale, (rows, n), element = spec.scale, spec.block, spec.elements[0].name
    if len(spec.elements) > 1 or element not in ("e2m1", *FP8):
        return f"{spec.short()}: elements are neither E2M1, E4M3 nor E5M2"
    if spec.leaves and element in FP8:
        return Kind(element, "whole")
    plain = not scale.macro and not scale.group and rows in (1, n)
    if plain and (scale.format, n) == SCALES["mx"]:
        return Kind(element, "mx")
    if plain and (scale.format, n) == SCALES["nv"] and element == "e2m1":
        return Kind(element, "nv")
    return f"{spec.short()}: scales are neither of a tensor or rows, nor E8M0 for 32, nor E4M3 for 16 of E2M1"


def supports(
    backend: str,
    a: Spec | None,
    b: Spec | None,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    capability: int | None = None,
) -> str:
    """Why `backend` ("emulate", "scaled_mm" or "triton") cannot multiply a [M, K] by b [N, K] into `dtype` there; "" if it can.

    capability: of a GPU, 89, 100, ... (default: the one that there is)."""
    if backend == "emulate":
        return ""
    if a is None or b is None:
        return "an operand is not quantised"
    kinds = kind(a), kind(b)
    for found in kinds:
        if isinstance(found, str):
            return found
    first, second = kinds
    if first.scale != second.scale:
        return f"{first.name} by {second.name}: scales of two kinds"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"an output of {str(dtype).removeprefix('torch.')}: expected bfloat16 or float32"
    return {"scaled_mm": _scaled_mm_obstacle, "triton": _triton_obstacle}[backend](first, second, sizes, device, capability)


def pick(
    a: Spec | None,
    b: Spec | None,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    capability: int | None = None,
) -> tuple[str, dict[str, str]]:
    """What train.gemm = "auto" takes on a GPU -> "scaled_mm", "triton" or "emulate", and why none of those before it."""
    reasons = {}
    for backend in ("scaled_mm", "triton"):
        why = supports(backend, a, b, sizes, device, dtype, capability)
        if backend == "triton" and not why:
            from quant.launch import matmul_way  # (needs Triton)

            x, w = kind(a), kind(b)
            if matmul_way((x.element, w.element), *SCALES[x.scale], capability) == "decoded":
                why = "the kernel decodes these codes here, each of them once for every tile of the product"
        if not why:
            return backend, reasons
        reasons[backend] = why
    return "emulate", reasons


def multiply(backend: str, a: QTensor, b: QTensor, dtype: torch.dtype) -> Tensor:
    """a [M, K], b [N, K], of specs that `supports` supports -> [M, N] in `dtype`."""
    return {"scaled_mm": _scaled_mm, "triton": _triton}[backend](a, b, dtype)


def line_scales(q: QTensor) -> Tensor:
    """Scale codes of a block each along K, uint8 [R, K / n]: those of squares repeated."""
    rows = q.rows_and_k[0] // q.scale_codes.shape[0]
    return q.scale_codes if rows == 1 else q.scale_codes.repeat_interleave(rows, 0)


# --- torch ---


def _scaled_mm_obstacle(a: Kind, b: Kind, sizes: Sizes, device: torch.device, capability: int | None) -> str:
    need = 89 if a.scale == "whole" else 100
    if device.type == "cpu" and a.scale != "whole":
        return f"{a.name}: scaled_mm has it on CUDA only, from sm_{need} on"
    if device.type == "cuda":
        capability = capability or 10 * (c := torch.cuda.get_device_capability(device))[0] + c[1]
        if capability < need:
            return f"{a.name}: scaled_mm needs sm_{need} or newer, not sm_{capability}"
    if a.scale == "mx" and "e2m1" in (a.element, b.element):
        return "MXFP4: scaled_mm has it in builds with MSLK only"
    if a.element == b.element == "e5m2" and device.type != "cpu":
        return "E5M2 by E5M2: scaled_mm does not have it"
    if any(size % 16 for size in sizes[1:]):
        return f"[M, N, K] = {list(sizes)}: scaled_mm needs N and K to be multiples of 16"
    return ""


def _scaled_mm(a: QTensor, b: QTensor, dtype: torch.dtype) -> Tensor:
    how = kind(a.spec).scale
    x, w = (q.packed_codes.contiguous() for q in (a, b))
    factors = factor_of(a), factor_of(b)
    if how == "whole":
        x, w = x.view(FP8[kind(a.spec).element]), w.view(FP8[kind(b.spec).element])
        if all(f.ndim == 0 for f in factors):
            return scaled_mm(
                x, w.t(), factors[0], ScalingType.TensorWise, factors[1], ScalingType.TensorWise, output_dtype=dtype
            )
        f, g = (f.expand(len(codes), 1).contiguous().flatten() for f, codes in zip(factors, (x, w), strict=True))
        return scaled_mm(x, w.t(), f[:, None], ScalingType.RowWise, g[None], ScalingType.RowWise, output_dtype=dtype)
    scales = [tiled(line_scales(q)).flatten() for q in (a, b)]
    if how == "mx":
        x, w = x.view(FP8[kind(a.spec).element]), w.view(FP8[kind(b.spec).element])
        s, t = (scale.view(torch.float8_e8m0fnu) for scale in scales)
        recipe = dict(swizzle_a=SwizzleType.SWIZZLE_32_4_4, swizzle_b=SwizzleType.SWIZZLE_32_4_4)
        alpha = [f for f in factors if f is not None]
        y = scaled_mm(
            x, w.t(), s, ScalingType.BlockWise1x32, t, ScalingType.BlockWise1x32, **recipe,
            output_dtype=torch.float32 if alpha else dtype,
        )  # fmt: skip
        return (y * (alpha[0] if len(alpha) == 1 else alpha[0] * alpha[1])).to(dtype) if alpha else y
    x, w = x.view(torch.float4_e2m1fn_x2), w.view(torch.float4_e2m1fn_x2)
    one = torch.ones((), device=x.device)
    s, t = ([scale.view(torch.float8_e4m3fn), one if f is None else f] for scale, f in zip(scales, factors, strict=True))
    recipe, order = [ScalingType.BlockWise1x16, ScalingType.TensorWise], [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return scaled_mm(x, w.t(), s, recipe, t, recipe, swizzle_a=order, swizzle_b=order, output_dtype=dtype)


# --- Triton ---


def _triton_obstacle(a: Kind, b: Kind, sizes: Sizes, device: torch.device, capability: int | None) -> str:
    if device.type not in kernel.DEVICES:
        return f"kernels run on CUDA, not on {device.type}"
    from quant.launch import matmul_obstacle  # (needs Triton)

    return matmul_obstacle((a.element, b.element), *SCALES[a.scale], *sizes, capability)


def _triton(a: QTensor, b: QTensor, dtype: torch.dtype) -> Tensor:
    from quant.launch import matmul_op

    x, w = kind(a.spec), kind(b.spec)
    return matmul_op(parts(a), parts(b), x.element, w.element, *SCALES[x.scale], a.rows_and_k[1], dtype)


def parts(q: QTensor) -> list[Tensor]:
    """Codes, scales of each block along K, factor; empty where there is none."""
    factor, empty = factor_of(q), torch.empty(0, device=q.packed_codes.device)
    scales = empty if q.spec.leaves else line_scales(q).contiguous()
    return [q.packed_codes.contiguous(), scales, empty if factor is None else factor.contiguous()]
