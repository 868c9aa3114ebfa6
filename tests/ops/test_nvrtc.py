"""The extension without nvcc: kernels that NVRTC compiles when they are first launched, through the driver's library.

A stand-in for that executes their PTX.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.ptx import Program, csrc_host, csrc_launch
from checks import HANG, assert_close, draw
from epigraf_fast import ops
from epigraf_fast.ops import native, nvrtc

ARCH, DRIVER = 70, 12
OTHERS = ("bias_act", "modulation", "upfirdn2d")
NAME = "epigraf::device::bias_act_elements_kernel<float, 4, false, (epigraf::device::Order)0>"


@pytest.fixture(scope="module")
def library() -> nvrtc.Nvrtc:
    found = nvrtc.find(ARCH, DRIVER)
    if isinstance(found, str):
        pytest.skip(found)
    return found[0]


class Gpu:
    """What the stand-in was asked for; launches are executed."""

    def __init__(self, path: Path, library: nvrtc.Nvrtc) -> None:
        self.stand_in, self.library = ctypes.CDLL(str(path)), library
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.answer = 0
        self.programs: dict[str, Program] = {}
        self.raised: list[BaseException] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p)
        self.recorder = kind(self.launch)
        self.stand_in.stand_in_record(self.recorder)

    def machine_code(self, name: str) -> bytes:
        self.compiled.append(name)
        code, ptx = self.library.compile(nvrtc.source_of(name), [name], ARCH)
        program = Program(ptx)
        (symbol,) = program.entries
        self.programs[symbol] = program
        return code

    def launch(self, kernel: bytes, sizes: ctypes.Array, arguments: int) -> int:
        if self.answer:
            return self.answer
        try:
            name = kernel.decode()
            program, params = self.programs[name], bytearray()
            pointers = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
            for i, param in enumerate(program.entries[name].parameters):
                params += bytes(param.offset - len(params)) + ctypes.string_at(pointers[i], param.size)
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            options = {"params": bytes(params), "tensors": self.tensors, "arch": ARCH, "count": False}
            program.launch(name, grid=grid, block=block, **options)
            self.launched.append(name)
        except BaseException as error:  # C++ is between here and who should hear of it
            self.raised.append(error)
        return 0


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    target = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = csrc_host.CSRC / "tests" / "stand_in_driver.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture
def gpu(stand_in: Path, library: nvrtc.Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The ops' backend cpu launches the kernels of csrc/ through the driver's library."""
    emulated = csrc_host.module()
    if isinstance(emulated, str):
        pytest.skip(emulated)
    extension = csrc_host.load(Path(shutil.copy(emulated.__file__, tmp_path)))  # a driver stays open
    gpu = Gpu(stand_in, library)
    extension.set_cuda_compiler(gpu.machine_code)
    extension.open_cuda_driver(str(stand_in))

    def launch(name: str, tensors: list[torch.Tensor | None], *numbers: float) -> None:
        gpu.tensors = csrc_launch.named(name, tensors)
        addresses = (0 if x is None else x.data_ptr() for x in tensors)
        getattr(extension, f"{name}_cuda")(*addresses, *numbers, 0)

    monkeypatch.setattr(native, "extension", lambda: extension)
    monkeypatch.setattr(native, "launch", launch)
    monkeypatch.setattr(native, "on_gpu", lambda x: True)
    yield gpu
    gpu.stand_in.stand_in_use_context(0)
    assert not gpu.raised


def results(backend: str) -> list[torch.Tensor]:
    """bias_act, upfirdn2d and a layer's epilogue, with gradients."""
    x, bias = draw(2, 8, 6, 5, dtype=torch.float32), draw(8, seed=1, dtype=torch.float32)
    noise, strength = draw(1, 1, 6, 5, seed=2, dtype=torch.float32), torch.tensor(0.3)
    filter_ = torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64
    inputs = [tensor.requires_grad_() for tensor in (x, bias, strength)]
    y = ops.bias_act(x, bias, act="lrelu", backend=backend)
    y = ops.layer_epilogue(y, noise=noise, strength=strength, bias=bias, act="lrelu", backend=backend)[0]
    y = ops.upfirdn2d(y, filter_, up=2, padding=[2, 1, 2, 1], backend=backend)
    return [y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=3, dtype=torch.float32)).sum(), inputs)]


def test_ops_go_through_the_driver(gpu: Gpu) -> None:
    """Every launch has the kernel, sizes and arguments that the PTX of a V100 needs to give the reference's numbers."""
    names = ("y", "x", "bias", "strength")
    for actual, expected, name in zip(results("cpu"), results("reference"), names, strict=True):
        assert_close(actual, expected, name, torch.float32)
    compiled = len(gpu.compiled)
    assert len(gpu.launched) == compiled > 6
    results("cpu")
    assert len(gpu.launched) == 2 * compiled
    assert len(gpu.compiled) == compiled  # they stay


