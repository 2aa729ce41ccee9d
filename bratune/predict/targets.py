"""Targets: GPUs that kernels are compiled for without having one, with the limits that decide occupancy.

The limits belong to the compute capability, not to the board: shared memory from NVIDIA's CCCL
(`arch_traits.h`), warps, blocks and L1 from the CUDA programming guide's table of compute capabilities. What
depends on the board (number of SMs, clock, bandwidth) is in `bratune.gpus`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bratune.errors import UnknownNameError
from bratune.machine import Machine

__all__ = ["TARGETS", "CompileTarget", "get_target", "target_of"]

_SCHEDULERS = 4


@dataclass(frozen=True, kw_only=True, order=True)
class CompileTarget:
    """One instruction set that Triton can compile for.

    Attributes:
        name: ``sm90``, ``gfx942``.
        backend: Triton's name of the vendor: ``cuda`` or ``hip``.
        arch: Triton's name of the architecture: 90, ``"gfx942"``.
        warp_size: Threads of a warp.
        max_warps: Warps that an SM (AMD: a compute unit) can hold.
        max_blocks: Blocks that an SM can hold.
        registers: 32-bit registers of an SM.
        register_unit: Registers are given to a warp in multiples of this.
        smem_kib: Shared memory of an SM, in KiB.
        smem_block_kib: Shared memory that one block may use, in KiB.
        smem_reserved: Bytes of shared memory that the system takes from every block.
        l1_kib: What L1 cache and shared memory of an SM have together, in KiB.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int = 32
    max_warps: int
    max_blocks: int
    registers: int = 65_536
    register_unit: int = 256
    smem_kib: int
    smem_block_kib: int
    smem_reserved: int = 1024
    l1_kib: int

    def resident_warps(self, *, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Warps of one kernel that an SM holds at a time; 0 when not even one block fits.

        Args:
            registers: Registers of a thread.
            shared_bytes: Shared memory of a block.
            num_warps: Warps of a block.
        """
        warp_registers = -(-registers * self.warp_size // self.register_unit) * self.register_unit
        # Each of the four schedulers has a quarter of the registers, for warps of its own.
        warps = _SCHEDULERS * (self.registers // _SCHEDULERS // max(1, warp_registers))
        blocks = min(
            self.max_blocks,
            self.max_warps // num_warps,
            warps // num_warps,
            self.smem_kib * 1024 // max(1, shared_bytes + self.smem_reserved),
        )
        return blocks * num_warps


def _nvidia(arch: int, warps: int, blocks: int, smem_kib: int, l1_kib: int) -> CompileTarget:
    return CompileTarget(
        name=f"sm{arch}",
        backend="cuda",
        arch=arch,
        max_warps=warps,
        max_blocks=blocks,
        smem_kib=smem_kib,
        smem_block_kib=smem_kib - 1,  # the rest is the system's
        l1_kib=l1_kib,
    )


# Four SIMD units of 512 vector registers for each of 64 lanes; eight waves per unit.
_MI300 = CompileTarget(
    name="gfx942",
    backend="hip",
    arch="gfx942",
    warp_size=64,
    max_warps=32,
    max_blocks=32,
    registers=4 * 512 * 64,
    register_unit=8 * 64,
    smem_kib=64,
    l1_kib=64 + 32,
    smem_block_kib=64,
    smem_reserved=0,
)
TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 64, 32, 164, 192),
        _nvidia(86, 48, 16, 100, 128),
        _nvidia(89, 48, 24, 100, 128),
        _nvidia(90, 64, 32, 228, 256),
        _nvidia(100, 64, 32, 228, 256),
        _nvidia(120, 48, 24, 100, 128),
        _MI300,
    )
}


def get_target(name: str) -> CompileTarget:
    """The target of that name; raises `UnknownNameError`."""
    if name not in TARGETS:
        raise UnknownNameError("compile target", name, TARGETS)
    return TARGETS[name]


def target_of(machine: Machine) -> CompileTarget | None:
    """The target that a machine runs; None for a CPU and for GPUs that are not in the table."""
    major, minor = machine.capability
    return TARGETS.get(f"sm{major}{minor}") if machine.is_cuda else None
