"""python export.py RUN_OR_STEP [--format F] [--layout L] [--out DIR]: a checkpoint as a Hugging Face folder (layouts.py).

    format    bf16        masters, rounded
              nvfp4       E2M1 in blocks of 16, E4M3 scales, one fp32 scale; activations too, by an amax
              nvfp4a16    ... weights alone                     mxfp8    E4M3 in blocks of 32, powers of two
              mixed       each matrix in the narrowest of these that has no fewer bits than most of its elements have
    layout    compressed-tensors, which transformers and vLLM read, or modelopt, the same bytes by other names

A Linear that the run has in BF16 stays so; where it quantises no weight, those with a recipe, or else all but the head, are
quantised now. One that the run trained in the format is exported by the codes of the checkpoint, bit for bit; another is
quantised again from its master, to nearest, and the model card says with what error. The query, key and value of a layer, and
gate and up, are one matrix here, so they share scale and format, as fused kernels need.

The amax of an activation is the largest that training has lately quantised (state.json), or, where that is not known, measured
now over windows of the training set. What the target has no place for lies in narrow/: tokenizer.model, config.toml and
state.json of the step, and of a ladder (MoR) which block of which matrix had which format, mor.safetensors.

The folder is written beside its place and renamed: it is whole or not there. It is not fsynced, since it can be made again.
What has no such form is refused: quantised norm gains, scores or residuals; weights in a rotated basis, unless as bf16.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
from configs import Config
from data import Corpus, prepare
from data.hf_tokenizer import tokenizer_config, tokenizer_json
from data.sources import ORIGINS
from layouts import LAYOUTS, SPECS, architecture, compressed_config, form_of, modelopt_config, parts, written
from model import GPT
from plot import lines_of
from quant import QTensor, quantize
from quant.encode import check
from quant.linear import Linear, linears
from quant.mixed import Mixed
from quant.policy import table

FORMATS = "bf16", "nvfp4", "nvfp4a16", "mxfp8", "mixed"
OURS = "narrow"  # the folder of what only narrow reads, by which an export is known


# --- what is written of a matrix ---


def wanted(model: GPT, form: str) -> dict[str, str]:
    """Linear -> "bf16", "nvfp4" or "mxfp8"."""
    modules = linears(model)
    trained = {name: bool(m.recipe and m.recipe.fprop.w) for name, m in modules.items()}
    if not any(trained.values()):  # a forward pass in BF16, at last (nvfp4.toml) or always
        trained = {name: bool(m.recipe) for name, m in modules.items()}
    if not any(trained.values()):
        trained = {name: name != "head" for name in modules}
    found = {}
    for name, module in modules.items():
        if form == "bf16" or not trained[name] or (name == "head" and model.config.tied_head):
            found[name] = "bf16"
        else:
            found[name] = nearest(module) if form == "mixed" else form.removesuffix("a16")
    return found


def nearest(module: Linear) -> str:
    """The narrowest of the formats that has no fewer bits than most elements of a matrix have in the checkpoint."""
    q, bits = module.quantized_weight(), 16
    if q is not None:
        made = list(q.parts.values()) if isinstance(q, Mixed) else [q]
        bits = max(made, key=lambda part: prod(part.shape)).spec.element.bits
    return "nvfp4" if bits <= 4 else "mxfp8" if bits <= 8 else "bf16"


def coded(module: Linear, form: str) -> tuple[QTensor, str]:
    """A matrix [O, I] in that format: its own codes, if it has been trained in it, or new ones; and where they are from."""
    spec = module.recipe.fprop.w if module.recipe else None
    if (module.recipe and module.recipe.rotate) or (spec and spec.hadamard):
        raise ValueError(f"{module.name}: its weight is quantised in a rotated basis, which {form} has no place for; use bf16")
    if spec is not None and form_of(spec) == form:
        return module.quantized_weight(), "the codes of training"
    w = module.weight.detach()
    check(w.shape, SPECS[form], f"{module.name} as {form}")
    q = quantize(w, SPECS[form])
    return q, f"quantised again from the master, relative error {float((q.dequantize() - w).norm() / w.norm()):.4f}"


def trained_in(module: Linear, kept: str) -> str:
    """What training multiplied as a weight, in words. kept: what weights are in where no spec quantises them."""
    if (q := module.quantized_weight()) is None:
        return kept
    if isinstance(q, Mixed):
        return f"{q.spec.short()}, of its elements " + " and ".join(f"{s:.1%} {n}" for n, s in q.shares().items())
    return f"{module.recipe.fprop.w.short()}, all of it {q.spec.short()}" if module.recipe.fprop.w.ladder else q.spec.short()


def choices(model: GPT) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of each matrix of a ladder: uint8 [blocks along O, blocks along I], which candidate a block has ([1, 1] where all of it
    has one), and metadata: the candidates by number and the size of a block."""
    tensors, said = {}, {}
    for name, module in linears(model).items():
        spec, q = module.recipe and module.recipe.fprop.w, module.quantized_weight()
        if spec and spec.ladder:
            one = isinstance(q, QTensor)
            tensors[name] = torch.tensor([[spec.candidates.index(q.spec)]], dtype=torch.uint8) if one else q.index
            unit = q.shape if one else spec.unit
            said[name] = json.dumps({"block": list(unit), "candidates": [each.short() for each in spec.candidates]})
    return tensors, said


