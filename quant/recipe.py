"""The vocabulary of recipes, as data.

    y[T,O] = x[T,I] w[O,I]^T        fprop { x, w }      contraction I
    dx     = g[T,O] w               dgrad { g, w }      contraction O
    dw     = g^T x                  wgrad { g, x }      contraction T

A Recipe says what happens to the six operands of a Linear; a Rule gives Linears a recipe; Sites are the operands outside of
Linears; Weights and Moments are how the weights themselves and the optimiser's moments are kept. An operand left out stays in
the compute dtype.
"""

from dataclasses import fields, replace
from typing import Literal

from pydantic import Field

from quant.choice import Choice, Spec
from quant.spec import QuantSpec, frozen


@frozen
class Fprop:
    x: Spec | None = None
    w: Spec | None = None


@frozen
class Dgrad:
    g: Spec | None = None
    w: Spec | None = None


@frozen
class Wgrad:
    g: Spec | None = None
    x: Spec | None = None


@frozen
class Recipe:
    """Six operands.

    weights: quantise W from the fp32 "master" or from its "bf16" copy (TransformerEngine's habit).
    rotate: 0, or the size of a Hadamard transform of x and W along I before everything else (a power of two): all GEMMs
      run in the rotated basis, and dx and dw are rotated back (Quartet, arXiv:2505.14669).
    clip: no gradient for elements of x and W that fprop clipped (as Quartet and QuEST do; otherwise straight-through).
    """

    fprop: Fprop = Fprop()
    dgrad: Dgrad = Dgrad()
    wgrad: Wgrad = Wgrad()
    weights: Literal["master", "bf16"] = "master"
    rotate: int = Field(0, ge=0)
    clip: bool = False

    def __post_init__(self):
        if self.rotate & (self.rotate - 1) or self.rotate == 1:
            raise ValueError(f"rotate {self.rotate}: expected 0 (off) or a power of two")
        for name in ("fprop", "dgrad", "wgrad"):
            gemm = getattr(self, name)
            (a, p), (b, q) = ((f.name, getattr(gemm, f.name)) for f in fields(gemm))
            rotation = [(s.hadamard, s.signs) if s and s.hadamard else None for s in (p, q)]
            if rotation[0] != rotation[1]:
                what = " and ".join(
                    f"{name}.{o} " + (f"has hadamard {r[0]} with signs {r[1]}" if r else "has none")
                    for o, r in zip((a, b), rotation, strict=True)
                )
                raise ValueError(f"{what}: both operands of a GEMM must be rotated alike, or the product changes")
        if (self.rotate or self.clip) and not (self.fprop.x and self.fprop.w):
            missing = [f"fprop.{name}" for name in ("x", "w") if not getattr(self.fprop, name)]
            raise ValueError(
                f"rotate = {self.rotate}, clip = {self.clip} are about quantised operands of fprop, and there is no spec for "
                + " and ".join(missing)
            )
        if self.clip and (self.fprop.x.ladder or self.fprop.w.ladder):
            raise ValueError("clip: what a ladder clips depends on what it picks; expected a spec for fprop.x and fprop.w")
        for name in ("x", "w") if self.clip else ():
            if size := getattr(self.fprop, name).hadamard:
                raise ValueError(f"clip: fprop.{name} is clipped after its hadamard {size}, and gradients are not; use rotate")
        for name, spec in self.operands().items():
            if spec:
                self._check_operand(name, spec)

    def _check_operand(self, name: str, spec: Spec) -> None:
        if isinstance(spec, Choice) and not spec.ladder and not name.startswith("fprop"):
            raise ValueError(
                f"{name} is a choice by {spec.by}, which is biased (the error that is kept depends on the value), and errors "
                "of gradients add up over steps: only operands of fprop may be chosen so"
            )
        if spec.source == "fprop":
            made = {"dgrad.w": self.fprop.w, "wgrad.x": self.fprop.x}.get(name)
            if made is None:
                raise ValueError(f"{name}: source 'fprop' is for dgrad.w and wgrad.x whose fprop operand has a spec")
            if spec.ladder or made.ladder:
                raise ValueError(f"{name}: source 'fprop' and a ladder: expected the original, or a spec of what a spec made")
            if made.hadamard or made.center or spec.center:
                raise ValueError(f"{name}: source 'fprop' of what is centred or transformed there; `rotate` is for that")
        if spec.center and name not in ("fprop.x", "wgrad.x"):
            raise ValueError(f"{name}: center is for activations, fprop.x and wgrad.x")

    def operands(self) -> dict[str, Spec | None]:
        """`fprop.x`, ... -> its spec, in the order of OPERANDS."""
        return {name: getattr(getattr(self, name[:5]), name[6:]) for name in OPERANDS}

    def short(self) -> dict[str, str]:
        return {name: spec.short() if spec else "-" for name, spec in self.operands().items()}


