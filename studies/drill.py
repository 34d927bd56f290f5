"""python -m studies.drill [KILLS] [--ranks 2] [--seed 0]: kill -9 of random ranks at random moments, and the end of the run.

A short run undisturbed; then again, while a rank is killed so many times: while it starts, in a step, or while a checkpoint is
being written, each a third of the time, after a random delay. `launch.py` starts the ranks again each time. At the end masters,
moments and counters must have the bits of the undisturbed run's. A kill takes some 15 seconds, most of them to start again.

Left out: machines that die as a whole, which several of them would be needed for.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from checkpoint import steps

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "out" / "studies-drill"
SIZES = ["model.blocks=2", "model.seq_len=128", "train.batch_size=2", "train.val_batches=2", "train.val_every=1000"]
SIZES += ["train.log_every=1", "run.samples=0", "run.checkpoint_every=2", "parallel.gather=codes", f"run.out={PLACE}"]


def start(ranks: int, name: str, length: int) -> subprocess.Popen:
    command = [sys.executable, "launch.py", str(ranks), "train.py", "configs/tiny-nvfp4.toml", f"run.name={name}"]
    command += [*SIZES, f"train.steps={length}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(PLACE / f"{name}.log").open("w"))


def workers(name: str, out: str = str(PLACE)) -> list[int]:
    """Process ids of the ranks of a run that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if {f"run.name={name}", f"run.out={out}"} <= set(words) and "launch.py" not in words:
            found.append(int(folder.name))
    return sorted(found)


def newest(name: str) -> int:
    return (steps(PLACE / name) or [0])[-1]


def saving(name: str) -> bool:
    return any((PLACE / name).glob(".*_step_*"))


def moment(name: str, kind: str, chance: random.Random, alive) -> bool:
    """Wait for a moment of that kind; False if the run ended first."""
    begun = newest(name)
    ready = {
        "starting": lambda: bool(workers(name)),
        "in a step": lambda: newest(name) > begun,  # (it may go on from there: a run that gets nowhere ends)
        "saving": lambda: saving(name),
    }[kind]
    while alive():
        if ready():
            time.sleep(chance.random() * {"starting": 8.0, "in a step": 0.5, "saving": 0.15}[kind])
            return alive()
        time.sleep(0.01)
    return False


def differing(a: Path, b: Path) -> list[str]:
    """Files of two steps that have other bits, by their manifests."""
    found = [json.loads((folder / "MANIFEST.json").read_text())["sha256"] for folder in (a, b)]
    return [
        name
        for name in found[0]
        if found[0][name] != found[1].get(name) and name not in ("config.toml", "quantized.safetensors")
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.partition(":")[2])
    parser.add_argument("kills", nargs="?", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    length, chance = 10 + 4 * args.kills, random.Random(args.seed)
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    quiet = start(args.ranks, "undisturbed", length)
    if quiet.wait():
        raise ValueError(f"the undisturbed run ended with exit code {quiet.returncode}: see {PLACE}/undisturbed.log")
    print(f"undisturbed: {length} steps on {args.ranks} ranks", flush=True)
    run, done = start(args.ranks, "killed", length), Counter()
    while done.total() < args.kills and run.poll() is None:
        kind = chance.choice(["starting", "in a step", "saving"])
        if not moment("killed", kind, chance, lambda: run.poll() is None):
            break
        alive = workers("killed")
        if not alive:
            continue
        victim = chance.choice(alive)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        done[kind] += 1
        print(
            f"kill {done.total():3}: process {alive.index(victim) + 1} of {len(alive)}, {kind}, newest step {newest('killed')}",
            flush=True,
        )
        while victim in workers("killed") or len(workers("killed")) == args.ranks - 1:
            time.sleep(0.05)
    try:
        code = run.wait()
    finally:
        run.terminate()
    a, b = (PLACE / name / f"step_{length:06d}" for name in ("undisturbed", "killed"))
    wrong = differing(a, b) if b.exists() else ["(the last step is not there)"]
    print(f"{done.total()} kills ({', '.join(f'{n} {kind}' for kind, n in done.items())}), exit code {code}")
    print("the last step has the bits of the undisturbed run" if not wrong else f"other bits in {', '.join(wrong)}")
    return bool(wrong) or done.total() < args.kills


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"studies.drill: {error}", file=sys.stderr)
        sys.exit(2)
