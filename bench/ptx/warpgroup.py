"""wgmma: products of matrices by four warps, which read shared memory by themselves while the threads go on.

A product's numbers are worked out when it is issued. What its being asynchronous asks of a kernel is checked: that
what threads wrote to shared memory was made visible by `fence.proxy.async`; that nobody writes over it before a
`wgmma.wait_group` and a barrier; and, before the kernel runs, that its registers are left alone in between
(`check_registers`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from .conversions import single_of_bfloat16
from .counts import WARP
from .faults import Fault, Race
from .operations import Opcode, Operation, operation
from .parse import Immediate, Instruction, Register, Vector
from .races import clock_of, places_of, who_of
from .tensor_cores import accumulator, adder_of, by_warp, fragment, multiply, numbers, tf32, whole_warps
from .wave import Wave

if TYPE_CHECKING:
    from .flow import Flow

GROUP = 4 * WARP
_ROWS = {"tf32": 8, "f16": 16, "bf16": 16}  # K of one product: 32 bytes
_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


def addresses(descriptor: np.ndarray, outer: int, kind: str, transposed: bool, site: Instruction) -> np.ndarray:
    """Where the numbers of an operand lie, by its descriptor.

    Args:
        descriptor: [...] 64 bits: address, leading and stride offsets (in 16 bytes, from bits 0, 16 and 32), the way of
            swizzling (bits 62 and 63).
        outer: Rows of A, or columns of B.
        transposed: Rows (columns) lie next to each other, rather than their K numbers.

    Returns:
        [..., outer, K] bytes in the block's shared memory.
    """
    start, leading, stride = (
        ((descriptor >> np.uint64(bit) & np.uint64(0x3FFF)) << np.uint64(4)) for bit in (0, 16, 32)
    )
    modes = np.unique(descriptor >> np.uint64(62))
    if len(modes) != 1 or (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise Fault(f"descriptors with a base offset, or swizzled in several ways, are not supported; {site}")
    width = _SWIZZLE_BYTES[int(modes[0])]
    size = 4 if kind == "tf32" else 2
    start, leading, stride = (x.astype("i8")[..., None, None] for x in (start, leading, stride))
    m, k = np.arange(outer).reshape(-1, 1), np.arange(_ROWS[kind]).reshape(1, -1)
    if transposed:
        per_row = width // size  # numbers of one k that lie together
        if width == 16:
            at = start + m // per_row * stride + k // 8 * leading + k % 8 * 16 + m % per_row * size
        else:
            at = start + m // per_row * leading + k // 8 * stride + k % 8 * width + m % per_row * size
    elif width == 16:
        at = start + m // 8 * stride + k * size // 16 * leading + m % 8 * 16 + k * size % 16
    else:
        at = start + m // 8 * stride + m % 8 * width + k * size
    return at ^ (at >> 7 & width // 16 - 1) << 4


def _of_groups(wave: Wave, x: np.ndarray, site: Instruction) -> np.ndarray:
    """[1 or B, G]: what the threads of each warp group have in common."""
    groups = wave.shape[1] // GROUP
    rows = np.broadcast_to(x, (x.shape[0], wave.shape[1])).reshape(x.shape[0], groups, GROUP)
    if (rows != rows[..., :1]).any():
        raise Fault(f"threads of a warp group give different descriptors or predicates; {site}")
    return rows[..., 0]


def _read(
    wave: Wave, site: Instruction, active: np.ndarray | None, at: np.ndarray, size: int, rows_of_warp: int | None
) -> np.ndarray:
    """Numbers at [1 or B, G, outer, K] bytes: [B, G, outer, K] bits.

    Args:
        rows_of_warp: How many rows each warp of the group reads; None where each reads all.
    """
    memory = wave.spaces["shared"]
    blocks, groups = wave.shape[0], at.shape[1]
    whole = np.broadcast_to(at, (blocks, *at.shape[1:]))
    high, low = int(whole.max()), int(whole.min())
    if high + size > memory.size or low < 0:
        raise Fault(f"a descriptor reaches byte {high:#x} of shared memory, of which there are {memory.size}; {site}")
    index = whole + memory.block.reshape(-1, 1, 1, 1)
    if memory.check:
        # Every warp reads what it multiplies; which of its threads a read is put down to makes no difference.
        here = np.ones((blocks, groups), bool)
        if active is not None:
            here = np.broadcast_to(active, wave.shape).reshape(blocks, groups, GROUP)[..., 0]
        places, lanes = [], []
        for group, warp in itertools.product(range(groups), range(4)):
            part = index[:, group]
            if rows_of_warp is not None:
                part = part[:, rows_of_warp * warp : rows_of_warp * (warp + 1)]
            part = part.reshape(blocks, -1)
            thread = GROUP * group + WARP * warp + np.arange(part.shape[1]) % WARP
            lane = np.arange(blocks).reshape(-1, 1) * wave.shape[1] + thread
            some = here[:, group]
            places.append(part[some].reshape(-1))
            lanes.append(lane[some].reshape(-1))
        _check_read(wave, site, np.concatenate(places), np.concatenate(lanes), size)
    return memory.views[f"u{size}"].take(index // size)


def _check_read(wave: Wave, site: Instruction, index: np.ndarray, lanes: np.ndarray, size: int) -> None:
    memory = wave.spaces["shared"]
    memory.check_read(wave, site, index, lanes, size)
    here = places_of(index, size, memory.grain)
    stamps = memory.shadow.writes[here]
    row = (lanes // wave.shape[1])[:, None]
    writer = np.minimum(who_of(stamps), wave.shape[1] - 1)
    visible = wave.proxy_fences[row, writer] >= clock_of(stamps)
    visible |= wave.proxy_fences.reshape(-1)[lanes][:, None] > clock_of(stamps)
    if not visible.all():
        bad, column = np.unravel_index(np.argmin(visible), visible.shape)
        what = f"{wave.author(stamps[bad, column])} wrote {memory.name(int(here[bad, column]))}"
        raise Race(f"{what} without a fence.proxy.async; {wave.place(site, wave.at(lanes, int(bad)))}")
    wave.asynchronous_reads.append((here, lanes))


@operation(
    "wgmma",
    "mma_async sync aligned fence commit_group wait_group "
    + " ".join(f"m64n{n}k{k}" for n in range(8, 264, 8) for k in (8, 16)),
)
def _wgmma(opcode: Opcode, instruction: Instruction) -> Operation | None:
    if opcode.words[-2:] != ("sync", "aligned") and "mma_async" not in opcode:
        return None
    if "mma_async" not in opcode:
        return Operation(_wait if "wait_group" in opcode else _together, (), ("u4",) * ("wait_group" in opcode), True)
    shape = opcode.words[-1]
    kind = opcode.types[1] if len(opcode.types) == 3 else ""
    if kind not in _ROWS or opcode.types != ("f32", kind, kind) or shape.split("k")[1] != str(_ROWS[kind]):
        return None
    columns, depth = int(shape[4:].split("k")[0]), _ROWS[kind]
    result, source_a, _, _, *immediates = instruction.operands
    given = [operand.value for operand in immediates if isinstance(operand, Immediate)]
    from_registers = isinstance(source_a, Vector)
    wanted = 2 + (kind != "tf32") * (1 if from_registers else 2)
    if len(given) != wanted or len(immediates) != wanted or not isinstance(result, Vector):
        return None
    sign = np.float32(given[0] * given[1])
    transposed = [bool(x) for x in given[2:]]
    transposed_b = transposed[-1] if transposed else False
    transposed_a = transposed[0] if len(transposed) == 2 else False
    count = columns // 2
    at_a, at_c = fragment(16, depth, kind), accumulator(columns)
    size = 4 if kind == "tf32" else 2

    def product(
        wave: Wave, site: Instruction, active: np.ndarray | None, *values: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        if wave.shape[1] % GROUP:
            raise Fault(f"wgmma must have blocks of whole warp groups; {site}")
        _together(wave, site, active)
        blocks, groups = wave.shape[0], wave.shape[1] // GROUP
        accumulators, rest = values[:count], values[count:]
        if from_registers:
            a = at_a.matrix(numbers(by_warp(wave, rest[:4]), kind))  # [K, blocks W, 16]
            a, rest = a.reshape(depth, -1, groups, 64), rest[4:]
        else:
            places = addresses(_of_groups(wave, rest[0], site), 64, kind, transposed_a, site)
            a, rest = _values(_read(wave, site, active, places, size, 16), kind), rest[1:]
        places = addresses(_of_groups(wave, rest[0], site), columns, kind, transposed_b, site)
        b = _values(_read(wave, site, active, places, size, None), kind)
        keeps = _of_groups(wave, rest[1], site)[..., None, None]
        c = np.zeros((blocks, wave.warps[1], 16, columns), "f4")
        held = by_warp(wave, accumulators).transpose(1, 2, 0)
        c[..., at_c[0], at_c[1]] = held.reshape(-1, wave.warps[1], WARP, count)
        c = np.where(keeps, c.reshape(blocks, groups, 64, columns), np.float32(0))
        d = multiply(sign * a, b, c, adder_of(wave.arch, kind)).reshape(blocks, -1, 16, columns)
        d = d[..., at_c[0], at_c[1]]
        return tuple(np.ascontiguousarray(d[..., i]).reshape(blocks, -1) for i in range(count))

    operands = ("f4",) * count + (("u4",) * 4 if from_registers else ("u8",)) + ("u8", "?")
    if isinstance(instruction.operands[3], Immediate) and not instruction.operands[3].value:
        # What the accumulators hold is not read.
        def fresh(
            wave: Wave, site: Instruction, active: np.ndarray | None, *values: np.ndarray
        ) -> tuple[np.ndarray, ...]:
            return product(wave, site, active, *[np.zeros((1, 1), "f4")] * count, *values)

        return Operation(fresh, ("f4",) * count, operands[count:], True)
    return Operation(product, ("f4",) * count, operands, True, True)


def _values(bits: np.ndarray, kind: str) -> np.ndarray:
    """[B, G, outer, K] bits as [K, B, G, outer] numbers."""
    bits = np.ascontiguousarray(np.moveaxis(bits, -1, 0))
    if kind == "tf32":
        return tf32(bits)
    return bits.view("f2").astype("f4") if kind == "f16" else single_of_bfloat16(bits)


def _together(wave: Wave, site: Instruction, active: np.ndarray | None) -> None:
    whole_warps(wave, site, active)


def _wait(wave: Wave, site: Instruction, active: np.ndarray | None, groups: np.ndarray) -> None:
    whole_warps(wave, site, active)
    if int(groups.reshape(-1)[0]) == 0:
        wave.asynchronous_reads.clear()


def check_registers(flow: Flow) -> None:
    """Looks for registers of products that are touched before these are done.

    Raises:
        Fault: A register is read or written between a product and the `wgmma.wait_group` behind it, or written and then
            given to a product without `wgmma.fence`.
    """
    products = [
        step
        for step in itertools.chain.from_iterable(flow.steps)
        if step.instruction.opcode.startswith("wgmma.mma_async")
    ]
    if not products:
        return
    # Registers: of products in flight, by how many groups were committed since (0: not yet); and changed, not fenced.
    start: State = (frozenset(), frozenset())
    states: dict[int, State] = {0: start}
    pending = [0]
    watched = {r.index for step in products for operand in _shared_registers(step) for r in operand}
    while pending:
        number = pending.pop()
        state = _through(flow, number, states[number], watched)
        for successor in flow.blocks[number].successors:
            old = states.get(successor)
            new = state if old is None else (old[0] | state[0], old[1] | state[1])
            if new != old:
                states[successor] = new
                pending.append(successor)


State = tuple[frozenset[tuple[int, int]], frozenset[int]]
_MOST_GROUPS = 8


def _shared_registers(step: Any) -> tuple[list[Register], list[Register]]:
    """Of a product: its accumulators, and A's where it is in registers."""
    accumulators = list(step.written())
    source = step.instruction.operands[1]
    return accumulators, [r for r in source.of if isinstance(r, Register)] if isinstance(source, Vector) else []


