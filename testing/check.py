"""python -m testing.check [ARCH ...] [--jobs N] [--renew]: every kernel, on every architecture, without a GPU (make
kernels-check).

Each variant that a shipped recipe uses (variants.py) is compiled by the host code that would launch it, for sm_80, sm_90a,
sm_100a, sm_103a and sm_120a; then

    spills        0 bytes
    shared        within what a block of the chip may have
    instructions  SASS per element, at most what testing/budgets.json says; --renew writes what is found there
    PTX           without approximate division, without a fused multiply-add; with the conversions its architecture has
    bytes         codes and scales, errors and values of the executed PTX equal those of the reference: of random numbers in
                  whole tiles, and of ragged matrices of extreme, of subnormal and zero numbers, and of random bits

Variants with stochastic rounding of 8 bits once more by cvt.rs, on sm_100a and sm_103a, which have it: then scales must equal
the reference's, and every element be one of the two numbers next to what is rounded.

The table goes to the terminal and to docs/kernels.md. Exit status 1 if anything fails: kernel, architecture, what, and the
first byte that differs."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import HAVE_RS
from kernels.matmul import matmul, native, per
from quant import QuantSpec, Scale, kernel, launch
from quant.choose import Operands
from quant.encode import encode
from quant.qtensor import QTensor, logical, tiled
from quant.random import Key
from testing.device import Launch, compiled, emulated
from testing.inspection import SHARED, TENSOR_COLUMNS, Anatomy, anatomy, resources
from testing.operands import astray, difference, numbers, rounded_by, unequal
from testing.products import product
from testing.variants import Decoded, Measured, Taken, Variant, decided, decoded, variants

ARCHITECTURES = (80, 90, 100, 103, 120)
BUDGETS = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).parent.parent / "docs/kernels.md"
MARK = "<!-- what follows is written by `make kernels-check ARGS=--renew` -->"
FORBIDDEN = r"\b(div\.(full|approx)|rcp\.approx|sqrt\.approx|ex2|lg2|fma\.|mad\.(rn|rz)\.f|mad\.f)"
KEYS = Key(11, index=3, layer=1, use=0), Key(11, index=3, layer=1, use=4)
HELD = torch.tensor(3.0)
KINDS = "normal", "extreme", "subnormal", "bits"  # of numbers


class Row(NamedTuple):
    """One line of the table."""

    variant: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    instructions: float  # an element
    moved: float  # bytes an element, read and written
    elements: int  # compared
    failures: list[str]


class ByRs(NamedTuple):
    """A variant that cvt.rs rounds."""

    variant: Variant

    def short(self) -> str:
        return f"{self.variant.short()}, {kernel.RS}"


def run(variant: Variant, x: torch.Tensor, capability: int, how: str = kernel.EXACT) -> tuple[list[QTensor], list[Launch]]:
    """What the kernels make of x [M, K], by side."""
    helds = [HELD if spec and spec.scale.history else None for spec in variant]
    with emulated(capability) as launches, rounded_by(how):
        if all(variant):
            return list(kernel.encode_pair(x, tuple(variant), KEYS, (None, None), tuple(helds))), launches
        side = 0 if variant.rows else 1
        return [kernel.encode(x.t() if side else x, variant[side], KEYS[side], None, helds[side])], launches


def wrong(variant: Variant, x: torch.Tensor, made: list[QTensor], how: str) -> list[str]:
    """The first byte of each side that is not right."""
    operands = ((x, variant.rows, KEYS[0]), (x.t(), variant.cols, KEYS[1]))
    found = []
    for (y, spec, key), q in zip([operand for operand in operands if operand[1]], made, strict=True):
        held = HELD if spec.scale.history else None
        by_rs = how == kernel.RS and kernel.rounds_by_rs(spec)
        found.append(astray(q, y, key, held) if by_rs else difference(q, encode(y, spec, key, None, held)))
    return list(filter(None, found))


def moved(variant: Variant, rows: int, k: int, made: list[QTensor]) -> float:
    """Bytes an element: BF16 read once, codes and scales written."""
    return 2 + sum(q.nbytes() for q in made) / (rows * k)


def inspected(launches: list[Launch], rows: int, capability: int, budget: float | None) -> tuple[Anatomy, float, list[str]]:
    """Of the last launch, whose tile has so many rows: what it is made of, instructions an element; and what is wrong."""
    failures, launch = [], launches[-1]
    found = anatomy(launch.kernel)
    count = found.count / (rows * launch.constants["BK"] / (32 * launch.kernel.metadata.num_warps))
    failures += [f"{each.name}: {stack} bytes spilled" for each in launches if (stack := resources(each.kernel)[1])]
    if found.shared > SHARED[capability]:
        failures.append(f"{found.shared} bytes of shared memory, the chip has {SHARED[capability]}")
    if budget is not None and count > budget:
        failures.append(f"{count:.2f} instructions an element, the budget is {budget}")
    for each in launches:
        if bad := re.search(FORBIDDEN, each.kernel.asm["ptx"]):
            failures.append(f"{each.name} has {bad[0]}")
        if each.lanes is not None and each.lanes.approx:
            failures.append(f"{each.name} executed {dict(each.lanes.approx)}")
    return found, count, failures


def ragged(variant: Variant) -> list[tuple[str, torch.Tensor]]:
    """Matrices whose tiles are not whole, of the kinds of numbers but the first; in one launch where no scale spans it."""
    large = any(max(spec.multiple) > 64 for spec in variant if spec)
    found = [(kind, numbers(kind, *((384, 128) if large else (160, 224)))) for kind in KINDS[1:]]
    if any(launch.look_of(spec) for spec in variant):
        return found
    return [(", ".join(KINDS[1:]), torch.cat([x for _, x in found]))]


def check(what: Variant | ByRs, capability: int, budget: float | None) -> Row:
    """One variant on one architecture."""
    variant, how = (what.variant, kernel.RS) if isinstance(what, ByRs) else (what, kernel.EXACT)
    elements, x = 0, numbers("normal", 128, 256)
    made, launches = run(variant, x, capability, how)
    whole, last = moved(variant, 128, 256, made), launches[-1]
    found, count, failures = inspected(launches, last.constants["BM"], capability, budget)
    texts = {each.name: each.kernel.asm["ptx"] for each in launches}
    if how == kernel.EXACT:
        failures += [f"{name} has {kernel.RS}, which nobody asked for" for name, ptx in texts.items() if kernel.RS in ptx]
    failures += [f"its PTX has no {word}" for word in required(variant, capability, how) if word not in texts[last.name]]
    others = [] if capability == 103 else ragged(variant)  # (its PTX is that of sm_100 but for its target)
    for kind, y in [("normal", x), *others]:
        made = made if y is x else run(variant, y, capability, how)[0]
        elements += y.numel() * len(made)
        failures += [f"{kind}: {words}" for words in wrong(variant, y, made, how)]
    return Row(what.short(), capability, found.registers, found.spilled, found.shared, count, whole, elements, failures)


def matrices(rows: int, k: int, kinds: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Operands [R, K] in multiples of these, one of each kind: the first in whole tiles, in rows; others ragged, in columns."""

    def up(size: int, unit: int) -> int:
        return -(-size // unit) * unit

    yield kinds[0], numbers(kinds[0], up(128, rows), up(256, k))
    for kind in kinds[1:]:
        yield kind, numbers(kind, up(224, k), up(96, rows)).t()


def check_made(what: Measured | Taken, capability: int, budget: float | None, kinds: tuple[str, ...] = KINDS) -> Row:
    """Errors or values of what the reference has quantised, on one architecture."""
    specs = what.specs if isinstance(what, Taken) else (what.spec,) if what.spec else ()
    sizes = [spec.multiple for spec in specs] + [tuple(max(size, 1) for size in what.per)]
    elements, failures, found = 0, [], None
    multiple = (math.lcm(*each) for each in zip(*sizes, strict=True))
    for number, (kind, x) in enumerate(matrices(*multiple, kinds[:1] if capability == 103 else kinds)):
        o = Operands(x, None, what.per)
        codes = [None if spec.scale.format == "none" else _in_rows(encode(o.x, spec)) for spec in specs]
        units = [size // unit for size, unit in zip(x.shape, what.per, strict=True) if unit > 0]
        index = (torch.arange(math.prod(units)) + number).view(units) % max(len(specs), 1)
        with emulated(capability) as launches:
            made = _by_kernels(what, x, specs, codes, index)
        if found is None:
            found, count, failures = inspected(launches, launches[-1].constants["BR"], capability, budget)
            first = sum(q.nbytes() for q in codes[:1] if q) / x.numel()  # (of several candidates it is the one that is taken)
            size = first + (2 if isinstance(what, Measured) else _dtype(specs).itemsize)
        for a, b in zip(made, _by_reference(what, o, specs, index), strict=True):
            elements += x.numel()
            failures += [words] if (words := unequal(kind, a, b)) else []
    return Row(what.short(), capability, found.registers, found.spilled, found.shared, count, size, elements, failures)


def _in_rows(q: QTensor) -> QTensor:
    """As kernels write it."""
    return dataclasses.replace(q, packed_codes=q.packed_codes.contiguous(), scale_codes=q.scale_codes.contiguous())


def _dtype(specs: tuple[QuantSpec, ...]) -> torch.dtype:
    return torch.bfloat16 if all(spec.exact for spec in specs) else torch.float32


def _by_kernels(what: Measured | Taken, x: torch.Tensor, specs, codes: list[QTensor | None], index: torch.Tensor) -> tuple:
    if isinstance(what, Measured):
        return kernel.errors(x, what.spec, codes[0] if codes else None, what.by, what.per)
    several = (x, index) if len(specs) > 1 else (None, None)
    return (kernel.values(several[0], specs, codes, _dtype(specs), several[1], what.per, dense=index.ndim > 0),)


def _by_reference(what: Measured | Taken, o: Operands, specs, index: torch.Tensor) -> tuple:
    if isinstance(what, Measured):
        return tuple(logical(part, o.transposed) for part in o._parts(what.by, what.spec))
    return (o.mixed(specs, index, _dtype(specs)),)


def check_decoded(what: Decoded, capability: int, budget: float | None) -> Row:
    """All of them, in whole tiles of numbers with all scales; the largest number of each column."""
    rows = [check_made(Taken((spec,), (-1, -1)), capability, budget, ("extreme",)) for spec in what.specs]
    worst = [max(getattr(row, name) for row in rows) for name in Row._fields[2:7]]
    failures = [f"{row.variant}: {words}" for row in rows for words in row.failures]
    return Row(what.short(), capability, *worst, sum(row.elements for row in rows), failures)


PRODUCTS = {
    # formats of both operands, format and group of their scales -> what the PTX has, by architecture; elsewhere it is decoded
    ("e2m1", "e2m1", "e4m3", 16): {100: ["kind::mxf4nvf4.block_scale.block16"], 120: ["scale_vec::4X", "ue4m3"]},
    ("e2m1", "e2m1", "e8m0", 32): {100: ["kind::mxf4.block_scale.block32"], 120: ["scale_vec::2X", "ue8m0"]},
    ("e4m3", "e4m3", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"], 120: ["kind::mxf8f6f4", "scale_vec::1X"]},
    ("e5m2", "e4m3", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"], 120: ["e5m2.e4m3", "scale_vec::1X"]},
    ("e4m3", "e2m1", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"]},
    ("e4m3", "e4m3", "none", 0): {
        90: ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"],
        100: ["tcgen05.mma.cta_group::1.kind::f8f6f4"],
        120: ["mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"],
    },
}
DECODED = {
    **dict.fromkeys((80, 120), ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16"]),
    90: ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"],
}
# M, N, dtype, and K in groups (or 12 codes): large; large and ragged; small, mostly in rows that TMA does not take.
SIZES = (1536, 2816, torch.bfloat16, 32), (1000, 24_000, torch.float32, 36), (250, 253, torch.float32, 17)


def check_product(kind: tuple[str, str, str, int], capability: int) -> Row:
    """A product compiles, to the instructions of its architecture, and its operands reach the tensor cores by copies that run
    ahead of the product; the emulator, which knows the tensor cores of sm_80 and sm_120, makes the right numbers of it."""
    *formats, scale, group = kind
    name, failures, shown = f"product {' x '.join(formats)}, {scale}/{group}", [], None
    for M, N, dtype, groups in SIZES[: 1 if capability == 103 else None]:  # (what differs from sm_100 is the target)
        K = groups * (group or 12)
        operands = []
        for rows, fmt in ((M, formats[0]), (N, formats[1])):
            plain = torch.zeros(rows, K // (group or 1), dtype=torch.uint8)
            scales = tiled(plain) if native(formats, scale, group, capability) else plain
            operands.append((torch.zeros(rows, K // per(fmt), dtype=torch.uint8), scales if group else None))
        with compiled(capability) as launches:
            factors = torch.ones(()), None if scale != "none" else torch.ones(N, 1)
            matmul(*operands, factors, tuple(formats), scale, group, K, capability, dtype)
        (launch,) = launches
        found, words = anatomy(launch.kernel), []
        if found.spilled:
            words.append(f"{found.spilled} bytes spilled")
        if found.shared > SHARED[capability] or found.tensor > TENSOR_COLUMNS:
            words.append(f"{found.shared} bytes of shared memory and {found.tensor} columns of tensor memory are too much")
        words += wanting(kind, launch, capability)
        failures += [f"{M} x {N} x {K}: {each}" for each in words]
        shown = shown or (found, found.count * 32 * launch.kernel.metadata.num_warps, launch.constants)
    found, lanes, cut = shown
    count = lanes / (cut["BM"] * cut["BN"] * cut["BK"])
    if capability in (80, 120):
        block, format_ = ((1, group), scale) if group else ((1, -1), "fp32")
        specs = tuple(QuantSpec(fmt, block, Scale(format_)) for fmt in formats)
        y, exact, bound = product(emulated(capability), specs, 96, 112, 9 * (group or 16))
        if worst := int((~((y - exact).abs() <= bound)).sum()):
            i = tuple((~((y - exact).abs() <= bound)).nonzero()[0].tolist())
            failures.append(
                f"{worst} of {y.numel()} are off, first at {list(i)}: {y[i]}, expected {exact[i]} +- {bound[i]:.2g}"
            )
    return Row(name, capability, found.registers, found.spilled, found.shared, count, 0.0, 0, failures)


def wanting(kind: tuple[str, str, str, int], launch: Launch, capability: int) -> list[str]:
    """What the PTX of a product should have, or not have."""
    ptx, how = launch.kernel.asm["ptx"], launch.constants["HOW"]
    family = 100 if capability == 103 else capability
    words = DECODED[family] if how == "decoded" else PRODUCTS[kind][family]
    words = [*words, "cp.async.bulk.tensor.2d" if launch.constants["TMA"] else "cp.async.c"]
    if how == "scaled" and family == 100:
        words += ["tcgen05.cp", "cp.async.bulk.tensor.5d"] if launch.constants["TMA"] else ["tcgen05.cp"]
    failures = [f"its PTX has no {word}" for word in words if word not in ptx]
    # Once: the zeros that the sum begins with. Scales in registers would be stored in each step.
    if (count := len(re.findall(r"tcgen05\.st\b", ptx))) != (family == 100):
        failures.append(f"its PTX has {count} tcgen05.st")
    return failures


def required(variant: Variant, capability: int, how: str) -> list[str]:
    """Instructions without which the architecture would not be used."""
    words = []
    for spec in filter(None, variant):
        if spec.format == "e2m1" and capability >= 100 and spec.rounding == "nearest":
            words.append("cvt.rn.satfinite.e2m1x2.f32")
        if how == kernel.RS and kernel.rounds_by_rs(spec):
            words.append(f"cvt.rs.satfinite.{spec.format}x4.f32")
        elif spec.format == "e2m1" and capability >= 100 and spec.rounding == "stochastic8":
            words.append("cvt.rn.satfinite.e2m1x2.f16x2")
        if spec.format in ("e4m3", "e5m2") and capability >= 90 and spec.rounding == "nearest":
            words.append(f"cvt.rn.satfinite.{spec.format}x2.f32")
        if spec.hadamard and capability >= 100:
            words.append("add.rn.f32x2")
    return words


CHECKS = {Variant: check, ByRs: check, Measured: check_made, Taken: check_made, Decoded: check_decoded}


def work(task: tuple[tuple, int, float | None]) -> Row:
    what, capability, budget = task
    with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the PTX that ptxas refuses
        try:
            function = CHECKS.get(type(what))
            return function(what, capability, budget) if function else check_product(what, capability)
        except Exception as error:
            words = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            return Row(name_of(what), capability, 0, 0, 0, 0.0, 0.0, 0, [words])


def name_of(what: tuple) -> str:
    return what.short() if type(what) in CHECKS else "product " + " ".join(map(str, what))


# Lanes x issues a second / bytes a second: instructions that a chip issues while its memory moves a byte. By data sheets and
# boost clocks, not measured: 148 SMs at 1.85 GHz and 8 TB/s, 132 at 1.73 and 4.8, 170 at 2.4 and 1.79; 4 x 32 lanes an SM.
CHIPS = {
    "B200": (100, 148 * 128 * 1.85e9 / 8e12),
    "H200": (90, 132 * 128 * 1.73e9 / 4.8e12),
    "5090": (120, 170 * 128 * 2.4e9 / 1.79e12),
}


def table(rows: list[Row]) -> list[str]:
    """A line for each variant: instructions an element (registers) by architecture, and these over what memory allows."""
    variants = dict.fromkeys(row.variant for row in rows)
    found = {(row.variant, row.architecture): row for row in rows}
    heads = ["variant", "bytes", *(f"sm_{a}" for a in ARCHITECTURES), *CHIPS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name in variants:
        cells = [name.replace("|", chr(92) + "|"), f"{found[name, 100].moved:.2f}"]
        some = [found.get((name, a)) for a in ARCHITECTURES]
        cells += [f"{r.instructions:.1f} ({r.registers})" if r else "-" for r in some]
        some = [(found.get((name, a)), budget) for a, budget in CHIPS.values()]
        cells += [f"{r.instructions / (r.moved * budget):.2f}" if r else "-" for r, budget in some]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("architectures", nargs="*", type=int, metavar="ARCH", help=f"default: {ARCHITECTURES}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name has it")
    parser.add_argument("--renew", action="store_true", help="write the budgets and docs/kernels.md")
    args = parser.parse_args(argv)
    if unknown := [a for a in args.architectures if a not in ARCHITECTURES]:
        parser.error(f"architecture {unknown[0]}: expected some of {', '.join(map(str, ARCHITECTURES))}")
    if args.renew and (args.architectures or args.only):
        parser.error("--renew writes the table of all variants on all architectures: no ARCH and no --only with it")
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    tasks = []
    by_rs = [ByRs(v) for v in variants() if any(spec and kernel.rounds_by_rs(spec) for spec in v)]
    for what in [*PRODUCTS, *variants(), *by_rs, *decided(), decoded()]:
        for a in args.architectures or ARCHITECTURES:
            if args.only in name_of(what) and (a in HAVE_RS or not isinstance(what, ByRs)):
                tasks.append((what, a, None if args.renew else budgets.get(name_of(what), {}).get(str(a))))
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"], os.environ["OMP_NUM_THREADS"] = cache, "1"
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for row in pool.imap(work, tasks):
                rows.append(row)
                equal = f"{row.elements:,} elements right" if row.elements else "compiles"
                said = "; ".join(row.failures) or f"{row.instructions:.3g} instructions, {equal}"
                print(f"{row.variant:60} sm_{row.architecture:<4} {said}", flush=True)
    failed = sum(bool(row.failures) for row in rows)
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} kernels, {sum(row.elements for row in rows):,} elements, {failed} failed, {seconds:.0f} s")
    if args.renew and not failed:
        new: dict[str, dict[str, float]] = {}
        for row in filter(lambda row: row.elements, rows):
            new.setdefault(row.variant, {})[str(row.architecture)] = round(row.instructions * 1.02 + 0.05, 1)
        BUDGETS.write_text(json.dumps(budgets | new, indent=1) + "\n")
        head = PAGE.read_text().split(MARK)[0]
        PAGE.write_text("\n".join([head + MARK, "", *table([row for row in rows if row.elements]), ""]))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ntesting.check: interrupted", file=sys.stderr)
        sys.exit(130)
