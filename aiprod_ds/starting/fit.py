"""How the phases of a draft fit a kind of GPU: ZeRO stage, offload, micro-batches and recomputation, by the
planner's estimates.

Owns the search over drafts: a last phase that fits with nothing is left out, and said. On a CPU nothing is
asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.load import load_config
from aiprod_ds.config.trainers import trainer_class
from aiprod_ds.errors import PlanError
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.planner.search import ParallelChoice, search
from aiprod_ds.starting.draft import CPU, PhaseDraft, Wish
from aiprod_ds.train.planning.estimate import estimator_of, settings_for
from aiprod_ds.train.planning.gpu_rules import require_runnable

_CPU_SETTINGS = "zero1_fp32"
TextOf = Callable[[Sequence[PhaseDraft], str], str]
"""Makes the text of a configuration from phases and the name of settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Phases that fit.

    Attributes:
        settings: Name of shipped DeepSpeed settings.
        notes: What was left out, in words.
    """

    phases: tuple[PhaseDraft, ...]
    settings: str
    notes: tuple[str, ...] = ()


def fitted(wish: Wish, phases: Sequence[PhaseDraft], text_of: TextOf) -> Fitted:
    """Returns the phases with what is fastest of what fits.

    Raises:
        PlanError: If not even the first phase fits.
        ConfigError: If a model cannot be built, or cannot run on the machine.
    """
    if wish.machine == CPU:
        split = (replace(phase, micro_batch_size=phase.global_batch_size // wish.ranks) for phase in phases)
        return Fitted(phases=tuple(split), settings=_CPU_SETTINGS)
    first = f"zero1_{_suffix(wish)}"
    notes: list[str] = []
    rest = list(phases)
    while True:
        try:
            choice = _search(wish, text_of(rest, first))
        except PlanError:
            if len(rest) == 1:
                raise
            left = rest.pop()
            notes.append(
                f"A phase of {left.height}x{left.width} with {left.length} frames was left out: by the "
                "planner it "
                f"does not fit {wish.ranks} x {wish.machine}."
            )
            continue
        chosen = zip(rest, choice.phases, strict=True)
        return Fitted(
            phases=tuple(
                replace(phase, micro_batch_size=own.micro_batch_sizes[0], is_recomputed=own.recompute > 0)
                for phase, own in chosen
            ),
            settings=f"zero{choice.zero_stage}_{_suffix(wish)}{'_offload' if choice.is_offloaded else ''}",
            notes=tuple(notes),
        )


def _suffix(wish: Wish) -> str:
    return "fp16_v100" if wish.precision == "fp16" else wish.precision


def _search(wish: Wish, text: str) -> ParallelChoice:
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_init_") as folder:
        path = Path(folder) / wish.file.name
        path.write_text(text, encoding="utf-8")
        # what `auto` chooses is asked here and then written down; shapes found from clips are no larger
        config = load_config(path, ["engine.parallel=auto"])
        trainer = trainer_class(config.trainer)(config=config, source=str(path))
        settings = read_settings(config, source=str(path))
    require_runnable(trainer.shapes, settings, MACHINES[wish.machine], where=str(wish.file))
    plan = trainer.plan(world_size=wish.ranks)
    estimator = estimator_of(trainer, plan, MACHINES[wish.machine], settings)
    with torch.random.fork_rng(devices=[]):
        return search(estimator, settings_for(settings, where=str(wish.file)), where=str(wish.file))
