"""One micro-batch for both sides, against the same written down in plain autograd; what is remembered.

The oracle differentiates the model's whole loss with respect to its parameters, with VQGAN's weight taken by
`torch.autograd.grad` at the last layer's weight itself. Tolerance: fp32 sums in another order.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.losses import PatchDiscriminatorConfig, VideoAdversarialConfig, VideoVAELossConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.losses import LossTerms, VideoVAELoss
from aiprod_ds.losses.adversarial import discriminator_loss, feature_matching, generator_loss
from aiprod_ds.models.discriminators.judgement import video_discriminators
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.adversarial.adversary import Adversary
from aiprod_ds.trainers.adversarial.critic import Critic
from aiprod_ds.trainers.adversarial.last_layer import LastLayer

SMALL = PatchDiscriminatorConfig(channels=4, layers=2)
WEIGHTS = {"adversarial_weight": 0.5, "feature_matching_weight": 2.0}
PHASE = phase_plan(updates=10, loss_weights=WEIGHTS)
BUCKET = BucketPlan(
    frames=5,
    requested_frames=5,
    height=16,
    width=16,
    frame_rate_hz=None,
    global_batch_size=2,
    micro_batch_size=2,
    accumulation=1,
)


def _engine(module: nn.Module, precision: str = "fp32") -> LocalEngine:
    values: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if precision != "fp32":
        values |= {precision: {"enabled": True}}
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(gradient_clip_norm=None),
        settings=parse_deepspeed_settings(values, where="test"),
        micro_batch_size=2,
        accumulation=1,
    )
    engine.set_learning_rate(1e-3)
    return engine


class Both:
    """Two engines, as a unit has them, and clips."""

    def __init__(self, precision: str = "fp32", **adversarial: Any) -> None:
        torch.manual_seed(0)
        config = VideoAdversarialConfig(patch_3d=SMALL, frame_2d=SMALL, **adversarial)
        self.module = VideoVAE(TinyVideoVAE())
        last = LastLayer(self.module, "vae.leave") if config.adaptive == "last_layer" else None
        self.critic = Critic(video_discriminators(config), config)
        self.before = copy.deepcopy(self.critic)
        self.engine = _engine(self.module, precision)
        own = _engine(self.critic, "bf16" if precision == "bf16" else "fp32")
        self.adversary = Adversary(self.critic, own, config, last_layer=last, start_phase=None)
        self.clips = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        self.of = VideoVAELoss(VideoVAELossConfig(perceptual_weight=0.0, kl_weight=1e-2), None)

    def begin(self, update: int = 0) -> None:
        self.adversary.begin_update(Clock(updates=update), phase=PHASE, bucket=BUCKET, learning_rate=1e-3)

    def loss(self) -> LossTerms:
        def loss_of(y: Tensor, mean: Tensor, logvar: Tensor) -> LossTerms:
            terms: LossTerms = self.of(y, self.clips, mean, logvar)
            return terms

        inputs = (self.clips.to(self.engine.compute_dtype), [5, 6])
        return self.adversary.loss(self.engine, inputs, self.clips, loss_of, PHASE)

    def by_hand(self, epsilon: float, *, at_output: bool) -> tuple[Tensor, Tensor]:
        """Returns loss and adaptive weight from one graph through both networks."""
        y, mean, logvar = self.module(self.clips, [5, 6])
        others = self.of(y, self.clips, mean, logvar).total
        with torch.no_grad():
            real = self.before.network(self.clips)
        fake = self.before.network(y)
        against = generator_loss([each.logits for each in fake], "hinge")
        matching = feature_matching([each.features for each in real], [each.features for each in fake])
        place = y if at_output else self.module.vae.leave.weight
        norms = [torch.autograd.grad(term, place, retain_graph=True)[0].norm() for term in (others, against)]
        factor = (norms[0] / (norms[1] + epsilon)).clamp(max=1e4)
        return others + 0.5 * factor * against + 2.0 * matching, factor


@pytest.mark.parametrize(("adaptive", "epsilon"), [("last_layer", 1e-4), ("output", 1e-6)])
def test_the_model_is_trained_by_the_gradient_of_the_whole_loss(adaptive: str, epsilon: float) -> None:
    both = Both(adaptive=adaptive)
    both.begin()
    total, factor = both.by_hand(epsilon, at_output=adaptive == "output")
    expected = torch.autograd.grad(total, list(both.module.parameters()))
    terms = both.loss()
    both.engine.backward(terms.total)
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert terms.terms["discriminator/adaptive_weight"].item() == pytest.approx(factor.item(), rel=1e-4)
    for value, gradient in zip(both.module.parameters(), expected, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, gradient, rtol=1e-4, atol=1e-6)


def test_without_an_adaptive_weight_the_weight_is_the_configured_one() -> None:
    both = Both(adaptive="off")
    both.begin()
    terms = both.loss()
    assert float(terms.terms["discriminator/adaptive_weight"]) == 1.0
    expected = 0.5 * terms.terms["loss/adversarial"] + 2.0 * terms.terms["loss/feature_matching"]
    others = terms.total.detach() - expected
    assert float(others) == pytest.approx(float(both.of(*_leaves(both)).total), rel=1e-6)


def _leaves(both: Both) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        y, mean, logvar = both.module(both.clips, [5, 6])
    return y, both.clips, mean, logvar


def test_the_gradient_ratio_is_the_weight_where_the_adaptive_weight_is_not_bounded() -> None:
    """lambda * ||g_adv|| = ||g_rec|| up to epsilon, so that the ratio is w_adv."""
    both = Both()
    both.begin()
    assert float(both.loss().terms["discriminator/gradient_ratio"]) == pytest.approx(0.5, rel=2e-2)


def test_the_discriminator_is_trained_on_the_same_clips_before_the_model_changes() -> None:
    both = Both()
    both.begin()
    with torch.no_grad():
        y = both.module(both.clips, [5, 6])[0]
    expected = copy.deepcopy(both.before)
    judged = expected.network(torch.cat([both.clips, y]))
    loss = discriminator_loss(
        [each.logits[:2] for each in judged], [each.logits[2:] for each in judged], "hinge"
    )
    optimizer = torch.optim.AdamW(
        expected.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
    )
    loss.backward()  # type: ignore[no-untyped-call]
    terms = both.loss()
    assert float(terms.terms["loss/discriminator"]) == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.nn.utils.get_total_norm(
        [value.grad for value in expected.parameters() if value.grad is not None]
    )
    assert float(both.adversary.metrics()["discriminator/gradient_norm"]) == pytest.approx(
        float(norm), rel=1e-5
    )
    optimizer.step()
    decayed = {name for group in decay_groups(expected) if group.is_decayed for name in group.names}
    for (name, mine), theirs in zip(both.critic.named_parameters(), expected.parameters(), strict=True):
        if name in decayed:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    assert all(value.grad is None for value in both.module.parameters()), "only the engine's backward does"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_the_gradient_is_that_of_fp32_within_their_digits(precision: str) -> None:
    """Measured: 1 % in bf16, 0.1 % in fp16, of the whole gradient's norm."""
    exact, rounded = Both(), Both(precision)
    for both in (exact, rounded):
        both.begin()
        both.engine.backward(both.loss().total)
    pairs = zip(_gradients(exact.engine), _gradients(rounded.engine), strict=True)
    distances, norms = zip(
        *[((one - other).square().sum(), one.square().sum()) for one, other in pairs], strict=True
    )
    assert float(sum(distances) / sum(norms)) ** 0.5 < {"bf16": 0.1, "fp16": 0.02}[precision]


