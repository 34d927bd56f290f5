"""One TOML file is one experiment. load(path, overrides) -> Config, validated; dump(config) writes it back resolved.

    extends = "base.toml"           keys of this file win over the extended one's; tables merge, a policy list replaces
    extends = ["a.toml", "b.toml"]  of several, keys of the later one win, e.g. a recipe and then the sizes of a model
    [specs]    name = { like = "other", ... }            a QuantSpec; `like` copies another one first
    [recipes.name]  wgrad = { g = "spec" | { like = "spec", hadamard = 16 } }
    [[policy]]      rules in order, first match wins; a rule with a `name` is reached as policy.NAME.key

Overrides are `key.path=value` with values in TOML's grammar; what is no TOML value is taken as a string (run.name=a), and
so is a date. Nothing else is converted: "100" is no number, and 1 is not true. A single key of a spec, recipe or rule can
be set only where that already exists; a new one is given whole (specs.mine={like="nv"}).
Everything wrong with a file or an override is a ValueError of one sentence: file or override, key path, what was
expected, and the nearest valid name.

For editors schema.py writes schema.json, for README.md table.py the table of recipes.

Left out: interpolation, environment variables, includes other than `extends`.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from data import DataConfig, near
from model import GPT, ModelConfig
from quant import Moments, Recipe, Rule, Sites, Weights, WeightStore, attach
from quant.choice import KINDS, Spec
from quant.context import Context
from quant.encode import check as check_blocks
from quant.linear import linears
from quant.policy import assign, switches
from quant.recipe import OPERANDS

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
    quantized: bool = True  # checkpoints hold the codes of training too, in quantized.safetensors
    keep: int = Field(2, ge=1)  # complete checkpoints kept
    samples: int = Field(2, ge=0)  # texts sampled at the end
    sample_tokens: int = Field(96, ge=1)

    def __post_init__(self):
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name {self.name!r}: expected the name of one folder inside run.out, without '/'")


@frozen
class TrainConfig:
    """The run itself. A step is `micro_batches` micro-batches of `batch_size` sequences of model.seq_len tokens."""

    steps: int = Field(500, ge=1)
    batch_size: int = Field(8, ge=1)
    micro_batches: int = Field(2, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False)
    final_lr: float = Field(0.01, ge=0)  # at the end of the decay, as a share of lr
    warmup: float = Field(0.04, ge=0, le=1)  # share of the run
    decay: float = Field(0.2, ge=0, le=1)  # share of the run; in between the rate is lr (WSD)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # matrices only
    clip: float = Field(1.0, gt=0)  # global gradient norm
    dtype: Literal["bf16", "fp32"] = "bf16"  # compute dtype: activations, and weights where they are not quantised
    gemm: Literal["auto", "emulate", "scaled_mm", "triton", "bf16", "fp32", "te16", "rz64", "rz64_rne", "exact"] = "auto"
    # (the backend of quantised GEMMs, or the mode of emulated ones, quant/gemm.py)
    rounding: Literal["exact", "cvt.rs"] = "exact"  # "cvt.rs": stochastic rounding by that instruction, see docs/kernels.md
    compile: Literal["quantiser", "model", "off"] = "quantiser"  # "model" also changes how its sums are ordered
    recompute: Literal["none", "selective", "full"] = "none"  # activation checkpointing, block by block (model.py)
    log_every: int = Field(10, ge=1)
    val_every: int = Field(100, ge=1)
    val_batches: int = Field(8, ge=1)  # of batch_size sequences
    stats_every: int = Field(0, ge=0)  # steps between per-operand statistics; 0: never, at no cost
    profile: str = Field("", pattern=r"^(\d+:\d+)?$")  # "FROM:TO" steps whose trace is written into the run folder

    @field_validator("recompute", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """As older configs have it."""
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    def __post_init__(self):
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} exceed the whole run")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)}: expected two numbers from 0 to below 1")
        first, last = map(int, (self.profile or "0:1").split(":"))
        if not first < last <= self.steps:
            raise ValueError(f"profile {self.profile!r}: expected FROM:TO with FROM < TO <= train.steps = {self.steps}")


@frozen
class ParallelConfig:
    """How the ranks of a run share it (parallel.py). `reduction`, `accumulate` and `replicas` change the last bits of
    sums, nothing else changes a number."""

    replicas: int = Field(1, ge=1)  # HSDP: so many copies of the model, each cut over ranks / replicas of them
    gather: Literal["weights", "codes"] = "weights"  # what all-gathers move: weights, or codes made before
    reduction: Literal["ordered", "library"] = "ordered"  # gradients, added in the order of ranks or as NCCL does
    accumulate: Literal["whole", "cut"] = "whole"  # gradients are reduced once a step, or after each micro-batch (less memory)
    prefetch: int = Field(1, ge=0)  # blocks that are gathered ahead
    offload: bool = False  # the optimiser's moments in the host's memory, a matrix at a time on the GPU (quant/moments.py)


@frozen
class Config:
    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    specs: dict[str, Spec] = Field(default_factory=dict)
    recipes: dict[str, Recipe] = Field(default_factory=dict)
    policy: tuple[Rule, ...] = (Rule(recipe="bf16"),)
    sites: Sites = Sites()
    weights: Weights = Weights()
    optimizer: Moments = Moments()
    source: str = ""  # the file, for messages and names; set by `load`, no key

    @property
    def tokens_per_step(self) -> int:
        return self.train.micro_batches * self.train.batch_size * self.model.seq_len


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), fits: bool = True) -> Config:
    """Read, merge, override, validate, and (`fits`: of what no run has begun with yet) check that everything fits together.
    Raises ValueError, one sentence."""
    layers: list[tuple[str, dict]] = []  # a file or an override, and everything merged up to it
    for file, content in reversed(_read(Path(path))):
        layers.append((str(file), _merge(layers[-1][1] if layers else {}, content)))
    for override in overrides:
        layers.append((f"override {override!r}", _override(layers[-1][1], override)))
    config, problems = _parse(layers[-1][1], fits)
    if config is None:
        problem, hint = next(iter(problems.items()))
        while len(layers) > 1 and problem in _parse(layers[-2][1])[1]:
            layers.pop()  # not to blame: the problem was there before
        raise ValueError(f"{layers[-1][0]}: {problem}{hint}")
    return replace(config, source=str(path))


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
    m, tokens = config.model, config.train.batch_size * config.model.seq_len
    sizes = {
        "train.batch_size * model.seq_len": tokens,
        "model.d_model": m.d_model,
        "model.ffn": m.ffn,
        "(model.heads + 2 * model.kv_heads) * model.head_dim": (m.heads + 2 * m.kv_heads) * m.head_dim,
        "model.heads * model.head_dim": m.heads * m.head_dim,
        "model.vocab_size": m.vocab_size,
    }
    if "M" in m.pattern:
        inner, channels, heads = m.mamba.widths(m.d_model)
        sizes["model.mamba.expand * model.d_model"] = inner
        sizes["(2 * model.mamba.expand * model.d_model + 2 * groups * state + heads) of model.mamba"] = inner + channels + heads
    rows = {"norm_gain": (1, m.d_model), "scores": (tokens * m.heads, m.seq_len), "residual": (tokens, m.d_model)}
    for name, spec in vars(config.sites).items():
        if spec:
            check_blocks(rows[name], spec, f"sites.{name}")
    for name, p in WeightStore(model, config.weights, 0).stored.items():
        check_blocks(p.shape, config.weights.store, f"weights.store of {name}")
    if state := config.optimizer.state:
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                check_blocks(p.shape, state, f"optimizer.state of {name}")
        b1, b2 = config.train.betas
        if b1 * b1 >= b2:
            raise ValueError(f"train.betas = {[b1, b2]}: optimizer.state needs b1^2 < b2, which bounds the updates of AdamW")
    for share in [0.0, *switches(config.policy)]:
        assign(model, config.recipes, config.policy, share)
        for module in linears(model).values():
            try:
                module.check(tokens)
            except ValueError as error:
                own = (tokens, module.in_features, module.out_features)
                keys = ", ".join(f"{key} = {size}" for key, size in sizes.items() if size in own)
                raise ValueError(f"{error}; sizes here: {keys}") from None
            spec, window = module.recipe and module.recipe.fprop.x, config.model.seq_len
            if spec and window % spec.multiple[0]:
                raise ValueError(
                    f"{module.name} fprop.x: model.seq_len = {window} must be a multiple of {spec.multiple[0]}, the rows of a "
                    f"block of {spec.short()}, since sampling sees a single window"
                )


# --- reading ---


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The file and those it extends, those that win first. `seen`: the files that led here."""
    if path.resolve() in map(Path.resolve, seen):
        raise ValueError(f"{path}: extends itself")
    place = f"{seen[-1]}: extends: {path}" if seen else path
    try:
        content = _plain(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        found = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / found[0]}?" if found else ""
        what = "no such file" if path.suffix else "neither a config, which ends in .toml, nor a run folder that is there"
        raise ValueError(f"{place}: {what}{hint}") from None
    except IsADirectoryError:
        inside = near("", sorted(p.name for p in path.glob("*.toml")))
        raise ValueError(f"{place}: a folder, expected a TOML file{inside}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{place}: not a TOML file: {error}") from None
    bases, found = content.pop("extends", []), [(path, content)]
    names = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: extends: expected the name of a file or a list of such, got {bases!r}")
    for name in reversed(names):
        found += _read(path.parent / name, (*seen, path))
    files = [file.resolve() for file, _ in found]
    if twice := [file for file in files if files.count(file) > 1]:
        raise ValueError(
            f"{path}: extends: {' and '.join(names)} both lead to {twice[0].name}, by which the later would undo the earlier"
        )
    return found


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict) and "like" not in over:
        return {**base, **{k: _merge(base.get(k), v) for k, v in over.items()}}
    return over


