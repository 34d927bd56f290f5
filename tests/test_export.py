"""export.py and data/hf_tokenizer.py: what other libraries read is what was trained. transformers with compressed-tensors load
each folder, offline, on a CPU: weights equal ours bit for bit, logits within the rounding of BF16, ids on difficult strings.
ModelOpt's layout, which nothing here loads, is checked tensor by tensor against its documented form.
"""

import contextlib
import io
import json
import random
import re
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoint
import evaluate
import export
import importer
import layouts
import train
from configs import load
from data import Tokenizer
from data.hf_tokenizer import tokenizer_config, tokenizer_json
from model import GPT, ModelConfig
from quant import FORMATS, QuantSpec, Scale, quantize
from quant.linear import linears
from quant.mixed import Mixed
from quant.policy import unquantized
from tests.test_train import LADDERS, NVFP4, ROOT, folder

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def run(small):
    """Two blocks of NVFP4, a head in BF16."""
    train.main([NVFP4, *small, "run.name=exported", "policy.tail.last=0"])
    return folder(small, "exported")


@pytest.fixture(scope="module")
def gated(small):
    """SwiGLU, MXFP8, trained in BF16 but for that."""
    train.main(["configs/mxfp8.toml", *small, "run.name=exported-gated", "model.activation=swiglu", "train.steps=2"])
    return folder(small, "exported-gated")


