"""planning/ and plan.py: bytes against what the allocator of real training steps says, counts by hand, and published runs."""

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from configs import load
from planning.memory import peak, timeline
from planning.probe import Model
from train import Trainer

# --- against reality ---


def measured(config) -> tuple[float, float]:
    """(live, most) bytes that the allocator has handed out in two steps of training: between the last forward and its backward,
    and at the highest. Everything is within the profile: weights, gradients, moments, caches, temporaries."""

    def batch(split, seed, number, size, length):
        ids = torch.randint(config.model.vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(number))
        return ids[:, :-1], ids[:, 1:]

    gc.collect()  # what dies inside would be subtracted
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(bytes_per_token=[1] * config.model.vocab_size), batch=batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        trainer = Trainer(config, None, corpus)
        trainer.set_policy(0)
        forward = trainer.loss

        def loss(x, y):
            out = forward(x, y)
            with record_function("between"):
                return out

        trainer.loss = loss
        for step in range(2):
            trainer.step(step)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    end = max(e.start_ns() for e in events if e.name() == "between")
    live = sum(size for at, size in changes if at <= end)
    return live, max(itertools.accumulate(size for _, size in changes))


SMALL = ["train.compile=off", "model.blocks=2", "model.seq_len=128", "train.batch_size=4"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny-bf16", []),
        *(
            pytest.param(name, overrides, marks=pytest.mark.slow)
            for name, overrides in [
                ("tiny-nvfp4", []),
                ("tiny-nvfp4", ["train.recompute=true"]),
                ("mxfp8", []),
                ("mor-tensor", []),
                ("fp8-adam", []),
                ("nvfp4-llama", ["train.micro_batches=1"]),
            ]
        ),
    ],
)
def test_bytes_are_those_of_real_steps(name, overrides):
    """Within 0.2 % of 61 MB and more: what is not counted is 74 kB of tokens, counters, RoPE's table, the optimiser's steps.
    The peak within 5 %: in nvfp4-llama it is the optimiser's, whose temporaries are not counted."""
    config = load(f"configs/{name}.toml", [*SMALL, *overrides])
    live, most = measured(config)
    found = timeline(Model(config), ranks=1)
    loss = [moment for moment in found if moment.label.endswith("loss")][-1]
    assert 0 <= live - loss.total < 1e5, f"{live - loss.total:.0f} bytes of {live:.0f}"
    assert peak(found).total == pytest.approx(most, rel=0.05)