def call() -> torch.Tensor:
    return ops.bias_act(torch.ones(1, 4, 2, 2), backend="cpu")


def test_what_fails_is_told(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = native.extension()

    def compile_(code: bytes | Exception) -> Callable[[str], bytes]:
        def run(name: str) -> bytes:
            if isinstance(code, Exception):
                raise code
            return code

        return run

    extension.set_cuda_compiler(compile_(ValueError("no luck")))
    with pytest.raises(RuntimeError, match=r"^no luck$"):
        call()
    extension.set_cuda_compiler(compile_(b"text"))
    with pytest.raises(
        RuntimeError, match=r"bias_act_elements_kernel<.*: its code does not load: device kernel image is"
    ):
        call()
    extension.set_cuda_compiler(gpu.machine_code)
    assert_close(call(), torch.ones(1, 4, 2, 2), "y", torch.float32)  # nothing is left of it
    gpu.answer = 1
    with pytest.raises(RuntimeError, match=r"bias_act_elements_kernel<.*: the launch failed: invalid argument"):
        call()
    gpu.answer = 99
    with pytest.raises(RuntimeError, match="the launch failed: CUDA error 99"):
        call()


def test_every_gpu_loads_for_itself(gpu: Gpu) -> None:
    for context, compiled in ((1, 1), (2, 2), (1, 2), (2, 2)):
        gpu.stand_in.stand_in_use_context(context)
        call()
        assert len(gpu.compiled) == compiled
    assert gpu.compiled[0] == gpu.compiled[1]


def test_a_thread_that_has_used_no_gpu_takes_the_right_one(gpu: Gpu) -> None:
    extension = native.extension()
    gpu.stand_in.stand_in_use_context(0)
    extension.use_cuda_device(3)
    assert gpu.stand_in.stand_in_context() == 103
    extension.use_cuda_device(2)  # torch has set it
    assert gpu.stand_in.stand_in_context() == 103
    gpu.stand_in.stand_in_use_context(0)
    with pytest.raises(RuntimeError, match="GPU 9: invalid device ordinal"):
        extension.use_cuda_device(9)


def test_threads_wait_for_a_compilation_without_holding_it_up(gpu: Gpu) -> None:
    """As autograd's does, while the main thread launches too."""
    extension, compiling = native.extension(), threading.Event()

    def compile_(name: str) -> bytes:
        compiling.set()
        time.sleep(0.2)  # the other thread gets Python meanwhile
        return gpu.machine_code(name)

    extension.set_cuda_compiler(compile_)
    launches = threading.Thread(target=call, daemon=True)
    launches.start()
    assert compiling.wait(HANG)
    other = threading.Thread(target=extension.use_cuda_device, args=(0,), daemon=True)
    other.start()
    for thread in (launches, other):
        thread.join(HANG)
        assert not thread.is_alive()
    assert len(gpu.compiled) == len(gpu.launched) == 1


def test_a_driver_that_is_missing_or_too_old_is_told(stand_in: Path, tmp_path: Path) -> None:
    emulated = csrc_host.module()
    if isinstance(emulated, str):
        pytest.skip(emulated)
    extension = csrc_host.load(Path(shutil.copy(emulated.__file__, tmp_path)))
    with pytest.raises(RuntimeError, match=r"the GPU's driver cannot be opened: .*nowhere"):
        extension.open_cuda_driver(str(tmp_path / "nowhere.so"))
    other = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(other)], check=True)
    with pytest.raises(RuntimeError, match="has no cuCtxGetCurrent: update the driver"):
        extension.open_cuda_driver(str(other))


def no_space(*args: object) -> None:
    raise OSError("no space left")


def test_machine_code_is_kept(library: nvrtc.Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = nvrtc.machine_code(NAME, library, ARCH, tmp_path / "kernels")
    assert code.startswith(b"\x7fELF")
    assert b"bias_act_elements_kernel" in code
    assert [path.read_bytes() for path in (tmp_path / "kernels").iterdir()] == [code]
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc.os, "replace", no_space)
        assert len(nvrtc.machine_code(NAME, library, ARCH, tmp_path / "full")) == len(code)
    assert not list((tmp_path / "full").iterdir())  # nothing half is left
    assert len(nvrtc.machine_code(NAME, library, ARCH, tmp_path / "file")) == len(code)  # where nothing can be kept
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", None)
    assert nvrtc.machine_code(NAME, library, ARCH, tmp_path / "kernels") == code
    with pytest.raises(TypeError):  # for another GPU it would be compiled
        nvrtc.machine_code(NAME, library, 80, tmp_path / "kernels")


