"""Whether a wrong instruction in a compiled kernel would be noticed: mutants of its PTX, executed, against its bytes."""

import os
import random
import re

import numpy as np
import pytest
import torch

from quant import QuantSpec, kernel
from quant.random import Key
from testing import device
from testing.machine import run_kernel

SWAPS = {
    "add": "sub", "sub": "add", "and": "or", "or": "and", "xor": "or", "shl": "shr", "max": "min", "min": "max", "mul": "add",
}  # fmt: skip


def mutants(ptx: str, count: int) -> list[tuple[str, str]]:
    """(what was changed, the text): one instruction replaced by another, or one of its immediates by its neighbour."""
    lines, found = ptx.splitlines(), []
    for i, line in enumerate(lines):
        code = line.strip()
        if not re.match(r"(@!?%p\d+ )?[a-z]", code) or code.startswith(("ret", "bra", "ld.param", "bar")):
            continue
        op = code.split()[1 if code.startswith("@") else 0]
        name, _, rest = op.partition(".")
        if name in SWAPS and not (name == "mul" and ("wide" in rest or "lo" in rest or "hi" in rest)) and "NaN" not in rest:
            other = SWAPS[name] + "." + (rest.replace("b32", "u32").replace("b64", "u64") if name == "shl" else rest)
            found.append((code, "\n".join([*lines[:i], line.replace(op, other, 1), *lines[i + 1 :]])))
        elif number := re.search(r", (-?\d+);", code):
            changed = line.replace(number[0], f", {int(number[1]) ^ 1};")
            found.append((code, "\n".join([*lines[:i], changed, *lines[i + 1 :]])))
    return random.Random(0).sample(found, min(count, len(found)))


@pytest.mark.slow
def test_a_wrong_instruction_is_noticed():
    """Of single-instruction changes in the compiled NVFP4 kernel of sm_100a, at least 95 % change a byte or fail."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are not compiled in the interpreter")
    calls = []
    run = device.run_kernel

    def noted(ptx, grid, arguments, shared):
        calls.append((ptx, grid, [a.copy() if isinstance(a, np.ndarray) else a for a in arguments], shared))
        result = run(ptx, grid, arguments, shared)
        calls[-1] += ([a.copy() for a in arguments if isinstance(a, np.ndarray)],)
        return result

    device.run_kernel = noted
    try:
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        x = (x * torch.exp2(torch.randint(-9, 3, x.shape, generator=torch.Generator().manual_seed(1)).float())).to(
            torch.bfloat16
        )
        specs = QuantSpec(rounding="stochastic8"), QuantSpec(rounding="stochastic8", hadamard=16)
        with device.emulated(100):
            kernel.encode_pair(x, specs, (Key(1), Key(2)), (None, None), (None, None))
    finally:
        device.run_kernel = run
    ptx, grid, arguments, shared, wanted = calls[-1]
    survivors = []
    tried = mutants(ptx, 200)
    for what, text in tried:
        arrays = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        try:
            run_kernel(text, grid, arrays, shared)
        except Exception:
            continue
        made = [a for a in arrays if isinstance(a, np.ndarray)]
        if all(np.array_equal(a, b) for a, b in zip(made, wanted, strict=True)):
            survivors.append(what)
    assert len(tried) >= 100
    assert len(survivors) <= 0.05 * len(tried), survivors
