"""Checkpoints: plain safetensors in a folder that is either complete or not there.

    out/NAME/step_000100/   model.safetensors      fp32 masters, by parameter name: the truth
                                                   and the amaxes that delayed scaling remembers
                            optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME: fp32, or codes and scales
                                                   (quant/moments.py; their specs in the metadata); compensation.NAME
                                                   under Kahan's update
                            quantized.safetensors  all that a forward pass needs: codes, scales and global scales of every
                                                   quantised weight, as training used them, other matrices in the compute
                                                   dtype; specs, config and state in the metadata, so that it stands alone
                            state.json             step, tokens, data position, policy in force, largest inputs
                            config.toml            that of the run, resolved                  tokenizer.model
                            MANIFEST.json          sha256 of each file                        COMPLETE: that of the manifest

Written to a temporary folder, every file fsynced, the folder renamed: a kill at any moment leaves the older steps and at
worst a folder that is never read. Whoever reads a file checks its sha256 first. Nothing of a random generator is stored,
because nothing draws from one: noise and data are functions of the counters in state.json.

Several ranks write the same files (saving.py). Other layouts are written by export.py.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sealed
from configs import Config, load
from data import Tokenizer
from model import GPT, rope_table
from parallel import Whole
from quant import QTensor, WeightStore, assign, assign_sites, attach
from quant.context import Context
from quant.linear import linears, memory
from quant.mixed import Mixed, from_state
from quant.moments import NAMES, AdamW

VERSION = 2  # 1 had no config.toml and an empty COMPLETE


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
    tokenizer: Path | None,
    keep: int,
    store: WeightStore | None = None,
    quantized: bool = True,
) -> Path:
    """Write step_STEP of a run, with quantized.safetensors if so, and delete all but the newest `keep`. Returns the folder.

    Raises OSError, with what is safe in its message, if it cannot be written; earlier steps are untouched then.
    """
    record = {"version": VERSION, "step": step, **state}
    with writing(run, step, keep) as (temporary, written):
        save_file(parameters(model), temporary / "model.safetensors")
        written("model.safetensors")
        compensation = {f"compensation.{name}": c for name, c in store.compensation.items()} if store else {}
        found, kept = moments(dict(model.named_parameters()), optimizer)
        metadata = {"specs": json.dumps(kept), "power": json.dumps(optimizer.power)} if kept else None
        save_file(found | compensation, temporary / "optimizer.safetensors", metadata=metadata)
        written("optimizer.safetensors")
        write_rest(temporary, run, model, record, tokenizer, quantized)
    return step_folder(run, step)


@contextmanager
def writing(run: Path, step: int, keep: int) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """`with writing(...) as (folder, written)`: a folder for the files of a step. written(name): that one is, and disk and
    hashes may work on it while the next is made. At the end they all are; the folder is sealed and gets its name, and all steps
    but the newest `keep` go. Raises OSError, with what is safe in its message."""
    folder, temporary = step_folder(run, step), run / f".writing_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(2) as pool:  # (each thread has a buffer)
            hashes = {}

            def written(name: str) -> None:
                hashes[name] = pool.submit(_settle, temporary / name)

            yield temporary, written
            for file in temporary.iterdir():
                if file.name not in hashes:
                    written(file.name)
            manifest = {name: hashes[name].result() for name in sorted(hashes)}
        (temporary / "MANIFEST.json").write_text(json.dumps({"version": VERSION, "sha256": manifest}, indent=1))
        (temporary / "COMPLETE").write_text(_settle(temporary / "MANIFEST.json"))
        for f in (temporary / "COMPLETE", temporary):
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


def write_rest(folder: Path, run: Path, model: GPT, record: dict, tokenizer: Path | None, quantized: bool) -> None:
    """The files of a step beside masters and moments."""
    shutil.copyfile(run / "config.toml", folder / "config.toml")
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    (folder / "state.json").write_text(json.dumps(record, indent=1))
    if quantized:
        specs: dict[str, dict] = {}
        texts = {"state": json.dumps(record), "config": (run / "config.toml").read_text()}
        file = folder / "quantized.safetensors"
        sealed.write(file, packed(model, specs), lambda: {"specs": json.dumps(specs), **texts})


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
    return {name: p.detach() for name, p in model.named_parameters()} | memory(model)


def packed(model: GPT, specs: dict[str, dict]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of quantized.safetensors, one at a time; fills `specs` with the description of each quantised Linear."""
    modules = linears(model)
    for name, module in modules.items():
        if (q := module.quantized_weight()) is not None:
            parts, specs[name] = q.state(name)
            yield from parts.items()
    for name, p in parameters(model).items():
        owner = name.removesuffix(".weight")
        if owner not in specs:
            yield name, p.to(model.dtype) if owner in modules or owner == "embedding" else p