def theirs(path):
    """The model as transformers loads it; weights are decompressed by the first forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model(torch.tensor([[1, 2, 3]]))
    return model


def values(module, form: str) -> torch.Tensor:
    """What a format makes of a matrix, fp32."""
    return module.weight.detach() if form == "bf16" else export.coded(module, form)[0].dequantize()


def distance(ours: GPT, tokens, logits) -> tuple[float, float]:
    """(|ours - theirs|, |ours - ours in fp32|) of logits."""
    with torch.no_grad():
        bf16 = ours(tokens).float()
        ours.dtype = torch.float32
        wide = ours(tokens)
        ours.dtype = torch.bfloat16
    return float((bf16 - logits.float()).detach().norm()), float((bf16 - wide).detach().norm())


def words(loaded) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer.encode(json.dumps(list(range(400))), bos=True)[: loaded.config.model.seq_len]])


@pytest.mark.parametrize("form", export.FORMATS)
@pytest.mark.parametrize("which", ["run", "gated"])
def test_transformers_reads_what_we_wrote(which, form, request, tmp_path):
    path = request.getfixturevalue(which)
    if which == "gated" and form in ("nvfp4", "mixed"):
        pytest.skip("the other run has these")
    out = export.export(path, form, "compressed-tensors", tmp_path / form, 2)
    model, loaded = theirs(out), checkpoint.load_model(path)
    forms, ours = export.wanted(loaded.model, form), loaded.model
    assert form == "bf16" or {"nvfp4": "nvfp4", "nvfp4a16": "nvfp4", "mxfp8": "mxfp8"}.get(form, "nvfp4") in forms.values()
    assert forms["head"] == "bf16"
    for name, module in linears(ours).items():
        w = values(module, forms[name])
        for there, rows in layouts.parts(name, ours.config).items():
            assert torch.equal(model.get_submodule(there).weight, w[rows].bfloat16()), there
        module.weight.data.copy_(w)
    tokens = words(loaded)
    logits = model(tokens).logits
    # Two computations in BF16 whose roundings are in other places (norms, RoPE, weights in BF16 there) are each about as far
    # from one without them; where inputs are quantised, so is that, and a rounding that flips a code counts in both.
    if form in ("bf16", "nvfp4a16"):
        with unquantized(ours):
            apart, bound = distance(ours, tokens, logits)
    else:  # the import holds the stored scales of inputs
        importer.import_(out, tmp_path / "back")
        apart, bound = distance(checkpoint.load_model(tmp_path / "back", "quantized").model, tokens, logits)
    assert apart <= 2 * bound, apart / bound


@pytest.mark.parametrize(("which", "form"), [("run", "nvfp4"), ("gated", "mxfp8")])
def test_transformers_quantises_inputs_as_we_do(which, form, request, tmp_path):
    """compressed-tensors 0.20 quantises the inputs in BF16, on a CPU too, and has all of them as we do but for

    NVFP4    scales of amax / 6 that it rounds to BF16: by at most 2^-9, where E4M3 numbers are 2^-4 to 2^-3 apart, so at
             most 2 * 2^-9 / 2^-4, 6 % of scales, are rounded the other way, to a neighbour; and a quotient within two
             roundings of fp32 of a tie, since we multiply by the reciprocal and it divides
    MXFP8    an amax of exactly 448 times a power of two, for which it takes the next power (elements stay within E4M3)
    """
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    path, block = request.getfixturevalue(which), layouts.SIZES[form]
    model = theirs(export.export(path, form, "compressed-tensors", tmp_path / form, 2))
    seen, others, blocks, ties = {}, 0, 0, 0
    modules = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None)}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y)))
    model(words(checkpoint.load_model(path)))
    assert len(seen) == len(modules) >= 5
    for name, (x, y) in seen.items():
        module = modules[name]
        found = forward_quantize(module, x, "input", module.quantization_scheme.input_activations)
        assert torch.equal(F.linear(found, module.weight), y) and not torch.equal(F.linear(x, module.weight), y), name
        x, found = x[0].detach(), found[0]
        held = layouts.LARGEST / module.input_global_scale[0] if form == "nvfp4" else None
        q = quantize(x, layouts.SPECS[form], held=held)
        amax = x.float().unflatten(1, (-1, block)).abs().amax(2)
        if form == "mxfp8":
            other = amax.frexp().mantissa == 1.75 / 2
            tie = torch.zeros_like(x, dtype=torch.bool)
        else:
            scale = (module.input_global_scale * (amax.bfloat16() / 6)).clamp(max=448).to(torch.float8_e4m3fn)
            steps = scale.view(torch.uint8).int() - q.scale_codes.int()
            assert steps.abs().max() <= 1, name
            other = steps != 0
            size = x.double().abs() / q.block_scale().double().repeat_interleave(block, 1)
            middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
            tie = ((size[..., None] / middles - 1).abs() <= 2**-22).any(-1)
        same = torch.equal(found[alike := ~(other.repeat_interleave(block, 1) | tie)], q.dequantize().bfloat16()[alike])
        assert same, name
        others, blocks, ties = others + int(other.sum()), blocks + other.numel(), ties + int(tie.sum())
    assert others <= 0.06 * blocks and ties <= 0.01 * block * blocks, (others, ties, blocks)


def test_inputs_are_scaled_by_what_training_has_seen(run, small, tmp_path, capsys, monkeypatch):
    """The amax of state.json is that of fprop.x in training, forgotten by 1 % a step, with and without recomputing; an
    evaluation adds nothing; a checkpoint without them is measured, and says so."""
    for name, extra in (("amax", []), ("amax-again", ["train.recompute=true"])):
        train.main([NVFP4, *small, f"run.name={name}", "train.steps=2", "run.checkpoint_every=1", *extra])
    first, last, again = (
        json.loads((folder(small, name) / step / "state.json").read_text())["amaxes"]
        for name, step in (("amax", "step_000001"), ("amax", "step_000002"), ("amax-again", "step_000002"))
    )
    assert last == again and set(last) == {f"blocks.0.{each}" for each in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")}
    assert all(last[name] >= train.FORGET * first[name] * (1 - 2**-22) for name in last) and last != first
    trainer = train.Trainer(config := load(NVFP4, [*small, "train.steps=2"]), train.Run(config, []), train.open_corpus(config))
    trainer.set_policy(0)
    seen = {}
    trainer.context.tap = lambda m, gemm, a, b, y: gemm == "fprop" and seen.setdefault(m.name, [])
    for name, module in linears(trainer.model).items():
        module.register_forward_pre_hook(lambda m, x, n=name: seen.setdefault(n, []).append(float(x[0].abs().max())))
    trainer.forward_backward(0)
    assert first == {name: max(seen[name]) for name in first}

    monkeypatch.setattr(export, "largest_inputs", lambda *_: pytest.fail("measured"))
    out = export.export(run, "nvfp4", "compressed-tensors", tmp_path / "x", 2)
    assert "the largest inputs that training has lately quantised" in (out / "README.md").read_text()
    monkeypatch.undo()
    old = tmp_path / "old"
    shutil.copytree(run, old)
    text = (state := checkpoint.find(old) / "state.json").read_text()
    state.write_text(json.dumps(json.loads(text) | {"amaxes": {}}))
    manifest = state.with_name("MANIFEST.json")
    manifest.write_text(
        manifest.read_text().replace(checkpoint.sha256(checkpoint.find(run) / "state.json"), checkpoint.sha256(state))
    )
    state.with_name("COMPLETE").write_text(checkpoint.sha256(manifest))
    out = export.export(old, "nvfp4", "compressed-tensors", tmp_path / "y", 2)
    assert "over 2 windows of the training set" in (out / "README.md").read_text()
    assert "scales of activations are of the largest inputs over 2 windows" in capsys.readouterr().out


def test_modelopt_layout(run, tmp_path):
    out = export.export(run, "nvfp4", "modelopt", tmp_path / "m", 2)
    same = load_file(export.export(run, "nvfp4", "compressed-tensors", tmp_path / "c", 2) / "model.safetensors")
    found, model = load_file(out / "model.safetensors"), checkpoint.load_model(run).model
    for name, form in export.wanted(model, "nvfp4").items():
        for there, rows in layouts.parts(name, model.config).items():
            w = found[f"{there}.weight"]
            if form == "bf16":
                assert w.dtype == torch.bfloat16
                continue
            assert w.dtype == torch.uint8 and torch.equal(w, same[f"{there}.weight_packed"])
            scale, outer, active = (found[f"{there}.{key}"] for key in ("weight_scale", "weight_scale_2", "input_scale"))
            assert (scale.dtype, outer.shape, active.shape) == (torch.float8_e4m3fn, (), ())
            assert outer.dtype == active.dtype == torch.float32
            codes = torch.stack([w & 15, w >> 4], 2).flatten(1).long()
            decoded = E2M1[codes] * scale.float().repeat_interleave(16, 1) * outer
            assert torch.equal(decoded, export.coded(linears(model)[name], form)[0].dequantize()[rows])
            assert same[f"{there}.input_global_scale"].item() == pytest.approx(1 / active.item(), rel=1e-6)
    config = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "NVFP4" and config["group_size"] == 16 and "lm_head" in config["exclude_modules"]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"


def test_parts_of_one_matrix_share_scales(run, tmp_path):
    found = load_file(export.export(run, "nvfp4", "compressed-tensors", tmp_path / "x", 2) / "model.safetensors")
    for key in ("weight_global_scale", "input_global_scale"):
        q, k, v = (found[f"model.layers.1.self_attn.{part}_proj.{key}"] for part in "qkv")
        assert q == k == v and q.shape == (1,) and q > 1


def test_a_bf16_run_is_quantised_now_and_says_so(small, tmp_path):
    train.main(["configs/tiny-bf16.toml", *small, "run.name=exported-bf16", "train.steps=2"])
    out = export.export(folder(small, "exported-bf16"), "mxfp8", "compressed-tensors", tmp_path / "x", 1)
    said = (out / "README.md").read_text()
    assert (
        "trained in BF16; mxfp8 here, quantised again from the master, relative error 0.0" in said
        and "lm_head" not in said.split("What is in the files")[1]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


EXOTIC = {  # config, overrides, what stands for the first matrix in "mixed", what the card says of it
    "mor-tensor": (LADDERS["mor-tensor"], None, "all of it"),
    "mor-block-3way": (LADDERS["mor-block-3way"], None, "of its elements "),
    "mor-nvfp4": ([], None, "all of it"),
    "int8": ([], "mxfp8", "trained in int8/"),
    "posit8": ([], "mxfp8", "trained in posit"),
    "fp8-delayed": (["specs.f8.scale.history=3"], "mxfp8", "trained in e4m3/allxall fp32-history3"),
    "mxfp4": ([], "nvfp4", "trained in e2m1/1x32"),
    "nvfp4-4over6": ([], "nvfp4", "the codes of training"),
    "if4": ([], "nvfp4", "trained in ["),
    "dqt": ([], "bf16", "trained in int8/allxall fp32 sr, in which its weights are kept"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("mor-block-3way", "dqt") else pytest.mark.slow) for n in EXOTIC]
)
def test_other_formats_are_quantised_again_and_the_card_says_how(name, small, tmp_path):
    overrides, mixed, said = EXOTIC[name]
    train.main([f"configs/{name}.toml", *small, f"run.name=exported-{name}", "train.steps=2", *overrides])
    loaded = checkpoint.load_model(folder(small, f"exported-{name}"))
    first, module = "model.layers.0.mlp.up_proj", linears(loaded.model)["blocks.0.ffn.up"]
    if mixed != "bf16":
        out = export.export(loaded.folder, "mixed", "compressed-tensors", tmp_path / "mixed", 1)
        found = load_file(out / "model.safetensors")
        form = "nvfp4" if f"{first}.weight_packed" in found else "mxfp8" if f"{first}.weight_scale" in found else "bf16"
        assert form == (mixed or export.nearest(module))
    else:
        with pytest.raises(ValueError, match="no Linear is in mixed, since all are in 16 bits"):
            export.export(loaded.folder, "mixed", "compressed-tensors", tmp_path / "mixed", 1)
    out = export.export(loaded.folder, "nvfp4a16", "compressed-tensors", tmp_path / "four", 1)
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith(f"* {first}")]
    assert said in line, line
    w, (form, q, amax) = module.weight.detach(), layouts.read(first, tensors_of(out, first), *module.weight.shape)
    assert form == "nvfp4" and amax is None
    if said != "the codes of training":
        error = float((q.dequantize() - w).norm() / w.norm())
        assert line.endswith(f"relative error {error:.4f}")
    else:
        assert torch.equal(q.dequantize(), module.quantized_weight().dequantize())
    kept = out / "narrow/mor.safetensors"
    assert kept.exists() == name.startswith("mor")
    if kept.exists():
        with safe_open(kept, "pt") as f:
            known = json.loads(f.metadata()["blocks.0.ffn.up"])
        index, made, spec = load_file(kept)["blocks.0.ffn.up"], module.quantized_weight(), module.recipe.fprop.w
        assert known["candidates"] == [each.short() for each in spec.candidates]
        assert [n * size for n, size in zip(index.shape, known["block"], strict=True)] == list(module.weight.shape)
        if isinstance(made, Mixed):
            assert torch.equal(index, made.index) and len(index.unique()) == line.count("% ")
        else:
            assert known["candidates"][int(index)] == made.spec.short() and made.spec.short() in line


def tensors_of(folder, name: str) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {key.removeprefix(f"{name}."): t for key, t in found.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(scale=Scale(outer="row")),
        QuantSpec(scale=Scale(outer="none")),
        QuantSpec("e4m3", (1, 32), Scale("e8m0", multiplier=0.75)),
        QuantSpec("e4m3", (1, 32), Scale("e8m0", rule="gam")),
        QuantSpec("e2m1", (1, 32), Scale("e8m0")),
        QuantSpec("e4m3", (-1, -1), Scale("fp32")),
    ],
    ids=QuantSpec.short,
)
def test_what_no_tensor_has_a_place_for_is_no_format(spec):
    assert layouts.form_of(spec) is None


def test_specs_that_have_a_place():
    """By what is written of them: all values, by the documented arithmetic."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for block in (1, 16):
        q = quantize(x, replace(layouts.SPECS["nvfp4"], block=(block, 16)))
        t = layouts.written(q, slice(None), "compressed-tensors", None)
        codes = torch.stack([t["weight_packed"] & 15, t["weight_packed"] >> 4], 2).flatten(1).long()
        scale = t["weight_scale"].float().repeat_interleave(16, 1)
        assert torch.equal(E2M1[codes] * scale * (1 / t["weight_global_scale"]), q.dequantize())
    for block in (1, 32):
        q = quantize(x, QuantSpec("e4m3", (block, 32), Scale("e8m0", rule="even")))
        t = layouts.written(q, slice(None), "modelopt", None)
        assert torch.equal(
            t["weight"].float() * 2.0 ** (t["weight_scale"].float() - 127).repeat_interleave(32, 1), q.dequantize()
        )
    assert {"e2m1", "e4m3"} <= set(FORMATS)


