"""What a discriminator answers, and several of them as one network.

Shape suffixes: B batch, C channels, N samples, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aiprod_ds.config.losses import AudioAdversarialConfig, VideoAdversarialConfig
from aiprod_ds.models.discriminators.patch import FrameDiscriminator, VideoPatchDiscriminator
from aiprod_ds.models.discriminators.period import PeriodDiscriminator
from aiprod_ds.models.discriminators.spectrum import SpectrumDiscriminator


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What one discriminator says of a batch.

    Attributes:
        logits: [B, ...] fp32 (fp64 of an fp64 network), one for each patch: high for data, low for
            reconstructions.
        features: What each layer gave, in order; the batch first.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


class Discriminators(nn.Module):
    """Several discriminators of one kind of clip, each of which judges every clip.

    Args:
        members: By name.
    """

    def __init__(self, members: dict[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    def forward(self, clips: Tensor) -> list[Judgement]:
        """Returns one judgement of each member, in order.

        Args:
            clips: video_BCTHW or wave_BCN in [-1, 1], fp32; each member casts what it computes with.
        """
        found = []
        for member in self.members.values():
            logits, features = member(clips)
            found.append(
                Judgement(
                    logits=logits if logits.dtype == torch.float64 else logits.float(),
                    features=tuple(features),
                )
            )
        return found


def judged_by_frozen(network: nn.Module, clips: Tensor) -> list[Judgement]:
    """Returns what `network` says of clips, with gradients to the clips alone.

    Its parameters get none, nor do hooks of an engine on them see anything: they are replaced, for this call,
    by tensors that share their memory and need no gradient.
    """
    tensors = {name: value.detach() for name, value in network.named_parameters()}
    answer: list[Judgement] = functional_call(network, tensors, (clips,))
    return answer


def video_discriminators(config: VideoAdversarialConfig) -> Discriminators:
    """Returns the discriminators of video that `config` names, with new weights from torch's own stream."""
    members: dict[str, nn.Module] = {}
    if config.patch_3d is not None:
        members["patch_3d"] = VideoPatchDiscriminator(config.patch_3d)
    if config.frame_2d is not None:
        members["frame_2d"] = FrameDiscriminator(config.frame_2d)
    return Discriminators(members)


def audio_discriminators(config: AudioAdversarialConfig, *, channels: int) -> Discriminators:
    """Returns the discriminators of sound that `config` names, one for each window and period.

    Args:
        config: Which there are.
        channels: Of the waveforms.
    """
    members: dict[str, nn.Module] = {}
    if config.stft is not None:
        for size in config.stft.fft_sizes:
            members[f"stft_{size}"] = SpectrumDiscriminator(
                channels, fft_size=size, width=config.stft.channels
            )
    if config.period is not None:
        for period in config.period.periods:
            members[f"period_{period}"] = PeriodDiscriminator(
                channels, period=period, width=config.period.channels
            )
    return Discriminators(members)
