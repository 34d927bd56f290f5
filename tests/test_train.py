"""The loop and its checkpoints, on real processes and files: kill -9 and resume, signals, damage, wrong inputs."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import BOUND

import checkpoint
import contents
import evaluate
import train
from configs import load
from quant.linear import linears
from quant.policy import unquantized
from studies.recipes import NAMES

ROOT = Path(__file__).parent.parent
NVFP4, BF16 = str(ROOT / "configs/tiny-nvfp4.toml"), str(ROOT / "configs/tiny-bf16.toml")
PHASES = [  # two parts of the standard library, in two phases
    'data.source=""',
    'data.sources={a={source="pkg:json:py"}, b={source="pkg:email:py"}}',
    "data.phases=[{until=0.6, shares={a=0.25, b=0.75}}, {shares={a=0.7, b=0.3}}]",
]
VARIANTS = {
    "bf16": (BF16, []),
    "phases": (BF16, PHASES),
    "nvfp4": (NVFP4, []),
    "nvfp4-recompute": (NVFP4, ["train.recompute=true"]),
    "nvfp4-one-micro-batch": (NVFP4, ["train.micro_batches=1"]),
    "bf16-recompute": (BF16, ["train.recompute=true"]),
    "nvfp4-fresh-signs": (
        str(ROOT / "configs/nvfp4.toml"),
        [f'recipes.{r}.wgrad.{o}.signs="fresh"' for r in ("nvfp4", "nvfp4-backward") for o in "gx"],
    ),
    "fp8-delayed": (str(ROOT / "configs/fp8-delayed.toml"), ["specs.f8.scale.history=3"]),
    "bf16-kahan": (str(ROOT / "configs/bf16-kahan.toml"), []),
    "dqt": (str(ROOT / "configs/dqt.toml"), []),
    "fp8-adam": (str(ROOT / "configs/fp8-adam.toml"), ["specs.adam.rounding=stochastic8"]),
    "tiny-hybrid": (str(ROOT / "configs/tiny-hybrid.toml"), ["model.pattern=M-*M-", "model.blocks=5"]),
    "mor-delayed": (
        str(ROOT / "configs/mor-delayed.toml"),
        [
            "specs.e4m3.block=[32,32]",
            "specs.mor.below=0.0226",
            "specs.mor.memory={every=3,delay=2,margin=0.01,patience=2,warmup=1}",
        ],
    ),
}
# Bounds among what these small runs meet, so that some of each is chosen; windows of 64 hold no block of 128 rows.
LADDERS = {
    "mor-delayed": VARIANTS["mor-delayed"][1],
    "mor-tensor": ["specs.e4m3.block=[-1,-1]", "specs.mor.below=0.0226"],
    "mor-block-3way": [f"specs.{name}.{key}=[32,32]" for name, key in (("e4m3", "block"), ("mor", "per"), ("gated", "per"))]
    + ['specs.mor.bounds=[[{by="relative_error",below=0.0226}],[{by="relative_error",below=0.0448}]]'],
    "mor-nvfp4": [],
}


def folder(small, name: str) -> Path:
    out = next(o for o in small if o.startswith("run.out="))
    return Path(json.loads(out.removeprefix("run.out="))) / name


def start(config, small, *overrides, **kw) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), config, *small, *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def losses(run: Path) -> list[float]:
    return [loss for line in (run / "metrics.jsonl").read_text().splitlines() for loss in json.loads(line)["losses"]]


def assert_same_step(a: Path, b: Path) -> None:
    """Every tensor of two checkpoints is the same, bit for bit."""
    for name in ("model", "optimizer", "quantized"):
        left, right = (load_file(f / f"{name}.safetensors") for f in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            x, y = (t[key].flatten().view(torch.uint8) for t in (left, right))
            assert torch.equal(x, y), f"{name}.safetensors: {key} differs in {int((x != y).sum())} of {len(x)} bytes"


SECOND = "nvfp4-one-micro-batch", "bf16-recompute", "nvfp4-fresh-signs"  # what others test too


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in SECOND)) for v in VARIANTS])
def test_kill_and_resume_is_exact(small, variant, capsys):
    kill_and_resume(small, variant, *VARIANTS[variant], capsys)


@pytest.mark.slow
def test_kill_and_resume_of_the_config_with_phases(small, tmp_path, capsys):
    """On its own sources, 21 MB, killed in the first phase of three."""
    others = [override for override in small if not override.startswith("data.")]
    config, cache = str(ROOT / "configs/tiny-phases.toml"), f'data.cache="{tmp_path}"'
    kill_and_resume([*others, "data.vocab_size=512", cache], "tiny-phases", config, [], capsys)
    facts = json.loads((folder(small, "tiny-phases-whole") / "run.json").read_text())["data"]
    assert [phase["steps"] for phase in facts["phases"]] == [[0, 14], [14, 18], [18, 20]]
    assert facts["sources"]["code"]["source"] == "pkg:numpy:py" and facts["sources"]["code"]["epochs_by_phase"][2] == 0


def kill_and_resume(small, variant: str, config: str, overrides: list[str], capsys) -> None:
    """A run of 20 steps, killed after the checkpoint of step 10 and continued, leaves what an uninterrupted one leaves."""
    overrides = [*overrides, "run.keep=5"]
    process = start(config, small, f"run.name={variant}-killed", *overrides)
    killed, whole = folder(small, f"{variant}-killed"), folder(small, f"{variant}-whole")
    while not (killed / "step_000010/COMPLETE").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.steps(killed) == [10], "the kill came too late to test anything"
    train.main([config, *small, f"run.name={variant}-whole", *overrides])
    assert train.main([config, *small, f"run.name={variant}-killed", *overrides]) == 0
    assert "continues from" in capsys.readouterr().out
    assert_same_step(whole / "step_000020", killed / "step_000020")
    assert len(losses(whole)) == 20 and losses(whole) == losses(killed)


@pytest.mark.parametrize("override", ["train.recompute=true", pytest.param("train.compile=quantiser", marks=pytest.mark.slow)])
def test_recompute_and_fusing_change_no_bit(small, override):
    runs = {"same-plain": ["run.overwrite=true"], f"same-{override}": [override]}
    for name, overrides in runs.items():
        train.main([NVFP4, *small, f"run.name={name}", *overrides])
    assert_same_step(*(folder(small, name) / "step_000020" for name in runs))


def test_sigterm_saves_and_the_run_continues(small):
    process = start(NVFP4, small, "run.name=term", "train.log_every=1", "run.checkpoint_every=0")
    for line in process.stdout:
        if line.startswith("step     3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert "SIGTERM: saved" in rest and "Traceback" not in rest
    assert 3 < checkpoint.steps(folder(small, "term"))[-1] < 20
    train.main([NVFP4, *small, "run.name=term", "run.checkpoint_every=0"])
    train.main([NVFP4, *small, "run.name=term-whole", "run.checkpoint_every=0"])
    assert_same_step(folder(small, "term") / "step_000020", folder(small, "term-whole") / "step_000020")
    assert losses(folder(small, "term")) == losses(folder(small, "term-whole"))


@pytest.fixture(scope="module")
def finished(small) -> Path:
    """A finished NVFP4 run with checkpoints at 10 and 20."""
    train.main([NVFP4, *small, "run.name=finished", "train.stats_every=10"])
    assert (folder(small, "finished") / "loss.png").stat().st_size > 10_000
    return folder(small, "finished")


def copy(run: Path, name: str) -> Path:
    subprocess.run(["cp", "-r", run, run.parent / name], check=True)
    return run.parent / name


def test_run_folder(finished):
    names = {f.name for f in (finished / "step_000020").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "quantized.safetensors", "state.json", "MANIFEST.json"}
    assert {f.name for f in finished.iterdir()} >= {"config.toml", "run.json", "metrics.jsonl", "tb"}
    facts = json.loads((finished / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__ and facts["backend"]["blocks.0.ffn.up"].endswith("nvfp4")
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    keys = "step tokens loss val_loss val_bpb val_loss_bf16 val_bpb_bf16 lr grad_norm tokens_per_s time_s mem_gib".split()
    assert set(keys) <= set(last)
    assert last["val_loss"] != last["val_loss_bf16"], "validation as trained is not quantised"
    operands = {k.split("/")[2] for k in last if k.startswith("quant/")}
    assert operands == {"fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x"}
    assert {k.split("/")[3] for k in last if k.startswith("quant/")} >= {"sqnr_db", "underflow", "saturated", "scale_max"}
    # RTN of Gaussian-like data is near 20.4 dB (mx-and-seeds A5); a gross error in the statistics would show.
    assert 17 < last["quant/blocks.0.attn.qkv/wgrad.x/sqnr_db"] < 24


def test_stored_codes_give_the_forward_of_training(finished):
    master, stored = (checkpoint.load_model(finished, weights) for weights in ("master", "quantized"))
    tokens = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(master.model(tokens), stored.model(tokens))
        with unquantized(master.model):
            assert not torch.equal(master.model(tokens), stored.model(tokens))
    bits = 8 * sum(t.nbytes for t in codes_of(stored.folder).values())
    weights = sum(m.weight.numel() for m in linears(stored.model).values() if m.recipe)
    assert bits / weights < 4.04  # 4 + 8 / 256, and one fp32 scale a matrix


def codes_of(step: Path) -> dict[str, torch.Tensor]:
    """What is quantised in a step: without the matrices that are not, and gains."""
    return {name: t for name, t in load_file(step / "quantized.safetensors").items() if not name.endswith("weight")}


ALONE = """
import sys, torch, checkpoint
loaded = checkpoint.load_packed(sys.argv[1])
with torch.no_grad():
    torch.save(loaded.model(torch.load(sys.argv[2])), sys.argv[3])
