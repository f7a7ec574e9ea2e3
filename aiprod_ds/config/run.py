"""What every trainer's configuration is, and the sections that all share: engine, checkpoints, evaluation,
report.

Owns `RunConfig`, of which `video_vae.py`, `audio_vae.py` and `diffusion.py` derive theirs with data and
losses; the sections `model`, `optimizer` and `curriculum` are in files of their own. Nothing here is derived:
batch triples and phase bounds are computed in `aiprod_ds.curriculum.plan`, the DeepSpeed dictionary in
`aiprod_ds.config.deepspeed`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.model import LoraConfig, ModelConfig
from aiprod_ds.config.optim import EmaConfig, OptimizerConfig, SpikesConfig
from aiprod_ds.config.phase import BucketConfig, PhaseConfig, WeightRamp
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    FreeMapping,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    StrictModel,
)

# A user's own trainer, `my_package.module:MyTrainer`; `trainers` imports it, or says why it cannot.
TrainerPath = Annotated[str, Field(pattern="^[^:]+:[^:]+$")]


class EngineConfig(StrictModel):
    """Which engine owns parameters, gradients and optimizer state."""

    kind: Literal["deepspeed", "local"] = "deepspeed"
    """`local` runs the same precision and checkpointing in plain PyTorch on one process, as the control for
    numerics."""
    deepspeed_config: str | FreeMapping = "zero1_bf16"
    """The name of shipped settings, a file (looked for in the working folder, the folder of the file that
    names it and the folders above) or the mapping itself. It holds only what DeepSpeed owns: ZeRO stage,
    precision, activation checkpointing, offload, buckets."""
    lost_rank_seconds: PositiveFloat | None = 60.0
    """Silence after which a rank counts as gone and the others end with an error, instead of waiting for it.
    null: never."""
    hang_seconds: PositiveFloat | None = 60.0
    """Time without progress after which a run counts as hung; more where the same has taken longer before, 10
    times as much for evaluations and checkpoints, 30 times for the start, a change of phase and new shapes.
    null: never."""
    compare_ranks: bool = True
    """Compares the bits of what every rank holds alike (whole weights, buffers), all within 100 updates and
    before every save; a rank that holds others ends the run."""
    parallel: Literal["configured", "auto"] = "configured"
    """`auto` chooses ZeRO stage, offload, activation checkpointing and micro-batches: the fastest that fit
    the GPUs by the estimates of `plan --machine`. Of the DeepSpeed settings then count precision, loss scale
    and buckets. A resumed run keeps its choice."""
    on_lack_of_memory: Literal["stop", "go_on"] = "stop"
    """A phase that does not fit the GPUs by the estimates of `plan --machine`: end before anything is
    started, or warn and go on all the same."""
    flat_parameters: Literal["auto", "on", "off"] = "auto"
    """`auto` puts the weights of each repeated block into a few flat parameters, which DeepSpeed updates
    faster than many small ones; what cannot be a view of one stays as it is, and with `on` is an error.
    Checkpoints are the same."""

    @rule
    def _flat_parameters_have_an_effect(self) -> Iterator[str]:
        if self.kind == "local" and self.flat_parameters == "on":
            yield "flat_parameters: on has no effect with kind: local, got both. Remove one of the two."


class PerformanceConfig(StrictModel):
    """How a run computes; no choice but `fp8` changes the result beyond the rounding of its precision. The
    report says what was chosen, and why."""

    compile: Literal["auto", "off", "blocks"] = "auto"
    """`blocks` makes kernels of the model's repeated blocks, once for each shape, by torch.compile. `auto`
    does so on GPUs where it can."""
    graphs: Literal["auto", "off", "passes"] = "auto"
    """`passes` captures the forward and the backward pass of a micro-batch as CUDA graphs, once for each
    shape, in phases that recompute nothing. `auto` does so on GPUs where it can."""
    attention: Literal["auto", "torch", "cudnn"] = "auto"
    """Whose attention kernel: `torch` lets torch choose, `cudnn` takes cuDNN's wherever it can. `auto` takes
    cuDNN's on GPUs of compute capability 9.x (H100, H200)."""
    activation_memory_budget: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Share of its activations that a compiled block keeps for the backward pass; the rest is computed again,
    what costs least first. 1: what is fastest."""
    recompute: Literal["configured", "none", "full", "every_n", "auto"] = "configured"
    """Which of the repeated blocks are computed again in the backward pass, in phases without an
    `activation_checkpointing` of their own: all (`full`), every n-th, or none; `configured` as the DeepSpeed
    settings say. `auto` takes, by the estimates of `plan --machine`, the fewest with which a phase fits the
    GPUs."""
    recompute_every: Annotated[int, Field(ge=2)] = 2
    """The n of `recompute: every_n`."""
    fp8: Literal["off", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "off"
    """Products of the trained linear layers of blocks in 8 bits, by torchao's recipe of that name, from the
    fastest to the most exact. Needs bf16, compiled blocks and a GPU of compute capability 8.9 or newer."""
    deterministic: bool = False
    """Takes kernels alone that give the same sums every time, and ends with an error where there is none.
    Slower; on a CPU all are."""


class KeepBestConfig(StrictModel):
    """Keeps the checkpoints with the best held-out measure, beside the last ones. An evaluation inside a
    phase that finds a new best is followed by a save, so that the best is never lost."""

    metric: str = Field(min_length=1)
    """A held-out measure, as `aiprod-ds eval` prints it: `psnr_db`, `mel_distance`, `loss`, ..."""
    count: PositiveInt = 1
    """Checkpoints to keep for it."""
    mode: Literal["min", "max"]
    """Whether the lowest or the highest value is the best."""


class CheckpointConfig(StrictModel):
    """When to save: every so many updates, at every phase edge and at the end; and what to keep of it."""

    every_updates: PositiveInt = 500
    """Updates between two saves, counted over the whole run."""
    keep_last: PositiveInt | None = None
    """Newest checkpoints to keep; older ones are deleted once a new one is whole. null: nothing is
    deleted."""
    keep_every_updates: PositiveInt | None = None
    """Also keeps the checkpoints at multiples of it; itself a multiple of `every_updates`. Needs
    `keep_last`."""
    keep_best: KeepBestConfig | None = None
    """Also keeps the best of those that were measured. Needs `keep_last`."""
    self_contained: bool = False
    """While adapters are trained: hold the frozen weights in every checkpoint. false: a checkpoint refers to
    what the run started from, or to one copy in `checkpoints/bases/` if the run has changed it."""
    asynchronous: bool = False
    """Copies the state to the host's memory and writes it while training goes on. It takes as much memory as
    all checkpoint files of the ranks on one host; without room for it, a run saves as with `false` and its
    report says so."""
    on_full_disk: Literal["stop", "go_on"] = "stop"
    """Where the disk takes no checkpoint, because it is full, read-only, failing or gone: end the run with an
    error, or warn, train on and try again at the next save."""

    @rule
    def _rules_have_an_effect(self) -> Iterator[str]:
        for key in ("keep_every_updates", "keep_best"):
            if self.keep_last is None and getattr(self, key) is not None:
                yield (
                    f"{key}: has no effect without keep_last, which null keeps everything, got a value. Set "
                    "keep_last or remove it."
                )
        if self.keep_every_updates is not None and self.keep_every_updates % self.every_updates:
            yield (
                f"keep_every_updates: must be a multiple of every_updates ({self.every_updates}), got "
                f"{self.keep_every_updates}."
            )


class EvaluationConfig(StrictModel):
    """How held-out clips are measured: before training, at the end of every phase and where an interval says
    so; always in the shape of the last phase, so that figures compare across phases."""

    every_updates: PositiveInt | None = None
    """Updates between two evaluations inside phases, counted over the whole run. null: none by updates."""
    every_samples: PositiveInt | None = None
    """Training clips between two evaluations inside phases, for phases whose batches differ. null: none by
    samples."""
    max_clips: PositiveInt = 16
    """Held-out clips that are measured: the first that are long enough."""
    num_pictures: NonNegativeInt = 4
    """Clips shown as pictures, of those that are measured."""
    keep_media: PositiveInt = 16
    """Evaluations inside phases whose pictures, films and sounds are kept, evenly spread over the run; of the
    others the measures stay."""


class WandbConfig(StrictModel):
    """Weights & Biases mirror; a failure of it never stops training."""

    mode: Literal["online", "offline", "off"] = "off"
    """`offline` writes into the run folder only; `online` needs an API key."""
    entity: str | None = None
    """The user or team that the run belongs to. null: the default of the API key."""
    project: str = "aiprod_ds"
    """The project's name at the service."""
    group: str | None = None
    """Runs of one group are shown together."""
    name: str | None = None
    """The run's name at the service. null: the name of the run folder."""
    notes: str | None = None
    """What is written beside the run at the service."""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    """Tags of the run at the service."""


