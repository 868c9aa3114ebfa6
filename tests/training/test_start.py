"""Processes that begin together: alike, from one state, or not at all and then all with a line."""

from __future__ import annotations

import datetime
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from command_lines import Distance, flags
from epigraf_fast.config import Config
from epigraf_fast.errors import UserError
from epigraf_fast.tools import train
from epigraf_fast.training import distributed, snapshot, start, watchdog
from epigraf_fast.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from epigraf_fast.training.distributed import World
from epigraf_fast.training.profile import annotate
from epigraf_fast.training.start import checksum
from epigraf_fast.training.watchdog import HUNG, Watchdog
from together import Ended, Fault, train_together

TinyConfig = Callable[..., Config]


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., list[Ended]]:
    """`together(line, line, faults={1: function})`: how the processes of these command lines end, forked from here."""
    return lambda *lines, **options: train_together(
        tmp_path / f"ended-{len(list(tmp_path.iterdir()))}", *lines, **options
    )


def error_of(ended: Ended) -> str:
    """The one line of a process that refused."""
    lines = [line.split("\r")[-1] for line in ended.errors.splitlines()]
    errors = [line for line in lines if "error: " in line and "[W" not in line and "[E" not in line]
    assert ended.code == 2, ended
    assert len(errors) == 1, ended.errors
    assert "Traceback" not in ended.errors
    return errors[0]


@pytest.fixture
def node(tiny_config: TinyConfig, tmp_path: Path) -> Callable[..., list[str]]:
    """`node(rank, **settings)`: the command line of a process with a run folder of its own."""

    def node(rank: int, **settings: Any) -> list[str]:
        config = tiny_config(**{"kimg": 0.032, "run_dir": str(tmp_path / f"node{rank}"), **settings})
        return [*flags(config), "--resume", "auto"]

    return node


@pytest.fixture(scope="module")
def half(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: the folder of a run of 16 images."""
    return {"folder": tmp_path_factory.mktemp("half") / "run"}


@pytest.fixture
def trained(half: dict[str, Any], tiny_config: TinyConfig, tmp_path: Path) -> Callable[[int], Path]:
    """`trained(rank)`: gives this process's run folder a checkpoint of 16 images."""

    def trained(rank: int) -> Path:
        if not half["folder"].is_dir():
            assert train.main(flags(tiny_config(kimg=0.016, run_dir=str(half["folder"])))) == 0
        shutil.copytree(half["folder"], tmp_path / f"node{rank}")
        (checkpoint,) = list_checkpoints(tmp_path / f"node{rank}")
        return checkpoint

    return trained


# One state


def test_folders_of_their_own(together: Callable, node: Callable, trained: Callable, tmp_path: Path) -> None:
    """Rank 0 alone has the checkpoint: rank 1 goes on from its state, and rank 0 says so."""
    checkpoint = trained(0)
    first, second = together(node(0), node(1))
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert f"continuing from {checkpoint}" in first.output
    assert "rank 1: no checkpoint of 16 images, or another one; taken is the state of rank 0" in first.output
    assert first.state == second.state != ""
    assert [path.name for path in list_checkpoints(tmp_path / "node0")][-1] == "checkpoint-000000032.pt"
    assert not list_checkpoints(tmp_path / "node1")
    assert not (tmp_path / "node0" / ".lock").exists()


def other_weights(checkpoint: Path) -> None:
    config, content = load_checkpoint(checkpoint)
    content["trainer"]["g_optimizer"]["state"][0]["exp_avg_sq"] += 1
    save_checkpoint(checkpoint.parents[1], config, content["trainer"], 3, content["random"])


def cut_off(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])


def other_random_numbers(checkpoint: Path) -> None:
    config, content = load_checkpoint(checkpoint)
    content["random"][0]["torch"][100] ^= 1
    save_checkpoint(checkpoint.parents[1], config, content["trainer"], 3, content["random"])


