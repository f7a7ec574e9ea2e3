"""What the loop trains in a diffusion run: the transformer with or without adapters, its loss, its held-out
measures and exports.

`diffusion.py` brings configuration, model and data together for it; the objective on one batch is
`diffusion_objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.curriculum.phase import PhasePlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.data.reading.replacing import UnreadClip
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.losses import LossTerms
from aiprod_ds.metrics.evaluations import NotJudged
from aiprod_ds.models.diffusion import TRANSFORMER, DiffusionModule
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.lora_files import LoraWeights
from aiprod_ds.train.unit import ClipWork, Evaluation, EvaluationRequest, Examples, Part
from aiprod_ds.trainers.clip_unit import ClipUnit
from aiprod_ds.trainers.diffusion_export import export_transformer
from aiprod_ds.trainers.diffusion_objective import FlowObjective
from aiprod_ds.trainers.evaluation import NOTHING_READ, evaluation_slots, without_unread
from aiprod_ds.trainers.open_data import read_empty_prompt
from aiprod_ds.trainers.preview import PreviewItem, Previews, held_out_items
from aiprod_ds.trainers.preview_prompts import EncodedPrompts, encode_prompts, prompt_item

_PROBE_LEVEL = 0.5


@dataclass(slots=True, kw_only=True)
class DiffusionUnit(ClipUnit):
    """What the loop trains; a `Unit`.

    Attributes:
        strides: Of the video VAE.
        started_with: What the adapters of the first phase go on from; None if they start with no effect.
    """

    config: DiffusionTrainerConfig
    module: DiffusionModule
    strides: ModelStrides
    started_with: LoraWeights | None = None
    _objective: FlowObjective = field(init=False)
    _decoder: LatentDecoder = field(init=False)
    _previews: Previews | None = field(init=False, default=None)
    _prompts: EncodedPrompts = field(init=False)
    _shapes: _ParameterShapes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Reads what can be missing before training."""
        config, family = self.config, self.module.family
        self._objective = FlowObjective(family=family, config=config.loss, seed=config.seed)
        self._require_fitting_latents()
        self._decoder = LatentDecoder(config.vae, config.audio_vae, config.preview, seed=config.seed)
        if not config.has_previews():
            return
        bucket = self.plan.phases[-1].buckets[0]
        item = self.data.readable_clip(bucket)
        self._prompts = encode_prompts(config, item, bucket, family=family, strides=self.strides)
        empty_prompt = read_empty_prompt(self.data)
        self._previews = Previews(
            config.preview,
            family=family,
            decoder=self._decoder,
            empty_prompt=self._prompts.empty if empty_prompt is None else empty_prompt,
            seed=config.seed,
        )

    @property
    def can_capture(self) -> bool:
        """Yes: all that is left to chance comes with the micro-batch."""
        return True

    def prepare(self, phase: PhasePlan) -> None:
        """Makes the transformer have the adapters that `phase` trains, or none; weights stay as they are."""
        set_adapters(self.module.transformer, self.module.family, phase, seed=self.config.seed)
        if phase.index == 0:
            start_adapters(self.module.transformer, self.started_with)
        self._shapes = _ParameterShapes(self.module.transformer)

    def hand_off(self, engine: Engine) -> WeightHandoff:
        """Returns W + scale * B A in fp32 of every wrapped layer, by its name in the plain transformer.
        Collective."""
        from aiprod_ds.models.lora import adapter_names  # imports peft, which takes seconds

        values = WeightHandoff()
        for names in adapter_names(self.module.transformer):
            base, down, up = (
                engine.read_value(f"{TRANSFORMER}{name}") for name in (names.base, names.down, names.up)
            )
            values.add(names.plain, base + names.scale * (up @ down))
        return values

    def take_over(self, handoff: WeightHandoff) -> Iterator[tuple[str, Tensor]]:
        """Yields what was carried by the names in the module as it is now. Collective."""
        from aiprod_ds.models.lora import adapter_names  # imports peft, which takes seconds

        wrapped = {names.plain: names.base for names in adapter_names(self.module.transformer)}
        for name, value in handoff.whole():
            yield f"{TRANSFORMER}{wrapped.get(name, name)}", value

    def probe(self, engine: Engine) -> Tensor:
        """Returns the velocities that the transformer predicts for the first held-out clip that can be read,
        half noised, in one vector."""
        engine.eval()
        bucket = self.plan.phases[-1].buckets[0]
        item = self.data.readable_clip(bucket)
        tensors = _on_device({name: tensor[None] for name, tensor in item.items()}, engine.device)
        answer = self._objective.answer(engine, tensors, place=0, noise_level=_PROBE_LEVEL)
        engine.train()
        return torch.cat(
            [answer[modality].float().flatten().cpu() for modality in self.module.family.modalities]
        )

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Noises one micro-batch and compares velocities."""
        tensors = _on_device(batch.tensors, engine.device)
        return self._objective.loss(engine, tensors, weights=phase.loss_weights)

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> Mapping[str, Tensor]:
        """See `FlowObjective.draws`."""
        return self._objective.draws(tensors, places)

    def clip_work(self, batch: MicroBatch) -> ClipWork | None:
        """Returns tokens, and FLOPs by `Family.flops_per_update`."""
        family = self.module.family
        tokens = {modality: part.grid.num_tokens for modality, part in family.tokens(batch.tensors).items()}
        flops = None
        if self._shapes is not None and self._shapes.are_whole:
            flops = family.flops_per_update(self._shapes, batch_size=1, num_tokens=tokens)
        return ClipWork(tokens=sum(tokens.values()), flops=flops)

    def evaluate(self, engine: Engine, request: EvaluationRequest) -> Evaluation:
        """Measures held-out clips and makes previews, whichever is asked for."""
        metrics: dict[str, float] = {}
        clips: tuple[str, ...] = ()
        not_judged: tuple[NotJudged, ...] = ()
        if Part.MEASURES in request.parts:
            unread: dict[int, str] = {}
            metrics = self._measured(engine, unread, request.go_on)
            clips, unreadable = without_unread(self._measured_names(), unread)
            not_judged = (*unreadable, *self._passed_over())
        examples = self._make_previews(engine, request.go_on) if Part.PREVIEWS in request.parts else None
        return Evaluation(
            metrics=metrics,
            headline=f"loss {metrics['loss']:.4f}" if metrics else NOTHING_READ if not_judged else "previews",
            examples=examples,
            clips=clips,
            not_judged=not_judged,
        )

    def _measured(
        self, engine: Engine, unread: dict[int, str], go_on: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the losses of held-out clips in the last phase's shape at the configured noise levels,
        spread over ranks; nothing if none could be read."""
        bucket, settings = self.plan.phases[-1].buckets[0], self.config.evaluation
        levels, modalities = settings.noise_levels, self.module.family.modalities
        sums_ML = torch.zeros(len(modalities), len(levels), dtype=torch.float64)
        count = 0
        slots = evaluation_slots(
            engine, self.data, bucket, max_clips=settings.max_clips, unread=unread, go_on=go_on
        )
        for slot in slots:
            tensors = _on_device({name: tensor[None] for name, tensor in slot.item.items()}, engine.device)
            for column, level in enumerate(levels):
                found = self._objective.held_out(engine, tensors, place=slot.place, noise_level=level)
                if slot.is_own:
                    sums_ML[:, column] += torch.tensor(
                        [found[modality] for modality in modalities], dtype=torch.float64
                    )
            count += slot.is_own
        means_ML = _mean_over_ranks(sums_ML, count, engine)
        if means_ML is None:
            return {}
        return _measures(means_ML, modalities, levels, self.plan.phases[-1].loss_weights)

    def num_sampled_shapes(self) -> int:
        """Returns how many shapes own prompts have: of latents and embeddings, with a first frame or
        without."""
        if self._previews is None or not self._prompts.entries:
            return 0
        own = self._preview_items()[: len(self._prompts.entries)]
        # The empty prompt of guidance has a length of its own.
        return 2 * len(
            {
                (item.first_frame is None, *(tuple(tensor.shape) for tensor in item.tensors.values()))
                for item in own
            }
        )

    def export(self, engine: Engine, folder: Path) -> None:
        """Writes the trained model in diffusers' layout, or the adapters in PEFT's and ComfyUI's.

        Beside adapters stands the model that they belong to if this run has changed it.
        """
        last = self.plan.phases[-1].adapters
        has_new_base = self.config.model.lora_checkpoint is not None or any(
            phase.adapters != last for phase in self.plan.phases
        )
        export_transformer(engine, self.module, folder, lora=last, with_base=has_new_base)

    def replacements(self) -> tuple[str, ...]:
        """Returns snapped frame counts, clips that do not fit their bucket, and what stands in for a missing
        vocoder."""
        decoding = self._decoder.replacements() if self.config.has_previews() else ()
        return (*self.snapped, *decoding, *self.data.replacements(self.plan))

    def _make_previews(self, engine: Engine, go_on: Callable[[], None]) -> Examples | None:
        if self._previews is None:
            return None
        if dist.is_main():
            self._prompts.keep(Path(self.config.output_dir))
        return self._previews.make(engine, self._preview_items(), go_on=go_on)

    def _preview_items(self) -> list[PreviewItem]:
        """Returns the own prompts, and those of the first held-out clips."""
        bucket, settings = self.plan.phases[-1].buckets[0], self.config.evaluation
        held_out = self.data.held_out(bucket)
        first, prompts = self.data.readable_clip(bucket), self._prompts
        family, strides = self.module.family, self.strides
        own = [
            PreviewItem(
                tensors=prompt_item(entry, conditions, first, bucket, family=family, strides=strides),
                noise=("preview_prompt", place),
                seed=entry.seed,
                prompt=entry.prompt,
                first_frame=first_frame,
                sound=sound,
            )
            for place, (entry, conditions, first_frame, sound) in enumerate(
                zip(prompts.entries, prompts.conditions, prompts.first_frames, prompts.sounds, strict=True)
            )
        ]
        shown = held_out[: min(settings.num_pictures, settings.max_clips)]
        found = [self.data.try_held_out(index, bucket) for index in shown]
        items = [None if isinstance(item, UnreadClip) else item for item in found]
        # The same on all ranks, which sample together, also if a clip can be read on some of them.
        gathered = dist.gather_objects([item is not None for item in items])
        read = [all(flags) for flags in zip(*gathered, strict=True)]
        kept = [
            (item, self.data.validation_clips[index].name)
            for item, index, is_read in zip(items, shown, read, strict=True)
            if item is not None and is_read
        ]
        return own + held_out_items([item for item, _ in kept], [name for _, name in kept])

    def _require_fitting_latents(self) -> None:
        """Finds latents of other channels or another size than the model and the phases take, before anything
        is written.

        Raises:
            PlanError: If the first held-out clip does not fit.
        """
        bucket = self.plan.phases[-1].buckets[0]
        try:
            item = self.data.readable_clip(bucket)
            self.module.family.tokens({name: tensor[None] for name, tensor in item.items()})
        except DataError as error:
            raise PlanError(f"data: {error}") from error


