"""How much memory of one GPU an update takes, by ZeRO stage, precision, offload and world size: sums in
bytes; of measurements only what compiled blocks keep and what libraries take.

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
and their gradients are on the host. At stages 1 and 2 the engine's own AdamW (not in fp16, not offloaded)
reads gradients where they lie: the copies of the last column are left out, and on one rank without
accumulation the gradients stay b T where autograd put them.

Passes that are captured as CUDA graphs keep activations and b T of gradients in a pool of their own until the
phase ends, beside what the engine makes of the gradients. Worked number: LTX-Video 2B, stage 1, bf16, one
rank, 17 frames of 512x512, batch 8, compiled and captured: (2 + 12) * 1.923e9 = 26.9 GB and a pool of 17.7;
`torch.cuda.max_memory_allocated` does not see the pool and says 29.4 on an H200: weights, masters and the
passes of the first update, before there were moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.planner.computing import Computing
from aiprod_ds.planner.hardware import Machine
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
COMPILED_SAVED = 0.81
"""Share of the activations of eager blocks that compiled ones keep. Fitted to all weights of LTX-Video 2B on
an H200 at 17x512x512 and 49x1024x1024; its LoRA in three shapes and ZeRO-3 are met within 4 %."""
GRAPH_SHARE_OF_FREE = 0.5
"""Of the free memory, what a captured forward pass may keep: as `aiprod_ds.engine.captured` has it."""
_EAGER = Computing()


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
        allocated: What `torch.cuda.max_memory_allocated` says: the peak, but of captured passes only those
            of the first update.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    buffers: float
    host: float
    allocated: float

    @property
    def peak(self) -> float:
        """What tensors take, those of captured passes among them."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.buffers

    @property
    def needed(self) -> float:
        """What the card must have: the peak, fragmentation, and the libraries' context."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def memory_use(
    workload: Workload,
    settings: DeepSpeedSettings,
    *,
    world_size: int,
    accumulation: int,
    has_average: bool,
    computing: Computing = _EAGER,
    is_captured: bool = False,
) -> MemoryUse:
    """Returns the larger of what backward and what the update take.

    Args:
        workload: One micro-batch of one rank, before any sharding.
        settings: Stage, precision, offload and sizes of reduction are read.
        world_size: Ranks that share optimizer state.
        accumulation: Micro-batches of an update; with more than one, gradients are there when forward runs.
        has_average: Whether the run keeps an average of the weights.
        computing: How the passes are computed.
        is_captured: Whether they are CUDA graphs.
    """
    is_in_place = has_one_pass(settings) and world_size == 1 and accumulation == 1
    state = _State(workload, settings, world_size, is_in_place)
    kept = activation_share(workload, computing)
    if is_captured:
        return state.captured(
            pool=workload.peak_bytes(bytes_per_gradient=state.width, share=kept), has_average=has_average
        )
    per_gradient, fixed = state.gradients_in_backward()
    before = workload.trained if accumulation > 1 else 0
    moments = [(held * kept, fixed + per_gradient * max(done, before)) for done, held in workload.curve]
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


def has_one_pass(settings: DeepSpeedSettings) -> bool:
    """Returns whether the engine's own AdamW updates: in one pass from gradients to weights."""
    return settings.zero_stage in (1, 2) and settings.precision != "fp16" and not settings.optimizer_offload


def activation_share(workload: Workload, computing: Computing) -> float:
    """Returns what is kept of the activations that eager blocks would.

    A budget takes its share of what compiled blocks keep, except of what they hand on: torch's own rule, not
    measured.
    """
    if not computing.compiles_blocks or not workload.saved_bytes:
        return 1.0
    compiled = COMPILED_SAVED * workload.block_saved_bytes
    handed_on = min(workload.block_output_bytes, compiled)
    kept = handed_on + computing.activation_memory_budget * (compiled - handed_on)
    return 1.0 - (workload.block_saved_bytes - kept) / workload.saved_bytes


def can_capture(
    workload: Workload,
    settings: DeepSpeedSettings,
    machine: Machine,
    computing: Computing,
    *,
    world_size: int,
) -> bool:
    """Returns whether the passes are captured where nothing is recomputed: where they keep no more than half
    of what is free."""
    if not computing.captures_passes:
        return False
    state = _State(workload, settings, world_size, is_in_place=False)
    use = state.use("backward", activations=0.0, gradients=0.0, bucket=0.0, has_average=False)
    free = machine.memory_bytes - CONTEXT_BYTES - use.peak
    return workload.saved_bytes * activation_share(workload, computing) <= GRAPH_SHARE_OF_FREE * free


