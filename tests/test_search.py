"""search.py and the studies around it: the metric is the published one, what passes is chosen, and the policy is a config."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import search
from configs import load
from quant import QuantSpec, Recipe, Scale, quantize
from quant.recipe import OPERANDS
from studies import student_t

ROOT = Path(__file__).parent.parent

# Medians of a separate simulation: one scale a vector, to nearest; INT8, E4M3, E5M2.
KNOWN = {
    2.0: (4.06e-3, 3.16e-3, 6.30e-3),
    3.0: (1.68e-3, 2.34e-3, 4.65e-3),
    5.0: (9.29e-4, 1.98e-3, 3.95e-3),
    8.0: (7.03e-4, 1.86e-3, 3.71e-3),
    30.0: (5.32e-4, 1.76e-3, 3.52e-3),
    math.inf: (4.89e-4, 1.738e-3, 3.458e-3),
}


def test_backward_errors_of_student_t():
    found = student_t.table(tuple(KNOWN), ("vector",))
    for nu, expected in KNOWN.items():
        assert [found[nu, "vector", name] for name in student_t.FORMATS] == pytest.approx(expected, rel=0.03), nu


def test_stochastic_rounding_doubles_the_variance():
    """1/6 of a squared step instead of 1/12, so the median is sqrt(2) times as large."""
    found = student_t.table((math.inf,), ("vector", "vector, stochastic"), trials=1)
    for name in student_t.FORMATS:
        ratio = found[math.inf, "vector, stochastic", name] / found[math.inf, "vector", name]
        assert ratio == pytest.approx(2**0.5, rel=0.03)


def test_the_profile_by_size():
    """INT8's error doubles with each binade, until what is below half a step is lost; E4M3 keeps 2.25 %, E5M2 4.5 %."""
    int8, e4m3, e5m2 = map(student_t.profile, student_t.FORMATS)
    assert int8[0] == pytest.approx(0.0028, rel=0.05) and int8[3] / int8[2] == pytest.approx(2, rel=0.1) and int8[9] == 1
    assert all(e4m3[k] == pytest.approx(0.0225, rel=0.05) for k in range(12)) and e4m3[18] > 0.5
    assert all(e5m2[k] == pytest.approx(0.045, rel=0.05) for k in range(20))  # 4,096 draws: a deviation of 1 %


def test_the_metric_by_hand():
    left, right = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[4.0, 1.0]])
    q = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
    assert search.backward_errors(left, q, right) == (pytest.approx(1 / 6), pytest.approx(1 / 6))  # |2 - 3| / 6, and 0
    assert search.backward_errors(left, left, right) == (0, 0)


