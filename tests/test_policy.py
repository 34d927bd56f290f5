"""quant/policy.py: which Linear follows which recipe, when, and that nothing about it is silent.

The models are stacks of Linears named as in model.py ("blocks.N.ffn.up", "head"); what the recipes say does not matter
here, only which one a Linear gets.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from quant import Linear, QuantSpec, Recipe, Rule, assign
from quant.linear import linears
from quant.policy import first_step, switches, table, unquantized
from quant.recipe import Fprop

RECIPES = {"a": Recipe(fprop=Fprop(x=QuantSpec())), "b": Recipe(fprop=Fprop(w=QuantSpec(block=(16, 16))))}
HIDDEN = ("attn.qkv", "attn.out", "ffn.up", "ffn.down")


def model(blocks: int = 4) -> nn.Module:
    """blocks.N.attn.{qkv, out}, blocks.N.ffn.{up, down}, head; and a norm, which no rule should meet."""

    def block():
        attn = nn.ModuleDict({"qkv": Linear(16, 16), "out": Linear(16, 16)})
        ffn = nn.ModuleDict({"up": Linear(16, 16), "down": Linear(16, 16)})
        return nn.ModuleDict({"norm": nn.RMSNorm(16), "attn": attn, "ffn": ffn})

    with torch.device("meta"):
        return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(blocks)), "head": Linear(16, 16)})


def who(recipe: str, rules: list[Rule], blocks: int = 4, progress: float = 0.0) -> set[str]:
    """The names that get this recipe; what `assign` returns and what it sets must agree."""
    m = model(blocks)
    chosen = assign(m, RECIPES, rules, progress)
    assert list(chosen) == list(linears(m)) and len(chosen) == 4 * blocks + 1
    for name, module in linears(m).items():
        assert module.recipe is RECIPES.get(chosen[name])
    return {name for name, chosen_recipe in chosen.items() if chosen_recipe == recipe}


def of_blocks(*numbers: int) -> set[str]:
    return {f"blocks.{n}.{k}" for n in numbers for k in HIDDEN}


REST = Rule(recipe="bf16")


# --- which ---


def test_every_linear_is_named_in_order_and_bf16_is_no_recipe():
    m = model()
    for module in linears(m).values():
        module.recipe = RECIPES["a"]
    names = [f"blocks.{n}.{k}" for n in range(4) for k in HIDDEN] + ["head"]
    assert list(assign(m, RECIPES, [REST]).items()) == [(name, "bf16") for name in names]
    assert all(module.recipe is None for module in linears(m).values())


def test_the_first_match_wins():
    rules = [Rule(match="blocks.1.*", recipe="a"), Rule(match="blocks.*", recipe="b"), Rule(recipe="bf16")]
    assert who("a", rules) == of_blocks(1)
    assert who("b", rules) == of_blocks(0, 2, 3)
    assert who("bf16", rules) == {"head"}
    swapped = [rules[1], rules[0], rules[2]]
    assert who("a", swapped) == set() and who("b", swapped) == of_blocks(0, 1, 2, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_first_and_last_count_blocks(n):
    assert who("a", [Rule(first=n, recipe="a"), REST]) == of_blocks(*range(4)[:n])
    assert who("a", [Rule(last=n, recipe="a"), REST]) == of_blocks(*range(4)[-n:])


@pytest.mark.parametrize("end", ["first", "last"])
def test_more_blocks_than_there_are(end):
    with pytest.raises(ValueError, match=f"{end} = 5, but the model has 4 blocks"):
        assign(model(), RECIPES, [Rule(**{end: 5}, recipe="a"), REST])


def test_first_and_last_together_mean_either_end():
    assert who("a", [Rule(first=1, last=2, recipe="a"), REST]) == of_blocks(0, 2, 3)
    assert who("a", [Rule(first=0, last=2, recipe="a"), REST]) == of_blocks(2, 3)


@pytest.mark.parametrize("rule", [{"last": 0}, {"first": 0}, {"first": 0, "last": 0}])
def test_zero_switches_a_rule_off_and_may(rule):
    assert who("a", [Rule(**rule, recipe="a"), REST]) == set()


def test_ends_and_globs_combine_by_and():
    assert who("a", [Rule(match="*.ffn.*", last=1, recipe="a"), REST]) == {"blocks.3.ffn.up", "blocks.3.ffn.down"}


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("head", {"head"}),
        ("blocks.*.ffn.up", {f"blocks.{n}.ffn.up" for n in range(12)}),
        ("*.out", {f"blocks.{n}.attn.out" for n in range(12)}),
        ("blocks.1.*", of_blocks(1)),  # not 10, not 11
        ("blocks.1*", of_blocks(1, 10, 11)),
        ("blocks.1?.*", of_blocks(10, 11)),
        ("blocks.[02].attn.qkv", {"blocks.0.attn.qkv", "blocks.2.attn.qkv"}),
        ("*", of_blocks(*range(12)) | {"head"}),
    ],
)
def test_globs_over_module_names(glob, wanted):
    assert who("a", [Rule(match=glob, recipe="a"), REST], blocks=12) == wanted


@pytest.mark.parametrize("glob", ["HEAD", "hea", "blocks", "ffn.up", "blocks.*.norm", "blocks.4.*"])
def test_a_glob_is_the_whole_name_and_minds_case(glob):
    with pytest.raises(ValueError, match="matches none"):
        assign(model(), RECIPES, [Rule(match=glob, recipe="a"), REST])


def test_blocks_are_counted_as_numbers():
    """The last blocks of 12 are 10 and 11; as text 9 would be."""
    assert who("a", [Rule(last=2, recipe="a"), REST], blocks=12) == of_blocks(10, 11)
    assert who("a", [Rule(first=2, recipe="a"), REST], blocks=12) == of_blocks(0, 1)


def test_a_model_without_blocks():
    """A user's own model: globs work, and rules about blocks say that there are none."""
    m = nn.Sequential(Linear(16, 16), nn.ReLU(), Linear(16, 16))
    assert assign(m, RECIPES, [Rule(match="2", recipe="a"), REST]) == {"0": "bf16", "2": "a"}
    with pytest.raises(ValueError, match="last = 1, but the model has 0 blocks"):
        assign(m, RECIPES, [Rule(last=1, recipe="a"), REST])


