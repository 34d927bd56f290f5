"""quant/random.py: Philox4x32-10 gives the known answers of its authors and of Triton, and every element of an operand
gets the bits that the documented layout says, wherever it lies in memory.
"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import assert_same_bits

from quant.random import Key, philox, random_bytes, random_ints
from quant.recipe import OPERANDS, SIGNS

# kat_vectors of the authors' library Random123, philox4x32-10: counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert philox(words(counter), words(key)) == words(answer), "Python integers"
    tensors = philox(tuple(map(torch.tensor, words(counter))), tuple(map(torch.tensor, words(key))))
    found = " ".join(f"{int(t):08x}" for t in tensors)
    assert found == answer, "int64 tensors"


TRITON = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def kernel(o_ptr, counter_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1 = tl.load(counter_ptr + i), tl.load(counter_ptr + N + i)
    c2, c3 = tl.load(counter_ptr + 2 * N + i), tl.load(counter_ptr + 3 * N + i)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(o_ptr + i, r0.to(tl.int32, bitcast=True))
    tl.store(o_ptr + N + i, r1.to(tl.int32, bitcast=True))
    tl.store(o_ptr + 2 * N + i, r2.to(tl.int32, bitcast=True))
    tl.store(o_ptr + 3 * N + i, r3.to(tl.int32, bitcast=True))

task = json.load(sys.stdin)
answers = []
for seed, counters in zip(task["seeds"], task["counters"]):
    counters = torch.tensor(counters, dtype=torch.int64).to(torch.int32)
    out = torch.empty_like(counters)
    kernel[(1,)](out, counters, seed, counters.shape[1])
    answers.append((out.to(torch.int64) & 0xFFFFFFFF).tolist())
json.dump(answers, sys.stdout)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here")
def test_equal_to_tritons_philox(tmp_path):
    """Kernels will draw with tl.philox. In a process of its own: the interpreter must be chosen before the import."""
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, *map(int, rng.integers(0, 2**63, 11))]
    counters = rng.integers(0, 2**32, (len(seeds), 4, 64))
    counters[:, :, 0], counters[:, :, 1] = 0, 2**32 - 1
    script = tmp_path / "kernel.py"  # Triton reads the source of a kernel from its file
    script.write_text(TRITON)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps({"seeds": seeds, "counters": counters.tolist()}),
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout))
    for seed, c, expected in zip(seeds, torch.from_numpy(counters), theirs, strict=True):
        key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
        assert_same_bits(torch.stack(philox(tuple(c), key)), expected, f"philox with seed {seed}")


# --- the layout: which element gets which bits ---


def expected_bits(key: Key, k: int, bits: int, row: int, column: int) -> int:
    """The documented layout in plain integers, one element at a time."""
    number = row * k + column
    taken = next(n for n in (8, 16, 32) if bits <= n)
    call, place = divmod(number, 128 // taken)
    answer = philox((call, int(key.index), key.layer, key.use), (key.seed & 0xFFFFFFFF, key.seed >> 32))
    word, part = divmod(place, 32 // taken)
    return (answer[word] >> (taken * part) & (2**taken - 1)) >> (taken - bits)


@pytest.mark.parametrize("bits", [3, 8, 13, 16, 17, 24])
@pytest.mark.parametrize("rows, k", [(1, 16), (3, 48), (16, 32), (5, 128)])
def test_every_element_gets_the_documented_bits(bits, rows, k):
    key = Key(0xFEDCBA9876543210, 7, 2**32 - 1, 5)
    expected = [[expected_bits(key, k, bits, r, c) for c in range(k)] for r in range(rows)]
    expected = torch.tensor(expected, dtype=torch.uint8 if bits <= 8 else torch.int32)
    assert_same_bits(random_ints(rows, k, bits, key.words()), expected, f"{rows} x {k}")
    transposed = random_ints(rows, k, bits, key.words(), transposed=True)
    assert_same_bits(transposed, expected.t(), f"{rows} x {k}, as it lies transposed in memory")
    if bits == 8 and sys.byteorder == "little":
        assert_same_bits(random_bytes(rows, k, key.words()).view(torch.uint8), expected, f"{rows} x {k}, eight bytes at a time")


@pytest.mark.parametrize("bits", [3, 8, 13, 16, 17, 24])
def test_bits_are_balanced(bits):
    """Each random bit is 1 in half of n cases: a stuck or shifted-out bit would be off by sqrt(n) standard errors."""
    values = random_ints(512, 512, bits, Key(3).words()).to(torch.int32)
    n = values.numel()
    for bit in range(bits):
        ones = int((values >> bit & 1).sum())
        assert abs(ones - n / 2) < 5 * (n / 4) ** 0.5, f"bit {bit} is 1 in {ones} of {n}"  # binomial, 5 sigma
    assert int(values.max()) < 2**bits and int(values.min()) >= 0


def test_every_part_of_the_key_matters():
    base = Key(1, 2, 3, 4)
    keys = [base, base.at(seed=2), base.at(seed=1 + 2**32), base.at(index=3), base.at(layer=4), base.at(use=5)]
    drawn = [random_ints(64, 64, 8, key.words()) for key in keys]
    for i in range(len(keys)):
        for j in range(i):
            same = int((drawn[i] == drawn[j]).sum())
            # Equal bytes by chance: binomial with n = 4096 and p = 1/256, so 16 +- 4; 5 sigma.
            assert same < 16 + 5 * 4, f"{keys[i]} and {keys[j]} share {same} of 4096 bytes"
    assert_same_bits(random_ints(64, 64, 8, Key(1, 2, 3, 4).words()), drawn[0], "the same key again")


def test_index_as_a_tensor_is_the_same_key():
    for index in (0, 5, 2**32 - 1):
        as_tensor = Key(9, torch.tensor(index), 1, 2).words()
        assert_same_bits(as_tensor, Key(9, index, 1, 2).words(), f"index {index}")
    counters = torch.tensor([11, 12])
    assert Key(9, counters[1]).words().tolist() == [12, 0, 0, 9, 0], "a view of a counter, and the documented order"


def test_uses_do_not_collide():
    uses = [*OPERANDS.values(), *SIGNS.values()]
    assert len(set(uses)) == len(uses)
    assert not {use + 16 for use in OPERANDS.values()} & set(OPERANDS.values()), "the default sign key of an operand"


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"layer": -1}, {"layer": 2**32}, {"use": 2**32}])
def test_a_key_out_of_range_says_so(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{name}={value}.*0 <= {name} < 2\^{64 if name == 'seed' else 32}"):
        Key(**{"seed": 0} | bad)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    random_ints(32, 32, 8, Key(0).words())
    random_ints(32, 32, 24, Key(0).words(), transposed=True)
    assert torch.equal(before[0], torch.get_rng_state()), "torch's generator moved"
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()
