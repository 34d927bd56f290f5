"""python train.py CONFIG [key=value ...] [--print] [--data]: the training loop, read from top to bottom.

    for each step:   for each micro-batch: loss.backward()      clip, AdamW      now and then: log, validate, save

fp32 masters, an explicit compute dtype, gradients summed in fp32. A step is `micro_batches` micro-batches; batch and noise
of each are functions of (seed, its global number), so what a step computes does not depend on what ran before it, and
continuing a run needs no generator state. Losses stay on the device until a logging step reads them: nothing else waits.

A non-finite loss or gradient freezes the weights on the device at once (every later update is skipped); the next log
finds it, runs the first bad step again with statistics on, and names the operands.

Several ranks run the same loop (parallel.py). Left out so far: other optimisers.
"""

import argparse
import ctypes
import math
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import plot
from configs import Config, dump, load
from data import Corpus, prepare, usage_lines
from model import GPT, flops_per_token, measure
from parallel import LOST, Shards, Whole, World, clip, lost, shared
from quant import WeightStore, assign, assign_sites, attach, decisions, fuse, kernel
from quant.context import Context
from quant.gemm import BACKENDS, backend_of, pick_mode
from quant.linear import GEMMS, linears
from quant.metrics import STATS
from quant.moments import AdamW
from quant.policy import first_step, switches, table, unquantized
from run import Run
from saving import Saver


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor. Given back to the system, as it does with large pieces, it returns a
    page fault at a time in every step: without this the tiny configs train 1.2 (NVFP4) and 1.3 times (BF16) slower."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: no piece is mapped alone
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# Of the largest inputs of Linears, a step: what an export scales activations by is of the last hundred steps or so, whenever
# earlier checkpoints were written. (A maximum since the last would depend on that, and one over the run would keep its start.)
FORGET = 0.99
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Stop(Exception):
    """The run ends here, early; the message says why, in one sentence."""


def learning_rate(config: Config, step: int) -> float:
    """Warm-up, stable, decay (WSD): linear up over the first share, flat, linear down to lr * final_lr at the last step."""
    t = config.train
    warmup, decay = t.warmup * t.steps, t.decay * t.steps
    up = min(1.0, (step + 1) / max(warmup, 1))
    down = min(1.0, max(0.0, (t.steps - 1 - step) / max(decay, 1)))
    return t.lr * min(up, t.final_lr + (1 - t.final_lr) * down)


