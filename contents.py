"""python contents.py RUN_OR_STEP [OTHER]: what a checkpoint holds, module by module; with another, how far it is from it.

    bits      of the codes, block scales and global scale of a matrix, for each of its parameters; 32 where it has only a master
    change    |w - v| / |v|, Frobenius norms, w the master here and v that of the other        flips: share of other signs

Hashes are verified first; a damaged file is named. Reads files only: no model is built, and the config is not needed.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
from quant.mixed import Mixed
from quant.moments import how
from quant.qtensor import SPECS


class Step:
    """The masters of a step, and what is quantised of them."""

    def __init__(self, run_or_step: str):
        self.folder = checkpoint.find(run_or_step)
        checkpoint.intact(self.folder)
        self.state = json.loads((self.folder / "state.json").read_text())
        self.masters = load_file(self.folder / "model.safetensors")
        self.quantised = {f"{name}.weight": q for name, q in checkpoint.codes(self.folder).items()}
        with safe_open(self.folder / "optimizer.safetensors", "pt") as f:
            kept = f.metadata() or {}
        first = next(iter(json.loads(kept.get("specs", "{}")).values()), None)
        self.moments = how(first and SPECS.validate_python(first["spec"]), int(kept.get("power", 1)))

    def format(self, name: str) -> str:
        """How a parameter is stored beside its master, with the share of each format where blocks differ."""
        if name not in self.quantised:
            return "fp32"
        q = self.quantised[name]
        if not isinstance(q, Mixed):
            return q.spec.short()
        return ", ".join(f"{share:.0%} {spec}" for spec, share in q.shares().items())

    def bits(self, name: str) -> float:
        q, count = self.quantised.get(name), self.masters[name].numel()
        return 32.0 if q is None else 8 * q.nbytes() / count

    def files(self) -> list[str]:
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        return [f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items() if size > 50_000]


def differences(w: Tensor, v: Tensor) -> tuple[float, float]:
    """(change, flips) of a tensor against another of its shape."""
    w, v = w.double(), v.double()
    return float((w - v).norm() / v.norm()), float(((w * v) < 0).double().mean())


def table(step: Step, other: Step | None) -> list[str]:
    head = f"{'parameter':28} {'shape':>14} {'bits':>7}  {'stored as':28}"
    lines = [head + (f" {'change':>9} {'flips':>8}  format before" if other else "")]
    for name, w in step.masters.items():
        line = f"{name:28} {'x'.join(map(str, w.shape)):>14} {step.bits(name):7.2f}  {step.format(name):28}"
        if other and name in other.masters and other.masters[name].shape == w.shape:
            change, flips = differences(w, other.masters[name])
            before = other.format(name)
            line += f" {change:9.2e} {flips:8.3%}" + (f"  {before}" if before != step.format(name) else "")
        elif other:
            line += " not there, or of another shape"
        lines.append(line.rstrip())
    if other and (gone := sorted(other.masters.keys() - step.masters.keys())):
        lines.append(f"only in {other.folder}: {', '.join(gone)}")
    return lines


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("step", help="out/NAME or out/NAME/step_N")
    parser.add_argument("other", nargs="?", help="... to compare it with")
    args = parser.parse_args(argv)
    step, other = Step(args.step), Step(args.other) if args.other else None
    manifest = json.loads((Path(step.folder) / "MANIFEST.json").read_text())["sha256"]
    print(f"{step.folder}: step {step.state['step']}, {step.state['tokens']:,} tokens; {len(manifest)} files have their sha256")
    print(f"  {', '.join(step.files())}; {step.moments}")
    print(*table(step, other), sep="\n")
    sizes = {name: step.masters[name].numel() for name in step.quantised}
    whole = sum(w.numel() for w in step.masters.values())
    if sizes:
        mean = sum(step.bits(name) * size for name, size in sizes.items()) / sum(sizes.values())
        print(f"{sum(sizes.values()):,} of {whole:,} parameters are quantised, at {mean:.3f} bits each")
    else:
        print(f"none of {whole:,} parameters is quantised")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ncontents.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"contents.py: {error}", file=sys.stderr)
        sys.exit(2)