assert loaded.tokenizer is None
"""


ALONE_QUICK = ("nvfp4", "fp8-delayed", "mxfp8-gains", "tiny-bf16", "tiny-hybrid", "mor-block-3way")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALONE_QUICK else pytest.mark.slow) for n in NAMES])
def test_the_packed_file_alone_is_the_model(small, name, tmp_path, monkeypatch):
    """In a process of its own, without config, masters and folder: the logits of training, and those of the masters, bit for
    bit; and smaller, but where other matrices are kept in fp32, which layercast and dqt compute in."""
    path, trained = ROOT / f"configs/{name}.toml", []
    extra = ["model.tied_head=true"] if name == "mxfp8-gains" else LADDERS.get(name, [])
    extra = [*extra, "model.blocks=4"] if name == "metric-int8-fp8" else extra  # whose policy names them
    extra = VARIANTS[name][1] if name == "tiny-hybrid" else extra
    window = max(64, *(r.fprop.x.multiple[0] for r in load(path, extra).recipes.values() if r.fprop.x), 0)
    monkeypatch.setattr(train, "finish", lambda trainer, metrics: trained.append(trainer.model.eval()))
    train.main([str(path), *small, f"run.name=alone-{name}", *extra, "train.steps=5", f"model.seq_len={window}"])
    loaded = checkpoint.load_model(folder(small, f"alone-{name}"))
    tokens = torch.randint(0, 512, (2, window), generator=torch.Generator().manual_seed(0))
    file, given, found = (tmp_path / each for each in ("weights.safetensors", "tokens.pt", "logits.pt"))
    file.write_bytes((loaded.folder / "quantized.safetensors").read_bytes())
    torch.save(tokens, given)
    subprocess.run([sys.executable, "-c", ALONE, file, given, found], cwd=ROOT, check=True)
    with torch.no_grad():
        alone = torch.load(found)
        assert torch.equal(loaded.model(tokens), alone)
        if not torch.cuda.is_available():  # (which sums in another order)
            assert torch.equal(trained[0](tokens), alone)
    if loaded.config.train.dtype == "bf16":
        assert file.stat().st_size < 0.6 * (loaded.folder / "model.safetensors").stat().st_size


def test_a_checkpoint_without_codes(small, capsys):
    train.main([NVFP4, *small, "run.name=no-codes", "run.quantized=false", "train.steps=2"])
    run = folder(small, "no-codes")
    assert not (run / "step_000002/quantized.safetensors").exists()
    with pytest.raises(ValueError, match="has no quantized.safetensors, since the run had run.quantized = false"):
        checkpoint.load_model(run, "quantized")
    assert evaluate.main([str(run), "--windows", "2"]) == contents.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "stored codes are left out: " in said and "as trained" in said and "none of" in said


def test_what_is_no_packed_model_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors: no model that stands alone, with its own sha256"):
        checkpoint.load_packed(finished / "step_000020/model.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.safetensors is no safetensors file"):
        checkpoint.load_packed(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", LADDERS)
def test_stored_choices_give_the_forward_of_training(small, name):
    """Tensors in the format that was chosen, and blocks of several with their map, in fewer bytes than BF16 takes."""
    train.main([str(ROOT / f"configs/{name}.toml"), *small, f"run.name=chosen-{name}", *LADDERS[name], "train.steps=10"])
    master, stored = (checkpoint.load_model(folder(small, f"chosen-{name}"), weights) for weights in ("master", "quantized"))
    tokens = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(master.model(tokens), stored.model(tokens))
    tensors = codes_of(stored.folder)
    weights = sum(m.weight.numel() for m in linears(stored.model).values() if m.recipe)
    assert sum(t.nbytes for t in tensors.values()) < 2 * weights
    if "block" in name:
        maps = torch.cat([t.flatten() for key, t in tensors.items() if key.endswith(".index")])
        assert len(maps.unique()) > 1, "all blocks are alike, so this tests nothing"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named_and_an_intact_step_offered(finished, small, damage):
    run = copy(finished, f"damaged-{damage}")
    path = run / "step_000020/model.safetensors"
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    arguments = [NVFP4, *small, f"run.name={run.name}", "train.stats_every=10"]
    with pytest.raises(ValueError, match=r"model\.safetensors is .*newest intact step is 10.*run\.resume=10"):
        train.main(arguments)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*newest intact step is 10: {run}/step_000010$"):
        checkpoint.load_model(run)
    branch = [NVFP4, *small, f"run.name=branch-{damage}", f"run.init_from={run}"]
    with pytest.raises(ValueError, match=rf"^run\.init_from: .*model\.safetensors .*run\.init_from={run}/step_000010$"):
        train.main(branch)
    assert train.main([*arguments, "run.resume=10"]) == 0
    assert_same_step(run / "step_000020", finished / "step_000020")
    assert losses(run) == losses(finished)


def test_full_disk_while_saving(finished, small):
    """A file size limit makes write() fail for real, as a full disk does; nothing that was safe is touched."""
    run = copy(finished, "full")
    loaded = checkpoint.load_model(run)
    optimizer = torch.optim.AdamW(loaded.model.parameters())
    before = {f: checkpoint.sha256(f) for f in sorted(run.rglob("*.safetensors"))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*step_000030.*newest complete checkpoint is .*step_000020"):
            checkpoint.save(run, 30, loaded.model, optimizer, {}, loaded.tokenizer.path, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert before == {f: checkpoint.sha256(f) for f in sorted(run.rglob("*.safetensors"))}
    assert not list(run.glob(".writing*"))


def test_too_small_a_disk_is_said_before_the_run(small, monkeypatch):
    monkeypatch.setattr("run.shutil.disk_usage", lambda place: type("usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"GiB are free, .* needed for 2 \+ 1 checkpoints|needed for 3 checkpoints"):
        train.main([NVFP4, *small, "run.name=no-room"])
    assert not folder(small, "no-room").exists()


def test_a_changed_config_is_refused_with_the_differences(finished, small, capsys):
    same = [NVFP4, *small, "run.name=finished", "train.stats_every=10"]
    with pytest.raises(ValueError, match=r"train\.lr: 0\.\d+ -> 0\.5.*run\.init_from"):
        train.main([*same, "train.lr=0.5"])
    with pytest.raises(ValueError, match=r"recipes\.nvfp4\.dgrad\.g\.rounding: 'stochastic8' -> 'nearest'"):
        train.main([*same, "specs.nvsr.rounding=nearest"])
    assert train.main([*same, "train.log_every=3"]) == 0
    out = capsys.readouterr().out
    assert "train.log_every: 5 -> 3" in out and "is finished" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this one may have it (tests/test_kernels.py)")
def test_rounding_that_the_device_lacks_is_refused(small):
    with pytest.raises(ValueError, match=r"rounding 'cvt\.rs': an instruction of GPUs, sm_100a and sm_103a"):
        train.main([NVFP4, *small, "run.name=cvt-rs", "train.rounding=cvt.rs"])


def test_branch_into_another_recipe(finished, small, capsys):
    start_from = f"run.init_from={finished}/step_000010"
    train.main([BF16, *small, "run.name=branch", start_from])
    assert "branches from" in capsys.readouterr().out
    assert checkpoint.steps(folder(small, "branch")) == [20]
    assert len(losses(folder(small, "branch"))) == 10
    with pytest.raises(ValueError, match="blocks.1.ffn.up.weight is|wants"):
        train.main([BF16, *small, "run.name=branch2", start_from, "model.ffn=384"])
    with pytest.raises(ValueError, match=r"run\.init_from: .*step_000020 has 20 steps, so train\.steps = 20 leaves none"):
        train.main([BF16, *small, "run.name=branch3", f"run.init_from={finished}"])


def test_a_branch_converts_moments_and_a_resume_does_not(finished, small, capsys):
    """Into codes, which are those of `quantize`, and back to fp32; one line each."""
    adam = str(ROOT / "configs/fp8-adam.toml")
    train.main([adam, *small, "run.name=into-codes", f"run.init_from={finished}/step_000010"])
    said = capsys.readouterr().out
    assert said.count("had moments in fp32 in") == 1 and "now moments in e4m3/1x128" in said
    with pytest.raises(ValueError, match=r"optimizer\.state: .* -> None.*run\.init_from"):
        train.main([NVFP4, *small, "run.name=into-codes"])
    with pytest.raises(ValueError, match=r"optimizer\.state\.rounding: 'nearest' -> 'stochastic8'"):
        train.main([adam, *small, "run.name=into-codes", "specs.adam.rounding=stochastic8"])
    codes = folder(small, "into-codes") / "step_000020"
    train.main([NVFP4, *small, "run.name=out-of-codes", f"run.init_from={codes}", "train.steps=22"])
    assert "had moments in e4m3/1x128 fp32, to the power 2 in" in capsys.readouterr().out
    last = load_file(folder(small, "out-of-codes") / "step_000022/optimizer.safetensors")
    assert all(t.dtype == torch.float32 for t in last.values())


def test_a_branch_may_have_other_shares_of_the_same_sources(small, capsys):
    train.main([BF16, *small, *PHASES, "run.name=phases-old", "train.steps=2"])
    source = f"run.init_from={folder(small, 'phases-old') / 'step_000002'}"
    shares = "data.phases=[{shares={a=0.5, b=0.5}}]"
    train.main([BF16, *small, *PHASES, shares, "run.name=phases-branch", source, "train.steps=3"])
    assert "branches from" in (said := capsys.readouterr().out) and "data: a (pkg:json:py)" in said
    with pytest.raises(ValueError, match=r"was trained on other data \(manifest sha256 "):
        train.main([BF16, *small, *PHASES, "data.sources.b.source=pkg:asyncio:py", "run.name=phases-other", source])
    with pytest.raises(ValueError, match="data.phases: "):
        train.main([BF16, *small, *PHASES, shares, "run.name=phases-old", "train.steps=2"])


def test_overwrite(small, capsys):
    arguments = [BF16, *small, "run.name=again", "train.steps=2"]
    train.main(arguments)
    train.main([*arguments, "train.steps=3", "run.overwrite=true"])
    assert checkpoint.steps(folder(small, "again")) == [3]


def test_overwrite_deletes_runs_only(small):
    """A mistyped run.name must not cost somebody else's folder; preparing data must not cost a run."""
    precious = folder(small, "thesis") / "chapter1.txt"
    precious.parent.mkdir()
    precious.write_text("all of it")
    with pytest.raises(ValueError, match=r"run\.overwrite: .*thesis is no run .*nothing was deleted"):
        train.main([BF16, *small, "run.name=thesis", "run.overwrite=true"])
    train.main([BF16, *small, "run.name=thesis", "run.overwrite=true", "--data"])
    assert precious.read_text() == "all of it"


