"""python -m testing.settle [e2m1 e4m3 e5m2] [--emulate]: which random bits cvt.rs gives to which number, asked of the GPU.

cvt.rs.satfinite.e2m1x4.f32 takes four numbers and a word. By the carry rule a number whose fraction of a unit is f goes up iff
r >= 2^N (1 - f), where r is made of N bits of the word. Then

    the map       f = 1 - 2^-m, and one bit of the word set: up iff that bit is among the m highest of r. The least such m is
                  the place of the bit, 1 the highest; none: the bit does not serve this number
    the finest    all bits set, f = 2^-k: up iff k <= N. P(up) is a multiple of 2^-N
    the test      random numbers and words against a hypothesis, which is four lists of bits, the highest first: those in
                  HYPOTHESES, and what the map says. One that fits differs nowhere

No hardware that has the instruction has been asked yet. --emulate asks the emulator, whose answer is what
testing/conversions.py assumes. Without a GPU that has it, it says so and ends with status 0.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kernels import HAVE_RS, capability
from kernels.numerics import RS
from testing.numbers import from_e2m1, from_e4m3, from_e5m2, to_e2m1, to_e4m3, to_e5m2


class Element(NamedTuple):
    encode: Callable  # fp32, random numbers, how many bits they have -> codes
    decode: Callable
    bits: int
    mantissa: int


ELEMENTS = {
    "e2m1": Element(to_e2m1, from_e2m1, 4, 1),
    "e4m3": Element(to_e4m3, from_e4m3, 8, 3),
    "e5m2": Element(to_e5m2, from_e5m2, 8, 2),
}
PLACES = 20  # fractions down to 2^-20 are fp32 numbers between 1 and 2 in all of them
BYTES = [range(8 * i + 7, 8 * i - 1, -1) for i in range(4)]
LOW, HIGH = range(15, -1, -1), range(31, 15, -1)
HYPOTHESES = {  # for x0 ... x3, x3 in the upper bits of the result (PTX has it first)
    "bytes in order": BYTES,
    "bytes, those of x1 and x2 exchanged (the emulator's e2m1)": [BYTES[0], BYTES[2], BYTES[1], BYTES[3]],
    "bytes, each reversed": [byte[::-1] for byte in BYTES],
    "halves, reversed for x1 and x3 (FlashInfer's measurement of e4m3)": [LOW, LOW[::-1], HIGH, HIGH[::-1]],
    "halves, reversed for x0 and x2": [LOW[::-1], LOW, HIGH[::-1], HIGH],
    "halves as they are": [LOW, LOW, HIGH, HIGH],
}


@triton.jit
def convert_kernel(x_ptr, words_ptr, codes_ptr, TEXT: tl.constexpr, N: tl.constexpr):
    """x fp32 [n, 4], words int32 [n] -> int32 [n], n a multiple of N."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    at, word = x_ptr + 4 * i, tl.load(words_ptr + i)
    given = [tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), word]
    tl.store(codes_ptr + i, tl.inline_asm_elementwise(TEXT, "=r,f,f,f,f,r", given, dtype=tl.int32, is_pure=True, pack=1))


