"""Several ranks: who they are, FSDP2, and what its all-gathers move.

    mesh [replicas, size / replicas]    every parameter [O, ...] is cut by rows over the second axis (FSDP), copied over the 1st
    step     = micro_batches of the run, size of them at once: rank r has numbers r m, ..., r m + m - 1 of a step (m a rank)
    loss, gradients = sums over ranks in the order of ranks, hence of micro-batches; each is divided by micro_batches beforehand

What is added up in a fixed order has the same bits on 1, 2 and 4 ranks that have one micro-batch each. With more of them, or
replicas, whole sums meet (a + b) + (c + d), and the last bits may differ.

    gather = "weights"   fp32 rows of what is quantised from fp32, BF16 rows of Linears in the compute dtype. Every rank
                         quantises the whole, once a step, and keeps that.
    gather = "codes"     every rank quantises its own rows, once a step, under the amax of all (one MAX over ranks), and packed
                         codes and scales are gathered: 4.03 bits a weight of NVFP4 in 16 x 16 blocks, where BF16 has 16

Both through FSDP2's extension points (`fsdp_pre_all_gather`, `fsdp_post_all_gather` of the rows): codes are bit for bit those
of one process, since blocks are whole in a shard. Where they are not, or a weight is quantised by chance, by a ladder or by a
delayed scale, a Linear is gathered as under "weights", and `describe` says so.

To autograd a gathered weight is fp32 [O, I], of which there are only codes (`Gathered`); gradients are fp32, cut by rows too.

Left out: tensor and pipeline parallelism; sequences cut over ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from configs import Config
from model import GPT, rope_table
from quant.choice import Spec
from quant.encode import check, rotated
from quant.gathered import Gathered
from quant.linear import Linear, linears, memory
from quant.qtensor import QTensor
from quant.quantize import quantize

T = TypeVar("T")


def shared(config: Config, ranks: int) -> tuple[int, int, int]:
    """(shards, replicas, micro-batches of each rank). Raises ValueError where the ranks cannot share the work."""
    replicas, micro = config.parallel.replicas, config.train.micro_batches
    if ranks < 1 or ranks % replicas:
        raise ValueError(f"NGPU = {ranks}: expected a multiple of parallel.replicas = {replicas}")
    if micro % ranks:
        able = [n for n in range(replicas, micro + 1, replicas) if micro % n == 0]
        near = sorted(able, key=lambda n: abs(n - ranks))[:4]
        end = "; no more ranks than micro-batches (docs/scale.md)" * (ranks > micro)
        raise ValueError(
            f"NGPU = {ranks}: train.micro_batches = {micro} of a step must be shared out evenly; near are {sorted(near)}{end}"
        )
    return ranks // replicas, replicas, micro // ranks


class World:
    """The ranks of a run, as torchrun starts them; one alone without it, or if it is to be. `shared` says whether they can."""

    def __init__(self, replicas: int = 1, alone: bool = False):
        self.sharded = "RANK" in os.environ and not alone  # under torchrun also one rank shards: one code for 1, 2 and 4
        self.rank, self.size = (int(os.environ[key]) if self.sharded else n for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.replicas = replicas
        if cuda:
            torch.cuda.set_device(self.device)
        elif self.sharded:
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
        if self.sharded:
            if not dist.is_initialized():
                how = "cpu:gloo,cuda:nccl" if cuda else "gloo"
                dist.init_process_group(how, timeout=timedelta(seconds=TIMEOUT))
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
            shape = replicas, self.size // replicas
            self.shard_rank = self.rank % shape[1]
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, config: Config) -> range:
        """Which micro-batches of a step are this rank's. Raises ValueError if they cannot be shared out equally."""
        each = shared(config, self.size)[2] if self.sharded else config.train.micro_batches
        return range(self.rank * each, (self.rank + 1) * each)

    def all(self, x: Tensor) -> Tensor:
        """x of every rank, [ranks, ...], in their order."""
        if not self.sharded:
            return x[None]
        found = x.new_empty(self.size, *x.shape)
        dist.all_gather_single(found.view(-1), x.reshape(-1))
        return found

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks, added in their order."""
        first, *others = self.all(x)
        for other in others:
            first = first + other
        return first

    def sum_of_shards(self, x: Tensor) -> Tensor:
        """Of the ranks of one replica, as of every other."""
        return self.sum(x) if self.replicas == 1 else self.all(x)[: self.size // self.replicas].sum(0)

    def max(self, x: Tensor) -> Tensor:
        """Of all ranks; a NaN stays (collectives of several libraries would lose it)."""
        return self.all(x).amax(0)

    def some(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Every size-th of `count` batches, from this rank's on; all of them where they cannot be shared out equally."""
        return iter(batches) if count % self.size else islice(batches, self.rank, None, self.size)

    def together(self, count: int) -> Callable[[Tensor], Tensor]:
        """What puts the rows [batches, ...] that ranks have found of `some` of them together, in their order."""
        return lambda x: x if count % self.size else self.all(x).transpose(0, 1).flatten(0, 1)

    def any(self, yes: bool) -> bool:
        """Whether it is so on some rank: asked by the hosts of each other, no device waits."""
        return bool(self.max(torch.tensor(float(yes)))) if self.sharded else yes

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, on all of them; if it raises there, the others end quietly."""
        if not self.sharded:
            return work()
        told: list = [None]
        if self.first:
            try:
                told = [(work(),)]
            except Exception:
                dist.broadcast_object_list([None], 0, group=self.patient)
                raise
        dist.broadcast_object_list(told, 0, group=self.patient)
        if told[0] is None:  # the first says why
            raise SystemExit(LOST)
        return told[0][0]

    def close(self) -> None:
        if self.sharded:
            dist.destroy_process_group()


# Seconds that a rank waits for the others in a step, and for the first, which may prepare data or hash a large step; then it
# says so and ends. (One whose process died ends them at once: launch.py or torchrun see to it.)
TIMEOUT, PATIENCE = 300, 1800
LOST = 4  # exit code of a rank that misses another


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone."""
    words = "closed by peer", "reset by peer", "Broken pipe", "imed out", "Connection refused", "failed to connect"
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


