"""Registers, spills and loads of the kernels in csrc/, without a GPU: what `rows` adds to `bench.resources`.

sm_80 and sm_90 are compiled by nvcc, exactly as the extension is. sm_70, which nvcc 13 no longer knows, is compiled by
NVRTC 12.8 (pip install nvidia-cuda-nvrtc-cu12): the same kernels, from the device code alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from epigraf_fast.ops import nvrtc

from .limits import Row, cuobjdump, occupancy

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = CSRC.parent / "build" / "csrc"
NVCC_ARCHS, NVRTC_ARCHS = (80, 90), (70,)
SIZES = {"float": 4, "Half": 2, "BFloat16": 2, "double": 8}
BLOCK_WARPS = 8  # every launch of csrc/ has blocks of 256 threads


def sources() -> list[Path]:
    """The CUDA files."""
    return sorted(CSRC.glob("*.cu"))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(_cuda_home(), "bin"))


def _cuda_home() -> str:
    return os.environ.get("CUDA_HOME", "/usr/local/cuda")


def find_nvrtc() -> nvrtc.Nvrtc | None:
    """NVRTC 12, the last one that knows sm_70."""
    found = nvrtc.find(NVRTC_ARCHS[0], 12)
    return None if isinstance(found, str) else found[0]


def lacking(arch: int) -> str | None:
    """Why nothing can be compiled for the architecture here; None if it can."""
    if find_nvcc() is None:
        return "nvcc is not installed"
    if shutil.which("c++filt") is None:
        return "c++filt is not installed (binutils)"
    if arch in NVRTC_ARCHS and find_nvrtc() is None:
        return "NVRTC 12 is not installed: pip install nvidia-cuda-nvrtc-cu12"
    return None


def rows(archs: tuple[int, ...], files: list[Path] | None = None) -> list[Row]:
    """One row a kernel and architecture, with the keys of `bench.resources`.

    Args:
        archs: Of 70, 80 and 90.
        files: CUDA files; default all.

    Raises:
        RuntimeError: A tool is missing, or a file does not compile.
    """
    found = []
    for arch in archs:
        reason = lacking(arch)
        if reason is not None:
            raise RuntimeError(f"bench.resources: sm_{arch}: {reason}")
        for source in sources() if files is None else files:
            found += _rows_of_file(source, arch)
    return found


def compiled(source: Path, arch: int) -> tuple[Path, Path]:
    """The device code of a file, with line numbers: machine code and PTX. Compiled once for a content of csrc/.

    Raises:
        RuntimeError: It does not compile, or a tool is missing (see `lacking`).
    """
    files = [source, *sorted(CSRC.glob("*.h")), Path(__file__)]
    library = find_nvrtc()
    tools = [_run(find_nvcc(), "--version"), str(library and library.version), str(arch)]
    digest = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), *map(str.encode, tools)])).hexdigest()
    found = [CACHE / f"{source.stem}-sm_{arch}-{digest[:16]}.{kind}" for kind in ("image", "ptx")]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{source.stem}-sm_{arch}.lock", "w") as lock:  # for all processes of the tests once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(path.exists() for path in found):
            _compile(source, arch, found)
    return found[0], found[1]


def _compile(source: Path, arch: int, found: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        image, ptx = Path(folder, "image"), Path(folder, "ptx")
        if arch in NVCC_ARCHS:
            code = f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
            options = ["-std=c++17", "-O3", "-lineinfo", "-gencode", code, "-fatbin"]
            _run(find_nvcc(), *options, str(source), "-o", str(image))
            ptx.write_text(_run(cuobjdump(), "-ptx", str(image)))
        else:
            cubin, text = find_nvrtc().compile(source, kernel_names(source), arch, "-lineinfo")
            image.write_bytes(cubin)
            ptx.write_text(text)
        for made, path in zip((image, ptx), found, strict=True):
            made.replace(path)


def _rows_of_file(source: Path, arch: int) -> list[Row]:
    image, ptx_file = compiled(source, arch)
    usage, ptx = _run(cuobjdump(), "-res-usage", str(image)), ptx_file.read_text()
    found = re.findall(r"Function (\S+?):\s+(REG:.*)", usage)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^\}", ptx, re.MULTILINE | re.DOTALL))
    cases = demangled([name for name, _ in found])
    return [_row(arch, case, numbers, bodies[name]) for (name, numbers), case in zip(found, cases, strict=True)]


def _row(arch: int, case: str, numbers: str, ptx: str) -> Row:
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", numbers)}
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    row = {
        "arch": arch,
        "case": case,
        "kernel": case.split("<")[0],
        "registers": usage["REG"],
        "spill": usage["STACK"] + usage["LOCAL"],
        "shared": usage["SHARED"],
        "warps": BLOCK_WARPS,
        "load_bits": max((int(vector or 1) * int(bits) for vector, bits in loads), default=0),
        "plane_bits": None,
        "atomic": None,
        "products": [],
        "occupancy": occupancy(usage["REG"], usage["SHARED"], BLOCK_WARPS, arch),
    }
    return row | {"problems": problems(row)}


def problems(row: Row) -> list[str]:
    """Where a kernel falls short: it spills, or what it loads is narrower than its template says."""
    found = [f"spills {row['spill']} bytes"] if row["spill"] else []
    vector = re.match(r"(?:bias_act|upfirdn2d|layer_epilogue|modulation)\w*<(\w+), (\d+)", row["case"])
    if vector and row["load_bits"] < min(8 * SIZES[vector[1]] * int(vector[2]), 128):
        found.append(f"loads at most {row['load_bits']} bits at once")
    return found


def demangled(names: list[str]) -> list[str]:
    """C++ names without return types, arguments and our namespaces."""
    lines = _run("c++filt", *names).splitlines() if names else []
    return [re.sub(r"epigraf::|device::", "", _expression(line)) for line in lines]


def _expression(name: str) -> str:
    """`void f<(E)1>(A)` -> `f<(E)1>`."""
    name = name.removeprefix("void ")
    return name[: name.rindex("(")]


def kernel_names(source: Path) -> list[str]:
    """The kernels that a file launches, as C++ expressions: those that nvcc finds."""
    names = re.findall(r"\.entry (\w+)\(", compiled(source, NVCC_ARCHS[0])[1].read_text())
    return [_expression(line) for line in _run("c++filt", *names).splitlines()]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"bench.resources: {' '.join(command[:6])} ... failed:\n{result.stdout}{result.stderr}")
    return result.stdout
