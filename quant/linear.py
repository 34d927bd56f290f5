"""Linear: nn.Linear whose six GEMM operands follow a Recipe.

    y[T,O] = x[T,I] w[O,I]^T        fprop { x, w }      contraction I
    dx     = g[T,O] w               dgrad { g, w }      contraction O
    dw     = g^T x                  wgrad { g, x }      contraction T

Each operand is quantised from the original tensor along its own contraction, or, where its `source` is "fprop", from what
fprop made of it. What wgrad needs of x is quantised in the forward pass and kept packed (4.5 bits an element for NVFP4); the
BF16 x is not. W is quantised once per change of the weight (its version counter), hence once per optimiser step. torch's fused
optimisers do not advance that counter: after theirs, call torch.autograd.graph.increment_version(parameters), as train.py does.

    rotate      x H and w H stand for x and w in all three GEMMs, H the normalised Hadamard matrix; dx and dw are turned back
    clip        dx and dw are 0 where fprop clipped x or w
    center      x = 1 m^T + r with m the token mean:  y = r w^T + 1 (w m)^T,  dw = g^T r + (g^T 1) m^T; only r is quantised, and
                m multiplied in fp32, by fprop's quantised w, so that a packed checkpoint has the forward of training
    history     a Scale's amaxes of earlier steps: buffers `history_GEMM_OPERAND`, [2, N + 1] steps and amaxes; a step's amax is
                the largest of its micro-batches, and serves later steps only
    memory      what a ladder remembers: buffers `memory_GEMM_OPERAND` (memory.py). These two are all the state a Linear has
    once        where x^T has the values of x, both GEMMs take them from one quantisation: of g, and of a ladder's x

The model is built with Linear from the start; a policy sets `.recipe`, so per-layer exceptions, BF16 evaluation and
switches during the run are assignments. Without a recipe a Linear is `F.linear` in the dtype of its input, bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant import kernel
from quant.choice import Choice, Spec
from quant.choose import choose
from quant.context import Context, Decision
from quant.encode import check, filled, rotated, transform, unclipped
from quant.gathered import Copied, Gathered
from quant.gemm import Operand, gemm, pick
from quant.memory import WHOSE, Copies, checksum, decision, empty, gathered, settled
from quant.metrics import operand_stats
from quant.mixed import Mixed
from quant.qtensor import QTensor
from quant.quantize import decoded_values, quantize, quantized_values
from quant.random import Key
from quant.recipe import OPERANDS, Recipe
from quant.scaling import stated_sum
from quant.spec import QuantSpec
from quant.transform import signs

PLAIN = Recipe()
GEMMS = "fprop", "dgrad", "wgrad"


class Linear(nn.Linear):
    """weight [O, I]: the fp32 master. x [..., I] -> [..., O] in x's dtype. No bias (raises ValueError).

    Raises ValueError in training if x cannot be cut into blocks; in an evaluation (`eval()`), where a prompt may have any
    length, rows of zeros fill up what is short of a block's rows."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **kw):
        if bias:
            raise ValueError("quant.Linear has no bias: none of the recipes defines how one would be quantised")
        super().__init__(in_features, out_features, bias=False, **kw)
        self._recipe: Recipe | None = None
        self.name, self.number = "linear", 0
        self.context = Context()
        self._cache: dict = {}
        self._copies: dict[str, Copies] = {}
        self.stamp = self._of_memory
        self._backends: dict[tuple, str] = {}

    def _of_memory(self) -> tuple:
        """Something that changes whenever the weight may have; `stamp` is another where ranks gather it (parallel.py)."""
        return self.weight._version, self.weight.data_ptr()

    @property
    def recipe(self) -> Recipe | None:
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: Recipe | None) -> None:
        self._recipe = recipe
        self._backends.clear()
        for operand, spec in recipe.operands().items() if recipe else ():
            if spec and (steps := spec.scale.history):
                self._history(operand, steps)
            if spec and spec.ladder and spec.memory:
                self._remember(operand, spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe is None and self.context.tap is None:
            return linear(x, self._copy(x.dtype))
        rows, spec = x.reshape(-1, x.shape[-1]), self.recipe and self.recipe.fprop.x
        count, weight = len(rows), self.weight if torch.is_grad_enabled() else self.weight.detach()  # (no wgrad to keep x for)
        if spec and not self.training:
            rows = filled(rows, spec)
        return _Quantized.apply(rows, weight, self)[:count].view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        text = f"{self.in_features} -> {self.out_features}"
        if self.recipe is not None:
            text += ", " + ", ".join(f"{name}: {spec}" for name, spec in self.recipe.short().items())
        return text

    def quantized_weight(self) -> QTensor | Mixed | None:
        """fprop.w quantised, as an evaluation would, or what is in `use`; None where the recipe leaves it as it is."""
        spec = self.recipe and self.recipe.fprop.w
        if not spec:
            return None
        stamp, q = self._cache.get("codes", (None, None))
        if q is not None and stamp == self._stamp(spec):
            return q
        w, keys = self._source(), self._keys("fprop.w", spec)
        index = self._remembered("fprop.w", spec, training=False)[0] if spec.ladder and spec.memory else None
        return quantize(w, spec, *keys, self._held("fprop.w", spec, w, note=False), index)

    @torch.no_grad()
    def use(self, q: QTensor | Mixed, master: bool = False) -> None:
        """Take these codes for fprop.w (and what is made of it for dgrad.w) until the weight changes; master: and as weight
        what they stand for."""
        self._cache.clear()
        spec = self.recipe.fprop.w
        operand = Operand(*decoded_values(q, spec))
        if master:
            self.weight.copy_(self.plain("fprop.w", operand))
        self._cached("codes", spec, lambda: q)
        self._cached("fprop.w", spec, lambda: operand)

    def hold(self, operand: str, amax: float) -> None:
        """Take this amax for the operand, whose scale has a history, in the step of the context: that of the step before."""
        number, found = self._history(operand, self.recipe.operands()[operand].scale.history)
        number[0], found[0] = self.context.step - 1, amax

    def dequantized(self, q: QTensor | Mixed) -> Tensor:
        """The weight that a QTensor of fprop.w stands for, fp32 [O, I], turned back from the basis it was quantised in."""
        return self.plain("fprop.w", Operand(*decoded_values(q, self.recipe.fprop.w)))

    def plain(self, operand: str, x: Operand) -> Tensor:
        """What a GEMM has multiplied as `operand`, fp32 [R, K], turned back from the basis it was quantised in."""
        return self._turned_back(operand, x.dense())

    def _turned_back(self, operand: str, x: Tensor) -> Tensor:
        spec, rotate = (self.recipe or PLAIN).operands()[operand], (self.recipe or PLAIN).rotate
        if spec and spec.hadamard:
            key = self.context.sign_key(operand, self.number)
            s = signs(spec.hadamard, spec.signs, key.words(x.device), x.device)
            x = transform(x, spec.hadamard, torch.ones_like(s), torch.float32) * s.repeat(x.shape[1] // spec.hadamard)
        if rotate and operand[-1] != "g":  # the axis I: the contraction in fprop, the rows of w^T and x^T
            x = self._rotated(x) if operand.startswith("fprop") else self._rotated(x.t()).t()
        return x

    def check(self, tokens: int) -> None:
        """Raises ValueError if some operand cannot be cut into blocks with `tokens` rows of x."""
        I, O = self.in_features, self.out_features
        shapes = dict(zip(OPERANDS, ((tokens, I), (O, I), (tokens, O), (I, O), (O, tokens), (I, tokens)), strict=True))
        for operand, spec in self.recipe.operands().items() if self.recipe else ():
            if spec:
                check(shapes[operand], spec, f"{self.name} {operand}")
        if self.recipe and self.recipe.rotate and I % self.recipe.rotate:
            raise ValueError(f"{self.name}: its inputs, {I}, must be a multiple of rotate = {self.recipe.rotate}")

    def backend(self, gemm: str, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
        """What multiplies in "fprop", "dgrad" or "wgrad", of `tokens` rows of x in `dtype`. Raises ValueError if the context
        names a backend that cannot."""
        if self.context.backend == "emulate" or self.recipe is None:
            return "emulate"
        place = gemm, tokens, dtype
        if place not in self._backends:
            I, O = self.in_features, self.out_features
            sizes = {"fprop": (tokens, O, I), "dgrad": (tokens, I, O), "wgrad": (O, I, tokens)}[gemm]
            a, b = (spec for operand, spec in self.recipe.operands().items() if operand.startswith(gemm))
            wide = gemm == "wgrad" or (gemm == "fprop" and a and a.center)
            out = torch.float32 if wide else dtype
            self._backends[place] = pick(self.context.backend, gemm, a, b, sizes, out, device)
        return self._backends[place]

    # --- operands ---

    def _note(self, x: Tensor) -> None:
        """Keep the largest |x| that training quantises in fprop. Recomputing a block notes it twice, which changes nothing."""
        if self.context.amaxes is not None and self.training and self.recipe and self.recipe.fprop.x:
            low, high = torch.aminmax(x)  # (a third of the time of abs and amax)
            seen = self.context.amaxes[self.number]
            seen.copy_(torch.maximum(seen, torch.maximum(high, -low).to(torch.float32)))

    def _mask(self, operand: str, spec: Spec, x: Tensor) -> Tensor:
        return unclipped(x, spec, *self._keys(operand, spec), self._held(operand, spec, x))

    def _keys(self, operand: str, spec: Spec) -> tuple[Key | None, Key | None]:
        if not spec.keyed:
            return None, None
        return self.context.key(operand, self.number), self.context.sign_key(operand, self.number)

    def _pair(self, first: str, second: str, x: Tensor, once: bool) -> tuple[QTensor | None, QTensor | None]:
        """What the second GEMM takes along the other axis of x than the first, both of one read where kernels do that.
        once: where x^T has the values of x, one side is enough."""
        a, b = ((self.recipe or PLAIN).operands()[name] for name in (first, second))
        if a is None or b is None or (once and a == b and a.transposes) or not kernel.takes(x, a, b):
            return None, None
        if any(spec.center or spec.source == "fprop" for spec in (a, b)):
            return None, None
        keys = zip(self._keys(first, a), self._keys(second, b), strict=True)
        held = self._held(first, a, x, note=False), self._held(second, b, x.t(), note=False)
        return kernel.encode_pair(x, (a, b), *keys, held)

    def _operand(self, operand: str, spec: Spec | None, x: Tensor, packed: bool, made: QTensor | None = None) -> Operand:
        """x [R, K], contraction last -> what gemm takes, `packed` or not. made: x, quantised already."""
        if spec is None:
            return Operand(x, None, False)
        held = self._held(operand, spec, x)
        found = self._quantized(operand, spec, x, held, packed) if made is None else _of(made, packed)
        self._observe(operand, spec, x, held, found.index)
        return found

    def _quantized(self, operand: str, spec: Spec, x: Tensor, held: Tensor | None, packed: bool) -> Operand:
        if spec.ladder:
            return self._chosen(operand, spec, x)
        given = x, spec, *self._keys(operand, spec), held
        return Operand(packed=quantize(*given)) if packed else Operand(*quantized_values(*given))

    def _chosen(self, operand: str, spec: Choice, x: Tensor) -> Operand:
        index, picker, measure = self._remembered(operand, spec, self.training) if spec.memory else (None, None, True)
        found = choose(x, spec, *self._keys(operand, spec), index, measure, picker)
        if spec.memory and measure:
            state = self._memory(operand)
            state.copy_(gathered(state, found.ratios.flatten(), self.context.counters[1]))
        self._decided(operand, Decision(spec, found.index, found.error, x.numel()))
        if operand == "fprop.w" and self._shares_weight():
            self._decided("dgrad.w", Decision(spec, _turned_index(found.index), found.error, x.numel()))
        return Operand(found.values, found.factor, index=found.index)

    def _decided(self, operand: str, what: tuple) -> None:
        """Note a decision, or what both operands of a GEMM are; what runs again in a micro-batch is noted once."""
        if self.context.decisions is not None:
            place = self.context.step, -1 if operand.endswith(".w") else self.context.micro_batch
            self.context.decisions.setdefault(f"{self.name}/{operand}", {})[place] = what

    def _multiplied(self, name: str, a: Operand, b: Operand, y: Tensor) -> None:
        if a.index is not None or b.index is not None:
            specs = [spec for o, spec in (self.recipe or PLAIN).operands().items() if o.startswith(name)]
            self._decided(name, tuple(zip(specs, (a.index, b.index), strict=True)))
        if self.context.tap is not None:
            self.context.tap(self, name, a, b, y)

    def _remember(self, operand: str, spec: Choice) -> None:
        """Keep the buffer of this ladder; start an empty one where it is that of another, or there is none."""
        old = self._buffers.get(f"memory_{operand.replace('.', '_')}")
        if old is None or old.is_meta or float(old[WHOSE]) != checksum(spec):
            self.register_buffer(f"memory_{operand.replace('.', '_')}", empty(spec, self.weight.device))
            self._copies.pop(operand, None)

    def _memory(self, operand: str) -> Tensor:
        return self._buffers[f"memory_{operand.replace('.', '_')}"]

    def _remembered(self, operand: str, spec: Choice, training: bool) -> tuple[Tensor | int | None, Callable | None, bool]:
        """What is decided already, what picks where nothing is, and whether errors are measured, in this step.

        The first call in a step finishes the look before. An evaluation takes what has been decided, and changes nothing."""
        state, step = self._memory(operand), self.context.step
        now = settled(state, spec, self.context.counters[1])
        if training:
            state.copy_(now)
        return decision(now, spec, step, training, self._copies.setdefault(operand, Copies()))

    def _observe(self, operand: str, spec: Spec, x: Tensor, held: Tensor | None, index: Tensor | int | None = None) -> None:
        """`index`: what a ladder has decided of x."""
        if self.context.stats is not None:
            keys = self._keys(operand, spec)
            q = quantize(x, spec, *keys, held, index)
            self.context.stats[f"{self.name}/{operand}"] = operand_stats(rotated(x, spec, keys[1]), q)

    def _history(self, operand: str, steps: int) -> Tensor:
        """fp64 [2, steps + 1]: steps (-inf: none yet) and their amaxes; a step lies at its number modulo steps + 1."""
        name = f"history_{operand.replace('.', '_')}"
        if name not in self._buffers or self._buffers[name].shape[1] != steps + 1:
            empty = torch.full((2, steps + 1), -torch.inf, dtype=torch.float64, device=self.weight.device)
            self.register_buffer(name, empty)
        return self._buffers[name]

    def _held(self, operand: str, spec: Spec, x: Tensor, note: bool = True) -> Tensor | None:
        """The amax of earlier steps, fp32 [], 0 if there is none, and None if the scale has no history; in training that of x
        (finite ones) is noted for later steps. Nothing here waits for the device."""
        if not (steps := spec.scale.history):
            return None
        history, step = self._history(operand, steps), self.context.counters[1].double()
        number, amax = history
        held = torch.where((number < step) & (number >= step - steps), amax, 0.0).amax().to(torch.float32)
        if note and self.training:
            found = rotated(x, spec, self._keys(operand, spec)[1]).abs().amax().double()
            found = torch.where(found.isfinite(), found, 0.0)
            here = torch.arange(steps + 1, device=amax.device) == step % (steps + 1)
            amax.copy_(torch.where(here, torch.where(number == step, torch.maximum(amax, found), found), amax))
            number.copy_(torch.where(here, step, number))
        return held

    def _once(self, operand: str, other: str, x: Tensor, found: Operand) -> bool:
        """Whether `operand`, of x^T, is what `other` is of x, which was found; what is watched of it is noted then."""
        spec, before = ((self.recipe or PLAIN).operands()[name] for name in (operand, other))
        once = spec is not None and spec == before and spec.transposes and not (spec.scale.history or spec.center)
        if once := once and not (spec.ladder and spec.memory):
            self._observe(operand, spec, x.t(), None, _turned_index(found.index))
            if spec.ladder and self.context.decisions is not None:
                decision = self.context.decisions[f"{self.name}/{other}"][self.context.step, self.context.micro_batch]
                self._decided(operand, decision._replace(index=_turned_index(decision.index)))
        return once

    def _source(self, rows: Tensor | None = None) -> Tensor:
        """The weight, or some rows of it, as it is quantised: the fp32 master, or its BF16 copy if the recipe says so, rotated
        if it says so."""
        weight = rows
        if weight is None:
            weight = self.weight.operands["copy"] if isinstance(self.weight, Gathered) else self.weight.detach()
        if self.recipe and self.recipe.weights == "bf16":
            weight = weight.to(torch.bfloat16)
        return self._rotated(weight)

    def _rotated(self, x: Tensor) -> Tensor:
        """x [.., I] in the basis of the recipe (`rotate`), or back in its own: H is its own inverse."""
        size = self.recipe.rotate if self.recipe else 0
        return transform(x, size, torch.ones(size, device=x.device), x.dtype) if size else x

    def _kept(self, spec: Spec | None, x: Tensor, made: QTensor | None = None) -> "Kept":
        """wgrad.x, of x^T [I, T], as it is kept for backward: packed where its format is known beforehand. made: as above."""
        if spec is None or (spec.ladder and not (spec.memory and spec.memory.delay)):
            return Kept.of(self._operand("wgrad.x", spec, x, packed=False))
        keys = self._keys("wgrad.x", spec)
        if spec.ladder:
            index, _, measure = self._remembered("wgrad.x", spec, self.training)
            if measure or spec.candidates[index].scale.format == "none":
                found = self._operand("wgrad.x", spec, x, packed=False)
            else:
                self._observe("wgrad.x", spec, x, None, index)
                self._decided("wgrad.x", Decision(spec, index, None, x.numel()))
            if spec.candidates[index].scale.format == "none":
                return Kept.of(found)
            return Kept.packed(quantize(x, spec.candidates[index], *keys), index)
        held = self._held("wgrad.x", spec, x)
        self._observe("wgrad.x", spec, x, held)
        return Kept.packed(quantize(x, spec, *keys, held) if made is None else made)

    def _weight(self, operand: str, spec: Spec | None, dtype: torch.dtype, packed: bool) -> Operand:
        """fprop.w: w [O, I]; dgrad.w: w^T [I, O]. Cached until the weight changes."""
        transpose = operand == "dgrad.w"
        if spec is None:
            w = self._copy(dtype).detach()
            if self.recipe and self.recipe.rotate:
                w = self._cached("rotated", dtype, lambda: self._source().to(dtype))
            return Operand(w.t() if transpose else w, None, False)
        shared = transpose and not packed and self._shares_weight()
        name, held = "fprop.w" if shared else operand, None
        if q := self._gathered(name):  # (decoded at every use: it is here for no longer than that)
            return _turned(_of(q, packed)) if shared else _of(q, packed)
        watched = self.context.stats is not None
        if spec.scale.history:  # noted also where an evaluation has filled the cache
            held = self._held(name, spec, self._original(operand, spec, dtype))
        found = self._cached(
            name + " packed" * packed,
            spec,
            lambda: self._quantized(name, spec, self._original(name, spec, dtype), held, packed),
        )
        found = _turned(found) if shared else found
        if watched:
            self._observe(operand, spec, self._original(operand, spec, dtype), held, found.index)
        return found

    def _gathered(self, operand: str) -> QTensor | None:
        """Codes of the weight that other ranks have made."""
        found = self.weight.operands if isinstance(self.weight, Gathered) else {}
        return found[operand] if operand in found else found["fprop.w"].turned() if "fprop.w" in found else None

    def _shares_weight(self) -> bool:
        """Whether W^T has the codes of W, so that both are quantised once."""
        return self.recipe.dgrad.w == self.recipe.fprop.w and self.recipe.dgrad.w.transposes

    def _original(self, operand: str, spec: Spec, dtype: torch.dtype) -> Tensor:
        """What a weight operand is quantised from, contraction last."""
        w = self._source()
        if spec.source == "fprop":
            w = self._weight("fprop.w", self.recipe.fprop.w, dtype, packed=False).dense()
        return w.t() if operand == "dgrad.w" else w

    def _copy(self, dtype: torch.dtype) -> Tensor:
        """The weight in the compute dtype; cached only where no gradient flows through the cast."""
        if isinstance(self.weight, Gathered):
            return Copied.apply(self.weight)
        if dtype == self.weight.dtype or (self.recipe is None and torch.is_grad_enabled()):
            return self.weight.to(dtype)
        return self._cached("copy", dtype, lambda: self.weight.detach().to(dtype))

    def _cached(self, name: str, kind, make):
        if torch.compiler.is_compiling():
            return make()  # part of the compiled graph then
        stamp = self._stamp(kind)
        if self._cache.get(name, (None,))[0] != stamp:
            self._cache[name] = (stamp, make())
        return self._cache[name][1]

    def _stamp(self, kind) -> tuple:
        """Of what is made of the weight by a spec, or in a dtype: as long as it is the same, so is what is made."""
        specs = [kind] if isinstance(kind, QuantSpec | Choice) else []
        specs += [self.recipe.fprop.w for spec in specs if spec.source == "fprop"]
        step = self.context.step if any(spec.keyed or spec.scale.history for spec in specs) else None
        if any(spec.ladder for spec in specs):  # it notes what it decides, once a step, in training
            step = self.context.step, self.training
        return self.stamp(), kind, self.recipe, step


class Kept(NamedTuple):
    """wgrad.x between forward and backward: the tensors of a QTensor, or of an Operand."""

    tensors: tuple[Tensor | None, ...] = ()
    spec: Spec | None = None  # of a QTensor, and its shape
    shape: tuple[int, ...] = ()
    quantised: bool = True
    index: Tensor | int | None = None

    @classmethod
    def of(cls, x: Operand) -> "Kept":
        return cls((x.values, x.factor), quantised=x.quantised, index=x.index)

    @classmethod
    def packed(cls, q: QTensor, index: int | None = None) -> "Kept":
        return cls((q.packed_codes, q.scale_codes, q.outer_codes), q.spec, q.shape, index=index)

    def operand(self, packed: bool) -> Operand:
        if self.spec is None:
            return Operand(*self.tensors, self.quantised, self.index)
        return _of(QTensor(*self.tensors, self.spec, self.shape), packed)._replace(index=self.index)


def _of(q: QTensor, packed: bool) -> Operand:
    return Operand(packed=q) if packed else Operand(*kernel.decode(q))


class _Quantized(torch.autograd.Function):
    """x [T, I], weight fp32 [O, I] -> y [T, O]; the recipe and the counters are read from the module."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, module: Linear) -> Tensor:
        recipe, mode, dtype = module.recipe or PLAIN, module.context.gemm, x.dtype
        fprop_x, wgrad_x = recipe.fprop.x, recipe.wgrad.x
        x, mean, mask, kept = module._rotated(x), None, None, Kept()
        if any(spec and spec.center for spec in (fprop_x, wgrad_x)):
            mean = stated_sum(x.to(torch.float32), 0) * (1 / x.shape[0])  # [1, I]
            rest = x.to(torch.float32) - mean
        needed = dict(zip(GEMMS, (True, *ctx.needs_input_grad[:2]), strict=True))
        backends = {name: module.backend(name, len(x), dtype, x.device) if needed[name] else "emulate" for name in GEMMS}
        packed = {name: backend != "emulate" for name, backend in backends.items()}
        once = not (packed["fprop"] or packed["wgrad"])
        first, second = module._pair("fprop.x", "wgrad.x", x, once) if ctx.needs_input_grad[1] else (None, None)
        inputs = rest if fprop_x and fprop_x.center else x
        module._note(inputs)
        a = module._operand("fprop.x", fprop_x, inputs, packed["fprop"], first)
        b = module._weight("fprop.w", recipe.fprop.w, dtype, packed["fprop"])
        if fprop_x and fprop_x.center:
            y = (gemm(a, b, torch.float32, mode, backends["fprop"]) + linear(mean, b.dense())).to(dtype)
        else:
            y = gemm(a, b, dtype, mode, backends["fprop"])
        module._multiplied("fprop", a, b, y)
        if ctx.needs_input_grad[0] and recipe.clip:
            mask = module._mask("fprop.x", fprop_x, rest if fprop_x.center else x)
        if ctx.needs_input_grad[1] and wgrad_x and wgrad_x.ladder and module._once("wgrad.x", "fprop.x", x, a):
            kept = Kept.of(_turned(a))
        elif ctx.needs_input_grad[1]:
            x = a.dense() if wgrad_x and wgrad_x.source == "fprop" else rest if wgrad_x and wgrad_x.center else x
            kept = module._kept(wgrad_x, x.t(), second)
        ctx.module, ctx.recipe, ctx.dtype, ctx.kept = module, recipe, dtype, kept._replace(tensors=())
        ctx.backends, ctx.packed = backends, packed
        ctx.save_for_backward(mean if wgrad_x and wgrad_x.center else None, mask, *kept.tensors)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        module, recipe, mode = ctx.module, ctx.recipe, ctx.module.context.gemm
        mean, mask, *tensors = ctx.saved_tensors
        g = g.contiguous()
        dx = dw = None
        a = None
        backends, packed = ctx.backends, ctx.packed
        once = not (packed["dgrad"] or packed["wgrad"])
        first, second = module._pair("dgrad.g", "wgrad.g", g, once) if all(ctx.needs_input_grad[:2]) else (None, None)
        if ctx.needs_input_grad[0]:
            a = module._operand("dgrad.g", recipe.dgrad.g, g, packed["dgrad"], first)
            b = module._weight("dgrad.w", recipe.dgrad.w, ctx.dtype, packed["dgrad"])
            dx = gemm(a, b, ctx.dtype, mode, backends["dgrad"])
            dx = module._rotated(dx if mask is None else torch.where(mask, dx, 0))
            module._multiplied("dgrad", a, b, dx)
        if ctx.needs_input_grad[1]:
            once = once and a and module._once("wgrad.g", "dgrad.g", g, a)
            a = _turned(a) if once else module._operand("wgrad.g", recipe.wgrad.g, g.t(), packed["wgrad"], second)
            b = ctx.kept._replace(tensors=tensors).operand(packed["wgrad"])
            dw = gemm(a, b, torch.float32, mode, backends["wgrad"])
            if mean is not None:
                dw = dw + stated_sum(g.to(torch.float32), 0).t() * mean
            if recipe.clip:
                w = recipe.fprop.w
                dw = torch.where(module._cached("mask", w, lambda: module._mask("fprop.w", w, module._source())), dw, 0)
            dw = module._rotated(dw)
            module._multiplied("wgrad", a, b, dw)
        return dx, dw, None


def _turned(operand: Operand) -> Operand:
    """The operand of x^T, of one of x whose spec has the same for both: then a factor is one number."""
    return operand._replace(values=operand.values.t(), index=_turned_index(operand.index))


def _turned_index(index: Tensor | int | None) -> Tensor | int | None:
    return index.t() if isinstance(index, Tensor) and index.ndim else index


def linears(model: nn.Module) -> dict[str, Linear]:
    """Name -> every Linear of a model, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def memory(model: nn.Module) -> dict[str, Tensor]:
    """Name -> what Linears of a model remember between steps: the buffers of delayed scaling and of ladders."""
    buffers = dict(model.named_buffers())
    return {name: t for name, t in model.state_dict().items() if name in buffers}
