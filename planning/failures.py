"""What interruptions cost a run, and how often it should save.

    M    mean time between interruptions of the whole run: that of one GPU over their number, exponentially distributed
    C    a checkpoint, during which nothing is trained        R    a restart, from the interruption to the next step
    t    between checkpoints:  sqrt(2 C M) - C                (Young, CACM 17(9), 1974; Daly, FGCS 22(3), 2006, first order)
    share of time that trains:  t / (M e^(R/M) (e^((t+C)/M) - 1))        (Daly, its complete cost function)

`simulated` plays it out. M is that of Llama 3's pretraining on H100 (arXiv:2407.21783, section 3.3.4): 466 interruptions in 54
days on 16,384 GPUs, planned ones too. C and R are assumptions. Left out: faults that slow a run or spoil its numbers, spare
GPUs, saving while training goes on (which makes C small).
"""

import math
from random import Random
from typing import NamedTuple

BETWEEN = 54 * 86400 * 16384 / 466  # seconds of one GPU: 1,898 days
STORE = 2e12 / 16384  # bytes/s a GPU writes: the sustained 2 TB/s of the storage there, shared by all (its section 3.3.1)
SETTLE, RESTART = 5.0, 600.0  # seconds, assumed: a checkpoint but for its bytes; until a failure is found, replaced, loaded


class Interrupted(NamedTuple):
    between: float  # seconds from one interruption to the next, on average
    checkpoint: float
    every: float  # seconds of training between checkpoints
    goodput: float  # share of time that trains and is not lost


def interrupted(gpus: int, size: float) -> Interrupted:
    """Of a run on so many GPUs whose checkpoint has `size` bytes."""
    between, cost = BETWEEN / gpus, SETTLE + size / (STORE * gpus)
    every = math.sqrt(2 * cost * between) - cost if cost < between / 2 else between
    return Interrupted(between, cost, every, expected(between, cost, every))


def expected(between: float, cost: float, every: float, restart: float = RESTART) -> float:
    """The share of time that trains."""
    return every / (between * math.exp(restart / between) * math.expm1((every + cost) / between))


def simulated(between: float, cost: float, every: float, work: float, seed: int, restart: float = RESTART) -> float:
    """The same of one run of `work` seconds of training, interrupted at random times."""
    draw, clock, done = Random(seed), 0.0, 0.0
    failure = draw.expovariate(1 / between)
    while done < work:
        end = clock + min(every, work - done) + cost
        if failure >= end:
            clock, done = end, done + min(every, work - done)
            continue
        while failure < (clock := failure + restart):  # a restart may be interrupted too
            failure += draw.expovariate(1 / between)
            if failure >= clock:
                break
    return work / clock
