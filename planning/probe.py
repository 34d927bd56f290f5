"""What a model keeps for backward and computes, counted on the meta device: nothing is allocated, and no formula of a
transformer is here.

    kinds of blocks    those with the same modules, shapes and recipes are one; of each one block is run, and multiplied
    a run              GPT.loss and its backward, of a model that has that block alone, less one that has none

A run notes every storage that lives and when it dies (TorchDispatchMode), so it does not matter who keeps a tensor: autograd,
activation checkpointing, or a Linear its codes. So it runs as the config has it; and its twin, without recipes and
recomputation, for what is not saved (the quantisers of a run on meta are plain torch, with temporaries that kernels do not
have); and with recomputation, where there is some, products emulated, for the FLOPs that are repeated.

Attention is that of CUDA (torch's flash attention, which keeps q, k, v, its output and a logarithm for each row; meta tensors
would be given T x T), and RMSNorm on a GPU its fused kernel (which keeps x and 1 / rms). Weights that FSDP gathers in BF16 are
BF16 here. Left out: fragmentation of the allocator, workspaces of libraries, NCCL's buffers, the CUDA context.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs import Config, TrainConfig
from model import GPT
from planning.gpus import GPU
from quant import QuantSpec, assign, assign_sites, attach, quantize
from quant.choice import Spec
from quant.context import Context
from quant.linear import GEMMS, Linear, linears
from quant.native import kind, pick

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
META = torch.device("meta")


# --- one run ---


class Live(TorchDispatchMode):
    """`now` and `peak`: bytes of the storages made inside that live, or did; `moved`: bytes that operations other than matrix
    products read and write. `before`: tensors that were there already."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = self.moved = 0
        self.sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view and "mm" not in func.__name__ and "empty" not in func.__name__:
            self.moved += sum(t.nbytes for t in (*found, *tree_leaves((args, kwargs))) if isinstance(t, Tensor))
        for t in found:
            self.note(t.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:2]))


def _attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
    """q [B, H, T, d], k, v [B, KV, T, d] -> [B, H, T, d], causal, as CUDA has it: torch's own operation, on meta."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


@contextmanager
def _kernels(fused_norm: bool) -> Iterator[None]:
    """F's attention and, on a GPU, norm replaced by what their kernels keep."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        if fused_norm:
            stack.enter_context(patch.object(F, "rms_norm", lambda x, size, weight, eps: _Norm.apply(x, weight)))
        yield


@dataclass(frozen=True)
class Piece:
    """Of a block, or of what is around all blocks: bytes and FLOPs of one micro-batch."""

    kept: float = 0  # from forward to backward
    whole: float = 0  # the same without recomputation, which its own backward has
    working: float = 0  # above that, while it runs
    moved: float = 0  # bytes that everything but matrix products reads and writes, forward and backward, not fused
    attention: float = 0  # FLOPs of attention, forward and backward: 2 and 5 products, of which a causal mask leaves half
    again: float = 0  # ... recomputed
    products: float = 0  # FLOPs of matrix products, forward and backward, in Linears and elsewhere
    repeated: float = 0  # ... recomputed
    codes: float = 0  # bytes of quantised weights, kept until the next step

    def plus(self, other: "Piece", factor: float) -> "Piece":
        return Piece(*(getattr(self, f.name) + factor * getattr(other, f.name) for f in fields(self)))


# --- a model as a GPU would have it ---


@cache
def backend_on(gpu: GPU | None, gemm: str, a: Spec | None, b: Spec | None, sizes: tuple[int, int, int]) -> str:
    """What `train.gemm = "auto"` takes there: "scaled_mm", "triton" or "emulate"; gpu None: a CPU."""
    if not gpu or not gpu.capability or a is None or b is None:
        return "emulate"
    out = torch.float32 if gemm == "wgrad" or a.center else torch.bfloat16
    return pick(a, b, sizes, torch.device("cuda"), out, gpu.capability)[0]


