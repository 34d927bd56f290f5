"""python plan.py CONFIG [key=value ...] --gpus N --gpu NAME: what a run will take, before it runs; it needs no GPU.

    one table      parameters, FLOPs, memory of a GPU, bytes over links, time, days; what to change if it does not fit
    one picture    memory over the step, by kind: out/plan/CONFIG-N-NAME.png
    side by side   the same model, batch and GPUs with other recipes

    --check        the runs that others have published, and how far a plan is from each
    --scale        8 to 16,384 GPUs, with failures and checkpoints: the table of docs/scale.md

Counted on the meta device (planning/probe.py); memory and time follow as planning/memory.py and planning/roofline.py say.
A plan is a model. With this trainer two runs of it have been measured, on one H200: --check has them too.
"""

import argparse
import dataclasses
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from configs import Config, load, near
from model import flops_per_token
from parallel import shared
from planning.failures import interrupted, simulated
from planning.gpus import EFFICIENCY, GIB, GPU, GPUS
from planning.memory import ASIDE, FRAGMENTS, KINDS, Moment, changed, fits, groups, moment_bytes, peak, timeline
from planning.probe import LEVELS, Known, Model, element_on, pairs, sizes_of
from planning.published import OWN, ROWS, UNCHECKED, check
from planning.roofline import FORMATS, Estimate, estimate, flops, kernels, phases, quantiser_name
from quant import Moments, QuantSpec, Rule, Scale

ROOT = Path(__file__).parent
BESIDE = "bf16", "mxfp8", "nvfp4"  # recipes, of the configs of these names, that a plan is compared with
FP8_ADAM = Moments(QuantSpec("e4m3", (1, 128), Scale("fp32")), 2)  # configs/fp8-adam.toml
MEANING = {
    "masters": "fp32 weights",
    "moments": "of the optimiser",
    "gradients": "fp32",
    "codes": "quantised weights, kept for the step; BF16 where emulated",
    "gathered": "weights of the block that runs and the next",
    "activations": "kept for backward",
    "working": "loss, recomputed block, gradients before they are reduced",
}


class Plan(NamedTuple):
    config: Config
    gpu: GPU
    ranks: int
    models: dict[float, Model]  # of each phase, by the share of the run at which it begins
    moments: list[Moment]  # of the phase that takes most memory
    estimate: Estimate

    @property
    def peak(self) -> Moment:
        return peak(self.moments)

    @property
    def fits(self) -> bool:
        return fits(self.peak, self.gpu)


def plan(config: Config, gpu: GPU, ranks: int, known: Known) -> Plan:
    """known: what plans before have counted. Raises ValueError where the ranks cannot share out the micro-batches."""
    shards, _, _ = shared(config, ranks)
    models = {begin: Model(config, begin, gpu, shards > 1, known) for begin, _ in phases(config)}
    moments = max((timeline(model, ranks) for model in models.values()), key=lambda found: peak(found).total)
    return Plan(config, gpu, ranks, models, moments, estimate(models, gpu, ranks))


# --- what else there is ---


def with_recipe(config: Config, name: str) -> Config:
    """The same run with the recipe of the config of that name wherever this one quantises, to its end."""
    if name == "bf16":
        return dataclasses.replace(config, policy=(Rule(recipe="bf16"),))
    recipe = load(ROOT / f"configs/{name}.toml").recipes[name]
    kept = [rule for rule in config.policy if rule.after == 0.0 and rule.until == 1.0]
    policy = tuple(dataclasses.replace(rule, recipe="bf16" if rule.recipe == "bf16" else name) for rule in kept)
    return dataclasses.replace(config, recipes={name: recipe}, policy=policy)


def largest_batch(found: Plan, known: Known) -> int:
    """The most sequences in a micro-batch with which the step fits, at most what a rank has in a step; 0 if not even one fits.
    Bytes lie on a line, which two sizes give."""
    own, limit = found.config.train.batch_size, found.config.train.batch_size * found.config.train.micro_batches // found.ranks
    double = changed(found.config, "train", batch_size=2 * own)
    others = {begin: Model(double, begin, found.gpu, m.sharded, known, bytes_only=True) for begin, m in found.models.items()}

    def able(size: int) -> bool:
        models = (model.with_batch(others[begin], size) for begin, model in found.models.items())
        return all(fits(peak(timeline(model, found.ranks)), found.gpu) for model in models)

    return bisect_left(range(1, limit + 1), True, key=lambda size: not able(size))


Change = Callable[[Config, int], tuple[Config, int]]


