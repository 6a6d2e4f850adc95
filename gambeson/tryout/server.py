"""The server of the page: this machine alone, its own page alone, and nothing on the disk read or written.

It listens on 127.0.0.1; a foreign Host (DNS rebinding) or Origin is refused, and all but the refusal needs the token
that the terminal printed. Whatever is sent is answered in words.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

from gambeson.errors import EnvironmentFault, UserError
from gambeson.threat import Norm
from gambeson.tryout.attacking import TICKS, Attacker
from gambeson.tryout.certifying import Certifier
from gambeson.tryout.desk import Desk, Work, words_of
from gambeson.tryout.page import render
from gambeson.tryout.pictures import MOST_BYTES, Seen, check_bytes, lines_of, packed, picture_of, read_picture, unpacked
from gambeson.tryout.subject import Tried

ADDRESS = "127.0.0.1"
"""The only address that is listened on."""
TOKEN = "X-Gambeson-Token"
"""The header with the token."""
_DRAINED = 3 * MOST_BYTES
"""Bytes of a refused upload that are read and dropped, so that its sender hears why."""
_SIGMA = 10.0
"""The largest noise that can be asked for."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is not answered: the status, and why."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Server(ThreadingHTTPServer):
    """One classifier's page. `port` 0: any free one. Raises EnvironmentFault where the port is taken.

    Use it as a context; `serve_forever` until `shutdown` or Ctrl-C.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, tried: Tried, attacker: Attacker, certifier: Certifier, port: int = 0) -> None:
        self.token, self.desk = secrets.token_urlsafe(24), Desk()
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise EnvironmentFault(
                f"--port {port}: expected a free port of {ADDRESS}, got: {error}. Choose another, or leave --port out"
            ) from error
        self.tried, self.attacker, self.certifier = tried, attacker, certifier
        self.page, self.policy = render(tried, attacker, certifier, self.token)

    @property
    def url(self) -> str:
        """Where the page is, with its token."""
        return f"http://{ADDRESS}:{self.server_port}/?token={self.token}"

    def server_close(self) -> None:
        """Closes the port, and ends what is being computed."""
        super().server_close()
        self.desk.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's fault; anything else is told in one line."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, (ConnectionError, TimeoutError)):
            words_of(error)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server  # type: ignore[assignment]
    server_version, sys_version = "gambeson", ""
    timeout = 30  # seconds that a sender may be silent

    def do_GET(self) -> None:
        """The page, and nothing else."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """What the page asks."""
        self._answered(self._post)

    def _answered(self, work: Any) -> None:
        """Does the work, and says in words where it failed."""
        try:
            work()
        except Refused as error:
            self._say(error.status, str(error))
        except UserError as error:
            self._say(400, str(error))
        except ConnectionError:
            pass  # whoever asked has gone
        except TimeoutError:
            self._say(408, "Expected the whole request, got nothing more of it for half a minute.")
        except Exception as error:  # a mistake of ours, and the page must go on
            self._say(500, words_of(error))

    def _get(self) -> None:
        self._check_door()
        address = urlsplit(self.path)
        if address.path != "/":
            raise Refused(404, "There is nothing here; the page is at /.")
        self._check_token((parse_qs(address.query).get("token") or [""])[0])
        self._send(
            200, "text/html; charset=utf-8", self.server.page.encode(), {"Content-Security-Policy": self.server.policy}
        )

    def _post(self) -> None:
        length = self._length()
        try:
            self._check_door()
            self._check_token(self.headers.get(TOKEN) or "")
            doors = {"/image": self._image, "/sample": self._sample, "/attack": self._attack, "/certify": self._certify}
            if self.path not in doors:
                raise Refused(404, "There is nothing here.")
            if length > MOST_BYTES:
                raise Refused(413, f"Expected at most {MOST_BYTES // 1_000_000} MB, got {length / 1e6:,.1f} MB.")
        except Refused:
            self._drain(length)
            raise
        doors[self.path](self._body(length))

    def _check_door(self) -> None:
        """Refused for a request that is addressed to, or comes from, a page of another name."""
        host = self.headers.get("Host") or ""
        name = host.rpartition(":")[0] or host
        origin = self.headers.get("Origin")
        if name not in (ADDRESS, "localhost") or origin not in (None, f"http://{host}"):
            raise Refused(403, f"This page answers as {ADDRESS} or localhost, and to itself alone.")

    def _check_token(self, found: str) -> None:
        if not hmac.compare_digest(found.encode(), self.server.token.encode()):
            raise Refused(403, "Open the address that the terminal printed, with its token; this one is of no session.")

    def _length(self) -> int:
        """Bytes of the body. Refused where that is not said."""
        told = self.headers.get("Content-Length")
        if told is None or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refused(411, "Expected a Content-Length.")
        if not (told.isascii() and told.isdigit()) or len(told) > 18:
            raise Refused(400, f"Content-Length: expected a number of bytes, got {told[:40]!r}.")
        return int(told)

    def _drain(self, length: int) -> None:
        left = min(length, _DRAINED)
        while left > 0 and (part := self.rfile.read(min(left, 1 << 20))):
            left -= len(part)

    def _body(self, length: int) -> bytes:
        content = self.rfile.read(length)
        if len(content) != length:
            raise Refused(400, f"Expected {length:,} bytes, got {len(content):,}.")
        return content

    def _image(self, content: bytes) -> None:
        check_bytes(len(content))
        self._show(read_picture(content, self.server.tried.shape), None)

    def _sample(self, content: bytes) -> None:
        tried = self.server.tried
        index = _number(_object(content), "index", 0, len(tried.places) - 1)
        assert tried.samples is not None
        told = (f"test image {tried.places[index]} of {tried.source}, as it is",)
        image = tried.samples.images[index : index + 1].float()
        self._show(Seen(image=image, told=told), tried.class_names[int(tried.samples.labels[index])])

    def _show(self, seen: Seen, label: str | None) -> None:
        """What the network sees: the pixels to ask about, a picture of them, and how they came about."""
        told = list(lines_of(seen.told))
        answer = {"pixels": packed(seen.image), "seen": picture_of(seen.image), "told": told, "label": label}
        self._send(200, "application/json", json.dumps(answer).encode())

    def _attack(self, content: bytes) -> None:
        asked, tried = _object(content), self.server.tried
        image, tick = unpacked(asked.get("pixels"), tried.shape), _number(asked, "tick", 0, TICKS)
        norm: Any = asked.get("norm")
        if norm not in get_args(Norm):
            raise Refused(400, f"norm: expected {', '.join(get_args(Norm))}, got {str(norm)[:40]!r}.")
        self._stream("attack", self.server.attacker.answer(image, norm, tick))

    def _certify(self, content: bytes) -> None:
        asked, tried = _object(content), self.server.tried
        image, sigma = unpacked(asked.get("pixels"), tried.shape), asked.get("sigma")
        if not isinstance(sigma, (int, float)) or isinstance(sigma, bool) or not 0 < sigma <= _SIGMA:
            raise Refused(400, f"σ: expected a number above 0 and at most {_SIGMA:g}, got {str(sigma)[:40]!r}.")
        self._stream("certificate", self.server.certifier.answer(image, float(sigma)))

    def _stream(self, kind: str, work: Work) -> None:
        """Each line of the work as soon as it is there; the connection ends with the last."""
        self._head(200, "application/x-ndjson", {})
        with closing(self.server.desk.ask(kind, work)) as lines:
            for line in lines:
                self.wfile.write(json.dumps(line).encode() + b"\n")
                self.wfile.flush()

    def _head(self, status: int, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **_HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, kind: str, content: bytes, more: dict[str, str] | None = None) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _say(self, status: int, words: str) -> None:
        """A refusal: JSON for the page's own requests, text otherwise."""
        try:
            if self.command == "POST":
                self._send(status, "application/json", json.dumps({"error": words}).encode())
            else:
                self._send(status, "text/plain; charset=utf-8", f"{words}\n".encode())
        except (ConnectionError, TimeoutError):
            pass  # whoever asked has gone

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in words instead of its page."""
        self.close_connection = True
        self._say(code, message or "This request is not understood.")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal stays quiet."""


def _object(content: bytes) -> dict[str, Any]:
    """A JSON object. Refused for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "Expected a JSON object.")
    return found


def _number(asked: dict[str, Any], name: str, low: int, high: int) -> int:
    """A whole number. Refused for anything else."""
    value = asked.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(400, f"{name}: expected a whole number from {low} to {high}, got {str(value)[:40]!r}.")
    return value
