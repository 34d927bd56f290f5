"""What Hugging Face folders hold, read and written: names and config of a model, codes and scales of a matrix.

    embedding, norm, head               model.embed_tokens, model.norm, lm_head
    blocks.i.   attn_norm, ffn_norm     model.layers.i.   input_layernorm, post_attention_layernorm
                attn.qkv, attn.out                        self_attn.{q,k,v}_proj one above the other, self_attn.o_proj
                ffn.up, ffn.down                          mlp.up_proj (SwiGLU: gate_proj above it), mlp.down_proj

    squared ReLU    ArceeForCausalLM        SwiGLU    LlamaForCausalLM        the architectures that compute what model.py does

They compute it with roundings in other places: norms round to BF16 before the gain, cos and sin are BF16. A matrix M [O, I] is

                            nvfp4: uint8 [O, I / 2], e4m3 [O, I / 16], fp32      mxfp8: e4m3 [O, I], uint8 [O, I / 32]
    compressed-tensors      M.weight_packed, M.weight_scale, M.weight_global_scale [1]      M.weight, M.weight_scale
                            W = code * weight_scale / weight_global_scale                   W = weight * 2^(weight_scale - 127)
    ModelOpt                M.weight, M.weight_scale, M.weight_scale_2 []                   the same
                            W = code * weight_scale * weight_scale_2
    NVFP4 activations       M.input_global_scale [1] = 2688 / amax; ModelOpt: M.input_scale [] = amax / 2688

Two E2M1 codes share a byte, the even one low. Sources: compressed-tensors 0.20, ModelOpt 0.47. Left out: key-value caches in
FP8, architectures with code of their own, hybrids (Nemotron-H), other formats of either library.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import ModelConfig
from quant import QTensor, QuantSpec, Scale
from quant.choice import Spec
from quant.native import Kind, kind, line_scales

LAYOUTS = "compressed-tensors", "modelopt"
SPECS = {"nvfp4": QuantSpec(), "mxfp8": QuantSpec("e4m3", (1, 32), Scale("e8m0"))}
SIZES = {form: spec.block[1] for form, spec in SPECS.items()}
TENSORS = {
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_scale_2",
    "input_global_scale",
    "input_scale",
}
LARGEST = 448 * 6  # E4M3's by E2M1's


def form_of(spec: Spec) -> str | None:
    """The format whose tensors hold the codes and scales of a spec as they are, or None. A scale of rows, or a factor over
    powers of two, has no place in them."""
    if spec.ladder or min(spec.block) < 1:
        return None
    form = {Kind("e2m1", "nv"): "nvfp4", Kind("e4m3", "mx"): "mxfp8"}.get(kind(spec))
    fits = spec.scale.outer == ("tensor" if form == "nvfp4" else "none") and spec.scale.multiplier == 1
    return form if fits else None


# --- the architecture ---


def architecture(c: ModelConfig) -> dict:
    """config.json of the model that computes the same. Raises ValueError if there is none."""
    if c.pattern or not c.rope:
        what = f"model.pattern = {c.pattern!r}" if c.pattern else "model.rope = false"
        raise ValueError(f"{what}: an export is an Arcee or a Llama, of transformer blocks with rotary positions")
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


def model_config(found: dict) -> ModelConfig:
    """... and back, with the defaults of those architectures. Raises ValueError for one that computes something else."""
    name = found.get("model_type")
    if name not in ("llama", "arcee"):
        raise ValueError(f"model_type is {name!r}, expected 'llama' or 'arcee', which compute what model.py does")
    right, length, eps = {"llama": ("silu", 2048, 1e-6), "arcee": ("relu2", 4096, 1e-5)}[name]
    if (act := found.get("hidden_act", right)) != right:
        raise ValueError(f"hidden_act is {act!r}, expected {right!r} of {name!r}")
    for key in ("attention_bias", "mlp_bias"):
        if found.get(key):
            raise ValueError(f"{key} is true, and Linears have no bias here")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default"))
    if turned != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rotary positions are {rope}, expected rope_type 'default' over whole heads, without scaling")
    try:
        heads = found["num_attention_heads"]
        return ModelConfig(
            blocks=found["num_hidden_layers"],
            d_model=found["hidden_size"],
            ffn=found["intermediate_size"],
            heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or found["hidden_size"] // heads,
            vocab_size=found["vocab_size"],
            seq_len=found.get("max_position_embeddings", length),
            activation="swiglu" if name == "llama" else "relu2",
            tied_head=found.get("tie_word_embeddings", False),
            rope_base=float(rope.get("rope_theta") or found.get("rope_theta") or 10000.0),
            norm_eps=found.get("rms_norm_eps", eps),
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]!r}") from None


def parts(name: str, c: ModelConfig) -> dict[str, slice]:
    """A parameter or Linear of ours -> its names there, and the rows of each."""
    d, q, kv = slice(0, c.d_model), c.heads * c.head_dim, c.kv_heads * c.head_dim
    around = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    if name in around:
        return {around[name]: d if name == "norm" else slice(0, c.vocab_size)}
    _, number, rest = name.split(".", 2)
    gated = {"mlp.gate_proj": slice(0, c.ffn), "mlp.up_proj": slice(c.ffn, 2 * c.ffn)}
    found = {
        "attn_norm": {"input_layernorm": d},
        "ffn_norm": {"post_attention_layernorm": d},
        "attn.qkv": {
            "self_attn.q_proj": slice(0, q),
            "self_attn.k_proj": slice(q, q + kv),
            "self_attn.v_proj": slice(q + kv, q + 2 * kv),
        },
        "attn.out": {"self_attn.o_proj": d},
        "ffn.up": gated if c.activation == "swiglu" else {"mlp.up_proj": slice(0, c.ffn)},
        "ffn.down": {"mlp.down_proj": d},
    }[rest]
    return {f"model.layers.{number}.{there}": rows for there, rows in found.items()}


# --- the tensors of a matrix ---


def _near(guess: Tensor, made: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """A float x within two of `guess` with made(x) == wanted, if there is one, else `guess`: fl(1 / fl(1 / x)) may not be x."""
    up, down = (torch.full_like(guess, torch.inf), torch.full_like(guess, -torch.inf))
    above, below = guess.nextafter(up), guess.nextafter(down)
    tries = guess, above, below, above.nextafter(up), below.nextafter(down)
    return next((x for x in tries if torch.equal(made(x), wanted)), guess)


def _multiplier(scale: Tensor) -> Tensor:
    """A decode scale -> a multiplier whose reciprocal it is, bit for bit where there is one."""
    return _near(1 / scale, lambda m: 1 / m, scale)


def _input_tensor(amax: Tensor, layout: str) -> Tensor:
    multiplier = torch.full_like(amax, LARGEST) / amax
    return multiplier.reshape(1) if layout == "compressed-tensors" else 1 / multiplier.reshape(())


def amax_of(scale: Tensor) -> Tensor:
    """A decode scale -> the amax that gives it (quant/scaling.py), bit for bit where there is one."""
    return _near(LARGEST * scale, lambda a: _input_tensor(a, "modelopt"), scale)


def written(q: QTensor, rows: slice, layout: str, amax: float | None) -> dict[str, Tensor]:
    """Some rows of a matrix in `form_of(q.spec)` -> its tensors. amax: of its input, for NVFP4 activations."""
    scale, codes = line_scales(q)[rows].contiguous(), q.packed()[rows].contiguous()
    if form_of(q.spec) == "mxfp8":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    scale, outer = scale.view(torch.float8_e4m3fn), q.global_scale
    if layout == "modelopt":
        found = {"weight": codes, "weight_scale": scale, "weight_scale_2": outer.reshape(()).clone()}
    else:
        found = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": _multiplier(outer).reshape(1)}
    if amax is not None:
        name = {"compressed-tensors": "input_global_scale", "modelopt": "input_scale"}[layout]
        found[name] = _input_tensor(torch.tensor(amax, dtype=torch.float32), layout)
    return found


def read(name: str, tensors: dict[str, Tensor], rows: int, k: int) -> tuple[str, QTensor | Tensor, float | None]:
    """The tensors "weight", ... of a matrix [rows, k] -> ("bf16", "nvfp4" or "mxfp8"; codes and scales, or fp32 values; the
    amax of its input where it has one). Raises ValueError for tensors of no layout."""

    def take(key: str, dtype: torch.dtype, *shape: int) -> Tensor:
        if key not in tensors:
            raise ValueError(f"{name}.{key} is missing")
        t = tensors[key]
        if t.dtype != dtype or tuple(t.shape) != shape:
            was, want = (f"{str(d).removeprefix('torch.')} {list(s)}" for d, s in ((t.dtype, t.shape), (dtype, shape)))
            raise ValueError(f"{name}.{key} is {was}, expected {want}")
        return t

    if unknown := sorted(tensors.keys() - TENSORS):
        raise ValueError(f"{name}.{unknown[0]}: no tensor of a matrix without bias, in BF16, NVFP4 or MXFP8")
    weight = tensors.get("weight")
    if "weight_packed" not in tensors and (weight is None or weight.dtype in (torch.bfloat16, torch.float16, torch.float32)):
        if extra := sorted(tensors.keys() - {"weight"}):
            raise ValueError(f"{name}.{extra[0]}: expected a weight in BF16 alone, or all tensors of NVFP4 or MXFP8")
        return "bf16", take("weight", torch.bfloat16 if weight is None else weight.dtype, rows, k).to(torch.float32), None
    if weight is not None and weight.dtype == torch.float8_e4m3fn:
        codes, scale = take("weight", torch.float8_e4m3fn, rows, k), take("weight_scale", torch.uint8, rows, k // 32)
        return "mxfp8", QTensor(codes.view(torch.uint8), scale, None, SPECS["mxfp8"], (rows, k)), None
    theirs = "weight_packed" in tensors
    codes = take("weight_packed" if theirs else "weight", torch.uint8, rows, k // 2)
    scale = take("weight_scale", torch.float8_e4m3fn, rows, k // 16)
    outer = 1 / take("weight_global_scale", torch.float32, 1)[0] if theirs else take("weight_scale_2", torch.float32)
    layout, key = ("compressed-tensors", "input_global_scale") if theirs else ("modelopt", "input_scale")
    amax = None
    if key in tensors:
        given = take(key, torch.float32, *[1] * theirs)
        near = _near(LARGEST / given.reshape(()), lambda a: _input_tensor(a, layout), given) if theirs else amax_of(given)
        amax = float(near)
    return "nvfp4", QTensor(codes, scale.view(torch.uint8), outer.clone(), SPECS["nvfp4"], (rows, k)), amax


# --- what config.json says of them ---


def _group(form: str, targets: list[str], activations: bool) -> dict:
    """A config group of compressed-tensors."""
    four = form == "nvfp4"
    made = {
        "num_bits": 4 if four else 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if four else "group",
        "group_size": SIZES[form],
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
    """`quantization_config` of config.json. modules: format -> names."""
    groups = [_group(form, modules[form], activations) for form in SIZES if modules[form]]
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": modules["bf16"],
        "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
    }


def modelopt_config(modules: dict[str, list[str]], activations: bool) -> tuple[dict, dict]:
    """hf_quant_config.json, and `quantization_config` of config.json."""
    producer = {"name": "narrow", "version": "0.1.0"}
    used = [form for form in SIZES if modules[form]]
    name = {"nvfp4": "NVFP4" if activations else "W4A16_NVFP4", "mxfp8": "MXFP8"}
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


def quantises_inputs(config: dict, outer: dict) -> bool:
    """Whether MXFP8 inputs are quantised too, from `quantization_config` of config.json, or hf_quant_config.json where ModelOpt
    has written no other. Raises ValueError for what is neither BF16, NVFP4 nor MXFP8 of a known layout."""
    method = config.get("quant_method") or ("modelopt" if outer else None)
    if method == "modelopt":
        inside = outer.get("quantization", {})
        algorithm = config.get("quant_algo") or inside.get("quant_algo")
        if algorithm not in ("NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"):
            raise ValueError(f"quant_algo is {algorithm!r}, expected NVFP4, W4A16_NVFP4, MXFP8 or MIXED_PRECISION")
        if cache := inside.get("kv_cache_quant_algo"):
            raise ValueError(f"kv_cache_quant_algo is {cache!r}, and caches are not quantised here")
        return True
    if method != "compressed-tensors":
        raise ValueError(f"quant_method is {method!r}, expected 'compressed-tensors' or 'modelopt'")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key):
            raise ValueError(f"quantization_config has a {key}, which has no place here")
    found = False
    for name, group in config.get("config_groups", {}).items():
        weights, form = group.get("weights") or {}, (group.get("format") or config.get("format"))
        numbers = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
        known = {"nvfp4-pack-quantized": (4, "float", 16), "mxfp8-quantized": (8, "float", 32)}
        if known.get(form) != numbers or group.get("output_activations"):
            raise ValueError(
                f"{name} of quantization_config has format {form!r} with {numbers[0]} bits ({numbers[1]}) in groups of "
                f"{numbers[2]}, expected nvfp4-pack-quantized (4, float, 16) or mxfp8-quantized (8, float, 32)"
            )
        found |= form == "mxfp8-quantized" and bool(group.get("input_activations"))
    return found
