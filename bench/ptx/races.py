"""Who wrote and read every place of a memory last, and whether two accesses are ordered.

Time is kept by clocks, one a warp: `bar.warp.sync` moves the warp's own, a barrier of the block moves all of its warps'
beyond all they were. An access is before another if it was the same thread's, if a barrier of the block lies between
them, or `bar.warp.sync` of a warp that both belong to; and between blocks through a fence, an atomic of the one and an
atomic of the other that reads what that wrote, and a fence again. That the threads of a warp run in step orders
nothing: PTX does not promise it, and what Triton and nvcc generate does not build upon it.

A stamp is a number: block + 1, the clock, and who, which may be one thread, or several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Race

if TYPE_CHECKING:
    from .parse import Instruction
    from .wave import Wave

BLOCK_SHIFT, CLOCK_SHIFT = 32, 11
WHO = (1 << CLOCK_SHIFT) - 1
CLOCKS = 1 << (BLOCK_SHIFT - CLOCK_SHIFT)
SOME_OF_WARP = 1024  # + the warp: several threads of it
COPY, ATOMIC, SEVERAL_WARPS = WHO - 2, WHO - 1, WHO
SEVERAL_BLOCKS = (1 << 31) - 1


def who_of(stamps: np.ndarray) -> np.ndarray:
    return stamps & WHO


def clock_of(stamps: np.ndarray) -> np.ndarray:
    return stamps >> CLOCK_SHIFT & CLOCKS - 1


def block_of(stamps: np.ndarray) -> np.ndarray:
    return (stamps >> BLOCK_SHIFT) - 1


class Clocks:
    """The time of a wave's threads.

    Attributes:
        now: [B, T] stamps of an access of every thread at this time.
        barrier: [B, T] the least stamp of its block that no barrier lies behind.
    """

    def __init__(self, blocks: np.ndarray, threads: int) -> None:
        self.blocks = blocks.astype("i8").reshape(-1, 1)
        self.clock = np.ones((len(blocks), threads // 32), "i8")
        self.last_barrier = np.ones((len(blocks), 1), "i8")
        self.threads = np.arange(threads, dtype="i8").reshape(1, -1)
        self.fenced: dict[int, np.ndarray] = {}  # block -> clocks of its threads up to which fences lie behind
        self.met: dict[int, Knowledge] = {}  # block -> what the atomics that it read from know, before its next fence
        self.seen: dict[int, Knowledge] = {}  # block -> what it knows
        self.update()

    def update(self) -> None:
        if self.clock.max() >= CLOCKS:
            raise OverflowError("bench.ptx: a block has more barriers than the clocks of its races can count")
        first = self.blocks + 1 << BLOCK_SHIFT
        clocks = np.repeat(self.clock, 32, axis=1)
        self.now = first | clocks << CLOCK_SHIFT | self.threads
        self.barrier = np.broadcast_to(first | self.last_barrier << CLOCK_SHIFT, self.now.shape)
        self.flat = self.now.reshape(-1, 1), self.barrier.reshape(-1, 1)

    def block_barrier(self, blocks: np.ndarray | slice) -> None:
        """All threads of these blocks (rows) waited for each other."""
        following = self.clock[blocks].max(axis=1, keepdims=True) + 1
        self.clock[blocks] = following
        self.last_barrier[blocks] = following
        self.update()

    def warp_barrier(self, warps: np.ndarray | slice) -> None:
        """All threads of these warps did; [B, W]."""
        self.clock[warps] += 1
        self.update()

    def fence(self, here: np.ndarray) -> None:
        """A fence of the GPU by the threads `here`, [B, T]."""
        for row in np.flatnonzero(here.any(1)):
            block = int(self.blocks[row, 0])
            fenced = self.fenced.setdefault(block, np.zeros(here.shape[1], "i8"))
            np.maximum(fenced, self.last_barrier[row] - 1, out=fenced)
            own = here[row]
            fenced[own] = np.repeat(self.clock[row], 32)[own]
            _learn(self.seen.setdefault(block, {}), self.met.pop(block, {}))

    def meet(self, place: Knowledge, row: int) -> None:
        """An atomic of a block (its row) at a place in global memory: it leaves there what it knows, and learns."""
        block = int(self.blocks[row, 0])
        if block in self.fenced:
            _learn(place, {block: self.fenced[block].copy()})
        _learn(place, self.seen.get(block, {}))
        _learn(self.met.setdefault(block, {}), place)

    def knows(self, now: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """Whether accesses of other blocks are before those of now, by their stamps."""
        found = np.zeros(len(now), bool)
        for i, (block, other, who, clock) in enumerate(
            zip(block_of(now), block_of(earlier), who_of(earlier), clock_of(earlier), strict=True)
        ):
            clocks = self.seen.get(int(block), {}).get(int(other))
            if clocks is not None:
                first, last = (who, who + 1) if who < SOME_OF_WARP else (0, len(clocks))
                if SOME_OF_WARP <= who < COPY:
                    first, last = 32 * (who - SOME_OF_WARP), 32 * (who - SOME_OF_WARP + 1)
                found[i] = clocks[first:last].min() >= clock
        return found


Knowledge = dict[int, np.ndarray]  # block -> clocks of its threads: accesses until then are before what comes now


def _learn(knowledge: Knowledge, other: Knowledge) -> None:
    for block, clocks in other.items():
        known = knowledge.get(block)
        knowledge[block] = clocks if known is None else np.maximum(known, clocks)


class Shadow:
    """Stamps of the last write and the last read of every place, 0 for never.

    In all of the methods `here` are places, [n, places of an access], beside the lanes of the n threads that access.

    Args:
        name: What to call a place in a message.
        shared: Whether only threads of one block ever come to a place.
    """

    def __init__(self, places: int, name: Callable[[int], str], shared: bool = False) -> None:
        self.writes = np.zeros(places, "i8")
        self.reads = np.zeros(places, "i8")
        self.name, self.shared = name, shared

    def read(self, wave: Wave, site: Instruction, here: np.ndarray, lanes: Any) -> np.ndarray:
        """Checks and remembers reads; gives the stamps of who wrote."""
        earlier = self.writes[here]
        self.check(wave, site, here, lanes, earlier, "reads what", "wrote")
        self.stamp_reads(wave, here, lanes)
        return earlier

    def write(self, wave: Wave, site: Instruction, here: np.ndarray, lanes: Any, like: np.ndarray) -> None:
        """The same of writes; where the value is `like` what is there, another thread may have written it."""
        self.check(wave, site, here, lanes, self.writes[here], "writes over what", "wrote", like)
        self.check(wave, site, here, lanes, self.reads[here], "writes over what", "read")
        self.writes[here] = wave.times(lanes)[0]

    def atomic(self, wave: Wave, site: Instruction, here: np.ndarray, lanes: Any) -> None:
        """The same of atomics, which are ordered among themselves, not with plain accesses."""
        earlier = self.writes[here]
        atomics = who_of(earlier) == ATOMIC
        self.check(wave, site, here, lanes, earlier, "adds to what", "wrote", atomics)
        self.check(wave, site, here, lanes, self.reads[here], "adds to what", "read")
        stamps = wave.times(lanes)[0] & ~WHO | ATOMIC
        foreign = atomics & (block_of(earlier) != block_of(stamps))
        self.writes[here] = np.where(foreign, SEVERAL_BLOCKS << BLOCK_SHIFT | stamps & (1 << BLOCK_SHIFT) - 1, stamps)

    def check(
        self,
        wave: Wave,
        site: Instruction,
        here: np.ndarray,
        lanes: Any,
        earlier: np.ndarray,
        does: str,
        did: str,
        harmless: np.ndarray | None = None,
    ) -> None:
        """Raises Race where accesses with these stamps are not before those of now, but for the harmless ones."""
        late = self.recent(wave, earlier, lanes)
        if not np.count_nonzero(late):
            return
        rows, columns = np.nonzero(late)
        late[rows, columns] = ~_ordered(earlier[rows, columns], wave.times(lanes)[0][rows, 0], wave.clocks)
        if harmless is not None:
            late &= ~harmless
        if np.count_nonzero(late):
            row, column = np.unravel_index(np.argmax(late), late.shape)
            what = f"a thread {does} {wave.author(earlier[row, column])} {did}, with nothing to order them"
            raise Race(f"{what}: {self.name(int(here[row, column]))}; {wave.place(site, wave.at(lanes, int(row)))}")

    def recent(self, wave: Wave, stamps: np.ndarray, lanes: Any) -> np.ndarray:
        """Which accesses no barrier of the block lies behind."""
        barrier = wave.times(lanes)[1]
        late = stamps >= barrier
        if not self.shared:
            late |= (stamps >> BLOCK_SHIFT != barrier >> BLOCK_SHIFT) & (stamps != 0)
        return late

    def stamp_reads(self, wave: Wave, here: np.ndarray, lanes: Any) -> None:
        """Remembers reads; where several threads read, that they were several."""
        now = wave.times(lanes)[0]
        earlier = self.reads[here]
        # A read before the block's last barrier need not be kept: what would race with it races with this one too.
        kept = self.recent(wave, earlier, lanes)
        stamps = np.where(kept, joined(earlier, now), now) if np.count_nonzero(kept) else now
        self.reads[here] = stamps
        back = self.reads[here]
        other = back != stamps
        if np.count_nonzero(other):
            np.maximum.at(self.reads, here[other], joined(back, stamps)[other])


def _ordered(earlier: np.ndarray, now: np.ndarray, clocks: Clocks) -> np.ndarray:
    """Which of the accesses with the earlier stamps are before those of now, although no barrier is between them."""
    who, thread = who_of(earlier), who_of(now)
    same_warp = _warp_of(who) == thread >> 5
    same_warp &= who < COPY
    ordered = (who == thread) | same_warp & (clock_of(earlier) < clock_of(now))
    other = block_of(earlier) != block_of(now)
    if np.count_nonzero(other):
        ordered[other] = clocks.knows(now[other], earlier[other])
    return ordered


def _warp_of(who: np.ndarray) -> np.ndarray:
    return np.where(who < SOME_OF_WARP, who >> 5, who - SOME_OF_WARP)


def places_of(index: np.ndarray, size: int, grain: int) -> np.ndarray:
    """Places of `grain` bytes that accesses of `size` bytes at bytes `index`, [n], touch: [n, places]."""
    first = index // grain if grain > 1 else index
    return first[:, None] + np.arange(max(size // grain, 1))


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether two threads may write these values (unsigned integers) to one place: if they are equal, or both NaN.

    (Hardware gives NaN the same bits whatever it came from, which a processor does not.)
    """
    equal = a == b
    size = a.dtype.itemsize
    if size == 1 or np.count_nonzero(equal) == equal.size:
        return equal
    return equal | np.isnan(a.view(f"f{size}")) & np.isnan(b.view(f"f{size}"))


def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The stamps of both accesses."""
    who_a, who_b = who_of(a), who_of(b)
    warp_a = _warp_of(who_a)
    one_warp = (warp_a == _warp_of(who_b)) & (who_a < COPY) & (who_b < COPY)
    who = np.where(who_a == who_b, who_a, np.where(one_warp, SOME_OF_WARP + warp_a, SEVERAL_WARPS))
    one_block = a >> BLOCK_SHIFT == b >> BLOCK_SHIFT
    block = np.where(one_block, a >> BLOCK_SHIFT, SEVERAL_BLOCKS)
    clock = np.maximum(clock_of(a), clock_of(b))
    return block << BLOCK_SHIFT | clock << CLOCK_SHIFT | np.where(one_block, who, SEVERAL_WARPS)
