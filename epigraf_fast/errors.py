"""The exceptions that end a program with one line: a mistake in what a user gave us, a run that diverged."""

from __future__ import annotations


class UserError(ValueError):
    """A fault in the user's input: data, settings or a checkpoint.

    The message is one line that names the fault and the fix. Command-line programs print it without a traceback and
    leave with exit code 2.
    """


def not_installed(package: str, extra: str, otherwise: str = "") -> UserError:
    """What to say where a package is missing that an extra of setup.py brings."""
    return UserError(f"{package} is not installed: pip install -e '.[{extra}]' in epigraf_fast's folder{otherwise}")


class DivergenceError(RuntimeError):
    """A loss is not finite any more. The message says where the last good checkpoint is."""


class DeviceError(RuntimeError):
    """A GPU has failed in a way that the process does not recover from. The message says how to go on."""


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are as they were."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or none."""


class Stopped(BaseException):
    """A signal of this number asks the program to stop; no `except Exception` is to catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number:d}")
        self.signal = number
