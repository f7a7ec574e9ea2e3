"""The loss and the measure of mel models: worked numbers, weights, shapes; and the picture of their
spectrograms."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
import torch

from aiprod_ds.errors import DataError
from aiprod_ds.losses.mel_vae import MelVAELoss
from aiprod_ds.media.sounds import save_mels
from aiprod_ds.metrics.mel_quality import MelQuality


def test_worked_number_of_the_docstring() -> None:
    target = torch.full((2, 1, 5, 4), -3.0)
    mean, logvar = torch.full((2, 3, 2, 2), 2.0), torch.zeros(2, 3, 2, 2)
    terms = MelVAELoss(mel_weight=1.0, kl_weight=1e-4)(target + 1, target, mean, logvar)
    expected = {"loss/total": 1.0006, "loss/mel": 1.0, "loss/kl": 6.0, "latent/mean": 2.0, "latent/std": 0.0}
    found = {name: value.item() for name, value in terms.terms.items()}
    assert found == pytest.approx({**expected, "latent/collapsed_share": 0.0}, abs=1e-6)


def test_sixteen_bits_are_widened_and_the_gradient_reaches_the_reconstruction() -> None:
    reconstruction = (
        torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    )
    posterior = torch.zeros(1, 2, 3, 1)
    terms = MelVAELoss(mel_weight=2.0, kl_weight=0.0)(
        reconstruction, torch.zeros(1, 2, 3, 4), posterior, posterior
    )
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert reconstruction.grad is not None
    # 2 / 24 elements by the sign; bf16 keeps 8 bits of it.
    torch.testing.assert_close(
        reconstruction.grad.float(), reconstruction.detach().float().sign() / 12, rtol=2**-8, atol=0
    )


def test_shapes_must_agree() -> None:
    posterior = torch.zeros(1, 2, 3, 1)
    with pytest.raises(
        DataError, match=r"both spectrograms must have one shape, got \[1, 2, 3, 4\] and \[1, 2, 3, 5\]"
    ):
        MelVAELoss(mel_weight=1.0, kl_weight=0.0)(
            torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5), posterior, posterior
        )


def test_measures_of_ranks_add_up_clip_by_clip() -> None:
    # Not of one level alone: that would be silence, which is not judged.
    short, long = torch.rand(1, 1, 2, 4), torch.rand(2, 1, 8, 4)
    one, other, together = MelQuality(), MelQuality(), MelQuality()
    one.update(short, short + 3)
    other.update(long, long - 1)
    for part in (one, other):
        together.merge(part.state())
    assert together.compute() == {"log_mel_l1": pytest.approx((3 + 1 + 1) / 3)}
    with pytest.raises(DataError, match="needs at least one clip"):
        MelQuality().compute()


@pytest.mark.slow
def test_the_picture_shows_both(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mels = [torch.randn(2, 1, 20, 8, generator=generator) for _ in range(2)]
    mels[1][0, 0, 0, 0] = torch.nan
    save_mels(*mels, tmp_path / "mels.png", title="title")
    pixels = matplotlib.image.imread(tmp_path / "mels.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.1
    with pytest.raises(ValueError, match=r"both must be \[N, C, T, M\] of one shape"):
        save_mels(mels[0], mels[1][..., :4], tmp_path / "other.png", title="title")
