"""What a trainer supplies to the loop: the module, its data and its loss. The loop, the engine and the
checkpoints are shared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.protocol import Engine, ParameterGroup
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.metrics.evaluations import Medium, NotJudged
from aiprod_ds.report.summary import DataSummary
from aiprod_ds.snapshot import Snapshot, StateReader


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipWork:
    """What one clip of training takes.

    Attributes:
        tokens: Of all modalities.
        flops: Forward and backward, recomputation not counted, by the convention of the model's family; None
            where it cannot be told.
    """

    tokens: int
    flops: float | None


class Stream(Protocol):
    """The micro-batches of one phase, from an exact position."""

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches, without end."""

    def bucket_at(self, position: int) -> int:
        """Returns which bucket of the phase the global batch at `position` is in."""

    def epoch_at(self, position: int) -> int:
        """Returns the completed passes over the phase's data before `position`."""

    def leave_out(self, names: Collection[str]) -> None:
        """Replaces the clips of these names, without reading them, in all that is yielded from now on."""

    def state_at(self, position: int) -> Mapping[str, Any]:
        """Returns what a resumed run needs of this rank beside the clock to begin at `position`, where the
        clock stands; JSON-ready, on all ranks empty if it needs nothing."""

    def restore(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from where each rank's `state_at` was asked, before anything is read; empty if none said
        anything. Of another phase it takes what all phases begin with.

        Raises:
            CheckpointError: If what was saved does not fit this data.
            DataError: If the data is not what it was.
        """

    def close(self) -> None:
        """Ends the workers. Idempotent."""


@runtime_checkable
class NamedStream(Stream, Protocol):
    """A stream that knows which clips make an update."""

    def clips_at(self, position: int) -> Sequence[str]:
        """Returns the names of the clips of the global batch at `position`, whether it was yielded or not."""


class Part(Flag):
    """What an evaluation consists of; each has an interval of its own."""

    NONE = 0
    MEASURES = 1
    """Held-out clips through the model, and pictures, films or sounds of them."""
    PREVIEWS = 2
    """Clips sampled from prompts; only diffusion makes them."""
    ALL = 3


class EvaluationStoppedError(Exception):
    """Leaves an evaluation that nobody waits for, on all ranks at the same place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What is asked of a unit.

    Attributes:
        parts: What to make; a unit without previews is asked for none.
        go_on: Called between two forwards, by every rank as often: raises `EvaluationStoppedError` on all of
            them once the run is to stop. Collective.
    """

    parts: Part = Part.ALL
    go_on: Callable[[], None] = lambda: None


class Examples(Protocol):
    """A few held-out clips, as they are and through the model, or clips that it has sampled."""

    def save(self, folder: Path, name: str, *, title: str, moment: str) -> tuple[Medium, ...]:
        """Writes `<name>.png` with `title` on top, and whatever else shows this kind of clip, into `folder`.

        A clip's own caption names the `moment` alone: the measure in the title is the mean of all clips.

        Returns:
            What was written, the sheet first; paths begin with the folder's own name.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out measures, equal on all ranks, and a few clips to look at or to hear (main rank only).

    Attributes:
        metrics: Measure -> value, without the `evaluation/` prefix; empty where none were asked for.
        headline: The measure to print over the examples, in words.
        examples: Clips before and after the model; None where there is nothing to show.
        clips: Names of the held-out clips that were measured, in order.
        not_judged: Which of them some measure leaves out, and why.
    """

    metrics: Mapping[str, float]
    headline: str
    examples: Examples | None
    clips: tuple[str, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()


class Unit(Protocol):
    """One kind of training. Everything it trains is reached through `engine(...)`."""

    @property
    def module(self) -> nn.Module:
        """What the engine trains."""

    @property
    def can_capture(self) -> bool:
        """Whether `loss` depends on the tensors of a micro-batch and the phase alone, draws nothing and never
        waits for the device."""

    def prepare(self, phase: PhasePlan) -> None:
        """Makes the module have what `phase` trains, and mark it. Called while no engine holds the module."""

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Returns the trained parameters by optimizer settings."""

    def open_stream(self, phase: PhasePlan, clock: Clock, *, rank: int, world_size: int) -> Stream:
        """Returns the data of `phase` from where `clock` stands."""

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> Mapping[str, Tensor]:
        """Returns what chance adds to the tensors of a micro-batch, on the CPU; the loader's workers call it.

        Args:
            tensors: The clips, stacked name by name.
            places: Of each clip: phase, position and ordinal in the global order. A draw depends on it alone.
        """

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Runs the module forward on one micro-batch and returns its loss."""

    def clip_work(self, batch: MicroBatch) -> ClipWork | None:
        """Returns what a clip of `batch` takes; None for a model without tokens."""

    def evaluate(self, engine: Engine, request: EvaluationRequest) -> Evaluation:
        """Measures held-out clips. Collective; draws nothing from the training's random streams.

        Raises:
            EvaluationStoppedError: If `request.go_on` has raised it.
        """

    def num_sampled_shapes(self) -> int:
        """Returns in how many shapes previews run the module beside those of the phases."""

    def export(self, engine: Engine, folder: Path) -> None:
        """Writes the trained model for others, and what they need to know of its latents. Collective; the
        main rank writes."""

    def data_summary(self) -> DataSummary:
        """Returns what the run trains on and what it could not use."""

    def replacements(self) -> tuple[str, ...]:
        """Returns everything done in place of what was asked, in words."""


class Companion(Protocol):
    """What is trained beside the module, by an engine of its own, inside the unit's loss: a discriminator.

    Its updates end with the module's. Checkpoints hold it; averages, evaluations and exports know nothing of
    it.
    """

    def begin_update(
        self, clock: Clock, *, phase: PhasePlan, bucket: BucketPlan, learning_rate: float
    ) -> None:
        """Prepares for the micro-batches of an update.

        Args:
            clock: Before the update.
            phase: That it is in.
            bucket: Whose batch it has.
            learning_rate: That the module has.
        """

    def metrics(self) -> Mapping[str, float | Tensor]:
        """Returns what the update that has ended brings beside the terms of the loss; the same names on all
        ranks."""

    def capture(self) -> Snapshot:
        """Returns what this rank writes into a checkpoint, as `Engine.capture` does; without a loss scale."""

    def restore(self, source: StateReader) -> None:
        """Takes over what `capture` gave, whatever its ranks and ZeRO stage. Collective.

        Raises:
            CheckpointError: If it is of another network, or cannot be read.
        """

    def close(self) -> None:
        """Releases everything. Idempotent."""


@runtime_checkable
class UnitWithCompanion(Unit, Protocol):
    """A unit that may train something beside its module."""

    def open_companion(self, settings: DeepSpeedSettings) -> Companion | None:
        """Returns what `loss` trains from now on; None if the configuration asks for none. Collective.

        Called before the module's engine is built: of two DeepSpeed engines the last one built decides how
        all linear layers run.

        Args:
            settings: Of the module's engine.
        """
