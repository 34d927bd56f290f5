"""Rounding: which of the two multiples of a unit next to a number it becomes, and what is random about it.

    nearest          to the nearest multiple, ties to the even one       zero    toward zero
    away, inward     to the nearest one, ties away from zero, toward zero
    stochasticN      up iff floor(2^N fraction) + random >= 2^N, with N random bits, 1 to 24: which is, since random is an
                     integer, iff fraction >= 1 - random / 2^N

`stochastic8` is the carry rule of TransformerEngine's portable path; `stochastic` is stochastic24, unbiased to 2^-24.
Everything is on magnitudes: the sign is put back afterwards, so toward zero and away are what they say.
"""

import re

import torch
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


def round_to(a: Tensor, unit: Tensor | float, rounding: str, random: Tensor | None) -> Tensor:
    """fp32 a >= 0, below 2^21 units -> the multiple of `unit` that `rounding` makes of it, fp32. unit: powers of two;
    random: int in [0, 2^N), same shape.

    fp32 has no bits below the unit between 2^23 and 2^24 units, so adding 1.5 * 2^23 of them and taking them off again is
    rounding to nearest, ties to even; a - below, and all that is compared, is exact.
    """
    large = unit * (1.5 * 2.0**23)
    nearest = (a + large) - large
    if rounding == "nearest":
        return nearest
    below = nearest - torch.where(nearest > a, unit, 0.0)
    if rounding == "zero":
        return below
    rest = a - below
    if rounding == "away":
        up = rest >= unit * 0.5
    elif rounding == "inward":
        up = rest > unit * 0.5
    else:
        up = rest >= unit * (1.0 - random.to(a.dtype) * 2.0 ** -random_bits(rounding))
    return below + torch.where(up, unit, 0.0)
