"""The process group: set up from the launcher's environment, a few collectives on it, and its end.

Owns rank, world size, device and backend. One process needs no launcher and no environment. Nothing here
knows DeepSpeed, which adopts the group that it finds. Called by the command line, the loop, the engines and
the checkpoint store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor

from aiprod_ds.engine.peers import PeerWatch
from aiprod_ds.errors import AiprodError, EngineError

T = TypeVar("T")

_MEETING_SECONDS = 1.0
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def choose_device() -> torch.device:
    """Returns this rank's GPU, or the CPU without one or with `DS_ACCELERATOR=cpu` (DeepSpeed's own
    switch)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def initialize(*, timeout_seconds: float = 1800.0) -> torch.device:
    """Joins the process group of the launcher, or makes one of a single process, and returns this rank's
    device.

    Calling it again changes nothing. NCCL is used for GPUs, gloo for CPUs.

    Raises:
        EngineError: If the launcher's environment is incomplete or names a GPU that does not exist.
    """
    device = choose_device()
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise EngineError(
                f"LOCAL_RANK: must be below the number of GPUs ({torch.cuda.device_count()}), got "
                f"{device.index}. Start fewer."
            )
        torch.cuda.set_device(device)
    if torch_dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # NCCL otherwise guesses the GPU from the rank at the first collective, and says so every time.
    device_id = device if device.type == "cuda" else None
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(present):
        store = torch_dist.HashStore()  # type: ignore[attr-defined]  # public, but not in torch's export list
        torch_dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
        return device
    missing = sorted(set(_LAUNCHER_VARIABLES) - set(present))
    if missing:
        raise EngineError(
            f"environment: the launcher must set {', '.join(_LAUNCHER_VARIABLES)}, got no "
            f"{', '.join(missing)}."
        )
    torch_dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    return device


def shutdown() -> None:
    """Waits for the other ranks and leaves the process group; without one it does nothing.

    Call it only after success: after an error the other ranks may never arrive.
    """
    if torch_dist.is_initialized():
        barrier()
        torch_dist.destroy_process_group()


@contextmanager
def process_group(
    *, timeout_seconds: float = 1800.0, lost_rank_seconds: float | None = 60.0
) -> Iterator[torch.device]:
    """Joins the group, yields the device, and leaves the group unless the body raised.

    Args:
        timeout_seconds: How long a rank waits for the others in a collective.
        lost_rank_seconds: A rank of which nothing is heard for this long is gone, and this process ends with
            exit code 1, even in a collective; about ten seconds suffice where a connection closed. None: only
            the time-out ends it.

    Raises:
        EngineError: In place of what the body raised, if another rank is the cause.
    """
    device = initialize(timeout_seconds=timeout_seconds)
    watch = None if lost_rank_seconds is None else _watch_peers(lost_rank_seconds)
    try:
        yield device
        if torch_dist.is_initialized():
            barrier()
    except Exception as error:
        cause = caused_by_peer(error)
        if cause is not None:
            raise cause from error
        if watch is not None:
            watch.tell(f"{type(error).__name__}: {error}")
        raise
    finally:
        _forget_peers()
    shutdown()


def caused_by_peer(error: BaseException) -> EngineError | None:
    """Returns what to report in place of `error`, if it came from a collective that failed because another
    rank is gone.

    The second call for one error returns the same. Waits for a few seconds to be sure.
    """
    watch = _PEERS.get("watch")
    if watch is None or not isinstance(error, RuntimeError):
        return None
    known = getattr(error, "_caused_by_peer", None)
    if known is None:
        verdict = watch.blame()
        if verdict is None:
            return None
        known = EngineError(
            f"the run cannot go on without all ranks: {verdict}. Start it again when the host is well; it "
            "resumes."
        )
        error._caused_by_peer = known  # type: ignore[attr-defined]
    return cast("EngineError", known)


_PEERS: dict[str, PeerWatch] = {}


def _watch_peers(limit_seconds: float) -> PeerWatch | None:
    if world_size() == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    watch = PeerWatch(
        rank=rank(), world_size=world_size(), address=address, port=port, limit_seconds=limit_seconds
    )
    watch.start()
    _PEERS["watch"] = watch
    return watch


def connect_to_store(timeout: timedelta) -> Any:
    """Returns a connection of the caller's own to the group's store, for threads that no collective may hold
    up.

    There must be more than one rank.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch_dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's export list
        address, port, None, False, timeout=timeout, wait_for_workers=False
    )


def when_a_rank_is_lost(write: Callable[[], None] | None) -> None:
    """Sets what this process does before it ends because another rank is gone; None: nothing."""
    watch = _PEERS.get("watch")
    if watch is not None:
        watch.before_end = write


def _forget_peers() -> None:
    watch = _PEERS.pop("watch", None)
    if watch is not None:
        watch.stop()


def rank() -> int:
    """Returns this process's rank; 0 without a group."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes; 1 without a group."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Returns whether this process is rank 0, the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        torch_dist.barrier(
            device_ids=[torch.cuda.current_device()] if torch_dist.get_backend() == "nccl" else None
        )