def convert(name: str, x: np.ndarray, words: np.ndarray, device: str) -> np.ndarray:
    """fp32 [n, 4] and uint32 [n] -> codes of the four, uint8 [n, 4], by cvt.rs."""
    count, bits = len(x), ELEMENTS[name].bits
    padding = -count % 1024
    x = torch.from_numpy(np.concatenate([x, np.zeros((padding, 4), np.float32)])).to(device)
    words = torch.from_numpy(np.concatenate([words, np.zeros(padding, np.uint32)]).view(np.int32)).to(device)
    made = torch.empty_like(words)
    convert_kernel[(len(words) // 1024,)](x, words, made, RS[name], 1024, num_warps=4)
    made = made.cpu().numpy().view(np.uint32)[:count, None]
    return (made >> (np.arange(4, dtype=np.uint32) * np.uint32(bits)) & np.uint32(2**bits - 1)).astype(np.uint8)


def went_up(name: str, fractions: np.ndarray, words: np.ndarray, device: str) -> np.ndarray:
    """Fractions of a unit above 1 [n] for all four -> which went up, bool [n, 4]."""
    x = np.repeat((1 + fractions / 2 ** ELEMENTS[name].mantissa).astype(np.float32)[:, None], 4, 1)
    return ELEMENTS[name].decode(convert(name, x, words, device)) > 1


class Found(NamedTuple):
    places: np.ndarray  # [4, 32], of each bit in the random number of each element, 0 where it does not serve it
    finest: list[int]  # k for each element: P(up) is a multiple of 2^-k; 0 where not even 1/2 goes up
    differ: dict[str, int]  # hypothesis -> how many of the codes differ
    compared: int

    @property
    def fits(self) -> list[str]:
        return [name for name, count in self.differ.items() if not count]


def settle(name: str, device: str, count: int = 2**16) -> Found:
    """Ask; see above. device: cuda, or cpu where the emulator or the interpreter stands for a GPU."""
    bit, m = (a.reshape(-1) for a in np.meshgrid(np.arange(32), np.arange(1, PLACES + 1), indexing="ij"))
    up = went_up(name, 1 - 0.5**m, np.uint32(1) << bit.astype(np.uint32), device).reshape(32, PLACES, 4)
    places = np.where(up.any(1), up.argmax(1) + 1, 0).T
    k = np.arange(1, PLACES + 1)
    ever = went_up(name, 0.5**k, np.full(PLACES, 0xFFFFFFFF, np.uint32), device)
    finest = [int(k[up].max(initial=0)) for up in ever.T]
    hypotheses = dict(HYPOTHESES)
    if (read := [in_order(one) for one in places]) and all(read):
        hypotheses["what the map says"] = read
    generator = np.random.default_rng(5)
    x = (generator.standard_normal((count, 4)) * 2).astype(np.float32)
    words = generator.integers(0, 2**32, count, dtype=np.uint32)
    codes = convert(name, x, words, device)
    differ = {title: int((codes != predicted(name, x, words, bits)).sum()) for title, bits in hypotheses.items()}
    return Found(places, finest, differ, codes.size)


def in_order(places: np.ndarray) -> list[int]:
    """Of one element -> its bits, the highest first; [] where no two have to be in one place, or one is missing."""
    bits = [int(bit) for bit in np.argsort(places, kind="stable") if places[bit]]
    return bits if [places[bit] for bit in bits] == list(range(1, len(bits) + 1)) else []


def predicted(name: str, x: np.ndarray, words: np.ndarray, hypothesis: list) -> np.ndarray:
    """The codes that follow from a hypothesis, [n, 4]."""
    made = []
    for values, bits in zip(x.T, hypothesis, strict=True):
        random = np.zeros_like(words)
        for bit in bits:
            random = random << np.uint32(1) | (words >> np.uint32(bit)) & np.uint32(1)
        made.append(ELEMENTS[name].encode(values, random, len(bits)))
    return np.stack(made, 1)


def report(name: str, found: Found) -> list[str]:
    lines = [f"{RS[name].split('.f32')[0].split()[-1]}.f32: the place of each bit of the word (1: the highest, -: none)"]
    lines.append("  bit  " + "".join(f"{bit:3}" for bit in range(31, -1, -1)))
    for i in (3, 2, 1, 0):
        row = "".join(f"{place or '-':>3}" for place in found.places[i][::-1])
        lines.append(f"  x{i}   {row}   P(up) in steps of 2^-{found.finest[i]}")
    for title, count in found.differ.items():
        lines.append(f"  {title:66} {f'{count:,} of {found.compared:,} codes differ' if count else 'fits'}")
    return lines if found.fits else [*lines, "  none fits: it is no carry of bits of the word, or of others than these"]


def obstacle() -> str:
    """Why no GPU here can be asked, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if capability() not in HAVE_RS:
        return f"cvt.rs is an instruction of sm_100a and sm_103a, and this is sm_{capability()}"
    return ""


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"default: all of {', '.join(ELEMENTS)}")
    parser.add_argument("--emulate", action="store_true", help="ask the emulator of sm_100a")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.formats if name not in ELEMENTS]:
        parser.error(f"format {unknown[0]!r}: expected some of {', '.join(ELEMENTS)}")
    if (why := obstacle()) and not args.emulate:
        print(f"testing.settle: nothing to ask, {why}")
        return 0
    from testing.device import emulated

    with emulated(100) if args.emulate else contextlib.nullcontext():
        print("emulated, so what is assumed" if args.emulate else torch.cuda.get_device_name())
        for name in args.formats or ELEMENTS:
            print("\n".join(report(name, settle(name, "cpu" if args.emulate else "cuda"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
