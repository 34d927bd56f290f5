"""timeline(model, ranks): bytes on one GPU, by kind, over a step that is not the first.

    ranks W = replicas R x shards S        N parameters, m = micro_batches / W micro-batches on each rank

    masters        4 N / S             fp32
    moments        8 N / S             AdamW's, or as optimizer.state keeps them; with Kahan's compensation 4 N / S more, all
                                       that stays with parallel.offload
    gradients      4 N / S             fp32, after they are reduced. Where m > 1 they stay whole, 4 N, from the first
                                       micro-batch on, and are reduced in the backward pass of the last; with
                                       parallel.accumulate = "cut" each micro-batch reduces its own
    gathered       of the block that runs and of `prefetch` more, in fp32 or BF16 (probe.gathered_in_bf16), or as codes; of
                   embedding, head and norm, one group, throughout forward and backward
    codes          of quantised weights, of the whole model, from one optimiser's step to the next; none where they are gathered
    activations    what the blocks that ran keep for backward (probe.py)
    working        what lives for a moment: gradients of a block before they are reduced, twice; the loss; temporaries

One rank is train.py's single device: nothing is gathered, and masters and gradients are whole.
These are bytes that live. An allocator reserves `FRAGMENTS` times as much, and a GPU has `ASIDE` less than its memory.
Sources: FSDP2 (arXiv:2304.11277 and torch.distributed.fsdp.fully_shard), ZeRO (arXiv:1910.02054).
"""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from configs import Config
from parallel import shared
from planning.gpus import GPU
from planning.probe import DTYPES, Model, coded, gathered_in_bf16
from quant.linear import Linear

KINDS = "masters", "moments", "gradients", "codes", "gathered", "activations", "working"
# What this trainer reserved and what lived, on an H200: 36.49 of 32.54 GiB in BF16 and 37.71 of 33.66 in NVFP4, both 1.12
# (published.OWN). Others measured 1.06, without and with expandable segments, which leave few fragments (Llama 3 8B in MXFP8
# on GB200, rdspring1/nvfp4-training-harness, llama3/run_logs/smoke_fixed_batch_size_results/20260712_fixed_batch).
FRAGMENTS = 1.12
ASIDE = 2 * 2**30  # for the CUDA context and NCCL's buffers: allowed for, not measured


class Moment(NamedTuple):
    """What is there at a moment of the step, bytes by kind."""

    phase: str  # "forward", "backward", "last forward", "last backward", "optimiser"
    place: str  # "start", "block 3", "loss", "embedding"
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def reserved(self) -> float:
        return FRAGMENTS * self.total


class Group(NamedTuple):
    """Parameters that are gathered together: bytes."""

    count: int  # parameters
    gathered: float  # as they are gathered
    made: float  # their gradients, as backward makes them


def group(config: Config, parts: list[nn.Module]) -> Group:
    """Of modules that are gathered together."""
    count, gathered, made, seen = 0, 0.0, 0.0, set()
    for module in (m for part in parts for m in part.modules()):
        for p in (p for p in module.parameters(recurse=False) if id(p) not in seen):
            seen.add(id(p))
            size = DTYPES[config.train.dtype].itemsize if gathered_in_bf16(module) else 4
            codes = config.parallel.gather == "codes" and isinstance(module, Linear) and module.recipe
            count, made = count + p.numel(), made + p.numel() * size
            gathered += code_bytes(module) if codes else p.numel() * size
    return Group(count, gathered, made)


def code_bytes(module: Linear) -> float:
    """What "codes" gathers of a Linear: fprop.w, in BF16 if it has no spec, and dgrad.w where its codes are others."""
    specs, (O, I) = module.recipe.operands(), module.weight.shape
    w, turned = specs["fprop.w"], specs["dgrad.w"]
    found = coded(w.candidates[0], (O, I)) if w else 2 * O * I
    if turned and not (turned == w and w.transposes):
        found += coded(turned.candidates[0], (I, O))
    return found


