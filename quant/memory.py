"""What a ladder with a Memory remembers between steps: a vector in a buffer, and how it changes once a step.

    state fp64 [3 + 2 N + D] = whose, look, level, good[N], worst[N], levels[D]        N = candidates - 1, D = max(delay, 1)

    whose   a checksum of the ladder: the memory of another one is not read
    look    the step whose errors are gathered in `worst`, the largest ratios of its micro-batches (choose.py); -inf: none
    level   the candidate that all finished looks have led to, -1 before the first
    good    of each candidate, in how many looks in a row its ratio has been at most 1 - margin
    levels  the level at the beginning of step s at s modulo D: a delay of D reads that of step s - D + 1

A look finds the first candidate that may be taken: below the level one with ratio <= 1 - margin and good >= patience, from
the level on one with ratio <= 1 + margin. Without delay each micro-batch of the look has taken its own so; with all defaults
that is a ladder without a Memory.

A look is finished by the first call in a later step. All is arithmetic on the device. Only a delayed level is read by the
host, from a copy that has been on its way since the level was settled: so a GPU is waited for with a delay of 1, and not with
one of 2 (as documented, not measured). With several ranks `worst` is theirs to maximise.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from quant.choice import Choice, Memory

WHOSE, LOOK, LEVEL, GOOD = 0, 1, 2, 3


def empty(choice: Choice, device: torch.device) -> Tensor:
    """The state before the first step."""
    n, d = len(choice.candidates) - 1, max(choice.memory.delay, 1)
    state = torch.full((GOOD + 2 * n + d,), -1.0, dtype=torch.float64, device=device)
    state[WHOSE] = checksum(choice)
    state[LOOK], state[GOOD : GOOD + n], state[GOOD + n : GOOD + 2 * n] = -torch.inf, 0, -torch.inf
    return state


def checksum(choice: Choice) -> float:
    return float(zlib.crc32(repr(choice).encode()))


def looks(memory: Memory, step: int) -> bool:
    """Whether errors are measured in this step."""
    return step >= memory.warmup and (step - memory.warmup) % memory.every == 0


def _first(ratios: Tensor, level: Tensor, good: Tensor, cheaper: Tensor | bool, memory: Memory) -> Tensor:
    """The first that may be taken, int64 []. `good`: with this look; `cheaper`: whether any below the level may be."""
    below = torch.arange(len(ratios), device=ratios.device) < level
    below_may = (good >= memory.patience) & (ratios <= 1 - memory.margin) & cheaper
    may = torch.where(below, below_may, ratios <= torch.where(level < 0, 1.0, 1 + memory.margin))
    return (~may).long().cumprod(0).sum(0)


def _good(ratios: Tensor, good: Tensor, memory: Memory) -> Tensor:
    return torch.where(ratios <= 1 - memory.margin, good + 1, 0.0)


def settled(state: Tensor, choice: Choice, step: Tensor) -> Tensor:
    """The state at the beginning of a step ([]), its last look finished if that was an earlier one."""
    memory, n, d = choice.memory, len(choice.candidates) - 1, max(choice.memory.delay, 1)
    look, level, good, worst, levels = state[LOOK], state[LEVEL], *state[GOOD:].split([n, n, d])
    after = _good(worst, good, memory)
    found = _first(worst, level, after, (look < memory.freeze) | (memory.freeze == 0), memory)
    over = (look < step) & (look >= 0)
    level, good = torch.where(over, found, level), torch.where(over, after, good)
    now = torch.arange(d, device=state.device) == step % d
    head = torch.stack([state[WHOSE], torch.where(over, -torch.inf, look), level])
    return torch.cat([head, good, worst, torch.where(now, level, levels)])


def gathered(state: Tensor, ratios: Tensor, step: Tensor) -> Tensor:
    """... with the ratios fp64 [N] of one more micro-batch of this step. A NaN stays, and is within no bound."""
    n = len(ratios)
    worst = state[GOOD + n : GOOD + 2 * n]
    worst = torch.where(state[LOOK] == step, torch.maximum(worst, ratios), ratios)
    look = step.view(1).double()
    return torch.cat([state[:LOOK], look, state[LEVEL : GOOD + n], worst, state[GOOD + 2 * n :]])


class Copies:
    """Levels on their way to the host, of one operand: step -> a copy, and on a GPU the event that it is there."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def send(self, state: Tensor, choice: Choice, step: int) -> None:
        if state.is_cuda and step not in self.found:
            self.found = {s: copy for s, copy in self.found.items() if s > step - choice.memory.delay}
            host = torch.empty((), dtype=state.dtype, pin_memory=True).copy_(state[LEVEL], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.found[step] = host, event

    def level(self, state: Tensor, choice: Choice, step: int) -> int:
        """That of `step`; from the state where no copy was sent (on a CPU, or after a restart)."""
        if step in self.found:
            self.found[step][1].synchronize()
            return int(self.found[step][0])
        return int(state[GOOD + 2 * (len(choice.candidates) - 1) + step % choice.memory.delay])


def decision(
    state: Tensor, choice: Choice, step: int, training: bool, copies: Copies
) -> tuple[Tensor | int | None, Callable | None, bool]:
    """A settled state -> (the candidate where it is decided, else what picks one from ratios, and whether to measure them)."""
    n, memory = len(choice.candidates) - 1, choice.memory
    measure = training and looks(memory, step)
    if memory.delay:
        copies.send(state, choice, step)
        level = copies.level(state, choice, step - memory.delay + 1)
        return n if level < 0 else level, None, measure
    if not measure:
        return torch.where(state[LEVEL] < 0, n, state[LEVEL]).long(), None, False
    level, good = state[LEVEL].clone(), state[GOOD : GOOD + n].clone()

    def picker(ratios: Tensor, bounded: bool = True) -> Tensor:
        return _first(ratios, level, _good(ratios, good, memory), not memory.freeze or step < memory.freeze, memory)

    return None, picker, True
