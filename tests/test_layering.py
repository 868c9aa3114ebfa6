"""Who may import whom: train.py -> tools -> training -> models -> ops -> {reference | kernels | _C}.

Imports are read from the source, those inside functions too, so nothing has to be importable here.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from epigraf_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "epigraf_fast"

# room -> what it may import of this repository.
BASE = {"atomic", "camera", "errors", "machine", "progress"}
HALL = {"config", "data", "files", *BASE}
ALLOWED = {
    "train": {"__main__"},
    "__main__": {"tools", "tools.command"},
    "tools": {"tools", "tools.command", "training", "models", "ops", "reference", "kernels", "_C", *HALL},
    "tools.command": {"errors", "progress"},
    "training": {"training", "models", "ops", "config", "data", *BASE},
    "models": {"models", "ops", "config", *BASE},
    "ops": {"ops", "reference", "kernels", "_C", "atomic", "machine"},
    "reference": {"reference"},
    "kernels": {"kernels"},
    "data": {"config", "files", *BASE},
    "files": {"errors"},
    "config": BASE,
    "camera": {"errors"},
    "errors": set(),
    "atomic": set(),
    "machine": set(),
    "progress": set(),
    "__init__": set(),
}
# room -> what it may import besides Python's own modules, where that is a rule.
ALLOWED_OUTSIDE = {
    "reference": {"torch"},
    "ops": {"torch", "nvtx"},
    "kernels": {"torch", "triton"},
    "camera": {"torch"},
    "progress": {"tqdm"},
    "tools.command": set(),
    "atomic": set(),
    "machine": set(),
    "__main__": set(),
    "__init__": set(),
}

NEVER = {"bench", "tests", "checks", "kernels", "train"}  # under these names

SOURCES = [ROOT / "train.py", *sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
OPS = sorted(path.stem for path in (PACKAGE / "reference").glob("*.py") if path.stem != "__init__")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("epigraf_fast", *parts)
    return ".".join(parts)


def room_of(module: str) -> str:
    """`epigraf_fast.ops.composite` -> `ops`; `epigraf_fast` -> `__init__`; of another package, its name.

    What begins a command, before anything large is imported, is a room of its own.
    """
    first, *rest = module.split(".")
    if first != "epigraf_fast":
        return first
    if rest == ["tools", "command"]:
        return "tools.command"
    return rest[0] if rest else "__init__"


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports."""
    module = module_name(path)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, node.module or ""]).strip(".")
            # `from package import x` imports a module if there is one of that name, else a name inside the package.
            modules = [f"{source}.{alias.name}" for alias in node.names if is_module(f"{source}.{alias.name}")]
            found += [(node.lineno, name) for name in modules or [source]]
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def wrong_imports(path: Path) -> list[str]:
    """What a file imports against the rules."""
    room = room_of(module_name(path))
    ours, outside = ALLOWED[room], ALLOWED_OUTSIDE.get(room)
    wrong = []
    for line, name in imports(path):
        target = room_of(name)
        if name == "epigraf_fast":  # its version
            fine = True
        elif name.startswith("epigraf_fast."):
            fine = target in ours
        else:
            allowed = outside is None or target in outside or target in sys.stdlib_module_names
            fine = allowed and target not in NEVER
        if not fine:
            wrong.append(f"line {line}: {name}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    wrong = wrong_imports(path)
    assert not wrong, f"{path.relative_to(ROOT)} may not import {'; '.join(wrong)}"


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("train.py", "from epigraf_fast.ops import composite"),
        ("epigraf_fast/training/step.py", "from ..reference.composite import composite"),
        ("epigraf_fast/training/step.py", "from ..tools import doctor"),
        ("epigraf_fast/models/layers.py", "from ..training import losses"),
        ("epigraf_fast/models/layers.py", "def f():\n    import epigraf_fast.reference.bias_act"),
        ("epigraf_fast/ops/bias_act.py", "from ..config import Config"),
        ("epigraf_fast/ops/bias_act.py", "import kernels.bias_act"),
        ("epigraf_fast/training/step.py", "import bench.step"),
        ("epigraf_fast/reference/bias_act.py", "from ..errors import UserError"),
        ("epigraf_fast/reference/bias_act.py", "import numpy as np"),
        ("epigraf_fast/camera.py", "from .config import Config"),
        ("epigraf_fast/tools/doctor.py", "from tests import checks"),
        ("epigraf_fast/tools/doctor.py", "import kernels"),
        ("epigraf_fast/tools/command.py", "import torch"),
        ("epigraf_fast/tools/command.py", "from . import arguments"),
        ("epigraf_fast/progress.py", "import numpy"),
        ("epigraf_fast/__main__.py", "import tyro"),
        ("epigraf_fast/config.py", "from .tools import doctor"),
        ("kernels/__init__.py", "from epigraf_fast.ops import backends"),
        ("kernels/__init__.py", "import numpy"),
    ],
)
def test_wrong_imports_are_found(file: str, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: statement)
    assert wrong_imports(ROOT / file)


