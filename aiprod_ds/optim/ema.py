"""An exponential moving average (EMA) of the fp32 master weights, kept by each rank for the masters that it
owns.

Owns the average: its decay, its part in a checkpoint and its exchange with the weights. Owns neither the
masters nor when an update counts: the loop calls `update` after every applied update, with the clock's
samples, and `swapped` around evaluation and export. Memory: 4 bytes for every element of the rank's masters,
on their device; with an offloaded optimizer that is the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from aiprod_ds.config.optim import EmaConfig
from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import ShardSlice, Snapshot, StateReader, fill

_EXCHANGED_AT_ONCE = 2**26  # elements; bounds the third copy that an exchange needs to 256 MiB


class MasterHolder(Protocol):
    """What the average needs of an engine; `aiprod_ds.engine.protocol.Engine` describes each."""

    rank: int
    has_partitioned_masters: bool

    def master_shards(self) -> list[Tensor]:
        """Returns the fp32 masters that this rank owns, not copied."""

    def slices(self) -> list[tuple[ShardSlice, ...]]:
        """Returns, for each of them, which parts of which parameters lie in it."""

    def refresh_weights(self) -> None:
        """Casts the masters into the weights that the module computes with. Collective."""


class Ema:
    """The average of one engine's masters; it starts as a copy of them.

    After the update that took the run from n to m samples:

        ema += (1 - decay) * (master - ema),  decay = ema_decay(n, m)

    in fp32, one lerp. Since fp32 cannot add less than half an ulp, the average stops following a weight that
    differs by less than 6e-8 / (1 - decay) of its value: 0.05% at 0.99989; choose the half-life no more than
    some ten thousand updates long.

    Args:
        holder: The engine; a new engine needs a new average.
    """

    def __init__(self, holder: MasterHolder, config: EmaConfig) -> None:
        self._holder = holder
        self._config = config
        self._shards = [master.detach().clone() for master in holder.master_shards()]
        self._is_swapped = False

    @torch.no_grad()
    def update(self, *, samples_before: int, samples_after: int) -> None:
        """Moves the average towards the masters of an update that was applied.

        Args:
            samples_before: `clock.samples` before the update.
            samples_after: `clock.samples` after it.

        Raises:
            EngineError: If called while the average is swapped in.
        """
        self._require_own_place("update")
        decay = ema_decay(self._config, samples_before=samples_before, samples_after=samples_after)
        # A few kernels for all shards, in place of one for each, whose launching the host would pay for.
        torch._foreach_lerp_(self._shards, self._holder.master_shards(), 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Lets the engine hold the average for evaluation and export, and then its own weights again, bit for
        bit. Collective.

        Inside, forward uses the average in the compute type, and `parameter_states` and `module_state` return
        it in fp32. If the body raises, masters and average return to their places, but the weights are
        refreshed by the next update only: that would be a collective, which other ranks may never reach.

        Raises:
            EngineError: If the average is swapped in already.
        """
        self._require_own_place("swapped")
        self._exchange()
        self._is_swapped = True
        try:
            self._holder.refresh_weights()
            yield
        finally:
            self._exchange()
            self._is_swapped = False
        self._holder.refresh_weights()

    def capture(self, state: Snapshot) -> Snapshot:
        """Returns what the engine captured, and the average, not copied.

        Raises:
            EngineError: If called while the average is swapped in.
        """
        self._require_own_place("capture")
        # Masters that are not partitioned are the same on every rank: one writes them.
        writes = self._holder.has_partitioned_masters or self._holder.rank == 0
        return state.plus("ema", self._shards if writes else [], self._holder.slices() if writes else [])

    def replicas(self) -> list[tuple[Tensor, tuple[ShardSlice, ...]]]:
        """Returns the averages that every rank holds alike, not copied, and what lies in each: all, or none
        where each rank owns other masters.

        Raises:
            EngineError: If called while the average is swapped in.
        """
        self._require_own_place("replicas")
        if self._holder.has_partitioned_masters:
            return []
        return list(zip(self._shards, self._holder.slices(), strict=True))

    def restore(self, source: StateReader) -> None:
        """Takes over what an average of the same parameters captured, bit for bit.

        Raises:
            CheckpointError: If there is none, or it cannot be read.
            EngineError: If called while the average is swapped in.
        """
        self._require_own_place("restore")
        fill(source, "ema", self._shards, self._holder.slices())

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, shard in zip(self._holder.master_shards(), self._shards, strict=True):
            for part, other in zip(_parts(master), _parts(shard), strict=True):
                kept = part.clone()
                part.copy_(other)
                other.copy_(kept)

    def _require_own_place(self, where: str) -> None:
        if self._is_swapped:
            raise EngineError(
                f"ema.{where}: must be called outside `swapped`, got a call inside. Leave the block first."
            )


def evaluated_weights(ema: Ema | None) -> AbstractContextManager[None]:
    """Returns the block inside which the engine holds what is evaluated and exported: the average if the run
    keeps one."""
    return nullcontext() if ema is None else ema.swapped()


def ema_decay(config: EmaConfig, *, samples_before: int, samples_after: int) -> float:
    """Returns what the average keeps of itself in an update, a function of samples alone.

    The half-life at t samples is h(t) = min(half_life_samples, ramp * t). With T = half_life_samples / ramp,
    where the ramp ends,

        decay = 0.5 ** integral of dt / h(t) from n to m
              = (n / m) ** (ln 2 / ramp)              if m <= T, so 0 for the first update of a run
              = 0.5 ** ((m - n) / half_life_samples)  if n >= T

    and the product of both parts across T. So the decays of consecutive updates multiply to the decay over
    all of them: how long the average remembers does not depend on how samples are cut into batches, nor does
    it jump where a phase changes the batch.

    Worked numbers: half-life 200000, ramp 0.05, batch 32. From 320 to 352 samples (320 / 352) ** 13.863 =
    0.266794; from 4000000 samples on 0.5 ** (32 / 200000) = 0.99988910.

    Source: the ramp is that of EDM (Karras et al. 2022; NVlabs/edm, training/training_loop.py,
    ema_rampup_ratio), there evaluated once per batch, here integrated. The usual min(decay, (1 + k) / (10 +
    k)) after k updates is nearly the same ramp, (n / m) ** 9 or ramp = 0.077, but it counts updates and so
    depends on the batch size.

    Args:
        config: Without a `ramp` the half-life is `half_life_samples` from the first sample on.
        samples_before: n >= 0.
        samples_after: m > n.

    Returns:
        In [0, 1).
    """
    assert 0 <= samples_before < samples_after, "an update sees samples"
    end_of_ramp = 0.0 if config.ramp is None else config.half_life_samples / config.ramp
    in_ramp, after_ramp = min(samples_after, end_of_ramp), max(samples_before, end_of_ramp)
    half_lives = max(samples_after - after_ramp, 0.0) / config.half_life_samples
    if config.ramp is not None and in_ramp > samples_before:
        if samples_before == 0:
            return 0.0
        half_lives += math.log(in_ramp / samples_before) / config.ramp
    return math.pow(0.5, half_lives)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.split(tensor, _EXCHANGED_AT_ONCE) if tensor.dim() == 1 else (tensor,)
    )  # large shards are flat
