"""Rounding: how a number of quanta becomes an integer, and what is random about it.

    nearest          to the nearest integer, ties to the even one        zero    toward zero
    away, inward     to the nearest one, ties away from zero, toward zero
    stochasticN      up iff floor(2^N fraction) + random >= 2^N, with N random bits, 1 to 24

`stochastic8` is the carry rule of TransformerEngine's portable path; `stochastic` is stochastic24, unbiased to 2^-24.
Everything is on magnitudes: the sign is put back afterwards, so toward zero and away are what they say.
"""

import re

from torch import Tensor

ROUNDINGS = ("nearest", "away", "inward", "zero", "stochastic", "stochastic8")


def random_bits(rounding: str) -> int:
    """How many random bits an element takes: N for stochasticN, 0 for the others. Raises ValueError for an unknown name."""
    if rounding in ROUNDINGS[:4]:
        return 0
    named = re.fullmatch(r"stochastic([1-9]\d?)?", rounding)
    if not named or int(named[1] or 24) > 24:
        raise ValueError(f"unknown rounding {rounding!r}, expected one of {', '.join(map(repr, ROUNDINGS))}, or 1 to 24 bits")
    return int(named[1] or 24)


def round_quanta(t: Tensor, size: int, rounding: str, random: Tensor | None) -> Tensor:
    """fp32 t in [0, 2^size) -> the integer that `rounding` makes of it, as fp32. random: int in [0, 2^N), same shape."""
    if rounding == "nearest":
        return t.round()  # torch rounds halves to even
    if rounding == "zero":
        return t.floor()
    n = random_bits(rounding)
    if n and size + n <= 24:  # floor(2^N t) + random is exact: the carry does it, in fewer steps
        return (((t * 2.0**n).floor() + random.to(t.dtype)) * 2.0**-n).floor()
    below = t.floor()
    fraction = t - below  # exact: both share t's quantum
    if rounding == "away":
        return below + (fraction >= 0.5)
    if rounding == "inward":
        return below + (fraction > 0.5)
    return below + ((fraction * 2.0**n).floor() + random.to(t.dtype) >= 2.0**n)