def _through(flow: Flow, number: int, state: State, watched: set[int]) -> State:
    """What holds behind a block, if `state` holds before it."""
    flying, changed = set(state[0]), set(state[1])
    for step in flow.steps[number]:
        opcode = step.instruction.opcode
        written = {r.index for r in step.written()}
        if opcode.startswith("wgmma.mma_async"):
            accumulators, source = _shared_registers(step)
            used = {r.index for r in accumulators + source}
            if used & changed:
                _blame(step, flow, used & changed, "is given to a product without a wgmma.fence behind its last change")
            flying = {(r, age) for r, age in flying if r not in used} | {(r, 0) for r in used}
        elif opcode.startswith("wgmma.fence"):
            changed.clear()
        elif opcode.startswith("wgmma.commit_group"):
            flying = {(r, min(age + 1, _MOST_GROUPS)) for r, age in flying}
        elif opcode.startswith("wgmma.wait_group"):
            left = step.instruction.operands[0].value
            flying = {(r, age) for r, age in flying if age <= left}
        else:
            accumulators_in_flight = {r for r, _ in flying}
            touched = accumulators_in_flight & (written | {r.index for r in step.read()})
            if touched:
                _blame(step, flow, touched, "is touched while a product is in flight, without a wgmma.wait_group")
            if not opcode.startswith("mov."):  # by which ptxas only renames
                changed |= written & watched
    return frozenset(flying), frozenset(changed)


def _blame(step: Any, flow: Flow, registers: set[int], what: str) -> None:
    name = flow.entry.body.registers[min(registers)].name
    raise Race(f"register {name} {what}; {step.instruction}")
