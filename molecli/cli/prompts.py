"""Prompts from a file or stdin: plain lines, or JSONL."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from molecli.errors import UsageError

FIELDS = ("prompt", "input")


def read_prompts(source: str) -> list[str]:
    """The prompts in `source`, a file or "-" for stdin, without empty lines.

    JSONL is recognised by the file's name, or on stdin by a JSON object in the first line.
    Raises: UsageError for a file that cannot be read, and for a JSONL line without prompt, with its number.
    """
    where = "stdin" if source == "-" else source
    lines = [(number, line) for number, line in enumerate(_text(source).splitlines(), start=1) if line.strip()]
    if not lines:
        raise UsageError(where, "it holds no prompt", "Write one prompt per line.")
    if source.endswith(".jsonl") or (source == "-" and _is_object(lines[0][1])):
        return [_prompt(f"{where}:{number}", line) for number, line in lines]
    return [line for _, line in lines]


def _text(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise UsageError(source, f"the prompts cannot be read ({reason})", "Check the path.") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _prompt(where: str, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UsageError(where, "not a JSON object", 'Write {"prompt": "..."} on each line.')
    found = next((row[field] for field in FIELDS if isinstance(row.get(field), str)), None)
    if found is None:
        raise UsageError(where, "neither 'prompt' nor 'input' is a text", 'Write {"prompt": "..."} on each line.')
    return found
