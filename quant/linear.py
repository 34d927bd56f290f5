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
    history     a Scale's amaxes of earlier steps, the one state a Linear has: buffers `history_GEMM_OPERAND`, [2, N + 1]
                steps and amaxes; a step's amax is the largest of its micro-batches, and serves later steps only

The model is built with Linear from the start; a policy sets `.recipe`, so per-layer exceptions, BF16 evaluation and
switches during the run are assignments. Without a recipe a Linear is `F.linear` in the dtype of its input, bit for bit.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant.gemm import Operand, gemm
from quant.metrics import operand_stats
from quant.qtensor import QTensor
from quant.quantize import check, decoded_values, quantize, quantized_values, rotated, transform, unclipped
from quant.random import Key
from quant.recipe import OPERANDS, SIGNS, Recipe
from quant.scaling import stated_sum
from quant.spec import Choice, QuantSpec, Spec
from quant.transform import signs


class Context:
    """What all Linears of a model share during a run: where in the run we are, and the GEMM mode.

    The counters also live in int64 tensors, so that advancing them recompiles nothing and waits for nothing.
    `stats`: None, or a dict that collects `operand_stats` of every operand under "module/gemm.operand".
    """

    def __init__(self, seed: int = 0, gemm: str = "bf16", device: str | torch.device = "cpu"):
        self.seed, self.gemm = seed, gemm
        self.step = 0
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)  # global micro-batch, step
        self.stats: dict[str, Tensor] | None = None

    def at(self, step: int, micro_batch: int) -> None:
        """Move to a place in the run; both counts are global, from 0."""
        self.step = step
        self.counters[0] = micro_batch
        self.counters[1] = step

    def key(self, operand: str, layer: int) -> Key:
        """Randomness of weights depends on the step, that of activations and gradients on the micro-batch."""
        return Key(self.seed, self.counters[int(operand.endswith(".w"))], layer, OPERANDS[operand])

    def sign_key(self, operand: str, layer: int) -> Key:
        """Fresh Hadamard signs, the same for both operands of a GEMM; GEMMs with a weight change them once a step."""
        gemm = operand[:5]
        return Key(self.seed, self.counters[int(gemm != "wgrad")], layer, SIGNS[gemm])