def _plain(content: dict) -> dict:
    """A copy with dates as text and the name of a spec as { like = name }, so that a table over it varies that spec."""
    content = json.loads(json.dumps(content, default=str))
    for table, key, _ in _spec_places(content):
        if isinstance(table[key], str):
            table[key] = {"like": table[key]}
    return content


def _spec_places(raw: dict) -> Iterator[tuple[dict, str, str]]:
    """(table or list, key, key path) of everything that stands for a QuantSpec or a Choice, and before it what that names:
    its candidates, and what its bounds compare with."""

    def items(table: Any, key: str) -> list:
        return found if isinstance(table, dict) and isinstance(found := table.get(key), list) else []

    def places(table: dict, path: str) -> Iterator[tuple[Any, Any, str]]:
        for key, value in table.items():
            candidates = items(value, "candidates")
            for i in range(len(candidates)):
                yield candidates, i, f"{path}.{key}.candidates.{i + 1}"
            for i, rung in enumerate(items(value, "bounds"), 1):
                for j, bound in enumerate(rung if isinstance(rung, list) else [], 1):
                    if isinstance(bound, dict) and "than" in bound:
                        yield bound, "than", f"{path}.{key}.bounds.{i}.{j}.than"
            yield table, key, f"{path}.{key}"

    specs, recipes = (raw[k] if isinstance(raw.get(k), dict) else {} for k in ("specs", "recipes"))
    yield from places(specs, "specs")
    for name, recipe in recipes.items():
        for gemm, operands in recipe.items() if isinstance(recipe, dict) else ():
            if isinstance(operands, dict):
                yield from places(operands, f"recipes.{name}.{gemm}")
    if isinstance(raw.get("sites"), dict):
        yield from places(raw["sites"], "sites")
    for section, key in (("weights", "store"), ("optimizer", "state")):
        if isinstance(table := raw.get(section), dict) and key in table:
            yield table, key, f"{section}.{key}"


