"""Latents and prompt embeddings that answer a `ClipRequest`: the clip's entry of exactly the shape that is
asked for.

Owns reading, the draw among several captions of a clip and caption dropout, pure functions of (seed, sample,
epoch); which clips there are is `latent_index.py`'s. Nothing is cropped or mirrored: a latent has one shape.
Shapes: C channels, F frames, H height, W width, T audio positions, M mel bands, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aiprod_ds.curriculum.auto_buckets import Shape
from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.buckets import bucket_clips
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    EMPTY_PROMPT,
    LATENTS,
    EntryFile,
    LatentShape,
    entry_name,
    find_beside,
    find_entry,
    read_caption,
    read_entry,
    read_found_buckets,
    read_header,
)
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.rng import stream_seed
from aiprod_ds.shards.reader import ShardReader

_PROMPT = ("prompt_embeds", "prompt_attention_mask", "audio_prompt_embeds")


class LatentDataset:
    """Clips of a scanned folder, read when asked for.

    Args:
        manifest: From `scan_latents`, whose clips are complete and fit each other.
        seed: With sample and epoch it decides which captions are dropped.
        strides: Of the video VAE that encoded: what pixels and frames a latent of some shape stands for.
        with_audio: Whether clips come with audio latents.
        caption_dropout: Share of augmented requests that get the empty caption.

    Raises:
        DataError: If there is caption dropout and no embedding of the empty caption.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        strides: ModelStrides,
        with_audio: bool = False,
        caption_dropout: float = 0.0,
    ) -> None:
        self._manifest = manifest
        self._seed = seed
        self._strides = strides
        self._with_audio = with_audio
        self._caption_dropout = caption_dropout
        self._root = manifest.root if manifest.packed is None else manifest.packed
        self._empty = _empty_prompt(self._root) if caption_dropout > 0 else {}

    def empty_prompt(self) -> dict[str, Tensor] | None:
        """Returns the embedding of the empty caption that lies beside the latents; None if there is none."""
        entry = find_beside(self._root, EMPTY_PROMPT)
        return None if entry is None else read_entry(entry)

    def found_buckets(self) -> dict[str, tuple[Shape, ...]]:
        """Returns the shapes that `buckets: auto` found when the clips were encoded, by `AutoPlan.key`."""
        return read_found_buckets(self._root)

    def __len__(self) -> int:
        """Returns the number of clips."""
        return len(self._manifest.records)

    def __getitem__(self, request: ClipRequest) -> dict[str, Tensor]:
        """Returns the tensors of one clip, as the files hold them (bf16 if `aiprod-ds encode` wrote them).

        `latents` [C,F,H,W], `audio_latents` [C,T] or [C,T,M] with audio, `prompt_embeds` [S,D],
        `prompt_attention_mask` [S] bool, `audio_prompt_embeds` [S,D'] where the files have them, and `fps`, a
        fp32 scalar. Of several captions, an augmented request gets one by (seed, sample, epoch), another the
        first.

        Raises:
            DataError: If the clip has no entry of that shape, a file is damaged, or a mirrored clip is asked
                for.
        """
        if request.flip:
            raise DataError(
                "latents: cannot be mirrored, got random_flip. Remove augment.random_flip from the phases."
            )
        record = self._manifest.records[request.sample_index]
        shape = _shape(request)
        name = self._name(record.path, shape)
        drops_caption = self._drops_caption(request)
        self._fetch(record.path, name, with_caption=not drops_caption)
        latents_CFHW = self._tensor(LATENTS, name)
        if tuple(latents_CFHW.shape[1:]) != self._latent_size(shape):
            raise self._other_shape(record.path, shape)
        fps = record.fps if shape.frame_rate_hz is None else shape.frame_rate_hz
        item = {"latents": latents_CFHW, "fps": torch.tensor(fps, dtype=torch.float32)}
        if self._with_audio:
            item["audio_latents"] = self._tensor(AUDIO_LATENTS, name)
        prompt = self._empty if drops_caption else self._caption(record.path, request)
        return {**item, **_prompt(prompt)}

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; opens no file."""
        return [
            ClipFacts(
                name=record.path,
                frames=record.frames,
                seconds=record.seconds,
                height=record.height,
                width=record.width,
            )
            for record in self._manifest.records
        ]

    def without_entry(self, indices: Sequence[int], bucket: BucketPlan) -> tuple[str, ...]:
        """Returns the clips among `indices` that have no entry of the bucket's shape; reads headers of
        untagged entries only."""
        shape = _shape(bucket)
        clips = (self._manifest.records[index].path for index in indices)
        return tuple(clip for clip in clips if not self._has(clip, shape))

    def _has(self, clip: str, shape: LatentShape) -> bool:
        if find_entry(self._root, LATENTS, entry_name(clip, shape)) is not None:
            return True
        path = find_entry(self._root, LATENTS, clip)
        return path is not None and read_header(path).shapes["latents"][1:] == self._latent_size(shape)

    def _name(self, clip: str, shape: LatentShape) -> str:
        """Returns the name of the clip's entry: with its shape, or as ltx-trainer names it."""
        for name in (entry_name(clip, shape), clip):
            if find_entry(self._root, LATENTS, name) is not None:
                return name
        raise self._other_shape(clip, shape)

    def _latent_size(self, shape: LatentShape) -> tuple[int, int, int]:
        strides = self._strides
        return strides.latents(shape.frames), shape.height // strides.spatial, shape.width // strides.spatial

    def _other_shape(self, clip: str, shape: LatentShape) -> DataError:
        return DataError(
            f"{self._root}/{LATENTS}/{clip}: must have latents of {shape.tag}, got none. "
            "Encode with the curriculum that is trained."
        )

    def _tensor(self, source: str, name: str) -> Tensor:
        tensors = self._read(source, name)
        if "latents" not in tensors:
            raise DataError(
                f"{self._root}/{source}/{name}: must hold a tensor 'latents', got {sorted(tensors)}."
            )
        return tensors["latents"]

    def _read(self, source: str, name: str) -> dict[str, Tensor]:
        return read_entry(self._path(source, name))

    def _fetch(self, clip: str, name: str, *, with_caption: bool) -> None:
        """Brings the entries of a clip near together; of a folder, each is opened by itself."""
        if isinstance(self._root, ShardReader):
            sources = {LATENTS: name, **({AUDIO_LATENTS: name} if self._with_audio else {})}
            sources |= {CONDITIONS: clip} if with_caption else {}
            found = (find_entry(self._root, source, entry) for source, entry in sources.items())
            self._root.fetch([entry.name for entry in found if entry is not None])

    def _caption(self, clip: str, request: ClipRequest) -> dict[str, Tensor]:
        def choose(count: int) -> int:
            if not request.augment:
                return 0
            return stream_seed(self._seed, "captions", request.sample_index, request.epoch) % count

        return read_caption(self._path(CONDITIONS, clip), choose)

    def _path(self, source: str, name: str) -> EntryFile:
        path = find_entry(self._root, source, name)
        if path is None:
            raise DataError(f"{self._root}/{source}/{name}: must exist, got no such file. Encode again.")
        return path

    def _drops_caption(self, request: ClipRequest) -> bool:
        if not request.augment or self._caption_dropout == 0:
            return False
        draws = np.random.default_rng(stream_seed(self._seed, "caption", request.sample_index, request.epoch))
        return bool(draws.random() < self._caption_dropout)


