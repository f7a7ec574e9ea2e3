"""What every trainer is: a configuration, a model, data and a unit, brought together for the loop.

Owns the order of preparation; `aiprod_ds.train.run` owns what happens after it. `video_vae.py`,
`audio_vae.py` and `diffusion.py` say how the model's strides are found, where clips come from and what the
unit is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.console import Console
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.trainers import TRAINERS
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.clip_list import ClipList, own_fingerprint
from aiprod_ds.data.own.values import require_range
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, DataError, PlanError
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.planner.evaluations import EvaluationCost, evaluation_cost
from aiprod_ds.report.summary import RunSummary
from aiprod_ds.train.planning.auto import recompute_here, search_here, this_machine
from aiprod_ds.train.planning.capacity import require_own_capacity
from aiprod_ds.train.planning.gpu_rules import prepare_gpu, require_runnable
from aiprod_ds.train.resume.data_change import change_since_saved, selection_of
from aiprod_ds.train.run import Prepared, evaluate_checkpoint, run_training
from aiprod_ds.train.unit import Evaluation, Unit
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.measures import require_known_measure
from aiprod_ds.trainers.own_data import HeldOut, StreamData

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Trainer(ABC, Generic[ConfigT]):
    """Trains a model through a curriculum.

    A class derived from it may take other arguments, as long as those here reach this constructor; the
    command line calls it with `config` and `source` alone, by name.

    Attributes:
        config_class: What `config` is an instance of; a file that names the trainer is read as that.

    Args:
        config: The whole configuration.
        model: A module to train in place of `config.model`.
        dataset: Training clips in place of `config.data.train`: a map-style dataset (any object with
            `__len__` and `__getitem__`, a list too), a DataLoader, an IterableDataset, another object that
            gives a new iterator whenever one is asked for, or one of these in a `ClipIterable`. Items, or the
            items that a loader's batches are cut into, are tensors, arrays or mappings as the trainer says.
        validation: Held-out clips, in the same forms. Without it `config.data.holdout_fraction` of a
            map-style dataset is held out; beside an iterable it is required, and of an iterable validation
            set the first `config.evaluation.max_clips` clips are read.
        value_range: What the values of floating items lie in: (-1, 1), (0, 1) or (0, 255). uint8 is in
            0..255 and int16 samples are of full scale whatever stands here. None: (-1, 1), and a dataset
            whose first items have no value below 0 is refused.
        source: How messages name the configuration.

    Raises:
        ConfigError: If `validation` or `value_range` comes without `dataset`, or the range is another one.
    """

    config_class: ClassVar[type[RunConfig]]

    def __init__(
        self,
        config: ConfigT,
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        validation: Any = None,
        value_range: tuple[float, float] | None = None,
        source: str = "configuration",
    ) -> None:
        for key, value in (("validation", validation), ("value_range", value_range)):
            if dataset is None and value is not None:
                raise ConfigError(
                    f"{type(self).__name__}: {key} has no effect without dataset, got one. Pass dataset too, "
                    "or name folders in the configuration."
                )
        self.value_range = require_range(value_range)
        self.config = config
        self.source = source
        self._model = model
        self._datasets = (dataset, validation)

    def _what_is_held_out(self) -> HeldOut:
        return HeldOut(fraction=self.config.data.holdout_fraction, max_clips=self.config.evaluation.max_clips)

    @cached_property
    @abstractmethod
    def strides(self) -> ModelStrides:
        """How the model divides its input; found without memory for weights."""

    @abstractmethod
    def _open_datasets(self, dataset: Any, validation: Any) -> ClipData:
        """Returns the clips of a user's own datasets."""

    @abstractmethod
    def _open_files(self) -> ClipData:
        """Returns the clips of the files that the configuration names."""

    @abstractmethod
    def build_unit(
        self,
        config: ConfigT,
        *,
        model: nn.Module,
        plan: RunPlan,
        data: ClipData,
        too_short: tuple[TooShort, ...],
    ) -> Unit:
        """Returns what the loop trains.

        Args:
            config: The trainer's own, or for estimates what `blank_config` leaves of it.
            model: With its weights, or on the meta device.
            plan: The phases.
            data: The clips.
            too_short: Those that some phase cannot use.
        """

    @abstractmethod
    def blank_clip(self, bucket: BucketPlan) -> dict[str, Tensor]:
        """Returns what a clip of that shape consists of, on the meta device: for estimates of memory and
        time."""

    def blank_unit(self, plan: RunPlan) -> Unit:
        """Returns the unit without weights and data, on the meta device: for estimates of memory and time."""
        clips = [self.blank_clip(plan.phases[-1].buckets[0])]
        return self.build_unit(
            blank_config(self.config),
            model=on_meta(self.shapes),
            plan=plan,
            data=self._open_datasets(clips, clips),
            too_short=(),
        )

    def plan(self, *, world_size: int = 1) -> RunPlan:
        """Returns the curriculum as it would run on `world_size` ranks; takes no memory for weights.

        Raises:
            PlanError: With every problem found.
        """
        plan = plan_run(self.config, world_size=world_size, strides=self.strides, source=self.source)
        path = f"{type(self).__module__}:{type(self).__qualname__}"
        # A class of a user's own may measure more than the one that it is derived from.
        if self.config.checkpoint.keep_best is not None and path in {each.path for each in TRAINERS.values()}:
            require_known_measure(self.config, self.measures(plan), self.source)
        return plan

    def measures(self, plan: RunPlan) -> tuple[str, ...]:  # noqa: ARG002  a trainer that knows them reads it
        """Returns the names of what evaluations may measure; empty where nobody knows."""
        return ()

    def evaluation_cost(self, plan: RunPlan) -> EvaluationCost:
        """Returns what the evaluations of the run cost beside training."""
        return evaluation_cost(plan, self.config, recompute_default=self._recompute_default())

    def preview_shapes(self, plan: RunPlan) -> tuple[tuple[str, BucketPlan], ...]:  # noqa: ARG002  see diffusion
        """Returns the shapes of clips to sample that are not a phase's, with the dotted path of each."""
        return ()

    def _recompute_default(self) -> bool:
        asked: str = self.config.performance.recompute
        if asked in {"none", "full"}:
            return asked == "full"
        return read_settings(self.config, source=self.source).activation_checkpointing

    def measure_notes(self, plan: RunPlan, data: ClipData) -> tuple[str, ...]:  # noqa: ARG002
        """Returns in words what is doubtful of the measures on the held-out clips of `data`."""
        return ()

    def num_parameters(self) -> int:
        """Returns the number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.shapes.parameters())

    def open_data(self) -> ClipData:
        """Reads the manifests on the main rank and gives every rank the same clips."""
        try:
            if self._datasets[0] is not None:
                return self._open_datasets(*self._datasets)
            return dist.from_main(self._open_files)
        except DataError as error:  # before training it is the configuration's data section that must change
            raise PlanError(f"{self.source}: data: {error}") from error

    def clip_list(self, data: ClipData) -> ClipList:
        """Returns the list of the clips of `data` that stands in checkpoints.

        Raises:
            DataError: If a file of latents cannot be read.
        """
        said = zip(("dataset", "validation"), map(own_fingerprint, self._datasets), strict=True)
        fingerprints = {f"{name}.fingerprint": value for name, value in said if value is not None}
        return data.clip_list(selection=selection_of(self.config), fingerprints=fingerprints)

    def data_change(self, data: ClipData) -> str | None:
        """Returns in words how `data` differs from what the run in `output_dir` had; None if it does not, or
        if there is no run that says.

        Raises:
            DataError: If a file of latents cannot be read.
        """
        return change_since_saved(Path(self.config.output_dir), partial(self.clip_list, data))

    def train(
        self, *, resume: str = "auto", accept_changed_data: bool = False, console: Console | None = None
    ) -> RunSummary:
        """Runs the whole training, or what is left of it.

        Args:
            resume: `auto` goes on from the newest checkpoint in `output_dir`; `never` starts anew and moves
                an old run aside; a path names a checkpoint folder.
            accept_changed_data: Goes on with other data than the run had, which is an error without it.
            console: Where progress is drawn; standard error by default. Log through the same one, or lines
                tear the display.

        Returns:
            What the report says; files are in `config.output_dir`.
        """
        return run_training(
            self._prepare(), resume=resume, accept_changed_data=accept_changed_data, console=console
        )

    def evaluate(self, *, resume: str = "auto") -> dict[str, float]:
        """Returns the held-out measures of a checkpoint: the newest in `output_dir`, or the folder that
        `resume` names.

        Raises:
            CheckpointError: If there is none.
        """
        return dict(self.evaluation(resume=resume).metrics)

    def evaluation(self, *, resume: str = "auto") -> Evaluation:
        """Returns what `evaluate` does, with the names of the clips that were measured, and of those that a
        measure leaves out.

        Raises:
            CheckpointError: If there is no checkpoint.
        """
        return evaluate_checkpoint(self._prepare(), resume=resume)

    @cached_property
    def shapes(self) -> nn.Module:
        """The model, on the meta device unless it was passed in."""
        if self._model is not None:
            return self._model
        return build_model(self.config.model, seed=self.config.seed, device="meta")

    def _prepare_gpu(self) -> None:
        machine = this_machine()
        if machine is not None:
            settings = read_settings(self.config, source=self.source)
            require_runnable(self.shapes, settings, machine, where=self.source)
            prepare_gpu(machine)

    def _prepare(self) -> Prepared:
        plan = self.plan(world_size=dist.world_size())
        self._prepare_gpu()
        data = self.open_data()
        plan = data.with_buckets(plan, self.source)
        too_short = data.check(plan, self.source)
        plan = data.with_lengths(plan, self.source)

        def build_unit(resolved: RunPlan) -> Unit:
            model = self._own_model()
            return self.build_unit(self.config, model=model, plan=resolved, data=data, too_short=too_short)

        return Prepared(
            config=self.config,
            plan=plan,
            build_unit=build_unit,
            search_now=partial(search_here, self),
            choose_recompute=partial(recompute_here, self),
            require_capacity=partial(require_own_capacity, self),
            source=self.source,
            clips=cache(partial(self.clip_list, data)),
            unread_clips=lambda names: frozenset(clip.name for clip in data.unread_for_training(plan, names)),
            can_begin_anew=self._model is None and not isinstance(data, StreamData),
        )

    def _own_model(self) -> nn.Module:
        return build_model(self.config.model, seed=self.config.seed) if self._model is None else self._model


def blank_config(config: ConfigT) -> ConfigT:
    """Returns `config` without what needs weights or files and changes no shape: previews and LoRA files."""
    evaluation = config.evaluation.model_copy(update={"num_pictures": 0})
    model = config.model.model_copy(
        update={
            key: None for key in ("lora_checkpoint", "lora_init") if key in type(config.model).model_fields
        }
    )
    update = {"evaluation": evaluation, "model": model}
    if (preview := getattr(config, "preview", None)) is not None:
        own = {"prompts": (), "prompts_file": None, "text": None, "every_updates": None}
        update["preview"] = preview.model_copy(update=own)
    return config.model_copy(update=update)