def reduce_mean(tensor: Tensor) -> Tensor:
    """Returns the mean of `tensor` (any shape, floating point) over all ranks, as a new tensor of the same
    type."""
    result = tensor.detach().clone()
    if world_size() > 1:
        torch_dist.all_reduce(result)
        result /= world_size()
    return result


def broadcast_object(value: T) -> T:
    """Returns rank 0's `value` on every rank; it must be picklable."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch_dist.broadcast_object_list(box, src=0, device=_collective_device())
    received: T = box[0]
    return received


def from_main(make: Callable[[], T]) -> T:
    """Returns rank 0's `make()` on every rank; an error of it is raised on every rank."""
    made: T | AiprodError | None = None
    if is_main():
        try:
            made = make()
        except AiprodError as error:
            made = error
    made = broadcast_object(made)
    if isinstance(made, AiprodError):
        raise made
    return cast("T", made)


def gather_objects(value: T) -> list[T]:
    """Returns the `value` of every rank, in rank order, on every rank; they must be picklable."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered


def all_agree(flag: bool) -> bool:
    """Returns True on every rank if `flag` is True on every rank, else False on every rank."""
    if world_size() == 1:
        return flag
    agreed = torch.tensor(int(flag), device=_collective_device())
    torch_dist.all_reduce(agreed, op=torch_dist.ReduceOp.MIN)
    return bool(agreed.item())


class Ballot:
    """The greatest of each of a few integers over all ranks, asked for at one moment and read at a later one.

    Between `cast` and `result` nobody waits, neither the host nor the GPU's own work. Every rank calls both
    in the same order.

    Args:
        size: How many integers.
    """

    def __init__(self, size: int) -> None:
        self._is_alone = world_size() == 1
        self._device = torch.device("cpu") if self._is_alone else _collective_device()
        is_gpu = self._device.type == "cuda"
        self._values = torch.zeros(size, dtype=torch.int64, pin_memory=is_gpu)
        self._votes = torch.zeros(size, dtype=torch.int64, device=self._device) if is_gpu else self._values
        self._stream = torch.cuda.Stream(self._device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._work: Any = None
        self._given: Tensor = self._values  # whoever gave it may forget it

    def cast(self, values: Sequence[int] | Tensor) -> None:
        """Gives this rank's integers; the last result must have been read.

        Args:
            values: An int64 tensor may be on the GPU, where it must stay as it is until the result is read;
                the host then does not wait for it.
        """
        assert self._work is None, "one vote at a time"
        if self._stream is not None and isinstance(values, Tensor) and values.is_cuda:
            self._given = values
            self._stream.wait_stream(torch.cuda.current_stream())
        else:
            self._values.copy_(torch.as_tensor(values))
            self._given = self._values
        if self._is_alone:
            return
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._votes.copy_(self._given, non_blocking=True)
            self._work = torch_dist.all_reduce(self._votes, op=torch_dist.ReduceOp.MAX, async_op=True)
            if self._stream is not None:
                self._work.wait()  # of the side stream, not of the host
                self._values.copy_(self._votes, non_blocking=True)

    def result(self) -> list[int]:
        """Returns the greatest integers, once every rank has given its own."""
        if self._stream is not None:
            self._stream.synchronize()
        elif self._work is not None:
            self._work.wait()
        self._work = None
        found: list[int] = self._values.tolist()
        return found


def together(work: Callable[[], T]) -> T:
    """Returns this rank's `work()` once all ranks have finished theirs. Collective.

    For work that takes ranks differently long, as decoding and writing do: `work` runs in a thread of its own
    while the ranks meet about once a second, so that none waits in a collective until the group's time-out.
    `work` must not use collectives.

    Raises:
        AiprodError: On every rank, if the work of one raised it; of several, a rank raises its own, others
            that of the lowest.
        EngineError: The same on the other ranks if it raised anything else, which goes on as it is on its
            own.
    """
    if world_size() == 1:
        return work()
    device = _collective_device()
    with ThreadPoolExecutor(max_workers=1) as executor:
        outcome = executor.submit(_on_device, device, work)
        with _own_stream(device):
            while not all_agree(outcome.done()):
                wait([outcome], timeout=_MEETING_SECONDS)
    failures = [failure for failure in gather_objects(_failure(outcome)) if failure is not None]
    result = outcome.result()
    if failures:
        raise failures[0]
    return result


def _on_device(device: torch.device, work: Callable[[], T]) -> T:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread begins on the first GPU
    return work()


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    # On the default stream a meeting would wait for everything that the work has queued there.
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]  # torch has no types for it


def _failure(outcome: Future[Any]) -> AiprodError | None:
    error = outcome.exception()
    if error is None or isinstance(error, AiprodError):
        return error
    return EngineError(
        f"rank {rank()}: must finish its part of the work, got {type(error).__name__}: {error}. Read its log."
    )


def _collective_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch_dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
