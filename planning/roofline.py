"""estimate(model, gpu, ranks): seconds of a step, as the sum of what cannot overlap, and bytes over links.

    products      2 M N K / (peak of the wider operand's format x share)        emulated ones at the peak of BF16
    attention     FLOPs of flash attention / (peak of BF16 x share)             2 products forward, 5 backward, causal halves
    quantisers    the larger of bytes / (bandwidth x share) and instructions / lanes, by the table in docs/kernels.md: what
                  `make kernels-check` counts of the kernel for this architecture; of a spec that has no row, by bytes alone
    elementwise   bytes / (bandwidth x share): of eager operations, each reads and writes its tensors (counted on meta); with
                  train.compile = "model" what products read and write is written and read once forward and twice backward
    optimiser     bytes of masters, moments and gradients / (bandwidth x share), and of moments that come from the host and go
                  back / the bandwidth of PCIe, one after the other
    links         all-gathers of a block hide behind the block before (prefetch), and so do reductions in backward; what is
                  longer than that block, and the first group, is waited for

All shares are in gpus.EFFICIENCY, one number for each kind of work. Links: an all-gather or reduce-scatter of B bytes over S
ranks brings B (S - 1) / S to each at the bandwidth of its link, or, beyond a domain of links, at that of all NICs of a domain
if that is less; an all-reduce over R replicas 2 (R - 1) / R of a shard, over the rank's own NIC. Each hop of a ring takes time
too, which is what ends one over thousands of ranks.
Left out: launches, synchronisation, stragglers, the data loader, validation, checkpoints (failures.py), power limits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from configs import Config
from parallel import shared
from planning.gpus import EFFICIENCY, FAR_HOP, GPU, HOP, PCIE, START
from planning.memory import Group, groups, moment_bytes
from planning.probe import Model, backend_on, coded, element_on, pairs, sizes_of
from quant.choice import Spec
from quant.linear import GEMMS, Linear
from quant.policy import switches

KERNELS = Path(__file__).parent.parent / "docs/kernels.md"
FORMATS = "fp4", "fp8", "bf16"
PARTS = *(f"products in {f}" for f in FORMATS), "attention", "quantisers", "elementwise", "optimiser", "links"


class Kernel(NamedTuple):
    moved: float  # bytes an element, BF16 read once
    instructions: dict[int, float]  # an element, by architecture


@cache
def kernels() -> dict[str, Kernel]:
    """Variant -> what docs/kernels.md has of it."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in KERNELS.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
    head = next(i for i, row in enumerate(rows) if row[:2] == ["variant", "bytes"])
    columns = {i: int(name[3:]) for i, name in enumerate(rows[head]) if name.startswith("sm_")}
    return {
        row[0]: Kernel(float(row[1]), {a: float(row[i].split()[0]) for i, a in columns.items() if row[i] != "-"})
        for row in rows[head + 2 :]
    }


def quantiser_name(rows: Spec | None, cols: Spec | None) -> str:
    """As in docs/kernels.md; "" where nothing is quantised."""
    names = [spec.short() if spec else "-" for spec in (rows, cols)]
    return "" if names == ["-", "-"] else f"{names[0]} both ways" if names[0] == names[1] else " | ".join(names)


def _needs_amax(spec: Spec) -> bool:
    """Whether the whole tensor is read before it is quantised."""
    return not spec.scale.history and (spec.scale.outer != "none" or -1 in spec.block)


def quantiser(
    rows: Spec | None, cols: Spec | None, elements: int, gpu: GPU, read: int, decoded: bool, share: float | None = None
) -> float:
    """Seconds to quantise a tensor along one axis or both; read: bytes of an element as it is; decoded: GEMMs take values;
    share: of the bandwidth, by bytes alone, of somebody else's kernels."""
    specs = [spec for spec in (rows, cols) if spec]
    if not specs:
        return 0.0
    speed = gpu.bandwidth * (share or EFFICIENCY["memory"].share)
    if any(spec.ladder for spec in specs):  # each candidate is quantised, read again for its error, and one is decoded
        moved = sum(2 * (read + _bits(c)) for spec in specs for c in spec.candidates if c.scale.format != "none")
        return (moved + 4 * len(specs)) * elements / speed
    found = kernels().get(quantiser_name(rows, cols))
    moved = found.moved - 2 + read if found else read + sum(map(_bits, specs))
    moved += read * any(map(_needs_amax, specs)) + decoded * sum(_bits(spec) + 2 for spec in specs)
    issued = found.instructions.get(gpu.capability, 0.0) if found and not share else 0.0
    return max(moved * elements / speed, issued * elements / gpu.lanes if gpu.lanes else 0.0)


