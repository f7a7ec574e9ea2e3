"""A headless Chromium to look at pages with: what a page logs, what it asks the network for, what a script
finds in it, and how it looks.

Speaks the DevTools protocol through two pipes, so that nothing but the browser is needed and no port is
opened. POSIX only.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiprod_ds.errors import EngineError

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_FIRST_FREE = 10  # of file descriptors: the browser reads 3 and writes 4
_WAIT_SECONDS = 60.0


def find_browser() -> str | None:
    """Returns the browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass(slots=True, kw_only=True)
class Page:
    """An open page.

    Attributes:
        errors: What it logged as an error, and what it threw.
        requests: Addresses that it asked for, without those of files and of data in the page.
    """

    browser: Browser
    session: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        """Returns what a script's expression gives, after waiting for it if it is a promise.

        Raises:
            EngineError: If it throws.
        """
        options = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.browser.call("Runtime.evaluate", options, session=self.session)
        if "exceptionDetails" in found:
            raise EngineError(f"browser: the script must not throw, got {found['exceptionDetails']}.")
        return found["result"].get("value")

    def save_picture(self, path: Path, *, is_whole: bool = False) -> None:
        """Writes a PNG of what the window shows, or of the whole page."""
        options = {"format": "png", "captureBeyondViewport": is_whole}
        if is_whole:
            size = self.browser.call("Page.getLayoutMetrics", session=self.session)["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.browser.call("Page.captureScreenshot", options, session=self.session)
        path.write_bytes(base64.b64decode(found["data"]))

    def take(self, method: str, values: dict[str, Any]) -> None:
        """Takes an event of the page."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in {"error", "assert"}:
            self.errors.append(json.dumps(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = values["request"]["url"]
            if not address.startswith(("file:", "data:", "about:", "blob:")):
                self.requests.append(address)


@dataclass(slots=True, kw_only=True)
class Browser:
    """A running browser; see `open_browser`."""

    process: int
    commands: int
    answers: int
    _number: int = 0
    _waiting: bytes = b""
    _pages: dict[str, Page] = field(default_factory=dict)
    _loaded: set[str] = field(default_factory=set)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> Page:
        """Returns the page of a local file, once it is loaded.

        Args:
            path: Of the file.
            width: Of the window, in pixels; a phone's up to 500.
            height: Likewise.
            is_dark: Whether the reader prefers dark pages.

        Raises:
            EngineError: If the browser does not answer.
        """
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(browser=self, session=session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session=session)
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 500}
        self.call("Emulation.setDeviceMetricsOverride", screen, session=session)
        colours = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [colours]}, session=session)
        self._loaded.discard(session)
        self.call("Page.navigate", {"url": path.resolve().as_uri()}, session=session)
        deadline = time.monotonic() + _WAIT_SECONDS
        while session not in self._loaded:
            self._take(self._read(deadline))
        return page

    def call(
        self, method: str, values: dict[str, Any] | None = None, *, session: str | None = None
    ) -> dict[str, Any]:
        """Returns the answer to a command of the protocol.

        Raises:
            EngineError: If it is an error, or does not come.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values or {}}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode("utf-8") + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        deadline = time.monotonic() + _WAIT_SECONDS
        while (answer := self._read(deadline)).get("id") != self._number:
            self._take(answer)
        if "error" in answer:
            raise EngineError(f"browser: {method} must succeed, got {answer['error']}.")
        result: dict[str, Any] = answer["result"]
        return result

    def _take(self, event: dict[str, Any]) -> None:
        session, method = event.get("sessionId", ""), event.get("method", "")
        if method == "Page.loadEventFired":
            self._loaded.add(session)
        if session in self._pages:
            self._pages[session].take(method, event["params"])

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self.answers], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self.answers, 1 << 16) if ready else b""
            if not data:
                raise EngineError(f"browser: must answer within {_WAIT_SECONDS:.0f} s, got nothing.")
            self._waiting += data
        line, _, self._waiting = self._waiting.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Starts a browser with a profile of its own, and ends it with the block.

    Raises:
        EngineError: If there is none.
    """
    program = find_browser()
    if program is None:
        raise EngineError(f"browser: one of {', '.join(_NAMES)} must be installed, got none.")
    pipes = [_high(descriptor) for descriptor in (*os.pipe(), *os.pipe())]
    read_commands, commands, answers, write_answers = pipes
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_browser_", ignore_cleanup_errors=True) as profile:
        process = os.posix_spawn(
            program,
            [program, *_ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read_commands, 3),
                (os.POSIX_SPAWN_DUP2, write_answers, 4),
                *((os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)),
            ],
            setpgroup=0,  # its own helpers end with it
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Browser(process=process, commands=commands, answers=answers)
        finally:
            os.close(commands)
            os.close(answers)
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _high(descriptor: int) -> int:
    """Returns the descriptor under a number that does not meet those that the browser takes."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    os.close(descriptor)
    return moved
