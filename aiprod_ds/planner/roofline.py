"""How long an update takes: a roofline over the kernels of a micro-batch, the host that starts them, and the
engine's part.

    kernel      = max(flops / (peak * efficiency), bytes / (bandwidth * 0.98))
    micro-batch = max(sum over kernels, operations * 17 us); captured as CUDA graphs, the sum alone
    step        = constant + max(trained tensors * 0.19 ms, bytes * T / W / bandwidth); captured, no tensors
    update      = accumulation * micro-batch + step + exchange

In compiled blocks kernels without products move 0.4 of the bytes and the host starts half of the operations.
The step is the engine's own AdamW at ZeRO-1 and 2 (30 bytes an element, 11 ms captured, 25 ms not), otherwise
DeepSpeed's (90 bytes, 70 ms).

The constants of convolutions, operations, tensors and of DeepSpeed's step were fitted on one H200 (torch
2.11, DeepSpeed 0.19.8, bf16, ZeRO-1, one GPU, a host with 16 cores of an Intel Xeon), eager and before there
were flat parameters: LTX-Video 2B in the low phase and the last one, its LoRA, AutoencoderKLLTXVideo at
17x512x512 and AutoencoderOobleck; five cases were kept out of the fit and met within 11 %. Two hosts with
the same GPU differed by 27 % in the low phase, which the host bounds. Those of products, cuDNN's attention,
compiled blocks and the captured step were fitted to the six times of LTX-Video 2B at ZeRO-1 with graphs (all
weights and LoRA of rank 64, three phases; the last one of all weights is too large for graphs), those of the
step and the operations without graphs to three more; attention without cuDNN to the last phase, eager, once
products were known. Kept out was ZeRO-3, met within 5 % (`tests/unit/planner/test_calibration.py`). Other
GPUs are assumed to reach the same shares of their peaks; exchange between GPUs, offload, other models'
compiled blocks, and what `activation_memory_budget` costs are sums and shares that nobody has measured.
"""

from __future__ import annotations

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.planner.computing import Computing
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.memory import has_one_pass
from aiprod_ds.planner.workload import Work, WorkKind, Workload

EFFICIENCY = {WorkKind.MATMUL: 0.64, WorkKind.ATTENTION: 0.33, WorkKind.CONVOLUTION: 0.35}
"""Share of the peak that a kernel reaches."""
CUDNN_ATTENTION_EFFICIENCY = 0.45
ATTENTION_EFFICIENCY_BEFORE_FLASH = 0.12
"""The same of the memory-efficient kernel: measured on an H200 with flash switched off, 50.6 ms instead of
20.7."""
BANDWIDTH_EFFICIENCY = 0.98
COMPILED_BYTES = 0.4
"""Of what eager blocks move outside of products, what compiled ones move."""
SECONDS_PER_OPERATION = 17e-6
COMPILED_OPERATIONS = 0.5
"""Of the operations that the host starts for eager blocks, those that it starts for compiled ones."""
SECONDS_PER_TENSOR = 0.19e-3
SECONDS_PER_UPDATE = 0.07
UPDATE_BYTES = 90.0
"""What DeepSpeed's optimizer and the copies around it read and write for each trained element."""
SECONDS_PER_ONE_PASS, SECONDS_PER_CAPTURED = 0.025, 0.011
ONE_PASS_BYTES = 30.0
"""What the engine's own AdamW reads and writes for each trained element of bf16, the norm among it."""
LINK_EFFICIENCY = 0.7
HOST_ADAM_BYTES_PER_SECOND = 20e9
"""Per GPU's share of a host. Assumed."""
FORWARD_SHARE = 1 / 3
"""Of the time of both passes. Assumed, for what a budget of activations computes again."""
_TENSOR_CORE_BYTES = 2
_EAGER = Computing()