def changes(found: Plan) -> Iterator[tuple[str, Change]]:
    """What saves memory, in the order of what it costs."""
    c = found.config
    for level in LEVELS[1:]:
        yield f"train.recompute={level}", lambda c, n, level=level: (changed(c, "train", recompute=level), n)
    if c.train.batch_size % 2 == 0:
        keys = dict(batch_size=c.train.batch_size // 2, micro_batches=2 * c.train.micro_batches)
        text = " ".join(f"train.{key}={value}" for key, value in keys.items())
        yield text, lambda c, n: (changed(c, "train", **keys), n)
    if c.parallel.replicas > 1:
        yield "parallel.replicas=1", lambda c, n: (changed(c, "parallel", replicas=1), n)
    if found.ranks > 1:
        yield 'parallel.gather="codes"', lambda c, n: (changed(c, "parallel", gather="codes"), n)
    if found.ranks > 1 and found.ranks < c.train.micro_batches:
        yield "parallel.accumulate=cut", lambda c, n: (changed(c, "parallel", accumulate="cut"), n)
    yield "parallel.offload=true", lambda c, n: (changed(c, "parallel", offload=True), n)
    if not c.optimizer.state:
        yield "optimizer.state of configs/fp8-adam.toml", lambda c, n: (dataclasses.replace(c, optimizer=FP8_ADAM), n)
    for n in [n for n in range(2 * found.ranks, c.train.micro_batches + 1, found.ranks) if c.train.micro_batches % n == 0][-1:]:
        yield f"NGPU={n}, the most that can share a step", lambda c, _, n=n: (c, n)


def remedies(found: Plan, known: Known) -> Iterator[str]:
    """Each that helps, alone; and if none suffices, the first of them that do together."""
    useful: list[tuple[str, Change]] = []
    enough = False
    for name, change in changes(found):
        config, ranks = change(found.config, found.ranks)
        other = plan(config, found.gpu, ranks, known)
        if other.peak.reserved < found.peak.reserved:
            useful, enough = [*useful, (name, change)], enough or other.fits
            saved = (found.peak.reserved - other.peak.reserved) / GIB
            yield f"    {name:48} saves {saved:8.2f} GiB" + ", and fits" * other.fits
    config, ranks = found.config, found.ranks
    for i, (_, change) in enumerate(useful, 1):
        config, ranks = change(config, ranks)
        if not enough and plan(config, found.gpu, ranks, known).fits:
            yield f"    the first {i} together fit"
            return
    if not enough:
        yield "    all of them together do not suffice: another GPU, or tensor or pipeline parallelism (docs/scale.md)"


# --- the table ---


def gib(size: float) -> str:
    return f"{size / GIB:9.2f} GiB"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2f} s"


def parameters(found: Plan) -> Iterator[str]:
    """By kind: what quantises them at the start of the run."""
    model = found.models[0.0]
    count: Counter[str] = Counter()
    for name, module in model.gpt.named_modules():
        recipe = getattr(module, "recipe", None)
        chosen = next((n for n, r in found.config.recipes.items() if r == recipe), "bf16") if name in model.modules else ""
        what = f"Linears, {chosen}" if chosen and name != "head" else "head" if name == "head" else name
        for p in module.parameters(recurse=False):
            what = "embedding" if name == "embedding" else what if chosen else "gains and others"
            count[what] += p.numel()
    total = sum(count.values())
    yield f"parameters      {total:,}"
    for what, n in count.items():
        yield f"  {what:22} {n:17,}  {n / total:6.1%}"


def memory(found: Plan, known: Known) -> Iterator[str]:
    c, top, still = found.config, found.peak, found.moments[0]
    shards, replicas, micro = shared(c, found.ranks)
    blocks, rest = groups(found.models[0.0])
    N = sum(g.count for g in blocks) + rest.count
    yield f"memory of a GPU, {shards} shards x {replicas} replicas, {micro} micro-batches of {c.train.batch_size} a step"
    yield f"  {'':14}{'at rest':>13} {'at the peak':>17}      ({top.phase}, {top.place})"
    for kind in KINDS:
        yield f"  {kind:12} {gib(still.parts[kind])}     {gib(top.parts[kind])}      {MEANING[kind]}"
    yield f"  {'live':12} {gib(still.total)}     {gib(top.total)}"
    yield f"  {'reserved':12} {gib(still.reserved)}     {gib(top.reserved)}      {FRAGMENTS:.2f} times that, with fragments"
    verdict = "fits" if found.fits else "DOES NOT FIT"
    yield f"  {verdict} into {found.gpu.memory / GIB:.1f} GiB less {ASIDE / GIB:.0f} for CUDA and NCCL"
    if micro > 1 and shards > 1 and c.parallel.accumulate == "whole":
        saved, more = 4 * N * (1 - 1 / shards), (micro - 1) * 4 * N * (shards - 1) / shards
        yield f"  {gib(4 * N).strip()} of these are gradients that stay whole between micro-batches:"
        yield f"  parallel.accumulate=cut saves {gib(saved).strip()} and moves {more / 1e9:,.0f} GB more a step"
    most = largest_batch(found, known)
    whole = most == c.train.batch_size * micro
    yield f"  largest micro-batch that fits: {most} sequences" + ", all that a rank has in a step" * whole
    if not found.fits:
        yield "  what to change, each alone:"
        yield from remedies(found, known)


