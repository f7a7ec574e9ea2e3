"""The loader delivers the same micro-batches from any position with any number of workers, and fails in one
clear line."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.loader import ClipLoader, MicroBatch
from aiprod_ds.data.reading import replacing
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler
from aiprod_ds.data.synthetic import SyntheticVideoDataset, write_synthetic_clips
from aiprod_ds.errors import DataError


class Clips:
    """Clips whose values depend on the sample and the epoch."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        clips = SyntheticVideoDataset(100, request.frames, request.height, request.width, seed=request.epoch)
        return {"video": clips[request.sample_index]}


class EchoClips:
    """Channels are filled with the request's sample, epoch and settings."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        facts = torch.tensor(
            [request.sample_index, request.epoch, 100 * request.augment + request.flip], dtype=torch.float32
        )
        video = facts.view(3, 1, 1, 1).expand(3, request.frames, request.height, request.width)
        return {"video": video}


class BrokenClips:
    """Every clip is unreadable."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        raise self._error


class DeadlyClips:
    """Reading a clip kills the worker, as a lack of memory does."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class WideClips:
    """Clips are wider than asked for."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return {"video": torch.zeros(3, request.frames, request.height, request.width + 1)}


class Latents:
    """What folders of latents give: several tensors in the types of their files, none of the bucket's own
    shape."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return {
            "latents": torch.full((4, 2, 3, 3), request.sample_index).bfloat16(),
            "prompt_attention_mask": torch.arange(6) < 4,
            "fps": torch.tensor(24.0),
        }


class HalfClips:
    """Clips are in 16 bits."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return {"video": torch.zeros(3, request.frames, request.height, request.width).half()}


class CollectingClips:
    """Reading a clip frees whatever garbage the worker has."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        gc.collect()
        return {"video": torch.zeros(3, request.frames, request.height, request.width)}


class ThreadCountClips:
    """Clips are filled with the number of threads of the process that reads them."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        shape = (3, request.frames, request.height, request.width)
        return {"video": torch.full(shape, float(torch.get_num_threads()))}


def _plan(frames: int, size: int, *, world_size: int, micro: int) -> BucketPlan:
    return BucketPlan(
        frames=frames,
        requested_frames=frames,
        height=size,
        width=size,
        frame_rate_hz=None,
        global_batch_size=8,
        micro_batch_size=micro,
        accumulation=8 // (world_size * micro),
    )


def _loader(
    dataset: Any = None,
    *,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    augment: bool = True,
    flip: bool = False,
) -> ClipLoader:
    return ClipLoader(
        dataset or Clips(),
        PhaseSampler(
            seed=3,
            phase=0,
            buckets=[
                BucketSamples(indices=tuple(range(13)), global_batch_size=8),
                BucketSamples(indices=tuple(range(13, 30)), global_batch_size=8),
            ],
        ),
        [_plan(5, 8, world_size=world_size, micro=4), _plan(1, 16, world_size=world_size, micro=2)],
        rank=rank,
        world_size=world_size,
        start_position=start,
        num_workers=workers,
        augment=augment,
        flip=flip,
    )


def _updates(loader: ClipLoader, first: int, count: int) -> Iterator[MicroBatch]:
    with closing(loader):
        for batch in loader:
            if batch.position >= first + count:
                return
            yield batch


def _assert_equal(left: list[MicroBatch], right: list[MicroBatch]) -> None:
    facts = [
        [(batch.samples, batch.bucket, batch.position) for batch in batches] for batches in (left, right)
    ]
    assert facts[0] == facts[1]
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.tensors["video"], other.tensors["video"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_delivers_what_the_uninterrupted_run_would(workers: int) -> None:
    whole = list(_updates(_loader(), 0, 9))
    resumed = list(_updates(_loader(start=4, workers=workers), 4, 5))

    assert resumed[0].position == 4
    _assert_equal(resumed, [batch for batch in whole if batch.position >= 4])


def test_shapes_follow_the_bucket() -> None:
    batches = list(_updates(_loader(), 0, 8))

    assert {(batch.bucket, tuple(batch.tensors["video"].shape)) for batch in batches} == {
        (0, (4, 3, 5, 8, 8)),
        (1, (2, 3, 1, 16, 16)),
    }
    assert {batch.tensors["video"].dtype for batch in batches} == {torch.float32}


def test_two_ranks_share_what_one_reads_alone() -> None:
    alone = _clips(list(_updates(_loader(), 0, 5)))
    ranks = [_clips(list(_updates(_loader(rank=rank, world_size=2), 0, 5))) for rank in range(2)]

    assert not ranks[0].keys() & ranks[1].keys()
    together = ranks[0] | ranks[1]
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], clip) for key, clip in alone.items())


def _clips(batches: list[MicroBatch]) -> dict[tuple[int, int, int], Tensor]:
    pairs = chain.from_iterable(zip(batch.samples, batch.tensors["video"], strict=True) for batch in batches)
    return {(sample.sample_index, sample.epoch, sample.ordinal): clip for sample, clip in pairs}


