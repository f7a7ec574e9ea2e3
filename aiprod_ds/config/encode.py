"""What `aiprod-ds encode` may be told: which clips, in which shapes, by which encoders, and where the results
go.

Owns the schema; `load` reads the file. Field names are the YAML keys; what needs the data or the models is
checked in `aiprod_ds.encode.run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from aiprod_ds.config.data import Decibels, PictureConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.phase import PhaseDuration, PhaseResolution
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    Fraction,
    FreeMapping,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    StrictModel,
)

Precision = Literal["fp32", "bf16", "fp16"]


class ShardOutputConfig(StrictModel):
    """Shards of what was encoded, which a run reads from a disk, a web server or object storage."""

    output: str = Field(min_length=1)
    """A folder or `s3://bucket/prefix`, which must be empty, or hold shards of the same entries."""
    shard_mb: PositiveFloat = 256.0
    """What a shard holds at most, in 1e6 bytes."""
    endpoint_url: str | None = Field(default=None, pattern=r"^https?://[^@?#]+$")
    """A server that speaks the protocol of S3. null: as boto3 finds it."""

    @rule
    def _endpoint_has_effect(self) -> Iterator[str]:
        if self.endpoint_url is not None and not self.output.startswith("s3://"):
            yield "endpoint_url: has no effect without an s3:// address in output. Remove it."


class EncodeDataConfig(PictureConfig):
    """What is encoded, and where to."""

    media: str = Field(min_length=1)
    """A folder, searched recursively, or a CSV, JSON or JSONL manifest; relative to the working folder."""
    output_dir: str | None = None
    """Where `latents/`, `audio_latents/` and `conditions/` are made. null: beside the folder of the media or
    of the table, named after it with `_latents`; or `.precomputed` in it, where that exists."""
    shards: ShardOutputConfig | None = None
    """Packs the entries into shards when all are there. null: no shards; `aiprod-ds shard` makes them
    later."""
    captions_per_line: bool = False
    """Whether each line of a text file beside the media is a caption of its own. false: the whole file is
    one."""
    held_out: bool = False
    """Whether the clips are held out: with `curriculum`, each is then encoded in one shape only, the first of
    the last phase, in which a run measures them."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that decode ahead; 0 decodes between two encodings. No effect on the result."""
    max_failed_fraction: Fraction = 0.05
    """Share of clips that may fail; above it the run ends with an error."""


class EncodeShape(StrictModel):
    """A shape in which every clip that is long enough is encoded; of longer clips, the middle."""

    resolution: PhaseResolution
    """Frame size; text such as `256x256` is height x width."""
    duration: PhaseDuration
    """Length; frames that the VAE cannot take are rounded up."""


class TilingConfig(StrictModel):
    """Encodes in overlapping parts, which takes less memory and changes the latents near the seams.

    Before the run, a part of the first clip is encoded both ways; the run stops if the latents differ too
    much.
    """

    tile: PhaseResolution
    """Size of a tile in pixels; multiples of the model's spatial stride. Smaller clips are encoded whole."""
    overlap: PositiveInt
    """Pixels that neighbouring tiles share, where they are blended; a multiple of the spatial stride below
    the tile's size."""
    frames: PositiveInt | None = None
    """Frames of a chunk, a multiple of the model's temporal stride; longer clips are cut into chunks. null:
    no chunks."""
    overlap_frames: PositiveInt | None = None
    """Frames that neighbouring chunks share, a multiple of the temporal stride below `frames`. Goes with
    `frames`."""
    max_deviation: PositiveFloat = 0.1
    """Most that tiled latents may differ: the root mean square difference over the standard deviation of
    whole latents."""

    @rule
    def _parts_overlap(self) -> Iterator[str]:
        smallest = min(self.tile.height, self.tile.width)
        if self.overlap >= smallest:
            yield (
                f"overlap: must be below the tile's smaller side ({smallest}), got {self.overlap}. Lower it."
            )
        if (self.frames is None) != (self.overlap_frames is None):
            yield (
                f"overlap_frames: goes with frames, got {self.overlap_frames} and frames: {self.frames}. "
                "Set both or neither."
            )
        elif (
            self.frames is not None and self.overlap_frames is not None and self.overlap_frames >= self.frames
        ):
            yield (
                f"overlap_frames: must be below frames ({self.frames}), got {self.overlap_frames}. Lower it."
            )


class VideoEncoderConfig(StrictModel):
    """The VAE of the pictures."""

    model: ModelConfig
    """The network; `pretrained` names a diffusers folder, such as `export/` of a run."""
    precision: Precision = "bf16"
    """Of the computation. Latents are kept in bf16."""
    tiling: TilingConfig | None = None
    """In overlapping parts. null: each clip whole."""


