"""The comparison of what all ranks hold alike: a part of it at every update, all of it before every save.

Every update sums the bits of an eightieth (`sums.py`); every tenth sends the ten sums to the other ranks,
without waiting, and reads the ten before them. So a bit that flips at any time is found within 100 updates:
80 until its part's turn, 10 until that is sent, 10 until it is read. With one rank nothing is summed. What
follows from a difference is `verdict.py`.

At ZeRO-1 and ZeRO-2 every update gathers trained weights anew from the ranks that own their masters, which
heals a copy that has flipped; it is found only if its turn comes before that. ZeRO-3 leaves nothing but
buffers on every rank. So it is frozen weights, buffers and ZeRO-0 where this finds what would stay.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine, Replica
from aiprod_ds.train.replicas.sums import Turn, as_integers, is_aligned, is_dense, share_out, sum_of_each
from aiprod_ds.train.replicas.verdict import Divergence, Key, find_divergence, keys_of, named_sums
from aiprod_ds.train.state import TrainState

_LOG = logging.getLogger(__name__)
WITHIN_UPDATES = 100
_TURNS, _TURNS_OF_VOTE = 80, 10
_TOLD = 3


@dataclass(slots=True, kw_only=True)
class _Compared:
    """What is compared of one engine; the same on all ranks, apart from the memory.

    Attributes:
        replicas: In an order that all ranks have.
        by_words: Of each, whether its memory is read as words.
    """

    engine: Engine
    replicas: list[Replica]
    by_words: list[bool]

    def integers(self) -> list[list[Tensor]]:
        """Returns the memory of each replica as integers."""
        return [
            as_integers(replica.tensor, by_words=words)
            for replica, words in zip(self.replicas, self.by_words, strict=True)
        ]

    def without(self, buffers: set[str]) -> _Compared:
        """Returns the same without some buffers."""
        kept = [index for index, replica in enumerate(self.replicas) if not _is_in(replica, buffers)]
        return _Compared(
            engine=self.engine,
            replicas=[self.replicas[index] for index in kept],
            by_words=[self.by_words[index] for index in kept],
        )


@dataclass(slots=True)
class _Vote:
    """Sums of consecutive turns that are on their way.

    Attributes:
        sums: Of this rank.
        turns: What was summed.
    """

    sums: Tensor
    turns: tuple[Turn, ...]


@dataclass(slots=True, kw_only=True)
class ReplicaCheck:
    """Compares the ranks of one run; every rank calls the same at the same moments.

    Attributes:
        is_on: Whether it compares at all; with one rank it never does.
        num_turns: Updates in which everything is summed once.
        turns_of_vote: Updates whose sums are sent together.
    """

    is_on: bool
    num_turns: int = _TURNS
    turns_of_vote: int = _TURNS_OF_VOTE
    _compared: _Compared | None = None
    _turns: list[Turn] = field(default_factory=list)
    _turn: int = 0
    _sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    _summed: list[Turn] = field(default_factory=list)
    _vote: _Vote | None = None
    _ballot: dist.Ballot | None = None
    _before: dict[Key, int] = field(default_factory=dict)  # sums of buffers when the phase began
    _unlike: set[str] = field(default_factory=set)  # buffers that are each rank's own

    def begin(self, state: TrainState) -> None:
        """Takes what `state` trains from now on; its tensors must stay where they are until `end`.
        Collective."""
        if not self._does_compare:
            return
        compared = self._agreed(state)
        own = zip(compared.replicas, compared.by_words, strict=True)
        buffers = [(replica, words) for replica, words in own if replica.kind == "buffer"]
        self._before = named_sums([replica for replica, _ in buffers], [words for _, words in buffers])
        self._share_out(compared)
        self._sums = torch.zeros(self.turns_of_vote, dtype=torch.int64, device=state.engine.device)
        if self._ballot is None:
            self._ballot = dist.Ballot(2 * self.turns_of_vote)
        num_bytes = sum(replica.tensor.nbytes for replica in compared.replicas)
        _LOG.info(
            "ranks_compared tensors=%d bytes=%d within_updates=%d%s",
            sum(len(replica.slices) for replica in compared.replicas), num_bytes, WITHIN_UPDATES,
            "" if num_bytes else " note='every rank holds its own part'",
        )  # fmt: skip

    def look(self) -> Divergence | None:
        """Sums a part after an update; returns a difference between ranks once one is known. Collective."""
        if not self._turns:
            return None
        turn = self._turns[self._turn]
        turn.sum_into(self._sums[len(self._summed)])
        self._summed.append(turn)
        self._turn = (self._turn + 1) % self.num_turns
        if len(self._summed) < self.turns_of_vote:
            return None
        found = self._read()
        if found is None and self._summed:  # else they are shared out anew
            self._cast()
        return found

    def look_at_all(self, state: TrainState) -> Divergence | None:
        """Sums everything and waits for the other ranks, before what they hold is saved. Collective."""
        if not self._does_compare:
            return None
        compared = self._agreed(state)
        if not compared.replicas:
            return None
        sums = sum_of_each(compared.integers(), device=state.engine.device)
        ballot = dist.Ballot(2 * sums.numel())
        ballot.cast(_both(sums))
        differing = _unequal(ballot.result())
        if not differing:
            return None
        suspects = [key for index in differing for key in keys_of(compared.replicas[index])]
        own = sums.tolist()
        return self._judge(compared, suspects, [own[index] for index in differing])

    def end(self) -> Divergence | None:
        """Reads what is still on its way and forgets all tensors; returns a difference, if there is one.
        Collective."""
        found = self._read() if self._turns else None
        self._turns, self._summed, self._compared = [], [], None
        return found

    @property
    def _does_compare(self) -> bool:
        return self.is_on and dist.world_size() > 1

    def _share_out(self, compared: _Compared) -> None:
        """Shares out what is compared from now on; what was summed and not sent yet is summed again later."""
        self._compared, self._summed = compared, []
        self._turns = share_out(compared.integers(), num_turns=self.num_turns) if compared.replicas else []

    def _agreed(self, state: TrainState) -> _Compared:
        """Returns what this rank holds of what all ranks hold, of equal sizes. Collective."""
        held = {_name(replica): replica for replica in self._held(state)}
        forms = {name: _form(replica) for name, replica in held.items()}
        digest = hashlib.sha256(repr(sorted(forms.items())).encode()).hexdigest()
        if len(set(dist.gather_objects(digest))) > 1:
            everyone = dist.gather_objects(forms)
            forms = {
                name: (*form[:-1], all(other[name][-1] for other in everyone))
                for name, form in forms.items()
                if all(name in other and other[name][:-1] == form[:-1] for other in everyone)
            }
        names = sorted(forms)
        return _Compared(
            engine=state.engine,
            replicas=[held[name] for name in names],
            by_words=[bool(forms[name][-1]) for name in names],
        )

    def _held(self, state: TrainState) -> Iterator[Replica]:
        averages = [] if state.ema is None else state.ema.replicas()
        for replica in (
            *state.engine.replicas(),
            *(Replica(kind="average", tensor=tensor, slices=slices) for tensor, slices in averages),
        ):
            is_here = replica.tensor.device == state.engine.device and is_dense(replica.tensor)
            if is_here and replica.slices and not _is_in(replica, self._unlike):
                yield replica

    def _cast(self) -> None:
        assert self._ballot is not None
        sums = self._sums.clone()  # the next turns write into these
        self._ballot.cast(_both(sums))
        self._vote, self._summed = _Vote(sums=sums, turns=tuple(self._summed)), []

    def _read(self) -> Divergence | None:
        vote, self._vote = self._vote, None
        if vote is None or self._ballot is None or self._compared is None:
            return None
        differing = _unequal(self._ballot.result())
        if not differing:
            return None
        suspects = [
            key for index in differing for key in _touched(vote.turns[index], self._compared.replicas)
        ]
        own = vote.sums.tolist()
        return self._judge(self._compared, suspects, [own[index] for index in differing])

    def _judge(self, compared: _Compared, suspects: Sequence[Key], seen: Sequence[int]) -> Divergence | None:
        """Returns who differs; buffers into which ranks write on their own are not compared any more."""
        found, unlike = find_divergence(
            compared.replicas,
            suspects=list(dict.fromkeys(suspects)),
            seen=seen,
            before=self._before,
            read_master=compared.engine.read_value,
            by_words=compared.by_words,
        )
        if unlike and found is None:
            self._leave_out(unlike)
        return found

    def _leave_out(self, buffers: Sequence[str]) -> None:
        more = f" and {len(buffers) - _TOLD} more" if len(buffers) > _TOLD else ""
        _LOG.warning(
            "buffers_not_compared names=%s%s: each rank writes values of its own, as a batch norm does",
            ",".join(buffers[:_TOLD]),
            more,
        )
        self._unlike.update(buffers)
        if self._compared is not None:
            self._share_out(self._compared.without(self._unlike))


def _name(replica: Replica) -> str:
    return f"{replica.kind}/{replica.slices[0].name}"


def _is_in(replica: Replica, buffers: set[str]) -> bool:
    return replica.kind == "buffer" and replica.slices[0].name in buffers


def _form(replica: Replica) -> tuple[Any, ...]:
    """Returns what must be equal on all ranks for sums to be comparable; at last whether it can be read by
    words, which may differ."""
    places = tuple((part.name, part.offset, part.length) for part in replica.slices)
    return places, replica.tensor.nbytes, str(replica.tensor.dtype), is_aligned(replica.tensor)


def _both(sums: Tensor) -> Tensor:
    """Returns what the greatest values over all ranks tell equal sums by: -x - 1 falls where x rises, and
    unlike -x it exists for each."""
    return torch.cat([sums, ~sums])


def _unequal(greatest: Sequence[int]) -> list[int]:
    half = len(greatest) // 2
    return [index for index in range(half) if greatest[index] != ~greatest[half + index]]


def _touched(turn: Turn, replicas: Sequence[Replica]) -> Iterator[Key]:
    for index, first, last in turn.touched:
        replica = replicas[index]
        size = replica.tensor.element_size()
        for part in replica.slices:
            if part.offset * size < last and first < (part.offset + part.length) * size:
                yield replica.kind, part.name
