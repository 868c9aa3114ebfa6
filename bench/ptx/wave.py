"""Blocks that are run together: their threads, what these know of themselves, and how to say which of them erred."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .counts import SECTOR, WARP, Counts, sectors, wavefronts
from .parse import Instruction
from .races import ATOMIC, BLOCK_SHIFT, COPY, SEVERAL_BLOCKS, SEVERAL_WARPS, SOME_OF_WARP, WHO, Clocks

Size = tuple[int, int, int]
BLOCK_OF_SECTOR = 44  # bits of a sector's number; those above are its block's


SPECIALS = frozenset(
    [
        "%laneid",
        "%warpid",
        *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
        *(f"%lanemask_{way}" for way in ("lt", "le", "eq", "ge", "gt")),
    ]
)


class Copy(NamedTuple):
    """A cp.async of several threads: who, in which of their groups, and what goes where in shared memory."""

    lanes: np.ndarray  # [n]
    groups: np.ndarray  # [n]
    index: np.ndarray  # [n] bytes
    data: np.ndarray  # [n, words]

    def part(self, which: np.ndarray) -> Copy:
        return Copy(*(x[which] for x in self))


class Copies:
    """Of a wave: those that were begun and not waited for, and how many groups every thread has committed."""

    def __init__(self, threads: int) -> None:
        self.begun: list[Copy] = []
        self.groups = np.zeros(threads, "i8")


class Specials(dict[str, np.ndarray]):
    """Special registers of a wave's threads, each made when it is first asked for."""

    def __init__(self, blocks: np.ndarray, threads: int, grid: Size, block: Size) -> None:
        super().__init__()
        self.blocks, self.threads, self.grid, self.block = blocks, threads, grid, block

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = self.make(name).astype("u4")
        return self[name]

    def make(self, name: str) -> np.ndarray:
        thread = np.arange(self.threads).reshape(1, -1)
        if name == "%warpid":
            return thread // WARP
        if name == "%laneid":
            return thread % WARP
        if name.startswith("%lanemask"):
            equal = np.int64(1) << thread % WARP
            below = {"lt": equal - 1, "le": 2 * equal - 1, "gt": 2 * equal - 1, "ge": equal - 1}
            way = name.removeprefix("%lanemask_")
            return equal if way == "eq" else 2**32 - 1 - below[way] if way[0] == "g" else below[way]
        kind, _, letter = name.partition(".")
        axis = "xyz".index(letter)
        sizes = self.grid if "cta" in kind else self.block
        if kind in ("%ntid", "%nctaid"):
            return np.full((1, 1), sizes[axis])
        before = int(np.prod(sizes[:axis], initial=1))
        number = thread if kind == "%tid" else self.blocks.reshape(-1, 1)
        return number // before % sizes[axis]


