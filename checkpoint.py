"""Checkpoints: plain safetensors in a folder that is either complete or not there.

    out/NAME/step_000100/   model.safetensors      fp32 masters, by parameter name: the truth
                                                   and the amaxes that delayed scaling remembers
                            optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME: fp32, or codes and scales
                                                   (quant/moments.py; their specs in the metadata); compensation.NAME
                                                   under Kahan's update
                            quantized.safetensors  all that a forward pass needs: codes, scales and global scales of every
                                                   quantised weight, as training used them, other matrices in the compute
                                                   dtype; specs, config and state in the metadata, so that it stands alone
                            state.json             step, tokens, data position, policy in force
                            tokenizer.model        MANIFEST.json (sha256 of each file)        COMPLETE

Written to a temporary folder, every file fsynced, the folder renamed: a kill at any moment leaves the older steps and at
worst a folder that is never read. Nothing of a random generator is stored, because nothing draws from one: noise and data
are functions of the counters in state.json.

Left out so far: several ranks. Other layouts are written by export.py.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import Config, load
from data import Tokenizer
from model import GPT
from quant import WeightStore, assign, assign_sites, attach
from quant.context import Context
from quant.linear import linears
from quant.mixed import from_state
from quant.moments import NAMES, AdamW
from quant.qtensor import QTensor

VERSION = 1


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def steps(run: Path) -> list[int]:
    """The complete steps of a run, oldest first; complete means that COMPLETE is there, not that the bits are intact."""
    return sorted(int(f.parent.name[5:]) for f in run.glob("step_*/COMPLETE"))


def save(
    run: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    state: dict,
    tokenizer: Path,
    keep: int,
    store: WeightStore | None = None,
    quantized: bool = True,
) -> Path:
    """Write step_STEP of a run, with quantized.safetensors if so, and delete all but the newest `keep`. Returns the folder.

    Raises OSError, with what is safe in its message, if it cannot be written; earlier steps are untouched then.
    """
    folder, temporary = step_folder(run, step), run / f".writing_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(parameters(model), temporary / "model.safetensors")
        compensation = {f"compensation.{name}": c for name, c in store.compensation.items()} if store else {}
        moments, kept = _moments(model, optimizer)
        metadata = {"specs": json.dumps(kept), "power": json.dumps(optimizer.power)} if kept else None
        save_file(moments | compensation, temporary / "optimizer.safetensors", metadata=metadata)
        record = {"version": VERSION, "step": step, **state}
        if quantized:
            tensors, specs = packed(model)
            metadata = {"specs": json.dumps(specs), "state": json.dumps(record), "config": (run / "config.toml").read_text()}
            save_file(tensors, temporary / "quantized.safetensors", metadata=metadata)
        shutil.copyfile(tokenizer, temporary / "tokenizer.model")
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        manifest = {f.name: sha256(f) for f in sorted(temporary.iterdir())}
        (temporary / "MANIFEST.json").write_text(json.dumps({"version": VERSION, "sha256": manifest}, indent=1))
        (temporary / "COMPLETE").touch()
        for f in (*temporary.iterdir(), temporary):
            _fsync(f)
        if folder.exists():
            _set_aside(folder)
        os.replace(temporary, folder)
        _fsync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(run)
        safe = steps(run)
        rest = f"the newest complete checkpoint is {step_folder(run, safe[-1])}" if safe else "there is no earlier checkpoint"
        raise OSError(f"could not write {folder}: {error}; {rest}") from None
    for old in steps(run)[:-keep]:
        if old != step:
            _set_aside(step_folder(run, old))
    for old in run.glob(".old_step_*"):
        shutil.rmtree(old)
    return folder


def _set_aside(folder: Path) -> None:
    """Take a step out of sight in one operation: a folder half deleted would still look like a checkpoint."""
    shutil.rmtree(aside := folder.with_name(f".old_{folder.name}"), ignore_errors=True)
    os.replace(folder, aside)


def recover(run: Path) -> list[str]:
    """Put right what a save left when it was interrupted: a whole step whose place is empty takes it, the rest is deleted.
    Returns a line for each."""
    lines = []
    for left in sorted(run.glob(".*_step_*"), reverse=True):  # .writing_ before .old_
        place = run / left.name[left.name.index("step_") :]
        if not place.exists() and fault(left) is None:
            os.replace(left, place)
            lines.append(f"{place} was whole when a save was interrupted: kept")
        else:
            shutil.rmtree(left)
            lines.append(f"removing {left}, which an interrupted save left behind")
    return lines


def size_estimate(model: nn.Module, optimizer: AdamW, store: WeightStore) -> int:
    """Bytes of one checkpoint: masters in fp32, moments as they are kept, Kahan's compensation, and at most two bytes a
    parameter for the forward pass."""
    count = sum(p.numel() for p in model.parameters())
    return 6 * count + (optimizer.nbytes() or 8 * count) + 4 * store.weights.kahan * count


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and what Linears remember (delayed scaling); tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters()} | _memory(model)


def packed(model: GPT) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(the tensors of quantized.safetensors, the description of each Linear that is quantised)."""
    tensors, specs, modules = {}, {}, linears(model)
    for name, module in modules.items():
        if (q := module.quantized_weight()) is not None:
            parts, specs[name] = q.state(name)
            tensors |= parts
    for name, p in parameters(model).items():
        owner = name.removesuffix(".weight")
        if owner not in specs:
            tensors[name] = p.to(model.dtype) if owner in modules or owner == "embedding" else p
    return tensors, specs


