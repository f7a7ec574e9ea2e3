"""The one form that all items are read as, and batches cut into items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aiprod_ds.data.own.items import AUDIO, LATENTS, VIDEO, items_of, latents_of, sound_of, video_of
from aiprod_ds.errors import DataError

T, H, W, N = 5, 8, 6, 200
CLIP = torch.arange(3 * T * H * W, dtype=torch.float32).view(3, T, H, W) / 1000
BYTES = (torch.arange(3 * T * H * W) % 251).to(torch.uint8).view(3, T, H, W)
WAVE = torch.linspace(-1, 1, 2 * N).view(2, N)


@pytest.mark.parametrize("clip", [CLIP, BYTES, CLIP.to(torch.bfloat16)])
@pytest.mark.parametrize(
    "form",
    [
        lambda clip: clip,
        lambda clip: clip.transpose(0, 1),
        lambda clip: clip.permute(1, 2, 3, 0),
        lambda clip: {"video": clip, "label": 3},
        lambda clip: (clip,),
        lambda clip: [clip.permute(1, 2, 3, 0)],
    ],
)
def test_every_order_of_axes_is_read_as_the_same_clip(clip: torch.Tensor, form: Any) -> None:
    video, fps = video_of(form(clip), "a")
    assert torch.equal(video, clip)
    assert video.dtype == clip.dtype
    assert fps is None


@pytest.mark.parametrize("key", ["fps", "frame_rate_hz"])
def test_rates_are_read(key: str) -> None:
    assert video_of({"video": CLIP, key: torch.tensor(25.0)}, "a")[1] == 25.0
    assert sound_of({"audio": WAVE, "sample_rate": 8000}, "a")[1] == 8000
    assert sound_of({"audio": {"array": WAVE[0].numpy(), "sampling_rate": 16000}}, "a")[1] == 16000


def test_arrays_and_pictures_are_read() -> None:
    pixels = BYTES.permute(1, 2, 3, 0).numpy()
    read_only = pixels.copy()
    read_only.flags.writeable = False
    assert torch.equal(video_of(read_only, "a")[0], BYTES)
    assert torch.equal(video_of(pixels[:, :, ::-1], "a")[0], BYTES.flip(-1))
    frames = [Image.fromarray(frame) for frame in pixels]
    assert torch.equal(video_of(frames, "a")[0], BYTES)
    assert torch.equal(video_of({"video": frames}, "a")[0], BYTES)
    assert torch.equal(video_of(frames[2], "a")[0], BYTES[:, 2:3])
    grey = Image.fromarray(pixels[0, :, :, 0])
    assert torch.equal(video_of(grey, "a")[0], BYTES[:1, :1].expand(3, 1, H, W))


@pytest.mark.parametrize("picture", [CLIP[:, 0], BYTES[:, 0].permute(1, 2, 0)])
def test_a_picture_is_a_clip_of_one_frame(picture: torch.Tensor) -> None:
    expected = picture if picture.shape[0] == 3 else picture.permute(2, 0, 1)
    assert torch.equal(video_of(picture, "a")[0], expected[:, None])


def test_three_frames_of_floats_are_the_form_that_was_always_promised() -> None:
    clip = torch.rand(3, 3, H, W)
    assert torch.equal(video_of(clip, "a")[0], clip)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            torch.zeros(4, T, H, W),
            r"a: a clip must have 3 channels in one of .* got \[4, 5, 8, 6\]",
        ),
        (torch.zeros(1, T, H, W), "Repeat grey, drop alpha, or permute the axes"),
        (
            torch.zeros(3, 3, H, W, dtype=torch.uint8),
            r"got \[3, 3, 8, 6\], which may be \[3,T,H,W\] or \[T,3,H,W\]. Give it as floating",
        ),
        (torch.zeros(3, H, W, 3, dtype=torch.uint8), r"may be \[3,T,H,W\] or \[T,H,W,3\]"),
        (torch.zeros(3, T, H, W, dtype=torch.int32), r"got \[3, 5, 8, 6\] torch.int32"),
        (torch.zeros(2, 3, T, H, W), r"a: must be a tensor or array .* got \[2, 3, 5, 8, 6\]"),
        ({"clip": CLIP}, r"got a mapping with \['clip'\]"),
        ((CLIP, 3), "got tuple"),
        (None, "got NoneType"),
        (Image.new("RGBA", (W, H)), "a PIL picture must be of mode RGB or L, got RGBA"),
    ],
)
def test_clips_of_another_form_are_named(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        video_of(item, "a")


def test_sounds_are_read_with_channels_first() -> None:
    assert torch.equal(sound_of(WAVE[0], "a")[0], WAVE[:1])
    assert torch.equal(sound_of({"audio": WAVE.numpy()}, "a")[0], WAVE)
    with pytest.raises(DataError, match=r"sound must be \[C,N\], channels before samples, got \[200, 2\]"):
        sound_of(WAVE.T, "a")


def test_latents_are_read_and_media_in_their_place_are_named() -> None:
    item = {"latents": np.zeros((4, 2, 3, 3), np.float32), "prompt_embeds": torch.ones(3, 8), "fps": 24}
    found = latents_of({**item, "caption": "a dog"}, "a")
    assert {name: list(value.shape) for name, value in found.items()} == {
        "latents": [4, 2, 3, 3],
        "prompt_embeds": [3, 8],
    }
    with pytest.raises(DataError, match=r"got media under \['caption', 'video'\].*encode media first"):
        latents_of({"video": CLIP, "caption": "a dog"}, "a")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


CLIPS = torch.stack([CLIP, CLIP + 1])
WAVES = torch.stack([WAVE, -WAVE])
ROWS = [
    # element, kind, is_batch, is_collated, items
    (CLIP, VIDEO, None, False, [CLIP]),
    (CLIPS, VIDEO, None, False, [CLIP, CLIP + 1]),
    (CLIPS.numpy(), VIDEO, None, False, [CLIP.numpy(), CLIP.numpy() + 1]),
    ([CLIP, CLIP + 1], VIDEO, None, False, [CLIP, CLIP + 1]),
    ([CLIPS], VIDEO, True, True, [CLIP, CLIP + 1]),
    ([CLIP], VIDEO, True, False, [CLIP]),
    (CLIPS[:, :, 0], VIDEO, True, False, [CLIP[:, 0], CLIP[:, 0] + 1]),
    (
        {"video": CLIPS, "fps": torch.tensor([24.0, 25.0]), "caption": ["a", "b"], "name": "set"},
        VIDEO,
        None,
        False,
        [
            {"video": CLIP, "fps": torch.tensor(24.0), "caption": "a", "name": "set"},
            {"video": CLIP + 1, "fps": torch.tensor(25.0), "caption": "b", "name": "set"},
        ],
    ),
    (
        {"video": [CLIP, CLIP[:, :2]], "fps": 24.0},
        VIDEO,
        True,
        False,
        [{"video": CLIP, "fps": 24.0}, {"video": CLIP[:, :2], "fps": 24.0}],
    ),
    (WAVE, AUDIO, None, False, [WAVE]),
    (WAVE, AUDIO, True, False, [WAVE[0], WAVE[1]]),
    (WAVES, AUDIO, None, False, [WAVE, -WAVE]),
    (
        {"audio": {"array": WAVE, "sampling_rate": torch.tensor([8000, 8000])}},
        AUDIO,
        True,
        True,
        [{"audio": {"array": wave, "sampling_rate": torch.tensor(8000)}} for wave in WAVE],
    ),
    (
        {"latents": torch.zeros(2, 4, 2, 3, 3), "prompt_embeds": torch.ones(2, 3, 8)},
        LATENTS,
        None,
        False,
        [{"latents": torch.zeros(4, 2, 3, 3), "prompt_embeds": torch.ones(3, 8)}] * 2,
    ),
]


@pytest.mark.parametrize(("element", "kind", "is_batch", "is_collated", "items"), ROWS)
def test_elements_are_cut_into_items(
    element: Any, kind: Any, is_batch: bool | None, is_collated: bool, items: list[Any]
) -> None:
    found = items_of(element, kind, is_batch=is_batch, is_collated=is_collated)
    assert len(found) == len(items)
    for one, other in zip(found, items, strict=True):
        same = np.array_equal(one, other) if isinstance(other, np.ndarray) else _equal(other, one)
        assert same


def test_fields_without_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"got a sequence of 2 fields\. Let items be mappings with 'video'"):
        items_of([CLIPS, torch.zeros(2)], VIDEO, is_batch=True, is_collated=True)
