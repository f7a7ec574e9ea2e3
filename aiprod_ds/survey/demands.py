"""What is asked of the media: by a configuration, or by nobody yet.

Owns the record, and what is asked for where there is no configuration. Called by the command line, which
fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aiprod_ds.config.data import AudioDataConfig, PictureConfig
from aiprod_ds.config.phase import AutoBuckets
from aiprod_ds.curriculum.phase import AutoPlan, BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides

Wanted = Literal["any", "video", "sound"]
"""Films and pictures, sounds (also those of films), or, where nobody has said, each as what it is."""
# Where no configuration says more: what many models of today can be trained on.
_USUAL_SIDE, _USUAL_FRAMES = 512, 49
_USUAL_STRIDES = ModelStrides(spatial=32, temporal=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase's shapes, or another group of which a clip goes into one.

    Attributes:
        buckets: Those that are configured.
        auto: How they are found from the clips; None if they are configured.
    """

    name: str
    buckets: tuple[BucketPlan, ...]
    auto: AutoPlan | None = None

    @property
    def draws_by_share(self) -> bool:
        """Whether every bucket draws from all clips that are long enough for it."""
        return self.buckets[0].share is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What the files are compared with.

    Attributes:
        configuration: Its file; None if there is none.
        wanted: What is trained on.
        pictures: What becomes of interlaced, HDR and transparent pictures.
        phases: Shapes that clips are cut to; without a configuration those that `buckets: auto` finds.
        sounds: What becomes of sounds, where they are what is trained on.
        sample_rate_hz: What sounds are resampled to; None where nobody has said.
        channels: What sounds get; None likewise.
        needs_captions: Whether a clip without a caption is left out; None where nobody has said.
        captions_per_line: As `data.captions_per_line` of `encode`.
        command: What to do next; the source stands behind it.
    """

    configuration: Path | None = None
    wanted: Wanted = "any"
    pictures: PictureConfig = field(default_factory=PictureConfig)
    phases: tuple[Phase, ...] = field(default_factory=lambda: (usual_shapes(),))
    sounds: AudioDataConfig | None = None
    sample_rate_hz: int | None = None
    channels: int | None = None
    needs_captions: bool | None = None
    captions_per_line: bool = False
    command: str = ""


def usual_shapes() -> Phase:
    """Returns what `buckets: auto` would find at 512 x 512 pixels and 49 frames at most."""
    largest = BucketPlan(
        frames=_USUAL_FRAMES,
        requested_frames=_USUAL_FRAMES,
        height=_USUAL_SIDE,
        width=_USUAL_SIDE,
        frame_rate_hz=None,
        global_batch_size=1,
        micro_batch_size=1,
        accumulation=1,
    )
    auto = AutoPlan(rule=AutoBuckets(), largest=largest, batch_step=1, strides=_USUAL_STRIDES)
    return Phase(name="buckets: auto", buckets=(largest,), auto=auto)
