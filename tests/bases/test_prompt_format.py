"""Prompts by a chat template: system prompt, its variables, and the template's own text of a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from molecli.bases.causal import Causal
from molecli.bases.prompt_format import PromptFormat, template_variables
from molecli.bases.seq2seq import Seq2Seq
from molecli.errors import UsageError
from molecli.protocols import Example

# As Qwen 3's: thinking is on unless it is turned off, and the history's last answer has empty thoughts.
QWEN = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}"
    "{{ '<|assistant|>\n<think>\n\n</think>\n\n' + m.content + '<|end|>\n' }}"
    "{%- else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
# As DeepSeek R1's: the assistant's turn opens with thoughts, and the history has none.
R1 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# As Nemotron's: thoughts are open in the prompt and in the history.
OPEN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + ('<think>' if m.role == 'assistant' else '') + m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# As gpt-oss's: an answer has its own channel.
CHANNELS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{{ ('<|channel|>final<|message|>' if m.role == 'assistant' else '') + m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Mistral's: a space stands before an answer.
SPACED = (
    "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + '<|end|>' }}"
    "{% endfor %}"
)
# As Gemma's: no system role.
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + SPACED
TEMPLATES = {"qwen": QWEN, "r1": R1, "open": OPEN, "channels": CHANNELS, "spaced": SPACED, "strict": STRICT}


def make(make_tiny: Any, template: str, **how: Any) -> Causal:
    model, tokenizer = make_tiny("llama", chat=True)
    tokenizer.chat_template = template
    return Causal(model, tokenizer, "my-base", **how)


def text(backbone: Causal, prompt: str, target: str) -> str:
    """The text of a training example: prompt and target."""
    ids = backbone.collate([Example("t", prompt, target)])["input_ids"][0].tolist()
    return backbone.tokenizer.decode(ids)


def conversation(backbone: Causal, prompt: str, target: str, **args: Any) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
    return backbone.tokenizer.apply_chat_template(turns, tokenize=False, **args)


@pytest.mark.parametrize("name", ["qwen", "channels", "spaced", "strict"])
def test_prompt_and_target_are_the_templates_own_conversation(make_tiny: Any, name: str) -> None:
    backbone = make(make_tiny, TEMPLATES[name])
    assert text(backbone, "the old fox", "runs") == conversation(backbone, "the old fox", "runs").rstrip("\n")


@pytest.mark.parametrize("off", [True, False])
def test_what_is_trained_begins_with_what_generation_reads(make_tiny: Any, off: bool) -> None:
    args = {"enable_thinking": False} if off else {}
    backbone = make(make_tiny, QWEN, template_args=args)
    turn = [{"role": "user", "content": "hi"}]
    read = backbone.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **args)
    assert backbone.tokenizer.decode(backbone.format.prompt_ids("hi")) == read
    assert ("</think>" in read) == off
    assert text(backbone, "hi", "you") == conversation(backbone, "hi", "you").rstrip("\n")
    assert text(backbone, "hi", "you").startswith(read)


@pytest.mark.parametrize(("name", "start"), [("r1", "<|user|>hi"), ("open", "<|user|>hi<|end|>")])
def test_a_template_that_opens_thoughts_has_them_closed_before_the_answer(
    make_tiny: Any, name: str, start: str
) -> None:
    backbone = make(make_tiny, TEMPLATES[name])
    line = "\n" if name == "r1" else ""
    assert text(backbone, "hi", "you") == f"{start}<|assistant|><think>{line}\n</think>\n\nyou<|end|>"
    answer = backbone.format.completion("hi", backbone.format.target_ids("hi", "you")).answer
    assert answer == "you"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_target_reads_back_as_itself(make_tiny: Any, name: str) -> None:
    found = make(make_tiny, TEMPLATES[name]).format
    for target in ("runs", "two words", "1, 2\n3"):
        assert found.completion("hi", found.target_ids("hi", target)).answer == target


def test_a_system_prompt_is_the_first_turn_in_training_and_in_generation(make_tiny: Any) -> None:
    backbone = make(make_tiny, QWEN, system_prompt="Be brief.")
    start = "<|system|>\nBe brief.<|end|>\n<|user|>\nhi"
    assert text(backbone, "hi", "you").startswith(start)
    assert backbone.tokenizer.decode(backbone.format.prompt_ids("hi")).startswith(start)


@pytest.mark.parametrize(
    "template", [STRICT, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"]
)
def test_a_template_that_refuses_or_drops_a_system_prompt_is_named(make_tiny: Any, template: str) -> None:
    with pytest.raises(UsageError) as error:
        make(make_tiny, template, system_prompt="Be brief.")
    assert str(error.value) == (
        "--system-prompt: the chat template of my-base takes no system prompt. "
        "Leave it out, or write it at the beginning of each prompt."
    )


def test_a_template_that_puts_the_system_prompt_into_the_users_turn_is_taken(make_tiny: Any) -> None:
    merged = (
        "{% set first = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{{ first + m.content }}{% endfor %}"
    )
    backbone = make(make_tiny, merged, system_prompt="Be brief.")
    assert backbone.format.prompt_text("hi") == "Be brief.\nhi"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"enable_thinkin": False},
            "--template-arg enable_thinkin: the chat template of my-base has no such variable. "
            "Did you mean 'enable_thinking'?",
        ),
        (
            {"messages": "x"},
            "--template-arg messages: it is no variable of a template: mole sets it. Leave it out.",
        ),
        ({"tokenize": True}, "--template-arg tokenize: it is no variable of a template: mole sets it. Leave it out."),
    ],
)
def test_variables_that_the_template_does_not_read_are_refused(make_tiny: Any, args: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        make(make_tiny, QWEN, template_args=args)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "template",
    [
        "{% if thinking %}a{% endif %}",
        "{% if thinking is defined and thinking %}a{% endif %}",
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}",
        "{% set thinking = thinking | default(true) %}{{ thinking }}",
        "{%- set thinking = thinking if thinking is defined else true -%}{{ thinking }}",
        "{% macro f(x) %}{{ x }}{{ thinking }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_templates_variables_are_found_however_it_reads_them(template: str) -> None:
    body = "{{ bos_token }}{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}"
    assert template_variables(body + template) == {"thinking"}
    assert template_variables(body) == set()


@pytest.mark.parametrize("how", [{"system_prompt": "Be brief."}, {"template_args": {"x": 1}}])
def test_plain_text_has_no_place_for_what_a_template_takes(make_tiny: Any, how: dict[str, Any]) -> None:
    flag = f"--{next(iter(how)).replace('_args', '_arg').replace('_', '-')}"
    with pytest.raises(UsageError) as error:
        make(make_tiny, QWEN, chat_template=False, **how)
    assert str(error.value) == f"{flag}: it is for chat templates, and --no-chat-template leaves it out. Leave it out."
    for made, kind in ((Causal, "llama"), (Seq2Seq, "t5")):
        with pytest.raises(UsageError) as error:
            made(*make_tiny(kind), "my-base", **how)
        assert str(error.value) == f"{flag}: it is for chat templates, and my-base has none. Leave it out."


def test_a_damaged_template_is_named_before_anything_is_read(make_tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"my-base: its chat template cannot be used \(.*Write --no-chat-template"):
        make(make_tiny, "{% for m in messages %}{{ m.content")
    make(make_tiny, "{% for m in messages %}{{ m.content", chat_template=False)


def test_a_template_that_reads_parts_gets_them(make_tiny: Any) -> None:
    parts = (
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    backbone = make(make_tiny, parts, system_prompt="Be brief.")
    assert text(backbone, "hi", "you") == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>you<|end|>"


def test_a_template_that_leaves_the_prompt_or_the_answer_out_is_refused(make_tiny: Any) -> None:
    for role, left_out in (("assistant", "prompt"), ("user", "answer")):
        template = f"{{% for m in messages if m.role == '{role}' %}}{{{{ m.content }}}}{{% endfor %}}"
        with pytest.raises(UsageError, match=rf"cannot be used \(it leaves out the {left_out}\)"):
            make(make_tiny, template)


def test_a_value_that_the_template_refuses_is_named(make_tiny: Any) -> None:
    strict = (
        "{% if effort is defined and effort != 'low' %}{{ raise_exception('no such effort.') }}{% endif %}" + SPACED
    )
    make(make_tiny, strict, template_args={"effort": "low"})
    with pytest.raises(UsageError) as error:
        make(make_tiny, strict, template_args={"effort": "lo"})
    assert str(error.value) == (
        "--template-arg: the chat template of my-base does not take it (no such effort). Correct it."
    )


def test_an_encoder_decoder_base_with_a_template_writes_prompts_by_it(make_tiny: Any) -> None:
    model, tokenizer = make_tiny("t5", chat=True)
    backbone = Seq2Seq(model, tokenizer, "my-base")
    turn = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert backbone.collate([Example("t", "hi", "you")])["input_ids"][0].tolist() == ids
    plain = Seq2Seq(model, tokenizer, "my-base", chat_template=False)
    assert plain.collate([Example("t", "hi", "you")])["input_ids"][0].tolist() == tokenizer("hi")["input_ids"]


def test_a_templates_date_is_noticed_unless_it_is_given(make_tiny: Any) -> None:
    dated = "{{ date_string if date_string is defined else strftime_now('%d') }}" + SPACED
    assert make(make_tiny, dated).format.dated
    assert not make(make_tiny, dated, template_args={"date_string": "1 May"}).format.dated
    assert not make(make_tiny, SPACED).format.dated


def test_the_format_of_plain_text_stays_as_it_was(make_tiny: Any) -> None:
    _, tokenizer = make_tiny("gpt2")
    found = PromptFormat(tokenizer, False, (1,))
    assert tokenizer.decode(found.target_ids("hi", "you")) == " you</s>"
    assert found.completion("hi", found.target_ids("hi", "you")) == "you"
