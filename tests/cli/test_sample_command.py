"""`mole sample` on a tiny T5 and a composition of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = ("--max-new-tokens", "8")


def _texts(ran: Any) -> list[str]:
    assert ran.code == 0, ran.err
    return [row["text"] for row in json.loads(ran.out)]


def test_the_composition_changes_what_the_base_says(mole: Callable[..., Any], gated_folder: Any) -> None:
    prompts = ("--prompt", "a b", "--prompt", "c d", "--prompt", "hello", *SHORT, "--json")
    composed = _texts(mole("sample", gated_folder.folder, *prompts))
    bare = _texts(mole("sample", "--base", gated_folder.base, *prompts))
    assert len(composed) == len(bare) == 3
    assert composed != bare


def test_all_experts_masked_is_the_bare_base(mole: Callable[..., Any], gated_folder: Any) -> None:
    prompts = ("--prompt", "a b", "--prompt", "hello", *SHORT, "--json")
    masked = mole("sample", gated_folder.folder, "--mask", "a,b", *prompts)
    assert _texts(masked) == _texts(mole("sample", "--base", gated_folder.base, *prompts))


def test_one_expert_alone_is_that_lora(mole: Callable[..., Any], gated_folder: Any) -> None:
    prompts = ("--prompt", "a b", "--prompt", "hello", *SHORT, "--json")
    only = mole("sample", gated_folder.folder, "--only", "a", *prompts)
    lora = mole("sample", "--base", gated_folder.base, "--loras", f"a={gated_folder.loras['a']}", *prompts)
    assert _texts(only) == _texts(lora)


def test_several_loras_without_a_composition_need_a_choice(mole: Callable[..., Any], gated_folder: Any) -> None:
    loras = ",".join(f"{name}={path}" for name, path in gated_folder.loras.items())
    arguments = ("sample", "--base", gated_folder.base, "--loras", loras, "--prompt", "x", *SHORT)
    ran = mole(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "mole: --loras: there are 2 LoRAs, and no composition says how to combine them. "
        "Make one with mole compose, or choose one LoRA with --only.\n"
    )
    alone = mole("sample", "--base", gated_folder.base, "--loras", f"b={gated_folder.loras['b']}", *arguments[5:])
    assert mole(*arguments, "--only", "b").out == alone.out


def test_prompts_come_from_stdin_as_lines_or_jsonl(
    mole: Callable[..., Any], gated_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("sample", "-", "--base", str(gated_folder.base), *SHORT, "--json")
    expected = _texts(mole("sample", "--base", gated_folder.base, "--prompt", "a b", "--prompt", "c", *SHORT, "--json"))
    for text in ("a b\n\nc\n", '{"prompt": "a b"}\n{"input": "c"}\n'):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert _texts(mole(*base)) == expected


def test_batches_do_not_change_greedy_completions(mole: Callable[..., Any], gated_folder: Any) -> None:
    prompts = [part for text in ("a", "a longer one", "b b b") for part in ("--prompt", text)]
    arguments = ("sample", gated_folder.folder, *prompts, *SHORT, "--json")
    assert mole(*arguments, "--batch-size", "1").out == mole(*arguments, "--batch-size", "3").out


def test_sampling_follows_the_seed(mole: Callable[..., Any], gated_folder: Any) -> None:
    arguments = ("sample", gated_folder.folder, "--prompt", "a b", *SHORT, "--temperature", "1.5")
    first = mole(*arguments, "--seed", "1")
    assert mole(*arguments, "--seed", "1").out == first.out
    assert mole(*arguments, "--seed", "2").out != first.out


def test_with_an_output_the_samples_and_the_recipe_are_written_and_the_recipe_repeats_them(
    mole: Callable[..., Any], gated_folder: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = mole("sample", gated_folder.folder, "--prompt", "a b", *SHORT, "--output", out)
    assert ran.err == f"prompts: plain text\nWritten: {out}\n"
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a b"]
    again = mole("sample", out / "recipe.yaml", "--output", tmp_path / "again")
    assert again.out == ran.out == rows[0]["text"] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "mole: mole sample: there is no prompt. Write --prompt TEXT, --prompts-file FILE, or - for stdin.\n"),
        (
            ("--prompts-file", "none.txt"),
            "mole: none.txt: the prompts cannot be read (No such file or directory). Check the path.\n",
        ),
        (("-", "--prompt", "-"), "mole: -: stdin can be read only once. Write - in one place.\n"),
    ],
)
def test_missing_prompts_are_code_2(arguments: tuple[str, ...], message: str, mole: Callable[..., Any]) -> None:
    assert mole("sample", *arguments) == (2, "", message)


def test_a_jsonl_line_without_its_field_is_named(mole: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    ran = mole("sample", "--prompts-file", file)
    assert ran.err == (
        f"mole: {file}:2: neither 'prompt' nor 'input' is a text. Write {{\"prompt\": \"...\"}} on each line.\n"
    )
    assert ran.code == 2
