"""Ten training steps, ten known losses.

The default config at seed 0, with fp32 GEMMs and fp32 activations so that only the order of fp32 sums differs between
machines. The bound is measured here rather than assumed: a second run adds every GEMM up in another order (the contraction
axis of both operands is reversed, so the same products are summed backwards), and the bound is 8 times the largest
difference that makes: the change of order flips a few codes, and a flipped code costs far more than the sum's own error.
Without stochastic rounding, or with the other order of the scale's operations, the losses leave the bound.
"""

from pathlib import Path

import pytest
import torch

import quant.gemm
import quant.linear
import train
from configs import load

ROOT = Path(__file__).parent.parent
LOSSES = []
BOUND = 0.0


def ten_losses(*overrides: str) -> list[float]:
    base = ["train.steps=250", "train.dtype=fp32", "train.gemm=fp32", "train.compile=off", "train.batch_size=2"]
    config = load(ROOT / "configs/tiny-nvfp4.toml", [*base, f'data.cache="{ROOT / "data/cache"}"', *overrides])
    trainer = train.Trainer(config, train.Run(config, []), train.Corpus(train.prepare(config.data, quiet=True)))
    trainer.set_policy(0)
    return [float(trainer.step(step)[0]) for step in range(10)]


def backwards(x, w):
    return torch.nn.functional.linear(x.flip(-1), w.flip(-1))


if __name__ == "__main__":
    a = ten_losses()
    print([round(v, 7) for v in a])
    print("again", ten_losses() == a)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print("threads", threads, max(abs(x - y) for x, y in zip(a, ten_losses(), strict=True)))
    quant.gemm.linear = quant.linear.linear = backwards
    print("backwards", [abs(x - y) for x, y in zip(a, ten_losses(), strict=True)])
    quant.gemm.linear = quant.linear.linear = torch.nn.functional.linear
    for o in ("specs.nvsr.rounding=nearest", 'specs.nv.scale.order="g1"', "specs.nv2d.block=[1,16]", "policy.tail.last=0"):
        print(o, [abs(x - y) for x, y in zip(a, ten_losses(o), strict=True)])