def make_optimizer(parameters: Iterable[nn.Parameter], config: Config) -> AdamW:
    """AdamW that decays matrices only (of Mamba-2 also the taps of its convolution, as Megatron does, which spares what has one
    axis), and whose updates a flag on the device can stop (`found_inf`)."""
    t, parameters = config.train, list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, config.optimizer, t.seed, config.parallel.offload, lr=t.lr, betas=t.betas, eps=t.eps)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one 2048^3 matmul here and now, best of five: the stated denominator of the utilisation."""
    a = torch.ones(2048, 2048, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU makes when it gets there (from pageable memory the host would wait for it)."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def announce(config: Config, device: torch.device) -> None:
    """Print what multiplies the GEMMs of every recipe of the run. Raises ValueError if train.gemm names what cannot."""
    t = config.train
    with torch.device("meta"):
        model = GPT(config.model)
    attach(model, Context(backend=t.gemm if t.gemm in BACKENDS else "emulate"))
    for share in [0.0, *switches(config.policy)]:
        assign(model, config.recipes, config.policy, share)
        for module in linears(model).values():
            for name in GEMMS:
                module.backend(name, t.batch_size * config.model.seq_len, DTYPES[t.dtype], device)


class Trainer:
    def __init__(self, config: Config, run: Run, corpus: Corpus, world: World | None = None):
        t, world = config.train, world or World()
        self.config, self.run, self.corpus, self.world = config, run, corpus, world
        self.device = world.device
        self.mode, mode_line = pick_mode(t.gemm, self.device)
        self.dtype = DTYPES[t.dtype]
        print(fuse(t.compile == "quantiser"))
        kernel.round_by(t.rounding, self.device)
        specs = (spec for recipe in config.recipes.values() for spec in recipe.operands().values() if spec)
        print(*kernel.report(specs, self.device), mode_line, sep="\n")
        announce(config, self.device)
        backend = backend_of(t.gemm, self.device)
        self.how = f"emulate {self.mode}" if backend == "emulate" else backend
        self.share = world.share(config)
        with torch.device("meta") if world.sharded else nullcontext():
            model = GPT(config.model, self.dtype, t.recompute)
        self.shards = Shards(model, world, config) if world.sharded else Whole(model.to(self.device))
        model.initialise(t.seed, self.shards.put)
        self.model, self.optimizer = model, make_optimizer(self.shards.parameters.values(), config)
        self.context = Context(t.seed, self.mode, self.device, backend)
        self.context.decisions = {}
        self.context.amaxes = torch.zeros(len(linears(model)), device=self.device)
        attach(model, self.context)
        assign_sites(model, config.sites)
        self.store = WeightStore(self.shards.parameters, config.weights, t.seed)
        self.store.begin()
        self.loss = self.shards.compiled() if t.compile == "model" else model.loss
        self.bytes = torch.as_tensor(corpus.tokenizer.bytes_per_token, device=self.device)
        self.frozen = torch.zeros((), device=self.device)  # 1 from the first non-finite loss or gradient on
        self.optimizer.found_inf = self.frozen
        self.saver = Saver(self.shards, config, run.folder, corpus.tokenizer.path) if world.sharded else None
        self.policy: dict[str, str] = {}
        self.stopped_by = ""

    # --- one step ---

    def forward_backward(self, step: int) -> tuple[Tensor, Tensor]:
        """All micro-batches of a step -> (mean loss, bytes of the targets), on the device; gradients are left in place."""
        t = self.config.train
        total, size = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for i in self.share:
            number = step * t.micro_batches + i
            self.context.at(step, number)
            self.shards.last(i == self.share[-1])
            batch = self.corpus.batch("train", t.seed, number, t.batch_size, self.config.model.seq_len)
            x, y = (to_device(ids, self.device) for ids in batch)
            loss = self.loss(x, y)
            (loss / t.micro_batches).backward()
            total += loss.detach() / t.micro_batches
            size += self.bytes[y].sum().float()
        self.shards.gradients()
        total, size = self.world.sum(torch.stack([total, size]))
        return total, size

    def step(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss, bytes of the targets, gradient norm), all on the device."""
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.context.amaxes.mul_(self.forget)
        loss, size = self.forward_backward(step)
        norm = clip(self.shards.parameters.values(), self.config.train.clip, self.world)
        self.frozen.copy_(torch.maximum(self.frozen, (~(loss.isfinite() & norm.isfinite())).float()))
        self.store.keep()
        self.optimizer.step()
        self.store.put(step, self.frozen)
        self.shards.changed()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, size, norm

    def set_policy(self, step: int) -> None:
        """Recipes for this step; printed when they change."""
        config = self.config
        chosen = assign(self.model, config.recipes, config.policy, step / config.train.steps)
        if chosen != self.policy:
            noted = (module.recipe and module.recipe.fprop.x for module in linears(self.model).values())
            self.forget = torch.tensor([FORGET if x else 1.0 for x in noted], device=self.device)
            print(f"policy from step {step}:\n" + "\n".join("  " + line for line in table(chosen, config.recipes).splitlines()))
            others = [f"{name}  {spec}" for name, spec in config.sites.short().items()]
            print("".join(f"  {line}\n" for line in [*others, self.store.describe()] if line), end="")
            self.policy = chosen
            self.shards.assigned()
            print("".join(f"  {line}\n" for line in self.shards.describe()), end="")

    # --- measuring ---

    def validate(self) -> dict[str, float]:
        """Loss (nats a token) and bits per byte, as trained and with the same weights in the compute dtype."""
        t, found = self.config.train, {}
        stats, noted = self.context.stats, self.context.decisions
        self.context.stats = self.context.decisions = None
        for suffix, precision in (("", nullcontext()), ("_bf16", unquantized(self.model))):
            with precision:
                batches = list(self.corpus.val_batches(t.batch_size, self.config.model.seq_len, t.val_batches))
                count = len(batches)  # (a small split has fewer)
                given = self.model, self.world.some(batches, count), self.bytes, self.world.together(count)
                found["val_loss" + suffix], found["val_bpb" + suffix] = measure(*given)
        self.context.stats, self.context.decisions = stats, noted
        return found

    def statistics(self) -> dict[str, float | list[int]]:
        """What ladders have decided since the last log, and what Context.stats collected, as metrics."""
        found = decisions.metrics(self.model, self.context)
        for name, values in (self.context.stats or {}).items():
            found |= {f"quant/{name}/{key}": value for key, value in zip(STATS[:-1], values.tolist(), strict=False)}
        return {k: v for k, v in found.items() if isinstance(v, list) or math.isfinite(v)}

    def diagnose(self, step: int) -> str:
        """Run a step again (the weights are still those before it) with statistics on: its ten worst operands."""
        self.context.stats = {}
        self.set_policy(step)
        self.forward_backward(step)
        rows = [(name, dict(zip(STATS, v.tolist(), strict=True))) for name, v in self.context.stats.items()]
        sqnr = {name: r["sqnr_db"] if math.isfinite(r["sqnr_db"]) else -math.inf for name, r in rows}
        rows.sort(key=lambda row: (-row[1]["nonfinite"], sqnr[row[0]]))
        line = (
            "  {:32} {nonfinite:.0f} non-finite, SQNR {sqnr_db:.1f} dB, underflow {underflow:.1%}, scales up to {scale_max:.2e}"
        )
        return "\n".join(line.format(name, **r) for name, r in rows[:10]) or "  (no operand is quantised)"

    # --- the loop ---

    def save(self, step: int) -> Path:
        """A checkpoint after `step` finished steps."""
        amaxes = self.world.max(self.context.amaxes)
        state = {
            "tokens": step * self.config.tokens_per_step,
            "next_micro_batch": step * self.config.train.micro_batches,
            "progress": max(step - 1, 0) / self.config.train.steps,  # the policy of the last step done
            "policy": self.policy,
            "gemm": self.mode,
            "data_sha256": self.corpus.sha256,
            "amaxes": {name: a for name, a in zip(linears(self.model), amaxes.tolist(), strict=True) if a},
        }
        if self.saver:
            return self.saver.save(step, self.optimizer, self.store, state)
        run, path = self.config.run, self.corpus.tokenizer.path
        given = self.run.folder, step, self.model, self.optimizer, state, path, run.keep, self.store
        return checkpoint.save(*given, quantized=run.quantized)

    def train(self) -> dict[str, float]:
        """Steps run.start ... steps - 1. Returns the last metrics. Raises Stop when the run ends early."""
        t, every = self.config.train, self.config.run.checkpoint_every
        change = {self.run.start, *(first_step(share, t.steps) for share in switches(self.config.policy))}
        self.peak, self.began = matmul_peak(self.device, self.dtype), time.perf_counter()
        self.tick, self.timed_steps, self.timed = self.began, 0, 0.0
        first_traced, end_traced = map(int, (t.profile or "0:0").split(":"))
        unread, metrics = [], {}  # (loss, bytes, norm) of steps since the last log, still on the device
        with ExitStack() as tracing:
            for step in range(self.run.start, t.steps):
                if step == max(first_traced, self.run.start) and step < end_traced:
                    tracing.enter_context(self.traced())
                if step in change:
                    self.set_policy(step)
                done, last = step + 1, step + 1 == t.steps
                self.context.stats = {} if t.stats_every and done % t.stats_every == 0 else None
                unread.append(self.step(step))
                if done == end_traced:
                    tracing.close()
                validating = last or done % t.val_every == 0
                stopping = self.world.any(bool(self.stopped_by))
                saving = last or stopping or bool(every and done % every == 0)
                if validating or saving or self.context.stats or done % t.log_every == 0 or step == self.run.start:
                    metrics |= self.log(unread, done, validating, saving, stopping)
                    unread = []
        return metrics

    def log(
        self, unread: list[tuple[Tensor, ...]], done: int, validating: bool, saving: bool, stopping: bool
    ) -> dict[str, float]:
        """Read the losses, the one place where the host waits for the device; print, validate, write, save."""
        t, per_step = self.config.train, self.config.tokens_per_step
        values = torch.stack([torch.stack(v) for v in unread]).tolist()
        self.check_finite(values, done)
        now = time.perf_counter()
        if done > self.run.start + 1:  # the first step compiles
            self.timed_steps, self.timed = self.timed_steps + len(values), self.timed + now - self.tick
        loss, size, norm = (sum(column) / len(values) for column in zip(*values, strict=True))
        speed = self.timed_steps * per_step / self.timed if self.timed else 0.0
        left = int((t.steps - done) * per_step / speed) if speed else 0
        pace = f"{speed:7,.0f} tokens/s  left {left // 60}:{left % 60:02}" if speed else f"first step {now - self.tick:.0f} s"
        flops = speed * flops_per_token(self.config.model)
        metrics = {
            "step": done,
            "tokens": done * per_step,
            "loss": loss,
            "bpb": loss * per_step / size / math.log(2),
            "lr": learning_rate(self.config, done - 1),
            "grad_norm": norm,
            "tokens_per_s": speed,
            "time_s": now - self.began,
            "mem_gib": self.memory(),
            "tflops": flops / 1e12,
            "utilisation": flops / self.peak,  # of a 2048^3 matmul in the compute dtype, measured at the start
        }
        live = sys.stdout.isatty()  # there a line lies over the one before, which may be longer
        line = f"step {done:5}/{t.steps}  loss {loss:.4f}  bits/byte {metrics['bpb']:.4f}  {pace}"
        if "quant/share_tensors" in (statistics := self.statistics()):
            line += f"  chosen below 16 bits: {statistics['quant/share_tensors']:.1%}"
        print(f"{line:{90 * live}}", end="\r" if live and not (validating or saving) else "\n", flush=True)
        if validating:
            metrics |= (found := self.validate())
            print(
                f"           validation {found['val_loss']:.4f} ({found['val_bpb']:.4f} bits/byte) as trained, "
                f"{found['val_loss_bf16']:.4f} ({found['val_bpb_bf16']:.4f}) with the same weights in {t.dtype.upper()}"
            )
        self.run.write(metrics | statistics, losses=[v[0] for v in values])
        if saving:
            folder = self.save(done)
            if self.saver and (done == t.steps or stopping):
                self.saver.wait()
            if stopping and done < t.steps:
                again = f"the same command with run.name={self.run.folder.name} continues"
                raise Stop(f"{self.stopped_by or 'a signal to another rank'}: saved {folder} and stopped; {again}")
        self.tick = time.perf_counter()
        return metrics

    @contextmanager
    def traced(self) -> Iterator[None]:
        """A profiler trace of what runs inside, written into the run folder also when that ends early."""
        path = self.run.folder / f"profile_{self.config.train.profile.replace(':', '-')}.json"
        profiler = torch.profiler.profile()
        try:
            with profiler:
                yield
        finally:
            if self.world.first:
                profiler.export_chrome_trace(str(path))
            print(f"profile: {path} (for chrome://tracing or ui.perfetto.dev)")

    def check_finite(self, values: list[list[float]], done: int) -> None:
        """Raises Stop if one of the steps up to `done` had a non-finite loss or gradient norm."""
        bad = next((i for i, (loss, _, norm) in enumerate(values) if not (math.isfinite(loss) and math.isfinite(norm))), None)
        if bad is None:
            return
        if self.saver:
            self.saver.wait()
        step = done - len(values) + bad
        found = checkpoint.steps(self.run.folder)
        safe = (
            f"the last good checkpoint is {checkpoint.step_folder(self.run.folder, found[-1])}"
            if found
            else "no checkpoint yet"
        )
        print(f"\nthe ten worst operands of step {step + 1}, run again:\n{self.diagnose(step)}")
        loss, _, norm = values[bad]
        raise Stop(f"step {step + 1} is the first with a non-finite loss ({loss}) or gradient norm ({norm}); {safe}")

    def memory(self) -> float:
        """GiB: the peak of the device's allocator, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def finish(trainer: Trainer, metrics: dict[str, float]) -> None:
    """What a person wants to know at the end."""
    run, config, tokenizer = trainer.run, trainer.config, trainer.corpus.tokenizer
    texts = []
    for i in range(config.run.samples):
        ids = trainer.model.eval().sample([tokenizer.bos], config.run.sample_tokens, seed=i)
        texts.append(tokenizer.decode([t for t in ids if t != tokenizer.bos]))
    if not trainer.world.first:
        return
    if texts:
        (run.folder / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n")
        print("\nsamples:\n" + "\n".join(f"  | {' '.join(text.split())}" for text in texts))
    if trainer.world.sharded:
        print(f"\na rank received {trainer.shards.traffic}, validations and samples included")
    pictures = [path for path in (plot.loss(run.folder), plot.choices(run.folder)) if path]
    files = ["config.toml", "metrics.jsonl", *["samples.txt"] * bool(texts), f"step_{config.train.steps:06d}/"]
    other = "nvfp4" if set(trainer.policy.values()) == {"bf16"} else "bf16"
    next_one = f"make train CONFIG=configs/tiny-{other}.toml"
    dtype, utilisation = config.train.dtype.upper(), f"{metrics['utilisation']:.1%} of a 2048^3 matmul measured here"
    print(
        f"\nfinal validation loss {metrics['val_loss']:.4f} nats/token, {metrics['val_bpb']:.4f} bits/byte as trained; "
        f"{metrics['val_loss_bf16']:.4f} and {metrics['val_bpb_bf16']:.4f} in {dtype}\n"
        f"{metrics['tokens_per_s']:,.0f} tokens/s, {metrics['tflops']:.3f} TFLOP/s ({utilisation} in {dtype})\n\n"
        f"run folder   {run.folder}  ({', '.join(files)})\n"
        f"curves       {', '.join(map(str, pictures))}, or all runs: .venv/bin/tensorboard --logdir {run.folder.parent}\n"
        f"evaluate     make eval RUN={run.folder}\n"
        f"sample       make eval RUN={run.folder} ARGS='--sample \"My fellow citizens\"'\n"
        f"next         {next_one:45}the small run in {other.upper()}\n"
        "             make train ARGS='policy.tail.last=0'         NVFP4 in every block; configs/nvfp4.toml lists more"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train a model as a config says.", epilog="see README.md")
    parser.add_argument("config", help="a TOML file, e.g. configs/tiny-nvfp4.toml")
    parser.add_argument("override", nargs="*", default=[], help="key=value, e.g. train.steps=100 run.name=a")
    parser.add_argument("--print", action="store_true", help="write the resolved config and stop")
    parser.add_argument("--data", action="store_true", help="prepare the data and stop")
    args = parser.parse_intermixed_args(argv)
    config = load(args.config, args.override)
    if args.print:
        print(dump(config), end="")
        return 0
    if args.data:
        open_corpus(config)
        return 0
    keep_freed_memory()
    shared(config, int(os.environ.get("WORLD_SIZE", 1)))
    world = World(config.parallel.replicas)
    with closing(Run(config, argv, world)) as run:
        start(config, run, world)
    world.close()  # (not after an exception: the others would notice and end first, and be taken for the cause)
    return 0


def open_corpus(config: Config) -> Corpus:
    """Prepare the data if need be. Raises ValueError if the model cannot be trained on it."""
    corpus = Corpus(prepare(config.data), run=(config.train.steps, config.train.micro_batches * config.train.batch_size))
    if corpus.vocab_size > config.model.vocab_size:
        raise ValueError(f"the tokenizer has {corpus.vocab_size} tokens and model.vocab_size = {config.model.vocab_size}")
    corpus.check(config.model.seq_len)
    print(*usage_lines(corpus.usage(config.model.seq_len)), sep="\n")
    return corpus


def start(config: Config, run: Run, world: World) -> None:
    """Begin the run, or continue or branch from a checkpoint, and train to the end."""
    source, branch = world.once(lambda: (run.resume_from(), run.branch_from()))
    if not world.first:
        world.once(lambda: None)  # until the first has prepared it
    corpus = open_corpus(config)
    if world.first:
        world.once(lambda: None)
    trainer = Trainer(config, run, corpus, world)
    world.once(lambda: run.check_disk(checkpoint.size_estimate(trainer.model, trainer.optimizer, trainer.store)))
    step = 0
    if source or branch:
        state = checkpoint.restore(source or branch, trainer.shards, trainer.optimizer, trainer.store)
        amaxes = [state.get("amaxes", {}).get(name, 0.0) for name in linears(trainer.model)]  # (older steps have none)
        trainer.context.amaxes.copy_(torch.tensor(amaxes))
        if branch and not source:
            trainer.store.begin()  # another config's weights may lie off the grid
        folder, step = source or branch, state["step"]
        if state["data_sha256"] != corpus.sha256:
            was, now = state["data_sha256"][:12], corpus.sha256[:12]
            raise ValueError(f"{folder} was trained on other data (manifest sha256 {was}..., now {now}...)")
        print(f"run: {run.folder} " + ("continues" if source else "branches") + f" from {folder}, after step {step}")
    if step >= config.train.steps and not source:
        raise ValueError(f"run.init_from: {branch} has {step} steps, so train.steps = {config.train.steps} leaves none to do")
    if step >= config.train.steps:
        print(f"run: {run.folder} is finished, its {config.train.steps} steps are done; a new run needs another run.name")
        return
    trainer.set_policy(step)
    trainer.shards.changed()
    facts = {
        "command": ["train.py", *run.argv],
        "commit": run.commit(),
        "python": platform.python_version(),
        "versions": {m: sys.modules[m].__version__ for m in ("torch", "numpy", "pydantic", "safetensors")},
        "device": f"{trainer.device} ({platform.processor() or platform.machine()})",
        "threads": torch.get_num_threads(),
        "backend": {name: f"{trainer.how}: {recipe}" for name, recipe in trainer.policy.items()},
        "optimizer": trainer.optimizer.describe(),
        "ranks": world.size,
        "data": corpus.usage(config.model.seq_len),
    }
    run.open(step, facts)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"run: {run.folder}: {count:,} parameters, {config.tokens_per_step:,} tokens a step, {config.train.steps} steps")
    if config.optimizer.state or config.parallel.offload:
        print(f"optimizer: {trainer.optimizer.describe()}")

    def interrupted(number, frame):
        trainer.stopped_by = signal.Signals(number).name
        # A second one ends one process at once; ranks get it from a scheduler and again from what has started them, which kills
        # those that do not end.
        signal.signal(number, signal.SIG_IGN if world.sharded else signal.SIG_DFL)

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    finish(trainer, trainer.train())


if __name__ == "__main__":
    rank = os.environ.get("RANK")
    name = f"train.py, rank {rank}" if rank else "train.py"
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        if rank is not None:  # a signal that others have had may come while Python ends: killed by it, all would start again
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank in (None, "0"):
            print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(3 if "non-finite" in str(stop) else 0)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; it can be started again", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        # Most mistakes are of all ranks: the first says it, and what has started them ends the others meanwhile.
        if rank not in (None, "0"):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if rank is None or not lost(error):
            raise
        print(f"{name}: another rank is gone ({str(error).split('] ')[-1].split('.')[0]})", file=sys.stderr)
        sys.exit(LOST)
