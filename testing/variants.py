"""The operands of the shipped recipes that kernels quantise: what `make kernels-check` goes through.

A tensor that two GEMMs take along different axes is one variant, read once: x in fprop and wgrad, g in dgrad and wgrad, w in
fprop and dgrad. Of a ladder each candidate is one.
"""

from pathlib import Path
from typing import NamedTuple

from configs import load
from quant.choice import Spec
from quant.kernel import obstacle
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


def variants() -> dict[Variant, list[str]]:
    """Variant -> the configs that use it, in the order of their names."""
    found: dict[Variant, list[str]] = {}
    for path in sorted(CONFIGS.glob("*.toml")):
        config = load(path)
        for rule in config.policy:
            recipe = config.recipes.get(rule.recipe)
            operands = recipe.operands() if recipe else {}
            for first, second in SHARED if recipe else ():
                for variant in _pairs(operands[first], operands[second]):
                    names = found.setdefault(variant, [])
                    names += [path.stem] * (path.stem not in names)
    return found


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
