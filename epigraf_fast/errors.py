"""The exceptions that end a program with one line: a mistake in what a user gave us, a run that diverged."""

from __future__ import annotations


class UserError(ValueError):
    """A fault in the user's input: data, settings or a checkpoint.

    The message is one line that names the fault and the fix. Command-line programs print it without a traceback and
    leave with exit code 2.
    """


class DivergenceError(RuntimeError):
    """A loss is not finite any more. The message says where the last good checkpoint is."""


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are as they were."""
