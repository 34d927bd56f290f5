"""docs/tutorial.md: every command runs as it is written there, one after the other, in a copy of the tree."""

import os
import shutil
import subprocess

import pytest

from tests.test_docs import ROOT, fenced
from tests.test_house import FILES

PAGE = ROOT / "docs/tutorial.md"


@pytest.mark.slow
def test_every_command_of_the_tutorial(tmp_path):
    if not (ROOT / ".venv").exists():
        pytest.skip("make setup has made no .venv here")
    for file in FILES:
        (place := tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)  # with its time, by which make knows that .venv is ready
    os.symlink(ROOT / ".venv", tmp_path / ".venv")
    commands = [line for block in fenced(PAGE, "sh") for line in block.splitlines()]
    code = fenced(PAGE, "py")
    assert len(commands) > 10 and len(code) == 1

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        return done.stdout

    said = {line: run("bash", "-c", line) for line in commands if "import" not in line and "back" not in line}
    assert "My fellow citizens" in run(".venv/bin/python", "-c", code[0])
    said |= {line: run("bash", "-c", line) for line in commands if line not in said}
    assert "e2m1/16x16" in said["make inspect STEP=out/first"] and "4.03" in said["make inspect STEP=out/first"]
    for name in ("loss.png", "comparison.png", "export/nvfp4-compressed-tensors/README.md", "step_000040/sweep.png"):
        assert (tmp_path / "out/first" / name).exists(), name
