"""What cannot be written ends no run: it is said once, and made up for; what was damaged is mended or put aside."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import HANG, small_files
from command_lines import Distance, assert_one_error_line, flags
from epigraf_fast import progress
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset
from epigraf_fast.tools import train
from epigraf_fast.training import board as board_module
from epigraf_fast.training import log as log_module
from epigraf_fast.training import snapshot, warmup
from epigraf_fast.training.board import Board
from epigraf_fast.training.checkpoint import list_checkpoints
from epigraf_fast.training.log import RunLog, read_stats
from epigraf_fast.training.snapshot import read_metrics

TinyConfig = Callable[..., Config]


def no_space(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_another_process(function: Callable[[], int], output: Path, errors: Path) -> int:
    """The exit code of a function in a forked process whose streams are these files."""

    def run() -> None:
        for path, number in ((output, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        code = 1
        try:
            code = function()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(HANG)
    return process.exitcode


def test_nothing_can_be_written(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """No file beyond a few bytes, as on a full disk: each kind is said once, and the last checkpoint is the end."""
    config = tiny_config(kimg=0.04, snapshot_kimg=0.008, checkpoint_kimg=0.016, turntable=1)

    def run() -> int:
        with small_files(100):
            return train.main(flags(config))

    reading, writing = os.pipe()  # no file, so without a limit
    output, errors = Path(f"/dev/fd/{writing}"), tmp_path / "errors"
    os.set_blocking(reading, False)
    errors.symlink_to(output)
    code = in_another_process(run, output, errors)
    os.close(writing)
    printed = os.read(reading, 2**20).decode()
    assert code == 2, printed
    for name in ("stats.jsonl", "samples/", "tensorboard/", "config.json"):
        assert printed.count(f"warning: {name} cannot be written (File too large): make room; training goes on") == 1
    assert printed.count("checkpoint-000000016.pt could not be written") == 1
    assert_one_error_line(
        printed[printed.index("error: ") :], "checkpoint-000000040.pt could not be written", "make room"
    )
    run_dir = tmp_path / "run"
    left = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".tmp" or path.name == ".lock"]
    assert all(path.stat().st_size <= 100 for path in left)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.json", "turntable.gif", "best.pt", "stats.jsonl", "samples", "trace.json"]
)
def test_one_file_cannot_be_written(
    name: str,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By EIO, to the end of the run: all else is there, the measurements decide what is best, and the code is 0."""
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    original = os.replace

    def replace(source: Any, target: Path) -> None:
        if name in (target.name, target.parent.name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    kimg, turntable = 0.064 if name == "trace.json" else 0.024, int(name == "turntable.gif")
    config = tiny_config(
        kimg=kimg, metric_kimg=0.008, metric_images=2, turntable=turntable, snapshot_kimg=0.008, grid=(1, 1)
    )
    assert train.main([*flags(config), *(["--profile"] if name == "trace.json" else [])]) == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("cannot be written (Input/output error)") == 1
    assert "Traceback" not in captured.err
    run_dir = tmp_path / "run"
    assert not (run_dir / name).is_file()
    for other in ("config.json", "metrics.json", "checkpoints/best.pt", "stats.jsonl", "samples/reals.png"):
        assert (run_dir / other).exists() == (name not in Path(other).parts)
    assert not list(run_dir.rglob("*.tmp"))
    assert list_checkpoints(run_dir)


def test_lines_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two failures, two times: two warnings, and no line or event is missing in the end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 1.0, 0)
    for cur_nimg in range(8, 80, 8):
        with monkeypatch.context() as patch:
            if cur_nimg in (16, 24, 48, 56):
                patch.setattr(log_module, "append", no_space)
                patch.setattr(board_module, "append", no_space)
            log.write(cur_nimg, {"loss/G": float(cur_nimg)})
    log.close()
    assert [line["cur_nimg"] for line in read_stats(tmp_path / "stats.jsonl")] == list(range(8, 80, 8))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/G")] == list(range(8, 80, 8))
    output = capsys.readouterr().out
    for name in ("stats.jsonl", "tensorboard/"):
        assert output.count(f"warning: {name} cannot be written (No space left on device)") == 2