def test_files_of_several_parts(run, tmp_path):
    out = export.export(run, "bf16", "compressed-tensors", tmp_path / "x", 1, shard="200KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert theirs(out).lm_head.weight.shape[0] == json.loads((out / "config.json").read_text())["vocab_size"]
    # 8 GB of one layer and 3 GB of another, by the function that writes them, at the size that is the default.
    large = {f"{i}.weight": torch.empty(2, 2**30, dtype=torch.bfloat16, device="meta") for i in range(2)}
    large["2.weight"] = torch.empty(3 * 2**29, dtype=torch.bfloat16, device="meta")
    split = split_torch_state_dict_into_shards(large, max_shard_size="5GB")
    assert [len(names) for names in split.filename_to_tensors.values()] == [1, 1, 1] and split.is_sharded


def sizes(**changes) -> dict:
    small = {"blocks": 1, "d_model": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_size": 96, "seq_len": 32}
    return small | changes


FIELDS = {
    "plain": {},
    "heads wider than the model": {"head_dim": 32},
    "heads narrower": {"head_dim": 8},
    "tied": {"tied_head": True},
    "every head its own keys": {"kv_heads": 4},
    "one for all": {"kv_heads": 1},
    "rope base": {"rope_base": 500.0},
    "norm eps": {"norm_eps": 0.1},
    "two blocks": {"blocks": 2},
}


@pytest.mark.parametrize("act", ["relu2", "swiglu"])
@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_the_architecture_computes_the_same(changes, act):
    """Every size of ModelConfig, in fp32 on both sides: what is left are the orders of sums, 1e-6 of the logits here, and
    angles of RoPE that are rounded once there; with a field of the other config they are 1e-2 apart or more."""
    c = ModelConfig(**sizes(activation=act, **changes))
    assert layouts.model_config(layouts.architecture(c)) == c
    ours = GPT(c, torch.float32).initialise(0)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(10) if p.ndim == 2 else p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)
    config = transformers.AutoConfig.for_model(**layouts.architecture(c))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {
        f"{there}.weight": p.detach()[rows]
        for name, p in ours.named_parameters()
        for there, rows in layouts.parts(name.removesuffix(".weight"), c).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"] * c.tied_head
    model.tie_weights()
    tokens = torch.randint(c.vocab_size, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = ours(tokens), model(tokens).logits
    assert (a - b).norm() <= 2e-5 * a.norm(), float((a - b).norm() / a.norm())


def test_the_card_and_its_snippet(run, tmp_path, monkeypatch, capsys):
    out = export.export(run, "nvfp4", "compressed-tensors", tmp_path / "x", 2)
    said = (out / "README.md").read_text()
    facts = json.loads((run / "run.json").read_text())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    for part in (
        f"at commit {facts['commit']} on 10,240 tokens",
        "python train.py",
        "an origin and licence that narrow does not know",
        f"* as trained: {last['val_loss']:.4f} nats/token",
        f"* the same weights in BF16: {last['val_loss_bf16']:.4f}",
        "    fprop.w  e2m1/16x16",
        "bf16: 1 of 9 Linears: head",
        "self_attn.v_proj, which are one matrix in narrow: trained in e2m1/16x16; nvfp4 here, the codes of training",
    ):
        assert part in said, part
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    (snippet,) = re.findall(r"```python\n(.*?)```", said, re.S)
    monkeypatch.chdir(out)
    transformers.set_seed(0)
    exec(snippet, {})
    assert "My fellow" in capsys.readouterr().out
    found = transformers.AutoTokenizer.from_pretrained(out)
    assert found("My fellow")["input_ids"] == Tokenizer.load(out / "narrow").encode("My fellow", bos=True)
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [2, 1]
    assert "transformers does not read it" in card_of(run, "modelopt", tmp_path)


def card_of(run, layout: str, tmp_path) -> str:
    return (export.export(run, "nvfp4", layout, tmp_path / layout, 2) / "README.md").read_text()


def test_a_tied_head_stays_the_embedding(small, tmp_path):
    overrides = ["model.tied_head=true", "policy.head.recipe=nvfp4", "train.steps=2"]
    train.main([NVFP4, *small, "run.name=exported-tied", *overrides])
    out = export.export(folder(small, "exported-tied"), "nvfp4a16", "compressed-tensors", tmp_path / "x", 2)
    assert "lm_head: BF16, as the embedding that it is; trained in e2m1/16x16" in (out / "README.md").read_text()
    assert not any(name.startswith("lm_head") for name in load_file(out / "model.safetensors"))
    model = theirs(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_refused(small, run, tmp_path, capsys):
    train.main(["configs/mxfp8-gains.toml", *small, "run.name=exported-gains", "train.steps=2"])
    with pytest.raises(ValueError, match="sites.norm_gain is quantised, which no architecture there has"):
        export.export(folder(small, "exported-gains"), "bf16", "compressed-tensors", None, 1)
    with pytest.raises(ValueError, match="--windows 0: expected at least 1"):
        export.main([str(run), "--windows", "0"])
    assert not (folder(small, "exported-gains") / "export").exists()


def test_a_rotated_basis_is_refused_but_as_bf16(small, tmp_path):
    recipe = ["recipes.nvfp4.fprop.x.hadamard=16", "recipes.nvfp4.fprop.w.hadamard=16"]
    train.main([NVFP4, *small, "run.name=exported-rotated", "train.steps=2", *recipe])
    path, out = folder(small, "exported-rotated"), tmp_path / "x"
    with pytest.raises(
        ValueError, match="blocks.0.attn.qkv: its weight is quantised in a rotated basis, which nvfp4 has no place"
    ):
        export.export(path, "nvfp4", "compressed-tensors", out, 1)
    assert not out.exists() and list(tmp_path.iterdir()) == []
    export.export(path, "bf16", "compressed-tensors", out, 1)


def test_a_width_that_no_block_cuts_is_refused(small, tmp_path):
    train.main(["configs/tiny-bf16.toml", *small, "run.name=exported-odd", "train.steps=2", "model.ffn=272"])
    with pytest.raises(
        ValueError, match="blocks.0.ffn.down as mxfp8 of shape .*: its contraction, 272, must be a multiple of 32"
    ):
        export.export(folder(small, "exported-odd"), "mxfp8", "compressed-tensors", tmp_path / "x", 1)
    assert list(tmp_path.iterdir()) == []
    export.export(folder(small, "exported-odd"), "nvfp4a16", "compressed-tensors", tmp_path / "x", 1)


def test_a_forward_pass_that_ends_in_bf16(small, tmp_path):
    """nvfp4.toml leaves fprop in BF16 for its last 18 %: what has the recipe is quantised again, what never had stays, and the
    largest inputs are those of when they were quantised."""
    train.main(["configs/nvfp4.toml", *small, "run.name=exported-late", "run.checkpoint_every=16", "policy.tail.last=1"])
    early, late = (folder(small, "exported-late") / step for step in ("step_000016", "step_000020"))
    before, after = (json.loads((step / "state.json").read_text()) for step in (early, late))
    assert set(before["policy"].values()) == {"bf16", "nvfp4"} and set(after["policy"].values()) == {"bf16", "nvfp4-backward"}
    assert set(after["amaxes"]) == {name for name, recipe in after["policy"].items() if recipe != "bf16"}
    least = train.FORGET * (1 - 2**-22)  # (0.99 and its product are rounded to fp32)
    assert all(after["amaxes"][name] >= least * a for name, a in before["amaxes"].items())
    out = export.export(late, "nvfp4", "compressed-tensors", tmp_path / "x", 1)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"] and "model.layers.1.mlp.up_proj" in config["ignore"] and len(config["ignore"]) == 7
    assert "training has lately quantised" in (out / "README.md").read_text()


def test_what_is_no_export_is_left_alone(run, tmp_path, monkeypatch):
    """And an export that fails, or is killed, leaves the older one."""
    (out := tmp_path / "x").mkdir()
    (out / "thesis.tex").write_text("years")
    for place in (out, out / "thesis.tex", run):
        with pytest.raises(ValueError, match="there is something that export.py has not written"):
            export.export(run, "bf16", "compressed-tensors", place, 1)
    assert (out / "thesis.tex").read_text() == "years" and checkpoint.fault(checkpoint.find(run)) is None
    (out / "thesis.tex").unlink()
    export.export(run, "bf16", "compressed-tensors", out, 1)
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    with pytest.raises(ValueError):
        export.export(run, "bf16", "compressed-tensors", out, 1, shard="many")
    monkeypatch.setattr(export, "card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export.export(run, "bf16", "compressed-tensors", out, 1)
    assert {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == before and list(tmp_path.iterdir()) == [out]
    monkeypatch.undo()
    out.rename(tmp_path / ".old_x")  # killed between two renames
    with pytest.raises(ValueError):
        export.export(run, "bf16", "compressed-tensors", out, 1, shard="many")
    assert {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == before and list(tmp_path.iterdir()) == [out]
    export.export(run, "nvfp4", "compressed-tensors", out, 1)
    assert "quantization_config" in json.loads((out / "config.json").read_text()) and list(tmp_path.iterdir()) == [out]


def command(script: str, *argv) -> tuple[int, str]:
    """(exit status, last line of stderr) of a script, run as one, in this process."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return end.value.code, said.getvalue().splitlines()[-1]


def test_steps_that_cannot_be_exported(run, tmp_path):
    """One sentence each, nothing written."""
    step, out = checkpoint.find(run), tmp_path / "out"
    code, said = command("export.py", tmp_path / "nothing", "--out", out)
    assert code == 2 and said == f"export.py: {tmp_path / 'nothing'}: neither a checkpoint nor a run folder with a complete one"
    for name, what in (("COMPLETE", "was never completed"), ("model.safetensors", "is missing"), ("config.toml", "is missing")):
        shutil.copytree(run, copy := tmp_path / f"copy-{name}")
        (copy / step.name / name).unlink()
        with pytest.raises(ValueError, match=what):
            export.export(copy / step.name, "bf16", "compressed-tensors", out, 1)
    shutil.copytree(run, copy := tmp_path / "flipped")
    bits = bytearray((copy / step.name / "model.safetensors").read_bytes())
    bits[-1] ^= 1
    (copy / step.name / "model.safetensors").write_bytes(bits)
    with pytest.raises(ValueError, match="model.safetensors is truncated or altered"):
        export.export(copy / step.name, "bf16", "compressed-tensors", out, 1)
    assert not out.exists()


def test_an_export_is_evaluated_beside_its_checkpoint(run, tmp_path, capsys):
    """BF16 is BF16 wherever it runs, within its rounding; four bits, weights alone, cost what the table says of them."""
    folders = [export.export(run, form, "compressed-tensors", tmp_path / form, 2) for form in ("bf16", "nvfp4a16")]
    assert evaluate.main([str(run), "--windows", "8", *(word for each in folders for word in ("--exported", str(each)))]) == 0
    found = json.loads((checkpoint.find(run) / "evaluation.json").read_text())
    same, four = (found[str(each)] for each in folders)
    assert abs(same["difference"]) <= 4 * same["standard_error"] + 1e-4 and abs(same["difference"]) < 0.01
    assert same["loss"] == pytest.approx(found["bf16"]["loss"], rel=1e-3) and four["loss"] != same["loss"]
    assert f"{folders[1]} " in capsys.readouterr().out
    with pytest.raises(ValueError, match="no folder that export.py has written"):
        evaluate.main([str(run), "--exported", str(tmp_path / "nothing")])


def test_exports_of_a_step_are_rows_of_its_table(run, tmp_path, capsys):
    """Where make export puts them, without being named; not those of another step, nor what transformers cannot load."""
    shutil.copytree(run, own := tmp_path / "own")
    for step, form, layout in (
        (20, "bf16", layouts.LAYOUTS[0]),
        (20, "nvfp4", layouts.LAYOUTS[1]),
        (10, "mxfp8", layouts.LAYOUTS[0]),
    ):
        export.export(own / f"step_{step:06d}", form, layout, None, 2)
    assert evaluate.main([str(own), "--windows", "2"]) == 0
    found = json.loads((own / "step_000020/evaluation.json").read_text())
    assert [name.rpartition("/")[2] for name in found if "export" in name] == ["bf16"], found.keys()
    assert "nvfp4-modelopt is in the layout of modelopt" in capsys.readouterr().out


# --- the tokenizer ---

ODD = ["", "a", " ", "  ", "\n", "\n\n\n", "\u2581", "\ue581", "\ue581s \ue581e", "\u2581\u2581a", "\x00", "<s>", "\u200d"]
ODD += [
    " <s> </s> <unk>",
    "<0x0A>",
    " two  spaces\t\r\n \uff21e\u0301 \u00bd 123 \U0001f600\u0378",
    "f(x):\n    return x * 12345",
]
ATOMS = ["a", "e", "the ", "th", " ", "  ", "\n", "\t", "1", "23", "\u2581", "\ue581", "é", "ß", "漢", "\U0001f600", "\u0301"]
ATOMS += ["<s>", "<unk>", "self", "import ", "\x00", "\u200d", "...", "--", "'s", "def ", "(", ")", '"', "__"]


def test_the_tokenizer_gives_the_same_ids(run, tmp_path):
    ours = Tokenizer.load(checkpoint.find(run))
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(ours), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(tokenizer_config(ours, 10**6))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    random.seed(0)
    texts = ODD + ["".join(random.choices(ATOMS, k=random.randint(1, 40))) for _ in range(300)]
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids[1:]) == ours.decode(ids[1:]) == text, text
