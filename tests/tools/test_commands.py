"""All tools alike: what each number may be, where each file may go, what stands for a checkpoint and what does not."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import stat
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import PIL.Image
import pytest
import torch
from torch import nn
from tyro.constructors import PrimitiveConstructorSpec

from checks import small_files
from command_lines import Features, run_tool
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import UserError
from epigraf_fast.progress import Progress
from epigraf_fast.tools import arguments, command
from epigraf_fast.training.checkpoint import list_checkpoints
from epigraf_fast.training.identify import what_else
from epigraf_fast.training.pretrained import load_generator, save_safetensors

# What each tool cannot do without; its numbers and outputs are tested on top. RUN and DATA exist.
REQUIRED = {
    "render": ["grid", "RUN", "--out", "out.png"],
    "mesh": ["RUN", "--out", "out.ply"],
    "metrics": ["RUN"],
    "viewer": ["RUN"],
    "project": ["RUN", "x.png", "--out", "out.png"],
    "figures": ["scales"],
    "convert": ["RUN", "--out", "out"],
    "convert_data": ["to-eg3d", "DATA", "--out", "out.json"],
    "check_data": ["DATA"],
    "make_data": ["--recipe", "builtin", "--out", "out.zip"],
}
WORDS = {"set", "device", "host", "data", "attribution"}  # options that are free text


def module(tool: str) -> ModuleType:
    return importlib.import_module(f"epigraf_fast.tools.{tool}")


def options(tool: str) -> dict[str, tuple[object, str]]:
    """Every option's type, and the word for its value where we read it ourselves."""
    found = {}
    for name, hint in typing.get_type_hints(module(tool).Options, include_extras=True).items():
        kind, *details = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        specs = [detail for detail in details if isinstance(detail, PrimitiveConstructorSpec)]
        found[name] = kind, specs[0].metavar if specs else ""
    return found


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_number(metavar: str) -> bool:
    return metavar.split()[:1] in (["INT"], ["FLOAT"])


NUMBERS = [(tool, flag_of(name)) for tool in REQUIRED for name, (_, it) in options(tool).items() if is_number(it)]
RANGES = [(tool, flag_of(name)) for tool in REQUIRED for name, (_, it) in options(tool).items() if it == "0-3,8"]


@pytest.mark.parametrize("tool", REQUIRED)
def test_every_option_has_a_type(tool: str) -> None:
    for name, (kind, metavar) in options(tool).items():
        words = {word for part in (kind, *typing.get_args(kind)) for word in typing.get_args(part) or (part,)}
        known = metavar or kind is bool or Path in words or name in WORDS or str not in words
        assert known, f"{tool} {name} takes any text"


def test_the_numbers_are_all_here() -> None:
    assert len(NUMBERS) >= 42
    assert RANGES == [
        ("render", "--seeds"),
        ("render", "--labels"),
        ("render", "--mix-seeds"),
        ("mesh", "--seeds"),
        ("mesh", "--labels"),
    ]


# Where zero, a negative or a huge number has a meaning.
ZERO = {
    *(("render", flag) for flag in ("--truncation", "--cutoff", "--yaw", "--pitch", "--yaw-range", "--pitch-range")),
    *(("mesh", flag) for flag in ("--truncation", "--cutoff", "--threshold")),
    *(("metrics", flag) for flag in ("--objects", "--turn")),  # `run` says what is wrong with no turn
    ("viewer", "--port"),
    *(("project", flag) for flag in ("--yaw", "--pitch", "--seed")),
    ("figures", "--seed"),
    ("convert", "--kimg"),
    *(("convert_data", flag) for flag in ("--yaw-offset", "--tolerance", "--distance-tolerance")),
    *(("make_data", flag) for flag in ("--min-alpha", "--min-box-volume", "--seed")),
}
NEGATIVE = {
    *(("render", flag) for flag in ("--truncation", "--yaw")),
    *(("mesh", flag) for flag in ("--truncation", "--threshold")),
    ("metrics", "--turn"),
    ("project", "--yaw"),
    ("convert_data", "--yaw-offset"),
}
HUGE = {("mesh", "--threshold")}


def parse(tool: str, text: str) -> None:
    arguments.parse(module(tool).Options, tool, "", [*REQUIRED[tool], text])


