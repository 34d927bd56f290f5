"""What each instruction does to the lanes (lanes.py), by the PTX ISA 9.

KNOWN lists, name by name, which modifiers are implemented; anything else raises NotImplementedError with the instruction's
text, so that no rounding mode and no type is taken for another.

Assumed, since the ISA does not say it in words: which random bits of cvt.rs go to which element (here 8 each for e2m1x4, the
upper and the lower 16 for the two pairs of e4m3x4 and e5m2x4). Not modelled: the order and the width of the sums within one
mma, which here are fp64 and rounded once; `approx` counts these, and approximate instructions.
"""

import re

import numpy as np

from testing.lanes import SIGNED, UNSIGNED, Lanes
from testing.numbers import (
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    fma32,
    from_e2m1,
    from_e4m3,
    from_e5m2,
    from_ue8m0,
    to_e2m1,
    to_e4m3,
    to_e5m2,
    to_ue8m0,
)

INTEGER = r"[us](16|32|64)"
FLOAT = r"(rn\.)?(f32|f32x2|f16|f16x2|bf16|bf16x2)"
SPACE = r"(global|shared|shared::cta)"
KNOWN = {
    "mov": r"[bus](16|32|64)|f32|pred",
    "cvta": r"(to\.)?global\.u64",
    "ld": rf"param\.[busf]\d+|{SPACE}(\.L1::\w+)*(\.v[248])?\.[busf](8|16|32|64)",
    "st": rf"{SPACE}(\.v[248])?\.[busf](8|16|32|64)",
    "atom": r"global\.gpu\.(acq_rel|relaxed)\.(max|min|add|and|or)\.[usb](32|64)",
    "red": r"global\.gpu\.(relaxed|release)\.(max|min|add|and|or)\.[usb](32|64)",
    "bar": r"sync|warp\.sync",
    "barrier": r"sync\.aligned",
    "membar": r".*", "fence": r".*", "griddepcontrol": r".*", "prefetch": r".*",
    "cp": r"async\.c[ag]\.shared\.global(\.L2::\w+)?|async\.(commit_group|wait_group|wait_all)",
    "and": r"b(16|32|64)|pred", "or": r"b(16|32|64)|pred", "xor": r"b(16|32|64)|pred", "not": r"b(16|32|64)|pred",
    "shl": r"b(16|32|64)", "shr": rf"{INTEGER}|b(16|32|64)", "shf": r"[lr]\.(wrap|clamp)\.b32",
    "lop3": r"b32", "prmt": r"b32", "bfe": r"[us](32|64)", "bfi": r"b(32|64)",
    "popc": r"b(32|64)", "clz": r"b32",
    "add": rf"{INTEGER}|{FLOAT}", "sub": rf"{INTEGER}|{FLOAT}", "neg": r"s(16|32|64)|f32", "abs": r"s(16|32|64)|f32",
    "copysign": r"f32", "div": rf"(rn|full|approx)\.f32|{INTEGER}", "rem": INTEGER,
    "max": rf"{INTEGER}|(NaN\.)?(xorsign\.abs\.|abs\.)?(f32|bf16x2|f16x2)",
    "min": rf"{INTEGER}|(NaN\.)?(xorsign\.abs\.|abs\.)?(f32|bf16x2|f16x2)",
    "mul": rf"(lo|hi|wide)\.{INTEGER}|{FLOAT}", "mad": rf"(lo|hi|wide)\.{INTEGER}", "fma": rf"{FLOAT}|rn\.f32\.bf16",
    "rcp": r"(rn|approx)\.f32", "sqrt": r"(rn|approx)\.f32", "rsqrt": r"approx\.f32",
    "ex2": r"approx\.f32", "lg2": r"approx\.f32",
    "setp": r"(eq|ne|[lg][te]u?|equ|neu|num|nan|lo|ls|hi|hs)(\.(and|or|xor))?\.([busf](16|32|64)|bf16x2|f16x2)",
    "selp": r"[busf](16|32|64)", "vote": r"sync\.(ballot\.b32|any\.pred|all\.pred)", "elect": r"sync",
    "shfl": r"sync\.(bfly|idx|up|down)\.b32", "redux": r"sync\.(max|min|add|and|or|xor)(\.abs)?\.([us]32|b32|f32)",
    "ldmatrix": r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16",
    "stmatrix": r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16",
    "mma": r"sync\.aligned\.m16n8k(8|16|32|64)\.row\.col\..*",
    "cvt": (
        r"rn\.satfinite\.(e4m3x2|e5m2x2|e2m1x2)\.(f32|f16x2|bf16x2)|r[pz]\.satfinite\.ue8m0x2\.(f32|bf16x2)"
        r"|rs\.satfinite\.(e2m1x4|e4m3x4|e5m2x4)\.f32|r[nz]\.(bf16x2|f16x2)\.f32"
        r"|rn\.(f16x2|bf16x2)\.(e4m3x2|e5m2x2|e2m1x2|ue8m0x2)"
        r"|r[nz]\.(bf16|f16)\.f32|f32\.(bf16|f16)|rn\.f32\.[us](8|16|32)|r[nzmp]i\.(f32\.f32|[us](8|16|32|64)\.f32)"
        r"|(sat\.)?[us](8|16|32|64)\.[us](8|16|32|64)"
    ),
}  # fmt: skip
_known: set[str] = set()


