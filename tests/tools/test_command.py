"""How commands end, whatever ends them: outputs whole or not there, one line, an exit code; and how waits are shown."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from checks import HANG
from epigraf_fast import progress
from epigraf_fast.__main__ import COMMANDS, main
from epigraf_fast.errors import UserError
from epigraf_fast.progress import Progress, waiting
from epigraf_fast.tools import arguments, command
from epigraf_fast.tools.arguments import real, whole
from epigraf_fast.tools.command import check_folder, check_output, output, output_folder, running
from epigraf_fast.training.progress import progress as progress_of_training


def tree(folder: Path) -> list[str]:
    """Everything under a folder, hidden files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Outputs


def test_an_output_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    with output(path) as partial:
        assert partial.suffix == path.suffix
        partial.write_text("new")
        assert not path.exists()
        assert list(command._temporaries) == [partial]
    assert path.read_text() == "new"
    assert tree(tmp_path) == ["a", "a/b", "a/b/x.txt"]
    assert not command._temporaries


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_what_is_not_whole_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    old = tmp_path / "x.txt"
    old.write_text("old")
    for path in (old, tmp_path / "a" / "b" / "y.txt"):
        with pytest.raises(error), output(path) as partial:  # noqa: PT012
            partial.write_text("half")
            raise error
    with pytest.raises(error), output_folder(tmp_path / "c") as partial:  # noqa: PT012
        (partial / "d").mkdir()
        (partial / "d" / "z").touch()
        raise error
    assert old.read_text() == "old"
    assert tree(tmp_path) == ["x.txt"]


def test_a_folder_gets_its_files_together(tmp_path: Path) -> None:
    (tmp_path / "out" / "d").mkdir(parents=True)
    (tmp_path / "out" / "kept").touch()
    with output_folder(tmp_path / "out") as partial:
        (partial / "d").mkdir()
        (partial / "d" / "new").touch()
        assert not (tmp_path / "out" / "d" / "new").exists()
    assert tree(tmp_path) == ["out", "out/d", "out/d/new", "out/kept"]


def test_outputs_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with output(tmp_path / "x") as partial:
            partial.write_text("x")
        with output_folder(tmp_path / "y") as partial:
            (partial / "z").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "y/z", "y")]
    assert modes == [0o640, 0o640, 0o750]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "x.txt").symlink_to(tmp_path / "real" / "y.txt")
    for text in ("one", "two"):
        check_output("--out", tmp_path / "x.txt", overwrite=True)
        with output(tmp_path / "x.txt") as partial:
            partial.write_text(text)
        assert (tmp_path / "real" / "y.txt").read_text() == text
    assert (tmp_path / "x.txt").is_symlink()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x could not be written \(No space left on device\)$"), output(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), output(tmp_path / "x"):  # of another file: not ours to explain
        (tmp_path / "none").read_text()
    with pytest.raises(UserError, match="could not be written"), output(tmp_path / "x" / "y"):  # noqa: PT012
        (tmp_path / "x" / "y").unlink(missing_ok=True)
        raise OSError(5, "Input/output error", str(tmp_path / "x"))
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x", "--out must end in .png or .gif, got "),
        ("x.jpg", "--out must end in .png or .gif, got "),
        ("folder.png", "folder.png is a folder: name a file in it"),
        ("file.png", "file.png is there already: choose another name, or add --overwrite"),
        ("file.png/x.png", "file.png is a file, not a folder"),
        ("file.png/y/x.png", "file.png is a file, not a folder"),
        (f"{'x' * 300}.png", "cannot be written (File name too long): choose another place"),
        ("/proc/x.png", "--out /proc/x.png cannot be written ("),
        ("/proc/y/x.png", "--out /proc/y/x.png cannot be written ("),
    ],
)
def test_an_output_that_cannot_be_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        check_output("--out", tmp_path / name, (".png", ".gif"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_an_output_that_can_be_leaves_no_trace(tmp_path: Path) -> None:
    for name in ("x.png", "a/b/c.png", "ä ö.png"):
        check_output("--out", tmp_path / name, (".png",))
    check_folder("out", tmp_path / "new", ["x.pt"])
    check_folder("out", tmp_path, ["x.pt"])
    assert not tree(tmp_path)
    (tmp_path / "x.png").touch()
    check_output("--out", tmp_path / "x.png", (".png",), overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_places_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    for check, path in ((check_output, folder / "x"), (check_output, folder / "y" / "x")):
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            check("--out", path)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        check_folder("out", folder, [])
    file = tmp_path / "x"
    file.touch(mode=0o400)
    with pytest.raises(UserError, match="is no file that may be replaced"):
        check_output("--out", file, overwrite=True)


def test_special_files_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="is no file that may be replaced"):
        check_output("--out", tmp_path / "x", overwrite=True)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.pt").touch()
    with pytest.raises(UserError, match=r"has a a\.pt already: choose another folder, or add --overwrite"):
        check_folder("out", tmp_path, ["config.json", "checkpoints/*.pt"])
    check_folder("out", tmp_path, ["config.json", "checkpoints/*.pt"], overwrite=True)
    with pytest.raises(UserError, match="is a file: name a folder"):
        check_folder("out", tmp_path / "checkpoints" / "a.pt", [])


# Ends


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: there is not enough memory for that: ask for less\n"),
        (RuntimeError("[...] can't allocate memory: you tried"), 2, "error: there is not enough memory"),
        (SystemExit(7), 7, ""),
    ],
)
def test_every_end_has_its_code(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, running():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_other_faults_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"), running():
        raise RuntimeError("a fault of ours")


def test_handlers_and_threads_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before, threads = [signal.getsignal(number) for number in numbers], set(threading.enumerate())
    with running():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in numbers] == before
    deadline = time.monotonic() + HANG
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_command_in_another_thread_has_no_signals() -> None:
    results = []

    def work() -> None:
        with running():
            results.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1]


