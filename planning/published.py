"""ROWS: runs that others have published with all that a plan needs, and what the plan says of them: `python plan.py --check`.

They are of torchtitan, which is not this trainer; OWN are runs of this one. What is modelled of torchtitan, by its own
documents and sources:

    weights        gathered in BF16, quantised where they are used, codes not kept; gradients reduced in fp32; FSDP2 by blocks
    activations    "selective": a block's input, the output of attention and of every second product are kept, of wq wk wv
                   wo w1 w3 w2 that is wq, wv and w1 (w2's is the next block's input); all else is computed again. FP8 and MXFP8
                   Linears keep the same; NVFP4 Linears, no aten.mm, keep "packed 4-bit activations", as here, and those two
    loss           2024: eager, in fp32, as here; 2025: compiled, logits and their gradient in BF16; 2026: in 8 chunks, 13 bytes
                   a logit (pytorch/torchtitan pull 4514)
    elementwise    compiled blocks: train.compile = "model"; else eager
    quantisers     by bytes at the bandwidth of their kernels: torchao's in Triton reach 1,764 of 7,928 GB/s on a GB200 with
                   NVFP4 and its RHT (nvfp4_671b_kernel_bandwidth.md); of others none is known to us, so ours is taken

Not modelled: wq, wk and wv that quantise their input each for itself (here they are one), Qwen3's norms of q and k, float8
all-gathers, what compilers keep. Published memory is the peak of what the allocator has reserved.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs import Config, load
from planning.gpus import GPUS
from planning.memory import peak, timeline
from planning.probe import FULL, Model, coded
from planning.roofline import Estimate, estimate

ROOT = Path(__file__).parent.parent
HARNESS = "github.com/rdspring1/nvfp4-training-harness, "
TITAN = "github.com/pytorch/torchtitan, benchmarks/"


class Row(NamedTuple):
    name: str
    config: str
    overrides: tuple[str, ...]
    gpu: str
    ranks: int
    tokens_per_s: float  # of one GPU
    gib: float
    selective: bool  # torchtitan's rule; else what train.recompute says
    loss: float  # bytes a logit beside the loss, 0: as here
    source: str
    quantisers: float | None = None  # share of the bandwidth that their kernels reach

    def load(self) -> Config:
        return load(ROOT / f"configs/{self.config}.toml", list(self.overrides))


def _model(**sizes: int) -> tuple[str, ...]:
    return tuple(f"model.{key}={value}" for key, value in sizes.items())


def _batch(size: int, ranks: int, length: int, compiled: bool = True) -> tuple[str, ...]:
    how = (f'train.compile="{"model" if compiled else "off"}"',)
    return (f"train.batch_size={size}", f"train.micro_batches={ranks}", f"model.seq_len={length}", *how)


_LLAMA = _model(blocks=32, d_model=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=128256)
_QWEN = _model(blocks=36, d_model=4096, ffn=12288, heads=32, kv_heads=8, head_dim=128, vocab_size=151936)
_SWIGLU = ("model.activation=swiglu",)
_TAIL = ("policy.late.after=1.0", "recipes.nvfp4.weights=bf16")


def _gb200(name: str, config: str, more: tuple[str, ...], speed: float, gib: float, file: str, qwen: bool = False) -> Row:
    sizes = (*_QWEN, *_batch(16, 4, 2048)) if qwen else (*_LLAMA, *_batch(32, 4, 2048))
    share = 1764 / 7928 if config.startswith("nvfp4") else None
    return Row(name, config, (*_SWIGLU, *sizes, *more), "gb200", 4, speed, gib, True, 13 / 8, HARNESS + file, share)


def _h100(name: str, config: str, more: tuple[str, ...], ranks: int, speed: float, gib: float, compiled: bool = True) -> Row:
    sizes = (*_SWIGLU, *_LLAMA, *_batch(2, ranks, 8192, compiled), *more)
    return Row(name, config, sizes, "h100-hbm2e", ranks, speed, gib, True, 0.0, TITAN + "llama3_h100_202412_torchtitan.md")


def _h200(ranks: int, speed: float, gib: float) -> Row:
    sizes = (*_SWIGLU, *_LLAMA, *_batch(2, ranks, 8192), *_FP8)
    source = TITAN + "llama3_8b_h200_2025-06_torchtitan.md"
    return Row(f"Llama 3 8B FP8, {ranks} H200", "fp8-tensorwise", sizes, "h200", ranks, speed, gib, True, 4.0, source)


_FP8 = ("recipes.fp8-tensorwise.weights=bf16",)
_MX = ("recipes.mxfp8.weights=bf16",)
_LONG = (*_SWIGLU, *_LLAMA, *_batch(1, 8, 32768), *_FP8, f"train.recompute={FULL}")
_RUNS, _MORE = "llama3/run_logs/eager_trainer/", "qwen3/run_logs_pretrain/random_init/eager_trainer/"
ROWS = [
    # The first is the one that EFFICIENCY["products"] was chosen by.
    _gb200("Llama 3 8B BF16, 4 GB200", "tiny-bf16", (), 21919, 174.49, _RUNS + "20260712_..._bf16_..."),
    _gb200("Llama 3 8B MXFP8, 4 GB200", "mxfp8", _MX, 28084, 179.94, _RUNS + "20260713_..._mxfp8_..."),
    _gb200("Llama 3 8B NVFP4, 4 GB200", "nvfp4", ("policy.tail.last=0", *_TAIL), 31758, 103.00, _RUNS + "20260723_..."),
    _gb200("Llama 3 8B NVFP4 but 5 blocks", "nvfp4", ("policy.tail.last=5", *_TAIL), 30011, 110.95, _RUNS + "20260801_..."),
    _gb200("Qwen3 8B BF16, 4 GB200", "tiny-bf16", (), 20913, 112.88, _MORE + "20260801_..._bf16_...", True),
    _gb200("Qwen3 8B MXFP8, 4 GB200", "mxfp8", _MX, 27587, 112.63, _MORE + "20260801_..._mxfp8_...", True),
    _gb200(
        *("Qwen3 8B NVFP4 but 6 blocks", "nvfp4", ("policy.tail.last=6", *_TAIL), 26732, 78.63),
        *(_MORE + "20260801_..._nvfp4_mixed_...", True),
    ),
    _h100("Llama 3 8B BF16, 8 H100, eager", "tiny-bf16", (), 8, 5762, 82.4, False),
    _h100("Llama 3 8B BF16, 8 H100", "tiny-bf16", (), 8, 6667, 77.0),
    _h100("Llama 3 8B FP8, 8 H100", "fp8-tensorwise", _FP8, 8, 8532, 76.8),
    _h100("Llama 3 8B BF16, 128 H100, eager", "tiny-bf16", (), 128, 5605, 67.0, False),
    _h100("Llama 3 8B BF16, 128 H100", "tiny-bf16", (), 128, 6514, 62.0),
    _h100("Llama 3 8B FP8, 128 H100", "fp8-tensorwise", _FP8, 128, 8380, 61.8),
    Row(
        *("Llama 3 8B FP8, 8 H100, T 32,768", "fp8-tensorwise", _LONG, "h100-hbm2e", 8, 3890, 83.9, False, 0.0),
        TITAN + "llama3_h100_202412_torchtitan.md, table 2, full recomputation",
    ),
    _h200(32, 10938, 47.96),
    _h200(64, 10753, 46.97),
]


class Own(NamedTuple):
    """What `python -m studies.steps` has measured of this trainer: two micro-batches of a sequence on one GPU."""

    config: str
    gpu: str
    tokens_per_s: float
    live: float  # GiB
    reserved: float

    def load(self) -> Config:
        return load(ROOT / f"configs/{self.config}.toml", ["train.micro_batches=2"])


# torch 2.11.0, CUDA 13.0, Triton 3.8.0, driver 580.159. Of three steps the first row has the mean, the second the fastest.
OWN = [
    Own("bf16-1.2b", "h200", 36_660, 32.537, 36.492),
    Own("nvfp4-1.2b", "h200", 23_460, 33.662, 37.713),
]
UNCHECKED = {
    "Llama 3 70B and 405B (same page of torchtitan)": "tensor, pipeline and context parallelism, which are not here",
    "Megatron-Bridge pull 1409, 1,574 to 1,805 TFLOP/s a GPU": "batch, parallelism and GPU are not stated beside them",
    "TransformerEngine on one GB200, 3,212 and 3,894 tokens/s (Nemotron-H 8B)": "a hybrid, batch and memory not stated",
    "DeepSeek-V3 16B (torchao pull 4798)": "mixture of experts",
    "arXiv:2509.25149, 12B": "no memory or throughput is published",
}


def selective(model: Model) -> None:
    """A Model as torchtitan's selective checkpointing has it, in place."""
    c, T = model.config.model, model.tokens
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for members in model.kinds:
        name = f"blocks.{members[0]}."
        inside = [m for n, m in model.modules.items() if n.startswith(name)]
        low = [m for m in inside if m.recipe and m.recipe.wgrad.x.format == "e2m1"]
        packed = sum(coded(m.recipe.wgrad.x, (m.in_features, T)) for m in low) / T
        kept = 2 * c.d_model + 2 * heads + 4 * c.heads + (packed if low else 2 * (heads + kv + c.ffn))
        piece = model.blocks[members[0]]
        again = c.d_model * (kv + heads + c.ffn)  # wk, wo, w3; of NVFP4 all but w2
        if low:
            again = sum(m.weight.numel() for m in inside) - c.d_model * c.ffn
        piece = replace(piece, kept=T * kept, whole=max(piece.whole, T * kept), codes=0.0, repeated=2 * T * again)
        model.blocks |= dict.fromkeys(members, piece)


def check(row: Row) -> tuple[Estimate, float]:
    """The estimate of a row, and GiB reserved."""
    config, gpu = row.load(), GPUS[row.gpu]
    model = Model(config, 0.0, gpu, sharded=True)
    if row.selective:
        selective(model)
    if row.loss:
        logits = model.tokens * config.model.vocab_size
        model.around = replace(model.around, kept=0.0, working=row.loss * logits)
    model.blocks = {i: replace(piece, codes=0.0) for i, piece in model.blocks.items()}
    return estimate({0.0: model}, gpu, row.ranks, row.quantisers), peak(timeline(model, row.ranks)).reserved / 2**30
