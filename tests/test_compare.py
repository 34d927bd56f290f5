"""compare.py: the first operand that parts is found where it was made to part, and nothing where nothing does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
from configs import load
from train import open_corpus

ROOT = Path(__file__).parent.parent


def pair(small, a: str, b: str, *more: str) -> list:
    configs = [load(ROOT / f"configs/{name}.toml", [*small, *more]) for name in (a, b)]
    compare.same_data(*configs)
    corpus = open_corpus(configs[0])
    return [compare.trainer_for(c, Path("."), 0, corpus) for c in configs]


def quiet(line: str) -> None:
    pass


def test_a_run_does_not_part_from_itself(small):
    found = compare.compare(*pair(small, "ufp4", "ufp4"), range(2), quiet)
    # 8 Linears and the head, three GEMMs with two operands and a product each, two micro-batches, two steps
    assert len(found) == 9 * 9 * 2 * 2
    assert all(f.apart == 0 and f.errors_apart == 0 for f in found)
    assert sum(bool(f.a) for f in found) == 8 * 6 * 2 * 2  # errors, of what is quantised
    assert compare.summary(found, 0.0) == {"values": [], "errors": []}


def test_transformed_operands_are_compared_in_their_own_basis(small):
    """The RHT of wgrad's operands leaves a gap to BF16 that is their error, not sqrt(2)."""
    found = compare.compare(*pair(small, "tiny-bf16", "ufp4"), range(1), quiet)
    first = {f.place: f for f in reversed(found)}
    x = first["blocks.0.attn.qkv/wgrad.x"]
    assert x.apart == pytest.approx(x.b, rel=0.2) and 0.05 < x.apart < 0.2


def test_the_first_place_is_where_it_was_made_to_part(small):
    a, b = pair(small, "tiny-bf16", "tiny-bf16")
    with torch.no_grad():
        b.model.blocks[1].ffn.up.weight *= 3
    torch.autograd.graph.increment_version(b.model.parameters())
    rows = compare.summary(compare.compare(a, b, range(1), quiet), 0.2)["values"]
    assert (rows[0].step, rows[0].micro_batch, rows[0].place) == (1, 0, "blocks.1.ffn.up/fprop.w")
    assert rows[0].apart == pytest.approx(2 / 3, rel=1e-3)
    assert len(rows) == 11 and [r.apart for r in rows[1:]] == sorted((r.apart for r in rows[1:]), reverse=True)


def test_errors_part_too(small):
    a, b = pair(small, "ufp4", "mxfp8")
    rows = compare.summary(compare.compare(a, b, range(1), quiet), 0.05)["errors"]
    assert rows and rows[0].place == "blocks.0.attn.qkv/fprop.x" and rows[0].a > 0.08 > 0.03 > rows[0].b


def test_what_is_not_finite_is_apart():
    x, nan, inf = torch.ones(4), torch.tensor([1, 1, torch.nan, 1]), torch.tensor([1, torch.inf, 1, 1])
    assert compare.apart(x, nan) == compare.apart(inf, x) == compare.apart(nan, inf) == float("inf")
    assert compare.apart(nan, nan) == compare.apart(inf, inf) == 0 and compare.apart(2 * x, x) == 1


def test_a_run_that_is_no_longer_finite_is_found(small):
    a, b = pair(small, "mxfp8", "mxfp8")
    with torch.no_grad():
        b.model.blocks[0].ffn.down.weight[3, 5] = torch.nan
    rows = compare.summary(compare.compare(a, b, range(1), quiet), 0.2)
    assert rows["values"][0].place == "blocks.0.ffn.down/fprop.w" and rows["values"][0].apart == float("inf")
    assert rows["errors"][0].place == "blocks.0.ffn.down/fprop.w"


def test_what_cannot_be_compared():
    a = load(ROOT / "configs/tiny-bf16.toml")
    for override, key in (
        ("train.seed=1", "train.seed is 0 and 1"),
        ("train.rounding=cvt.rs", "train.rounding is 'exact' and 'cvt.rs'"),
        ("model.blocks=2", "model is ModelConfig"),
    ):
        with pytest.raises(ValueError, match=f"A and B cannot be compared: {key}"):
            compare.same_data(a, load(ROOT / "configs/tiny-bf16.toml", [override]))
    compare.same_data(a, load(ROOT / "configs/tiny-bf16.toml", ["train.steps=100"]))
    a, b = (load(ROOT / "configs/tiny-phases.toml", [f"train.steps={steps}"]) for steps in (200, 100))
    with pytest.raises(ValueError, match="train.steps is 200 and 100"):
        compare.same_data(a, b)


def test_the_command(small, tmp_path):
    out = Path(next(o for o in small if o.startswith("run.out="))[9:-1])
    for name in ("tiny-bf16", "mxfp8"):
        command = [sys.executable, "train.py", f"configs/{name}.toml", *small, f"run.name=compare-{name}"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    command = [sys.executable, str(ROOT / "compare.py"), str(out / "compare-tiny-bf16"), str(out / "compare-mxfp8")]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "env": env}
    done = subprocess.run([*command, "--from", "10", "--steps", "1", "--apart", "0.01"], **how)
    assert done.returncode == 0, done.stderr
    assert "step    11  loss A" in done.stdout and "the first place where values are apart by more than 0.01" in done.stdout
    kept = json.loads((tmp_path / "out/compare.json").read_text())
    assert len(kept["values"]) == 11 and kept["values"][0]["step"] == 11
    done = subprocess.run([*command, "--from", "7"], **how)
    assert done.returncode == 2 and done.stderr.startswith("compare.py: ") and done.stderr.count("\n") == 1
