"""Ladders with a Memory (quant/memory.py): the state machine is a simple one in Python, its defaults are a ladder without one,
decisions do not depend on the order of micro-batches, and nothing is lost by saving and loading.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import Choice, Context, Linear, Memory, QuantSpec, Recipe, Scale, attach, memory
from quant.metrics import STATS
from quant.recipe import Dgrad, Fprop, Wgrad

BF16 = QuantSpec("bf16", scale=Scale("none"))
E4M3, E2M1 = QuantSpec("e4m3", (-1, -1), Scale("fp32")), QuantSpec("e2m1", (-1, -1), Scale("fp32"))


def ladder(n: int, **how) -> Choice:
    return Choice((E2M1, E4M3, BF16)[-n - 1 :], "relative_error", 0.045, "tensor", memory=Memory(**how))


class Simple:
    """The rules of quant/choice.py's Memory, a step at a time, with lists and loops. used(): what each micro-batch takes."""

    def __init__(self, n: int, m: Memory):
        self.n, self.m = n, m
        self.level, self.good, self.levels = -1, [0] * n, []

    def first(self, ratios: list[float], good: list[int], cheaper: bool) -> int:
        for c in range(self.n):
            if c < self.level:
                may = cheaper and good[c] >= self.m.patience and ratios[c] <= 1 - self.m.margin
            else:
                may = ratios[c] <= (1 if self.level < 0 else 1 + self.m.margin)
            if may:
                return c
        return self.n

    def step(self, step: int, batches: list[list[float]]) -> list[int]:
        m, look = self.m, step >= self.m.warmup and (step - self.m.warmup) % self.m.every == 0
        cheaper = not m.freeze or step < m.freeze
        self.levels.append(self.level)
        if m.delay:
            now = self.levels[step - m.delay + 1] if step - m.delay + 1 >= 0 else -1
            used = [now] * len(batches)
        elif look:
            better = [[g + 1 if r <= 1 - m.margin else 0 for g, r in zip(self.good, b, strict=True)] for b in batches]
            used = [self.first(b, g, cheaper) for b, g in zip(batches, better, strict=True)]
        else:
            used = [self.level] * len(batches)
        if look:
            worst = [max(column) for column in zip(*batches, strict=True)]
            self.good = [g + 1 if r <= 1 - m.margin else 0 for g, r in zip(self.good, worst, strict=True)]
            self.level = self.first(worst, self.good, cheaper)
        return [self.n if u < 0 else u for u in used]


def decisions(choice: Choice, steps: list[list[list[float]]], saved: int | None = None) -> list[list[int]]:
    """What quant/memory.py decides; after `saved` steps from a copy of the state alone."""
    state, copies, found = memory.empty(choice, torch.device("cpu")), memory.Copies(), []
    for step, batches in enumerate(steps):
        if step == saved:
            state, copies = state.clone(), memory.Copies()
        used = []
        for ratios in batches:
            state = memory.settled(state, choice, torch.tensor(step))
            index, picker, measure = memory.decision(state, choice, step, True, copies)
            values = torch.tensor(ratios, dtype=torch.float64)
            used.append(int(picker(values) if index is None else index))
            if measure:
                state = memory.gathered(state, values, torch.tensor(step))
        found.append(used)
    return found


MEMORIES = st.builds(
    Memory,
    every=st.integers(1, 4),
    delay=st.integers(0, 3),
    patience=st.integers(1, 4),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    warmup=st.integers(0, 4),
    freeze=st.sampled_from([0, 7, 12]),
)
RATIOS = st.sampled_from([0.2, 0.5, 0.8, 0.95, 1.0, 1.05, 1.2, 2.0, float("inf")])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_state_machine_is_the_simple_one(data):
    n, m = data.draw(st.integers(1, 2)), data.draw(MEMORIES)
    batch = st.lists(RATIOS, min_size=n, max_size=n)
    steps = data.draw(st.lists(st.lists(batch, min_size=2, max_size=2), min_size=1, max_size=24))
    simple = Simple(n, m)
    choice = ladder(n, **vars(m))
    found = decisions(choice, steps)
    assert found == [simple.step(i, batches) for i, batches in enumerate(steps)]
    assert decisions(choice, steps, saved=len(steps) // 2) == found
    turned = decisions(choice, [batches[::-1] for batches in steps])
    assert [sorted(used) for used in turned] == [sorted(used) for used in found]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(RATIOS, min_size=2, max_size=2), min_size=1, max_size=20))
def test_defaults_are_no_memory_at_all(steps):
    """With one micro-batch a step; with more, the worst one of a step holds the others of the next back."""
    first = [[next((c for c, r in enumerate(ratios) if r <= 1), 2)] for ratios in steps]
    assert decisions(ladder(2), [[ratios] for ratios in steps]) == first


# --- in a Linear ---


def recipe(choice: Choice) -> Recipe:
    return Recipe(Fprop(choice, choice), Dgrad(choice, choice), Wgrad(choice, choice))