def test_the_reference_is_that_of_normal_numbers():
    median, p99 = search.reference(1024)
    assert median == pytest.approx(8.7e-4, rel=0.03) and p99 == pytest.approx(3.4e-3, rel=0.05)
    x, w = (torch.randn(256, 1024, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    own = search.Measure(x, w).errors(search.IN_RANGE)  # in range, E4M3 and E8M3 are alike
    assert own.median == pytest.approx(median, rel=0.05) and own.p99 == pytest.approx(p99, rel=0.1)


def test_errors_of_one_operand():
    """To nearest the bias is the error, of E = 1/12 squared steps; the mean of 16 draws has E = 1/6 / 16 of them."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    spec = search.DEFAULT["int8-vector"]
    found = search.Measure(x, w).errors(spec)
    q = quantize(x, spec).dequantize()
    assert found[:2] == pytest.approx(search.backward_errors(x.float(), q, w), rel=1e-9)
    assert found.underflow == pytest.approx(float(((q == 0) & (x != 0)).double().mean()), abs=1e-12)
    nearest, random = (search.bias(x, s) for s in (spec, replace(spec, rounding="stochastic")))
    assert nearest == pytest.approx(float((q - x.float()).norm() / x.float().norm()), rel=1e-5)
    assert random / nearest == pytest.approx((12 / 6 / 16) ** 0.5, rel=0.05)


@pytest.fixture(scope="module")
def found(small, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("search") / "policy.toml"
    command = [sys.executable, "search.py", str(ROOT / "configs/tiny-bf16.toml"), *small, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_policy_is_a_config(found, small):
    out, printed = found
    config = load(out, small)
    assert f"policy   {out}" in printed and "search: step 20: 48 operands measured" in printed
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")]
    assert sorted(rule.match for rule in config.policy) == sorted([*names, "*"])
    for recipe in config.recipes.values():
        for operand, spec in recipe.operands().items():
            assert spec is None or spec.stochastic == operand.endswith("g"), operand
    command = [sys.executable, "train.py", str(out), *small, "run.name=searched", "train.steps=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_policy_may_be_searched_again(found, small, tmp_path):
    """Its recipes have names of their own, and nothing of the first policy's; overrides of the model come along."""
    out = tmp_path / "again.toml"
    own = ["--bound", "own", "--at", "1", "2", "--out", str(out), "model.ffn=384", "run.name=nothing"]
    command = [sys.executable, "search.py", str(found[0]), *small, *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = load(out)
    assert config.model.ffn == 384 and config.run.name == "" and len(config.policy) == 8 + 1
    assert all(rule.recipe.endswith("-2") for rule in config.policy[:-1])


WRONG = [
    (["out/nothing"], "out/nothing: neither a config, which ends in .toml, nor a run folder"),
    (["configs/tiny-bf16.toml", "--out", "policy.txt"], "--out policy.txt: expected a file that ends in .toml"),
    (["configs/tiny-bf16.toml", "--at", "0"], "--at 0: expected steps from 1 to train.steps = 200"),
    (
        ["configs/tiny-bf16.toml", "--specs", "configs/int8.toml"],
        "--specs configs/int8.toml: i8sr is int8/1xall fp32 sr8: expected a",
    ),
    (["configs/tiny-bf16.toml", "--specs", "configs/tiny-bf16.toml"], "--specs configs/tiny-bf16.toml: it has no [specs]"),
    (["configs/mxfp8.toml", "specs.mx.format=e5m2"], "override 'specs.mx.format=e5m2': specs, recipes and policy are what is"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_input_is_one_sentence(args, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = subprocess.run([sys.executable, "search.py", *args], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"search.py: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_number_that_is_none_passes_nothing():
    e = search.Errors(1.0, 2.0, 0.1, 0.0)
    assert math.isnan(e._replace(median=math.nan).worst(e).median) and math.isnan(e.worst(e._replace(median=math.nan)).median)
    assert e.worst(e._replace(p99=3.0)) == e._replace(p99=3.0)


def test_every_choice_is_the_first_that_passes(found):
    """From the table of why: its errors are within its bounds, and those named before it are not."""
    table = found[0].with_suffix(".txt").read_text().split("\n\n")[0].splitlines()
    assert len(table) == 1 + 8 * 6
    seen = set()
    for line in table[1:]:
        words = line.split()
        seen.add(words[2])
        if words[2] != "bf16":
            median, median_bound, p99, p99_bound = map(float, words[3:7])
            assert median <= median_bound and p99 <= p99_bound, line
        assert all(float(ratio) > 0.99 for ratio in re.findall(r"\((\d+\.\d) x\)", line)), line
    assert "int8-tensor" in seen


def test_both_operands_together(monkeypatch):
    """A pair whose error is more than the sum of their squares explains loses its worse operand."""
    s = search.Search({"int8-tensor": search.DEFAULT["int8-tensor"], "e4m3-tensor": search.DEFAULT["e4m3-tensor"]}, False, [])
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 128, generator=g), torch.randn(64, 128, generator=g)
    module = type("Module", (), {"name": "m"})()
    a, b = search.Operand(x), search.Operand(w)
    s.measure(module, "fprop", a, b, None)
    s.choose()
    assert set(s.chosen.values()) == {"int8-tensor"}
    s.check(module, "fprop", a, b, None)
    assert set(s.chosen.values()) == {"int8-tensor"} and s.joint["m", "fprop"][0] <= s.joint["m", "fprop"][1]
    monkeypatch.setattr(search, "JOINT", 0.1)  # as if their errors had more in common than chance
    s.check(module, "fprop", a, b, None)
    assert "" in s.chosen.values(), "nothing fits, so one of them ends in the compute dtype"


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec("int8", (-1, -1), Scale("fp32"), "stochastic"),
        QuantSpec("e2m1", (16, 16), Scale("e4m3", outer="tensor", order="g1"), hadamard=16, signs="fresh"),
        QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="floor", multiplier=0.75)),
        QuantSpec("e3m4", (128, 128), Scale("e8m0", rule="gam")),
    ],
    ids=lambda spec: spec.short(),
)
def test_specs_written_are_read_as_they_were(spec, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(f"[specs]\na = {search.spec_text(spec)}\n")
    assert load(path).specs["a"] == spec


def test_recipes_are_shared_by_those_who_have_the_same():
    s = search.Search(search.DEFAULT, True, [])
    s.chosen = {(m, o): "int8-tensor" if m != "b" else "" for m in "abc" for o in OPERANDS}
    groups = s.recipes()
    assert [modules for _, modules in groups.values()] == [["a", "c"], ["b"]]
    assert groups["search-2"][0] == Recipe()
