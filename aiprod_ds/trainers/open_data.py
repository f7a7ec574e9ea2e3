"""Opens the clips of a run: files that a configuration names, or a user's own datasets; of pictures, of sound
and of latents.

Owns which dataset of `aiprod_ds.data` reads which kind, and that latents are of the configured VAEs. Called
by the trainers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aiprod_ds.codec.encoders import vae_fingerprint
from aiprod_ds.config.data import AudioDataConfig, VideoDataConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.curriculum.auto_buckets import with_auto_buckets
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.audio_dataset import AudioClipDataset, AudioItems, usable_sounds
from aiprod_ds.data.clip_list import Listing
from aiprod_ds.data.dataset import VideoClipDataset, VideoItems
from aiprod_ds.data.latent_dataset import LatentDataset, require_entries, unmeasured_note
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import AUDIO_LATENTS, EMPTY_PROMPT, LATENTS
from aiprod_ds.data.manifest import Manifest, scan
from aiprod_ds.data.own.values import ValueRange
from aiprod_ds.data.packed.media import packed_media
from aiprod_ds.data.probe_cache import default_probe_cache
from aiprod_ds.data.scenes import usable_clips
from aiprod_ds.data.tensor_latents import LatentItems
from aiprod_ds.data.treatment import audio_notes, picture_notes
from aiprod_ds.errors import PlanError
from aiprod_ds.shards.reader import ShardReader
from aiprod_ds.trainers.clip_data import (
    ClipData,
    manifest_notes,
    split_manifests,
    unreadable_files,
)
from aiprod_ds.trainers.own_data import HeldOut, open_own_data


def open_video_files(config: VideoDataConfig, *, seed: int) -> ClipData:
    """Reads the folders or manifests that `config` names; files that an earlier run has probed are not probed
    again.

    Raises:
        DataError: If a folder is missing or empty, or too many files cannot be read.
    """
    train, validation = split_manifests(config, partial(_scan_videos, config), seed=seed)
    background = config.alpha_background
    notes = picture_notes((*train.records, *validation.records), config)
    return ClipData.of(
        VideoClipDataset(train, seed=seed, background=background),
        VideoClipDataset(validation, seed=seed, background=background),
        unreadable=unreadable_files(train, validation),
        notes=(*notes, *manifest_notes(config, train, validation)),
        listing=Listing(train=train, validation=validation, by=config.fingerprint),
    )


def open_video_datasets(
    dataset: Any,
    validation: Any,
    *,
    seed: int,
    value_range: ValueRange | None = None,
    held_out: HeldOut | None = None,
) -> ClipData:
    """Takes a user's own data; see `VideoItems` for what its items may be.

    Raises:
        DataError: As `open_own_data`.
    """
    reader = VideoItems(seed=seed, value_range=value_range)
    chosen = held_out or HeldOut()
    return open_own_data(dataset, validation, reader, seed=seed, held_out=chosen, kind=ClipData)


def _scan_videos(config: VideoDataConfig, source: Path | ShardReader) -> Manifest:
    if isinstance(source, ShardReader):
        return usable_clips(packed_media(source, "video"), config, probes=None)
    probes = default_probe_cache(source)
    return usable_clips(scan(source, cache=probes), config, probes=probes)


def open_audio_files(config: AudioDataConfig, *, seed: int) -> ClipData:
    """Reads the folders or manifests that `config` names; files that an earlier run has probed are not probed
    again.

    Raises:
        DataError: If a folder is missing or empty, or too many files cannot be read or used.
    """
    train, validation = split_manifests(config, partial(_scan_sounds, config), seed=seed)
    return ClipData.of(
        AudioClipDataset(train, seed=seed, config=config),
        AudioClipDataset(validation, seed=seed, config=config),
        unreadable=unreadable_files(train, validation),
        notes=(
            *audio_notes((*train.records, *validation.records), config),
            *manifest_notes(config, train, validation),
        ),
        listing=Listing(train=train, validation=validation, by=config.fingerprint),
    )


def open_audio_datasets(
    dataset: Any,
    validation: Any,
    config: AudioDataConfig,
    *,
    seed: int,
    value_range: ValueRange | None = None,
    held_out: HeldOut | None = None,
) -> ClipData:
    """Takes a user's own data; see `AudioItems` for what its items may be.

    Raises:
        DataError: As `open_own_data`.
    """
    reader = AudioItems(seed=seed, config=config, value_range=value_range)
    chosen = held_out or HeldOut()
    return open_own_data(dataset, validation, reader, seed=seed, held_out=chosen, kind=ClipData)


def _scan_sounds(config: AudioDataConfig, source: Path | ShardReader) -> Manifest:
    if isinstance(source, ShardReader):
        return usable_sounds(packed_media(source, "sound"), config)
    found = scan(source, cache=default_probe_cache(source, medium="sound"), medium="sound")
    return usable_sounds(found, config)


class LatentData(ClipData):
    """Clips that exist in some shapes only."""

    __slots__ = ()

    def with_buckets(self, plan: RunPlan, source: str) -> RunPlan:
        """Returns `plan` with the shapes that `buckets: auto` got when the clips were encoded.

        Raises:
            PlanError: If the clips were not encoded with it.
        """
        asked = {phase.index: phase.auto.key for phase in plan.phases if phase.auto is not None}
        if not asked:
            return plan
        found = self.train.found_buckets() if isinstance(self.train, LatentDataset) else {}
        missing = [index for index, key in asked.items() if key not in found]
        if missing:
            raise PlanError(
                [
                    f"{source}: curriculum.phases[{index}].buckets: auto takes the shapes that `encode` "
                    f"found with this curriculum ({asked[index]}), got latents without them. Encode with "
                    "this curriculum or list the buckets."
                    for index in missing
                ]
            )
        shapes = {index: found[key] for index, key in asked.items()}
        return with_auto_buckets(plan, self.train_clips, shapes=shapes)

    def check(self, plan: RunPlan, source: str) -> tuple[TooShort, ...]:
        """Returns the training clips that some phase cannot use.

        Raises:
            PlanError: As for any clips, or if a clip has no latents in the shape of a bucket that will draw
                it, or no held-out clip in that in which it is measured.
        """
        last = plan.phases[-1]
        if isinstance(self.validation, LatentDataset) and not self.held_out(last.buckets[0]):
            measured = replace(plan, phases=(replace(last, buckets=last.buckets[:1]),))
            require_entries(self.validation, measured, source)
        too_short = super().check(plan, source)
        if isinstance(self.train, LatentDataset):
            require_entries(self.train, plan, source)
        return too_short

    def held_out(self, bucket: BucketPlan) -> tuple[int, ...]:
        """Returns the indices of the held-out clips that are long enough for `bucket` and have latents of its
        shape: one that was held out by a fraction has those of the bucket that it would train in."""
        indices = super().held_out(bucket)
        if not isinstance(self.validation, LatentDataset):
            return indices
        dataset = self.validation
        return tuple(index for index in indices if not dataset.without_entry([index], bucket))

    def replacements(self, plan: RunPlan) -> tuple[str, ...]:
        """See `ClipData.replacements`."""
        notes, bucket = super().replacements(plan), plan.phases[-1].buckets[0]
        if not isinstance(self.validation, LatentDataset):
            return notes
        names = self.validation.without_entry(super().held_out(bucket), bucket)
        return (*notes, *unmeasured_note(names, bucket, of=len(self.validation_clips)))


def open_latent_files(
    config: DiffusionTrainerConfig, *, strides: ModelStrides, with_audio: bool
) -> LatentData:
    """Reads the folders or manifests that `config` names and compares their encoders with the configured
    VAEs.

    Raises:
        DataError: If a folder is missing or empty, too many clips cannot be used, or the latents are of
            another VAE.
    """
    needs = LatentNeeds(strides=strides, with_audio=with_audio, fingerprints=_fingerprints(config))

    def scan(source: Path | ShardReader) -> Manifest:
        return scan_latents(source, needs)

    train, validation = split_manifests(config.data, scan, seed=config.seed)

    def dataset(manifest: Manifest, caption_dropout: float) -> LatentDataset:
        return LatentDataset(
            replace(manifest, files={}),  # loader workers need not have them
            seed=config.seed,
            strides=strides,
            with_audio=with_audio,
            caption_dropout=caption_dropout,
        )

    return LatentData.of(
        dataset(train, config.data.caption_dropout),
        dataset(validation, 0.0),
        unreadable=unreadable_files(train, validation),
        notes=manifest_notes(config.data, train, validation),
        listing=Listing(
            train=train,
            validation=validation,
            by=config.data.fingerprint,
            beside=(EMPTY_PROMPT,) if config.data.caption_dropout > 0 else (),
        ),
    )


def open_latent_datasets(
    dataset: Any, validation: Any, *, strides: ModelStrides, seed: int = 0, held_out: HeldOut | None = None
) -> ClipData:
    """Takes a user's own data; see `LatentItems` for what its items may be.

    Raises:
        DataError: As `open_own_data`.
    """
    reader = LatentItems(strides=strides)
    chosen = held_out or HeldOut()
    return open_own_data(dataset, validation, reader, seed=seed, held_out=chosen, kind=LatentData)


def read_empty_prompt(data: ClipData) -> dict[str, Tensor] | None:
    """Returns the embedding of the empty caption that lies beside the training latents; None if there is
    none."""
    return data.train.empty_prompt() if isinstance(data.train, LatentDataset) else None


def _fingerprints(config: DiffusionTrainerConfig) -> dict[str, Callable[[], str]]:
    models = {LATENTS: config.vae, AUDIO_LATENTS: config.audio_vae}
    return {
        source: cache(partial(vae_fingerprint, model, seed=config.seed))
        for source, model in models.items()
        if model is not None
    }