class Machine(Lanes):
    """`x_NAME(instruction, op, operands, active)` executes an instruction of that name."""

    def execute(self, instruction, active):
        op = instruction.op
        name = ".".join(op)
        if name not in _known:
            if op[0] not in KNOWN or not re.fullmatch(KNOWN[op[0]], ".".join(op[1:])):
                raise NotImplementedError(f"PTX instruction {instruction.text!r}")
            _known.add(name)
        getattr(self, "x_" + op[0])(instruction, op, instruction.operands, active)

    # ---- moves and memory
    def w(self, op):
        return int(re.sub(r"\D", "", op[-1]) or 1) if op[-1] != "pred" else 1

    def x_mov(self, instruction, op, operands, active):
        w = self.w(op)
        self.put(operands[0], self.get(operands[1], w), active)

    def x_cvta(self, instruction, op, operands, active):
        self.put(operands[0], self.get(operands[1], 64), active)

    def addr(self, a):
        return self.get(a[1], 64) + np.uint64(a[2] & (2**64 - 1))

    def vecinfo(self, op, reg):
        nv = next((int(q[1:]) for q in op if re.fullmatch(r"v\d", q)), 1)
        w = int(re.sub(r"\D", "", op[-1]))
        regs = reg[1] if reg[0] == "v" else [reg]
        return nv, w, regs

    def x_ld(self, instruction, op, operands, active):
        if op[1] == "param":
            v = self.parameters[operands[1][1][1]]
            nv, w, regs = self.vecinfo(op, operands[0])
            self.put(operands[0], np.full(self.n, v & ((1 << w) - 1), np.uint64).astype(UNSIGNED[w]), active)
            return
        nv, w, regs = self.vecinfo(op, operands[0])
        nb = nv * w // 8
        a = self.addr(operands[1])
        sel = slice(None) if active is None else active
        if op[1].startswith("shared"):
            idx = self.sidx(a[sel], sel, nb)
            buf = self.shared
        else:
            idx = self.memory.index(a[sel], nb)
            buf = self.memory.bytes
        v = buf.view(UNSIGNED[w])[(idx // (w // 8))[:, None] + np.arange(nv)]
        for j, q in enumerate(regs):
            if q[0] == "_":
                continue
            d = self.registers[q[1]]
            nvl = np.array(d)
            x = v[:, j]
            if op[-1][0] == "s" and d.dtype.itemsize * 8 > w:
                x = x.view(SIGNED[w]).astype(SIGNED[d.dtype.itemsize * 8]).view(d.dtype)
            nvl[sel] = x
            self.registers[q[1]] = nvl

    x_ldu = x_ld

    def sidx(self, a, sel, nb):
        off = (a & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if (off + nb > self.shared_size).any():
            raise IndexError(f"shared access beyond {self.shared_size}")
        if (off % nb).any():
            raise ValueError("misaligned shared access")
        return off + self.block[sel] * self.shared_size

    def x_st(self, instruction, op, operands, active):
        nv, w, regs = self.vecinfo(op, operands[1])
        nb = nv * w // 8
        a = self.addr(operands[0])
        sel = slice(None) if active is None else active
        if op[1].startswith("shared"):
            idx = self.sidx(a[sel], sel, nb)
            buf = self.shared
        else:
            idx = self.memory.index(a[sel], nb)
            buf = self.memory.bytes
        for j, q in enumerate(regs):
            buf.view(UNSIGNED[w])[idx // (w // 8) + j] = self.get(q, w)[sel]

    def x_atom(self, instruction, op, operands, active):
        ret = instruction.op[0] == "atom"
        a = self.addr(operands[1] if ret else operands[0])
        src = operands[2] if ret else operands[1]
        w = int(re.sub(r"\D", "", op[-1]))
        sel = slice(None) if active is None else active
        idx = self.memory.index(a[sel], w // 8) // (w // 8)
        t = op[-1][0]
        dt = {"f": np.float32, "u": UNSIGNED[w], "b": UNSIGNED[w], "s": SIGNED[w]}[t]
        buf = self.memory.bytes.view(dt)
        v = self.get(src, w)[sel].view(dt)
        old = buf[idx].copy()
        f = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}[
            [q for q in op if q in ("max", "min", "add", "or", "and")][0]
        ]
        f.at(buf, idx, v)
        if ret:
            full = self.get(operands[0], w).copy()
            full[sel] = old.view(UNSIGNED[w])
            self.put(operands[0], full, None)

    x_red = x_atom

    def x_bar(self, instruction, op, operands, active):
        if op[1] == "warp":
            return
        if active is not None:
            k = active.reshape(self.blocks, self.threads)
            if (k.any(1) != k.all(1)).any():
                raise RuntimeError("bar.sync reached by part of a CTA")

    x_barrier = x_bar

    def nop(self, *a):
        pass

    x_membar = x_fence = x_griddepcontrol = x_prefetch = x_cp_commit = nop

    def x_cp(self, instruction, op, operands, active):
        if "commit_group" in op or "wait_group" in op or "wait_all" in op:
            return
        n = operands[2][1]
        sel = np.ones(self.n, bool) if active is None else active.copy()
        src = np.full(self.n, n)
        if len(operands) > 3:
            src = self.get(operands[3], 32).astype(np.int64)
        d = self.addr(operands[0])
        s = self.addr(operands[1])
        di = self.sidx(d[sel], sel, n)
        cols = np.arange(n)
        out = np.zeros((sel.sum(), n), np.uint8)
        live = src[sel] > 0
        if live.any():
            si = self.memory.index(s[sel][live], n)
            out[live] = self.memory.bytes[si[:, None] + cols]
        self.shared[di[:, None] + cols] = out

    # ---- integer and logic
    def bits(self, instruction, op, operands, active, f):
        w = self.w(op)
        self.put(operands[0], f(*[self.get(q, w) for q in operands[1:]]), active)

    def x_and(self, instruction, op, operands, active):
        self.bits(instruction, op, operands, active, np.bitwise_and)

    def x_or(self, instruction, op, operands, active):
        self.bits(instruction, op, operands, active, np.bitwise_or)

    def x_xor(self, instruction, op, operands, active):
        self.bits(instruction, op, operands, active, np.bitwise_xor)

    def x_not(self, instruction, op, operands, active):
        self.bits(instruction, op, operands, active, np.invert)

    def x_shl(self, instruction, op, operands, active):
        w = self.w(op)
        s = self.get(operands[2], 32)
        self.put(
            operands[0],
            np.where(s < w, self.get(operands[1], w) << np.minimum(s, w - 1).astype(UNSIGNED[w]), 0).astype(UNSIGNED[w]),
            active,
        )

    def x_shr(self, instruction, op, operands, active):
        w = self.w(op)
        s = self.get(operands[2], 32)
        sm = np.minimum(s, w - 1)
        if op[-1][0] == "s":
            v = (self.get(operands[1], w).view(SIGNED[w]) >> sm.astype(SIGNED[w])).view(UNSIGNED[w])
        else:
            v = np.where(s < w, self.get(operands[1], w) >> sm.astype(UNSIGNED[w]), 0).astype(UNSIGNED[w])
        self.put(operands[0], v, active)

    def x_shf(self, instruction, op, operands, active):
        a, b, c = (self.get(q, 32).astype(np.uint64) for q in operands[1:4])
        c = c & np.uint64(31) if "wrap" in op else np.minimum(c, 32).astype(np.uint64)
        v = (b << np.uint64(32)) | a
        self.put(operands[0], ((v << c) >> np.uint64(32) if op[1] == "l" else v >> c).astype(np.uint32), active)

    def x_lop3(self, instruction, op, operands, active):
        a, b, c = (self.get(q, 32) for q in operands[1:4])
        lut = operands[4][1]
        r = np.zeros(self.n, np.uint32)
        for k in range(8):
            if lut >> k & 1:
                r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        self.put(operands[0], r, active)

    def x_prmt(self, instruction, op, operands, active):
        a, b, s = self.get(operands[1], 32), self.get(operands[2], 32), self.get(operands[3], 32)
        v = (b.astype(np.uint64) << np.uint64(32)) | a
        r = np.zeros(self.n, np.uint32)
        for k in range(4):
            n = (s >> np.uint32(4 * k)) & 15
            by = ((v >> ((n & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
            by = np.where(n & 8, np.where(by & 0x80, 0xFF, 0), by).astype(np.uint32)
            r |= by << np.uint32(8 * k)
        self.put(operands[0], r, active)

    def x_bfe(self, instruction, op, operands, active):
        w = self.w(op)
        a = self.get(operands[1], w)
        p = (self.get(operands[2], 32) & 255).astype(np.int64)
        l = (self.get(operands[3], 32) & 255).astype(np.int64)
        m = np.where(
            l >= w, UNSIGNED[w](2**w - 1), (UNSIGNED[w](1) << np.minimum(l, w - 1).astype(UNSIGNED[w])) - UNSIGNED[w](1)
        ).astype(UNSIGNED[w])
        r = np.where(p < w, a >> np.minimum(p, w - 1).astype(UNSIGNED[w]), 0).astype(UNSIGNED[w]) & m
        if op[-1][0] == "s":  # the field's top bit (or the msb past the end) fills the rest
            sb = (a >> np.minimum(p + l - 1, w - 1).clip(0).astype(UNSIGNED[w])) & UNSIGNED[w](1)
            r = np.where((sb == 1) & (l > 0), r | ~m, r).astype(UNSIGNED[w])
        self.put(operands[0], r, active)

    def x_bfi(self, instruction, op, operands, active):
        w = self.w(op)
        a, b = self.get(operands[1], w), self.get(operands[2], w)
        p, l = self.get(operands[3], 32), self.get(operands[4], 32)
        m = ((UNSIGNED[w](1) << l.astype(UNSIGNED[w])) - UNSIGNED[w](1)) << p.astype(UNSIGNED[w])
        self.put(operands[0], (b & ~m) | ((a << p.astype(UNSIGNED[w])) & m), active)

    def ty(self, op):
        return op[-1]

    def arith(self, instruction, op, operands, active, fi, ff):
        t = op[-1]
        if t == "f32":
            r = ff(*[self.fp32(q) for q in operands[1:]])
            r = self.ftz(op, r)
        elif t == "f64":
            r = ff(*[self.get(q, 64).view(np.float64) for q in operands[1:]])
        elif t in ("f32x2",):
            a = [self.get(q, 64) for q in operands[1:]]
            lo = ff(*[x.astype(np.uint32).view(np.float32) for x in a])
            hi = ff(*[(x >> np.uint64(32)).astype(np.uint32).view(np.float32) for x in a])
            r = lo.view(np.uint32).astype(np.uint64) | (hi.view(np.uint32).astype(np.uint64) << np.uint64(32))
        elif t in ("bf16", "bf16x2", "f16", "f16x2"):
            r = self.half(t, ff, [self.get(q, 32 if "x2" in t else 16) for q in operands[1:]])
        else:
            w = int(t[1:])
            d = SIGNED if t[0] == "s" else UNSIGNED
            r = fi(*[self.get(q, w).view(d[w]) for q in operands[1:]]).astype(d[w]).view(UNSIGNED[w])
        self.put(operands[0], r, active)

    def half(self, t, ff, a):
        up = bf16_to_f32 if t[0] == "b" else lambda c: c.view(np.float16).astype(np.float32)
        dn = f32_to_bf16 if t[0] == "b" else lambda x: x.astype(np.float16).view(np.uint16)

        def one(v):
            return dn(ff(*[up(np.ascontiguousarray(x.astype(np.uint16))) for x in v]))

        if "x2" not in t:
            return one(a)
        return one(a).astype(np.uint32) | (one([x >> np.uint32(16) for x in a]).astype(np.uint32) << np.uint32(16))

    def ftz(self, op, r):
        if "ftz" in op:
            r = np.where(np.abs(r) < np.float32(2**-126), np.copysign(np.float32(0), r), r)
        return r.astype(np.float32)

    def x_add(self, instruction, op, operands, active):
        self.arith(instruction, op, operands, active, np.add, np.add)

    def x_sub(self, instruction, op, operands, active):
        self.arith(instruction, op, operands, active, np.subtract, np.subtract)

    def x_neg(self, instruction, op, operands, active):
        self.arith(instruction, op, operands, active, np.negative, np.negative)

    def x_abs(self, instruction, op, operands, active):
        self.arith(instruction, op, operands, active, np.abs, np.abs)

    def x_copysign(self, instruction, op, operands, active):
        self.put(operands[0], np.copysign(self.fp32(operands[2]), self.fp32(operands[1])), active)

    def mm(self, instruction, op, operands, active, mx):
        def ff(*v):
            v = list(v)
            sg = None
            if "xorsign" in op:
                sg = np.signbit(v[0]) ^ np.signbit(v[1])
            if "abs" in op:
                v = [np.abs(x) for x in v]
            r = v[0]
            for x in v[1:]:
                eq = (r == x) & (r == 0)
                z = (
                    np.where(np.signbit(r) & np.signbit(x), -0.0, 0.0)
                    if mx
                    else np.where(np.signbit(r) | np.signbit(x), -0.0, 0.0)
                ).astype(np.float32)
                k = (np.maximum if mx else np.minimum)(r, x) if "NaN" in op else (np.fmax if mx else np.fmin)(r, x)
                r = np.where(eq, z, k).astype(np.float32)
            return r if sg is None else np.where(sg, -r, r)

        self.arith(instruction, op, operands, active, (np.maximum if mx else np.minimum), ff)

    def x_max(self, instruction, op, operands, active):
        self.mm(instruction, op, operands, active, True)

    def x_min(self, instruction, op, operands, active):
        self.mm(instruction, op, operands, active, False)

    def x_mul(self, instruction, op, operands, active):
        t = op[-1]
        if t[0] in "us" and t[1:].isdigit():
            w = int(t[1:])
            d = SIGNED if t[0] == "s" else UNSIGNED
            a, b = (self.get(q, w).view(d[w]) for q in operands[1:])
            if "wide" in op:
                r = (a.astype(d[2 * w]) * b.astype(d[2 * w])).view(UNSIGNED[2 * w])
            elif "hi" in op:
                r = ((a.astype(d[2 * w]) * b.astype(d[2 * w])) >> d[2 * w](w)).astype(d[w]).view(UNSIGNED[w])
            else:
                r = (a * b).view(UNSIGNED[w])
            self.put(operands[0], r, active)
        else:
            self.arith(instruction, op, operands, active, None, np.multiply)

    def x_mad(self, instruction, op, operands, active):
        t = op[-1]
        w = int(t[1:])
        d = SIGNED if t[0] == "s" else UNSIGNED
        if t[0] == "f":
            return self.x_fma(instruction, op, operands, active)
        a, b = (self.get(q, w).view(d[w]) for q in operands[1:3])
        if "wide" in op:
            r = (a.astype(d[2 * w]) * b.astype(d[2 * w])).view(UNSIGNED[2 * w]) + self.get(operands[3], 2 * w)
        elif "hi" in op:
            r = ((a.astype(d[2 * w]) * b.astype(d[2 * w])) >> d[2 * w](w)).astype(d[w]).view(UNSIGNED[w]) + self.get(
                operands[3], w
            )
        else:
            r = (a * b).view(UNSIGNED[w]) + self.get(operands[3], w)
        self.put(operands[0], r, active)

    def x_fma(self, instruction, op, operands, active):
        if op[-2:] == ["f32", "bf16"]:
            self.put(
                operands[0],
                fma32(bf16_to_f32(self.get(operands[1], 16)), bf16_to_f32(self.get(operands[2], 16)), self.fp32(operands[3])),
                active,
            )
        else:
            self.arith(instruction, op, operands, active, None, fma32)

    def x_div(self, instruction, op, operands, active):
        t = op[-1]
        if t[0] == "f":
            if "full" in op or "approx" in op:
                self.approx[".".join(op)] += 1
            self.arith(instruction, op, operands, active, None, np.divide)
        else:

            def q(a, b):
                z = b == 0
                b = np.where(z, 1, b)
                r = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
                return np.where(z, -1, np.where((a < 0) != (b < 0), -r, r) if a.dtype.kind == "i" else r)

            self.arith(instruction, op, operands, active, q, None)

    def x_rem(self, instruction, op, operands, active):
        self.arith(instruction, op, operands, active, lambda a, b: np.fmod(a, np.where(b == 0, 1, b)), None)

    def apx(self, instruction, op, operands, active, ff):
        if "approx" in op:
            self.approx[".".join(op)] += 1
        self.arith(instruction, op, operands, active, None, ff)

    def x_rcp(self, instruction, op, operands, active):
        self.apx(instruction, op, operands, active, lambda a: np.float32(1) / a)

    def x_sqrt(self, instruction, op, operands, active):
        self.apx(instruction, op, operands, active, np.sqrt)

    def x_rsqrt(self, instruction, op, operands, active):
        self.apx(instruction, op, operands, active, lambda a: np.float32(1) / np.sqrt(a))

    def x_ex2(self, instruction, op, operands, active):
        self.apx(instruction, op, operands, active, np.exp2)

    def x_lg2(self, instruction, op, operands, active):
        self.apx(instruction, op, operands, active, np.log2)

    def x_setp(self, instruction, op, operands, active):
        t = op[-1]
        cmp = op[1]
        comb = next((q for q in op[2:-1] if q in ("and", "or", "xor")), None)
        if t in ("f16x2", "bf16x2"):  # two predicates: low half | high half
            a, b = self.get(operands[1], 32), self.get(operands[2], 32)
            up = bf16_to_f32 if t[0] == "b" else lambda q: q.view(np.float16).astype(np.float32)
            for k, q in enumerate(operands[0][1]):
                x, y = (up(np.ascontiguousarray((v >> np.uint32(16 * k)).astype(np.uint16))) for v in (a, b))
                un = np.isnan(x) | np.isnan(y)
                base = cmp[:-1] if cmp.endswith("u") else cmp
                r = {
                    "eq": np.equal,
                    "ne": np.not_equal,
                    "lt": np.less,
                    "le": np.less_equal,
                    "gt": np.greater,
                    "ge": np.greater_equal,
                }[base](x, y)
                self.put(q, (r | un) if cmp.endswith("u") else (r & ~un), active)
            return
        w = 16 if t in ("bf16", "f16") else int(t[1:]) if t != "pred" else 1
        a, b = self.get(operands[1], w), self.get(operands[2], w)
        if t == "f32":
            a, b = a.view(np.float32), b.view(np.float32)
        elif t == "f64":
            a, b = a.view(np.float64), b.view(np.float64)
        elif t == "bf16":
            a, b = bf16_to_f32(a), bf16_to_f32(b)
        elif t == "f16":
            a, b = a.view(np.float16), b.view(np.float16)
        elif t[0] == "s":
            a, b = a.view(SIGNED[w]), b.view(SIGNED[w])
        un = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(self.n, bool)
        base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(cmp, cmp)
        unord = a.dtype.kind == "f" and base.endswith("u")
        base = base[:-1] if unord else base
        if base == "num":
            r = ~un
        elif base == "nan":
            r = un
        else:
            r = {
                "eq": np.equal,
                "ne": np.not_equal,
                "lt": np.less,
                "le": np.less_equal,
                "gt": np.greater,
                "ge": np.greater_equal,
            }[base](a, b)
            if a.dtype.kind == "f":
                r = (r | un) if unord else (r & ~un)
        dst = operands[0][1] if operands[0][0] == "p2" else [operands[0]]
        nr = ~r
        if comb:
            c = self.get(operands[3], 1)
            fc = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[comb]
            r, nr = fc(r, c), fc(nr, c)
        self.put(dst[0], r, active)
        if len(dst) > 1:
            self.put(dst[1], nr, active)

    def x_selp(self, instruction, op, operands, active):
        w = int(re.sub(r"\D", "", op[-1]))
        self.put(operands[0], np.where(self.get(operands[3], 1), self.get(operands[1], w), self.get(operands[2], w)), active)

    def x_popc(self, instruction, op, operands, active):
        self.put(operands[0], np.bitwise_count(self.get(operands[1], self.w(op))).astype(np.uint32), active)

    def x_clz(self, instruction, op, operands, active):
        a = self.get(operands[1], 32).astype(np.float64)
        self.put(operands[0], np.where(a > 0, 31 - np.floor(np.log2(np.maximum(a, 1))), 32).astype(np.uint32), active)

    # ---- warp
    def x_shfl(self, instruction, op, operands, active):
        dst = operands[0][1] if operands[0][0] == "p2" else [operands[0]]
        mode = op[2]
        a = self.get(operands[1], 32)
        b = self.get(operands[2], 32).astype(np.int64)
        c = self.get(operands[3], 32).astype(np.int64)
        lane = np.arange(self.n) % 32
        seg = (c >> 8) & 31
        cv = c & 31
        mx = (lane & seg) | (cv & ~seg)
        mn = lane & seg
        j = {"bfly": lane ^ b, "idx": mn | (b & ~seg), "up": lane - b, "down": lane + b}[mode]
        ok = j >= mx if mode == "up" else j <= mx
        j = np.where(ok, j, lane)
        src = np.arange(self.n) // 32 * 32 + j
        self.put(dst[0], a[src], active)
        if len(dst) > 1:
            self.put(dst[1], ok, active)

    def x_redux(self, instruction, op, operands, active):
        t = op[-1]
        a = self.get(operands[1], 32)
        v = a.view({"s32": np.int32, "f32": np.float32}.get(t, np.uint32)).reshape(-1, 32)
        if "abs" in op:
            v = np.abs(v)
        f = {
            "max": (np.nanmax if t == "f32" else np.max),
            "min": (np.nanmin if t == "f32" else np.min),
            "add": np.sum,
            "or": np.bitwise_or.reduce,
            "and": np.bitwise_and.reduce,
            "xor": np.bitwise_xor.reduce,
        }[op[2]]
        self.put(operands[0], np.repeat(f(v, axis=1).astype(v.dtype), 32).view(np.uint32), active)

    def x_vote(self, instruction, op, operands, active):
        p = self.get(operands[1], 1).reshape(-1, 32)
        m = op[2]
        if m == "ballot":
            self.put(
                operands[0],
                np.repeat((p.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32),
                active,
            )
        else:
            self.put(operands[0], np.repeat(p.any(1) if m == "any" else p.all(1), 32), active)

    def x_elect(self, instruction, op, operands, active):
        self.put(operands[0][1][1], np.arange(self.n) % 32 == 0, active)

    def x_ldmatrix(self, instruction, op, operands, active):
        a = self.addr(operands[1])
        idx = self.sidx(a, slice(None), 16).reshape(-1, 32)
        lane = np.arange(32)
        b16 = self.shared.view(np.uint16)
        for k, q in enumerate(operands[0][1] if operands[0][0] == "v" else [operands[0]]):
            rows = b16[(idx[:, 8 * k : 8 * k + 8] // 2)[:, :, None] + np.arange(8)]  # (warps, 8 rows, 8)
            if "trans" in op:
                rows = rows.swapaxes(1, 2)
            v = rows[:, lane // 4, :][:, np.arange(32), (lane % 4) * 2].astype(np.uint32) | (
                rows[:, lane // 4, :][:, np.arange(32), (lane % 4) * 2 + 1].astype(np.uint32) << 16
            )
            self.put(q, v.ravel(), active)

    def x_stmatrix(self, instruction, op, operands, active):
        idx = self.sidx(self.addr(operands[0]), slice(None), 16).reshape(-1, 32)
        lane = np.arange(32)
        b16 = self.shared.view(np.uint16)
        for k, q in enumerate(operands[1][1] if operands[1][0] == "v" else [operands[1]]):
            v = self.get(q, 32).reshape(-1, 32)
            rows = np.zeros((v.shape[0], 8, 8), np.uint16)
            rows[:, lane // 4, (lane % 4) * 2] = v & 0xFFFF
            rows[:, lane // 4, (lane % 4) * 2 + 1] = v >> 16
            if "trans" in op:
                rows = rows.swapaxes(1, 2)
            b16[(idx[:, 8 * k : 8 * k + 8] // 2)[:, :, None] + np.arange(8)] = rows

    def x_mma(self, instruction, op, operands, active):
        sh = next(q for q in op if re.fullmatch(r"m\d+n\d+k\d+", q))
        tys = [q for q in op if q in ("f32", "bf16", "f16", "tf32")]
        if any(q.startswith("kind::mxf") for q in re.split(r"\.", instruction.text.split()[0])):
            return self.mma_scaled(instruction, op, operands, active)
        if sh != "m16n8k16" and sh != "m16n8k8":
            raise NotImplementedError(instruction.text)
        K = int(sh.split("k")[1])
        at = tys[1]
        up = bf16_to_f32 if at == "bf16" else lambda c: c.view(np.float16).astype(np.float32)
        W = self.n // 32
        lane = np.arange(32)
        gid, tig = lane // 4, lane % 4
        A = np.zeros((W, 16, K), np.float64)
        B = np.zeros((W, K, 8), np.float64)
        C = np.zeros((W, 16, 8), np.float64)

        def halves(q):
            v = self.get(q, 32).reshape(W, 32)
            return up(np.ascontiguousarray((v & 0xFFFF).astype(np.uint16))), up(
                np.ascontiguousarray((v >> 16).astype(np.uint16))
            )

        for r, q in enumerate(operands[1][1]):
            l, h = halves(q)
            row = gid + 8 * (r & 1)
            col = tig * 2 + 8 * (r >> 1)
            A[:, row, col] = l
            A[:, row, col + 1] = h
        for r, q in enumerate(operands[2][1]):
            l, h = halves(q)
            k = tig * 2 + 8 * r
            B[:, k, gid] = l
            B[:, k + 1, gid] = h
        for r, q in enumerate(operands[3][1]):
            C[:, gid + 8 * (r >> 1), tig * 2 + (r & 1)] = self.fp32(q).reshape(W, 32)
        D = (A @ B + C).astype(np.float32)
        self.approx["mma.sync (order of sums)"] += 1
        for r, q in enumerate(operands[0][1]):
            self.put(q, D[:, gid + 8 * (r >> 1), tig * 2 + (r & 1)].reshape(-1), active)

    def mma_scaled(self, instruction, op, operands, active):
        """mma.sync kind::mxf4nvf4 / mxf4 (m16n8k64, e2m1) and mxf8f6f4 (m16n8k32, 8-bit containers) with block scales"""
        name = instruction.text.split()[0]
        K = 64 if "m16n8k64" in name else 32
        sv = int(re.search(r"scale_vec::(\d)X", name)[1])
        tys = re.search(r"\.f32\.(\w+)\.(\w+)\.f32\.(\w+)", name)
        W = self.n // 32
        lane = np.arange(32)
        gid, tig = lane // 4, lane % 4
        per = 8 if K == 64 else 4
        bits = 32 // per
        dec = {"e2m1": from_e2m1, "e4m3": from_e4m3, "e5m2": from_e5m2}

        def vals(q, t):
            v = self.get(q, 32).reshape(W, 32)
            c = np.stack([(v >> np.uint32(bits * e)) & np.uint32(2**bits - 1) for e in range(per)], -1).astype(np.uint8)
            if t == "e2m1" and bits == 8:
                c = c >> 2  # e2m1 in an 8-bit container sits in bits 5:2
            return dec[t](c).astype(np.float64)

        A = np.zeros((W, 16, K))
        B = np.zeros((W, K, 8))
        C = np.zeros((W, 16, 8))
        half = K // 2
        e = np.arange(per)
        for r, q in enumerate(operands[1][1]):
            A[:, (gid + 8 * (r & 1))[:, None], (tig * per + half * (r >> 1))[:, None] + e] = vals(q, tys[1])
        for r, q in enumerate(operands[2][1]):
            B[:, (tig * per + half * r)[:, None] + e, gid[:, None]] = vals(q, tys[2])
        for r, q in enumerate(operands[3][1]):
            C[:, gid + 8 * (r >> 1), tig * 2 + (r & 1)] = self.fp32(q).reshape(W, 32)
        decode = from_e4m3 if tys[3] == "ue4m3" else from_ue8m0

        def reg(q):
            return self.get(q[1][0] if q[0] == "v" else q, 32).reshape(W, 32)

        def scale(v, byte):
            return decode(((v >> np.uint32(8 * byte)) & np.uint32(255)).astype(np.uint8)).astype(np.float64)

        def sel(q):
            return [int(x[1]) if x[0] == "i" else int(self.get(x, 16)[0]) for x in q[1]]

        (ba, ta), (bb, tb) = sel(operands[5]), sel(operands[7])
        sa, sb = reg(operands[4]), reg(operands[6])
        rows = np.arange(8)
        blk = K // sv
        for j in range(sv):
            for h in range(2):
                A[:, rows + 8 * h, j * blk : (j + 1) * blk] *= scale(sa[:, rows * 4 + 2 * ta + h], ba + j)[:, :, None]
            B[:, j * blk : (j + 1) * blk, :] *= scale(sb[:, rows * 4 + tb], bb + j)[:, None, :]
        D = (A @ B + C).astype(np.float32)
        self.approx["mma.sync (order of sums)"] += 1
        for r, q in enumerate(operands[0][1]):
            self.put(q, D[:, gid + 8 * (r >> 1), tig * 2 + (r & 1)].reshape(-1), active)

    # ---- cvt
    def x_cvt(self, instruction, op, operands, active):
        d, s = op[-2], op[-1]
        mods = op[1:-2]
        c = np.ascontiguousarray
        pair = {
            "e4m3x2": (to_e4m3, 8),
            "e5m2x2": (to_e5m2, 8),
            "e2m1x2": (to_e2m1, 4),
            "ue8m0x2": (lambda x: to_ue8m0(x, "rp" in mods), 8),
            "bf16x2": (lambda x: f32_to_bf16(x, "rz" in mods), 16),
            "f16x2": (lambda x: f32_to_f16(x, "rz" in mods), 16),
        }
        quad = {"e2m1x4": (to_e2m1, 4), "e4m3x4": (to_e4m3, 8), "e5m2x4": (to_e5m2, 8)}
        if d in quad and s == "f32":  # (which random bits go where is assumed, see above)
            f, w = quad[d]
            v = [self.fp32(q) for q in operands[1][1]]
            rb = self.get(operands[2], 32)
            if d == "e2m1x4":
                rs = [(rb >> 24) & 255, (rb >> 8) & 255, (rb >> 16) & 255, rb & 255]
                nr = 8
            else:
                rs = [rb >> 16, rb >> 16, rb & 0xFFFF, rb & 0xFFFF]
                nr = 16
            r = np.zeros(self.n, np.uint32)
            for x, k in zip(v, rs, strict=True):
                r = (r << np.uint32(w)) | f(x, k, nr)
            self.put(operands[0], r.astype(UNSIGNED[4 * w]), active)
            return
        if d in pair and s in ("f32", "bf16x2", "f16x2"):
            f, w = pair[d]
            if s == "f32":
                a, b = self.fp32(operands[1]), self.fp32(operands[2])
            else:
                v = self.get(operands[1], 32)
                up = bf16_to_f32 if s == "bf16x2" else lambda q: q.view(np.float16).astype(np.float32)
                a, b = up(c((v >> 16).astype(np.uint16))), up(c((v & 0xFFFF).astype(np.uint16)))
            self.put(operands[0], ((f(a).astype(np.uint32) << np.uint32(w)) | f(b)).astype(UNSIGNED[2 * w]), active)
            return
        if d in ("f16x2", "bf16x2") and s in ("e4m3x2", "e5m2x2", "e2m1x2", "ue8m0x2"):
            w = 4 if s == "e2m1x2" else 8
            v = self.get(operands[1], 2 * w)
            lo, hi = v & (2**w - 1), v >> w
            if s == "ue8m0x2":
                lo, hi = (f32_to_bf16(from_ue8m0(q)) for q in (lo, hi))
            else:
                decode = {"e4m3x2": from_e4m3, "e5m2x2": from_e5m2, "e2m1x2": from_e2m1}[s]
                lo, hi = (decode(c(q)).astype(np.float16).view(np.uint16) for q in (lo, hi))
            self.put(operands[0], lo.astype(np.uint32) | (hi.astype(np.uint32) << 16), active)
            return

        # scalar conversions
        def load(t, q):
            w = 16 if t in ("f16", "bf16") else int(t[1:])
            v = c(self.get(q, w))
            if t == "f32":
                return v.view(np.float32)
            if t == "f64":
                return v.view(np.float64)
            if t == "bf16":
                return bf16_to_f32(v)
            if t == "f16":
                return v.view(np.float16).astype(np.float32)
            return v.view(SIGNED[w] if t[0] == "s" else UNSIGNED[w])

        v = load(s, operands[1])
        if d == "f32":
            r = (
                v.astype(np.float32)
                if not any(m in mods for m in ("rni", "rzi", "rmi", "rpi"))
                else {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[
                    next(m for m in mods if m in ("rni", "rzi", "rmi", "rpi"))
                ](v)
            )
        elif d == "f64":
            r = v.astype(np.float64)
        elif d == "bf16":
            r = f32_to_bf16(v.astype(np.float32), "rz" in mods)
        elif d == "f16":
            r = f32_to_f16(v.astype(np.float32), "rz" in mods)
        else:
            w = int(d[1:])
            dt = SIGNED[w] if d[0] == "s" else UNSIGNED[w]
            if v.dtype.kind == "f":
                v = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[
                    next(m for m in mods if m in ("rni", "rzi", "rmi", "rpi"))
                ](v.astype(np.float64))
                ii = np.iinfo(dt)
                r = np.where(np.isnan(v), 0, np.clip(v, ii.min, ii.max)).astype(dt).view(UNSIGNED[w])
            else:
                if "sat" in mods:
                    ii = np.iinfo(dt)
                    v = np.clip(v, ii.min, ii.max)
                r = v.astype(dt)
                dw = self.registers[operands[0][1]].dtype.itemsize * 8  # destination register may be wider: extend
                r = r.astype((SIGNED if d[0] == "s" else UNSIGNED)[dw]).view(UNSIGNED[dw]) if dw != w else r.view(UNSIGNED[w])
        self.put(operands[0], r, active)