@pytest.mark.parametrize("spoil", [None, other_weights, cut_off, other_random_numbers])
def test_copies_of_a_checkpoint(spoil: Any, together: Callable, node: Callable, trained: Callable) -> None:
    """That are equal; that differ in one moment of an optimizer; of which one is damaged."""
    trained(0)
    copy = trained(1)
    if spoil is not None:
        spoil(copy)
    first, second = together(node(0), node(1))
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert ("taken is the state of rank 0" in first.output) == (spoil is not None)
    assert first.state == second.state != ""


def test_a_checkpoint_that_is_no_file_elsewhere(together: Callable, node: Callable, trained: Callable) -> None:
    checkpoint = trained(0)
    lines = [[*node(rank)[:-1], str(path)] for rank, path in ((0, checkpoint), (1, "no/such/checkpoint.pt"))]
    first, second = together(*lines)
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert first.state == second.state != ""


def test_rank_0_knows_less(together: Callable, node: Callable, trained: Callable, tmp_path: Path) -> None:
    """As when machines were numbered in another order: what was trained is not begun anew."""
    trained(1)
    for ended in together(node(0), node(1)):
        message = error_of(ended)
        assert "rank 1 has a checkpoint of 16 images, but rank 0, which writes, has none" in message
        assert "copy the checkpoints of rank 1 into the --run-dir of rank 0" in message
    assert not (tmp_path / "node0").exists()


def test_a_new_run_where_machines_build_other_weights(together: Callable, node: Callable) -> None:
    def another_machine() -> None:
        original = start.Trainer

        def trainer(*args: Any) -> Any:
            built = original(*args)
            with torch.no_grad():
                built.generator.decoder.fc1.bias += 1e-6
            return built

        start.Trainer = trainer

    first, second = together(node(0), node(1), faults={1: another_machine})
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert first.state == second.state != ""


# Or none


def other_set(**edits: Any) -> Callable[[dict, dict], None]:
    def edit(files: dict, metadata: dict) -> None:
        if "label" in edits:
            metadata["labels"][3][1] = edits["label"]
        if "yaw" in edits:
            metadata["camera_angles"]["003.png"][0] += edits["yaw"]

    return edit


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        ({"optim": {"g_lr": 0.1}}, {}, "optim.g_lr is 0.0025 on rank 0 and 0.1 on rank 1: give every process the same"),
        ({"batch": 16}, {}, "batch is 8 on rank 0 and 16 on rank 1"),
        ({}, {"count": 21}, "the number of images is 48 on rank 0 and 42 on rank 1"),
        ({}, {"edit": other_set(label=1)}, "the checksum of the labels is"),
        ({}, {"edit": other_set(yaw=1e-6)}, "the checksum of the poses is"),
        ({}, {"seed": 0, "images": True}, "the checksum of some images is"),
    ],
)
def test_other_settings_and_data(
    settings: dict[str, Any],
    data: dict[str, Any],
    words: str,
    together: Callable,
    node: Callable,
    write_data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    if data.pop("images", False):

        def edit(files: dict, metadata: dict) -> None:
            names = list(files)
            files[names[0]], files[names[1]] = files[names[1]], files[names[0]]

        data["edit"] = edit
    if data:
        settings = {**settings, "data": str(write_data(tmp_path / "other.zip", **data))}
    for rank, ended in enumerate(together(node(0), node(1, **settings))):
        message = error_of(ended)
        assert message.startswith(f"[rank {rank}] error: the processes differ: ")
        assert words in message
    assert not (tmp_path / "node0").exists()


def test_equal_data_in_other_places(
    together: Callable, node: Callable, write_data: Callable[..., Path], tmp_path: Path
) -> None:
    """Each machine may have its own copy."""
    first, second = together(node(0), node(1, data=str(write_data(tmp_path / "copy.zip"))))
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert first.state == second.state != ""


def another_version() -> None:
    start.__version__ = "0.0.1"


def another_torch() -> None:
    torch.__version__ = "2.8.0"


def other_code() -> None:
    original = Path.read_bytes
    Path.read_bytes = lambda path: original(path) + (b"#" if path.name == "losses.py" else b"")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (another_version, "epigraf_fast is 0.1.0 on rank 0 and 0.0.1 on rank 1: install the same everywhere"),
        (another_torch, "and 2.8.0 on rank 1: install the same everywhere"),
        (other_code, "the checksum of epigraf_fast's code is"),
    ],
)
def test_other_versions(fault: Fault, words: str, together: Callable, node: Callable) -> None:
    for ended in together(node(0), node(1), faults={1: fault}):
        assert words in error_of(ended)


