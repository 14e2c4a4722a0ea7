"""What of a reasoning model's completion is scored: what follows its thoughts, and nothing if they never end."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from molecli.bases.causal import Causal
from molecli.bases.thinking import MARKS, thinking_of
from molecli.evaluation.scoring import completion, score
from molecli.protocols import Completion, Example

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def make(make_tiny: Any, template: str = TEMPLATE, tokens: tuple[str, ...] = (), *, special: bool = False) -> Causal:
    model, tokenizer = make_tiny("llama", chat=True)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    model.resize_token_embeddings(len(tokenizer))
    return Causal(model, tokenizer, "my-base")


def read(backbone: Causal, text: str, prompt: str = "hi") -> Completion:
    """The completion whose tokens are those of `text`, ended by the end of turn."""
    ids = backbone.tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"]
    return backbone.format.completion(prompt, ids)


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("known", ["special", "token", "template"])
def test_the_answer_follows_the_thoughts(make_tiny: Any, marks: tuple[str, str], known: str) -> None:
    if known == "template":
        backbone = make(make_tiny, TEMPLATE + "{% if false %}" + "".join(marks) + "{% endif %}")
    else:
        tokens = ("<|channel|>", "<|message|>") if marks[0] == "<|channel|>" else marks
        backbone = make(make_tiny, tokens=tokens, special=known == "special")
    first, last = marks
    said = read(backbone, f"{first}\nfox or 7? maybe 8\n{last}\n\n7")
    assert said.answer == "7"
    assert "maybe 8" in said
    assert read(backbone, "7").answer == "7"
    unclosed = read(backbone, f"{first}fox or 7? maybe")
    assert unclosed.answer is None
    assert "maybe" in unclosed


def test_thoughts_that_the_prompt_opens_are_closed_by_the_completion(make_tiny: Any) -> None:
    for opening in ("<think>\n", "<think>", "<think>budget: "):
        backbone = make(make_tiny, TEMPLATE + opening)
        assert read(backbone, "maybe 8\n</think>\n\n7").answer == "7"
        assert read(backbone, "maybe 8").answer is None
    closed = make(make_tiny, TEMPLATE + "<think></think>")
    assert read(closed, "7").answer == "7"
    assert read(closed, "7", prompt="what is <think>?").answer == "7"


def test_a_lone_closing_mark_ends_thoughts_of_a_chat_alone(make_tiny: Any) -> None:
    chat = make(make_tiny, tokens=("<think>", "</think>"))
    assert read(chat, "maybe 8</think>7").answer == "7"
    plain = Causal(chat.model, chat.tokenizer, chat_template=False)
    assert read(plain, "maybe 8</think>7").answer == "maybe 8</think>7"
    assert read(plain, "<think>maybe 8</think>7").answer == "7"


def test_a_base_that_knows_no_marks_is_read_as_it_is(make_tiny: Any) -> None:
    assert read(make(make_tiny), "<think>a</think>7").answer == "<think>a</think>7"


def test_the_marks_that_a_tokenizer_publishes_go_first(make_tiny: Any) -> None:
    _, tokenizer = make_tiny("llama", chat=True)
    tokenizer.response_template = {"fields": {"thinking": {"open": "<muse>", "close": "</muse>"}, "content": {}}}
    assert thinking_of(tokenizer, None).marks == (("<muse>", "</muse>"),)


def test_scores_are_of_the_answer_and_the_whole_is_kept(make_tiny: Any) -> None:
    backbone = make(make_tiny, tokens=("<think>", "</think>"))
    said = [read(backbone, "<think>8</think>\n\n7\nmore"), read(backbone, "<think>7"), "7"]
    examples = [Example("t", "what?", "7")] * 3
    result = score("t", examples, said, ["exact_match"])
    assert result.scores["exact_match"] == (1.0, 0.0, 1.0)
    rows = json.loads(json.dumps(result.samples()))
    assert [row["filtered_resps"] for row in rows] == [["7"], [""], ["7"]]
    assert rows[0]["resps"] == [["<think>8</think>7\nmore"]] or rows[0]["resps"][0][0].startswith("<think>8</think>")


def test_a_completion_that_never_ends_its_thoughts_is_told(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
    for template, remedy in (
        (TEMPLATE + switch, ", or turn thinking off by --template-arg enable_thinking=false"),
        (TEMPLATE + "<think>", ""),
    ):
        backbone = make(make_tiny, template)
        with pytest.warns(UserWarning, match="within its thoughts and counts as no answer") as told:
            said = backbone.generate(["hi"], max_new_tokens=2)
        assert str(told[0].message).endswith(f": raise --max-new-tokens{remedy}")
        assert said[0].answer is None
        assert completion(said[0], ["7"]) == ""


def test_a_completion_is_a_text_that_can_be_copied() -> None:
    said = Completion("a b", "b")
    assert (said, copy.deepcopy(said).answer, json.dumps([said])) == ("a b", "b", '["a b"]')
