"""Linear: nn.Linear whose six GEMM operands follow a Recipe.

    y[T,O] = x[T,I] w[O,I]^T        fprop { x, w }      contraction I
    dx     = g[T,O] w               dgrad { g, w }      contraction O
    dw     = g^T x                  wgrad { g, x }      contraction T

Each operand is quantised from the original tensor along its own contraction, never by requantising another copy. What
wgrad needs of x is quantised in the forward pass and kept packed (4.5 bits an element for NVFP4); the BF16 x is not.
W is quantised once per change of the weight (its version counter), hence once per optimiser step. torch's fused optimisers
do not advance that counter: after theirs, call torch.autograd.graph.increment_version(parameters), as train.py does.

The model is built with Linear from the start; a policy sets `.recipe`, so per-layer exceptions, BF16 evaluation and
switches during the run are assignments. Without a recipe a Linear is `F.linear` in the dtype of its input, bit for bit.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant.gemm import Operand, gemm
from quant.metrics import operand_stats
from quant.qtensor import QTensor
from quant.quantize import check, decoded_values, quantize, quantized_values, rotated
from quant.random import Key
from quant.spec import OPERANDS, SIGNS, QuantSpec, Recipe


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
        self.recipe: Recipe | None = None
        self.name, self.number = "linear", 0
        self.context = Context()
        self._cache: dict = {}

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
        return quantize(self._source(), spec, *self._keys("fprop.w", spec)) if spec else None

    def use(self, q: QTensor) -> None:
        """Take these codes for fprop.w (and dgrad.w where W^T has the same ones) until the weight changes."""
        self._cached("fprop.w", q.spec, lambda: Operand(*decoded_values(q)))

    def check(self, tokens: int) -> None:
        """Raises ValueError if some operand cannot be cut into blocks with `tokens` rows of x."""
        I, O = self.in_features, self.out_features
        shapes = dict(zip(OPERANDS, ((tokens, I), (O, I), (tokens, O), (I, O), (O, tokens), (I, tokens)), strict=True))
        for operand, spec in self.recipe.operands().items() if self.recipe else ():
            if spec:
                check(shapes[operand], spec, f"{self.name} {operand}")

    # --- operands ---

    def _keys(self, operand: str, spec: QuantSpec) -> tuple[Key | None, Key | None]:
        if not spec.keyed:
            return None, None
        return self.context.key(operand, self.number), self.context.sign_key(operand, self.number)

    def _operand(self, operand: str, spec: QuantSpec | None, x: Tensor) -> Operand:
        """x [R, K], contraction last -> what gemm takes."""
        if spec is None:
            return Operand(x, None, False)
        keys = self._keys(operand, spec)
        if self.context.stats is not None:
            self._observe(operand, spec, x)
        return Operand(*quantized_values(x, spec, *keys))

    def _observe(self, operand: str, spec: QuantSpec, x: Tensor) -> None:
        keys = self._keys(operand, spec)
        y = rotated(x, spec, keys[1])
        self.context.stats[f"{self.name}/{operand}"] = operand_stats(y, quantize(x, spec, *keys))

    def _source(self) -> Tensor:
        """The weight as it is quantised: the fp32 master, or its BF16 copy if the recipe says so."""
        weight = self.weight.detach()
        return weight.to(torch.bfloat16) if self.recipe and self.recipe.weights == "bf16" else weight

    def _weight(self, operand: str, spec: QuantSpec | None, dtype: torch.dtype) -> Operand:
        """fprop.w: w [O, I]; dgrad.w: w^T [I, O]. Cached until the weight changes."""
        transpose = operand == "dgrad.w"
        if spec is None:
            w = self._copy(dtype).detach()
            return Operand(w.t() if transpose else w, None, False)
        if self.context.stats is not None:
            self._observe(operand, spec, self._source().t() if transpose else self._source())
        if spec.transposes:  # the codes of w^T are those of w, transposed: quantise once for both GEMMs
            found = self._cached("fprop.w", spec, lambda: self._operand_of_weight("fprop.w", spec))
            return found._replace(values=found.values.t()) if transpose else found
        return self._cached(operand, spec, lambda: self._operand_of_weight(operand, spec))

    def _operand_of_weight(self, operand: str, spec: QuantSpec) -> Operand:
        w = self._source()
        return Operand(*quantized_values(w.t() if operand == "dgrad.w" else w, spec, *self._keys(operand, spec)))

    def _copy(self, dtype: torch.dtype) -> Tensor:
        """The weight in the compute dtype; cached only where no gradient flows through the cast."""
        if dtype == self.weight.dtype or (self.recipe is None and torch.is_grad_enabled()):
            return self.weight.to(dtype)
        return self._cached("copy", dtype, lambda: self.weight.detach().to(dtype))

    def _cached(self, name: str, kind, make):
        if torch.compiler.is_compiling():
            return make()  # part of the compiled graph then
        keyed = isinstance(kind, QuantSpec) and kind.keyed
        source = self.recipe.weights if self.recipe else ""
        stamp = (self.weight._version, self.weight.data_ptr(), kind, source, self.context.step if keyed else None)
        if self._cache.get(name, (None,))[0] != stamp:
            self._cache[name] = (stamp, make())
        return self._cache[name][1]


class _Quantized(torch.autograd.Function):
    """x [T, I], weight fp32 [O, I] -> y [T, O]; the recipe and the counters are read from the module."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, module: Linear) -> Tensor:
        recipe = module.recipe
        ctx.module, ctx.recipe, ctx.dtype = module, recipe, x.dtype
        y = gemm(
            module._operand("fprop.x", recipe.fprop.x, x),
            module._weight("fprop.w", recipe.fprop.w, x.dtype),
            x.dtype,
            module.context.gemm,
        )
        ctx.shape = None
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward()
        elif recipe.wgrad.x is None:
            ctx.save_for_backward(x)
        else:
            if module.context.stats is not None:
                module._observe("wgrad.x", recipe.wgrad.x, x.t())
            q = quantize(x.t(), recipe.wgrad.x, *module._keys("wgrad.x", recipe.wgrad.x))
            ctx.shape = q.shape
            ctx.save_for_backward(q.packed_codes, q.scale_codes, q.global_scale)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        module, recipe, mode = ctx.module, ctx.recipe, ctx.module.context.gemm
        g = g.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            a = module._operand("dgrad.g", recipe.dgrad.g, g)
            dx = gemm(a, module._weight("dgrad.w", recipe.dgrad.w, ctx.dtype), ctx.dtype, mode)
        if ctx.needs_input_grad[1]:
            a = module._operand("wgrad.g", recipe.wgrad.g, g.t())
            if ctx.shape is None:
                b = Operand(ctx.saved_tensors[0].t(), None, False)
            else:
                b = Operand(*decoded_values(QTensor(*ctx.saved_tensors, recipe.wgrad.x, ctx.shape)))
            dw = gemm(a, b, torch.float32, mode)
        return dx, dw, None


def linears(model: nn.Module) -> dict[str, Linear]:
    """Name -> every Linear of a model, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def attach(model: nn.Module, context: Context) -> None:
    """Give every Linear of a model its name, its number and the shared context."""
    for number, (name, module) in enumerate(linears(model).items()):
        module.name, module.number, module.context = name, number, context
