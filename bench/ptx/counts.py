"""What a launch did, counted as the hardware's own counters would.

A request is one instruction of one warp with at least one thread that takes part. Global memory moves in sectors of 32
bytes. Shared memory has 32 banks of 4 bytes, and serves one word of every bank in a wavefront: requests of 8 (16) bytes
a thread are served by halves (quarters) of a warp. Wavefronts beyond one for each of these parts are conflicts.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

SECTOR = 32
BANKS = 32
WARP = 32


@dataclasses.dataclass
class Counts:
    """Of a launch, or of the blocks of it that were run. Divided by `per`, all are means.

    Instructions are counted as issued: a guard that is false does not take a thread out, and a warp issues an
    instruction once for every group of its threads that has come there.
    """

    thread_instructions: float = 0
    warp_instructions: float = 0
    opcodes: Counter[str] = dataclasses.field(default_factory=Counter)  # warp instructions
    global_load_requests: float = 0
    global_load_sectors: float = 0
    global_load_bytes: float = 0  # of different addresses in a request: what was of use
    global_load_distinct: float = 0  # sectors, each once a block: what a cache that keeps all would ask L2 for
    global_store_requests: float = 0
    global_store_sectors: float = 0
    global_store_bytes: float = 0
    global_store_distinct: float = 0
    atomic_requests: float = 0
    atomic_sectors: float = 0
    atomic_bytes: float = 0
    shared_load_requests: float = 0
    shared_load_wavefronts: float = 0
    shared_store_requests: float = 0
    shared_store_wavefronts: float = 0
    shared_conflicts: float = 0  # wavefronts that conflicts of banks add
    # (file:line of the source, "requests" or "sectors") of global loads
    load_lines: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    barriers: float = 0  # of warps
    divergent_branches: float = 0  # of warps
    blocks: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def per(self, n: float) -> Counts:
        """Everything divided by n: a block's, point's or ray's part."""
        return Counts(**{f.name: _divided(getattr(self, f.name), n) for f in dataclasses.fields(self)})


def _divided(value: float | Counter, n: float) -> float | Counter:
    if isinstance(value, Counter):
        return Counter({name: count / n for name, count in value.items()})
    return value / n


_OUTSIDE = 2**63 - 1  # in place of the address of a thread that takes no part


def _rows(addresses: np.ndarray, active: np.ndarray | None, threads: int) -> np.ndarray:
    """Addresses as rows of so many threads of one warp; those that take no part lie behind all others."""
    if active is not None:
        addresses = np.where(active, addresses, _OUTSIDE)
    return addresses.reshape(-1, threads)


def _sorted(rows: np.ndarray) -> np.ndarray:
    changes = rows[:, 1:] < rows[:, :-1]
    return np.sort(rows, axis=1) if np.count_nonzero(changes) else rows


def sectors(addresses: np.ndarray, active: np.ndarray | None, width: int) -> tuple[int, int, int]:
    """Requests, sectors and useful bytes of one access to global memory.

    Args:
        addresses: [blocks, threads], multiples of `width`.
        active: Who takes part.
        width: Bytes of a thread's access.
    """
    rows = _sorted(_rows(addresses, active, WARP))
    some = rows[:, 0] != _OUTSIDE
    requests = int(np.count_nonzero(some))
    # Threads that take no part are one more value of their row.
    beside = requests - int(np.count_nonzero(some & (rows[:, -1] == _OUTSIDE)))
    different = int(np.count_nonzero(rows[:, 1:] != rows[:, :-1])) + beside
    if width >= SECTOR:
        return requests, different * width // SECTOR, different * width
    rows = rows >> SECTOR.bit_length() - 1
    return requests, int(np.count_nonzero(rows[:, 1:] != rows[:, :-1])) + beside, different * width


def wavefronts(addresses: np.ndarray, active: np.ndarray | None, width: int) -> tuple[int, int, int]:
    """Requests, wavefronts and conflicts of one access to shared memory; arguments as for `sectors`."""
    unit = max(width, 4)
    rows = _rows(addresses, active, WARP)
    requests = int(np.count_nonzero((rows != _OUTSIDE).any(1)))
    rows = rows.reshape(-1, WARP * 4 // unit)  # threads that are served together
    banks = BANKS * 4 // unit
    rows = np.where(rows != _OUTSIDE, rows >> unit.bit_length() - 1, _OUTSIDE)
    if not np.count_nonzero(rows != rows[:, :1]):
        return requests, int(np.count_nonzero(rows[:, 0] != _OUTSIDE)), 0
    rows = _sorted(rows)
    first = rows != _OUTSIDE
    least = int(np.count_nonzero(first.any(1)))
    first[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    words = np.bincount(np.nonzero(first)[0] * banks + (rows[first] % banks), minlength=len(rows) * banks)
    fronts = int(words.reshape(-1, banks).max(1).sum())
    return requests, fronts, fronts - least
