"""assign(model, recipes, rules, progress): an ordered list of rules gives every Linear its recipe; the first match wins.

    [[policy]] match = "head"            recipe = "bf16"        a glob over module names
    [[policy]] last = 2                  recipe = "bf16"        that many blocks from the end ("blocks.N. ...")
    [[policy]] after = 0.82              recipe = "nvfp4-backward"      a share of the run
    [[policy]]                           recipe = "nvfp4"

"bf16" is predefined: no recipe, the compute dtype. A Linear without a rule is an error, and so is a rule that could
never match: in both cases somebody believes in a precision that does not run.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from quant.linear import linears
from quant.recipe import Recipe, Rule, Sites
from quant.site import sites
from quant.spec import known


def _block(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _matches(rule: Rule, name: str, blocks: int) -> bool:
    block = _block(name)
    at_ends = [block < rule.first] if rule.first is not None and block is not None else []
    at_ends += [block >= blocks - rule.last] if rule.last is not None and block is not None else []
    if (rule.first is not None or rule.last is not None) and not any(at_ends):
        return False
    return fnmatchcase(name, rule.match)


def _describe(number: int, rule: Rule) -> str:
    what = [f"{k} = {getattr(rule, k)!r}" for k in ("name", "match", "first", "last", "after", "until")
            if getattr(rule, k) != Rule.__dataclass_fields__[k].default]  # fmt: skip
    return f"policy rule {number} ({', '.join(what) or 'everything'})"


def assign(
    model: nn.Module, recipes: dict[str, Recipe], rules: list[Rule] | tuple[Rule, ...], progress: float = 0.0
) -> dict[str, str]:
    """Set `.recipe` of every Linear for this share of the run, 0 <= progress < 1. Returns module name -> recipe name.

    Raises ValueError for a recipe that does not exist, a Linear without a rule, more blocks at an end than there are,
    and a rule that matches no Linear (`first = 0` and `last = 0` switch a rule off and may).
    """
    modules = linears(model)
    blocks = 1 + max((b for b in map(_block, modules) if b is not None), default=-1)
    for number, rule in enumerate(rules, 1):
        known(rule.recipe, [*recipes, "bf16"], f"recipe in {_describe(number, rule)}:")
        for key in ("first", "last"):
            if (getattr(rule, key) or 0) > blocks:
                raise ValueError(f"{_describe(number, rule)}: {key} = {getattr(rule, key)}, but the model has {blocks} blocks")
        off = 0 in (rule.first, rule.last) and not (rule.first or rule.last)
        if not off and not any(_matches(rule, name, blocks) for name in modules):
            raise ValueError(f"{_describe(number, rule)} matches none of the Linears {', '.join(modules)}")
    chosen = {}
    for name, module in modules.items():
        for rule in rules:
            if rule.after <= progress and (progress < rule.until or rule.until == 1.0) and _matches(rule, name, blocks):
                chosen[name] = rule.recipe
                module.recipe = recipes.get(rule.recipe)
                break
        else:
            raise ValueError(
                f"no policy rule matches the Linear {name!r} at {progress:.0%} of the run; add a last rule for all"
            )
    return chosen


def switches(rules: list[Rule] | tuple[Rule, ...]) -> list[float]:
    """The shares of the run at which some rule begins or ends."""
    return sorted({share for rule in rules for share in (rule.after, rule.until) if 0 < share < 1})


def first_step(share: float, steps: int) -> int:
    """The first step of a run of `steps` at which step / steps >= share, as `assign` compares: 7 for 0.07 of 100, where
    share * steps is 7.000000000000001."""
    return bisect_left(range(steps), share, key=lambda step: step / steps)


def table(chosen: dict[str, str], recipes: dict[str, Recipe]) -> str:
    """The resolved policy as text: which Linears follow which recipe, and what each recipe does to six operands."""
    lines = []
    for name in dict.fromkeys(chosen.values()):
        members = [m for m, r in chosen.items() if r == name]
        lines.append(f"{name}: {len(members)} of {len(chosen)} Linears: {', '.join(_shorten(members))}")
        if name in recipes:
            lines += [f"    {operand}  {spec}" for operand, spec in recipes[name].short().items()]
    return "\n".join(lines)


def _shorten(names: list[str]) -> list[str]:
    """blocks.0.ffn.up, blocks.1.ffn.up, blocks.3.ffn.up -> blocks.0-1,3.ffn.up"""
    groups: dict[str, list[int]] = {}
    for name in names:
        block = _block(name)
        groups.setdefault(name if block is None else name.split(".", 2)[2], []).extend([] if block is None else [block])
    return [f"blocks.{_ranges(found)}.{tail}" if found else tail for tail, found in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """0, 6, 7 -> 0,6-7"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def assign_sites(model: nn.Module, specs: Sites) -> None:
    """Set `.spec` of every Site."""
    for site in sites(model):
        site.spec = getattr(specs, site.kind)


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """The same weights in the compute dtype: inside, no Linear has a recipe and no Site a spec."""
    before = [(module, module.recipe) for module in linears(model).values()], [(site, site.spec) for site in sites(model)]
    try:
        for module, _ in before[0]:
            module.recipe = None
        for site, _ in before[1]:
            site.spec = None
        yield
    finally:
        for module, recipe in before[0]:
            module.recipe = recipe
        for site, spec in before[1]:
            site.spec = spec
