"""Decoding, fitting and the datasets, on small real files: frame i is grey of shade 20 + 4 i, so frames name
themselves."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from aiprod_ds.data.dataset import ClipRequest, TensorVideoDataset, VideoClipDataset
from aiprod_ds.data.manifest import scan
from aiprod_ds.decode.fit import fit_clip
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.decode.video import decode_clip, max_start_seconds
from aiprod_ds.errors import DataError

_FRAMES, _FPS, _HEIGHT, _WIDTH = 48, 24, 32, 48


def _write_video(path: Path, *, gop: int = 12) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=_FPS, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.gop_size, stream.bit_rate = gop, 4_000_000
        for index in range(_FRAMES):
            pixels = np.full((_HEIGHT, _WIDTH, 3), 20 + 4 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_video(tmp_path_factory.mktemp("media") / "clip.mp4")


def _indices(frames_THWC: np.ndarray) -> list[int]:
    # Shades lie 4 apart and the codec errs by about 1, so rounding names the frame.
    return [round((float(frame.mean()) - 20) / 4) for frame in frames_THWC]


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 30, 43])
@pytest.mark.parametrize("rate", [None, 24.0])
def test_consecutive_frames_are_exact_wherever_the_keyframes_lie(
    clip: Path, start: int, rate: float | None
) -> None:
    frames = decode_clip(clip, start_seconds=start / _FPS, num_frames=5, frame_rate_hz=rate)
    assert frames.shape == (5, _HEIGHT, _WIDTH, 3)
    assert frames.dtype == np.uint8
    assert _indices(frames) == list(range(start, start + 5))


def test_resampling_takes_the_nearest_frame(clip: Path) -> None:
    half = decode_clip(clip, start_seconds=0.5, num_frames=4, frame_rate_hz=12.0)
    assert _indices(half) == [12, 14, 16, 18]
    # 48 Hz would ask for frames 46, 46.5, 47, 47.5: a tie takes the earlier frame, the last one is shown
    # until the end.
    double = decode_clip(clip, start_seconds=46 / _FPS, num_frames=4, frame_rate_hz=48.0)
    assert _indices(double) in ([46, 46, 47, 47], [46, 47, 47, 47])


@pytest.mark.parametrize("suffix", ["mkv", "mpg", "ts", "avi"])
def test_every_container_gives_the_same_frames(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"clip.{suffix}"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg2video" if suffix in {"mpg", "ts"} else "mpeg4", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = _WIDTH, _HEIGHT, "yuv420p", 12
        stream.bit_rate = 4_000_000
        for index in range(_FRAMES):
            pixels = np.full((_HEIGHT, _WIDTH, 3), 20 + 4 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    assert scan(tmp_path).records[0].frames == _FRAMES
    for start in (0, 13, 30):
        frames = decode_clip(file, start_seconds=start / _FPS, num_frames=3, frame_rate_hz=float(_FPS))
        assert _indices(frames) == [start, start + 1, start + 2]


def _write_moving(path: Path, *, codec: str, options: dict[str, str]) -> list[np.ndarray]:
    """Writes 48 frames of drifting noise, which make the encoder use B-frames, and returns them as decoded in
    one go."""
    noise = np.random.default_rng(0).integers(0, 256, (_HEIGHT + 48, _WIDTH + 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for index in range(_FRAMES):
            pixels = np.ascontiguousarray(noise[index : index + _HEIGHT, index : index + _WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"bf": "3", "g": "12"}),
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12"}),
        ("open.mkv", "libx264", {"x264-params": "open-gop=1:bframes=8:b-pyramid=normal:keyint=12"}),
        ("refresh.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
        ("hidden.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("reordered.avi", "libx264", {"bf": "2", "g": "10"}),
        ("reordered4.avi", "mpeg4", {"bf": "2", "g": "10"}),
        ("jumping.mpg", "mpeg2video", {"bf": "2", "g": "10"}),
    ],
)
@pytest.mark.parametrize("rate", [None, float(_FPS)])
def test_frames_are_exact_where_they_are_stored_out_of_order(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], rate: float | None
) -> None:
    # Oracle: the frames that FFmpeg gives in one go from the beginning, bit for bit.
    expected = _write_moving(tmp_path / name, codec=codec, options=options)
    assert len(expected) == _FRAMES
    for start in range(_FRAMES - 2):
        frames = decode_clip(tmp_path / name, start_seconds=start / _FPS, num_frames=3, frame_rate_hz=rate)
        np.testing.assert_array_equal(frames, expected[start : start + 3], err_msg=f"start {start}")


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_damaged_frame_is_an_error_not_a_guess(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "clip.mp4"
    _write_moving(file, codec=codec, options={})
    with av.open(str(file)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(file.read_bytes())
    position, size = packets[_FRAMES // 2]
    data[position + 8 : position + size] = bytes(255 - byte for byte in data[position + 8 : position + size])
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"clip\.mp4: must be a decodable video, got: .*frame"):
        decode_clip(file, start_seconds=0.0, num_frames=_FRAMES, frame_rate_hz=float(_FPS))


def test_a_rotated_clip_is_turned_upright(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + len(identity)] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    (tmp_path / "turned.mp4").write_bytes(bytes(data))
    record = scan(tmp_path).records[0]
    assert (record.height, record.width) == (_WIDTH, _HEIGHT)
    frames = decode_clip(tmp_path / "turned.mp4", start_seconds=0.0, num_frames=2, frame_rate_hz=None)
    assert frames.shape == (2, _WIDTH, _HEIGHT, 3)


@pytest.mark.parametrize("rate", [None, 24.0])
def test_a_clip_that_ends_too_early_is_named(clip: Path, rate: float | None) -> None:
    with pytest.raises(DataError, match=r"clip.mp4: must have 10 frames.* from 1.792 s on, got 5"):
        decode_clip(clip, start_seconds=43 / _FPS, num_frames=10, frame_rate_hz=rate)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    for name in ("noise.mp4", "gone.mp4"):
        with pytest.raises(DataError, match=f"{name}: must be a decodable video"):
            decode_clip(tmp_path / name, start_seconds=0.0, num_frames=1, frame_rate_hz=None)


def test_the_latest_start_leaves_the_frames() -> None:
    record = MediaRecord(path="a.mp4", sha256="0", frames=48, fps=24.0, height=16, width=16, seconds=2.0)
    assert max_start_seconds(record, 24, None) == pytest.approx(1.0)
    assert max_start_seconds(record, 48, 24.0) == 0.0
    assert max_start_seconds(record, 9, 12.0) == pytest.approx(1.25)
    with pytest.raises(DataError, match=r"a.mp4: must have 25 frames at 12 Hz, got 24"):
        max_start_seconds(record, 25, 12.0)


def test_bytes_become_floats_in_range() -> None:
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    frames[1] = 255
    video = fit_clip(frames, height=4, width=4, seed=None, flip=False)
    assert video.shape == (3, 2, 4, 4)
    assert video.dtype == torch.float32
    assert video[:, 0].eq(-1).all()
    assert video[:, 1].eq(1).all()


def test_the_centre_is_cut_from_the_covering_size() -> None:
    # Oracle: columns 2..5 of 8, by slicing; no scaling is needed because the height already fits.
    clip = torch.linspace(-1, 1, 8).expand(3, 2, 4, 8).contiguous()
    assert torch.equal(fit_clip(clip, height=4, width=4, seed=None, flip=True), clip[..., 2:6])


def test_shrinking_is_antialiased() -> None:
    # A checkerboard of single pixels averages to grey; sampling without a filter would keep black or white.
    board = (torch.arange(32)[:, None] + torch.arange(32)[None, :]).remainder(2).float() * 2 - 1
    small = fit_clip(board.expand(3, 1, 32, 32), height=8, width=8, seed=None, flip=False)
    assert small.abs().max() < 0.1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (64, 40), (17, 33)])
def test_every_size_is_covered(height: int, width: int) -> None:
    frames = np.full((2, 20, 30, 3), 100, dtype=np.uint8)
    assert fit_clip(frames, height=height, width=width, seed=3, flip=True).shape == (3, 2, height, width)


def test_crop_and_flip_follow_the_seed() -> None:
    clip = torch.rand(3, 1, 8, 16) * 2 - 1
    first = [fit_clip(clip, height=8, width=8, seed=seed, flip=True) for seed in range(12)]
    again = [fit_clip(clip, height=8, width=8, seed=seed, flip=True) for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    unflipped = [fit_clip(clip, height=8, width=8, seed=seed, flip=False) for seed in range(12)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(first, unflipped, strict=True)]
    assert any(mirrored)
    assert not all(mirrored)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"must be \[T,H,W,3\] uint8 .* got \[4, 8, 8\]"):
        fit_clip(torch.zeros(4, 8, 8), height=4, width=4, seed=None, flip=False)


def _request(**changes: object) -> ClipRequest:
    return ClipRequest(**{"sample_index": 0, "epoch": 0, "frames": 5, "height": 16, "width": 16, **changes})  # type: ignore[arg-type]


def _first_frame(video_CTHW: torch.Tensor) -> int:
    return round(((float(video_CTHW[:, 0].mean()) + 1) * 127.5 - 20) / 4)


def test_a_file_answers_requests_as_a_function_of_seed_sample_and_epoch(clip: Path) -> None:
    manifest = scan(clip.parent)
    dataset = VideoClipDataset(manifest, seed=7)
    assert len(dataset) == 1
    sample = dataset[_request(epoch=3)]
    assert sample["video"].shape == (3, 5, 16, 16)
    assert torch.equal(sample["video"], VideoClipDataset(manifest, seed=7)[_request(epoch=3)]["video"])
    starts = {_first_frame(dataset[_request(epoch=epoch)]["video"]) for epoch in range(8)}
    assert len(starts) > 2
    assert all(0 <= start <= _FRAMES - 5 for start in starts)


def test_without_augmentation_the_centre_is_taken(clip: Path) -> None:
    dataset = VideoClipDataset(scan(clip.parent), seed=7)
    for epoch in range(3):
        video = dataset[_request(epoch=epoch, augment=False, flip=True)]["video"]
        assert _first_frame(video) == (_FRAMES - 5) // 2


def test_every_start_that_is_drawn_can_be_decoded(clip: Path) -> None:
    dataset = VideoClipDataset(scan(clip.parent), seed=0)
    for frames, rate in ((48, None), (47, 24.0), (24, 12.0), (60, 30.0), (90, 48.0), (14, 7.3)):
        for epoch in range(4):
            assert (
                dataset[_request(frames=frames, frame_rate_hz=rate, epoch=epoch)]["video"].shape[1] == frames
            )


def test_files_of_variable_rate_never_run_out(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "variable.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = _WIDTH, _HEIGHT, "yuv420p", 6
        stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(24):
            frame = av.VideoFrame.from_ndarray(
                np.full((_HEIGHT, _WIDTH, 3), 90, dtype=np.uint8), format="rgb24"
            )
            # The first half runs at 50 Hz, the second at 10: counted in frames, a late start would leave too
            # few.
            frame.pts, frame.time_base = (
                20 * index if index < 12 else 240 + 100 * (index - 12),
                Fraction(1, 1000),
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    manifest = scan(tmp_path)
    assert manifest.records[0].fps == pytest.approx(23 / 1.34, rel=0.02)
    dataset = VideoClipDataset(manifest, seed=0)
    for epoch in range(12):
        for frames, rate in ((9, None), (24, None), (17, 24.0)):
            assert (
                dataset[_request(frames=frames, frame_rate_hz=rate, epoch=epoch)]["video"].shape[1] == frames
            )


@pytest.mark.parametrize("rate", [None, 10.0, 60.0])
def test_an_image_is_a_clip_of_one_frame_at_every_rate(tmp_path: Path, rate: float | None) -> None:
    Image.fromarray(np.full((_HEIGHT, _WIDTH, 3), 100, dtype=np.uint8)).save(tmp_path / "image.png")
    video_CTHW = VideoClipDataset(scan(tmp_path), seed=0)[_request(frames=1, frame_rate_hz=rate)]["video"]
    # PNG keeps every value, so only float32 rounds.
    torch.testing.assert_close(video_CTHW, torch.full((3, 1, 16, 16), 100 / 127.5 - 1), atol=1e-6, rtol=0.0)


def test_a_video_shorter_than_a_period_gives_a_frame(tmp_path: Path) -> None:
    # 2 frames at 24 Hz last 83 ms; a frame at 10 Hz would last 100.
    record = MediaRecord(path="a.mp4", sha256="0", frames=2, fps=24.0, height=16, width=16, seconds=2 / 24)
    assert max_start_seconds(record, 1, 10.0) == pytest.approx(1 / 24)


def test_facts_of_files(clip: Path) -> None:
    (facts,) = VideoClipDataset(scan(clip.parent), seed=0).lengths()
    assert (facts.name, facts.frames, facts.seconds, facts.height, facts.width) == (
        "clip.mp4",
        48,
        2.0,
        32,
        48,
    )


def _ramp(frames: int) -> torch.Tensor:
    return torch.linspace(-1, 1, frames)[None, :, None, None].expand(3, frames, 16, 16).contiguous()


@pytest.mark.parametrize("as_mapping", [False, True])
def test_tensors_answer_the_same_requests(as_mapping: bool) -> None:
    clip = _ramp(21)
    dataset = TensorVideoDataset([{"video": clip}] if as_mapping else [clip], seed=0)
    centre = dataset[_request(augment=False)]["video"]
    assert torch.equal(centre, clip[:, 8:13])
    firsts = {float(dataset[_request(epoch=epoch)]["video"][0, 0, 0, 0]) for epoch in range(8)}
    assert len(firsts) > 2
    assert [(f.frames, f.height, f.width) for f in dataset.lengths()] == [(21, 16, 16)]


def test_tensors_are_resampled_when_their_rate_is_known() -> None:
    clip = _ramp(21)
    dataset = TensorVideoDataset([{"video": clip, "fps": 24.0}], seed=0)
    video = dataset[_request(frames=10, frame_rate_hz=12.0, augment=False)]["video"]
    assert torch.equal(video, clip[:, 0:20:2])
    assert dataset.lengths()[0].seconds == pytest.approx(21 / 24)
    with pytest.raises(DataError, match="must state its rate under 'fps'"):
        TensorVideoDataset([clip], seed=0)[_request(frame_rate_hz=12.0)]


def test_items_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match=r"dataset\[1\]: must have 5 frames, got 4"):
        TensorVideoDataset([_ramp(9), _ramp(4)], seed=0)[_request(sample_index=1)]
    with pytest.raises(DataError, match=r"dataset\[0\]: must be a tensor or array .* got str"):
        TensorVideoDataset(["clip"], seed=0)[_request()]