def test_one_process_a_run_folder(small):
    process = start(BF16, small, "run.name=busy", "train.steps=100000", "train.log_every=1", "run.checkpoint_every=0")
    for line in process.stdout:
        if line.startswith("step     3/"):
            break
    written = (folder(small, "busy") / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"busy is being trained by another process; give this run another run\.name"):
        train.main([BF16, *small, "run.name=busy", "run.overwrite=true"])
    assert (folder(small, "busy") / "metrics.jsonl").read_text().startswith(written)
    process.kill()  # and the lock with it
    process.wait()
    train.main([BF16, *small, "run.name=busy", "run.overwrite=true", "train.steps=2"])
    assert checkpoint.steps(folder(small, "busy")) == [2]


def test_interrupted_saves(finished, small, capsys):
    """What a kill leaves between any two operations of a save: a whole step is never lost, half a one never taken."""
    run = copy(finished, "interrupted")
    step = run / "step_000020"
    states = {
        "written, not yet in place": lambda: step.rename(run / ".writing_step_000020"),
        "the old one set aside, the new one not yet in place": lambda: (
            step.rename(run / ".old_step_000020"),
            subprocess.run(["cp", "-r", run / ".old_step_000020", run / ".writing_step_000020"], check=True),
        ),
        "in place, the old one half deleted": lambda: (
            subprocess.run(["cp", "-r", step, run / ".old_step_000020"], check=True),
            (run / ".old_step_000020/model.safetensors").unlink(),
        ),
        "half written": lambda: (
            subprocess.run(["cp", "-r", step, run / ".writing_step_000030"], check=True),
            os.truncate(run / ".writing_step_000030/model.safetensors", 1000),
        ),
    }
    for name, make in states.items():
        make()
        lines = checkpoint.recover(run)
        assert lines and checkpoint.steps(run) == [10, 20], name
        assert checkpoint.fault(step) is None and not list(run.glob(".*")), name
    step.rename(run / ".writing_step_000020")
    train.main([NVFP4, *small, "run.name=interrupted", "train.stats_every=10"])
    assert "step_000020 was whole when a save was interrupted: kept" in capsys.readouterr().out


