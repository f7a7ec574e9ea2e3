"""Text in a file: whole lines, whatever their length; in a terminal it is rich's."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.logging import RichHandler

from aiprod_ds.report.output import log_handler, open_console


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("aiprod_ds.x", logging.INFO, __file__, 1, message, None, None)


def test_a_log_file_has_one_line_for_each_record() -> None:
    file, message = io.StringIO(), "performance " + "word " * 60
    handler = log_handler(Console(file=file, width=40))
    handler.handle(record(message))
    handler.handle(record("second"))
    first, second = file.getvalue().splitlines()
    assert first.endswith(f" INFO {message}")
    assert second.endswith(" INFO second")


def test_a_terminal_has_columns() -> None:
    assert isinstance(log_handler(Console(file=io.StringIO(), force_terminal=True)), RichHandler)


def test_what_is_no_terminal_is_not_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = "word " * 100
    open_console(stderr=True).print(text)
    assert capsys.readouterr().err.splitlines() == [text]
    monkeypatch.setenv("COLUMNS", "80")
    open_console().print(text)
    assert len(capsys.readouterr().out.splitlines()) > 5
