"""The loss of the video VAE: reconstruction, perceptual distance, KL, Haar bands and change between frames,
each under its own name.

Owns which terms there are and their weights; the formulas are in `kl.py`, `perceptual.py`, `haar.py` and
`temporal.py`. Called by the video VAE trainer. Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from aiprod_ds.config.losses import VideoVAELossConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses.haar import haar_l1
from aiprod_ds.losses.kl import gaussian_kl, latent_statistics
from aiprod_ds.losses.perceptual import PerceptualLoss
from aiprod_ds.losses.precision import no_autocast, widened
from aiprod_ds.losses.temporal import flicker_l1, frame_difference_l1
from aiprod_ds.losses.terms import LossSum, LossTerms, add_kl, graph_for, weights_of


class VideoVAELoss(nn.Module):
    """Sums the weighted terms of a video VAE in fp32.

        L = R(x, y) + lambda_p * P(x, y) + lambda_kl * KL + lambda_dwt * Haar(x, y)
            + lambda_d * frame_difference(x, y) + lambda_f * flicker(x, y)
        R = mean|x - y| or mean (x - y)^2

    Worked number: one clip of 3x2x4x4 (96 elements), y = x + 0.5 everywhere, a latent of 8 elements with mean
    2 and logvar 0, kl_weight 0.1, no perceptual network, haar_weight 1: L1 0.5; KL 8 * 2 / 96 = 0.166667;
    Haar 0.353553 * 0.5 = 0.176777; total 0.5 + 0.016667 + 0.176777 = 0.693443.

    Holds no parameters. Logged: `loss/total`, `loss/reconstruction_l1` (or `_mse`), `loss/perceptual`,
    `loss/kl`, `loss/kl_free_bits` (what is trained where there are free bits; `loss/kl` is without),
    `loss/haar`, `loss/frame_difference` and `loss/flicker` (where their weight is above 0), `latent/mean`,
    `latent/std`, `latent/collapsed_share`. Without a posterior there is no KL and no collapse.

    Args:
        config: Reductions and the weights of one phase. None: the defaults, which include the distance of
            VGG16's features and need its weights.
        perceptual: The network distance. `configured` makes it of `config.perceptual` if its weight is above
            0. None leaves the term out altogether; then its weight must be 0.

    Raises:
        ConfigError: If the perceptual weight is positive and there is no network.
    """

    def __init__(
        self,
        config: VideoVAELossConfig | None = None,
        perceptual: PerceptualLoss | Literal["configured"] | None = "configured",
    ) -> None:
        super().__init__()
        config = config or VideoVAELossConfig()
        if isinstance(perceptual, str):
            perceptual = PerceptualLoss(config.perceptual) if config.perceptual_weight > 0 else None
        if perceptual is None and config.perceptual_weight > 0:
            raise ConfigError(
                "loss.perceptual_weight: must be 0 without a perceptual network, got "
                f"{config.perceptual_weight}. "
                "Pass a PerceptualLoss, or set the weight to 0."
            )
        self.config = config
        self.perceptual = perceptual

    def forward(
        self,
        reconstruction_BCTHW: Tensor,
        target_BCTHW: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        *,
        frame_seeds: Sequence[int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> LossTerms:
        """Returns the terms of one micro-batch.

        Args:
            reconstruction_BCTHW: [B,C,T,H,W] in [-1,1], any float type: what the decoder gave.
            target_BCTHW: Same shape: the clip.
            mean: [B,L,...] posterior mean.
            logvar: Posterior log-variance, the mean's shape or broadcastable to it; None for a deterministic
                autoencoder.
            frame_seeds: One seed per clip, when the perceptual distance looks at some frames only.
            weights: By their names in the configuration, in place of its own.

        Raises:
            DataError: If the shapes do not fit.
        """
        _check_shapes(reconstruction_BCTHW, target_BCTHW)
        config, perceptual, total = self.config, self.perceptual, LossSum()
        weight = weights_of(config, weights)
        with no_autocast(reconstruction_BCTHW):
            y_BCTHW, x_BCTHW = widened(reconstruction_BCTHW), widened(target_BCTHW)
            reconstruction = _reconstruction(y_BCTHW, x_BCTHW, config)
            total.add(f"loss/reconstruction_{config.reconstruction}", 1.0, reconstruction)
            if perceptual is not None:
                with graph_for(weight["perceptual_weight"]):
                    distance = perceptual(y_BCTHW, x_BCTHW, frame_seeds=frame_seeds)
                total.add("loss/perceptual", weight["perceptual_weight"], distance)
            if logvar is not None:
                add_kl(
                    total,
                    weight["kl_weight"],
                    partial(self._kl, mean, logvar, x_BCTHW),
                    free_bits=config.kl_free_bits,
                )
            with graph_for(weight["haar_weight"]):
                haar = haar_l1(y_BCTHW, x_BCTHW)
            total.add("loss/haar", weight["haar_weight"], haar)
            self._add_temporal(total, weight, y_BCTHW, x_BCTHW)
        for name, value in latent_statistics(mean, logvar).items():
            total.measure(name, value)
        return total.finish()

    def _add_temporal(
        self, total: LossSum, weight: Mapping[str, float], y_BCTHW: Tensor, x_BCTHW: Tensor
    ) -> None:
        """Adds the terms of change between frames that the configuration weighs at all."""
        for name, distance in _TEMPORAL.items():
            key = f"{name}_weight"
            if getattr(self.config, key) > 0:
                with graph_for(weight[key]):
                    value = distance(y_BCTHW, x_BCTHW)
                total.add(f"loss/{name}", weight[key], value)

    def _kl(self, mean: Tensor, logvar: Tensor, target_BCTHW: Tensor, *, free_bits: float) -> Tensor:
        return gaussian_kl(
            mean,
            logvar,
            reduction=self.config.kl_reduction,
            input_elements=target_BCTHW[0].numel(),
            free_bits=free_bits,
        )


_TEMPORAL = {"frame_difference": frame_difference_l1, "flicker": flicker_l1}


def _reconstruction(y_BCTHW: Tensor, x_BCTHW: Tensor, config: VideoVAELossConfig) -> Tensor:
    difference = y_BCTHW - x_BCTHW
    return difference.abs().mean() if config.reconstruction == "l1" else difference.square().mean()


def _check_shapes(reconstruction: Tensor, target: Tensor) -> None:
    if target.dim() != 5 or reconstruction.shape != target.shape:
        raise DataError(
            "VideoVAELoss: reconstruction and target must be [B,C,T,H,W] of one shape, got "
            f"{list(reconstruction.shape)} and "
            f"{list(target.shape)}. Check the frame count and frame size against the model's strides."
        )
