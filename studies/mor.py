"""python -m studies.mor [seeds|sweep|stress ...] [--jobs N]: what MoR does while training (arXiv:2512.22804), on small models.

    seeds    BF16 and MoR tensor by tensor (configs/mor-tensor.toml), on the tiny model (seeds 0, 1, 2) and on one of 16 M
             parameters (seeds 0, 1): the share of tensors in FP8, and the loss; on the tiny one plain E4M3 and E5M2 too
    sweep    the threshold, with one scale a tensor: 0.02, 0.0225, 0.03, 0.0375, 0.045, 0.06: share and loss
    stress   five channels of the input of the last block's ffn.down made 2000 times as large and their weights as much smaller,
             which changes no product: where MoR falls back with one scale a tensor, and what plain E4M3 loses there

Each is a run of train.py's Trainer in a process of its own with one thread, 200 steps, in out/mor/; numbers go to
docs/measured.json and the picture to docs/mor.png. About 40 minutes with --jobs 2.
What it is not: evidence about large models. The paper reports 98.38 % of tensors in FP8; a healthy small model shows about as
many, and no difference in loss that seeds do not make too.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch

import plot
from configs import Config, load
from run import Run
from studies.recipes import MEASURED, ROOT
from train import Trainer, keep_freed_memory, open_corpus

WIDE = ["model.d_model=512", "model.ffn=2048", "model.heads=8", "model.kv_heads=4"]  # 16 M parameters
ONE_SCALE = ["specs.e4m3.block=[-1,-1]"]
ALWAYS = ["specs.mor.below=1e9"]  # never back: what E4M3 is without MoR
E5M2 = ["specs.e4m3.format=e5m2", *ALWAYS]
CHANNELS, FACTOR = 5, 2000.0
TAUS = (0.02, 0.0225, 0.03, 0.0375, 0.045, 0.06)


def runs(sections: list[str]) -> dict[str, tuple[str, list[str], bool]]:
    """Name -> (config, overrides, whether channels are made large)."""
    found = {}
    kinds = {"bf16": ("tiny-bf16", []), "mor": ("mor-tensor", []), "e4m3": ("mor-tensor", ALWAYS), "e5m2": ("mor-tensor", E5M2)}
    if "seeds" in sections:
        for size, more, seeds in (("tiny", [], 3), ("wide", WIDE, 2)):
            for kind, (config, own) in kinds.items():
                count = seeds if kind in ("bf16", "mor") else int(size == "tiny")
                for seed in range(count):
                    found[f"{size}-{kind}-{seed}"] = config, [*more, *own, f"train.seed={seed}"], False
    if "sweep" in sections:
        found |= {f"tau-{tau:g}": ("mor-tensor", [*ONE_SCALE, f"specs.mor.below={tau}"], False) for tau in TAUS}
    if "stress" in sections:
        for kind, (config, own) in kinds.items():
            if kind != "e5m2":
                found[f"stress-{kind}"] = config, [*(ONE_SCALE if kind != "bf16" else []), *own], True
    return found


def enlarge(trainer: Trainer) -> None:
    """Channels of the input of the last block's ffn.down times FACTOR; their weights are as much smaller, and have no gradient
    (Adam's steps, made for weights of the usual size, would blow them up; weight decay is all that moves them)."""
    down = trainer.model.blocks[-1].ffn.down
    factors = torch.ones(down.in_features)
    factors[torch.randperm(down.in_features, generator=torch.Generator().manual_seed(0))[:CHANNELS]] = FACTOR
    with torch.no_grad():
        down.weight /= factors
    down.register_forward_pre_hook(lambda module, args: ((args[0] * factors).to(args[0].dtype),))
    down.weight.register_hook(lambda grad: torch.where(factors > 1, 0.0, grad))


def one(config: Config, large: bool) -> dict:
    """Train it -> what came of it."""
    run, corpus = Run(config, sys.argv), open_corpus(config)
    trainer = Trainer(config, run, corpus)
    if large:
        enlarge(trainer)
    trainer.set_policy(0)
    run.open(0, {"command": sys.argv, "commit": run.commit()})
    metrics = trainer.train()
    run.close()
    found = shares_of(run.folder)
    plot.loss(run.folder)
    plot.choices(run.folder)
    return {"loss": round(metrics["val_loss"], 4), **found}


def shares_of(folder: Path) -> dict:
    """Shares below 16 bits over the run, and the five operands that fell back most."""
    lines = plot.lines_of(folder)
    found = {k: plot.over_run(lines, lambda line, k=k: line.get(f"quant/share_{k}")) for k in ("tensors", "elements", "flops")}
    fell = {}
    for place in dict.fromkeys(place for line in lines for place in plot.shares(line)):
        fell[" ".join(place)] = plot.over_run(lines, lambda line, p=place: plot.high(plot.shares(line)[p]))
    worst = sorted(((k, round(v, 4)) for k, v in fell.items() if v), key=lambda item: -item[1])[:5]
    return {k: round(v, 4) for k, v in found.items() if v is not None} | {"fell_back": dict(worst)}


def spawn(name: str, config: str, overrides: list[str], large: bool) -> dict:
    own = [f"run.name={name}", "run.out=out/mor", "run.overwrite=true", "run.samples=0"]
    command = [sys.executable, "-m", "studies.mor", "--one", json.dumps([f"configs/{config}.toml", [*overrides, *own], large])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(name: str, found: dict) -> None:
    known = json.loads(MEASURED.read_text())
    known["mor"] = dict(sorted((known.get("mor", {}) | {name: found}).items()))
    MEASURED.write_text(json.dumps(known, indent=1) + "\n")


def report(found: dict[str, dict]) -> list[str]:
    """The tables, of what there is."""
    lines = []
    for size in ("tiny", "wide"):
        base = {n[-1]: f["loss"] for n, f in found.items() if n.startswith(f"{size}-bf16-")}
        if not base:
            continue
        spread = (max(base.values()) - min(base.values())) / 2
        lines.append(f"\n{size}: BF16 {mean(base.values()):.4f} +- {spread:.4f} nats/token over {len(base)} seeds")
        for kind in ("mor", "e4m3", "e5m2"):
            rows = {n[-1]: f for n, f in found.items() if n.startswith(f"{size}-{kind}-") and n[-1] in base}
            if rows:
                gaps = [f"{100 * (f['loss'] / base[s] - 1):+.2f} %" for s, f in rows.items()]
                share = f", {mean(f['tensors'] for f in rows.values()):.2%} of tensors in FP8" if kind == "mor" else ""
                lines.append(f"  {kind:5} loss {', '.join(gaps)} against BF16 of the same seed{share}")
    if taus := {n: f for n, f in found.items() if n.startswith("tau-")}:
        lines.append("\nthreshold, one scale a tensor:      tensors in FP8   elements   FLOPs    loss")
        lines += [
            f"  {n[4:]:32} {f['tensors']:15.2%} {f['elements']:10.2%} {f['flops']:7.2%} {f['loss']:9.4f}"
            for n, f in taus.items()
        ]
    if "stress-bf16" in found:
        lines.append(f"\n{CHANNELS} channels x {FACTOR:g} into the last ffn.down, one scale a tensor: loss")
        for kind in ("bf16", "mor", "e4m3"):
            if (f := found.get(f"stress-{kind}")) is not None:
                fell = "; fell back: " + ", ".join(f"{k} {v:.0%}" for k, v in f["fell_back"].items()) if f["fell_back"] else ""
                lines.append(f"  {kind:5} {f['loss']:.4f}  {100 * (f['loss'] / found['stress-bf16']['loss'] - 1):+.2f} %{fell}")
    return lines


def draw(found: dict[str, dict], path: Path) -> None:
    """Share and loss against the threshold, and the stress."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    taus = sorted((float(n[4:]), f) for n, f in found.items() if n.startswith("tau-"))
    if taus:
        x = [100 * tau for tau, _ in taus]
        for key, style in (("tensors", "o-"), ("flops", "s--")):
            label = {"tensors": "tensors", "flops": "GEMM FLOPs"}[key] + " in FP8 (%)"
            left.plot(x, [100 * f[key] for _, f in taus], style, label=label)
        left.axvline(2.25, color="0.7", ls=":", label="error of E4M3 in range")
        left.axvline(4.5, color="0.5", ls="--", label="4.5 %, that of E5M2")
        left.set(xlabel="threshold on the mean relative error (%)", ylim=(-3, 103))
        left.set_title("share in FP8 against the threshold (one scale a tensor)", fontsize=10)
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
    stress = {k: found[f"stress-{k}"]["loss"] for k in ("bf16", "mor", "e4m3") if f"stress-{k}" in found}
    if stress:
        right.bar(stress.keys(), stress.values(), color=["0.6", "tab:blue", "tab:orange"][: len(stress)])
        low, high = min(stress.values()), max(stress.values())
        right.set(ylim=(1.3 * low - 0.3 * high - 0.02, 1.2 * high - 0.2 * low + 0.02))
        right.set_ylabel("final validation loss (nats/token)")
        for i, value in enumerate(stress.values()):
            right.text(i, value, f"{value:.3f}", ha="center", va="bottom", fontsize=9)
        right.set_title(f"{CHANNELS} channels x {FACTOR:g} into one ffn.down (one scale a tensor)", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("what", nargs="*", choices=["seeds", "sweep", "stress", "all"], default="all", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many side by side; default 1")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        path, overrides, large = json.loads(args.one)
        keep_freed_memory()
        print(json.dumps(one(load(path, overrides), large)))
        return 0
    if args.jobs < 1:
        parser.error("--jobs is at least 1")
    todo = runs(["seeds", "sweep", "stress"] if "all" in args.what else args.what)
    failed, commit = 0, Run.commit()
    with ThreadPoolExecutor(args.jobs) as pool:
        going = {name: pool.submit(spawn, name, *what) for name, what in todo.items()}
        for name, run in going.items():
            try:
                found = run.result()
            except ValueError as error:
                print(f"studies.mor: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            keep(name, found | {"commit": commit})
            share = f"  {found['tensors']:.2%} of tensors in FP8" if "tensors" in found else ""
            print(f"{name:16} loss {found['loss']:.4f}{share}", flush=True)
    known = json.loads(MEASURED.read_text()).get("mor", {})
    print("\n".join(report(known)))
    draw(known, ROOT / "docs/mor.png")
    print("\nwritten to docs/measured.json and docs/mor.png; pictures of each run in out/mor")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstudies.mor: interrupted; what has ended is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.mor: {error}", file=sys.stderr)
        sys.exit(2)
