"""The errors that a user, a file or the cluster can cause, one class per place where the fix is.

Owns the hierarchy and nothing else. Every message follows one form: where + rule + got + fix. `assert` stays
for "this code is wrong". The command line maps `ConfigError`, `PlanError` and `DataError` raised before
training to exit code 2.
"""

from collections.abc import Sequence


class AiprodError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(AiprodError):
    """The configuration breaks one or more rules; all of them are reported at once.

    Args:
        problems: One message per broken rule, each with its file and dotted path.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class PlanError(ConfigError):
    """The configuration is well formed but cannot run with this data, model or world size."""


class DataError(AiprodError):
    """Media, manifests or latents are missing, unreadable or do not fit."""


class StorageError(DataError):
    """All data is out of reach: its storage or the network to it is down, or does not let this user in."""


class DiskError(AiprodError):
    """A disk is full, read-only, failing or gone, and does not take what a command writes."""


class EngineError(AiprodError):
    """The training engine or a process group cannot do what was asked."""


class CheckpointError(AiprodError):
    """A checkpoint is missing, incomplete, corrupt or belongs to another run."""


class HangError(AiprodError):
    """The data of the only rank did not come.

    Args:
        message: What blocked, and where.
        was_asked: Whether the process had been asked to stop.
    """

    def __init__(self, message: str, *, was_asked: bool = False) -> None:
        self.was_asked = was_asked
        super().__init__(message)


class DivergenceError(AiprodError):
    """Ranks hold different bits where all must hold the same; nothing of that was saved."""


class SpikeError(AiprodError):
    """Training went wrong more often than the run may go back, or there was nothing to go back to."""


class NonFiniteError(AiprodError):
    """A loss or a gradient became NaN or infinite and training stopped before it could be saved."""
