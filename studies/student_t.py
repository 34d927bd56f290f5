"""python -m studies.student_t: the synthetic study of the metric-driven approach (arXiv:2408.02897, figures 3 and 4).

    l, r [512, 512], both Student-t with nu degrees of freedom; both quantised by INT8, E4M3, E5M2
    BE = |l r^T - q(l) q(r)^T| / (|l| |r|^T)     element by element, in fp64: the median over 6 trials

with one scale for each vector along the contraction, as in the paper, rounded to nearest and stochastically, and with one scale
for the tensor; and the mean relative error of elements by their size, |x| / amax in binades. Seconds; printed, and drawn to
docs/student_t.png. What the paper's figures show is known here at second hand: that FP8 stays
bounded as tails get heavier, and INT8 does not. tests/test_search.py compares with the numbers of a separate simulation.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quant import QuantSpec, Scale, quantize
from quant.random import Key

SIZE, TRIALS = 512, 6
NUS = (1.0, 2.0, 3.0, 5.0, 8.0, 30.0, math.inf)
FORMATS = ("int8", "e4m3", "e5m2")
WAYS = {"vector": ((1, -1), "nearest"), "vector, stochastic": ((1, -1), "stochastic"), "tensor": ((-1, -1), "nearest")}


def student(nu: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SIZE, SIZE)) if math.isinf(nu) else rng.standard_t(nu, (SIZE, SIZE))
    return torch.from_numpy(x).float()


def backward_error(left: Tensor, right: Tensor, spec: QuantSpec) -> float:
    """The median BE of left @ right^T, both quantised along the contraction, fp64."""
    keys = (Key(0), Key(1)) if spec.keyed else (None, None)
    a, b = (quantize(x, spec, key).dequantize().double() for x, key in zip((left, right), keys, strict=True))
    x, y = left.double(), right.double()
    return float(((x @ y.T - a @ b.T).abs() / (x.abs() @ y.abs().T)).median())


def table(nus=NUS, ways=tuple(WAYS), trials: int = TRIALS) -> dict[tuple[float, str, str], float]:
    """(nu, way, format) -> median BE, the median over trials."""
    found = {}
    for nu in nus:
        pairs = [(student(nu, 2 * trial), student(nu, 2 * trial + 1)) for trial in range(trials)]
        for way in ways:
            block, rounding = WAYS[way]
            for name in FORMATS:
                spec = QuantSpec(name, block, Scale("fp32"), rounding)
                found[nu, way, name] = float(np.median([backward_error(*pair, spec) for pair in pairs]))
    return found


def profile(name: str) -> dict[int, float]:
    """k -> the mean relative error of elements with 2^-(k+1) < |x| / amax <= 2^-k, log-uniform within the binade."""
    spec, found = QuantSpec(name, (-1, -1), Scale("fp32")), {}
    for k in range(20):
        x = torch.exp2(-k - torch.rand(1, 4096, generator=torch.Generator().manual_seed(k)))
        x[0, -1] = 1.0  # the amax
        q = quantize(x, spec).dequantize()
        found[k] = float(((q - x).abs() / x)[0, :-1].mean())
    return found


def draw(found: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in FORMATS:
        points = profile(name)
        left.semilogy([-k - 0.5 for k in points], points.values(), "o-", ms=3, label=name)
        (line,) = right.semilogy(range(len(NUS)), [found[nu, "vector", name] for nu in NUS], "o-", label=f"{name}, vector")
        tensor = [found[nu, "tensor", name] for nu in NUS]
        right.semilogy(range(len(NUS)), tensor, "--", color=line.get_color(), lw=1, label=f"{name}, tensor")
    left.set(xlabel="log2 |x| / amax", ylabel="mean relative error")
    left.set_title("relative error by size, rounded to nearest", fontsize=10)
    right.set_xticks(range(len(NUS)), ["∞" if math.isinf(nu) else f"{nu:g}" for nu in NUS])
    right.set(xlabel="degrees of freedom of Student's t (heavy tails at the left)", ylabel="median backward error")
    right.set_title(f"backward error of a {SIZE} x {SIZE} x {SIZE} product", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    found = table()
    print(f"median backward error, {SIZE} x {SIZE} operands, Student-t; scales of a vector or the tensor\n")
    print(f"{'nu':>4}  " + "  ".join(f"{way:^32}" for way in WAYS))
    print("      " + "  ".join("".join(f"{name:>10}" for name in FORMATS) + "  " for _ in WAYS))
    for nu in NUS:
        cells = ["".join(f"{found[nu, way, name]:10.2e}" for name in FORMATS) for way in WAYS]
        print(f"{nu:>4g}  " + "    ".join(cells))
    profiles = {name: profile(name) for name in FORMATS}
    print("\nmean relative error by size, |x| / amax within a binade below 2^-k\n")
    print("   k" + "".join(f"{name:>10}" for name in FORMATS))
    for k in range(0, 20, 2):
        print(f"{k:4}" + "".join(f"{profiles[name][k]:10.4f}" for name in FORMATS))
    path = Path(__file__).parent.parent / "docs/student_t.png"
    draw(found, path)
    print(f"\ndrawn: docs/{path.name}")


if __name__ == "__main__":
    main()
