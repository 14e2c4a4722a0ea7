"""`mask` and `only` of an evaluation: one list of names as ever, or a list of such lists."""

from __future__ import annotations

from typing import Any

import pytest

from molecli.config import EvaluateRecipe, Switched, dump_recipe, load_recipe


def evaluation(**values: Any) -> EvaluateRecipe:
    recipe = load_recipe(None, "evaluate", values)
    assert isinstance(recipe, EvaluateRecipe)
    return recipe


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("a", ("a",)),
        ("a, b", ("a", "b")),
        ("", ()),
        (["a", "b"], ("a", "b")),
        ([["a", "b"]], ("a", "b")),
        ([[]], ()),
        ([["a"], ["b", "c"], []], (("a",), ("b", "c"), ())),
        ([["a"], "b,c", ""], (("a",), ("b", "c"), ())),
    ],
)
def test_one_list_stays_one_and_several_are_kept_apart(written: Any, stored: tuple[Any, ...]) -> None:
    recipe = evaluation(mask=written, only=written)
    assert (recipe.mask, recipe.only) == (stored, stored)


def test_a_recipe_with_several_is_read_back_as_it_was(tmp_path: Any) -> None:
    for values in ({"mask": [["a"], [], ["b", "c"]]}, {"only": "a,b"}):
        recipe = evaluation(**values)
        file = tmp_path / "recipe.yaml"
        file.write_text(dump_recipe(recipe))
        assert load_recipe(file) == recipe


def test_every_mask_goes_with_every_only_and_each_pair_once() -> None:
    recipe = evaluation(mask=[["a"], [], ["a"]], only=[["b", "c"], []])
    assert recipe.switched == (
        Switched(("a",), ("b", "c")), Switched(("a",), ()), Switched((), ("b", "c")), Switched(),
    )  # fmt: skip
    assert [choice.label for choice in recipe.switched] == [" only b, c without a", " without a", " only b, c", ""]
    assert evaluation().switched == (Switched(),)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (5, "command line: mask is 5, not a list. Write it in brackets: [...]."),
        ([1], "command line: mask.0 is 1, not text. Write text, in quotes if it looks like a number."),
        ([["a"], [[]]], "command line: mask.0 is ['a'], not text. Write text, in quotes if it looks like a number."),
    ],
)
def test_what_is_no_list_of_names_is_refused(written: Any, message: str, explained: Any) -> None:
    explained(lambda: evaluation(mask=written), 2, message)
