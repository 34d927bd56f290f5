"""python bench.py [quantise|linear|step|recipes|gpu ...] [--size N] [--tokens N] [--repeats N]: how long quantising takes, as
ratios in one run.

    quantise   one BF16 tensor [N, N] quantised and packed: here, eagerly and compiled, and by torchao, gfloat and pychop where
               they are installed; against a copy of the same tensor, which is what memory alone would take
    linear     one Linear forward and backward (2048 tokens, 1024 x 1024), all operands of its recipe quantised, the weight
               too, as after an optimiser's step; against BF16. Then the bytes of activations that it keeps for backward
    step       Trainer.step of train.py with a model of d_model 512 on random tokens: forward, backward, clipping, AdamW, with
               recipe and policy as the config files have them; against BF16
    recipes    a step of every config as it stands, the small model, against tiny-bf16; written to docs/measured.json too, from
               which `make table` makes a column in README.md. Only by name: it compiles for a quarter of an hour at first
    gpu        the kernels, for each Linear of three models (MODELS): x [8192 tokens, inputs] quantised by NVFP4 along both
               axes, with its amax, and a copy of x; the product with the weight, of codes or emulated: decoded, then in BF16;
               against torch's BF16 product of numbers that are there. Calls are replayed from a graph: what a host needs to
               launch them is not in these times. Only by name, and on a GPU (make bench-gpu). A small x stays in its cache,
               to the advantage of quantiser and copy

Times are the least of several repeats, each row of a section in turn after one run to warm up, so that a busy machine slows
all alike; read the ratios. A row measured on some rows of the tensor is scaled by the element (a small piece stays in the
caches, to its advantage). What the project wants to reach is in TARGETS. The table is written to out/bench.txt too.
Left out: dequantising, the memory of a step, data loading; and what others lack: blocks of 16x16 in torchao and pychop,
stochastic rounding in torchao (on a CPU) and in pychop's blocks, transforms in all three. gfloat's scales are made in numpy.
"""

import argparse
import io
import itertools
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import Config, load
from quant import Context, Linear, QuantSpec, Scale, fuse, kernel, quantize
from quant.gemm import Operand, gemm, pick_mode
from quant.linear import linears
from quant.native import supports
from quant.random import Key
from run import Run
from studies.recipes import BASE, MEASURED, NAMES
from studies.steps import trainer
from train import keep_freed_memory

ROOT = Path(__file__).parent
SPECS = {
    "nvfp4 1x16": QuantSpec(),
    "nvfp4 16x16": QuantSpec(block=(16, 16)),
    "nvfp4 1x16 sr8": QuantSpec(rounding="stochastic8"),
    "nvfp4 1x16 rht16 sr8": QuantSpec(rounding="stochastic8", hadamard=16),
    "mxfp8 1x32": QuantSpec("e4m3", (1, 32), Scale("e8m0")),
}
CONFIGS = {"bf16": "tiny-bf16", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "mor": "mor-tensor"}  # row -> config, if it is there
WIDE = (
    "model.d_model=512 model.ffn=2048 model.heads=8 model.kv_heads=4 model.head_dim=64 model.blocks=4 model.seq_len=256 "
    "model.vocab_size=4096 data.vocab_size=4096 train.batch_size=8 train.micro_batches=1"
).split()

