"""Reading sounds: exact parts of real files in many formats, resampling, channels, and every kind of file
that cannot be used.

The files hold noise over a gliding tone, written with PyAV, so that no two parts are alike.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aiprod_ds.data.manifest import require_readable, scan
from aiprod_ds.data.probe_cache import default_probe_cache
from aiprod_ds.decode.audio import decode_audio, decode_beginning
from aiprod_ds.decode.resampling import check_rates, input_window, resample_window, resampled_length
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.errors import DataError

_SECONDS = 6
Samples = NDArray[np.float32]


def _sound(rate_hz: int, channels: int = 2, seconds: float = _SECONDS) -> Samples:
    t = np.arange(int(rate_hz * seconds)) / rate_hz
    draw = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * 440 * t * (1 + 0.1 * t))
    return (tone + 0.05 * draw.standard_normal((channels, t.size))).astype(np.float32)


_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def _write(
    path: Path, wave_CN: Samples, *, codec: str, rate_hz: int, options: dict[str, str] | None = None
) -> Path:
    layout = _LAYOUTS[wave_CN.shape[0]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout, options=options or {})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave_CN), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        converter = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=rate_hz)
        for piece in [*converter.resample(frame), *converter.resample(None), None]:
            container.mux(stream.encode(piece))
    return path


def _wav(path: Path, wave_CN: Samples, rate_hz: int = 44_100, codec: str = "pcm_f32le") -> Path:
    return _write(path, wave_CN, codec=codec, rate_hz=rate_hz)


def _whole(path: Path) -> Samples:
    """Returns the file as FFmpeg decodes it in one go."""
    with av.open(str(path)) as container:
        pieces = []
        for frame in container.decode(audio=0):
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, frame.layout.nb_channels).T
            scale = 1.0 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)
            pieces.append((samples / scale).astype(np.float32))
    return np.concatenate(pieces, axis=1)


FORMATS = [
    ("a.wav", "pcm_s16le", 44_100),
    ("b.wav", "pcm_f32le", 96_000),
    ("c.wav", "pcm_s24le", 48_000),
    ("d.aiff", "pcm_s16be", 44_100),
    ("e.flac", "flac", 44_100),
    ("f.mp3", "libmp3lame", 44_100),
    ("g.m4a", "aac", 44_100),
    ("h.m4a", "alac", 48_000),
    ("i.ogg", "flac", 48_000),
    ("j.opus", "libopus", 48_000),
    ("k.aac", "aac", 32_000),
    ("l.mkv", "aac", 44_100),
    ("m.webm", "libopus", 48_000),
    ("n.ts", "aac", 48_000),
    ("o.mp4", "libopus", 48_000),
    ("p.mp4", "libmp3lame", 44_100),
    ("q.ogg", "vorbis", 44_100),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sounds")
    for name, codec, rate_hz in FORMATS:
        options = {"strict": "-2"} if codec == "vorbis" else {}
        _write(path / name, _sound(rate_hz), codec=codec, rate_hz=rate_hz, options=options)
    # A bit rate so low that MP3 fetches bits from many frames back, and one that varies.
    _write(path / "r.mp3", _sound(44_100), codec="libmp3lame", rate_hz=44_100, options={"b": "64000"})
    _write(
        path / "s.mp3",
        _sound(44_100),
        codec="libmp3lame",
        rate_hz=44_100,
        options={"flags": "+qscale", "global_quality": "236"},
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name, _, _ in FORMATS), "r.mp3", "s.mp3"])
def test_a_part_is_the_same_part_of_the_whole(folder: Path, name: str) -> None:
    # Oracle: all of the file as FFmpeg decodes it from the beginning, bit for bit.
    whole_CN = _whole(folder / name).clip(-1, 1)
    with av.open(str(folder / name)) as container:
        rate_hz = container.streams.audio[0].rate
    length = whole_CN.shape[1]
    assert length >= _SECONDS * rate_hz - 1
    starts = [
        0,
        1,
        1023,
        rate_hz - 1,
        rate_hz + 1,
        2 * rate_hz + 777,
        3 * rate_hz,
        4 * rate_hz + 4097,
        length - 3000,
    ]
    for start in starts:
        part_CN = decode_audio(
            folder / name, start_sample=start, num_samples=3000, sample_rate_hz=rate_hz, channels=2
        )
        assert part_CN.dtype == torch.float32
        assert part_CN.is_contiguous()
        np.testing.assert_array_equal(
            part_CN.numpy(), whole_CN[:, start : start + 3000], err_msg=f"start {start}"
        )


@pytest.mark.parametrize(
    ("codec", "tolerance"),
    [("pcm_u8", 2**-7), ("pcm_s16le", 2**-15), ("pcm_s32le", 1e-7), ("pcm_f64le", 1e-7)],
)
def test_integers_and_doubles_become_floats_in_range(tmp_path: Path, codec: str, tolerance: float) -> None:
    # Tolerance: one step of the format, and rounding of fp32.
    wave_CN = _sound(8_000, channels=1, seconds=0.5)
    file = _wav(tmp_path / "a.wav", wave_CN, 8_000, codec)
    part_CN = decode_audio(file, start_sample=0, num_samples=4000, sample_rate_hz=8_000, channels=1)
    assert np.abs(part_CN.numpy() - wave_CN).max() <= tolerance


@pytest.mark.parametrize("name", ["e.flac", "f.mp3", "g.m4a", "j.opus"])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000])
def test_a_resampled_part_is_the_same_part_of_the_resampled_whole(
    folder: Path, name: str, rate_hz: int
) -> None:
    # Tolerance: the sums of the filter may be taken in another order for another length; samples are up to 1.
    with SoundFile(folder / name) as sound:
        own_hz, total = sound.sample_rate_hz, sum(piece.wave.shape[1] for piece in sound.pieces())
    length = resampled_length(total, from_hz=own_hz, to_hz=rate_hz)
    form = {"sample_rate_hz": rate_hz, "channels": 2}
    whole_CN = decode_audio(folder / name, start_sample=0, num_samples=length, **form)
    for start in (0, 1, 146, 147, 5000, length // 2 + 1, length - 2000):
        part_CN = decode_audio(folder / name, start_sample=start, num_samples=2000, **form)
        torch.testing.assert_close(part_CN, whole_CN[:, start : start + 2000], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(48_000, 44_100), (44_100, 48_000), (96_000, 16_000), (8_000, 44_100)]
)
def test_a_sine_stays_the_same_sine_at_another_rate(from_hz: int, to_hz: int) -> None:
    # Oracle: the sine at the new rate. The filter's ripple is far under 1e-4; the ends see zeros beyond the
    # sound.
    wave_CN = resample_window(_sine(1000, from_hz), 0, to_hz, from_hz=from_hz, to_hz=to_hz)
    inner = slice(to_hz // 10, -to_hz // 10)
    torch.testing.assert_close(wave_CN[:, inner], _sine(1000, to_hz)[:, inner], rtol=0, atol=1e-4)


def _sine(frequency_hz: float, rate_hz: int) -> torch.Tensor:
    seconds = torch.arange(rate_hz, dtype=torch.float64) / rate_hz
    return torch.sin(2 * math.pi * frequency_hz * seconds).float()[None]


def test_what_the_new_rate_cannot_hold_is_filtered_out() -> None:
    # 10 kHz does not exist at 16 kHz; without a filter it would come back as 6 kHz at full level.
    inner_CN = resample_window(_sine(10_000, 48_000), 0, 16_000, from_hz=48_000, to_hz=16_000)[:, 1600:-1600]
    assert inner_CN.abs().max() < 1e-4


def test_lengths_and_windows_of_resampling() -> None:
    assert resampled_length(48_000, from_hz=48_000, to_hz=44_100) == 44_100
    assert resampled_length(47_999, from_hz=48_000, to_hz=44_100) == 44_099
    assert input_window(100, 50, from_hz=48_000, to_hz=48_000) == range(100, 150)
    window = input_window(44_100, 441, from_hz=48_000, to_hz=44_100)
    assert window.start % 160 == 0
    assert window.start <= 48_000 - 74  # 64 zero crossings of the filter are 74 samples of the faster rate
    assert window.stop >= 48_480 + 74


def test_rates_without_a_simple_ratio_are_refused() -> None:
    for rate_hz in (
        8_000,
        11_025,
        16_000,
        22_050,
        24_000,
        32_000,
        44_100,
        48_000,
        88_200,
        96_000,
        176_400,
        192_000,
    ):
        for to_hz in (16_000, 22_050, 24_000, 44_100, 48_000):
            check_rates(from_hz=rate_hz, to_hz=to_hz)
    with pytest.raises(
        DataError, match=r"simple ratio to data.sample_rate_hz \(44100\), got 44101 Hz \(44101:44100\)"
    ):
        check_rates(from_hz=44_101, to_hz=44_100)


def test_mono_is_repeated_and_stereo_averaged(tmp_path: Path) -> None:
    mono_CN, stereo_CN = _sound(8_000, channels=1, seconds=0.5), _sound(8_000, channels=2, seconds=0.5)
    mono, stereo = (
        _wav(tmp_path / "mono.wav", mono_CN, 8_000),
        _wav(tmp_path / "stereo.wav", stereo_CN, 8_000),
    )
    form = {"start_sample": 100, "num_samples": 3000, "sample_rate_hz": 8_000}
    np.testing.assert_array_equal(
        decode_audio(mono, channels=2, **form).numpy(), np.repeat(mono_CN[:, 100:3100], 2, axis=0)
    )
    np.testing.assert_array_equal(decode_audio(mono, channels=1, **form).numpy(), mono_CN[:, 100:3100])
    expected = (stereo_CN[:1, 100:3100] + stereo_CN[1:, 100:3100]) / 2
    np.testing.assert_allclose(decode_audio(stereo, channels=1, **form).numpy(), expected, rtol=0, atol=1e-7)


def test_overshoot_is_clipped(tmp_path: Path) -> None:
    file = _wav(tmp_path / "loud.wav", np.full((1, 1000), 1.5, dtype=np.float32))
    part_CN = decode_audio(file, start_sample=0, num_samples=1000, sample_rate_hz=44_100, channels=1)
    assert part_CN.eq(1.0).all()


@pytest.mark.parametrize(("rate_hz", "got"), [(44_100, 2000), (22_050, 1000)])
def test_a_sound_that_ends_too_early_is_named(tmp_path: Path, rate_hz: int, got: int) -> None:
    file = _wav(tmp_path / "short.wav", _sound(44_100, seconds=1.0))
    start = rate_hz - got
    with pytest.raises(
        DataError,
        match=rf"short.wav: must have 3000 samples at {rate_hz} Hz from sample {start} on, got {got}\.",
    ):
        decode_audio(file, start_sample=start, num_samples=3000, sample_rate_hz=rate_hz, channels=2)
    with pytest.raises(DataError, match=r"from sample 200000 on, got 0\."):
        decode_audio(file, start_sample=200_000, num_samples=10, sample_rate_hz=rate_hz, channels=2)


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp3").write_bytes(b"this is not a sound" * 50)
    (tmp_path / "empty.wav").touch()
    for name in ("noise.mp3", "empty.wav", "gone.flac"):
        with pytest.raises(DataError, match=f"{name}: must be decodable sound"):
            decode_audio(tmp_path / name, start_sample=0, num_samples=1, sample_rate_hz=44_100, channels=2)


def test_a_file_without_samples_is_named(tmp_path: Path) -> None:
    file = _wav(tmp_path / "header.wav", _sound(44_100, seconds=0.1))
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"data") + 4] + bytes(4))
    with pytest.raises(DataError, match=r"header.wav: must be decodable sound, got: .*no sample"):
        decode_audio(file, start_sample=0, num_samples=1, sample_rate_hz=44_100, channels=2)


def _silent_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 32, 3), dtype=np.uint8), format="rgb24"))
        )
        container.mux(stream.encode(None))
    return path


def test_a_video_without_sound_is_named(tmp_path: Path) -> None:
    file = _silent_video(tmp_path / "silent.mp4")
    with pytest.raises(DataError, match=r"silent.mp4: must be decodable sound, got: it holds no sound"):
        decode_audio(file, start_sample=0, num_samples=1, sample_rate_hz=44_100, channels=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    wave_CN = _sound(44_100, seconds=1.0)
    wave_CN[1, 30_000] = bad
    file = _wav(tmp_path / "bad.wav", wave_CN)
    assert (
        decode_audio(file, start_sample=0, num_samples=30_000, sample_rate_hz=44_100, channels=2)
        .isfinite()
        .all()
    )
    with pytest.raises(DataError, match=r"bad.wav: samples must be finite, got NaN or infinity"):
        decode_audio(file, start_sample=29_000, num_samples=2_000, sample_rate_hz=44_100, channels=2)
    assert "holds NaN or infinity after sample" in scan(tmp_path, medium="sound").unreadable[0].reason


@pytest.mark.parametrize("name", ["e.flac", "f.mp3", "g.m4a", "h.m4a", "i.ogg", "j.opus", "l.mkv", "n.ts"])
def test_damage_in_the_middle_is_found_by_the_scan(folder: Path, tmp_path: Path, name: str) -> None:
    # Some demuxers drop the damaged packets and say nothing, so that what follows would move forward.
    file = tmp_path / name
    data = bytearray((folder / name).read_bytes())
    with av.open(str(folder / name)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    position, _ = packets[len(packets) // 2]
    data[position : position + 4000] = bytes(4000)
    file.write_bytes(bytes(data))
    (unreadable,) = scan(tmp_path, medium="sound").unreadable
    assert unreadable.path == name
    assert unreadable.reason.startswith("cannot be decoded: ")


@pytest.mark.parametrize("name", ["h.m4a", "j.opus"])
def test_damage_in_a_part_is_an_error_and_elsewhere_none(folder: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    data = bytearray((folder / name).read_bytes())
    with av.open(str(folder / name)) as container:
        rate_hz = container.streams.audio[0].rate
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        broken = packets[int(len(packets) * 0.5)].pos
    data[broken : broken + 100] = bytes(100)
    file.write_bytes(bytes(data))
    form = {"num_samples": 1000, "sample_rate_hz": rate_hz, "channels": 2}
    with pytest.raises(DataError, match=f"{name}: must be decodable sound"):
        decode_audio(file, start_sample=_SECONDS * rate_hz // 2, **form)
    expected_CN = decode_audio(folder / name, start_sample=5 * rate_hz, **form)
    assert torch.equal(decode_audio(file, start_sample=5 * rate_hz, **form), expected_CN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.wav", "f.mp3", "j.opus"])
def test_a_truncated_file_counts_what_it_holds(folder: Path, tmp_path: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    whole, (half,) = scan(folder, medium="sound"), scan(tmp_path, medium="sound").records
    full = next(record for record in whole.records if record.path == name)
    assert 0.3 * full.frames < half.frames < 0.6 * full.frames
    rate_hz = half.audio_rate_hz
    assert rate_hz is not None
    form = {"num_samples": 1000, "sample_rate_hz": rate_hz, "channels": 2}
    assert decode_audio(tmp_path / name, start_sample=half.frames - 1000, **form).shape == (2, 1000)
    with pytest.raises(DataError, match=r"must have 1000 samples .* got 999"):
        decode_audio(tmp_path / name, start_sample=half.frames - 999, **form)


@pytest.mark.parametrize("name", ["e.flac", "g.m4a"])
def test_a_truncated_file_that_says_so_is_unreadable(folder: Path, tmp_path: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert [item.path for item in scan(tmp_path, medium="sound").unreadable] == [name]


def test_a_scan_for_sound_takes_audio_files_and_the_sound_of_videos(folder: Path) -> None:
    manifest = scan(folder, medium="sound")
    assert manifest.unreadable == ()
    assert manifest.medium == "sound"
    by_name = {record.path: record for record in manifest.records}
    assert sorted(by_name) == sorted([*(name for name, _, _ in FORMATS), "r.mp3", "s.mp3"])
    for name, _, rate_hz in FORMATS:
        record = by_name[name]
        assert (record.fps, record.audio_rate_hz, record.audio_channels) == (rate_hz, rate_hz, 2)
        assert (record.height, record.width) == (1, 1)
        assert record.frames == _whole(folder / name).shape[1]
        assert record.seconds == record.frames / rate_hz
        assert record.audio_peak == pytest.approx(np.abs(_whole(folder / name)).max(), abs=1e-6)


def test_a_peak_of_integers_in_floats_is_refused(tmp_path: Path) -> None:
    _wav(tmp_path / "scaled.wav", 32_768 * _sound(44_100, seconds=0.2))
    assert (
        scan(tmp_path, medium="sound")
        .unreadable[0]
        .reason.startswith("its samples must be in [-1, 1], got a peak of ")
    )


def test_tables_may_name_sounds_apart_from_videos(tmp_path: Path) -> None:
    _wav(tmp_path / "voice.wav", _sound(8_000, channels=1, seconds=0.5), 8_000)
    _silent_video(tmp_path / "film.mp4")
    table = tmp_path / "clips.csv"
    table.write_text("video,audio\nfilm.mp4,voice.wav\n,voice.wav\nfilm.mp4,\n", encoding="utf-8")
    manifest = scan(table, medium="sound")
    assert [record.path for record in manifest.records] == ["voice.wav", "voice.wav"]
    assert [(item.path, item.reason) for item in manifest.unreadable] == [
        ("film.mp4", "cannot be decoded: it holds no sound")
    ]
    table.write_text("film\nx.wav\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"row 1: must name a file in column 'audio' or 'video' or 'media_path'"
    ):
        scan(table, medium="sound")


def test_probes_of_sounds_are_kept_apart_from_those_of_videos(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    _wav(tmp_path / "set" / "a.wav", _sound(8_000, seconds=0.2), 8_000)
    cache = tmp_path / "cache.json"
    first = scan(tmp_path / "set", cache=cache, medium="sound")
    text = cache.read_text(encoding="utf-8")
    cache.write_text(text.replace('"frames":1600', '"frames":99'), encoding="utf-8")
    assert scan(tmp_path / "set", cache=cache, medium="sound").records[0].frames == 99
    cache.write_text(cache.read_text(encoding="utf-8").replace(", sound", ", video"), encoding="utf-8")
    assert scan(tmp_path / "set", cache=cache, medium="sound") == first
    assert default_probe_cache(tmp_path) != default_probe_cache(tmp_path, medium="sound")


def test_a_folder_without_sounds_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no sound", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"must hold at least one sound clip, got none. Add files ending in .*\.wav"
    ):
        require_readable(scan(tmp_path, medium="sound"), 0.0)


def test_a_sound_that_changes_its_form_is_unreadable(tmp_path: Path) -> None:
    parts = [
        _write(tmp_path / f"{n}.aac", _sound(44_100, channels=n, seconds=1.0), codec="aac", rate_hz=44_100)
        for n in (1, 2)
    ]
    (tmp_path / "joined.aac").write_bytes(b"".join(part.read_bytes() for part in parts))
    (unreadable,) = scan(tmp_path, medium="sound").unreadable
    assert unreadable.path == "joined.aac"
    assert "rate and channels change from (44100, 1) to (44100, 2) at sample " in unreadable.reason


def test_the_file_of_variable_bit_rate_has_one(folder: Path) -> None:
    with av.open(str(folder / "s.mp3")) as container:
        sizes = {packet.size for packet in container.demux(audio=0) if packet.size}
    assert max(sizes) > 1.2 * min(sizes)  # a constant one differs by a byte


def test_a_beginning_is_filled_with_silence(tmp_path: Path) -> None:
    path = _wav(tmp_path / "a.wav", _sound(16_000, seconds=0.5), rate_hz=16_000)
    whole = decode_audio(path, start_sample=0, num_samples=8000, sample_rate_hz=16_000, channels=2)
    longer = decode_beginning(path, num_samples=12_000, sample_rate_hz=16_000, channels=2)
    assert torch.equal(longer[:, :8000], whole)
    assert longer[:, 8000:].eq(0).all()
    shorter = decode_beginning(path, num_samples=100, sample_rate_hz=16_000, channels=2)
    assert torch.equal(shorter, whole[:, :100])
    with pytest.raises(DataError, match=r"no\.wav: must be decodable sound"):
        decode_beginning(tmp_path / "no.wav", num_samples=1, sample_rate_hz=16_000, channels=1)
