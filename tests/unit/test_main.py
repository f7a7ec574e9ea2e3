"""The module as a program."""

from __future__ import annotations

import gc
import runpy
import sys

import pytest


def test_the_interpreter_ends_without_a_look_at_every_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aiprod_ds", "--help"])
    before = gc.get_freeze_count()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("aiprod_ds", run_name="__main__")
        assert ended.value.code == 0
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()
    assert "usage: aiprod-ds" in capsys.readouterr().out