# One that fails


def test_data_that_are_missing_on_one(together: Callable, node: Callable) -> None:
    first, second = together(node(0), [*node(1), "--data", "no/such/set.zip"])
    assert "[rank 1] error: no/such/set.zip: there is no such data set" in error_of(second)
    assert "[rank 0] error: rank 1 has stopped: no/such/set.zip: there is no such data set" in error_of(first)


def test_flags_that_are_wrong_on_one(together: Callable, node: Callable) -> None:
    first, second = together([*node(0), "--no-such-flag", "1"], node(1))
    assert first.code == 2
    assert "no-such-flag" in first.errors
    assert "[rank 1] error: rank 0 has stopped: unrecognized options: --no-such-flag" in error_of(second)


def test_a_checkpoint_that_is_damaged_on_rank_0(together: Callable, node: Callable, trained: Callable) -> None:
    checkpoint = trained(0)
    checkpoint.write_bytes(b"half of it")
    first, second = together(node(0), node(1))
    assert "holds no readable checkpoint: choose another --run-dir to begin anew" in error_of(first)
    assert "rank 0 has stopped" in error_of(second)


def test_an_image_that_cannot_be_read_by_one(
    together: Callable, node: Callable, write_data: Callable[..., Path], tmp_path: Path
) -> None:
    """Found in the middle of training: what was trained is saved, and all say which process has the fault."""

    def unreadable() -> None:
        original = train.make_loader

        def make_loader(*args: Any, **options: Any) -> Any:
            loader = original(*args, **options)
            yield next(loader)
            raise UserError("image 005.png cannot be read")

        train.make_loader = make_loader

    first, second = together(node(0), node(1), faults={1: unreadable})
    assert "rank 1 has stopped: image 005.png cannot be read (saved" in error_of(first)
    assert "[rank 1] error: image 005.png cannot be read (saved" in error_of(second)
    assert [path.name for path in list_checkpoints(tmp_path / "node0")] == ["checkpoint-000000008.pt"]


@pytest.mark.parametrize("trained_images", [0, 8])
def test_a_signal_in_a_measurement(trained_images: int, together: Callable, node: Callable, tmp_path: Path) -> None:
    """That rank 0 makes while the other waits for it: both leave, before any step or after one that is saved."""

    def stopped_in_a_measurement() -> None:
        calls = []

        class Stopping(Distance):
            def update_fake(self, images: torch.Tensor) -> None:
                calls.append(images)
                if len(calls) == (2 if trained_images else 1):
                    signal.raise_signal(signal.SIGTERM)
                    raise AssertionError("the signal did not interrupt")

        snapshot.FeatureDistance = Stopping

    lines = [node(rank, metric_images=2, metric_kimg=0.008) for rank in range(2)]
    first, second = together(*lines, faults={0: stopped_in_a_measurement})
    assert (first.code, second.code) == (143, 143), first.errors + second.errors
    assert f"stopped by signal 15; {'saved' if trained_images else 'nothing was trained yet'}" in first.output
    assert len(list_checkpoints(tmp_path / "node0")) == (1 if trained_images else 0)


def test_a_process_that_dies(together: Callable, node: Callable) -> None:
    """At once, while the other builds its networks."""

    def die() -> None:
        start.Trainer = lambda *args: os._exit(9)

    first, second = together(node(0), node(1), faults={1: die})
    assert second.code == 9
    assert "another process is gone" in error_of(first)


