"""One micro-batch of adversarial training, for both sides, and what a run asks of the second engine.

The model's forward pass is taken once. Its loss is computed on copies of what came out that are leaves of the
graph, so that the gradients of its parts can be measured there, weighed and added up; what the engine
differentiates is a sum that has just these gradients:

    g_y = d L_rec / d y + ramp * (w_adv * lambda * d L_adv / d y + w_fm * d L_fm / d y)
    L   = L_rec + ramp * (w_adv * lambda * L_adv + w_fm * L_fm),   d L / d y = g_y

Then the discriminator is trained on the same clips and reconstructions, before the model changes. So neither
engine ever sees the other one's graph.

Shapes: y and x are clips of any kind, the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aiprod_ds.clock import Clock
from aiprod_ds.config.losses import AdversarialConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.losses import LossTerms
from aiprod_ds.losses.adversarial import (
    LAST_LAYER_EPSILON,
    OUTPUT_EPSILON,
    adaptive_weight,
    feature_matching,
    generator_loss,
)
from aiprod_ds.losses.precision import widened
from aiprod_ds.models.discriminators.judgement import judged_by_frozen
from aiprod_ds.snapshot import EngineFacts, Kind, Snapshot, StateReader
from aiprod_ds.trainers.adversarial.critic import Critic
from aiprod_ds.trainers.adversarial.last_layer import LastLayer, Record
from aiprod_ds.trainers.adversarial.watch import CollapseWatch

Loss = Callable[[Tensor, Tensor, Tensor | None], LossTerms]
"""Of reconstruction, mean and log-variance; the last is None without a posterior."""


class Adversary:
    """The discriminator's side of a run; a `Companion`.

    Args:
        critic: What `engine` trains.
        engine: Of its own, in fp32 or bf16.
        config: When it starts, and how both sides are weighed.
        last_layer: Of the decoder, where `adaptive` asks for it.
        start_phase: Index of the phase it starts with; None if an update says so.
    """

    def __init__(
        self,
        critic: Critic,
        engine: Engine,
        config: AdversarialConfig,
        *,
        last_layer: LastLayer | None,
        start_phase: int | None,
    ) -> None:
        self._critic, self._engine, self._config = critic, engine, config
        self._last_layer, self._start_phase = last_layer, start_phase
        self._started_at: int | None = None
        self._update = 0
        self._position = 0
        self._learning_rate = 0.0
        self._logits: list[Tensor] = []
        self._metrics: dict[str, float | Tensor] = {}
        self._watch = CollapseWatch()

    @property
    def is_on(self) -> bool:
        """Whether the discriminator is trained in this update."""
        return self._started_at is not None

    @property
    def ramp(self) -> float:
        """Share of their weights that the terms of the model have in this update, in [0, 1]."""
        if self._started_at is None:
            return 0.0
        since = self._update - self._started_at - self._config.warmup_updates
        if since < 0:
            return 0.0
        return min(1.0, (since + 1) / self._config.ramp_updates) if self._config.ramp_updates else 1.0

    def begin_update(
        self, clock: Clock, *, phase: PhasePlan, bucket: BucketPlan, learning_rate: float
    ) -> None:
        """See `Companion.begin_update`."""
        self._update, self._position = clock.updates, clock.phase_position
        self._metrics, self._logits = {}, []
        if self._started_at is None and self._is_due(clock, phase):
            self._started_at = clock.updates
            self._critic.begin(clock.updates)
        if self._started_at is not None:
            own = self._config.optimizer.learning_rate
            self._learning_rate = learning_rate if own is None else own
            self._engine.set_batch(micro_batch_size=bucket.micro_batch_size, accumulation=bucket.accumulation)
            self._engine.set_learning_rate(self._learning_rate)

    def metrics(self) -> Mapping[str, float | Tensor]:
        """See `Companion.metrics`."""
        return self._metrics

    def loss(
        self,
        engine: Engine,
        inputs: Sequence[Tensor | list[int] | None],
        target: Tensor,
        loss: Loss,
        phase: PhasePlan,
    ) -> LossTerms:
        """Returns what the model minimises on one micro-batch, after training the discriminator on it.
        Collective.

        Args:
            engine: The model's.
            inputs: Of its module.
            target: The clips, fp32, in the reconstruction's shape.
            loss: Its terms without a discriminator.
            phase: Whose weights hold.
        """
        own_weights = phase.weights_at(self._position)
        weights = {name: self.ramp * own_weights[name] for name in _WEIGHTS}
        is_measured = weights["adversarial_weight"] > 0 and self._last_layer is not None
        recording = (
            self._last_layer.recording(engine.module) if is_measured and self._last_layer else nullcontext()
        )
        with recording as record:
            outputs = [output for output in engine(*inputs) if output is not None]
        leaves = [widened(output.detach()).requires_grad_() for output in outputs]
        y, mean, *logvar = leaves
        terms = loss(y, mean, logvar[0] if logvar else None)
        gradients = list(torch.autograd.grad(terms.total, leaves, allow_unused=True, materialize_grads=True))
        against = self._against(leaves[0], target, gradients[0], weights, record)
        gradients[0] = gradients[0] + against.gradient if against.terms else gradients[0]
        own = {**terms.terms, **against.terms, **self._train(target, leaves[0].detach(), against.terms)}
        total = terms.total.detach() + against.value
        return LossTerms(total=_with_gradients(total, outputs, gradients), terms={**own, "loss/total": total})

    def capture(self) -> Snapshot:
        """See `Companion.capture`."""
        return self._engine.capture()

    def restore(self, source: StateReader) -> None:
        """See `Companion.restore`."""
        self._engine.restore(_InOwnPrecision(source=source, precision=self._engine.capture().facts.precision))
        self._started_at = self._critic.start()

    def close(self) -> None:
        """See `Companion.close`."""
        self._engine.close()

    def _is_due(self, clock: Clock, phase: PhasePlan) -> bool:
        if self._start_phase is not None:
            return phase.index >= self._start_phase
        return clock.updates >= (self._config.start_update or 0)

    def _against(
        self, y: Tensor, x: Tensor, others: Tensor, weights: Mapping[str, float], record: Record | None
    ) -> _Against:
        """Returns what the discriminator has to say to the model; nothing where no weight asks for it."""
        adversarial, matching = weights["adversarial_weight"], weights["feature_matching_weight"]
        gradient, value = torch.zeros_like(y), torch.zeros((), dtype=y.dtype, device=y.device)
        terms: dict[str, Tensor] = {}
        if adversarial == matching == 0:
            return _Against(gradient=gradient, value=value, terms=terms)
        network = self._critic.network
        fake = judged_by_frozen(network, y)
        if adversarial > 0:
            term = generator_loss([judgement.logits for judgement in fake], self._config.objective)
            (own,) = torch.autograd.grad(term, y, retain_graph=matching > 0)
            factor, ratio = self._factor(others, own, record)
            gradient = gradient + adversarial * factor * own
            value = value + adversarial * factor * term.detach()
            terms |= {
                "loss/adversarial": term.detach(),
                "discriminator/adaptive_weight": factor,
                "discriminator/gradient_ratio": adversarial * factor * ratio,
            }
        if matching > 0:
            with torch.no_grad():
                real = judged_by_frozen(network, x)
            term = feature_matching([each.features for each in real], [each.features for each in fake])
            (own,) = torch.autograd.grad(term, y)
            gradient = gradient + matching * own
            value = value + matching * term.detach()
            terms["loss/feature_matching"] = term.detach()
        return _Against(gradient=gradient, value=value, terms=terms)

    def _factor(self, others: Tensor, own: Tensor, record: Record | None) -> tuple[Tensor, Tensor]:
        """Returns the adaptive weight, and ||own|| / ||others||; both of the micro-batches of all ranks
        together."""
        if self._last_layer is not None and record is not None:
            pair = [self._last_layer.weight_gradient(record, gradient) for gradient in (others, own)]
            norms = dist.reduce_mean(torch.stack(pair)).flatten(1).norm(dim=1)
            epsilon = LAST_LAYER_EPSILON
        else:
            # Of a mean over ranks each clip's gradient is a part, and no two ranks have the same clip.
            squares = torch.stack([gradient.square().sum() for gradient in (others, own)])
            norms = (dist.reduce_mean(squares) / dist.world_size()).sqrt()
            epsilon = OUTPUT_EPSILON
        ratio = norms[1] / norms[0]
        if self._config.adaptive == "off":
            return torch.ones_like(ratio), ratio
        return adaptive_weight(norms[0], norms[1], epsilon=epsilon, most=self._config.max_adaptive), ratio

    def _train(self, x: Tensor, y: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trains the discriminator and returns what to log of it. Collective."""
        config = self._config
        with_r1 = config.r1_weight > 0 and self._update % config.r1_every_updates == 0
        total: Tensor
        terms: dict[str, Tensor]
        total, terms = self._engine(x, y, with_r1=with_r1)
        self._logits.append(terms.pop("logits"))
        self._engine.backward(total)
        result = self._engine.step()
        if result is not None:
            if config.lecam_weight > 0:
                self._critic.remember(dist.reduce_mean(torch.stack(self._logits).mean(dim=0)))
            self._metrics["discriminator/learning_rate"] = self._learning_rate
            if result.applied:
                self._metrics["discriminator/gradient_norm"] = result.gradient_norm
            self._watch.observe({**terms, **seen}, is_applied=result.applied, update=self._update)
        return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class _Against:
    """The discriminator's part of the model's loss.

    Attributes:
        gradient: At the reconstruction, weighed.
        value: Weighed, 0-dim.
        terms: To log; empty where there is no part.
    """

    gradient: Tensor
    value: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _InOwnPrecision:
    """A `StateReader` whose facts have the precision of the engine that reads: a run in fp16 has its
    discriminator in fp32."""

    source: StateReader
    precision: str

    @property
    def facts(self) -> EngineFacts:
        """See `StateReader.facts`."""
        return replace(self.source.facts, precision=self.precision)

    def read(self, kind: Kind, name: str, start: int, length: int) -> Tensor:
        """See `StateReader.read`."""
        return self.source.read(kind, name, start, length)


_WEIGHTS = ("adversarial_weight", "feature_matching_weight")


def _with_gradients(value: Tensor, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns `value` with these gradients at `outputs`."""
    products = [
        (widened(output) * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)
    ]
    carrier = torch.stack(products).sum()
    return value + (carrier - carrier.detach())
