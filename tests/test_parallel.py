"""Several ranks, in real processes under gloo: the same numbers as in one, what is moved, and checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import train
from configs import load
from parallel import World, shared
from quant import QuantSpec, Scale, quantize
from quant.gathered import Copied, Gathered
from studies import drill
from tests.test_train import ROOT

# Recipes of each kind, and all that a config can say about ranks.
TWO = [
    "tiny-nvfp4 parallel.gather=codes",
    "mxfp8 parallel.gather=codes",
    "tiny-bf16 train.val_batches=3",
    "mor-tensor",
    "mor-delayed",
    "fp8-delayed",
]
FOUR = [
    "tiny-nvfp4 parallel.gather=codes",
    "mxfp8",
    "tiny-bf16 parallel.gather=codes",
    "mor-block-3way parallel.gather=codes",
    "fp8-tensorwise parallel.gather=codes",
    "fp8-adam",
    "nvfp4 train.recompute=selective parallel.prefetch=0 parallel.gather=codes",
    "nvfp4 parallel.offload=true model.tied_head=true",
    "fp8-blockwise recipes.fp8-blockwise.weights=bf16",
    "tiny-hybrid model.blocks=3 model.pattern=M*- parallel.gather=codes",
]
ORDERS = ["nvfp4 parallel.replicas=2 parallel.gather=codes", "nvfp4 train.micro_batches=8", "nvfp4 parallel.reduction=library"]
ORDERS += ["nvfp4 train.micro_batches=8 parallel.accumulate=cut"]


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def cases(ranks: int, which: list[str]) -> list[dict]:
    found = torchrun(ranks, "-m", "tests.ranks", *which).stdout.splitlines()
    found = [json.loads(line.removeprefix("RESULT ")) for line in found if line.startswith("RESULT ")]
    assert [" ".join([c["config"], *c["overrides"]]) for c in found] == which
    return found


def same(case: dict) -> None:
    """Bit for bit what one process has: losses, bytes and norms of two steps, weights, what ladders and delayed scales
    remember, largest inputs, and the validation."""
    assert all(many == one for many, one in case["steps"]), case
    assert case["weights"] == case["memory"] == [] and case["amaxes"], case
    assert case["validation"][0] == case["validation"][1], case


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return cases(2, TWO)


def test_two_ranks_compute_what_one_process_does(two):
    for case in two:
        same(case)


def test_codes_are_made_before_the_all_gather_and_are_those_of_one_process(two):
    """tests/ranks.py compares them; here, that there were any: of the Linears in blocks that have a recipe (tiny-nvfp4 keeps
    the last block in BF16)."""
    found = {case["config"]: case["codes"] for case in two}
    assert found == {"tiny-nvfp4": 8, "mxfp8": 12, "tiny-bf16": 0, "mor-tensor": 0, "mor-delayed": 0, "fp8-delayed": 0}


def test_an_all_gather_of_codes_moves_a_quarter_of_bf16():
    """Of NVFP4 weights in blocks of 16 x 16 at most 0.27 of the bytes: 4 bits a weight, 8 for the scale of 256, of BF16's 16.

    Every parameter is received once in forward and once in backward, (ranks - 1) / ranks of it; all but the quantised weights
    are alike in both runs."""
    case, plain = cases(2, ["nvfp4 parallel.gather=codes policy.tail.last=0", "tiny-bf16"])
    config = load(ROOT / "configs/nvfp4.toml", ["model.blocks=3"])
    with torch.device("meta"):
        model = train.GPT(config.model)
    weights = sum(m.weight.numel() for name, m in train.linears(model).items() if name != "head")
    bf16 = 2 * weights * 2 // 2  # twice, half of it, 2 bytes each
    codes = case["moved"]["all-gather"] - (plain["moved"]["all-gather"] - bf16)
    assert codes == bf16 * (4 + 8 / 256) / 16
    assert codes <= 0.27 * bf16
    assert case["moved"]["reduce-scatter"] == plain["moved"]["reduce-scatter"]


@pytest.mark.slow
def test_four_ranks_compute_what_one_process_does():
    for case in cases(4, FOUR):
        same(case)


@pytest.mark.slow
def test_rows_that_cannot_be_cut_equally():
    """256, 512, 1,024 and 4,096 rows on three ranks: no codes, since blocks would be cut, and the same bits."""
    (case,) = cases(3, ["nvfp4 parallel.gather=codes"])
    same(case)
    assert case["codes"] == 0 and any("rows on 3 ranks" in why for why in case["gathered"])


@pytest.mark.slow
def test_other_orders_of_a_sum_move_last_bits_only():
    """(a + b) + (c + d) and a + b + c + d of the same micro-batches. An addition in fp32 errs by 2^-24 of its result, three of
    them by at most 3 x 2^-24 of the sum of magnitudes: for losses, which are positive, two such orders differ by at most
    6 x 2^-24 of the sum. A gradient's error is relative to the sum of magnitudes of four gradients, whose norm is at most 2
    times the root of the sum of their squares; they point so much alike in the first step, where the loss falls fastest, that
    the norm of their sum is more than a fourth of that of magnitudes: 24 x 2^-24."""
    for case in cases(4, ORDERS):
        (many, one), _ = case["steps"]
        assert many[0] == pytest.approx(one[0], rel=6 * 2**-24) and many[1] == one[1]
        assert many[2] == pytest.approx(one[2], rel=24 * 2**-24)
        assert case["codes"] == (8 if "parallel.gather=codes" in case["overrides"] else 0)


@pytest.mark.slow
def test_blocks_compiled_for_themselves_have_all_their_gradients():
    """Their sums are in other orders than one process's (train.compile="model" says so); what is reduced is as much."""
    compiled, eager = cases(2, ["tiny-nvfp4 train.compile=model", "tiny-nvfp4"])
    assert compiled["moved"]["reduce-scatter"] == eager["moved"]["reduce-scatter"] > 0
    done = launched(2, "out", "train.compile=model", check=False)
    assert done.returncode == 2 and "parallel.gather = 'codes' with train.compile = 'model'" in done.stderr


