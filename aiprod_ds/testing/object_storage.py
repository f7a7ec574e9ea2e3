"""Object storage for tests and benchmarks, on this machine's loopback only: a server with the protocol of S3,
a web server that answers ranges, and a bad line in front of either.

Owns processes that end with their `with` block. S3 is moto's, which the extra `test` installs. Executing this
module is the web server's and the line's side.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, ClassVar
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

_BLOCK_BYTES = 16 << 10
_STARTED = re.compile(r"http://127\.0\.0\.1:(\d+)")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHAREDCREDENTIALS_FILE": os.devnull,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """What is wrong with a line; counts are of requests for objects, from 1.

    Attributes:
        latency_seconds: Before every answer.
        bytes_per_second: Of each connection; None: as fast as it goes.
        cut_every: Every so many answers end in the middle.
        fail_every: Every so many requests are answered with status 500.
        die_after: The line is gone for good after so many answers.
    """

    latency_seconds: float = 0.0
    bytes_per_second: float | None = None
    cut_every: int | None = None
    fail_every: int | None = None
    die_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        url: Where it answers.
    """

    url: str
    _process: subprocess.Popen[str]

    def kill(self) -> None:
        """Ends it at once; later requests are refused."""
        self._process.kill()
        self._process.wait()


@contextmanager
def s3_server(bucket: str) -> Iterator[Server]:
    """Runs a server with one bucket; in the block the environment has credentials for it and no others."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with patch.dict(os.environ, CREDENTIALS), _running(command) as server:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
            os.environ.pop(name, None)
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.request("PUT", f"/{bucket}")
        status = connection.getresponse().status
        connection.close()
        assert status == 200, f"the bucket is made, got status {status}"
        yield server


@contextmanager
def bad_line(target: Server, line: BadLine) -> Iterator[Server]:
    """Runs a line in front of a server."""
    command = [sys.executable, "-m", __name__, target.url, json.dumps(asdict(line))]
    with _running(command) as server:
        yield server


@contextmanager
def web_server(folder: Path, line: BadLine | None = None) -> Iterator[Server]:
    """Runs a web server of a folder that answers ranges; for reading it is an S3 server whose buckets are
    the folders inside, and faster than moto's, which reads a whole object for every range of it."""
    command = [sys.executable, "-m", __name__, str(folder), json.dumps(asdict(line or BadLine()))]
    with _running(command) as server:
        yield server


@contextmanager
def _running(command: list[str]) -> Iterator[Server]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None, "it was asked for"
            url = _url_of(process.stdout)
            # Nobody reads what it says from here on, and a full pipe would stop it.
            threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
            yield Server(url=url, _process=process)
        finally:
            process.kill()


def _url_of(output: IO[str]) -> str:
    said = ""
    for line in output:
        said += line
        started = _STARTED.search(line)
        if started:
            return started[0]
    raise RuntimeError(f"the server did not start: {said[-2000:]}")


def _drain(output: IO[str]) -> None:
    try:
        while output.read(1 << 16):
            pass
    except ValueError:  # closed with the block
        return


class _Handler(BaseHTTPRequestHandler):
    """Answers from a folder, or from a server behind it."""

    protocol_version = "HTTP/1.1"
    source: ClassVar[str]
    line: ClassVar[BadLine]
    lock: ClassVar[threading.Lock] = threading.Lock()
    count: ClassVar[int] = 0

    def do_GET(self) -> None:
        number = 0
        if "list-type" not in self.path:
            with self.lock:
                type(self).count += 1
                number = self.count
        if self.line.die_after is not None and number > self.line.die_after:
            os._exit(1)
        time.sleep(self.line.latency_seconds)
        if number and self.line.fail_every and number % self.line.fail_every == 0:
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        status, headers, body = self._forwarded() if "://" in self.source else self._file()
        is_cut = bool(number and self.line.cut_every and number % self.line.cut_every == 0 and len(body) > 1)
        self._answer(status, headers, body, is_cut=is_cut)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815  http.server's names

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = memoryview(body)[: len(body) // 2 if is_cut else len(body)]
        for start in range(0, len(sent), _BLOCK_BYTES):
            block = sent[start : start + _BLOCK_BYTES]
            if self.line.bytes_per_second is not None:
                time.sleep(len(block) / self.line.bytes_per_second)
            self.wfile.write(block)
        self.close_connection = self.close_connection or is_cut

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.source).netloc, timeout=60)
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _OF_ONE_HOP}
            return response.status, kept, response.read()
        finally:
            connection.close()

    def _file(self) -> tuple[int, dict[str, str], bytes]:
        asked = urlsplit(self.path)
        path = Path(self.source, unquote(asked.path).lstrip("/"))
        if "list-type" in asked.query:
            return 200, {}, _listing(path, parse_qs(asked.query)["prefix"][0])
        if not path.is_file():
            return 404, {}, b""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return 200, {}, path.read_bytes()
        size, start = path.stat().st_size, int(span[1])
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(int(span[2] or size - 1) + 1 - start)
        if not body:
            return 416, {}, b""
        return 206, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{size}"}, body


def _listing(bucket: Path, prefix: str) -> bytes:
    """Returns what S3 answers to `ListObjectsV2` of files that lie in one folder."""
    files = sorted((bucket / prefix).iterdir())
    entries = "".join(
        f"<Contents><Key>{prefix}{file.name}</Key><Size>{file.stat().st_size}</Size></Contents>"
        for file in files
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


_OF_ONE_HOP = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})


def _serve(source: str, line: str) -> None:
    _Handler.source, _Handler.line = source, BadLine(**json.loads(line))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