# (section, row): what it is compared with, at most ("<=") or at least (">=") how many times that.
OURS = "ours nvfp4 1x16, compiled"
TARGETS = {
    ("quantise", OURS): ("copy", "<=", 12),
    ("quantise", "torchao nvfp4 1x16, eager"): (OURS, ">=", 10),
    ("quantise", "torchao nvfp4 1x16, compiled"): (OURS, ">=", 3),
    ("linear", "mxfp8"): ("bf16", "<=", 1.35),
    ("linear", "nvfp4"): ("bf16", "<=", 1.5),
    ("kept", "nvfp4"): ("bf16", "<=", 0.36),
    **{("step", row): ("bf16", "<=", 1.5) for row in ("mxfp8", "nvfp4", "mor")},
    # (NVFP4 products have four times the rate of BF16's by data sheets, and none has been measured; a quantiser took 4.1 copies
    # on an H200)
    ("gpu", "12b up, scaled_mm"): ("12b up, bf16", "<=", 0.4),
    ("gpu", "12b up, quantise"): ("12b up, copy", "<=", 2.5),
}
# d_model, query and key-value heads of 128, the width of the feed-forward (two matrices, squared ReLU), the source.
MODELS = {
    "1.2b": (2048, 16, 8, 6144, "arXiv:2509.25149, configs/nvfp4-1.2b.toml"),
    "8b": (4096, 32, 32, 16384, "Nemotron-3 8B, 32 blocks, by its published config"),
    "12b": (5120, 40, 8, 20480, "arXiv:2509.25149, attention and feed-forward blocks"),
}
BY_NAME = "recipes", "gpu"  # sections that only run when they are named


class Table:
    """Lines, printed as they come and kept for the file, and how the targets fared."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fared: dict[str, list[str]] = {"met": [], "missed": []}
        self.sections: set[str] = set()

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def add(self, section: str, found: dict[str, float], notes: dict[str, str], unit: str = "ms", factor: float = 1e3) -> None:
        """A line for each row, with its ratio to the first row and its target, if it has one."""
        base = next(iter(found))
        self.sections.add(section)
        for row, value in found.items():
            line = f"  {row:36} {value * factor:9.2f} {unit} {value / found[base]:8.2f} x {base}   {notes.get(row, ''):22}"
            over, sense, limit = TARGETS.get((section, row), (None, "", 0))
            if over in found:
                ratio = value / found[over]
                fared = "met" if (ratio <= limit if sense == "<=" else ratio >= limit) else "missed"
                line += f"{ratio:.1f} x ours, " * (over != base) + f"target {sense} {limit:g}: {fared}"
                self.fared[fared].append(f"{section} {row}")
            self.say(line.rstrip())

    def fare(self) -> Iterator[str]:
        """How the targets of what has run fared, a line for each word."""
        known = {*self.fared["met"], *self.fared["missed"]}
        asked = (f"{section} {row}" for section, row in TARGETS if section in self.sections)
        for word, rows in (self.fared | {"not measured": [row for row in asked if row not in known]}).items():
            yield f"targets {word}: {'; '.join(rows) or 'none'}"


class Work(NamedTuple):
    call: Callable[[], object]
    fused: bool = True
    share: float = 1.0  # of the tensor; seconds are divided by it


def least(works: dict[str, Work], repeats: int) -> dict[str, float]:
    """Seconds of each: the least of `repeats` (2 where nothing is fused, which is slow), in turn, after one to warm up."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, (call, fused, share) in works.items():
            if turn > min(repeats, 2) and not fused:
                continue
            fuse(fused)
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - start) / share)
    return best


def replayed(works: dict[str, Work], repeats: int) -> dict[str, float]:
    """As `least`, of what a GPU takes alone: calls are recorded once and replayed, so that it never waits for the host."""
    graphs, best, many = {}, dict.fromkeys(works, float("inf")), 10
    for name, (call, *_) in works.items():
        call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(many):
                call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / 1e3 / many)
    return best


# --- quantise: what others have, each as row -> Work ---


def torchao(x: Tensor) -> dict[str, Work]:
    logging.disable(logging.WARNING)  # about kernels for GPUs that it cannot load here
    try:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    finally:
        logging.disable(logging.NOTSET)
    eager = {
        "torchao nvfp4 1x16": lambda x: nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max())),
        "torchao mxfp8 1x32": lambda x: to_mx(x, torch.float8_e4m3fn, 32, scaling_mode=ScaleCalculationMode.RCEIL),
    }
    calls = {f"{row}, eager": f for row, f in eager.items()}
    calls |= {f"{row}, compiled": torch.compile(f) for row, f in eager.items()}
    return {row: Work(lambda f=f: f(x)) for row, f in calls.items()}