# --- runs ---

SMALL = ["model.blocks=2", "model.seq_len=128", "train.batch_size=2", "train.steps=6", "train.val_batches=2", "run.samples=1"]
SMALL += ["run.sample_tokens=4", "run.checkpoint_every=2", "run.keep=9", "parallel.gather=codes"]


def launcher(ranks: int, config: str, *overrides: str) -> list[str]:
    return [sys.executable, "launch.py", str(ranks), "train.py", str(ROOT / f"configs/{config}.toml"), *overrides]


def launched(ranks: int, out, *overrides: str, check: bool = True, config: str = "tiny-nvfp4") -> subprocess.CompletedProcess:
    command = launcher(ranks, config, *SMALL, f"run.out={out}", "run.name=a", *overrides)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def hashes(folder) -> dict[str, str]:
    found = json.loads((folder / "MANIFEST.json").read_text())["sha256"]
    return {name: found[name] for name in ("model.safetensors", "optimizer.safetensors", "state.json")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two ranks."""
    out = tmp_path_factory.mktemp("ranks")
    launched(2, out)
    return out / "a"


@pytest.mark.slow
def test_a_step_of_two_ranks_holds_what_one_process_writes(run, tmp_path):
    train.main([str(ROOT / "configs/tiny-nvfp4.toml"), *SMALL, f"run.out={tmp_path}", "run.name=a"])
    for step in (2, 4, 6):
        for name in ("model", "optimizer", "quantized"):
            a, b = (checkpoint.load_file(f / f"step_{step:06d}/{name}.safetensors") for f in (run, tmp_path / "a"))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), (step, name)
    assert (run / "rank_1.log").read_text() and (run / "samples.txt").read_text() == (tmp_path / "a/samples.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fp8-adam", "bf16-kahan", "mor-delayed"])
def test_moments_in_codes_compensations_and_memories_are_saved_and_resumed_by_ranks(tmp_path, config):
    """Two ranks to the end; and one process that continues their second step, with what each keeps besides."""
    launched(2, tmp_path, config=config)
    before = {name: checkpoint.load_file(tmp_path / f"a/step_000006/{name}.safetensors") for name in ("model", "optimizer")}
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"a/step_{step:06d}")
    train.main([str(ROOT / f"configs/{config}.toml"), *SMALL, f"run.out={tmp_path}", "run.name=a"])
    for name, tensors in before.items():
        found = checkpoint.load_file(tmp_path / f"a/step_000006/{name}.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found), name


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (1, 4), (4, 1)])
def test_a_step_is_resumed_on_other_numbers_of_ranks(tmp_path, first, then):
    """The last step is that of a run that was not interrupted, with as many micro-batches as the larger number of ranks."""
    share = f"train.micro_batches={max(first, then)}"
    launched(first, tmp_path, share)
    before = hashes(tmp_path / "a/step_000006")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"a/step_{step:06d}")
    done = launched(then, tmp_path, share)
    assert "continues from" in done.stdout and "after step 2" in done.stdout and "MB by all-gathers" in done.stdout
    assert hashes(tmp_path / "a/step_000006") == before


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on(run, tmp_path):
    """kill -9 while it trains: the end is that of the run that nobody killed."""
    command = launcher(2, "tiny-nvfp4", *SMALL, f"run.out={tmp_path}", "run.name=a")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        while not (tmp_path / "a/step_000002").exists():
            assert started.poll() is None
            time.sleep(0.02)
        os.kill(drill.workers("a", str(tmp_path))[1], signal.SIGKILL)
        out, err = started.communicate(timeout=300)
    assert started.returncode == 0 and "was killed by SIGKILL; all start again from step" in err, err
    assert hashes(tmp_path / "a/step_000006") == hashes(run / "step_000006")


def test_a_mistake_is_one_sentence(tmp_path):
    done = launched(2, tmp_path, "train.micro_batches=3", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == (
        "launch.py: NGPU = 2: train.micro_batches = 3 of a step must be shared out evenly; near are [1, 3]"
    )


# --- parts ---


def test_a_world_alone():
    world, x = World(alone=True), torch.tensor([1.0, float("nan")])
    config = load(ROOT / "configs/tiny-bf16.toml", ["train.micro_batches=6"])
    assert world.first and world.share(config) == range(6)
    assert torch.equal(world.sum(x[:1]), x[:1]) and world.max(x).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"NGPU = 1: expected a multiple of parallel.replicas = 2"):
        shared(load(config.source, ["parallel.replicas=2"]), 1)


def test_a_gathered_weight_takes_gradients_and_gives_no_numbers():
    copy = torch.randn(8, 4).to(torch.bfloat16)
    weight = torch.nn.Parameter(Gathered(torch.Size([8, 4]), torch.device("cpu"), {"copy": copy}))
    assert weight.shape == (8, 4) and weight.dtype == torch.float32 and isinstance(weight, Gathered)
    x = torch.randn(2, 4).to(torch.bfloat16)
    torch.nn.functional.linear(x, Copied.apply(weight)).sum().backward()
    plain = copy.float().requires_grad_()
    torch.nn.functional.linear(x, plain.to(torch.bfloat16)).sum().backward()
    assert torch.equal(weight.grad, plain.grad)
    with pytest.raises(NotImplementedError, match="of a gathered weight only codes are on this rank"):
        weight.detach() + 1


@pytest.mark.parametrize("format", ["e2m1", "e4m3"])
def test_a_turned_operand_is_that_of_the_transpose(format):
    spec = QuantSpec(format, (16, 16), Scale("e4m3"))
    x = torch.randn(32, 64)
    a, b = quantize(x, spec).turned(), quantize(x.t(), spec)
    assert torch.equal(a.codes(), b.codes()) and torch.equal(a.dequantize(), b.dequantize()) and a.shape == b.shape
    assert torch.equal(a.packed(), b.packed())
