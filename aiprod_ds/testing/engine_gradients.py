"""Gradients of DeepSpeed's engine against those of plain eager autograd, for every parameter, on the CPU or a
GPU.

A case names a model of `gradients`, what is trained, the precision, how it runs (eager, compiled, captured or
both), and what is recomputed (nothing, what the model itself chooses, whole blocks by their class, or every
second of them): `ltx-lora-bf16-captured-none`. ZeRO-3 is not captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.captured import CapturedLoss
from aiprod_ds.engine.compiled import set_compiled
from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.testing.gradients import Subject, gradient_errors, plain_gradients, subject
from aiprod_ds.train.engines import decay_groups

STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 3)
ReadGradient = Callable[[nn.Parameter], Tensor]
_BACKENDS = {"cpu": "aot_eager", "cuda": "inductor"}


def measure_gradients(
    cases: Iterable[str], read: ReadGradient, *, stages: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[str, float]]:
    """Returns, for each `case-stage-accumulation`, the parameter with the largest error and the error. Inside
    `dist.process_group`.

    Args:
        cases: As above.
        read: Gives the whole gradient of one of an engine's parameters: `deepspeed.utils.safe_get_full_grad`.
        stages: The ZeRO stages of each case; all of all by default.
    """
    errors = {}
    for case in cases:
        for stage in STAGES if stages is None else stages[case]:
            for accumulation, worst in zip(ACCUMULATIONS, worst_gradients(case, stage, read), strict=True):
                errors[f"{case}-{stage}-{accumulation}"] = worst
    return errors


def small_settings(stage: int, precision: str) -> DeepSpeedSettings:
    """Returns settings under which even small blocks have several flat parameters."""
    values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if stage:
        # So small that the blocks here have several flat parameters, some of them larger than a bucket.
        values["zero_optimization"]["reduce_bucket_size"] = 5000
    if stage == 3:
        # Nothing stays gathered, neither for its size nor because it is needed again soon.
        values["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    if precision == "bf16":
        values["bf16"] = {"enabled": True}
    return parse_deepspeed_settings(values, where=f"stage {stage}")


def worst_gradients(case: str, stage: int, read: ReadGradient) -> Iterator[tuple[str, float]]:
    """Yields the parameter with the largest error and the error, for each of `ACCUMULATIONS`. Collective."""
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    name, kind, precision, form, recompute = case.split("-")
    trained = subject(name, has_adapters=kind == "lora", device=dist.choose_device())
    blocks = list(repeated_blocks(trained.module))
    set_compiled(blocks, enabled=form in {"compiled", "both"}, backend=_BACKENDS[dist.choose_device().type])
    if recompute != "none":
        own = None if recompute == "own" else blocks
        set_recompute(trained.module, enabled=True, blocks=own, every=2 if recompute == "second" else 1)
    engine = DeepSpeedEngine(
        trained.module,
        decay_groups(trained.module),
        optimizer=OptimizerConfig(),
        settings=small_settings(stage, precision),
        micro_batch_size=1,
        accumulation=1,
        flat_parameters="on",
    )
    loss = _captured(trained, engine) if form in {"captured", "both"} and stage < 3 else None
    for accumulation in ACCUMULATIONS:
        engine.set_batch(micro_batch_size=1, accumulation=accumulation)
        for index in range(accumulation):
            number = engine.rank * accumulation + index
            if loss is None:
                engine.backward(trained.loss(engine, number))
            else:
                is_last = index == accumulation - 1
                engine.backward(loss(trained.batch(number), is_last=is_last)["total"])
            if index < accumulation - 1:
                engine.step()
        expected = _expected(name, kind, precision, accumulation)
        errors = gradient_errors(_gradients(engine, read), expected)
        worst = max(errors, key=lambda name: errors[name])
        engine.step()  # the learning rate is 0
        yield worst, errors[worst]
    engine.close()


def _captured(trained: Subject, engine: Any) -> CapturedLoss:
    def loss(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"total": trained.loss_of(engine, tensors)}

    found: CapturedLoss = engine.captured_loss(loss, trained.batch(0))
    assert found.why_not is None, found.why_not
    return found


def _gradients(engine: Any, read: ReadGradient) -> dict[str, Tensor]:
    """Returns the gradients of the update to come, by the parameters' own names."""
    found = {}
    layouts = engine._flat.layouts
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = read(parameter)
        if name not in layouts:
            found[name] = whole
            continue
        for member in layouts[name].members:
            found[member.name] = whole[member.start :][: member.numel].view(member.shape)
    return found


@functools.cache
def _expected(name: str, kind: str, precision: str, accumulation: int) -> dict[str, Tensor]:
    trained = subject(name, has_adapters=kind == "lora", device=dist.choose_device())
    if precision == "bf16":
        trained.module.bfloat16()
    return plain_gradients(trained, range(accumulation * dist.world_size()))
