"""Instructions in which the threads of a warp look at each other: shfl, vote, redux, bar.warp.sync."""

from __future__ import annotations

import numpy as np

from .counts import WARP
from .faults import BarrierFault, Uninitialized
from .operations import CODES, Opcode, Operation, operation
from .parse import Immediate, Instruction, Pair
from .wave import Wave

_LANE = np.arange(WARP, dtype="i8")
_BIT = np.uint32(1) << np.arange(WARP, dtype="u4")


def members(wave: Wave, site: Instruction, active: np.ndarray | None, mask: np.ndarray) -> None:
    """Checks that the threads of a membermask are those that are here, but for what has returned.

    Raises:
        BarrierFault: A thread executes the instruction that the mask does not name, or one that it names does not.
    """
    if mask.size == 1 and active is None and int(mask.reshape(-1)[0]) == 2**32 - 1:
        return
    rows = (*wave.warps, WARP)
    here = np.ones(rows, bool) if active is None else np.broadcast_to(active, wave.shape).reshape(rows)
    live = np.ones(rows, bool) if wave.live is None else wave.live.reshape(rows)
    named = np.broadcast_to(mask, wave.shape).reshape(rows) & _BIT != 0
    if (here & ~named).any():
        at = wave.first((here & ~named).reshape(wave.shape))
        raise BarrierFault(f"a thread is not in its own membermask; {wave.place(site, at)}")
    missing = here.any(2, keepdims=True) & named & live & ~here
    if missing.any():
        at = wave.first(missing.reshape(wave.shape))
        raise BarrierFault(f"the membermask names a thread that is elsewhere; {wave.place(site, at)}")