def test_what_does_not_compile_is_told(library: nvrtc.Nvrtc, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC, bias_act.cu for sm_70: [\s\S]*no_such_type"):
        library.compile(nvrtc.csrc() / "bias_act.cu", [NAME.replace("float", "no_such_type")], ARCH)
    with pytest.raises(RuntimeError, match=r"no file of .* has the kernel epigraf::no_kernel<1>"):
        nvrtc.source_of("epigraf::no_kernel<1>")


@pytest.mark.parametrize(
    ("there", "capability", "driver", "found"),
    [
        ([(12, 8)], 70, 12, ((12, 8), 70)),
        ([(12, 8)], 86, 13, ((12, 8), 86)),
        ([(12, 8)], 87, 13, ((12, 8), 86)),  # machine code of its generation
        ([(13, 0), (12, 8)], 90, 13, ((13, 0), 90)),
        ([(13, 0), (12, 8)], 90, 12, ((12, 8), 90)),  # the driver is older than the first
        ([(13, 0), (12, 8)], 70, 13, ((12, 8), 70)),  # the first is too new for a V100
        ([(13, 0)], 70, 13, "NVRTC 13.0 is there, .* sm_70 and .* CUDA 13: pip install nvidia-cuda-nvrtc-cu12"),
        ([(12, 8)], 103, 13, "NVRTC 12.8 is there, .* sm_103 and .* CUDA 13: pip install 'nvidia-cuda-nvrtc==13.*'"),
        ([], 80, 12, "there is no NVRTC, .*: pip install nvidia-cuda-nvrtc-cu12"),
        ([None], 80, 13, "there is no NVRTC, .*: pip install 'nvidia-cuda-nvrtc==13.*'"),
    ],
)
def test_which_library_fits(
    there: list[tuple[int, int] | None],
    capability: int,
    driver: int,
    found: tuple | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archs = {(12, 8): (70, 80, 86, 90, 120), (13, 0): (75, 80, 86, 90, 100, 103, 120)}

    def stand_in(version: tuple[int, int] | None) -> SimpleNamespace:
        if version is None:
            raise OSError("no library")
        made = SimpleNamespace(version=version, archs=archs[version])
        made.fitting = lambda capability: fitting(made, capability)
        return made

    fitting = nvrtc.Nvrtc.fitting
    monkeypatch.setattr(nvrtc, "candidates", lambda: there)
    monkeypatch.setattr(nvrtc, "Nvrtc", stand_in)
    actual = nvrtc.find.__wrapped__(capability, driver)
    if isinstance(found, str):
        assert re.match(found, actual)
    else:
        assert (actual[0].version, actual[1]) == found


def test_a_process_that_had_a_compiler_ends() -> None:
    emulated = csrc_host.module()
    if isinstance(emulated, str):
        pytest.skip(emulated)
    program = "import sys; from pathlib import Path; from bench.ptx import csrc_host\n"
    program += "csrc_host.load(Path(sys.argv[1])).set_cuda_compiler(lambda name: b'')"
    subprocess.run([sys.executable, "-c", program, emulated.__file__], cwd=csrc_host.CSRC.parent, check=True)


def test_status_asks_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(cuda_built=True, set_cuda_compiler=None, build_info=lambda: {"cuda": "nvrtc"})
    monkeypatch.setattr(native, "extension", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    asked = []
    monkeypatch.setattr(nvrtc, "find", lambda *place: asked.append(place) or "there is no NVRTC")
    assert native.lacking("cuda") == "there is no NVRTC"
    with pytest.raises(RuntimeError, match="there is no NVRTC"):
        native._machine_code(NAME)
    assert asked == [(70, 12)] * 2
    monkeypatch.setattr(nvrtc, "find", lambda *place: ("library", 70))
    assert native.lacking("cuda") is None


@pytest.mark.parametrize(
    "name", ["layer_epilogue", *(pytest.param(name, marks=pytest.mark.compiled) for name in OTHERS)]
)
def test_files_compile_without_nvcc(name: str) -> None:
    """As setup.py compiles them; the tests above have the emulation's words for what differs."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("there is no C++ compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-w", f"-I{csrc_host.DRIVER}", "-include", "cuda_runtime.h"]
    flags += [*csrc_host.CUDA, "-x", "c++"]
    subprocess.run([*compiler, *flags, str(csrc_host.CSRC / f"{name}.cu")], check=True)
