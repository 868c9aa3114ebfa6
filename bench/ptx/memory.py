"""Global memory: tensors, by their real addresses.

Every access is checked before it is made: that it lies in a tensor, that its size divides its address, that what it
reads was written, and that no other thread's access to the place is unordered with it (`races`).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .faults import Misaligned, OutOfRange, Race, Uninitialized
from .races import Knowledge, Shadow, alike, places_of

if TYPE_CHECKING:
    from .machine import Wave
    from .parse import Instruction

GUARD = 16  # bytes that addresses of regions are rounded to, so that every access has a view of its type


_LOWEST = -(2**63)


def filled(address: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Addresses (signed), those of threads that take no part being the highest of the others', and that; None for no
    thread."""
    high = int(np.where(active, address, _LOWEST).max())
    return None if high == _LOWEST else (np.where(active, address, high), high)


class Region:
    """Memory of tensors that overlap, or of one.

    Attributes:
        unwritten: Which places nobody has written, or that lie between a tensor's elements; None where all are good.
        shadow: Of races; None where the kernel cannot write.
    """

    def __init__(self, tensors: dict[str, Tensor], start: int, end: int, uninitialized: set[str]) -> None:
        self.tensors, self.start, self.end = tensors, start, end
        self.base = start // GUARD * GUARD
        size = -(-(end - self.base) // GUARD) * GUARD
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), "u1")
        self.views = {code: self.bytes.view(code) for code in ("u1", "u2", "u4", "u8", "f4", "f8", "f2", "i4", "i8")}
        self.grain = min(min(t.element_size() for t in tensors.values()), 8)
        if self.base % self.grain or start % self.grain:
            self.grain = 1
        self.unwritten: np.ndarray | None = None
        self.shadow: Shadow | None = None
        for name, tensor in tensors.items():
            self._mark(tensor, name in uninitialized)

    @property
    def places(self) -> int:
        return len(self.bytes) // self.grain

    def _mark(self, tensor: Tensor, uninitialized: bool) -> None:
        whole = tensor.numel() * tensor.element_size() == self.end - self.start
        if not uninitialized and whole and self.unwritten is None:
            return
        if self.unwritten is None:
            self.unwritten = np.ones(self.places, bool)
        if not uninitialized:
            step = tensor.element_size() // self.grain
            first = (tensor.data_ptr() - self.base) // self.grain
            flags = torch.from_numpy(self.unwritten)
            for part in range(step):
                flags.as_strided(tensor.shape, [step * s for s in tensor.stride()], first + part).zero_()

    def track(self) -> None:
        if self.shadow is None:
            self.shadow = Shadow(self.places, lambda place: self.name_of(self.base + place * self.grain))

    def name_of(self, address: int) -> str:
        """The tensor that an address lies in, with its place in it."""
        for name, tensor in self.tensors.items():
            start, end = extent(tensor)
            if start <= address < end:
                return f"{describe(name, tensor)} at byte {address - start}"
        name, tensor = next(iter(self.tensors.items()))
        return f"{describe(name, tensor)} at byte {address - self.start}"


