"""What goes wrong with the data while a run trains: clips that cannot be read, and workers that die.

Owns the list of the clips, which each rank finds for itself and all agree on at a save, its words in the log
and in the error, and how many are too many. What takes their place is `aiprod_ds.data.reading`'s; the loop
hands the list to the loader and the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine import dist
from aiprod_ds.errors import DataError

_LOG = logging.getLogger(__name__)
_MAX_NAMED = 5


@dataclass(slots=True, kw_only=True)
class DataFaults:
    """The faults of one run.

    Attributes:
        num_clips: For training, as the scan found them.
        max_fraction: Of them; more that cannot be read stop the run.
        agreed: Name -> reason, by name: the clips that all ranks knew of at the last save. Stands in the
            checkpoint.
        worker_restarts: Starts after deaths of workers, of all ranks until the last save.
    """

    num_clips: int
    max_fraction: float
    agreed: dict[str, str] = field(default_factory=dict)
    worker_restarts: int = 0
    _found: dict[str, str] = field(default_factory=dict)  # by this rank since the last save, as the next
    _restarts: int = 0

    @property
    def known(self) -> Mapping[str, str]:
        """Name -> reason of all that this rank knows of."""
        return {**self._found, **self.agreed}

    @property
    def are_too_many(self) -> bool:
        """Whether this rank knows of more than `max_fraction` allows."""
        found = sum(name not in self.agreed for name in self._found)
        return len(self.agreed) + found > self.max_fraction * self.num_clips

    def note(self, batch: MicroBatch) -> None:
        """Remembers what went wrong before a micro-batch came, and logs each clip once."""
        self._restarts += batch.restarts
        for clip in batch.unread:
            if clip.name not in self._found and clip.name not in self.agreed:
                self._found[clip.name] = clip.reason
                self._log(clip.name, clip.reason)

    def merge(self) -> bool:
        """Adds up what the ranks found and returns whether the list grew. Collective.

        Of a clip that several ranks found, the reason that sorts first counts.
        """
        before = len(self.agreed)
        gathered = dist.gather_objects((self._found, self._restarts))
        pairs = sorted({pair for found, _ in gathered for pair in found.items()}, reverse=True)
        news = {name: reason for name, reason in pairs if name not in self.agreed}
        for name in sorted(news.keys() - self._found.keys()):
            self._log(name, news[name])
        self.agreed = dict(sorted({**self.agreed, **news}.items()))
        self.worker_restarts += sum(restarts for _, restarts in gathered)
        self._found, self._restarts = {}, 0
        return len(self.agreed) > before

    def require_few(self) -> None:
        """Checks what all ranks have agreed on, so that all go on or none.

        Raises:
            DataError: If it is more than `max_fraction` of the clips; names them.
        """
        count = len(self.agreed)
        if count <= self.max_fraction * self.num_clips:
            return
        named = "; ".join(f"{name} ({reason})" for name, reason in list(self.agreed.items())[:_MAX_NAMED])
        more = f"; and {count - _MAX_NAMED} more, see report.json" if count > _MAX_NAMED else ""
        raise DataError(
            f"data.train: at most {self.max_fraction:.0%} of the clips may be unreadable in training, got "
            f"{count} of {self.num_clips}: {named}{more}. The run is saved: repair these files, or raise "
            "data.max_unreadable_fraction, and start it again."
        )

    def _log(self, name: str, reason: str) -> None:
        _LOG.warning("clip_replaced name=%s reason=%s", name, reason)
