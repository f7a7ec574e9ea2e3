"""What a checkpoint says about the run beside the engine's own files.

Owns the record, its JSON form and the hash that lets anyone compare two runs. Writing and reading folders is
`store.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError

_KINDS: dict[str, type] = {"fingerprint": str, "phase_fingerprints": Sequence}  # the others are mappings
# Checkpoints from before these fields are read as if they had them empty.
_CAME_LATER = frozenset({"replaced_clips", "spikes", "streams"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything that a resumed run needs and cannot compute.

    Attributes:
        scheduler: What `CurriculumScheduler.state_dict` returned at this clock.
        fingerprint: Hash of the configuration without its phases.
        phase_fingerprints: One hash per phase, so that phases not yet reached may still be edited.
        layout: Engine, world size, ZeRO stage and precision that saved, and the global batches by phase and
            bucket.
        history: What the report needs from before the save (evaluations, seconds per phase, resumes).
        adaptive_clip: Statistics of gradient norms; empty without an adaptive clip.
        streams: Where an iterable dataset stands on every rank (`ranks`); empty if the clock says all.
        replaced_clips: Name -> reason, by name, of the training clips that could not be read and that no rank
            reads from this checkpoint on.
        spikes: What was decided about them (`rollbacks`), the `watch` that looks for the next one, and
            whether one `is_doubtful`.
    """

    clock: Clock
    scheduler: Mapping[str, Any]
    fingerprint: str
    phase_fingerprints: tuple[str, ...]
    layout: Mapping[str, Any]
    history: Mapping[str, Any] = field(default_factory=dict)
    adaptive_clip: Mapping[str, Any] = field(default_factory=dict)
    streams: Mapping[str, Any] = field(default_factory=dict)
    replaced_clips: Mapping[str, str] = field(default_factory=dict)
    spikes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_doubtful(self) -> bool:
        """Whether a spike may have begun before this checkpoint, which then has to be given up."""
        return self.spikes.get("is_doubtful") is True

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "clock": asdict(self.clock),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """Returns the state saved by `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or of another kind.
        """
        if set(values) | _CAME_LATER != set(cls.__dataclass_fields__):
            raise CheckpointError(
                f"state.json: fields must be {sorted(cls.__dataclass_fields__)}, got {sorted(values)}."
            )
        for name, value in values.items():
            kind = _KINDS.get(name, Mapping)
            if not isinstance(value, kind):
                raise CheckpointError(
                    f"state.json: {name} must be a {kind.__name__}, got {type(value).__name__}."
                )
        clock, fingerprints = Clock.from_dict(values["clock"]), tuple(values["phase_fingerprints"])
        return cls(**{**values, "clock": clock, "phase_fingerprints": fingerprints})


def weights_sha256(digests: Mapping[str, str]) -> str:
    """Returns the hash of a set of weights: the SHA-256 of lines `<name> <hash of that tensor>` in the order
    of names.

    Args:
        digests: `tensors_sha256` of each tensor alone, by its name.
    """
    return hashlib.sha256(
        "".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()
    ).hexdigest()


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns one hash over names, dtypes, shapes and bytes, in the order given; equal hashes mean bitwise
    equal states."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()
