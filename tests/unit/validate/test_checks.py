"""The ten checks hold here, and each finds what it is for: a wrong number, a wrong count."""

from __future__ import annotations

import pytest

from aiprod_ds.validate import losses, phases
from aiprod_ds.validate.check import CheckFailedError, Outcome, require_close, require_equal
from aiprod_ds.validate.run import Validation

CHECKS = {
    check.__name__: check
    for check in (
        losses.vae_configuration, losses.video_loss, losses.audio_loss, losses.spectral_loss,
        phases.three_phases, phases.scheduler_start, phases.step_transitions, phases.plateau,
        phases.custom_phases,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_holds_on_this_machine(name: str) -> None:
    assert len(CHECKS[name]()) > 10


@pytest.mark.slow
def test_the_perceptual_check_holds_with_random_weights() -> None:
    assert "0.25 apart" in losses.perceptual_loss()


def test_another_number_is_told_with_both() -> None:
    require_close("sum", 1.00001, 1.0)
    with pytest.raises(CheckFailedError, match=r"sum: must be 1, got 1\.0001"):
        require_close("sum", 1.0001, 1.0)
    with pytest.raises(CheckFailedError, match=r"sum: must be 0\.5, got nan"):
        require_close("sum", float("nan"), 0.5)


def test_another_value_is_told_with_both() -> None:
    with pytest.raises(CheckFailedError, match=r"ends: must be \[3, 5\], got \[3, 6\]"):
        require_equal("ends", [3, 6], [3, 5])


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("video_loss", ("aiprod_ds.losses.video.haar_l1", lambda *_: 0.0 * _[0].sum())),
        ("audio_loss", ("aiprod_ds.losses.spectral._POWER_EPSILON", 1e-6)),
        ("spectral_loss", ("aiprod_ds.losses.spectral._POWER_EPSILON", 1e-6)),
    ],
)
def test_a_wrong_formula_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: tuple[str, object]
) -> None:
    monkeypatch.setattr(*broken)
    with pytest.raises(CheckFailedError, match="must be"):
        CHECKS[name]()


def test_a_scheduler_that_ends_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiprod_ds.curriculum.plateau.PlateauState.reached", lambda *_: False)
    with pytest.raises(CheckFailedError, match="end with a constant loss"):
        phases.plateau()


def test_one_failure_fails_the_whole() -> None:
    good = Outcome(name="a", title="A", is_passed=True, seconds=0.1, detail="fine")
    bad = Outcome(name="b", title="B", is_passed=False, seconds=0.2, detail="wrong", advice="do")
    assert Validation(outcomes=(good,), seconds=1.0).is_passed
    found = Validation(outcomes=(good, bad), seconds=1.0)
    assert not found.is_passed
    document = found.document()
    assert document["passed"] is False
    assert document["checks"][1] == {
        "name": "b", "title": "B", "passed": False, "seconds": 0.2, "detail": "wrong", "advice": "do"
    }  # fmt: skip
