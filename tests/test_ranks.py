"""Whole runs of several ranks, in real processes under gloo: how they branch, stop, fail and go on. What a step of theirs
computes: tests/test_parallel.py."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import checkpoint
import train
from studies.drill import workers
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


@pytest.mark.slow
def test_what_moves_and_lies_where_may_change_in_a_run(small):
    whole, moved = alone(small, "moved-whole"), ["parallel.gather=weights", "parallel.prefetch=0", "parallel.offload=true"]
    ranks(2, small, "moved")
    for step in (4, 6, 8):
        shutil.rmtree(folder(small, "moved") / f"step_{step:06d}")
    said = ranks(2, small, "moved", *moved)
    assert said.count("continues with a change that alters no number, parallel.") == 3 and "in the host's memory" in said
    same_end(whole, folder(small, "moved"))


@pytest.mark.slow
def test_replicas_are_saved_and_go_on(small):
    """Two replicas of one shard add two gradients, as one process and two shards do: the same bits, also of norms, summed in
    fp64 over shards and rounded to fp32 (parallel.clip: all but one in 10^8). With more ranks `parallel.replicas` means another
    order of sums, so a run keeps it, and a branch may change it."""
    two, whole = "parallel.replicas=2", alone(small, "replicas-whole")
    ranks(2, small, "replicas", two)
    same_end(whole, folder(small, "replicas"))
    for step in (4, 6, 8):
        shutil.rmtree(folder(small, "replicas") / f"step_{step:06d}")
    assert "continues from" in ranks(2, small, "replicas", two)
    same_end(whole, folder(small, "replicas"))
    assert losses(whole) == losses(folder(small, "replicas"))
    said = ranks(2, small, "replicas", code=2)
    assert "parallel.replicas: 2 -> 1" in said and "run.init_from=" in said and "Traceback" not in said
    start = f"run.init_from={folder(small, 'replicas') / 'step_000002'}"
    same_end(whole, alone(small, "replicas-to-one", start))
    ranks(2, small, "replicas-to-shards", start)
    same_end(whole, folder(small, "replicas-to-shards"))


@pytest.mark.slow
def test_two_replicas_of_two_shards_are_two_shards_of_twice_the_work(small):
    """Ranks 0, 1 | 2, 3 of two replicas and two ranks with micro-batches 0, 1 | 2, 3 both add (0 + 1) + (2 + 3): weights and
    moments have the same bits. A loss is the sum of ranks in turn: of four positive numbers, two orders differ by at most
    2 x 3 x 2^-24 of it."""
    share, run = "train.micro_batches=4", folder(small, "two-by-two")
    ranks(4, small, "two-by-two", share, "parallel.replicas=2")
    before = run.rename(run.with_name("two-by-two-whole"))
    shutil.copytree(before, run, ignore=shutil.ignore_patterns("step_*[468]"))
    assert "after step 2" in ranks(4, small, "two-by-two", share, "parallel.replicas=2")
    same_end(before, run)
    assert losses(before) == losses(run)
    ranks(2, small, "two-by-two-shards", share, f"run.init_from={run / 'step_000002'}")
    shards = folder(small, "two-by-two-shards")
    same_end(run, shards)
    assert losses(shards) == pytest.approx(losses(run)[2:], rel=6 * 2**-24, abs=0)


def begun(number: int, small, name: str, *overrides: str, config: str = "tiny-nvfp4") -> tuple[subprocess.Popen, list[int]]:
    """A run that has done a step or more since it was started; the process ids of its ranks in their order."""
    command = launcher(number, config, *small, *SHORT, f"run.name={name}", *overrides)
    log, out = folder(small, name) / "metrics.jsonl", next(o for o in small if o.startswith("run.out="))
    before = log.read_text() if log.exists() else ""
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not log.exists() or len(log.read_text()) <= len(before):
        assert started.poll() is None, started.stdout.read()
        time.sleep(0.002)
    found = {}
    for pid in workers(name, out.removeprefix("run.out=")):
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found[next(int(word[5:]) for word in words if word.startswith("RANK="))] = pid
    return started, [found[rank] for rank in range(number)]


@pytest.mark.slow
def test_sigterm_to_any_of_the_ranks_and_their_launcher_saves_one_step(small):
    """One run, stopped again and again: by a signal to the first rank, to the other, to both a moment apart, to the launcher,
    and to all that there are, as a scheduler does, where ranks get theirs and what the launcher passes on."""
    given = ["train.steps=60", "run.checkpoint_every=0"]
    run, done = folder(small, "term-ranks"), 0
    moments = [([0], 0), ([1], 0), ([0, 1], 0.05), ([1, 0], 0.3), ([0, 1], 0.5), ([2], 0), ([2, 0, 1], 0), ([0, 1, 2], 0.02)]
    for who, pause in moments:
        started, found = begun(2, small, "term-ranks", *given)
        for rank in who:
            with suppress(ProcessLookupError):  # that one has stopped already
                os.kill([*found, started.pid][rank], signal.SIGTERM)
            time.sleep(pause)
        said, _ = started.communicate(timeout=300)
        assert started.returncode == 0 and "Traceback" not in said, said
        newest = checkpoint.steps(run)[-1]
        assert newest > done and f": saved {run}/step_{newest:06d} and stopped" in said, (who, said)
        if len(who) == 1:
            assert ("a signal to another rank" if who == [1] else "SIGTERM") + f": saved {run}" in said, (who, said)
        assert len(losses(run)) == newest and not list(run.glob(".*"))
        done = newest
    ranks(2, small, "term-ranks", *given)
    whole = alone(small, "term-ranks-whole", *given)
    same_end(whole, run, 60)
    assert losses(whole) == losses(run)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_waits_for_the_step_that_is_being_written(small):
    """A learning rate of 1e30 breaks the weights in step 1, which is being written when step 2 shows it. All ranks run that one
    again, the first says what it found, and nobody starts again."""
    given = "train.lr=1e30", "train.warmup=0", "run.checkpoint_every=1"
    said, run = ranks(2, small, "broken-ranks", *given, code=3), folder(small, "broken-ranks")
    assert said.count("step 2 is the first with a non-finite loss") == 1 and "Traceback" not in said, said
    assert f"the last good checkpoint is {run / 'step_000001'}" in said and "start again" not in said
    assert checkpoint.steps(run) == [1] and checkpoint.fault(run / "step_000001") is None and not list(run.glob(".*"))
    for text in (said, (run / "rank_1.log").read_text()):
        assert "the ten worst operands of step 2" in text and "non-finite, SQNR" in text


@pytest.mark.slow
@pytest.mark.parametrize(("full", "size"), [([1], 300_000), ([0], 300_000), ([0, 1], 300_000), ([0], 2_000_000)])
def test_a_step_that_cannot_be_written_ends_all_ranks_and_leaves_the_others(small, full, size):
    """Files of some ranks may grow no more, as on a full disk: those of each rank's rows (of 361,088 parameters half, in 4
    bytes, and 8 of moments), or with 2 MB only that of all moments. One sentence, no new start, and what was there is there;
    with room again the run goes on."""
    name = f"full-{'-'.join(map(str, full))}-{size}"
    run = folder(small, name)
    started, found = begun(2, small, name, "train.steps=40")
    while not checkpoint.steps(run):
        assert started.poll() is None, started.stdout.read()
        time.sleep(0.002)
    for rank in full:
        resource.prlimit(found[rank], resource.RLIMIT_FSIZE, (size, size))
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 2 and "Traceback" not in said and "start again" not in said, said
    safe = checkpoint.steps(run)
    assert said.count("could not write") == 1 and "File too large" in said, said
    assert all(checkpoint.fault(checkpoint.step_folder(run, s)) is None for s in safe)
    assert f"train.py, rank 0: could not write {run}/step_{safe[-1] + 2:06d}: " in said, said
    assert f"; the newest complete checkpoint is {run}/step_{safe[-1]:06d}\n" in said, said
    assert f"after step {safe[-1]}" in ranks(2, small, name, "train.steps=40")
    assert checkpoint.steps(run)[-1] == 40 and not list(run.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        ("dqt", [], "weights.store = "),
        ("tiny-nvfp4", ["model.ffn=384"], "the config's model wants"),
    ],
)
def test_a_mistake_that_all_ranks_find_is_said_once(small, config, overrides, sentence):
    if overrides:
        ranks(2, small, "mistake-source", "train.steps=2")
        overrides = [*overrides, f"run.init_from={folder(small, 'mistake-source')}"]
    said = ranks(2, small, "mistake", *overrides, config=config, code=2)
    assert said.count(sentence) == 1 and "Traceback" not in said and "start again" not in said, said


@pytest.mark.slow
def test_a_profile_is_of_the_first_rank(small):
    said, run = ranks(2, small, "profile-ranks", "train.steps=5", "train.profile=2:4"), folder(small, "profile-ranks")
    assert said.count(f"profile: {run}/profile_2-4.json") == 1
    found = {event.get("name", "") for event in json.loads((run / "profile_2-4.json").read_text())["traceEvents"]}
    assert any("mm" in name for name in found) and any("gloo" in name for name in found), sorted(found)
    assert checkpoint.steps(run)[-1] == 5
