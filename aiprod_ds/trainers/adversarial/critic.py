"""The module that the discriminator's engine trains: its networks, its loss, and what it must remember.

Everything happens in one forward, so that an engine sees no more than the loss that comes out: R1 takes its
inner gradient inside. Called by `adversary.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aiprod_ds.config.losses import AdversarialConfig
from aiprod_ds.losses.adversarial import accuracies, discriminator_loss, lecam, mean_logit, r1_penalty
from aiprod_ds.models.discriminators.judgement import Discriminators

_NOT_YET = -1


class Critic(nn.Module):
    """The discriminators of one run.

    Its buffers are part of every checkpoint: the update at which training it began, and LeCAM's running
    means with how many updates are in them.

    Args:
        network: Judges clips.
        config: Objective and regularisers.
    """

    started_at: Tensor
    mean_logits: Tensor
    num_means: Tensor

    def __init__(self, network: Discriminators, config: AdversarialConfig) -> None:
        super().__init__()
        self.network = network
        self._config = config
        self.register_buffer("started_at", torch.tensor([_NOT_YET]))
        self.register_buffer("mean_logits", torch.zeros(2))  # of data and of reconstructions
        self.register_buffer("num_means", torch.zeros(1, dtype=torch.long))

    def forward(self, real: Tensor, fake: Tensor, *, with_r1: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of one micro-batch and the terms of it to log, and `logits` [2], the means for
        `remember`.

        Args:
            real: Clips, fp32.
            fake: Their reconstructions, fp32, without a graph.
            with_r1: Whether R1 is added, as often as `r1_every_updates` says.
        """
        config, num_real = self._config, len(real)
        if with_r1:
            real = real.detach().requires_grad_()
        judgements = self.network(torch.cat([real, fake]))
        of_real = [judgement.logits[:num_real] for judgement in judgements]
        of_fake = [judgement.logits[num_real:] for judgement in judgements]
        total = discriminator_loss(of_real, of_fake, config.objective)
        terms = {"loss/discriminator": total.detach()}
        if config.lecam_weight > 0:
            mean_real, mean_fake = self.mean_logits.unbind()
            term = lecam(of_real, of_fake, mean_real=mean_real, mean_fake=mean_fake)
            total = total + config.lecam_weight * term
            terms["loss/lecam"] = term.detach()
        if with_r1:
            term = r1_penalty(of_real, real)
            total = total + config.r1_weight * config.r1_every_updates * term
            terms["loss/r1"] = term.detach()
        right_real, right_fake = accuracies(of_real, of_fake, config.objective)
        terms["discriminator/real_accuracy"], terms["discriminator/fake_accuracy"] = right_real, right_fake
        terms["logits"] = torch.stack([mean_logit(of_real), mean_logit(of_fake)])
        return total, terms

    @torch.no_grad()
    def remember(self, logits: Tensor) -> None:
        """Moves LeCAM's means towards those of an update; the first update's are taken as they are, and none
        that are not finite.

            a = decay * a + (1 - decay) * mean D

        Args:
            logits: [2] of data and reconstructions, the mean over all ranks.
        """
        decay = self._config.lecam_decay
        moved = torch.where(
            self.num_means > 0, decay * self.mean_logits + (1.0 - decay) * logits, logits.to(self.mean_logits)
        )
        is_finite = logits.isfinite().all()
        self.mean_logits.copy_(torch.where(is_finite, moved, self.mean_logits))
        self.num_means += is_finite

    def begin(self, update: int) -> None:
        """Remembers that training it begins now."""
        self.started_at.fill_(update)

    def start(self) -> int | None:
        """Returns the update at which training it began; None if it has not."""
        found = int(self.started_at)
        return None if found == _NOT_YET else found
