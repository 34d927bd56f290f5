"""python -m testing.check [ARCH ...] [--jobs N] [--renew]: every kernel, on every architecture, without a GPU (make
kernels-check).

Each variant that a shipped recipe uses (variants.py) is compiled by the host code that would launch it, for sm_80, sm_90a,
sm_100a, sm_103a and sm_120a; then

    spills        0 bytes
    shared        within what a block of the chip may have
    instructions  SASS per element, at most what testing/budgets.json says; --renew writes what is found there
    PTX           without approximate division, without a fused multiply-add; with the conversions its architecture has
    bytes         codes and scales of the executed PTX equal those of the reference: of random numbers in whole tiles, and of
                  ragged matrices of extreme, of subnormal and zero numbers, and of random bits

The table goes to the terminal and to docs/kernels.md. Exit status 1 if anything fails: kernel, architecture, what, and the
first byte that differs."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.matmul import matmul, native
from quant import kernel
from quant.encode import encode
from quant.qtensor import QTensor
from quant.random import Key
from testing.device import Launch, compiled, emulated
from testing.inspection import SHARED, TENSOR_COLUMNS, anatomy
from testing.variants import Variant, variants

ARCHITECTURES = (80, 90, 100, 103, 120)
BUDGETS = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).parent.parent / "docs/kernels.md"
MARK = "<!-- what follows is written by `make kernels-check ARGS=--renew` -->"
FORBIDDEN = r"\b(div\.(full|approx)|rcp\.approx|sqrt\.approx|ex2|lg2|fma\.|mad\.(rn|rz)\.f|mad\.f)"
KEYS = Key(11, index=3, layer=1, use=0), Key(11, index=3, layer=1, use=4)
HELD = torch.tensor(3.0)


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


def numbers(kind: str, rows: int, k: int) -> torch.Tensor:
    """BF16 [rows, k]."""
    generator = torch.Generator().manual_seed(rows * k)
    x = torch.randn(rows, k, generator=generator)
    if kind == "extreme":
        x = x * torch.exp2(torch.randint(-120, 120, (rows, k), generator=generator).float())
        x[0, 0] = 3e38
    elif kind == "subnormal":
        x = x * 1e-38
        x[:, : k // 3] = 0.0
        x[: rows // 3] = -0.0
    elif kind == "bits":
        return torch.randint(-(2**15), 2**15, (rows, k), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    return x.to(torch.bfloat16)


def run(variant: Variant, x: torch.Tensor, capability: int) -> tuple[list[QTensor], list[Launch]]:
    """What the kernels make of x [M, K], by side."""
    helds = [HELD if spec and spec.scale.history else None for spec in variant]
    with emulated(capability) as launches:
        if all(variant):
            return list(kernel.encode_pair(x, tuple(variant), KEYS, (None, None), tuple(helds))), launches
        side = 0 if variant.rows else 1
        return [kernel.encode(x.t() if side else x, variant[side], KEYS[side], None, helds[side])], launches


def wanted(variant: Variant, x: torch.Tensor) -> list[QTensor]:
    operands = ((x, variant.rows, KEYS[0]), (x.t(), variant.cols, KEYS[1]))
    return [encode(y, spec, key, None, HELD if spec.scale.history else None) for y, spec, key in operands if spec]


def difference(found: QTensor, reference: QTensor) -> str:
    """The first byte that differs, or ""."""
    for name in ("packed_codes", "scale_codes", "outer_codes"):
        a, b = getattr(found, name), getattr(reference, name)
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {a if a is None else tuple(a.shape)} and not {b if b is None else tuple(b.shape)}"
        if a.is_floating_point():
            a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t).contiguous().view(torch.int32) for t in (a, b))
        wrong = (a != b).nonzero()
        if len(wrong):
            i = tuple(wrong[0].tolist())
            return f"{name}{list(i)} of {found.spec.short()}: {int(a[i]):#x}, expected {int(b[i]):#x} ({len(wrong)} differ)"
    return ""


def moved(variant: Variant, rows: int, k: int, made: list[QTensor]) -> float:
    """Bytes an element: BF16 read once, codes and scales written."""
    return 2 + sum(q.nbytes() for q in made) / (rows * k)


def check(variant: Variant, capability: int, budget: float | None) -> Row:
    """One variant on one architecture."""
    failures, elements = [], 0
    sizes = [spec.multiple for spec in variant if spec]
    ragged = (384, 128) if any(max(size) > 64 for size in sizes) else (160, 224)
    x = numbers("normal", 128, 256)
    made, launches = run(variant, x, capability)
    launch = launches[-1]
    found = anatomy(launch.kernel, capability)
    count = found.count / (launch.constants["BM"] * launch.constants["BK"] / (32 * launch.kernel.metadata.num_warps))
    if found.spilled:
        failures.append(f"{found.spilled} bytes spilled")
    if found.shared > SHARED[capability]:
        failures.append(f"{found.shared} bytes of shared memory, the chip has {SHARED[capability]}")
    if budget is not None and count > budget:
        failures.append(f"{count:.2f} instructions an element, the budget is {budget}")
    for each in launches:
        ptx = each.kernel.asm["ptx"]
        if bad := re.search(FORBIDDEN, ptx):
            failures.append(f"{each.name} has {bad[0]}")
        if each.lanes is not None and each.lanes.approx:
            failures.append(f"{each.name} executed {dict(each.lanes.approx)}")
    failures += [f"its PTX has no {word}" for word in required(variant, capability) if word not in launch.kernel.asm["ptx"]]
    kinds = () if capability == 103 else ("extreme", "subnormal", "bits")  # (its PTX is that of sm_100 but for its target)
    for kind, shape in (("normal", None), *((kind, ragged) for kind in kinds)):
        if shape:
            x = numbers(kind, *shape)
            made, _ = run(variant, x, capability)
        for q, reference in zip(made, wanted(variant, x), strict=True):
            elements += x.numel()
            if words := difference(q, reference):
                failures.append(f"{kind}: {words}")
    whole = moved(variant, 128, 256, wanted(variant, numbers("normal", 128, 256)))
    return Row(variant.short(), capability, found.registers, found.spilled, found.shared, count, whole, elements, failures)


PRODUCTS = {
    # formats of both operands, format and group of their scales -> what the PTX has, by architecture
    ("e2m1", "e2m1", "e4m3", 16): {100: ["kind::mxf4nvf4.block_scale.block16"], 120: ["scale_vec::4X", "ue4m3"]},
    ("e2m1", "e2m1", "e8m0", 32): {100: ["kind::mxf4.block_scale.block32"], 120: ["scale_vec::2X", "ue8m0"]},
    ("e4m3", "e4m3", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"], 120: ["kind::mxf8f6f4", "scale_vec::1X"]},
    ("e5m2", "e4m3", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"], 120: ["e5m2.e4m3", "scale_vec::1X"]},
    ("e4m3", "e2m1", "e8m0", 32): {100: ["kind::mxf8f6f4.block_scale.block32"]},
}
ANYWHERE = {80: "mma.sync.aligned.m16n8k16.row.col.f32.bf16", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def check_product(kind: tuple[str, str, str, int], capability: int) -> Row:
    """A block-scaled product compiles, to the instructions of its architecture. (Numbers: tests/test_matmul.py.)"""
    a_format, b_format, scale, group = kind
    M, N, K, name = 256, 256, 512, f"product {a_format} x {b_format}, {scale}/{group}"
    fast = native(capability, a_format, b_format)

    def operand(rows: int, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros(rows, K // 2 if fmt == "e2m1" else K, dtype=torch.uint8)
        size = (rows // 128 * K // group // 4, 512) if fast else (rows, K // group)
        return codes, torch.zeros(size, dtype=torch.uint8)

    with compiled(capability) as launches:
        matmul(operand(M, a_format), operand(N, b_format), torch.ones(1), kind[:2], scale, group, K, capability)
    (launch,) = launches
    found, ptx, failures = anatomy(launch.kernel, capability), launch.kernel.asm["ptx"], []
    if found.spilled:
        failures.append(f"{found.spilled} bytes spilled")
    if found.shared > SHARED[capability] or found.tensor > TENSOR_COLUMNS:
        failures.append(f"{found.shared} bytes of shared memory and {found.tensor} columns of tensor memory are too much")
    family = 100 if capability == 103 else capability
    words = [ANYWHERE[family], *(PRODUCTS[kind].get(family, []) if fast else [])]
    failures += [f"its PTX has no {word}" for word in words if word not in ptx]
    product = launch.constants["BM"] * launch.constants["BN"] * launch.constants["BK"]
    count = found.count * 32 * launch.kernel.metadata.num_warps / product
    return Row(name, capability, found.registers, found.spilled, found.shared, count, 0.0, 0, failures)


def required(variant: Variant, capability: int) -> list[str]:
    """Instructions without which the architecture would not be used."""
    words = []
    for spec in filter(None, variant):
        if spec.format == "e2m1" and capability >= 100 and spec.rounding == "nearest":
            words.append("cvt.rn.satfinite.e2m1x2.f32")
        if spec.format == "e2m1" and capability >= 100 and spec.rounding == "stochastic8":
            words.append("cvt.rn.satfinite.e2m1x2.f16x2")
        if spec.format in ("e4m3", "e5m2") and capability >= 90 and spec.rounding == "nearest":
            words.append(f"cvt.rn.satfinite.{spec.format}x2.f32")
        if spec.hadamard and capability >= 100:
            words.append("add.rn.f32x2")
    return words


def work(task: tuple[Variant | tuple, int, float | None]) -> Row:
    what, capability, budget = task
    with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the PTX that ptxas refuses
        try:
            return check(what, capability, budget) if isinstance(what, Variant) else check_product(what, capability)
        except Exception as error:
            words = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            return Row(name_of(what), capability, 0, 0, 0, 0.0, 0.0, 0, [words])


def name_of(what: Variant | tuple) -> str:
    return what.short() if isinstance(what, Variant) else "product " + " ".join(map(str, what))


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
        cells += [f"{(r := found[name, a]).instructions:.1f} ({r.registers})" for a in ARCHITECTURES]
        cells += [f"{(r := found[name, a]).instructions / (r.moved * budget):.2f}" for a, budget in CHIPS.values()]
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
    for what in [*PRODUCTS, *variants()]:
        for a in args.architectures or ARCHITECTURES:
            if args.only in name_of(what):
                tasks.append((what, a, None if args.renew else budgets.get(name_of(what), {}).get(str(a))))
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"], os.environ["OMP_NUM_THREADS"] = cache, "1"
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for row in pool.imap(work, tasks):
                rows.append(row)
                equal = f"{row.elements:,} elements equal" if row.elements else "compiles"
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