def test_a_resumed_file_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines beyond the checkpoint go also where the file cannot be written at first; until then it stays as it is."""
    path = tmp_path / "stats.jsonl"
    path.write_text("".join(json.dumps({"cur_nimg": cur_nimg, "seconds": 1.0}) + "\n" for cur_nimg in (8, 16, 24)))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(log_module, "replacing", no_space)
        log = RunLog(tmp_path, 1.0, 16)
        log.write(24, {"loss/G": 1.0})
    assert path.read_bytes() == before
    log.write(32, {"loss/G": 2.0})
    log.close()
    assert [(line["cur_nimg"], line.get("loss/G")) for line in read_stats(path)] == [
        (8, None),
        (16, None),
        (24, 1.0),
        (32, 2.0),
    ]


def test_events_that_find_no_room_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "append", no_space)
    monkeypatch.setattr(board_module, "KEPT", 1000)
    board = Board(tmp_path, 1)
    for step in range(100):
        board.scalar("loss", 1.0, step)
        with pytest.raises(OSError, match="No space"):
            board.flush()
        assert len(board.pending) < 1100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("patience", [10.0, 0.001])
def test_the_terminal_is_a_file_on_a_full_disk(
    patience: float, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the start takes so long that it is shown."""
    monkeypatch.setattr(progress, "PATIENCE", {False: patience})
    config = tiny_config(kimg=0.016, snapshot_kimg=0.008)
    full = Path("/dev/full")
    assert in_another_process(lambda: train.main(flags(config)), full, full) == 0
    assert len(read_stats(tmp_path / "run" / "stats.jsonl")) == 2
    assert in_another_process(lambda: train.main(flags(config)), full, full) == 2  # the folder holds a run


def test_kernel_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged kernels.json is made anew; one that cannot be written is a warning."""
    monkeypatch.setattr(warmup.tuning, "tune_decode_triplane", lambda *args, **options: [])
    for name in ("read_timings", "write_timings"):
        monkeypatch.setattr(warmup.verdicts, name, lambda *args: None)
    path = tmp_path / "kernels.json"

    def choose() -> bool:
        cpu = torch.device("cpu")
        return warmup.choose_kernels(tmp_path, cpu, (), (), 1.0, timer=lambda work: 0.0).fresh

    for content in (b"", b"[]", b"{}", b'{"device": "cpu"}', b'{"device": "cpu", "choices": 3}', b"\xff"):
        path.write_bytes(content)
        assert choose()
        assert "kernels.json is damaged or of another version, and not read" in capsys.readouterr().out
        assert not choose()
    path.unlink()
    monkeypatch.setattr(os, "replace", no_space)
    assert choose()
    assert "kernels.json cannot be written (No space left on device)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# Damaged files of a run that goes on

GOOD = [json.dumps({"cur_nimg": cur_nimg, "seconds": cur_nimg / 8}).encode() + b"\n" for cur_nimg in (8, 16, 24)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"seconds": 2.0}\n',
        b'{"cur_nimg": "16", "seconds": 2.0}\n',
        b'{"cur_nimg": 16, "seconds": "2"}\n',
        b'{"cur_nimg": 16, "sec\n',
        b"[16]\n",
        b"16\n",
        b"\n",
        b"\xff\xfe\x00\n",
        b"\x00" * 50 + b"\n",
        b"[" * 100_000 + b"\n",
        GOOD[0][:10] + GOOD[1],  # half a line, then a whole one
    ],
)
def test_damaged_lines(line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stats.jsonl"
    content = GOOD[0] + line + GOOD[1] + GOOD[2]
    for number in ("", "-2"):
        path.write_bytes(content)
        log = RunLog(tmp_path, 1.0, 16)
        log.close()
        assert path.read_bytes() == GOOD[0] + GOOD[1]
        assert log.seconds_before == 2.0
        aside = tmp_path / f"stats-damaged{number}.jsonl"
        assert aside.read_bytes() == content
        assert f"{path}: line 2 is damaged; 1 such, kept in {aside}" in capsys.readouterr().out


@pytest.mark.parametrize("end", [b'{"cur_nimg": 32, "sec', b"\x00\x00\x00", b"\xff"])
def test_a_last_line_that_was_cut_off(end: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a kill or a power cut: it goes, with a word, and no copy is kept."""
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b"".join(GOOD) + end)
    RunLog(tmp_path, 1.0, 24).close()
    assert path.read_bytes() == b"".join(GOOD)
    assert "the last line was cut off and is left out" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*.jsonl")] == ["stats.jsonl"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"{}", b"[1]", b'[{"images": 3}]', b'[{"cur_nimg": 0, "fd_efficientnet": "x"}]', b"\xff", b"1"],
)
def test_a_damaged_metrics_file(
    content: bytes,
    tiny_config: TinyConfig,
    tiny_dataset: ImageDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.json is damaged: train\.py --resume starts another one"):
        read_metrics(tmp_path)
    log = RunLog(tmp_path, 1.0, 0)
    monkeypatch.setattr(snapshot, "fixed_latents", lambda *args: ())
    snapshots = snapshot.Snapshots(tiny_config(run_dir=str(tmp_path)), tiny_dataset, None, log)
    log.close()
    assert snapshots.entries == []
    aside = tmp_path / "metrics-damaged.json"
    assert aside.read_bytes() == content
    assert f"metrics.json is damaged, and is now {aside}" in capsys.readouterr().out
