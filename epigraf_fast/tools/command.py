"""How a command begins, is interrupted, writes its files and ends.

Little is imported at first, and nothing but Python's own modules, so that Ctrl-C is heard early, long before torch is
loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ClassVar, NoReturn

from ..errors import UserError, not_installed
from ..progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOST = b"\0"  # no signal's number
GRACE = 3.0  # seconds that the main thread may take from a signal to the end of what it does
REPEATED = 0.5  # seconds within which signals are one: `timeout` sends each to a process and to its group


# Interruption


def begin() -> None:
    """What a command does before anything large is imported: until `running` takes over, Ctrl-C ends it at once.

    Nothing has been written by then, and libraries half imported cannot be trusted with an exception.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _at_once)
    if sys.stderr.isatty():
        Progress(what="starting").__enter__()  # `running` ends it


def begun() -> None:
    """Everything large is imported: Ctrl-C raises KeyboardInterrupt again, and nothing computes with denormal numbers.

    What lies behind a surface gets gradients of 1e-38 and less, with which a CPU takes many times as long. Threads
    inherit it, so that it is said before there are any.
    """
    Progress.end_all()
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(True)
    if signal.getsignal(signal.SIGINT) is _at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _at_once(number: int, frame: FrameType | None) -> None:
    _leave_at_once(number)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """How a command ends: all that it does stands in this block.

    A `UserError`, or memory that is not there, is `error: ...` on stderr and exit code 2. Ctrl-C is `interrupted` and
    130, SIGTERM and SIGHUP are `terminated` and 143 and 129: they raise KeyboardInterrupt in the main thread, so that
    what is open closes. A second one, or three seconds in which the main thread does not get there, end the process at
    once. Whichever way, no temporary output stays.
    """
    begun()
    interrupts = _Interrupts()
    try:
        with interrupts:
            yield
    except BaseException as error:
        Progress.end_all()
        remove_temporaries()
        number = interrupts.number or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        if number:  # whatever came after a signal came of it
            print(_last_word(number), file=sys.stderr)
            exec("")  # forgets a KeyboardInterrupt that has left another exec, for which Python would end by SIGINT
            sys.exit(128 + number)
        if isinstance(error, BrokenPipeError):  # who reads our output, as `head`, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        if isinstance(error, UserError) or _is_out_of_memory(error):
            text = str(error) if isinstance(error, UserError) else "there is not enough memory for that: ask for less"
            print(f"error: {text}", file=sys.stderr)
            sys.exit(2)
        raise


def require(module: str, package: str, extra: str, otherwise: str = "") -> ModuleType:
    """A module of a package that only some extra of setup.py brings.

    Raises:
        UserError: It is not installed.
    """
    try:
        with uninterrupted():  # which some packages take for the absence of what they import
            return importlib.import_module(module)
    except ImportError:
        raise not_installed(package, extra, otherwise) from None