class Wave:
    """Some blocks of a launch, whose threads are one axis each, [B, T]; T is a multiple of 32.

    Attributes:
        specials: Special registers, [1 or B, 1 or T].
        spaces: Memories by name.
        live: Threads that have not returned, [B, T]; None for all.
        arch: Compute capability.
        orders: Whether the kernel has fences, so that it is of use to keep what blocks know of each other.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        grid: Size,
        block: Size,
        counts: Counts | None,
        arch: int,
        orders: bool,
    ) -> None:
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // WARP) * WARP
        self.shape = len(blocks), padded
        self.warps = self.shape[0], padded // WARP
        self.blocks, self.grid, self.block = blocks, grid, block
        self.clocks = Clocks(blocks, padded)
        self.spaces: dict[str, Any] = {}
        self.counts, self.arch, self.orders = counts, arch, orders
        self.live: np.ndarray | None = None
        if padded != threads:
            self.live = np.broadcast_to(np.arange(padded) < threads, self.shape)
        self.specials = Specials(blocks, padded, grid, block)
        self.copies = Copies(self.shape[0] * self.shape[1])
        self.touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}  # sectors and their blocks
        self.proxy_fences = np.zeros(self.shape, "i8")  # clocks of the threads' last fence.proxy.async
        self.asynchronous_reads: list[tuple[np.ndarray, np.ndarray]] = []  # places in shared memory, and flat threads

    # Threads that take part in something, None for all, are looked at one by one in flat arrays.

    def lanes(self, active: np.ndarray | None) -> Any:
        """Flat indices of those threads, to be applied to [B T]."""
        if active is None:
            return slice(None)
        return np.flatnonzero(self.whole(active))

    def whole(self, x: np.ndarray) -> np.ndarray:
        """With a value for every thread, [B, T]."""
        if x.shape == self.shape:
            return x
        result = np.empty(self.shape, x.dtype)  # which is faster than numpy's broadcast_to
        result[:] = x
        return result

    def flat(self, x: np.ndarray, lanes: Any) -> np.ndarray:
        """The values of these threads, 1-D."""
        return self.whole(x).reshape(-1)[lanes]

    def times(self, lanes: Any) -> tuple[np.ndarray, np.ndarray]:
        """Stamps of an access by each of them now, and the least stamps that no barrier lies behind: [n, 1]."""
        now, barrier = self.clocks.flat
        return now[lanes], barrier[lanes]

    def at(self, lanes: Any, number: int) -> tuple[int, int]:
        """The block (its row) and thread of one of these."""
        flat = number if isinstance(lanes, slice) else int(lanes[number])
        return divmod(flat, self.shape[1])

    def first(self, bad: np.ndarray) -> tuple[int, int]:
        """The first thread for which something holds."""
        return self.at(slice(None), int(np.argmax(self.whole(bad))))

    def place(self, site: Instruction, at: tuple[int, int]) -> str:
        """`block (0, 0, 0), thread (3, 0, 0), PTX line 12: ...`."""
        return f"block {self.block_name(int(self.blocks[at[0]]))}, thread {self.thread_name(at[1])}, {site}"

    def block_name(self, number: int) -> str:
        return _coordinates(number, self.grid)

    def thread_name(self, number: int) -> str:
        return _coordinates(number, self.block)

    def author(self, stamp: int) -> str:
        """Whose access a stamp is of."""
        stamp = int(stamp)
        who, block = stamp & WHO, stamp >> BLOCK_SHIFT
        if block == SEVERAL_BLOCKS:
            return "several blocks"
        block_name = self.block_name(block - 1)
        if who == SEVERAL_WARPS:
            return f"several warps of block {block_name}"
        if who == COPY:
            return f"a cp.async of block {block_name} that nobody has waited for"
        if who == ATOMIC:
            return f"an atomic of block {block_name}"
        if who >= SOME_OF_WARP:
            return f"threads of warp {who - SOME_OF_WARP} of block {block_name}"
        return f"thread {self.thread_name(who)} of block {block_name}"

    def barrier(self, blocks: np.ndarray | slice) -> None:
        """All threads of these blocks (rows) have waited for each other."""
        self.clocks.block_barrier(blocks)
        # Reads that products make by themselves are not over.
        for places, lanes in self.asynchronous_reads:
            self.spaces["shared"].shadow.stamp_reads(self, places, lanes)

    # Fences and what blocks tell each other by atomics

    def fence(self, active: np.ndarray | None) -> None:
        """A fence of the whole GPU by these threads."""
        if self.orders:
            self.clocks.fence(np.ones(self.shape, bool) if active is None else np.broadcast_to(active, self.shape))

    def meet(self, addresses: np.ndarray, lanes: Any) -> None:
        """Atomics of these threads at addresses of global memory, one after the other."""
        if self.orders:
            rows = np.arange(self.shape[0] * self.shape[1])[lanes] // self.shape[1]
            for address, row in dict.fromkeys(zip(addresses.tolist(), rows.tolist(), strict=True)):
                self.clocks.meet(self.spaces["global"].meetings.setdefault(address, {}), row)

    # Counts

    def count_global(
        self, kind: str, site: Instruction, base: int, address: np.ndarray, active: np.ndarray | None, width: int
    ) -> None:
        """An access at base + address; tensors begin with a sector, as a GPU's allocator has it."""
        if self.counts is None:
            return
        if address.shape[1] == 1:
            requests = self.active_warps(active)
            found = requests, requests * -(-width // 32), requests * width
        else:
            found = self._counted(sectors, address, active, width)
        name = "atomic" if kind == "atomic" else f"global_{kind}"
        for unit, value in zip(("requests", "sectors", "bytes"), found, strict=True):
            field = f"{name}_{unit}"
            setattr(self.counts, field, getattr(self.counts, field) + value)
        if kind == "load":
            line = f"{site.source[0]}:{site.source[1]}" if site.source else ""
            self.counts.load_lines[line, "requests"] += found[0]
            self.counts.load_lines[line, "sectors"] += found[1]
        if kind in self.touched:
            row = np.arange(self.shape[0], dtype="i8").reshape(-1, 1) << BLOCK_OF_SECTOR
            key = row + (address >> SECTOR.bit_length() - 1) + (base >> SECTOR.bit_length() - 1)
            key = key if active is None else key[np.broadcast_to(active, key.shape)]
            self.touched[kind].append(np.unique(key))

    def distinct(self, kind: str) -> int:
        """Sectors that blocks have loaded from, or stored to, once for every block."""
        touched = self.touched[kind]
        return len(np.unique(np.concatenate(touched))) if touched else 0

    def count_shared(self, kind: str, address: np.ndarray, active: np.ndarray | None, width: int) -> None:
        if self.counts is None:
            return
        if address.shape[1] == 1:
            found = (*(self.active_warps(active),) * 2, 0)
        else:
            found = self._counted(wavefronts, address, active, width)
        self.add_shared(kind, *found)

    def add_shared(self, kind: str, requests: int, fronts: int, conflicts: int) -> None:
        name = f"shared_{kind}"
        setattr(self.counts, f"{name}_requests", getattr(self.counts, f"{name}_requests") + requests)
        setattr(self.counts, f"{name}_wavefronts", getattr(self.counts, f"{name}_wavefronts") + fronts)
        self.counts.shared_conflicts += conflicts

    def _counted(self, count: Any, address: np.ndarray, active: np.ndarray | None, width: int) -> list[int]:
        rows = address.shape[0] if active is None else max(address.shape[0], active.shape[0])
        shape = rows, self.shape[1]
        active = None if active is None else np.broadcast_to(active, shape)
        found = count(np.broadcast_to(address, shape), active, width)
        return [value * (self.shape[0] // rows) for value in found]

    def active_threads(self, active: np.ndarray | None) -> int:
        if active is None:
            return self.shape[0] * self.shape[1]
        return int(np.count_nonzero(active)) * (self.shape[0] * self.shape[1] // active.size)

    def active_warps(self, active: np.ndarray | None) -> int:
        if active is None:
            return self.warps[0] * self.warps[1]
        return int(np.count_nonzero(self.by_warp(active)))

    def by_warp(self, active: np.ndarray) -> np.ndarray:
        """[B, W] whether any thread of a warp takes part."""
        return self.whole(active).reshape(*self.warps, WARP).any(2)


def _coordinates(number: int, sizes: Size) -> str:
    return str((number % sizes[0], number // sizes[0] % sizes[1], number // (sizes[0] * sizes[1])))
