"""A web site on this machine that cuts, lies, is busy or knows no ranges, for tests of downloads."""

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """It gives one file. `faults` are used up one a request: 'cut N', 'status N', 'wrong', 'hang N', 'move'."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.content, self.ranges, self.etag, self.length = CONTENT, True, '"one"', True
        self.faults: list[str] = []
        self.asked: list[str | None] = []  # the Range of every request
        self.pace = 0.0  # seconds between portions of 20 kB
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Page(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Site  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        site, asked = self.server, self.headers["Range"]
        site.asked.append(asked)
        fault, _, number = (site.faults.pop(0) if site.faults else "").partition(" ")
        if fault == "status":
            self.send_response(int(number))
            self.end_headers()
            return
        if fault == "move":
            self.send_response(302)
            self.send_header("Location", site.url)
            self.end_headers()
            return
        if fault == "hang":
            time.sleep(float(number))
            return
        content = bytes(len(site.content)) if fault == "wrong" else site.content
        start = self._start(asked) if asked and site.ranges else None
        if start is not None and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self._send(content, start, int(number) if fault == "cut" else None)

    def _start(self, asked: str) -> int | None:
        """Where to begin, unless the file is another one than the asker knows."""
        if self.headers["If-Range"] not in (None, self.server.etag):
            return None
        return int(asked.removeprefix("bytes=").rstrip("-"))

    def _send(self, content: bytes, start: int | None, cut: int | None) -> None:
        site, rest = self.server, content[start or 0 :]
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.length:
            self.send_header("Content-Length", str(len(rest)))
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        rest = rest[:cut]
        with contextlib.suppress(ConnectionError):
            for place in range(0, len(rest), 20_000):
                self.wfile.write(rest[place : place + 20_000])
                time.sleep(site.pace)