def heard() -> None:
    """Says that a KeyboardInterrupt has arrived and something is being saved, which may take its time."""
    if _Interrupts.active is not None:
        _Interrupts.active.heard.set()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For a short piece of work that a signal shall not cut in half: KeyboardInterrupt is raised behind it."""
    interrupts = _Interrupts.active
    if interrupts is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupts.held = interrupts.number, True
    try:
        yield
    finally:
        interrupts.held = False
    if interrupts.number != before:
        raise KeyboardInterrupt


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, of numpy, or of torch's allocator on the CPU, which raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


class _Interrupts:
    """The signals of a command, as `running` describes them.

    Python calls a handler between two steps of the main thread, which a library's long call puts off. So a second
    thread is told too, through the wakeup descriptor, and ends the process where the main thread does not. And what is
    raised inside a callback is lost, as Python has nobody to hand it to: it is raised anew.
    """

    active: ClassVar[_Interrupts | None] = None

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.held = False  # by `uninterrupted`
        self.lost = False  # the KeyboardInterrupt
        self.heard = threading.Event()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        _Interrupts.active = self
        self.inner, self.outer = os.pipe()
        os.set_blocking(self.outer, False)
        self.descriptor = signal.set_wakeup_fd(self.outer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        self.hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
                self.before[number] = signal.signal(number, self._asked)

    def __exit__(self, *_: object) -> None:
        self.heard.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if _Interrupts.active is self:
            sys.unraisablehook = self.hook
            signal.set_wakeup_fd(self.descriptor)
            os.close(self.outer)
            _Interrupts.active = None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if not self.number or self.lost:
            self.number, self.lost = self.number or number, False
            if not self.held:
                raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        if self.number and issubclass(lost.exc_type, KeyboardInterrupt):
            self.lost = True
            os.write(self.outer, LOST)
        else:
            self.hook(lost)

    def _watch(self) -> None:
        first, number, ours = 0.0, 0, 0
        while True:
            waits = number and not self.heard.is_set()
            timeout = max(first + GRACE - time.monotonic(), 0.01) if waits else None
            if not select.select([self.inner], [], [], timeout)[0]:
                if not self.heard.is_set():
                    _leave_at_once(number)
                continue
            new = os.read(self.inner, 1)
            if not new:  # the block has ended
                os.close(self.inner)
                return
            if new == LOST:
                time.sleep(0.05)  # until the callback has ended
                if not self.heard.is_set():
                    ours += 1
                    signal.pthread_kill(threading.main_thread().ident, number)
            elif new[0] not in SIGNALS:
                continue
            elif not number:
                first, number = time.monotonic(), new[0]
            elif ours:
                ours -= 1
            elif time.monotonic() - first > REPEATED:
                _leave_at_once(number)


def _last_word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def _leave_at_once(number: int) -> NoReturn:
    remove_temporaries()
    line = ("\n" if os.isatty(2) else "") + _last_word(number) + "\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(128 + number)


# Outputs


_temporaries: set[Path] = set()
_numbers = itertools.count()


def remove_temporaries() -> None:
    """Removes every output that is not whole yet."""
    for path in list(_temporaries):
        _remove(path)


def _remove(path: Path) -> None:
    import shutil

    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _temporaries.discard(path)


def check_output(flag: str, path: Path, suffixes: Sequence[str] = (), *, overwrite: bool = False) -> None:
    """Raises UserError, before any work, where a flag names a file that could not be written. Nothing stays behind.

    Args:
        suffixes: What the name may end in; default: anything.
        overwrite: Whether a file that is there may be replaced.
    """
    if suffixes and path.suffix not in suffixes:
        allowed = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise UserError(f"{flag} must end in {allowed}, got {path}")
    with _explained(flag, path):
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder: name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"{flag} {path} is there already: choose another name, or add --overwrite")
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise UserError(f"{flag} {path} is no file that may be replaced: choose another name")
        _probe(flag, path, Path(os.path.realpath(path)))


def check_folder(flag: str, path: Path, names: Sequence[str], *, overwrite: bool = False) -> None:
    """The same for a folder that files of these names, as `checkpoints/*.pt`, shall be written to."""
    with _explained(flag, path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag} {path} is a file: name a folder")
        found = [file for name in names for file in sorted(path.glob(name))]
        if found and not overwrite:
            raise UserError(f"{flag} {path} has a {found[0].name} already: choose another folder, or add --overwrite")
        _probe(flag, path, Path(os.path.realpath(path)) / "x")


@contextlib.contextmanager
def _explained(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror or error}): choose another place") from None


def _probe(flag: str, path: Path, target: Path) -> None:
    """Makes and removes a file where the temporary one will be, or in the nearest folder that is there."""
    folder = target.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{flag} {path} cannot be written: {folder} is a file, not a folder")
    probe = _beside(folder / target.name)
    _temporaries.add(probe)
    try:
        probe.touch()
    finally:
        _remove(probe)


def _beside(path: Path) -> Path:
    """A hidden temporary with the same suffix, by which libraries choose the format."""
    return path.with_name(f".{path.stem[:100]}-{os.getpid()}.partial{path.suffix}")


@contextlib.contextmanager
def output(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path`, which becomes it when the block ends well, and is removed when it does not.

    Folders are made where they lack. Raises UserError where the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = _beside(target)
    with _written(path, partial):
        partial.touch()
        yield partial
        os.replace(partial, target)


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """The same for the files of a folder: what is written to the temporary one, subfolders too, moves into `path`."""
    partial = _beside(Path(os.path.realpath(path)) / f"files-{next(_numbers)}")
    with _written(path, partial):
        partial.mkdir()
        yield partial
        for file in sorted(file for file in partial.rglob("*") if file.is_file()):
            target = path / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


@contextlib.contextmanager
def _written(path: Path, partial: Path) -> Iterator[None]:
    """Owns a temporary and the folders that are made for it."""
    made = [folder for folder in partial.parents if not folder.exists()]
    _temporaries.add(partial)
    whole = False
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield
        whole = True
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise  # of our stdout
        if isinstance(error.filename, (str, bytes, os.PathLike)) and not _is_ours(error.filename, partial):
            raise  # of a file that was read
        raise UserError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        _remove(partial)
        if not whole:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _is_ours(name: Any, partial: Path) -> bool:
    named = Path(os.fsdecode(name))
    return partial in (named, *named.parents) or named in partial.parents
