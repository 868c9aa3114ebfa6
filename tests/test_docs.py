"""Flags, commands and files that the documents name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from epigraf_fast.__main__ import COMMANDS, main
from epigraf_fast.config import PRESETS, Config, preset
from epigraf_fast.tools import convert, published_settings

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "coming-from-epigraf.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "docs" / "make_pictures.sh").read_text(encoding="utf-8")


def section(title: str) -> list[list[str]]:
    """The rows of the table below a heading of the guide."""
    text = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def setting(flag: str, config: Config) -> object:
    """The value of `--part.name`. Raises AttributeError if there is no such setting."""
    value: object = config
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        value = getattr(value, name)
    return value


def test_every_flag_of_the_table_is_a_setting() -> None:
    rows = section("Training settings")
    assert len(rows) > 30
    for _, ours in rows:
        for flag in re.findall(r"`(--[\w.-]+)", ours):
            if flag not in ("--resume", "--dry-run"):
                setting(flag, preset("ffhq"))
    for name in re.findall(r"`train.py (\w+)`", rows[0][1]):
        assert name in PRESETS


def test_every_default_of_the_table_is_that_of_the_preset() -> None:
    checked = 0
    for _, ours in section("Training settings"):
        for flag, stated in re.findall(r"`(--[\w.-]+)` \((\d{1,3}(?:,\d{3})+|[\w.]+)[,;)]", ours):
            value = setting(flag, preset("ffhq"))
            words = {"on": True, "off": False}
            number = stated.replace(",", "")
            expected = words.get(number, number)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                expected = float(number)
            assert value == expected, (flag, value, stated)
            checked += 1
    assert checked > 20


def test_the_table_of_settings_is_that_of_the_importer() -> None:
    text = GUIDE.partition("## What a snapshot's settings become")[2]
    assert [line for line in text.splitlines() if line.startswith("|")] == published_settings.table()
    for setting_of_theirs in published_settings.TABLE:
        for name in setting_of_theirs.ours:
            if name != published_settings.LABEL_DIM:
                setting(name, Config())


def test_the_table_of_tensors_is_what_the_importer_does() -> None:
    for published, ours in section("Tensors"):
        names = re.findall(r"`([^`]+)`", published)
        if "*" in names[0] and names[0].startswith("*"):
            continue
        first = names[0].replace("<res>", "8").replace("*", "fc0")
        patterns = convert.DISCRIMINATOR_NAMES if "(D)" in published else convert.GENERATOR_NAMES
        suffix = "" if first.endswith(("weight", "pose")) else ".weight"
        expected = re.findall(r"`([^`]+)`", ours)[0].replace("<res>", "8").replace("*", "fc0") + suffix
        assert convert._translate(first + suffix, patterns) == expected


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every `epigraf ...` of a text: the command, then its words."""
    text = text.replace("\\\n", " ").replace('"$python" -m epigraf_fast', "epigraf").replace('"$run"', "runs/demo")
    found = re.findall(rf"\bepigraf ({'|'.join(COMMANDS)})\b([^\n`#|]*)", text)
    return [(name, shlex.split(words)) for name, words in found]


@pytest.mark.parametrize("name", ["README.md", "docs/coming-from-epigraf.md", "docs/make_pictures.sh"])
def test_every_command_exists_with_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "-m epigraf_fast." not in text
    found = commands(text)
    assert found
    helps = {}
    for command, words in found:
        if command not in helps:
            with pytest.raises(SystemExit):
                main([*command.split(), "--help"])
            helps[command] = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"(?<![\w-]){word}(?![\w-])", helps[command]), f"{command} has no {word}"


def test_the_pictures_of_the_readme_are_made_by_the_script() -> None:
    shown = set(re.findall(r"\]\((docs/[\w.-]+\.(?:png|gif))\)", README)) - {"docs/demo.png"}
    written = set(re.findall(r"docs/[\w.-]+\.(?:png|gif)", SCRIPT))
    written |= {f"docs/render-{name}.png" for name in ("depth", "normals")}
    assert shown == written
    assert all((ROOT / path).is_file() for path in shown)
