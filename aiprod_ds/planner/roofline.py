"""How long an update takes: a roofline over the kernels of a micro-batch, the host that starts them, and
DeepSpeed's part.

    kernel      = max(flops / (peak * efficiency), bytes / (bandwidth * 0.98))
    micro-batch = max(sum over kernels, operations * 17 us)
    step        = 0.07 s + max(trained tensors * 0.19 ms, 90 bytes * T / W / bandwidth)
    update      = accumulation * micro-batch + step + exchange

The constants were fitted on one H200 (torch 2.11, DeepSpeed 0.19.8, eager, bf16, ZeRO-1, one GPU, a host with
16 cores of an Intel Xeon): LTX-Video 2B in the low phase and the last one, its LoRA, AutoencoderKLLTXVideo at
17x512x512 and AutoencoderOobleck; five cases were kept out of the fit and are met within 11 %
(`benchmarks/planner_accuracy.py`). Two hosts with the same GPU differed by 27 % in the low phase, which the
host bounds. Other GPUs are assumed to reach the same shares of their peaks; exchange between GPUs, offload
and ZeRO-3 are sums of bytes over bandwidths that nobody has measured. A model that is compiled is faster.
"""

from __future__ import annotations

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.workload import Work, WorkKind, Workload

EFFICIENCY = {WorkKind.MATMUL: 0.75, WorkKind.ATTENTION: 0.29, WorkKind.CONVOLUTION: 0.35}
"""Share of the peak that a kernel reaches."""
ATTENTION_EFFICIENCY_BEFORE_FLASH = 0.12
"""The same of the memory-efficient kernel: measured on an H200 with flash switched off, 50.6 ms instead of
20.7."""
BANDWIDTH_EFFICIENCY = 0.98
SECONDS_PER_OPERATION = 17e-6
SECONDS_PER_TENSOR = 0.19e-3
SECONDS_PER_UPDATE = 0.07
UPDATE_BYTES = 90.0
"""What the optimizer and the copies around it read and write for each trained element."""
LINK_EFFICIENCY = 0.7
HOST_ADAM_BYTES_PER_SECOND = 20e9
"""Per GPU's share of a host. Assumed."""
_TENSOR_CORE_BYTES = 2


def micro_batch_seconds(workload: Workload, machine: Machine) -> float:
    """Returns the time of forward and backward: what the GPU or what the host takes, whichever is more."""
    device = sum(work.count * _kernel_seconds(work, machine) for work in workload.work)
    return max(device, workload.dispatched * SECONDS_PER_OPERATION)


def update_seconds(
    workload: Workload, settings: DeepSpeedSettings, machine: Machine, *, world_size: int, accumulation: int
) -> float:
    """Returns the time of one update of one rank, exchange with the others included and not hidden."""
    own = workload.trained / (world_size if settings.zero_stage else 1)
    optimizer = UPDATE_BYTES * own / (machine.memory_bytes_per_second * BANDWIDTH_EFFICIENCY)
    if settings.optimizer_offload:
        optimizer = (
            28.0 * own / HOST_ADAM_BYTES_PER_SECOND + (4.0 + 2.0) * own / machine.host_bytes_per_second
        )
    step = SECONDS_PER_UPDATE + max(workload.trained_tensors * SECONDS_PER_TENSOR, optimizer)
    exchange = _exchanged_bytes(workload, settings, world_size, accumulation)
    link = machine.link_bytes_per_second * LINK_EFFICIENCY
    return accumulation * micro_batch_seconds(workload, machine) + step + exchange / link


def _kernel_seconds(work: Work, machine: Machine) -> float:
    moved = work.moved_bytes / (machine.memory_bytes_per_second * BANDWIDTH_EFFICIENCY)
    if work.kind is WorkKind.OTHER:
        return moved
    return max(moved, work.flops / (_peak(work, machine) * _efficiency(work, machine)))


def _peak(work: Work, machine: Machine) -> float:
    if work.element_bytes <= _TENSOR_CORE_BYTES:
        return machine.half_flops
    return machine.convolution_fp32_flops if work.kind is WorkKind.CONVOLUTION else machine.fp32_flops


def _efficiency(work: Work, machine: Machine) -> float:
    if work.kind is WorkKind.ATTENTION and not machine.has_bf16:
        return ATTENTION_EFFICIENCY_BEFORE_FLASH
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
