"""The words of an opcode, and what becomes of one: an Operation.

An instruction's decoder takes the words it knows from an Opcode; `done`, called at the end (instructions.py), refuses what is
left. So a modifier is implemented, listed as one to ignore, or refused, and never silently taken for something else.

    def decode(op):                           # add.rn.f32, add.rz.f32
        kind = op.kind("f32")
        toward_zero = op.one("rn", "rz") == "rz"
        return lanewise(partial(add32, toward_zero=toward_zero), [kind, kind], kind)

Types are words: b, u, s and f with a width, f16, bf16, pred, and pairs such as f32x2; DTYPES says what numpy array stands for
each. Numbers of 16 bits and pairs are unsigned integers of the whole width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
SIGNED = {8: np.dtype(np.int8), 16: np.dtype(np.int16), 32: np.dtype(np.int32), 64: np.dtype(np.int64)}
BITS = tuple(f"b{w}" for w in UNSIGNED)
UNSIGNEDS = tuple(f"u{w}" for w in UNSIGNED)
SIGNEDS = tuple(f"s{w}" for w in SIGNED)
INTEGERS = UNSIGNEDS + SIGNEDS
HALVES = "f16", "bf16"
HALF_PAIRS = "f16x2", "bf16x2"

DTYPES = {
    **{f"b{w}": dtype for w, dtype in UNSIGNED.items()},
    **{f"u{w}": dtype for w, dtype in UNSIGNED.items()},
    **{f"s{w}": dtype for w, dtype in SIGNED.items()},
    **{kind: UNSIGNED[16] for kind in (*HALVES, "e4m3x2", "e5m2x2", "ue8m0x2")},
    **{kind: UNSIGNED[32] for kind in HALF_PAIRS},
    "e2m1x2": UNSIGNED[8],
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f32x2": UNSIGNED[64],
    "pred": np.dtype(np.bool_),
}


def width(kind: str) -> int:
    """Bits of a type, 1 for pred."""
    return 1 if kind == "pred" else 8 * DTYPES[kind].itemsize


class Opcode:
    """The words of an opcode that are not taken yet."""

    def __init__(self, text: str):
        self.text = text
        self.name, *self.words = text.split(".")

    def flag(self, word: str) -> bool:
        """Takes the word, says whether it was there."""
        if word in self.words:
            self.words.remove(word)
            return True
        return False

    def one(self, *choices: str, default: str | None = None) -> str:
        """Takes the first of the choices that is there. Raises NotImplementedError where none is and there is no default."""
        for word in choices:
            if self.flag(word):
                return word
        if default is None:
            raise NotImplementedError(f"{self.text} has none of .{', .'.join(choices)}")
        return default

    def kind(self, *choices: str) -> str:
        """Takes the last word, a type. Raises NotImplementedError for any but these."""
        word = self.words.pop() if self.words else ""
        if word not in choices:
            raise NotImplementedError(f"type .{word} of {self.text}")
        return word

    def ignore(self, *words: str) -> None:
        """Takes those of the words that are there, which change nothing here."""
        self.words = [word for word in self.words if word not in words]

    def done(self) -> None:
        """Raises NotImplementedError for a word that nobody took."""
        if self.words:
            raise NotImplementedError(f".{'.'.join(self.words)} of {self.text}")


class Operation(NamedTuple):
    """execute(lanes, operands, active): `lanes` as in lanes.py; `active` bool for each lane, None for all."""

    execute: Callable[[Any, tuple, np.ndarray | None], None] | None
    approximate: bool = False  # what hardware gives may differ in the last bits
    jump: str = ""  # "branch" or "exit": done by the machine itself


def lanewise(function: Callable, sources: list[str], result: str | None = None, whole=False, approximate=False) -> Operation:
    """A function of arrays, one element a lane: destination, then a source operand of each of these types.

    Immediates are given as numpy scalars, or as arrays where `whole`. `result` is the type of what the function gives where
    that is an array of another dtype than it should have.
    """
    dtypes = [DTYPES[kind] for kind in sources]
    count = 1 + len(dtypes)
    given = result and DTYPES[result]

    def execute(lanes, operands, active):
        if len(operands) != count:
            raise NotImplementedError(f"{len(operands)} operands, expected {count}")
        read = lanes.whole if whole else lanes.read
        values = [read(operand, dtype) for operand, dtype in zip(operands[1:], dtypes, strict=True)]
        value = function(*values)
        if given and value.dtype != given:
            value = value.view(given) if value.dtype.itemsize == given.itemsize else value.astype(given)
        lanes.write(operands[0], value, active)

    return Operation(execute, approximate)


def in_parts(function: Callable, dtype: np.dtype) -> Callable:
    """A function of arrays of `dtype` -> one of arrays of wider unsigned integers that hold several each (use with `whole`)."""

    def apply(*packed):
        made = function(*[np.ascontiguousarray(p).view(dtype) for p in packed])
        return made.view(packed[0].dtype)

    return apply