@frozen
class Sites:
    """Operands outside of the GEMMs of Linears (quant/site.py), for the whole model. norm_gain: the gains of all norms.
    scores: q k^T / sqrt(d) of attention before its softmax. residual: the stream after each addition to it."""

    norm_gain: Spec | None = None
    scores: Spec | None = None
    residual: Spec | None = None

    def __post_init__(self):
        for field in fields(self):
            if spec := getattr(self, field.name):
                _plain(spec, field.name)

    def short(self) -> dict[str, str]:
        return {field.name: spec.short() for field in fields(self) if (spec := getattr(self, field.name))}


@frozen
class Weights:
    """How weights are kept between steps (quant/update.py).

    store: nothing for fp32, or the spec whose values they have; its rounding is that of the update.
    kahan: carry what rounding has cut off into the next step (for unscaled stores). match: globs over parameter names.
    """

    store: QuantSpec | None = None
    kahan: bool = False
    match: tuple[str, ...] = ("*",)

    def __post_init__(self):
        if self.store:
            _kept(self.store, "store", "weights")
        if self.kahan and not (self.store and self.store.scale.format == "none"):
            raise ValueError("kahan: expected a store of an unscaled format, e.g. bf16, whose grid does not move")

    @property
    def nearest(self) -> QuantSpec:
        """The store, rounded to nearest."""
        return replace(self.store, rounding="nearest", scale=replace(self.store.scale, rounding="nearest"))


@frozen
class Moments:
    """How AdamW's moments are kept between steps (quant/moments.py).

    state: nothing for fp32, or the spec by which those of matrices are stored. power: what of them is stored, m |m|^(power - 1)
      and sqrt(v)^power: 1 for formats of few octaves, 2 for E4M3, 4 for E5M2.
    """

    state: QuantSpec | None = None
    power: Literal[1, 2, 4] = 1

    def __post_init__(self):
        if self.state:
            _kept(self.state, "state", "moments")


def _kept(spec: QuantSpec, what: str, of: str) -> None:
    _plain(spec, what)
    if spec.hadamard:
        raise ValueError(f"{what}: expected {of} in their own basis, not hadamard {spec.hadamard}")


def _plain(spec: Spec, what: str) -> None:
    if spec.scale.history or spec.center or spec.source != "original" or spec.ladder:
        raise ValueError(f"{what}: history, center, source and ladders are for operands of a Linear, not {spec.short()}")


# The number of an operand is its `use` in a random Key; 16 + the number of the GEMM's first operand is that of its signs,
# 32 + that of an operand of the noise of its scales (quant/random.py).
OPERANDS = {"fprop.x": 0, "fprop.w": 1, "dgrad.g": 2, "dgrad.w": 3, "wgrad.g": 4, "wgrad.x": 5}
SIGNS = {"fprop": 16, "dgrad": 18, "wgrad": 20}


@frozen
class Rule:
    """One line of a policy; the first rule that matches a Linear gives it its recipe.

    match: a glob over module names ("head", "blocks.*.ffn.*"). first / last: that many blocks at either end
    (0 switches the rule off). after / until: only from / up to this share of the run (after = 1 switches it off).
    Conditions combine by "and".
    name: makes the rule overridable from the command line (policy.NAME.last=4).
    """

    recipe: str
    match: str = "*"
    first: int | None = None
    last: int | None = None
    after: float = 0.0
    until: float = 1.0
    name: str = ""

    def __post_init__(self):
        for key in ("first", "last"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} = {getattr(self, key)}: expected a number of blocks, 0 or more")
        if not 0.0 <= self.after <= self.until <= 1.0 or self.after == self.until < 1.0:
            raise ValueError(
                f"after = {self.after}, until = {self.until}: expected 0 <= after <= until <= 1 (shares of the run), and "
                "both alike only at 1, which switches the rule off"
            )