@pytest.mark.parametrize(("tool", "flag"), NUMBERS)
def test_numbers_out_of_bounds_are_one_line(tool: str, flag: str) -> None:
    texts = {"nan", "inf", "-inf", "1e999", "abc", ""}
    texts |= set() if (tool, flag) in HUGE else {"1e30", "9" * 30, "-1e30"}
    texts |= set() if (tool, flag) in ZERO else {"0"}
    texts |= set() if (tool, flag) in NEGATIVE else {"-1", "-0.5"}
    for text in texts:
        with pytest.raises(UserError) as caught:
            parse(tool, f"{flag}={text}")
        assert str(caught.value).startswith(f"{flag} must be a "), (text, caught.value)
        assert "\n" not in str(caught.value)
    for texts, tools in (("0", ZERO), ("-1", NEGATIVE), ("1e30", HUGE)):
        if (tool, flag) in tools:
            parse(tool, f"{flag}={texts}")


@pytest.mark.parametrize(("tool", "flag"), RANGES)
def test_wrong_ranges_are_one_line(tool: str, flag: str, one_error_line: Callable[..., str]) -> None:
    for text in ("abc", "0-2,9-5", "-3", "nan", "1-", "", "0-99999999", "9" * 30):
        message = one_error_line(module(tool), *REQUIRED[tool], f"{flag}={text}")
        assert message.startswith(f"error: {flag} must ")


# Flags that would do nothing


