"""A Choice: several QuantSpecs for one operand, and the rule that picks one from the numbers in the tensor.

    nearest   no bound: for each block the candidate whose values come closest (four-over-six, IF4)
    ladder    bounds: candidates in order, the cheapest first, and the first within its bounds, for the operand or each block of
              it; the last has none (MoR, arXiv:2512.22804; the metric-driven approach, arXiv:2408.02897)

With x an operand after its Hadamard transform and q what a candidate makes of it, over the unit that is decided about:

    relative_error   mean |q - x| / |x| over x != 0           squared_error    sum (q - x)^2 / sum x^2
    underflow        share of x != 0 with q = 0               absolute_error   sum |q - x| / sum |x|
    dynamic_range    max |x| / min |x| over x != 0            largest_error    max |q - x| / max |x|
    backward_error   99th percentile of |(q - x) p| / (|x| |p|), p standard normal [K, 64], over 64 rows (arXiv:2408.02897
                     has the GEMM's other operand for p, which is not there yet when a weight is quantised)

A ladder looks at q rounded to nearest even where its candidate rounds stochastically: what it decides depends on x alone, and
what was unbiased stays so. A quotient 0 / 0 is 0. What decides is quant/choose.py.
"""

from math import lcm
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from quant.codebooks import Codebook
from quant.formats import FORMATS, Format
from quant.spec import QuantSpec, frozen

Metric = Literal[
    "relative_error", "backward_error", "squared_error", "absolute_error", "largest_error", "underflow", "dynamic_range"
]
METRICS = get_args(Metric)


@frozen
class Bound:
    """The metric `by` of a candidate is at most `below`, or `below` times that of the spec `than`.

    enough: a candidate within this bound is taken whatever the others say; one that is not must be within those.
    """

    by: Metric
    below: float = Field(1.0, gt=0, le=1e30)
    than: QuantSpec | None = None
    enough: bool = False


@frozen
class Memory:
    """How the decisions of a ladder depend on earlier steps: hysteresis. Without one, each call decides for itself.

    A look is a step in which errors are measured; what counts is the worst of its micro-batches. The first decides outright.
    every: steps from one look to the next. delay: 0, a look decides for its own step already; or by how many steps later: then
      the format is known before the operand is, and only one candidate is computed.
    margin: the candidate in use has failed where a metric is above its bound * (1 + margin): then the next one that has not is
      taken at once. A cheaper one has passed only below bound * (1 - margin), in `patience` looks in a row.
    warmup: so many steps in the last candidate before the first look. freeze: 0, or from this step on nothing gets cheaper.
    """

    every: int = Field(1, ge=1)
    delay: int = Field(0, ge=0)
    patience: int = Field(1, ge=1)
    margin: float = Field(0.0, ge=0, lt=1)
    warmup: int = Field(0, ge=0)
    freeze: int = Field(0, ge=0)


def _shared(name: str) -> property:
    return property(lambda self: attrgetter(name)(self.candidates[0]), doc=f"`{name}`, the same for all candidates.")


