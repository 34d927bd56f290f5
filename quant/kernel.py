"""Quantising, decoding and what ladders need, on a GPU: which specs the kernels take, and how they are called.

`obstacle(spec)` says why the kernels cannot; what they can is bit-equal to encode.py and choose.py (tests/test_kernels.py,
tests/test_mor_kernels.py), which do the rest. An operand that two GEMMs take along different axes, such as x in fprop and
wgrad, is read once: `encode_pair`. Of a ladder the candidates are quantised, their errors measured from their codes, and only
what is taken is decoded.

One thing is not bit-equal, and so never done unless `round_by("cvt.rs")` asks for it: stochastic rounding by the instruction
cvt.rs, of the same random words. Which of their bits it gives to which element is published nowhere.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch import Tensor

from quant.choice import Choice
from quant.encode import check, factor_of
from quant.encode import decode as decode_reference
from quant.formats import FORMATS, Format
from quant.qtensor import QTensor, in_memory
from quant.random import Key, constants
from quant.rounding import random_bits
from quant.scaling import threshold
from quant.spec import QuantSpec, Scale

BLOCKS = 16, 32, 64, 128
CANDIDATES = 4  # of a ladder
BF16 = QuantSpec("bf16", scale=Scale("none"))


@lru_cache
def obstacle(spec: QuantSpec | Choice) -> str:
    """Why the kernels do not quantise by this spec, or decide this ladder, or ""."""
    if isinstance(spec, Choice):
        return _of_ladder(spec) if spec.ladder else "a choice between specs"
    element, scale, (rows, n) = spec.element, spec.scale, spec.block
    if not _float(element) or not element.signed:
        return f"elements {spec.format}, no float of up to 8 bits with a negative zero"
    if element.emin - element.mantissa_bits < -103:  # (2^24 of these units are a factor in fp32)
        return f"elements {spec.format}, whose smallest number is below 2^-103"
    if not ((rows, n) in ((1, -1), (-1, -1)) or (n in BLOCKS and rows in (1, n))):
        return f"blocks {list(spec.block)}"
    if spec.hadamard > 32:
        return f"a Hadamard transform of {spec.hadamard}"
    bits = random_bits(spec.rounding)
    if 8 < bits <= 16:
        return f"{bits} random bits"
    if scale.statistic != "absmax" or scale.stochastic or scale.macro or scale.outer not in ("none", "tensor"):
        return f"scales {scale.short()}"
    if scale.format in ("none", "bf16") or not (scale.format in ("e8m0", "fp32") or _float(FORMATS[scale.format])):
        return f"scales {scale.short()}"
    if scale.format == "e8m0" and scale.rule != "gam" and threshold(spec)[0] < 2:
        return f"a target of {threshold(spec)[0]:g}"
    return ""


def _of_ladder(choice: Choice) -> str:
    """Its candidates and what they are compared with, after their transform; unscaled, BF16 alone."""
    if len(choice.candidates) > CANDIDATES:
        return f"{len(choice.candidates)} candidates"
    compared = [bound.than for rung in choice.rungs for bound in rung if bound.than]
    for spec in (replace(each, hadamard=0) for each in (*choice.candidates, *compared)):
        if spec.scale.format != "none":
            why = obstacle(spec)
        else:
            why = "" if replace(spec, signs="fixed") == BF16 else f"elements {spec.short()}"
        if why:
            return why
    return ""


def _float(fmt) -> bool:
    return isinstance(fmt, Format) and fmt.bits <= 8 and fmt.exponent_bits > 0 and fmt.mantissa_bits > 0 and fmt.negative_zero


@lru_cache
def _text(spec: QuantSpec | None) -> str:
    return "" if spec is None else json.dumps(asdict(spec))


DEVICES = {"cuda"}  # where the kernels run; testing/ adds what it stands for one


def takes(x: Tensor, *specs: QuantSpec | Choice) -> bool:
    """Whether the kernels quantise x [R, K] by these; they work on pairs, so both sizes are even. (Of a ladder: `decides`.)"""
    return _there(x) and not any(spec.ladder or obstacle(spec) for spec in specs)


def decides(x: Tensor, choice: Choice) -> bool:
    """Whether the kernels do all that this ladder needs of x [R, K]."""
    return _there(x) and choice.ladder and not obstacle(choice)


def _there(x: Tensor) -> bool:
    return x.device.type in DEVICES and not any(size % 2 for size in x.shape)


EXACT, RS = "exact", "cvt.rs"
_rounding = EXACT


def round_by(how: str, device: torch.device) -> None:
    """How kernels round stochastically from now on. "exact": by the rule of quant/rounding.py; "cvt.rs": E2M1, E4M3 and E5M2
    of 8 random bits by that instruction, the rest as before. Raises ValueError where the device has no cvt.rs."""
    global _rounding
    if how not in (EXACT, RS):
        raise ValueError(f"rounding {how!r}: expected {EXACT!r} or {RS!r}")
    if how == RS and device.type not in DEVICES:
        raise ValueError(f"rounding {RS!r}: an instruction of GPUs, sm_100a and sm_103a, and kernels do not run on {device}")
    if how == RS:
        from kernels import capability, target_at

        target_at(capability(), rs=True)
    _rounding = how


def rounds_by_rs(spec: QuantSpec | Choice) -> bool:
    """Whether cvt.rs rounds by this spec where `round_by` asks for it."""
    return not obstacle(spec) and spec.format in ("e2m1", "e4m3", "e5m2") and spec.rounding == "stochastic8"


def report(specs: Iterable[QuantSpec | Choice], device: torch.device) -> list[str]:
    """A line for what kernels quantise on this device and with what, and one for each spec that they do not, and why."""
    if device.type not in DEVICES:
        return []
    from kernels import capability, target_at

    one = {each: obstacle(each) for each in dict.fromkeys(specs)}
    has = [name for name, there in target_at(capability(), _rounding == RS)._asdict().items() if there]
    what = f"conversions of sm_{capability()} ({', '.join(has)})" if has else "exact arithmetic"
    count = sum(not why for why in one.values())
    lines = [f"kernels: quantise by {count} of {len(one)} specs, with {what}; operands of an odd size are fused"]
    if _rounding == RS:
        stochastic = [each for each in one if any(spec.stochastic for spec in each.candidates)]
        some = f"{sum(map(rounds_by_rs, stochastic))} of {len(stochastic)} stochastic specs"
        lines += [f"kernels: rounding is {RS} by {some}: results are not reproducible on other hardware"]
    return lines + [f"kernels: not {each.short()}, for {why}: fused" for each, why in one.items() if why]


def encode(
    x: Tensor, spec: QuantSpec, key: Key | None = None, sign_key: Key | None = None, held: Tensor | None = None
) -> QTensor:
    """encode.encode for x [R, K] that `takes` takes. Raises ValueError with the obstacle, if there is one."""
    from quant.launch import call, quantize_op  # (needs Triton)

    check(x.shape, spec)
    if why := obstacle(spec):
        raise ValueError(f"{spec.short()}: no kernel for {why}")
    m, transposed = in_memory(x)
    text, keys = _text(spec), _keys(spec, key, sign_key, held, x.device)
    out = call(quantize_op, m, "" if transposed else text, text if transposed else "", keys, keys, _rounding == RS)
    return _qtensor(out, spec, x.shape)


def encode_pair(
    x: Tensor, specs: tuple[QuantSpec, QuantSpec], keys: tuple, sign_keys: tuple, helds: tuple
) -> tuple[QTensor, QTensor]:
    """x [M, K] by the first spec, and x^T by the second, of one read; the other arguments are those of `encode`, of each.
    `takes` takes both."""
    from quant.launch import call, quantize_op

    for shape, spec in zip((x.shape, x.shape[::-1]), specs, strict=True):
        check(shape, spec)
    given = [_keys(*each, x.device) for each in zip(specs, keys, sign_keys, helds, strict=True)]
    out = call(quantize_op, x, *map(_text, specs), *given, _rounding == RS)
    return _qtensor(out[:3], specs[0], x.shape), _qtensor(out[3:], specs[1], x.shape[::-1])


def _keys(spec: QuantSpec, key: Key | None, sign_key: Key | None, held: Tensor | None, device) -> list[Tensor]:
    if spec.keyed and key is None:
        raise ValueError(f"{spec.short()} draws random bits: pass key=quant.random.Key(seed, ...)")
    empty = torch.empty(0, device=device)
    fresh = sign_key or (key and key.at(use=key.use + 16))
    words = constants((0,) * 5, torch.int64, device) if key is None else key.words(device)
    return [words, empty if fresh is None else fresh.words(device), empty if held is None else held.reshape(1)]


def _qtensor(out: list[Tensor], spec: QuantSpec, shape) -> QTensor:
    codes, scale, outer = out
    return QTensor(codes, scale, outer if outer.ndim == 0 else None, spec, tuple(shape))


def decode(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """encode.decode; by a kernel where one takes the spec and codes lie in rows, as the quantiser's do."""
    codes, scale = q.packed_codes, q.scale_codes
    if codes.device.type not in DEVICES or obstacle(q.spec) or not (codes.is_contiguous() and scale.is_contiguous()):
        return decode_reference(q)
    return values(None, (q.spec,), [q], torch.bfloat16 if q.spec.exact else torch.float32), factor_of(q)


