"""Products of matrices by tensor cores, and how warps load and store their operands: mma.sync, ldmatrix, stmatrix.

How tensor cores round is not documented; the model here is that of Fasi, Higham, Mikaitis and Pranesh, "Numerical
behavior of NVIDIA tensor cores" (2021) and Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores" (2025):
products are exact; a few of them and the accumulator are shifted to the largest exponent among them, cut off there,
added, and the sum is cut off to fp32; then come the next few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .conversions import single_of_bfloat16
from .counts import WARP, wavefronts
from .faults import BarrierFault
from .loads import offset_of
from .operations import Opcode, Operation, operation
from .parse import Instruction, Vector
from .wave import Wave


class Adder(NamedTuple):
    """How many products are added at once, and how many bits behind those of fp32 their alignment keeps."""

    products: int
    extra_bits: int


def adder_of(arch: int, kind: str) -> Adder:
    """Of an architecture, as 80, for operands of a type."""
    if arch < 80:
        return Adder(4, 0)
    if arch < 90:
        return Adder(4 if kind == "tf32" else 8, 1)
    return Adder(8 if kind == "tf32" else 16, 2)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, adder: Adder) -> np.ndarray:
    """a b + c as a tensor core rounds it. K runs slowest, so that sums over it are of whole arrays.

    Args:
        a: [K, ..., M] fp32 holding numbers of a type whose products fp64 holds exactly.
        b: [K, ..., N] likewise.
        c: [..., M, N] fp32.

    Returns:
        [..., M, N] fp32.
    """
    a, b = a.astype("f8")[..., :, None], b.astype("f8")[..., None, :]
    power_a, power_b = _power_of_two(a), _power_of_two(b)
    for first in range(0, len(a), adder.products):
        part = slice(first, first + adder.products)
        c = c.astype("f8")
        largest = (power_a[part] * power_b[part]).max(0)
        np.maximum(largest, _power_of_two(c), out=largest)
        np.clip(largest, 2.0**-300, 2.0**300, out=largest)  # so that zeros and infinities can be scaled
        unit = 2.0 ** -(23 + adder.extra_bits) * largest
        scale = 1 / unit
        shifted = a[part] * b[part]
        shifted *= scale
        total = np.trunc(shifted, out=shifted).sum(0)
        total += np.trunc(c * scale)
        total *= unit
        # What fp32 has no place for is cut off, but for infinities and NaN, whose bits would become others.
        cut = (total.view("u8") & np.uint64(0xFFFFFFFFE0000000)).view("f8")
        c = np.where(np.isfinite(total), cut, total).astype("f4")
    return c


def _power_of_two(x: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above |x|; 0 for 0."""
    return (x.view("u8") & np.uint64(0x7FF0000000000000)).view("f8")


