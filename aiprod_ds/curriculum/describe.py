"""The plan as rows, totals and points, for the `plan` command, plan.json, the report and plots. Prints
nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan, UpdateRange
from aiprod_ds.curriculum.strides import ModelStrides

ClipCounts = Sequence[Sequence[int]]


class CurvePoint(NamedTuple):
    """The learning rate of one update of the run, counted from 0, and the index of its phase."""

    update: int
    phase: int
    learning_rate: float


def describe(
    plan: RunPlan,
    *,
    config: RunConfig | None = None,
    strides: ModelStrides | None = None,
    clips: ClipCounts | None = None,
) -> list[dict[str, Any]]:
    """Returns one JSON-ready row for every bucket of every phase, in order.

    `first_update`, `last_update`, `updates`, `samples` and `epochs` stand three times: exact (None when the
    data or the loss decides), with `min_` and with `max_` (None when nothing bounds it). `samples` and
    `epochs` of several buckets follow their shares, so a run may differ from them by an update.

    | key | meaning |
    |---|---|
    | `phase`, `name`, `bucket` | index and name of the phase, index of the bucket in it |
    | `height`, `width` | of a clip, in pixels |
    | `requested_frames`, `frames`, `frame_rate_hz` | frames asked for and used; a null rate: the clip's own |
    | `share` | of the phase's updates; from the clips where the configuration has none; null: unknown |
    | `global_batch_size`, `micro_batch_size`, `accumulation` | the first is the others' product x ranks |
    | `ends_by` | the rules that end the phase, joined by `or` |
    | `end` | `limit_updates`, `minimum_updates`, `epochs`, `plateau` as configured; null: no such rule |
    | `first_update`, `last_update` | of the phase in the run, counted from 0: the next begins one later |
    | `updates` | of the phase, all buckets together |
    | `samples` | clips that the bucket gives over all ranks |
    | `clips`, `epochs` | clips that the bucket can use, and passes over them; null: the data was not read |
    | `pixels_per_update`, `latent_tokens_per_update` | over all ranks; tokens are null without `strides` |
    | `learning_rate_max`, `learning_rate_final` | the peak, and the rate at the phase's longest end |
    | `schedule`, `warmup_updates` | shape and warm-up of the learning rate |
    | `weight_decay`, `loss_weights`, `random_flip` | in force |
    | `activation_checkpointing` | in force; null: as the engine's settings say |
    | `training_mode`, `lora_rank` | `full` or `lora`, and the rank of the adapters; null under `full` |
    | `moments`, `moment_scale` | what happens to the optimizer's moments at the start of the phase |
    | `overrides` | those of the last four lines that differ from the trainer's `config`; null without it |

    Args:
        plan: After `with_epoch_lengths` where the data was read; else bounds of lengths may be open.
        config: Of the run; needed for `overrides`.
        strides: Of the model; needed for the latent tokens.
        clips: How many clips each bucket of each phase can use; needed for `clips`, `epochs` and a share that
            follows from it.
    """
    rows = []
    for phase in plan.phases:
        counts = None if clips is None else clips[phase.index]
        shares = _shares(phase, counts)
        for index, bucket in enumerate(phase.buckets):
            count = None if counts is None else counts[index]
            row = _shape_columns(phase, index, bucket, strides) | {"share": shares[index], "clips": count}
            row |= _length_columns(phase, bucket, share=shares[index], clips=count) | _setting_columns(phase)
            rows.append(row | {"overrides": None if config is None else _overrides(phase, config)})
    return rows


def totals(plan: RunPlan, *, clips: ClipCounts | None = None) -> dict[str, int | None]:
    """Returns `updates`, `samples` and `pixels` of the whole run, each exact, with `min_` and with `max_`, as
    in `describe`."""
    samples = pixels = UpdateRange(minimum=0, maximum=0)
    for phase in plan.phases:
        shares = _shares(phase, None if clips is None else clips[phase.index])
        samples += _over_phase(phase, shares, lambda bucket: bucket.global_batch_size)
        pixels += _over_phase(phase, shares, lambda bucket: bucket.pixels_per_update)
    return _bounds("updates", plan.total) | _bounds("samples", samples) | _bounds("pixels", pixels)


def learning_rate_curve(plan: RunPlan, points: int) -> list[CurvePoint]:
    """Returns about `points` points in order, every phase's edges and warm-up ends among them.

    Phases of open length are drawn at their longest; one without a limit at its warm-up and as much again, at
    least 1.
    """
    lengths = [_drawn_length(phase) for phase in plan.phases]
    step = max(1, sum(lengths) // max(points, 1))
    curve: list[CurvePoint] = []
    first = 0
    for phase, length in zip(plan.phases, lengths, strict=True):
        rate = phase.learning_rate
        chosen = {*range(0, length, step), max(rate.warmup_updates - 1, 0), length - 1}
        curve += [
            CurvePoint(first + update, phase.index, rate.at(update))
            for update in sorted(chosen)
            if update < length
        ]
        first += length
    return curve


def _shape_columns(
    phase: PhasePlan, index: int, bucket: BucketPlan, strides: ModelStrides | None
) -> dict[str, Any]:
    return {
        "phase": phase.index,
        "name": phase.name,
        "bucket": index,
        "height": bucket.height,
        "width": bucket.width,
        "requested_frames": bucket.requested_frames,
        "frames": bucket.frames,
        "frame_rate_hz": bucket.frame_rate_hz,
        "global_batch_size": bucket.global_batch_size,
        "micro_batch_size": bucket.micro_batch_size,
        "accumulation": bucket.accumulation,
        "pixels_per_update": bucket.pixels_per_update,
        "latent_tokens_per_update": None if strides is None else _latent_tokens(bucket, strides),
    }


def _length_columns(
    phase: PhasePlan, bucket: BucketPlan, *, share: float | None, clips: int | None
) -> dict[str, Any]:
    after = phase.first + phase.length
    last = UpdateRange(
        minimum=after.minimum - 1, maximum=None if after.maximum is None else after.maximum - 1
    )
    samples = None if share is None else _scaled(phase.length, share, bucket.global_batch_size)
    columns: dict[str, Any] = {
        "ends_by": _ends_by(phase),
        "end": {
            "limit_updates": phase.end.limit_updates,
            "minimum_updates": phase.end.minimum_updates,
            "epochs": phase.end.epochs,
            "plateau": None if phase.end.plateau is None else phase.end.plateau.model_dump(mode="json"),
        },
    }
    columns |= (
        _bounds("first_update", phase.first) | _bounds("last_update", last) | _bounds("updates", phase.length)
    )
    return columns | _bounds("samples", samples) | _epochs(phase, bucket, share=share, clips=clips)


def _setting_columns(phase: PhasePlan) -> dict[str, Any]:
    rate, limit = phase.learning_rate, phase.length.maximum
    return {
        "learning_rate_max": rate.highest,
        "learning_rate_final": rate.highest if limit is None else rate.at(limit - 1),
        "schedule": rate.kind,
        "warmup_updates": rate.warmup_updates,
        "weight_decay": phase.weight_decay,
        "loss_weights": dict(phase.loss_weights),
        "random_flip": phase.random_flip,
        "activation_checkpointing": phase.activation_checkpointing,
        "training_mode": phase.training_mode,
        "lora_rank": None if phase.adapters is None else phase.adapters.rank,
        "moments": phase.moments,
        "moment_scale": phase.moment_scale,
    }


def _overrides(phase: PhasePlan, config: RunConfig) -> dict[str, Any]:
    own = {
        "weight_decay": config.optimizer.weight_decay,
        "augment.random_flip": config.random_flip(),
        "moments": "keep",
    }
    own |= {f"loss.{name}": weight for name, weight in config.loss_weights().items()}
    in_force = {
        "weight_decay": phase.weight_decay,
        "augment.random_flip": phase.random_flip,
        "moments": phase.moments,
    }
    in_force |= {f"loss.{name}": weight for name, weight in phase.loss_weights.items()}
    found: dict[str, Any] = {name: value for name, value in in_force.items() if value != own[name]}
    if phase.activation_checkpointing is not None:
        found["activation_checkpointing"] = phase.activation_checkpointing
    if phase.training_mode != getattr(config, "training_mode", phase.training_mode):
        found["training_mode"] = phase.training_mode
    found |= {f"loss.{name}": ramp.model_dump() for name, ramp in phase.loss_ramps.items()}
    if phase.decoder_only:
        found["decoder_only"] = True
    if phase.frozen:
        found["frozen"] = list(phase.frozen)
    if phase.latents != "sample":
        found["latents"] = phase.latents
    if phase.moments == "decay":
        found["moment_decay"] = phase.moment_scale
    return found


def _ends_by(phase: PhasePlan) -> str:
    rules = {"epochs": phase.end.epochs, "plateau": phase.end.plateau, "updates": phase.end.limit_updates}
    return " or ".join(name for name, rule in rules.items() if rule is not None)


def _latent_tokens(bucket: BucketPlan, strides: ModelStrides) -> int:
    frames = strides.latents(bucket.frames)
    return (
        bucket.global_batch_size
        * frames
        * (bucket.height // strides.spatial)
        * (bucket.width // strides.spatial)
    )


def _shares(phase: PhasePlan, clips: Sequence[int] | None) -> list[float | None]:
    """Each bucket's part of the phase's updates; without configured shares every clip is taken once in a
    pass."""
    if len(phase.buckets) == 1:
        return [1.0]
    if phase.buckets[0].share is not None or clips is None:
        return [bucket.share for bucket in phase.buckets]
    updates = [count / bucket.global_batch_size for count, bucket in zip(clips, phase.buckets, strict=True)]
    return [part / sum(updates) for part in updates] if sum(updates) else [None] * len(updates)


def _over_phase(
    phase: PhasePlan, shares: Sequence[float | None], amount: Callable[[BucketPlan], int]
) -> UpdateRange:
    """Range of the sum over all updates of the phase of what one update of a bucket brings."""
    amounts = [amount(bucket) for bucket in phase.buckets]
    known = [share for share in shares if share is not None]
    if len(known) < len(amounts):
        maximum = None if phase.length.maximum is None else phase.length.maximum * max(amounts)
        return UpdateRange(minimum=phase.length.minimum * min(amounts), maximum=maximum)
    parts = [_scaled(phase.length, share, amount) for share, amount in zip(known, amounts, strict=True)]
    return sum(parts, start=UpdateRange(minimum=0, maximum=0))


def _scaled(updates: UpdateRange, share: float, amount: int) -> UpdateRange:
    maximum = None if updates.maximum is None else round(updates.maximum * share) * amount
    return UpdateRange(minimum=round(updates.minimum * share) * amount, maximum=maximum)


def _epochs(
    phase: PhasePlan, bucket: BucketPlan, *, share: float | None, clips: int | None
) -> dict[str, float | None]:
    names = ("epochs", "min_epochs", "max_epochs")
    if not clips or share is None:
        return dict.fromkeys(names)
    lengths = (phase.length.exact, phase.length.minimum, phase.length.maximum)
    per_update = share * bucket.global_batch_size / clips
    return {
        name: None if length is None else length * per_update
        for name, length in zip(names, lengths, strict=True)
    }


def _bounds(name: str, number: UpdateRange | None) -> dict[str, int | None]:
    if number is None:
        return {name: None, f"min_{name}": None, f"max_{name}": None}
    return {name: number.exact, f"min_{name}": number.minimum, f"max_{name}": number.maximum}


def _drawn_length(phase: PhasePlan) -> int:
    return phase.length.maximum or max(2 * phase.learning_rate.warmup_updates, phase.length.minimum)
