"""Runs a kernel's blocks: the threads of several at once, those with the lowest place in the program first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from .compile import Code
from .counts import WARP, Counts
from .faults import BarrierFault, Fault, Runaway
from .flow import Block
from .memory import GlobalMemory, regions_of
from .parse import Entry, Immediate, parse_module
from .shared import LocalMemory, ParameterMemory, SharedMemory
from .wave import Size, Wave

THREADS_AT_ONCE = 8192
MOST_STEPS = 10_000_000  # basic blocks that a wave may enter


class Program:
    """A PTX module.

    Attributes:
        entries: Its kernels by name.
    """

    def __init__(self, ptx: str) -> None:
        self.entries: dict[str, Entry] = parse_module(ptx)
        self._codes: dict[str, Code] = {}

    def code(self, entry: str) -> Code:
        """What a kernel was made into.

        Raises:
            UnknownOpcode: It has an instruction that the machine does not know.
        """
        if entry not in self._codes:
            if entry not in self.entries:
                raise ValueError(f"bench.ptx: entry must be one of {sorted(self.entries)}, got {entry!r}")
            self._codes[entry] = Code(self.entries[entry])
        return self._codes[entry]

    def launch(
        self,
        entry: str,
        *,
        grid: Size,
        block: Size,
        params: bytes,
        tensors: dict[str, Tensor],
        shared: int = 0,
        arch: int = 80,
        blocks: Sequence[int] | None = None,
        check: bool = True,
        count: bool = True,
        uninitialized: Iterable[str] = (),
        threads_at_once: int = THREADS_AT_ONCE,
        most_steps: int = MOST_STEPS,
    ) -> Counts:
        """Runs a kernel, and says what it did.

        Args:
            entry: The kernel's name.
            grid, block: Sizes along x, y and z.
            params: Arguments as `entries[entry].parameters` lays them out; pointers are addresses of `tensors`.
            tensors: What the kernel may touch, by name, on the CPU; it finds and leaves its numbers there.
            shared: Bytes of shared memory that the launch adds, for `extern` variables.
            arch: Compute capability, as 80: the rounding of tensor cores depends on it.
            blocks: Numbers of the blocks to run, x running fastest; default all.
            check: Look for races and for reads of what nobody wrote; ranges and alignment are always checked.
            count: Fill `Counts`; without it only `blocks` is.
            uninitialized: Names of tensors that hold nothing before the launch.
            threads_at_once: How many threads to run together, at least a block.
            most_steps: How many basic blocks these may enter.

        Raises:
            Fault: The kernel did what it must not.
        """
        code = self.code(entry)
        if len(params) < code.entry.parameter_bytes:
            raise ValueError(
                f"bench.ptx: params must have {code.entry.parameter_bytes} bytes (because {entry} takes them), "
                f"got {len(params)}"
            )
        regions = regions_of(tensors, set(uninitialized))
        memory = GlobalMemory(regions, check)
        if check:
            memory.track(code.flow.written_through, bytes(params))
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if blocks is None else np.asarray(blocks, "i8")
        together = max(threads_at_once // (block[0] * block[1] * block[2]), 1)
        counts = Counts(blocks=len(numbers))
        for first in range(0, len(numbers), together):
            wave = Wave(
                numbers[first : first + together],
                grid,
                block,
                counts if count else None,
                arch,
                code.flow.fences and check,
            )
            size = max(code.entry.static_bytes("shared"), 0) + shared
            wave.spaces = {
                "global": memory,
                "shared": SharedMemory(wave.shape[0], size, code.flow.grain, check),
                "local": LocalMemory(wave.shape[0] * wave.shape[1], code.entry.static_bytes("local")),
                "param": ParameterMemory(bytes(params)),
            }
            with np.errstate(all="ignore"):
                _Run(code, wave, most_steps).run()
        return counts


class _Run:
    """One wave's way through a kernel.

    Threads are in groups: those of one place in the program, as a mask [1 or B, 1 or T], None for all of the wave.
    """

    def __init__(self, code: Code, wave: Wave, most_steps: int) -> None:
        self.code, self.wave, self.left = code, wave, most_steps
        self.registers: list[np.ndarray | None] = [None] * len(code.entry.body.registers)
        nobody = np.zeros((1, 1), bool)
        self.defined = dict.fromkeys(code.flow.doubtful, nobody)
        self.groups: dict[int, np.ndarray | None] = {0: wave.live}
        self.waiting: dict[int, list[tuple[int, np.ndarray, int]]] = {}  # barrier -> where behind it, who, how many
        self.entered: Counter[int] = Counter()  # block -> threads
        self.issued: Counter[int] = Counter()  # block -> warps
        self.measured: tuple[np.ndarray | None, tuple[int, int]] = None, (0, 0)

    def run(self) -> None:
        wave, blocks = self.wave, self.code.flow.blocks
        if wave.live is not None and not wave.live.any():
            return
        while self.groups:
            number = min(self.groups)
            active = self.groups.pop(number)
            alone = not self.groups and not self.waiting
            self.left -= 1
            if self.left < 0:
                at = blocks[number].body[0] if blocks[number].body else blocks[number].last
                raise Runaway(f"more steps than a launch may take; {at}")
            if wave.counts is not None:
                threads, warps = self.size(active)
                self.entered[number] += threads
                self.issued[number] += warps
            function = self.code.function(number)
            predicate = function(wave, self.registers, self.defined, None if alone else active, active)
            self.leave(blocks[number], active, predicate)
        if self.waiting:
            self.stuck()
        self.count()

    def size(self, active: np.ndarray | None) -> tuple[int, int]:
        """How many threads and warps these are."""
        if self.measured[0] is not active or active is None:
            self.measured = active, (self.wave.active_threads(active), self.wave.active_warps(active))
        return self.measured[1]

    def go(self, number: int, active: np.ndarray | None) -> None:
        """Has threads continue there."""
        if number in self.groups:
            other = self.groups[number]
            active = other | active
            if self.alone(active):
                active = self.wave.live
        self.groups[number] = active

    def alone(self, active: np.ndarray) -> bool:
        """Whether these are all that live."""
        live = self.wave.live
        active = active if live is None else active & live
        return self.everyone(active, np.count_nonzero(active), live)

    def leave(self, block: Block, active: np.ndarray | None, predicate: np.ndarray | None) -> None:
        if block.end == "jump":
            self.go(block.target, active)
        elif block.end == "branch":
            self.branch(block, active, predicate)
        elif block.end == "exit":
            self.exit(block, active, predicate)
        else:
            self.barrier(block, active, predicate)

    def branch(self, block: Block, active: np.ndarray | None, predicate: np.ndarray) -> None:
        taken = predicate if active is None else predicate & active
        count = np.count_nonzero(taken)
        if count == 0:
            self.go(block.next, active)
        elif self.everyone(taken, count, active):
            self.go(block.target, active)
        else:
            rest = ~predicate if active is None else ~predicate & active
            if self.wave.counts is not None:
                both = self.wave.by_warp(taken) & self.wave.by_warp(rest)
                self.wave.counts.divergent_branches += int(np.count_nonzero(both))
            self.go(block.target, taken)
            self.go(block.next, rest)

    def everyone(self, some: np.ndarray, count: int, active: np.ndarray | None) -> bool:
        """Whether `some` of the active threads, `count` in an array of that shape, are all of them."""
        if active is None:
            return count == some.size
        return count * active.size == np.count_nonzero(active) * some.size

    def exit(self, block: Block, active: np.ndarray | None, predicate: np.ndarray | None) -> None:
        wave = self.wave
        gone = np.ones((1, 1), bool) if active is None else active
        if predicate is not None:
            rest = gone & ~predicate
            gone = gone & predicate
            if rest.any():
                self.go(block.next, rest)
        live = ~gone if wave.live is None else wave.live & ~gone
        wave.live = np.broadcast_to(live, wave.shape)
        self.release()

    def barrier(self, block: Block, active: np.ndarray | None, predicate: np.ndarray | None) -> None:
        wave, site = self.wave, block.last
        words = site.opcode.split(".")
        numbers = [operand.value for operand in site.operands if isinstance(operand, Immediate)]
        if predicate is not None or len(numbers) != len(site.operands) or {"red", "arrive"} & set(words):
            raise Fault(f"a barrier of this form is not supported; {site}")
        which, count = numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0
        if wave.counts is not None:
            wave.counts.barriers += wave.active_warps(active)
        if active is None or (not count and not self.groups and not self.waiting):
            wave.barrier(slice(None))
            self.go(block.next, active)
            return
        active = np.broadcast_to(active, wave.shape)
        self.whole_warps(active, block)
        self.waiting.setdefault(which, []).append((block.next, active, count))
        self.release()

    def whole_warps(self, active: np.ndarray, block: Block) -> None:
        """Raises BarrierFault where some of a warp's threads come to a barrier that others do not come to."""
        wave = self.wave
        if (
            "sync" in block.last.opcode
            and block.last.opcode.startswith("barrier")
            and "aligned" not in block.last.opcode
        ):
            return
        live = np.ones(wave.shape, bool) if wave.live is None else wave.live
        rows = (*wave.warps, WARP)
        here = active.reshape(rows).any(2, keepdims=True)
        missing = here & live.reshape(rows) & ~active.reshape(rows)
        if missing.any():
            at = wave.first(missing.reshape(wave.shape))
            raise BarrierFault(
                f"a thread does not come to a barrier that others of its warp wait at; {wave.place(block.last, at)}"
            )

    def release(self) -> None:
        """Lets blocks go on of which all threads that live wait."""
        wave = self.wave
        for which, groups in list(self.waiting.items()):
            arrived = np.logical_or.reduce([mask for _, mask, _ in groups])
            count = groups[0][2]
            live = np.ones(wave.shape, bool) if wave.live is None else wave.live
            if count:
                free = np.count_nonzero(arrived, axis=1) >= count
            else:
                free = (arrived == live).all(1) & arrived.any(1)
            if not free.any():
                continue
            if count:
                # A barrier of some warps orders those alone, which clocks do not tell; it is taken for one of them all.
                free &= arrived.any(1)
            wave.barrier(free)
            column = free.reshape(-1, 1)
            rest = []
            for number, mask, wanted in groups:
                if (mask & column).any():
                    self.go(number, mask & column)
                if (mask & ~column).any():
                    rest.append((number, mask & ~column, wanted))
            if rest:
                self.waiting[which] = rest
            else:
                del self.waiting[which]

    def stuck(self) -> None:
        which, groups = next(iter(self.waiting.items()))
        number, mask, _ = groups[0]
        site = self.code.flow.blocks[number - 1].last
        raise BarrierFault(f"threads wait for ever at barrier {which}; {self.wave.place(site, self.wave.first(mask))}")

    def count(self) -> None:
        counts = self.wave.counts
        if counts is None:
            return
        counts.global_load_distinct += self.wave.distinct("load")
        counts.global_store_distinct += self.wave.distinct("store")
        for number, threads in self.entered.items():
            opcodes = self.code.flow.blocks[number].opcodes
            size = sum(opcodes.values())
            counts.thread_instructions += threads * size
            counts.warp_instructions += self.issued[number] * size
            for name, times in opcodes.items():
                counts.opcodes[name] += times * self.issued[number]
