"""Checkpoints of several ranks: each writes its rows through DCP while training goes on, the first makes of them the same files
that one process writes.

    all ranks    a copy of masters, memory and moments, to .shards_step_N/ in a thread    dcp.async_save, safetensors
    first rank   when all are there: one file each of models and moments, quantized.safetensors, hashes, COMPLETE, in a thread

So a step is resumed on any number of ranks, and evaluated without any. Until it is COMPLETE nobody reads it, and a kill at any
moment leaves the older ones (checkpoint.py). Left out: steps that stay cut, as they would have to where one rank's disk cannot
take a whole step in the time between two.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

import checkpoint
import sealed
from configs import Config
from parallel import Shards, Whole
from quant import WeightStore
from quant.linear import memory
from quant.moments import AdamW

KINDS = ("model", "optimizer")


class Saver:
    """What writes the checkpoints of a run, one at a time."""

    def __init__(self, shards: Shards, config: Config, run: Path, tokenizer: Path):
        self.shards, self.config, self.run, self.tokenizer = shards, config, run, tokenizer
        self.group = dist.new_group(backend="gloo")  # of its own: it works beside the collectives of training
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future | None = None
        self.made: Future | None = None

    def save(self, step: int, optimizer: AdamW, store: WeightStore, state: dict) -> Path:
        """Begin to write a step; returns its folder, which is there when it is whole. Raises OSError if the one before could
        not be written."""
        self.wait()
        given = checkpoint.moments(self.shards.parameters, optimizer)
        tensors = given[0] | {f"compensation.{name}": c for name, c in store.compensation.items()}
        record = {"version": checkpoint.VERSION, "step": step, **state}
        about = {"specs": json.dumps(given[1]), "power": json.dumps(optimizer.power)} if given[1] else None
        whole = {name: self.cut(name, p.detach()) for name, p in self.shards.parameters.items()} | memory(self.shards.model)
        kinds = dict.fromkeys(whole, 1) | dict.fromkeys(tensors, 2)
        whole |= {key: self.cut(self.owner(key), t) if t.ndim else t for key, t in tensors.items()}
        place, self.folder = self.run / f".shards_step_{step:06d}", checkpoint.step_folder(self.run, step)
        self.shards.once(lambda: shutil.rmtree(place, ignore_errors=True))
        writer = dcp.HuggingFaceStorageWriter(str(place), kinds, save_distributed=True)
        self.writing = dcp.async_save(whole, storage_writer=writer, process_group=self.group)
        if self.shards.world.first:
            self.made = self.pool.submit(self.make, self.writing, place, step, record, about)
        return self.folder

    def cut(self, name: str, rows: Tensor) -> DTensor:
        """Rows of this rank, as wide as they may be, as part of all rows of a parameter."""
        p = self.shards.model.get_parameter(name)
        shape = torch.Size((p.shape[0], *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    def owner(self, key: str) -> str:
        """The parameter that a tensor of the optimiser is about: KIND.NAME, or KIND.NAME.PART."""
        name = key.partition(".")[2]
        return name if name in self.shards.parameters else name.rpartition(".")[0]

    def make(self, written: Future, place: Path, step: int, record: dict, about: dict | None) -> None:
        """On the first rank, in a thread: the step itself."""
        written.result()
        run = self.config.run
        with checkpoint.writing(self.run, step, run.keep) as (folder, settled):
            for number, kind in enumerate(KINDS, 1):
                name = f"{kind}.safetensors"
                sealed.write(
                    folder / name, joined(place, number), lambda kind=kind: about if about and kind == "optimizer" else {}
                )
                settled(name)
            shutil.rmtree(place)
            model = checkpoint.built(self.config, json.loads(json.dumps(record)))
            if run.quantized:
                checkpoint.fill(Whole(model), load_file(folder / "model.safetensors"), folder / "model.safetensors")
            checkpoint.write_rest(folder, self.run, model, record, self.tokenizer, run.quantized)

    def wait(self) -> None:
        """Until what is being written is there. Raises OSError if it could not be."""
        try:
            for work in filter(None, (self.writing, self.made)):
                work.result()
        except CheckpointException as error:
            (rank, (why, _)), safe = next(iter(error.failures.items())), checkpoint.steps(self.run)
            rest = (
                f"the newest complete checkpoint is {checkpoint.step_folder(self.run, safe[-1])}" if safe else "there is none"
            )
            raise OSError(f"could not write {self.folder}: {why} (rank {rank}); {rest}") from None
        self.writing = self.made = None
        self.shards.once(lambda: None)  # nobody goes on without the first


def joined(place: Path, number: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of file `number` of a folder that DCP has written: rows of all ranks, one after the other. (DCP's own
    function for it knows floats only, and moments may be codes.)"""
    found = defaultdict(list)
    with ExitStack() as files:
        for path in sorted(place.glob(f"shard-*-model-{number:05d}-of-*.safetensors")):
            f = files.enter_context(safe_open(path, "pt"))
            for key, about in json.loads(f.metadata()["DCP_SHARDING_INFO"]).items():
                found[key].append((about["saved_offsets"], f))
        for key, parts in sorted(found.items()):
            rows = [f.get_tensor(key) for _, f in sorted(parts, key=lambda part: part[0])]
            yield key, torch.cat(rows) if len(rows) > 1 else rows[0]
