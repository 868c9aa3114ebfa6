"""Kernels of csrc/ for the GPU at hand, compiled by NVRTC at their first launch and kept on disk.

An extension that was built without nvcc holds the host's part of X.cu alone. NVRTC comes with torch for CUDA; the
machine code that it makes goes to the driver, see csrc/driver/.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import replacing

PACKAGE = Path(__file__).parents[1]
INSTALL = {12: "pip install nvidia-cuda-nvrtc-cu12", 13: "pip install 'nvidia-cuda-nvrtc==13.*'"}


def csrc() -> Path:
    """The sources: beside the package in a checkout, in it where a wheel was installed."""
    return next((path for path in (PACKAGE.parent / "csrc", PACKAGE / "csrc") if (path / "gpu.h").exists()), PACKAGE)


def candidates() -> list[str]:
    """Files that may be NVRTC: of pip's packages, then of a toolkit."""
    package = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    folders = [place / folder for place in places for folder in ("cuda_nvrtc/lib", "cu13/lib")]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64"))
    return [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.*"), reverse=True)]


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            OSError: It is no library, or of a kind that this does not know.
        """
        self.library = ctypes.CDLL(path)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        try:
            self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
            archs = (ctypes.c_int * count.value)()
            self.call("nvrtcGetSupportedArchs", archs)
        except AttributeError as error:
            raise OSError(str(error)) from None
        self.version, self.archs = (major.value, minor.value), tuple(archs)

    def call(self, function: str, *args: Any) -> None:
        if status := getattr(self.library, function)(*args):
            raise RuntimeError(f"{function} fails with status {status}")

    def fitting(self, capability: int) -> int | None:
        """The architecture whose machine code runs on a GPU of ten times that compute capability."""
        return max((arch for arch in self.archs if capability // 10 * 10 <= arch <= capability), default=None)

    def compile(self, source: Path, names: Sequence[str], arch: int, *options: str) -> tuple[bytes, str]:
        """Kernels of a file: machine code and PTX.

        Args:
            names: As C++ says them, without arguments: f<int, 4>.

        Raises:
            RuntimeError: It does not compile; the message is NVRTC's log.
        """
        program = ctypes.c_void_p()

        def output(kind: str) -> bytes:
            size = ctypes.c_size_t()
            self.call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            self.call(f"nvrtcGet{kind}", program, buffer)
            return buffer.raw

        text = (source.read_bytes(), source.name.encode())
        self.call("nvrtcCreateProgram", ctypes.byref(program), *text, 0, None, None)
        flags = [f"--gpu-architecture=sm_{arch}", "-std=c++17", f"-I{source.parent}", *options]
        try:
            for name in names:
                self.call("nvrtcAddNameExpression", program, name.encode())
            given = (ctypes.c_char_p * len(flags))(*map(os.fsencode, flags))
            try:
                self.call("nvrtcCompileProgram", program, len(flags), given)
            except RuntimeError:
                log = output("ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"NVRTC, {source.name} for sm_{arch}: {log}") from None
            return output("CUBIN"), output("PTX").rstrip(b"\0").decode()
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def find(capability: int, driver: int) -> tuple[Nvrtc, int] | str:
    """The library for a GPU and the architecture it is to compile for; or why there is none.

    Args:
        capability: Ten times the compute capability, 70 for a V100.
        driver: The CUDA generation of its driver, as 12: it loads no machine code of a newer one.
    """
    seen = []
    for path in candidates():
        try:
            nvrtc = Nvrtc(path)
        except (OSError, RuntimeError):
            continue
        seen.append(nvrtc)
        if nvrtc.version[0] <= driver and (arch := nvrtc.fitting(capability)):
            return nvrtc, arch
    versions = ", ".join(".".join(map(str, nvrtc.version)) for nvrtc in seen)
    has = f"NVRTC {versions} is there" if seen else "there is no NVRTC"
    wanted = INSTALL[12 if driver < 13 or capability < 75 else 13]
    return f"{has}, and none that compiles kernels for sm_{capability} and a driver of CUDA {driver}: {wanted}"


def source_of(name: str) -> Path:
    """The file that has a kernel, by its C++ name.

    Raises:
        RuntimeError: None has.
    """
    plain = re.sub(r"<.*", "", name).rpartition("::")[2]
    for source in sorted(csrc().glob("*.cu")):
        text = source.read_text(encoding="utf-8")
        included = [source.with_name(header) for header in re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE)]
        text += "".join(header.read_text(encoding="utf-8") for header in included)
        if re.search(rf"^__global__ .*\b{plain}\(", text, re.MULTILINE):
            return source
    raise RuntimeError(f"no file of {csrc()} has the kernel {name}")


def machine_code(name: str, nvrtc: Nvrtc, arch: int, folder: Path) -> bytes:
    """A kernel's, from the folder where it has been compiled before."""
    source = source_of(name)
    files = [source, *sorted(source.parent.glob("*.h"))]
    digest = hashlib.blake2b(f"{name} {arch} {nvrtc.version}".encode(), digest_size=12)
    for file in files:
        digest.update(file.read_bytes())
    kept = folder / f"{source.stem}-sm_{arch}-{digest.hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    code, _ = nvrtc.compile(source, [name], arch)
    with contextlib.suppress(OSError), replacing(kept) as temporary:  # else the next process compiles it anew
        temporary.write_bytes(code)
    return code
