"""The table of metrics: every row loads, unknown names are met with the nearest one."""

from __future__ import annotations

import pytest

from molecli.catalog.metrics import METRICS, metric_row
from molecli.errors import UsageError
from molecli.metrics import aggregate, load_metric, load_picture_metric

TEXTS = [name for name, row in METRICS.items() if row.takes == "texts"]


@pytest.mark.parametrize("name", TEXTS)
def test_every_metric_scores_a_right_answer_with_its_upper_bound(name: str) -> None:
    text = "one two three four five"
    assert load_metric(name)([text], [(text,)]) == [pytest.approx(METRICS[name].upper)]
    assert aggregate(name, [text], [(text,)], [METRICS[name].upper]) == pytest.approx(METRICS[name].upper)


@pytest.mark.parametrize("name", TEXTS)
def test_every_metric_scores_an_empty_completion_zero(name: str) -> None:
    assert load_metric(name)([""], [("one two three four five",)]) == [0.0]


def test_a_mistyped_metric_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        load_metric("exact_mach")
    assert str(caught.value) == "metrics: no metric is called 'exact_mach'. Did you mean 'exact_match'?"
    assert caught.value.exit_code == 2


def test_an_unlike_name_lists_what_is_known() -> None:
    with pytest.raises(UsageError) as caught:
        metric_row("zzz")
    assert str(caught.value) == f"metrics: no metric is called 'zzz'. Known: {', '.join(METRICS)}."


def test_a_metric_of_pictures_is_refused_for_completions_and_the_other_way_round() -> None:
    with pytest.raises(UsageError) as caught:
        load_metric("text_alignment")
    assert str(caught.value).startswith("metrics: 'text_alignment' scores pictures, not texts. Write some of")
    with pytest.raises(UsageError) as caught:
        load_picture_metric("bleu")
    assert str(caught.value) == (
        "metrics: 'bleu' scores texts, not pictures. Write some of: text_alignment, image_alignment, recognised."
    )