def quantisers(found: Plan) -> list[str]:
    """Specs whose kernels are not counted for this GPU, or that no kernel takes."""
    missing: dict[str, None] = {}
    for model in found.models.values():
        for module in model.modules.values():
            (x, w), (g, turned_w), (turned_g, turned_x) = pairs(module).values()
            for rows, cols in ((x, turned_x), (g, turned_g), (w, turned_w)):
                name = quantiser_name(rows, cols)
                if name and not (name in kernels() and found.gpu.capability in kernels()[name].instructions):
                    missing[name] = None
    return list(missing)


def wide(found: Plan) -> str:
    """How many GEMMs of two quantised operands this GPU multiplies in BF16; "" if none."""
    seen: Counter[str] = Counter()
    for model in found.models.values():
        for module in model.modules.values():
            for gemm, (a, b) in pairs(module).items():
                if a and b:
                    seen[element_on(found.gpu, gemm, a, b, sizes_of(module, model.tokens)[gemm])] += 1
    return f"{seen['bf16']} of {seen.total()}" if seen["bf16"] else ""


def time(found: Plan) -> Iterator[str]:
    c, e, model = found.config, found.estimate, found.models[0.0]
    needed, done = flops(model, found.gpu), flops(model, found.gpu, executed=True)
    yield f"FLOPs of a token, at the start    {flops_per_token(c.model) / 1e9:.1f} G by model.flops_per_token; as multiplied:"
    for kind in (*FORMATS, "attention"):
        if done[kind]:
            peak_rate = found.gpu.bf16 if kind == "attention" else found.gpu.peak(kind)
            share = EFFICIENCY["attention" if kind == "attention" else "products"].share
            rate = f"{share:.0%} of {peak_rate / 1e12:,.0f} TFLOP/s"
            yield f"  {kind:12} {needed[kind] / 1e9:9.2f} G    {done[kind] / 1e9:9.2f} G with what is recomputed    at {rate}"
    yield (
        f"links, a GPU and step    {e.link / 1e9:,.1f} GB within {found.gpu.domain} GPUs, {e.nic / 1e9:,.1f} GB over its NIC"
        + (f", {e.host / 1e9:,.1f} GB over PCIe" * bool(e.host))
    )
    yield f"a step          {e.seconds:.3f} s, of which"
    for name, seconds in e.parts.items():
        if seconds:
            yield f"  {name:18} {seconds:9.3f} s  {seconds / e.seconds:6.1%}"
    tokens = c.train.steps * e.tokens
    yield f"throughput      {e.tokens_per_s:,.0f} tokens/s a GPU, {e.tokens_per_s * e.ranks:,.0f} in all"
    used = flops_per_token(c.model) * e.tokens_per_s
    yield f"                {used / 1e12:,.0f} TFLOP/s a GPU, {used / found.gpu.bf16:.1%} of its peak in BF16"
    seconds = c.train.steps * e.seconds
    yield (
        f"the run         {c.train.steps:,} steps, {tokens / 1e9:,.0f} G tokens: {duration(seconds)}, "
        f"{seconds * found.ranks / 3600:,.0f} GPU-hours"
    )
    size = 4 * sum(p.numel() for p in model.gpt.parameters()) + moment_bytes(c, model.gpt)
    stops = interrupted(found.ranks, size)
    yield (
        f"interruptions   one in {duration(stops.between)}; a checkpoint ({size / 1e9:,.0f} GB, {duration(stops.checkpoint)}) "
        f"every {duration(stops.every)} leaves {stops.goodput:.1%}: {duration(seconds / stops.goodput)}"
    )


