"""csrc's CUDA kernels on the CPU: every X.cu compiled as C++ against csrc/tests/emulation, and run on CPU tensors.

This shows what the kernels compute, in every thread of every block, where there is no GPU.
"""

from __future__ import annotations

import concurrent.futures
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
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from epigraf_fast.ops import native

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", f"-I{CSRC}", f"-I{CSRC / 'tests' / 'emulation'}"]
CUDA = ['-DEPIGRAF_CUDA="emulated"', '-DEPIGRAF_CUDA_ARCHS=""']


def without_launch_syntax(source: str) -> str:
    """`k<T><<<grid, block, 0, stream>>>(a);` -> `emulation::launch(grid, block, [=] { k<T>(a); });`."""
    while (at := source.find("<<<")) >= 0:
        start, depth = at, 0
        while depth or source[start - 1].isalnum() or source[start - 1] in "_>":
            start -= 1
            depth += {">": 1, "<": -1}.get(source[start], 0)
        end = source.index(">>>", at)
        stop = source.index(";", end)
        grid, block = source[at + 3 : end].split(", ")[:2]
        call = f"emulation::launch({grid}, {block}, [=] {{ {source[start:at]}{source[end + 3 : stop]}; }})"
        source = source[:start] + call + source[stop:]
    return source


@functools.cache
def module() -> ModuleType | str:
    """The extension with emulated launchers X_cuda, built once for all processes; or why it cannot be had."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return "there is no C++ compiler"
    try:
        import pybind11
    except ImportError:
        return "pybind11 is not installed"
    files = sorted([*CSRC.glob("*.h"), *CSRC.glob("*.c*"), *CSRC.glob("tests/emulation/*"), Path(__file__)])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder = CSRC.parent / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_C_{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            build(compiler, includes, target)
    spec = importlib.util.spec_from_file_location("_C", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(compiler: list[str], includes: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)

        def compile_(source: Path) -> Path:
            flags = [*FLAGS, "-DEPIGRAF_ISA=base"]
            if source.suffix == ".cu":
                text = without_launch_syntax(source.read_text())
                source = folder / f"{source.stem}_cuda.cpp"
                source.write_text(text)
                flags = [*FLAGS, *CUDA, "-DEPIGRAF_EMULATED", "-include", "cuda_runtime.h"]
            elif source.stem == "bindings":
                flags += [*CUDA, *includes]
            out = folder / f"{source.stem}.o"
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(out)], check=True)
            return out

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_, sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")])))
        linked = folder / target.name
        subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(linked)], check=True)
        linked.replace(target)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of a test, the ops' backend cpu launches what a GPU would be given."""
    emulated = module()
    if isinstance(emulated, str):
        pytest.skip(emulated)

    def launch(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
        getattr(emulated, f"{name}_cuda")(*(0 if x is None else x.data_ptr() for x in tensors), *numbers, 0)

    monkeypatch.setattr(native, "extension", lambda: emulated)
    monkeypatch.setattr(native, "launch", launch)
    monkeypatch.setattr(native, "on_gpu", lambda x: True)
