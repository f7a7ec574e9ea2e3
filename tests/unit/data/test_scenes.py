"""Cuts are found at the frames where they were drawn, and films become clips that straddle none of them."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from aiprod_ds.config.data import PictureConfig
from aiprod_ds.data import scenes
from aiprod_ds.data.clip_list import Listing, list_files
from aiprod_ds.data.dataset import ClipRequest, VideoClipDataset
from aiprod_ds.data.manifest import Manifest, holdout, scan
from aiprod_ds.data.scenes import cut_at_scenes, scenes_of, usable_clips
from aiprod_ds.data.treatment import duplicate_notes, picture_notes
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.decode.scenes import begins_scene, change, find_cuts
from aiprod_ds.decode.video import decode_clip
from aiprod_ds.errors import ConfigError

RATE_HZ = 24
_COLORS = ((180, 40, 40), (40, 60, 170), (60, 150, 60), (200, 190, 60), (90, 90, 90), (150, 60, 160))


def _scene(number: int, length: int, *, size: tuple[int, int] = (48, 64)) -> list[NDArray[np.uint8]]:
    """A square that moves before a gradient of one color; each scene has its own."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    shade = 0.7 + 0.3 * (rows / height + columns / width) / 2
    frames = []
    for index in range(length):
        frame = np.asarray(_COLORS[number % len(_COLORS)]) * shade[..., None]
        top, left = 5 + index % 20, (3 + 2 * index) % (width - 10)
        frame[top : top + 8, left : left + 8] = 230
        frames.append(frame.astype(np.uint8))
    return frames


def _film(
    path: Path, lengths: list[int], *, rate_hz: int = RATE_HZ, codec: str = "libx264", first: int = 0
) -> list[NDArray[np.uint8]]:
    frames = [frame for number, length in enumerate(lengths) for frame in _scene(number + first, length)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.time_base = Fraction(1, rate_hz)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return frames


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")],
)
def test_cuts_are_found_at_their_frames(tmp_path: Path, name: str, codec: str) -> None:
    lengths = [11, 7, 24, 3, 9]
    _film(tmp_path / name, lengths, codec=codec)
    found = [round(seconds * RATE_HZ) for seconds in find_cuts(tmp_path / name, threshold=27.0)]
    assert found == list(itertools.accumulate(lengths[:-1]))


def test_motion_and_dissolves_are_no_cuts(tmp_path: Path) -> None:
    _film(tmp_path / "a.mp4", [60])
    assert find_cuts(tmp_path / "a.mp4", threshold=27.0) == ()
    assert len(find_cuts(tmp_path / "a.mp4", threshold=0.01)) == 59


def test_a_sudden_change_counts_below_the_threshold() -> None:
    still = [0.5] * 4
    changes = [*still, 16.0, *still]
    found = [index for index in range(9) if _begins(changes, index)]
    assert found == [4]
    assert not any(_begins([14.0 if change == 16.0 else change for change in changes], n) for n in range(9))
    # Of much motion, the same change is a part.
    assert not any(_begins([8.0, 9.0, 16.0, 8.0, 9.0], index) for index in range(5))
    assert _begins([8.0, 9.0, 27.0, 8.0, 9.0], 2)


def _begins(changes: list[float], index: int) -> bool:
    return begins_scene(changes, index, threshold=27.0)


def test_the_change_is_that_of_the_worked_numbers() -> None:
    def flat(*values: float) -> NDArray[np.float32]:
        return np.stack([np.full((2, 3), value, dtype=np.float32) for value in values])

    black, white = flat(np.nan, 0, 0), flat(np.nan, 0, 255)
    red, green = flat(0, 255, 255), flat(60, 255, 255)
    assert change(black, white) == 85.0
    assert change(red, green) == 20.0
    # Around the circle: 175 and 5 half degrees are 10 apart. Grey has no hue.
    assert change(flat(175, 255, 255), flat(5, 255, 255)) == pytest.approx(10 / 3)
    assert change(flat(90, 100, 100), flat(np.nan, 100, 100)) == 0.0


def _record(**changes: Any) -> MediaRecord:
    values: dict[str, Any] = {
        "path": "a.mp4",
        "sha256": "x",
        "frames": 48,
        "fps": 24.0,
        "height": 48,
        "width": 64,
        "seconds": 2.0,
    }
    return MediaRecord(**{**values, **changes})


def test_scenes_are_records_with_their_own_lengths() -> None:
    first, middle, last = scenes_of(_record(), (0.5, 1.5))
    assert [(r.start_seconds, r.end_seconds, r.frames, r.seconds) for r in (first, middle, last)] == [
        (0.0, 0.5, 12, 0.5),
        (0.5, 1.5, 24, 1.0),
        (1.5, None, 12, 0.5),
    ]
    assert [record.name for record in (first, middle, last)] == [
        "a.mp4#t=0,0.5",
        "a.mp4#t=0.5,1.5",
        "a.mp4#t=1.5",
    ]
    assert list(scenes_of(_record(), ())) == [_record()]
    assert _record().name == "a.mp4"
    # Matroska counts milliseconds: 12 frames are 0.5 s, of which 0.499 are left after a cut at 1.501 s.
    *_, last = scenes_of(_record(), (1.501,))
    assert last.frames == 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "films").mkdir()
    _film(tmp_path / "films" / "a.mp4", [12, 18, 10])
    _film(tmp_path / "films" / "b.mp4", [20], first=3)
    return tmp_path / "films"


