"""What ladders decided, as numbers and pictures (quant/decisions.py, plot.py), and a run that logs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plot
import train
from quant import Choice, Context, Linear, QuantSpec, Recipe, Scale, attach, decisions
from quant.context import Decision
from quant.recipe import OPERANDS, Dgrad, Fprop, Wgrad

ROOT = Path(__file__).parent.parent
BF16, E4M3 = QuantSpec("bf16", scale=Scale("none")), QuantSpec("e4m3", (32, 32), Scale("fp32"))
TENSOR = Choice((E4M3, BF16), "relative_error", 0.045, "tensor")
BLOCKS = Choice((E4M3, BF16), "relative_error", 0.045, (32, 32))


def model(x, w) -> tuple[torch.nn.Module, Context]:
    net = torch.nn.Sequential(Linear(64, 128))
    net[0].recipe = Recipe(Fprop(x, w), Dgrad(), Wgrad(g=w))
    context = Context()
    attach(net, context)
    context.decisions = {}
    return net, context


def test_shares_by_hand():
    """x: three calls, the second in BF16; w: one block of eight in BF16; g of wgrad: all E4M3; the others: no spec."""
    net, context = model(TENSOR, BLOCKS)
    w, g = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    w[0, 0] = 1
    e = torch.tensor

    def noted(spec: Choice, *calls: tuple) -> dict:
        return {(0, i): Decision(spec, *call) for i, call in enumerate(calls)}

    def products(a: Choice, b: Choice | None, *calls: tuple) -> dict:
        return {(0, i): ((a, x), (b, y)) for i, (x, y) in enumerate(calls)}

    context.decisions |= {
        "0/fprop.x": noted(TENSOR, (0, e(0.021), 640), (e(1), e(0.059), 640), (0, e(0.5), 640)),
        "0/fprop.w": noted(BLOCKS, (w, None, 8192)),
        "0/wgrad.g": noted(BLOCKS, (g, None, 1280), (g, None, 1280)),
        "0/fprop": products(TENSOR, BLOCKS, (0, w), (e(1), w), (0, w)),
        "0/wgrad": products(BLOCKS, None, (g, None), (g, None)),
    }
    found = decisions.metrics(net, context)
    assert context.decisions == {}
    key = "quant/0/fprop"
    assert found[f"{key}.x/share/e4m3"] == pytest.approx(2 / 3) and found[f"{key}.x/share/bf16"] == pytest.approx(1 / 3)
    assert found[f"{key}.w/share/bf16"] == pytest.approx(1 / 8) and f"{key}.w/errors" not in found
    assert found[f"{key}.x/errors"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1]  # the last bin has all from 0.06 on
    assert found[f"{key}.x/error/e4m3"] == pytest.approx((0.021 + 0.059 + 0.5) / 3)
    assert found[f"{key}.x/flips"] == 2 and found[f"{key}.w/flips"] == 0
    # Products of x in E4M3 with w: seven of eight blocks; x in BF16: none. wgrad's x has no spec.
    assert found[f"{key}/below_16"] == pytest.approx(2 / 3 * 7 / 8) and found["quant/0/wgrad/below_16"] == 0
    assert found["quant/share_tensors"] == pytest.approx((2 + 0 + 2) / 6)
    assert found["quant/share_elements"] == pytest.approx((2 * 640 + 7168 + 2 * 1280) / (3 * 640 + 8192 + 2 * 1280))
    assert found["quant/share_flops"] == pytest.approx((3 * (2 / 3) * 7 / 8 + 0) / 5)
    # What comes next flips against what was there before, and another ladder's decisions are its own.
    context.decisions["0/fprop.x"] = noted(TENSOR, (1, None, 640))
    context.decisions["0/fprop.w"] = noted(TENSOR, (1, None, 8192))
    found = decisions.metrics(net, context)
    assert found[f"{key}.x/flips"] == 1 and found[f"{key}.w/flips"] == 0 and found[f"{key}.w/share/bf16"] == 1


def test_shares_of_products_block_by_block():
    """By counting: a product of blocks is below 16 bits if both are."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(2, (3, 4), generator=generator), torch.randint(2, (5, 8), generator=generator)
    both = [(1 - a[i, k // 2]) * (1 - b[j, k]) for i in range(3) for j in range(5) for k in range(8)]
    found = decisions._joint(decisions._low(BLOCKS, a), decisions._low(BLOCKS, b))
    assert found == pytest.approx(float(sum(both)) / len(both))


def test_a_policy_may_change_between_two_logs(small):
    """From a ladder to another one and to none; each has its decisions until then."""
    other = 'recipes.other={fprop={x="mor",w="mor"}}'
    policy = 'policy=[{until=0.25,recipe="mor-tensor"},{until=0.5,recipe="other"},{recipe="bf16"}]'
    own = ["specs.e4m3.block=[32,32]", other, policy, "run.name=switch", "train.log_every=7"]
    assert train.main([str(ROOT / "configs/mor-tensor.toml"), *small, *own]) == 0


def test_what_runs_again_is_counted_once(small):
    lines = {}
    for recompute in ("false", "true"):
        own = ["specs.e4m3.block=[32,32]", f"train.recompute={recompute}", f"run.name=again-{recompute}", "train.steps=3"]
        train.main([str(ROOT / "configs/mor-tensor.toml"), *small, *own])
        lines[recompute] = plot.lines_of(Path(next(o for o in small if o.startswith("run.out="))[9:-1]) / f"again-{recompute}")[
            -1
        ]
    a, b = ({k: v for k, v in line.items() if k.startswith("quant/")} for line in lines.values())
    assert a == b and any(k.endswith("/errors") for k in a)


def test_labels_tell_candidates_apart():
    mx = QuantSpec("e4m3", (1, 32), Scale("e8m0"))
    assert decisions.labels((E4M3, BF16)) == ["e4m3", "bf16"]
    assert decisions.labels((E4M3, mx, BF16)) == ["e4m3/32x32 fp32", "e4m3/1x32 e8m0-rceil", "bf16"]


def test_nothing_without_ladders():
    net, context = model(E4M3, None)
    assert decisions.metrics(net, context) == {}


# --- a run ---


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """Twenty steps of MoR whose threshold lies among what it meets."""
    own = ["run.name=ladder", "train.stats_every=10", "specs.mor.below=0.023", "specs.e4m3.block=[-1,-1]"]
    done = subprocess.run(
        [sys.executable, "train.py", "configs/mor-tensor.toml", *small, *own], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "chosen below 16 bits: " in done.stdout and "choices.png" in done.stdout
    return Path(next(o for o in small if o.startswith("run.out="))[9:-1]) / "ladder"


def test_a_run_logs_what_it_chose(run):
    lines = plot.lines_of(run)
    last = lines[-1]
    names = {key.split("/")[1] for key in last if "/share/" in key}
    assert len(names) == 8 and "head" not in names
    for place, found in plot.shares(last).items():
        assert sum(found.values()) == pytest.approx(1), place
    assert 0 < last["quant/share_tensors"] < 1 and 0 < last["quant/share_flops"] <= last["quant/share_elements"]
    counts = sum(sum(v) for line in lines for k, v in line.items() if k.endswith("/errors"))
    assert counts == 20 * 8 * (2 * 4 + 2)  # x and g in both micro-batches, for two GEMMs each; w once, for two
    assert {"underflow", "saturated", "dynamic_range"} <= {
        key.split("/")[-1] for key in last if key.startswith("quant/blocks.0")
    }


def test_tensorboard_has_scalars_and_heat_maps(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), size_guidance={"images": 0}).Reload()
    assert "quant/share_tensors" in events.Tags()["scalars"]
    assert len(events.Images("quant/fallback")) == 2  # at each validation


def test_pictures(run, tmp_path, capsys):
    png = b"\x89PNG"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "config.toml"):
        (other / name).write_text((run / name).read_text())
    assert plot.main([str(run), str(other)]) == 0
    made = [Path(line.removeprefix("drawn: ")) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in made] == ["loss.png", "choices.png"] * 2 + ["gap.png"]
    assert all(path.read_bytes().startswith(png) and path.stat().st_size > 10_000 for path in made)
    plain = [{k: v for k, v in line.items() if not k.startswith("quant/")} for line in plot.lines_of(run)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    assert plot.choices(other) is None and plot.fallback_figure(plain[-1]) is None


def test_plot_says_what_is_no_run(tmp_path):
    done = subprocess.run([sys.executable, "plot.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"plot.py: {tmp_path}: no run (it has no metrics.jsonl)\n")


def test_every_operand_has_a_column():
    axes = plot._figure(4, 3).subplots()
    plot.heat_map(axes, {("a", "fprop.x"): 0.5, ("b", "wgrad.g"): 0.0}, "title")
    assert [t.get_text() for t in axes.get_xticklabels()] == list(OPERANDS)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
