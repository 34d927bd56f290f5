"""One TOML file is one experiment. load(path, overrides) -> Config, validated; dump(config) writes it back resolved.

    extends = "base.toml"           keys of this file win over the extended one's; tables merge, a policy list replaces
    [specs]    name = { like = "other", ... }            a QuantSpec; `like` copies another one first
    [recipes.name]  wgrad = { g = "spec" | { like = "spec", hadamard = 16 } }
    [[policy]]      rules in order, first match wins; a rule with a `name` is reached as policy.NAME.key

Overrides are `key.path=value` with values in TOML's grammar; what is no TOML value is taken as a string (run.name=a).
Everything wrong with a file or an override is a ValueError of one sentence: file, key path, what was expected, and the
nearest valid name.

Left out: interpolation, environment variables, includes other than one `extends` a file.
"""

import difflib
import json
import tomllib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data import DataConfig
from model import GPT, ModelConfig
from quant import QuantSpec, Recipe, Rule, attach
from quant.linear import Context, linears
from quant.policy import assign, switches

frozen = dataclass(frozen=True, config=ConfigDict(extra="forbid"))


@frozen
class RunConfig:
    """Where results go and what happens around the training; none of it changes a number of the training."""

    name: str = ""  # of the folder out/NAME; made from the config's name and the time if empty
    out: str = "out"
    overwrite: bool = False  # start an existing out/NAME anew
    resume: int = Field(0, ge=0)  # continue from this step instead of the newest
    init_from: str = ""  # a step folder to branch from: weights, optimiser and position, under this config's recipe
    checkpoint_every: int = Field(0, ge=0)  # steps; 0: only at the end and when interrupted
    keep: int = Field(2, ge=1)  # complete checkpoints kept
    samples: int = Field(2, ge=0)  # texts sampled at the end
    sample_tokens: int = Field(96, ge=1)


@frozen
class TrainConfig:
    """The run itself. A step is `micro_batches` micro-batches of `batch_size` sequences of model.seq_len tokens."""

    steps: int = Field(500, ge=1)
    batch_size: int = Field(8, ge=1)
    micro_batches: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)
    lr: float = Field(2e-3, gt=0)
    final_lr: float = Field(0.01, ge=0)  # at the end of the decay, as a share of lr
    warmup: float = Field(0.04, ge=0, le=1)  # share of the run
    decay: float = Field(0.2, ge=0, le=1)  # share of the run; in between the rate is lr (WSD)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # matrices only
    clip: float = Field(1.0, gt=0)  # global gradient norm
    dtype: Literal["bf16", "fp32"] = "bf16"  # compute dtype: activations, and weights where they are not quantised
    gemm: Literal["auto", "bf16", "fp32"] = "auto"  # emulated GEMMs, see quant/gemm.py
    compile: Literal["quantiser", "model", "off"] = "quantiser"  # "model" also changes how its sums are ordered
    recompute: bool = False  # activation checkpointing, block by block
    log_every: int = Field(10, ge=1)
    val_every: int = Field(100, ge=1)
    val_batches: int = Field(8, ge=1)  # of batch_size sequences
    stats_every: int = Field(0, ge=0)  # steps between per-operand statistics; 0: never, at no cost
    profile: str = Field("", pattern=r"^(\d+:\d+)?$")  # "FROM:TO" steps whose trace is written into the run folder

    def __post_init__(self):
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} exceed the whole run")


