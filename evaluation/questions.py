"""What evaluate.py answers instead of its table: the options, and what each of them prints and writes.

    --sample PROMPT        texts that continue a prompt; may be repeated [--tokens N --temperature T --top-p P --seed S]
    --tasks a,b,x.jsonl    tasks of lm-eval -> tasks.json         [--task-dir DIR --limit N --online --exported DIR]
    --core-bundle DIR      DCLM CORE -> core.json                 [--limit N]
    --reproduce            batch sizes, threads, precisions -> reproduce.json [--batches 1,2,4,8 --threads 1,2 --tokens N]

The files lie in the step folder, and are written when everything has been answered. `--models` says of which models tasks and
CORE are asked: trained (as the policy quantises), stored (from quantized.safetensors alone), bf16 (nothing quantised).
"""

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

import checkpoint
from checkpoint import Loaded, written
from configs import near
from data import Corpus, prepare
from model import GPT
from quant.policy import unquantized

MODELS = {"trained": "as trained", "stored": "stored codes", "bf16": "bf16"}


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--sample", metavar="PROMPT", action="append", help="continue this text; may be repeated")
    add("--tokens", type=int, metavar="N", help="tokens a sample (default 128), or a text of --reproduce (default 64)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    add(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens that have this share (default 1)"
    )
    add("--seed", type=int, default=0)
    add("--tasks", metavar="NAMES", help="lm-eval tasks: names, files of JSON lines, separated by commas")
    add("--task-dir", metavar="DIR", type=Path, help="more tasks: a folder of lm-eval's YAML files")
    add("--online", action="store_true", help="lm-eval's own tasks too, whose data it downloads")
    add("--limit", type=int, metavar="N", help="documents a task")
    add("--core-bundle", metavar="DIR", type=Path, help="DCLM CORE, from a folder with core.yaml")
    add(
        "--models",
        default="trained,bf16",
        metavar="NAMES",
        help="of tasks and CORE: trained, stored, bf16 (default trained,bf16)",
    )
    add("--reproduce", action="store_true", help="do logits and greedy texts depend on batch size and threads?")
    add("--batches", default="1,2,4,8", metavar="SIZES", help="of --reproduce (default 1,2,4,8); the largest is the prompts")
    add("--threads", metavar="COUNTS", help="of --reproduce (default 1 and all cores)")


def check(args: Namespace) -> None:
    """Raises ValueError for numbers that mean nothing, before anything is loaded."""
    if args.tokens is not None and args.tokens < 1 or args.temperature < 0:
        raise ValueError("expected --tokens of at least 1, --temperature of at least 0")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: expected at least 1")
    for name in args.models.split(","):
        if name not in MODELS:
            raise ValueError(f"--models {name}: no such model{near(name, MODELS)}")
    args.batches, default = numbers("--batches", args.batches), sorted({1, os.cpu_count() or 1})
    args.threads = numbers("--threads", args.threads) if args.threads else default


def numbers(option: str, text: str) -> list[int]:
    found = text.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in found):
        raise ValueError(f"{option} {text}: expected whole numbers from 1, separated by commas")
    return [int(n) for n in found]


def asked(args: Namespace) -> list[Callable[[Namespace, Loaded], None]]:
    """What is asked; nothing if it is the table alone."""
    all_ = (args.sample, sample), (args.tasks, tasks), (args.core_bundle, core), (args.reproduce, reproduced)
    return [ask for wanted, ask in all_ if wanted]


def answer(args: Namespace, loaded: Loaded) -> None:
    for ask in asked(args):
        ask(args, loaded)


def models(args: Namespace, loaded: Loaded) -> Iterator[tuple[str, GPT]]:
    """The models that are asked for, by the names of the table, each as it is while the caller has it."""
    for name in dict.fromkeys(args.models.split(",")):
        model = checkpoint.load_model(loaded.folder, "quantized").model if name == "stored" else loaded.model
        with unquantized(model) if name == "bf16" else nullcontext():
            yield MODELS[name], model


def write(loaded: Loaded, name: str, found: dict) -> None:
    print(f"written to {written(loaded.folder / name, json.dumps({'step': loaded.state['step'], **found}, indent=1))}")


def corpus_of(loaded: Loaded) -> Corpus:
    """The checkpoint's data. Raises ValueError if it was made with another tokenizer."""
    corpus = Corpus(prepare(loaded.config.data, quiet=True))
    if corpus.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise ValueError(f"{corpus.tokenizer.path} is another tokenizer than that of {loaded.folder}")
    return corpus


# --- the questions ---


def sample(args: Namespace, loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    for prompt in args.sample:
        ids = tokenizer.encode(prompt, bos=True)
        ids = loaded.model.sample(ids, args.tokens or 128, args.temperature, args.seed, args.top_p, end=tokenizer.bos)
        print(f"\n{tokenizer.decode([i for i in ids if i != tokenizer.bos])}")


def tasks(args: Namespace, loaded: Loaded) -> None:
    from evaluation import harness

    names = args.tasks.split(",")
    metadata = {"corpus": corpus_of(loaded).val_folders} if "heldout_bpb" in names else None
    load, rows = harness.load_tasks(names, args.task_dir, metadata, args.online), {}
    load()  # before anything is computed
    exported = {str(folder): harness.exported_model(folder, loaded.config.model.seq_len) for folder in args.exported}
    for name, model in models(args, loaded):
        rows[name] = harness.run(harness.checkpoint_model(model, loaded.tokenizer), load, args.limit)
    for name, model in exported.items():
        rows[name] = harness.run(model, load, args.limit)
    print("\n".join(harness.table(rows)))
    write(loaded, "tasks.json", {"limit": args.limit, **{name: [r._asdict() for r in rows[name]] for name in rows}})


def core(args: Namespace, loaded: Loaded) -> None:
    from evaluation import core

    bundle, found = core.read(args.core_bundle), {}
    for name, model in models(args, loaded):
        print(f"{name}\n{core.HEAD}")
        given = model, lambda text: loaded.tokenizer.encode(text, bos=True), model.config.seq_len
        results = core.evaluate(bundle, *given, args.limit, print)
        found[name] = {"core": core.core(results), "tasks": [r._asdict() for r in results]}
        print(f"CORE {found[name]['core']:.4f}, the mean of {len(results)} tasks\n")
    write(loaded, "core.json", {"limit": args.limit, **found})


def reproduced(args: Namespace, loaded: Loaded) -> None:
    from evaluation import reproduce

    T, count = loaded.config.model.seq_len, max(args.batches)
    corpus, length = corpus_of(loaded), T // 2
    windows = torch.cat([x for x, _ in corpus.val_batches(1, T, count)])
    tokens = min(args.tokens or 64, T - length)
    rows = reproduce.reproduce(loaded.model, windows[:, :length], tokens, args.batches, args.threads)
    print("\n".join(reproduce.table(rows, tokens, len(windows))))
    shape = {"prompts": len(windows), "prompt_tokens": length, "tokens": tokens}
    write(loaded, "reproduce.json", {**shape, "rows": [r._asdict() for r in rows]})