def test_a_process_that_hangs(together: Callable, node: Callable, tmp_path: Path) -> None:
    """In the second step, in D; the one that waits for it ends by itself, long before an exchange gives up."""
    waiting = tmp_path / "pid"

    def hang(trainer: start.Trainer) -> None:
        while trainer.iterations == 1 and Path("/proc", waiting.read_text()).is_dir():
            time.sleep(0.05)

    def watch(trainer: start.Trainer) -> None:
        if trainer.iterations == 1:
            trainer.world.watch.limit = 0.5

    def patch(rank: int) -> None:
        if rank == 0:
            waiting.write_text(str(os.getpid()))
        original = start.Trainer._discriminator_phase

        def phase(trainer: start.Trainer, *samples: Any) -> None:
            (watch, hang)[rank](trainer)
            original(trainer, *samples)

        start.Trainer._discriminator_phase = phase

    first, second = together(node(0), node(1), faults={rank: functools.partial(patch, rank) for rank in range(2)})
    assert first.code == 3
    *_, line = first.errors.splitlines()
    assert line == (
        "[rank 0] stopped: waited 0.5 s in phase D of step 1, at 8 images: another process or the network hangs "
        "(exit code 3; EPIGRAF_FAST_HANG_SECONDS sets the limit); go on with --resume auto"
    )
    assert "another process is gone" in error_of(second)


def test_waits_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a step, an excused one, and time in which this process was stopped; phases do on a GPU alone."""
    ended: list[int] = []
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog.threading, "Thread", lambda **_: SimpleNamespace(start=int, join=int))
    ticks: list[float] = []

    def wait(seconds: float) -> bool:
        clock.now += ticks.pop(0)
        return not ticks

    def spend(*seconds: float) -> list[int]:
        ticks[:] = [*seconds, 0.0]
        watch._look(SimpleNamespace(wait=wait))
        return ended

    watch = Watchdog(0, limit=8, end=ended.append)
    for device, name, codes in (("cpu", "G", []), ("cuda", "data", []), ("cuda", "G", [HUNG])):
        with watch.over(lambda: "step 7", torch.device(device)), annotate("iteration"), annotate(name):
            assert spend(*[1.0] * 9) == codes
        ended.clear()
    with watch.over(lambda: "step 7", torch.device("cpu")):
        with watch.waiting():
            assert spend(100.0, 1.0, 1.0) == []
            assert spend(*[1.0] * 5) == [HUNG]
        ended.clear()
        watch.excuse()
        with watch.waiting():
            assert spend(*[1.0] * 9) == []
        with watch.waiting(), watch.waiting():
            assert spend(*[1.0] * 9) == [HUNG]


def test_a_process_that_never_comes(together: Callable, node: Callable) -> None:
    def impatient() -> None:
        distributed.JOIN = datetime.timedelta(seconds=1)

    def die() -> None:
        os._exit(9)

    first, _ = together(node(0), node(1), faults={0: impatient, 1: die})
    assert "the 2 processes do not meet at localhost:" in error_of(first)


# Their environment


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "abc"}, "RANK must be an integer in [0, 1), got 'abc'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be an integer in [0, 2), got '2'"),
        ({"RANK": "1"}, "RANK must be an integer in [0, 1), got '1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer at least 1, got '0'"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE must be an integer at least 1, got '2.5'"),
        (
            {"EPIGRAF_FAST_HANG_SECONDS": "1.5"},
            "EPIGRAF_FAST_HANG_SECONDS must be an integer at least 0, got '1.5': unset EPI",
        ),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be an integer at least 0, got '-1'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT must be an integer in [1, 65536), got '0'"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
            "MASTER_PORT must be an integer in [1, 65536), got 'http'",
        ),
    ],
)
def test_variables(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.main(["demo"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert World.from_environment().size == 1


# The checksum


def test_the_checksum_sees_every_bit() -> None:
    content = {"b": [torch.zeros(3), (1, None)], "a": torch.tensor(2.0)}
    same = {"a": torch.tensor(2.0), "b": [torch.zeros(6)[::2], (1, None)]}
    assert checksum(content) == checksum(same)
    for other in (
        {**content, "a": torch.tensor(2.0000002)},
        {**content, "a": torch.tensor(2.0, dtype=torch.float64)},
        {**content, "b": [torch.zeros(1, 3), (1, None)]},
        {**content, "b": [torch.tensor([0.0, 0.0, -0.0]), (1, None)]},
        {**content, "b": [torch.zeros(3), (2, None)]},
        {**content, "c": 0},
    ):
        assert checksum(content) != checksum(other)
