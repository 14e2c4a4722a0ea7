"""The thoughts that a reasoning model writes before its answer: where they end, and what is scored.

MARKS       what opens and closes them, by model
Thinking    the marks that one tokenizer or chat template knows
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from molecli.protocols import Completion

# (what opens the thoughts, what closes them)
MARKS = (
    ("<think>", "</think>"),  # Qwen 3, DeepSeek R1, GLM, SmolLM 3, Phi 4, Nemotron, MiniMax
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    # gpt-oss writes in channels, and the answer is in the last one.
    ("<|channel|>", "<|channel|>final<|message|>"),
)
# Fields of a tokenizer's response template that hold thoughts.
_FIELDS = ("thinking", "reasoning", "reasoning_content")
# Variables with which chat templates turn thinking off, and their values.
SWITCHES = {"enable_thinking": "false", "thinking": "false", "thinking_budget": "0"}


@dataclass(frozen=True)
class Thinking:
    """The marks that a tokenizer or its chat template knows; with none of them every completion is an answer.

    chat: prompts are written with the template, so that a lone closing mark ends thoughts too.
    """

    marks: tuple[tuple[str, str], ...]
    chat: bool

    def open_after(self, text: str) -> tuple[str, str] | None:
        """The marks of the thoughts that an assistant's turn, which begins with `text`, has begun and not closed."""
        return next(((first, last) for first, last in self.marks if text.rfind(first) > text.rfind(last)), None)

    def read(self, ids: Sequence[int], decode: Callable[..., str], opening: str) -> Completion:
        """The completion in generated `ids`: its whole text, and the answer that follows the thoughts.

        decode: the tokenizer's, with `skip_special_tokens`; opening: the end of the prompt, where the assistant's turn
        begins. An answer that was never reached is None.
        """
        whole = decode(ids, skip_special_tokens=True)
        opened = self.open_after(opening)
        raw = decode(ids, skip_special_tokens=False) if self.marks else ""
        for first, last in self.marks if opened is None else (opened,):
            if not (opened or raw.lstrip().startswith(first) or (self.chat and last in raw)):
                continue
            if last not in raw:
                return Completion(whole, None)
            # The marks may be special tokens, which the answer's text must not have.
            end = bisect_left(range(len(ids)), True, key=lambda n: last in decode(ids[:n], skip_special_tokens=False))
            thoughts, _, rest = decode(ids[:end], skip_special_tokens=False).partition(last)
            answer = rest + decode(ids[end:], skip_special_tokens=True)
            return Completion(thoughts + last + answer, answer.lstrip())
        return Completion(whole, whole)


def thinking_of(tokenizer: Any, template: str | None) -> Thinking:
    """The marks that a tokenizer has as tokens, publishes in its response template, or has in the chat template."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    known = [pair for pair in MARKS if pair[1] in tokens or (pair[0] in tokens and pair[1].startswith(pair[0]))]
    known += [pair for pair in MARKS if template is not None and any(mark in template for mark in pair)]
    return Thinking(tuple(dict.fromkeys([*_published(tokenizer), *known])), template is not None)


def _published(tokenizer: Any) -> list[tuple[str, str]]:
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    pairs = [(fields[name].get("open"), fields[name].get("close")) for name in _FIELDS if name in fields]
    return [(first, last) for first, last in pairs if isinstance(first, str) and isinstance(last, str)]
