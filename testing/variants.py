"""What kernels do of the shipped recipes, which `make kernels-check` goes through: the operands that they quantise, the errors
that ladders measure, and what is taken then.

A tensor that two GEMMs take along different axes is one variant, read once: x in fprop and wgrad, g in dgrad and wgrad, w in
fprop and dgrad. Of a ladder each candidate is one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs import load
from kernels.dequantise import Layout
from quant.choice import Choice, Spec
from quant.choose import unrotated
from quant.kernel import obstacle
from quant.launch import layout_of
from quant.spec import QuantSpec

CONFIGS = Path(__file__).parent.parent / "configs"
SHARED = ("fprop.x", "wgrad.x"), ("dgrad.g", "wgrad.g"), ("fprop.w", "dgrad.w")


class Variant(NamedTuple):
    """rows: along K of a matrix [M, K] as it lies in memory; cols: along M."""

    rows: QuantSpec | None
    cols: QuantSpec | None

    def short(self) -> str:
        rows, cols = (spec.short() if spec else "-" for spec in self)
        return f"{rows} both ways" if rows == cols else f"{rows} | {cols}"


def _per(unit: tuple[int, int]) -> str:
    return f" per {'tensor' if unit[0] < 0 else 'x'.join(map(str, unit))}"


class Measured(NamedTuple):
    """A metric (choose.py) of a spec, None where it is of the operand alone, for units `per`."""

    by: str
    spec: QuantSpec | None
    per: tuple[int, int]

    def short(self) -> str:
        of = f" of {self.spec.short()}" if self.spec else ""
        return f"{self.by}{of}{_per(self.per)}"


class Taken(NamedTuple):
    """Values of units `per`, each by one of the specs."""

    specs: tuple[QuantSpec, ...]
    per: tuple[int, int]

    def short(self) -> str:
        return f"values of {' or '.join(spec.short() for spec in self.specs)}{_per(self.per)}"


def variants() -> dict[Variant, list[str]]:
    """Variant -> the configs that use it, in the order of their names."""
    found: dict[Variant, list[str]] = {}
    for name, operands in _recipes():
        for first, second in SHARED:
            for variant in _pairs(operands[first], operands[second]):
                names = found.setdefault(variant, [])
                names += [name] * (name not in names)
    return found


class Decoded(NamedTuple):
    """Values of each of the specs."""

    specs: tuple[QuantSpec, ...]

    def short(self) -> str:
        return f"values of any of {len(self.specs)} layouts, the worst of each column"


def decoded() -> Decoded:
    """A spec for each layout of codes and scales that there is."""
    found: dict[Layout, QuantSpec] = {}
    for variant in variants():
        for spec in filter(None, variant):
            found.setdefault(layout_of(spec)._replace(factor="none"), _plain(spec))  # (factors are not multiplied by)
    return Decoded(tuple(found.values()))


def _plain(spec: QuantSpec) -> QuantSpec:
    """For an operand after its transform, without noise and history."""
    return replace(unrotated(spec), rounding="nearest", scale=replace(spec.scale, history=0))


def decided() -> list[Measured | Taken]:
    """What kernels do for ladders beside quantising, but for decoding a candidate alone; once each."""
    found: dict[Measured | Taken, None] = {}
    for _, operands in _recipes():
        for choice in operands.values():
            if isinstance(choice, Choice) and choice.ladder and not obstacle(choice):
                found |= dict.fromkeys(_measured(choice))
                found[Taken(tuple(map(_plain, choice.candidates)), choice.unit)] = None
    return list(found)


def _measured(choice: Choice) -> Iterator[Measured]:
    pairs = [(bound, spec) for rung, spec in zip(choice.rungs, choice.candidates, strict=False) for bound in rung]
    for by, spec in [(b.by, each) for b, own in pairs for each in (own, b.than) if each and b.by != "backward_error"]:
        yield Measured(by, None if by == "dynamic_range" else _plain(spec), choice.unit)


def _recipes() -> Iterator[tuple[str, dict[str, Spec | None]]]:
    """Config and operands of each recipe that a rule of it names."""
    for path in sorted(CONFIGS.glob("*.toml")):
        config = load(path)
        for rule in config.policy:
            if recipe := config.recipes.get(rule.recipe):
                yield path.stem, recipe.operands()


def _pairs(rows: Spec | None, cols: Spec | None) -> list[Variant]:
    """Sides that one kernel makes of one tensor; what it cannot, or has another source, is left out."""
    sides = [spec.candidates if spec and getattr(spec, "source", "original") == "original" else () for spec in (rows, cols)]
    count = max(map(len, sides))
    made = []
    for i in range(count):
        pair = [side[i] if i < len(side) and not obstacle(side[i]) else None for side in sides]
        if any(pair):
            made.append(Variant(*pair))
    return made
