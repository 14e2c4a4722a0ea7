"""A CLIP tokenizer with a tiny vocabulary: every word of the language is one token; other words become letters."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "".join(chr(code) for code in range(33, 127) if not chr(code).isupper())


def merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """BPE merges, in rank order, after which every word is one token.

    Each word is split by the merges so far and its pieces are joined from the left. A later merge ranks below every
    earlier one, so that a word added before always has a merge of its own to take first and stays one token.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return merges


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Pieces of one word under these merges (byte-pair encoding as CLIP's: the last letter carries `</w>`)."""
    rank = {pair: place for place, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while pairs := [pair for pair in pairwise(pieces) if pair in rank]:
        left, right = min(pairs, key=rank.__getitem__)
        at = next(i for i, pair in enumerate(pairwise(pieces)) if pair == (left, right))
        pieces[at : at + 2] = [left + right]
    return pieces


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token to id: letters, letters that end a word, merged pieces; the two special tokens come last, as in CLIP."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(left + right for left, right in merges), START, END]
    return {token: row for row, token in enumerate(dict.fromkeys(pieces))}


def build_tokenizer(words: Iterable[str], length: int, folder: Path) -> CLIPTokenizer:
    """Build the tokenizer and save it in `folder`, loadable with CLIPTokenizer.from_pretrained.

    Processes that run side by side build the same: the folder is moved into place when it is whole.
    """
    merges = merges_for(words)
    vocab = vocabulary(merges)
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=length,
    )
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            inner = Path(part) / folder.name
            tokenizer.save_pretrained(inner)
            (inner / "vocab.json").write_text(json.dumps(vocab), "utf-8")
            lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
            (inner / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
            with contextlib.suppress(OSError):  # another process was first
                inner.rename(folder)
    return tokenizer
