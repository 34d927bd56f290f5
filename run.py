"""The run folder out/NAME: what a run may continue, and the files it writes beside its checkpoints.

    config.toml (resolved) · run.json (command, commit, versions, device, backends) · metrics.jsonl · tb/ · samples.txt
    loss.png

One process at a time trains into a folder. An existing one continues from its newest complete step if the config continues
it, and is refused with the differences otherwise. metrics.jsonl is cut back to that step, so a continued run leaves the
file of an uninterrupted one.
"""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import checkpoint
from configs import Config, differences, dump, load
from data import place_for
from parallel import World
from plot import fallback_figure

# Keys that may change when a run is continued: none of them changes a number that training computes.
FREE = (
    "run.",
    "source",
    "data.cache",
    "data.validate",
    "train.log_every",
    "train.val_",
    "train.stats_every",
    "train.profile",
    "train.recompute",
    "parallel.gather",
    "parallel.prefetch",
    "parallel.offload",
)


class Run:
    """One run folder: the config, the console, metrics.jsonl and tensorboard. Of several ranks the first has it; the others
    write what they print into rank_N.log there."""

    def __init__(self, config: Config, argv: list[str], world: World | None = None):
        world = world or World()
        name = config.run.name or world.once(lambda: f"{Path(config.source).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.config, self.folder, self.argv, self.world = config, Path(config.run.out) / name, argv, world
        self.start = 0  # the first step to do
        self.board: SummaryWriter | None = None
        self.lock: int | None = None
        if not world.first:
            sys.stdout = self.console = io.StringIO()
        world.once(self._enter)

    def _enter(self) -> None:
        place_for(self.folder, "run.out")
        if not self.folder.exists():
            return
        self.claim()
        if self.config.run.overwrite:
            if not (self.folder / "config.toml").exists() and any(self.folder.iterdir()):
                raise ValueError(f"run.overwrite: {self.folder} is no run (it has no config.toml), so nothing was deleted")
            print(f"run: {self.folder} is started anew, as asked (run.overwrite)")
            for old in self.folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for line in checkpoint.recover(self.folder):
            print(f"run: {line}")

    def claim(self) -> None:
        """Lock the folder for this process; the lock ends with it, however it ends. Raises ValueError if another has it."""
        if self.lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(f"{self.folder} is being trained by another process; give this run another run.name") from None

    def close(self) -> None:
        """Write out what tensorboard holds back, and let go of the folder."""
        if self.board:
            self.board.close()
        if self.lock is not None:
            os.close(self.lock)
        self.board = self.lock = None

    def resume_from(self) -> Path | None:
        """The checkpoint an existing run folder continues from. Raises ValueError if the config does not continue it."""
        if not (self.folder / "config.toml").exists():
            return None
        old, new = (asdict(c) for c in (load(self.folder / "config.toml"), self.config))
        changed = differences(old, new)
        quoted = {k: f"{k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()}
        binding = [text for k, text in quoted.items() if not k.startswith(FREE) and not self._same_bits(k, changed[k])]
        if binding:
            raise ValueError(
                f"{self.folder} was trained with another config ({'; '.join(binding)}): give the run another run.name, "
                "start it anew with run.overwrite=true, or branch from one of its checkpoints with run.init_from="
            )
        for key, text in quoted.items():
            if not key.startswith(("source", "run.")):
                print(f"run: continues with a change that alters no number, {text}")
        found = checkpoint.steps(self.folder)
        if not found:
            return None
        step = self.config.run.resume or found[-1]
        if step not in found:
            raise ValueError(f"run.resume={step}: {self.folder} has the steps {', '.join(map(str, found))}")
        source = checkpoint.step_folder(self.folder, step)
        checkpoint.intact(source, "continue from it with run.resume={step}")
        return source

    def branch_from(self) -> Path | None:
        """The step folder that run.init_from means. Raises ValueError if it is none, or damaged."""
        if not self.config.run.init_from:
            return None
        try:
            source = checkpoint.find(self.config.run.init_from)
            checkpoint.intact(source, "branch from it with run.init_from={folder}")
        except ValueError as error:
            raise ValueError(f"run.init_from: {error}") from None
        return source

    @staticmethod
    def _same_bits(key: str, values: tuple) -> bool:
        return key == "train.compile" and "model" not in values

    def open(self, step: int, facts: dict) -> None:
        """Create or continue the files of the run; metrics of later steps than `step` are cut off."""
        self.start = step
        self.world.once(lambda: self._open(step, facts))
        if not self.world.first:
            sys.stdout = (self.folder / f"rank_{self.world.rank}.log").open("a", buffering=1)
            print(self.console.getvalue(), end="")

    def _open(self, step: int, facts: dict) -> None:
        self.claim()
        config = replace(self.config, run=replace(self.config.run, overwrite=False))
        checkpoint.written(self.folder / "config.toml", dump(config))
        checkpoint.written(self.folder / "run.json", json.dumps(facts, indent=1))
        self.path = self.folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
        checkpoint.written(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(self.folder / "tb"), purge_step=step + 1 if step else None)

    def write(self, metrics: dict[str, float], losses: list[float]) -> None:
        """One line of metrics.jsonl, numbers also to tensorboard. `step` counts finished steps; `losses` is that of each
        step since the last line."""
        if not self.world.first:
            return
        with self.path.open("a") as f:
            f.write(json.dumps({**metrics, "losses": losses}) + "\n")
        for key, value in metrics.items():
            if key != "step" and not isinstance(value, list):
                self.board.add_scalar(key, value, metrics["step"])
        if "val_loss" in metrics and (figure := fallback_figure(metrics)):
            self.board.add_figure("quant/fallback", figure, metrics["step"])

    def check_disk(self, checkpoint_bytes: int) -> None:
        """Raises ValueError if the checkpoints the run keeps, and the one being written, do not fit on the disk."""
        need, count = checkpoint_bytes * (self.config.run.keep + 1), self.config.run.keep + 1
        if (free := shutil.disk_usage(place_for(self.folder, "run.out")).free) < need:
            raise ValueError(
                f"{self.folder}: {free / 2**30:.2f} GiB are free, {need / 2**30:.2f} needed for {count} checkpoints"
            )

    @staticmethod
    def commit() -> str:
        """The commit of this code, with "-dirty" if files differ from it."""
        git = ["git", "describe", "--always", "--dirty"]
        try:
            done = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None  # half a line that a kill left