def element_on(gpu: GPU, gemm: str, a: Spec | None, b: Spec | None, sizes: tuple[int, int, int]) -> str:
    """ "fp4", "fp8" or "bf16": at whose peak this product runs, given the backend; emulated ones are BF16."""
    backend = backend_on(gpu, gemm, a, b, sizes)
    if backend == "emulate":
        return "bf16"
    return "fp4" if kind(a).element == kind(b).element == "e2m1" else "fp8"


def sizes_of(module: Linear, tokens: int) -> dict[str, tuple[int, int, int]]:
    """M, N, K of the three GEMMs."""
    I, O = module.in_features, module.out_features
    return {"fprop": (tokens, O, I), "dgrad": (tokens, I, O), "wgrad": (O, I, tokens)}


def pairs(module: Linear) -> dict[str, tuple[Spec | None, Spec | None]]:
    """The specs of both operands of each GEMM."""
    specs = list(module.recipe.operands().values()) if module.recipe else [None] * 6
    return dict(zip(GEMMS, zip(specs[::2], specs[1::2], strict=True), strict=True))


def gathered_in_bf16(module: nn.Module) -> bool:
    """In the compute dtype: Linears that are not quantised, or from their BF16 copy; all else is gathered in fp32."""
    return isinstance(module, Linear) and (module.recipe is None or module.recipe.weights == "bf16")


Known = dict[tuple, Piece]  # see Model._known
LEVELS = get_args(get_type_hints(TrainConfig)["recompute"])  # of train.recompute, from nothing to all
PLAIN, FULL = LEVELS[0], LEVELS[-1]


