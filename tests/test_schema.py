"""configs/schema.json, what editors know of a config: it is the one that configs/schema.py makes, takes all that `load` reads,
and rejects what can be seen to be wrong without resolving names."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from configs import Config, dump, load
from configs.schema import DIRECTIVE, FILE, SCALES, schema, text
from quant import Scale
from quant.formats import FLT_MAX, FORMATS, NAMED, Format
from quant.rounding import ROUNDINGS, random_bits

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.toml"))
VALID = Draft7Validator(json.loads(FILE.read_text()))


def wrong(content: dict, start: dict | None = None) -> list[str]:
    """What the schema, or one of its definitions, has against it: "key.path: message"."""
    validator = VALID if start is None else VALID.evolve(schema=start | {"definitions": VALID.schema["definitions"]})
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(content)]


def test_the_file_is_the_one_that_is_made():
    assert FILE.read_text(encoding="utf-8") == text(), "configs/schema.json is of other dataclasses: make schema"
    Draft7Validator.check_schema(VALID.schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config(path):
    """As it is written, with the line by which editors find the schema, and resolved."""
    written = path.read_text(encoding="utf-8")
    assert written.startswith(f"{DIRECTIVE}\n"), f"editors look for the line {DIRECTIVE!r} at the top of {path.name}"
    assert wrong(tomllib.loads(written)) == []
    assert wrong(tomllib.loads(dump(load(path)))) == []


def test_it_has_the_keys_of_the_dataclasses():
    top = set(VALID.schema["properties"])
    assert top == {f.name for f in fields(Config)} - {"source"} | {"extends"}
    for field in fields(Config):
        ref = VALID.schema["properties"].get(field.name, {}).get("$ref", "")
        if ref:
            node = VALID.schema["definitions"][ref.rsplit("/", 1)[1]]
            assert set(node["properties"]) == {f.name for f in fields(field.type)}


def test_tables_that_may_be_misspelt_are_closed():
    nodes = [VALID.schema, *VALID.schema["definitions"].values()]
    assert all(node["additionalProperties"] is False for node in nodes)
    required = [name for name, node in VALID.schema["definitions"].items() if "required" in node]
    assert required == ["Bound", "Phase", "Rule", "Source"]


def test_descriptions_come_from_docstrings_and_comments():
    definitions = VALID.schema["definitions"]
    keys = {(name, key): value for name, node in definitions.items() for key, value in node["properties"].items()}
    assert keys["TrainConfig", "decay"]["description"].startswith("share of the run")
    assert keys["QuantSpec", "hadamard"]["description"].startswith("0, or the size")
    assert "macro-block" in keys["Scale", "outer_format"]["description"]
    assert keys["Rule", "first"]["description"] == keys["Rule", "last"]["description"] != ""
    assert all("description" in keys[name, key] for name, key in keys if name in ("QuantSpec", "Scale") and key != "scale")


# --- what a person may write ---

WRITTEN = [
    "extends = 'base.toml'",
    "extends = 'mxfp8.toml'\n[specs]\nmx = { scale = { rule = 'floor' } }",
    "extends = 'nvfp4-4over6.toml'\n[specs]\nfos = { by = 'largest_error' }",
    "extends = 'nvfp4-4over6.toml'\n[specs]\nother = { like = 'fos', by = 'absolute_error' }",
    "[specs]\na = {}\nb = 'a'\nc = { like = 'b', hadamard = 16, signs = 'fresh' }",
    "[specs]\na = {}\nb = { like = 'a', format = 'e3m4b5' }\n[recipes.r.fprop]\nx = 'b'\nw = { like = 'a', block = [16, 16] }",
    "[specs.a]\nformat = 'ue4m4b7'",
    "[recipes.r.fprop]\nx = { candidates = [{}, { format = 'int4', scale = { target = 6.0, outer_target = 448.0 } }] }",
    "[sites]\nnorm_gain = { format = 'e4m3', block = [1, 32], scale = { format = 'e8m0' } }",
    "[specs]\na = { format = 'bf16', scale = { format = 'none' } }\n[weights]\nstore = 'a'\nkahan = true",
    "[optimizer]\nstate = { format = 'e4m3', block = [1, 128], scale = { format = 'fp32' } }",
    "[specs]\na = { scale = { outer = '1x64', rounding = 'stochastic4' }, rounding = 'stochastic17' }",
    "[train]\nlr = 1\nclip = inf\nprofile = '3:5'",
    "[[policy]]\nrecipe = 'bf16'\nfirst = 0\n[[policy]]\nrecipe = 'bf16'",
    "[data]\nsource = ''\n[data.sources.a]\nsource = 'pysource'\n[[data.phases]]\nuntil = 1\nshares = { a = 1 }",
]


@pytest.mark.parametrize("content", WRITTEN)
def test_what_load_reads_is_valid(content, tmp_path):
    (tmp_path / "x.toml").write_text(content.replace("extends = '", f"extends = '{ROOT.as_posix()}/configs/"))
    load(tmp_path / "x.toml")
    assert wrong(tomllib.loads(content)) == []


WRONG = [  # (a file, the path that the schema blames, a word of its message)
    ("[trian]\nsteps = 3", "", "'trian'"),
    ("[train]\nstepz = 3", "train", "'stepz'"),
    ("[train]\nsteps = 'many'", "train.steps", "integer"),
    ("[train]\nsteps = 0", "train.steps", "minimum"),
    ("[train]\nlr = 0", "train.lr", "minimum"),
    ("[train]\nbetas = [0.9]", "train.betas", "short"),
    ("[train]\ndtype = 'b16'", "train.dtype", "'bf16'"),
    ("[train]\nrecompute = 1", "train.recompute", "'selective'"),
    ("[run]\noverwrite = 1", "run.overwrite", "boolean"),
    ("[train]\nprofile = 'abc'", "train.profile", "match"),
    ("source = 'x'", "", "'source'"),
    ("extends = 3", "extends", "string"),
    ("specs = 3", "specs", "object"),
    ("[specs]\na = 3", "specs.a", "'string'"),
    ("[specs]\na = { fromat = 'e2m1' }", "specs.a", "'fromat'"),
    ("[specs]\na = { format = 'e9m1' }", "specs.a.format", "'e9m1'"),
    ("[specs]\na = { rounding = 'stochastik8' }", "specs.a.rounding", "'stochastik8'"),
    ("[specs]\na = { rounding = 'stochastic25' }", "specs.a.rounding", "'stochastic25'"),
    ("[specs]\na = { block = [1, 16, 2] }", "specs.a.block", "long"),
    ("[specs]\na = { block = [1, 'all'] }", "specs.a.block.1", "integer"),
    ("[specs]\na = { signs = 'fixd' }", "specs.a.signs", "'fixed'"),
    ("[specs]\na = { scale = 'e4m3' }", "specs.a.scale", "object"),
    ("[specs]\na = { scale = { format = 'int8' } }", "specs.a.scale.format", "'int8'"),
    ("[specs]\na = { scale = { format = 'e8m0', rule = 'up' } }", "specs.a.scale.rule", "'rceil'"),
    ("[specs]\na = { scale = { outer = 'column' } }", "specs.a.scale.outer", "match"),
    ("[specs]\na = { scale = { rounding = 'away' } }", "specs.a.scale.rounding", "'away'"),
    ("[specs]\na = { like = 3 }", "specs.a.like", "string"),
    ("[specs]\na = {}\nb = { candidates = ['a', 'a'], format = 'e2m1' }", "specs.b", "'format'"),
    ("[specs]\na = {}\nb = { candidates = ['a', { fromat = 'e2m1' }] }", "specs.b.candidates.1", "'fromat'"),
    ("[specs]\na = {}\nb = { candidates = ['a', { candidates = ['a', 'a'] }] }", "specs.b.candidates.1", "'candidates'"),
    ("[recipes.r]\nwgard = {}", "recipes.r", "'wgard'"),
    ("[recipes.r]\nfprop = { g = 'a' }", "recipes.r.fprop", "'g'"),
    ("[recipes.r]\nfprop = 'a'", "recipes.r.fprop", "object"),
    ("[recipes.r]\nweights = 'bf61'", "recipes.r.weights", "'master'"),
    ("[[policy]]\nmatch = 'head'", "policy.0", "'recipe'"),
    ("[[policy]]\nrecipe = 'bf16'\nlats = 2", "policy.0", "'lats'"),
    ("[policy]\nrecipe = 'bf16'", "policy", "array"),
    ("[sites]\nnorm_gains = {}", "sites", "'norm_gains'"),
    ("[weights]\nstore = { candidates = [{}, {}] }", "weights.store", "'candidates'"),
]


@pytest.mark.parametrize(("content", "path", "word"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_underlined(content, path, word, tmp_path):
    found = wrong(tomllib.loads(content))
    assert [f for f in found if f.startswith(f"{path}: ") and word in f], found
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(ValueError):
        load(tmp_path / "x.toml")


# --- words ---


def accepts(kind: str, key: str):
    node = schema()["definitions"][kind]["properties"][key]
    return lambda word: wrong(word, node) == []


def spellings() -> list[str]:
    biases = ["", *(f"b{b}" for b in (0, 1, 5, 15, 126, 127, 128, 200, 999, -1, -12, -120)), "b00", "b-0", "b1000", "b"]
    floats = [f"{u}e{E}m{M}{b}" for u in ("", "u") for E in range(10) for M in range(12) for b in biases]
    return [*NAMED, *floats, *(f"int{n}" for n in range(19)), "fp32", "none", "e4m3fn", "E4M3", " e4m3", "e2m1x", "posit8", ""]


def test_names_of_formats():
    """All of FORMATS; of others only what the grammar spells and fp32 cannot hold."""
    valid = accepts("QuantSpec", "format")
    for name in spellings():
        if name in FORMATS:
            assert valid(name), name
        elif valid(name):
            unsigned, E, M, bias = re.fullmatch(r"(u?)e(\d)m(\d+)(?:b(.+))?", name).groups()
            fmt = Format(name, int(E), int(M), bias and int(bias), signed=not unsigned)
            assert fmt.emin < -126 or fmt.max > FLT_MAX, name


def test_names_of_formats_of_scales():
    valid = accepts("Scale", "format")
    for name in spellings():
        try:
            Scale(name)
        except ValueError:
            assert not valid(name), name
        else:
            assert valid(name), name
    assert set(SCALES) < set(NAMED)


def test_names_of_roundings():
    elements, scales = accepts("QuantSpec", "rounding"), accepts("Scale", "rounding")
    for name in [*ROUNDINGS, *(f"stochastic{n}" for n in range(-1, 101)), "stochastic08", "Nearest", "", "up"]:
        try:
            bits = random_bits(name)
        except ValueError:
            assert not elements(name) and not scales(name), name
        else:
            assert elements(name), name
            assert scales(name) == (bits > 0 or name == "nearest"), name
