"""csrc's launches on CPU tensors: X.cu's host code, compiled as C++, decides what is launched with which grid and
arguments. The kernels then run in C++, thread by thread (csrc/tests/emulation), or go to whom they are recorded for.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from ..resources import of_csrc

CSRC = of_csrc.CSRC
EMULATION, DRIVER = CSRC / "tests" / "emulation", CSRC / "driver"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-DEPIGRAF_EMULATED", f"-I{CSRC}", f"-I{EMULATION}"]
CUDA = ['-DEPIGRAF_CUDA="emulated"', '-DEPIGRAF_CUDA_ARCHS=""', "-DEPIGRAF_DRIVER"]
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_THREADS = 1024


class Launch(NamedTuple):
    """What a GPU would be given."""

    kernel: str  # the mangled name
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes


@functools.cache
def module() -> ModuleType | str:
    """The extension with emulated launchers X_cuda and without X_cpu, built once for all; or why it cannot be had."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return "there is no C++ compiler"
    try:
        import pybind11
    except ImportError:
        return "pybind11 is not installed"
    files = sorted([*CSRC.glob("*.h"), *CSRC.glob("*.c*"), *EMULATION.glob("*"), *DRIVER.glob("*"), Path(__file__)])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder = CSRC.parent / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_C_{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            _build(compiler, includes, target)
    return load(target)


def load(path: Path) -> ModuleType:
    """An extension that may be one of several; pybind11 knows them by their names."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._C", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(compiler: list[str], includes: list[str], target: Path) -> None:
    sources = [CSRC / "bindings.cpp", CSRC / "launchers.cpp", DRIVER / "driver.cpp", *sorted(CSRC.glob("*.cu"))]
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)

        def compile_(source: Path) -> Path:
            flags = [*FLAGS, "-DEPIGRAF_ISA=base"]
            if source.suffix == ".cu":
                flags = [*FLAGS, *CUDA, "-include", "cuda_runtime.h", "-x", "c++"]
            elif source.stem == "bindings":
                flags += [*CUDA, *includes]
            out = folder / f"{source.stem}.o"
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(out)], check=True)
            return out

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_, sources))
        linked = folder / target.name
        subprocess.run([*compiler, "-shared", *map(str, objects), "-ldl", "-o", str(linked)], check=True)
        linked.replace(target)


def launch_emulated(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """What `ops.native.launch` does on a GPU, with the emulation's launcher, on CPU tensors."""
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    getattr(module(), f"{name}_cuda")(*addresses, *numbers, 0)


@contextmanager
def recorded(run: Callable[[Launch], None]) -> Iterator[None]:
    """Kernels that `launch_emulated` launches in this block go to `run`; what that raises is raised at the end."""
    failed: list[BaseException] = []

    @ctypes.CFUNCTYPE(
        None,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_uint * 3),
        ctypes.POINTER(ctypes.c_uint * 3),
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    def recorder(kernel: bytes, grid: Any, block: Any, arguments: int, size: int) -> None:
        if failed:
            return
        try:
            sizes = tuple(grid.contents), tuple(block.contents)
            launch = Launch(kernel.decode(), *sizes, ctypes.string_at(arguments, size))
            check(launch)
            run(launch)
        except BaseException as error:  # C++ is between here and who should hear of it
            failed.append(error)

    library = ctypes.CDLL(module().__file__)
    library.emulation_record(recorder)
    try:
        yield
    finally:
        library.emulation_record(None)
    if failed:
        raise failed[0]


def check(launch: Launch) -> None:
    """Raises ValueError for what no GPU launches."""
    blocks, threads = launch.grid, launch.block[0] * launch.block[1] * launch.block[2]
    if not all(0 < n <= most for n, most in zip(blocks, MOST_BLOCKS, strict=True)):
        raise ValueError(f"{launch.kernel}: a grid must have 1 to {MOST_BLOCKS} blocks, got {blocks}")
    if not 0 < threads <= MOST_THREADS:
        raise ValueError(f"{launch.kernel}: a block must have 1 to {MOST_THREADS} threads, got {launch.block}")
