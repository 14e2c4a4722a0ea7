"""How prompts and targets become the tokens of a language model: plain text, or a chat template's turns.

PromptFormat     the format of one base
choose_format    the format that a base's settings ask for, checked
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from molecli.bases.thinking import SWITCHES, Thinking, thinking_of
from molecli.errors import UsageError, suggestion
from molecli.protocols import Completion

# Stands for an assistant's answer, to find what the template writes around an answer.
_PROBE = "mole0probe"
SYSTEM, ARGUMENT = "--system-prompt", "--template-arg"
# Variables that every template gets: what is said, and what the library adds.
_GIVEN = ("messages", "raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and targets become tokens. The prompt's tokens never depend on the target.

    With a chat template: prompt = the turns before the answer and the opening of the assistant's, target = what the
    template writes up to the end of that turn, so that both together are its own text of the conversation. Without
    one: the target follows the prompt after a space, unless the prompt ends in white space.
    system: the text of a first turn. args: more variables of the template. parts: the template reads a turn's text from
    a list of parts, as those of multimodal models do.
    """

    tokenizer: Any
    chat: bool
    stop: tuple[int, ...]
    system: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    parts: bool = False

    def prompt_ids(self, prompt: str) -> list[int]:
        """The model's input for a prompt, the same in training and in generation."""
        # The template writes the bos token itself; the tokenizer would add a second one.
        ids = self._ids(self.prompt_text(prompt), special=not self.chat)
        return ids or [self._start]

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """The tokens that should follow `prompt`, up to and including the token that ends the answer."""
        before, after = self.prompt_text(prompt), self._lead(prompt) + target
        given = self._ids(before, special=not self.chat)
        joined = self._ids(before + after, special=not self.chat)
        # Tokenised together, like the text that the model was trained on, unless a token would span the border.
        if joined[: len(given)] == given and (given or not after):
            answer = joined[len(given) :]
        else:
            answer = self._ids(after, special=False)
        return answer + list(self.ending_ids)

    def completion(self, prompt: str, ids: Sequence[int]) -> Completion:
        """The text of generated ids, without special tokens and without what stands between prompt and target; its
        `answer` is without thoughts."""
        found = self.thinking.read(ids, self.tokenizer.decode, self._opening)
        if found.answer is None or found.answer != found:
            return found
        text = found.removeprefix(self._lead(prompt))
        return Completion(text, text)

    @cached_property
    def ending_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's end of turn up to its stop token, or eos."""
        ids = self._ids(self._around[1], special=False) if self.chat else []
        special = (i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        ends = {*self.stop, *special}
        place = next((i for i, token in enumerate(ids) if token in ends), None)
        return (*ids, self.tokenizer.eos_token_id) if place is None else tuple(ids[: place + 1])

    @cached_property
    def template(self) -> str | None:
        """The chat template in use; None for plain text."""
        return self.tokenizer.get_chat_template() if self.chat else None

    @property
    def dated(self) -> bool:
        """Whether the template writes the date of today, so that prompts differ from day to day."""
        return self.template is not None and "strftime_now" in self.template and "date_string" not in self.args

    @cached_property
    def thinking(self) -> Thinking:
        """How this base marks its thoughts."""
        return thinking_of(self.tokenizer, self.template)

    @cached_property
    def switch(self) -> str:
        """What turns thinking off, for a message; "" if the template has no variable for it."""
        known = template_variables(self.template) if self.template else set()
        return next((f"{ARGUMENT} {name}={off}" for name, off in SWITCHES.items() if name in known), "")

    def prompt_text(self, prompt: str) -> str:
        """The text whose tokens are the prompt's."""
        if not self.chat:
            return prompt
        return self._rendered(("user", prompt), add_generation_prompt=True)

    def _rendered(self, *turns: tuple[str, str], **how: Any) -> str:
        """The template's text of a conversation: turns of (role, text) after the system prompt."""
        system = [("system", self.system)] if self.system is not None else []
        said = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in (*system, *turns)
        ]
        return self.tokenizer.apply_chat_template(said, tokenize=False, **self.args, **how)

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes between a prompt and its answer, and after the answer."""
        before, _, after = self._rendered(("user", "-"), ("assistant", _PROBE)).rpartition(_PROBE)
        prompt = self.prompt_text("-")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # A prompt that makes the model think: examples have no thoughts, so an answer begins by closing them.
        opened = self.thinking.open_after(self._opening + lead)
        return (lead if opened is None else f"{lead}\n{opened[1]}\n\n"), after

    @cached_property
    def _opening(self) -> str:
        """What the template writes after a user's words: the end of the turn and the opening of the assistant's."""
        return self.prompt_text(_PROBE).rpartition(_PROBE)[2] if self.chat else ""

    @property
    def _start(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _lead(self, prompt: str) -> str:
        """What stands between a prompt and its target."""
        if self.chat:
            return self._around[0]
        return "" if not prompt or prompt[-1].isspace() else " "

    def _ids(self, words: str, *, special: bool) -> list[int]:
        return self.tokenizer(words, add_special_tokens=special)["input_ids"] if words or special else []


def choose_format(
    tokenizer: Any,
    stop: Sequence[int],
    where: str,
    *,
    chat_template: bool = True,
    system_prompt: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> PromptFormat:
    """The format of a base: its tokenizer's chat template, if it has one and `chat_template` allows it.

    Raises: UsageError for a system prompt or a variable that the template, or plain text, would not take.
    """
    chat = chat_template and bool(tokenizer.chat_template)
    args = dict(template_args or {})
    found = PromptFormat(tokenizer, chat, tuple(stop), system_prompt, args)
    if chat:
        as_parts = replace(found, system=None, args={}, parts=True)
        if _problem(replace(found, system=None, args={})) is not None and _problem(as_parts) is None:
            found = replace(found, parts=True)
        _check_template(found, where)
        _check_system(found, where)
    else:
        why = "--no-chat-template leaves it out" if tokenizer.chat_template else f"{where or 'the base'} has none"
        for flag, given in ((SYSTEM, system_prompt is not None), (ARGUMENT, bool(args))):
            if given:
                raise UsageError(flag, f"it is for chat templates, and {why}", "Leave it out.")
    return found


def template_variables(template: str) -> set[str]:
    """The variables that a chat template reads, besides those that it always gets."""
    from jinja2 import meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    # A variable that the template sets from itself, as in `set thinking = thinking | default(true)`, is one too.
    defaults = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name)
        and any(name.name == assign.target.name for name in assign.node.find_all(nodes.Name))
    }
    guarded = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    free = meta.find_undeclared_variables(tree) | defaults | guarded
    return free - {*_GIVEN, *_reserved(), *environment.globals}


def _reserved() -> set[str]:
    """The names that have another meaning where a template is rendered."""
    from transformers import PreTrainedTokenizerBase

    return {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}


def _check_template(found: PromptFormat, where: str) -> None:
    """Raises: UsageError if the template fails, or does not read one of its variables."""
    for name in found.args:
        if name in _reserved():
            raise UsageError(f"{ARGUMENT} {name}", "it is no variable of a template: mole sets it", "Leave it out.")
    problem = _problem(replace(found, system=None, args={}))
    if problem is not None:
        what = f"its chat template cannot be used ({problem})"
        raise UsageError(where or "tokenizer", what, "Write --no-chat-template, or --template-file FILE.")
    known = template_variables(found.template or "")
    for name in found.args:
        if name not in known:
            remedy = suggestion(name, sorted(known)) if known else "Leave it out: it has none."
            raise UsageError(f"{ARGUMENT} {name}", f"the chat template of {where} has no such variable", remedy)
    problem = _problem(replace(found, system=None))
    if problem is not None:
        raise UsageError(ARGUMENT, f"the chat template of {where} does not take it ({problem})", "Correct it.")


def _problem(found: PromptFormat) -> str | None:
    """What is wrong with a template, in the first line of its error; None if it can be used."""
    try:
        said = _PROBE in found.prompt_text(_PROBE)
        answered = _PROBE in found._rendered(("user", "-"), ("assistant", _PROBE))
    except Exception as error:  # jinja2's errors, and whatever an expression of the template raises
        return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    if said and answered:
        return None
    return "it leaves out the answer" if said else "it leaves out the prompt"


def _check_system(found: PromptFormat, where: str) -> None:
    """Raises: UsageError if the template refuses the system prompt, or leaves it out."""
    if found.system is None:
        return
    try:
        text = replace(found, system=_PROBE).prompt_text("-")
    except Exception:
        text = ""
    if _PROBE not in text:
        what = f"the chat template of {where or 'the base'} takes no system prompt"
        raise UsageError(SYSTEM, what, "Leave it out, or write it at the beginning of each prompt.")
