"""python -m configs.table: write the table of recipes, one line for each config, between two comments in README.md, those of
real runs and of formats (support.py) between others, and what was measured of a config as the last line of its first comment.

What its columns mean stands below it in README.md. All of it is computed from the config as resolved, at the start of the run,
for the recipe that most FLOPs have; a paper is the first that the file's comment names (or that of a file which it extends);
times and losses are those in docs/measured.json.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from configs import Config, load, support
from model import GPT, parameter_count
from quant import Context, WeightStore, assign, attach
from quant.choice import Spec
from quant.formats import FORMATS
from quant.linear import Linear, linears
from quant.recipe import OPERANDS
from quant.spec import QuantSpec

ROOT = Path(__file__).parent.parent
README, MEASURED = ROOT / "README.md", ROOT / "docs/measured.json"
BEGIN, END = "<!-- make table -->", "<!-- end of the table -->"
BEGIN_RUNS, END_RUNS = "<!-- make table: real runs -->", "<!-- end of the real runs -->"
# The name of a config of a real run, which nobody trains here: a recipe and a size.
RUN = re.compile(r"(?P<recipe>.+)-(?P<size>[\d.]+b(-hybrid)?)")
SEEN = "Measured (README.md, recipes):"
HEAD = (
    "config",
    "paper",
    "fprop x · w",
    "dgrad g · w",
    "wgrad g · x",
    "scales",
    "also",
    "bits x, w",
    "below 16 bits",
    "step / BF16",
    "loss",
)


class Resolved:
    """A config and its model at the start of the run, without memory."""

    def __init__(self, config: Config):
        self.config, self.tokens = config, config.train.batch_size * config.model.seq_len
        with torch.device("meta"):
            self.model = GPT(config.model)
        attach(self.model, Context())
        self.names = assign(self.model, config.recipes, config.policy)
        stored = WeightStore(self.model, config.weights, 0).stored
        self.store = {name: config.weights.store for name in self.names if f"{name}.weight" in stored}
        work: dict[str, int] = {}
        for name, module in linears(self.model).items():
            work[self.names[name]] = work.get(self.names[name], 0) + module.weight.numel()
        self.main = max((n for n in work if n != "bf16"), key=work.get, default="bf16")

    def operands(self, module: Linear) -> dict[str, Spec | None]:
        """As the recipe has them, a weight without a spec as its store has it."""
        found = module.recipe.operands() if module.recipe else dict.fromkeys(OPERANDS)
        return {o: self.store.get(module.name) if spec is None and o.endswith(".w") else spec for o, spec in found.items()}

    def below_16(self) -> tuple[float, float]:
        """(least, most): a ladder leaves it to the data."""
        low = high = total = 0
        for module in linears(self.model).values():
            for _, pair in groupby(self.operands(module).items(), lambda item: item[0][:5]):
                kinds = [[e.bits < 16 for e in spec.elements] if spec else [False] for _, spec in pair]
                total += module.weight.numel()
                low += module.weight.numel() * all(map(all, kinds))
                high += module.weight.numel() * all(map(any, kinds))
        return low / total, high / total

    def bits(self, operand: str) -> tuple[float, float]:
        """(least, most) bits of an element: a choice may leave it to the data."""
        plain = {"bf16": 16, "fp32": 32}[self.config.train.dtype]
        low = high = count = 0
        for name, module in linears(self.model).items():
            if self.names[name] == self.main:
                shape = (self.tokens if operand.endswith("x") else module.out_features), module.in_features
                spec = self.operands(module)[operand]
                found = [element_bits(s, *shape) for s in spec.candidates] if spec else [plain]
                size = shape[0] * shape[1]
                low, high, count = low + size * min(found), high + size * max(found), count + size
        return low / count, high / count


def element_bits(spec: QuantSpec, rows: int, k: int) -> float:
    """Of codes, block scales and outer scales, for one element of an operand [rows, k]."""
    scale, block = spec.scale, spec.blocks_of(rows, k)
    bits = float(spec.element.bits)
    if scale.format != "none":
        bits += (32 if scale.format == "fp32" else FORMATS[scale.format].bits) / (block[0] * block[1])
    if scale.outer != "none":
        spans = scale.group or (k if scale.outer == "row" else rows * k)
        bits += (8 if scale.macro else 32) / spans
    return bits


def shown(spec: Spec | None) -> str:
    if spec is None:
        return "-"
    formats = ("→" if spec.ladder else "+").join(dict.fromkeys(s.format for s in spec.candidates))
    if len(spec.candidates) > len(spec.elements):
        formats = f"{len(spec.candidates)} × {formats}"
    block = {(-1, -1): "tensor", (1, -1): "row"}.get(spec.block) or "x".join(map(str, spec.block))
    return formats if spec.scale.format == "none" else f"{formats}/{block}"


def words(spec: QuantSpec) -> tuple[str, list[str]]:
    """(the scale without its targets, transforms and roundings), in the words of `short`."""
    scale = spec.scale.short()
    rest = [word for word in spec.short().split()[1:] if word != scale]
    return re.sub(r"-(outer_)?target=[^-]+", "", scale), rest


def paper(path: Path) -> str:
    """The first arXiv number in the comment at the top, or of the file that it extends."""
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)*", text)[0]
    if found := re.search(r"arXiv:(\d{4}\.\d{5})", comment):
        return f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
    bases = tomllib.loads(text).get("extends", [])
    found = (paper(path.parent / name) for name in ([bases] if isinstance(bases, str) else bases))
    return next((number for number in found if number != "-"), "-")


def also(r: Resolved, of_operands: list[str]) -> str:
    """What the columns of formats do not say."""
    recipe, weights, state = r.config.recipes.get(r.main), r.config.weights, r.config.optimizer.state
    found = [f"rotate{recipe.rotate}"] * (recipe.rotate > 0) + ["clip"] * recipe.clip if recipe else []
    found += [f"{site}={shown(spec)}" for site, spec in vars(r.config.sites).items() if spec]
    found += [f"weights={shown(weights.store)}" + "-kahan" * weights.kahan] if weights.store else []
    found += [f"moments={shown(state)}"] if state else []
    return " ".join([*sorted(set(of_operands)), *found]) or "-"


def row(path: Path, measured: dict) -> tuple[str, ...]:
    r = Resolved(load(path))
    specs = next(r.operands(m) for name, m in linears(r.model).items() if r.names[name] == r.main)
    gemms = [(shown(a), shown(b)) for a, b in zip(*[iter(specs.values())] * 2, strict=True)]
    found = [words(c) for s in specs.values() if s for c in s.candidates]
    scales = dict.fromkeys(scale for scale, _ in found if scale != "unscaled")
    bits = ["–".join(dict.fromkeys(f"{b:.2f}".rstrip("0").rstrip(".") for b in r.bits(o))) for o in ("fprop.x", "fprop.w")]
    time, end = measured["steps"]["ratio"].get(path.stem), measured["outcomes"].get(path.stem)
    return (
        *(f"[{path.stem}](configs/{path.name})", paper(path), *(a if a == b else f"{a} · {b}" for a, b in gemms)),
        *(", ".join(scales) or "-", also(r, [word for _, some in found for word in some])),
        *(", ".join(bits), "–".join(dict.fromkeys(f"{b:.0%}" for b in r.below_16()))),
        *(f"{time:g}" if time else "-", f"{end['loss']:.3f}" if end else "-"),
    )


def table() -> str:
    measured = json.loads(MEASURED.read_text())
    return lines(HEAD, [row(path, measured) for path in small_files()])


def small_files() -> list[Path]:
    """Every config that is trained here; base.toml is tiny-bf16.toml."""
    return [path for path in sorted((ROOT / "configs").glob("*.toml")) if path.stem != "base" and not RUN.fullmatch(path.stem)]


def lines(head: Sequence[str], rows: list[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))


def runs() -> str:
    """One line for each size; under each recipe the share of FLOPs with both operands below 16 bits, and its file."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted((ROOT / "configs").glob("*.toml")):
        if name := RUN.fullmatch(path.stem):
            found.setdefault(name["size"], {})[name["recipe"]] = path
    recipes = ("bf16", "mor", "fp8-blockwise", "mxfp8", "nvfp4")
    rows = []
    for size, files in sorted(found.items(), key=lambda item: (float(item[0].split("b")[0]), item[0])):
        of = {name: Resolved(load(files[name])) for name in recipes}
        c, t = of["bf16"].config, of["bf16"].config.train
        tokens = t.steps * c.tokens_per_step
        shares = ("–".join(dict.fromkeys(f"{b:.0%}" for b in each.below_16())) for each in of.values())
        links = (f"[{share}](configs/{files[name].name})" for name, share in zip(recipes, shares, strict=True))
        sizes = (
            f"{parameter_count(c.model):,}",
            f"{c.model.blocks}",
            f"{tokens / 1e12:.0f}T",
            f"{c.tokens_per_step:,}",
            f"{t.lr:g}",
        )
        rows.append((size, *sizes, *links))
    return lines(("", "parameters", "blocks", "tokens", "a step", "rate", *recipes), rows)


def renewed(text: str) -> str:
    """A page with the tables as they are now."""
    made_of = (BEGIN, END, table), (BEGIN_RUNS, END_RUNS, runs), (support.BEGIN, support.END, support.table)
    for begin, end, made in made_of:
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{made()}\n{end}{rest.split(end)[1]}"
    return text


def said(path: Path, measured: dict) -> str:
    """A config's text with what one should see, if it has been measured."""
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)*", text)[0]
    time, end = measured["steps"]["ratio"].get(path.stem), measured["outcomes"].get(path.stem)
    found = [f"validation loss {end['loss']:.3f} nats/token at the end"] if end else []
    found += [f"a step {time:g} times that of tiny-bf16"] if time else []
    line = f"# {SEEN} {'; '.join(found)}.\n" if found else ""
    return re.sub(rf"# {re.escape(SEEN)}.*\n", "", comment) + line + text[len(comment) :]


if __name__ == "__main__":
    known = json.loads(MEASURED.read_text())
    for file in sorted((ROOT / "configs").glob("*.toml")):
        file.write_text(said(file, known), encoding="utf-8")
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
