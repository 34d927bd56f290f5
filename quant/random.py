"""Counter-based randomness: every random bit is a pure function of where it is used.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a 64-bit key and four
32-bit counter words to four random words. We spend the counter as

    key  = seed
    word = (call, index, layer, use)     call  = element // (elements a call serves), element numbered row-major
                                         index = global micro-batch (activations, gradients) or step (weights)
                                         layer = number of the Linear in the model; use = operand, or signs of a GEMM

so nothing depends on tiling, rank, accumulation, recomputation or on what was drawn before, and there is no state to
save. One call serves 16 elements of 8 bits (byte i of word w to element 4w + i), 8 of 16 or 4 of 32. Bit-equal to
`triton.language.philox` (tests/test_random.py).

Left out: normal variates (initialisation uses a torch.Generator of its own).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.fuse import compiling

LOW = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple:
    """Four counter words and two key words (int64 tensors or ints holding uint32) -> four uint32 words as int64.

    int64 products of two uint32 wrap modulo 2^64, which leaves both 32-bit halves right; `& LOW` undoes the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


_constants: dict[tuple, Tensor] = {}


def constants(values: tuple, dtype: torch.dtype, device) -> Tensor:
    """A tensor of numbers known beforehand, made once: copying one to a GPU waits for all the work queued before it."""
    if compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    place = (values, dtype, str(device))
    if place not in _constants:
        _constants[place] = torch.tensor(values, dtype=dtype, device=device)
    return _constants[place]


@dataclass(frozen=True)
class Key:
    """Where randomness is used. `index` may be an int64 tensor of one element: then advancing it needs no host sync
    and no recompilation. `use` numbers the operand (quant/recipe.py OPERANDS)."""

    seed: int
    index: int | Tensor = 0
    layer: int = 0
    use: int = 0

    def __post_init__(self):
        for name in ("seed", "layer", "use"):
            if not 0 <= getattr(self, name) < 2 ** (64 if name == "seed" else 32):
                raise ValueError(f"Key({name}={getattr(self, name)}): expected 0 <= {name} < 2^{64 if name == 'seed' else 32}")

    def at(self, **where) -> "Key":
        return replace(self, **where)

    def words(self, device="cpu") -> Tensor:
        """int64 [5]: index, layer, use, seed low, seed high, the form that kernels take."""
        index = self.index if isinstance(self.index, Tensor) else torch.tensor(self.index)
        fixed = constants((self.layer, self.use, self.seed & LOW, self.seed >> 32), torch.int64, device)
        return torch.cat([index.reshape(1).to(device), fixed])


def per_call(bits: int) -> int:
    """How many elements that take so many random bits one call serves."""
    return 16 if bits <= 8 else 8 if bits <= 16 else 4


def random_ints(rows: int, k: int, bits: int, words: Tensor, transposed: bool = False) -> Tensor:
    """Random numbers in [0, 2^bits) for an operand [rows, k], uint8 up to 8 bits and int32 above; bits 1 to 24, k divisible
    by `per_call(bits)`.

    An element takes 8, 16 or 32 bits of a call, and the upper `bits` of them are used.
    `words`: `Key.words()`. Element (r, i) has number r * k + i wherever it lies in memory; `transposed` returns [k, rows].
    """
    n = per_call(bits)
    r, c = torch.arange(rows, device=words.device), torch.arange(k // n, device=words.device)
    index, layer, use, low, high = words.unbind()
    calls = c[:, None] + r[None, :] * (k // n) if transposed else r[:, None] * (k // n) + c[None, :]
    drawn = philox((calls & LOW, index, layer, use), (low, high))
    taken, axis = 128 // n, 1 if transposed else 2
    parts = [word >> shift for word in drawn for shift in range(taken - bits, 32, taken)]
    out = torch.stack([(part & ((1 << bits) - 1)).to(torch.uint8 if bits <= 8 else torch.int32) for part in parts], axis)
    return out.flatten(0, 1) if transposed else out.flatten(1, 2)


def random_bytes(rows: int, k: int, words: Tensor) -> Tensor:
    """int64 [rows, k / 8], whose bytes are random_ints(rows, k, 8, words) where the lowest lies first in memory."""
    r, c = torch.arange(rows, device=words.device), torch.arange(k // 16, device=words.device)
    index, layer, use, low, high = words.unbind()
    a, b, c, d = philox(((r[:, None] * (k // 16) + c[None, :]) & LOW, index, layer, use), (low, high))
    return torch.stack([a | b << 32, c | d << 32], 2).flatten(1, 2)


random_bytes.wide = lambda **_: True  # (quant/fuse.py)