def require_entries(dataset: LatentDataset, plan: RunPlan, source: str) -> None:
    """Checks that every clip has latents in the shape of every bucket that will draw it.

    Raises:
        PlanError: One problem a bucket, with the names of the clips.
    """
    clips = dataset.lengths()
    problems: list[str] = []
    for phase in plan.phases:
        for bucket, indices in zip(phase.buckets, bucket_clips(clips, phase.buckets), strict=True):
            names = dataset.without_entry(indices, bucket)
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(
                    f"{source}: curriculum.phases[{phase.index}]: needs latents of {_shape(bucket).tag}, "
                    f"got none for {len(names)} of {len(indices)} clips: {', '.join(names[:5])}{more}. "
                    "Encode with this curriculum."
                )
    if problems:
        raise PlanError(problems)


def unmeasured_note(names: Sequence[str], bucket: BucketPlan, *, of: int) -> tuple[str, ...]:
    """Returns which of the held-out clips are not measured in the shape of `bucket`, in words; nothing if all
    are."""
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    why = f"not measured, because they have no latents of {_shape(bucket).tag}"
    return (f"{len(names)} of {of} held-out clips are {why}: {', '.join(names[:3])}{more}",)


def _shape(asked: ClipRequest | BucketPlan) -> LatentShape:
    return LatentShape(
        frames=asked.frames, height=asked.height, width=asked.width, frame_rate_hz=asked.frame_rate_hz
    )


def _empty_prompt(root: Path | ShardReader) -> dict[str, Tensor]:
    path = find_beside(root, EMPTY_PROMPT)
    if path is None:
        raise DataError(
            f"{root}/{EMPTY_PROMPT}: must exist for data.caption_dropout above 0, got no such file. "
            "Encode the captions with `aiprod-ds encode`, or set data.caption_dropout to 0."
        )
    return read_entry(path)


def _prompt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prompt = {name: tensors[name] for name in _PROMPT if name in tensors}
    return {**prompt, "prompt_attention_mask": prompt["prompt_attention_mask"].bool()}
