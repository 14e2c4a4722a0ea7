"""A stand-in for an OpenAI-compatible endpoint, on 127.0.0.1: a script says what it answers, it keeps what it was sent.

serve(script)       a StandIn, listening while the block lasts         says(text)      an ordinary answer
fair, biased        scripts that mark pictures by their colour         lines(...)      the two score lines
paint(path, ...)    a picture that is worth those marks
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "sk-test-3f9d1c77aa"


@dataclass(frozen=True)
class Asked:
    """One request; `number` counts from 0."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The question."""
        return str(self.body["messages"][0]["content"][0]["text"])

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures, in the order in which they are shown."""
        return [Image.open(io.BytesIO(data)) for data in self.files]

    @property
    def files(self) -> list[bytes]:
        """The pictures' files."""
        parts = [part for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        prefix = "data:image/png;base64,"
        assert all(part["image_url"]["url"].startswith(prefix) for part in parts)
        return [base64.b64decode(part["image_url"]["url"][len(prefix) :], validate=True) for part in parts]

    @property
    def worth(self) -> list[tuple[float, float]]:
        """What each picture is worth: (composition, image)."""
        return [(p.getpixel((0, 0))[0] / 10, p.getpixel((0, 0))[1] / 10) for p in self.pictures]  # type: ignore[index]


@dataclass(frozen=True)
class Answer:
    """What the endpoint sends back: JSON, or `body` as it is if that is bytes."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Script = Callable[[Asked], Answer]


@dataclass
class StandIn:
    """A listening endpoint; `script` may be changed while it listens."""

    url: str
    script: Script
    asked: list[Asked] = field(default_factory=list)


def says(text: str | None, *, finish: str = "stop", **message: Any) -> Answer:
    """An ordinary answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return Answer({"object": "chat.completion", "choices": [choice]})


def lines(first: tuple[float, float], second: tuple[float, float]) -> str:
    """An answer with these marks for image 1 and image 2, (composition, image) each."""
    rows = [
        f"Image {k}: Composition Quality: {c:g}/10, Image Quality: {i:g}/10" for k, (c, i) in ((1, first), (2, second))
    ]
    return "For image 1, the hat is missing.\n\nFor image 2, all is well.\n\nScores:\n" + "\n".join(rows)


def fair(asked: Asked) -> Answer:
    """Gives every picture what it is worth, wherever it is shown."""
    first, second = asked.worth
    return says(lines(first, second))


def biased(asked: Asked) -> Answer:
    """Gives the picture that comes first 2 points more on both dimensions."""
    (composition, image), second = asked.worth
    return says(lines((composition + 2, image + 2), second))


def paint(path: Path, composition: float, image: float, **metadata: str) -> Path:
    """`path`, a PNG that is worth these marks."""
    info = PngInfo()
    for name, text in metadata.items():
        info.add_text(name, text)
    Image.new("RGB", (4, 4), (round(10 * composition), round(10 * image), 0)).save(path, pnginfo=info)
    return path


@contextmanager
def serve(script: Script) -> Iterator[StandIn]:
    """A stand-in that answers by `script` while the block lasts."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked = Asked(len(standin.asked), self.path, dict(self.headers.items()), body)
                standin.asked.append(asked)
            answer = standin.script(asked)
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # whoever asked did not wait

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    standin = StandIn(f"http://127.0.0.1:{server.server_port}/v1", script)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
