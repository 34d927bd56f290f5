"""torchrun --nproc-per-node N tests/ranks.py: real training steps on N ranks and in one process, compared bit for bit.

Prints a line of JSON for each case of CASES: what differs. tests/test_parallel.py runs it.
"""

import io
import json
import os
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import torch

import train
from configs import load
from parallel import World
from quant.linear import linears, memory

ROOT = train.Path(__file__).parent.parent
SIZES = ["model.blocks=3", "model.seq_len=128", "train.batch_size=1", "train.steps=4", "train.val_batches=4"]
SIZES += ["train.gemm=bf16", "train.compile=off", f"train.micro_batches={os.environ['WORLD_SIZE']}"]


def trainer(config, world: World, corpus) -> train.Trainer:
    given = SimpleNamespace(start=0, folder=None)
    made = train.Trainer(config, given, corpus, world)
    made.set_policy(0)
    made.shards.changed()
    return made


def compared(name: str, overrides: list[str]) -> dict:
    """Two steps of a config, on all ranks and alone -> what is equal, and what was moved."""
    config = load(ROOT / f"configs/{name}.toml", [*SIZES, *overrides])
    world = World(config.parallel.replicas)
    corpus = train.open_corpus(config)
    many, one = trainer(config, world, corpus), trainer(config, World(alone=True), corpus)
    codes = sum(shown(m, q) for m, q in pairs(many, one))
    moved = dict(many.shards.traffic.received)
    steps = []
    for step in range(2):
        a, b = many.step(step), one.step(step)
        steps.append([[float(x) for x in v] for v in (a, b)])
        if not step:
            moved = {key: many.shards.traffic.received[key] - moved[key] for key in moved}
    weights = [
        name
        for name, p in one.shards.parameters.items()
        if not torch.equal(p[many.shards.rows(name)], many.shards.parameters[name])
    ]
    state = [key for key, t in memory(one.model).items() if not torch.equal(t, memory(many.model)[key])]
    amaxes = torch.equal(world.max(many.context.amaxes), one.context.amaxes)
    return {
        "config": name, "ranks": world.size, "overrides": overrides, "steps": steps, "weights": weights, "memory": state,
        "codes": codes, "amaxes": amaxes, "moved": moved, "validation": [many.validate(), one.validate()],
        "gathered": sorted({r.why_not() for r in many.shards.linears.values()}),
    }  # fmt: skip


def pairs(many, one):
    """(Linear on all ranks, its weight gathered; what one process makes of it)."""
    for block in many.model.blocks:
        block.unshard()
    for name, module in linears(one.model).items():
        if name.startswith("blocks."):
            yield linears(many.model)[name], module.quantized_weight()
    for block in many.model.blocks:
        block.reshard()


def shown(module, q) -> int:
    """1 if codes were gathered, and are those of one process."""
    found = getattr(module.weight, "operands", {}).get("fprop.w")
    if found is None:
        return 0
    for a, b in ((found.codes(), q.codes()), (found.scale_codes, q.scale_codes), (found.global_scale, q.global_scale)):
        assert a is b is None or torch.equal(a, b), module.name
    return 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World()
    for case in sys.argv[1:]:
        name, *overrides = case.split()
        with redirect_stdout(io.StringIO()):
            found = compared(name, overrides)
        if world.first:
            print("RESULT " + json.dumps(found), flush=True)
    world.close()