@pytest.fixture(scope="session")
def plain_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator without classes, as a folder with G_ema.safetensors alone."""
    config, generator = load_generator(tiny_run, "cpu")
    state = generator.state_dict()
    state["mapping.embed.weight"] = state["mapping.embed.weight"][:, -2:].clone()
    folder = tmp_path_factory.mktemp("plain")
    save_safetensors(state, config, folder / "G_ema.safetensors")
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "render grid PLAIN --out OUT.png --labels 0",
            "--labels does nothing here, as the generator was trained witho",
        ),
        ("mesh PLAIN --out OUT.ply --labels 0", "--labels does nothing here, as the generator was trained without"),
        ("mesh RUN --out OUT.ply --labels 1,3", "--labels must be of class from 0 to 2, got 3"),
        ("render grid RUN --out OUT.png --cutoff 3", "--cutoff does nothing without a --truncation below 1"),
        ("render grid RUN --out OUT.png --truncation 0 --cutoff 7", "--cutoff must be from 0 to 6, the style vectors"),
        (
            "render grid RUN --out OUT.png --frames 9",
            "--frames does nothing for grid, only for turntable, interpolation",
        ),
        ("render grid RUN --out OUT.png --fps 9", "--fps does nothing for grid"),
        (
            "render turntable RUN --out OUT.gif --yaw 0",
            "--yaw does nothing for turntable, only for grid, images",
        ),
        ("render steps RUN --out OUT.png --seeds 0", "--seeds must be at least two"),
        ("render mixing RUN --out OUT.png", "mixing needs --mix-seeds"),
        ("render mixing RUN --out OUT.png --mix-seeds 1 --mix-from 6", "--mix-from must be from 1 to 5"),
        ("render turntable RUN --out OUT.gif --yaw-range 1", "--yaw-range does nothing for turntable"),
        ("render interpolation RUN --out OUT.gif --columns 2", "--columns does nothing for interpolation"),
        ("render interpolation RUN --out OUT.gif --zoom 2", "--zoom does nothing for interpolation"),
        ("render grid RUN --out OUT.png --seeds 0-9999 --resolution 9999", "pixels: lower --resolution, or give fewer"),
        ("render turntable RUN --out OUT.mp4 --columns 9 --resolution 2048", "pixels: lower --resolution"),
        ("mesh RUN --out OUT.ply --seeds 4,4", "--seeds and --out must differ among themselves"),
        ("mesh RUN --out OUT.ply OUT.ply", "--seeds and --out must differ among themselves"),
        ("metrics RUN --turn 0", "--turn must not be 0"),
        ("figures curves RUN --out OUT.png --seed 3", "--seed does nothing for curves, only for modulation"),
        ("figures scales RUN --out OUT.png", "--run does nothing for scales"),
        ("figures scales --out OUT.png --batch 8", "--batch does nothing for scales, only for schedules"),
        ("figures schedules --out OUT.png --patch 512", "--patch must be below the --resolution 512, got 512"),
        ("figures modulation --out OUT.png", "modulation needs a run"),
        ("convert RUN --out OUT --kimg 3", "--kimg does nothing for a checkpoint of ours, only for a .pkl"),
        ("convert RUN --out OUT --preset cats", "--preset does nothing for a checkpoint of ours"),
        ("convert x.pkl --out OUT --names ours", "--names does nothing for a .pkl"),
        (
            "convert_data to-eg3d DATA --out OUT.json --ray-start 1",
            "--ray-start does nothing for to-eg3d, only for from-eg3d",
        ),
        ("convert_data from-eg3d DATA --out OUT.json --fov 30", "--fov does nothing for from-eg3d"),
        (
            "make_data --recipe builtin --out OUT.zip --meshes x",
            "--meshes does nothing for builtin, only for megasc",
        ),
        ("make_data --recipe builtin --out OUT.zip --resolution 48", "--resolution must be a power of two"),
        ("render grid RUN --out OUT.png --device tpu", "--device must be cpu, cuda or cuda:N, got tpu"),
        ("render grid RUN --out OUT.png --device cuda:99", "torch sees"),
    ],
)
def test_what_would_be_ignored_is_refused(
    line: str,
    words: str,
    tiny_run: Path,
    plain_run: Path,
    tiny_data: Path,
    tmp_path: Path,
    one_error_line: Callable[..., str],
) -> None:
    places = {"RUN": tiny_run, "PLAIN": plain_run, "DATA": tiny_data}
    tool, *rest = line.split()
    rest = [str(places.get(word, word)).replace("OUT", str(tmp_path / "out")) for word in rest]
    assert words in one_error_line(module(tool), *rest)
    assert not list(tmp_path.iterdir())


# Outputs. A checkpoint that is not there shows that nothing is looked at before the outputs are.

NOWHERE = "nowhere"
FILES = {
    "render grid": ["grid", NOWHERE, "--out", ".png"],
    "render video": ["turntable", NOWHERE, "--out", ".mp4"],
    "mesh": [NOWHERE, "--out", ".ply"],
    "mesh volume": [NOWHERE, "--out", ".mrc"],
    "metrics": [NOWHERE, "--out", ".json"],
    "project": [NOWHERE, "x.png", "--out", ".mp4"],
    "metrics plot": [NOWHERE, "--plot", ".pdf"],
    "figures": ["curves", NOWHERE, "--out", ".svg"],
    "convert_data": ["from-eg3d", NOWHERE, "--out", ".zip"],
    "check_data": [NOWHERE, "--plot", ".png"],
    "make_data": ["--recipe", "megascans", "--meshes", NOWHERE, "--out", ".zip"],
}


def message_for(case: str, name: object, one_error_line: Callable[..., str]) -> str:
    *before, _ = FILES[case]
    return one_error_line(module(case.split()[0]), *before, name)


@pytest.mark.parametrize("case", FILES)
def test_outputs_that_cannot_be_written_are_one_line_before_any_work(
    case: str, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    flag, suffix = FILES[case][-2:]
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"file{suffix}").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for name, words in (
        ("x", " must end in ."),
        ("x.unknown", " must end in ."),
        (f"folder{suffix}", "is a folder: name a file in it"),
        (f"file{suffix}", "is there already: choose another name, or add --overwrite"),
        (f"file{suffix}/x{suffix}", "is a file, not a folder"),
        (f"/proc/x{suffix}", "cannot be written"),
    ):
        message = message_for(case, tmp_path / name, one_error_line)
        assert words in message
        assert message.startswith(f"error: {flag} ")
    assert NOWHERE in message_for(case, tmp_path / "a" / f"x{suffix}", one_error_line)  # fine so far
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    convert = module("convert")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "G_ema.safetensors").touch()
    for name, words in (
        ("file", "--out .*file is a file: name a folder"),
        ("file/x", "file is a file, not a folder"),
        ("full", r"--out .*full has a G_ema\.safetensors already: choose another folder, or add --overwrite"),
        ("/proc/x", r"--out /proc/x cannot be written \("),
    ):
        assert re.search(words, one_error_line(convert, NOWHERE, "--out", tmp_path / name))
    assert len(list(tmp_path.rglob("*"))) == 3


# Whole runs. Each writes its files into a folder; what they are and how many is in the names.

MAKES = {
    "render grid RUN --out OUT/x.png --seeds 0 --show rgb depth --resolution 16": ["x-depth.png", "x.png"],
    "render turntable RUN --out OUT/x.mp4 --seeds 0 --frames 2 --resolution 16": ["x.mp4"],
    "render turntable RUN --out OUT/x.gif --seeds 0 --frames 2 --resolution 16": ["x.gif"],
    "mesh RUN --out OUT/x.ply OUT/x.obj OUT/x.glb OUT/x.mrc OUT/x.png --resolution 12": [
        *("x.glb", "x.mrc", "x.obj", "x.ply", "x.png")
    ],
    "figures schedules --out OUT/x.png": ["x.png"],
    "figures schedules --out OUT/x.pdf": ["x.pdf"],
    "figures schedules --out OUT/x.svg": ["x.svg"],
    "check_data DATA --plot OUT/x.png": ["x.png"],
    "convert RUN --out OUT": ["G_ema.safetensors"],
    "convert RUN --out OUT --names published": ["G_ema-published.safetensors"],
    "convert_data to-eg3d DATA --out OUT/x.json": ["x.json"],
    "convert_data to-eg3d DATA --out OUT/x.zip": ["x.zip"],
}


@pytest.fixture
def run(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> Callable[[str], None]:
    """Runs one of `MAKES` into tmp_path/out."""

    def run(line: str, *more: str) -> None:
        tool, *rest = line.split()
        places = {"RUN": tiny_run, "DATA": tiny_data}
        run_tool(
            module(tool), *(str(places.get(word, word)).replace("OUT", str(tmp_path / "out")) for word in rest), *more
        )

    return run


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("line", MAKES)
def test_files_have_the_mode_of_the_umask_and_are_not_replaced(
    line: str, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(line)
    files = sorted((tmp_path / "out").rglob("*"))
    assert [file.name for file in files] == MAKES[line]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    for file in files:
        file.write_text("old")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(line)
    assert caught.value.code == 2
    assert "already: choose another" in capsys.readouterr().err
    assert {file.read_text() for file in files} == {"old"}
    run(line, "--overwrite")
    assert sorted((tmp_path / "out").rglob("*")) == files
    assert all(file.read_bytes() != b"old" for file in files)


@pytest.mark.parametrize("line", MAKES)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    line: str, run: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, small_files(60):
        run(line)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "could not be written (" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Interruption: what is done by then is kept


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """The function is interrupted in its n-th call, counted from 1."""
    inner, calls = getattr(owner, name), []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def interrupted(tool: ModuleType, *words: object) -> None:
    with pytest.raises(SystemExit) as caught:
        run_tool(tool, *words)
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("line", "owner", "function", "call"),
    [
        ("render grid RUN --out OUT/x.png --seeds 0-2 --show rgb depth --resolution 16", "render", "surface_depth", 2),
        ("render turntable RUN --out OUT/x.mp4 --seeds 0 --frames 4 --resolution 16", "render", "to_uint8", 3),
        ("render turntable RUN --out OUT/x.gif --seeds 0 --frames 4 --resolution 16", "render", "gif_of", 1),
        ("mesh RUN --out OUT/x.ply --resolution 12", "mesh", "to_trimesh", 2),
        ("mesh RUN --out OUT/x.png --resolution 12", "mesh", "picture", 1),
        ("check_data DATA --plot OUT/x.png", "plotting", "output", 1),
        ("convert RUN --out OUT", "convert", "save_safetensors", 1),
        ("convert_data to-eg3d DATA --out OUT/x.zip", "convert_data", "picture", 1),
    ],
)
def test_an_interruption_leaves_nothing_half(
    line: str,
    owner: str,
    function: str,
    call: int,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--resolution", "8"] if owner == "convert_data" else []
    interrupt_at(monkeypatch, module(owner), function, call)
    with pytest.raises(SystemExit) as caught:
        run(line, *more)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())
    assert not command._temporaries


def test_meshes_that_are_done_are_kept(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = module("mesh")
    interrupt_at(monkeypatch, mesh, "extract", 2)
    interrupted(mesh, tiny_run, "--out", tmp_path / "x.ply", "--resolution", 12, "--seeds", "0-2")
    assert [path.name for path in tmp_path.iterdir()] == ["x-0.ply"]


def test_measurements_that_are_done_are_kept(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    metrics = module("metrics")
    monkeypatch.setattr("epigraf_fast.training.metrics.EfficientNetFeatures", Features)
    interrupt_at(monkeypatch, metrics, "consistency", 2)
    out = tmp_path / "x.json"
    interrupted(metrics, tiny_run, "--images", 4, "--objects", 1, "--out", out)
    assert [Path(result["checkpoint"]).name for result in json.loads(out.read_text())] == ["checkpoint-000000008.pt"]
    assert len(list(tmp_path.iterdir())) == 1


class Views:
    """Stands in for VTK: grey views, and Ctrl-C in the fifth object."""

    def __init__(self, recipe: object, resolution: int) -> None:
        self.size, self.calls = resolution, 0

    def render(self, mesh: object, angles: torch.Tensor) -> tuple[list, float]:
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return [torch.full((self.size, self.size, 3), 9, dtype=torch.uint8).numpy() for _ in angles], 0.5


@pytest.mark.parametrize("first", [True, False])
def test_objects_that_are_rendered_are_kept(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data = module("make_data")
    (tmp_path / "meshes").mkdir()
    for number in range(7):
        (tmp_path / "meshes" / f"{number}.stl").touch()
    monkeypatch.setattr(make_data, "Renderer", Views)
    if first:
        interrupt_at(monkeypatch, Views, "render", 1)
    out = tmp_path / "x.zip"
    line = ["--recipe", "megascans", "--meshes", tmp_path / "meshes", "--views", 3, "--resolution", 8, "--out", out]
    interrupted(make_data, *line)
    printed = capsys.readouterr()
    assert printed.err == "interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == (["meshes"] if first else ["meshes", "x.zip"])
    if not first:
        assert "the 4 objects that were rendered until the interruption" in printed.out
        dataset = ImageDataset(out, 8, mirror=False)
        dataset.check_images()
        assert len(dataset) == 4 * 3


# Waits

WAITS = {
    "render grid RUN --out OUT/x.png --seeds 0 --resolution 16": [
        "reading the checkpoint",
        "objects",
        "rays",
        "writing x.png",
    ],
    "render turntable RUN --out OUT/x.mp4 --seeds 0 --frames 2 --resolution 16": [
        *("reading the checkpoint", "objects", "frames", "rays", "rays", "writing x.mp4")
    ],
    "render interpolation RUN --out OUT/x.gif --seeds 0 --frames 2 --resolution 16": [
        *("reading the checkpoint", "frames", "rays", "rays", "writing x.gif")
    ],
    "mesh RUN --out OUT/x.ply OUT/x.png OUT/x.mrc --resolution 12": [
        *("reading the checkpoint", "painting the planes", "points", "views", "slabs", "colours"),
        *("measuring the mesh", "writing x.ply"),
        *("faces", "faces", "writing x.png", "writing x.mrc"),
    ],
    "metrics RUN --images 4 --objects 1": [
        *("reading checkpoint and data set", "reading the feature networks", "real images"),
        *("measuring: generated images", "computing fd_efficientnet", "re-projected objects"),
        *("reading checkpoint and data set", "measuring: generated images", "computing fd_efficientnet"),
        "re-projected objects",
    ],
    "figures schedules --out OUT/x.png": ["drawing x.png"],
    "check_data DATA --plot OUT/x.png": ["reading dataset.json", "images checked", "drawing x.png"],
    "convert RUN --out OUT": ["converting RUN"],
    "convert_data to-eg3d DATA --out OUT/x.zip": ["poses", "images"],
}


@pytest.mark.parametrize("line", WAITS)
def test_every_wait_has_a_name(
    line: str, run: Callable[[str], None], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line.startswith("metrics"):
        pytest.importorskip("torchmetrics", reason="needs the extra metrics")
        monkeypatch.setattr("epigraf_fast.training.metrics.EfficientNetFeatures", Features)
    seen, enter = [], Progress.__enter__
    monkeypatch.setattr(Progress, "__enter__", lambda self: seen.append(self.what) or enter(self))
    run(line)
    assert seen == [what.replace("RUN", tiny_run.name) for what in WAITS[line]]


# What is given as a checkpoint


@pytest.fixture
def things(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Path]:
    """Things that are no checkpoints, by name."""
    folder = tmp_path / "things"
    folder.mkdir()
    shutil.copy(tiny_data, folder / "data.zip")
    (folder / "snapshot.pkl").write_bytes(b"\x80\x04}.")
    (folder / "renamed.pt").write_bytes(b"\x80\x04}.")
    shutil.copy(tiny_run / "config.json", folder / "config.json")
    shutil.copy(tiny_run / "config.json", folder / "settings.json")
    (folder / "dataset.json").write_text('{"camera_angles": {}}')
    (folder / "transforms.json").write_text('{"frames": []}')
    (folder / "stats.jsonl").write_text("{}\n")
    PIL.Image.new("RGB", (8, 8)).save(folder / "x.png")
    (folder / "x.mp4").touch()
    (folder / "x.glb").touch()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), folder / "inception.pt")
    (folder / "images").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(folder / "images" / "0.png")
    (folder / "deep" / "00").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(folder / "deep" / "00" / "0.jpg")
    (folder / "pickles").mkdir()
    (folder / "pickles" / "network-snapshot-000100.pkl").touch()
    (folder / "begun").mkdir()
    (folder / "begun" / "stats.jsonl").touch()
    (folder / "empty").mkdir()
    (folder / "x.txt").write_text("hello")
    return {path.name: path for path in folder.iterdir()}


THINGS = {
    "data.zip": "a data set: train.py --data and epigraf data check take it",
    "images": "a data set: train.py --data and epigraf data check take it",
    "deep": "a data set: train.py --data and epigraf data check take it",
    "snapshot.pkl": "a pickle, as published snapshots are: make a checkpoint of it with epigraf convert",
    "renamed.pt": "a pickle, as published snapshots are: make a checkpoint of it with epigraf convert",
    "config.json": "the settings of a run: give the folder that it lies in",
    "settings.json": "the settings of a run: give the folder that it lies in",
    "stats.jsonl": "the log of a run: give the folder that it lies in",
    "dataset.json": "the description of a data set: ",
    "transforms.json": "the description of a data set: ",
    "x.png": "an image",
    "x.mp4": "a video",
    "x.glb": "a mesh or volume",
    "inception.pt": "a network in TorchScript, as metrics --inception takes",
    "pickles": "epigraf convert takes network-snapshot-000100.pkl",
    "begun": "the folder of a run that has saved no checkpoint yet",
}


def test_things_are_known(things: dict[str, Path], tiny_run: Path) -> None:
    for name, words in THINGS.items():
        assert words in what_else(things[name]), name
    for path in (things["empty"], things["x.txt"], things["empty"] / "nothing", tiny_run, *list_checkpoints(tiny_run)):
        assert what_else(path) is None


@pytest.mark.parametrize("tool", ["render", "mesh", "metrics", "viewer", "convert", "figures"])
def test_what_is_no_checkpoint_is_named(
    tool: str, things: dict[str, Path], plain_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    for name in ("data.zip", "images", "snapshot.pkl", "config.json", "pickles"):
        if tool == "convert" and name == "snapshot.pkl":
            continue
        line = {
            "render": ["grid", things[name], "--out", tmp_path / "x.png"],
            "mesh": [things[name], "--out", tmp_path / "x.ply"],
            "metrics": [things[name]],
            "viewer": [things[name], "--port", 0],
            "convert": [things[name], "--out", tmp_path / "x"],
            "figures": ["modulation", things[name], "--out", tmp_path / "x.png"],
        }[tool]
        message = one_error_line(module(tool), *line)
        assert THINGS[name] in message
        assert str(things[name]) in message
    if tool == "figures":  # which draws the discriminator
        for path in (plain_run, plain_run / "G_ema.safetensors", "builtin"):
            message = one_error_line(module(tool), "modulation", path, "--out", tmp_path / "x.png")
            assert "is a generator alone: D, which this figure draws, is not in it" in message
    if tool == "convert":
        message = one_error_line(module(tool), things["renamed.pt"], "--out", tmp_path / "x")
        assert "it is no EpiGRAF snapshot" in message
    assert [path.name for path in tmp_path.iterdir()] == ["things"]
