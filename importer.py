"""python importer.py DIR [--out RUN]: a Hugging Face folder (layouts.py) as a run that evaluate.py and export.py take.

    config.json                        -> config.toml: sizes, and for each Linear a recipe of the formats found, of fprop alone
    BF16, or codes * scales            -> the masters, fp32; q, k, v and gate, up become one matrix
    codes, scales                      -> quantized.safetensors, as they are
    outer scales, input_global_scale   -> amaxes held in place of those of weights and inputs, as a history of a step has it
    narrow/ of an export of ours       -> tokenizer.model, and from config.toml its [data]

load_model(RUN, "quantized") has the very codes. load_model(RUN), which quantises the masters again, has the same values where
block scales were made as they are here; one line says of how many matrices. Of others' tokenizer.json no SentencePiece model
can be made: then the run has no tokenizer, and is good for logits only.

Everything is checked before anything is written, and the run appears whole or not at all. Left out: other architectures and
formats, pickles, weights whose q, k and v differ in format.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import AdamW

import checkpoint
from configs import Config, RunConfig, check, dump, load
from data import DataConfig, Tokenizer
from export import OURS, whole
from layouts import SPECS, amax_of, model_config, parts, quantises_inputs, read
from model import GPT, ModelConfig
from quant import QTensor, Recipe, Rule, Scale, assign, attach
from quant.context import Context
from quant.linear import linears
from quant.recipe import Fprop

HELD = replace(SPECS["nvfp4"], scale=Scale(history=1))
ROWS = replace(SPECS["nvfp4"], scale=Scale(outer="row"))  # where q, k and v have outer scales of their own


class Files:
    """Tensors of model.safetensors, or of the files that model.safetensors.index.json names. Raises ValueError if one is
    missing or no such file."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else [single.name]
        if not index.is_file() and not single.is_file():
            raise ValueError(f"{folder} has no model.safetensors (pickles are not read)")
        self.files, self.place = [], {}
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing, which {index.name} names")
            try:
                file = safe_open(folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / name} is no whole safetensors file: {error}") from None
            self.files.append(file)
            self.place |= dict.fromkeys(file.keys(), file)
        missing = sorted(_json(index)["weight_map"].keys() - self.place.keys()) if index.is_file() else []
        if missing:
            raise ValueError(f"{folder}: {missing[0]} is in none of the files, and {index.name} names it")
        self.left = set(self.place)

    def of(self, name: str) -> dict[str, Tensor]:
        """ "weight", ... of a module."""
        found = [key for key in self.place if key.rpartition(".")[0] == name]
        self.left -= set(found)
        return {key.rpartition(".")[2]: self.place[key].get_tensor(key) for key in found}


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


class Matrix:
    """One of ours, from its parts: `form`, `q` or fp32 `values`, and the amax of its input or None."""

    def __init__(self, name: str, c: ModelConfig, files: Files, k: int):
        found = {}
        for there, rows in parts(name, c).items():
            found[there] = read(there, files.of(there), rows.stop - rows.start, k)
        forms = {there: form for there, (form, _, _) in found.items()}
        if len(set(forms.values())) > 1:
            raise ValueError(f"{', '.join(f'{there} is {form}' for there, form in forms.items())}: they are one matrix here")
        self.form = next(iter(forms.values()))
        made = [each for _, each, _ in found.values()]
        amaxes = [amax for _, _, amax in found.values() if amax is not None]
        self.amax = max(amaxes, default=None)
        self.apart = len(set(amaxes)) > 1
        self.q = None if self.form == "bf16" else joined(made)
        self.values = torch.cat(made) if self.q is None else self.q.dequantize()


def joined(parts_: list[QTensor]) -> QTensor:
    """One above the other; with an outer scale of each row where theirs differ, and in squares where their scales are."""
    first, shape = parts_[0], (sum(q.shape[0] for q in parts_), parts_[0].shape[1])
    codes, scale = (torch.cat([getattr(q, key) for q in parts_]) for key in ("packed_codes", "scale_codes"))
    spec, outer = HELD if first.spec == SPECS["nvfp4"] else first.spec, first.outer_codes
    if outer is not None and not all(torch.equal(q.outer_codes, outer) for q in parts_):
        spec, outer = ROWS, torch.cat([q.outer_codes.expand(q.shape[0], 1) for q in parts_])
    elif not shape[0] % (n := spec.block[1]) and torch.equal(scale, scale[::n].repeat_interleave(n, 0)):
        spec, scale = replace(spec, block=(n, n)), scale[::n].contiguous()
    return QTensor(codes, scale, outer, spec, shape)


def recipe_of(matrix: Matrix, mx_inputs: bool) -> tuple[str, Recipe]:
    """(name, recipe) of a matrix that is quantised."""
    inputs = (HELD if matrix.amax else None) if matrix.form == "nvfp4" else (SPECS["mxfp8"] if mx_inputs else None)
    square = matrix.q.spec.block[0] > 1
    name = matrix.form + "a16" * (inputs is None) + "-rows" * (matrix.q.spec == ROWS) + "-squares" * square
    return name, Recipe(Fprop(inputs, matrix.q.spec))