def _override(raw: dict, text: str) -> dict:
    """A copy of `raw` with one key set."""
    key, equals, given = text.partition("=")
    if not equals or not key.strip() or "\n" in text:
        raise ValueError(f"override {text!r}: expected one key=value, e.g. train.steps=100")
    try:
        value = tomllib.loads(f"value = {given}")["value"]
        json.dumps(value)
    except (tomllib.TOMLDecodeError, TypeError):
        value = given.strip()  # a bare word or a date
    *path, last = key.strip().split(".")
    raw = _plain(raw)
    node: Any = raw
    for depth, part in enumerate(path, 1):
        kind = {"specs": "spec", "recipes": "recipe", "policy": "policy rule"}.get(path[0])
        if kind and depth == 2:  # these have names, and a mistyped one must not become a new entry that nothing uses
            named = node
            if isinstance(node, list):
                named = {str(rule["name"]): rule for rule in node if isinstance(rule, dict) and rule.get("name")}
            if part not in named:
                raise ValueError(f"override {text!r}: no {kind} is named {part!r}{near(part, named)}")
            child = named[part]
        elif kind == "recipe" and depth == 4 and ".".join(path[2:4]) in OPERANDS and part not in node:
            raise ValueError(
                f"override {text!r}: {'.'.join(path)} is not quantised, so there is nothing to vary; name a spec first, "
                f"e.g. {'.'.join(path)}={next(iter(raw.get('specs', {})), 'NAME')}"
            )
        else:
            child = node.setdefault(part, {})
        place = ".".join(path[:depth])
        if not isinstance(child, dict | list if place == "policy" else dict):
            raise ValueError(f"override {text!r}: {place} is {child!r}, which has no keys")
        node = child
    if isinstance(node, list):
        raise ValueError(f"override {text!r}: say which key of the policy rule, e.g. {key.strip()}.last=0")
    node[last] = value
    return raw


