"""importer.py: a folder that export.py has written comes back as it was, and goes out again as the same tensors; one of others
gives their values, and their logits within the rounding of BF16; what cannot be is refused and leaves nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import export
import importer
import layouts
from quant import QTensor, quantize
from quant.linear import linears
from tests.helpers import assert_same_bits
from tests.test_export import command, distance, gated, run, sizes, theirs, words  # noqa: F401 (fixtures)

FOLDERS = [("run", "nvfp4"), ("run", "nvfp4a16"), ("run", "mixed"), ("run", "bf16"), ("gated", "mxfp8"), ("run", "mxfp8")]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize(("which", "form"), FOLDERS)
def test_there_and_back_and_there(which, form, layout, request, tmp_path, capsys):
    """Weights, bit for bit; then every tensor of a second export; by the packed file and, since our own scales are made so that
    they are found again, by the masters."""
    path = request.getfixturevalue(which)
    out = export.export(path, form, layout, tmp_path / "out", 2)
    assert importer.main([str(out), "--out", str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    forms, before = export.wanted(model := checkpoint.load_model(path).model, form), linears(model)
    packed, masters = (checkpoint.load_model(tmp_path / "back", weights) for weights in ("quantized", "master"))
    for name, form_ in forms.items():
        w = before[name].weight.detach().bfloat16().float()
        w = w if form_ == "bf16" else export.coded(before[name], form_)[0].dequantize()
        for loaded in (packed, masters):
            assert_same_bits(linears(loaded.model)[name].weight.detach(), w, name)
        if form_ != "bf16":
            q = linears(packed.model)[name].quantized_weight()
            assert isinstance(q, QTensor) and torch.equal(q.dequantize(), w)
            assert torch.equal(linears(masters.model)[name].quantized_weight().dequantize(), w)
    quantised = sum(each != "bf16" for each in forms.values())
    assert f"{quantised} of {len(forms)} matrices are quantised" in said
    assert not quantised or f"have the stored values in {quantised} of them" in said
    again = export.export(tmp_path / "back", form, layout, tmp_path / "again", 2)
    first, second = (load_file(f / "model.safetensors") for f in (out, again))
    assert first.keys() == second.keys()
    for name in first:
        assert_same_bits(first[name].reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8), name)
    assert json.loads((out / "config.json").read_text()) == json.loads((again / "config.json").read_text())


def test_an_import_is_evaluated(run, tmp_path, capsys):  # noqa: F811
    out = export.export(run, "nvfp4", "compressed-tensors", tmp_path / "out", 2)
    importer.import_(out, tmp_path / "back")
    assert evaluate.main([str(tmp_path / "back"), "--windows", "4"]) == 0
    found = json.loads((tmp_path / "back/step_000000/evaluation.json").read_text())
    assert found["as trained"]["loss"] == found["stored codes"]["loss"] != found["bf16"]["loss"]
    loaded, before = checkpoint.load_model(tmp_path / "back"), checkpoint.load_model(run)
    assert loaded.config.model == before.config.model and loaded.config.data == before.config.data
    assert loaded.tokenizer.sha256 == before.tokenizer.sha256 and checkpoint.fault(loaded.folder) is None


def theirs_of(path: Path, name: str, seed: int = 0, **changes):
    """A random model of transformers, saved in BF16."""
    own = {
        key: value
        for key, value in layouts.architecture(importer.ModelConfig(**sizes(vocab_size=384))).items()
        if key != "architectures"
    }
    config = transformers.AutoConfig.for_model(
        **own | {"model_type": name, "hidden_act": {"llama": "silu", "arcee": "relu2"}[name]} | changes
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.ndim == 2 else p.add_(torch.randn_like(p) / 8)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-3, "num_key_value_heads": 1}])
@pytest.mark.parametrize("name", ["llama", "arcee"])
def test_models_of_others(name, changes, tmp_path, capsys):
    theirs_of(tmp_path / "there", name, **changes)
    lines = importer.import_(tmp_path / "there", tmp_path / "back")
    assert lines[-1].startswith("no tokenizer: ")
    loaded = checkpoint.load_model(tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there", dtype=torch.bfloat16)
    tokens = torch.randint(384, (1, 32), generator=torch.Generator().manual_seed(0))
    apart, bound = distance(loaded.model, tokens, model(tokens).logits)
    assert 0 < apart <= 2 * bound, apart / bound  # (as in test_transformers_reads_what_we_wrote)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate.main([str(tmp_path / "back")])
    export.export(tmp_path / "back", "bf16", "compressed-tensors", tmp_path / "again", 1)
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("there", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("inputs", [(5.0, 5.0, 5.0), (3.0, 3.0, 5.0)], ids=["one input", "several"])
def test_scales_of_others(inputs, tmp_path):
    """q, k and v with outer scales of their own, as quantisers of single matrices leave them: the codes are kept, with an outer
    scale for each row; masters quantised again are other values then, and the import says so."""
    theirs_of(tmp_path / "there", "llama")
    place = tmp_path / "there/model.safetensors"
    tensors, expected = load_file(place), []
    for part, factor, amax in zip("qkv", (1, 3, 0.1), inputs, strict=True):
        name = f"model.layers.0.self_attn.{part}_proj"
        q = quantize(tensors.pop(f"{name}.weight").float() * factor, layouts.SPECS["nvfp4"])
        written = layouts.written(q, slice(None), "compressed-tensors", amax)
        tensors |= {f"{name}.{key}": t for key, t in written.items()}
        expected.append(q.dequantize())
    save_file(tensors, place, metadata={"format": "pt"})
    config = json.loads((tmp_path / "there/config.json").read_text())
    modules = {"bf16": ["lm_head"], "nvfp4": ["re:.*(q|k|v)_proj"], "mxfp8": []}
    config["quantization_config"] = layouts.compressed_config(modules, True)
    (tmp_path / "there/config.json").write_text(json.dumps(config))
    lines = importer.import_(tmp_path / "there", tmp_path / "back")
    assert "have the stored values in 0 of them" in lines[1]
    assert ("inputs of 1 matrices have several scales" in lines[2]) == (len(set(inputs)) > 1)
    loaded = checkpoint.load_model(tmp_path / "back", "quantized")
    assert torch.equal(linears(loaded.model)["blocks.0.attn.qkv"].quantized_weight().dequantize(), torch.cat(expected))
    assert loaded.state["amaxes"] == {"blocks.0.attn.qkv": pytest.approx(5.0, rel=1e-6)}
    if len(set(inputs)) == 1:
        tokens = torch.randint(384, (1, 32), generator=torch.Generator().manual_seed(0))
        apart, bound = distance(loaded.model, tokens, theirs(tmp_path / "there")(tokens).logits)
        assert apart <= 2 * bound, apart / bound


@settings(deadline=None)
@given(st.floats(2**-60, 2**60, width=32))
def test_outer_scales_come_back(amax):
    """The outer scale that an amax gives, and the amax itself, through the reciprocals of either layout: as bits of what would
    be written again."""
    x = torch.zeros(1, 16)
    x[0, 0] = amax
    q = quantize(x, layouts.SPECS["nvfp4"])
    for layout in layouts.LAYOUTS:
        t = layouts.written(q, slice(None), layout, amax)
        form, made, found = layouts.read("m", t, 1, 16)
        assert form == "nvfp4" and torch.equal(made.outer_codes, q.outer_codes)
        again = layouts.written(made, slice(None), layout, found)
        for key in t:
            assert_same_bits(t[key].reshape(-1).view(torch.uint8), again[key].reshape(-1).view(torch.uint8), key)


# --- what is refused ---


def broken(tmp_path, change, form: str | None = None, path=None) -> Path:
    if form:
        place = export.export(path, form, "compressed-tensors", tmp_path / "there", 2)
    else:
        theirs_of(place := tmp_path / "there", "llama")
    config = json.loads((place / "config.json").read_text())
    tensors = load_file(place / "model.safetensors")
    change(config, tensors)
    (place / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


Q = "model.layers.0.self_attn.q_proj"
WRONG = {
    "architecture": (lambda c, t: c.update(model_type="gpt2"), "model_type is 'gpt2', expected 'llama' or 'arcee'"),
    "activation": (lambda c, t: c.update(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu' of 'llama'"),
    "bias": (lambda c, t: c.update(attention_bias=True), "attention_bias is true"),
    "mlp bias": (lambda c, t: c.update(mlp_bias=True), "mlp_bias is true"),
    "rope": (
        lambda c, t: c.update(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}),
        "rotary positions are {'rope_type': 'llama3'",
    ),
    "old rope": (lambda c, t: c.update(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}), "rotary positions"),
    "size": (lambda c, t: c.pop("hidden_size"), "config.json has no 'hidden_size'"),
    "type": (lambda c, t: c.update(num_hidden_layers="two"), "blocks: Input should be a valid integer"),
    "heads": (lambda c, t: c.update(num_key_value_heads=3), "heads = 4 must be a multiple of kv_heads = 3"),
    "missing": (lambda c, t: t.pop(f"{Q}.weight"), f"{Q}.weight is missing"),
    "shape": (
        lambda c, t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:8]}),
        f"{Q}.weight is bfloat16 [8, 64], expected bfloat16 [64, 64]",
    ),
    "dtype": (lambda c, t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.int32)}), f"{Q}.weight is int32"),
    "a bias after all": (lambda c, t: t.update({f"{Q}.bias": torch.zeros(64)}), f"{Q}.bias: no tensor of a matrix"),
    "more": (lambda c, t: t.update({"model.vision.weight": torch.zeros(2)}), "model.vision.weight is no tensor of 'llama'"),
    "vocabulary": (
        lambda c, t: (
            c.update(vocab_size=96),
            t.update({k: t[k][:96] for k in ("model.embed_tokens.weight", "lm_head.weight")}),
        ),
        "data.vocab_size = 384 does not fit model.vocab_size = 96",
    ),
    "norm": (lambda c, t: t.update({"model.norm.weight": torch.zeros(8)}), "model.norm.weight is float32 [1, 8], expected"),
}
QUANTISED = {
    "method": (lambda c, t: c["quantization_config"].update(quant_method="awq"), "quant_method is 'awq'"),
    "cache": (lambda c, t: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme"),
    "format": (
        lambda c, t: c["quantization_config"]["config_groups"]["group_0"].update(format="pack-quantized"),
        "group_0 of quantization_config has format 'pack-quantized' with 4 bits (float) in groups of 16",
    ),
    "scale": (lambda c, t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "scale dtype": (
        lambda c, t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].float()}),
        f"{Q}.weight_scale is float32 [128, 8], expected float8_e4m3fn [128, 8]",
    ),
    "two formats": (
        lambda c, t: (
            [t.pop(k) for k in list(t) if k.startswith(Q)] and t.update({f"{Q}.weight": torch.zeros(128, 128).bfloat16()})
        ),
        f"{Q} is bf16, model.layers.0.self_attn.k_proj is nvfp4",
    ),
}


def refused(place: Path, tmp_path: Path, said: str) -> None:
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError) as found:
        importer.import_(place, tmp_path / "runs/back")
    assert said in str(found.value) and "\n" not in str(found.value), found.value
    assert list((tmp_path / "runs").iterdir()) == []
    assert before == {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_refused(change, said, tmp_path):
    refused(broken(tmp_path, change), tmp_path, said)


@pytest.mark.parametrize(("change", "said"), QUANTISED.values(), ids=QUANTISED)
def test_refused_where_it_is_quantised(change, said, run, tmp_path):  # noqa: F811
    refused(broken(tmp_path, change, "nvfp4", run), tmp_path, said)


def test_refused_where_modelopt_has_another_algorithm(run, tmp_path):  # noqa: F811
    place = export.export(run, "nvfp4", "modelopt", tmp_path / "there", 2)
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        found = json.loads((place / name).read_text())
        found[key]["quant_algo"] = "FP8"
        (place / name).write_text(json.dumps(found))
    refused(place, tmp_path, "quant_algo is 'FP8', expected NVFP4")


def test_refused_files(run, tmp_path):  # noqa: F811
    place = export.export(run, "bf16", "compressed-tensors", tmp_path / "there", 1, shard="200KB")
    shards = sorted(place.glob("model-*.safetensors"))
    shutil.copytree(place, two := tmp_path / "two")
    (two / shards[1].name).unlink()
    refused(two, tmp_path, f"{shards[1].name} is missing, which model.safetensors.index.json names")
    (tmp_path / "runs").rmdir()
    shutil.copytree(place, half := tmp_path / "half")
    (half / shards[0].name).write_bytes(shards[0].read_bytes()[:-100])
    refused(half, tmp_path, f"{shards[0].name} is no whole safetensors file")
    (tmp_path / "runs").rmdir()
    index = json.loads((place / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.x.weight"] = shards[0].name
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(place, tmp_path, "model.layers.9.x.weight is in none of the files")
    (tmp_path / "runs").rmdir()
    (empty := tmp_path / "empty").mkdir()
    refused(empty, tmp_path, "has no config.json")
    (tmp_path / "runs").rmdir()
    (empty / "config.json").write_text(json.dumps(layouts.architecture(importer.ModelConfig(**sizes(vocab_size=384)))))
    (empty / "pytorch_model.bin").write_bytes(b"pickle")
    refused(empty, tmp_path, "has no model.safetensors (pickles are not read)")
    (tmp_path / "runs").rmdir()
    (empty / "config.json").write_text("{")
    refused(empty, tmp_path, "config.json: not JSON")


def test_a_run_that_exists_is_left_alone(run, tmp_path):  # noqa: F811
    out = export.export(run, "bf16", "compressed-tensors", tmp_path / "there", 1)
    code, said = command("importer.py", out, "--out", run)
    assert code == 2 and said == f"importer.py: --out {run} exists; name another run, and nothing is overwritten"
    assert checkpoint.fault(checkpoint.find(run)) is None
