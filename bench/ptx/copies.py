"""cp.async: copies from global to shared memory that threads wait for later.

What is copied is read when the copy is issued, and is in shared memory when its thread has waited for it; until then
nobody may touch the place, as a barrier must lie between the wait and what other threads read.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .loads import offset_of
from .operations import Opcode, Operation, operation
from .parse import Immediate, Instruction
from .races import CLOCK_SHIFT, CLOCKS, COPY, WHO, places_of
from .wave import Copy, Wave


@operation("cp", "async ca cg shared shared::cta global commit_group wait_group wait_all L2::64B L2::128B L2::256B")
def _copy(opcode: Opcode, instruction: Instruction) -> Operation | None:
    if opcode.words[0] != "async":
        return None
    if opcode.words[1:] == ("commit_group",):
        return Operation(_commit, (), (), True)
    if opcode.words[1:] == ("wait_all",):
        return Operation(lambda wave, site, active: _wait(wave, active, None), (), (), True)
    if opcode.words[1:] == ("wait_group",):
        left = instruction.operands[0].value
        return Operation(lambda wave, site, active: _wait(wave, active, left), (), (), True)
    to, source, size, *given = instruction.operands
    if not opcode.one_of("ca", "cg") or "global" not in opcode or not isinstance(size, Immediate):
        return None
    offsets, size = (offset_of(to), offset_of(source)), size.value

    def copy(
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        to: np.ndarray,
        source: np.ndarray,
        _: np.ndarray,
        given: np.ndarray | None = None,
    ) -> None:
        word = min(size, 4)
        reads = active
        if given is not None:  # how many bytes there are; the rest is zeros
            if np.isin(given, (0, size), invert=True).any():
                raise Fault(f"copies of a part of their size are not supported; {site}")
            reads = (given != 0) if active is None else (given != 0) & active
        memory = wave.spaces["shared"]
        located = memory.locate(wave, site, active, to, offsets[0], size, size)
        if located is None:
            return
        to, who = located
        values = wave.spaces["global"].load(wave, site, reads, source, offsets[1], word, size // word)
        if reads is not None:
            values = tuple(np.where(reads, value, value.dtype.type(0)) for value in values)
        wave.count_shared("store", to, who, size)
        lanes = wave.lanes(who)
        index = wave.flat(to + memory.block, lanes)
        data = np.stack([wave.flat(value, lanes) for value in values], axis=1)
        if memory.check:
            here = places_of(index, size, memory.grain)
            memory.shadow.write(wave, site, here, lanes, np.zeros(here.shape, bool))
            memory.shadow.writes[here] = wave.times(lanes)[0] & ~WHO | (CLOCKS - 1 << CLOCK_SHIFT) | COPY
        lanes = np.arange(wave.shape[0] * wave.shape[1])[lanes]
        wave.copies.begun.append(Copy(lanes, wave.copies.groups[lanes], index, data))

    return Operation(copy, (), ("u4", "u8", "u4", *["u4"] * len(given)), True)


def _commit(wave: Wave, site: Instruction, active: np.ndarray | None) -> None:
    wave.copies.groups[wave.lanes(active)] += 1


def _wait(wave: Wave, active: np.ndarray | None, left: int | None) -> None:
    """Ends the copies of these threads, but for their last `left` groups; None: of all, whether in a group or not."""
    memory = wave.spaces["shared"]
    here = np.zeros(wave.shape[0] * wave.shape[1], bool)
    here[wave.lanes(active)] = True
    rest = []
    for copy in wave.copies.begun:
        done = here[copy.lanes]
        if left is not None:
            done &= copy.groups < wave.copies.groups[copy.lanes] - left
        ended, others = copy.part(done), copy.part(~done)
        if len(ended.lanes):
            size = ended.data.dtype.itemsize
            view = memory.views[f"u{size}"]
            view[ended.index[:, None] // size + np.arange(ended.data.shape[1])] = ended.data
            if memory.check:
                places = places_of(ended.index, size * ended.data.shape[1], memory.grain)
                memory.shadow.writes[places] = wave.times(ended.lanes)[0]
        if len(others.lanes):
            rest.append(others)
    wave.copies.begun = rest
