"""python launch.py N train.py CONFIG [key=value ...]: N ranks of a script on this machine, by torchrun's engine.

A rank that dies, of whatever, ends the others within seconds, and all are started again from the newest complete step, up to
RESTARTS times, after a line that says which it was and why. A mistake of the user (exit code 2) or a loss that is not finite (3)
would only come again: those end it. Several machines: docs/scale.md, where torchrun or Slurm starts the ranks.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

RESTARTS = 100
FINAL = {2, 3, 130}  # exit codes of train.py after which it is not started again


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
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return code, f"rank {rank} of {ranks} {what}"
    except SignalException as stopped:
        return 0, f"stopped by {stopped.sigval.name}"
    return 0, ""


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not argv[0].isdigit() or not int(argv[0]):
        print("usage: launch.py N train.py CONFIG [key=value ...], N >= 1 ranks", file=sys.stderr)
        return 2
    for again in range(RESTARTS + 1):
        code, what = run(int(argv[0]), argv[1:])
        if not code or code in FINAL or again == RESTARTS:
            break
        print(f"launch.py: {what}; all start again, {again + 1} of {RESTARTS}", file=sys.stderr, flush=True)
    if what:
        print(f"launch.py: {what}", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