def moments(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(the tensors of optimizer.safetensors, the description of each that is kept as codes)."""
    tensors, specs = {}, {}
    for name, p in parameters.items():
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


def _settle(file: Path) -> str:
    """On the disk, and its sha256."""
    digest = sha256(file)
    _fsync(file)
    return digest


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fault(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """None if every file of a step folder (or those of `names` that it has) has the bits its manifest names; else one clause
    that says what is wrong."""
    try:
        text = (folder / "MANIFEST.json").read_bytes()
        manifest = json.loads(text)
        version, expected = int(manifest["version"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / 'MANIFEST.json'} is missing or unreadable"
    if version > VERSION:
        return f"{folder} has format {version}, of a newer narrow; this one reads up to {VERSION}"
    if not (folder / "COMPLETE").exists():
        return f"{folder} was never completed (it has no COMPLETE)"
    if version > 1 and (folder / "COMPLETE").read_bytes() != hashlib.sha256(text).hexdigest().encode():
        return f"{folder / 'MANIFEST.json'} or {folder / 'COMPLETE'} is altered (one has not the sha256 that the other names)"
    with ThreadPoolExecutor() as pool:
        asked = sorted(expected if names is None else expected.keys() & set(names))
        for name, found in zip(asked, pool.map(lambda name: _sha256_or_none(folder / name), asked), strict=True):
            if found is None:
                return f"{folder / name} is missing"
            if found != expected[name]:
                return f"{folder / name} is truncated or altered (its sha256 is not the one in MANIFEST.json)"
    return None


def _sha256_or_none(file: Path) -> str | None:
    if not file.exists():
        return None
    with sealed.mapped(file) as whole:
        return hashlib.sha256(whole).hexdigest()


def intact(folder: Path, use: str = "{folder}", names: Iterable[str] | None = None) -> None:
    """Raises ValueError if a step folder is damaged (or one of `names` in it), naming the file and the newest intact step of
    the run; `use` says how to go on with that one."""
    if (wrong := fault(folder, names)) is None:
        return
    good = [s for s in steps(folder.parent) if step_folder(folder.parent, s) != folder]
    good = next((s for s in reversed(good) if fault(step_folder(folder.parent, s)) is None), None)
    use = use.format(step=good, folder=good and step_folder(folder.parent, good))
    offer = f"the newest intact step is {good}: {use}" if good else "no other step is intact"
    raise ValueError(f"{wrong}; {offer}")


def restore(folder: Path, shards: Whole, optimizer: AdamW, store: WeightStore | None = None) -> dict:
    """Load masters, memory and moments into a model, its optimiser and the store of its weights, or those rows that are on
    this rank; returns state.json. Moments that were kept in another way are converted, and a line says so. Raises ValueError if
    damaged or if the model has other parameters."""
    shards.once(lambda: intact(folder))
    state = json.loads((folder / "state.json").read_text())
    fill(shards, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    path, converted = folder / "optimizer.safetensors", []
    with safe_open(path, "pt") as f:
        specs, power = (json.loads((f.metadata() or {}).get(key, no)) for key, no in (("specs", "{}"), ("power", "1")))
    if len(shards.parameters) and any(shards.rows(name) != slice(None) for name in shards.parameters):
        for place, about in specs.items():
            if about["spec"]["block"][0] != 1:
                raise ValueError(
                    f"{path}: {place} is in blocks of several rows, which are not cut over ranks; continue it on one"
                )
    whole = load_file(path)
    for name, p in shards.parameters.items():
        places = {key: f"{key}.{name}" for key in NAMES}
        mine = (key for key in whole if name in (key.partition(".")[2], key.partition(".")[2].rpartition(".")[0]))
        tensors = {key: shards.mine(name, whole[key]).to(p.device) for key in mine}
        found = {key: from_state(place, tensors, specs[place]) for key, place in places.items() if place in specs}
        found = {key: replace(q, shape=tuple(p.shape)) for key, q in found.items()}
        if found := found | {key: tensors[place] for key, place in places.items() if place in tensors}:
            converted += filter(None, [optimizer.adopt(p, state["step"], found, power)])
        if store and store.weights.kahan and f"compensation.{name}" in tensors:
            store.compensation[name] = tensors[f"compensation.{name}"]
    if converted:
        print(f"optimizer: {len(converted)} matrices had {converted[0]} in {path}, now {optimizer.describe()}")
    return state


@torch.no_grad()
def fill(shards: Whole, tensors: dict[str, Tensor], file: Path, but: Iterable[str] = ()) -> None:
    for name in shards.parameters:
        if name in but:
            continue
        shape, wanted = tuple(tensors[name].shape) if name in tensors else "nothing", tuple(shards.shape(name))
        if shape != wanted:
            raise ValueError(f"{file}: {name} is {shape}, the config's model wants {wanted}")
        shards.put(name, tensors[name])
    for name in tensors.keys() - shards.parameters.keys():  # memory, of whatever recipe had one
        module, _, buffer = name.rpartition(".")
        shards.model.get_submodule(module).register_buffer(buffer, tensors[name].to(shards.device))


def written(path: Path, what: str | bytes) -> Path:
    """Write a file so that it is there whole or not at all: beside its place, then renamed. Raises OSError."""
    beside = path.with_name(f".writing_{path.name}")
    beside.write_bytes(what.encode() if isinstance(what, str) else what)
    os.replace(beside, path)
    return path


def config_file(folder: Path) -> Path:
    """The config of a step: its own, or in format 1 that of its run."""
    own = folder / "config.toml"
    return own if own.exists() else folder.parent / "config.toml"


@dataclass
class Loaded:
    model: GPT
    config: Config
    tokenizer: Tokenizer | None  # an import may have none
    state: dict
    folder: Path


PICKLES = ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"


def refuse_pickle(path: Path) -> None:
    """Raises ValueError if this is a pickle, by name or by its first bytes, or a folder that has one and no safetensors."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    if any(f.suffix == ".safetensors" for f in files):
        return
    for f in files:
        if f.suffix.lower() in PICKLES or (f == path and _pickled(f)):
            raise ValueError(f"{f} is a pickle, which may run any code when it is loaded: only safetensors are read")


def _pickled(file: Path) -> bool:
    """By protocol 2 or newer of pickle, or as torch.save writes it, a zip with data.pkl."""
    with file.open("rb") as f:
        start = f.read(4)
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return True
    if start != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def find(run_or_step: str | Path) -> Path:
    """out/NAME (its newest complete step) or out/NAME/step_N -> the step folder. Raises ValueError if there is none."""
    path = Path(run_or_step)
    if (path / "MANIFEST.json").exists() or (path / "state.json").exists():
        return path
    if not (found := steps(path)):
        refuse_pickle(path)
        raise ValueError(f"{path}: neither a checkpoint nor a run folder with a complete one")
    return step_folder(path, found[-1])


def load_model(run_or_step: str | Path, weights: str = "master") -> Loaded:
    """The model of a checkpoint, with the policy in force when it was saved, in evaluation mode.

    weights: "master" = fp32 masters, which the policy quantises again; "quantized" = quantized.safetensors alone, whose
    forward pass is bitwise that of training.
    Raises ValueError if the checkpoint is damaged or absent.
    """
    folder = find(run_or_step)
    files = ["config.toml", "state.json", "tokenizer.model"]
    if weights == "quantized":
        if not (folder / "quantized.safetensors").exists():
            intact(folder, names=["quantized.safetensors"])
            raise ValueError(f"{folder} has no quantized.safetensors, since the run had run.quantized = false")
        intact(folder, names=files)  # (quantized.safetensors has a sha256 of its own)
        return load_packed(folder / "quantized.safetensors")
    with sealed.meanwhile(lambda: intact(folder, names=[*files, "model.safetensors"])):
        state = json.loads((folder / "state.json").read_text())
        config = load(config_file(folder), fits=False)
        model = built(config, state)
        fill(Whole(model), load_file(folder / "model.safetensors"), folder / "model.safetensors")
        model.requires_grad_(False)
        return Loaded(model, config, _tokenizer(folder), state, folder)


def load_packed(file: str | Path) -> Loaded:
    """The model of one quantized.safetensors, wherever it lies; its tokenizer, if tokenizer.model lies beside it, else None.
    Raises ValueError if it is no such file."""
    file = Path(file)
    with sealed.read(file) as (tensors, found):
        state = json.loads(found["state"])
        if state["version"] > VERSION:
            raise ValueError(f"{file} has format {state['version']}, of a newer narrow; this one reads up to {VERSION}")
        with tempfile.TemporaryDirectory() as place:
            (text := Path(place, "config.toml")).write_text(found["config"])
            config = load(text, fits=False)
        model = built(config, state)
        codes = {name: from_state(name, tensors, each) for name, each in json.loads(found["specs"]).items()}
        parts = {part for name, q in codes.items() for part in q.state(name)[0]}
        modules = linears(model)
        rest = {name: t for name, t in tensors.items() if name not in parts}
        fill(Whole(model), rest, file, but={f"{name}.weight" for name in codes})
        model.requires_grad_(False)
        for name, q in codes.items():
            modules[name].use(q, master=True)
    return Loaded(model, config, _tokenizer(file.parent), state, file.parent)


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if (folder / "tokenizer.model").exists() else None


def codes(folder: Path) -> dict[str, QTensor | Mixed]:
    """Linear -> its weight as quantized.safetensors of a step has it; nothing where there is no such file."""
    if not (file := folder / "quantized.safetensors").exists():
        return {}
    with safe_open(file, "pt") as f:
        specs = json.loads(f.metadata()["specs"])
    tensors = load_file(file)
    return {name: from_state(name, tensors, each) for name, each in specs.items()}


def built(config: Config, state: dict) -> GPT:
    """The model at a place in the run, without its parameters."""
    with torch.device("meta"):  # nobody draws initial weights for what is filled at once
        model = GPT(config.model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]).eval()
    model.to_empty(device="cpu")
    if config.model.rope:
        model.rope.copy_(rope_table(config.model))
    if config.model.tied_head:  # to_empty gives each a memory of its own
        model.head.weight = model.embedding.weight
    attach(model, context := Context(config.train.seed, state["gemm"]))
    context.at(max(state["step"] - 1, 0), max(state["next_micro_batch"] - 1, 0))
    assign(model, config.recipes, config.policy, state["progress"])
    assign_sites(model, config.sites)
    return model