def shuffle_lanes(way: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which lane each of [..., 32] reads, and whether that is in range (else it reads itself)."""
    clamp, segment = c & 31, c >> 8 & 31
    first = _LANE & segment
    limit = first | clamp & ~segment
    if way == "up":
        source, inside = _LANE - b, _LANE - b >= limit
    elif way == "down":
        source, inside = _LANE + b, _LANE + b <= limit
    elif way == "bfly":
        source, inside = _LANE ^ b, (_LANE ^ b) <= limit
    else:
        source = first | b & ~segment
        inside = source <= limit
    return np.where(inside, source, _LANE), np.broadcast_to(inside, np.broadcast_shapes(inside.shape, source.shape))


@operation("shfl", "sync up down bfly idx", types=("b32",))
def _shuffle(opcode: Opcode, instruction: Instruction) -> Operation | None:
    way = opcode.one_of("up", "down", "bfly", "idx")
    if "sync" not in opcode or not way:
        return None
    both = isinstance(instruction.operands[0], Pair)
    b, c = instruction.operands[2:4]
    fixed = None
    if isinstance(b, Immediate) and isinstance(c, Immediate):
        fixed = shuffle_lanes(way, np.int64(b.value & 31), np.int64(c.value))

    def shuffle(
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        a: np.ndarray,
        b: np.ndarray,
        c: np.ndarray,
        mask: np.ndarray,
    ) -> object:
        members(wave, site, active, mask)
        rows = a.shape[0], -1, WARP
        if fixed is not None:
            source, inside = fixed
            result = a if a.shape[1] == 1 else a.reshape(rows)[..., source].reshape(a.shape)
            inside = np.tile(inside, wave.warps[1]).reshape(1, -1)
            source = np.broadcast_to(source, (1, wave.warps[1], WARP))
        else:
            lanes = np.broadcast_shapes(b.shape, c.shape, (1, wave.shape[1]))
            count, bounds = (np.broadcast_to(x, lanes).reshape(lanes[0], -1, WARP).astype("i8") for x in (b & 31, c))
            source, inside = shuffle_lanes(way, count, bounds)
            blocks = max(a.shape[0], lanes[0])
            whole = np.broadcast_to(a, (blocks, wave.shape[1])).reshape(blocks, -1, WARP)
            result = np.take_along_axis(whole, np.broadcast_to(source, whole.shape), 2).reshape(blocks, -1)
            inside = inside.reshape(lanes[0], -1)
        if active is not None:
            here = np.broadcast_to(active, wave.shape).reshape(*wave.warps, WARP)
            there = np.take_along_axis(here, np.broadcast_to(source, here.shape), 2)
            if (here & ~there).any():
                at = wave.first((here & ~there).reshape(wave.shape))
                raise Uninitialized(f"the lane that is read takes no part; {wave.place(site, at)}")
        return (result, inside) if both else result

    return Operation(shuffle, ("u4", "?")[: 1 + both], ("u4",) * 4, True, spreads="first")


def ballots(wave: Wave, active: np.ndarray | None, p: np.ndarray) -> np.ndarray:
    """[B, W, 1]: a bit for every thread that takes part and has p."""
    there = p if active is None else p & active
    rows = np.broadcast_to(there, wave.shape).reshape(*wave.warps, WARP)
    return (rows * _BIT).sum(2, keepdims=True, dtype="u4")


def to_threads(wave: Wave, x: np.ndarray) -> np.ndarray:
    """[B, W, 1] -> [B, T]."""
    return np.repeat(x[..., 0], WARP, axis=1)


@operation("vote", "sync all any uni ballot", types=("pred", "b32"))
def _vote(opcode: Opcode, _: Instruction) -> Operation | None:
    way = opcode.one_of("all", "any", "uni", "ballot")
    if "sync" not in opcode or not way:
        return None

    def vote(wave: Wave, site: Instruction, active: np.ndarray | None, p: np.ndarray, mask: np.ndarray) -> np.ndarray:
        members(wave, site, active, mask)
        true = ballots(wave, active, p)
        every = ballots(wave, active, np.ones((1, 1), bool))
        found = {"all": true == every, "any": true != 0, "uni": (true == every) | (true == 0), "ballot": true}[way]
        return to_threads(wave, found)

    return Operation(vote, ("u4" if way == "ballot" else "?",), ("?", "u4"), True)


@operation("activemask", types=("b32",))
def _active(_: Opcode, __: Instruction) -> Operation:
    return Operation(
        lambda wave, site, active: to_threads(wave, ballots(wave, active, np.ones((1, 1), bool))), ("u4",), (), True
    )


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@operation("redux", f"sync {' '.join(_REDUCE)}", types=("s32", "u32", "b32"))
def _reduce(opcode: Opcode, _: Instruction) -> Operation | None:
    way = opcode.one_of(*_REDUCE)
    if "sync" not in opcode or not way:
        return None
    code = CODES[opcode.type].replace("b", "u")
    limits = np.iinfo(code)
    neutral = {"min": limits.max, "max": limits.min, "and": -1 if code[0] == "i" else limits.max}.get(way, 0)

    def reduce(wave: Wave, site: Instruction, active: np.ndarray | None, a: np.ndarray, mask: np.ndarray) -> np.ndarray:
        members(wave, site, active, mask)
        values = a if active is None else np.where(active, a, a.dtype.type(neutral))
        rows = np.broadcast_to(values, wave.shape).reshape(*wave.warps, WARP)
        return to_threads(wave, _REDUCE[way].reduce(rows, axis=2, keepdims=True, dtype=code))

    return Operation(reduce, (code,), (code, "u4"), True)


@operation("bar", "warp sync")
def _warp_barrier(opcode: Opcode, _: Instruction) -> Operation | None:
    if opcode.words != ("warp", "sync"):
        return None

    def wait(wave: Wave, site: Instruction, active: np.ndarray | None, mask: np.ndarray) -> None:
        members(wave, site, active, mask)
        if active is None:
            whole = mask.size == 1 and int(mask.reshape(-1)[0]) == 2**32 - 1
            if whole:
                wave.clocks.warp_barrier(slice(None))
                return
        # Only a barrier of all of a warp's living threads moves its clock: those of some order too little to be kept.
        named = np.broadcast_to(mask, wave.shape).reshape(*wave.warps, WARP) & _BIT != 0
        live = np.ones(named.shape, bool) if wave.live is None else wave.live.reshape(named.shape)
        here = (
            np.ones(named.shape, bool) if active is None else np.broadcast_to(active, wave.shape).reshape(named.shape)
        )
        wave.clocks.warp_barrier((named & here | ~live).all(2))

    return Operation(wait, (), ("u4",), True)