# --- when ---


@pytest.mark.parametrize(
    ("progress", "wanted"),
    [(0.0, "a"), (0.5, "a"), (0.82 - 2**-53, "a"), (0.82, "b"), (0.9, "b"), (1 - 2**-53, "b")],
)
def test_a_late_switch_happens_at_its_share(progress, wanted):
    rules = [Rule(match="head", recipe="bf16"), Rule(after=0.82, recipe="b"), Rule(recipe="a")]
    assert who(wanted, rules, progress=progress) == of_blocks(0, 1, 2, 3)
    assert who("bf16", rules, progress=progress) == {"head"}


@pytest.mark.parametrize(("progress", "wanted"), [(0.0, "a"), (0.25, "b"), (0.5 - 2**-54, "b"), (0.5, "a"), (1 - 2**-53, "a")])
def test_after_is_included_until_is_not(progress, wanted):
    assert who(wanted, [Rule(after=0.25, until=0.5, recipe="b"), Rule(recipe="a")], progress=progress)


def test_until_one_lasts_to_the_end_and_after_one_never_begins():
    assert who("a", [Rule(recipe="a")], progress=1.0)
    assert not who("a", [Rule(after=1.0, recipe="a"), REST], progress=1 - 2**-53)


def test_a_switch_replaces_recipes_of_the_same_model():
    m, rules = model(), [Rule(match="head", recipe="bf16"), Rule(after=0.5, recipe="b"), Rule(recipe="a")]
    for progress, wanted in [(0.0, "a"), (0.6, "b"), (0.4, "a")]:
        assign(m, RECIPES, rules, progress)
        assert all(linears(m)[name].recipe is RECIPES[wanted] for name in of_blocks(0, 1, 2, 3))
        assert m["head"].recipe is None


def test_switches_are_the_shares_where_something_changes():
    rules = [Rule(after=0.82, recipe="a"), Rule(after=0.25, until=0.5, recipe="b"), Rule(until=0.25, recipe="b"), REST]
    assert switches(rules) == [0.25, 0.5, 0.82]
    assert switches([REST, Rule(after=1.0, recipe="a")]) == []
    assert switches([]) == []


@given(st.integers(1, 10**6), st.integers(0, 10**4))
def test_a_rule_begins_with_the_step_at_which_assign_sees_it(steps, digits):
    """Of a share as people write it, four digits: the exact product, rounded up."""
    exact = math.ceil(Fraction(digits, 10**4) * steps)
    assert first_step(digits / 10**4, steps) == exact


def test_seven_hundredths_of_a_hundred_steps_are_seven():
    assert first_step(0.07, 100) == 7 < math.ceil(0.07 * 100)


# --- what is wrong ---


def test_a_linear_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no policy rule matches the Linear 'head' at 0%"):
        assign(model(), RECIPES, [Rule(match="blocks.*", recipe="a")])
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.qkv' at 50%"):
        assign(model(), RECIPES, [Rule(until=0.5, recipe="a"), Rule(match="head", recipe="b")], 0.5)
    with pytest.raises(ValueError, match=r"no policy rule matches"):
        assign(model(), RECIPES, [])