def _gradients(engine: LocalEngine) -> list[Tensor]:
    scale = engine._scaler.scale
    return [master.grad / scale for master in engine.master_shards() if master.grad is not None]


def test_it_starts_when_it_is_due_and_the_model_feels_it_later_and_slowly() -> None:
    both = Both(start_update=3, warmup_updates=2, ramp_updates=4)
    found = []
    for update in range(10):
        both.begin(update)
        found.append((both.adversary.is_on, both.adversary.ramp))
    assert [is_on for is_on, _ in found] == [False] * 3 + [True] * 7
    assert [ramp for _, ramp in found] == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert both.critic.start() == 3


def test_alone_the_discriminator_changes_and_the_model_has_its_own_loss() -> None:
    both = Both(warmup_updates=5)
    both.begin()
    terms = both.loss()
    assert float(terms.total.detach()) == pytest.approx(float(both.of(*_leaves(both)).total), rel=1e-6)
    assert "loss/adversarial" not in terms.terms
    assert not torch.equal(
        next(iter(both.critic.network.parameters())), next(iter(both.before.network.parameters()))
    )


def test_a_start_with_a_phase_is_in_that_phase_or_later() -> None:
    both = Both()
    adversary = Adversary(
        both.critic, both.adversary._engine, both.adversary._config, last_layer=None, start_phase=1
    )
    for index, is_on in ((0, False), (2, True)):
        clock = Clock(updates=4 * index, phase=index)
        phase = phase_plan(updates=4, index=index)
        adversary.begin_update(clock, phase=phase, bucket=BUCKET, learning_rate=1.0)
        assert adversary.is_on is is_on