def _bits(spec: Spec) -> float:
    """Bytes of an element as codes and scales."""
    return coded(spec.candidates[0], (4096, 4096)) / 4096**2


@dataclass
class Work:
    """Seconds of one micro-batch by part, forward and backward."""

    forward: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    backward: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def modules_of(model: Model, members: list[int]) -> list[Linear]:
    """Linears of a block, or of what is around all blocks."""
    names = [f"blocks.{i}." for i in members] or [""]
    return [m for n, m in model.modules.items() if n.startswith(names[0]) and (members or not n.startswith("blocks."))]


def outside(model: Model, members: list[int]) -> float:
    """FLOPs of matrix products outside of Linears, forward and backward (of these blocks, or what is around all)."""
    piece = model.blocks[members[0]] if members else model.around
    return piece.products - 6 * model.tokens * sum(m.weight.numel() for m in modules_of(model, members[:1]))


def forwards(model: Model, members: list[int]) -> float:
    """How often a Linear there multiplies forward, on average by FLOPs: once, and what is recomputed."""
    piece = model.blocks[members[0]] if members else model.around
    return 1 + 3 * piece.repeated / piece.products if piece.products else 1.0


def flops(model: Model, gpu: GPU, executed: bool = False) -> dict[str, float]:
    """A token's FLOPs, forward and backward, by the format they are multiplied in; executed: with what is recomputed."""
    found, T = dict.fromkeys((*FORMATS, "attention"), 0.0), model.tokens
    for members in [[], *model.kinds]:
        piece = model.blocks[members[0]] if members else model.around
        count, times = max(1, len(members)), forwards(model, members)
        for module in modules_of(model, members[:1]):
            for gemm, specs in pairs(module).items():
                repeated = times if gemm == "fprop" and executed else 1
                found[element_on(gpu, gemm, *specs, sizes_of(module, T)[gemm])] += 2 * module.weight.numel() * count * repeated
        found["bf16"] += outside(model, members) * count / T
        found["attention"] += (piece.attention + piece.again * executed) * count / T
    return found


def work(model: Model, gpu: GPU, members: list[int], share: float | None = None) -> Work:
    """Of one of these blocks, or of what is around all blocks. share: as of `quantiser`."""
    piece, found, T = model.blocks[members[0]] if members else model.around, Work(), model.tokens
    memory = gpu.bandwidth * EFFICIENCY["memory"].share
    fused, calls = 0.0, forwards(model, members)
    for module in modules_of(model, members[:1]):
        specs, sizes = pairs(module), sizes_of(module, T)
        for gemm in GEMMS:
            element = element_on(gpu, gemm, *specs[gemm], sizes[gemm])
            seconds = 2 * T * module.weight.numel() / (gpu.peak(element) * EFFICIENCY["products"].share)
            into, times = (found.forward, calls) if gemm == "fprop" else (found.backward, 1)
            into[f"products in {element}"] += seconds
            found.backward[f"products in {element}"] += seconds * (times - 1)
        values = {gemm: backend_on(gpu, gemm, *specs[gemm], sizes[gemm]) == "emulate" for gemm in GEMMS}
        (x, _), (g, _), (turned_g, turned_x) = (specs[gemm] for gemm in GEMMS)
        once = quantiser(x, turned_x, T * module.in_features, gpu, 2, values["fprop"], share)
        found.forward["quantisers"] += once
        found.backward["quantisers"] += once * (calls - 1)
        found.backward["quantisers"] += quantiser(g, turned_g, T * module.out_features, gpu, 2, values["dgrad"], share)
        fused += 2 * T * (module.in_features + module.out_features)
    attention = gpu.bf16 * EFFICIENCY["attention"].share
    found.forward["attention"] += piece.attention * 2 / 7 / attention
    found.backward["attention"] += (piece.attention * 5 / 7 + piece.again) / attention
    other = gpu.bf16 * EFFICIENCY["products"].share
    found.forward["products in bf16"] += outside(model, members) / 3 / other
    found.backward["products in bf16"] += outside(model, members) * (1 + calls) / 3 / other
    moved = 3 * fused if model.config.train.compile == "model" else piece.moved
    again = piece.kept < piece.whole  # all that is not a product is computed again
    found.forward["elementwise"] += moved / 3 / memory
    found.backward["elementwise"] += moved * (2 + again) / 3 / memory
    return found


@dataclass
class Estimate:
    """Of a step, averaged over the run's recipes (policy rules with after and until)."""

    parts: dict[str, float]  # seconds
    link: float  # bytes a GPU receives in a step over links of its domain
    nic: float  # ... over its NIC
    host: float  # ... over PCIe
    tokens: int  # a step
    ranks: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.tokens / self.seconds / self.ranks


