"""launch.py: what is started again, as what, and when no more. The ranks themselves: tests/test_parallel.py."""

import pytest

import launch
from parallel import LOST

CONFIG = "configs/tiny-bf16.toml"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """How starts end, in turn: (exit code, the newest step then); and the commands they had."""
    ends, commands = [], []

    def run(ranks, command):
        code, step = ends[len(commands)]
        commands.append(command)
        folder = tmp_path / "a" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "COMPLETE").touch()
        return code, f"rank 0 of {ranks} ended with exit code {code}" if code else ""

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "prepare", lambda data: None)
    return ends, commands, [f"run.out={tmp_path}", "run.name=a"]


def test_a_crash_is_started_again_and_a_mistake_is_not(started, capsys):
    ends, commands, place = started
    ends += [(-9, 2), (1, 4), (2, 4)]
    assert launch.main(["2", "train.py", CONFIG, *place]) == 2
    assert len(commands) == 3
    assert "all start again from step 4" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["run.overwrite=true", "run.resume=2"])
def test_what_an_override_did_is_not_done_again(started, override):
    ends, commands, place = started
    ends += [(-9, 2), (0, 4)]
    assert launch.main(["2", "train.py", CONFIG, *place, override]) == 0
    first, again = commands
    assert override in first and override not in again
    assert again[-2:] == ["run.overwrite=false", "run.resume=0"]


def test_no_more_starts_when_they_bring_nothing(started, capsys):
    ends, commands, place = started
    ends += [(LOST, 2)] * 50
    assert launch.main(["2", "train.py", CONFIG, *place]) == LOST
    assert len(commands) == launch.PATIENCE
    assert f"{launch.PATIENCE} starts have brought no step after 2" in capsys.readouterr().err


def test_all_starts_are_of_one_run(started):
    ends, commands, place = started
    ends += [(-9, 2), (0, 4)]
    assert launch.main(["2", "train.py", CONFIG, place[0]]) == 0
    names = [next(o for o in command if o.startswith("run.name=")) for command in commands]
    assert names[0] == names[1] and names[0].startswith("run.name=tiny-bf16-")


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "train.py", CONFIG], ["two", "train.py", CONFIG]])
def test_usage(arguments):
    with pytest.raises(ValueError, match=r"expected launch.py N train.py CONFIG"):
        launch.main(arguments)


def test_a_config_that_is_wrong_starts_nothing(started):
    ends, commands, place = started
    with pytest.raises(ValueError, match=r"train\.stepz"):
        launch.main(["2", "train.py", CONFIG, *place, "train.stepz=3"])
    assert commands == []