# --- what FSDP2 calls ---


class Traffic:
    """Bytes that this rank has received, by "all-gather" and "reduce-scatter", of parameters and gradients; without the
    all-reduce between replicas."""

    def __init__(self) -> None:
        self.received = {"all-gather": 0, "reduce-scatter": 0}

    def note(self, what: str, whole: Tensor, ranks: int) -> None:
        self.received[what] += whole.nbytes * (ranks - 1) // ranks

    def __str__(self) -> str:
        return ", ".join(f"{size / 1e6:,.1f} MB by {what}s" for what, size in self.received.items())


class _Allocate:
    def __init__(self, traffic: Traffic):
        self.traffic = traffic

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Allocate, AllGather):
    """All-gather, counted."""

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.traffic.note("all-gather", output_tensor, group.size())
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class OrderedSum(_Allocate, ReduceScatter):
    """Reduce-scatter that adds in the order of ranks, counted: an all-to-all, then additions."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.traffic.note("reduce-scatter", input_tensor, group.size())
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        first, *others = received.view(group.size(), -1)
        output_tensor.copy_(first)
        for other in others:
            output_tensor.add_(other)


class Sum(_Allocate, ReduceScatter):
    """Reduce-scatter in the order of the library, counted."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.traffic.note("reduce-scatter", input_tensor, group.size())
        return dist.reduce_scatter_single(output_tensor, input_tensor, op, group=group, async_op=async_op)


REDUCTIONS = {"ordered": OrderedSum, "library": Sum}