@frozen
class Config:
    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    specs: dict[str, QuantSpec] = Field(default_factory=dict)
    recipes: dict[str, Recipe] = Field(default_factory=dict)
    policy: tuple[Rule, ...] = (Rule(recipe="bf16"),)
    source: str = ""  # the file, for messages and names

    @property
    def tokens_per_step(self) -> int:
        return self.train.micro_batches * self.train.batch_size * self.model.seq_len


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read, merge, override, validate, and check that everything fits together. Raises ValueError, one sentence."""
    files = _read(Path(path))
    raw: dict = {}
    for _, content in reversed(files):
        raw = _merge(raw, content)
    for override in overrides:
        _override(raw, override)
    try:
        config = TypeAdapter(Config).validate_python({**_resolve(raw), "source": str(path)})
    except ValidationError as error:
        raise ValueError(_explain(error, files, overrides)) from None
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def check(config: Config) -> None:
    """Raises ValueError if parts that are valid alone do not fit: policy and model, blocks and sizes, vocabularies."""
    if config.data.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.vocab_size = {config.data.vocab_size} does not fit model.vocab_size = {config.model.vocab_size}; "
            "the model needs at least as many rows as the tokenizer has tokens"
        )
    with torch.device("meta"):
        model = GPT(config.model)
    attach(model, Context())
    for share in [0.0, *switches(config.policy)]:
        assign(model, config.recipes, config.policy, share)
        for module in linears(model).values():
            module.check(config.train.batch_size * config.model.seq_len)


# --- reading ---


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The file and those it extends, nearest first."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: extends itself")
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"{path}: no such file{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    base = content.pop("extends", None)
    if base is None:
        return [(path, content)]
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends: expected the name of a file, got {base!r}")
    return [(path, content), *_read(path.parent / base, (*seen, path.resolve()))]


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict) and "like" not in over:
        return {**base, **{k: _merge(base.get(k), v) for k, v in over.items()}}
    return over


def _override(raw: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {text!r}: expected key=value, e.g. train.steps=100")
    try:
        value = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        value = value.strip()  # a bare word
    *path, last = key.strip().split(".")
    node: Any = raw
    for depth, part in enumerate(path):
        if isinstance(node, list):
            names = [rule.get("name", "") for rule in node]
            if part not in names:
                raise ValueError(
                    f"override {text!r}: no policy rule is named {part!r}; named are {_names(filter(None, names))}"
                )
            node = node[names.index(part)]
            continue
        child = node.setdefault(part, {})
        if isinstance(child, str) and path[0] == "recipes":  # an operand given by name: vary a copy of that spec
            child = node[part] = {"like": child}
        if not isinstance(child, dict | list):
            raise ValueError(f"override {text!r}: {'.'.join(path[: depth + 1])} is {child!r}, which has no keys")
        node = child
    if isinstance(node, list):
        raise ValueError(f"override {text!r}: say which key of the policy rule, e.g. {key.strip()}.last=0")
    node[last] = value


def _resolve(raw: dict) -> dict:
    """Replace `like` and names of specs by the tables they stand for."""
    raw = json.loads(json.dumps(raw))
    specs = raw.get("specs", {})

    def spec(value, place, seen=()):
        if isinstance(value, str):
            value = {"like": value}
        if not isinstance(value, dict) or "like" not in value:
            return value
        name = value["like"]
        if name in seen:
            raise ValueError(f"{place}: specs {' -> '.join((*seen, name))} are like each other")
        if name not in specs:
            near = difflib.get_close_matches(str(name), list(specs), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {_names(specs)}"
            raise ValueError(f"{place}: no spec is named {name!r}{hint}")
        base = spec(specs[name], f"specs.{name}", (*seen, name))
        return _merge(base, {k: v for k, v in value.items() if k != "like"})

    resolved = {name: spec(value, f"specs.{name}", (name,)) for name, value in specs.items()}
    for name, recipe in raw.get("recipes", {}).items():
        for gemm, operands in recipe.items() if isinstance(recipe, dict) else ():
            if isinstance(operands, dict):
                for operand, value in operands.items():
                    operands[operand] = spec(value, f"recipes.{name}.{gemm}.{operand}")
    return raw | ({"specs": resolved} if "specs" in raw else {})


def _names(names) -> str:
    return ", ".join(map(repr, names)) or "none"


def _explain(error: ValidationError, files, overrides) -> str:
    """The first of pydantic's errors as one sentence with its place and the nearest valid name."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "function-after"]
    key = ".".join(path)
    said = next((o for o in overrides if o.partition("=")[0].strip() == key), None)
    where = f"override {said!r}" if said else f"{next((f for f, c in files if _has(c, path)), files[0][0])}: {key}"
    if first["type"] == "unexpected_keyword_argument":
        valid = _valid_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.4)
        return f"{where}: unknown key {path[-1]!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; there are {_names(valid)}"
        )
    if first["type"] == "missing":
        return f"{where}: this key is required"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}"
    got = first["input"]
    hint = ""
    if first["type"] == "literal_error" and isinstance(got, str):
        near = difflib.get_close_matches(got, first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}: {message[0].lower()}{message[1:]}, got {got!r}{hint}"


def _has(content: Any, path: list[str]) -> bool:
    for part in path:
        if isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        elif isinstance(content, dict) and part in content:
            content = content[part]
        else:
            return False
    return True


def _valid_keys(path: list[str]) -> list[str]:
    """The keys of the dataclass that lies at `path` in Config."""
    kind: Any = Config
    for part in path:
        if is_dataclass(kind):
            kind = next((f.type for f in fields(kind) if f.name == part), None)
        else:  # dict[str, X] or tuple[X, ...]: the part is a name or a number
            kind = next((a for a in get_args(kind) if is_dataclass(a)), None)
        if not is_dataclass(kind):
            inner = [a for a in get_args(kind) if is_dataclass(a)]
            kind = inner[0] if inner and type(None) in get_args(kind) else kind
    return [f.name for f in fields(kind) if f.name != "source"] if is_dataclass(kind) else []


# --- writing ---


def dump(config: Config) -> str:
    """The resolved config as TOML that `load` reads back to an equal Config."""
    content = asdict(config)
    lines = [f"# resolved from {content.pop('source')}"]
    for section, value in content.items():
        if section == "policy":
            for rule in value:
                lines += ["", "[[policy]]", *(f"{k} = {_toml(v)}" for k, v in rule.items() if v is not None)]
        elif section in ("specs", "recipes"):
            for name, entry in value.items():
                lines += ["", f"[{section}.{name}]", *(f"{k} = {_toml(v)}" for k, v in entry.items() if v is not None)]
        else:
            lines += ["", f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Key path -> (old, new) of every leaf in which two resolved configs (as dicts) differ."""
    found = {}
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found
