"""python -m studies.moments [STEPS]: how far moments in codes take AdamW's updates from those of fp32 moments.

    u = what AdamW subtracts with learning rate 1 and no decay        error = |u - u of fp32| / |u of fp32|        of a matrix

configs/tiny-bf16.toml on windows of 64 is trained with fp32 moments for STEPS (default 60). Beside its optimiser each of KINDS
gets the same gradients, of the last 128 rows of four matrices, and keeps moments of its own. Printed: the error in each, a
mean over the steps from the tenth on; the largest |u| that there was; and the sum of sqrt v over that of fp32, at the end,
which shows moments that do not decay. A minute or two on a quiet core. What it is not: a loss (configs/fp8-adam.toml has that).
"""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from types import SimpleNamespace

import torch
from torch import Tensor

from configs import Config, load
from quant import Moments, QuantSpec, Scale
from quant.moments import AdamW
from train import Trainer, open_corpus

ROWS, FIRST = slice(-128, None), 10  # the first rows of an embedding are bytes, which text has none of
MATRICES = ("embedding", "blocks.0.attn.qkv", "blocks.1.ffn.down", "head")
FP32, E8M0 = Scale("fp32"), Scale("e8m0")
KINDS = {
    "fp32": Moments(),
    "e4m3/128": Moments(QuantSpec("e4m3", (1, 128), FP32)),
    "e4m3/128, squares": Moments(QuantSpec("e4m3", (1, 128), FP32), 2),
    "e4m3/128, squares, stochastic": Moments(QuantSpec("e4m3", (1, 128), FP32, "stochastic8"), 2),
    "e5m2/128, fourth powers": Moments(QuantSpec("e5m2", (1, 128), FP32), 4),
    "e3m4/128": Moments(QuantSpec("e3m4", (1, 128), FP32)),
    "int8/128": Moments(QuantSpec("int8", (1, 128), FP32)),
    "int8/128, squares": Moments(QuantSpec("int8", (1, 128), FP32), 2),
    "mxfp8, squares": Moments(QuantSpec("e4m3", (1, 32), E8M0), 2),
    "mxfp8, squares, stochastic": Moments(QuantSpec("e4m3", (1, 32), E8M0, "stochastic8"), 2),
    "nvfp4": Moments(QuantSpec()),
    "nvfp4, stochastic": Moments(QuantSpec(rounding="stochastic8")),
}


def measure(
    config: Config, kinds: dict[str, Moments], steps: int, first: int = FIRST
) -> dict[str, tuple[list[float], float, float]]:
    """Kind -> (error of each matrix, largest |u|, sum of sqrt v over that of fp32); kinds["fp32"] is the measure."""
    t = config.train
    with redirect_stdout(io.StringIO()):
        trainer = Trainer(config, SimpleNamespace(start=0), open_corpus(config))
        trainer.set_policy(0)
    weights = [trainer.model.get_submodule(name).weight for name in MATRICES]
    beside = {}
    for kind, moments in kinds.items():
        group = {"params": [torch.zeros_like(w[ROWS]) for w in weights], "weight_decay": 0.0}
        beside[kind] = AdamW([group], moments, t.seed, lr=1.0, betas=t.betas, eps=t.eps)
    found = {kind: ([[] for _ in weights], [0.0]) for kind in kinds}

    def updates(optimizer: AdamW) -> list[Tensor]:
        for p, w in zip(optimizer.numbers, weights, strict=True):
            p.zero_()
            p.grad = w.grad[ROWS].clone()
        optimizer.step()
        return list(optimizer.numbers)

    def before(step: Callable) -> None:
        us = {kind: updates(optimizer) for kind, optimizer in beside.items()}
        for kind, (errors, largest) in found.items() if len(seen) >= first else ():
            for error, u, exact in zip(errors, us[kind], us["fp32"], strict=True):
                error.append(float((u - exact).norm() / exact.norm()))
                largest.append(float(u.abs().max()))
        seen.append(step())

    seen, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: before(step)
    for number in range(steps):
        trainer.step(number)
    roots = {}
    for kind, optimizer in beside.items():
        roots[kind] = sum(float(optimizer.moments(p, optimizer.power)[1].sqrt().double().sum()) for p in optimizer.numbers)
    mean = {kind: [sum(error) / len(error) for error in errors] for kind, (errors, _) in found.items()}
    return {kind: (mean[kind], max(found[kind][1]), roots[kind] / roots["fp32"]) for kind in kinds}


def main(argv: list[str]) -> int:
    if len(argv) > 1 or not all(word.isdigit() and int(word) > FIRST for word in argv):
        raise ValueError(f"{' '.join(argv)}: expected one number of steps, above {FIRST}, or nothing")
    short = ["train.compile=off", "model.seq_len=64"]
    found = measure(load("configs/tiny-bf16.toml", short), KINDS, int(argv[0]) if argv else 60)
    print(f"{'':30}" + "".join(f"{name:>18}" for name in MATRICES) + f"{'largest':>9}{'sqrt v':>8}")
    for kind, (errors, largest, root) in found.items():
        print(f"{kind:30}" + "".join(f"{error:18.3f}" for error in errors) + f"{largest:9.2f}{root:8.3f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.moments: {error}", file=sys.stderr)
        sys.exit(2)