def tf32(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers that 32-bit registers hold for a tensor core: it does not see their lowest 13 bits."""
    return (bits & np.uint32(0xFFFFE000)).view("f4")


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers [n, ...] as fp32 numbers: [n, ...] of tf32, [2 n, ...] of fp16 or bf16."""
    if kind == "tf32":
        return tf32(bits)
    parts = np.stack([bits.astype("u2"), (bits >> np.uint32(16)).astype("u2")], axis=1).reshape(-1, *bits.shape[1:])
    return parts.view("f2").astype("f4") if kind == "f16" else single_of_bfloat16(parts)


_GROUP, _MEMBER = np.divmod(np.arange(WARP), 4)


class Fragment(NamedTuple):
    """Where the numbers of a matrix lie in a warp's registers: for each, which of a thread's and which thread's."""

    number: np.ndarray
    lane: np.ndarray

    def matrix(self, numbers: np.ndarray) -> np.ndarray:
        """[numbers of a thread, warps, 32] -> [depth, warps, rows or columns]."""
        warps = np.arange(numbers.shape[1])[:, None]
        return numbers[self.number[:, None], warps, self.lane[:, None]]


def fragment(outer: int, depth: int, kind: str) -> Fragment:
    """Of A, with 16 rows, or of B, with 8 columns: both [depth, rows or columns]."""
    pair = 1 if kind == "tf32" else 2  # numbers in a register
    k, m = np.arange(depth)[:, None], np.arange(outer)[None, :]
    register = k // (4 * pair) * (outer // 8) + m // 8
    return Fragment(register * pair + k % pair, m % 8 * 4 + k // pair % 4)


def accumulator(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, of 16 rows, that every register of C and D holds: [32, registers]."""
    row, column = np.zeros((2, WARP, columns // 2), int)
    for register in range(columns // 2):
        row[:, register] = _GROUP + 8 * (register // 2 % 2)
        column[:, register] = 2 * _MEMBER + register % 2 + 8 * (register // 4)
    return row, column


def by_warp(wave: Wave, registers: Sequence[np.ndarray]) -> np.ndarray:
    """Registers of all threads as [registers, warps of all blocks (of one, where all have the same), 32]."""
    rows = max(register.shape[0] for register in registers)
    whole = np.empty((len(registers), rows, wave.shape[1]), registers[0].dtype)
    for place, register in zip(whole, registers, strict=True):
        place[:] = register
    return whole.reshape(len(registers), -1, WARP)


def whole_warps(wave: Wave, site: Instruction, active: np.ndarray | None) -> None:
    """Raises BarrierFault where not all threads of a warp take part."""
    if active is None:
        return
    here = np.broadcast_to(active, wave.shape).reshape(*wave.warps, WARP)
    missing = here.any(2, keepdims=True) & ~here
    if missing.any():
        raise BarrierFault(
            f"a thread does not take part in what its warp does together; "
            f"{wave.place(site, wave.first(missing.reshape(wave.shape)))}"
        )


# (rows, columns, depth) and type of the operands -> registers of A and of B.
_SHAPES = {
    ("m16n8k4", "tf32"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k16", "bf16"): (4, 2),
}


@operation("mma", "sync aligned row col m16n8k4 m16n8k8 m16n8k16")
def _mma(opcode: Opcode, _: Instruction) -> Operation | None:
    if opcode.words[:2] != ("sync", "aligned") or opcode.words[3:] != ("row", "col") or len(opcode.types) != 4:
        return None
    kind = opcode.types[1]
    found = _SHAPES.get((opcode.words[2], kind))
    if found is None or opcode.types != ("f32", kind, kind, "f32"):
        return None
    count_a, count_b = found
    depth = int(opcode.words[2].split("k")[1])
    at_a, at_b, at_c = fragment(16, depth, kind), fragment(8, depth, kind), accumulator(8)

    def mma(wave: Wave, site: Instruction, active: np.ndarray | None, *registers: np.ndarray) -> tuple[np.ndarray, ...]:
        whole_warps(wave, site, active)
        given = by_warp(wave, registers)
        a = at_a.matrix(numbers(given[:count_a], kind))
        b = at_b.matrix(numbers(given[count_a : count_a + count_b], kind))
        c = np.empty((given.shape[1], 16, 8), "f4")
        c[:, at_c[0], at_c[1]] = given[count_a + count_b :].transpose(1, 2, 0).view("f4")
        d = multiply(a, b, c, adder_of(wave.arch, kind))[:, at_c[0], at_c[1]]
        return tuple(np.ascontiguousarray(d[..., i]).reshape(-1, wave.shape[1]) for i in range(4))

    return Operation(mma, ("f4",) * 4, ("u4",) * (count_a + count_b + 4), True)


def _matrix_places(wave: Wave, address: np.ndarray, matrix: int) -> np.ndarray:
    """The addresses of rows of a matrix, for every thread of a warp: [1 or B, W, 8]."""
    whole = np.broadcast_to(address, (address.shape[0], wave.shape[1])).reshape(address.shape[0], -1, WARP)
    return whole[..., 8 * matrix : 8 * matrix + 8].astype("i8")


def _prepare(
    wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, offset: int, matrices: int, kind: str
) -> np.ndarray | None:
    """Checked addresses of rows; None where nobody takes part."""
    whole_warps(wave, site, active)
    named = (np.arange(wave.shape[1]) % WARP < 8 * matrices).reshape(1, -1)
    who = named if active is None else active & named
    located = wave.spaces["shared"].locate(wave, site, who, address, offset, 16, 16)
    if located is None:
        return None
    address, who = located
    if wave.counts is not None:
        # Eight rows of 16 bytes are a matrix, and those of a quarter of a warp: each matrix has wavefronts of its own.
        shape = max(address.shape[0], who.shape[0]), wave.shape[1]
        address_, who_ = np.broadcast_to(address, shape), np.broadcast_to(who, shape)
        times = wave.shape[0] // shape[0]
        wave.add_shared(kind, *(times * n for n in wavefronts(address_, who_, 16)))
    return address


@operation("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", types=("b16",))
def _load_matrix(opcode: Opcode, instruction: Instruction) -> Operation | None:
    matrices = int(opcode.one_of("x1", "x2", "x4", default="x0")[1])
    if not matrices or opcode.words[:3] != ("sync", "aligned", "m8n8"):
        return None
    transposed = "trans" in opcode
    offset = offset_of(instruction.operands[1])

    def load(wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray) -> object:
        memory = wave.spaces["shared"]
        address = _prepare(wave, site, active, address, offset, matrices, "load")
        if address is None:
            zero = np.zeros((1, 1), "u4")
            return (zero,) * matrices if matrices > 1 else zero
        lanes = wave.lanes(active)
        results = []
        for matrix in range(matrices):
            rows = _matrix_places(wave, address, matrix)
            if transposed:
                at = [rows[..., 2 * _MEMBER + part] + 2 * _GROUP for part in range(2)]
            else:
                at = [rows[..., _GROUP] + 4 * _MEMBER]
            size = 2 if transposed else 4
            index = [x.reshape(x.shape[0], -1) + memory.block for x in at]
            if memory.check:
                for x in index:
                    memory.check_read(wave, site, wave.flat(x, lanes), lanes, size)
            parts = [memory.views[f"u{size}"].take(x // size) for x in index]
            results.append(parts[0].astype("u4") | parts[1].astype("u4") << np.uint32(16) if transposed else parts[0])
        return tuple(results) if matrices > 1 else results[0]

    return Operation(load, ("u4",) * matrices, ("u4",), True)


@operation("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", types=("b16",))
def _store_matrix(opcode: Opcode, instruction: Instruction) -> Operation | None:
    matrices = int(opcode.one_of("x1", "x2", "x4", default="x0")[1])
    if not matrices or opcode.words[:3] != ("sync", "aligned", "m8n8"):
        return None
    transposed = "trans" in opcode
    offset = offset_of(instruction.operands[0])
    sources = len(instruction.operands[1].of) if isinstance(instruction.operands[1], Vector) else 1
    if sources != matrices:
        return None

    def store(
        wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, *values: np.ndarray
    ) -> None:
        memory = wave.spaces["shared"]
        address = _prepare(wave, site, active, address, offset, matrices, "store")
        if address is None:
            return
        lanes = wave.lanes(active)
        for matrix, value in enumerate(values):
            rows = _matrix_places(wave, address, matrix)
            data = wave.flat(value, lanes)
            if transposed:
                for part in range(2):
                    at = rows[..., 2 * _MEMBER + part] + 2 * _GROUP
                    at = wave.flat(at.reshape(at.shape[0], -1) + memory.block, lanes)
                    memory.write(wave, site, at, lanes, (data >> np.uint32(16 * part)).astype("u2")[:, None])
            else:
                at = rows[..., _GROUP] + 4 * _MEMBER
                at = wave.flat(at.reshape(at.shape[0], -1) + memory.block, lanes)
                memory.write(wave, site, at, lanes, data[:, None])

    return Operation(store, (), ("u4",) * (1 + matrices), True)