def test_r1_and_lecam_are_added_when_they_are_due() -> None:
    both = Both(r1_weight=1.0, r1_every_updates=2, lecam_weight=0.1, lecam_decay=0.9)
    seen = []
    for update in range(4):
        both.begin(update)
        terms = both.loss().terms
        seen.append("loss/r1" in terms)
        assert "loss/lecam" in terms
    assert seen == [True, False, True, False]
    assert int(both.critic.num_means) == 4


def test_the_running_means_are_the_formula_and_survive_what_is_not_finite() -> None:
    critic = Both(lecam_weight=0.1, lecam_decay=0.75).critic
    critic.remember(torch.tensor([1.0, -2.0]))
    assert critic.mean_logits.tolist() == [1.0, -2.0]
    critic.remember(torch.tensor([3.0, 0.0]))
    assert critic.mean_logits.tolist() == [1.5, -1.5]
    critic.remember(torch.tensor([float("nan"), 0.0]))
    assert critic.mean_logits.tolist() == [1.5, -1.5]
    assert int(critic.num_means) == 2


def test_an_update_that_overflows_changes_no_discriminator() -> None:
    both = Both()
    both.begin()
    with torch.no_grad():
        both.module.vae.leave.bias.fill_(float("inf"))
    terms = both.loss()
    assert not bool(terms.total.detach().isfinite())
    assert "discriminator/gradient_norm" not in both.adversary.metrics()
    for mine, before in zip(both.critic.parameters(), both.before.parameters(), strict=True):
        assert torch.equal(mine, before)


def test_what_is_captured_is_restored_bit_for_bit() -> None:
    both, fresh = Both(lecam_weight=0.1), Both(lecam_weight=0.1)
    for update in range(2):
        both.begin(update)
        both.loss()
    state = both.adversary.capture()
    chunks = {(chunk.kind, chunk.name): values.clone() for chunk, values in state.chunk_values()}

    class Reader:
        facts = state.facts

        def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
            return chunks[kind, name][start : start + length]

    fresh.adversary.restore(Reader())  # type: ignore[arg-type]
    assert fresh.adversary.is_on
    for side in (both, fresh):
        side.begin(2)
        side.loss()
    for one, other in zip(both.critic.state_dict().values(), fresh.critic.state_dict().values(), strict=True):
        assert torch.equal(one, other)