@pytest.mark.parametrize(("augment", "flip"), [(True, False), (False, True)])
def test_requests_carry_sample_epoch_and_settings(augment: bool, flip: bool) -> None:
    batches = list(_updates(_loader(EchoClips(), augment=augment, flip=flip), 0, 9))

    assert {sample.epoch for batch in batches for sample in batch.samples} > {0, 1}
    for batch in batches:
        expected = [[sample.sample_index, sample.epoch, 100 * augment + flip] for sample in batch.samples]
        assert batch.tensors["video"][:, :, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            DataError("clip 7.mp4: must have 5 frames, got 3. Remove it."),
            "clip 7.mp4: must have 5 frames, got 3. Remove it.",
        ),
        (OSError("disc is gone"), "OSError: disc is gone"),
    ],
)
def test_a_disk_that_is_gone_is_one_clear_message(
    error: Exception, reason: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacing, "WAITS_SECONDS", (0.001,))
    loader = _loader(BrokenClips(error), workers=workers)

    with pytest.raises(DataError) as caught:
        next(loader)

    assert str(caught.value) == (
        "data loader: sample 24 or another clip of its bucket must be readable, got 17 that could not be "
        f"read, at last: {reason} Repair the disk, the network or the files."
    )
    assert not multiprocessing.active_children()


def test_a_clip_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"sample \d+: video must be float32 of shape \(3, "):
        next(_loader(WideClips()))


def test_clips_of_another_type_are_refused() -> None:
    with pytest.raises(DataError, match=r"sample \d+: video must be float32 of shape .*, got torch.float16"):
        next(_loader(HalfClips()))


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_come_in_the_types_of_their_files(workers: int) -> None:
    with closing(_loader(Latents(), workers=workers)) as loader:
        batch = next(loader)
    size = len(batch.samples)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.tensors.items()} == {
        "latents": ((size, 4, 2, 3, 3), torch.bfloat16),
        "prompt_attention_mask": ((size, 6), torch.bool),
        "fps": ((size,), torch.float32),
    }
    assert batch.tensors["latents"][:, 0, 0, 0, 0].tolist() == [
        sample.sample_index for sample in batch.samples
    ]


# torch 2.14.1 (utils/data/dataloader.py:1324) may be interrupted before it has closed temporary files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_die_again_and_again_are_a_data_error() -> None:
    with pytest.raises(
        DataError,
        match=r"^data loader: worker processes must stay alive, got worker \d+ ended with exit code -9 again",
    ):
        next(_loader(DeadlyClips(), workers=2))
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_a_worker_leaves_the_garbage_of_its_parent_alone() -> None:
    """A converted frame holds a pool of threads (swscale's), which a fork does not have: to free it there
    waits for them forever."""
    gc.collect()
    gc.disable()
    try:
        frame = av.VideoFrame(512, 512, "yuv420p")
        frame.to_ndarray(format="rgb24")
        circle: list[Any] = [frame]
        circle.append(circle)
        del frame, circle
        with closing(_loader(CollectingClips(), workers=1)) as loader:
            assert next(loader).tensors["video"].shape[0] > 0
    finally:
        gc.enable()


def test_workers_use_one_thread() -> None:
    with closing(_loader(ThreadCountClips(), workers=1)) as loader:
        assert next(loader).tensors["video"].unique().tolist() == [1.0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_only_its_own_process_ends_a_worker(number: signal.Signals) -> None:
    """A signal to the process group makes the run save, for which it needs the batches of the update under
    way."""
    with closing(_loader(workers=1)) as loader:
        next(loader)
        [worker] = multiprocessing.active_children()
        subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(worker.pid)], check=True)
        for _ in range(4):  # more than are decoded ahead
            next(loader)
        worker.terminate()
        worker.join(timeout=60)
        assert worker.exitcode == 0


def test_close_ends_the_workers_at_once_and_may_be_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    loader = _loader(workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2

    started = time.monotonic()
    loader.close()
    loader.close()

    # Idle workers leave within milliseconds; DataLoader kills those that hang after five seconds.
    assert time.monotonic() - started < 4
    assert not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_synthetic_clips_are_deterministic_and_differ() -> None:
    clips = SyntheticVideoDataset(3, 9, 16, 24, seed=5)

    assert clips[1].shape == (3, 9, 16, 24)
    assert clips[1].dtype == torch.float32
    assert clips[1].abs().max() <= 1
    assert torch.equal(clips[1], SyntheticVideoDataset(3, 9, 16, 24, seed=5)[1])
    assert not torch.equal(clips[1], clips[2])
    assert not torch.equal(clips[1], SyntheticVideoDataset(3, 9, 16, 24, seed=6)[1])
    assert not torch.equal(clips[1][:, 0], clips[1][:, 8])
    assert len(list(clips)) == 3


@pytest.mark.parametrize("with_sound", [True, False])
def test_written_clips_can_be_read_back(tmp_path: Path, with_sound: bool) -> None:
    paths = write_synthetic_clips(
        tmp_path / "clips", num_clips=2, frames=10, height=32, width=48, seed=1, with_sound=with_sound
    )

    assert [path.name for path in paths] == ["clip_00000.mp4", "clip_00001.mp4"]
    with av.open(str(paths[1])) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"][
            : 1 + with_sound
        ]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    written_TCHW = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2) / 127.5 - 1
    expected_TCHW = SyntheticVideoDataset(2, 10, 32, 48, seed=1)[1].transpose(0, 1)
    assert written_TCHW.shape == expected_TCHW.shape
    # Lossy coding with halved chroma blurs the shapes' edges; another clip is further away than 0.3.
    assert (written_TCHW - expected_TCHW).abs().mean() < 0.15


def test_odd_sizes_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"height and width must be even for H.264 in 4:2:0, got 33x48. Round them up"
    ):
        write_synthetic_clips(tmp_path, num_clips=1, frames=1, height=33, width=48)


def test_the_loader_goes_on_without_end() -> None:
    with closing(_loader()) as loader:
        assert [batch.position for batch in islice(loader, 60)][-1] > 15
