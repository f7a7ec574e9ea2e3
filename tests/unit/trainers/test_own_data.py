"""A program's own data through the trainers: what is held out, how it is opened, and what is refused before
training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from aiprod_ds.clock import Clock
from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.own.iterables import ClipIterable
from aiprod_ds.data.own.stream_loader import StreamLoader, StreamPlace
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, DataError, PlanError
from aiprod_ds.testing.runs import without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.open_data import open_latent_datasets, open_video_datasets
from aiprod_ds.trainers.own_data import HeldOut, StreamData
from aiprod_ds.trainers.video_vae import VideoVAETrainer

RATE_HZ = 8_000


class Listed:
    """The least that an iterable is."""

    def __init__(self, elements: list[Any]) -> None:
        self._elements = elements

    def __iter__(self) -> Iterator[Any]:
        yield from self._elements


def _clips(*frames: int, size: int = 16) -> list[Tensor]:
    """Clips uint8, each of which is known by its first pixel."""
    generator = torch.Generator().manual_seed(len(frames))
    clips = [
        torch.randint(256, (3, count, size, size), generator=generator, dtype=torch.uint8) for count in frames
    ]
    for number, clip in enumerate(clips):
        clip[:] = clip // 2
        clip[0, 0, 0, 0] = 100 + number
    return clips


def _config(folder: Path, *phases: dict[str, Any], **sections: Any) -> VAETrainerConfig:
    usual = {
        "resolution": "16x16",
        "duration": {"frames": 5},
        "global_batch_size": 4,
        "updates": 2,
        "learning_rate": 1e-3,
    }
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0},
            "curriculum": {
                "phases": [{"name": f"p{n}", **usual, **phase} for n, phase in enumerate(phases or ({},))]
            },
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 2, "num_pictures": 0},
            **sections,
        }
    )


def _plan(*phases: dict[str, Any], world_size: int = 1) -> RunPlan:
    strides = ModelStrides(spatial=4, temporal=2)
    return plan_run(_config(Path("o"), *phases), world_size=world_size, strides=strides)


def _names(clips: Any) -> list[int]:
    return [int(clip.name.removeprefix("dataset[").removesuffix("]")) for clip in clips]


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 1), (0.25, 3), (0.99, 9)])
def test_a_fraction_is_held_out_by_the_seed(fraction: float, expected: int) -> None:
    clips, held_out = _clips(*[5] * 10), HeldOut(fraction=fraction)
    data = open_video_datasets(clips, None, seed=3, held_out=held_out)
    held, rest = _names(data.validation_clips), _names(data.train_clips)
    assert len(held) == (expected if fraction != 0.25 else 2), "round(2.5) is 2"
    assert sorted(held + rest) == list(range(10))
    again = open_video_datasets(clips, None, seed=3, held_out=held_out)
    assert _names(again.validation_clips) == held
    others = [
        _names(open_video_datasets(clips, None, seed=seed, held_out=held_out).validation_clips)
        for seed in range(4, 12)
    ]
    assert any(other != held for other in others)
    bucket = _plan().phases[0].buckets[0]
    shown = data.held_out_clip(0, bucket)["video"]
    assert torch.equal(shown, clips[held[0]].float() / 127.5 - 1), "the clip that is named"
    assert f"dataset: {len(held)} of 10 items are held out, chosen by the seed" in data.notes


def test_of_videos_and_images_videos_are_held_out() -> None:
    data = open_video_datasets(_clips(1, 1, 1, 5, 5), None, seed=0, held_out=HeldOut(fraction=0.9))
    assert len(data.validation_clips) == 1
    assert data.validation_clips[0].frames == 5
    images = open_video_datasets(_clips(1, 1, 1, 5), None, seed=0)
    assert len(images.validation_clips) == 1


def test_one_clip_cannot_be_split() -> None:
    with pytest.raises(DataError, match="must hold at least 2 clips to hold some out, got 1"):
        open_video_datasets(_clips(5), None, seed=0)


def test_an_iterable_needs_a_validation_set() -> None:
    with pytest.raises(DataError, match="validation: must be given beside an iterable dataset"):
        open_video_datasets(Listed(_clips(5, 5)), None, seed=0)


def test_of_an_iterable_validation_set_the_first_clips_are_read() -> None:
    clips = _clips(*[5] * 6)
    bucket = _plan().phases[0].buckets[0]
    for validation in (Listed(clips), DataLoader(clips, batch_size=4), clips[:3]):  # type: ignore[arg-type]
        data = open_video_datasets(clips, validation, seed=0, held_out=HeldOut(max_clips=3))
        assert len(data.validation_clips) == 3
        found = [data.held_out_clip(index, bucket)["video"] for index in range(3)]
        assert all(
            torch.equal(one, other.float() / 127.5 - 1) for one, other in zip(found, clips, strict=False)
        )
    shuffled = DataLoader(clips, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    assert len(open_video_datasets(clips, shuffled, seed=0).validation_clips) == 6


def _stream(data: Any, phase: Any, **changes: Any) -> StreamLoader:
    assert isinstance(data, StreamData)
    place = {"rank": 0, "world_size": 1, "seed": 0, "num_workers": 0, **changes}
    return data.stream(phase, Clock(), **place)


def test_items_go_to_the_bucket_that_fits_and_ranks_part_them() -> None:
    buckets = [
        {"resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 2},
        {"resolution": "8x16", "duration": {"frames": 9}, "global_batch_size": 4},
    ]
    empty = {"resolution": None, "duration": None, "global_batch_size": None}
    (phase,) = _plan({**empty, "buckets": buckets}, world_size=2).phases
    square, wide = _clips(*[5] * 4), [clip[:, :, :8] for clip in _clips(*[9] * 5)]
    mixed = [clip for pair in zip(square, wide, strict=False) for clip in pair]
    data = open_video_datasets(Listed(mixed), _clips(9), seed=0)
    seen: list[Any] = []
    for rank in range(2):
        stream = _stream(data, phase, rank=rank, world_size=2)
        batches = list(islice(stream, 6))
        seen.append([(batch.position, batch.bucket, tuple(batch.samples)) for batch in batches])
        assert [stream.bucket_at(5), stream.epoch_at(6)] == [batches[5].bucket, 2]
        stream.close()
    assert [entry[:2] for entry in seen[0]] == [entry[:2] for entry in seen[1]], "ranks decide alike"
    # Pairs of square clips fill every second item, so an update of 2 squares comes after 3, 7, 11, ... items.
    assert [bucket for _, bucket, _ in seen[0]] == [0, 0, 1, 0, 0, 1]
    numbers = Counter(
        (ref.epoch, ref.sample_index) for rank in seen for _, _, samples in rank for ref in samples
    )
    assert len(numbers) == sum(numbers.values()) == 16, "every item once"
    ordinals = [sorted(ref.ordinal for rank in seen for ref in rank[update][2]) for update in range(6)]
    assert ordinals == [[0, 1], [0, 1], [0, 1, 2, 3]] * 2


def test_items_that_no_bucket_takes_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    (phase,) = _plan().phases
    stream = _stream(open_video_datasets(Listed(_clips(5, 2, 5, 4)), _clips(5), seed=0), phase)
    (batch,) = islice(stream, 1)
    assert [ref.sample_index for ref in batch.samples] == [0, 2, 0, 2]
    said = [record.message.split(" reason")[0] for record in caplog.records]
    assert [words for words in said if words.startswith("item_left_out")] == [
        "item_left_out name='dataset, item 1 of pass 1'"
    ], "once"
    short = _stream(open_video_datasets(Listed(_clips(2, 4)), _clips(5), seed=0), phase)
    with pytest.raises(DataError, match="must give clips of at least 5 frames, got none in a whole pass"):
        next(iter(short))


def test_a_pass_of_own_parts_is_over_when_it_is_on_every_rank() -> None:
    """Stands for the other rank, whose first pass lasts until the third update."""
    answers = iter([False, False, True, False, False])
    own: list[bool] = []

    def agree(is_over: bool) -> bool:
        own.append(is_over)
        return is_over and next(answers)

    (phase,) = _plan({"epochs": 1, "updates": None, "schedule": "constant"}, world_size=2).phases
    data = open_video_datasets(ClipIterable(Listed(_clips(5, 5, 5)), each_rank="own"), _clips(5), seed=0)
    assert isinstance(data, StreamData)
    place = StreamPlace(phase=phase, seed=0, rank=0, world_size=2, start_position=0)
    stream = iter(loader := StreamLoader(data.source, data.reader, place, agree=agree))
    epochs = []
    for position in range(4):
        next(stream)
        epochs.append(loader.epoch_at(position + 1))
    assert epochs == [0, 0, 0, 1]
    assert own == [False, True, True, True, True], "two items an update, three a pass"


def test_images_wait_for_their_bucket() -> None:
    buckets = [
        {"resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 2, "share": 0.5},
        {"resolution": "16x16", "duration": {"frames": 1}, "global_batch_size": 2, "share": 0.5},
    ]
    empty = {"resolution": None, "duration": None, "global_batch_size": None}
    (phase,) = _plan({**empty, "buckets": buckets}).phases
    stream = _stream(open_video_datasets(Listed(_clips(1, 5, 1, 5, 5)), _clips(5), seed=1), phase)
    batches = list(islice(stream, 4))
    assert sorted(batch.bucket for batch in batches) == [0, 0, 1, 1]
    frames = {batch.bucket: batch.tensors["video"].shape[2] for batch in batches}
    assert frames == {0: 5, 1: 1}


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([torch.rand(3, 5, 16, 16)], "nothing below 0 in the first 4 items"),
        ([torch.rand(3, 5, 16, 16) * 255], "pass value_range=\\(0, 255\\)"),
        ([torch.full((3, 5, 16, 16), float("nan"))], "item 0 of pass 1: video must be finite"),
        ([torch.full((3, 5, 16, 16), -1.0)], "got black alone in all"),
        ([torch.zeros(5, 16, 16, 4)], "item 0 of pass 1: a clip must have 3 channels"),
    ],
)
def test_first_items_of_an_iterable_are_looked_at(clips: list[Tensor], message: str) -> None:
    (phase,) = _plan().phases
    stream = _stream(open_video_datasets(Listed(clips), _clips(5), seed=0), phase)
    with pytest.raises(DataError, match=message):
        next(iter(stream))


def test_a_value_that_is_not_finite_is_found_later_too() -> None:
    (phase,) = _plan().phases
    good = torch.rand(3, 5, 16, 16) * 2 - 1
    bad = good.clone()
    bad[:, 3] = float("inf")
    stream = iter(_stream(open_video_datasets(Listed([good] * 30 + [bad] * 2), _clips(5), seed=0), phase))
    for _ in range(7):
        next(stream)
    with pytest.raises(DataError, match="item 30 of pass 1: pixels must be finite"):
        next(stream)


def test_what_nobody_can_know_is_refused_before_training() -> None:
    data = open_video_datasets(Listed(_clips(5)), _clips(5), seed=0)
    epochs = {"updates": None, "epochs": 1}
    with pytest.raises(PlanError, match=r"c: curriculum.phases\[0\].schedule: must be constant where only"):
        data.with_lengths(_plan(epochs), "c")
    for fitting in ({"schedule": "constant", **epochs}, {"max_updates": 5, **epochs}):
        plan = _plan(fitting)
        assert data.with_lengths(plan, "c") is plan
    with pytest.raises(PlanError, match="must hold a clip of at least 9 frames"):
        data.check(_plan({"duration": {"frames": 9}}), "c")

    buckets = [{"resolution": "16x16", "duration": {"frames": n}, "global_batch_size": 2} for n in (1, 5)]
    empty = {"resolution": None, "duration": None, "global_batch_size": None}
    own = open_video_datasets(ClipIterable(Listed(_clips(5)), each_rank="own"), _clips(5), seed=0)
    without = _plan({**empty, "buckets": buckets}, world_size=2)
    with pytest.raises(PlanError, match="must have shares where each rank has items of its own"):
        own.check(without, "c")
    data.check(without, "c")
    own.check(_plan({**empty, "buckets": [{**each, "share": 0.5} for each in buckets]}, world_size=2), "c")


def test_validation_sets_that_differ_by_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = _clips(5, 5)
    part = DataLoader(
        clips,  # type: ignore[arg-type]
        sampler=DistributedSampler(clips, num_replicas=2, rank=0),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(DataError, match="validation: must hold the same clips on all ranks"):
        open_video_datasets(clips, part, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": []}, "VideoVAETrainer: validation has no effect without dataset"),
        ({"value_range": (0, 1)}, "VideoVAETrainer: value_range has no effect without dataset"),
        ({"dataset": [], "value_range": (0, 2)}, r"value_range: must be \(-1, 1\) or"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoVAETrainer(_config(Path("o")), model=TinyVideoVAE(), **arguments)


def test_wrong_ranges_are_errors_of_the_trainer(tmp_path: Path) -> None:
    clips = [torch.rand(3, 5, 16, 16) for _ in range(4)]
    trainer = VideoVAETrainer(_config(tmp_path), source="c.yaml", model=TinyVideoVAE(), dataset=clips)
    with pytest.raises(PlanError, match=r"c.yaml: data: dataset\[0\]: video must be in \(-1, 1\)"):
        trainer.open_data()
    declared = VideoVAETrainer(
        _config(tmp_path), model=TinyVideoVAE(), dataset=clips, value_range=(0, 1)
    ).open_data()
    assert float(declared.held_out_clip(0, _plan().phases[0].buckets[0])["video"].min()) < -0.9


@pytest.mark.slow
def test_sounds_of_a_loader_train(tmp_path: Path) -> None:
    seconds = torch.arange(2_400) / RATE_HZ
    sounds = torch.stack([0.4 * torch.sin(2 * torch.pi * hz * seconds) for hz in (200, 300, 450, 700)])
    config = AudioVAETrainerConfig.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {
                "source": "AutoencoderOobleck",
                "config": {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ},
            },
            "data": {"train": "unused", "num_workers": 0, "sample_rate_hz": RATE_HZ, "channels": 1},
            "loss": {"spectral": {"fft_sizes": [64]}},
            "curriculum": {
                "phases": [
                    {
                        "name": "only",
                        "duration": {"frames": 1040},
                        "global_batch_size": 4,
                        "updates": 3,
                        "learning_rate": 1e-3,
                    }
                ]
            },
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 2, "num_pictures": 0},
        }
    )
    integers = (sounds * 32768).to(torch.int16)
    floats = integers.float() / 32768
    forms = {
        "batches_BT": DataLoader(floats, batch_size=3),  # type: ignore[arg-type]
        "integers": DataLoader(integers, batch_size=2),  # type: ignore[arg-type]
        "mappings": Listed([{"audio": {"array": wave.numpy(), "sampling_rate": RATE_HZ}} for wave in floats]),
        "batches_BCN": Listed([floats[:3, None], floats[3:, None]]),
    }
    digests = set()
    with dist.process_group(), without_plots():
        for name, dataset in forms.items():
            own = config.model_copy(update={"output_dir": str(tmp_path / name)})
            digests.add(AudioVAETrainer(own, dataset=dataset, validation=floats).train().final_state_sha256)
    assert len(digests) == 1
    report = json.loads((tmp_path / "batches_BT" / "report.json").read_text())
    assert report["data"]["clips"] is None
    words = (tmp_path / "batches_BT" / "report.md").read_text()
    assert f"Clips of an iterable for training, {len(floats)} held out." in words
    assert any("batches of 3 are cut" in note for note in report["replacements"])


def test_latents_of_a_loader_are_stacked_with_what_belongs_to_them() -> None:
    items = [
        {"latents": torch.randn(4, 3, 4, 4), "prompt_embeds": torch.randn(3, 8), "fps": 24.0}
        for _ in range(4)
    ]
    strides = ModelStrides(spatial=4, temporal=2)
    data = open_latent_datasets(DataLoader(items, batch_size=2), items[:1], strides=strides)  # type: ignore[arg-type]
    (phase,) = _plan().phases
    (batch,) = islice(_stream(data, phase), 1)
    assert {name: list(tensor.shape) for name, tensor in batch.tensors.items()} == {
        "latents": [4, 4, 3, 4, 4],
        "prompt_embeds": [4, 3, 8],
        "fps": [4],
    }
    assert torch.equal(batch.tensors["latents"][2], items[2]["latents"])


@pytest.mark.slow
def test_the_example_of_the_guide_runs(
    tmp_path: Path, repository_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (repository_root / "docs" / "guide.md").read_text(encoding="utf-8")
    (example,) = (
        block.partition("```")[0] for block in guide.split("```python\n")[1:] if "class Recordings" in block
    )
    monkeypatch.chdir(tmp_path)
    with without_plots():
        exec(example, {"__name__": "example"})
    assert capsys.readouterr().out.endswith("6 updates of 4 clips: two passes over 12\n")
    report = json.loads((tmp_path / "runs" / "recordings" / "report.json").read_text())
    assert report["phases"][0]["updates"] == 6