class _ParameterShapes(nn.Module):
    """Configuration, names and shapes of a transformer, as they were before an engine took it."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.config: Any = transformer.config
        self._named = {
            name: nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
            for name, value in transformer.named_parameters()
        }
        self.are_whole = all(value.numel() for value in self._named.values())  # ZeRO-3 leaves empty ones

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


def set_adapters(transformer: nn.Module, family: Family, phase: PhasePlan, *, seed: int) -> None:
    """Makes `transformer` have the adapters that `phase` trains, or none, in place; its weights stay as they
    are."""
    if phase.adapters is None and not hasattr(transformer, "peft_config"):
        transformer.requires_grad_(True)
        return
    from aiprod_ds.models.lora import add_lora, remove_lora  # imports peft, which takes seconds

    remove_lora(transformer)
    if phase.adapters is not None:
        add_lora(transformer, phase.adapters, allowed=family.lora_targets, seed=seed)


def start_adapters(transformer: nn.Module, lora: LoraWeights | None) -> None:
    """Gives the adapters the values of `lora`, if there is one.

    Raises:
        CheckpointError: If it is of other layers or another rank.
    """
    if lora is not None:
        from aiprod_ds.models.lora import start_from  # imports peft, which takes seconds

        start_from(transformer, lora)


def _on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _mean_over_ranks(sums_ML: Tensor, count: int, engine: Engine) -> Tensor | None:
    own = torch.cat([sums_ML.flatten(), torch.tensor([count], dtype=torch.float64)]).to(engine.device)
    *sums, total = dist.reduce_mean(own).tolist()
    if total == 0:
        return None
    means_ML: Tensor = torch.tensor(sums, dtype=torch.float64).view_as(sums_ML) / total
    return means_ML


def _measures(
    means_ML: Tensor, modalities: tuple[str, ...], levels: tuple[float, ...], weights: Mapping[str, float]
) -> dict[str, float]:
    """Returns the weighted loss, of each modality the mean over levels, and each level's."""
    each = {modality: means_ML[row] for row, modality in enumerate(modalities)}
    measures = {
        "loss": sum(weights[f"{modality}_weight"] * float(means.mean()) for modality, means in each.items())
    }
    measures |= {f"{modality}_loss": float(means.mean()) for modality, means in each.items()}
    for modality, means in each.items():
        measures |= {
            f"{modality}_loss_at_{level:g}": float(value) for level, value in zip(levels, means, strict=True)
        }
    return measures
