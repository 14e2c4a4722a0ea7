"""The table of metrics: every row loads, unknown names are met with the nearest one."""

from __future__ import annotations

import pytest

from molecli.errors import UsageError
from molecli.metrics import METRICS, aggregate, load_metric, metric_row


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_a_right_answer_with_its_upper_bound(name: str) -> None:
    text = "one two three four five"
    assert load_metric(name)([text], [(text,)]) == [pytest.approx(METRICS[name].upper)]
    assert aggregate(name, [text], [(text,)], [METRICS[name].upper]) == pytest.approx(METRICS[name].upper)


@pytest.mark.parametrize("name", METRICS)
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
