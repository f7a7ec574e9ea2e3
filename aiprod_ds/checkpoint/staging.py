"""A copy of a snapshot in memory of the host, so that training may go on while it is written.

Owns the memory, kept from save to save, and how the copy is made: on a side stream, into page-locked memory,
with one wait. Asks for no agreement between ranks. `train/resume/saver.py` is the only caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.snapshot import Snapshot

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64
_PINNED_FROM_BYTES = 64 << 20  # smaller memory may share its pages, which cannot be locked twice


class StagingBuffer:
    """Memory for one copy of one rank's snapshot."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._is_pinned = False

    def missing_bytes(self, state: Snapshot) -> int:
        """Returns how much memory `take` would still have to ask for."""
        held = 0 if self._memory is None else self._memory.nbytes
        needed = _offsets(state.tensors)[-1]
        return 0 if needed <= held else needed

    def request(self, state: Snapshot) -> Callable[[], object]:
        """Returns the work that gets what `take` needs for such a state. Any thread may do it, while nothing
        is taken.

        It takes a second for some 10 GB, most of it to lock pages. The work does not hold the state.
        """
        return partial(self._memory_for, _offsets(state.tensors)[-1], _gpu_of(state))

    @torch.no_grad()
    def take(self, state: Snapshot) -> Snapshot:
        """Returns the same state with all tensors copied; it is valid until the next call."""
        offsets = _offsets(state.tensors)
        memory = self._memory_for(offsets[-1], _gpu_of(state))
        copies = tuple(
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(offsets, state.tensors, strict=False)
        )
        stream = torch.cuda.Stream() if self._is_pinned else None  # type: ignore[no-untyped-call]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for copy, tensor in zip(copies, state.tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        return replace(state, tensors=copies)

    def release(self) -> None:
        """Gives the memory back."""
        if self._memory is not None and self._is_pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))  # type: ignore[no-untyped-call]
        self._memory, self._is_pinned = None, False

    def _memory_for(self, num_bytes: int, gpu: torch.device | None) -> Tensor:
        if self._memory is None or self._memory.nbytes < num_bytes:
            self.release()
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
            if gpu is not None and num_bytes >= _PINNED_FROM_BYTES:
                # `pin_memory=True` would round up to a power of two, up to twice of what may be most of the
                # host's memory.
                self._memory.zero_()  # all cores ask for the pages, which locking would do with one
                with torch.cuda.device(gpu):  # a new thread is at GPU 0
                    code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), num_bytes, 0)  # type: ignore[no-untyped-call]
                torch.cuda.check_error(int(code))
                self._is_pinned = True
            _LOG.info("staging bytes=%d pinned=%s", num_bytes, self._is_pinned)
        return self._memory


def available_bytes() -> int:
    """Returns how much memory this process may still use: what the system tells, and the limit of its control
    group."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
    except (OSError, KeyError):
        return available
    return available if limit == "max" else min(available, int(limit) - used + int(cached))


def _gpu_of(state: Snapshot) -> torch.device | None:
    return next((tensor.device for tensor in state.tensors if tensor.is_cuda), None)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Returns where each tensor begins, and at the end the size of all of them."""
    return list(accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0))
