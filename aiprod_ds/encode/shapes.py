"""In which shapes clips are encoded: those of the configuration, those that a curriculum will ask for, and
those that its `buckets: auto` finds.

What `auto` found is kept beside the latents, where training reads it: it sees other clips than encoding did
(without held-out ones, without those that failed) and would find other shapes. A later run over more clips
keeps them, too. Called by `work.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiprod_ds.config.encode import EncodeConfig, EncodeShape
from aiprod_ds.config.load import read_curriculum
from aiprod_ds.config.phase import AutoBuckets, BucketConfig, PhaseConfig
from aiprod_ds.curriculum.auto_buckets import Shape, find_shapes
from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.phase import AutoPlan, BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError

_Shapes = tuple[BucketPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What is to be encoded.

    Attributes:
        shapes: In groups of which training treats each as the buckets of one phase.
        found: What `auto` found now or before, by `AutoPlan.key`.
    """

    shapes: tuple[_Shapes, ...]
    found: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One group as it is configured, with how messages name it."""

    where: str
    shapes: tuple[EncodeShape | BucketConfig, ...]
    rule: AutoBuckets | None = None


def shape_groups(
    config: EncodeConfig,
    strides: ModelStrides,
    *,
    clips: Sequence[ClipFacts] = (),
    known: Mapping[str, tuple[Shape, ...]] | None = None,
) -> Groups:
    """Returns the shapes of `config`.

    Args:
        strides: Of the VAE.
        clips: For `buckets: auto`.
        known: What an earlier run found, by `AutoPlan.key`.

    Raises:
        ConfigError: If a resolution is no multiple of the stride, the file of the curriculum is wrong, or
            held-out clips come before those that `buckets: auto` looks at.
    """
    problems: list[str] = []
    groups: list[_Shapes] = []
    found: dict[str, tuple[Shape, ...]] = {}
    for asked in _groups(config):
        planned = tuple(_planned(shape, strides, asked.where, problems) for shape in asked.shapes)
        if asked.rule is None or problems:
            groups.append(planned)
            continue
        auto = AutoPlan(rule=asked.rule, largest=planned[0], batch_step=1, strides=strides)
        shapes = (known or {}).get(auto.key)
        if shapes is None and config.data.held_out:
            problems.append(
                f"{asked.where}.buckets: auto must have been found from the training clips before held-out "
                "ones are encoded, got nothing beside the latents. Encode the training clips first."
            )
            continue
        found[auto.key] = shapes or find_shapes(clips, auto.largest, auto.rule, strides)
        groups.append(tuple(auto.bucket(*shape) for shape in found[auto.key]))
    if problems:
        raise ConfigError(problems)
    if config.data.held_out:
        groups = [groups[-1][:1]]
    return Groups(shapes=tuple(groups), found=found)


def _groups(config: EncodeConfig) -> list[_Asked]:
    if config.curriculum is None:
        return [
            _Asked(where=f"shapes[{index}]", shapes=(shape,)) for index, shape in enumerate(config.shapes)
        ]
    phases = read_curriculum(Path(config.curriculum)).phases
    groups = [
        _Asked(
            where=f"{config.curriculum}: curriculum.phases[{index}]",
            shapes=_buckets(phase),
            rule=phase.auto_buckets,
        )
        for index, phase in enumerate(phases)
    ]
    return groups[-1:] if config.data.held_out else groups


def _buckets(phase: PhaseConfig) -> tuple[BucketConfig, ...]:
    if phase.listed_buckets:
        return phase.listed_buckets
    assert phase.duration is not None, "the schema demands a length"
    return (BucketConfig(resolution=phase.resolution, duration=phase.duration),)


def _planned(
    shape: EncodeShape | BucketConfig, strides: ModelStrides, where: str, problems: list[str]
) -> BucketPlan:
    duration, resolution = shape.duration, shape.resolution
    height, width = (0, 0) if resolution is None else (resolution.height, resolution.width)
    if resolution is None or height % strides.spatial or width % strides.spatial:
        problems.append(
            f"{where}.resolution: must be a multiple of the VAE's stride {strides.spatial} both ways, got "
            f"{height}x{width}. "
            "Change it."
        )
    requested = duration.frames
    if requested is None:
        if duration.frame_rate_hz is None:
            problems.append(
                f"{where}.duration.seconds: needs frame_rate_hz, got none. Add it or write frames."
            )
        requested = max(1, round((duration.seconds or 0.0) * (duration.frame_rate_hz or 0.0)))
    return BucketPlan(
        frames=strides.snap(requested),
        requested_frames=requested,
        height=height,
        width=width,
        frame_rate_hz=duration.frame_rate_hz,
        global_batch_size=1,
        micro_batch_size=1,
        accumulation=1,
        share=getattr(shape, "share", None),
    )
