"""Shared memory, a block's; local memory, a thread's; and the parameters of a launch.

Shared memory is checked as global memory is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Misaligned, OutOfRange, Uninitialized
from .memory import check_stored, filled, like_places
from .races import Shadow, places_of

if TYPE_CHECKING:
    from .parse import Instruction
    from .wave import Wave

GUARD = 128  # bytes that sizes of memories are rounded to


class SharedMemory:
    """Of all blocks of a wave, one after the other."""

    def __init__(self, blocks: int, size: int, grain: int, check: bool) -> None:
        self.size, self.grain, self.check = size, grain, check
        self.stride = -(-max(size, 1) // GUARD) * GUARD
        self.bytes = np.zeros(blocks * self.stride, "u1")
        self.views = {f"u{n}": self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.block = np.arange(blocks, dtype="i8").reshape(-1, 1) * self.stride
        self.shadow = Shadow(len(self.bytes) // grain, self.name, shared=True) if check else None

    def locate(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        size: int,
        align: int,
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Addresses in the block's shared memory, checked, and who takes part; None for nobody."""
        address = address.astype("i8")
        if offset:
            address += offset
        if active is not None:
            found = filled(address, active)
            if found is None:
                return None
            address, high = found
        else:
            high = int(address.max())
        if high + size > self.size or address.min() < 0:
            at = wave.first(((address + size > self.size) | (address < 0)) & (True if active is None else active))
            place = int(np.broadcast_to(address, wave.shape)[at])
            raise OutOfRange(
                f"{size} bytes at {place:#x} of shared memory, of which there are {self.size}; {wave.place(site, at)}"
            )
        if align > 1 and np.count_nonzero(address & align - 1):
            at = wave.first((address & align - 1 != 0) & (True if active is None else active))
            place = int(np.broadcast_to(address, wave.shape)[at])
            raise Misaligned(f"{align} bytes at {place:#x} of shared memory; {wave.place(site, at)}")
        return address, active

    def load(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        size: int,
        count: int,
    ) -> tuple[np.ndarray, ...]:
        found = self.locate(wave, site, active, address, offset, size * count, size * count)
        if found is None:
            return tuple(np.zeros((1, 1), f"u{size}") for _ in range(count))
        address, active = found
        wave.count_shared("load", address, active, size * count)
        index = address + self.block
        if self.check:
            lanes = wave.lanes(active)
            self.check_read(wave, site, wave.flat(index, lanes), lanes, size * count)
        index = index >> size.bit_length() - 1 if size > 1 else index
        view = self.views[f"u{size}"]
        return tuple(view[i:].take(index) for i in range(count))

    def name(self, place: int) -> str:
        return f"byte {place * self.grain % self.stride:#x} of shared memory"

    def check_read(self, wave: Wave, site: Instruction, index: np.ndarray, lanes: Any, size: int) -> None:
        """`index` are bytes of all blocks' memory, [n], beside the lanes that read."""
        here = places_of(index, size, self.grain)
        self.check_written(wave, site, here, lanes, self.shadow.read(wave, site, here, lanes))

    def check_written(self, wave: Wave, site: Instruction, here: np.ndarray, lanes: Any, stamps: np.ndarray) -> None:
        if np.count_nonzero(stamps) != stamps.size:
            row, column = np.unravel_index(np.argmax(stamps == 0), stamps.shape)
            name = self.name(int(here[row, column]))
            raise Uninitialized(f"nobody has written {name}; {wave.place(site, wave.at(lanes, int(row)))}")

    def store(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        values: tuple[np.ndarray, ...],
    ) -> None:
        size = values[0].dtype.itemsize
        whole = size * len(values)
        found = self.locate(wave, site, active, address, offset, whole, whole)
        if found is None:
            return
        address, active = found
        wave.count_shared("store", address, active, whole)
        lanes = wave.lanes(active)
        data = np.stack([wave.flat(value, lanes) for value in values], axis=1)
        self.write(wave, site, wave.flat(address + self.block, lanes), lanes, data)

    def write(self, wave: Wave, site: Instruction, index: np.ndarray, lanes: Any, data: np.ndarray) -> None:
        """Stores numbers [n, numbers], one behind the other, at bytes `index` of all blocks' memory, [n]."""
        size = data.dtype.itemsize
        view = self.views[f"u{size}"]
        places = (index >> size.bit_length() - 1)[:, None] + np.arange(data.shape[1])
        if not self.check:
            view[places] = data
            return
        here = places_of(index, size * data.shape[1], self.grain)
        self.shadow.write(wave, site, here, lanes, like_places(view[places], data, here))
        view[places] = data
        check_stored(wave, site, self.shadow, here, lanes, view[places], data)

    def check_atomic(self, wave: Wave, site: Instruction, index: np.ndarray, lanes: Any, size: int) -> None:
        here = places_of(index * size, size, self.grain)
        self.check_written(wave, site, here, lanes, self.shadow.writes[here])
        self.shadow.atomic(wave, site, here, lanes)