def _memory(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers())
    return {name: t for name, t in model.state_dict().items() if name in buffers}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(the tensors of optimizer.safetensors, the description of each that is kept as codes)."""
    tensors, specs = {}, {}
    for name, p in model.named_parameters():
        for key, kept in optimizer.state.get(p, {}).items():
            if isinstance(kept, QTensor):
                parts, specs[f"{key}.{name}"] = kept.state(f"{key}.{name}")
                tensors |= parts
            elif key != "step":
                tensors[f"{key}.{name}"] = kept
    return tensors, specs


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fault(folder: Path) -> str | None:
    """None if every file of a step folder has the bits its manifest names; else one clause that says what is wrong."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        expected = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / 'MANIFEST.json'} is missing or unreadable"
    if not (folder / "COMPLETE").exists():
        return f"{folder} was never completed (it has no COMPLETE)"
    for name, digest in expected.items():
        if not (folder / name).exists():
            return f"{folder / name} is missing"
        if sha256(folder / name) != digest:
            return f"{folder / name} is truncated or altered (its sha256 is not the one in MANIFEST.json)"
    return None


def intact(folder: Path, use: str = "{folder}") -> None:
    """Raises ValueError if a step folder is damaged, naming the file and the newest intact step of the run; `use` says how
    to go on with that one."""
    if (wrong := fault(folder)) is None:
        return
    good = [s for s in steps(folder.parent) if step_folder(folder.parent, s) != folder]
    good = next((s for s in reversed(good) if fault(step_folder(folder.parent, s)) is None), None)
    use = use.format(step=good, folder=good and step_folder(folder.parent, good))
    offer = f"the newest intact step is {good}: {use}" if good else "no other step is intact"
    raise ValueError(f"{wrong}; {offer}")


