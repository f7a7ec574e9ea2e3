"""A folder with everything that people's folders hold: each file is trained on as it is displayed, or refused
or passed over by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.data.dataset import ClipDataset, ClipRequest
from aiprod_ds.data.manifest import scan
from aiprod_ds.testing.awkward_folder import BACKGROUND, Truth, write_awkward_folder
from aiprod_ds.trainers.open_data import open_video_files

# Codecs smear strong colors, 8 bits of 4:2:0 round them, and each step of HDR's codes is several of SDR's.
_TOLERANCE = 12
# Width over height of what a bucket asks for, from tall to wide.
_SHAPES = ((48, 32), (32, 32), (32, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    path: Path
    truth: Truth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("awkward") / "clips"
    return Folder(path=path, truth=write_awkward_folder(path))


def test_every_file_is_a_clip_or_named_with_its_reason(folder: Folder) -> None:
    found, truth = scan(folder.path), folder.truth
    assert {record.path: (record.height, record.width) for record in found.records} == {
        name: clip.size for name, clip in truth.clips.items()
    }
    reasons = {entry.path: entry.reason for entry in found.unreadable}
    assert set(reasons) == set(truth.unreadable)
    assert [name for name, reason in truth.unreadable.items() if reason not in reasons[name]] == []
    assert {entry.path: entry.reason for entry in found.ignored} == truth.ignored


@pytest.mark.parametrize(("height", "width"), _SHAPES)
def test_every_clip_is_trained_on_as_it_is_displayed(folder: Folder, height: int, width: int) -> None:
    share = math.nextafter(len(folder.truth.unreadable) / len(folder.truth.clips), 1)
    config = VideoDataConfig(
        train=str(folder.path), max_unreadable_fraction=share, alpha_background=BACKGROUND
    )
    data = open_video_files(config, seed=0)
    wrong, seen = {}, 0
    for dataset in (data.train, data.validation):
        for index, facts in enumerate(dataset.lengths()):
            seen += 1
            found = _quarters(dataset, index, frames=min(5, facts.frames), height=height, width=width)
            expected = np.array(folder.truth.clips[facts.name].quarters)
            if np.abs(found - expected).max() > _TOLERANCE:
                wrong[facts.name] = (found.round().astype(int).tolist(), expected.tolist())
    assert wrong == {}
    assert seen == len(folder.truth.clips)


def _quarters(dataset: ClipDataset, index: int, *, frames: int, height: int, width: int) -> np.ndarray:
    """Returns the color in the middle of each quarter, of the frame that is furthest from the others."""
    request = ClipRequest(
        sample_index=index, epoch=0, frames=frames, height=height, width=width, augment=False
    )
    video_CTHW = (dataset[request]["video"].numpy() + 1) * 127.5
    rows, columns = (height // 4, height - height // 4), (width // 4, width - width // 4)
    places = np.stack([video_CTHW[:, :, row, column] for row in rows for column in columns])
    spread = places.max(axis=2) - places.min(axis=2)
    assert spread.max() <= _TOLERANCE, "a still film stays still"
    middle: np.ndarray = places[:, :, frames // 2]
    return middle
