"""export.py and data/hf_tokenizer.py: what other libraries read is what was trained. transformers with compressed-tensors load
each folder, offline, on a CPU: weights equal ours bit for bit, logits within the rounding of BF16, ids on difficult strings.
ModelOpt's layout, which nothing here loads, is checked tensor by tensor against its documented form.
"""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

import checkpoint
import evaluate
import export
import train
from data import Tokenizer
from data.hf_tokenizer import tokenizer_config, tokenizer_json
from quant.linear import linears
from quant.policy import unquantized
from tests.test_train import NVFP4, folder

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
        for there, rows in export.parts(name, ours.config).items():
            assert torch.equal(model.get_submodule(there).weight, w[rows].bfloat16()), there
        module.weight.data.copy_(w)
    if form in ("nvfp4", "mixed", "mxfp8"):  # (activations are quantised there)
        return
    tokens = torch.tensor([loaded.tokenizer.encode(json.dumps(list(range(400))), bos=True)[: ours.config.seq_len]])
    with unquantized(ours), torch.no_grad():
        bf16, logits = ours(tokens).float(), model(tokens).logits.float()
        ours.dtype = torch.float32
        wide = ours(tokens)
    # Two computations in BF16 whose roundings are in other places (norms) are each about as far from one without them.
    assert (bf16 - logits).norm() <= 2 * (bf16 - wide).norm(), float((bf16 - logits).norm() / (bf16 - wide).norm())


def test_modelopt_layout(run, tmp_path):
    out = export.export(run, "nvfp4", "modelopt", tmp_path / "m", 2)
    same = load_file(export.export(run, "nvfp4", "compressed-tensors", tmp_path / "c", 2) / "model.safetensors")
    found, model = load_file(out / "model.safetensors"), checkpoint.load_model(run).model
    for name, form in export.wanted(model, "nvfp4").items():
        for there, rows in export.parts(name, model.config).items():
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
    assert "trained in BF16), relative error 0.0" in said and "lm_head" not in said.split("Matrices")[1]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_files_of_several_parts(run, tmp_path):
    out = export.export(run, "bf16", "compressed-tensors", tmp_path / "x", 1, shard="200KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert theirs(out).lm_head.weight.shape[0] == json.loads((out / "config.json").read_text())["vocab_size"]


def test_refused(small, run, capsys):
    train.main(["configs/mxfp8-gains.toml", *small, "run.name=exported-gains", "train.steps=2"])
    with pytest.raises(ValueError, match="sites.norm_gain is quantised, which no architecture there has"):
        export.export(folder(small, "exported-gains"), "bf16", "compressed-tensors", None, 1)
    with pytest.raises(ValueError, match="--windows 0: expected at least 1"):
        export.main([str(run), "--windows", "0"])


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