# --- the largest inputs ---


@torch.no_grad()
def largest_inputs(model: GPT, corpus: Corpus, windows: int) -> dict[str, float]:
    """Linear -> the largest magnitude of its input over windows of the training set."""
    found = dict.fromkeys(linears(model), 0.0)

    def see(name: str) -> Callable:
        def hook(module, args) -> None:
            found[name] = max(found[name], float(args[0].abs().amax()))

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in linears(model).items()]
    for number in range(windows):
        model(corpus.batch("train", 0, number, 1, model.config.seq_len)[0])
    for hook in hooks:
        hook.remove()
    return found


def amaxes_of(loaded: checkpoint.Loaded, names: list[str], windows: int) -> tuple[dict[str, float], str]:
    """The amaxes of the inputs of these Linears, and where they are from. Raises ValueError for one that no scale maps."""
    known, origin = loaded.state.get("amaxes", {}), "of the largest inputs that training has lately quantised"
    if missing := [name for name in names if name not in known]:
        known = largest_inputs(loaded.model, Corpus(prepare(loaded.config.data, quiet=True)), windows) | known
        many = "Linears" if len(missing) == len(names) else f"{len(missing)} Linears of {len(names)}"
        measured = f"of the largest inputs over {windows} windows of the training set, measured at export"
        origin = measured + f", since training has none of {many}" if many == "Linears" else f"{origin}, for {many} {measured}"
    found = {name: known[name] for name in names}
    if bad := [name for name, a in found.items() if not (a > 0 and math.isfinite(448 * 6 / a))]:
        raise ValueError(
            f"{bad[0]}: the largest input is {found[bad[0]]}, which gives no scale; export weights alone (nvfp4a16)"
        )
    return found, origin


