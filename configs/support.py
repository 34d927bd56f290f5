"""What runs natively where: the table of formats and GPUs in README.md, computed from the code that decides.

Of each format, how operands are quantised, and how the GEMM of two of them is made on each GPU. It needs Triton, and no GPU.
"""

import torch

from configs import load
from quant import QuantSpec, Scale, kernel
from quant.choice import Spec
from quant.native import pick

BEGIN, END = "<!-- make table: formats -->", "<!-- end of the formats -->"
GPUS = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100, 103": 100, "sm_120": 120}
SIZES = 4096, 4096, 4096
FORMATS: dict[str, tuple[Spec, Spec]] = {
    "FP8, a scale of the tensor": (QuantSpec("e4m3", (-1, -1), Scale("fp32")),) * 2,
    "FP8, a scale of each row": (QuantSpec("e4m3", (1, -1), Scale("fp32")),) * 2,
    "FP8, E5M2 by E4M3": (QuantSpec("e5m2", (-1, -1), Scale("fp32")), QuantSpec("e4m3", (-1, -1), Scale("fp32"))),
    "FP8, fp32 scales 1x128, 128x128": (
        QuantSpec("e4m3", (1, 128), Scale("fp32")),
        QuantSpec("e4m3", (128, 128), Scale("fp32")),
    ),
    "MXFP8": (QuantSpec("e4m3", (1, 32), Scale("e8m0")),) * 2,
    "MXFP4": (QuantSpec("e2m1", (1, 32), Scale("e8m0")),) * 2,
    "MXFP4 by MXFP8": (QuantSpec("e2m1", (1, 32), Scale("e8m0")), QuantSpec("e4m3", (1, 32), Scale("e8m0"))),
    "NVFP4": (QuantSpec(), QuantSpec(block=(16, 16))),
    "NVFP4, stochastic rounding": (QuantSpec(rounding="stochastic8"), QuantSpec(block=(16, 16))),
    "NVFP4, four over six": (load("configs/nvfp4-4over6.toml").recipes["nvfp4-4over6"].fprop.x,) * 2,
    "MoR, by tensor": (load("configs/mor-tensor.toml").recipes["mor-tensor"].fprop.x,) * 2,
    "INT8": (QuantSpec("int8", (1, -1), Scale("fp32")),) * 2,
    "NF4": (QuantSpec("nf4", (1, 64), Scale("fp32")),) * 2,
}


def quantised(spec: Spec, capability: int) -> str:
    """ "fast" and "slow": by the kernel, by conversions of the GPU or in packed halves, or number by number, with the same
    bits; "fused": by torch.compile."""
    from kernels import target_at
    from kernels.quantize import quick
    from quant.launch import side_of

    if kernel.obstacle(spec):
        return "fused"
    scaled = [each for each in spec.candidates if each.scale.format != "none"]
    return "fast" if all(quick(side_of(each), target_at(capability)) for each in scaled) else "slow"


def table() -> str:
    head = ("", "CPU", *GPUS)
    rows = [head, ("---",) * len(head)]
    for name, (a, b) in FORMATS.items():
        took = [pick(a, b, SIZES, torch.device("cuda"), capability=c)[0] for c in GPUS.values()]
        cells = [f"{quantised(a, c)} · {backend}" for c, backend in zip(GPUS.values(), took, strict=True)]
        rows.append((name, "fused · emulate", *cells))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
