"""What takes long shows what it is and how far; Ctrl-C is heard in the middle of it, and nothing trained is lost."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checks import HANG
from command_lines import Distance, flags, losses
from epigraf_fast import progress as progress_module
from epigraf_fast.config import Config
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import Stopped
from epigraf_fast.progress import Progress, waiting
from epigraf_fast.tools import train
from epigraf_fast.training import endurance, snapshot, start
from epigraf_fast.training.checkpoint import list_checkpoints
from epigraf_fast.training.endurance import StopRequest
from epigraf_fast.training.progress import progress

TinyConfig = Callable[..., Config]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def run(config: Config, *extra: str) -> int:
    return train.main([*flags(config), *extra])


def interrupted(function: Callable[..., Any], number: int = signal.SIGINT, call: int = 1) -> Callable[..., Any]:
    """The function, in whose so many-th call a signal comes; an interruption takes effect before it ends."""
    calls = []

    def with_a_signal(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
            pytest.fail("the signal did not interrupt")
        return function(*args, **options)

    return with_a_signal


@pytest.fixture(autouse=True)
def _no_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody passes signals on, for which a run would wait."""
    monkeypatch.setattr(endurance, "REPEATED", 0.0)


# What is shown


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is shown, and often."""
    for name, value in (("PATIENCE", {False: 0.001}), ("LONGEST_PAUSE", 0.001)):
        monkeypatch.setattr(progress_module, name, value)


def wait_for(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Until stderr has shown the words."""
    shown, deadline = "", time.monotonic() + HANG
    while words not in shown:
        shown += capsys.readouterr().err
        assert time.monotonic() < deadline, shown
        time.sleep(0.001)


@pytest.mark.usefixtures("soon")
def test_one_slow_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Its time passes on the terminal although nothing in it says how far it is."""
    with waiting("reading the checkpoint"):
        wait_for("reading the checkpoint ... 1 s\n", capsys)


@pytest.mark.usefixtures("soon")
def test_many_calls(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in progress(iter("abcd"), 4, "measuring"):
        seen.append(item)
        wait_for(f"measuring: {len(seen) - 1}/4 [", capsys)
    assert seen == list("abcd")


def test_what_is_quick_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE", {False: 1e6})
    with waiting("reading"):
        assert list(progress(range(100), 100, "measuring")) == list(range(100))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("soon")
def test_a_bar_ends_with_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        list(progress(fail(), 2, "measuring"))
    assert not [thread for thread in progress_module.threading.enumerate() if thread.name == "progress"]


def test_every_wait_of_a_run_is_named(tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the data to the last measurement."""
    named, enter = [], Progress.__enter__
    monkeypatch.setattr(Progress, "__enter__", lambda self: named.append((self.what, self.total)) or enter(self))
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    assert run(tiny_config(kimg=0.008, metric_images=20, turntable=1)) == 0
    drawing = ("drawing the samples", 1)
    measuring = [("measuring: generated images", 3), ("measuring: distances", None)]
    assert named == [
        ("reading the data set", None),
        ("reading the checkpoint", None),
        ("building the networks", None),
        ("loading what measures", None),
        drawing,
        ("measuring: real images", 3),
        *measuring,
        ("the first step", None),
        ("saving the checkpoint", None),
        drawing,
        ("drawing the turntable", 36),
        *measuring,
    ]


