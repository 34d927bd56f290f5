"""README.md and docs/: their examples run, what examples print is what the page says, their diffs apply, their links lead
somewhere, and the table of recipes is the one that `make table` writes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import load
from configs.table import MEASURED, README, Resolved, element_bits, paper, renewed, row, said
from quant import QuantSpec, Scale, quantize

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


@PAGE
def test_python_prints_what_the_page_says(page, tmp_path):
    """All python blocks of a page as one program, in a copy of the sources to which the page's diffs are applied."""
    blocks, diffs = fenced(page, "python"), fenced(page, "diff")
    for folder in ("kernels", "quant", "configs", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("cache", "__pycache__"))
    for file in ("model.py", "mamba.py"):
        shutil.copy(ROOT / file, tmp_path)
    if diffs and not shutil.which("git"):
        pytest.skip("no git here to apply diffs with")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: {done.stderr}\n{diff}"
        for name in re.findall(r"^\+\+\+ b/(.*)$", diff, re.M):
            assert (tmp_path / name).read_text() != (ROOT / name).read_text(), f"{page.name}: nothing changes in {name}"
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(fenced(page, "text"))


@PAGE
def test_toml_loads(page, tmp_path):
    """As files beside those of configs/."""
    for path in CONFIGS.glob("*.toml"):
        shutil.copy(path, tmp_path)
    blocks = fenced(page, "toml")
    for block in blocks:
        (tmp_path / "x.toml").write_text(block)
        config = load(tmp_path / "x.toml")
        assert {rule.recipe for rule in config.policy} >= set(config.recipes)
    assert blocks or page not in (README, ROOT / "docs/algebra.md")


@PAGE
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not re.match(r"https://", link)]
    assert [link for link in local if not (page.parent / link.partition("#")[0]).exists()] == []
    named = re.findall(r"\b((?:quant|tests|configs|data|docs)/[\w.-]+\.(?:py|toml|md|json))\b", text)
    assert [name for name in named if not (ROOT / name).exists() and name != "configs/x.toml"] == []


@PAGE
def test_lines_are_short(page):
    """But those of tables."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    assert [number for number, line in lines if len(line) > 128 and not line.startswith("|")] == []


# --- the table of recipes ---


def test_the_table_in_the_readme():
    text = README.read_text(encoding="utf-8")
    assert text == renewed(text), "the table of recipes in README.md is of other configs or measurements: make table"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_config_says_what_was_measured_of_it(path):
    assert path.read_text(encoding="utf-8") == said(path, json.loads(MEASURED.read_text())), "make table"


def test_measurements_are_of_configs():
    measured = json.loads(MEASURED.read_text())
    assert set(measured) == {"steps", "outcomes", "mor", "metric"} and set(measured["steps"]) == {"commit", "machine", "ratio"}
    for name in [*measured["steps"]["ratio"], *measured["outcomes"]]:
        assert (CONFIGS / f"{name}.toml").is_file(), name
    assert all(set(found) == {"loss", "commit"} for found in measured["outcomes"].values())
    runs = [*measured["outcomes"].values(), *measured["mor"].values(), measured["metric"]]
    for commit in [measured["steps"]["commit"], *(found["commit"] for found in runs)]:
        assert re.fullmatch(r"[0-9a-f]{7,40}", commit), f"{commit}: measured with changes that no commit has"


def test_a_row():
    measured = {"steps": {"ratio": {"nvfp4": 1.5}}, "outcomes": {"nvfp4": {"loss": 4.6354}}}
    assert row(CONFIGS / "nvfp4.toml", measured) == (
        *("[nvfp4](configs/nvfp4.toml)", "[2509.25149](https://arxiv.org/abs/2509.25149)"),
        *("e2m1/1x16 · e2m1/16x16", "e2m1/1x16 · e2m1/16x16", "e2m1/1x16"),
        *("e4m3-tensor", "rht16 sr8", "4.5, 4.03", "55%", "1.5", "4.635"),
    )
    assert row(CONFIGS / "tiny-bf16.toml", measured)[1:] == ("-",) * 6 + ("16, 16", "0%", "-", "-")


def test_the_paper_of_a_file_that_names_none_is_that_of_the_one_it_extends(tmp_path):
    (tmp_path / "a.toml").write_text("#:schema schema.json\n# x (arXiv:1234.56789), y (arXiv:9999.99999)\n[train]\n")
    (tmp_path / "b.toml").write_text('# z\nextends = "a.toml"\n# arXiv:1111.11111\n')
    (tmp_path / "c.toml").write_text("# z\n")
    assert paper(tmp_path / "a.toml") == paper(tmp_path / "b.toml") == "[1234.56789](https://arxiv.org/abs/1234.56789)"
    assert paper(tmp_path / "c.toml") == "-"


def test_the_share_of_flops():
    """By hand: 4 blocks of qkv 256 x 512, out 256 x 256, up and down 256 x 1024; the head is 256 x 4096."""
    block, head = 256 * (512 + 256 + 2 * 1024), 256 * 4096

    def share(name: str, *overrides: str) -> float:
        low, high = Resolved(load(CONFIGS / f"{name}.toml", overrides)).below_16()
        assert low == high, name
        return low

    assert Resolved(load(CONFIGS / "mor-tensor.toml")).below_16() == (0, 4 * block / (4 * block + head))
    assert share("nvfp4") == 3 * block / (4 * block + head)
    assert share("nvfp4", "policy.tail.last=0") == 4 * block / (4 * block + head)
    assert share("nvfp4", "policy.tail.last=0", "policy.head.recipe=nvfp4") == 1
    assert share("mxfp8-forward") == pytest.approx(4 * block / 3 / (4 * block + head))
    assert share("dqt") == share("mxfp8-forward"), "weights on a grid of 8 bits, and activations of fprop"
    for name in ("bf16-sr", "dfp16", "mxfp8-weights", "tiny-bf16"):
        assert share(name) == 0, name


BITS = [
    QuantSpec(),
    QuantSpec(block=(16, 16)),
    QuantSpec(scale=Scale(outer="row")),
    QuantSpec(scale=Scale(outer="1x64")),
    QuantSpec(block=(1, 32), scale=Scale("e8m0", outer="1x128", outer_format="m8")),
    QuantSpec("e4m3", (1, 32), Scale("e8m0")),
    QuantSpec("int8", (1, -1), Scale("fp32")),
    QuantSpec("e5m2", (-1, -1), Scale("fp32")),
    QuantSpec("int16", (1, 32), Scale("bf16")),
    QuantSpec("bf16", scale=Scale("none")),
]


@pytest.mark.parametrize("spec", BITS, ids=QuantSpec.short)
def test_bits_are_those_of_what_is_stored(spec):
    q = quantize(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), spec)
    assert element_bits(spec, 128, 256) == pytest.approx(8 * q.nbytes() / (128 * 256))