class Rows:
    """The rows of a Linear's weight on this rank, and what is gathered of them: FSDP2 calls the two methods at its end.

    `module.recipe` decides what; when that changes, FSDP2 starts again with buffers of other sizes.
    """

    def __init__(self, module: Linear, param: FSDPParam, codes: bool, dtype: torch.dtype):
        self.module, self.param, self.dtype = module, param, dtype
        self.wanted = codes
        self.made: dict[str, QTensor] = {}
        self.layout: tuple = ()
        rows = self.rows
        rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = self.fsdp_pre_all_gather, self.fsdp_post_all_gather
        param._init_extensions()

    @property
    def rows(self) -> Tensor:
        """fp32 [O / ranks, I], the master."""
        return self.param.sharded_param._local_tensor

    @property
    def ranks(self) -> int:
        return self.param.mesh_info.shard_mesh_size

    def specs(self) -> dict[str, Spec | None]:
        """Of the operands that the weight is; without W^T where that has the codes of W."""
        if (recipe := self.module.recipe) is None:
            return {}
        shared = recipe.fprop.w == recipe.dgrad.w and (recipe.fprop.w is None or recipe.fprop.w.transposes)
        return {"fprop.w": recipe.fprop.w} | ({} if shared else {"dgrad.w": recipe.dgrad.w})

    def why_not(self) -> str:
        """Why codes cannot be made of these rows alone; empty if they can."""
        if (recipe := self.module.recipe) is None:
            return "in the compute dtype"
        if self.ranks == 1:
            return "one rank has all rows"
        if recipe.clip:
            return "clipping looks at the weight"
        for operand, spec in self.specs().items():
            if spec is None:
                continue
            if spec.ladder:
                return f"{operand} is chosen by the whole weight"
            if spec.keyed:
                return f"{operand} is rounded by chance"
            if spec.scale.history:
                return f"{operand} remembers amaxes"
            if spec.source == "fprop":
                return f"{operand} is quantised twice"
            turned = operand == "dgrad.w"
            if spec.block[turned] == -1 and not self.whole(spec):
                return f"{operand} has scales over all rows"
            if spec.scale.outer == "row" and turned:
                return f"{operand} has scales over all rows"
            try:
                O, I = len(self.module.weight), self.module.in_features
                if O % self.ranks:
                    return f"{O} rows on {self.ranks} ranks"
                check((I, O // self.ranks) if turned else (O // self.ranks, I), spec, operand)
            except ValueError as error:
                return f"cut over {self.ranks} ranks, {error}"
        return ""

    @staticmethod
    def whole(spec: Spec) -> bool:
        """Whether one scale spans the tensor, and so the rows of all ranks."""
        return spec.scale.outer == "tensor" or spec.block == (-1, -1)

    @property
    def narrow(self) -> bool:
        """Whether the weight in the compute dtype is all that a Linear needs of it."""
        recipe = self.module.recipe
        return recipe is None or (recipe.weights == "bf16" and self.dtype == torch.bfloat16)

    @property
    def codes(self) -> bool:
        return self.wanted and not self.why_not()

    def seen(self) -> dict[str, Tensor]:
        """Operand -> the rows as its quantiser takes them, contraction last."""
        rows = self.module._source(self.rows.detach())
        return {name: rows.t() if name == "dgrad.w" else rows for name, spec in self.specs().items() if spec}

    @torch.no_grad()
    def amaxes(self) -> list[Tensor]:
        """Of each operand that has one scale over the ranks."""
        keys = {name: self.module._keys(name, spec)[1] for name, spec in self.specs().items() if spec}
        return [
            rotated(x, spec, keys[name]).abs().amax().float()
            for name, x in self.seen().items()
            if self.whole(spec := self.specs()[name])
        ]

    @torch.no_grad()
    def make(self, amaxes: Iterable[Tensor]) -> None:
        """Quantise the rows, under these amaxes (an iterator, shared with the Linears to come)."""
        self.made = {}
        for name, x in self.seen().items():
            spec = self.specs()[name]
            held = next(amaxes) if self.whole(spec) else None
            if held is not None:  # (inf makes all of it NaN, on every rank)
                held = torch.where(held.isnan(), torch.inf, held)
            self.made[name] = quantize(x, spec, *self.module._keys(name, spec), held)

    # --- FSDP2's extension points ---

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """-> (what is gathered of these rows, [rows, ...] each; what the other end needs to know)."""
        if self.narrow and not self.codes:
            parts, told = [self.padded(self.rows.to(self.dtype))], [("copy", 1)]
        elif not self.codes:
            parts, told = [self.padded(self.rows)], None
        else:
            parts, told = [], []
            for name, spec in self.specs().items():
                tensors = self.stacked(name) if spec else [self.padded(self.rows.to(self.dtype))]
                told.append((name if spec else "copy", len(tensors)))
                parts += tensors
        layout = tuple((p.shape, p.dtype) for p in parts), told is None
        if layout != self.layout:
            self.layout, self.param.all_gather_outputs = layout, []
            vars(self.param).pop("_unsharded_param", None)
        return tuple(parts), told

    def padded(self, rows: Tensor) -> Tensor:
        """As many rows as the first rank has."""
        short = self.param.padded_sharded_param_size[0] - len(rows)
        return F.pad(rows, (0, 0, 0, short)) if short else rows

    def stacked(self, name: str) -> list[Tensor]:
        """The parts of codes that differ between ranks, rows of the weight first."""
        return [(part.t() if name == "dgrad.w" else part).contiguous() for part, cut in self.parts(name) if cut]

    def parts(self, name: str) -> list[tuple[Tensor | None, bool]]:
        """Codes, scales and outer scales of an operand, and which of them are cut over the ranks."""
        q = self.made[name]
        across = q.spec.block[name == "dgrad.w"] == -1  # one scale for all rows
        outer = q.outer_codes is not None and q.outer_codes.ndim > 0
        return [(q.packed_codes, True), (q.scale_codes, q.scale_codes is not None and not across), (q.outer_codes, outer)]

    def fsdp_post_all_gather(self, outputs, told, param_dtype, *, out=None):
        """The gathered parts -> the weight that Linear sees."""
        if told is None:
            return None if out is not None else (outputs[0], ())
        found, left = {}, list(outputs)
        for name, count in told:
            parts, left = left[:count], left[count:]
            if name == "copy":
                found[name] = parts[0][: self.param._orig_size[0]]
                continue
            given, turned = iter(parts), name == "dgrad.w"
            whole = [(next(given).t() if turned else next(given)) if cut else part for part, cut in self.parts(name)]
            O, I = self.param._orig_size
            found[name] = QTensor(*whole, self.made[name].spec, (I, O) if turned else (O, I))
        if out is not None:
            out.operands = found
            return None
        return Gathered(self.param._orig_size, self.rows.device, found), ()


class Whole:
    """A model on one rank. `parameters`: name -> what of each parameter is here, for the optimiser and for checkpoints."""

    def __init__(self, model: GPT):
        self.model = model
        self.parameters = dict(model.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def shape(self, name: str) -> torch.Size:
        """Of a parameter, all its rows."""
        return self.model.get_parameter(name).shape

    def rows(self, name: str) -> slice:
        """Which rows of a parameter are here."""
        return slice(None)

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """What is here of a tensor with the rows of a parameter."""
        return whole

    def once(self, work: Callable[[], T]) -> T:
        """`World.once`."""
        return work()

    def changed(self) -> None:
        """After every change of the weights."""
        # Fused optimisers leave the version counters alone (torch 2.13), by which Linears know that a weight has changed.
        torch.autograd.graph.increment_version(self.model.parameters())

    def assigned(self) -> None:
        """After every change of the recipes."""

    def last(self, yes: bool) -> None:
        """Whether gradients are summed over ranks after the next backward."""

    def gradients(self) -> None:
        """Give `parameters` their gradients, after the backward of a step; and ranks what each other remember."""

    def compiled(self) -> Callable[..., Tensor]:
        """The model's loss, compiled: as one."""
        return torch.compile(self.model.loss)

    @torch.no_grad()
    def put(self, name: str, x: Tensor) -> None:
        """Give a parameter, or what of it is here, its value, of which x is the whole."""
        self.parameters[name].copy_(x[self.rows(name)])

    def describe(self) -> list[str]:
        return []


class Shards(Whole):
    """A model on the meta device, cut over ranks and given memory. `parameters`: this rank's rows, plain fp32 tensors.

    Raises ValueError where weights or moments are kept in a way that needs more than the rows of a rank."""

    def __init__(self, model: GPT, world: World, whole: Config):
        config, compiled = whole.parallel, whole.train.compile == "model"
        if compiled and config.gather == "codes":  # (to the compiler a Gathered is no tensor: it would drop its gradients)
            raise ValueError("parallel.gather = 'codes' with train.compile = 'model': expected 'weights', or 'quantiser'")
        self.model, self.world, self.config, self.traffic = model, world, config, Traffic()
        self.updates = 0
        for what, spec in (("weights.store", whole.weights.store), ("optimizer.state", whole.optimizer.state)):
            spans = spec and spec.scale.format != "none" and (spec.block[0] != 1 or spec.scale.outer == "tensor")
            if spec and world.size > 1 and (spec.keyed or spans):
                raise ValueError(f"{what} = {spec.short()}: with several ranks it takes blocks of one row, rounded to nearest")
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = world.mesh if config.replicas > 1 else world.mesh["shard"]
        # Weights are let go after forward everywhere, also of the head, which backward begins with: between a step and an
        # evaluation in another precision nothing may be left of what was gathered.
        given = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
        blocks = list(model.blocks)
        groups = [*blocks, model]
        for group in groups:
            fully_shard(group, **given)
            group.set_custom_all_gather(Gather(self.traffic))
            group.set_custom_reduce_scatter(REDUCTIONS[config.reduction](self.traffic))
            group.set_force_sum_reduction_for_comms(True)
            group.set_gradient_divide_factor(1.0)
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + config.prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(i - config.prefetch, 0) : i][::-1])
        model.to_empty(device=world.device)
        if model.config.rope:
            model.rope = rope_table(model.config, world.device)
        found = [p for group in groups for p in group._get_fsdp_state()._fsdp_param_groups[0].fsdp_params]
        self.linears = {}
        for name, module in linears(model).items():
            (param,) = (p for p in found if p._module_info.module is module or module in p._module_info.shared_modules)
            module.stamp = lambda: self.updates
            if not (param._module_info.shared_modules or compiled):
                self.linears[name] = Rows(module, param, config.gather == "codes", model.dtype)
        self.parameters = {name: nn.Parameter(p._local_tensor) for name, p in model.named_parameters()}

    def rows(self, name: str) -> slice:
        whole, ranks, rank = self.shape(name)[0], self.world.mesh["shard"].size(), self.world.shard_rank
        each = -(-whole // ranks)
        return slice(min(rank * each, whole), min((rank + 1) * each, whole))

    def mine(self, name: str, whole: Tensor) -> Tensor:
        return whole[self.rows(name)].clone() if whole.ndim else whole  # (not a part of a larger memory)

    def compiled(self) -> Callable[..., Tensor]:
        """... each block for itself, between what FSDP2 does around it."""
        for block in self.model.blocks:
            block.compile()
        return self.model.loss

    def once(self, work: Callable[[], T]) -> T:
        return self.world.once(work)

    def changed(self) -> None:
        """Each rank quantises its rows, where codes are gathered."""
        self.updates += 1
        rows = [r for r in self.linears.values() if r.codes]
        amaxes = [a for r in rows for a in r.amaxes()]
        amaxes = iter(self.world.max(torch.stack(amaxes)).unbind() if amaxes else ())
        for r in rows:
            r.make(amaxes)

    def assigned(self) -> None:
        self.changed()

    def last(self, yes: bool) -> None:
        for module in [*self.model.blocks, self.model]:
            module.set_requires_gradient_sync(yes or self.config.accumulate == "cut", recurse=False)

    def gradients(self) -> None:
        for name, p in self.model.named_parameters():
            assert p.grad is not None, name
            self.parameters[name].grad, p.grad = p.grad._local_tensor, None
        # Of delayed scales and ladders: their largest of all micro-batches. By name: a checkpoint brings them in any order.
        state = [t for _, t in sorted(memory(self.model).items())]
        if state:
            merged = self.world.max(torch.cat([t.flatten() for t in state]))
            for t, found in zip(state, merged.split([t.numel() for t in state]), strict=True):
                t.copy_(found.view(t.shape))

    def describe(self) -> list[str]:
        """What is gathered how, for the console."""
        kinds: dict[str, list[str]] = {}
        for name, r in self.linears.items():
            how = "codes" if r.codes else str(r.dtype).removeprefix("torch.") if r.narrow else "fp32"
            why = f" ({r.why_not()})" if r.module.recipe and not r.codes and r.wanted else ""
            kinds.setdefault(f"{how}{why}", []).append(name)
        return [f"all-gathers move {how} of {len(names)} Linears, e.g. {names[0]}" for how, names in kinds.items()]


def clip(parameters: Iterable[nn.Parameter], limit: float, world: World) -> Tensor:
    """Scale gradients to a norm of at most `limit`; returns the norm before, fp32 [].

    In fp64, where the order of additions, which is another on other numbers of ranks, moves one norm in 10^8 or so."""
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()
    norm = world.sum_of_shards(squares).sqrt().to(torch.float32)
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
