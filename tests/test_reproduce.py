"""evaluation/reproduce.py: it sees what it is there to see, leaves a model as it was, and threads really change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import train
from evaluation import reproduce
from model import GPT
from quant.linear import linears
from tests.test_model import SMALL
from tests.test_train import NVFP4, folder

ROOT = Path(__file__).parent.parent


def prompts(count: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def model(dtype=torch.float32) -> GPT:
    found = GPT(SMALL, dtype).initialise(0).eval()
    with torch.no_grad():
        found.head.weight.mul_(30)
    return found


def test_a_row_by_hand():
    """The second text parts at token 2, the third at 3; logits of later tokens are of other texts, and say nothing."""
    base = reproduce.Found(torch.zeros(3, 2, 4), torch.zeros(3, 4, 4), torch.tensor([[1, 2, 3, 4]] * 3))
    assert reproduce.compare("x", 1, 1, base, base) == ("x", 1, 1, True, 0.0, None, 0)
    logits, steps, tokens = (t.clone() for t in base)
    tokens[1, 2], tokens[2, 3], steps[1, 3] = 9, 9, 7.0
    assert reproduce.compare("x", 2, 1, reproduce.Found(logits, steps, tokens), base) == ("x", 2, 1, True, 0.0, 2, 2)
    steps[1, 2, 0] = 0.5
    assert reproduce.compare("x", 2, 1, reproduce.Found(logits, steps, tokens), base) == ("x", 2, 1, False, 0.5, 2, 2)
    logits[2, 1, 3] = -0.75
    assert reproduce.compare("x", 2, 4, reproduce.Found(logits, steps, tokens), base) == ("x", 2, 4, False, 0.75, 2, 2)


class Batched(GPT):
    """A model whose logits depend on the batch: 2^-10 more for the last token of each prompt, for each other in the batch."""

    def forward(self, tokens, cache=None):
        logits = super().forward(tokens, cache).double()
        logits[:, -1, 5] += 2.0**-10 * (len(tokens) - 1)
        return logits


def test_it_sees_a_model_that_depends_on_the_batch():
    found = Batched(SMALL, torch.float32).initialise(0).eval()
    rows = reproduce.reproduce(found, prompts(), 6, [1, 2, 4], [1])
    assert {r.precision for r in rows} == {"as trained", "bf16", "layercast"}
    for r in rows:
        if r.precision == "layercast":  # (of BF16 the model's own logits may depend on the batch too)
            assert r.largest == pytest.approx(2**-10 * (r.batch - 1), abs=2**-16)
        assert r.equal == (r.batch == 1)
        assert (r.texts > 0) == (r.parts_at is not None)


def test_texts_are_those_of_sample():
    found, asked = model(), prompts()
    logits, steps, tokens = reproduce.texts(found, asked, 12, 3)
    assert steps.shape == (4, 12, SMALL.vocab_size) and torch.equal(steps.argmax(-1), tokens)
    assert tokens.tolist() == [found.sample(p, 12, temperature=0)[8:] for p in asked.tolist()]
    with torch.no_grad():
        assert torch.equal(logits[3:], found(asked[3:]))


def test_precisions_are_what_they_are_called_and_end():
    """LayerCast: BF16 matrices, fp32 logits; BF16: the same matrices, BF16 logits. Then all is as it was, bit for bit."""
    found, asked = model(), prompts()
    kept = {name: p.clone() for name, p in found.named_parameters()}
    with torch.no_grad():
        before = found(asked)
        with reproduce.layercast(found):
            for name, p in found.named_parameters():
                assert torch.equal(p, kept[name].bfloat16().float() if p.ndim == 2 else kept[name]), name
            wide = found(asked)
            assert wide.dtype == torch.float32
        with reproduce.bf16(found):
            narrow = found(asked)
            assert narrow.dtype == torch.bfloat16
        assert not torch.equal(wide, before) and torch.equal(found(asked), before)
    # The same weights: what parts them is BF16's rounding of activations, 2^-9 each, of some twenty in a row.
    assert (wide - narrow).abs().max() < 20 * 2**-8 * wide.abs().max()


def test_threads_change_and_are_put_back():
    before = torch.get_num_threads()
    for count in (1, 2):
        with reproduce.threads(count):
            info = torch.__config__.parallel_info()
            assert torch.get_num_threads() == count
            assert f"omp_get_max_threads() : {count}" in info
    assert torch.get_num_threads() == before


def test_threads_are_threads_of_the_system():
    """As the kernel counts them, in a process of its own: one more for each that is asked for."""
    code = """
import os, torch
from evaluation.reproduce import threads
a, found = torch.ones(512, 512), []
for count in (1, 2, 3):
    with threads(count):
        a @ a, a.exp()
    found.append(len(os.listdir("/proc/self/task")))
print(*found)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    one, two, three = map(int, done.stdout.split())
    assert (two - one, three - one) == (1, 2), done.stderr


def test_the_command(small, capsys):
    train.main([NVFP4, *small, "run.name=reproduce", "policy.tail.last=0", "train.steps=2"])
    run = folder(small, "reproduce")
    assert evaluate.main([str(run), "--reproduce", "--batches", "1,3", "--threads", "1,2", "--tokens", "5"]) == 0
    found = json.loads((checkpoint.find(run) / "reproduce.json").read_text())
    assert (found["prompts"], found["prompt_tokens"], found["tokens"]) == (3, 32, 5)
    rows = found["rows"]
    assert [(r["precision"], r["batch"], r["threads"]) for r in rows] == [
        (name, b, n) for name in reproduce.PRECISIONS for n in (1, 2) for b in (1, 3)
    ]
    bases = [r for r in rows if (r["batch"], r["threads"]) == (1, 1)]
    assert all(r["equal"] and r["largest"] == 0 and r["parts_at"] is None for r in bases)
    # NVFP4 has one scale for the activations of a batch: of three prompts it is another than of one.
    assert not any(r["equal"] for r in rows if r["precision"] == "as trained" and r["batch"] == 3)
    assert len(capsys.readouterr().out.splitlines()) >= 14
    loaded = checkpoint.load_model(run)
    assert any(m.recipe for m in linears(loaded.model).values())