def test_rooms_are_seen() -> None:
    assert {
        "train",
        "training",
        "models",
        "ops",
        "reference",
        "kernels",
        "tools",
        "camera",
        "errors",
        "config",
        "data",
    } <= {room_of(module_name(path)) for path in SOURCES}


@pytest.mark.parametrize(
    ("file", "statement", "expected"),
    [
        ("epigraf_fast/models/layers.py", "from .. import ops", ["epigraf_fast.ops"]),
        ("epigraf_fast/models/layers.py", "from ..ops import bias_act", ["epigraf_fast.ops.bias_act"]),
        ("epigraf_fast/models/layers.py", "from ..errors import UserError", ["epigraf_fast.errors"]),
        ("epigraf_fast/ops/__init__.py", "from .composite import Composite", ["epigraf_fast.ops.composite"]),
        ("epigraf_fast/tools/doctor.py", "from .. import __version__", ["epigraf_fast"]),
        ("train.py", "from epigraf_fast import config, data", ["epigraf_fast.config", "epigraf_fast.data"]),
        ("kernels/__init__.py", "def f():\n    import triton.language as tl", ["triton.language"]),
    ],
)
def test_imports_are_read(file: str, statement: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: statement)
    assert [name for _, name in imports(ROOT / file)] == expected


def test_the_ops_are_those_of_the_reference() -> None:
    assert sorted([*backends.OPS, *backends.PARTS]) == OPS


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files(op: str) -> None:
    for file in (f"epigraf_fast/ops/{op}.py", f"tests/ops/test_{op}.py"):
        assert (ROOT / file).is_file(), f"{op}: there is no {file}"


def test_kernels_are_named_after_ops() -> None:
    """Or hold what such files import."""
    files = {path.stem: path for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__"}
    shared = {name for path in files.values() for _, name in imports(path)}
    assert {name for name in files if f"epigraf_fast.kernels.{name}" not in shared} <= set(OPS)


def test_csrc_is_named_after_ops() -> None:
    sources = {path.stem for path in (ROOT / "csrc").glob("*.c*")} - {"bindings", "launchers"}
    assert sources <= set(OPS)


LONGEST = 450  # lines of a file of these rooms; beyond, its head says why it is one file
LONG = {"bindings.cpp": "every argument of every launcher", "upfirdn2d.cpp": "hence one file"}


def test_files_are_short_or_say_why() -> None:
    rooms = ("epigraf_fast/ops", "kernels", "csrc")
    long = {
        path.name: path.read_text(encoding="utf-8")
        for room in rooms
        for path in (ROOT / room).iterdir()
        if path.suffix in (".py", ".h", ".cpp", ".cu") and path.read_text(encoding="utf-8").count("\n") > LONGEST
    }
    assert set(long) == set(LONG)
    for name, reason in LONG.items():
        assert reason in long[name][:600], name


def test_the_loop_is_read_in_one_sitting() -> None:
    assert len((PACKAGE / "tools" / "train.py").read_text(encoding="utf-8").splitlines()) <= 200


# What asks torch's current GPU on purpose: launchers make a tensor's GPU the current one, commands that of --device.
OF_THE_CURRENT_GPU = {("native.py", "get_device_capability"), ("tuning.py", "synchronize")}


def test_what_is_asked_of_a_gpu_names_it() -> None:
    """Without a device torch's functions mean its current one, which need not be the one that computes."""
    asking = re.compile(
        r"torch\.cuda\.(current_stream|default_stream|synchronize|get_device_\w+|mem_get_info|memory_\w+|max_memory_\w+|"
        r"reset_peak_memory_stats|Stream)\(\)"
    )
    found = {(path.name, match[1]) for path in SOURCES for match in asking.finditer(path.read_text(encoding="utf-8"))}
    assert found == OF_THE_CURRENT_GPU


def test_the_hall_is_small() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *HALL}


def test_nothing_imports_in_a_circle() -> None:
    modules = {module_name(path): path for path in SOURCES}
    below = {name: {target for _, target in imports(path) if target in modules} for name, path in modules.items()}
    packages = {name: f"{name}.__init__" for name in {module.rpartition(".")[0] for module in modules}}
    for name, path in modules.items():
        below[name] |= {packages[target] for _, target in imports(path) if packages.get(target) in modules}
        below[name].discard(name)
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(below[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())
