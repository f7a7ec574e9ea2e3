"""A second family with sound: one class like a file of `models/families`, and one line to register it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.convert.single_file import names_for_single_file
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, PlanError
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.facts import PublishedNames, SoundFacts
from aiprod_ds.models.families.flops import linear_flops
from aiprod_ds.models.families.inputs import latent_tokens, prompt
from aiprod_ds.models.families.tokens import TokenGrid, Tokens
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.tensor_file import TensorSpec
from aiprod_ds.train.planning.estimate import estimate_run
from aiprod_ds.trainers.diffusion import DiffusionTrainer


class DuetTransformer(ModelMixin, ConfigMixin):
    """Video and sound that hear of each other by their means; predicts x0 - eps."""

    @register_to_config
    def __init__(self, width: int = 8, sound_per_second: float = 25.0) -> None:  # noqa: ARG002  the family reads it
        super().__init__()
        self.enter = nn.ModuleDict({"video": nn.Linear(4, width), "audio": nn.Linear(6, width)})
        self.text = nn.ModuleDict({"video": nn.Linear(16, width), "audio": nn.Linear(10, width)})
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.leave = nn.ModuleDict({"video": nn.Linear(width, 4), "audio": nn.Linear(width, 6)})

    def forward(self, noisy: Mapping[str, Tensor], text: Mapping[str, Tensor], levels: Any) -> Any:
        hidden = {
            name: self.enter[name](noisy[name]) + self.text[name](text[name]).mean(dim=1, keepdim=True)
            for name in noisy
        }
        both = sum(part.mean(dim=1, keepdim=True) for part in hidden.values())
        for block in self.blocks:
            hidden = {name: part + torch.tanh(block(part + both)) for name, part in hidden.items()}
        return {name: self.leave[name](part) + levels[name].unsqueeze(2) for name, part in hidden.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Duet:
    """A `Family`."""

    sound: SoundFacts

    name: ClassVar[str] = "duet"
    transformer_class: ClassVar[str] = "DuetTransformer"
    pipeline_class: ClassVar[str] = "DuetPipeline"
    modalities: ClassVar[tuple[str, ...]] = ("video", "audio")
    has_token_timesteps: ClassVar[bool] = True
    text_tokens: ClassVar[int] = 5
    lora_targets: ClassVar[tuple[str, ...]] = ("blocks.*",)
    published: ClassVar[PublishedNames | None] = None
    patch: ClassVar[tuple[int, int, int]] = (1, 1, 1)
    token_width: ClassVar[int] = 4
    text_width: ClassVar[int] = 16

    @classmethod
    def of(cls, transformer: nn.Module, strides: ModelStrides) -> Duet:  # noqa: ARG003  not measured
        config: Any = transformer.config
        return cls(
            sound=SoundFacts(
                token_width=6,
                text_width=10,
                latents_per_second=config.sound_per_second,
                rate_keys="sound_per_second",
            )
        )

    @staticmethod
    def tiny_config() -> dict[str, Any]:
        return {}

    def tokens(self, tensors: Mapping[str, Tensor]) -> dict[str, Tokens]:
        video = latent_tokens(tensors, "video", patch=self.patch, token_width=4, family=self.name)
        return {
            "video": video,
            "audio": latent_tokens(tensors, "audio", patch=(1,), token_width=6, family=self.name),
        }

    def forward(
        self,
        transformer: nn.Module,
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, TokenGrid],  # noqa: ARG002  it has no positions
    ) -> dict[str, Tensor]:
        dtype = noisy["video"].dtype
        text = {
            "video": prompt(tensors, "prompt_embeds", width=16, family=self.name).to(dtype),
            "audio": prompt(tensors, "audio_prompt_embeds", width=10, family=self.name).to(dtype),
        }
        levels = {name: level.to(dtype) for name, level in timesteps.items()}
        return {name: -value for name, value in transformer(noisy, text, levels).items()}

    def repeated_blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return list(transformer.blocks)

    def flops_per_update(
        self, transformer: nn.Module, *, batch_size: int, num_tokens: Mapping[str, int]
    ) -> float:
        tokens = sum(num_tokens.values())
        return linear_flops(transformer.parameters(), batch_size=batch_size, num_tokens=tokens)

    def original_name(self, module_name: str) -> str:
        return module_name


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, Duet))


def _trainer(folder: Path, *, rate: float = 25.0, **changes: Any) -> DiffusionTrainer:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "latents": (4, 2, 4, 4),
        "audio_latents": (6, 9),
        "prompt_embeds": (3, 16),
        "audio_prompt_embeds": (3, 10),
    }
    clips = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(4)
    ]
    phase = {"name": "only", "resolution": "128x128", "duration": {"frames": 9}, "global_batch_size": 2}
    config = DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given in code"},
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 32,
                "temporal_stride": 8,
            },
            "audio_vae": {"source": "AutoencoderKLLTX2Audio"},
            "data": {"train": "given in code", "num_workers": 0},
            "curriculum": {"phases": [{**phase, "updates": 1, "learning_rate": 3e-3}]},
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
            **changes,
        }
    )
    torch.manual_seed(0)
    model = DuetTransformer(sound_per_second=rate)
    return DiffusionTrainer(config, source="test.yaml", model=model, dataset=clips[:3], validation=clips[3:])


def test_its_clips_and_its_needs_are_planned(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    plan = trainer.plan()
    clip = trainer.blank_clip(plan.phases[0].buckets[0])
    assert {name: tuple(value.shape) for name, value in clip.items() if value.dim()} == {
        "latents": (4, 2, 4, 4),
        "audio_latents": (6, 9),  # 9 frames at 24 Hz are 0.375 s, and 25 latents a second
        "prompt_embeds": (5, 16),
        "audio_prompt_embeds": (5, 10),
    }
    (cost,) = estimate_run(trainer, plan, MACHINES["h200-141gb"]).configured
    assert cost.parameters == trainer.num_parameters()


def test_one_update_trains_and_measures_both_modalities(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    before = {name: value.detach().clone() for name, value in trainer.shapes.named_parameters()}
    assert trainer.train().updates == 1
    changed = {
        name: not torch.equal(value, before[name]) for name, value in trainer.shapes.named_parameters()
    }
    assert all(changed.values()), changed
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert metrics["audio_loss_after"] != metrics["audio_loss_before"]
    assert metrics["video_loss_after"] != metrics["video_loss_before"]
    assert DuetTransformer.from_pretrained(tmp_path / "export").config["width"] == 8


def test_its_own_keys_are_named_where_the_rates_differ(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"model.config: sound_per_second must be .*, 25, got 50\."):
        _trainer(tmp_path, rate=50.0).plan()
    with pytest.raises(PlanError, match=r"audio_vae: must be given for the family 'duet', which makes sound"):
        _trainer(tmp_path, audio_vae=None).plan()


def test_a_family_without_a_publication_is_not_written_as_one() -> None:
    specs = {name: TensorSpec.of(value) for name, value in DuetTransformer().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"must be one of LTXVideo.*, got DuetTransformer\. Write it"):
        names_for_single_file(specs, "DuetTransformer")
