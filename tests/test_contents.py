"""contents.py: what it prints of a checkpoint is what is in its files."""

import re
import shutil

import pytest
from safetensors.torch import load_file

import contents
import train
from tests.test_train import LADDERS, NVFP4, folder


@pytest.fixture(scope="module")
def run(small):
    train.main([NVFP4, *small, "run.name=contents", "policy.tail.last=0", "run.keep=5"])
    return folder(small, "contents")


def lines(capsys, *argv) -> list[str]:
    assert contents.main([str(each) for each in argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_bits_are_those_of_the_file(run, capsys):
    stored, masters = (load_file(run / f"step_000020/{name}.safetensors") for name in ("quantized", "model"))
    found = lines(capsys, run)
    name = "blocks.0.ffn.up"
    size = sum(t.nbytes for key, t in stored.items() if key.startswith(f"{name}."))
    (line,) = [line for line in found if line.startswith(f"{name}.weight")]
    assert float(line.split()[2]) == pytest.approx(8 * size / masters[f"{name}.weight"].numel(), abs=0.005)
    assert "e2m1/16x16" in line and "4 files" not in found[0] and "step 20" in found[0]
    total = sum(t.nbytes for name, t in stored.items() if name not in masters)
    count, whole, bits = re.match(r"([\d,]+) of ([\d,]+) parameters are quantised, at ([\d.]+) bits", found[-1]).groups()
    assert float(bits) == pytest.approx(8 * total / int(count.replace(",", "")), abs=0.0005)
    assert int(whole.replace(",", "")) == sum(w.numel() for w in masters.values())


def test_differences(run, capsys):
    steps = run / "step_000010", run / "step_000020"
    a, b = (load_file(step / "model.safetensors")["blocks.1.attn.qkv.weight"].double() for step in steps)
    (line,) = [line for line in lines(capsys, *steps) if line.startswith("blocks.1.attn.qkv")]
    change, flips = line.split()[4:6]
    assert float(change) == pytest.approx(float((a - b).norm() / b.norm()), rel=0.01)
    assert float(flips[:-1]) / 100 == pytest.approx(float((a * b < 0).double().mean()), abs=1e-5)
    assert all("0.00e+00   0.000%" in line for line in lines(capsys, run, run)[3:-1])


def test_another_recipe(run, small, capsys):
    overrides = LADDERS["mor-block-3way"]
    train.main(["configs/mor-block-3way.toml", *small, "run.name=contents-mor", "train.steps=2", *overrides])
    found = lines(capsys, folder(small, "contents-mor"), run)
    assert any("e4m3/32x32" in line and line.endswith("e2m1/16x16") for line in found), found
    step = contents.Step(folder(small, "contents-mor"))
    for name, q in step.quantised.items():
        shares = [int(share) for share in re.findall(r"(\d+)% ", step.format(name))]
        assert len(shares) == len(q.parts) and abs(sum(shares) - 100) <= len(shares) / 2


def test_a_damaged_file_is_named(run, tmp_path):

    broken = tmp_path / "step_000020"
    shutil.copytree(run / "step_000020", broken)
    with (broken / "model.safetensors").open("r+b") as f:
        f.seek(5000)
        f.write(b"\0\1")
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or altered"):
        contents.main([str(broken)])