def linear(choice: Choice) -> Linear:
    module = Linear(64, 64)
    with torch.no_grad():
        module.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    module.recipe = recipe(choice)
    attach(module, Context())
    module.context.decisions = {}
    return module


def batch(number: int) -> tuple[Tensor, Tensor]:
    """x and g; every third pair has rows of very different sizes, which E4M3 cannot hold."""
    generator = torch.Generator().manual_seed(number)
    sizes = torch.exp(3.0 * (number % 3 == 0) * torch.randn(64, 1, generator=generator))
    return tuple((torch.randn(64, 64, generator=generator) * sizes).bfloat16() for _ in range(2))


def train(module: Linear, steps: range) -> list[Tensor]:
    out = []
    for step in steps:
        for i in range(2):
            module.context.at(step, 2 * step + i)
            x, g = batch(2 * step + i)
            x.requires_grad_()
            y = module(x)
            y.backward(g)
            out += [y.detach(), x.grad]
        with torch.no_grad():
            module.weight -= 0.01 * module.weight.grad.sign()
        module.weight.grad = None
    return out


HOW = [dict(), dict(every=3), dict(delay=1), dict(delay=2, every=2), dict(margin=0.3, patience=2, warmup=2)]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_run_continues_from_its_buffers(how):
    whole = linear(ladder(1, **how))
    expected = train(whole, range(10))
    first = linear(ladder(1, **how))
    found = train(first, range(5))
    with torch.no_grad():
        for x in (batch(100)[0], batch(99)[0]):  # an evaluation in between changes nothing
            first.eval()(x)
    second = linear(ladder(1, **how))
    second.load_state_dict(first.state_dict())
    found += train(second, range(5, 10))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)
    assert {name for name in whole.state_dict() if name != "weight"} == {
        f"memory_{o}" for o in ("fprop_x", "fprop_w", "dgrad_g", "dgrad_w", "wgrad_g", "wgrad_x")
    }
    for name, buffer in whole.named_buffers():
        assert_same_bits(second.get_buffer(name), buffer)


def test_a_memory_of_nothing_trains_as_none():
    """One micro-batch a step, every default: bit for bit the memoryless ladder."""

    def one(choice: Choice) -> list[Tensor]:
        module, out = linear(choice), []
        for step in range(6):
            module.context.at(step, step)
            x, g = batch(step)
            x.requires_grad_()
            module(x).backward(g)
            out += [x.grad, module.weight.grad.clone()]
            torch.autograd.graph.increment_version(module.weight)
        return out

    for a, b in zip(one(ladder(1)), one(replace(ladder(1), memory=None)), strict=True):
        assert_same_bits(a, b)


def test_statistics_are_of_what_was_used():
    """In a look without delay each micro-batch takes its own, and so do its statistics."""
    module = linear(ladder(1))
    for step in range(6):
        module.context.at(step, step)
        module.context.stats, (x, g) = {}, batch(step)
        module(x.requires_grad_()).backward(g)
        used = module.context.decisions["/fprop.x"][step, step].index
        sqnr = float(module.context.stats["/fprop.x"][STATS.index("sqnr_db")])
        assert used == (step % 3 == 0) and (sqnr > 100) == bool(used)  # BF16 leaves x as it is


def test_another_ladder_starts_anew():
    first = linear(ladder(1, every=2))
    train(first, range(3))
    state = first.get_buffer("memory_fprop_x").clone()
    same, first.recipe = first.recipe, None
    first.recipe = same  # as an evaluation in BF16 does
    assert_same_bits(first.get_buffer("memory_fprop_x"), state)
    first.recipe = recipe(replace(ladder(1, every=2), below=0.05))
    assert first.get_buffer("memory_fprop_x")[memory.LEVEL] == -1
    second = linear(ladder(1, every=2))  # a checkpoint of one, under the recipe of another
    second.load_state_dict(first.state_dict() | {"memory_fprop_x": state})
    second.recipe = recipe(replace(ladder(1, every=2), below=0.05))
    assert second.get_buffer("memory_fprop_x")[memory.LEVEL] == -1


def kept(module: Linear, x: Tensor) -> int:
    """Bytes that autograd saves of x, for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x.requires_grad_())
    return sum({t.data_ptr(): t.nbytes for t in saved if t.dtype != torch.float32 or t.numel() == 1}.values())


def test_what_is_known_beforehand_is_kept_packed():
    """A byte an element for E4M3 and a scale, instead of BF16's two; in a look too."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    delayed, at_once = linear(ladder(1, delay=1, every=2)), linear(replace(ladder(1), memory=None))
    sizes = []
    for step in range(4):
        delayed.context.at(step, step)
        sizes.append(kept(delayed, x.clone()))
    assert sizes[0] >= 2 * x.numel()  # nothing is known yet: BF16
    assert sizes[1:] == [x.numel() + 4] * 3
    assert kept(at_once, x.clone()) >= 2 * x.numel()
