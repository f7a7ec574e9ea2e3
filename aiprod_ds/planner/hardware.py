"""The GPUs that estimates are made for: one table of facts and assumptions, and the rules that a GPU sets for
the settings.

Pure data. Peaks, memory and bandwidths are those of the vendor's data sheets (V100 SXM2 32 GB, A100 SXM 80
GB, H100 SXM 80 GB, H200 SXM 141 GB, dense, without sparsity); usable memory is what torch reports of such a
card, a little less than its name says. Host memory, the speed to the host and prices are assumptions of ours,
to be replaced by the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from aiprod_ds.config.deepspeed import DeepSpeedSettings

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of GPU in a host.

    Attributes:
        compute_capability: Of the vendor; 7.0 has no bf16 and no flash attention.
        memory_bytes: Usable by torch.
        half_flops: Peak per second in fp16, and in bf16 where it has that, with fp32 sums.
        convolution_fp32_flops: Peak per second of fp32 convolutions: TF32 where the GPU has it, as torch
            allows by default.
        fp32_flops: Peak per second of fp32 matrix products outside tensor cores.
        memory_bytes_per_second: To the GPU's own memory.
        link_bytes_per_second: Between GPUs of one host, one direction.
        host_bytes_per_second: Between GPU and host, one direction.
        host_memory_bytes: Per GPU. Assumed.
        price_per_gpu_hour: In dollars. Assumed: rented, on demand, rounded.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    half_flops: float
    convolution_fp32_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    host_bytes_per_second: float
    host_memory_bytes: int
    price_per_gpu_hour: float

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16; torch emulates it elsewhere, and says that it is supported."""
        return self.compute_capability >= (8, 0)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="v100-32gb",
            compute_capability=(7, 0),
            memory_bytes=int(31.7 * GIB),
            half_flops=125e12,
            convolution_fp32_flops=15.7e12,
            fp32_flops=15.7e12,
            memory_bytes_per_second=0.9e12,
            link_bytes_per_second=150e9,
            host_bytes_per_second=12e9,
            host_memory_bytes=64 * GIB,
            price_per_gpu_hour=1.0,
        ),
        Machine(
            name="a100-80gb",
            compute_capability=(8, 0),
            memory_bytes=int(79.2 * GIB),
            half_flops=312e12,
            convolution_fp32_flops=156e12,
            fp32_flops=19.5e12,
            memory_bytes_per_second=2.04e12,
            link_bytes_per_second=300e9,
            host_bytes_per_second=25e9,
            host_memory_bytes=128 * GIB,
            price_per_gpu_hour=2.0,
        ),
        Machine(
            name="h100-80gb",
            compute_capability=(9, 0),
            memory_bytes=int(79.1 * GIB),
            half_flops=989e12,
            convolution_fp32_flops=494e12,
            fp32_flops=67e12,
            memory_bytes_per_second=3.35e12,
            link_bytes_per_second=450e9,
            host_bytes_per_second=50e9,
            host_memory_bytes=192 * GIB,
            price_per_gpu_hour=3.0,
        ),
        Machine(
            name="h200-141gb",
            compute_capability=(9, 0),
            memory_bytes=int(139.8 * GIB),
            half_flops=989e12,
            convolution_fp32_flops=494e12,
            fp32_flops=67e12,
            memory_bytes_per_second=4.8e12,
            link_bytes_per_second=450e9,
            host_bytes_per_second=50e9,
            host_memory_bytes=192 * GIB,
            price_per_gpu_hour=3.5,
        ),
    )
}


def machine_like(name: str, capability: tuple[int, int], *, memory_bytes: int) -> Machine:
    """Returns a GPU that was found, with its own memory and the speed of the machine of the table that is
    most like it.

    Args:
        name: As torch says it, such as `NVIDIA H200`.
        capability: Compute capability, of the vendor.
        memory_bytes: Of the whole GPU.
    """
    by_name = [machine for known, machine in MACHINES.items() if known.partition("-")[0] in name.lower()]
    by_age = [machine for machine in MACHINES.values() if machine.compute_capability <= capability]
    likest = next(iter(by_name), by_age[-1] if by_age else MACHINES["v100-32gb"])
    return replace(likest, name=name, compute_capability=capability, memory_bytes=memory_bytes)


def settings_problems(settings: DeepSpeedSettings, machine: Machine, *, where: str) -> Iterator[str]:
    """Yields what the engine's settings, which messages call `where`, ask for and the GPU has not."""
    if settings.precision == "bf16" and not machine.has_bf16:
        major, minor = machine.compute_capability
        yield (
            f"{where}: bf16.enabled: needs compute capability 8.0 or higher, got {machine.name} with "
            f"{major}.{minor}, on which "
            "torch emulates it slowly. Use a file such as ds_configs/zero1_fp16_v100.json."
        )
