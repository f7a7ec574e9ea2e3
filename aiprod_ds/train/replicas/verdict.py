"""Which rank holds other bits than the rest, and in which tensor: asked once ranks are known to differ.

Owns the comparison tensor by tensor, the majority, and the judge where there is none: the fp32 master of a
trained weight, of which the weight is a cast. Everything here is collective.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Replica
from aiprod_ds.train.replicas.sums import as_integers, sum_of_each

_TOLD, _JUDGED = 3, 8
_WORDS = {"weight": "weight", "master": "fp32 master of", "average": "average of", "buffer": "buffer"}

Key = tuple[str, str]
"""Kind and name of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Ranks that hold different bits, the same on all ranks.

    Attributes:
        tensors: In which, as messages name them; at least one.
        ranks: That are to blame, with their hosts; all, if nothing tells which.
        world_size: Number of ranks.
        lasts: Whether the bits still differ; weights may have been gathered anew meanwhile.
    """

    tensors: tuple[str, ...]
    ranks: Mapping[int, str]
    world_size: int
    lasts: bool

    def message(self, *, update: int, checkpoint: str | None) -> str:
        """Returns where, rule, got and fix.

        Args:
            update: That the run stands at.
            checkpoint: The newest; None if there is none.
        """
        more = len(self.tensors) - _TOLD
        what = ", ".join(self.tensors[:_TOLD]) + (f" and {more} more" if more > 0 else "")
        who = ", ".join(f"rank {rank} on {host}" for rank, host in self.ranks.items())
        if len(self.ranks) == self.world_size:
            who = f"different ones, on which of {who} cannot be told,"
        else:
            who = f"others on {who}"
        last = (
            f"The same command goes on from checkpoint {checkpoint}, which was compared before it was written"
            if checkpoint is not None
            else "There is no checkpoint yet: the same command starts anew"
        )
        gone = "" if self.lasts else " (not any more: that update ended with all ranks alike)"
        return (
            f"update {update}: all ranks must hold the same bits, got {who} in {what}{gone}. Nothing of it "
            f"was saved. {last}. Memory, device or link of that host may be failing: examine it, or leave it "
            "out."
        )


def find_divergence(
    replicas: Sequence[Replica],
    *,
    suspects: Sequence[Key],
    seen: Sequence[int],
    before: Mapping[Key, int],
    read_master: Callable[[str], Tensor],
    by_words: Sequence[bool],
) -> tuple[Divergence | None, tuple[str, ...]]:
    """Returns what differs, and the names of buffers that differ because every rank writes its own values.

    Args:
        replicas: What every rank holds.
        suspects: What lay in the sums that differed.
        seen: These sums, of this rank.
        before: The sums of this rank's buffers when the phase began. One that has changed on every rank is
            written by training; a bit flips on one.
        read_master: Returns a parameter in fp32, as `Engine.read_value`.
        by_words: Of each replica, whether its memory is read as words.
    """
    sums = named_sums(replicas, by_words)
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "sums": sums,
        "seen": tuple(seen),
        "changed": {key for key, found in sums.items() if key[0] == "buffer" and before.get(key) != found},
    }
    ranks: list[dict[str, Any]] = dist.gather_objects(own)
    changing: set[Key] = set.intersection(*(rank["changed"] for rank in ranks))
    differing = [key for key in sums if len({rank["sums"][key] for rank in ranks}) > 1]
    unlike = tuple(sorted(name for kind, name in differing if (kind, name) in changing))
    silent = [key for key in differing if key not in changing]
    if not silent and (unlike or not changing.isdisjoint(suspects)):
        return None, unlike or tuple(sorted(name for kind, name in suspects if (kind, name) in changing))
    votes = [tuple(rank["sums"][key] for key in silent) if silent else rank["seen"] for rank in ranks]
    blamed = _minority(votes) or _not_cast(replicas, silent, read_master) or range(len(ranks))
    divergence = Divergence(
        tensors=tuple(f"{_WORDS[kind]} {name}" for kind, name in silent or suspects),
        ranks={rank: ranks[rank]["host"] for rank in blamed},
        world_size=len(ranks),
        lasts=bool(silent),
    )
    return divergence, unlike


def keys_of(replica: Replica) -> list[Key]:
    """Returns what lies in a replica."""
    return [(replica.kind, part.name) for part in replica.slices]


@torch.no_grad()
def named_sums(replicas: Sequence[Replica], by_words: Sequence[bool]) -> dict[Key, int]:
    """Returns the sum of the bits of each tensor that lies in a replica; the host waits for it."""
    sums: dict[Key, int] = {}
    for replica, words in zip(replicas, by_words, strict=True):
        parts = [_part(replica, index) for index in range(len(replica.slices))]
        integers = [
            as_integers(part, by_words=words and offset * part.element_size() % 8 == 0)
            for part, offset in zip(parts, (piece.offset for piece in replica.slices), strict=True)
        ]
        found = sum_of_each(integers, device=replica.tensor.device).tolist()
        sums |= dict(zip(keys_of(replica), found, strict=True))
    return sums


def _part(replica: Replica, index: int) -> Tensor:
    """Returns a slice of a replica, flat, in the order of its memory."""
    tensor, piece = replica.tensor.detach(), replica.slices[index]
    return tensor.as_strided((piece.length,), (1,), tensor.storage_offset() + piece.offset)


def _minority(votes: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the ranks that differ from more than half of all; none if no more than half agree."""
    ((common, count),) = Counter(votes).most_common(1)
    return [rank for rank, vote in enumerate(votes) if vote != common] if 2 * count > len(votes) else []


@torch.no_grad()
def _not_cast(
    replicas: Sequence[Replica], differing: Sequence[Key], read_master: Callable[[str], Tensor]
) -> list[int]:
    """Returns the ranks whose weights are no casts of their masters, if there are others."""
    wanted = [name for kind, name in differing if kind == "weight"][:_JUDGED]
    homes = {
        part.name: (replica, index)
        for replica in replicas
        if replica.kind == "weight"
        for index, part in enumerate(replica.slices)
    }
    is_cast = True
    for name in wanted:
        replica, index = homes[name]
        own = _part(replica, index)
        master = read_master(name).to(own.dtype).reshape(-1)
        is_cast = is_cast and torch.equal(own.view(torch.uint8), master.view(torch.uint8))
    wrong = [rank for rank, is_right in enumerate(dist.gather_objects(is_cast)) if not is_right]
    return wrong if len(wrong) < dist.world_size() else []