def moment_bytes(config: Config, model: nn.Module, here: bool = False) -> float:
    """Of AdamW's two moments, and of Kahan's compensation, whole. here: without moments that parallel.offload keeps on the
    host."""
    state, weights, found = config.optimizer.state, config.weights, 0.0
    for name, p in model.named_parameters():
        if not (here and config.parallel.offload):
            found += 2 * (coded(state, tuple(p.shape)) if state and p.ndim >= 2 else 4 * p.numel())
        if weights.kahan and _stored(config, name):
            found += 4 * p.numel()
    return found


def groups(model: Model) -> tuple[list[Group], Group]:
    """Of each block, and of all around them."""
    gpt, found = model.gpt, {}
    for members in model.kinds:
        found |= dict.fromkeys(members, group(model.config, [gpt.blocks[members[0]]]))
    rest = [child for name, child in gpt.named_children() if name != "blocks"]
    return [found[i] for i in range(len(gpt.blocks))], group(model.config, rest)


def timeline(model: Model, ranks: int) -> list[Moment]:
    """The moments of a step: the first micro-batch of a rank, the last one where there are several, and the optimiser."""
    c = model.config
    shards, _, micro = shared(c, ranks)
    blocks, rest = groups(model)
    pieces, around = [model.blocks[i] for i in range(len(blocks))], model.around
    N, sharded, ahead = sum(g.count for g in blocks) + rest.count, shards > 1, c.parallel.prefetch
    still, cut = dict.fromkeys(KINDS, 0.0), c.parallel.accumulate == "cut"
    still |= {"masters": 4 * N / shards, "moments": moment_bytes(c, model.gpt, here=True) / shards}
    if c.parallel.gather == "weights" or not sharded:
        still["codes"] = around.codes + sum(piece.codes for piece in pieces)

    def micro_batch(which: str, gradients: float, last: bool) -> Iterator[Moment]:
        """gradients: bytes of those that are there already, of all parameters or of none; last: they are reduced."""
        there = gradients / (4 * N)

        def at(phase: str, place: str, activations: float, working: float, near: list[Group]) -> Moment:
            gathered = (rest.gathered + sum(g.gathered for g in near)) * sharded
            parts = {"gradients": gradients, "gathered": gathered, "activations": activations, "working": working}
            return Moment(f"{which}{phase}", place, still | parts)

        def reduced(g: Group) -> float:
            """What the gradients of a group add when its backward is over."""
            return 4 * g.count * ((1 / shards if last or cut else 1) - there)

        def buffers(g: Group) -> float:
            return (g.made + 4 * g.count * (last or cut)) * (ranks > 1)

        activations = 0.0
        yield at("forward", "start", 0.0, 0.0, [])
        for i, piece in enumerate(pieces):
            activations += piece.kept
            yield at("forward", f"block {i}", activations, piece.working, blocks[i : i + 1 + ahead])
        yield at("forward", "loss", activations + around.kept, 0.0, [])
        yield at("backward", "loss", activations + around.kept, around.working, [])
        for i, piece in reversed(list(enumerate(pieces))):
            working = piece.whole - piece.kept + piece.working + buffers(blocks[i])
            yield at("backward", f"block {i}", activations, working, blocks[max(0, i - ahead) : i + 1])
            activations, gradients = activations - piece.kept, gradients + reduced(blocks[i])
        yield at("backward", "embedding", 0.0, buffers(rest), [])

    found = list(micro_batch("", 0.0, micro == 1))
    if micro > 1:
        found += micro_batch("last ", 4.0 * N / (shards if cut else 1), True)
    # The optimiser: weights from before where they are kept on a grid; one matrix of moments that were decoded or fetched.
    named = dict(model.gpt.named_parameters())
    old = sum(4 * p.numel() for name, p in named.items() if c.weights.store and _stored(c, name))
    decoded = 8 * max(p.numel() for p in named.values()) if c.optimizer.state or c.parallel.offload else 0
    return [*found, Moment("optimiser", "step", still | {"gradients": 4 * N / shards, "working": (old + decoded) / shards})]


def _stored(config: Config, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.weights.match)


def peak(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda m: m.total)


def fits(moment: Moment, gpu: GPU) -> bool:
    return moment.reserved <= gpu.memory - ASIDE


def changed(config: Config, section: str, **keys) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **keys)})
