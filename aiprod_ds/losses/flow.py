"""Flow matching on latents: what the transformer is given, what it should answer, and how far off it was.

Owns noising, clean conditioning tokens, per-token timesteps and the velocity loss; levels are drawn in
`noise_level.py`. Called by the diffusion trainer, once per modality. Shapes: B batch, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.losses.precision import no_autocast, widened

NUM_BUCKETS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSample:
    """One noised micro-batch of one modality.

    Attributes:
        noisy: [B,L,C] fp32: the transformer's input; clean where conditioned.
        velocity: [B,L,C] fp32: eps - x0, the answer.
        timesteps: [B,L] fp32 in [0,1]: the noise level of each token, 0 where conditioned.
        has_loss: [B,L] bool: tokens to generate, neither conditioning nor padding.
        noise_levels: [B] fp32: the level of each sample.
    """

    noisy: Tensor
    velocity: Tensor
    timesteps: Tensor
    has_loss: Tensor
    noise_levels: Tensor


def noised(
    latent_BLC: Tensor,
    noise_levels_B: Tensor,
    noise_BLC: Tensor,
    *,
    is_clean_BL: Tensor | None = None,
    is_token_BL: Tensor | None = None,
) -> FlowSample:
    """Returns what the transformer is trained on.

        x_s = (1 - s) * x0 + s * eps,   v = eps - x0,   eps normal

    Worked number: x0 = 2, eps = -1, s = 0.25: x_s = 1.25, v = -3; following v back from x_s for s gives x0 =
    x_s - s * v = 2.

    Args:
        latent_BLC: [B,L,C] any float type, normalised latents.
        noise_levels_B: [B] in [0,1].
        noise_BLC: [B,L,C], from `draw_noise`.
        is_clean_BL: [B,L] bool, tokens that stay clean (a given first frame); None: none.
        is_token_BL: [B,L] bool, False in padding; None: all are tokens.

    Raises:
        DataError: If the shapes do not fit.

    Source: Lipman et al. 2023, rectified-flow form of Liu et al. 2022; per-token timesteps after LTX-Video
    (HaCohen et al. 2024).
    """
    _check_inputs(
        latent_BLC, noise_levels_B, noise_BLC, {"is_clean_BL": is_clean_BL, "is_token_BL": is_token_BL}
    )
    with torch.no_grad(), no_autocast(latent_BLC):
        x0_BLC = widened(latent_BLC)
        eps_BLC = noise_BLC.to(x0_BLC)
        levels_B = noise_levels_B.to(x0_BLC)
        timesteps_BL = levels_B.unsqueeze(1).expand(x0_BLC.shape[:2])
        has_loss_BL = (
            torch.ones_like(timesteps_BL, dtype=torch.bool)
            if is_token_BL is None
            else is_token_BL.to(x0_BLC.device)
        )
        if is_clean_BL is not None:
            is_clean_BL = is_clean_BL.to(x0_BLC.device)
            timesteps_BL = timesteps_BL.masked_fill(is_clean_BL, 0.0)
            has_loss_BL = has_loss_BL & ~is_clean_BL
        s_BL1 = timesteps_BL.unsqueeze(2)
        return FlowSample(
            noisy=(1 - s_BL1) * x0_BLC + s_BL1 * eps_BLC,
            velocity=eps_BLC - x0_BLC,
            timesteps=timesteps_BL.contiguous(),
            has_loss=has_loss_BL,
            noise_levels=levels_B,
        )


def draw_noise(shape_LC: Sequence[int], *, seeds: Sequence[int]) -> Tensor:
    """Returns normal noise for each sample, [B,L,C] fp32 on the CPU: the same for every device and batch.

    Args:
        shape_LC: Tokens and channels of one sample.
        seeds: One per sample, `stream_seed(seed, "noise", modality, *place)`.
    """
    draws = [torch.randn(*shape_LC, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws)


def first_frame_mask(
    probability: float, *, num_frames: int, tokens_per_frame: int, seeds: Sequence[int]
) -> Tensor:
    """Returns which tokens are a given, clean first frame, [B,L] bool on the CPU with L = num_frames *
    tokens_per_frame.

    Each sample is conditioned with `probability`, drawn from its seed
    (`stream_seed(seed, "first_frame", sample_index, update)`). A clip of one latent frame never is: nothing
    would be left to generate.
    """
    mask_BL = torch.zeros(len(seeds), num_frames * tokens_per_frame, dtype=torch.bool)
    if num_frames > 1:
        for index, seed in enumerate(seeds):
            draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
            mask_BL[index, :tokens_per_frame] = bool(draw < probability)
    return mask_BL


def flow_losses(prediction_BLC: Tensor, sample: FlowSample) -> Tensor:
    """Returns each sample's loss, [B] fp32: the mean over its generated tokens and channels of (v_hat - v)^2.

    The batch loss is their mean, so that samples weigh the same however many tokens they have. A sample
    without a generated token has loss 0. Padding may hold anything, NaN included.

    Args:
        prediction_BLC: [B,L,C] any float type: the transformer's answer.
        sample: What `noised` gave the transformer; says which tokens count.

    Raises:
        DataError: If the shapes differ.
    """
    if prediction_BLC.shape != sample.velocity.shape:
        raise DataError(
            f"flow loss: the prediction must have the latent's shape {list(sample.velocity.shape)}, got "
            f"{list(prediction_BLC.shape)}. Check the transformer's output channels and patch size."
        )
    with no_autocast(prediction_BLC):
        ignored_BL1 = ~sample.has_loss.unsqueeze(2)
        error_BLC = widened(prediction_BLC).masked_fill(ignored_BL1, 0.0) - sample.velocity.masked_fill(
            ignored_BL1, 0.0
        )
        tokens_B = sample.has_loss.sum(dim=1).clamp(min=1)
        return error_BLC.square().sum(dim=(1, 2)) / (tokens_B * prediction_BLC.shape[2])


def bucket_terms(name: str, losses_B: Tensor, noise_levels_B: Tensor) -> dict[str, Tensor]:
    """Returns the loss split by noise level into [0,1/4), [1/4,1/2), [1/2,3/4), [3/4,1], as numbers that
    ranks may average.

    A bucket is empty on many updates and its mean then undefined, so each bucket gives two parts that always
    exist: `loss/{name}_s{k}_part` (its losses over the batch size; the four add up to the loss) and
    `loss/{name}_s{k}_share` (its samples over the batch size). Averaged over ranks and micro-batches, part
    over share is the bucket's mean, which the recorder writes as `loss/{name}_s{k}`.
    """
    losses_B = losses_B.detach()
    buckets_B = (noise_levels_B.to(losses_B.device) * NUM_BUCKETS).long().clamp(0, NUM_BUCKETS - 1)
    terms: dict[str, Tensor] = {}
    for bucket in range(NUM_BUCKETS):
        is_in_B = buckets_B == bucket
        terms[f"loss/{name}_s{bucket}_part"] = losses_B.masked_fill(~is_in_B, 0.0).mean()
        terms[f"loss/{name}_s{bucket}_share"] = is_in_B.to(losses_B.dtype).mean()
    return terms


def _check_inputs(
    latent: Tensor, noise_levels: Tensor, noise: Tensor, masks: Mapping[str, Tensor | None]
) -> None:
    if latent.dim() != 3 or latent.numel() == 0:
        raise DataError(f"flow matching: latents must be [B,L,C] and not empty, got {list(latent.shape)}.")
    batch = latent.shape[0]
    if list(noise_levels.shape) != [batch] or noise.shape != latent.shape:
        raise DataError(
            f"flow matching: needs one noise level for each of {batch} samples and noise of shape "
            f"{list(latent.shape)}, got {list(noise_levels.shape)} and {list(noise.shape)}."
        )
    for name, mask in masks.items():
        if mask is not None and (mask.shape != latent.shape[:2] or mask.dtype != torch.bool):
            raise DataError(
                f"flow matching: {name} must be bool {list(latent.shape[:2])}, got {mask.dtype} "
                f"{list(mask.shape)}."
            )
