"""Opens the clips of a video run: files that a configuration names, or a user's own datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiprod_ds.config.video_vae import VideoDataConfig
from aiprod_ds.data.dataset import TensorVideoDataset, VideoClipDataset
from aiprod_ds.data.manifest import Manifest, scan
from aiprod_ds.data.probe import default_probe_cache
from aiprod_ds.trainers.clip_data import ClipData, require_clips, split_manifests, unreadable_files


def open_video_files(config: VideoDataConfig, *, seed: int) -> ClipData:
    """Reads the folders or manifests that `config` names; files that an earlier run has probed are not probed again.

    Raises:
        DataError: If a folder is missing or empty, or too many files cannot be read.
    """
    train, validation = split_manifests(config, _scan, seed=seed)
    unreadable = unreadable_files(train, validation)
    return ClipData.of(VideoClipDataset(train, seed=seed), VideoClipDataset(validation, seed=seed), unreadable=unreadable)


def open_video_datasets(dataset: Any, validation: Any, *, seed: int) -> ClipData:
    """Takes a user's own map-style datasets; see `TensorVideoDataset` for what their items may be.

    Raises:
        DataError: If a dataset is empty or an item is not a clip.
    """
    require_clips(dataset, validation)
    return ClipData.of(TensorVideoDataset(dataset, seed=seed), TensorVideoDataset(validation, seed=seed))


def _scan(path: Path) -> Manifest:
    return scan(path, cache=default_probe_cache(path))
