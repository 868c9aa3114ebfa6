"""atom and red: read, change and write at once. Threads come in the order of blocks and lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floating import larger, smaller
from .loads import address_code, offset_of
from .memory import GlobalMemory
from .operations import CODES, Opcode, Operation, operation
from .parse import SIZES, Instruction, Sink
from .rounding import flush
from .wave import Wave

_CHANGE: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype),
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


def _of_halves(change: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """On two fp16 numbers in 32 bits."""

    def function(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(change(old.view("f2"), new.view("f2"))).view("u4")

    return function


def in_turn(
    view: np.ndarray, index: np.ndarray, operands: list[np.ndarray], change: Callable[..., np.ndarray]
) -> np.ndarray:
    """Applies a change to view[index], one after the other where indices are equal; gives what was there before."""
    order = np.argsort(index, kind="stable")
    places = index[order]
    first = np.concatenate([[True], places[1:] != places[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(places)), 0))
    turn = np.empty(len(index), "i8")
    turn[order] = np.arange(len(places)) - start
    old = np.zeros(len(index), view.dtype)
    for number in range(int(turn.max(initial=-1)) + 1):
        now = turn == number
        here = index[now]
        old[now] = view[here]
        view[here] = change(old[now], *(operand[now] for operand in operands))
    return old


@operation(
    "atom red",
    f"global shared shared::cta {' '.join(_CHANGE)} relaxed acquire release acq_rel gpu cta sys noftz v2 v4",
)
def _atomic(opcode: Opcode, instruction: Instruction) -> Operation | None:
    way = opcode.one_of(*_CHANGE)
    kind = opcode.type
    space = "global" if "global" in opcode else "shared" if opcode.one_of("shared", "shared::cta") else ""
    if not way or not space or kind not in CODES:
        return None
    returns = opcode.base == "atom"
    count = int(opcode.one_of("v2", "v4", default="v1")[1])
    code = CODES[kind].replace("b", "u")
    halves = kind == "f16x2"
    if (kind in ("bf16", "bf16x2", "f64") and way != "add") or kind in ("bf16", "bf16x2"):
        return None
    size = SIZES[kind]
    change = _CHANGE[way]
    if code[0] == "f" and way in ("min", "max"):
        change = smaller if way == "min" else larger
    if halves:
        change = _of_halves(change)
    flushes = kind == "f32" and space == "global"
    if flushes and way == "add":
        change = lambda old, new: flush(flush(old) + flush(new))  # noqa: E731
    address = instruction.operands[1 if returns else 0]
    offset = offset_of(address)
    wanted = returns and not isinstance(instruction.operands[0], Sink)
    operands = 2 if way == "cas" else 1
    orders = opcode.one_of("acq_rel", "acquire", "release")

    def atomic(
        wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, *values: np.ndarray
    ) -> object:
        if space == "global" and orders:
            wave.fence(active)
        results = [np.zeros(wave.shape, code) for _ in range(count)] if returns else []
        for view, index, lanes, base in _places(wave, site, active, address, space, offset, size, count):
            for i in range(count):
                given = [wave.flat(values[i + k * count], lanes).view(code) for k in range(operands)]
                part = view[i:].view(code)
                if not wanted and way == "add" and not halves:
                    np.add.at(part, index, flush(given[0]) if flushes else given[0])
                    if flushes:
                        part[index] = flush(part[index])
                else:
                    old = in_turn(part, index, given, change)
                    if returns:
                        results[i].reshape(-1)[lanes] = old
            if space == "global":
                wave.meet(base + index * size, lanes)
        if space == "global" and orders:
            wave.fence(active)
        return tuple(results) if count > 1 else results[0] if returns else None

    codes = (code,) * count if returns else ()
    return Operation(atomic, codes, (address_code(instruction, 0, space), *[code] * (count * operands)), True)


def _places(
    wave: Wave,
    site: Instruction,
    active: np.ndarray | None,
    address: np.ndarray,
    space: str,
    offset: int,
    size: int,
    count: int,
) -> list[tuple[np.ndarray, np.ndarray, object, int]]:
    """Checked: memory in units of `size`, indices into it (1-D), their lanes, and the memory's first address."""
    memory = wave.spaces[space]
    shift = size.bit_length() - 1
    found = []
    if isinstance(memory, GlobalMemory):
        for region, at, who in memory.parts(wave, site, active, address, offset, size * count):
            wave.count_global("atomic", site, region.base, at, who, size * count)
            lanes = wave.lanes(who)
            index = wave.flat(at, lanes) >> shift
            if memory.check:
                for i in range(count):
                    memory.check_atomic(wave, site, region, index + i, lanes, size)
            found.append((region.views[f"u{size}"], index, lanes, region.base))
        return found
    located = memory.locate(wave, site, active, address, offset, size * count, size * count)
    if located is None:
        return []
    at, who = located
    wave.count_shared("store", at, who, size * count)
    lanes = wave.lanes(who)
    index = wave.flat(at + memory.block, lanes) >> shift
    if memory.check:
        for i in range(count):
            memory.check_atomic(wave, site, index + i, lanes, size)
    return [(memory.views[f"u{size}"], index, lanes, 0)]


@operation("membar", "gl cta sys")
def _membar(opcode: Opcode, _: Instruction) -> Operation:
    return Operation(_fence("cta" not in opcode), (), (), True)


@operation("fence", "acq_rel sc acquire release gpu cta sys proxy async shared::cta global")
def _fence_of(opcode: Opcode, _: Instruction) -> Operation:
    if "proxy" in opcode:
        return Operation(_proxy_fence, (), (), True)
    return Operation(_fence("cta" not in opcode), (), (), True)


def _proxy_fence(wave: Wave, site: Instruction, active: np.ndarray | None) -> None:
    """Makes what threads wrote visible to what reads by itself."""
    clocks = np.repeat(wave.clocks.clock, 32, axis=1)
    wave.proxy_fences = clocks if active is None else np.where(active, clocks, wave.proxy_fences)


def _fence(of_gpu: bool) -> Callable[..., None]:
    def fence(wave: Wave, site: Instruction, active: np.ndarray | None) -> None:
        if of_gpu:
            wave.fence(active)

    return fence
