"""Whole runs of several ranks, in real processes under gloo: how they branch, stop, fail and go on. What a step of theirs
computes: tests/test_parallel.py."""

import shutil
import subprocess
from pathlib import Path

import pytest

import train
from tests.test_parallel import launcher
from tests.test_train import ROOT, VARIANTS, assert_same_step, folder, losses

SHORT = ["train.steps=8", "train.batch_size=2", "train.log_every=1", "run.checkpoint_every=2", "run.keep=9"]
SHORT += ["parallel.gather=codes"]


def ranks(number: int, small, name: str, *overrides: str, config: str = "tiny-nvfp4", code: int = 0) -> str:
    """Run to the end; what was printed, errors last."""
    command = launcher(number, config, *small, *SHORT, f"run.name={name}", *overrides)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def alone(small, name: str, *overrides: str, config: str = "tiny-nvfp4") -> Path:
    """The same in this process; returns the run folder."""
    train.main([str(ROOT / f"configs/{config}.toml"), *small, *SHORT, f"run.name={name}", *overrides])
    return folder(small, name)


def same_end(a: Path, b: Path, step: int = 8) -> None:
    a, b = (run / f"step_{step:06d}" for run in (a, b))
    assert_same_step(a, b)
    assert (a / "state.json").read_text() == (b / "state.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [("tiny-nvfp4", "fp8-adam"), ("fp8-adam", "bf16-kahan"), ("bf16-kahan", "fp8-delayed"), ("fp8-delayed", "tiny-nvfp4")],
)
def test_ranks_branch_as_one_process_does(small, old, new):
    """From a step of one process and from one of two ranks, into other recipes, moments, stored weights and memories."""
    name = f"{old}-{new}"
    alone(small, f"{name}-1", "train.steps=2", config=old)
    ranks(2, small, f"{name}-2", "train.steps=2", config=old)
    whole = alone(small, f"{name}-1-1", f"run.init_from={folder(small, f'{name}-1')}", config=new)
    for first in (1, 2):
        said = ranks(2, small, f"{name}-{first}-2", f"run.init_from={folder(small, f'{name}-{first}')}", config=new)
        assert "branches from" in said and "after step 2" in said
        many = folder(small, f"{name}-{first}-2")
        same_end(whole, many)
        assert losses(whole) == losses(many) and len(losses(whole)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp8-delayed", "mor-delayed"])
def test_ranks_resume_with_what_linears_remember(small, variant):
    """Of each of several buffers of a Linear ranks take the maximum; a checkpoint must not bring them in other orders."""
    name, overrides = f"{variant}-resumed", VARIANTS[variant][1]
    ranks(2, small, name, *overrides, config=variant)
    for step in (4, 6, 8):
        shutil.rmtree(folder(small, name) / f"step_{step:06d}")
    assert "continues from" in ranks(2, small, name, *overrides, config=variant)
    whole, many = alone(small, f"{variant}-whole", *overrides, config=variant), folder(small, name)
    same_end(whole, many)
    assert losses(whole) == losses(many) and len(losses(whole)) == 8
