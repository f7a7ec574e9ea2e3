"""How much memory of one GPU an update takes, by ZeRO stage, precision, offload and world size: sums in
bytes, no measurements.

With T trained and F frozen parameters, W ranks, b bytes of the engine's type, g bytes in which gradients are
summed, and R elements of a reduction bucket, DeepSpeed 0.19.8 holds (counted on its engine,
`tests/distributed/test_engine_memory.py`):

    stage  weights        optimizer  gradients                    bucket  while it updates, beside both
    0      b (T + F)      12 T       b T                          0       b T + 4 T
    1      b (T + F)      12 T / W   g T; at the end and g T / W  g R     2 b T / W + 4 T / W, or g T if g > b
    2      b (T + F)      12 T / W   g T / W; and b R in flight   b R     g T / W
    3      b (T + F) / W  12 T / W   g T / W; and b R in flight   b R     g T / W + 4 T / W

In fp32 (b = 4) the last copies to fp32 are left out, and stage 0 has no masters beside the weights: 8 T.
Stage 3 gathers up to `max_live` parameters of b bytes at a time. With an offloaded optimizer masters, moments
and their gradients are on the host. Worked number: LTX-Video 2B, stage 1, bf16, one rank, while it updates:
(2 + 12 + 4 + 4) * 1.923e9 = 42.3 GB; measured 42.4 on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.planner.workload import Workload

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32, _FP64, _PARTITIONED = 4, 8, 3
WORKSPACE_BYTES = 70e6
"""What cuBLAS keeps for itself: measured 70 MB on an H200."""
CONTEXT_BYTES = 1.8e9
"""Of CUDA, cuDNN and NCCL outside torch's allocator: measured 1.8 GB on an H200."""
FRAGMENTATION = 0.05
"""Share of the peak that torch's allocator cannot use. Assumed: a run that needs 127.7 GB fits into 150 GB,
which proves no more than 16 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one GPU at the moment of an update when they are most, by what they are for.

    Attributes:
        moment: `backward` (forward and backward) or `update` (the optimizer).
        weights: In the engine's type, frozen ones among them; under stage 3 also those that are gathered.
        gradients: All copies of them.
        optimizer: fp32 masters and both moments.
        average: The moving average of the masters.
        activations: What forward keeps for backward, and both passes' own temporaries.
        buffers: Reduction buckets, the model's buffers, the workspace of libraries.
        host: In the host's memory, per GPU: an offloaded optimizer.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    buffers: float
    host: float

    @property
    def peak(self) -> float:
        """What tensors take: `torch.cuda.max_memory_allocated`."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.buffers

    @property
    def needed(self) -> float:
        """What the card must have: the peak, fragmentation, and the libraries' context."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def memory_use(
    workload: Workload, settings: DeepSpeedSettings, *, world_size: int, accumulation: int, has_average: bool
) -> MemoryUse:
    """Returns the larger of what backward and what the update take.

    Args:
        workload: One micro-batch of one rank, before any sharding.
        settings: Stage, precision, offload and sizes of reduction are read.
        world_size: Ranks that share optimizer state.
        accumulation: Micro-batches of an update; with more than one, gradients are there when forward runs.
        has_average: Whether the run keeps an average of the weights.
    """
    state = _State(workload, settings, world_size)
    per_gradient, fixed = state.gradients_in_backward()
    before = workload.trained if accumulation > 1 else 0
    moments = [(held, fixed + per_gradient * max(done, before)) for done, held in workload.curve]
    moments.append((0, state.gradients_after_backward()))
    held, gradients = max(moments, key=sum)
    backward = state.use(
        "backward", activations=held, gradients=gradients, bucket=state.bucket(), has_average=has_average
    )
    copies = state.gradients_in_update()
    update = state.use(
        "update", activations=0.0, gradients=copies, bucket=state.bucket_in_update(), has_average=has_average
    )
    return max(backward, update, key=lambda use: use.peak)


@dataclass(frozen=True, slots=True)
class _State:
    workload: Workload
    settings: DeepSpeedSettings
    world_size: int

    def use(
        self, moment: str, *, activations: float, gradients: float, bucket: float, has_average: bool
    ) -> MemoryUse:
        average = 4.0 * self._own if has_average else 0.0
        is_offloaded = self.settings.optimizer_offload
        on_host = (12.0 + 4.0 + self._width) * self._own + average
        return MemoryUse(
            moment=moment,
            weights=self._weights(),
            gradients=gradients,
            optimizer=0.0 if is_offloaded else self._optimizer_bytes(),
            average=0.0 if is_offloaded else average,
            activations=activations,
            buffers=bucket + self.workload.buffer_bytes + WORKSPACE_BYTES,
            host=on_host if is_offloaded else 0.0,
        )

    def gradients_in_backward(self) -> tuple[float, float]:
        """Returns the bytes of each gradient that is done, and of what is there from the start."""
        width, sum_width, stage = self._width, self._sum_width, self.settings.zero_stage
        own = 0.0 if self.settings.optimizer_offload else sum_width * self._own
        if stage == 0:
            return float(width), 0.0
        if stage == 1 and not self.settings.optimizer_offload:
            return float(sum_width), own if sum_width > width else 0.0
        return 0.0, own + width * min(self._bucket_elements(), self.workload.trained)

    def gradients_after_backward(self) -> float:
        """Returns the bytes where stage 1 holds all gradients and a copy of its own, before it lets the
        others go."""
        if self.settings.zero_stage != 1 or self.settings.optimizer_offload:
            return 0.0
        return self._sum_width * (self.workload.trained + self._own)

    def gradients_in_update(self) -> float:
        width, own, stage = self._width, self._own, self.settings.zero_stage
        if self.settings.optimizer_offload:
            return 0.0
        copy = 4.0 if width < _FP32 else 0.0
        if stage == 0:
            return (width + copy) * own
        if stage == 1 and self._sum_width == width:
            return (2 * width + copy) * own
        summed = self._sum_width * (self.workload.trained if stage == 1 else own)
        norm = (
            _FP64 * self.workload.largest_trained
        )  # the norm of one gradient after the other is taken in fp64
        return summed + (4.0 * own if stage == _PARTITIONED else norm)

    def bucket(self) -> float:
        """Returns the bytes of the reduction buckets while gradients are reduced."""
        stage = self.settings.zero_stage
        if stage == 0:
            return 0.0
        width = self._sum_width if stage == 1 else self._width
        is_double = stage < _PARTITIONED and bool(self.settings.zero_setting("overlap_comm", default=0))
        return self._bucket_elements() * width * (2 if is_double else 1)

    def bucket_in_update(self) -> float:
        """Returns the bytes of the buckets that stay."""
        return self.bucket() if self.settings.zero_stage == _PARTITIONED else 0.0

    @property
    def _width(self) -> int:
        return _BYTES[self.settings.precision]

    @property
    def _sum_width(self) -> int:
        return _BYTES[self.settings.gradient_precision]

    @property
    def _own(self) -> float:
        """Trained elements whose optimizer state is this rank's."""
        return self.workload.trained / (self.world_size if self.settings.zero_stage else 1)

    def _weights(self) -> float:
        whole = float(self._width * self.workload.parameters)
        if self.settings.zero_stage < _PARTITIONED or self.world_size == 1:
            return whole
        live = min(
            self.settings.zero_setting("stage3_max_live_parameters", default=1e9), self.workload.parameters
        )
        return whole / self.world_size + self._width * live

    def _optimizer_bytes(self) -> float:
        has_own_masters = self.settings.zero_stage > 0 or self._width < _FP32
        return (12.0 if has_own_masters else 8.0) * self._own

    def _bucket_elements(self) -> float:
        return self.settings.zero_setting("reduce_bucket_size", default=5e8)
