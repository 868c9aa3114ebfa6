"""Every command that README.md and docs/tools.md show, run here with exactly the flags that it shows.

Paths are those of a tiny run, sizes the smallest; what a line leaves to defaults that are large is set beside it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from torch import nn

from command_lines import Features, flags
from epigraf_fast.__main__ import COMMANDS, main
from epigraf_fast.config import Config
from epigraf_fast.tools import viewer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tools.md")}
RUN, DATA = {"runs/demo", "runs/ffhq"}, {"datasets/ffhq.zip"}
SMALLEST = {"--resolution": "16", "--frames": "2", "--images": "4", "--steps": "4", "--batch": "8"}
# What a command's defaults would take long for, unless the line says it; and what a machine has only one of.
BESIDE = {
    "render": {"--resolution": "16", "--device": "cpu"},
    "render turntable": {"--frames": "2"},
    "render interpolation": {"--frames": "2"},
    "render fly-around": {"--frames": "2"},
    "mesh": {"--resolution": "12", "--device": "cpu"},
    "metrics": {"--images": "4", "--objects": "1", "--device": "cpu"},
    "project": {"--steps": "4", "--device": "cpu"},
    "viewer": {"--port": "0", "--device": "cpu"},
}


def commands_of(text: str) -> list[str]:
    """The lines of code blocks that call us, and what is quoted in the text with a flag."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = " ".join(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split())
    lines += re.findall(r"`(epigraf [^`]*--[^`]*)`", prose)
    ours = [line for line in lines if re.match(r"(python train\.py|epigraf) ", line) and "COMMAND" not in line]
    return [" ".join(line.partition(" #")[0].split()) for line in ours]


SHOWN = {line: name for name, text in reversed(TEXTS.items()) for line in commands_of(text)}
TRAINING = [line for line in SHOWN if line.startswith("python train.py")]


def words_of(line: str, run: Path, data: Path) -> list[str]:
    """The command line, for `main`: everything small, outputs where we are."""
    words = shlex.split(line.replace("python train.py", "epigraf train"))[1:]
    for i, word in enumerate(words):
        before = words[i - 1]
        if before in SMALLEST:
            words[i] = SMALLEST[before]
        elif before == "--seeds" and (found := re.fullmatch(r"(\d+)-(\d+)", word)):
            words[i] = f"{found[1]}-{int(found[1]) + 1}"  # of several two
        elif word in RUN and before != "--run-dir":
            words[i] = str(run)
        elif word in DATA:
            words[i] = str(data)
    for start in (words[:1], words[:2]):
        for flag, value in BESIDE.get(" ".join(start), {}).items():
            words += [] if flag in words else [flag, value]
    return words


class Means(nn.Module):
    """Stands in for Inception."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def call(words: list[str]) -> int:
    """The exit code."""
    try:
        return main(words)
    except SystemExit as left:
        return left.code or 0


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(Means()).save(str(path))
    return path


@pytest.fixture
def here(tmp_path: Path, inception: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with what the lines name beside runs and data; the features are not EfficientNet's."""
    for name in ("photo.png", "face.png"):
        PIL.Image.new("RGB", (16, 16), (200, 90, 40)).save(tmp_path / name)
    shutil.copy(inception, tmp_path / inception.name)
    monkeypatch.setattr("epigraf_fast.training.metrics.EfficientNetFeatures", Features)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the viewer as soon as it waits."""

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(viewer, "time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))


def outputs(words: list[str]) -> list[str]:
    """What the line is to write, less the suffix: a file may become one a seed, or one for each thing shown."""
    found = [word for i, word in enumerate(words) if words[i - 1] in ("--out", "--plot")]
    return [str(Path(name).with_suffix("")) for name in found]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("line", [line for line in SHOWN if line not in TRAINING])
def test_commands(line: str, tiny_run: Path, tiny_data: Path, here: Path) -> None:
    if "metrics" in line:
        pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    words = words_of(line, tiny_run, tiny_data)
    assert call(words) == 0
    for name in outputs(words):
        assert list(here.glob(f"{name}*")), name


@pytest.mark.usefixtures("no_waiting")
def test_training_and_what_it_says_to_try_next(
    tiny_config: Callable[..., Config], tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines of the README, in their order, one run; its last words are commands, too."""
    assert len(TRAINING) == 4
    small = flags(tiny_config(kimg=0.016, generator={"plane_resolution": 16}), "ffhq")[1:]
    pairs = {}
    for word in small:
        if word.startswith("--"):
            pairs[word] = []
            values = pairs[word]
        else:
            values.append(word)
    for line in TRAINING:
        words = words_of(line, here, tiny_data)
        beside = [[flag, *values] for flag, values in pairs.items() if flag not in words and flag != "--run-dir"]
        if "--help" not in words:
            words += [word for pair in beside for word in pair]
        assert call(words) == 0
        printed = capsys.readouterr().out
        if "what to try next" in printed:
            said = printed.partition("what to try next")[2].splitlines()[1:]
    run = here / "runs" / "ffhq"
    lines = [line.partition(" #")[0].strip() for line in said if line.startswith("  epigraf ")]
    assert [line.split()[1] for line in lines] == ["viewer", "mesh", "render"]
    for line in lines:
        assert "runs/ffhq" in line
        assert call(words_of(line, run, tiny_data)) == 0
    assert (here / "object.glb").is_file()
    assert (here / "turntable.mp4").is_file()


def test_all_commands_are_found() -> None:
    assert len(SHOWN) >= 24
    named = {words for words in COMMANDS for line in SHOWN if line.startswith(f"epigraf {words} ")}
    assert {"render", "mesh", "viewer", "project", "metrics", "doctor"} <= named
