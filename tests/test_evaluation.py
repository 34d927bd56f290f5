"""evaluation/ and what evaluate.py makes of it: every method after training against its definition or a search by brute force,
specs by name, tables of several checkpoints, and what a user may get wrong.
"""

import json
import os
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers import assert_same_bits

import checkpoint
import evaluate
import train
from configs import dump, load
from configs.table import element_bits
from evaluation import posttrain, questions, rows, specs
from evaluation import sweep as sweeps
from evaluation.posttrain import Coded, clipped, compand, companded, nearest, ranged, shifted, switch, switched
from model import GPT, ModelConfig, measure
from quant import Choice, Context, QuantSpec, Recipe, Scale, attach, quantize
from quant.linear import linears
from quant.policy import unquantized
from quant.recipe import Fprop
from tests.test_train import BF16, NVFP4, folder

SMALL = ModelConfig(blocks=1, d_model=64, ffn=128, heads=2, kv_heads=1, head_dim=32, vocab_size=64, seq_len=32)
ROWS, GROUPS = (1, -1), (1, 32)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp32, normal, some of them large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    return x * torch.where(torch.rand(shape, generator=g) < 0.02, 6.0, 1.0) * 0.02


def gap(values: torch.Tensor, w: torch.Tensor) -> float:
    return float((values - w).square().sum())


# --- methods ---


@pytest.mark.parametrize("bits", range(2, 9))
def test_switching_bits_is_its_definition(bits):
    """Of every code, in exact arithmetic; round() of a Fraction takes ties to even."""
    codes = range(-128, 128)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = [min(max(round(Fraction(c, 2 ** (8 - bits))), low), high) for c in codes]
    assert switch(torch.tensor(codes), bits).tolist() == expected
    w = torch.tensor([[c * 2.0**-10 for c in range(-127, 128)] + [0.0]])  # whose scale is 2^-10, exactly
    assert switched(w, w, bits).weight[0, :-1].tolist() == [v * 2.0 ** (-10 + 8 - bits) for v in expected[1:]]