@frozen
class Choice:
    """Several specs for one operand.

    by, below: the bound of every candidate but the last, or `bounds`: of each of them one or more. Neither: the candidate with
      the smallest `by`, the first of those that are as near.
    per: what is decided about: the whole operand ("tensor"), blocks [rows, contraction] of it, or, without bounds, "block": the
      scale blocks of the candidates, which then differ only in the targets of their scales (four-over-six, arXiv:2512.02010:
      the block's amax to 6 or to 4; decoding needs no flag), and two of them in their element format (IF4, arXiv:2603.28765):
      the sign bit of the block scale, which must be a signed format, says which. All the rest they share, outer scale included.
    """

    candidates: tuple[QuantSpec, ...]
    by: Metric = "squared_error"
    below: float | None = Field(None, gt=0, le=1e30)
    per: Literal["tensor", "block"] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = "block"
    bounds: tuple[tuple[Bound, ...], ...] = ()
    memory: Memory | None = None

    def __post_init__(self):
        if len(self.candidates) < 2:
            raise ValueError(f"candidates: expected at least two specs to choose from, got {len(self.candidates)}")
        if self.per == "block" and (self.rungs or self.memory):
            raise ValueError("per 'block' chooses the nearest; bounds need per = 'tensor' or a block [rows, contraction]")
        self._check_alike(self.LADDER if self.ladder else self.ALIKE)
        self._check_ladder() if self.ladder else self._check_nearest()

    def _check_alike(self, names: tuple[str, ...]) -> None:
        first = self.candidates[0]
        for other in self.candidates[1:]:
            pairs = [(name, attrgetter(name)(first), attrgetter(name)(other)) for name in names]
            if not self.ladder:
                pairs.append(("target * outer_target", *(_whole_target(spec) for spec in (first, other))))
            for name, a, b in pairs:
                if a != b:
                    raise ValueError(f"candidates must have the same {name}, not {a!r} and {b!r}")

    def _check_nearest(self) -> None:
        first = self.candidates[0]
        if self.by not in ("squared_error", "absolute_error", "largest_error"):
            raise ValueError(f"by {self.by!r}: without a bound expected 'squared_error', 'absolute_error' or 'largest_error'")
        fmt = FORMATS[first.scale.format] if first.scale.format in FORMATS else None
        free = isinstance(fmt, Format) and fmt.signed and fmt.negative_zero  # (without one the sign bit is a NaN)
        if len(self.elements) > 1 and (len(self.candidates) > 2 or not free):
            raise ValueError(
                f"candidates of different element formats, {', '.join(e.name for e in self.elements)}: expected two, and block "
                f"scales of a signed format, whose sign bit says which; not {len(self.candidates)} with {first.scale.format!r}"
            )
        if first.scale.correction != "none" or first.scale.history or first.leaves or first.scale.format == "none":
            raise ValueError(f"candidates need block scales without a history or a correction, not {first.short()}")

    def _check_ladder(self) -> None:
        if self.bounds and self.below is not None:
            raise ValueError("below and bounds: expected one of them, since `below` is one bound for all")
        if self.bounds and self.by != "squared_error":
            raise ValueError(f"by {self.by!r} and bounds: expected one of them, since each of the bounds has a `by` of its own")
        if self.bounds and len(self.bounds) != len(self.candidates) - 1:
            raise ValueError(
                f"bounds: expected a list for every candidate but the last, {len(self.candidates) - 1}, not {len(self.bounds)}"
            )
        if any(not rung or all(b.enough for b in rung) and len(rung) > 1 for rung in self.rungs):
            raise ValueError("bounds: expected for each candidate at least one, and one that is not `enough` among several")
        if self.memory and (self.per != "tensor" or not self.rungs):
            raise ValueError("memory is of bounds per = 'tensor': the blocks of another micro-batch hold other tokens")
        compared = [bound.than for bound in self._every_bound if bound.than]
        metrics = [bound.by for bound in self._every_bound] or [self.by]
        if "backward_error" in metrics and self.per != "tensor":
            raise ValueError(f"by 'backward_error' is of whole rows: expected per = 'tensor', not {list(self.per)}")
        for spec in (*self.candidates, *compared):
            if spec.scale.correction != "none" or spec.scale.history or spec.scale.stochastic:
                raise ValueError(f"{spec.short()}: a ladder takes scales without history and correction, rounded to nearest")
            if self.per != "tensor" and spec.scale.format != "none":
                sizes = zip(self.per, spec.block, strict=True)
                if any(size < 1 or unit % size for unit, size in sizes) or spec.scale.outer not in ("none", "tensor"):
                    raise ValueError(
                        f"per {list(self.per)}: expected a multiple of the block and scales within it, not {spec.short()}"
                    )
        for spec in compared:
            if any(getattr(spec, name) != getattr(self.candidates[0], name) for name in self.LADDER):
                raise ValueError(f"than {spec.short()}: expected the same {', '.join(self.LADDER)} as the candidates")

    ALIKE = (
        *("block", "scale.format", "scale.outer", "scale.outer_format", "scale.order", "scale.rounding", "scale.multiplier"),
        *("scale.correction", "scale.history", "element.bits", "rounding", "hadamard", "signs", "source", "center"),
    )
    LADDER = ("hadamard", "signs", "source", "center")
    SHARED = ("block", "scale", "rounding", "hadamard", "signs", "source", "center", "blocks_of", "leaves")
    block, scale, rounding, hadamard, signs, source, center, blocks_of, leaves = map(_shared, SHARED)

    @property
    def ladder(self) -> bool:
        """Whether candidates may have layouts of their own; else they share one, and are packed without a map."""
        return self.per != "block"

    @property
    def rungs(self) -> tuple[tuple[Bound, ...], ...]:
        """The bounds of every candidate but the last; () where the nearest is chosen."""
        if self.bounds or self.below is None:
            return self.bounds
        return ((Bound(self.by, self.below),),) * (len(self.candidates) - 1)

    @property
    def _every_bound(self) -> list[Bound]:
        return [bound for rung in self.rungs for bound in rung]

    @property
    def unit(self) -> tuple[int, int]:
        """[rows, contraction] that are decided about together, -1 for the whole axis."""
        return self.block if self.per == "block" else (-1, -1) if self.per == "tensor" else self.per

    @property
    def stochastic(self) -> bool:
        return any(spec.stochastic for spec in self.candidates)

    @property
    def keyed(self) -> bool:
        return any(spec.keyed for spec in self.candidates)

    @property
    def multiple(self) -> tuple[int, int]:
        """As of a QuantSpec."""
        every = [*self.candidates, *(bound.than for bound in self._every_bound if bound.than)]
        rows, k = zip(*(spec.multiple for spec in every), strict=True)
        return lcm(*rows, max(self.unit[0], 1)), lcm(*k, max(self.unit[1], 1))

    @property
    def transposes(self) -> bool:
        """Whether what is chosen for x^T is that for x, transposed, values and decisions."""
        every = [*self.candidates, *(bound.than for bound in self._every_bound if bound.than)]
        rows_matter = "backward_error" in (self.by, *(bound.by for bound in self._every_bound))
        return all(spec.transposes for spec in every) and self.unit[0] == self.unit[1] and not rows_matter

    @property
    def elements(self) -> tuple[Format | Codebook, ...]:
        formats: list[str] = []  # (torch.compile does not trace the hash of a format, as a set would take it)
        for spec in self.candidates:
            formats += [spec.format] * (spec.format not in formats)
        return tuple(FORMATS[name] for name in formats)

    @property
    def element(self) -> Format | Codebook:
        """Of the first candidate: for what asks about bits, which all have alike without bounds, and range."""
        return self.candidates[0].element

    @property
    def exact(self) -> bool:
        return all(spec.exact for spec in self.candidates)

    def short(self) -> str:
        among = f"[{' | '.join(spec.short() for spec in self.candidates)}]"
        per = "" if self.per == "block" else f" per {self.per if self.per == 'tensor' else 'x'.join(map(str, self.per))}"
        memory = f", a look every {self.memory.every} steps" if self.memory else ""
        return f"{among} by {'; '.join(map(_words, self.rungs)) or self.by}{per}{memory}"


