"""Which source each sequence of a run is from, and how many of that source came before it: closed forms, no state.

Sequences are numbered over the run: s = micro-batch * batch_size + row. A phase is the sequences from its first step on, up to
the next phase; inside it s counts from 0 and its K sources have the shares f_1 >= f_2 >= ... >= f_K, exact fractions that sum
to 1. Source 1 gets its share of all, source 2 its share of the rest, and so on, each time rounded to the nearest:

    i_1 = s        c_k(s) = floor(g_k i_k + 1/2)        g_k = f_k / R_(k-1),  R_k = f_(k+1) + ... + f_K
    i_(k+1) = i_k - c_k        s is of the first source k whose c_k grows from i_k to i_k + 1, and is number c_k of it

So of any two shares one is split as evenly as whole numbers allow. In any window of n sequences of a phase

    |count_k - f_k n| < 1 + f_k (1 / R_1 + ... + 1 / R_m),  m = min(k, K - 1) - 1        (from the first on: half of it at most)

because c_k of a window of length l is less than 1 from g_k l, so |l_(k+1) - l_k R_k / R_(k-1)| < 1, and each of these errors
reaches source k times the shares that are left below it, a product that telescopes to f_k / R_j. As f_k is the smallest so
far, R_j >= (k - j) f_k: less than 1 for two sources, 2 for three, 1 + 1 + 1/2 + ... + 1 / (K - 2) for K. Nothing here is drawn
at random: runs of several seeds differ in the texts of a source, not in where its turns are.

The n-th sequence of a source is the n-th over all phases: what earlier phases took is c_k of their lengths. Everything is exact
(integers of any size). Left out: shares that change inside a phase, and weights inside a source.
"""

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

ONE = ""  # the name of a source that is alone


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Phase:
    """A stretch of the run and what it reads. until: where it ends, as a share of the run; shares: source -> its share of the
    sequences."""

    shares: dict[str, float]
    until: float = Field(1.0, gt=0, le=1)


class Mixture(NamedTuple):
    """Several prepared sources, by name; validation is on that of one name, or as the last phase has it ("")."""

    folders: dict[str, Path]
    phases: tuple[Phase, ...]
    validate: str = ""


def decimal(x: float) -> Fraction:
    """The number as it is written: 0.7 is 7/10."""
    return Fraction(repr(x))


def near(word: Any, choices: Iterable, otherwise: bool = True) -> str:
    """A hint: the nearest of the choices, or else all of them."""
    choices = list(map(str, choices))
    if found := difflib.get_close_matches(str(word), choices, n=1, cutoff=0.4):
        return f"; did you mean {found[0]!r}?"
    return f"; there are {', '.join(map(repr, choices)) or 'none'}" if otherwise else ""


def check(sources: Iterable[str], phases: tuple[Phase, ...], validate: str) -> None:
    """Raises ValueError, one sentence, unless the phases cover the run once and name every source and nothing else."""
    names, begin = sorted(sources), 0.0
    if not phases:
        raise ValueError(f"no phase says how to mix {', '.join(names)}; add [[data.phases]] with shares that sum to 1")
    for number, phase in enumerate(phases, 1):
        for name, share in phase.shares.items():
            if name not in names:
                raise ValueError(f"phase {number} names {name!r}, which is none of the sources{near(name, names)}")
            if not 0 < share <= 1:
                raise ValueError(
                    f"phase {number} gives {name!r} the share {share:g}; expected above 0 and up to 1, or no mention"
                )
        if (total := sum(map(decimal, phase.shares.values()))) != 1:
            raise ValueError(f"phase {number}: the shares sum to {float(total):.12g}, expected 1")
        if not begin < phase.until:
            raise ValueError(f"phase {number} ends at {phase.until:g} of the run, expected more than {begin:g}, its beginning")
        begin = phase.until
    if begin != 1:
        raise ValueError(f"the last phase ends at {begin:g} of the run; expected 1, or no until")
    if unused := [name for name in names if not any(name in phase.shares for phase in phases)]:
        raise ValueError(f"source {unused[0]!r} is in no phase; give it a share or take it out")
    if validate and validate not in names:
        raise ValueError(f"validate: {validate!r} is none of the sources{near(validate, names)}")


class Split:
    """One phase: `shares` name -> exact share, of sum 1."""

    def __init__(self, shares: dict[str, Fraction]):
        self.shares = dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))
        self.levels, rest = [], Fraction(1)
        for name, share in self.shares.items():
            g, rest = share / rest, rest - share
            self.levels.append((name, g.numerator, g.denominator))

    def place(self, s: int) -> tuple[str, int]:
        """Sequence s -> (its source, how many of this source are before it)."""
        for name, p, q in self.levels:
            before = (2 * p * s + q) // (2 * q)
            if (2 * p * (s + 1) + q) // (2 * q) > before:
                return name, before
            s -= before
        raise AssertionError("the last source takes all that is left")

    def counts(self, n: int) -> dict[str, int]:
        """Source -> how many of the first n sequences are its."""
        found = {}
        for name, p, q in self.levels:
            found[name] = (2 * p * n + q) // (2 * q)
            n -= found[name]
        return found


class Plan:
    """Phases in order: `firsts[p]`, the number of phase p's first sequence; `splits[p]`, its shares. The last never ends."""

    def __init__(self, firsts: list[int], shares: list[dict[str, Fraction]]):
        self.firsts, self.splits = firsts, [Split(each) for each in shares]
        self.before = [dict.fromkeys((name for each in shares for name in each), 0)]
        for p in range(1, len(firsts)):
            taken = self.splits[p - 1].counts(firsts[p] - firsts[p - 1])
            self.before.append({name: count + taken.get(name, 0) for name, count in self.before[-1].items()})

    def place(self, s: int) -> tuple[str, int]:
        """Sequence s of the run -> (its source, how many of this source are before it in the run)."""
        p = bisect_right(self.firsts, s) - 1
        name, n = self.splits[p].place(s - self.firsts[p])
        return name, self.before[p][name] + n


def alone(name: str = ONE) -> Plan:
    return Plan([0], [{name: Fraction(1)}])


def plan(phases: tuple[Phase, ...], steps: int, per_step: int) -> Plan:
    """Of a run of `steps` steps of `per_step` sequences. A phase begins with the first step of which step / steps >= the
    `until` before it, as a rule of the policy does."""
    begins = [0, *(math.ceil(decimal(phase.until) * steps) * per_step for phase in phases[:-1])]
    return Plan(begins, [{name: decimal(share) for name, share in phase.shares.items()} for phase in phases])
