"""What a verification says and when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moe import IDS, MOES, moe
from peft import PeftModel

from molecli.adapters import LoraSpec, read_expert, write_peft
from molecli.bases.fused import fused_parameters, fused_places, taken_for_experts
from molecli.errors import RunError
from molecli.evaluation.verify import Verification, verify
from molecli.experts import LowRank
from molecli.mixture.build import sum_of
from molecli.mixture.layout import adaptable_matrices


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


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3", "jetmoe"])
def test_routed_experts_are_compared_one_by_one(kind: str, make_peft_adapter: Any, tmp_path: Path) -> None:
    model = moe(kind)
    asked = MOES[kind][1] | ({"targets": ["gate", "gate_proj", "up_proj", "down_proj"]} if kind[:4] == "deep" else {})
    folder = make_peft_adapter(model, tmp_path / "lora", **asked)
    expert = read_expert(LoraSpec("x", str(folder)), adaptable_matrices(model))
    parameters = fused_parameters(model) | {(n, "weight"): [n] for n in taken_for_experts(model, expert.factors)}
    written = write_peft(tmp_path / "written", expert.factors, "x", parameters=parameters)

    @contextmanager
    def loaded() -> Iterator[None]:
        adapted = PeftModel.from_pretrained(model, str(written))
        yield
        adapted.unload()

    def checked(**changes: LowRank) -> Verification:
        meant = {**expert.factors, **changes}
        return verify(
            model,
            sum_of(model, [expert]),
            loaded(),
            lambda: model(input_ids=IDS).logits,
            meant=meant,
            written=expert.factors,
            exact=True,
            library="PEFT",
        )

    found = checked()
    found.check("x")
    assert set(found.delta) == set(expert.factors)
    assert max(found.delta.values()) < 1e-5
    name = next(name for name in expert.factors if name in fused_places(model) and name[-1] != "e")
    one = expert.factors[name]
    assert checked(**{name: LowRank(one.A, one.B, 2 * one.scaling)}).worst == name