class ReportConfig(StrictModel):
    """Metrics and the run report."""

    flush_updates: PositiveInt = 10
    """Updates between two readings of the metrics from the device; then they are reduced over ranks and
    written."""
    tensorboard: bool = False
    """Mirrors metrics, pictures, films and sounds into `tensorboard/` of the run folder; needs the extra
    `tensorboard`."""
    on_full_disk: Literal["stop", "go_on"] = "go_on"
    """Where the disk takes nothing of all that is no checkpoint, because it is full, read-only, failing or
    gone: save and end the run with an error, or warn, train on, and write it once the disk takes it again."""
    wandb: WandbConfig = WandbConfig()
    """Mirrors metrics, pictures, films and sounds to Weights & Biases."""


class RunConfig(StrictModel):
    """What the curriculum, the engines, the loop and the reports need to know of any training run."""

    has_adapters: ClassVar[bool] = False
    """Whether phases may train adapters."""
    has_stages: ClassVar[bool] = False
    """Whether phases may train parts of the model, and weights of the loss may move inside a phase."""

    trainer: str
    """What is trained."""
    output_dir: str = Field(min_length=1)
    """The run folder, relative to the working folder; `--output-dir` replaces it."""
    seed: Seed = 0
    """Of every random stream: weights, data order, clips, noise."""
    model: ModelConfig
    """The network."""
    data: ClipDataConfig
    """The clips."""
    curriculum: CurriculumConfig
    """The phases."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the loss is minimised."""
    spikes: SpikesConfig = SpikesConfig()
    """What happens where training goes wrong."""
    ema: EmaConfig | None = None
    """Keeps an average of the weights, which is evaluated and exported in their place. null: the weights
    themselves are."""
    engine: EngineConfig = EngineConfig()
    """What it runs on: ZeRO stage, precision, offload."""
    performance: PerformanceConfig = PerformanceConfig()
    """How it computes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on held-out clips."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""

    @rule
    def _phases_weigh_known_terms(self) -> Iterator[str]:
        known = self.loss_weights()
        for index, phase in enumerate(self.curriculum.phases):
            for name, value in phase.loss.items():
                if name not in known:
                    yield (
                        f"curriculum.phases[{index}].loss.{name}: is not a weight of the loss section, got "
                        f"{value}. {suggestion(name, known)}"
                    )

    @rule
    def _adapters_have_an_effect(self) -> Iterator[str]:
        phases = self.curriculum.phases
        for index, phase in enumerate(phases):
            for key in ("training_mode", "lora"):
                if not self.has_adapters and getattr(phase, key) is not None:
                    yield (
                        f"curriculum.phases[{index}].{key}: has no effect for trainer {self.trainer}, got a "
                        "value. Remove it."
                    )
        if self.checkpoint.self_contained and all(self.phase_adapters(phase) is None for phase in phases):
            yield (
                "checkpoint.self_contained: has no effect unless a phase trains adapters, got true. Remove "
                "it."
            )

    @rule
    def _stages_have_an_effect(self) -> Iterator[str]:
        previous: PhaseConfig | None = None
        for index, phase in enumerate(self.curriculum.phases):
            where = f"curriculum.phases[{index}]"
            ramps = [f"loss.{name}" for name, value in phase.loss.items() if isinstance(value, WeightRamp)]
            given = [key for key in ("decoder_only", "frozen", "latents") if getattr(phase, key)]
            for key in () if self.has_stages else (*given, *ramps):
                value = "a weight that moves" if key in ramps else "a value"
                yield f"{where}.{key}: has no effect for trainer {self.trainer}, got {value}. Remove it."
            trains_others = previous is not None and phase.trained_part != previous.trained_part
            if trains_others and phase.moments in {"keep", "decay"}:
                yield (
                    f"{where}.moments: must be reset where other parameters are trained, got "
                    f"{phase.moments}. Remove it: a new optimizer begins with the phase."
                )
            previous = phase

    @rule
    def _chosen_by_auto(self) -> Iterator[str]:
        if self.engine.parallel != "auto":
            return
        if self.engine.kind == "local":
            yield "engine.parallel: auto has no effect with kind: local, got both. Remove one of the two."
        for where, shape in self.phase_shapes():
            for key in ("micro_batch_size", "accumulation"):
                if getattr(shape, key) is not None:
                    yield (
                        f"{where}.{key}: is chosen by engine.parallel: auto, got a value. Give "
                        "global_batch_size alone."
                    )
        for index, phase in enumerate(self.curriculum.phases):
            for key in (
                "activation_checkpointing",
                *(("micro_batch_size", "accumulation") if phase.listed_buckets else ()),
            ):
                if getattr(phase, key) is not None:
                    where = f"curriculum.phases[{index}].{key}"
                    yield f"{where}: is chosen by engine.parallel: auto, got a value. Remove it."

    def phase_adapters(self, phase: PhaseConfig) -> LoraConfig | None:  # noqa: ARG002  a diffusion run reads it
        """Returns the adapters that `phase` trains; None if it trains the weights themselves."""
        return None

    def has_previews(self) -> bool:
        """Returns whether evaluations may sample clips."""
        return False

    def preview_updates(self) -> int | None:
        """Returns the updates between two previews inside phases; None if there are none."""
        return None

    @abstractmethod
    def loss_weights(self) -> dict[str, float]:
        """Returns the weights of the trainer's loss that a phase may override, by name."""

    @abstractmethod
    def random_flip(self) -> bool:
        """Returns whether training clips are mirrored at random unless a phase says otherwise."""

    @abstractmethod
    def clip_rate_hz(self) -> float | None:
        """Returns the rate that all clips have, in frames (of sound: samples) per second; None if each has
        its own."""

    def phase_shapes(self) -> Iterator[tuple[str, PhaseConfig | BucketConfig]]:
        """Yields every shape of every phase with the dotted path of what holds it."""
        for index, phase in enumerate(self.curriculum.phases):
            where = f"curriculum.phases[{index}]"
            if not phase.listed_buckets:
                yield where, phase
            for number, bucket in enumerate(phase.listed_buckets):
                yield f"{where}.buckets[{number}]", bucket
