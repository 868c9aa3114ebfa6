"""The record of a run: stats.jsonl, TensorBoard, speeds, and pictures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import imageio.v3
import numpy as np
import PIL.Image
import pytest
import torch

from epigraf_fast.errors import UserError
from epigraf_fast.training import log as log_module
from epigraf_fast.training.log import RunLog, depth_to_uint8, read_stats, save_gif, save_png, tile, to_uint8


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The log's clock; `clock.now` moves by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(log_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def open_log(tmp_path: Path) -> Callable[..., RunLog]:
    """`open_log(cur_nimg)`: the log of a run of 1 kimg, closed at the end."""
    logs = []

    def open_log(cur_nimg: int = 0) -> RunLog:
        logs.append(RunLog(tmp_path, 1.0, cur_nimg))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_lines(tmp_path: Path, clock: SimpleNamespace, open_log: Callable[..., RunLog]) -> None:
    log = open_log()
    clock.now += 2
    log.write(40, {"loss/G": 0.5})
    clock.now += 4
    log.write(240, {"loss/G": 0.25, "loss/R1": 1.0})
    assert read_stats(tmp_path / "stats.jsonl") == [
        {"cur_nimg": 40, "kimg": 0.04, "seconds": 2.0, "sec_per_kimg": 50.0, "img_per_sec": 20.0, "loss/G": 0.5},
        {
            "cur_nimg": 240,
            "kimg": 0.24,
            "seconds": 6.0,
            "sec_per_kimg": 20.0,
            "img_per_sec": 50.0,
            "loss/G": 0.25,
            "loss/R1": 1.0,
        },
    ]
    log.close()
    assert scalars(tmp_path, "loss/G") == [(40, 0.5), (240, 0.25)]
    assert scalars(tmp_path, "img_per_sec") == [(40, 20.0), (240, 50.0)]


def test_what_is_said_stands_above_the_bar(open_log: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own, and the bar comes again below, where both go to one terminal or file."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    open_log().say("a word")
    said, bar = (line.rpartition("\r")[2] for line in screen.getvalue().split("\n"))
    assert said == "a word"
    assert bar.endswith("0.0/1.0 kimg [00:00<?]")


def test_pauses_do_not_count_as_training(clock: SimpleNamespace, open_log: Callable[..., RunLog]) -> None:
    log = open_log()
    with log.pause():
        clock.now += 30
    clock.now += 2
    log.write(40, {})
    clock.now += 1
    with log.pause():
        clock.now += 500
    clock.now += 1
    log.write(80, {})
    assert [(line["img_per_sec"], line["seconds"]) for line in read_stats(log.path)] == [(20.0, 32.0), (20.0, 534.0)]


def test_a_line_without_images_has_no_speed(open_log: Callable[..., RunLog]) -> None:
    log = open_log(40)
    log.write(40, {"loss/G": 0.5})
    (line,) = read_stats(log.path)
    assert "img_per_sec" not in line
    assert line["loss/G"] == 0.5


def test_resume_drops_what_lies_beyond(tmp_path: Path, clock: SimpleNamespace, open_log: Callable[..., RunLog]) -> None:
    """Lines and TensorBoard's events after the checkpoint go, those at it stay; the seconds go on."""
    log = open_log()
    for cur_nimg in (8, 16, 24, 32):
        clock.now += 1
        log.write(cur_nimg, {"loss/G": float(cur_nimg)})
    log.close()
    clock.now += 1000
    log = open_log(16)
    clock.now += 1
    log.write(24, {"loss/G": -24.0})
    log.close()
    lines = read_stats(tmp_path / "stats.jsonl")
    assert [(line["cur_nimg"], line["loss/G"], line["seconds"]) for line in lines] == [
        (8, 8.0, 1.0),
        (16, 16.0, 2.0),
        (24, -24.0, 3.0),
    ]
    assert scalars(tmp_path, "loss/G") == [(8, 8.0), (16, 16.0), (24, -24.0)]


def test_a_run_that_begins_again_begins_with_an_empty_file(tmp_path: Path, open_log: Callable[..., RunLog]) -> None:
    """Killed before its first checkpoint."""
    open_log().write(8, {"loss/G": 1.0})
    assert open_log().path.read_text() == ""


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, open_log: Callable[..., RunLog]) -> None:
    path = tmp_path / "stats.jsonl"
    good = {"cur_nimg": 8, "seconds": 1.0}
    path.write_text(json.dumps(good) + '\n{"cur_nimg": 16, "sec')
    assert read_stats(path) == [good]
    open_log(8).write(16, {})
    assert [line["cur_nimg"] for line in read_stats(path)] == [8, 16]


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"cur_nimg": 8}\n{"cur_ni\n{"cur_nimg": 24}\n')
    with pytest.raises(UserError, match=r"line 2 is damaged; train.py --resume mends it, or move the file away"):
        read_stats(path)


def test_no_file_no_lines(tmp_path: Path) -> None:
    assert read_stats(tmp_path / "stats.jsonl") == []


def test_bar(clock: SimpleNamespace, open_log: Callable[..., RunLog], capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(200)
    clock.now += 4
    log.advance(400)
    log.write(400, {"loss/G": 0.5, "loss/D": 1.25, "logits/real": 3.0})
    log.say("a line above the bar")
    log.close()
    captured = capsys.readouterr()
    assert "a line above the bar" in captured.out
    last = captured.err.split("\r")[-1]
    for word in ("40%", "0.4/1.0 kimg", "s/kimg=20.0", "img/s=50.0", "G=0.500", "D=1.250"):
        assert word in last
    assert "logits" not in captured.err


# Pictures


def test_to_uint8() -> None:
    """v / 127.5 - 1, inverted: halves to even, clamped."""
    values = torch.arange(256)
    assert torch.equal(to_uint8(values / 127.5 - 1), values.byte())
    assert to_uint8(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).tolist() == [0, 0, 128, 255, 255]


def test_depth_to_uint8() -> None:
    """White at ray_start, black at ray_end, clamped."""
    depth = torch.tensor([0.0, 0.75, 1.0, 1.25, 9.0]).view(1, 1, 1, 5)
    picture = depth_to_uint8(depth, 0.75, 1.25)
    assert picture.shape == (1, 3, 1, 5)
    assert picture[0, 0, 0].tolist() == [255, 255, 128, 0, 0]


def test_tile() -> None:
    """Row by row: image i stands at row i div 3, column i mod 3."""
    images = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).view(6, 3, 2, 2)
    grid = tile(images, 3)
    assert grid.shape == (4, 6, 3)
    for i, image in enumerate(images):
        row, column = 2 * (i // 3), 2 * (i % 3)
        assert (grid[row : row + 2, column : column + 2] == image.permute(1, 2, 0).numpy()).all()


def test_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path = tmp_path / "new" / "grid.png"
    save_png(picture, path)
    with PIL.Image.open(path) as image:
        assert (np.asarray(image) == picture).all()
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_gif(tmp_path: Path) -> None:
    """12 frames a second, endless."""
    frames = np.zeros((5, 8, 16, 3), np.uint8)
    frames[np.arange(5), :, np.arange(5)] = 255
    path = tmp_path / "new" / "turn.gif"
    save_gif(frames, path, 12.5)
    read = imageio.v3.imread(path)
    assert read.shape == frames.shape
    assert (read == frames).all()
    with PIL.Image.open(path) as image:
        assert (image.info["duration"], image.info["loop"]) == (80, 0)
