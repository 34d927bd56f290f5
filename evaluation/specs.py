"""Names of specs for --weights and --activations, each an inline table of TOML, as a config would have it.

    evaluate.py RUN --weights nvfp4      a name below
    evaluate.py RUN --weights nv2d       one of the run's own specs
    evaluate.py RUN --weights '{ like = "mxfp4", block = [1, 16] }'      any spec, also like one of these

int2 to int8: one fp32 scale a row; -128: 128 elements. The E8M0 scales round up, so that nothing saturates.
"""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

from configs import load
from quant import Choice
from quant.choice import Spec
from quant.qtensor import SPECS
from quant.spec import QuantSpec, known


def _mx(name: str) -> str:
    return f'{{ format = "{name}", block = [1, 32], scale = {{ format = "e8m0" }} }}'


def _fp32(name: str, block: tuple[int, int], rest: str = "") -> str:
    return f'{{ format = "{name}", block = {list(block)}, scale = {{ format = "fp32"{rest} }} }}'


NAMED = {
    "nvfp4": '{ format = "e2m1", block = [1, 16] }',
    "nvfp4-2d": '{ format = "e2m1", block = [16, 16] }',
    "mxfp4": _mx("e2m1"),
    "mxfp6": _mx("e3m2"),
    "mxfp6-e2m3": _mx("e2m3"),
    "mxfp8": _mx("e4m3"),
    "mxfp8-e5m2": _mx("e5m2"),
    "mxint8": _mx("int8"),
    "fp8": _fp32("e4m3", (-1, -1)),
    "fp8-e5m2": _fp32("e5m2", (-1, -1)),
    "fp8-row": _fp32("e4m3", (1, -1)),
    "nf4": _fp32("nf4", (1, 64)),  # the blocks of QLoRA, arXiv:2305.14314
    "posit8": _fp32("posit8-es1", (-1, -1), ", target = 1"),  # densest at 1
    **{f"int{bits}": _fp32(f"int{bits}", (1, -1)) for bits in range(8, 1, -1)},
    **{f"int{bits}-128": _fp32(f"int{bits}", (1, 128)) for bits in range(8, 1, -1)},
    "int8-tensor": _fp32("int8", (-1, -1)),
    "bf16": '{ format = "bf16", scale = { format = "none" } }',
}


def preset(name: str) -> QuantSpec:
    return SPECS.validate_json(json.dumps(tomllib.loads(f"spec = {NAMED[name]}")["spec"]), strict=True)


def named(text: str, option: str, config: Path) -> Spec:
    """The spec that an option names, to nearest. `config`: of the run, whose own specs come before those above.

    Raises ValueError, one sentence with the nearest valid name.
    """
    own = load(config).specs
    extra = [f"specs.{name}={table}" for name, table in NAMED.items() if name not in own]
    if not text.lstrip().startswith("{"):
        known(text, [*own, *(name for name in NAMED if name not in own)], f"spec of {option}:")
        return to_nearest(load(config, extra).specs[text])
    try:
        tomllib.loads(f"spec = {text}")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{option} {text}: no table of TOML: {error}") from None
    return to_nearest(load(config, [*extra, f"specs.{option}={text}"]).specs[option])


def to_nearest(spec: Spec) -> Spec:
    """Without noise: stochastic roundings, of elements and scales, become nearest (and the correction that needs one goes)."""
    if isinstance(spec, Choice):
        return replace(spec, candidates=tuple(map(to_nearest, spec.candidates)))
    scale = replace(spec.scale, rounding="nearest", correction="none") if spec.scale.stochastic else spec.scale
    return replace(spec, scale=scale, rounding="nearest" if spec.stochastic else spec.rounding)
