"""GPUS: what data sheets say of a GPU, and EFFICIENCY: which share of that is assumed, one number for each kind of work.

Peaks are dense (without 2:4 sparsity), FLOP/s; bandwidths bytes/s, those of links in one direction. A format without a peak has
no tensor cores there and is multiplied in BF16. Memory is what a driver reports where somebody has published that, else the
data sheet's GB, as 10^9. `lanes` are what issues the instructions that docs/kernels.md counts: 128 an SM, boost clock; none
where those kernels are not counted for the architecture. Left out: power limits, clocks under load, other form factors.
"""

from typing import NamedTuple

GIB, TB, GB, TERA = 2**30, 1e12, 1e9, 1e12


class GPU(NamedTuple):
    name: str
    capability: int  # 10 * major + minor; 0: not CUDA, everything is emulated
    memory: float  # bytes
    bandwidth: float  # of its memory
    bf16: float
    fp8: float  # 0: none
    fp4: float
    link: float  # to others in its domain, one direction
    domain: int  # GPUs that reach each other so
    nic: float  # to other domains, of one GPU
    lanes: float  # instructions a second
    source: str

    def peak(self, element: str) -> float:
        """FLOP/s of a product whose wider operand is "bf16", "fp8" or "fp4"."""
        return getattr(self, element) or self.bf16


def _nvidia(name, capability, memory, bandwidth, bf16, fp8, fp4, link, domain, nic, sms, clock, source) -> GPU:
    rates = (rate * TERA for rate in (bf16, fp8, fp4))
    return GPU(name, capability, memory, bandwidth * TB, *rates, link * GB, domain, nic * GB, sms * 128 * clock * 1e9, source)


# NICs: 400 Gb/s a GPU in DGX H100, H200 and B200 and GB200 NVL72, 800 in B300 and GB300, 200 in DGX A100.
GPUS = {
    "a100": _nvidia(
        *("A100 80GB SXM", 80, 79.2 * GIB, 2.039, 312, 0, 0, 300, 8, 25, 108, 1.41),
        "nvidia.com/en-us/data-center/a100",
    ),
    "h100": _nvidia(
        *("H100 SXM", 90, 79.2 * GIB, 3.35, 989, 1979, 0, 450, 8, 50, 132, 1.73),
        "nvidia.com/en-us/data-center/h100",
    ),
    # The same chip with slower memory, at 500 W instead of 700; its peaks "are between SXM and NVL", so an upper bound.
    "h100-hbm2e": _nvidia(
        *("H100 96GB HBM2e, 500 W", 90, 95.0 * GIB, 2.4, 989, 1979, 0, 450, 8, 50, 132, 1.73),
        "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md",
    ),
    "h200": _nvidia(
        *("H200 SXM", 90, 139.8 * GIB, 4.8, 989, 1979, 0, 450, 8, 50, 132, 1.73),
        "nvidia.com/en-us/data-center/h200",
    ),
    "b200": _nvidia(
        *("B200 (DGX, HGX)", 100, 178.4 * GIB, 8.0, 2250, 4500, 9000, 900, 8, 50, 148, 1.85),
        "nvidia.com/en-us/data-center/dgx-b200: 72 PF of dense FP4, 64 TB/s for 8",
    ),
    "gb200": _nvidia(
        *("GB200 (NVL72)", 100, 184.3 * GIB, 8.0, 2500, 5000, 10000, 900, 72, 50, 148, 1.85),
        "nvidia.com/en-us/data-center/gb200-nvl72: 720 PF of dense FP4, 576 TB/s for 72",
    ),
    "b300": _nvidia(
        *("B300 (DGX, HGX)", 103, 288e9, 8.0, 2250, 4500, 13500, 900, 8, 100, 160, 1.85),
        "nvidia.com/en-us/data-center/hgx: 108 PF of dense FP4 for 8",
    ),
    "gb300": _nvidia(
        *("GB300 (NVL72)", 103, 288e9, 8.0, 2500, 5000, 15000, 900, 72, 100, 160, 1.85),
        "nvidia.com/en-us/data-center/gb300-nvl72: 1,080 PF of dense FP4 for 72",
    ),
    # No NVLink: PCIe 5 x16. Peaks: 4,000 TOPS of sparse FP4, halved for dense and again for each doubling of bits.
    "rtx-pro-6000": _nvidia(
        *("RTX PRO 6000 Blackwell", 120, 95.0 * GIB, 1.792, 500, 1000, 2000, 64, 8, 50, 188, 2.6),
        "nvidia.com/en-us/products/workstations/professional-desktop-gpus/rtx-pro-6000",
    ),
    # No kernel here is compiled for it, so all its GEMMs are emulated in BF16, though it has FP8 (2,615 TFLOP/s).
    "mi300x": GPU(
        *("MI300X", 0, 192 * GIB, 5.3 * TB, 1307 * TERA, 0, 0, 448 * GB, 8, 50 * GB, 0),
        "amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
}


class Share(NamedTuple):
    share: float
    source: str


# Chosen once, each from one published number, and then left alone (`python plan.py --check` shows how the rest fares).
EFFICIENCY = {
    "products": Share(0.50, "torchtitan, Llama 3 8B in BF16 on 4 GB200, 21,919 tokens/s a GPU (published.py, first row)"),
    "attention": Share(0.35, "arXiv:2407.08608, abstract: FlashAttention-2, which is torch's, on an H100"),
    "memory": Share(0.83, "TransformerEngine's NVFP4 quantiser of 32,768 x 7,168 on a GB200, 6,606 of 7,928 GB/s"),
    "links": Share(0.80, "NCCL's own table of what it reaches: 360 of 450 GB/s on Hopper, 720 of 900 on Blackwell"),
}
# Seconds of a collective, and of each hop of its ring over a link or a NIC: NCCL 2.28.7, src/graph/tuning.cc, ring, simple.
START, HOP, FAR_HOP = 8.4e-6, 3.4e-6, 14e-6
PCIE = 64 * GB  # bytes/s in one direction, PCIe 5 x16
