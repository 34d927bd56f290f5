"""The house: who imports whom, what no file may contain, and that the commands which README and Makefile offer exist.

All of it is read from the sources (ast, git), nothing is imported or run but `make help`.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A floor imports only from lower ones, packages also from themselves.
FLOORS = {
    "bench": 10, "launch": 6,
    "studies": 9, "testing": 9,
    "compare": 8, "search": 8, "contents": 8, "importer": 8,
    "train": 7, "evaluate": 7, "export": 7, "plan": 7,
    "run": 6, "saving": 6, "evaluation": 6, "planning": 6,
    "checkpoint": 5, "plot": 5,
    "parallel": 4,
    "configs": 3, "layouts": 3,
    "model": 2, "data": 2, "sealed": 2,
    "mamba": 1.5,
    "quant": 1,
    "kernels": 0,
}  # fmt: skip
# The same inside quant; what stands on one line does not import each other.
QUANT = [
    ["fuse", "accumulate"], ["rounding", "random"], ["codebooks"], ["formats"], ["spec"], ["choice"],
    ["recipe", "scaling", "transform"], ["qtensor"], ["encode", "mixed"], ["metrics", "launch"], ["kernel"], ["choose"],
    ["quantize", "memory", "native"], ["gemm"], ["context", "gathered"], ["linear"],
    ["decisions", "site", "update", "moments"], ["policy"],
]  # fmt: skip
QUANT_FLOORS = {name: floor for floor, names in enumerate(QUANT) for name in names}


def files() -> list[Path]:
    """What git tracks and what it would: untracked, not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    names = listed.split("\0") if listed else [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*")
        if not re.search(r"(^|/)(\.(?!ci/)|out/|data/cache/|__pycache__)", f"{path.relative_to(ROOT)}/")
    ]  # fmt: skip
    return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})


FILES = files()
MODULES = [path for path in FILES if path.suffix == ".py"]
SOURCES = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "tests"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imports, also inside functions; `from a import b` gives a.b, relative ones are resolved."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_the_reader_of_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "x.py"
    path.write_text("import a.b as c\nfrom . import s\nfrom .t import u\ndef f():\n    from quant import v, w\n")
    assert list(imports(path)) == ["a.b", "data.s", "data.t.u", "quant.v", "quant.w"]


def test_there_is_something_to_read():
    assert {"model.py", "quant/linear.py", "data/loader.py", "configs/__init__.py"} <= set(map(name_of, SOURCES))
    assert "tests/test_house.py" in map(name_of, FILES) and "Makefile" in map(name_of, FILES)


# --- imports point one way ---


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_lower_floor_never_imports_a_higher_one(path):
    own = floor_of(path)
    assert own in FLOORS, f"{name_of(path)} is new: give it a floor in {name_of(Path(__file__))}"
    for name in imports(path):
        other = name.split(".")[0]
        assert other != "tests", f"{name_of(path)} imports {name}"
        if other in FLOORS and other != own:
            assert FLOORS[other] < FLOORS[own], f"{name_of(path)} imports {name}"
            assert own != "data", f"{name_of(path)} imports {name}: data imports nothing of ours"


def test_only_tests_and_what_takes_a_training_apart_import_train():
    """bench.py times its steps, as a study does on a GPU, compare.py and search.py look into them, one study changes the model,
    one saves what it has."""
    found = [name_of(path) for path in SOURCES if any(n.split(".")[0] == "train" for n in imports(path))]
    studies = [f"studies/{name}.py" for name in ("checkpoints", "moments", "mor", "steps")]
    assert found == ["bench.py", "compare.py", "search.py", *studies]


@pytest.mark.parametrize("path", [path for path in SOURCES if floor_of(path) == "kernels"], ids=name_of)
def test_kernels_import_only_torch_and_triton(path):
    allowed = {"torch", "triton", "kernels"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if floor_of(path) == "quant" and path.name != "__init__.py"], ids=name_of
)
def test_the_order_inside_quant(path):
    assert path.stem in QUANT_FLOORS, f"{name_of(path)} is new: give it a place in {name_of(Path(__file__))}"
    for name in imports(path):
        if name.split(".")[0] == "quant":
            other = (name.split(".") + [""])[1]
            assert other in QUANT_FLOORS, f"{name_of(path)} imports {name}: name the module, not the package"
            assert QUANT_FLOORS[other] < QUANT_FLOORS[path.stem], f"{name_of(path)} imports {name}"