# Before the first step


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("what", ["real", "fake"])
def test_the_first_measurement(
    what: str,
    number: int,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    monkeypatch.setattr(Distance, f"update_{what}", interrupted(getattr(Distance, f"update_{what}"), number, 2))
    before = [signal.getsignal(n) for n in SIGNALS]
    assert run(tiny_config(metric_images=50)) == 128 + number
    captured = capsys.readouterr()
    assert f"stopped by signal {number}; nothing was trained yet" in captured.out.splitlines()
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize(
    ("module", "name"),
    [(start, "load_checkpoint"), (start, "Trainer"), (train, "warm_up"), (train, "Record"), (start, "find_checkpoint")],
)
def test_the_start(
    module: Any,
    name: str,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(kimg=0.016)
    assert run(tiny_config(kimg=0.008)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(module, name, interrupted(getattr(module, name)))
    capsys.readouterr()
    assert run(config, "--resume", "auto") == 130
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "stopped by signal 2"
    assert captured.err == ""
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_the_data(
    extra: list[str],
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While they are read, and while their images are checked."""
    name = "check_images" if extra else "_read_angles"
    monkeypatch.setattr(ImageDataset, name, interrupted(getattr(ImageDataset, name)))
    assert run(tiny_config(), *extra) == 130
    captured = capsys.readouterr()
    assert captured.out == "stopped by signal 2\n"
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


# Between the steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stops, made by the first test that needs it."""
    return tmp_path_factory.mktemp("undisturbed") / "run"


@pytest.mark.parametrize(
    ("place", "number"), [("measurement", signal.SIGINT), ("pictures", signal.SIGTERM), ("data", signal.SIGHUP)]
)
def test_between_the_steps(
    place: str,
    number: int,
    undisturbed: Path,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was trained is saved at once, and the run goes on from there as if nobody had stopped it."""
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    config = tiny_config(kimg=0.04, metric_images=20, metric_kimg=0.016, snapshot_kimg=0.016)
    if not undisturbed.exists():
        assert run(tiny_config(kimg=0.04, run_dir=str(undisturbed))) == 0
        capsys.readouterr()
    with monkeypatch.context() as patch:
        if place == "measurement":  # the second, of three batches
            patch.setattr(Distance, "update_fake", interrupted(Distance.update_fake, number, 5))
        elif place == "pictures":
            patch.setattr(snapshot, "render_images", interrupted(snapshot.render_images, number, 3))
        else:
            original = train.make_loader

            def make_loader(*args: Any, **options: Any) -> Iterator[Any]:
                loader = original(*args, **options)
                yield next(loader)
                yield next(loader)
                interrupted(lambda: None, number)()

            patch.setattr(train, "make_loader", make_loader)
        assert run(config) == 128 + number
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-000000016.pt"
    assert list_checkpoints(tmp_path / "run") == [newest]
    captured = capsys.readouterr()
    message = f"stopped by signal {number}; saved {newest}; go on with --run-dir {tmp_path / 'run'} --resume auto"
    assert captured.out.splitlines()[-1] == message
    assert "Traceback" not in captured.err
    assert run(config, "--resume", "auto") == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


@pytest.mark.parametrize("place", ["turntable", "measurement"])
def test_after_the_last_step(
    place: str,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All is saved; the next start makes what is missing."""
    monkeypatch.setattr(snapshot, "FeatureDistance", Distance)
    config, run_dir = tiny_config(kimg=0.016, metric_images=20, turntable=1), tmp_path / "run"
    with monkeypatch.context() as patch:
        if place == "turntable":
            patch.setattr(snapshot, "render_turntable", interrupted(snapshot.render_turntable))
        else:
            patch.setattr(Distance, "update_fake", interrupted(Distance.update_fake, call=5))
        assert run(config) == 130
    assert "stopped by signal 2; all is trained and saved; " in capsys.readouterr().out.splitlines()[-1]
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-000000016.pt"]
    assert run(config, "--resume", "auto") == 0
    assert (run_dir / "turntable.gif").exists()
    assert [entry["cur_nimg"] for entry in json.loads((run_dir / "metrics.json").read_text())] == [0, 16]


# The request itself


def test_what_a_signal_does_when() -> None:
    """It interrupts before training and in what may be left half-done, and is kept in between."""
    with StopRequest(talks=False) as stop, pytest.raises(Stopped, match="stopped by signal 15"):
        signal.raise_signal(signal.SIGTERM)
    with StopRequest(talks=False) as stop:
        assert stop.at_once(lambda: 3) == 3
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # as from torchrun and from the system
        assert stop.at_once(lambda: pytest.fail("there is no time for that")) is None


def test_signals_that_are_passed_on_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a wrapper that is interrupted together with the program, and tells it."""
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(seconds)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(endurance, "time", SimpleNamespace(sleep=sleep))
    with StopRequest(talks=False) as stop:
        stop.at_once(lambda: None)
        signal.raise_signal(signal.SIGINT)
        assert (stop.signal, len(seen)) == (signal.SIGINT, 1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_run_under_nohup_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_fault_passes(tiny_config: TinyConfig) -> None:
    def fail() -> None:
        raise ValueError("a fault")

    with StopRequest() as stop:
        with pytest.raises(ValueError, match="a fault"):
            stop.at_once(fail)
        assert stop.patient
