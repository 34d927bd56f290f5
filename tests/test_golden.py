"""Twenty training steps of every recipe, twenty known losses: crude, and hard to fool.

Each config at seed 0 on short windows, with fp32 GEMMs and activations, so that only the order of fp32 sums differs between
machines. Another order flips a few codes, which costs far more than the sums' own errors (a flip moves an element by a whole
step), so the bound is measured for each recipe: 4 times the largest change when every GEMM sums backwards, or with another
number of threads; and where another machine was further away with the same code (--widen), twice that. On one machine runs
are equal.

    python -m tests.test_golden [NAME ...]           renews tests/golden.json, of these configs or of all, and prints its finds
    python -m tests.test_golden --widen NAME ...     keeps the losses, and widens the bound to twice what this machine is away
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

import train
from configs import load
from studies.recipes import NAMES

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_name("golden.json")
GOLDEN = json.loads(FILE.read_text())
QUICK = ("tiny-nvfp4", "mxfp8")
BOUND = GOLDEN["tiny-nvfp4"]["bound"]


def losses(name: str, *overrides: str) -> list[float]:
    base = [
        "train.dtype=fp32",
        "train.gemm=fp32",
        "train.compile=off",
        f'data.cache="{ROOT / "data/cache"}"',
    ]
    path = ROOT / f"configs/{name}.toml"
    inputs = [recipe.fprop.x for recipe in load(path).recipes.values()]
    window = max(64, *(spec.multiple[0] for spec in inputs if spec), 0)  # as many rows as their blocks have
    config = load(path, [*base, f"model.seq_len={window}", *overrides])
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        trainer = train.Trainer(config, train.Run(config, []), train.Corpus(train.prepare(config.data, quiet=True)))
        trainer.set_policy(0)
    return [float(trainer.step(step)[0]) for step in range(20)]


def backwards(x, w):
    return linear(x.flip(-1), w.flip(-1))


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_every_recipe_has_its_losses():
    assert sorted(GOLDEN) == NAMES
    assert all(len(golden["losses"]) == 20 for golden in GOLDEN.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_golden_losses(name):
    found, golden = losses(name), GOLDEN[name]
    assert apart(golden["losses"], found) < golden["bound"], f"losses are {[round(v, 6) for v in found]}"


@pytest.mark.slow
def test_the_bound_notices_another_recipe():
    assert apart(GOLDEN["tiny-nvfp4"]["losses"], losses("tiny-nvfp4", "specs.nv.format=e2m3")) > BOUND


@pytest.mark.slow
def test_on_one_machine_losses_are_equal():
    assert losses("tiny-nvfp4") == losses("tiny-nvfp4")


def renew(name: str) -> dict:
    modules = sys.modules["quant.gemm"], sys.modules["quant.linear"]
    torch.set_num_threads(1)
    found = losses(name)
    torch.set_num_threads(2)
    changes = [apart(found, losses(name))]
    for module in modules:
        module.linear = backwards
    changes.append(apart(found, losses(name)))
    for module in modules:
        module.linear = linear
    # Where no code flips, what is left is the sums' own error: 1e-5 covers those of this model (1e-6 is seen).
    bound = max(4 * max(changes), 1e-5)
    print(f"{name}: 2 threads {changes[0]:.1e}, backwards {changes[1]:.1e}, last loss {found[-1]:.4f}", flush=True)
    return {"bound": float(f"{bound:.1e}"), "losses": [round(v, 6) for v in found]}


def wider(name: str) -> dict:
    golden = GOLDEN[name]
    away = apart(golden["losses"], losses(name))
    print(f"{name}: {away:.1e} away here, bound so far {golden['bound']:.1e}", flush=True)
    return golden | {"bound": max(golden["bound"], float(f"{2 * away:.1e}"))}


if __name__ == "__main__":
    widen = "--widen" in sys.argv
    for name in [n for n in sys.argv[1:] if n != "--widen"] or NAMES:
        GOLDEN[name] = wider(name) if widen else renew(name)
        kept = {n: GOLDEN[n] for n in sorted(GOLDEN) if n in NAMES}
        FILE.write_text("{\n" + ",\n".join(f'"{n}": {json.dumps(golden)}' for n, golden in kept.items()) + "\n}\n")