# --- sources ---


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} has no docstring"


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`a.b.c` of something imported, aliases undone; "" of anything else, such as a variable called `random`."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def aliases(tree: ast.AST) -> dict[str, str]:
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                top = a.name.split(".")[0]
                found[a.asname or top] = a.name if a.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


TORCH_DRAWS = (
    r"torch\.(manual_seed|seed|set_rng_state|rand\w*|normal|bernoulli|multinomial|poisson|binomial|random\.\w+)"
    r"|torch\.(cuda|mps|xpu)\.(manual_seed\w*|seed\w*|set_rng_state\w*)"
    r"|torch\.nn\.init\.(?!constant_|zeros_|ones_|eye_)\w+"
    r"|torch\.nn(\.functional)?\.\w*[dD]ropout\w*"
    r"|torch\.distributions\.\w+"
)
NUMPY_OK = {"Generator", "SeedSequence", "PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937", "BitGenerator"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"}


def global_draws(text: str) -> list[str]:
    """Calls that draw from, or seed, a generator that nobody passed."""
    tree, found = ast.parse(text), []
    names = aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        passed = any(k.arg == "generator" and getattr(k.value, "value", ...) is not None for k in node.keywords)
        last = name.split(".")[-1]
        if re.fullmatch(TORCH_DRAWS, name):
            bad = not passed
        elif re.match(r"numpy\.random\.", name):
            bad = last not in NUMPY_OK and not (last == "default_rng" and (node.args or node.keywords))
        elif re.match(r"random\.\w+$", name):
            bad = last != "Random" or not node.args
        else:
            bad = isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE and not passed
        if bad:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.manual_seed(0)",
        "import torch as t\nt.randn(3)",
        "from torch import randint\nrandint(3, (2,))",
        "import torch\ntorch.rand_like(x)",
        "import torch\ntorch.randn(3, generator=None)",
        "import torch\ntorch.cuda.manual_seed_all(0)",
        "from torch import nn\nnn.init.normal_(w)",
        "import torch.nn.functional as F\nF.dropout(x)",
        "w.normal_()",
        "a.b[0].uniform_(0, 1)",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy as np\nnp.random.permutation(3)",
        "import numpy as np\nnp.random.default_rng()",
        "from numpy.random import rand\nrand(3)",
        "import random\nrandom.shuffle(x)",
        "from random import choice\nchoice(x)",
        "import random\nrandom.Random()",
        "def f():\n    import random as r\n    r.seed(1)",
    ],
)
def test_the_finder_of_global_draws_finds(text):
    assert len(global_draws(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.randn(3, generator=g)",
        "import torch\ntorch.Generator().manual_seed(0)",
        "w.normal_(generator=g)",
        "import numpy as np\nnp.random.default_rng(0).permutation(3)",
        "import random\nrandom.Random(0).shuffle(x)",
        "from quant.random import random_ints\nrandom_ints(1, 2)",
        "from torch import nn\nnn.init.zeros_(w)",
        "self.random.shuffle(x)",
        "def f(random):\n    return random.to(x)",
    ],
)
def test_the_finder_of_global_draws_lets_pass(text):
    assert global_draws(text) == []


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if floor_of(path) in ("quant", "model", "train", "run", "data", "kernels")],
    ids=name_of,
)
def test_nothing_draws_from_a_global_generator(path):
    assert global_draws(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in SOURCES if floor_of(path) in ("quant", "model", "kernels")], ids=name_of)
