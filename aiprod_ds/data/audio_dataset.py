"""Sounds that answer a `ClipRequest`: which clip, how many samples, at a random place or in the middle.

Owns the choice of the place as a pure function of (seed, sample, epoch), so that a resumed run hears the
clips of an uninterrupted one, and what is done about silence and loudness; decoding is `decode/audio.py`'s. A
sound's `frames` are its samples at the configured rate, its height and width are 1. Shapes: C channels, N
samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from aiprod_ds.config.data import AudioDataConfig
from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.data.dataset import ClipRequest, ItemDataset, MapDataset
from aiprod_ds.data.loudness import level_db, normalized
from aiprod_ds.data.manifest import Manifest, Unreadable
from aiprod_ds.data.own.items import AUDIO, sound_of
from aiprod_ds.data.own.values import ValueRange, to_signed
from aiprod_ds.decode.audio import decode_audio, fit_sound
from aiprod_ds.decode.downmix import check_layout
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.decode.resampling import check_rates, input_window, resampled_length
from aiprod_ds.decode.whole import read_sound_to_end
from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

_MAX_DRAWS = 8


def usable_sounds(manifest: Manifest, config: AudioDataConfig) -> Manifest:
    """Returns the manifest without the sounds that cannot become clips; they are listed in `unreadable`, each
    with its reason.

    These are sounds whose rate has no simple ratio to the configured one and sounds that nowhere reach the
    silence threshold.
    """
    problems = {record.path: _problem(record, config) for record in manifest.records}
    records = tuple(record for record in manifest.records if problems[record.path] is None)
    unusable = tuple(
        Unreadable(path=path, reason=reason) for path, reason in problems.items() if reason is not None
    )
    return replace(manifest, records=records, unreadable=manifest.unreadable + unusable)


class AudioClipDataset:
    """Clips of a manifest's sounds, decoded when asked for.

    Args:
        manifest: What to draw from: `scan(..., medium="sound")`, then `usable_sounds`.
        seed: With sample and epoch it decides where a clip starts.
        config: Rate and channels that all clips get, loudness that they are brought to, and silence that is
            drawn again.
    """

    def __init__(self, manifest: Manifest, *, seed: int, config: AudioDataConfig) -> None:
        self._manifest = manifest
        self._seed = seed
        self._config = config

    def __len__(self) -> int:
        """Returns the number of sounds."""
        return len(self._manifest.records)

    def __getitem__(self, request: ClipRequest) -> dict[str, Tensor]:
        """See `ClipSource.__getitem__`: `audio`, [C,N] float32 in [-1,1].

        Raises:
            DataError: If the sound is too short for the request or cannot be decoded.
        """
        record = self._manifest.records[request.sample_index]

        def read(start: int) -> Tensor:
            return decode_audio(
                path,
                start_sample=start,
                num_samples=request.frames,
                sample_rate_hz=self._config.sample_rate_hz,
                channels=self._config.channels,
            )

        with self._manifest.file(record.path) as path:
            clip = _clip(
                request,
                _length(record, self._config),
                read,
                record.path,
                seed=self._seed,
                config=self._config,
            )
        return {"audio": clip}

    def read_whole(self, index: int) -> None:
        """Decodes every sample of a sound.

        Raises:
            DataError: If one cannot be decoded.
        """
        record = self._manifest.records[index]
        with self._manifest.file(record.path) as path:
            read_sound_to_end(path, samples=record.frames)

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; opens no file."""
        return [
            _facts(record.path, _length(record, self._config), self._config.sample_rate_hz)
            for record in self._manifest.records
        ]


class AudioItems:
    """Reads items that are whole sounds; see `items.AUDIO` for what they may be.

    Args:
        seed: With sample and epoch it decides where a clip starts.
        config: Rate and channels that all clips get, loudness that they are brought to, and silence that is
            drawn again.
        value_range: Of floating samples; see `values.to_signed`.
    """

    kind = AUDIO

    def __init__(self, *, seed: int, config: AudioDataConfig, value_range: ValueRange | None = None) -> None:
        self._seed = seed
        self._config = config
        self.value_range = value_range

    def values(self, item: Any, name: str) -> Tensor:
        """See `ItemReader.values`."""
        return sound_of(item, name)[0]

    def facts(self, item: Any, name: str) -> ClipFacts:
        """See `ItemReader.facts`.

        Raises:
            DataError: If the item is no sound, has channels without a place, or its rate has no simple ratio
                to the configured one.
        """
        wave_CN, own_hz = self._read(item, name)
        rate_hz = self._config.sample_rate_hz
        try:
            check_layout(wave_CN.shape[0], None)
            check_rates(from_hz=own_hz, to_hz=rate_hz)
        except DataError as error:
            raise DataError(f"{name}: {error}.") from error
        return _facts(name, resampled_length(wave_CN.shape[1], from_hz=own_hz, to_hz=rate_hz), rate_hz)

    def clip(self, item: Any, request: ClipRequest, name: str) -> dict[str, Tensor]:
        """See `ItemReader.clip`: `audio`, [C,N] float32 in [-1,1].

        Raises:
            DataError: If the item is no sound, is too short for the request or holds NaN or infinity.
        """
        wave_CN, own_hz = self._read(item, name)
        rate_hz = self._config.sample_rate_hz

        def read(start: int) -> Tensor:
            window = input_window(start, request.frames, from_hz=own_hz, to_hz=rate_hz)
            return fit_sound(
                to_signed(wave_CN[:, window.start : window.stop], self.value_range),
                start,
                request.frames,
                from_hz=own_hz,
                to_hz=rate_hz,
                channels=self._config.channels,
                where=name,
            )

        length = resampled_length(wave_CN.shape[1], from_hz=own_hz, to_hz=rate_hz)
        return {"audio": _clip(request, length, read, name, seed=self._seed, config=self._config)}

    def _read(self, item: Any, name: str) -> tuple[Tensor, int]:
        wave_CN, rate_hz = sound_of(item, name)
        return wave_CN, self._config.sample_rate_hz if rate_hz is None else rate_hz


