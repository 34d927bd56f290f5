"""Shared by the tests: a small real corpus, and a config of a model small enough to train in a second."""

import json
import os
import sysconfig
from pathlib import Path

# One thread, here and in the processes tests start, so that several at once do not wait for each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="what a GPU is to be asked, skipped where there is none: make test-gpu")


def pytest_collection_modifyitems(config, items):
    """With --gpu all tests want a GPU; without it those that ask the hardware (marked `gpu`) are left out."""
    asked = config.getoption("--gpu", False)
    why = "" if asked else "asks the hardware: make test-gpu"
    if asked:
        import torch

        why = "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"
    for item in items:
        if why and (asked or item.get_closest_marker("gpu")):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides that turn a config of configs/ into a run of a second: real text, two blocks of width 128, 20 steps."""
    folder = tmp_path_factory.mktemp("small")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"], "json").glob("*.py"))
    sources += sorted(Path(sysconfig.get_paths()["stdlib"], "email").glob("*.py"))
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f.read_text(encoding="utf-8")}) + "\n" for f in sources))
    overrides = {
        "data.source": str(text),
        "data.vocab_size": 512,
        "data.val_every": 5,
        "data.cache": str(folder / "cache"),
        "model.blocks": 2,
        "model.d_model": 128,
        "model.ffn": 256,
        "model.heads": 2,
        "model.kv_heads": 1,
        "model.vocab_size": 512,
        "model.seq_len": 64,
        "train.steps": 20,
        "train.batch_size": 4,
        "train.log_every": 5,
        "train.val_every": 10,
        "train.val_batches": 2,
        "train.compile": "off",
        "run.out": str(folder / "out"),
        "run.samples": 0,
        "run.checkpoint_every": 10,
    }
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