class LocalMemory:
    """Every thread's own."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // GUARD) * GUARD
        self.bytes = np.zeros(lanes * self.stride, "u1")
        self.views = {f"u{n}": self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.written = np.zeros(lanes * self.stride, bool)

    def index(
        self, wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, offset: int, size: int
    ) -> tuple[np.ndarray, Any]:
        lanes = wave.lanes(active)
        address = wave.flat(address, lanes).astype("i8") + offset
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            at = wave.at(lanes, int(np.argmax(outside)))
            raise OutOfRange(f"{size} bytes of local memory, of which there are {self.size}; {wave.place(site, at)}")
        if (address % size).any():
            at = wave.at(lanes, int(np.argmax(address % size != 0)))
            raise Misaligned(f"{size} bytes of local memory; {wave.place(site, at)}")
        return address + np.arange(wave.shape[0] * wave.shape[1])[lanes] * self.stride, lanes

    def load(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        size: int,
        count: int,
    ) -> tuple[np.ndarray, ...]:
        index, lanes = self.index(wave, site, active, address, offset, size * count)
        results = []
        for i in range(count):
            for byte in range(size):
                bad = ~self.written[index + i * size + byte]
                if bad.any():
                    raise Uninitialized(
                        f"nobody has written local memory; {wave.place(site, wave.at(lanes, int(np.argmax(bad))))}"
                    )
            value = np.zeros(wave.shape[0] * wave.shape[1], f"u{size}")
            value[lanes] = self.views[f"u{size}"][index // size + i]
            results.append(value.reshape(wave.shape))
        return tuple(results)

    def store(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        values: tuple[np.ndarray, ...],
    ) -> None:
        size = values[0].dtype.itemsize
        index, lanes = self.index(wave, site, active, address, offset, size * len(values))
        for i, value in enumerate(values):
            self.views[f"u{size}"][index // size + i] = wave.flat(value, lanes)
            for byte in range(size):
                self.written[index + i * size + byte] = True


class ParameterMemory:
    """The launch's arguments: the same for all threads, so most loads have one address."""

    def __init__(self, content: bytes) -> None:
        self.bytes = np.frombuffer(content, "u1")
        self.loaded: dict[tuple[int, int, int], tuple[np.ndarray, ...]] = {}

    def load(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        size: int,
        count: int,
    ) -> tuple[np.ndarray, ...]:
        if address.size != 1:
            return self._gather(site, active, address + offset, size, count)
        start = int(address[0, 0]) + offset
        if (start, size, count) not in self.loaded:
            if start < 0 or start + size * count > len(self.bytes):
                raise OutOfRange(f"{size * count} bytes at {start} of {len(self.bytes)} bytes of parameters; {site}")
            if start % (size * count):
                raise Misaligned(f"{size * count} bytes at {start} of the parameters; {site}")
            values = self.bytes[start : start + size * count].view(f"u{size}")
            self.loaded[start, size, count] = tuple(values[i : i + 1].reshape(1, 1) for i in range(count))
        return self.loaded[start, size, count]

    def _gather(
        self, site: Instruction, active: np.ndarray | None, starts: np.ndarray, size: int, count: int
    ) -> tuple[np.ndarray, ...]:
        """Of threads that do not share an address; 0 for those that take no part."""
        starts = starts.astype("i8")
        taking = np.broadcast_to(True if active is None else active, starts.shape)
        for start in np.unique(starts[taking]):
            if start < 0 or start + size * count > len(self.bytes):
                raise OutOfRange(f"{size * count} bytes at {start} of {len(self.bytes)} bytes of parameters; {site}")
            if start % (size * count):
                raise Misaligned(f"{size * count} bytes at {start} of the parameters; {site}")
        places = np.where(taking, starts, 0)[..., None] + np.arange(size)
        return tuple(
            np.where(taking, self.bytes[np.where(taking[..., None], places + i * size, 0)].view(f"u{size}")[..., 0], 0)
            for i in range(count)
        )
