"""The settings that each method reads: the table's keys are the recipe's, and what no mode reads is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.catalog.methods import EVERYWHERE, METHODS
from molecli.config import ComposeRecipe, MethodConfig, dump_recipe, load_recipe
from molecli.config.unread import check_keys, check_options, composing
from molecli.errors import UsageError

KEYS = set(MethodConfig.model_fields)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_names_keys_of_the_recipe_each_once(name: str) -> None:
    reads = METHODS[name].reads
    assert set(reads) <= KEYS
    assert len(set(reads)) == len(reads)
    assert reads[-len(EVERYWHERE) :] == EVERYWHERE


def test_every_key_is_read_by_some_mode() -> None:
    assert {key for row in METHODS.values() for key in row.own_options} | set(EVERYWHERE) == KEYS


@pytest.mark.parametrize(
    ("modes", "settings", "message"),
    [
        (
            ["iso"],
            {"density": 0.3},
            "method.density: mode iso does not read it. "
            "It reads scale, rank, layers; density is for magnitude_prune, ties, dare, dare_ties, knots.",
        ),
        (
            ["iso"],
            {"evaluations": 4},
            "method.evaluations: mode iso does not read it. It reads scale, rank, layers; evaluations is for lorahub.",
        ),
        (["merge"], {"rank": 3}, "method.rank: mode merge does not read it. It reads scale, layers."),
        (["nla"], {"scale": 0.5}, "method.scale: mode nla does not read it. It reads layers."),
        (
            ["ties", "linear"],
            {"density": 0.3, "tau": 2},
            "method.tau: none of the modes ties, linear reads it. "
            "They read scale, rank, density, layers; tau is for switch, w_switch.",
        ),
        ([], {"scale": 0.5}, "method.scale: no chosen mode reads it. Leave it out."),
        ([], {"l1": 0.5}, "method.l1: no chosen mode reads it. Leave it out; l1 is for lorahub."),
    ],
)
def test_what_no_mode_reads_is_refused(modes: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(MethodConfig(**settings), modes)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_it_is_enough_that_one_of_several_modes_reads_it() -> None:
    check_options(MethodConfig(density=0.3, expression="a + b", layers="0-50"), ["linear", "ties", "pem"])


def test_a_section_may_have_another_name() -> None:
    with pytest.raises(UsageError, match=r"^methods\.mine\.method\.top_k: mode iso does not read it"):
        check_keys(["rank", "top_k"], ["iso"], "methods.mine.method")


def test_the_base_and_a_lora_alone_read_no_settings() -> None:
    assert composing(["base", "single", "linear", "switch"]) == ["linear", "switch"]


def test_a_record_of_a_run_is_taken_though_it_holds_every_default(tmp_path: Path) -> None:
    made = load_recipe(None, "compose", {"mode": "iso", "method.scale": 0.5})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    again = load_recipe(tmp_path, "compose")
    assert isinstance(again, ComposeRecipe)
    assert again.method.model_fields_set == KEYS
    check_options(again.method, [again.mode])


def test_the_document_lists_what_every_mode_reads() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text("utf-8")
    for options in {row.own_options for row in METHODS.values()}:
        names = ", ".join(f"`{name}`" for name, row in METHODS.items() if row.own_options == options)
        assert f"| {names} | {', '.join(f'`{key}`' for key in options) or 'none'} |\n" in text