def _words(bounds: tuple[Bound, ...]) -> str:
    """E.g. `relative_error <= 0.045`."""

    def one(b: Bound) -> str:
        than = f"that of {b.than.short()}" if b.than else ""
        bound = than if than and b.below == 1 else f"{b.below:g} x {than}" if than else f"{b.below:g}"
        return f"{b.by} <= {bound}"

    needed = " and ".join(one(b) for b in bounds if not b.enough)
    return " or ".join([*(one(b) for b in bounds if b.enough), *[needed] * bool(needed)])


def _whole_target(spec: QuantSpec) -> float | None:
    """What an outer scale maps the amax to."""
    s = spec.scale
    return None if s.outer == "none" else (s.target or spec.element.max) * (s.outer_target or FORMATS[s.format].max)


# What stands for an operand in a recipe: a Choice is what has candidates. KINDS: the words that pydantic's error paths get.
KINDS = {"(spec)": QuantSpec, "(choice)": Choice}


def _kind(value: Any) -> str:
    return "(choice)" if isinstance(value, Choice) or (isinstance(value, dict) and "candidates" in value) else "(spec)"


Spec = Annotated[Annotated[QuantSpec, Tag("(spec)")] | Annotated[Choice, Tag("(choice)")], Discriminator(_kind)]
