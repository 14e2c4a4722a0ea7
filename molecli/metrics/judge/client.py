"""One request to an OpenAI-compatible /chat/completions endpoint, and its answer.

The key comes from an environment variable and is sent only in one header: it is removed from all texts of the endpoint
before they leave this file, no exception has a request, and redirects are not followed.
Contents: read_key, Completion, NoAnswer, Client.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx2
from pydantic import SecretStr

from molecli.errors import UsageError

if TYPE_CHECKING:
    from molecli.config.judge import JudgeConfig

_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
_LONGEST_ANSWER = 4_000_000  # bytes
_SHOWN = 300  # characters of an endpoint's error message to show
# A shorter "key" is a placeholder for a server without keys; removing it would garble answers.
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class Completion:
    """The text of the model, and whether it was cut off at the length limit."""

    text: str
    cut_off: bool


class NoAnswer(Exception):
    """A request without an answer: whether and when to try again, and whether all requests would fail (`stops`).

    `remedy` comes with `stops`: what the user can do.
    """

    def __init__(
        self, reason: str, *, again: bool = True, after_s: float = 0.0, stops: bool = False, remedy: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.after_s, self.stops, self.remedy = reason, again, after_s, stops, remedy


def read_key(config: JudgeConfig) -> SecretStr | None:
    """The key; None if its variable is not set and the endpoint is plain http, as for local servers.

    Raises: UsageError for an https endpoint without a key, or a key that a header cannot hold.
    """
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        if config.endpoint.startswith("https:"):
            what = f"the environment variable {config.key_env} is not set"
            raise UsageError("judge.key_env", what, f"Put the key for {config.endpoint} into it.")
        return None
    if not all("!" <= character <= "~" for character in key):
        what = f"the key in {config.key_env} has blanks or characters outside ASCII"
        raise UsageError("judge.key_env", what, "Copy it again.")
    return SecretStr(key)


class Client:
    """Sends questions. A context manager; threads may share it."""

    def __init__(self, config: JudgeConfig, key: SecretStr | None) -> None:
        self._config, self._key = config, key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
        self._http = httpx2.Client(timeout=config.timeout_s, headers=headers, follow_redirects=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def answer(self, question: str, pictures: Sequence[str]) -> Completion:
        """The model's answer to `question` about `pictures` (data URLs, called image 1, image 2, ...).

        Raises: NoAnswer.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for number, url in enumerate(pictures, start=1):
            content.append({"type": "text", "text": f"Image {number}:"})
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        status, headers, body = self._post({**self._config.options, "model": self._config.model, "messages": messages})
        document = _document(body)
        if status != 200:
            raise self._refused(status, headers, self._said(document, body))
        return self._completion(document, body)

    def _post(self, request: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        url, end = f"{self._config.endpoint}/chat/completions", time.monotonic() + self._config.timeout_s
        try:
            with self._http.stream("POST", url, json=request) as response:
                return response.status_code, response.headers, self._read(response, end)
        except httpx2.TimeoutException:
            failure = self._late()
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            reason = f"no connection to {self._config.endpoint} ({self._clean(str(error))})"
            failure = NoAnswer(reason, stops=True, remedy="Check judge.endpoint and that its server runs.")
        except httpx2.HTTPError as error:
            failure = NoAnswer(f"the connection broke ({self._clean(str(error)) or type(error).__name__})")
        raise failure  # outside the except block, so that httpx2's error with the request is not attached

    def _read(self, response: httpx2.Response, end: float) -> bytes:
        body = b""
        for part in response.iter_bytes():
            body += part
            if time.monotonic() > end:  # httpx2's limit is per part
                raise self._late()
            if len(body) > _LONGEST_ANSWER:
                raise NoAnswer(f"the answer is longer than {_LONGEST_ANSWER} bytes", again=False)
        return body

    def _late(self) -> NoAnswer:
        return NoAnswer(f"no answer within {self._config.timeout_s:g} s")

    def _refused(self, status: int, headers: httpx2.Headers, said: str) -> NoAnswer:
        config, reason = self._config, f"HTTP {status}" + (f": {said}" if said else "")
        if status in _AGAIN or status >= 500:
            return NoAnswer(reason, after_s=_retry_after_s(headers))
        if status == 401:
            remedy = f"Check the key in the environment variable {config.key_env}."
            return NoAnswer(f"{config.endpoint} wants another key ({reason})", again=False, stops=True, remedy=remedy)
        if status == 402:
            return NoAnswer(f"{config.endpoint} wants to be paid ({reason})", again=False, stops=True)
        if status in (404, 405) or status < 400:
            what = f"{config.endpoint} does not answer for the model {config.model!r} ({reason})"
            remedy = "Check judge.model and judge.endpoint, which ends before /chat/completions."
            return NoAnswer(what, again=False, stops=True, remedy=remedy)
        return NoAnswer(reason, again=False)

    def _completion(self, document: Any, body: bytes) -> Completion:
        try:
            choice = document["choices"][0]
            message = choice["message"]
            said = message.get("content") or message.get("refusal") or ""
            finish = choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            raise NoAnswer(f"this is not a chat completion ({self._said(document, body)})") from None
        if isinstance(said, list):  # some servers answer in parts, as questions are asked
            said = "".join(str(part.get("text", "")) for part in said if isinstance(part, Mapping))
        return Completion(self._clean(str(said)), finish == "length")

    def _said(self, document: Any, body: bytes) -> str:
        """The error message of the endpoint, in one short line."""
        found = document
        for key in ("error", "message", "detail"):
            if isinstance(found, Mapping) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else body.decode("utf-8", errors="replace")
        # The key is removed before the text is cut: half a key is a secret too.
        line = " ".join(self._clean(text).split())
        return line if len(line) <= _SHOWN else line[:_SHOWN].rstrip() + "..."

    def _clean(self, text: str) -> str:
        """`text` without the key and without unpaired surrogates, which JSON may have and files cannot."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        key = self._key.get_secret_value() if self._key is not None else ""
        return text.replace(key, "***") if len(key) >= _SHORTEST_KEY else text


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _retry_after_s(headers: httpx2.Headers) -> float:
    """Seconds to wait according to the Retry-After header, a number or a date; 0 without one."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