def test_saving_a_step_again_keeps_it_until_the_new_one_is_in_place(finished, monkeypatch):
    """The last rename fails: the old step is still there."""
    run = copy(finished, "again-full")
    loaded = checkpoint.load_model(run)
    before = checkpoint.sha256(run / "step_000020/model.safetensors")
    replace = os.replace

    def failing(old, new):
        if ".writing_" in str(old):
            raise OSError("No space left on device")
        replace(old, new)

    monkeypatch.setattr("checkpoint.os.replace", failing)
    with pytest.raises(OSError, match=r"could not write .*step_000020: No space left.*newest complete checkpoint is .*000020"):
        checkpoint.save(run, 20, loaded.model, torch.optim.AdamW([torch.zeros(1)]), {}, loaded.tokenizer.path, keep=2)
    assert checkpoint.fault(run / "step_000020") is None and not list(run.glob(".*"))
    assert checkpoint.sha256(run / "step_000020/model.safetensors") == before


def test_keep_last(small):
    train.main([BF16, *small, "run.name=keep", "run.checkpoint_every=5", "run.keep=3"])
    assert checkpoint.steps(folder(small, "keep")) == [10, 15, 20]


def test_non_finite_stops_with_the_first_bad_step_and_the_worst_operands(small, capsys):
    """A learning rate of 1e30 breaks the weights in step 1, so step 2 is the first with a non-finite loss."""
    arguments = [NVFP4, *small, "run.name=broken", "train.lr=1e30", "train.warmup=0", "train.log_every=10"]
    with pytest.raises(train.Stop, match=r"step 2 is the first with a non-finite loss .*no checkpoint yet"):
        train.main(arguments)
    out = capsys.readouterr().out
    assert "ten worst operands of step 2" in out
    worst = out.split("run again:\n")[1].splitlines()[:10]
    assert all("non-finite, SQNR" in line for line in worst)
    assert not checkpoint.steps(folder(small, "broken"))