class Model:
    """A GPT on meta at a share of the run, its kinds of blocks, and what each takes.

    config, share: from 0 to below 1; gpu: None for a CPU; sharded: weights are gathered (several ranks); known: what other
    models have counted, and this one too afterwards; bytes_only: without the FLOPs of what is recomputed."""

    def __init__(
        self,
        config: Config,
        share: float = 0.0,
        gpu: GPU | None = None,
        sharded: bool = False,
        known: Known | None = None,
        bytes_only: bool = False,
    ):
        self.config, self.share, self.gpu, self.sharded, self.bytes_only = config, share, gpu, sharded, bytes_only
        self.tokens = config.train.batch_size * config.model.seq_len
        self.gpt, self.known = self._build(config.train.recompute), {} if known is None else known
        self.modules = linears(self.gpt)
        groups: dict[tuple, list[int]] = {}
        for i, block in enumerate(self.gpt.blocks):
            modules = ((name, type(m).__name__, getattr(m, "recipe", None)) for name, m in block.named_modules())
            shapes = ((name, p.shape) for name, p in block.named_parameters())
            groups.setdefault((*modules, *shapes), []).append(i)
        self.kinds = list(groups.values())
        self.blocks: dict[int, Piece] = {}
        self.around = self._known((), [])
        for key, members in groups.items():
            piece = self._known(key, members[:1])
            self.blocks |= dict.fromkeys(members, replace(piece.plus(self.around, -1), working=piece.working))

    def _known(self, key: tuple, members: list[int]) -> Piece:
        """`_piece`, once for what is the same."""
        t, c = self.config.train, self.config
        place = c.model, c.sites, t.batch_size, t.dtype, self.gpu, self.sharded
        full = key, self.modules["head"].recipe, t.recompute, self.bytes_only, *place
        if full not in self.known:
            plain = tuple(part[:2] for part in key), *place
            if plain not in self.known:
                self.known[plain] = self._run(PLAIN, members, twin=True)
            self.known[full] = self._piece(members, self.known[plain])
        return self.known[full]

    def with_batch(self, other: "Model", size: int) -> "Model":
        """This model with micro-batches of `size` sequences, along the line through its pieces and those of another one that
        differs in that alone."""
        found, own = copy(self), self.config.train.batch_size
        found.config = replace(self.config, train=replace(self.config.train, batch_size=size))
        found.tokens = size * self.config.model.seq_len
        factor = (size - own) / (other.config.train.batch_size - own)

        def along(a: Piece, b: Piece) -> Piece:
            return a.plus(b.plus(a, -1), factor)

        found.around = along(self.around, other.around)
        found.blocks = {i: along(piece, other.blocks[i]) for i, piece in self.blocks.items()}
        return found

    def _build(self, level: Any) -> GPT:
        c = self.config
        with META:
            gpt = GPT(c.model, DTYPES[c.train.dtype], level)
        attach(gpt, Context(device=META))
        assign(gpt, c.recipes, c.policy, self.share)
        assign_sites(gpt, c.sites)
        for module in linears(gpt).values():
            module.backend = self._backends(module)
        return gpt

    def _backends(self, module: Linear) -> Callable[..., str]:
        specs = pairs(module)
        return lambda gemm, tokens, dtype, device: backend_on(self.gpu, gemm, *specs[gemm], sizes_of(module, tokens)[gemm])

    def _piece(self, members: list[int], twin: Piece) -> Piece:
        """What these blocks and all around them take."""
        level = self.config.train.recompute
        run = self._run(level, members)
        if level == PLAIN:
            return replace(twin, kept=run.kept, whole=run.kept, codes=run.codes)
        found = replace(twin, kept=run.kept, whole=self._run(PLAIN, members).kept, codes=run.codes)
        if self.bytes_only:
            return found
        again = self._run(level, members, emulated=True).plus(twin, -1)
        return replace(found, again=again.attention, repeated=again.products)

    def _run(self, level: Any, members: list[int], twin: bool = False, emulated: bool = False) -> Piece:
        """One forward and backward of a model of these blocks. twin: without recipes, and what does not depend on them;
        emulated: with products that torch can count."""
        gpt = self._build(level)
        gpt.blocks = nn.ModuleList(gpt.blocks[i] for i in members)
        modules = [m for m in gpt.modules() if isinstance(m, Linear)]
        for module in modules:
            if self.sharded and gathered_in_bf16(module) or twin and module.recipe:
                module.weight = nn.Parameter(module.weight.to(gpt.dtype))
            if twin:
                module.recipe = None
            if emulated:
                module.backend = lambda *_: "emulate"
        for p in gpt.parameters():  # gradients are counted elsewhere
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        batch, c = self.config.train.batch_size, self.config.model
        x = torch.zeros(batch, c.seq_len, dtype=torch.int64, device=META)
        before = [x, *gpt.parameters(), *gpt.buffers()]
        counted = twin or emulated
        counter = FlopCounterMode(display=False) if counted else nullcontext()
        with _kernels(self.gpu is not None), counter, Live(before) as live:
            loss = gpt.loss(x, x)
            kept, working = live.now - sum(map(_cached, modules)), live.now
            loss.backward()
        if not counted:
            return Piece(kept=kept, codes=sum(map(_cached, modules)))
        found = Piece(working=live.peak - working, moved=live.moved)
        if members and twin:  # a block's own peak, not that of the loss
            h = torch.zeros(batch, c.seq_len, c.d_model, dtype=gpt.dtype, device=META, requires_grad=True)
            with _kernels(self.gpu is not None), Live([h, *before]) as live:
                y = gpt.blocks[0](h, gpt.rope)
                inside = live.now
                y.backward(torch.empty_like(y))
            found = replace(found, working=live.peak - inside)
        flops = counter.get_flop_counts()["Global"]
        attention = sum(n for op, n in flops.items() if "attention" in str(op))
        return replace(found, attention=attention / 2, products=sum(flops.values()) - attention)


def _cached(module: Linear) -> float:
    """Bytes of what a Linear keeps of its weight until that changes."""
    found = {id(t): t.untyped_storage().nbytes() for _, kept in module._cache.values() for t in _tensors(kept)}
    return sum(found.values())


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif is_dataclass(x):
        for f in fields(x):
            yield from _tensors(getattr(x, f.name))
    elif isinstance(x, list | tuple):
        for each in x:
            yield from _tensors(each)


@cache
def coded(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Bytes of a tensor [R, K] as codes and scales."""
    plain = replace(spec, rounding="nearest", scale=replace(spec.scale, rounding="nearest"))
    return quantize(torch.empty(shape, device=META), plain).nbytes()