@dataclass(frozen=True, slots=True)
class _State:
    workload: Workload
    settings: DeepSpeedSettings
    world_size: int
    is_in_place: bool

    def captured(self, *, pool: float, has_average: bool) -> MemoryUse:
        """Returns what a captured update takes.

        Args:
            pool: What the passes keep: activations and their own gradients.
            has_average: As in `use`.
        """
        beside = 0.0 if self.is_in_place else max(self.gradients_after_backward(), self.gradients_in_update())
        bucket = 0.0 if self.is_in_place else self.bucket()
        whole = self.use(
            "backward", activations=pool, gradients=beside, bucket=bucket, has_average=has_average
        )
        moments = 0.0 if self.settings.optimizer_offload else 8.0 * self._own
        return replace(whole, allocated=max(whole.peak - pool, whole.peak - beside - bucket - moments))

    def use(
        self, moment: str, *, activations: float, gradients: float, bucket: float, has_average: bool
    ) -> MemoryUse:
        average = 4.0 * self._own if has_average else 0.0
        is_offloaded = self.settings.optimizer_offload
        on_host = (12.0 + 4.0 + self.width) * self._own + average
        found = MemoryUse(
            moment=moment,
            weights=self._weights(),
            gradients=gradients,
            optimizer=0.0 if is_offloaded else self._optimizer_bytes(),
            average=0.0 if is_offloaded else average,
            activations=activations,
            buffers=bucket + self.workload.buffer_bytes + WORKSPACE_BYTES,
            host=on_host if is_offloaded else 0.0,
            allocated=0.0,
        )
        return replace(found, allocated=found.peak)

    def gradients_in_backward(self) -> tuple[float, float]:
        """Returns the bytes of each gradient that is done, and of what is there from the start."""
        width, sum_width, stage = self.width, self._sum_width, self.settings.zero_stage
        own = 0.0 if self.settings.optimizer_offload else sum_width * self._own
        if stage == 0 or self.is_in_place:
            return float(width), 0.0
        if stage == 1 and not self.settings.optimizer_offload:
            return float(sum_width), own if sum_width > width else 0.0
        return 0.0, own + width * min(self._bucket_elements(), self.workload.trained)

    def gradients_after_backward(self) -> float:
        """Returns the bytes where stage 1 holds all gradients and a copy of its own, before it lets the
        others go."""
        if self.is_in_place:
            return float(self.width) * self.workload.trained
        if self.settings.zero_stage != 1 or self.settings.optimizer_offload:
            return 0.0
        return self._sum_width * (self.workload.trained + self._own)

    def gradients_in_update(self) -> float:
        width, own, stage = self.width, self._own, self.settings.zero_stage
        if self.settings.optimizer_offload:
            return 0.0
        copy = 4.0 if width < _FP32 else 0.0
        if stage == 0:
            return (width + copy) * own
        if self.is_in_place:
            return float(width) * self.workload.trained
        if has_one_pass(self.settings):
            return self._sum_width * (
                own if stage > 1 or self._sum_width == width else float(self.workload.trained)
            )
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
        width = self._sum_width if stage == 1 else self.width
        is_double = stage < _PARTITIONED and bool(self.settings.zero_setting("overlap_comm", default=0))
        return self._bucket_elements() * width * (2 if is_double else 1)

    def bucket_in_update(self) -> float:
        """Returns the bytes of the buckets that stay."""
        return self.bucket() if self.settings.zero_stage == _PARTITIONED else 0.0

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return _BYTES[self.settings.precision]

    @property
    def _sum_width(self) -> int:
        return _BYTES[self.settings.gradient_precision]

    @property
    def _own(self) -> float:
        """Trained elements whose optimizer state is this rank's."""
        return self.workload.trained / (self.world_size if self.settings.zero_stage else 1)

    def _weights(self) -> float:
        whole = float(self.width * self.workload.parameters)
        if self.settings.zero_stage < _PARTITIONED or self.world_size == 1:
            return whole
        live = min(
            self.settings.zero_setting("stage3_max_live_parameters", default=1e9), self.workload.parameters
        )
        return whole / self.world_size + self.width * live

    def _optimizer_bytes(self) -> float:
        has_own_masters = self.settings.zero_stage > 0 or self.width < _FP32
        return (12.0 if has_own_masters else 8.0) * self._own

    def _bucket_elements(self) -> float:
        return self.settings.zero_setting("reduce_bucket_size", default=5e8)
