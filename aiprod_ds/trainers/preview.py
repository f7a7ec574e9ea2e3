"""Clips sampled during training: what the model makes of noise and of prompts, spread over ranks.

Owns who samples and decodes what, and how it comes to the main rank; the mathematics is in `models.sampling`.
Called by the diffusion trainer's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_ds import progress
from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.config.sample import PreviewConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import ConfigError
from aiprod_ds.media.clips import Clip, save_contact_sheet
from aiprod_ds.metrics.evaluations import Medium
from aiprod_ds.models.families.protocol import LATENTS, Family
from aiprod_ds.models.sampling import draw_noise, noise_levels, sample_latents
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.unit import Examples
from aiprod_ds.trainers.evaluation import gather_shown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreviewItem:
    """One clip to sample.

    Attributes:
        tensors: As a dataset of latents gives them; the latents only say the shape.
        noise: What, beside the seed, decides its noise.
        seed: In place of the run's.
        prompt: In words; empty where only its embeddings are known.
        source: Name of the held-out clip that the prompt is of.
        first_frame: Normalised video latents [C,1,H',W'] that the clip begins with.
        sound: Normalised audio latents that the clip has, in the shape of the item's.
    """

    tensors: Mapping[str, Tensor]
    noise: tuple[str | int, ...]
    seed: int | None = None
    prompt: str = ""
    source: str = ""
    first_frame: Tensor | None = None
    sound: Tensor | None = None


def held_out_items(items: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> list[PreviewItem]:
    """Returns the items of held-out clips, whose noise depends on their place."""
    return [
        PreviewItem(tensors=tensors, noise=("preview", place), source=name)
        for place, (tensors, name) in enumerate(zip(items, names, strict=True))
    ]


class Previews:
    """Makes previews from an engine that holds a `DiffusionModule`.

    The noise of a clip depends on the seed and its place alone, so that previews compare over a run and do
    not depend on the number of ranks.

    Args:
        config: How clips are sampled.
        family: Of the transformer.
        decoder: Of its latents.
        empty_prompt: Tensors of the empty prompt, as a held-out item has them; None where there are none.
        seed: The run's seed.

    Raises:
        ConfigError: If there is guidance and no empty prompt.
    """

    def __init__(
        self,
        config: PreviewConfig,
        *,
        family: Family,
        decoder: LatentDecoder,
        empty_prompt: Mapping[str, Tensor] | None,
        seed: int,
    ) -> None:
        if config.guidance_scale > 1 and empty_prompt is None:
            raise ConfigError(
                "preview.guidance_scale: must be 1 without embeddings of the empty prompt, got "
                f"{config.guidance_scale:g}. "
                "Encode the captions with `aiprod-ds encode`, or set it to 1."
            )
        self._config = config
        self._family = family
        self._decoder = decoder
        self._empty_prompt = empty_prompt if config.guidance_scale > 1 else None
        self._seed = seed

    @torch.no_grad()
    def make(
        self,
        engine: Engine,
        items: Sequence[PreviewItem],
        *,
        go_on: Callable[[], None] = lambda: None,
    ) -> Examples | None:
        """Returns one clip for each item on the main rank, None on the others and where there is no item.
        Collective.

        Every rank samples as many clips, because ZeRO-3 gathers in each forward, and decodes its own while it
        meets the others, so that no collective times out however long decoding takes. Nothing is drawn from
        the training's random streams.

        Args:
            engine: In evaluation mode.
            items: The same on all ranks.
            go_on: Called between two forwards and two clips; see `EvaluationRequest`.

        Raises:
            ConfigError: If a VAE cannot be built.
            DataError: If an item does not fit the transformer or its VAE.
            EngineError: If a device has too little memory for decoding.
        """
        if not items:
            return None
        sampled: dict[int, dict[str, Tensor]] = {}
        turns = range(-(-len(items) // engine.world_size))
        with progress.counting("sampling preview", len(turns)) as counted:

            def told() -> None:
                go_on()
                counted.show()

            for turn in turns:
                place = turn * engine.world_size + engine.rank
                own = min(place, len(items) - 1)
                latents = self._sample(engine, items[own], told)
                if place == own:
                    sampled[place] = latents
                counted.advance()
        clips: dict[int, Clip] = {}
        for turn in progress.steps(turns, "decoding preview", len(turns)):
            go_on()
            place = turn * engine.world_size + engine.rank
            mine = {place: sampled[place]} if place in sampled else {}
            clips |= dist.together(partial(self._decoded, engine, items, mine))
        shown = gather_shown(clips)
        return _Shown(clips=tuple(shown), items=tuple(items)) if engine.rank == 0 else None

    def _sample(self, engine: Engine, asked: PreviewItem, go_on: Callable[[], None]) -> dict[str, Tensor]:
        item, seed = asked.tensors, self._seed if asked.seed is None else asked.seed
        names = {modality: LATENTS[modality] for modality in self._family.modalities}
        shapes = {modality: tuple(item[name].shape) for modality, name in names.items()}
        seeds = {modality: stream_seed(seed, *asked.noise, modality) for modality in names}

        def forward(*arguments: Any) -> dict[str, Tensor]:
            go_on()
            predicted: dict[str, Tensor] = engine(*arguments)
            return predicted

        latents = sample_latents(
            forward,
            self._family,
            noise=_on_device(draw_noise(shapes, seeds), engine.device),
            fps=item["fps"][None].to(engine.device),
            prompt=_batch_of_one(_prompt(item), engine.device),
            empty_prompt=None
            if self._empty_prompt is None
            else _batch_of_one(self._empty_prompt, engine.device),
            levels=noise_levels(self._config.num_forwards, shift=self._config.time_shift),
            guidance_scale=self._config.guidance_scale,
            first_frame=None if asked.first_frame is None else asked.first_frame[None].to(engine.device),
            sound=None if asked.sound is None else asked.sound[None].to(engine.device),
        )
        return {modality: value[0].cpu() for modality, value in latents.items()}

    def _decoded(
        self,
        engine: Engine,
        items: Sequence[PreviewItem],
        sampled: Mapping[int, Mapping[str, Tensor]],
    ) -> dict[int, Clip]:
        return {
            place: self._decoder.clip(
                latents, frame_rate_hz=float(items[place].tensors["fps"]), device=engine.device
            )
            for place, latents in sampled.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """The clips of all ranks, in order; an `Examples`."""

    clips: tuple[Clip, ...]
    items: tuple[PreviewItem, ...]

    def save(self, folder: Path, name: str, *, title: str, moment: str) -> tuple[Medium, ...]:
        captions = [
            f"clip {number}{': ' if item.prompt else ''}{item.prompt}"
            for number, item in enumerate(self.items, start=1)
        ]
        save_contact_sheet(self.clips, captions, folder / f"{name}.png", title=title)
        media = [Medium(path=f"{folder.name}/{name}.png", kind="picture", role="sheet", caption=title)]
        for number, (clip, item) in enumerate(zip(self.clips, self.items, strict=True), start=1):
            path = folder / f"{name}_clip_{number}.mp4"
            path.write_bytes(clip.mp4)
            media.append(
                Medium(
                    path=f"{folder.name}/{path.name}",
                    kind="film",
                    role="preview",
                    caption=f"clip {number}, {moment}",
                    clip=number,
                    source=item.source,
                    prompt=item.prompt,
                )
            )
        return tuple(media)


def _prompt(item: Mapping[str, Tensor]) -> dict[str, Tensor]:
    others = {*LATENTS.values(), "fps"}
    return {name: tensor for name, tensor in item.items() if name not in others}


def _batch_of_one(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor[None].to(device) for name, tensor in tensors.items()}


def _on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
