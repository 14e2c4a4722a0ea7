"""Source and target languages of translation models, where their tokenizer needs them.

Tokenizers tell the languages in three ways: codes around the text (mBART, mBART-50, NLLB, M2M100, PLBART, Seamless), a
tag before the prompt that names the target (`>>fra<<` of multilingual Marian, `<2fr>` of MADLAD), or one fixed pair
(FSMT, Marian).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molecli.errors import UsageError, near

# A language's token among a tokenizer's special ones: fr_XX, fra_Latn, __fra__.
_CODE = re.compile(r"[a-z]{2,4}_[A-Z][A-Za-z]{1,3}|__[A-Za-z_]{2,8}__")
_TAGS = (re.compile(r">>([\w.-]+)<<"), re.compile(r"<2([a-z]{2,3}(?:_\w+)?)>"))
# So many codes show the user their form.
_SHOWN = 5
SOURCE, TARGET = "--source-language", "--target-language"


@dataclass(frozen=True)
class Languages:
    """What the languages change: `start` replaces the decoder's start token, `forced` is the first token of every
    completion (both None: the checkpoint's own), `tag` goes before a prompt that has none of `tags`.

    source, target: the codes, as they are recorded; None where the tokenizer knows none.
    """

    source: str | None = None
    target: str | None = None
    start: int | None = None
    forced: int | None = None
    tag: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    def tagged(self, prompt: str) -> str:
        """The prompt with the tag of the target language. Raises: UsageError if it has none, or another one."""
        own = next((tag for tag in self.tags.values() if prompt.lstrip().startswith(tag)), None)
        if not self.tags or (own is not None and own == (self.tag or own)):
            return prompt
        if own is not None:
            raise UsageError(TARGET, f"it is {self.target}, and a prompt begins with {own}", "Leave one of them out.")
        if not self.tag:
            raise _needed(self.where, TARGET, "target", self.tags)
        return f"{self.tag} {prompt}"


def choose(model: Any, tokenizer: Any, where: str, source: str | None, target: str | None) -> Languages:
    """The languages of an encoder-decoder base; sets them in its tokenizer.

    source, target: codes as the tokenizer writes them; None: those stored with the tokenizer, or in the generation
    config. Raises: UsageError where the tokenizer needs one that is nowhere named, does not know it, or knows none.
    """
    if tags := _tags(tokenizer):
        return _by_tag(tokenizer, where, source, target, tags)
    codes = language_codes(tokenizer)
    if not codes:
        _check_fixed(tokenizer, where, source, target)
        return Languages()
    stored = getattr(tokenizer, "init_kwargs", {})
    source = _known(where, SOURCE, "source", source or stored.get("src_lang"), codes)
    target = target or getattr(tokenizer, "tgt_lang", None) or _configured(model, codes)
    target = _known(where, TARGET, "target", target, codes)
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    token = codes[target]
    if _starts_with_language(model, tokenizer, token):
        return Languages(source, target, start=token)
    return Languages(source, target, forced=token)


def refuse_any(where: str, source: str | None, target: str | None) -> None:
    """Raises: UsageError if a language is named for a base that knows none."""
    for flag, given in ((SOURCE, source), (TARGET, target)):
        if given is not None:
            raise UsageError(flag, f"the tokenizer of {where} knows no languages", "Leave it out.")


def language_codes(tokenizer: Any) -> dict[str, int]:
    """code -> token id, for a tokenizer that writes codes around its texts; {} for any other."""
    if not hasattr(tokenizer, "src_lang") or not hasattr(tokenizer, "_switch_to_target_mode"):
        return {}
    table = getattr(tokenizer, "lang_code_to_id", None)
    if table:
        return dict(table)
    return {text: i for i, token in tokenizer.added_tokens_decoder.items() if _CODE.fullmatch(text := str(token))}


def two_vocabularies(tokenizer: Any) -> bool:
    """Whether a tokenizer reads with one vocabulary, writes with another, and cannot encode targets (FSMT's)."""
    reads, writes = getattr(tokenizer, "encoder", None), getattr(tokenizer, "decoder", None)
    if hasattr(tokenizer, "_switch_to_target_mode") or not isinstance(reads, dict) or not isinstance(writes, dict):
        return False
    return any(writes.get(i) != token for token, i in reads.items())


def _tags(tokenizer: Any) -> dict[str, str]:
    """language -> tag, for a tokenizer whose vocabulary has tags of target languages."""
    for pattern in _TAGS:
        found = {match[1]: match[0] for token in tokenizer.get_vocab() if (match := pattern.fullmatch(str(token)))}
        if len(found) > 1:
            return found
    return {}


def _by_tag(tokenizer: Any, where: str, source: str | None, target: str | None, tags: dict[str, str]) -> Languages:
    own = getattr(tokenizer, "source_lang", None)
    if source is not None and source != own:
        raise UsageError(SOURCE, f"the tokenizer of {where} takes none: only the target has a tag", "Leave it out.")
    if target is None:
        return Languages(tags=tags, where=where)
    target = _known(where, TARGET, "target", target, tags)
    return Languages(own, target, tag=tags[target], tags=tags, where=where)


def _check_fixed(tokenizer: Any, where: str, source: str | None, target: str | None) -> None:
    """Raises: UsageError for a language that is not the one of a tokenizer's fixed pair."""
    own = [
        getattr(tokenizer, old, None) or getattr(tokenizer, new, None)
        for old, new in (("src_lang", "source_lang"), ("tgt_lang", "target_lang"))
    ]
    if not all(own):
        refuse_any(where, source, target)
        return
    for flag, given, fixed in ((SOURCE, source, own[0]), (TARGET, target, own[1])):
        if given is not None and given != fixed:
            raise UsageError(flag, f"{where} translates only from {own[0]} to {own[1]}", "Leave it out.")


def _known(where: str, flag: str, side: str, given: str | None, codes: Mapping[str, Any]) -> str:
    if given is None:
        raise _needed(where, flag, side, codes)
    for code in (given, f"__{given}__"):
        if code in codes:
            return code
    nearest = near(given, codes)
    remedy = f"Did you mean {nearest!r}?" if nearest else f"Write one of its codes, such as {_some(codes)}."
    raise UsageError(f"{flag} {given}", f"the tokenizer of {where} knows no such language", remedy)


def _needed(where: str, flag: str, side: str, codes: Mapping[str, Any]) -> UsageError:
    what = f"its tokenizer needs a {side} language, and none is named"
    return UsageError(where, what, f"Write {flag} CODE, such as {_some(codes)}.")


def _some(codes: Mapping[str, Any]) -> str:
    step = max(1, len(codes) // _SHOWN)
    return ", ".join(sorted(codes)[::step][:_SHOWN])


def _configured(model: Any, codes: Mapping[str, int]) -> str | None:
    """The language whose token the generation config writes first, as in a model with one target language."""
    own = model.generation_config
    firsts = [own.forced_bos_token_id, own.decoder_start_token_id]
    return next((code for first in firsts for code, token in codes.items() if token == first), None)


def _starts_with_language(model: Any, tokenizer: Any, token: int) -> bool:
    """Whether the library's own training starts the decoder with the target's code, as for mBART and PLBART."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return False
    labels = tokenizer(text_target="a", return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    return bool(shift(labels=labels)[0, 0] == token)