# A command that signals meet while its output is half written. It says so on stdout.
PROGRAM = """
import signal, sys, time
from pathlib import Path
from epigraf_fast.tools import command
def ready():
    print("ready", flush=True)
def sleep():
    while True:
        time.sleep(0.05)
class Callback:
    def __del__(self):
        ready()
        sleep()
command.REPEATED = 0.0
with command.running(), command.output(Path(sys.argv[1]) / "a" / "x.txt") as partial:
    partial.write_text("half")
    {body}
"""
SWALLOWED = """
    say = ready
    while True:
        try:
            say()
            say = lambda: None
            sleep()
        except KeyboardInterrupt:
            print("swallowed", flush=True)
"""
DEAF = """
    import ctypes
    command.GRACE = 0.1
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    ready()
    ctypes.CDLL(None).sleep(600)  # one call, which does not return for a signal that another thread is handed
"""
SAVING = """
    try:
        ready()
        sleep()
    except KeyboardInterrupt:
        command.heard()
        command.GRACE = 0.1
        time.sleep(0.5)
        Path(sys.argv[1], "saved").touch()
        raise
"""
HELD = """
    with command.uninterrupted():
        ready()
        begun = time.monotonic()
        while time.monotonic() < begun + 0.5:
            time.sleep(0.05)
        Path(sys.argv[1], "saved").touch()
    Path(sys.argv[1], "too far").touch()
"""
BODIES = {
    "waits": "ready()\n    sleep()",
    "swallows": SWALLOWED,
    "is deaf": DEAF,
    "saves": SAVING,
    "is held": HELD,
    "is in a callback": "Callback()\n    sleep()",
}
WORDS = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n", signal.SIGHUP: "terminated\n"}


def start(folder: Path, body: str, **options: object) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", PROGRAM.format(body=body), str(folder)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=HANG)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number", WORDS, ids=lambda number: number.name)
@pytest.mark.parametrize("body", ["waits", "is in a callback", "is deaf"])
def test_a_signal_leaves_nothing_behind(body: str, number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, BODIES[body])
    process.send_signal(number)
    assert end(process) == (128 + number, WORDS[number])
    assert [name for name in tree(tmp_path) if name != "a"] == []


def test_a_signal_inside_of_exec_has_its_own_exit_code(tmp_path: Path) -> None:
    """With `python -m`, and `exec` as libraries call it while they are imported, Python would end by SIGINT."""
    lines = ["import time", "from epigraf_fast.tools import command", "with command.running():"]
    lines += ["    exec('print(\\'ready\\', flush=True)\\nwhile True: time.sleep(0.01)')"]
    (tmp_path / "program.py").write_text("\n".join(lines))
    process = subprocess.Popen(
        [sys.executable, "-m", "program", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "terminated\n")


def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, BODIES["swallows"])
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "swallowed\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "interrupted\n")
    assert [name for name in tree(tmp_path) if name != "a"] == []


def test_two_that_are_one_do_not_cut_off_what_is_saved(tmp_path: Path) -> None:
    """As `timeout` sends them, to a process and to its group."""
    process = start(tmp_path, "command.REPEATED = 60.0\n" + BODIES["saves"])
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "terminated\n")
    assert tree(tmp_path) == ["saved"]


@pytest.mark.parametrize("body", ["saves", "is held"])
def test_what_is_being_saved_is_saved(body: str, tmp_path: Path) -> None:
    process = start(tmp_path, BODIES[body])
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "interrupted\n")
    assert tree(tmp_path) == ["saved"]