def values(
    x: Tensor | None,
    specs: tuple[QuantSpec, ...],
    made: list[QTensor | None],
    dtype: torch.dtype,
    index: Tensor | None = None,
    per: tuple[int, int] = (-1, -1),
    dense: bool = False,
) -> Tensor:
    """[R, K] in BF16 or fp32: what was made of x by one spec, or of each unit `per` of x by that which index (int64 [] or
    [R / r, K / k]) names. made: the codes of each spec, None of BF16 unscaled, x itself; dense: times their factors."""
    from quant.launch import call, dequantise_op

    device = made[0].packed_codes.device if x is None else x.device
    empty = torch.empty(0, device=device)
    codes, scales, factors = _lists(made, empty, dense)
    x, index = (empty if t is None else t for t in (x, index))
    return call(dequantise_op, x, index, codes, scales, factors, _texts(specs), _sizes(per), dense, dtype == torch.bfloat16)


def errors(x: Tensor, spec: QuantSpec | None, q: QTensor | None, by: str, per: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a metric of choose.py is the quotient of, two fp64 [R / r, K / k], or the two of a range, where spec is None.
    x [R, K]; q: its codes by this spec, None as above."""
    from quant.launch import call, errors_op

    parts = _lists([q], torch.empty(0, device=x.device), True)
    found = call(errors_op, x, *parts, _text(spec), by, _sizes(per))
    return found[0], found[1]


def _lists(made: list[QTensor | None], empty: Tensor, factors: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes, scales and factors of each, empty where there are none."""
    found = [(empty,) * 3 if q is None else (q.packed_codes, q.scale_codes, factor_of(q) if factors else None) for q in made]
    return tuple([empty if t is None else t for t in part] for part in zip(*found, strict=True))


def _sizes(per: tuple[int, int]) -> list[int]:
    """A unit as the kernels have it, 0 for the whole axis."""
    return [max(size, 0) for size in per]


@lru_cache
def _texts(specs: tuple[QuantSpec, ...]) -> str:
    return json.dumps([asdict(spec) for spec in specs])
