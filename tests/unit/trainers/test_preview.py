"""Previews on one process: what they depend on, what they leave alone, and the files they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.sample import PreviewConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.testing.families import tiny_batch, tiny_transformer
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.preview import PreviewItem, Previews, held_out_items

pytestmark = pytest.mark.slow

STRIDES = ModelStrides(spatial=32, temporal=8)
VAE = ModelConfig(source="aiprod_ds.testing.tiny:TinyVideoVAE")
AUDIO_VAE = ModelConfig(
    source="AutoencoderKLLTX2Audio",
    config={
        "base_channels": 8,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "latent_channels": 2,
        "mel_bins": 16,
    },
)
CONFIG = PreviewConfig(num_forwards=3, decode_precision="fp32")
EMPTY = {"prompt_embeds": torch.zeros(6, 16), "prompt_attention_mask": torch.arange(6) < 1}


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    module = DiffusionModule(transformer := tiny_transformer(LTX2), find_family(transformer, STRIDES))
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 1}}, where="test")
    groups = decay_groups(module)
    built = LocalEngine(
        module, groups, optimizer=OptimizerConfig(), settings=settings, micro_batch_size=1, accumulation=1
    )
    built.eval()
    return built


def _tensors(num: int) -> list[dict[str, Tensor]]:
    batches = [tiny_batch(seed=seed) for seed in range(num)]
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def _items(num: int) -> list[PreviewItem]:
    return held_out_items(_tensors(num), [f"clip_{number}" for number in range(num)])


def _previews(
    engine: LocalEngine, config: PreviewConfig = CONFIG, *, empty: Any = EMPTY, seed: int = 0
) -> Previews:
    decoder = LatentDecoder(VAE, AUDIO_VAE, config, seed=0)
    return Previews(config, family=engine.module.family, decoder=decoder, empty_prompt=empty, seed=seed)


def _frames(examples: Any, folder: Path) -> list[np.ndarray[Any, Any]]:
    """Returns every clip's stills, from the contact sheet: a PNG keeps them exactly, which H.264 does not."""
    assert examples is not None
    folder.mkdir()
    examples.save(folder, "low", title="phase low: loss 1", moment="phase low")
    with Image.open(folder / "low.png") as image:
        sheet = np.asarray(image)
    tops = range(64, sheet.shape[0], 160 + 18 + 24)
    return [sheet[top : top + 160, 18:-18] for top in tops]


def test_every_item_becomes_a_film_with_sound_on_one_sheet(engine: LocalEngine, tmp_path: Path) -> None:
    examples = _previews(engine).make(engine, _items(2))
    assert examples is not None
    examples.save(tmp_path, "low", title="phase low: loss 1", moment="phase low")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low.png", "low_clip_1.mp4", "low_clip_2.mp4"]
    with av.open(str(tmp_path / "low_clip_1.mp4")) as film:
        assert film.streams.audio[0].rate == 16_000
        assert film.streams.video[0].average_rate == 24
        # 2 latent frames of 4x4 through strides 2 and 4, enlarged tenfold.
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in film.decode(video=0)]
    assert shapes == [(160, 160, 3)] * len(shapes)
    assert len(shapes) == 3


def test_a_clip_depends_on_its_prompt_its_place_and_the_seed_alone(
    engine: LocalEngine, tmp_path: Path
) -> None:
    items, tensors, names = _items(2), _tensors(2), ["a", "b"]
    other_latents = held_out_items([{**item, "latents": item["latents"] + 1.0} for item in tensors], names)
    same_prompt = held_out_items([tensors[0], tensors[0]], names)
    both = _frames(_previews(engine).make(engine, items), tmp_path / "a")
    assert np.array_equal(_frames(_previews(engine).make(engine, items[:1]), tmp_path / "b")[0], both[0])
    assert np.array_equal(
        np.stack(_frames(_previews(engine).make(engine, other_latents), tmp_path / "c")), np.stack(both)
    )
    first, second = _frames(_previews(engine).make(engine, same_prompt), tmp_path / "d")
    assert not np.array_equal(first, second), "other noise at another place"
    assert not np.array_equal(second, both[1]), "another prompt"
    assert not np.array_equal(
        _frames(_previews(engine, seed=1).make(engine, items[:1]), tmp_path / "e")[0], both[0]
    )


def test_the_weights_decide(engine: LocalEngine, tmp_path: Path) -> None:
    before = _frames(_previews(engine).make(engine, _items(1)), tmp_path / "a")[0]
    weight = engine.module.transformer.proj_out.weight
    with torch.no_grad():
        weight.mul_(3.0)
        after = _frames(_previews(engine).make(engine, _items(1)), tmp_path / "b")[0]
        weight.div_(3.0)
    assert not np.array_equal(before, after)


def test_guidance_needs_the_empty_prompt_and_changes_the_clip(engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"preview\.guidance_scale: must be 1 without embeddings of the empty prompt, got 4\.",
    ):
        _previews(engine, empty=None)
    plain = CONFIG.model_copy(update={"guidance_scale": 1.0})
    without = _frames(_previews(engine, plain, empty=None).make(engine, _items(1)), tmp_path / "a")[0]
    assert np.array_equal(
        _frames(_previews(engine, plain).make(engine, _items(1)), tmp_path / "b")[0], without
    )
    assert not np.array_equal(_frames(_previews(engine).make(engine, _items(1)), tmp_path / "c")[0], without)


def test_nothing_is_drawn_from_the_global_stream_and_nothing_needs_gradients(engine: LocalEngine) -> None:
    before = torch.get_rng_state()
    _previews(engine).make(engine, _items(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_without_items_nothing_is_built(engine: LocalEngine) -> None:
    config = ModelConfig(source="no_such_package:VAE")
    previews = Previews(
        CONFIG,
        family=engine.module.family,
        decoder=LatentDecoder(config, None, CONFIG, seed=0),
        empty_prompt=EMPTY,
        seed=0,
    )
    assert previews.make(engine, []) is None
    with pytest.raises(ConfigError, match="must be importable"):
        previews.make(engine, _items(1))
