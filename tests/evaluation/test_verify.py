"""What a verification says and when it fails."""

from __future__ import annotations

from typing import Any

import pytest

from molecli.errors import RunError
from molecli.evaluation.verify import Verification


def verification(**changes: Any) -> Verification:
    values: dict[str, Any] = {
        "library": "PEFT 1",
        "exact": True,
        "file": {"q": 1e-8, "v": 2e-8},
        "delta": {"q": 3e-8, "v": 2e-8},
        "output": 1e-6,
    }
    return Verification(**{**values, **changes})


def test_rounding_passes_and_is_told() -> None:
    found = verification()
    found.check("out")
    assert found.line() == "PEFT 1: ΔW differs by at most 3.0e-08 (q), output by 1.0e-06"
    assert found.document()["delta"] == {"worst": 3e-8, "matrix": "q", "by_matrix": {"q": 3e-8, "v": 2e-8}}
    assert found.document()["file"] == 2e-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": {"q": 0.0, "v": 0.5}}, "loads another update of 'v' (relative difference 5.0e-01)"),
        ({"delta": {"q": 2e-5, "v": 0.0}}, "loads another update of 'q' (relative difference 2.0e-05)"),
        ({"output": 0.02}, "gives another output (relative difference 2.0e-02)"),
        ({"output": float("nan")}, "gives another output (relative difference nan)"),
        ({"missing": ("k", "o")}, "leaves out 2 matrices, such as 'k'"),
        ({"surplus": ("k",)}, "also adapts 1 matrices, such as 'k'"),
    ],
)
def test_more_than_rounding_fails(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError) as caught:
        verification(**changes).check("out")
    assert str(caught.value) == f"out: PEFT 1 {message}. The files are kept; report.json lists every matrix."


def test_what_was_left_out_on_purpose_is_no_failure_but_a_file_read_otherwise_is() -> None:
    cut: dict[str, Any] = {"exact": False, "delta": {"q": 0.4, "v": 0.2}, "output": 0.3}
    verification(**cut).check("out")
    with pytest.raises(RunError, match="loads another update of 'q'"):
        verification(**cut, file={"q": 1e-3, "v": 0.0}).check("out")


def test_a_library_that_loads_nothing_fails() -> None:
    found = verification(file={}, delta={}, missing=("q", "v"), output=0.5)
    with pytest.raises(RunError, match="leaves out 2 matrices"):
        found.check("out")
    assert found.line() == "PEFT 1: nothing was loaded, output differs by 5.0e-01"
    assert (found.document()["file"], found.document()["delta"]["worst"]) == (None, None)
