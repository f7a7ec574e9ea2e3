"""What of DeepSpeed's log is shown."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from aiprod_ds.engine.deepspeed_internals import quiet_logs

pytestmark = pytest.mark.slow  # loads deepspeed


@pytest.fixture(name="shown")
def _shown() -> Iterator[io.StringIO]:
    """What the handlers of DeepSpeed's logger write."""
    logger, shown = logging.getLogger("DeepSpeed"), io.StringIO()
    kept = logger.handlers[:], logger.filters[:], logger.level
    logger.handlers[:] = [logging.StreamHandler(shown)]
    yield shown
    logger.handlers[:], logger.filters[:], level = kept
    logger.setLevel(level)


def _log() -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.info("Rank 0 partition count [2]")
    logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
    logger.warning("overflow")


@pytest.mark.parametrize(
    ("level", "lines"),
    [(logging.INFO, ["overflow"]), (logging.DEBUG, ["Rank 0 partition count [2]", "overflow"])],
)
def test_warnings_are_shown_and_the_rest_when_all_is_asked_for(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch, level: int, lines: list[str]
) -> None:
    own = logging.getLogger("aiprod_ds")
    before = own.level
    own.setLevel(level)
    try:
        quiet_logs()
        quiet_logs()
        _log()
    finally:
        own.setLevel(before)
    assert shown.getvalue().splitlines() == lines
