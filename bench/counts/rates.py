"""What GPUs are taken to do at best, and the least time that counts need at these rates.

The rates are the datasheets', at the boost clock that gives their arithmetic, or assumed where no datasheet has them;
`bench.ops` measures some of them on a device (`ops.ceilings`). A bound is no measurement: it says which of a kernel's
needs is the greatest, and that it cannot be faster than that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..ops.cases import Work
from ..ptx import Counts

SECTOR = 32


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates of one GPU.

    Attributes:
        multiprocessors: SMs; each issues 4 warp instructions a cycle, and has one wavefront of shared memory or 4
            sectors of L1 in it.
        ghz: Clock of the multiprocessors and, as taken here, of L2.
        fp32_lanes: Of a multiprocessor.
        l2_sectors: That all of L2 hands out in a cycle.
        atomic_sectors: That it adds to in a cycle: one for every slice of 64 bytes a cycle.
        dram_gb: GB/s.
        tensor_flops: Operations a second by the operands' type.
    """

    name: str
    multiprocessors: int
    ghz: float
    fp32_lanes: int
    l2_sectors: int
    atomic_sectors: int
    dram_gb: float
    tensor_flops: Mapping[str, float]


GPUS = {
    70: Gpu("V100", 80, 1.53, 64, 64, 32, 900, {"f16": 125e12}),
    80: Gpu("A100", 108, 1.41, 64, 160, 80, 1555, {"f16": 312e12, "bf16": 312e12, "tf32": 156e12}),
    90: Gpu("H100", 132, 1.98, 128, 160, 80, 3350, {"f16": 989e12, "bf16": 989e12, "tf32": 495e12}),
}

ISSUE_PER_CYCLE, L1_SECTORS, SHARED_WAVEFRONTS = 4, 4, 1  # of a multiprocessor

_PRODUCT = re.compile(r"(?:wgmma|mma)\.\S*?\.m(\d+)n(\d+)k(\d+)\.\S*?\.(tf32|bf16|f16)\.(?:tf32|bf16|f16)(?:\.|$)")
_FP32 = re.compile(r"(?:fma|add|sub|mul|mad)\.(?:rn\.|rz\.)?(?:ftz\.)?(?:sat\.)?f32(x2)?$")


def tensor_flops(opcodes: Mapping[str, float]) -> dict[str, float]:
    """Operations of tensor cores by the operands' type, of warp instructions by opcode."""
    found: dict[str, float] = {}
    for opcode, count in opcodes.items():
        if product := _PRODUCT.match(opcode):
            m, n, k = (int(product[i]) for i in (1, 2, 3))
            warps = 4 if opcode.startswith("wgmma") else 1  # that have a product together
            found[product[4]] = found.get(product[4], 0) + 2 * m * n * k * count / warps
    return found


def fp32_instructions(opcodes: Mapping[str, float]) -> float:
    """Warp instructions that fp32 lanes execute."""
    return sum((2 if found[1] else 1) * count for name, count in opcodes.items() if (found := _FP32.match(name)))


def bounds(counts: Counts, gpu: Gpu, *, footprint: float | None = None, longest: float = 0) -> dict[str, float]:
    """Seconds that a launch's counts need, by what needs them.

    Args:
        counts: Of the whole launch.
        footprint: Bytes of all tensors, where they come from DRAM and go there; what blocks share is moved once.
            None where it is L2 that they are read from.
        longest: Warp instructions of the block that has most.
    """
    hz = gpu.ghz * 1e9
    per_sm = 1 / (gpu.multiprocessors * hz)
    fronts = counts.shared_load_wavefronts + counts.shared_store_wavefronts
    moved = counts.global_load_distinct + counts.global_store_sectors  # L1 writes through
    found = {
        "issue": counts.warp_instructions / ISSUE_PER_CYCLE * per_sm,
        "one block": longest / ISSUE_PER_CYCLE / hz,
        "fp32": fp32_instructions(counts.opcodes) * 32 / gpu.fp32_lanes * per_sm,
        "tensor cores": sum(n / gpu.tensor_flops[kind] for kind, n in tensor_flops(counts.opcodes).items()),
        "shared memory": fronts / SHARED_WAVEFRONTS * per_sm,
        "L1": counts.global_load_sectors / L1_SECTORS * per_sm,
        "L2": moved / gpu.l2_sectors / hz,
        "atomics": counts.atomic_sectors / gpu.atomic_sectors / hz,
    }
    if footprint is not None:
        moved = SECTOR * (counts.global_load_distinct + counts.global_store_distinct)
        found["DRAM"] = min(moved, footprint) / (gpu.dram_gb * 1e9)
    return found


def floor(work: Work, gpu: Gpu, precision: str) -> float:
    """Seconds that any implementation needs at the same rates."""
    hz = gpu.ghz * 1e9
    kind = {"fp16": "f16"}.get(precision, precision)
    flops = gpu.tensor_flops.get(kind, 2 * gpu.fp32_lanes * gpu.multiprocessors * hz)
    return max(
        work.bytes / (gpu.dram_gb * 1e9),
        work.gather_bytes / SECTOR / gpu.l2_sectors / hz,
        work.atomics * 4 / SECTOR / gpu.atomic_sectors / hz,
        work.flops / flops,
    )


def table() -> list[dict[str, Any]]:
    """The rates, as they stand in a result file."""
    return [
        {
            "arch": arch,
            **dataclasses.asdict(gpu),
            "warp_instructions_per_cycle_and_sm": ISSUE_PER_CYCLE,
            "shared_wavefronts_per_cycle_and_sm": SHARED_WAVEFRONTS,
            "l1_sectors_per_cycle_and_sm": L1_SECTORS,
        }
        for arch, gpu in GPUS.items()
    ]