def restore(folder: Path, model: GPT, optimizer: AdamW, store: WeightStore | None = None) -> dict:
    """Load masters, memory and moments into a model, its optimiser and the store of its weights; returns state.json. Moments
    that were kept in another way are converted, and a line says so. Raises ValueError if damaged or if the model has other
    parameters."""
    intact(folder)
    state = json.loads((folder / "state.json").read_text())
    _fill(model, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    path, converted = folder / "optimizer.safetensors", []
    with safe_open(path, "pt") as f:
        specs, power = (json.loads((f.metadata() or {}).get(key, no)) for key, no in (("specs", "{}"), ("power", "1")))
    tensors = load_file(path, device=str(next(model.parameters()).device))
    for name, p in model.named_parameters():
        places = {key: f"{key}.{name}" for key in NAMES}
        found = {key: from_state(place, tensors, specs[place]) for key, place in places.items() if place in specs}
        if found := found | {key: tensors[place] for key, place in places.items() if place in tensors}:
            converted += filter(None, [optimizer.adopt(p, state["step"], found, power)])
        if store and store.weights.kahan and f"compensation.{name}" in tensors:
            store.compensation[name] = tensors[f"compensation.{name}"]
    if converted:
        print(f"optimizer: {len(converted)} matrices had {converted[0]} in {path}, now {optimizer.describe()}")
    return state


@torch.no_grad()
def _fill(model: GPT, tensors: dict[str, Tensor], file: Path) -> None:
    for name, p in model.named_parameters():
        shape = tuple(tensors[name].shape) if name in tensors else "nothing"
        if shape != tuple(p.shape):
            raise ValueError(f"{file}: {name} is {shape}, the config's model wants {tuple(p.shape)}")
        p.copy_(tensors[name])
    for name in tensors.keys() - dict(model.named_parameters()).keys():  # memory, of whatever recipe had one
        module, _, buffer = name.rpartition(".")
        model.get_submodule(module).register_buffer(buffer, tensors[name].to(p.device))


@dataclass
class Loaded:
    model: GPT
    config: Config
    tokenizer: Tokenizer
    state: dict
    folder: Path


def find(run_or_step: str | Path) -> Path:
    """out/NAME (its newest complete step) or out/NAME/step_N -> the step folder. Raises ValueError if there is none."""
    path = Path(run_or_step)
    if (path / "state.json").exists():
        return path
    if not (found := steps(path)):
        raise ValueError(f"{path}: neither a checkpoint nor a run folder with a complete one")
    return step_folder(path, found[-1])


def load_model(run_or_step: str | Path, weights: str = "master") -> Loaded:
    """The model of a checkpoint, with the policy in force when it was saved, in evaluation mode.

    weights: "master" = fp32 masters, which the policy quantises again; "quantized" = quantized.safetensors alone, whose
    forward pass is bitwise that of training.
    Raises ValueError if the checkpoint is damaged or absent.
    """
    folder = find(run_or_step)
    intact(folder)
    if weights == "quantized":
        if not (folder / "quantized.safetensors").exists():
            raise ValueError(f"{folder} has no quantized.safetensors, since the run had run.quantized = false")
        return load_packed(folder / "quantized.safetensors")
    state = json.loads((folder / "state.json").read_text())
    config = load(folder.parent / "config.toml")
    model = _built(config, state)
    _fill(model, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    model.requires_grad_(False)
    return Loaded(model, config, Tokenizer.load(folder), state, folder)


def load_packed(file: str | Path) -> Loaded:
    """The model of one quantized.safetensors, wherever it lies; its tokenizer, if tokenizer.model lies beside it, else None.
    Raises ValueError if it is no such file."""
    file = Path(file)
    try:
        with safe_open(file, "pt") as f:
            found, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: {error}") from None
    if not found.keys() >= {"specs", "state", "config"}:
        raise ValueError(
            f"{file}: no model that stands alone, with specs, state and config in its metadata, but "
            f"{sorted(found) or 'nothing'} (older steps have specs alone: the run, continued, writes whole ones)"
        )
    with tempfile.TemporaryDirectory() as place:
        (text := Path(place, "config.toml")).write_text(found["config"])
        config = load(text)
    state = json.loads(found["state"])
    model = _built(config, state)
    codes = {name: from_state(name, tensors, each) for name, each in json.loads(found["specs"]).items()}
    parts = {part for name, q in codes.items() for part in q.state(name)[0]}
    modules = linears(model)
    rest = {name: t for name, t in tensors.items() if name not in parts}
    _fill(model, rest | {f"{name}.weight": modules[name].dequantized(q) for name, q in codes.items()}, file)
    model.requires_grad_(False)
    for name, q in codes.items():
        modules[name].use(q)
    tokenizer = Tokenizer.load(file.parent) if (file.parent / "tokenizer.model").exists() else None
    return Loaded(model, config, tokenizer, state, file.parent)


def _built(config: Config, state: dict) -> GPT:
    """The model at a place in the run, without its parameters."""
    model = GPT(config.model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]).eval()
    attach(model, context := Context(config.train.seed, state["gemm"]))
    context.at(max(state["step"] - 1, 0), max(state["next_micro_batch"] - 1, 0))
    assign(model, config.recipes, config.policy, state["progress"])
    assign_sites(model, config.sites)
    return model