def reconstructed(c: ModelConfig, data: DataConfig, chosen: dict[str, str], recipes: dict[str, Recipe]) -> Config:
    """The config of a run that has these recipes: the commonest for all, the others by name."""
    names = list(chosen.values())
    common = max(dict.fromkeys(names), key=names.count)
    rules = [Rule(recipe, name) for name, recipe in chosen.items() if recipe != common]
    return Config(run=RunConfig(), data=data, model=c, recipes=recipes, policy=(*rules, Rule(common)))


def data_of(folder: Path, tokenizer: Tokenizer | None, c: ModelConfig) -> DataConfig:
    """The data of the run that was exported; else those that configs have by default."""
    if (config := folder / OURS / "config.toml").is_file():
        return load(config).data
    size = tokenizer.vocab_size if tokenizer else min(4096, c.vocab_size // 128 * 128)
    return DataConfig(vocab_size=max(size, 384))


@torch.no_grad()
def import_(folder: Path, out: Path) -> list[str]:
    """Write the run `out` -> lines about it. Raises ValueError for what cannot be, before anything is written."""
    if out.exists():
        raise ValueError(f"--out {out} exists; name another run, and nothing is overwritten")
    found, c = _json(folder / "config.json"), None
    outer = _json(folder / "hf_quant_config.json") if (folder / "hf_quant_config.json").is_file() else {}
    quantisation = found.get("quantization_config") or {}
    try:
        c = model_config(found)
        mx_inputs = bool(quantisation or outer) and quantises_inputs(quantisation, outer)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{folder / 'config.json'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    files = Files(folder)
    model = GPT(c).eval()
    matrices, chosen, recipes = {}, {}, {}
    for name, module in linears(model).items():
        if name == "head" and c.tied_head:
            files.of("lm_head")  # (some write it all the same)
            chosen[name] = "bf16"
            continue
        matrices[name] = matrix = Matrix(name, c, files, module.in_features)
        chosen[name] = "bf16"
        if matrix.q is not None:
            chosen[name], recipe = recipe_of(matrix, mx_inputs)
            recipes[chosen[name]] = recipe
        module.weight.copy_(matrix.values)
    for name, p in model.named_parameters():
        if (owner := name.removesuffix(".weight")) not in linears(model):
            (there,) = parts(owner, c)
            rows, k = p.shape if p.ndim == 2 else (1, p.shape[0])
            tensors = {key: t.reshape(1, -1) if p.ndim == 1 else t for key, t in files.of(there).items()}
            form, values, _ = read(there, tensors, rows, k)
            if form != "bf16":
                raise ValueError(f"{there} is {form}, and only Linears are quantised here")
            p.copy_(values.view(p.shape))
    if left := sorted(name for name in files.left if not name.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"{folder}: {left[0]} is no tensor of {found['model_type']!r} as model.py has it ({len(left)} such)")
    path = folder / OURS / "tokenizer.model"
    tokenizer = Tokenizer.load(path) if path.is_file() else None
    config = reconstructed(c, data_of(folder, tokenizer, c), chosen, recipes)
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{folder}: no config of narrow has these sizes: {error}") from None
    with whole(out) as place:
        (place / "config.toml").write_text(dump(replace(config, source=str(folder))))
        again = _step(place, model, config, matrices, chosen, path if tokenizer else None)
    quantised = sum(matrix.q is not None for matrix in matrices.values())
    lines = [f"{quantised} of {len(chosen)} matrices are quantised ({', '.join(sorted(recipes)) or 'none'}), the rest BF16"]
    lines += [f"masters, quantised again, have the stored values in {again} of them"] * bool(quantised)
    if apart := [name for name, matrix in matrices.items() if matrix.apart]:
        lines.append(f"inputs of {len(apart)} matrices have several scales, of which the one of the largest amax is taken")
    if not tokenizer:
        lines.append(f"no tokenizer: {folder} has no {OURS}/tokenizer.model, and none can be made from tokenizer.json")
    return lines


def _step(
    run: Path,
    model: GPT,
    config: Config,
    matrices: dict[str, Matrix],
    chosen: dict[str, str],
    tokenizer: Path | None,
) -> int:
    """Write step 0 of a run -> of how many quantised matrices the masters, quantised again, have the stored values."""
    attach(model, Context())
    assign(model, config.recipes, config.policy)
    again, modules, amaxes = 0, linears(model), {}
    for name, matrix in matrices.items():
        if matrix.amax:
            amaxes[name] = matrix.amax
            modules[name].hold("fprop.x", matrix.amax)
        if matrix.q is not None and matrix.q.spec.scale.history:
            modules[name].hold("fprop.w", float(amax_of(matrix.q.global_scale)))
        if matrix.q is not None:
            again += torch.equal(modules[name].quantized_weight().dequantize(), matrix.values)
            modules[name].use(matrix.q)
    state = {"tokens": 0, "next_micro_batch": 0, "progress": 0.0, "policy": chosen, "gemm": "bf16", "data_sha256": ""}
    checkpoint.save(run, 0, model, AdamW(model.parameters()), state | {"amaxes": amaxes}, tokenizer, 1)
    return again


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with config.json and safetensors")
    parser.add_argument("--out", type=Path, help="the run to write (default out/NAME, of the folder's name)")
    args = parser.parse_args(argv)
    out = args.out or Path("out") / args.folder.resolve().name
    lines = import_(args.folder, out)
    print(f"written to {out}: a run of one step, from {args.folder}", *lines, sep="\n  ")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nimporter.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"importer.py: {error}", file=sys.stderr)
        sys.exit(2)