class AudioEncoderConfig(StrictModel):
    """The VAE of the sounds."""

    model: ModelConfig
    """The network."""
    precision: Precision = "bf16"
    """Of the computation. Latents are kept in bf16."""
    sample_rate_hz: PositiveInt | None = None
    """The rate that the model takes. null: as the model declares it."""
    channels: Literal[1, 2] | None = None
    """The channels that the model takes. null: as the model declares them."""
    loudness_lufs: Decibels | None = None
    """Brings the sound of every clip to this loudness, as `data.loudness_lufs` of the VAE's training did.
    null: as it is."""
    missing_sound: Literal["fail", "silence"] = "fail"
    """A clip without sound, or with more than 0.1 s of it missing: `fail` lists it as failed, `silence` fills
    up with zeros."""


class TextEncoderConfig(StrictModel):
    """The encoder of the captions: any text model of transformers."""

    pretrained: str | None = None
    """A local folder or a hub name."""
    subfolder: str = ""
    """Folder inside `pretrained` that holds the model, e.g. `text_encoder`."""
    tokenizer: str | None = None
    """A local folder or a hub name. null: that of the model; for random weights, bytes as tokens."""
    tokenizer_subfolder: str = ""
    """Folder inside that holds the tokenizer, e.g. `tokenizer`."""
    source: str | None = None
    """A class of transformers, e.g. `T5EncoderModel`. null: the text encoder that fits `pretrained`. Required
    with `config`."""
    config: FreeMapping = Field(default_factory=dict)
    """Keyword arguments of the class's configuration; the weights are random. For tests."""
    connectors: ModelConfig | None = None
    """LTX-2's text connectors, which turn all hidden states into embeddings for video and for audio. null:
    the last state."""
    precision: Precision = "bf16"
    """Of the computation. Embeddings are kept in bf16."""
    max_tokens: PositiveInt = 128
    """Tokens of every caption after padding, end token included."""
    long_captions: Literal["fail", "truncate"] = "fail"
    """A caption with more tokens: `fail` lists its clip as failed, `truncate` cuts it."""
    mask_padding: bool = True
    """Whether the encoder ignores padding. LTX-Video was trained with false, Wan with true."""
    default_caption: str | None = None
    """Caption of clips without one. null: these are listed as failed, before anything is encoded."""

    @rule
    def _one_origin(self) -> Iterator[str]:
        if (self.pretrained is None) == (not self.config):
            got = "neither" if self.pretrained is None else "both"
            yield f"pretrained: either this or config must be given, got {got}. Name a text encoder."
        if self.config and self.source is None:
            yield "source: must be given with config, got nothing. Write for example T5EncoderModel."
        if self.pretrained is None and self.tokenizer is None and self.tokenizer_subfolder:
            yield (
                f"tokenizer_subfolder: has no effect without tokenizer, got {self.tokenizer_subfolder!r}. "
                "Remove it."
            )


class CaptionConfig(TextEncoderConfig):
    """How captions are encoded."""

    trigger: str | None = Field(default=None, min_length=1)
    """A word or text that is put before every caption, with a space between. The empty caption of
    `empty_prompt` does not get it. null: captions as they are."""


class EncodeConfig(StrictModel):
    """Everything that `aiprod-ds encode` needs."""

    seed: Seed = 0
    """Draws the weights of a network without `pretrained`."""
    data: EncodeDataConfig
    """The clips and the results."""
    video: VideoEncoderConfig
    """How pictures are encoded."""
    audio: AudioEncoderConfig | None = None
    """How sounds are encoded. null: no audio latents."""
    text: CaptionConfig | None = None
    """How captions are encoded. null: no prompt embeddings."""
    shapes: tuple[EncodeShape, ...] = Field(default=(), strict=False)
    """The shapes to encode. Either these or `curriculum`."""
    curriculum: str | None = None
    """A trainer's YAML file, of which only the section `curriculum` is read: every clip is encoded in the
    shapes in which its phases will ask for it; relative to the working folder."""

    @rule
    def _problems(self) -> Iterator[str]:
        if self.data.held_out and self.curriculum is None:
            yield "data.held_out: has no effect without curriculum, got true. Remove it."
        if self.data.captions_per_line and self.text is None:
            yield "data.captions_per_line: has no effect without text, got true. Remove it."
        if bool(self.shapes) == (self.curriculum is not None):
            got = "both" if self.shapes else "neither"
            yield (
                f"shapes: either these or curriculum must be given, got {got}. List shapes or name a file "
                "with phases."
            )
        for index, shape in enumerate(self.shapes):
            if shape.duration.seconds is not None and shape.duration.frame_rate_hz is None:
                yield (
                    f"shapes[{index}].duration.seconds: needs frame_rate_hz, got none. Add it or write "
                    "frames."
                )