def extent(tensor: Tensor) -> tuple[int, int]:
    """From a tensor's first byte to behind its last; both equal if it is empty."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def describe(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def regions_of(tensors: dict[str, Tensor], uninitialized: set[str]) -> list[Region]:
    """Regions by rising address; tensors that share bytes share a region."""
    for name in uninitialized:
        if name not in tensors:
            raise ValueError(
                f"bench.ptx: uninitialized must be names of tensors, got {name!r} beside {sorted(tensors)}"
            )
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"bench.ptx: tensors must be on the CPU (because it runs the kernel), {name} is not")
    extents = sorted((*extent(t), name) for name, t in tensors.items() if t.numel())
    regions, group, start, end = [], {}, 0, 0
    for first, last, name in extents:
        if group and first >= end:
            regions.append(Region(group, start, end, uninitialized))
            group = {}
        if not group:
            start, end = first, last
        group[name] = tensors[name]
        end = max(end, last)
    if group:
        regions.append(Region(group, start, end, uninitialized))
    return regions


class GlobalMemory:
    """All tensors that a launch may touch."""

    def __init__(self, regions: list[Region], check: bool) -> None:
        self.regions, self.check = regions, check
        self.starts = np.array([r.start for r in regions], "u8")
        self.ends = np.array([r.end for r in regions], "u8")
        self.last: dict[int, Region] = {}  # by the line of an instruction
        self.meetings: dict[int, Knowledge] = {}  # address of atomics -> what blocks left there

    def track(self, offsets: frozenset[int] | None, params: bytes) -> None:
        """Watches the regions that pointers at these places of the parameters point to; None: all."""
        for region in self.regions:
            if offsets is None or any(
                region.start <= int.from_bytes(params[at : at + 8], "little") < region.end for at in offsets
            ):
                region.track()

    def parts(
        self, wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, offset: int, size: int
    ) -> list[tuple[Region, np.ndarray, np.ndarray | None]]:
        """Where an access goes: regions, byte offsets from the region's base (0 or more), and who takes part."""
        address = address.view("i8")
        if active is None:
            low, high = int(address.min()), int(address.max())
        else:
            found = filled(address, active)
            if found is None:
                return []
            address, high = found
            low = int(address.min())
        region = self.last.get(site.line)
        if region is None or low + offset < region.start or high + offset + size > region.end:
            region = self.find(low + offset, high + offset + size)
        if size > 1 and np.count_nonzero((address + offset if offset % size else address) & size - 1):
            self.misaligned(wave, site, active, address + offset, size)
        if region is None:
            return self.several(wave, site, active, address + offset, size)
        self.last[site.line] = region
        return [(region, address - (region.base - offset), active)]

    def find(self, low: int, high: int) -> Region | None:
        """The region that holds all bytes from low to before high."""
        index = int(np.searchsorted(self.starts, np.uint64(max(low, 0)), "right")) - 1
        if low >= 0 and index >= 0 and high <= self.regions[index].end:
            return self.regions[index]
        return None

    def several(
        self, wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, size: int
    ) -> list[tuple[Region, np.ndarray, np.ndarray | None]]:
        places = address.view("u8")
        index = np.searchsorted(self.starts, places, "right") - 1
        outside = index < 0
        if len(self.regions):
            outside |= places + np.uint64(size) > self.ends[np.maximum(index, 0)]
        if active is not None:
            outside = outside & active
        if np.count_nonzero(outside):
            self.out_of_range(wave, site, outside, address, size)
        found = []
        for number in np.unique(index if active is None else index[np.broadcast_to(active, index.shape)]):
            here = index == number if active is None else (index == number) & active
            region = self.regions[number]
            found.append((region, np.where(here, address, region.start) - region.base, here))
        return found

    def out_of_range(self, wave: Wave, site: Instruction, outside: np.ndarray, address: np.ndarray, size: int) -> None:
        at = wave.first(outside)
        place = int(np.broadcast_to(address, wave.shape)[at]) % 2**64
        nearest, distance = None, None
        for region in self.regions:
            for name, tensor in region.tensors.items():
                start, end = extent(tensor)
                away = start - place if place < start else max(place + size - end, 0)
                if distance is None or away < distance:
                    nearest, distance, before = describe(name, tensor), away, place < start
        where = (
            f"{distance} bytes {'before' if before else 'past the end of'} {nearest}"
            if nearest
            else "no tensor is given"
        )
        raise OutOfRange(f"{size} bytes at address {place:#x}: {where}; {wave.place(site, at)}")

    def misaligned(
        self, wave: Wave, site: Instruction, active: np.ndarray | None, address: np.ndarray, size: int
    ) -> None:
        at = wave.first((address & size - 1 != 0) & (True if active is None else active))
        place = int(np.broadcast_to(address, wave.shape)[at]) % 2**64
        region = self.find(place, place + 1)
        name = region.name_of(place) if region else "no tensor"
        raise Misaligned(f"{size} bytes at address {place:#x} in {name}; {wave.place(site, at)}")

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
        """`count` numbers of `size` bytes from every address: unsigned integers of the address's shape."""
        whole = size * count
        parts = self.parts(wave, site, active, address, offset, whole)
        if len(parts) != 1:
            return self._load_several(wave, site, parts, size, count)
        region, at, who = parts[0]
        wave.count_global("load", site, region.base, at, who, whole)
        if self.check:
            self.check_read(wave, site, region, at, who, whole)
        index = at >> size.bit_length() - 1 if size > 1 else at
        view = region.views[f"u{size}"]
        return tuple(view[i:].take(index) for i in range(count))

    def _load_several(
        self, wave: Wave, site: Instruction, parts: list, size: int, count: int
    ) -> tuple[np.ndarray, ...]:
        shape = np.broadcast_shapes(*(at.shape for _, at, _ in parts)) if parts else (1, 1)
        values = tuple(np.zeros(shape, f"u{size}") for _ in range(count))
        for region, at, who in parts:
            wave.count_global("load", site, region.base, at, who, size * count)
            if self.check:
                self.check_read(wave, site, region, at, who, size * count)
            index = at >> size.bit_length() - 1
            for i, value in enumerate(values):
                np.copyto(value, region.views[f"u{size}"][i:].take(index), where=who)
        return values

    def check_read(
        self, wave: Wave, site: Instruction, region: Region, at: np.ndarray, who: np.ndarray | None, size: int
    ) -> None:
        if region.unwritten is None and region.shadow is None:
            return
        lanes = wave.lanes(who)
        here = places_of(wave.flat(at, lanes), size, region.grain)
        self.check_written(wave, site, region, here, lanes)
        if region.shadow is not None:
            region.shadow.read(wave, site, here, lanes)

    def check_written(self, wave: Wave, site: Instruction, region: Region, here: np.ndarray, lanes: Any) -> None:
        if region.unwritten is None:
            return
        bad = region.unwritten[here]
        if np.count_nonzero(bad):
            row, column = np.unravel_index(np.argmax(bad), bad.shape)
            place = region.name_of(region.base + int(here[row, column]) * region.grain)
            raise Uninitialized(f"nobody has written {place}; {wave.place(site, wave.at(lanes, int(row)))}")

    def store(
        self,
        wave: Wave,
        site: Instruction,
        active: np.ndarray | None,
        address: np.ndarray,
        offset: int,
        values: tuple[np.ndarray, ...],
    ) -> None:
        """One or more numbers, unsigned integers, to every address."""
        size = values[0].dtype.itemsize
        whole = size * len(values)
        for region, at, who in self.parts(wave, site, active, address, offset, whole):
            wave.count_global("store", site, region.base, at, who, whole)
            lanes = wave.lanes(who)
            place = wave.flat(at, lanes)
            data = np.stack([wave.flat(value, lanes) for value in values], axis=1)
            view = region.views[f"u{size}"]
            index = (place >> size.bit_length() - 1)[:, None] + np.arange(len(values))
            if not self.check:
                view[index] = data
                continue
            region.track()
            here = places_of(place, whole, region.grain)
            if region.unwritten is not None:
                region.unwritten[here] = False
            region.shadow.write(wave, site, here, lanes, like_places(view[index], data, here))
            view[index] = data
            check_stored(wave, site, region.shadow, here, lanes, view[index], data)

    def check_atomic(
        self, wave: Wave, site: Instruction, region: Region, index: np.ndarray, lanes: Any, size: int
    ) -> None:
        region.track()
        here = places_of(index * size, size, region.grain)
        self.check_written(wave, site, region, here, lanes)
        region.shadow.atomic(wave, site, here, lanes)


def like_places(old: np.ndarray, new: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Of which places numbers that are stored, [n, numbers], are like what was there."""
    like = alike(old, new)
    if like.shape == here.shape:
        return like
    if here.shape[1] < like.shape[1]:
        return like.reshape(*here.shape, -1).all(2)
    return np.repeat(like, here.shape[1] // like.shape[1], axis=1)


def check_stored(
    wave: Wave, site: Instruction, shadow: Shadow, here: np.ndarray, lanes: Any, found: np.ndarray, meant: np.ndarray
) -> None:
    """Raises Race where threads have stored different values at once."""
    wrong = ~like_places(found, meant, here)
    if np.count_nonzero(wrong):
        row, column = np.unravel_index(np.argmax(wrong), wrong.shape)
        place = shadow.name(int(here[row, column]))
        raise Race(f"threads write different values at once: {place}; {wave.place(site, wave.at(lanes, int(row)))}")
