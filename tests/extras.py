"""Installs each extra alone and runs what docs/install.md says it brings: `python tests/extras.py [EXTRA ...]`.

Every extra gets a virtual environment of its own with the tested versions from the package index; of the one that runs
this only torch is lent, with what torch needs. The commands are small, on a run of a few steps. `make extras` does all;
no test does, as it downloads some hundred megabytes. Exit status 1 if one cannot be installed or a command fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any
from unittest import mock

import setuptools

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "extras"
LENT = ("torch", "triton")

TINY = """--batch 4 --kimg 0.008 --log-kimg 0.004 --device cpu --turntable 2 --grid 2 1 --no-tune --patch.resolution 16
    --generator.channel-base 256 --generator.channel-max 16 --generator.plane-channels 4
    --generator.plane-resolution 32 --generator.decoder-hidden 8 --renderer.coarse-samples 4 --renderer.fine-samples 4
    --discriminator.channel-base 128 --discriminator.channel-max 16 --discriminator.code-dim 16"""
TOOLS = (
    "render grid RUN --out OUT/x.png --seeds 0 --show rgb depth normals --resolution 16",
    "render turntable RUN --out OUT/x.mp4 --seeds 0 --frames 2 --resolution 16",
    "mesh RUN --out OUT/x.ply OUT/x.glb OUT/x.mrc OUT/m.png --resolution 12",
    "convert RUN --out OUT/converted",
    "figures curves RUN --out OUT/c.png",
    "figures schedules --out OUT/s.png",
    "data check builtin --preset demo --plot OUT/p.png",
    "data convert to-eg3d epigraf_fast/builtin/objects64.zip --out OUT/labels.json",
)
METRICS = ("metrics RUN --images 4 --objects 1 --plot OUT/d.png",)
# extra -> commands, of `epigraf` or of Python. RUN is a run, OUT a folder, MESHES one of meshes.
LINES: dict[str, tuple[str, ...]] = {
    "demo": (f"train demo --run-dir OUT/run --metric-images 4 {TINY}",),
    "metrics": METRICS,
    "profiling": (f"train demo --run-dir OUT/run --metric-images 0 --profile {TINY}", "python -c 'import nvtx'"),
    "make_dataset": ("data make --recipe megascans --meshes MESHES --out OUT/x.zip --views 2 --resolution 8",),
    "tools": TOOLS,
    "viewer": (*TOOLS, *METRICS, "viewer RUN --port 0"),
    "bench": ("python -m bench.ops --size tiny --op bias_act --device cpu --mode fwd --budget 0.02",),
}
APART = {"test"}  # is what runs this

CUBE = """solid cube
{}
endsolid cube
"""


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py installs, and its extras."""
    captured: dict[str, Any] = {}
    with mock.patch.object(setuptools, "setup", captured.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return captured["install_requires"], captured["extras_require"]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def lent() -> set[Path]:
    """The files and folders of torch here, and of what it needs."""
    queue, seen, found = list(LENT), set(), set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        folder = Path(package.locate_file(""))
        tops = {file.parts[0] for file in package.files or () if not file.parts[0].startswith(("..", "/"))}
        found |= {folder / top for top in tops if top != "__pycache__"}
        queue += [name_of(one) for one in package.requires or () if "extra ==" not in one]
    return found


def make(extra: str) -> Path:
    """The Python of a new environment that has the extra alone. Raises CalledProcessError where pip fails."""
    place = FOLDER / extra
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    for path in lent():
        target = packages / path.name
        if not target.exists():
            target.symlink_to(path)
    always, extras = requirements()
    wanted = [one for one in (*always, *extras[extra]) if name_of(one) not in LENT]
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*command, *wanted], check=True)
    return python


def words_of(line: str, python: Path, out: Path, run: Path, meshes: Path) -> list[str]:
    """The command line, with its places."""
    places = {"RUN": str(run), "MESHES": str(meshes)}
    words = [places.get(word, word).replace("OUT", str(out)) for word in shlex.split(line)]
    return [str(python), *(words[1:] if words[0] == "python" else ["-m", "epigraf_fast", *words])]


def succeeds(words: list[str]) -> bool:
    """Runs one; a viewer is ended when it is there."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "bench" / "site"), str(ROOT)]),
        "PYTHONNOUSERSITE": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("viewer at"):
            process.send_signal(signal.SIGINT)
    good = process.wait() == 0
    print(f"  {'ok  ' if good else 'FAIL'} {' '.join(words[2:] if words[1] == '-m' else words[1:])[:100]}", flush=True)
    if not good:
        print("".join(said[-15:]), flush=True)
    return good


def cube() -> str:
    """A cube of side 1, as STL."""
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    facets = []
    for a, b, c, d in sides:
        for triangle in ((a, b, c), (a, c, d)):
            lines = "\n".join("vertex {} {} {}".format(*corners[i]) for i in triangle)
            facets.append(f"facet normal 0 0 0\nouter loop\n{lines}\nendloop\nendfacet")
    return CUBE.format("\n".join(facets))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/extras.py", description=__doc__.split(":")[0] + ".")
    parser.add_argument("extras", nargs="*", choices=[*LINES, []], help="default: all")
    chosen = parser.parse_args().extras or list(LINES)
    FOLDER.mkdir(parents=True, exist_ok=True)
    run, meshes = FOLDER / "run", FOLDER / "meshes"
    meshes.mkdir(exist_ok=True)
    (meshes / "cube.stl").write_text(cube())
    shutil.rmtree(run, ignore_errors=True)
    line = f"train demo --run-dir {run} --metric-images 0 {TINY}"
    if not succeeds(words_of(line, Path(sys.executable), FOLDER, run, meshes)):
        return 1
    good = True
    for extra in chosen:
        print(extra, flush=True)
        out = FOLDER / f"{extra}-out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            python = make(extra)
        except subprocess.CalledProcessError as error:
            print(f"  FAIL pip ended with {error.returncode}")
            good = False
            continue
        for one in LINES[extra]:
            good &= succeeds(words_of(one, python, out, run, meshes))
        shutil.rmtree(FOLDER / extra)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
