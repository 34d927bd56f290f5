"""python evaluate.py RUN_OR_STEP [--windows N] [--exported DIR ...] [one of the questions below]: what a checkpoint is worth.

One table over the validation set (bits per byte, see model.measure), the same windows in each row:

    as trained     masters, quantised by the policy the checkpoint was saved under
    stored codes   quantized.safetensors alone: bitwise the row above, without the masters (left out where there is none)
    bf16           the same masters in the compute dtype
    DIR            a folder of export.py, as transformers loads it: the weights it holds, activations quantised as it says

and `difference`, the mean over windows of a row's loss minus that of bf16, with its paired standard error: much smaller than
that of either mean. Also written to evaluation.json in the step folder.

Or, instead of the table (evaluation/questions.py): --sample PROMPT, --tasks NAMES, --core-bundle DIR, --reproduce.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from data import Corpus, prepare
from evaluation import questions
from model import measure
from quant.policy import unquantized


def row(model, corpus: Corpus, count: int) -> dict:
    """{loss, bpb, each window's loss} over `count` windows of the validation set, evenly spread."""
    T = model.config.seq_len
    batches = list(corpus.val_batches(1, T, count))
    table = torch.as_tensor(corpus.tokenizer.bytes_per_token)
    losses = torch.tensor([measure(model, [batch], table)[0] for batch in batches])
    loss, bpb = measure(model, batches, table)
    return {"loss": loss, "bpb": bpb, "windows": losses}


class Exported(nn.Module):
    """A folder of export.py, as transformers loads it, for `measure`. Raises ValueError without one or without transformers."""

    def __init__(self, folder: Path, T: int):
        super().__init__()
        checkpoint.refuse_pickle(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"--exported {folder}: no folder that export.py has written, which has a config.json")
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ValueError("--exported needs transformers and compressed-tensors, as pyproject.toml pins them") from None
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.norm, self.config = self.model.model.norm, SimpleNamespace(seq_len=T)

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self.model(tokens).logits.to(torch.float32)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint; sample from it.")
    parser.add_argument("run", help="out/NAME or out/NAME/step_N")
    parser.add_argument("--windows", type=int, default=64, help="validation windows of seq_len tokens (default 64)")
    parser.add_argument("--exported", metavar="DIR", type=Path, action="append", default=[], help="... of this checkpoint too")
    questions.arguments(parser)
    args = parser.parse_args(argv)
    if args.windows < 2:
        raise ValueError("expected --windows of at least 2")
    questions.check(args)
    loaded = checkpoint.load_model(args.run)
    if loaded.tokenizer is None:
        raise ValueError(
            f"{loaded.folder} has no tokenizer (it was imported without one), so there is no text to evaluate it on"
        )
    print(f"{loaded.folder}: step {loaded.state['step']}, {loaded.state['tokens']:,} tokens")
    if questions.answer(args, loaded):
        return 0
    corpus = Corpus(prepare(loaded.config.data, quiet=True))
    if corpus.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise ValueError(f"{corpus.folder} was made with another tokenizer than {loaded.folder}")
    rows = {"as trained": row(loaded.model, corpus, args.windows)}
    try:
        rows["stored codes"] = row(checkpoint.load_model(args.run, "quantized").model, corpus, args.windows)
    except ValueError as error:
        print(f"stored codes are left out: {error}")
    with unquantized(loaded.model):
        rows["bf16"] = row(loaded.model, corpus, args.windows)
    for folder in args.exported:
        rows[str(folder)] = row(Exported(folder, loaded.config.model.seq_len), corpus, args.windows)
    width, base = max(14, *(len(name) + 1 for name in rows)), rows["bf16"]["windows"]
    print(f"{'':{width}}{'loss':>9}{'bits/byte':>11}{'difference to bf16':>24}")
    for name, found in rows.items():
        delta = found.pop("windows") - base
        error = float(delta.std()) / math.sqrt(len(delta))
        found |= {"difference": float(delta.mean()), "standard_error": error}
        shown = f"{found['difference']:+14.4f} +- {error:.4f}" if name != "bf16" else ""
        print(f"{name:{width}}{found['loss']:9.4f}{found['bpb']:11.4f}  {shown}")
    path = loaded.folder / "evaluation.json"
    path.write_text(json.dumps({"windows": args.windows, **rows}, indent=1))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nevaluate.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
