"""python -m studies.steps [CONFIG ...] [key=value ...] [--steps N] [--out FILE]: steps of real configs on this GPU, beside what
`make plan` says of them.

Trains each config (those of the 1.2B if none is named) on random tokens, two micro-batches a step, on one GPU: two steps to
warm up, N of which the fastest counts, one under the profiler. Then, of a step,

    memory    the most that lived and that was reserved, GiB
    time      seconds on the clock, and what the GPU worked, by what its kernels are called
    off       planned / measured - 1, positive where the plan wants more

The plan is that of the same config, with the same overrides, on one GPU of that name. Left out: several GPUs, what the first
step compiles, data, validation, checkpoints. Without a GPU it says so and ends with status 0.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from configs import Config, load
from plan import plan
from planning.gpus import GIB, GPUS
from quant import fuse
from train import Trainer

ROOT = Path(__file__).parent.parent
NAMES = [f"{recipe}-1.2b" for recipe in ("bf16", "mxfp8", "nvfp4", "mor", "fp8-blockwise")]
WARM = 2  # steps, of which the first compiles
KINDS = {  # part of a plan -> names of kernels, the first that matches
    "attention": r"flash|fmha|attention",
    "quantisers": r"^(quantize|amax|dequantise|errors|prepare)\w*_kernel|^triton_",
    "products": r"gemm|cutlass|nvjet|xmma|matmul|splitK",
    "optimiser": r"multi_tensor|foreach|adam",
    "copies": r"^Mem(cpy|set)",
    "elementwise": r"",
}


def trainer(config: Config) -> Trainer:
    """Of a run on the same random tokens over and over."""
    m, t = config.model, config.train
    ids = torch.randint(m.vocab_size, (t.batch_size, m.seq_len + 1), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    tokenizer = SimpleNamespace(bytes_per_token=[1.0] * m.vocab_size)
    corpus = SimpleNamespace(tokenizer=tokenizer, batch=lambda *place: batch)  # all that a step asks of it
    made = Trainer(config, run=None, corpus=corpus)
    made.set_policy(0)
    return made


def kind(kernel: str) -> str:
    return next(kind for kind, words in KINDS.items() if re.search(words, kernel))


def worked(run, device: torch.device) -> Counter[str]:
    """Seconds of the GPU by kind."""
    found: Counter[str] = Counter()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize(device)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.key:  # (Optimizer.step# is no kernel)
            found[kind(event.key)] += event.self_device_time_total / 1e6
            found[f"  {event.key[:100]}"] += event.self_device_time_total / 1e6
    return found


def measure(config: Config, steps: int) -> dict:
    made = trainer(config)
    device = made.device
    losses, seconds = [], []
    for step in range(WARM + steps):
        start = time.perf_counter()
        losses.append(made.step(step)[0].item())
        seconds.append(time.perf_counter() - start)
        if step + 1 == WARM:
            torch.cuda.reset_peak_memory_stats(device)
    found = {"seconds": min(seconds[WARM:]), "losses": losses}
    found |= {"live": torch.cuda.max_memory_allocated(device) / GIB, "reserved": torch.cuda.max_memory_reserved(device) / GIB}
    return found | {"kernels": dict(worked(lambda: made.step(WARM + steps), device))}


def planned(config: Config, gpu: str) -> dict:
    fuse(False)  # (what is compiled cannot be counted)
    found = plan(config, GPUS[gpu], 1, {})
    parts = Counter()
    for part, seconds in found.estimate.parts.items():
        parts[part.split(" in ")[0]] += seconds
    return {"seconds": found.estimate.seconds, "live": found.peak.total / GIB, "reserved": found.peak.reserved / GIB,
            "parts": dict(parts)}  # fmt: skip


def report(name: str, got: dict, said: dict, tokens: int) -> list[str]:
    kernels, parts = got["kernels"], said["parts"]
    lines = [f"{name}: {tokens / got['seconds']:,.0f} tokens/s; losses {', '.join(f'{loss:.4f}' for loss in got['losses'])}"]
    rows = [("live GiB", said["live"], got["live"]), ("reserved GiB", said["reserved"], got["reserved"])]
    rows += [("step s", said["seconds"], got["seconds"])]
    rows += [(f"  {kind} s", parts.get(kind, 0.0), kernels.get(kind, 0.0)) for kind in KINDS]
    rows += [("  idle s", 0.0, got["seconds"] - sum(kernels.get(kind, 0.0) for kind in KINDS))]
    lines.append(f"  {'':16} {'planned':>9} {'measured':>9} {'off':>8}")
    for what, a, b in rows:
        lines.append(f"  {what:16} {a:9.3f} {b:9.3f}" + (f" {a / b - 1:+8.1%}" if a and b > 0 else ""))
    return lines


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=raw)
    parser.add_argument("given", nargs="*", metavar="CONFIG or key=value")
    parser.add_argument("--steps", type=int, default=3, help="that count, at least 1; default 3")
    parser.add_argument("--out", type=Path, help="JSON, with every kernel")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps is at least 1")
    if not torch.cuda.is_available():
        print(f"studies.steps: not measured, torch {torch.__version__} sees no CUDA device")
        return 0
    name = torch.cuda.get_device_name()
    words = set(re.split(r"[\s-]+", name.lower()))
    gpu = next((key for key in GPUS if words >= set(key.split("-"))), "")
    if not gpu:
        raise ValueError(f"{name}: no data sheet of that name in planning/gpus.py; there are {', '.join(GPUS)}")
    overrides = ["train.micro_batches=2", *(word for word in args.given if "=" in word)]
    names = [word for word in args.given if "=" not in word] or NAMES
    print(f"{name}, torch {torch.__version__}; plan of {gpu}")
    kept = {}
    for each in names:
        config = load(each if each.endswith(".toml") else ROOT / f"configs/{each}.toml", overrides)
        got = measure(config, args.steps)
        gc.collect()
        torch.cuda.empty_cache()
        said = planned(config, gpu)
        kept[each] = got | {"planned": said}
        print("\n".join(report(each, got, said, config.tokens_per_step)), flush=True)
        if args.out:
            args.out.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"studies.steps: {error}", file=sys.stderr)
        sys.exit(2)