def test_nohup_is_respected(tmp_path: Path) -> None:
    process = start(tmp_path, BODIES["waits"], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "terminated\n")


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    process = start(tmp_path, "ready()\n    sys.stdin.readline()\n    print(1, flush=True)", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=HANG), errors) == (141, "")
    assert not tree(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_torch_is_loaded_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "epigraf_fast", *name.split(), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "interrupted\n")


def test_a_terminal_sees_that_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "epigraf_fast", "render", "--help"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    try:
        read_until(ours, "starting ... ")
        process.send_signal(signal.SIGINT)
        read_until(ours, "\ninterrupted\r\n")
        assert process.wait(timeout=HANG) == 130
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("is_command", [True, False])
def test_a_command_flushes_denormal_numbers_in_all_threads(is_command: bool) -> None:
    """A library does not: that is its program's choice."""
    program = """
import contextlib, sys, torch
from epigraf_fast import ops
from epigraf_fast.tools.command import running

with running() if sys.argv[1] == "True" else contextlib.nullcontext():
    torch.set_num_threads(3)
    tiny = torch.tensor([1e-39]).expand(4, 64, 128, 128).contiguous()
    print(*((y != 0).sum().item() for y in (tiny * 0.5, ops.bias_act(tiny, None, act="lrelu"))))
"""
    words = [sys.executable, "-c", program, str(is_command)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["0"] * 2 if is_command else [str(4 * 64 * 128 * 128)] * 2)


def test_a_library_keeps_the_signals_of_its_program() -> None:
    program = "import signal, epigraf_fast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# Waits


def read_until(descriptor: int, *words: str) -> str:
    """What is written to a terminal until all words have come, or for two minutes."""
    text, deadline = "", time.monotonic() + HANG
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, text[-200:]
        text += os.read(descriptor, 1000).decode()
    return text


def test_a_terminal_shows_what_it_is_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr(progress, "PATIENCE", {True: 0.01, False: threading.TIMEOUT_MAX})
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for number in Progress(range(4), "objects"):
            if number == 1:
                read_until(ours, "objects: ", " 25%|", "| 1/4 [")
        with Progress(what="images", total=10) as bar:
            bar.update(7)
            read_until(ours, "images: ", "| 7/10 [")
        with Progress(range(3), "outer"), waiting("reading"):
            read_until(ours, "outer: 0/3 [", ", reading ... 0 s")
        with Progress(what="outer"):
            for number in progress_of_training(range(2), 2, "inner"):
                assert "\n" not in read_until(ours, f" s, inner: {number}/2 [")  # one display on one line
        # the thread has ended, its line is cleared
        assert re.search(r"\r *\r$", os.read(ours, 1000).decode())
    os.close(ours)


def test_a_file_gets_a_few_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", {True: threading.TIMEOUT_MAX, False: 0.01})
    text, deadline = "", time.monotonic() + HANG
    with Progress(what="images", total=10) as bar:
        bar.update(7)
        while text.count("\n") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            text += capsys.readouterr().err
    assert {line.partition(" [")[0] for line in text.splitlines()} == {"images: 7/10"}
    assert "\r" not in text


def test_short_waits_are_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress([1, 2], "objects")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_wait_that_fails_is_shown_no_longer() -> None:
    with pytest.raises(SystemExit), running():  # noqa: PT012
        for number in Progress(range(3), "objects"):
            if number:
                raise UserError("no")
    assert not Progress._open
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


# Options


def test_numbers() -> None:
    read = arguments.parse_numbers
    assert [read(text) for text in ("0-3,8", "7", "4,4")] == [(0, 1, 2, 3, 8), (7,), (4, 4)]
    assert read(str(2**63 - 1)) == (2**63 - 1,)


@pytest.mark.parametrize(
    "text", ["", "a", "3-", "1,,2", "5-3", "0-2,9-5", "-1", "9" * 30, str(2**63), "0-9999999999", "0-5000,1-5000", "1 "]
)
def test_wrong_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must (look like|be ranges that go up|be at most)"):
        arguments.parse_numbers(text)


def read(spec: PrimitiveConstructorSpec, text: str) -> object:
    return spec.instance_from_str([text])


