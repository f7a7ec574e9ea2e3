"""The weights that adapters are trained on: what they are, as a hash, and where a checkpoint finds them
again.

Owns the hash over an engine's frozen weights and the choice between a reference and a copy. The files are
`aiprod_ds.checkpoint.frozen_bases`.
"""

from __future__ import annotations

from pathlib import Path

from aiprod_ds.checkpoint.state import tensors_sha256, weights_sha256
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import PhasePlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import Base


def base_of_phase(
    engine: Engine, phase: PhasePlan, config: RunConfig, *, origin: str, is_stored: bool
) -> Base | None:
    """Returns what checkpoints of `phase` refer to; None if they hold everything. Collective.

    Args:
        engine: Holds the frozen weights as they stay through the phase.
        origin: Of these weights, in words.
        is_stored: Whether they must be stored, because starting the run anew does not give them.
    """
    if phase.adapters is None or config.checkpoint.self_contained:
        return None
    return Base(sha256=frozen_sha256(engine), is_stored=is_stored, origin=origin)


def start_in_words(config: RunConfig) -> str:
    """Returns where the weights come from that a run starts from."""
    model = config.model
    words = model.pretrained or f"{model.source} with its own weights, seed {config.seed}"
    merged = getattr(model, "lora_checkpoint", None)
    return words if merged is None else f"{words} and the LoRA {merged.path}"


def frozen_sha256(engine: Engine) -> str:
    """Returns `weights_sha256` of all frozen parameters, whatever the sharding. Collective; the ranks share
    the tensors."""
    frozen = engine.frozen_dtypes()
    own: dict[str, str] = {}
    for index, name in enumerate(sorted(frozen)):
        value = engine.read_value(name)  # fp32, which every type of weights fits into
        if index % engine.world_size == engine.rank:
            own[name] = tensors_sha256([(name, value.to(frozen[name]))])
    digests = {name: digest for part in dist.gather_objects(own) for name, digest in part.items()}
    return weights_sha256(digests)


def require_same_base(engine: Engine, base: Base, *, folder: Path, origin: str) -> None:
    """Checks that an engine, as it was built, holds what a checkpoint refers to. Collective.

    Args:
        engine: Not restored yet.
        base: From the checkpoint.
        folder: Of the checkpoint, for the message.
        origin: Of the engine's weights, in words.

    Raises:
        CheckpointError: If it holds other weights; names both.
    """
    own = frozen_sha256(engine)
    if own != base.sha256:
        raise CheckpointError(
            f"{folder}: must go on with the weights that its adapters were trained on, {base.origin} "
            f"(sha256 {base.sha256[:16]}), got {origin} (sha256 {own[:16]}). Give the run those weights "
            "again."
        )