def test_no_environment_variable_changes_numbers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = aliases(tree)
    read = {dotted(node, names) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    assert not {n for n in read if re.match(r"os\.(environb?|getenvb?|putenv)\b", n)}


# --- what no file may contain ---

# Written so that this file does not contain what it looks for.
FORBIDDEN = {
    "an absolute path of some machine": r"(?<![\w.~-])/(?:(?:work|root)\b|(?:home|Users)/\w)",
    "a package index": r"(?:py[p]i|python[h]osted|download\.[p]ytorch|ana[c]onda)\.org|index-url[= ]+[\"']?http|https?://\S+/simple\b",
}


@pytest.mark.parametrize(("what", "pattern"), FORBIDDEN.items(), ids=FORBIDDEN)
def test_no_file_mentions(what, pattern):
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := re.search(pattern, line):
                if not (path == Path(__file__) and "FORBIDDEN" in line):
                    found.append(f"{name_of(path)}:{number}: {match[0]}")
    assert not found, f"{what}: {found}"


def test_the_patterns_find():
    paths, index = FORBIDDEN.values()
    slash = "/"  # keeps these examples out of reach of the search above
    for text in ("work/main", "root/x", "home/ann/x", "Users/ann"):
        assert re.search(paths, f"see {slash}{text}") and re.search(paths, f'"{slash}{text}"')
    for text in ("a/work/main", "roots", "framework/x", "~/home/x", "out/home"):
        assert not re.search(paths, text)
    for text in ("--index-url=" + "https://x.example", "https:" + "//x.example/simple/", "py" + "pi.org"):
        assert re.search(index, text)
    assert not re.search(index, 'PIP_ARGS="--extra-index-url URL"')


# --- what Makefile and README offer ---

MAKEFILE = (ROOT / "Makefile").read_text()
HELPED = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", MAKEFILE, re.M))
TARGETS = re.findall(r"^([a-zA-Z0-9_-]+):(?!=)", MAKEFILE, re.M)


def test_every_target_has_a_line_of_help():
    """All but guards: named targets that others need first and that nobody calls by name."""
    needed = {word for line in re.findall(r"^[\w-]+:(?!=)([^#\n]*)", MAKEFILE, re.M) for word in line.split()}
    assert [t for t in TARGETS if t not in HELPED and t not in needed] == []
    assert {"help", "setup", "data", "train", "eval", "test", "lint", "clean"} <= set(HELPED)


def test_no_target_is_taken_for_a_file():
    phony = set(re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.M)[1].split())
    assert phony == set(TARGETS)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_alone_lists_all_targets():
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(HELPED)


@pytest.mark.parametrize("target", [t for t in HELPED if re.search(rf"^{t}:.*\n\t.*\.py", MAKEFILE, re.M)])
def test_scripts_that_make_runs_exist(target):
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    for script in re.findall(r"\$\(py\) (\S+\.py)", recipe):
        assert (ROOT / script).is_file(), f"make {target} runs {script}"


@pytest.fixture(scope="module", params=["README.md", "docs/algebra.md"])
def readme(request) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines of fenced blocks and spans of inline code: where a command is a command and "make sure" is not."""
    fenced = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.M | re.S)
    rest = re.sub(r"^ *```.*?\n.*?^ *```", "", text, flags=re.M | re.S)
    lines = [line for block in fenced for line in block.splitlines()]
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines] + re.findall(r"`([^`\n]+)`", rest)


MAKE = r"(?:^|[\s;&|(])make((?:\s+[A-Z_]+=(?:\"[^\"]*\"|\S*))*)\s+([a-z][\w-]*)"
PYTHON = r"(?:^|[\s;&|(/])python3?\s+((?!-)\S+\.py)\b"
MODULE = r"(?:^|[\s;&|(/])python3?\s+-m\s+([\w.]+)"


def test_the_reader_of_commands():
    text = 'make sure\n```\nmake A=1 setup && make B="x y" go # make no\n.venv/bin/python a.py x\n```\n'
    text += "`python -m d.p`\n"
    found = commands(text)
    assert [m[1] for c in found for m in re.findall(MAKE, c)] == ["setup", "go"]
    assert [m for c in found for m in re.findall(PYTHON, c)] == ["a.py"]
    assert [m for c in found for m in re.findall(MODULE, c)] == ["d.p"]


def test_targets_in_the_readme_exist(readme):
    named = {target for command in commands(readme) for _, target in re.findall(MAKE, command)}
    assert named <= set(HELPED), named - set(HELPED)
    assert {"setup", "train"} & named, "the README says how to start"


def test_scripts_in_the_readme_exist(readme):
    named = {script for command in commands(readme) for script in re.findall(PYTHON, command)}
    assert [script for script in sorted(named) if not (ROOT / script).is_file()] == []
    ours = {m for command in commands(readme) for m in re.findall(MODULE, command) if m.split(".")[0] in FLOORS}
    for module in ours:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_configs_in_the_readme_exist(readme):
    """x.toml and names in capitals are placeholders."""
    named = set(re.findall(r"configs/([\w.-]+\.toml)", readme)) - {"x.toml"}
    named = {name for name in named if not name.removesuffix(".toml").isupper()}
    assert [name for name in sorted(named) if not (ROOT / "configs" / name).is_file()] == []


def test_configs_named_in_sources_exist():
    for path in [*SOURCES, *(p for p in FILES if p.suffix == ".toml"), ROOT / "Makefile"]:
        named = set(re.findall(r"configs/([\w.-]+\.toml)", path.read_text(encoding="utf-8"))) - {"x.toml"}
        assert [n for n in sorted(named) if not (ROOT / "configs" / n).is_file()] == [], name_of(path)
