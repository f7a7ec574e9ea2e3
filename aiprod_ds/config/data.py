"""Where the clips of a run come from: what every kind needs, and what pictures, sounds and latents add to it.

Owns the schema; reading is `aiprod_ds.data`. Field names are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, StrictModel


class StorageConfig(StrictModel):
    """How shards are reached that lie in object storage or on a web server."""

    endpoint_url: str | None = Field(default=None, pattern=r"^https?://[^@?#]+$")
    """A server that speaks the protocol of S3, such as `http://localhost:9000`. null: as boto3 finds it
    (`AWS_ENDPOINT_URL`, the profile, Amazon)."""
    cache_dir: str | None = None
    """Folder on a local disk in which what was read is kept; all ranks, workers and runs may share it. null:
    `$AIPROD_DS_CACHE_DIR/shards`, else `~/.cache/aiprod_ds/shards`."""
    cache_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 100.0
    """The most that the folder holds, in 1e9 bytes; what was used longest ago goes first. 0: nothing is
    kept."""
    patience_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 40.0
    """How long a storage is waited for that does not answer, once training has begun; then the run ends with
    an error. Keep it below `engine.hang_seconds`."""


class ClipDataConfig(StrictModel):
    """What every kind of clip needs; a trainer's own data section adds to it."""

    train: str = Field(min_length=1)
    """A folder, searched recursively, or a CSV, JSON or JSONL manifest, relative to the working folder; or
    shards that `aiprod-ds shard` made: their folder, `s3://bucket/prefix` or `https://host/path`."""
    validation: str | None = None
    """Held-out clips, in the same forms. null: `holdout_fraction` of the training clips."""
    storage: StorageConfig = StorageConfig()
    """Where `train` or `validation` is an address: how it is reached. No effect on the result."""
    holdout_fraction: Fraction = 0.1
    """Share of the clips that is held out, at least one; chosen by the seed and the files' content. Not
    beside `validation`."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that decode ahead; 0 decodes in the training process. No effect on the result."""
    max_unreadable_fraction: Fraction = 0.05
    """Share of files that may be unreadable; above it the run stops before training. As many training clips
    again may turn out unreadable while it trains, and are replaced; above it the run saves and stops."""
    duplicates: Literal["allow", "warn", "error"] = "warn"
    """The same content twice in training, or in training and validation: allowed, told by `check` and in the
    report, or an error."""
    fingerprint: Literal["auto", "content", "time", "size"] = "auto"
    """What a resumed run compares of its clips beside their names and what was probed: `content`, the SHA-256
    of the files; `time`, sizes and times of the last change; `size`, sizes alone. `auto` is `content`, and of
    latents the beginning, middle and end of each file, so that they are not read as a whole."""

    @rule
    def _holdout_has_effect(self) -> Iterator[str]:
        # The default value is no choice, so that a resolved configuration, which states every default, loads
        # again.
        if (
            self.validation is not None
            and self.holdout_fraction != type(self).model_fields["holdout_fraction"].default
        ):
            yield (
                f"holdout_fraction: has no effect when validation is set, got {self.holdout_fraction}. "
                "Remove one of the two."
            )

    @rule
    def _storage_has_effect(self) -> Iterator[str]:
        sources = [source for source in (self.train, self.validation) if source is not None]
        if self.storage != StorageConfig() and not any("://" in source for source in sources):
            yield (
                "storage: has no effect unless train or validation is an address such as "
                f"s3://bucket/prefix, got {self.train!r}. Remove it."
            )
        if self.storage.endpoint_url is not None and not any(
            source.startswith("s3://") for source in sources
        ):
            yield "storage.endpoint_url: has no effect without an s3:// address. Remove it."


DEFAULT_SCENE_THRESHOLD = 27.0
Byte = Annotated[int, Field(ge=0, le=255)]


class PictureConfig(StrictModel):
    """What becomes of pictures that a training picture is not like; what was done stands in the report."""

    interlaced: Literal["deinterlace", "leave_out"] = "deinterlace"
    """Files whose frames say that they consist of two fields: deinterlaced with FFmpeg's bwdif, or left
    out."""
    hdr: Literal["tone_map", "leave_out"] = "tone_map"
    """PQ and HLG files: brought to SDR by BT.2390's curve from 1000 to 203 cd/m2 and BT.709's primaries, or
    left out."""
    alpha_background: tuple[Byte, Byte, Byte] = Field(default=(0, 0, 0), strict=False)
    """Red, green and blue behind transparent pixels."""
    scenes: Literal["none", "cut"] = "none"
    """`cut` makes a clip of every scene of a film, so that none straddles a hard cut; each film is decoded
    once for that. Dissolves are not found. Not for shards."""
    scene_threshold: PositiveFloat = DEFAULT_SCENE_THRESHOLD
    """How much a frame must differ from the one before it to begin a scene, as of PySceneDetect's
    ContentDetector; lower finds more cuts. Goes with `scenes: cut`."""

    @rule
    def _threshold_has_effect(self) -> Iterator[str]:
        if self.scenes == "none" and self.scene_threshold != DEFAULT_SCENE_THRESHOLD:
            yield (
                f"scene_threshold: has no effect without scenes: cut, got {self.scene_threshold:g}. Set "
                "both or neither."
            )


class VideoDataConfig(PictureConfig, ClipDataConfig):
    """Where clips come from."""

    random_flip: bool = True
    """Mirrors half of the training clips from left to right. Held-out clips are never mirrored."""


Decibels = Annotated[float, Field(ge=-120, le=0, allow_inf_nan=False)]


class AudioDataConfig(ClipDataConfig):
    """Audio files and the sound of videos; a table names them in the column `audio`, `video` or
    `media_path`."""

    sample_rate_hz: PositiveInt = 44_100
    """Every sound is resampled to this rate."""
    channels: Literal[1, 2] = 2
    """What the model gets: mono files are repeated for 2, stereo files averaged for 1. 5.1 and other layouts
    are mixed to stereo first by ITU-R BS.775, without LFE and normalised, so that nothing is clipped."""
    loudness_lufs: Decibels | None = None
    """Brings every clip to this loudness (-16 is common) as far as its peak stays within 1. null: as it is in
    the file."""
    silence_threshold_db: Decibels | None = None
    """Level in dB of full scale. A quieter training clip is drawn again, 8 times at most; if all are quieter,
    the loudest counts. Files whose peak is below it are listed as unreadable. null: every clip counts."""


class LatentDataConfig(ClipDataConfig):
    """Latents and prompt embeddings that `aiprod-ds encode` or ltx-trainer wrote."""

    train: str = Field(min_length=1)
    """A folder with `latents/`, or a folder of media that was encoded (`<folder>_latents` beside it, or
    `.precomputed/` in it), or a CSV, JSON or JSONL manifest in that one, of which only the rows' clips count;
    relative to the working folder. Or shards that `aiprod-ds shard` made of such a folder: their folder,
    `s3://bucket/prefix` or `https://host/path`."""
    validation: str | None = None
    """Held-out latents, in the same forms. null: `holdout_fraction` of the training clips."""
    num_workers: int = Field(default=2, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process. No effect on the result."""
    max_unreadable_fraction: Fraction = 0.05
    """Share of clips that may be damaged or lack a partner file; above it the run stops before training. As
    many again may turn out unreadable while it trains, and are replaced; above it the run saves and stops."""
    caption_dropout: Fraction = 0.1
    """Share of training clips whose caption is replaced by the empty one, for classifier-free guidance. Above
    0 it needs `empty_prompt.safetensors` beside the latents, which `aiprod-ds encode` writes."""