class TensorAudioDataset(ItemDataset):
    """A user's dataset of whole sounds, answering requests.

    Args:
        dataset: Items as `AudioItems` reads them: floating or int16 [N] or [C,N], or mappings with one under
            `audio` and optionally its rate under `sample_rate_hz`; without it the configured rate is taken
            for theirs.
        seed: With sample and epoch it decides where a clip starts.
        config: Rate and channels that all clips get, loudness that they are brought to, and silence that is
            drawn again.
        value_range: Of floating samples; None: [-1,1].
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        seed: int,
        config: AudioDataConfig,
        value_range: ValueRange | None = None,
    ) -> None:
        super().__init__(dataset, AudioItems(seed=seed, config=config, value_range=value_range))


def _problem(record: MediaRecord, config: AudioDataConfig) -> str | None:
    assert record.audio_rate_hz is not None, "a record of a sound"
    assert record.audio_peak is not None, "a record of a sound"
    try:
        check_rates(from_hz=record.audio_rate_hz, to_hz=config.sample_rate_hz)
    except DataError as error:
        return str(error)
    threshold_db = config.silence_threshold_db
    if threshold_db is not None and record.audio_peak < 10 ** (threshold_db / 20):
        return (
            f"is nowhere as loud as data.silence_threshold_db ({threshold_db:g} dB), its peak is "
            f"{record.audio_peak:.3g}"
        )
    return None


def _length(record: MediaRecord, config: AudioDataConfig) -> int:
    assert record.audio_rate_hz is not None, "a record of a sound"
    return resampled_length(record.frames, from_hz=record.audio_rate_hz, to_hz=config.sample_rate_hz)


def _facts(name: str, length: int, rate_hz: int) -> ClipFacts:
    return ClipFacts(name=name, frames=length, seconds=length / rate_hz, height=1, width=1)


def _clip(
    request: ClipRequest,
    length: int,
    read: Callable[[int], Tensor],
    name: str,
    *,
    seed: int,
    config: AudioDataConfig,
) -> Tensor:
    rate_hz = config.sample_rate_hz
    assert request.frame_rate_hz in (None, rate_hz), (
        f"sounds have {rate_hz} Hz, a plan must ask for no other rate"
    )
    latest = length - request.frames
    if latest < 0:
        raise DataError(
            f"{name}: must have {request.frames} samples at {rate_hz} Hz, got {length}. Ask for shorter "
            "clips or remove it."
        )
    wave_CN = (
        _sounding(_starts(request, latest, seed), read, config.silence_threshold_db)
        if request.augment
        else read(latest // 2)
    )
    if config.loudness_lufs is None:
        return wave_CN
    return normalized(wave_CN, sample_rate_hz=rate_hz, target_lufs=config.loudness_lufs)


def _starts(request: ClipRequest, latest: int, seed: int) -> list[int]:
    draws = np.random.default_rng(stream_seed(seed, "sound", request.sample_index, request.epoch))
    starts: list[int] = draws.integers(latest + 1, size=_MAX_DRAWS).tolist()
    return starts


def _sounding(starts: list[int], read: Callable[[int], Tensor], threshold_db: float | None) -> Tensor:
    """Returns the clip at the first start that is loud enough, the loudest if none is."""
    wave_CN = read(starts[0])
    if threshold_db is None:
        return wave_CN
    drawn = [wave_CN]
    while level_db(drawn[-1]) < threshold_db and len(drawn) < len(starts):
        drawn.append(read(starts[len(drawn)]))
    return drawn[-1] if level_db(drawn[-1]) >= threshold_db else max(drawn, key=level_db)
