"""What the diffusion trainer asks of a transformer family: how its inputs are made, and which of its layers
are which.

Owns the protocol and the one sign and scale that all families share towards the trainer. A family is one file
beside this one and one entry in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from typing_extensions import Self

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.families.facts import PublishedNames, SoundFacts
from aiprod_ds.models.families.tokens import TokenGrid, Tokens

LATENTS = {"video": "latents", "audio": "audio_latents"}
"""The tensor of a training sample that holds each modality."""


class Family(Protocol):
    """One kind of diffusion transformer, with what its configuration says; frozen and without weights.

    Towards the trainer every family predicts the velocity eps - x0 of x_s = (1 - s) * x0 + s * eps and takes
    the noise level s in [0,1] as its timestep, whatever its class expects.

    Attributes:
        name: As configurations and messages call it.
        transformer_class: The class in diffusers.
        pipeline_class: The pipeline in diffusers whose conventions it has, and which loads its adapters.
        modalities: Keys of what `forward` takes and returns: "video", or "video" and "audio"; the latter
            where there is `sound`.
        has_token_timesteps: Whether tokens of one sample may have different noise levels, as first-frame
            conditioning needs.
        text_tokens: Of a prompt, as diffusers' pipeline pads it.
        lora_targets: Patterns (see `models.lora`) of the modules that may get an adapter.
        published: How the one file of its first publication names the tensors. None: neither that file nor a
            LoRA for ComfyUI is written, because nobody would read its names.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    has_token_timesteps: ClassVar[bool]
    text_tokens: ClassVar[int]
    lora_targets: ClassVar[tuple[str, ...]]
    published: ClassVar[PublishedNames | None]

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns per token of video."""

    @property
    def token_width(self) -> int:
        """Values per token of video."""

    @property
    def text_width(self) -> int:
        """Of the prompt's embeddings."""

    @property
    def sound(self) -> SoundFacts | None:
        """What it needs of sound; None if it makes video alone."""

    @classmethod
    def of(cls, transformer: nn.Module, strides: ModelStrides) -> Self:
        """Returns the description of `transformer`, which may be on the meta device.

        Raises:
            ConfigError: If it is a variant that this family cannot feed.
        """

    @staticmethod
    def tiny_config() -> dict[str, Any]:
        """Returns constructor arguments for tests on a CPU."""

    def tokens(self, tensors: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Cuts a batch's latents into tokens, by modality.

        Args:
            tensors: `latents` [B,C,F,H,W], and `audio_latents` [B,C,T] or [B,C,T,M] for a joint family.

        Raises:
            DataError: If one is missing or of another VAE.
        """

    def forward(
        self,
        transformer: nn.Module,
        noisy: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, TokenGrid],
    ) -> dict[str, Tensor]:
        """Returns the predicted velocity of each modality, [B,L,D] in the dtype of `noisy`.

        Args:
            transformer: The network, in the dtype of `noisy`.
            noisy: [B,L,D] of each modality.
            timesteps: [B,L] fp32 in [0,1], or [B,1] when all tokens of a sample have one level, which is
                cheaper: the modulation is then computed once for each sample.
            tensors: `prompt_embeds` [B,S,D]; `prompt_attention_mask` [B,S] bool, absent when all are tokens;
                `fps` [B]; `audio_prompt_embeds` [B,S,D'] where the family takes it. The mask must leave each
                prompt at least one token.
            grids: Where the tokens of each modality lie.

        Raises:
            DataError: If a tensor is missing or has the wrong width.
        """

    def repeated_blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Returns the blocks to recompute in the backward pass or to compile, each on its own."""

    def flops_per_update(
        self, transformer: nn.Module, *, batch_size: int, num_tokens: Mapping[str, int]
    ) -> float:
        """Returns the floating-point operations of one update, by the convention of `flops.py`.

        Args:
            transformer: Before an engine partitions it; what is trained is what has `requires_grad`.
            batch_size: Samples of the update, over all ranks.
            num_tokens: Of one sample, by modality.
        """

    def original_name(self, module_name: str) -> str:
        """Returns what the model's first publication calls a module that may get an adapter; ComfyUI reads
        these names."""


def require_token_timesteps(family: Family) -> None:
    """Checks that first-frame conditioning is possible.

    Raises:
        ConfigError: If the family has one noise level per sample.
    """
    if not family.has_token_timesteps:
        raise ConfigError(
            f"loss.first_frame_probability: must be 0 for the family {family.name!r}, whose transformer "
            "takes one noise level per"
            " sample. Set it to 0 or train another family."
        )
