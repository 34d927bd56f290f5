"""python -m studies.checkpoints [CONFIG ...] [--repeats N]: what checkpoints weigh, and how long they take.

A model of each config (tiny-nvfp4 and nvfp4-1.2b if none is named), random weights and moments, saved as train.py saves it,
read to train and to evaluate, by masters and by codes. Each against a copy of the files that it writes or reads, to the disk
(fsync), in the same minutes of the same process:

    speed     of the copy's: 1 is as fast as a copy            copies: cp of the files, then fsync
    memory    what saving takes above the model at its highest, of the largest tensor

The largest takes 16 bytes a parameter of memory, twice that of disk in out/, and some minutes. The disk of a shared machine is
as fast as its neighbours let it be: read the ratios. Left out: GPUs, from which masters are copied first.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
from configs import Config, dump, load
from data import Corpus, prepare
from model import GPT
from parallel import Whole
from quant import assign, attach, fuse
from quant.context import Context
from quant.linear import linears
from train import keep_freed_memory, make_optimizer

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "out" / "studies-checkpoints"
STATE = {"tokens": 0, "next_micro_batch": 2, "progress": 0.0, "policy": {}, "gemm": "bf16", "data_sha256": ""}


def seconds(work: Callable[[], object], repeats: int, place: Path | None = None) -> float:
    """The least of so many; `place` is removed before each."""
    best = float("inf")
    for _ in range(repeats):
        if place:
            shutil.rmtree(place, ignore_errors=True)
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def copied(files: list[Path], to: Path) -> None:
    to.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, to / file.name)
    for file in files:
        checkpoint._fsync(to / file.name)


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def study(config: Config, name: str, repeats: int) -> list[str]:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    (PLACE / "config.toml").write_text(dump(config))
    tokenizer = Corpus(prepare(load(ROOT / "configs/tiny-bf16.toml").data, quiet=True)).tokenizer.path
    model = GPT(config.model).initialise(0)
    attach(model, Context(backend="emulate"))
    assign(model, config.recipes, config.policy, 0.0)
    optimizer = make_optimizer(model.parameters(), config)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.tensor(1.0)} | {key: torch.randn_like(p) for key in ("exp_avg", "exp_avg_sq")}
    largest = max(p.nbytes for p in model.parameters())
    for _ in checkpoint.packed(model, {}):  # what is compiled and allocated once
        pass
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")

    def save() -> Path:
        return checkpoint.save(PLACE, 1, model, optimizer, STATE, tokenizer, 1)

    folder = save()
    above = (memory("VmHWM") - before) / largest
    files = sorted(folder.glob("*.safetensors"))
    sizes = {file.stem: file.stat().st_size for file in files}
    count, modules = sum(p.numel() for p in model.parameters()), linears(model).values()
    quantised = sum(module.weight.numel() for module in modules if module.recipe)
    rest = 2 * (count - quantised)  # in BF16
    lines = [
        f"{name}: {count:,} parameters, {quantised:,} of them quantised",
        f"  {', '.join(f'{stem} {size / 1e6:,.1f} MB' for stem, size in sizes.items())}",
        f"  {8 * (sizes['quantized'] - rest) / quantised:.3f} bits a quantised parameter, with names and scales",
        f"  saving takes {above:.2f} times the largest tensor above the model (target <= 1.2: {_fared(above <= 1.2)})",
    ]

    def row(what: str, work: Callable[[], object], over: list[Path], place: Path | None = None) -> None:
        size, mine = sum(file.stat().st_size for file in over), seconds(work, repeats, place)
        theirs = seconds(lambda: copied(over, PLACE / "copy"), repeats, PLACE / "copy")
        lines.append(
            f"  {what:14} {mine:8.2f} s, {size / mine / 1e6:7,.0f} MB/s: {theirs / mine:5.2f} of a copy's speed "
            f"(target >= 0.5: {_fared(theirs / mine >= 0.5)})"
        )

    row("save", save, files, folder)
    row("load to train", lambda: checkpoint.restore(folder, Whole(model), optimizer), files)
    optimizer.state.clear()
    row("load masters", lambda: checkpoint.load_model(folder), [folder / "model.safetensors"])
    row("load codes", lambda: checkpoint.load_model(folder, "quantized"), [folder / "quantized.safetensors"])
    shutil.rmtree(PLACE)
    return lines


def _fared(met: bool) -> str:
    return "met" if met else "missed"


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("config", nargs="*", default=["tiny-nvfp4", "nvfp4-1.2b"], help="names in configs/")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores; {fuse(True)}")
    keep_freed_memory()
    for name in args.config:
        print(*study(load(ROOT / f"configs/{name}.toml"), name, args.repeats), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstudies.checkpoints: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.checkpoints: {error}", file=sys.stderr)
        sys.exit(2)