def refusal(spec: PrimitiveConstructorSpec, text: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(spec, text)
    return str(caught.value)


def test_bounds() -> None:
    assert [read(whole(2, 5), text) for text in ("2", "5", "+3")] == [2, 5, 3]
    for text in ("1", "6", "2.0", "", "nan", "1_0", "9" * 5000):
        assert refusal(whole(2, 5), text).startswith("must be a whole number from 2 to 5, got ")
    assert [read(real(-1, 1), text) for text in ("-1", "1", "1e-3")] == [-1, 1, 1e-3]
    for text in ("-1.1", "nan", "inf", "-inf", "1e999", "x", ""):
        assert refusal(real(-1, 1), text).startswith("must be a finite number from -1 to 1, got ")
    assert read(real(), "-1e300") == -1e300
    assert refusal(real(), "inf") == "must be a finite number, got inf"
    assert refusal(real(0), "-1") == "must be a finite number of at least 0, got -1"


@dataclasses.dataclass(frozen=True)
class Options:
    kind: tyro.conf.Positional[Literal["a", "b"]]
    """The first word."""
    size: Annotated[int, whole(1, 9)] = 3
    """Of it."""
    yaw: Annotated[tuple[float, ...] | None, real(several=True), arguments.default("ahead")] = None
    """To look at."""
    plain: float = 1.0


def parse(*line: str) -> Options:
    return arguments.parse(Options, "x", "What it does.\n\n$ epigraf x a\n\nWith care, " + "and " * 40, line)


def test_negative_numbers_are_no_flags() -> None:
    assert parse("a", "--yaw", "-1", "-.5", "-1e-3", "-2.E+1").yaw == (-1, -0.5, -0.001, -20)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["a", "--size", "0"], "--size must be a whole number from 1 to 9, got 0 (see epigraf x --help)"),
        (["a", "--size"], "--size needs a value (see epigraf x --help)"),
        (["a", "--yaw"], "--yaw needs at least one value (see epigraf x --help)"),
        (["a", "--plain", "y"], "--plain: could not convert string to float: 'y' (see epigraf x --help)"),
        (["c"], "invalid choice 'c' for argument 'kind'. Expected one of ('a', 'b') (see epigraf x --help)"),
        (["a", "--sizes"], "unrecognized options: --sizes; perhaps you meant --size INT (see epigraf x --help)"),
        ([], "required: {a,b} (see epigraf x --help)"),
        (["a", "--plain", "long " * 60 + "word"], f"--plain: could not convert string to float: '{'long ' * 60}word'"),
    ],
)
def test_faults_of_a_command_line_are_one_line(line: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*line)
    assert str(caught.value).startswith(message)


def test_help_says_what_it_does_then_options_then_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 60  # but for the usage
    assert lines[0].startswith("usage: epigraf x [-h] ")
    order = [lines[0], "What it does.", "$ epigraf x a"]
    assert sorted(order, key=lines.index) == order
    last = max(number for number, line in enumerate(lines) if "(default: 1.0)" in line)  # of the last option
    assert lines.index("$ epigraf x a") > last
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    assert "--yaw FLOAT [FLOAT ...] To look at. (default: ahead)" in text


# One command line


def epigraf(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "epigraf_fast", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG)


def test_the_help_page_has_a_line_for_each_command_and_loads_nothing() -> None:
    done = epigraf("--help")
    assert done.returncode == 0
    for name, (_, about) in COMMANDS.items():
        assert f"  {name} {about}" in re.sub(r"  +(?=[a-z])", " ", done.stdout).replace("\n ", "\n  ")
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert not loaded & {"torch", "numpy", "tyro", "PIL"}
    assert {name for name in loaded if name.startswith("epigraf_fast.tools.")} == {"epigraf_fast.tools.command"}


def test_what_is_no_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for line, name in ((["trian"], "trian"), (["data", "mesh"], "data mesh"), (["--grid"], "--grid")):
        assert main(line) == 2
        assert capsys.readouterr().err == f"error: there is no command {name!r} (see epigraf --help)\n"
    for line in ([], ["data"]):
        assert main(line) == 2
        assert capsys.readouterr().out.startswith("usage: epigraf ")
    assert main(["data", "--help"]) == 0
    assert len(re.findall(r"^  data ", capsys.readouterr().out, re.MULTILINE)) == 3


def test_every_tool_is_a_command() -> None:
    shared = {
        "arguments",
        "command",
        "complete",
        "dry_run",
        "plotting",
        "poses",
        "published",
        "published_settings",
        "training_options",
        "__init__",
    }
    files = {path.stem for path in Path(command.__file__).parent.glob("*.py")}
    assert {module for module, _ in COMMANDS.values()} == files - shared


def test_the_exit_code_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["figures", "curves"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: curves needs a run: give its folder\n"
    assert main(["train", "birds"]) == 2


def test_shells_complete_commands_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--tyro-print-completion", "bash"])
    assert not caught.value.code
    script = capsys.readouterr().out
    for word in ("data", "check", "interpolation", "--min-alpha", "ffhq", "--patch.beta-start"):
        assert word in script
    (tmp_path / "script").write_text(script)
    line = ["bash", "-c", f"source {tmp_path}/script; complete -p epigraf"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == "complete -F _tyro_epigraf epigraf\n"
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", "csh"])
    assert "needs a shell, one of bash, zsh, fish" in capsys.readouterr().err
