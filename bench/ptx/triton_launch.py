"""Triton's launches on CPU tensors: what a GPU would be given, compiled ahead of time, runs as PTX.

A launch is compiled as it would be on the device: constants, integers that are 1, and what 16 divides go into the code.
PTX is kept in build/triton by content. Where Triton interprets, in this process, another one compiles.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..resources import resources
from . import Counts, Program

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "triton"
FORMATS = {"fp32": "<f", "i32": "<i", "i64": "<q"}


class Compiled(NamedTuple):
    """A kernel for one architecture, by the hints of one launch."""

    name: str
    ptx: str
    shared: int  # bytes
    num_warps: int
    arguments: tuple[tuple[str, str], ...]  # name and type of those that are passed, in order


class Launch(NamedTuple):
    """What a GPU would be given."""

    compiled: Compiled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    tensors: dict[str, Tensor]
    arch: int


@contextmanager
def recorded(run: Callable[[Launch], None], arch: int) -> Iterator[None]:
    """Kernels that are launched in this block, interpreted ones too, go to `run`, compiled for an architecture."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(prepare(self, args, kwargs, grid, arch))

    before = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    for kind, _ in before:
        kind.run = launch
    try:
        yield
    finally:
        for kind, method in before:
            kind.run = method


def prepare(kernel: Any, args: tuple, kwargs: dict, grid: Any, arch: int) -> Launch:
    """The launch `kernel[grid](*args, **kwargs)`."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    compiled = compile_(kernel, args, kwargs, arch)
    sizes = grid(values) if callable(grid) else grid
    sizes = (*sizes, 1, 1)[:3]
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    block = 32 * compiled.num_warps, 1, 1
    return Launch(compiled, sizes, block, _params(compiled, values), tensors, arch)


def execute(launch: Launch, **options: Any) -> Counts:
    """Runs it; options are for `Program.launch`."""
    compiled = launch.compiled
    return _program(compiled.ptx).launch(
        compiled.name,
        grid=launch.grid,
        block=launch.block,
        params=launch.params,
        tensors=launch.tensors,
        shared=compiled.shared,
        arch=launch.arch,
        **options,
    )


@functools.lru_cache(256)
def _program(ptx: str) -> Program:
    return Program(ptx)


def _params(compiled: Compiled, values: dict[str, Any]) -> bytes:
    """The parameter buffer; what Triton adds at the end, scratch memory that no kernel of ours has, is null."""
    entry = _program(compiled.ptx).entries[compiled.name]
    buffer = bytearray(entry.parameter_bytes)
    for parameter, (name, kind) in zip(entry.parameters, compiled.arguments, strict=False):
        value = values[name]
        packed = struct.pack("<Q", value.data_ptr()) if kind[0] == "*" else struct.pack(FORMATS[kind], value)
        if len(packed) != parameter.size:
            raise ValueError(f"{compiled.name}: {name} has {len(packed)} bytes as {kind}, the PTX {parameter.size}")
        buffer[parameter.offset : parameter.offset + parameter.size] = packed
    return bytes(buffer)


def compile_(kernel: Any, args: tuple, kwargs: dict, arch: int) -> Compiled:
    """The PTX of a launch, from build/triton or made anew."""
    args, kwargs = tuple(map(_stub, args)), {name: _stub(value) for name, value in kwargs.items()}
    module = sys.modules[kernel.fn.__module__]
    request = kernel.fn.__module__, module.__file__, kernel.fn.__name__, args, kwargs, arch
    path = CACHE / f"{_digest(request)}.json"
    if path.exists():
        content = path.read_text()
    else:
        content = json.dumps(_compiler().submit(_compile, *request).result() if _interprets() else _compile(*request))
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    compiled = Compiled(**json.loads(content))
    return compiled._replace(arguments=tuple(map(tuple, compiled.arguments)))


def _stub(value: Any) -> Any:
    return resources.Pointer.of(value) if isinstance(value, Tensor) else value


@functools.cache
def _sources(file: str) -> bytes:
    """What the kernels of a module are made of."""
    import triton

    files = {*(ROOT / "kernels").glob("*.py"), Path(file), Path(__file__), Path(resources.__file__)}
    return triton.__version__.encode() + b"".join(path.read_bytes() for path in sorted(files))


def _digest(request: tuple) -> str:
    _, file, name, args, kwargs, arch = request
    return hashlib.sha256(_sources(file) + repr((name, args, sorted(kwargs.items()), arch)).encode()).hexdigest()[:32]


def _interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def _compiler() -> ProcessPoolExecutor:
    """A process in which Triton compiles."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_without_interpreter)


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(module: str, file: str, name: str, args: tuple, kwargs: dict, arch: int) -> dict[str, Any]:
    """`Compiled`, as a dictionary for JSON."""
    kernel = getattr(importlib.import_module(module), name)
    compiled = resources.compile_launch(kernel, args, kwargs, arch)
    signature = compiled.src.signature
    return {
        "name": compiled.metadata.name,
        "ptx": compiled.asm["ptx"],
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "arguments": [(argument, kind) for argument, kind in signature.items() if kind != "constexpr"],
    }
