"""csrc's launches on CPU tensors, run as the PTX that nvcc (sm_80, sm_90) or NVRTC (sm_70) makes of the kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from ..resources import of_csrc
from . import Counts, Program
from .csrc_host import CSRC, Launch, launch_emulated, module, recorded
from .parse import Entry


class Compiled(NamedTuple):
    """A launch that a GPU would be given, with the kernel's PTX and the tensors that it may touch."""

    kernel: str  # as in C++, without arguments
    entry: Entry
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    tensors: dict[str, Tensor]


@functools.cache
def ptx_of(arch: int, kernel: str) -> Path:
    """The PTX file that has a kernel. The source whose first word is in the kernel's name is compiled first.

    Raises:
        RuntimeError: A compiler is missing, or no source has the kernel.
    """
    require(arch)
    sources = sorted(of_csrc.sources(), key=lambda source: source.stem.split("_")[0] not in kernel)
    for source in sources:
        ptx = of_csrc.compiled(source, arch)[1]
        if f".entry {kernel}(" in ptx.read_text():
            return ptx
    raise RuntimeError(f"csrc for sm_{arch}: no source has the kernel {kernel}")


def require(arch: int) -> None:
    """Raises RuntimeError where a compiler for the architecture is missing."""
    reason = of_csrc.lacking(arch)
    if reason is not None:
        raise RuntimeError(f"csrc for sm_{arch}: {reason}")


@functools.cache
def _program(ptx: Path) -> Program:
    return Program(ptx.read_text())


def launch_compiled(
    arch: int, name: str, tensors: Sequence[Tensor | None], *numbers: float, **options: Any
) -> list[tuple[str, Counts]]:
    """What `ops.native.launch` does on a GPU of an architecture, by the machine, on CPU tensors.

    Args:
        name, tensors, numbers: As of `ops.native.launch`.
        options: For `Program.launch`.

    Returns:
        The kernels that were launched, by their mangled names, and what each of them did.
    """
    memory = named(name, tensors)
    made = []

    def run(launch: Launch) -> None:
        program = _program(ptx_of(arch, launch.kernel))
        sizes = {"grid": launch.grid, "block": launch.block}
        counts = program.launch(launch.kernel, **sizes, params=launch.params, tensors=memory, arch=arch, **options)
        made.append((launch.kernel, counts))

    with recorded(run):
        launch_emulated(name, tensors, *numbers)
    return made


def named(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a launcher, by what it calls them."""
    names = argument_names(name)
    return {names[i]: x.detach() for i, x in enumerate(tensors) if x is not None}


@contextmanager
def forwarded(arch: int, run: Callable[[Compiled], None]) -> Iterator[None]:
    """In this block the ops' backend cpu launches csrc's kernels, and their launches go to `run` instead of being run.

    Raises:
        RuntimeError: The emulated launchers cannot be built, or a compiler for the architecture is missing.
    """
    from epigraf_fast.ops import native

    extension = module()
    if isinstance(extension, str):
        raise RuntimeError(f"csrc for sm_{arch}: {extension}")
    require(arch)

    def launch(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
        memory = named(name, tensors)

        def forward(one: Launch) -> None:
            entry = _program(ptx_of(arch, one.kernel)).entries[one.kernel]
            (kernel,) = of_csrc.demangled([one.kernel])
            run(Compiled(kernel, entry, one.grid, one.block, one.params, memory))

        with recorded(forward):
            launch_emulated(name, tensors, *numbers)

    with (
        mock.patch.object(native, "extension", return_value=extension),
        mock.patch.object(native, "launch", launch),
        mock.patch.object(native, "on_gpu", return_value=True),
    ):
        yield


@functools.cache
def argument_names(name: str) -> tuple[str, ...]:
    """What bindings.cpp calls the tensors of a launcher, in their order."""
    source = (CSRC / "bindings.cpp").read_text()
    signature = re.search(rf"\b{name}\(\s*const Check& \w+,([^)]*)\)", source)
    return tuple(re.findall(r"\bPointer (\w+)", signature[1]))
