"""python -m configs.schema: write configs/schema.json, by which an editor completes a TOML file and underlines its mistakes.

It is made from the dataclasses of Config, with their docstrings and comments as descriptions, for what a person writes and
not for what `load` makes of it: `extends`, a spec by name or `like` another one, and no key is required that an extended file
may bring. Whatever `load` reads, the schema takes (but dates, which to `load` are strings). What it cannot say is left to
`load`: names that must exist, keys that must fit each other. JSON Schema draft-07, which editors of TOML know. A config names
its schema in its first line, DIRECTIVE.
"""

import inspect
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from configs import Config
from quant.choice import KINDS, Choice
from quant.formats import NAMED, Format
from quant.rounding import ROUNDINGS
from quant.spec import QuantSpec, Scale

FILE = Path(__file__).with_name("schema.json")
DIRECTIVE = f"#:schema {FILE.name}"

# The grammars of quant/formats.py (Formats) and quant/rounding.py; of the former, scales can have those that have a NaN.
FORMAT = r"^(int([2-9]|1[0-6])|u?e[1-8]m(\d|10)(b(0|-?[1-9]\d{0,2}))?)$"
SCALE_FORMAT = r"^ue8m0(b127)?$"
STOCHASTIC = r"^stochastic([1-9]|1\d|2[0-4])?$"
SCALES = [f.name for f in NAMED.values() if isinstance(f, Format) and f.bits <= 8 and f.nan_code is not None]


def _word(names, pattern: str) -> dict:
    """One of the names, which an editor offers, or another word."""
    return {"type": "string", "anyOf": [{"enum": list(names)}, {"pattern": pattern}]}


WORDS = {  # keys whose values pydantic knows as strings only
    (QuantSpec, "format"): _word(NAMED, FORMAT),
    (QuantSpec, "rounding"): _word(ROUNDINGS, STOCHASTIC),
    (Scale, "format"): _word([*SCALES, "bf16", "fp32", "none"], SCALE_FORMAT),
    (Scale, "rounding"): _word(["nearest", "stochastic"], STOCHASTIC),
}
EXTENDS = "the file, relative to this one, whose keys hold where this has none, or several, the later before the earlier"
LIKE = "the spec in [specs] that this one starts from; the other keys here change it"


def schema() -> dict[str, Any]:
    raw = TypeAdapter(Config).json_schema(ref_template="#/definitions/{model}")
    kinds = _kinds(Config)
    made = {name: _written(kinds[name], node) for name, node in raw["$defs"].items()}
    like = {"like": {"description": LIKE, "type": "string"}}
    keys = {kind: made.pop(kind.__name__)["properties"] for kind in KINDS.values()}
    table = {"type": ["string", "object"], "additionalProperties": False}
    about = "What happens to one operand: the name of a spec in [specs], or a table of keys"
    made["QuantSpec"] = {"description": about, **table, "properties": like | keys[QuantSpec]}
    made["Spec"] = {
        "description": f"{about}; or candidates, one of which is chosen from the numbers in the tensor",
        **table,
        "properties": {key: what for some in (like, *keys.values()) for key, what in some.items()},
        "dependencies": {"candidates": {"properties": dict.fromkeys(like | keys[Choice], {}), "additionalProperties": False}},
    }
    top = _written(Config, raw | {"description": ""})
    del top["properties"]["source"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of narrow: one file, one experiment",
        **top,
        "properties": {"extends": {"description": EXTENDS, "type": ["string", "array"], "items": {"type": "string"}}}
        | top["properties"],
        "definitions": dict(sorted(made.items())),
    }


def _written(kind: type, node: dict) -> dict:
    """What pydantic has for a dataclass, as one writes it in TOML, with descriptions."""
    about, keys = _described(kind, node.get("description", ""))
    properties = {}
    for key, value in node["properties"].items():
        value = _plain(value) | WORDS.get((kind, key), {})
        properties[key] = value if "$ref" in value or key not in keys else {"description": keys[key]} | value
    required = [key for key in node.get("required", ()) if kind is not Choice]
    found = {"description": about} if about else {}
    found |= {"type": "object", "additionalProperties": False, "properties": properties}
    return found | ({"required": required} if required else {})


def _plain(node: Any) -> Any:
    """Without what TOML has not (null) or only pydantic needs, and a spec's kinds as one Spec."""
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: _plain(value) for key, value in node.items() if key != "title"}
    if node.get("oneOf") == [{"$ref": f"#/definitions/{kind.__name__}"} for kind in KINDS.values()]:
        return {"$ref": "#/definitions/Spec"}
    if {"type": "null"} in node.get("anyOf", ()):
        (other,) = (branch for branch in node.pop("anyOf") if branch != {"type": "null"})
        node |= other
    if "prefixItems" in node:
        node["items"] = node.pop("prefixItems")[0]
    values = node.get("default", 0) if isinstance(node.get("default"), list) else [node.get("default", 0)]
    if "$ref" in node or any(value is None or isinstance(value, dict) for value in values):
        node.pop("default", None)  # of a table each key has its own
    return node


def _described(kind: type, doc: str) -> tuple[str, dict[str, str]]:
    """(what a dataclass is about, key -> what it is), from "key: what" in its docstring and comments beside its fields."""
    names = "|".join(f.name for f in fields(kind))
    about, *parts = re.split(rf"(?:^|(?<=[.;])\s|\n)((?:{names})(?: / (?:{names}))*): ", doc)
    keys = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.M))
    for heads, text in zip(parts[::2], parts[1::2], strict=True):
        keys |= dict.fromkeys(heads.split(" / "), " ".join(text.split()).rstrip(";"))
    return " ".join(about.split()), keys


def _kinds(kind: Any) -> dict[str, type]:
    """Name -> every dataclass inside."""
    if isinstance(kind, type) and is_dataclass(kind):
        return {kind.__name__: kind} | {k: v for f in fields(kind) for k, v in _kinds(f.type).items()}
    return {k: v for part in get_args(kind) for k, v in _kinds(part).items()}


def text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