def test_a_rule_that_matches_nothing_is_an_error_even_when_it_is_not_its_time():
    rules = [REST, Rule(name="x", match="blocks.*.mlp.*", after=0.5, recipe="a")]
    with pytest.raises(ValueError) as caught:
        assign(model(), RECIPES, rules)
    text = str(caught.value)
    for part in ("policy rule 2", "name = 'x'", "match = 'blocks.*.mlp.*'", "after = 0.5", "matches none"):
        assert part in text
    assert "blocks.0.ffn.up" in text and "head" in text  # what it could have matched
    assert "until" not in text and "\n" not in text


def test_a_rule_for_blocks_never_means_the_head():
    with pytest.raises(ValueError, match="matches none"):
        assign(model(), RECIPES, [Rule(match="head", last=1, recipe="a"), REST])


def test_an_unknown_recipe_is_an_error_with_the_nearest_name():
    recipes = {"nvfp4": RECIPES["a"], "mxfp8": RECIPES["b"]}
    with pytest.raises(ValueError) as caught:
        assign(model(), recipes, [REST, Rule(match="head", recipe="nvpf4")])
    text = str(caught.value)
    for part in ("policy rule 2", "match = 'head'", "'nvpf4'", "'mxfp8'", "'bf16'", "did you mean 'nvfp4'?"):
        assert part in text
    with pytest.raises(ValueError, match="unknown recipe"):  # never matched, still wrong
        assign(model(), recipes, [REST, Rule(last=0, recipe="nvpf4")])


@pytest.mark.parametrize("wrong", [{"first": -1}, {"last": -2}, {"after": 0.5, "until": 0.4}, {"until": 1.1}, {"after": -0.1}])
def test_rules_outside_their_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Rule(recipe="a", **wrong)


# --- unquantized ---


def test_unquantized_is_the_compute_dtype_and_restores():
    torch.manual_seed(0)
    m = nn.Sequential(Linear(32, 32), Linear(32, 32))
    assign(m, RECIPES, [Rule(match="0", recipe="a"), REST])
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    quantised = m(x)
    plain = nn.functional.linear(nn.functional.linear(x, m[0].weight.bfloat16()), m[1].weight.bfloat16())
    with unquantized(m):
        assert all(module.recipe is None for module in linears(m).values())
        assert torch.equal(m(x), plain)
    assert (m[0].recipe, m[1].recipe) == (RECIPES["a"], None)
    assert torch.equal(m(x), quantised) and not torch.equal(plain, quantised)


def test_unquantized_restores_after_an_exception_and_nests():
    m = model()
    chosen = assign(m, RECIPES, [Rule(first=1, recipe="a"), Rule(match="head", recipe="b"), REST])
    with pytest.raises(KeyError), unquantized(m):
        with unquantized(m):
            pass
        assert all(module.recipe is None for module in linears(m).values())
        raise KeyError
    assert [module.recipe for module in linears(m).values()] == [RECIPES.get(r) for r in chosen.values()]


# --- table ---


def test_table_says_who_follows_what():
    rules = [Rule(match="head", recipe="bf16"), Rule(last=1, recipe="bf16"), Rule(match="*.up", recipe="b")]
    rules += [Rule(recipe="a")]
    text = table(assign(model(), RECIPES, rules), RECIPES)
    assert text == "\n".join(
        [
            "a: 9 of 17 Linears: blocks.0-2.attn.qkv, blocks.0-2.attn.out, blocks.0-2.ffn.down",
            "    fprop.x  e2m1/1x16",
            "    fprop.w  -",
            *(f"    {operand}  -" for operand in ("dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")),
            "b: 3 of 17 Linears: blocks.0-2.ffn.up",
            "    fprop.x  -",
            "    fprop.w  e2m1/16x16",
            *(f"    {operand}  -" for operand in ("dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")),
            "bf16: 5 of 17 Linears: blocks.3.attn.qkv, blocks.3.attn.out, blocks.3.ffn.up, blocks.3.ffn.down, head",
        ]
    )


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(first=1, last=2, recipe="bf16"), Rule(match="head", recipe="bf16"), Rule(recipe="a")],
        [Rule(match="blocks.[0257].*", recipe="bf16"), Rule(recipe="a")],
        [Rule(match="blocks.[1-35].ffn.*", recipe="b"), Rule(recipe="a")],
    ],
)
def test_table_names_each_linear_exactly_once(rules):
    """Ranges expanded, every Linear stands under its own recipe and under no other: "0-3" must not hide 1 and 2."""
    chosen = assign(model(8), RECIPES, rules)
    found = []
    for line in table(chosen, RECIPES).splitlines():
        if line.startswith(" "):
            continue
        recipe, _, members = line.split(": ")
        for member in members.split(", "):
            head, *rest = member.split(".", 2)
            if head != "blocks":
                found.append((member, recipe))
                continue
            for part in rest[0].replace("+", ",").replace(";", ",").split(","):
                low, _, high = part.partition("-")
                found += [(f"blocks.{n}.{rest[1]}", recipe) for n in range(int(low), int(high or low) + 1)]
    assert sorted(found) == sorted(chosen.items())
