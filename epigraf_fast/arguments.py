"""Command lines: faults are one line, numbers are checked as they are read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from .errors import UserError

MOST_NUMBERS = 10_000


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a tool, whose faults are `error: ...` on stderr and exit code 2."""

    def __init__(self, tool: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m epigraf_fast.{tool}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Python's own pattern takes -1e-3 and -inf for flags.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Leaves with the message in one line."""
        named = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        self.exit(2, f"error: {named if named != message else f'{message} (see --help)'}\n")

    def add_overwrite(self) -> None:
        """The flag of `command.check_output`."""
        self.add_argument("--overwrite", action="store_true", help="replace what is there already")


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument: a whole number within bounds."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,40}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text}")
        return int(text)

    return whole_number


def real(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """The type of an argument: a finite number within bounds."""
    bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}" if low > -math.inf else ""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"must be a finite number{f' {bounds}' if bounds else ''}, got {text}")
        return value

    return number


def numbers(text: str) -> list[int]:
    """The type of an argument: `0-3,8` -> [0, 1, 2, 3, 8]."""
    if not re.fullmatch(r"\d{1,19}(-\d{1,19})?(,\d{1,19}(-\d{1,19})?)*", text):
        raise argparse.ArgumentTypeError(f"must look like 0-15 or 1,4,7-9, got {text!r}")
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    for ends in ranges:
        if ends[0] > ends[-1] or ends[-1] >= 2**63:
            part = "-".join(map(str, ends))
            raise argparse.ArgumentTypeError(f"must be ranges that go up, below 2^63, got {part!r} in {text!r}")
    if sum(ends[-1] - ends[0] + 1 for ends in ranges) > MOST_NUMBERS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_NUMBERS:,} numbers, got {text!r}")
    return [n for ends in ranges for n in range(ends[0], ends[-1] + 1)]


def check_effect(given: Mapping[str, object], kind: str, kinds: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a flag that was given although it does nothing for this kind of work.

    Args:
        given: Name -> value of all arguments, None where it was not given.
        kinds: Name -> the kinds of work that it is for.
    """
    for name, those in kinds.items():
        if given[name] is not None and kind not in those:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} does nothing for {kind}, only for {', '.join(those)}: leave it out")
