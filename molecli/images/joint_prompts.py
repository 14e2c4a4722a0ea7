"""Prompts that name several concepts at once, made from the concepts' own prompts.

    "a peacock on a red background", "a cactus on a red background"  ->  "a peacock and a cactus on a red background"

Wording        a prompt in parts
worded         a prompt split into parts at its concept's trigger
joint_prompt   one prompt from several wordings
composition    one prompt that names several concepts
prompts_of     each concept's prompt, and one that names all concepts
is_subject     whether a concept is a thing, which can be beside others in one picture
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from molecli.files.concepts import Concept

# Kinds of concept that are not things in a picture, but describe all of it.
_SETTINGS = ("style", "background")
_PREPOSITION = re.compile(r"^(?:in|on|at|by|with|under|near|over|beside|inside|before)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Wording:
    """A prompt in parts: its opening ("a photo of"), the concept's phrase with its article, and the scene."""

    opening: str
    phrase: str
    scene: str


def worded(prompt: str, concept: Concept) -> Wording:
    """The prompt, split at the concept's trigger; without the trigger, only the concept's phrase."""
    trigger = r"\s+".join(re.escape(word) for word in concept.trigger.split())
    pattern = re.compile(rf"(?<!\w)(?:(?:an?|the|one)\s+)?{trigger}(?!\w)", re.IGNORECASE)
    found = pattern.search(prompt)
    if found:
        return Wording(prompt[: found.start()].strip(), found.group(), prompt[found.end() :].strip(" .,;"))
    own = pattern.search(concept.prompt)
    return Wording("", own.group() if own else concept.trigger, "")


def joint_prompt(wordings: Sequence[Wording], settings: Sequence[str] = ()) -> str:
    """One prompt from several: opening and scene only if all prompts share them; `settings` come before the scene."""
    opening = _shared([wording.opening for wording in wordings])
    scene = _shared([wording.scene for wording in wordings])
    phrases = list(dict.fromkeys(wording.phrase for wording in wordings))
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    text = " ".join(filter(None, (opening, listed)))
    for setting in settings:
        text += f" {setting}" if _PREPOSITION.match(setting) else f", {setting}"
    return f"{text} {scene}".strip()


def composition(concepts: Sequence[Concept]) -> str:
    """One prompt that names all the concepts: the things joined by "and", then styles and backgrounds.

    A background replaces the scene of the things' own prompts.
    """
    subjects = [worded(concept.prompt, concept) for concept in concepts if is_subject(concept)]
    others = [concept for concept in concepts if not is_subject(concept)]
    if not subjects:
        subjects, others = [worded(concept.prompt, concept) for concept in concepts], []
    if any(concept.kind == "background" for concept in others):
        subjects = [Wording(subject.opening, subject.phrase, "") for subject in subjects]
    return joint_prompt(subjects, [concept.trigger for concept in others])


def prompts_of(concepts: Sequence[Concept]) -> tuple[str, ...]:
    """The concepts' own prompts and, if there are several, one that names them all. Empty without concepts."""
    together = [composition(concepts)] if len(concepts) > 1 else []
    return tuple(dict.fromkeys([*(concept.prompt for concept in concepts), *together]))


def is_subject(concept: Concept) -> bool:
    """Whether the concept is an object, a character or clothing, not a style or a background."""
    return concept.kind not in _SETTINGS


def _shared(texts: Sequence[str]) -> str:
    return texts[0] if all(text == texts[0] for text in texts) else ""
