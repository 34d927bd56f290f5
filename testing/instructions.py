"""All instructions by name: `decode` turns an opcode such as add.rn.f32 into what it does.

What an instruction does is in the module of its kind; each says what it refuses.
"""

import functools

from testing import accesses, arithmetic, conversions, logic, tensorcores, warps
from testing.opcode import Opcode, Operation


def decode_branch(op: Opcode) -> Operation:
    op.ignore("uni")
    return Operation(None, jump="branch")


def decode_exit(op: Opcode) -> Operation:
    op.ignore("uni")
    return Operation(None, jump="exit")


def decode_trap(op: Opcode) -> Operation:
    def execute(lanes, operands, active):
        raise RuntimeError("trap")

    return Operation(execute)


DECODERS = {
    **arithmetic.DECODERS,
    **logic.DECODERS,
    **conversions.DECODERS,
    **accesses.DECODERS,
    **warps.DECODERS,
    **tensorcores.DECODERS,
    **dict.fromkeys(("ret", "exit"), decode_exit),
    "bra": decode_branch,
    "trap": decode_trap,
}


@functools.cache
def decode(text: str) -> Operation:
    """Opcode -> operation. Raises NotImplementedError for an instruction, a modifier or a type that is not implemented."""
    op = Opcode(text)
    if op.name not in DECODERS:
        raise NotImplementedError(f"instruction {op.name}")
    operation = DECODERS[op.name](op)
    op.done()
    return operation
