"""Two waveforms made comparable: same shape, same length, silence where there is only padding.

Owns shapes, cropping and the true lengths, and averages that count true samples alone. Called by
`spectral.py`, `mel.py` and `audio.py`. Shapes: B batch, C channels, N samples, F frequency bins, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.losses.precision import widened


@dataclass(frozen=True, slots=True, kw_only=True)
class WavePair:
    """A reconstruction beside its target, zero in both where the clip has ended.

    Attributes:
        reconstruction: [B,C,N] fp32 (or fp64), with gradient.
        target: Same shape, without gradient.
        num_samples: True length of each clip, [B] int64 on the same device.
    """

    reconstruction: Tensor
    target: Tensor
    num_samples: Tensor


def aligned_pair(
    reconstruction: Tensor, target: Tensor, num_samples: Sequence[int] | None = None
) -> WavePair:
    """Returns the pair in full precision, the reconstruction cropped to the target and padding zeroed.

    Args:
        reconstruction: [B,C,N'] or [B,N'] (mono), any float type, N' at least N: codecs pad to whole latent
            frames.
        target: [B,C,N] or [B,N].
        num_samples: True length of each clip, 1 to N; None: all N. Host numbers, so that nothing waits for
            the device.

    Raises:
        DataError: If shapes or lengths do not fit.
    """
    y_BCN, x_BCN = _with_channels(reconstruction, "reconstruction"), _with_channels(target, "target")
    batch, _, length = x_BCN.shape
    if y_BCN.shape[:2] != x_BCN.shape[:2] or y_BCN.shape[2] < length:
        raise DataError(
            "audio loss: reconstruction must have the target's batch and channels and at least its length, "
            "got "
            f"{list(y_BCN.shape)} for {list(x_BCN.shape)}. Check the model's channels and strides."
        )
    lengths = _checked_lengths(num_samples, batch, length)
    num_samples_B = torch.tensor(lengths, device=x_BCN.device)
    y_BCN, x_BCN = widened(y_BCN[..., :length]), widened(x_BCN).detach()
    if min(lengths) < length:
        is_padding = torch.arange(length, device=x_BCN.device) >= num_samples_B.view(-1, 1, 1)
        y_BCN, x_BCN = y_BCN.masked_fill(is_padding, 0.0), x_BCN.masked_fill(is_padding, 0.0)
    return WavePair(reconstruction=y_BCN, target=x_BCN, num_samples=num_samples_B)


def sample_mean(values_BCN: Tensor, pair: WavePair) -> Tensor:
    """Returns the mean of each clip's true samples, averaged over clips, 0-dim; `values_BCN` must be 0 in the
    padding."""
    return (values_BCN.sum(dim=(1, 2)) / (values_BCN.shape[1] * pair.num_samples)).mean()


def frame_mean(values_BCFT: Tensor, pair: WavePair, hop_size: int) -> Tensor:
    """Returns the mean of each clip's true frames, averaged over clips, 0-dim.

    A clip of n samples has 1 + n // hop_size centred frames, as if it stood alone.
    """
    num_frames_B = 1 + pair.num_samples // hop_size
    is_frame_BT = torch.arange(values_BCFT.shape[3], device=values_BCFT.device) < num_frames_B.unsqueeze(1)
    sums_B = values_BCFT.sum(dim=(1, 2)).masked_fill(~is_frame_BT, 0.0).sum(dim=1)
    return (sums_B / (values_BCFT.shape[1] * values_BCFT.shape[2] * num_frames_B)).mean()


def _with_channels(wave: Tensor, what: str) -> Tensor:
    if wave.dim() not in (2, 3) or wave.numel() == 0:
        raise DataError(f"audio loss: {what} must be [B,N] or [B,C,N] and not empty, got {list(wave.shape)}.")
    return wave.unsqueeze(1) if wave.dim() == 2 else wave


def _checked_lengths(num_samples: Sequence[int] | None, batch: int, length: int) -> list[int]:
    if num_samples is None:
        return [length] * batch
    lengths = [int(number) for number in num_samples]
    if len(lengths) != batch or not all(1 <= number <= length for number in lengths):
        raise DataError(
            f"audio loss: num_samples must be {batch} numbers from 1 to {length}, got {lengths}. Check the "
            "loader."
        )
    return lengths