def gfloat(x: Tensor) -> dict[str, Work]:
    """It rounds and encodes arrays of elements and of scales; blocks, amaxes and bytes are numpy's."""
    import numpy as np
    from gfloat import RoundMode, encode_ndarray, formats, round_ndarray

    rows = max(16, len(x) // 16)
    values, draws = x[:rows].float().cpu().numpy(), np.random.default_rng(0)

    def one(spec: QuantSpec) -> tuple:
        element, scale = (getattr(formats, f"format_info_ocp_{name}") for name in (spec.format, spec.scale.format))
        mx, (b0, b1) = spec.scale.format == "e8m0", spec.block
        blocks = values.reshape(rows // b0, b0, -1, b1)
        amax = np.abs(blocks).max((1, 3), keepdims=True) / np.float32(element.max)
        outer = np.float32(1) if mx else amax.max() / np.float32(scale.max)
        s = round_ndarray(scale, amax / outer, RoundMode.TowardPositive if mx else RoundMode.TiesToEven, sat=True)
        how = (RoundMode.TiesToEven, True)
        if spec.stochastic:
            how = (RoundMode.Stochastic, True, draws.integers(0, 256, blocks.shape), 8)
        codes = encode_ndarray(element, round_ndarray(element, blocks / (s * outer), *how)).astype(np.uint8)
        return codes if mx else codes[..., ::2] | codes[..., 1::2] << 4, encode_ndarray(scale, s).astype(np.uint8), outer

    share, plain = rows / len(x), {f"gfloat {name}": spec for name, spec in SPECS.items() if not spec.hadamard}
    return {row: Work(lambda spec=spec: one(spec), share=share) for row, spec in plain.items()}


def pychop(x: Tensor) -> dict[str, Work]:
    """OCP's formats alone, scaled by powers of two, with a Python call for each element; to values, not packed."""
    from pychop import mx_quantize

    rows = max(1, len(x) // 1024)
    values = x[:rows].float().cpu().numpy()
    kinds = {"pychop mxfp4 1x16": ("mxfp4_e2m1", 16), "pychop mxfp8 1x32": ("mxfp8_e4m3", 32)}
    return {row: Work(lambda kind=kind: mx_quantize(values, *kind), share=rows / len(x)) for row, kind in kinds.items()}


def quantise(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    size = args.size
    x = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(torch.bfloat16)
    out = torch.empty_like(x)
    table.say(f"\nquantise and pack [{size}, {size}] BF16, least of {args.repeats} (ours eager: of {min(2, args.repeats)})")
    works = {"copy": Work(lambda: out.copy_(x))}
    for kind in ("eager", "compiled")[: 1 + ("fused" in fuse(True))]:
        for name, spec in SPECS.items():
            key = Key(0) if spec.keyed else None
            works[f"ours {name}, {kind}"] = Work(lambda s=spec, k=key: quantize(x, s, k), kind == "compiled")
    for library in (torchao, gfloat, pychop):
        try:
            for row, work in library(x).items():
                work.call()  # compiles, where that is to be done, or fails
                works[row] = work
        except Exception as error:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            table.say(f"  {library.__name__}: left out where it fails ({why})")
    found = least(works, args.repeats)
    notes = {name: f"{size * size / seconds / 1e6:,.0f} M elements/s" for name, seconds in found.items()}
    notes |= {name: f"on 1/{1 / works[name].share:.0f} of the rows" for name in found if works[name].share < 1}
    table.add("quantise", found, notes)


# --- linear and step: a row for each config ---


def configs(overrides: list[str]) -> dict[str, Config]:
    paths = {row: ROOT / "configs" / f"{stem}.toml" for row, stem in CONFIGS.items()}
    return {row: load(path, overrides) for row, path in paths.items() if path.exists()}


def linear(table: Table, args: argparse.Namespace, device: torch.device, tokens: int = 2048, width: int = 1024) -> None:
    generator, repeats = torch.Generator(device).manual_seed(0), 4 * args.repeats
    x, g = (torch.randn(tokens, width, device=device, generator=generator).to(torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    works, kept, notes = {}, {}, {}
    for name, config in configs([]).items():
        module = Linear(width, width, device=device)
        module.context = Context(0, pick_mode("auto", device)[0], device)
        module.recipe = config.recipes.get(config.policy[-1].recipe)  # that of all Linears without a rule of their own

        def once(module=module):
            x.grad = module.weight.grad = None
            torch.autograd.graph.increment_version(module.weight)  # as after an optimiser's step
            module(x).backward(g)

        works[name], kept[name] = Work(once), bytes_kept(module, x)
        notes[name] = f"{sum(map(bool, module.recipe.operands().values())) if module.recipe else 0} of 6 operands"
    table.say(f"\none Linear forward and backward, {tokens} tokens, {width} x {width}, least of {repeats}")
    table.add("linear", least(works, repeats), notes)
    table.say("\nactivations that this Linear keeps for backward")
    table.add("kept", kept, {}, "MiB", 2**-20)


def bytes_kept(module: Linear, x: Tensor) -> int:
    """Of activations, by what autograd saves; the weight is there anyway."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    own = module.weight.shape  # a float of that shape is the weight in the compute dtype
    return sum({t.data_ptr(): t.nbytes for t in saved if not (t.is_floating_point() and t.shape == own)}.values())


def trainers(found: dict[str, Config]) -> tuple[dict[str, Work], dict[str, str]]:
    """A training step of each on random tokens, and how many of its Linears have a recipe."""
    works, notes = {}, {}
    for name, config in found.items():
        with redirect_stdout(io.StringIO()):  # the policy, which train.py prints
            made = trainer(config)
        numbers = itertools.count()
        works[name] = Work(lambda made=made, numbers=numbers: made.step(next(numbers)))
        modules = linears(made.model).values()
        notes[name] = f"{sum(module.recipe is not None for module in modules)} of {len(modules)} Linears"
    return works, notes


def step(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    found = configs(WIDE)
    m, tokens = found["bf16"].model, found["bf16"].tokens_per_step
    works, notes = trainers(found)
    table.say(f"\none training step, {m.blocks} blocks of d_model {m.d_model}, {tokens} tokens, least of {args.repeats}")
    table.add("step", least(works, args.repeats), notes)


def recipes(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    found = {name: load(ROOT / f"configs/{name}.toml") for name in sorted(NAMES, key=lambda name: name != BASE)}
    works, notes = trainers(found)
    table.say(f"\none training step of each config, {found[BASE].tokens_per_step} tokens, least of {args.repeats}")
    seconds = least(works, args.repeats)
    table.add("recipes", seconds, notes)
    ratios = {name: round(time / seconds[BASE], 2) for name, time in sorted(seconds.items())}
    measured = json.loads(MEASURED.read_text()) | {"steps": {"commit": Run.commit(), "machine": machine(), "ratio": ratios}}
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    table.say(f"written to {MEASURED.relative_to(ROOT)}; make table brings README.md up to date")


def gpu(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    if why := _no_gpu(device):
        table.say(f"gpu: not measured, {why}")
        return
    from kernels import capability

    T, nv, turned = args.tokens, QuantSpec(), QuantSpec(hadamard=16)
    generator = torch.Generator(device).manual_seed(0)
    table.say(f"\nLinears of three models, {T} tokens, NVFP4 on sm_{capability()}, least of {args.repeats}")
    backends = {each: supports(each, nv, nv, (T, 128, 128), device) for each in ("triton", "scaled_mm")}
    for backend, why in backends.items():
        table.say(f"  {backend}: not measured, {why}" if why else f"  {backend}: scales are put in order in each call")
    for model, (d, heads, kv, ffn, source) in MODELS.items():
        table.say(f"  {model}: {source}")
        shapes = {"qkv": (d, (heads + 2 * kv) * 128), "out": (heads * 128, d), "up": (d, ffn), "down": (ffn, d)}
        for name, (inputs, outputs) in shapes.items():
            x, w = (torch.randn(n, inputs, device=device, generator=generator).to(torch.bfloat16) for n in (T, outputs))
            a, b, copy = (*(Operand(packed=kernel.encode(each, nv)) for each in (x, w)), torch.empty_like(x))

            def pair(x=x):
                return kernel.encode_pair(x, (nv, turned), (None, None), (None, None), (None, None))

            can = [*(backend for backend, why in backends.items() if not why), "emulate"]
            products = {"bf16": lambda x=x, w=w: torch.nn.functional.linear(x, w)}
            products |= {each: lambda a=a, b=b, each=each: gemm(a, b, torch.bfloat16, "bf16", each) for each in can}
            moves = {"quantise": pair, "copy": lambda x=x, copy=copy: copy.copy_(x)}
            calls = {f"{model} {name}, {row}": Work(call) for row, call in (products | moves).items()}
            found = (replayed if device.type == "cuda" else least)(calls, args.repeats)
            flops = 2 * T * inputs * outputs
            bytes_ = 2 * x.nbytes + sum(q.nbytes() for q in pair()), 2 * x.nbytes  # (read twice, for the amax first)
            speeds = [f"{flops / time / 1e12:,.1f} TFLOP/s" for time in list(found.values())[: len(products)]]
            speeds += [f"{n / time / 1e9:,.0f} GB/s" for n, time in zip(bytes_, list(found.values())[-2:], strict=True)]
            table.add("gpu", found, dict(zip(found, speeds, strict=True)))


def _no_gpu(device: torch.device) -> str:
    """Why the kernels do not run here, or ""."""
    return "" if device.type in kernel.DEVICES else f"torch {torch.__version__} sees no CUDA device"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M) or [platform.machine()]
    names = names[:1] + [torch.cuda.get_device_name() for _ in range(torch.cuda.is_available())]
    return f"{torch.get_num_threads()} threads, {', '.join(names)}"


SECTIONS = {"quantise": quantise, "linear": linear, "step": step, "recipes": recipes, "gpu": gpu}


def arguments(argv: list[str]) -> argparse.Namespace:
    # Without a usage of its own, a misuse is one sentence. `all` is a word, since a default has to be one of the choices.
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument(
        "what", nargs="*", choices=[*SECTIONS, "all"], default="all", help=f"default: all but {', '.join(BY_NAME)}"
    )
    parser.add_argument("--size", type=int, default=8192, help="N, a multiple of 32; default 8192")
    parser.add_argument("--tokens", type=int, default=8192, help="of `gpu`, a multiple of 128; default 8192")
    parser.add_argument("--repeats", type=int, default=5, help="default 5; a Linear takes four times as many")
    args = parser.parse_args(argv)
    if args.size % 32 or not 32 <= args.size <= 2**14 or args.repeats < 1:
        parser.error("--size is a multiple of 32 from 32 to 16384, and --repeats at least 1")
    if args.tokens % 128 or args.tokens < 128:
        parser.error("--tokens is a multiple of 128")
    return args


def main(argv: list[str]) -> int:
    args, table, device = arguments(argv), Table(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == ["gpu"] and _no_gpu(device):
        gpu(table, args, device)  # says why
        return 0
    keep_freed_memory()  # as in training
    table.say(f"torch {torch.__version__}, {machine()}")
    table.say(fuse(True))
    for name, section in SECTIONS.items():
        if name in args.what or ("all" in args.what and name not in BY_NAME):
            section(table, args, device)
    table.say("")
    for line in table.fare():
        table.say(line)
    path = ROOT / "out" / "bench.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(table.lines) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nbench.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
