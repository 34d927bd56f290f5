"""python launch.py N train.py CONFIG [key=value ...]: N ranks of a run on this machine, by torchrun's engine.

A rank that dies, of whatever, ends the others within seconds, and all start again from the newest complete step, after a line
that says which it was and of what; after PATIENCE starts in a row that brought no newer step, no more. A mistake of the user
(exit code 2) or a loss that is not finite (3) would only come again: those end it. Several machines: docs/scale.md, where
torchrun or Slurm starts the ranks.
"""

import signal
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from checkpoint import steps
from configs import load
from data import prepare
from parallel import LOST, shared

PATIENCE = 10
FINAL = {2, 3, 130}  # exit codes of train.py after which it is not started again
USAGE = "launch.py N train.py CONFIG [key=value ...], N >= 1 ranks"


def run(ranks: int, command: list[str]) -> tuple[int, str]:
    """-> (exit code of the first rank that failed, or 0; what happened to it)."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="narrow",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)(*command)
    except ChildFailedError as failed:
        # The cause comes first, but those that missed it, or were ended for it, may be noticed in the same second.
        found = failed.failures
        rank = min(found, key=lambda r: (found[r].exitcode in (LOST, -signal.SIGTERM), found[r].timestamp, r))
        code = found[rank].exitcode
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return code, f"rank {rank} of {ranks} {what}"
    except SignalException as stopped:
        return 0, f"stopped by {stopped.sigval.name}"
    return 0, ""


def main(argv: list[str]) -> int:
    if len(argv) < 3 or not argv[0].isdigit() or not int(argv[0]):
        raise ValueError(f"expected {USAGE}")
    ranks, (script, path, *overrides) = int(argv[0]), argv[1:]
    config = load(path, [o for o in overrides if not o.startswith("--")])  # what is wrong with it is said once
    shared(config, ranks)
    prepare(config.data)  # (hours, of a large set: ranks would wait for the first)
    if not config.run.name:  # all starts are of one run
        overrides.append(f"run.name={Path(path).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    name = config.run.name or overrides[-1].partition("=")[2]
    newest, waited = None, 0
    while True:
        code, what = run(ranks, [script, path, *overrides])
        if not code or code in FINAL:
            break
        found = (steps(Path(config.run.out, name)) or [0])[-1]
        newest, waited = found, 1 if found != newest else waited + 1
        if waited == PATIENCE:
            what += f"; {PATIENCE} starts have brought no step after {newest}"
            break
        overrides = [o for o in overrides if not o.startswith(("run.overwrite", "run.resume"))]
        overrides += ["run.overwrite=false", "run.resume=0"]  # what they did must not be done again
        print(f"launch.py: {what}; all start again from step {newest}", file=sys.stderr, flush=True)
    if what:
        print(f"launch.py: {what}", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"launch.py: {error}", file=sys.stderr)
        sys.exit(2)
