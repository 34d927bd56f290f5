"""python bench.py [quantise|linear ...] [--size N] [--repeats N]: how long quantising takes, as ratios within one run.

    quantise   one BF16 tensor [N, N] quantised and packed, against a copy of the same tensor (what memory alone would take)
               and against other libraries where they are installed and can do it
    linear     one Linear forward and backward (2048 tokens, 1024 x 1024), all operands quantised, against BF16;
               bytes kept for backward

Times are the least of several repeats, each thing in turn, so that a busy machine slows all alike; read the ratios.
Left out so far: a whole training step, pychop and gfloat.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from configs import load
from quant import Context, Linear, QuantSpec, Recipe, Scale, fuse, quantize
from quant.random import Key

NV = QuantSpec()
SPECS = {
    "nvfp4 1x16": NV,
    "nvfp4 16x16": QuantSpec(block=(16, 16)),
    "nvfp4 1x16 sr8": QuantSpec(rounding="stochastic8"),
    "nvfp4 1x16 rht16 sr8": QuantSpec(rounding="stochastic8", hadamard=16),
    "mxfp8 1x32": QuantSpec("e4m3", (1, 32), Scale("e8m0")),
}


def least(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each: the least of `repeats`, taken in turn, after one run to warm up."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def torchao_nvfp4() -> Callable[[Tensor], object] | None:
    """torchao's NVFP4 quantiser with a tensor scale, or None."""
    logging.disable(logging.WARNING)  # about kernels for GPUs that it cannot load here
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    except ImportError:
        return None
    finally:
        logging.disable(logging.NOTSET)
    return lambda x: nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))


def quantise(size: int, repeats: int, device: str) -> None:
    x = torch.randn(size, size, device=device).to(torch.bfloat16)
    out = torch.empty_like(x)
    works: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
    for name, spec in SPECS.items():
        works[f"ours {name}"] = lambda spec=spec: quantize(x, spec, Key(0) if spec.keyed else None)
    if (theirs := torchao_nvfp4()) is not None:
        works["torchao nvfp4 1x16, eager"] = lambda: theirs(x)
        compiled = torch.compile(theirs)
        works["torchao nvfp4 1x16, compiled"] = lambda: compiled(x)
    print(f"\nquantise and pack [{size}, {size}] BF16")
    found = least(works, repeats)
    for name, seconds in found.items():
        speed = size * size / seconds / 1e9
        print(f"  {name:30} {seconds * 1e3:9.2f} ms {speed:7.2f} G elements/s {seconds / found['copy']:8.1f} x copy")


def linear(repeats: int, device: str, tokens: int = 2048, width: int = 1024) -> None:
    x = torch.randn(tokens, width, device=device).to(torch.bfloat16).requires_grad_()
    g = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    recipes: dict[str, Recipe | None] = {"bf16": None}
    for name in ("mxfp8", "nvfp4"):
        recipes[name] = load(f"configs/{name}.toml").recipes[name]
    works, kept = {}, {}
    for name, recipe in recipes.items():
        module = Linear(width, width, device=device)
        module.recipe, module.context = recipe, Context(0, device=device)

        def once(module=module):
            x.grad = module.weight.grad = None
            torch.autograd.graph.increment_version(module.weight)  # as after an optimiser's step
            module(x).backward(g)

        works[name], kept[name] = once, bytes_kept(module, x)
    print(f"\none Linear forward and backward, {tokens} tokens, {width} x {width}")
    found = least(works, repeats)
    for name, seconds in found.items():
        print(
            f"  {name:12} {seconds * 1e3:8.2f} ms {seconds / found['bf16']:6.2f} x BF16"
            f"   {kept[name] / 2**20:6.2f} MiB kept for backward, {kept[name] / kept['bf16']:.2f} of BF16"
        )


def bytes_kept(module: Linear, x: Tensor) -> int:
    """Of activations, by what autograd saves; the weight is there anyway."""
    seen = {}

    def pack(t: Tensor) -> Tensor:
        if not (t.is_floating_point() and t.shape == module.weight.shape):  # (the weight in the compute dtype)
            seen[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(seen.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time the quantiser, as ratios.")
    parser.add_argument("what", nargs="*", default=["quantise", "linear"], help="quantise | linear; default: both")
    parser.add_argument("--size", type=int, default=8192, help="of the tensor to quantise (default 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="the least of so many counts (default 5)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if unknown := {*args.what} - {"quantise", "linear"}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are quantise and linear")
    print(fuse(True))
    if "quantise" in args.what:
        quantise(args.size, args.repeats, device)
    if "linear" in args.what:
        linear(args.repeats, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
