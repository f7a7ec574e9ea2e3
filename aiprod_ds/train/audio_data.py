"""Opens the clips of an audio run: files that a configuration names, or a user's own datasets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from aiprod_ds.config.audio_data import AudioDataConfig
from aiprod_ds.data.audio_dataset import AudioClipDataset, TensorAudioDataset, usable_sounds
from aiprod_ds.data.manifest import Manifest, scan
from aiprod_ds.data.probe import default_probe_cache
from aiprod_ds.trainers.clip_data import ClipData, require_clips, split_manifests, unreadable_files


def open_audio_files(config: AudioDataConfig, *, seed: int) -> ClipData:
    """Reads the folders or manifests that `config` names; files that an earlier run has probed are not probed again.

    Raises:
        DataError: If a folder is missing or empty, or too many files cannot be read or used.
    """
    train, validation = split_manifests(config, partial(_scan, config), seed=seed)
    return ClipData.of(
        AudioClipDataset(train, seed=seed, config=config),
        AudioClipDataset(validation, seed=seed, config=config),
        unreadable=unreadable_files(train, validation),
    )


def open_audio_datasets(dataset: Any, validation: Any, config: AudioDataConfig, *, seed: int) -> ClipData:
    """Takes a user's own map-style datasets; see `TensorAudioDataset` for what their items may be.

    Raises:
        DataError: If a dataset is empty or an item is not a sound.
    """
    require_clips(dataset, validation)
    own, held_out = (TensorAudioDataset(items, seed=seed, config=config) for items in (dataset, validation))
    return ClipData.of(own, held_out)


def _scan(config: AudioDataConfig, path: Path) -> Manifest:
    found = scan(path, cache=default_probe_cache(path, medium="sound"), medium="sound")
    return usable_sounds(found, config)