def _parse(raw: dict, fits: bool = True) -> tuple[Config | None, dict[str, str]]:
    """(the Config, {}), or (None, what is wrong: "key path: what" -> a hint at what would be right), missing keys last:
    a misspelt key is also missing."""
    raw, problems = _plain(raw), {}
    specs = raw.get("specs", {})

    def spec(value: Any, place: str, seen: tuple = ()) -> Any:
        """`value` with the spec that it is `like` put in, and so with the candidates of a Choice."""
        if not isinstance(value, dict) or "like" not in value:
            return value
        name, rest = value["like"], {k: v for k, v in value.items() if k != "like"}
        if name in seen:
            problems[f"{place}: specs {' -> '.join((*seen, name))} are like each other"] = ""
        elif name not in list(specs):
            problems[f"{place}: no spec is named {name!r}"] = near(name, specs)
        else:
            return _merge(spec(specs[name], f"specs.{name}", (*seen, name)), rest)
        return rest

    if "source" in raw:
        problems["source: unknown key 'source'"] = near("source", _valid_keys([]))
    if isinstance(specs, dict):
        for table, key, place in _spec_places(raw):
            table[key] = spec(table[key], place, (place.split(".")[1],) if place.startswith("specs.") else ())
    try:  # in JSON's strict mode a table is a dataclass and a list a tuple, but nothing else is converted
        config = TypeAdapter(Config).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems |= dict(map(_explain, error.errors()))
        return None, dict(sorted(problems.items(), key=lambda problem: problem[0].endswith("required")))
    try:
        if fits:
            check(config)
    except ValueError as error:
        problems.setdefault(str(error), "")
    return None if problems else config, problems


def _explain(error: Any) -> tuple[str, str]:
    """One of pydantic's errors as "key path: what", and the hint. Policy rules count from 1, as in quant/policy.py."""
    place, kind, got = list(map(str, error["loc"])), error["type"], error["input"]
    path = [part for part in place if part not in KINDS]
    lists = "candidates", "bounds", "phases"
    path = [str(int(p) + 1) if p.isdigit() and {*path[max(i - 2, 0) : i]} & {*lists} else p for i, p in enumerate(path)]
    if path[:1] == ["policy"] and len(path) > 1:
        key = ": ".join([f"policy rule {int(path[1]) + 1}", *path[2:]])
    else:
        key = ".".join(path)
    if kind == "unexpected_keyword_argument":
        return f"{key}: unknown key {path[-1]!r}", near(path[-1], _valid_keys(place[:-1]))
    if kind == "missing":
        return f"{key}: this key is required", ""
    if any(part.startswith(("literal[", "tuple[")) for part in path):
        key = key[: key.index(".literal[" if ".literal[" in key else ".tuple[")]
        return f"{key}: expected 'tensor', 'block' or a block [rows, contraction], each at least 1, got {got!r}", ""
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}", ""
    for wrong, right in (("an object", "a table"), ("dictionary", "table"), ("array", "list"), ("tuple", "list")):
        message = message.replace(wrong, right)  # TOML's words
    hint = near(got, re.findall("'(.*?)'", error["ctx"]["expected"]), otherwise=False) if kind == "literal_error" else ""
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}", hint


def _valid_keys(path: list[str]) -> list[str]:
    """The keys of the dataclass that lies at `path` in Config."""
    kind: Any = Config
    for part in path:
        if part in KINDS:
            kind = KINDS[part]
        elif is_dataclass(kind):
            kind = next(f.type for f in fields(kind) if f.name == part)
        else:  # dict[str, X] or tuple[X, ...]: the part is a name or a number
            kind = next(a for a in get_args(kind) if a not in (str, ...))
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
    return [f.name for f in fields(kind) if (kind, f.name) != (Config, "source")]


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
                lines += ["", f"[{section}.{_key(name)}]", *(f"{k} = {_toml(v)}" for k, v in entry.items() if v is not None)]
        else:
            lines += ["", f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


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
