"""One request to a stand-in endpoint: what is sent, and what each kind of failure is taken for."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx2
import pytest
from pydantic import SecretStr
from standin import KEY, Answer, says, serve

from molecli.config import JudgeConfig
from molecli.errors import UsageError
from molecli.metrics.judge.client import Client, Completion, NoAnswer, read_key

Settings = Callable[..., JudgeConfig]
PIXEL = "data:image/png;base64,AAAA"


def ask(config: JudgeConfig) -> Completion:
    with Client(config, read_key(config)) as client:
        return client.answer("Which is better?", (PIXEL, PIXEL))


def no_answer(config: JudgeConfig) -> NoAnswer:
    with pytest.raises(NoAnswer) as caught:
        ask(config)
    return caught.value


def answering(settings: Settings, answer: Answer, **more: object) -> NoAnswer:
    with serve(lambda asked: answer) as standin:
        return no_answer(settings(standin.url, **more))


def test_a_request_is_a_chat_completion_with_numbered_pictures(settings: Settings) -> None:
    with serve(lambda asked: says("hello")) as standin:
        completion = ask(settings(standin.url, model="judge-1", options={"temperature": 0}))
    assert completion == Completion("hello", cut_off=False)
    (asked,) = standin.asked
    assert asked.path == "/v1/chat/completions"
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    content = [
        {"type": "text", "text": "Which is better?"},
        {"type": "text", "text": "Image 1:"},
        picture,
        {"type": "text", "text": "Image 2:"},
        picture,
    ]
    assert asked.body == {"temperature": 0, "model": "judge-1", "messages": [{"role": "user", "content": content}]}


def test_the_key_goes_out_as_a_bearer_token(settings: Settings) -> None:
    with serve(lambda asked: says("hello")) as standin:
        ask(settings(standin.url))
    assert standin.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_local_server_needs_no_key(settings: Settings) -> None:
    with serve(lambda asked: says("hello")) as standin:
        ask(settings(standin.url, key_env="MOLE_TEST_NO_KEY"))
    assert "Authorization" not in standin.asked[0].headers


def test_an_https_endpoint_needs_one() -> None:
    with pytest.raises(UsageError) as caught:
        read_key(JudgeConfig(key_env="MOLE_TEST_NO_KEY"))
    message = "judge.key_env: the environment variable MOLE_TEST_NO_KEY is not set. "
    assert str(caught.value) == message + "Put the key for https://api.openai.com/v1 into it."


def test_line_breaks_around_a_key_are_no_part_of_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_TEST_KEY", f" {KEY}\n")
    assert read_key(settings("http://127.0.0.1")) == SecretStr(KEY)


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    key: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLE_TEST_KEY", key)
    with pytest.raises(UsageError) as caught:
        read_key(settings("http://127.0.0.1"))
    message = "judge.key_env: the key in MOLE_TEST_KEY has blanks or characters outside ASCII. Copy it again."
    assert str(caught.value) == message


def test_answers_in_parts_refusals_and_half_characters_are_text(settings: Settings) -> None:
    parts = says(None)
    parts.body["choices"][0]["message"]["content"] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for answer, text in (
        (parts, "ab"),
        (says(None, refusal="I cannot compare people."), "I cannot compare people."),
        (says(None), ""),
        (says("half \ud83d"), "half ?"),
    ):
        with serve(lambda asked, answer=answer: answer) as standin:  # type: ignore[misc]
            assert ask(settings(standin.url)).text == text


def test_an_answer_cut_off_is_told_from_a_whole_one(settings: Settings) -> None:
    with serve(lambda asked: says("Image 1:", finish="length")) as standin:
        assert ask(settings(standin.url)) == Completion("Image 1:", cut_off=True)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(status: int, settings: Settings) -> None:
    failure = answering(settings, Answer({"error": {"message": "busy"}}, status))
    assert (failure.reason, failure.again, failure.stops) == (f"HTTP {status}: busy", True, False)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_what_is_wrong_with_one_request_is_not(status: int, settings: Settings) -> None:
    failure = answering(settings, Answer({"error": {"message": "too many pictures"}}, status))
    assert (failure.reason, failure.again, failure.stops) == (f"HTTP {status}: too many pictures", False, False)


def test_what_is_wrong_with_every_request_stops_the_run(settings: Settings) -> None:
    with serve(lambda asked: Answer({"error": {"message": "No such model"}}, 404)) as standin:
        failure = no_answer(settings(standin.url, model="gpt-0"))
    assert (failure.again, failure.stops) == (False, True)
    assert failure.reason == f"{standin.url} does not answer for the model 'gpt-0' (HTTP 404: No such model)"
    assert failure.remedy == "Check judge.model and judge.endpoint, which ends before /chat/completions."
    with serve(lambda asked: Answer({"error": "expired"}, 401)) as standin:
        failure = no_answer(settings(standin.url))
    assert (failure.again, failure.stops) == (False, True)
    assert failure.reason == f"{standin.url} wants another key (HTTP 401: expired)"
    assert failure.remedy == "Check the key in the environment variable MOLE_TEST_KEY."
    with serve(lambda asked: Answer({}, 402)) as standin:
        failure = no_answer(settings(standin.url))
    assert (failure.again, failure.stops) == (False, True)
    assert failure.reason == f"{standin.url} wants to be paid (HTTP 402: {{}})"


def test_a_redirect_is_not_followed(settings: Settings) -> None:
    with serve(lambda asked: says("hello")) as other:
        answer = Answer(b"", 307, {"Location": f"{other.url}/chat/completions"})
        failure = answering(settings, answer)
    assert failure.stops
    assert "HTTP 307" in failure.reason
    assert other.asked == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>\n <p>hello</p>", "<html> <p>hello</p>"),
        ({"choices": []}, '{"choices": []}'),
        ({"choices": [{"text": "x"}]}, '{"choices": [{"text": "x"}]}'),
        ({"error": {"message": "upstream failed", "code": 502}}, "upstream failed"),
        ([1], "[1]"),
        (b"\xff", "\ufffd"),
        ({"detail": "x" * 400}, "x" * 300 + "..."),
    ],
)
def test_a_body_that_is_no_completion(body: object, said: str, settings: Settings) -> None:
    failure = answering(settings, Answer(body))
    assert (failure.reason, failure.again) == (f"this is not a chat completion ({said})", True)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("0.25", 0.25, 0.25),
        ("-3", 0, 0),
        ("soon", 0, 0),
        # Long enough: it is written when the tests are collected, and read when this one's turn comes.
        (format_datetime(datetime.now(timezone.utc) + timedelta(hours=3), usegmt=True), 7200, 10800),
        (format_datetime(datetime.now(timezone.utc) - timedelta(seconds=60), usegmt=True), 0, 0),
    ],
    # Named: two test processes that collect in different seconds must agree.
    ids=["seconds", "fraction", "negative", "no number", "later", "earlier"],
)
def test_retry_after_is_read_as_a_number_or_a_date(header: str, low: float, high: float, settings: Settings) -> None:
    failure = answering(settings, Answer({"error": "slow down"}, 429, {"Retry-After": header}))
    assert low <= failure.after_s <= high


def test_an_endpoint_that_says_nothing_is_waited_for_no_longer_than_the_limit(settings: Settings) -> None:
    def slowly(asked: object) -> Answer:
        time.sleep(1)
        return says("hello")

    with serve(slowly) as standin:
        start = time.monotonic()
        failure = no_answer(settings(standin.url, timeout_s=0.1))
        assert time.monotonic() - start < 0.9
    assert (failure.reason, failure.again, failure.stops) == ("no answer within 0.1 s", True, False)


def _dripping(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        try:
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.02)
        except OSError:
            pass


def test_an_endpoint_that_drips_is_waited_for_no_longer_either(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_dripping, args=(listener,), daemon=True)
        thread.start()
        failure = no_answer(settings(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_s=0.2))
        thread.join()
    assert failure.reason == "no answer within 0.2 s"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_no_connection_stops_the_run_after_further_tries(settings: Settings) -> None:
    url = f"http://127.0.0.1:{closed_port()}/v1"
    failure = no_answer(settings(url))
    assert failure.reason.startswith(f"no connection to {url} (")
    assert (failure.again, failure.stops) == (True, True)
    assert failure.remedy == "Check judge.endpoint and that its server runs."


def test_a_connection_that_breaks_is_tried_again(settings: Settings) -> None:
    failure = answering(settings, Answer(b"short", 200, {"Content-Length": "100", "Connection": "close"}))
    assert failure.reason.startswith("the connection broke (")
    assert (failure.again, failure.stops) == (True, False)


def test_no_failure_carries_the_request(settings: Settings) -> None:
    failure = no_answer(settings(f"http://127.0.0.1:{closed_port()}/v1"))
    seen: BaseException | None = failure
    while seen is not None:
        assert not isinstance(seen, httpx2.HTTPError)
        seen = seen.__cause__ or seen.__context__


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_an_endpoint_that_repeats_the_key_is_not_repeated(status: int, settings: Settings) -> None:
    echo = f"you sent {KEY} " + "x" * 279  # the limit of what is shown falls into the second one
    with serve(lambda asked: Answer({"error": echo + KEY}, status)) as standin:
        failure = no_answer(settings(standin.url))
    assert "you sent ***" in failure.reason
    assert KEY[:6] not in failure.reason
    with serve(lambda asked: says(f"your key is {KEY}")) as standin:
        assert ask(settings(standin.url)).text == "your key is ***"


def test_a_placeholder_for_a_key_garbles_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_TEST_KEY", "none")
    with serve(lambda asked: says("none of them")) as standin:
        assert ask(settings(standin.url)).text == "none of them"


def test_the_key_is_in_no_representation_and_no_log(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serve(lambda asked: says("hello")) as standin:
        config = settings(standin.url)
        with Client(config, read_key(config)) as client:
            client.answer("?", (PIXEL,))
            shown = [repr(client), str(client), repr(vars(client)), repr(vars(client._http)), repr(config)]
    assert standin.asked[0].headers["Authorization"].endswith(KEY)
    assert caplog.records
    assert KEY not in caplog.text
    assert all(KEY not in text for text in shown)