def micro_batch_seconds(
    workload: Workload, machine: Machine, computing: Computing = _EAGER, *, is_captured: bool = False
) -> float:
    """Returns the time of forward and backward: what the GPU or what the host takes, whichever is more.

    Args:
        computing: How the passes are computed.
        is_captured: Whether they are CUDA graphs, which the host starts by two calls.
    """
    device = sum(work.count * _kernel_seconds(work, workload, machine, computing) for work in workload.work)
    if computing.compiles_blocks and computing.activation_memory_budget < 1:
        device *= 1 + FORWARD_SHARE * workload.block_share * (1 - computing.activation_memory_budget)
    if is_captured:
        return device
    started = 1 - workload.block_dispatched * (1 - COMPILED_OPERATIONS) if computing.compiles_blocks else 1.0
    return max(device, workload.dispatched * SECONDS_PER_OPERATION * started)


def update_seconds(
    workload: Workload,
    settings: DeepSpeedSettings,
    machine: Machine,
    *,
    world_size: int,
    accumulation: int,
    computing: Computing = _EAGER,
    is_captured: bool = False,
) -> float:
    """Returns the time of one update of one rank, exchange with the others included and not hidden."""
    own = workload.trained / (world_size if settings.zero_stage else 1)
    passes = accumulation * micro_batch_seconds(workload, machine, computing, is_captured=is_captured)
    step = _step_seconds(workload, settings, machine, own, computing, is_captured=is_captured)
    exchange = _exchanged_bytes(workload, settings, world_size, accumulation)
    return passes + step + exchange / (machine.link_bytes_per_second * LINK_EFFICIENCY)


def _step_seconds(
    workload: Workload,
    settings: DeepSpeedSettings,
    machine: Machine,
    own: float,
    computing: Computing,
    *,
    is_captured: bool,
) -> float:
    bandwidth = machine.memory_bytes_per_second * BANDWIDTH_EFFICIENCY
    is_one_pass = has_one_pass(settings)
    optimizer = (ONE_PASS_BYTES if is_one_pass else UPDATE_BYTES) * own / bandwidth
    if is_one_pass and is_captured:
        return SECONDS_PER_CAPTURED + optimizer
    if settings.optimizer_offload:
        optimizer = (
            28.0 * own / HOST_ADAM_BYTES_PER_SECOND + (4.0 + 2.0) * own / machine.host_bytes_per_second
        )
    tensors = workload.flat_tensors if computing.has_flat_parameters else workload.trained_tensors
    constant = SECONDS_PER_ONE_PASS if is_one_pass else SECONDS_PER_UPDATE
    return constant + max(tensors * SECONDS_PER_TENSOR, optimizer)


def _kernel_seconds(work: Work, workload: Workload, machine: Machine, computing: Computing) -> float:
    moved = work.moved_bytes / (machine.memory_bytes_per_second * BANDWIDTH_EFFICIENCY)
    if work.kind is WorkKind.OTHER:
        fused = (1 - COMPILED_BYTES) * workload.block_share if computing.compiles_blocks else 0.0
        return moved * (1 - fused)
    return max(moved, work.flops / (_peak(work, machine) * _efficiency(work, machine, computing)))


def _peak(work: Work, machine: Machine) -> float:
    if work.element_bytes <= _TENSOR_CORE_BYTES:
        return machine.half_flops
    return machine.convolution_fp32_flops if work.kind is WorkKind.CONVOLUTION else machine.fp32_flops


def _efficiency(work: Work, machine: Machine, computing: Computing) -> float:
    if work.kind is WorkKind.ATTENTION and not machine.has_bf16:
        return ATTENTION_EFFICIENCY_BEFORE_FLASH
    if work.kind is WorkKind.ATTENTION and computing.has_cudnn_first:
        return CUDNN_ATTENTION_EFFICIENCY
    return EFFICIENCY[work.kind]


def _exchanged_bytes(
    workload: Workload, settings: DeepSpeedSettings, world_size: int, accumulation: int
) -> float:
    """Returns what one rank sends in an update: gradients once, weights once, and under stage 3 weights in
    every pass."""
    share = (world_size - 1) / world_size
    width = 4 if settings.precision == "fp32" else 2
    gradients = width * workload.trained * (2 if settings.zero_stage == 0 else 1)
    if settings.zero_stage < 3:
        return share * (gradients + (width * workload.trained if settings.zero_stage else 0))
    return share * (gradients * accumulation + 2 * width * workload.parameters * accumulation)