# --- the folder ---


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes it at the end, or is deleted. An older `out` is there until then."""
    temporary, old = (out.with_name(f".{word}_{out.name}") for word in ("writing", "old"))

    def settle() -> None:
        """Put right what was interrupted, by a kill too: the older folder has its place again."""
        if old.exists() and not out.exists():
            os.replace(old, out)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)

    settle()
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    finally:
        settle()


def replaceable(out: Path) -> None:
    """Raises ValueError if there is something that is no export."""
    if out.exists() and not (out.is_dir() and ((out / OURS).is_dir() or not any(out.iterdir()))):
        raise ValueError(f"--out {out}: there is something that export.py has not written, so nothing was; name another folder")


def export(run: str, form: str, layout: str, out: Path | None, windows: int, shard: str = "5GB") -> Path:
    """Write the folder -> where it is. Raises ValueError for what the format cannot say, before anything is written."""
    loaded = checkpoint.load_model(run)
    model, c, tokenizer, store = loaded.model, loaded.model.config, loaded.tokenizer, loaded.config.weights
    config = architecture(c)
    out = out or loaded.folder.parent / "export" / (form if form == "bf16" else f"{form}-{layout}")
    replaceable(out)
    for name, q in checkpoint.codes(loaded.folder).items():
        linears(model)[name].use(q)
    if sites := [name for name, spec in vars(loaded.config.sites).items() if spec]:
        raise ValueError(f"sites.{sites[0]} is quantised, which no architecture there has; export a run without it")
    forms = wanted(model, form)
    if form != "bf16" and set(forms.values()) == {"bf16"}:
        raise ValueError(f"{run}: no Linear is in {form}, since all are in 16 bits; export it as bf16, or name nvfp4 or mxfp8")
    activations = form not in ("nvfp4a16", "bf16")
    four = [name for name, each in forms.items() if each == "nvfp4" and activations]
    amaxes, origin = amaxes_of(loaded, four, windows) if four else ({}, "")
    if "measured" in origin:
        print(f"scales of activations are {origin}")
    kept = f"{store.store.short()}, in which its weights are kept" if store.store else "BF16"
    tensors: dict[str, Tensor] = {}
    modules: dict[str, list[str]] = {each: [] for each in ("bf16", *SPECS)}
    lines = []
    for name, module in linears(model).items():
        names = parts(name, c)
        if name == "head" and c.tied_head:
            if module.recipe and module.recipe.fprop.w:
                lines.append(f"lm_head: BF16, as the embedding that it is; trained in {trained_in(module, kept)}")
            continue
        modules[forms[name]] += names
        together = ", which are one matrix in narrow" if len(names) > 1 else ""
        trained = f"{', '.join(names)}{together}: trained in {trained_in(module, kept)}; {forms[name]} here, "
        if forms[name] == "bf16":
            tensors |= {f"{there}.weight": module.weight[rows].to(torch.bfloat16) for there, rows in names.items()}
            lines += [trained + "the master, rounded"] * bool(module.recipe and module.recipe.fprop.w)
            continue
        q, words = coded(module, forms[name])
        lines.append(trained + words)
        for there, rows in names.items():
            tensors |= {f"{there}.{key}": t for key, t in written(q, rows, layout, amaxes.get(name)).items()}
    for name, p in model.named_parameters():
        if not any(name == f"{each}.weight" for each in linears(model)):
            tensors |= {f"{there}.weight": p.to(torch.bfloat16) for there in parts(name.removesuffix(".weight"), c)}
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    files = {}
    if form != "bf16" and layout == "modelopt":
        files["hf_quant_config.json"], config["quantization_config"] = modelopt_config(modules, activations)
    elif form != "bf16":
        config["quantization_config"] = compressed_config(modules, activations)
    if tokenizer:
        bos, eos = tokenizer.bos, tokenizer.model.eos_id()
        config |= {"bos_token_id": bos, "eos_token_id": eos}
        # A document has no end of its own in training: it ends where the next begins.
        ends = {"bos_token_id": bos, "eos_token_id": [eos, bos], "pad_token_id": eos}
        files["generation_config.json"] = ends | {"do_sample": True, "temperature": 0.8}
    map_of_choices, candidates = choices(model)
    with whole(out) as place:
        (place / OURS).mkdir()
        for name, content in {"config.json": config, **files}.items():
            (place / name).write_text(json.dumps(content, indent=1))
        if tokenizer:
            (place / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
            (place / "tokenizer_config.json").write_text(tokenizer_config(tokenizer, c.seq_len))
            shutil.copyfile(tokenizer.path, place / OURS / "tokenizer.model")
        shutil.copyfile(checkpoint.config_file(loaded.folder), place / OURS / "config.toml")
        shutil.copyfile(loaded.folder / "state.json", place / OURS / "state.json")  # by which make eval knows its exports
        if map_of_choices:
            save_file(map_of_choices, place / OURS / "mor.safetensors", metadata=candidates)
        save_torch_state_dict(tensors, place, max_shard_size=shard, metadata={"format": "pt"})
        for file in place.rglob("*.safetensors"):
            shutil.copymode(place / "config.json", file)  # (safetensors writes files that nobody else may read)
        lines += [f"{OURS}/mor.safetensors: which format each block of each matrix had"] * bool(map_of_choices)
        (place / "README.md").write_text(card(loaded, form, layout, lines, origin), encoding="utf-8")
    return out


# --- the model card ---

SNIPPET = """
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this page lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
tokens = tokenizer("My fellow", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=16)[0], skip_special_tokens=True))
```
"""


def losses_of(loaded: checkpoint.Loaded) -> tuple[str, list[str]]:
    """(where they are from, a line for each): evaluation.json of the step, else the last validation of training before it."""

    def line(name: str, loss: float, bpb: float) -> str:
        return f"* {name}: {loss:.4f} nats/token, {bpb:.4f} bits/byte"

    evaluation, metrics = loaded.folder / "evaluation.json", loaded.folder.parent / "metrics.jsonl"
    found = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
    if rows := {name: row for name, row in found.items() if isinstance(row, dict) and {"loss", "bpb"} <= row.keys()}:
        return "`make eval`", [line(name, row["loss"], row["bpb"]) for name, row in rows.items()]
    every = lines_of(loaded.folder.parent) if metrics.is_file() else []
    seen = [m for m in every if "val_loss" in m and m["step"] <= loaded.state["step"]]
    if not seen:
        return "", []
    last = seen[-1]
    lines = [line("as trained", last["val_loss"], last["val_bpb"])]
    lines += [line("the same weights in BF16", last["val_loss_bf16"], last["val_bpb_bf16"])] * ("val_loss_bf16" in last)
    return f"training after step {last['step']}", lines


def card(loaded: checkpoint.Loaded, form: str, layout: str, lines: list[str], origin: str) -> str:
    """README.md of the folder."""
    state, config, facts = loaded.state, loaded.config, loaded.folder.parent / "run.json"
    run = json.loads(facts.read_text()) if facts.is_file() else {}
    source, losses = losses_of(loaded)
    texts = [one.source for one in config.data.texts.values()]
    text = [
        *("---", "library_name: transformers", "tags: [narrow]", "---", ""),
        f"# {loaded.folder.parent.name}, step {state['step']}, as {form}" + f" ({layout})" * (form != "bf16"),
        "",
        f"Trained with narrow{' at commit ' + run['commit'] if 'commit' in run else ''} on {state['tokens']:,} tokens of "
        f"{' and '.join(texts)} (sha256 of the manifest {state['data_sha256'][:12] or 'unknown'}).",
        *(f"The text {text}: {ORIGINS.get(text, 'of an origin and licence that narrow does not know')}." for text in texts),
        "",
        *([f"    python {' '.join(run['command'])}", ""] if "command" in run else []),
        f"Validation loss, from {source}:" if losses else "It was not evaluated before it was exported.",
        *losses,
        *("", "## Recipes", "", "```", *table(state["policy"], config.recipes).splitlines(), *others(config), "```", ""),
        *("## What is in the files", ""),
        "fp32 masters, rounded to BF16, but for what is named here.",
        *("", *(f"* {line}" for line in lines), "") * bool(lines),
        *([f"Scales of activations are {origin}.", ""] if origin else []),
    ]
    if layout == "modelopt" and form != "bf16":
        text += ["vLLM and SGLang document this layout of ModelOpt; transformers does not read it.", ""]
    elif loaded.tokenizer:
        text += ["## How to load it", SNIPPET]
    return "\n".join(text)


def others(config: Config) -> list[str]:
    """Lines about what is quantised outside of Linears."""
    store = config.weights.store
    return [f"weights are kept in {store.short()}: {', '.join(config.weights.match)}"] if store else []


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("run", help="out/NAME or out/NAME/step_N")
    parser.add_argument("--format", choices=FORMATS, default="mixed")
    parser.add_argument("--layout", choices=LAYOUTS, default="compressed-tensors")
    parser.add_argument("--out", type=Path, help="default: out/NAME/export/FORMAT-LAYOUT")
    parser.add_argument("--windows", type=int, default=16, help="of the training set, where amaxes are measured (default 16)")
    parser.add_argument("--shard", default="5GB", help="the largest file (default 5GB)")
    args = parser.parse_args(argv)
    if args.windows < 1:
        raise ValueError(f"--windows {args.windows}: expected at least 1")
    out = export(args.run, args.format, args.layout, args.out, args.windows, args.shard)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}; {size:,} bytes of weights")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nexport.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
