"""What the README says is what the files beside it hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

from epigraf_fast.config import PRESETS, preset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_numbers_are_those_of_the_result_file() -> None:
    result = json.loads((ROOT / "bench/results/demo-cpu.json").read_text())
    stated = re.search(r"took `fd_efficientnet` from ([\d.]+)((?:.|\n)*?)\(\[bench/results/demo-cpu", README)
    distance = result["fd_efficientnet"]
    assert float(stated[1]) == round(distance["before"], 1)
    assert [float(number) for number in re.findall(r"to (\d+\.\d)", stated[2])] == [
        round(x, 1) for x in distance["after"]
    ]
    assert (result["kimg"], result["images_per_measurement"]) == (preset("demo").kimg, preset("demo").metric_images)


def test_links_and_named_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    named = re.findall(r"`((?:epigraf_fast|train|tests|bench)[\w/]*\.py)`", README)
    assert links
    assert named
    for path in (*links, *named):
        assert (ROOT / path).is_file(), path


def test_every_preset_is_in_the_table() -> None:
    for name in PRESETS:
        assert re.search(rf"^\|.*`{name}`.*\|", README, re.MULTILINE), name


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 180