def test_switching_to_eight_bits_changes_nothing():
    w = numbers(16, 64)
    for block in (ROWS, GROUPS):
        plain = quantize(w, QuantSpec("int8", block, Scale("fp32")))
        found = switched(w, w, 8, block)
        assert_same_bits(found.weight, plain.dequantize())
        assert found.bits == element_bits(plain.spec, *w.shape) == switched(w, w, 3, block).bits + 5
        stored = switched(plain.dequantize(), w, 3, block).weight  # the same codes; scales twice rounded once more
        assert torch.allclose(stored, switched(w, w, 3, block).weight, rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("block", [ROWS, GROUPS], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_companding_by_one_is_the_integer_itself(bits, block):
    w, spec = numbers(16, 64), QuantSpec(f"int{bits}", block, Scale("fp32"))
    assert_same_bits(companded(w, w, bits, block, [1.0]).weight, quantize(w, spec).dequantize())
    searched = companded(w, w, bits, block)
    assert gap(searched.weight, w) <= gap(quantize(w, spec).dequantize(), w) and 0.2 <= searched.found["a"] <= 1
    assert searched.bits == element_bits(spec, *w.shape) + 32 / w.numel()


def test_companding_takes_the_nearest_in_its_own_measure():
    """sign(w) |w|^a against the grid of 15 values from its definition, in fp64. Each of two powers in fp32 is off by some units
    in the last place, 2^-20 together, and by as much of the largest a number may lie beyond the midpoint."""
    w, a = numbers(8, 64), 0.5
    found = companded(w, w, 4, ROWS, [a]).weight.double()
    u, top = compand(w.double(), a), w.double().abs().amax(1, keepdim=True) ** a
    grid = top[:, :, None] * torch.arange(-7, 8, dtype=torch.float64) / 7
    least = (u[:, :, None] - grid).abs().amin(2)
    assert ((compand(found, a) - u).abs() <= least + 2.0**-20 * top).all()


PLAIN = [
    QuantSpec("int4", ROWS, Scale("fp32")),
    QuantSpec("e2m1", (1, 32), Scale("e8m0")),
    QuantSpec("int3", (2, 32), Scale("bf16")),
    QuantSpec(),
    QuantSpec("e3m0", (-1, -1), Scale("fp32")),
]


@pytest.mark.parametrize("spec", PLAIN, ids=QuantSpec.short)
def test_a_searched_scale_is_the_best_of_all(spec):
    """Of all 111 factors, in every block; never worse than without a search."""
    w = numbers(16, 64)
    found, (b0, b1) = clipped(w, w, [spec]), spec.blocks_of(16, 64)

    def errors(values):
        return (values - w).square().unflatten(1, (-1, b1)).unflatten(0, (-1, b0)).sum((1, 3))

    every = torch.stack([errors(quantize(w, ranged(spec, f)).dequantize()) for f in posttrain.FACTORS])
    assert torch.equal(errors(found.weight), every.amin(0))
    assert gap(found.weight, w) < gap(quantize(w, spec).dequantize(), w)
    assert found.bits == element_bits(spec, 16, 64)


def test_searched_scales_under_one_outer_scale_are_a_choice(monkeypatch):
    """Of which the algebra has one itself; and all factors share their outer scale, or there would be no such tensor."""
    w, halves = numbers(16, 64), [0.5, 1.0]
    outer = {float(quantize(w, ranged(QuantSpec(), f)).global_scale) for f in posttrain.FACTORS}
    assert len(outer) == 1
    monkeypatch.setattr(posttrain, "FACTORS", halves)
    choice = Choice(tuple(ranged(QuantSpec(), f) for f in halves))
    assert_same_bits(clipped(w, w, [QuantSpec()]).weight, quantize(w, choice).dequantize())


def test_scales_searched_by_outputs():
    """||x w'^T - x w^T|| of each row is the least, but for the rounding of sums in fp32: 64 * 2^-24 of the largest terms, whose
    sum is within 100 times their result here."""
    w, spec = numbers(16, 64), PLAIN[0]
    x = numbers(96, 64, seed=1) * torch.linspace(0.1, 3, 64)
    found = clipped(w, x, [spec], by="outputs")

    def errors(values):
        return ((x.double() @ (values - w).double().t()) ** 2).sum(0)

    every = torch.stack([errors(quantize(w, ranged(spec, f)).dequantize()) for f in posttrain.FACTORS])
    assert (errors(found.weight) <= every.amin(0) * (1 + 100 * 64 * 2.0**-24)).all()
    assert errors(found.weight).sum() < errors(clipped(w, x, [spec]).weight).sum(), "x plays no part"
    with pytest.raises(ValueError, match=r"expected scales of whole rows, block \[1, -1\], not \[1, 32\]"):
        clipped(w, x, [PLAIN[1]], by="outputs")


def test_the_format_is_searched_for_too():
    w = numbers(16, 64)
    candidates = [QuantSpec(name, ROWS, Scale("fp32")) for name in ("e3m0", "e1m2", "e2m1")]
    each = [gap(clipped(w, w, [spec]).weight, w) for spec in candidates]
    found = clipped(w, w, candidates)
    assert gap(found.weight, w) == min(each) and found.found["E"] == (3, 1, 2)[each.index(min(each))]


def test_shift_and_scale_change_nothing_without_quantisation():
    """(x - z) / s times w s, plus w z, is x w^T: each product has four roundings (x - z, / s, w s, and its own) and each sum
    K + 1, of terms |x - z| |w| and |z| |w|, in both; u = 2^-24."""
    model = GPT(SMALL, dtype=torch.float32).initialise(0)
    attach(model, Context())
    model.requires_grad_(False)
    module = linears(model)["blocks.0.ffn.down"]
    x = numbers(64, 128) + torch.linspace(-1, 1, 128)
    w, exact = module.weight.clone(), x.double() @ module.weight.double().t()
    coded = shifted(w, x, QuantSpec("int8", ROWS, Scale("fp32")), QuantSpec("int8", (-1, -1), Scale("fp32")))
    z = coded.moved.shift
    assert z.abs().max() > 0.5 and coded.moved.scale.max() > 1, "there is something to move"
    terms = ((x - z).abs() + z.abs()).double() @ w.abs().double().t()
    with sweeps.given(model, {"blocks.0.ffn.down": coded._replace(fprop=None)}):
        assert not torch.equal(module.weight, w)
        y = module(x)
    assert ((y - exact).abs() <= 1.01 * (128 + 5) * 2.0**-24 * terms).all()
    assert_same_bits(module.weight, w)
    assert module.recipe is None and not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("what", ["off", "wide"])
def test_shift_and_scale_help_where_channels_are(what):
    """One scale for all tokens, and a channel that is far from zero, or a wide one: what the paper is about."""
    w, x = numbers(32, 64), numbers(128, 64, seed=1)
    x[:, 3] = x[:, 3] + 4 if what == "off" else x[:, 3] * 30
    spec, whole = QuantSpec("int8", ROWS, Scale("fp32")), QuantSpec("int8", (-1, -1), Scale("fp32"))

    def error(coded: Coded) -> float:
        q = quantize((x - coded.moved.shift) / coded.moved.scale, whole).dequantize()
        return gap(q @ quantize(coded.weight, spec).dequantize().t() + coded.moved.bias, x @ w.t())

    plain = gap(quantize(x, whole).dequantize() @ quantize(w, spec).dequantize().t(), x @ w.t())
    scaled, both = (shifted(w, x, spec, whole, shift) for shift in (False, True))
    assert error(both if what == "off" else scaled) < plain / 4
    assert torch.equal(both.moved.shift, (x.amax(0) + x.amin(0)) / 2) and not scaled.moved.shift.any()
    for coded in (scaled, both):
        z, ones = coded.moved.shift, torch.ones(64)
        assert error(coded) <= error(Coded(w, 0, moved=posttrain.Moved(z, ones, w @ z))), "worse than without a scale"
        high = (x - z).abs().amax(0)
        t = high.amax() * coded.found["t"]  # (rounded twice more than what was searched for)
        assert torch.allclose(coded.moved.scale, (high / t).clamp(min=1), rtol=3 * 2.0**-24, atol=0)
        assert_same_bits(coded.weight, w * coded.moved.scale)


def test_a_method_leaves_the_embedding_of_a_tied_head_alone():
    model = GPT(replace(SMALL, tied_head=True)).initialise(0)
    attach(model, Context())
    model.requires_grad_(False)
    before = model.embedding.weight.clone()
    with sweeps.given(model, {"head": Coded(before * 2, 16)}):
        assert_same_bits(model.embedding.weight, before)
        assert_same_bits(model.head.weight, before * 2)
    assert model.head.weight is model.embedding.weight


def test_what_is_given_is_what_is_multiplied():
    """Twice at the same place, so that nothing cached of the first is taken for the second."""
    model = GPT(SMALL, dtype=torch.float32).initialise(0)
    attach(model, Context())
    model.requires_grad_(False)
    module, x = linears(model)["head"], numbers(8, 64)
    for factor in (2, 3):
        with sweeps.given(model, {"head": Coded(module.weight * factor, 16)}):
            assert_same_bits(module(x), torch.nn.functional.linear(x, module.weight))
            y = module(x.bfloat16())
            assert_same_bits(y, torch.nn.functional.linear(x.bfloat16(), module.weight.bfloat16()))


def test_every_candidate_codes_a_matrix():
    """Names are distinct, bits are those of what is stored, and no method that searches is worse than the one that does not."""
    w, x = numbers(128, 256), numbers(64, 256, seed=1)
    names = [c.name for c in sweeps.CANDIDATES]
    assert len(set(names)) == len(names)
    quick = [c for c in sweeps.CANDIDATES if c.method in (nearest, switched, companded)]
    found = {c.name: c.method(w, x, **c.arguments) for c in quick}
    for name, coded in found.items():
        digit = next(d for d in name if d.isdigit())
        assert 2 <= coded.bits < 9, name
        assert name.startswith(("nvfp4", "mx", "fp8", "nf4", "posit", "w", "int8 to")) or int(digit) <= coded.bits, name
    for bits in (3, 4, 5, 6):
        assert gap(found[f"int{bits}, power"].weight, w) <= gap(found[f"int{bits}"].weight, w)
        assert found[f"int8 to int{bits}"].bits == found[f"int{bits}"].bits


# --- names of specs ---


def test_names(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(dump(load(NVFP4)))
    assert specs.named("nvfp4", "--weights", config) == specs.preset("nvfp4") == QuantSpec()
    assert specs.named("nv2d", "--weights", config) == QuantSpec(block=(16, 16)), "the run's own"
    assert specs.named("nvsr", "--weights", config) == QuantSpec(), "to nearest"
    assert specs.named('{ format = "int4", block = [1, 64], scale = { format = "bf16" } }', "--weights", config) == QuantSpec(
        "int4", (1, 64), Scale("bf16")
    )
    assert specs.named('{ like = "mxfp8", block = [1, 64] }', "--weights", config).block == (1, 64)
    assert specs.named("int4-128", "--activations", config) == QuantSpec("int4", (1, 128), Scale("fp32"))
    assert all(specs.preset(name).rounding == "nearest" for name in specs.NAMED)
    for text, expected in (
        ("nvpf4", r"unknown spec of --weights: 'nvpf4', .*; did you mean 'nvfp4'\?"),
        ('{ formt = "e2m1" }', r"unknown key 'formt'; did you mean 'format'\?"),
        ('{ format = "e2m" }', r"unknown format 'e2m', .*; did you mean 'e2m"),
        ("{ format = e2m1 }", "--weights { format = e2m1 }: no table of TOML"),
        ('{ like = "mxfp9" }', r"no spec is named 'mxfp9'; did you mean 'mxfp"),
    ):
        with pytest.raises(ValueError, match=expected) as caught:
            specs.named(text, "--weights", config)
        assert "\n" not in str(caught.value)


def test_noise_is_left_out():
    noisy = Scale("e5m3", rounding="stochastic", correction="eden")
    spec = QuantSpec(scale=noisy, hadamard=16, signs="fresh", block=(1, 16))
    assert specs.to_nearest(spec) == replace(spec, scale=Scale("e5m3"))
    assert specs.to_nearest(QuantSpec(rounding="away")) == QuantSpec(rounding="away")
    both = Choice((QuantSpec(rounding="stochastic"), QuantSpec(rounding="stochastic", scale=Scale(target=4, outer_target=672))))
    assert not specs.to_nearest(both).stochastic


# --- tables ---


@pytest.fixture(scope="module")
def run(small):
    train.main([NVFP4, *small, "run.name=judged", "train.steps=6", "run.checkpoint_every=3", "train.val_every=6"])
    return folder(small, "judged")


@pytest.fixture(scope="module")
def other(small):
    """In BF16, with a tokenizer of its own."""
    given = [*small, "run.name=judged-other", "data.vocab_size=384", "train.steps=2", "run.checkpoint_every=0"]
    train.main([BF16, *given, "run.quantized=false"])
    return folder(small, "judged-other")


def judged(*arguments) -> int:
    return evaluate.main([*map(str, arguments), "--windows", "4"])


def found_in(step) -> dict:
    return json.loads((step / "evaluation.json").read_text())


def test_a_row_is_the_measure_of_its_windows(run):
    loaded = checkpoint.load_model(run)
    corpus = questions.corpus_of(loaded)
    found = rows.row(loaded.model, corpus, 4)
    table = torch.as_tensor(corpus.tokenizer.bytes_per_token)
    expected = measure(loaded.model, corpus.val_batches(1, 64, 4), table)
    assert (found.loss, found.bpb) == pytest.approx(expected, rel=1e-12) and len(found.windows) == 4
    assert found.against(found) == (0, 0)
    other = replace(found, windows=found.windows + torch.tensor([0.1, 0.3, 0.1, 0.3]))
    assert other.against(found) == pytest.approx((0.2, (0.04 / 3) ** 0.5 / 2)), "mean, and deviation (n - 1) / sqrt(n)"


def test_the_recipe_of_training_gives_the_row_as_trained(run):
    """And another one gives another row; both stay in the file, until they are of other windows."""
    step = checkpoint.find(run)
    assert judged(run, "--weights", "nv2d", "--activations", "nv") == 0
    assert judged(run, "--weights", "nvfp4", "--activations", "mxfp8", "--all") == 0
    found = found_in(step)
    assert found["w nv2d, x nv"] == found["as trained"] == found["stored codes"] != found["w nvfp4, x mxfp8 in all Linears"]
    assert evaluate.main([str(run), "--windows", "5"]) == 0
    assert set(found_in(step)) == {"windows", "as trained", "stored codes", "bf16"}


def test_weights_are_quantised_by_the_algebra(run):
    model = checkpoint.load_model(run).model
    masters = {name: m.weight.clone() for name, m in linears(model).items()}
    trained = {name for name, m in linears(model).items() if m.recipe}
    recipe = Recipe(Fprop(w=specs.preset("nvfp4")))
    for everything in (False, True):
        with sweeps.under(model, recipe, everything):
            for name, module in linears(model).items():
                q = module.quantized_weight()
                assert (q is not None) == (everything or name in trained), name
                if q is not None:
                    plain = quantize(masters[name], QuantSpec())
                    assert_same_bits(q.packed_codes, plain.packed_codes)
                    assert_same_bits(q.dequantize(), plain.dequantize())
    assert {name for name, m in linears(model).items() if m.recipe} == trained and 0 < len(trained) < len(masters)


def test_stored_values_stand_in_for_masters(run):
    """In the compute dtype they are a packed model that quantises nothing; and quantised again as before, nearly themselves."""
    assert judged(run, "--stored", "--weights", "bf16") == 0
    packed = checkpoint.load_model(run, "quantized")
    corpus = questions.corpus_of(packed)
    with unquantized(packed.model):
        expected = rows.row(packed.model, corpus, 4)
    found = found_in(checkpoint.find(run))
    assert found["w bf16 of stored codes"]["loss"] == expected.loss != found["bf16"]["loss"]


def test_a_run_that_quantises_nothing_has_all_but_its_head_quantised(other):
    model = checkpoint.load_model(other).model
    assert set(linears(model)) - set(sweeps.targets(model)) == {"head"} and "head" in sweeps.targets(model, True)


def test_several_checkpoints(run, other, tmp_path, capsys):
    steps = sorted(run.glob("step_*"))
    assert len(steps) == 2 and judged(*steps, "--plot", tmp_path / "steps.png") == 0
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["difference to"] == "judged 3, bf16" and record["judged 3"]["bf16"]["difference"] == 0
    losses = {n: {k: v["loss"] for k, v in record[n].items()} for n in ("judged 3", "judged 6")}
    delta = losses["judged 6"]["bf16"] - losses["judged 3"]["bf16"]
    assert record["judged 6"]["bf16"]["difference"] == pytest.approx(delta) and delta < 0
    capsys.readouterr()
    assert judged(run, other) == 0
    out = capsys.readouterr().out
    assert "judged-other 2: another tokenizer, text or seq_len than judged 6, so only bits/byte compare, not losses" in out
    record = json.loads((run / "comparison.json").read_text())
    assert set(record["judged-other 2"]["bf16"]) == {"loss", "bpb"} and "difference" in record["judged 6"]["as trained"]
    assert "stored codes" not in record["judged-other 2"] and "has no quantized.safetensors" in out
    for picture in (tmp_path / "steps.png", run / "comparison.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep(run, capsys, monkeypatch):
    monkeypatch.setattr(posttrain, "STEPS", 4)
    step = checkpoint.find(run)
    only = [
        word for name in ("int4", "int8 to int4", "int4, clip", "nvfp4-2d", "int4-128", "w8 x8*") for word in ("--only", name)
    ]
    assert judged(run, "--sweep", "--calibrate", "1", *only) == 0
    found, out = json.loads((step / "sweep.json").read_text()), capsys.readouterr().out
    assert found["int4, clip"]["error"] < found["int4"]["error"] and found["int4"]["bits"] == found["int8 to int4"]["bits"]
    assert found["w8 x8, OS+"]["error"] is None and found["w8 x8, OS+"]["found"]["t"][1] <= 1
    assert found["bf16"]["loss"] == found_in(step)["bf16"]["loss"] and found["int4"]["loss"] != found["bf16"]["loss"]
    assert "int8 to int4" in out and (step / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert judged(run, "--sweep", "--stored", "--only", "int3") == 0
    again = json.loads((step / "sweep.json").read_text())
    assert again == found | {"int3 of stored codes": again["int3 of stored codes"]}, "rows of the same table stay"
    rows_of = {128: 4 + 32 / 128, 256: 4 + 32 / 256}  # rows of int4: by their length
    assert rows_of[256] < found["int4"]["bits"] < rows_of[128]


def test_what_cannot_be_cut_is_left_out_of_a_sweep(small, tmp_path):
    model = GPT(SMALL).initialise(0)
    attach(model, Context())
    model.requires_grad_(False)

    class Corpus:  # what a sweep asks of one
        @staticmethod
        def batch(*_):
            return (torch.zeros(1, 32, dtype=torch.int64),) * 2

    (said,) = sweeps.sweep(model, Corpus, sweeps.chosen(["int4-128"]), 2, 1, False)
    assert said.startswith("int4-128 is left out: ") and "128" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "nowhere"], "nowhere: neither a checkpoint nor a run folder with a complete one"),
        (["RUN", "--weights", "nvpf4"], "did you mean 'nvfp4'?"),
        (["RUN", "--activations", '{ formt = "e2m1" }'], "--activations.formt: unknown key 'formt'; did you mean 'format'?"),
        (
            ["RUN", "--weights", '{ format = "e2m1", block = [1, 48] }'],
            "blocks.0.attn.qkv fprop.w of shape [256, 128]: its contraction, 128, must be a multiple of 48",
        ),
        (["RUN", "--weights", '{ like = "nv", hadamard = 16 }'], "both operands of a GEMM must be rotated alike"),
        (["OTHER", "--stored", "--weights", "nvfp4"], "has no quantized.safetensors"),
        (["RUN", "--sweep", "--only", "int9"], "--only 'int9' matches no candidate"),
        (["RUN", "OTHER", "--sample", "x"], "--exported and questions other than the table are of one checkpoint, not of 2"),
        (["RUN", "OTHER", "--plot", "x.pdf"], "--plot x.pdf: expected a name that ends in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(run, other, arguments, expected):
    judged(run)
    before = {f: f.read_bytes() for f in run.rglob("*.json")}
    with pytest.raises(ValueError) as caught:
        judged(*({"RUN": run, "OTHER": other}.get(word, word) for word in arguments))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert {f: f.read_bytes() for f in run.rglob("*.json")} == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, row = tmp_path / "evaluation.json", {"loss": 2.0}
    assert rows.keep(path, 4, {"bf16": row, "x": row}) == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": {"acc": 1}}))
    assert rows.keep(path, 4, {"bf16": row, "y": row}) == ["x"], "a row of the same table"
    assert set(json.loads(path.read_text())) == {"windows", "bf16", "x", "y", "tasks"}
    for windows, loss in ((5, 2.0), (4, 2.5)):
        before = path.read_bytes()
        assert rows.keep(path, windows, {"bf16": {"loss": loss}}) == [], "rows of another table"
        assert set(json.loads(path.read_text())) == {"windows", "bf16", "tasks"}
        assert (tmp_path / "evaluation.old.json").read_bytes() == before
        rows.keep(path, 4, {"bf16": row, "x": row})
    before = path.read_bytes()

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        rows.keep(path, 9, {"bf16": row})
    assert path.read_bytes() == before
    path.write_text("[1")
    monkeypatch.undo()
    assert rows.keep(path, 9, {"bf16": row}) == [] and json.loads(path.read_text()) == {"windows": 9, "bf16": row}
    assert (tmp_path / "evaluation.old.json").read_text() == "[1"