def _cut(folder: Path, *, cache: Path | None = None) -> Manifest:
    return cut_at_scenes(scan(folder), threshold=27.0, cache=cache)


def test_no_clip_straddles_a_cut_at_any_rate(folder: Path) -> None:
    manifest = _cut(folder)
    assert [(record.name, record.frames) for record in manifest.records] == [
        ("a.mp4#t=0,0.5", 12),
        ("a.mp4#t=0.5,1.25", 18),
        ("a.mp4#t=1.25", 10),
        ("b.mp4", 20),
    ]
    dataset = VideoClipDataset(manifest, seed=0)
    assert [facts.name for facts in dataset.lengths()] == [record.name for record in manifest.records]
    for index, record in enumerate(manifest.records):
        first = int(record.start_seconds * RATE_HZ)
        whole = decode_clip(
            folder / record.path, start_seconds=0.0, num_frames=first + record.frames, frame_rate_hz=None
        )[first:]
        # Each frame of a clip is a frame of its scene, bit for bit, also where a rate asks between two.
        own = {frame.tobytes() for frame in whole}
        for frames, rate_hz in ((record.frames, None), (9, 24.0), (8, 60.0), (5, 13.0)):
            for epoch in range(4):
                request = ClipRequest(
                    sample_index=index, epoch=epoch, frames=frames, height=48, width=64, frame_rate_hz=rate_hz
                )
                video_CTHW = dataset[request]["video"]
                pixels = ((video_CTHW + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
                assert all(frame.tobytes() in own for frame in pixels)


def test_scenes_of_a_film_are_held_out_together_and_are_no_copies(folder: Path) -> None:
    manifest = _cut(folder)
    train, validation = holdout(manifest, fraction=0.25, seed=0)
    assert (
        len({record.path for record in train.records} & {record.path for record in validation.records}) == 0
    )
    assert duplicate_notes(manifest, Manifest(root=folder, records=())) == ()
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    copies = duplicate_notes(_cut(folder), Manifest(root=folder, records=()))
    pairs = ", ".join(f"a.mp4#t={span} = copy.mp4#t={span}" for span in ("0,0.5", "0.5,1.25", "1.25"))
    assert copies == (f"3 clips in training more than once, by content: {pairs}",)


def test_the_list_of_clips_knows_the_cuts(folder: Path) -> None:
    empty = Manifest(root=folder, records=())
    listed = list_files(Listing(train=_cut(folder), validation=empty), selection={})
    names = [(entry.name, dict(entry.facts).get("end_seconds")) for entry in listed.entries()]
    assert names == [
        ("a.mp4#t=0,0.5", 0.5),
        ("a.mp4#t=0.5,1.25", 1.25),
        ("a.mp4#t=1.25", None),
        ("b.mp4", None),
    ]
    whole = list_files(Listing(train=scan(folder), validation=empty), selection={})
    assert whole.sha256 != listed.sha256


def test_cuts_are_remembered_for_their_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "scenes.json"
    asked: list[str] = []

    def watched(path: Path, *, threshold: float) -> tuple[float, ...]:
        asked.append(path.name)
        return find_cuts(path, threshold=threshold)

    monkeypatch.setattr(scenes, "find_cuts", watched)
    first = _cut(folder, cache=cache)
    assert sorted(asked) == ["a.mp4", "b.mp4"]
    assert _cut(folder, cache=cache) == first
    assert len(asked) == 2
    (folder / "b.mp4").rename(folder / "c.mp4")
    _film(folder / "d.mp4", [5, 5])
    _cut(folder, cache=cache)
    assert asked[2:] == ["d.mp4"]
    cut_at_scenes(scan(folder), threshold=20.0, cache=cache)
    assert len(asked) == 6
    cache.write_text("{")
    assert _cut(folder, cache=cache).records[:3] == first.records[:3]


def test_settings_cut_and_the_notes_say_so(folder: Path) -> None:
    (folder / "noise.mp4").write_bytes((folder / "a.mp4").read_bytes()[:-2000])
    found = scan(folder)
    assert usable_clips(found, PictureConfig(), probes=None).records == found.records
    config = PictureConfig(scenes="cut")
    cut = usable_clips(found, config, probes=None)
    assert picture_notes(cut.records, config) == ("1 file cut into 3 scenes: a.mp4",)
    with pytest.raises(ConfigError, match=r"scene_threshold: has no effect without scenes: cut, got 20"):
        PictureConfig(scene_threshold=20.0)


def test_a_film_that_is_damaged_is_named(folder: Path) -> None:
    manifest = scan(folder)
    content = bytearray((folder / "a.mp4").read_bytes())
    middle = len(content) // 2
    content[middle - 300 : middle + 300] = bytes(600)
    (folder / "a.mp4").write_bytes(content)
    cut = cut_at_scenes(manifest, threshold=27.0)
    assert [record.path for record in cut.records] == ["b.mp4"]
    (bad,) = cut.unreadable
    assert bad.path == "a.mp4"
    assert bad.reason.startswith("cannot be decoded to its end: ")