def test_weights_freeze_at_the_first_non_finite_gradient(small):
    """The state that is left is the one before the bad step: that is what diagnose and a debugger look at."""
    config = load(NVFP4, [*small, "run.name=frozen"])
    run = train.Run(config, [])
    trainer = train.Trainer(config, run, train.Corpus(train.prepare(config.data, quiet=True)))
    trainer.set_policy(0)
    trainer.step(0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    weight = trainer.model.blocks[0].ffn.up.weight
    handle = weight.register_hook(lambda g: g * float("nan"))
    trainer.step(1)
    handle.remove()
    trainer.step(2)  # finite again, and still frozen
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_late_switch(small, capsys):
    train.main([str(ROOT / "configs/nvfp4.toml"), *small, "run.name=late", "policy.late.after=0.5"])
    out = capsys.readouterr().out
    assert "policy from step 0" in out and "policy from step 10" in out
    lines = [json.loads(line) for line in (folder(small, "late") / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    assert by_step[10]["val_loss"] != by_step[10]["val_loss_bf16"]
    assert by_step[20]["val_loss"] == by_step[20]["val_loss_bf16"], "the forward pass is back in BF16"


def test_statistics_off_collect_nothing(small, monkeypatch):
    monkeypatch.setattr("quant.linear.operand_stats", lambda *_: pytest.fail("statistics were computed"))
    train.main([NVFP4, *small, "run.name=nostats", "train.steps=2"])


@pytest.mark.slow
def test_a_whole_model_compiled_trains(small):
    """torch.compile of everything orders the sums of norms and softmax otherwise, so losses are near, not equal: within the
    bound of tests/test_golden.py, whose cause is the same."""
    for name in ("off", "model"):
        train.main([NVFP4, *small, f"run.name=compile-{name}", "train.steps=10", f"train.compile={name}"])
    eager, compiled = (losses(folder(small, f"compile-{name}")) for name in ("off", "model"))
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < BOUND


def test_profile(small):
    train.main([BF16, *small, "run.name=profile", "train.steps=3", "train.profile=1:2"])
    trace = json.loads((folder(small, "profile") / "profile_1-2.json").read_text())
    assert any("addmm" in e.get("name", "") or "mm" in e.get("name", "") for e in trace["traceEvents"])


def test_profile_of_a_run_that_stops_inside_the_window_and_is_continued(small, monkeypatch):
    """A profiler left running is a crash at exit; the continued run traces the rest of the window."""
    arguments = [BF16, *small, "run.name=profile-stopped", "train.steps=6", "train.profile=1:5", "train.log_every=1"]
    trace = folder(small, "profile-stopped") / "profile_1-5.json"
    step = train.Trainer.step

    def stopping(self, number):
        self.stopped_by = "SIGTERM" if number == 2 else ""
        return step(self, number)

    monkeypatch.setattr(train.Trainer, "step", stopping)
    with pytest.raises(train.Stop, match="saved .*step_000003"):
        train.main(arguments)
    assert json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    monkeypatch.setattr(train.Trainer, "step", step)
    train.main(arguments)
    assert json.loads(trace.read_text())["traceEvents"] and len(losses(trace.parent)) == 6


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=3"], "did you mean 'steps'"),
        (["model.vocab_size=384"], "data.vocab_size = 512 does not fit"),
        (["model.d_model=136"], "must be a multiple of 16"),
        (["data.source=nowhere/*.txt"], "nowhere"),
        (["run.out=README.md/x"], "run.out: README.md is a file, expected a folder"),
        (["data.cache=README.md"], "data.cache: README.md is a file, expected a folder"),
        (["run.init_from=nowhere"], "run.init_from: nowhere: neither a checkpoint nor a run folder"),
        (["run.resume=7", "run.name=finished", "train.stats_every=10"], "has the steps 10, 20"),
    ],
)
def test_wrong_input_is_one_sentence_without_a_traceback(finished, small, overrides, expected):
    done = start(NVFP4, small, *overrides)
    out = done.stdout.read()
    assert done.wait() == 2, out
    assert expected in out and "Traceback" not in out
    assert out.strip().splitlines()[-1].startswith("train.py: ")


def test_without_triton(small):
    """train.py runs where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train\n"
        f"sys.exit(train.main({[NVFP4, *small, 'run.name=no-triton', 'train.steps=1']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_evaluate(finished):
    command = [sys.executable, str(ROOT / "evaluate.py"), str(finished)]
    done = subprocess.run([*command, "--windows", "8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((finished / "step_000020/evaluation.json").read_text())
    assert found["as trained"] == found["stored codes"], "the stored codes are not those of training"
    assert found["as trained"]["loss"] != found["bf16"]["loss"]
    done = subprocess.run([*command, "--sample", "def main", "--tokens", "8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "def main" in done.stdout
    done = subprocess.run([*command[:2], "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
