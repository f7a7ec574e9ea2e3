"""All checks in their order, and what came of each.

Owns the list and the clock; what is checked is in `losses.py`, `phases.py` and `training.py`. Called by the
command line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aiprod_ds.validate.check import Check, CheckFailedError, Outcome
from aiprod_ds.validate.training import KINDS, Trainings

_OF_NUMBERS = (
    "This machine computes another number than the formula: install the versions of constraints.txt anew, "
    "and report "
    "it with the output of --json."
)
_OF_TRAINING = (
    "`aiprod-ds doctor` examines the machine; DS_ACCELERATOR=cpu says whether it is the GPU. docs/install.md "
    "names "
    "versions that work together."
)
_TITLES = {"video_vae": "video VAE", "audio_vae": "audio VAE", "diffusion": "diffusion transformer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What came of all checks."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def is_passed(self) -> bool:
        """Whether every check is."""
        return all(outcome.is_passed for outcome in self.outcomes)

    def document(self) -> dict[str, Any]:
        """Returns everything for JSON."""
        from aiprod_ds.report.environment import describe_environment  # loads torch

        environment = describe_environment()
        return {
            "format": 1,
            "passed": self.is_passed,
            "seconds": self.seconds,
            **{key: environment[key] for key in ("versions", "hardware", "platform")},
            "checks": [outcome.document() for outcome in self.outcomes],
        }


def validate(tell: Callable[[Outcome], None] = lambda _: None) -> Validation:
    """Does all checks; the trainings run beside the others.

    Args:
        tell: Gets each outcome as it is known.
    """
    began = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_validate_") as folder:
        trainings = Trainings(Path(folder))
        try:
            for check in _checks(trainings):
                outcomes.append(_done(check))
                tell(outcomes[-1])
        finally:
            trainings.close()
    return Validation(outcomes=tuple(outcomes), seconds=time.monotonic() - began)


def _done(check: Check) -> Outcome:
    began = time.monotonic()
    outcome = partial(Outcome, name=check.name, title=check.title)
    try:
        detail = check.work()
        advice = "" if check.note is None else check.note()
    except Exception as error:  # noqa: BLE001  a broken installation may fail anyhow; the other checks go on
        known = isinstance(error, CheckFailedError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        return outcome(is_passed=False, seconds=time.monotonic() - began, detail=words, advice=check.advice)
    seconds = time.monotonic() - began if check.took is None else check.took()
    return outcome(is_passed=True, seconds=seconds, detail=detail, advice=advice)


def _checks(trainings: Trainings) -> tuple[Check, ...]:
    from aiprod_ds.validate import losses, phases  # load torch, while the trainings have begun

    of_numbers = partial(Check, advice=_OF_NUMBERS)
    return (
        of_numbers(name="vae_configuration", title="VAE configuration", work=losses.vae_configuration),
        of_numbers(
            name="video_loss", title="video loss: reconstruction, KL, perceptual", work=losses.video_loss
        ),
        of_numbers(
            name="audio_loss", title="audio loss: reconstruction, KL, spectral", work=losses.audio_loss
        ),
        of_numbers(
            name="perceptual_loss",
            title="perceptual loss: VGG16, and without it",
            work=losses.perceptual_loss,
            note=losses.vgg_note,
        ),
        of_numbers(name="spectral_loss", title="spectral STFT loss", work=losses.spectral_loss),
        of_numbers(name="three_phases", title="three-phase curriculum", work=phases.three_phases),
        of_numbers(name="scheduler_start", title="scheduler: start", work=phases.scheduler_start),
        of_numbers(
            name="step_transitions", title="scheduler: phases by updates", work=phases.step_transitions
        ),
        of_numbers(name="plateau", title="scheduler: phases by plateau", work=phases.plateau),
        of_numbers(name="custom_phases", title="phases of one's own", work=phases.custom_phases),
        *(
            Check(
                name=f"train_{kind}",
                title=f"{_TITLES[kind]}: update, save, kill, resume",
                work=partial(trainings.check, kind),
                took=partial(trainings.seconds, kind),
                advice=_OF_TRAINING,
            )
            for kind in KINDS
        ),
    )