def assumptions(found: Plan) -> Iterator[str]:
    yield "assumed"
    for kind, (share, source) in EFFICIENCY.items():
        yield f"  {kind:10} {share:.0%} of the data sheet: {source}"
    yield f"  data sheet {found.gpu.source}"
    if missing := quantisers(found):
        yield "  quantisers by bytes alone, since docs/kernels.md counts no kernel of theirs for this GPU:"
        yield from (f"    {name[:120]}" for name in missing)
    if counted := wide(found):
        yield f"  {counted} GEMMs of quantised operands are emulated here, at the peak of BF16"


def beside(found: Plan, known: Known) -> Iterator[str]:
    """The same run with other recipes."""
    own = Path(found.config.source).stem
    columns = {own: found}
    for name in BESIDE:
        columns[f"all {name}" if name == own else name] = plan(with_recipe(found.config, name), found.gpu, found.ranks, known)
    base = columns["bf16"].estimate.tokens_per_s
    yield f"beside          {'live GiB':>12} {'reserved':>12} {'step s':>12} {'tokens/s/GPU':>14} {'to bf16':>9} {'days':>9}"
    for name, other in columns.items():
        e, days = other.estimate, other.config.train.steps * other.estimate.seconds / 86400
        yield (
            f"  {name:13} {other.peak.total / GIB:12.1f} {other.peak.reserved / GIB:12.1f} {e.seconds:12.3f} "
            f"{e.tokens_per_s:14,.0f} {e.tokens_per_s / base:9.2f} {days:9.1f}" + "  does not fit" * (not other.fits)
        )


def report(found: Plan, known: Known) -> str:
    c = found.config
    head = f"plan: {c.source} on {found.ranks} x {found.gpu.name}; a model, which --check holds to measurements"
    parts = [[head], parameters(found), memory(found, known), time(found), beside(found, known), assumptions(found)]
    return "\n\n".join("\n".join(part) for part in parts)


# --- the picture ---


