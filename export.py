"""python export.py RUN_OR_STEP [--format F] [--layout L] [--out DIR]: a checkpoint as a Hugging Face folder.

    format    bf16        masters, rounded
              nvfp4       E2M1 in blocks of 16, E4M3 scales, one fp32 scale; activations too, by an amax that is measured
              nvfp4a16    ... weights alone                     mxfp8    E4M3 in blocks of 32, powers of two
              mixed       each matrix in the one of these that is nearest to what the run trained it in
    layout    compressed-tensors, which transformers and vLLM read, or modelopt, the same bytes by other names

A Linear that the run has in BF16 stays so; where the run quantises none, all but the head are quantised now. One that the run
trained in the format is exported by its codes, bit for bit; another is quantised again from its master, to nearest, and the
model card says with what error. The query, key and value of a layer, and gate and up, are one matrix here, so they share scale
and format, as fused kernels need.

    squared ReLU    ArceeForCausalLM        SwiGLU    LlamaForCausalLM        the architectures that compute what model.py does

What has no such form is refused: quantised norm gains, scores or residuals; weights in a rotated basis, unless as bf16. Left
out: key-value caches in FP8, architectures with code of their own.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

import checkpoint
from data import Corpus, prepare
from data.hf_tokenizer import tokenizer_config, tokenizer_json
from model import GPT, ModelConfig
from quant import QTensor, QuantSpec, Scale, quantize
from quant.linear import Linear, linears
from quant.native import Kind, kind, line_scales

FORMATS = "bf16", "nvfp4", "nvfp4a16", "mxfp8", "mixed"
LAYOUTS = "compressed-tensors", "modelopt"
SPECS = {"nvfp4": QuantSpec(), "mxfp8": QuantSpec("e4m3", (1, 32), Scale("e8m0"))}
KINDS = {Kind("e2m1", "nv"): "nvfp4", Kind("e4m3", "mx"): "mxfp8"}


# --- the architecture ---


def architecture(c: ModelConfig) -> dict:
    """config.json of the model that computes the same."""
    name = {"relu2": "arcee", "swiglu": "llama"}[c.activation]
    return {
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "model_type": name,
        "hidden_size": c.d_model,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": {"relu2": "relu2", "swiglu": "silu"}[c.activation],
        "max_position_embeddings": c.seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "rope_theta": c.rope_base,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def parts(name: str, c: ModelConfig) -> dict[str, slice]:
    """A parameter or Linear of ours -> its names there, and the rows of each."""
    if name in ("embedding", "norm", "head"):
        return {{"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[name]: slice(None)}
    _, number, rest = name.split(".", 2)
    layer, kv = f"model.layers.{number}", c.kv_heads * c.head_dim
    q, rows = c.heads * c.head_dim, slice(None)
    qkv = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, None)}
    ffn = {"up_proj": rows} if c.activation == "relu2" else {"gate_proj": slice(0, c.ffn), "up_proj": slice(c.ffn, None)}
    found = {
        "attn_norm": {"input_layernorm": rows},
        "ffn_norm": {"post_attention_layernorm": rows},
        "attn.qkv": {f"self_attn.{p}_proj": each for p, each in qkv.items()},
        "attn.out": {"self_attn.o_proj": rows},
        "ffn.up": {f"mlp.{p}": r for p, r in ffn.items()},
        "ffn.down": {"mlp.down_proj": rows},
    }[rest]
    return {f"{layer}.{there}": each for there, each in found.items()}


# --- what is written of a matrix ---


def wanted(model: GPT, form: str) -> dict[str, str]:
    """Linear -> "bf16", "nvfp4" or "mxfp8"."""
    trained = {name: bool(m.recipe and m.recipe.fprop.w) for name, m in linears(model).items()}
    if not any(trained.values()):
        trained = {name: name != "head" for name in trained}
    found = {}
    for name, module in linears(model).items():
        if form == "bf16" or not trained[name] or (name == "head" and model.config.tied_head):
            found[name] = "bf16"
        elif form == "mixed":
            found[name] = nearest(module)
        else:
            found[name] = form.removesuffix("a16")
    return found


def nearest(module: Linear) -> str:
    """The format of these that has no fewer bits than what the run trains a matrix in."""
    spec = module.recipe.fprop.w if module.recipe else None
    bits = 16 if spec is None else max(each.element.bits for each in spec.candidates)
    return "nvfp4" if bits <= 4 else "mxfp8" if bits <= 8 else "bf16"


def coded(module: Linear, form: str) -> tuple[QTensor, str]:
    """A matrix [O, I] in that format: its own codes, if it has been trained in it, or new ones; and a line about it."""
    spec = module.recipe.fprop.w if module.recipe else None
    if (module.recipe and module.recipe.rotate) or (spec and spec.hadamard):
        raise ValueError(f"{module.name}: its weight is quantised in a rotated basis, which {form} has no place for; use bf16")
    if spec is not None and not spec.ladder and KINDS.get(kind(spec)) == form and min(spec.block) > 0:
        return module.quantized_weight(), "the codes of training"
    w = module.weight.detach()
    q = quantize(w, SPECS[form])
    error = float((q.dequantize() - w).norm() / w.norm())
    was = "BF16" if spec is None else spec.short()
    return q, f"quantised again from the master (trained in {was}), relative error {error:.4f}"


def compressed(q: QTensor, rows: slice, form: str) -> dict[str, Tensor]:
    """Tensors of compressed-tensors: W = code * weight_scale / weight_global_scale."""
    scale = line_scales(q)[rows].contiguous()
    if form == "mxfp8":
        return {"weight": q.packed()[rows].contiguous().view(torch.float8_e4m3fn), "weight_scale": scale}
    outer = {"weight_global_scale": (1 / q.global_scale).reshape(1)}
    return {"weight_packed": q.packed()[rows].contiguous(), "weight_scale": scale.view(torch.float8_e4m3fn), **outer}


def modelopt(q: QTensor, rows: slice, form: str) -> dict[str, Tensor]:
    """Those of ModelOpt: W = code * weight_scale * weight_scale_2."""
    found = compressed(q, rows, form)
    if form == "mxfp8":
        return found
    outer = {"weight_scale_2": q.global_scale.reshape(()).clone()}
    return {"weight": found["weight_packed"], "weight_scale": found["weight_scale"], **outer}


# --- what is written of all ---


def group(form: str, targets: list[str], activations: bool) -> dict:
    """A config group of compressed-tensors."""
    four = form == "nvfp4"
    made = {
        "num_bits": 4 if four else 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if four else "group",
        "group_size": 16 if four else 32,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn" if four else "torch.uint8",
        "zp_dtype": "torch.float8_e4m3fn" if four else "torch.uint8",
    }
    return {
        "targets": targets,
        "format": "nvfp4-pack-quantized" if four else "mxfp8-quantized",
        "weights": made,
        "input_activations": made | {"dynamic": "local" if four else True} if activations else None,
        "output_activations": None,
    }


def compressed_config(modules: dict[str, list[str]], activations: bool) -> dict:
    """modules: format -> names."""
    groups = [group(form, modules[form], activations) for form in ("nvfp4", "mxfp8") if modules[form]]
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": modules["bf16"],
        "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
    }


SIZES = {"nvfp4": 16, "mxfp8": 32}
ALGORITHMS = {"nvfp4": "NVFP4", "mxfp8": "MXFP8"}


def modelopt_config(modules: dict[str, list[str]], activations: bool) -> tuple[dict, dict]:
    """hf_quant_config.json, and `quantization_config` of config.json."""
    producer = {"name": "narrow", "version": "0.1.0"}
    used = [form for form in SIZES if modules[form]]
    name = {form: "W4A16_NVFP4" if form == "nvfp4" and not activations else ALGORITHMS[form] for form in used}
    mixed = len(used) > 1
    algorithm = "MIXED_PRECISION" if mixed else name[used[0]]
    found = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if mixed:
        each = {m: {"quant_algo": name[form], "group_size": SIZES[form]} for form in used for m in modules[form]}
        found["quantized_layers"] = each
    else:
        found |= {"group_size": SIZES[used[0]], "exclude_modules": modules["bf16"]}
    groups = {}
    for form in used:
        numbers = {"dynamic": False, "num_bits": 4 if form == "nvfp4" else 8, "type": "float", "group_size": SIZES[form]}
        targets = modules[form] if mixed else ["Linear"]
        groups[f"group_{len(groups)}"] = {
            "targets": targets,
            "weights": numbers,
            **({"input_activations": numbers} if activations else {}),
        }
    inner = {"quant_method": "modelopt", "quant_algo": algorithm, "config_groups": groups, "ignore": modules["bf16"]}
    return {"producer": producer, "quantization": found}, inner | {"producer": producer}


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


def export(run: str, form: str, layout: str, out: Path | None, windows: int, shard: str = "5GB") -> Path:
    """Write the folder -> where it is. Raises ValueError for what the format cannot say, before anything is written."""
    loaded = checkpoint.load_model(run)
    model, c = loaded.model, loaded.model.config
    if sites := [name for name, spec in vars(loaded.config.sites).items() if spec]:
        raise ValueError(f"sites.{sites[0]} is quantised, which no architecture there has; export a run without it")
    forms = wanted(model, form)
    out = out or loaded.folder.parent / "export" / (form if form == "bf16" else f"{form}-{layout}")
    if form != "bf16" and set(forms.values()) == {"bf16"}:
        raise ValueError(f"{run}: no Linear is in {form}; export it as bf16")
    activations = form != "nvfp4a16" and form != "bf16"
    inputs = (
        largest_inputs(model, Corpus(prepare(loaded.config.data, quiet=True)), windows) if "nvfp4" in forms.values() else {}
    )
    write = {"compressed-tensors": compressed, "modelopt": modelopt}[layout]
    tensors: dict[str, Tensor] = {}
    modules: dict[str, list[str]] = {each: [] for each in ("bf16", "nvfp4", "mxfp8")}
    lines = []
    for name, module in linears(model).items():
        if name == "head" and c.tied_head:
            continue
        names = parts(name, c)
        modules[forms[name]] += names
        if forms[name] == "bf16":
            tensors |= {f"{there}.weight": module.weight[rows].to(torch.bfloat16) for there, rows in names.items()}
            continue
        q, words = coded(module, forms[name])
        lines.append(f"{', '.join(names)}: {forms[name]}, {words}")
        for there, rows in names.items():
            tensors |= {f"{there}.{key}": t for key, t in write(q, rows, forms[name]).items()}
            if forms[name] == "nvfp4" and activations:
                multiplier = torch.tensor([448 * 6 / inputs[name]], dtype=torch.float32)
                scale = (
                    {"input_global_scale": multiplier}
                    if layout == "compressed-tensors"
                    else {"input_scale": (1 / multiplier)[0]}
                )
                tensors |= {f"{there}.{key}": t for key, t in scale.items()}
    for name, p in model.named_parameters():
        if not any(name == f"{each}.weight" for each in linears(model)):
            tensors |= {f"{there}.weight": p.to(torch.bfloat16) for there in parts(name.removesuffix(".weight"), c)}
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    config = architecture(c)
    if form != "bf16" and layout == "modelopt":
        outer, config["quantization_config"] = modelopt_config(modules, activations)
        (out / "hf_quant_config.json").write_text(json.dumps(outer, indent=1))
    elif form != "bf16":
        config["quantization_config"] = compressed_config(modules, activations)
    tokenizer = loaded.tokenizer
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.model.eos_id()}
    (out / "config.json").write_text(json.dumps(config | ends, indent=1))
    (out / "generation_config.json").write_text(json.dumps(ends | {"do_sample": True, "temperature": 0.8}, indent=1))
    (out / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(tokenizer_config(tokenizer, c.seq_len))
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_torch_state_dict(tensors, out, max_shard_size=shard, metadata={"format": "pt"})
    (out / "README.md").write_text(card(loaded, form, layout, lines, windows if inputs and activations else 0))
    return out


def card(loaded: checkpoint.Loaded, form: str, layout: str, lines: list[str], windows: int) -> str:
    """The model card."""
    state, evaluation = loaded.state, loaded.folder / "evaluation.json"
    found = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
    losses = [
        f"* {name}: {row['loss']:.4f} nats/token, {row['bpb']:.4f} bits/byte"
        for name, row in found.items()
        if name != "windows"
    ]
    recipes = sorted(set(state["policy"].values()))
    text = [
        f"# {loaded.folder.parent.name}, step {state['step']}, as {form} ({layout})",
        "",
        f"Trained with narrow on {state['tokens']:,} tokens of {loaded.config.data.source}, sha256 "
        f"{state['data_sha256'][:12]}, with recipes {', '.join(recipes)}.",
        "",
        "Validation loss (evaluation.json of the checkpoint):" if losses else "Not evaluated before it was exported.",
        *losses,
        "",
        *(["Matrices that are not BF16:", "", *(f"* {line}" for line in lines), ""] if lines else []),
    ]
    if windows:
        text += [f"Scales of activations are of the largest inputs over {windows} windows of the training set.", ""]
    return "\n".join(text)


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("run", help="out/NAME or out/NAME/step_N")
    parser.add_argument("--format", choices=FORMATS, default="mixed")
    parser.add_argument("--layout", choices=LAYOUTS, default="compressed-tensors")
    parser.add_argument("--out", type=Path, help="default: out/NAME/export/FORMAT-LAYOUT")
    parser.add_argument("--windows", type=int, default=16, help="of the training set, for scales of activations (default 16)")
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
        print("\nexport.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