def phases(config: Config) -> Iterator[tuple[float, float]]:
    """(from, length) of each part of the run that has one policy, as shares."""
    begins = [0.0, *switches(config.policy)]
    yield from zip(begins, (b - a for a, b in zip(begins, [*begins[1:], 1.0], strict=True)), strict=True)


def estimate(models: dict[float, Model], gpu: GPU, ranks: int, share: float | None = None) -> Estimate:
    """models: of each phase, by the share of the run at which it begins. share: as of `quantiser`."""
    config = next(iter(models.values())).config
    found = Estimate(dict.fromkeys(PARTS, 0.0), 0.0, 0.0, 0.0, config.tokens_per_step, ranks)
    for begin, length in phases(config):
        parts, link, nic, host = _step(models[begin], gpu, ranks, share)
        for name, seconds in parts.items():
            found.parts[name] += length * seconds
        found.link, found.nic, found.host = found.link + length * link, found.nic + length * nic, found.host + length * host
    return found


def _step(model: Model, gpu: GPU, ranks: int, share: float | None) -> tuple[dict[str, float], float, float, float]:
    c, (shards, replicas, micro) = model.config, shared(model.config, ranks)
    memory, links = gpu.bandwidth * EFFICIENCY["memory"].share, EFFICIENCY["links"].share
    blocks, rest = groups(model)
    N = sum(g.count for g in blocks) + rest.count
    works = {i: w for members in model.kinds for w in [work(model, gpu, members, share)] for i in members}
    order, around = [works[i] for i in range(len(blocks))], work(model, gpu, [], share)
    parts = dict.fromkeys(PARTS, 0.0)
    for w in [*order, around]:
        for name in PARTS:
            parts[name] += micro * (w.forward[name] + w.backward[name])

    # Weights, once a step: each rank quantises all of them, or its shard, from fp32.
    for module in model.modules.values():
        (_, w), (_, turned), _ = pairs(module).values()
        own = shards if c.parallel.gather == "codes" else 1
        decoded = backend_on(gpu, "fprop", *pairs(module)["fprop"], sizes_of(module, model.tokens)["fprop"]) == "emulate"
        parts["quantisers"] += quantiser(w, turned, module.weight.numel(), gpu, 4, decoded, share) / own

    # The optimiser reads and writes masters and moments, and reads gradients twice (their norm).
    moments = moment_bytes(c, model.gpt)
    host = 2 * (moments - moment_bytes(c, model.gpt, here=True)) / shards  # what comes to the GPU and goes back, one by one
    parts["optimiser"] = (16 * N + 2 * moments) / shards / memory + host / PCIE

    # Links. `wide`: shards reach beyond a domain; `far`: replicas are in other domains, where a rank has a NIC of its own.
    wide, one = shards > gpu.domain, (shards - 1) / shards
    speed = links * (min(gpu.link, gpu.domain * gpu.nic) if wide else gpu.link)
    far = replicas > 1 and shards * replicas > gpu.domain
    reduced = 4 * 2 * (replicas - 1) / replicas / shards  # bytes a parameter, of the all-reduce
    across = links * (gpu.nic if far else gpu.link)
    domains = max(1, shards // gpu.domain)
    ring = (START + (domains - 1) * FAR_HOP + (shards - domains) * HOP) * (shards > 1)
    rings = (START + 2 * (replicas - 1) * (FAR_HOP if far else HOP)) * (replicas > 1)

    def gathering(g: Group) -> float:
        return g.gathered * one / speed + ring

    def reducing(g: Group) -> float:
        return g.count * (4 * one / speed + reduced / across) + ring + rings

    exposed, hidden = 0.0, bool(c.parallel.prefetch)
    times = micro if c.parallel.accumulate == "cut" else 1  # that gradients are reduced
    for last in [False] * (micro - times) + [True] * times:
        exposed += 2 * gathering(rest) + last * reducing(rest)
        for g, w in zip(blocks, order, strict=True):
            exposed += max(0.0, gathering(g) - hidden * sum(w.forward.values()))
            exposed += max(0.0, gathering(g) + last * reducing(g) - hidden * sum(w.backward.values()))
    parts["links"] = exposed
    gathers = 2 * micro * (sum(g.gathered for g in blocks) + rest.gathered)
    moved = (gathers + 4 * N * times) * one
    beyond = (gathers + 4 * N * times) * (shards - gpu.domain) / shards / gpu.domain if wide else 0.0
    reduced *= N * times
    return parts, moved + (0 if far else reduced), beyond + (reduced if far else 0), host
