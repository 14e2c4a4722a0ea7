"""The recipes of the paper's experiments: every command of theirs is one, and their published figures can be met."""

from __future__ import annotations

from statistics import fmean

import pytest

from molecli.catalog import builtin as catalog
from molecli.catalog.metrics import METRICS
from molecli.config import ComposeRecipe, StudyRecipe, load_recipe
from molecli.evaluation.scoring import OWN_LORA
from molecli.study.gates import LARGEST
from molecli.study.jobs import tasks_of
from molecli.study.run import jobs_of

NAMES = [name for name in catalog.recipes() if name.startswith("paper/")]
# Averages that the paper prints and that do not follow from its rows; the recipes say so.
UNEVEN = {
    ("paper/table3-translation", "PEMs"),
    ("paper/table3-bbh", "LoRAHub"),
    ("paper/table3-bbh", "PEMs"),
}


def read(name: str) -> StudyRecipe:
    recipe = load_recipe(name, "study")
    assert isinstance(recipe, StudyRecipe)
    return recipe


def test_they_are_all_there() -> None:
    tables = {name.removeprefix("paper/").partition("-")[0] for name in NAMES}
    assert tables == {*(f"table{number}" for number in range(3, 11)), "fig5", "fig7"}


@pytest.mark.parametrize("name", NAMES)
def test_each_command_is_a_recipe_and_the_papers_gates_are_trained_as_it_says(name: str) -> None:
    recipe = read(name)
    jobs = jobs_of(recipe)
    made = [load_recipe(None, job.tree["command"], job.tree) for job in jobs]
    gated = [one for one in made if isinstance(one, ComposeRecipe) and one.preset == "paper"]
    for one in gated:
        assert one.gate.input == "experts"
        assert (one.train.steps, one.train.batch_size) == ((400, 2) if recipe.draws else (800, 12))
        assert one.train.balance in (0.5, 0.0)
        assert one.train.lr in (1e-5, 2e-2)
    assert gated or name in ("paper/table4", "paper/table5")


@pytest.mark.parametrize("name", NAMES)
def test_published_columns_and_rows_are_ones_that_the_study_measures(name: str) -> None:
    recipe = read(name)
    scenes = {scene.task for scene in recipe.test.data.scenes}
    tasks = scenes if recipe.draws else tasks_of(recipe.test.data)
    metrics = ("text_alignment", "image_alignment") if recipe.draws else recipe.test.metrics or ()
    rows = {*tasks, "average", *(str(number) for number in recipe.numbers), *([LARGEST] if recipe.gates else [])}
    rows |= {f"{row} {metric}" for row in (*tasks, "average") for metric in metrics} | {"average of all"}
    columns = {*recipe.methods, *([OWN_LORA] if recipe.own else [])}
    assert set(metrics) <= METRICS.keys()
    assert recipe.published.keys() <= rows
    assert {column for row in recipe.published.values() for column in row} <= columns
    assert bool(recipe.source) == bool(recipe.published)


@pytest.mark.parametrize("name", NAMES)
def test_published_averages_follow_from_the_rows_unless_the_recipe_says_so(name: str) -> None:
    published = read(name).published
    for row, printed in published.items():
        if row.startswith("average"):
            metric = row.removeprefix("average").removeprefix(" of all")
            some = [figures for other, figures in published.items() if other != row and other.endswith(metric)]
            for column, value in printed.items():
                follows = abs(fmean(figures[column] for figures in some) - value) < 0.1
                assert follows != ((name, column) in UNEVEN), (row, column)
    if any(name == one for one, _ in UNEVEN):
        assert "rows give" in catalog.recipes()[name].read_text()