def picture(found: Plan, path: Path) -> Path:
    """Memory over the moments of a step, stacked by kind."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    x = range(len(found.moments))
    colours = dict(zip(KINDS, ["#4c72b0", "#8172b3", "#c44e52", "#ccb974", "#64b5cd", "#55a868", "#bbbbbb"], strict=True))
    stacked = [[moment.parts[kind] / GIB for moment in found.moments] for kind in KINDS]
    axes.stackplot(x, stacked, labels=KINDS, colors=colours.values(), step="mid", lw=0)
    axes.axhline((found.gpu.memory - ASIDE) / FRAGMENTS / GIB, color="black", ls="--", lw=1)
    limit = f"{found.gpu.name}: {found.gpu.memory / GIB:.0f} GiB less fragments, CUDA and NCCL"
    axes.annotate(limit, (0.01, (found.gpu.memory - ASIDE) / FRAGMENTS / GIB), xycoords=("axes fraction", "data"), va="bottom",
                  fontsize=8)  # fmt: skip
    spans: dict[str, list[int]] = {}
    for i, moment in enumerate(found.moments):
        spans.setdefault(moment.phase, []).append(i)
    for at in spans.values():
        axes.axvline(at[0], color="0.3", lw=0.5, alpha=0.5)
    axes.set_xticks([sum(at) / len(at) for at in spans.values()], list(spans), fontsize=8)
    top = found.moments.index(found.peak)
    axes.plot(top, found.peak.total / GIB, "kv", ms=6, label=f"peak, {found.peak.total / GIB:.1f} GiB live")
    axes.set(ylabel="GiB of one GPU, live", xlim=(0, len(found.moments) - 1), ylim=(0, None))
    axes.set_title(f"{Path(found.config.source).stem} on {found.ranks} x {found.gpu.name}: a step", fontsize=11)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


# --- what others measured ---


def checks() -> Iterator[str]:
    yield "Published runs of torchtitan (planning/published.py: sources, what is modelled). Tokens/s of a GPU; GiB reserved."
    yield f"{'':34} {'planned':>9} {'measured':>9} {'off':>7}   {'planned':>9} {'measured':>9} {'off':>7}"
    within = Counter()
    for row in ROWS:
        e, size = check(row)
        speed, space = e.tokens_per_s / row.tokens_per_s - 1, size / row.gib - 1
        within["speed"] += abs(speed) <= 0.30
        within["space"] += abs(space) <= 0.15
        yield (
            f"{row.name:34} {e.tokens_per_s:9,.0f} {row.tokens_per_s:9,.0f} {speed:+7.1%}   "
            f"{size:9.1f} {row.gib:9.1f} {space:+7.1%}"
        )
    yield f"within 30 % in throughput: {within['speed']} of {len(ROWS)}, the first of which chose the share of the peak that"
    yield f"products are taken to reach; within 15 % in memory: {within['space']} of {len(ROWS)}"
    yield ""
    yield "This trainer, on one GPU (python -m studies.steps): tokens/s; GiB live; and reserved, by a share that is from here."
    for own in OWN:
        found = plan(own.load(), GPUS[own.gpu], 1, {})
        numbers = (
            (found.estimate.tokens_per_s, own.tokens_per_s, ",.0f"),
            (found.peak.total / GIB, own.live, ".1f"),
            (found.peak.reserved / GIB, own.reserved, ".1f"),
        )
        cells = (f"{a:9{how}} {b:9{how}} {a / b - 1:+7.1%}" for a, b, how in numbers)
        yield f"{f'{own.config}, {found.gpu.name}':25} " + "   ".join(cells)
    yield "Not checked:"
    yield from (f"  {what}: {why}" for what, why in UNCHECKED.items())


# --- scale ---


def fastest(config: Config, gpu: GPU, ranks: int, known: Known) -> Plan:
    """Of all numbers of replicas whose shards fill domains of links, the fastest that fits; if none does, one replica."""
    ways = [n for n in range(1, ranks + 1) if ranks % n == 0 and (n == 1 or ranks // n % min(gpu.domain, 8) == 0)]
    found = [plan(changed(config, "parallel", replicas=n), gpu, ranks, known) for n in ways]
    return min((each for each in found if each.fits), key=lambda each: each.estimate.seconds, default=found[0])


def scale(config: Config, gpu: GPU) -> Iterator[str]:
    """A table in Markdown."""
    known: Known = {}
    micro, steps = config.train.micro_batches, config.train.steps
    whole = [n for n in range(8, micro + 1, 8) if micro % n == 0]
    sizes = [*whole, *(n for n in (1024, 2048, 4096, 8192, 16384) if n > micro)]
    heads = (
        "GPUs",
        "shards x replicas",
        "batch",
        "GiB",
        "tokens/s/GPU",
        "links",
        "M tokens/s",
        "days",
        "one stop in",
        "save every",
    )
    heads = (*heads, "goodput", "simulated", "days in all")  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for n in sizes:
        ours = config if n <= micro else changed(config, "train", micro_batches=n, steps=max(1, round(steps * micro / n)))
        found = fastest(ours, gpu, n, known)
        e, c = found.estimate, found.config
        shards, copies, _ = shared(c, n)
        model = found.models[0.0]
        size = 4 * sum(p.numel() for p in model.gpt.parameters()) + moment_bytes(c, model.gpt)
        stops, seconds = interrupted(n, size), c.train.steps * e.seconds
        played = [simulated(stops.between, stops.checkpoint, stops.every, seconds, seed) for seed in range(20)]
        cells = (
            *(f"{n:,}", f"{shards} x {copies}", f"{c.train.micro_batches / micro:.3g} x", f"{found.peak.reserved / GIB:.0f}"),
            *(f"{e.tokens_per_s:,.0f}", f"{e.parts['links'] / e.seconds:.1%}", f"{e.tokens_per_s * n / 1e6:.2f}"),
            *(f"{seconds / 86400:,.1f}", duration(stops.between), duration(stops.every), f"{stops.goodput:.1%}"),
            *(f"{sum(played) / len(played):.1%}", f"{seconds / stops.goodput / 86400:,.1f}"),
        )
        yield f"| {' | '.join(cells)} |"


# --- the command ---


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=raw)
    parser.add_argument("config", nargs="?", default="configs/nvfp4-1.2b.toml", help="a TOML file")
    parser.add_argument("override", nargs="*", default=[], help="key=value, e.g. train.recompute=none parallel.replicas=4")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="b200", help=", ".join(GPUS))
    parser.add_argument("--check", action="store_true", help="against published runs and two of this trainer, and stop")
    parser.add_argument("--scale", action="store_true", help="8 to 16,384 GPUs, and stop")
    args = parser.parse_intermixed_args(argv)
    if args.check:
        print("\n".join(checks()))
        return 0
    if args.gpu not in GPUS:
        raise ValueError(f"GPU = {args.gpu!r}: no data sheet of that name{near(args.gpu, GPUS)}")
    config, gpu = load(args.config, args.override), GPUS[args.gpu]
    if args.scale:
        print("\n".join(scale(config, gpu)))
        return 0
    known: Known = {}
    found = plan(config, gpu, args.gpus, known)
    print(report(found, known))
    path = picture(found, ROOT / f"out/plan/{Path(config.source).stem}-{args.gpus}-{args.gpu}.png")
    print(f"\npicture: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(2)