class Linear(nn.Linear):
    """weight [O, I]: the fp32 master. x [..., I] -> [..., O] in x's dtype. No bias (raises ValueError)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **kw):
        if bias:
            raise ValueError("quant.Linear has no bias: none of the recipes defines how one would be quantised")
        super().__init__(in_features, out_features, bias=False, **kw)
        self._recipe: Recipe | None = None
        self.name, self.number = "linear", 0
        self.context = Context()
        self._cache: dict = {}

    @property
    def recipe(self) -> Recipe | None:
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: Recipe | None) -> None:
        self._recipe = recipe
        for operand, spec in recipe.operands().items() if recipe else ():
            if spec and (steps := spec.scale.history):
                self._history(operand, steps)

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe is None:
            return linear(x, self._copy(x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        return _Quantized.apply(rows, self.weight, self).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        text = f"{self.in_features} -> {self.out_features}"
        if self.recipe is not None:
            text += ", " + ", ".join(f"{name}: {spec}" for name, spec in self.recipe.short().items())
        return text

    def quantized_weight(self) -> QTensor | None:
        """The QTensor of fprop.w, or None where the recipe leaves it in the compute dtype."""
        spec = self.recipe and self.recipe.fprop.w
        if not spec:
            return None
        w = self._source()
        return quantize(w, spec, *self._keys("fprop.w", spec), self._held("fprop.w", spec, w, note=False))

    def use(self, q: QTensor) -> None:
        """Take these codes for fprop.w (and what is made of it for dgrad.w) until the weight changes."""
        self._cache.clear()
        self._cached("fprop.w", q.spec, lambda: Operand(*decoded_values(q)))

    def dequantized(self, q: QTensor) -> Tensor:
        """The weight that a QTensor of fprop.w stands for, fp32 [O, I], turned back from the basis it was quantised in."""
        w, ones = q.dequantize(), None
        for size, kind in ((q.spec.hadamard, q.spec.signs), (self.recipe.rotate, "none")):
            if size:
                ones = torch.ones(size, device=w.device)
                key = self.context.sign_key("fprop.w", self.number)
                s = signs(size, kind, key.words(w.device), w.device)
                w = transform(w, size, ones, torch.float32) * s.repeat(w.shape[1] // size)
        return w

    def check(self, tokens: int) -> None:
        """Raises ValueError if some operand cannot be cut into blocks with `tokens` rows of x."""
        I, O = self.in_features, self.out_features
        shapes = dict(zip(OPERANDS, ((tokens, I), (O, I), (tokens, O), (I, O), (O, tokens), (I, tokens)), strict=True))
        for operand, spec in self.recipe.operands().items() if self.recipe else ():
            if spec:
                check(shapes[operand], spec, f"{self.name} {operand}")
        if self.recipe and self.recipe.rotate and I % self.recipe.rotate:
            raise ValueError(f"{self.name}: its inputs, {I}, must be a multiple of rotate = {self.recipe.rotate}")

    # --- operands ---

    def _mask(self, operand: str, spec: Spec, x: Tensor) -> Tensor:
        return unclipped(x, spec, *self._keys(operand, spec), self._held(operand, spec, x))

    def _keys(self, operand: str, spec: Spec) -> tuple[Key | None, Key | None]:
        if not spec.keyed:
            return None, None
        return self.context.key(operand, self.number), self.context.sign_key(operand, self.number)

    def _operand(self, operand: str, spec: Spec | None, x: Tensor) -> Operand:
        """x [R, K], contraction last -> what gemm takes."""
        if spec is None:
            return Operand(x, None, False)
        self._observe(operand, spec, x, self._held(operand, spec, x))
        return self._quantized(operand, spec, x)

    def _quantized(self, operand: str, spec: Spec, x: Tensor) -> Operand:
        return Operand(*quantized_values(x, spec, *self._keys(operand, spec), self._held(operand, spec, x)))

    def _observe(self, operand: str, spec: Spec, x: Tensor, held: Tensor | None) -> None:
        if self.context.stats is not None:
            keys = self._keys(operand, spec)
            y = rotated(x, spec, keys[1])
            self.context.stats[f"{self.name}/{operand}"] = operand_stats(y, quantize(x, spec, *keys, held))

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

    def _source(self) -> Tensor:
        """The weight as it is quantised: the fp32 master, or its BF16 copy if the recipe says so, rotated if it says so."""
        weight = self.weight.detach()
        if self.recipe and self.recipe.weights == "bf16":
            weight = weight.to(torch.bfloat16)
        return self._rotated(weight)

    def _rotated(self, x: Tensor) -> Tensor:
        """x [.., I] in the basis of the recipe (`rotate`), or back in its own: H is its own inverse."""
        size = self.recipe.rotate if self.recipe else 0
        return transform(x, size, torch.ones(size, device=x.device), x.dtype) if size else x

    def _weight(self, operand: str, spec: Spec | None, dtype: torch.dtype) -> Operand:
        """fprop.w: w [O, I]; dgrad.w: w^T [I, O]. Cached until the weight changes."""
        transpose = operand == "dgrad.w"
        if spec is None:
            w = self._copy(dtype).detach()
            if self.recipe.rotate:
                w = self._cached("rotated", dtype, lambda: self._source().to(dtype))
            return Operand(w.t() if transpose else w, None, False)
        shared = transpose and spec == self.recipe.fprop.w and spec.transposes  # W^T has the codes of W: quantise once for both
        name = "fprop.w" if shared else operand
        if self.context.stats is not None:
            self._observe(operand, spec, w := self._original(operand, spec, dtype), self._held(name, spec, w))
        elif spec.scale.history and self.training:  # noted also where an evaluation has filled the cache
            self._held(name, spec, self._original(name, spec, dtype))
        found = self._cached(name, spec, lambda: self._quantized(name, spec, self._original(name, spec, dtype)))
        return found._replace(values=found.values.t()) if shared else found

    def _original(self, operand: str, spec: Spec, dtype: torch.dtype) -> Tensor:
        """What a weight operand is quantised from, contraction last."""
        w = self._source() if spec.source == "original" else self._weight("fprop.w", self.recipe.fprop.w, dtype).dense()
        return w.t() if operand == "dgrad.w" else w

    def _copy(self, dtype: torch.dtype) -> Tensor:
        """The weight in the compute dtype; cached only where no gradient flows through the cast."""
        if dtype == self.weight.dtype or (self.recipe is None and torch.is_grad_enabled()):
            return self.weight.to(dtype)
        return self._cached("copy", dtype, lambda: self.weight.detach().to(dtype))

    def _cached(self, name: str, kind, make):
        if torch.compiler.is_compiling():
            return make()  # part of the compiled graph then
        specs = [kind] if isinstance(kind, QuantSpec | Choice) else []
        specs += [self.recipe.fprop.w for spec in specs if spec.source == "fprop"]
        step = self.context.step if any(spec.keyed or spec.scale.history for spec in specs) else None
        stamp = (self.weight._version, self.weight.data_ptr(), kind, self.recipe, step)
        if self._cache.get(name, (None,))[0] != stamp:
            self._cache[name] = (stamp, make())
        return self._cache[name][1]


class _Quantized(torch.autograd.Function):
    """x [T, I], weight fp32 [O, I] -> y [T, O]; the recipe and the counters are read from the module."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, module: Linear) -> Tensor:
        recipe, mode, dtype = module.recipe, module.context.gemm, x.dtype
        fprop_x, wgrad_x = recipe.fprop.x, recipe.wgrad.x
        x, mean, mask, shape, kept = module._rotated(x), None, None, None, (None, None, None)
        if any(spec and spec.center for spec in (fprop_x, wgrad_x)):
            mean = stated_sum(x.to(torch.float32), 0) * (1 / x.shape[0])  # [1, I]
            rest = x.to(torch.float32) - mean
        a = module._operand("fprop.x", fprop_x, rest if fprop_x and fprop_x.center else x)
        b = module._weight("fprop.w", recipe.fprop.w, dtype)
        if fprop_x and fprop_x.center:
            y = (gemm(a, b, torch.float32, mode) + linear(mean, b.dense())).to(dtype)
        else:
            y = gemm(a, b, dtype, mode)
        if ctx.needs_input_grad[0] and recipe.clip:
            mask = module._mask("fprop.x", fprop_x, rest if fprop_x.center else x)
        if ctx.needs_input_grad[1] and wgrad_x:
            x = a.dense() if wgrad_x.source == "fprop" else rest if wgrad_x.center else x
            held, keys = module._held("wgrad.x", wgrad_x, x.t()), module._keys("wgrad.x", wgrad_x)
            module._observe("wgrad.x", wgrad_x, x.t(), held)
            q = quantize(x.t(), wgrad_x, *keys, held)
            shape, kept = q.shape, (q.packed_codes, q.scale_codes, q.outer_codes)
        elif ctx.needs_input_grad[1]:
            kept = (x, None, None)
        ctx.module, ctx.recipe, ctx.dtype, ctx.shape = module, recipe, dtype, shape
        ctx.save_for_backward(*kept, mean if wgrad_x and wgrad_x.center else None, mask)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        module, recipe, mode = ctx.module, ctx.recipe, ctx.module.context.gemm
        *kept, mean, mask = ctx.saved_tensors
        g = g.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            a = module._operand("dgrad.g", recipe.dgrad.g, g)
            dx = gemm(a, module._weight("dgrad.w", recipe.dgrad.w, ctx.dtype), ctx.dtype, mode)
            dx = module._rotated(dx if mask is None else torch.where(mask, dx, 0))
        if ctx.needs_input_grad[1]:
            a = module._operand("wgrad.g", recipe.wgrad.g, g.t())
            if ctx.shape is None:
                b = Operand(kept[0].t(), None, False)
            else:
                b = Operand(*decoded_values(QTensor(*kept, recipe.wgrad.x, ctx.shape)))
            dw = gemm(a, b, torch.float32, mode)
            if mean is not None:
                dw = dw + stated_sum(g.to(torch.float32), 0).t() * mean
            if recipe.clip:
                w = recipe.fprop.w
                dw = torch.where(module._cached("mask", w, lambda: module._mask("fprop.w", w, module._source())), dw, 0)
            dw = module._rotated(dw)
        return dx, dw, None


def linears(model: nn.Module) -> dict[str, Linear]:
    """Name -> every Linear of a model, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
