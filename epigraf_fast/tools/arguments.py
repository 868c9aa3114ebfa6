"""Command lines: tyro reads a dataclass of options, numbers are checked as they are read, faults are one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg as about
from tyro.constructors import PrimitiveConstructorSpec

from ..errors import UserError

MOST_NUMBERS = 10_000
T = TypeVar("T")


# Types of options


def _spec(metavar: str, read: Callable[[str], Any], *, several: bool = False) -> PrimitiveConstructorSpec:
    """How tyro reads an option of one word, or of one or more."""

    def instance(words: list[str]) -> Any:
        if not several:
            return read(words[0])
        if not words:
            raise ValueError("needs at least one value")
        return tuple(read(word) for word in words)

    def words(value: Any) -> list[str]:
        return [str(part) for part in value] if several and value is not None else [str(value)]

    name = f"{metavar} [{metavar} ...]" if several else metavar
    return PrimitiveConstructorSpec("*" if several else 1, name, instance, lambda value: True, words)


def whole(low: int, high: int) -> PrimitiveConstructorSpec:
    """For `Annotated[int, whole(0, 9)]`: a whole number within bounds."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,40}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, got {text or 'nothing'}")
        return int(text)

    return _spec("INT", read)


def real(low: float = -math.inf, high: float = math.inf, *, several: bool = False) -> PrimitiveConstructorSpec:
    """A finite number within bounds, or a tuple of one or more."""
    bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}" if low > -math.inf else ""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"must be a finite number{f' {bounds}' if bounds else ''}, got {text or 'nothing'}")
        return value

    return _spec("FLOAT", read, several=several)


def parse_numbers(text: str) -> tuple[int, ...]:
    """`0-3,8` -> (0, 1, 2, 3, 8)."""
    if not re.fullmatch(r"\d{1,19}(-\d{1,19})?(,\d{1,19}(-\d{1,19})?)*", text):
        raise ValueError(f"must look like 0-15 or 1,4,7-9, got {text!r}")
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    for ends in ranges:
        if ends[0] > ends[-1] or ends[-1] >= 2**63:
            part = "-".join(map(str, ends))
            raise ValueError(f"must be ranges that go up, below 2^63, got {part!r} in {text!r}")
    if sum(ends[-1] - ends[0] + 1 for ends in ranges) > MOST_NUMBERS:
        raise ValueError(f"must be at most {MOST_NUMBERS:,} numbers, got {text!r}")
    return tuple(n for ends in ranges for n in range(ends[0], ends[-1] + 1))


def several(choices: Sequence[str]) -> PrimitiveConstructorSpec:
    """One or more of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be of {', '.join(choices)}, got {text}")
        return text

    return _spec(f"{{{','.join(choices)}}}", read, several=True)


def default(text: object) -> Any:
    """What the help says of an option whose default is found at run time, or depends on another."""
    return about(help_behavior_hint=f"(default: {text})")


optional = about(help_behavior_hint="")  # what is not done unless it is asked for
NUMBERS = _spec("0-3,8", parse_numbers)
PATHS = _spec("PATH", Path, several=True)


# Options that mean the same in every command

Checkpoint = Annotated[
    tyro.conf.Positional[Path],
    about(
        help="A checkpoint, a run folder, what `epigraf convert` wrote, or `builtin`, the model that comes along.",
        metavar="CHECKPOINT",
    ),
]
Device = Annotated[
    str | None,
    about(help="cpu, cuda or cuda:N.", metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)"),
]
Overwrite = Annotated[bool, about(help="Replace what is there already.")]
Json = Annotated[bool, about(help="Print JSON, for programs.")]


@dataclasses.dataclass(frozen=True)
class GeneratorOptions:
    """What every command that looks at a generator asks for."""

    checkpoint: Checkpoint
    seeds: Annotated[tuple[int, ...], NUMBERS, default("0-15")] = tuple(range(16))
    """Objects to show, as in 0-15 or 1,4,7-9."""
    labels: Annotated[tuple[int, ...] | None, NUMBERS, default("seed modulo those that have images")] = None
    """Classes, taken in turn."""
    truncation: Annotated[float, real(-1, 1)] = 1.0
    """Truncation psi: 1 is none, 0 the mean object."""
    cutoff: Annotated[int | None, whole(0, 1000), default("all")] = None
    """How many style vectors are truncated."""
    device: Device = None


# Reading


def parse(options: type[T], command: str, document: str, args: Sequence[str]) -> T:
    """The options of `epigraf COMMAND`.

    Args:
        document: What it does in a line or two, for the head of its help; behind an empty line, what stands below.

    Raises:
        UserError: The command line is wrong.
    """
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    return read(functools.partial(tyro.cli, options, config=config), f"epigraf {command}", document, args)


def read(cli: Callable[..., T], prog: str, document: str, args: Sequence[str] | None) -> T:
    """The same with a function of tyro's. Of a mistake tyro paints a box, with help and hints: it becomes one line.

    Raises:
        UserError: The command line is wrong.
    """
    args = sys.argv[1:] if args is None else list(args)
    head, _, below = document.partition("\n\n")
    for columns in (None, "10000"):  # help is as wide as the terminal, what a mistake says is not broken into lines
        box = io.StringIO()
        with contextlib.redirect_stderr(box), _environment("COLUMNS", columns), _whole_paragraphs():
            try:
                return cli(prog=prog, description=head, args=args)
            except SystemExit as end:
                if not end.code and {"-h", "--help"} & set(args):
                    print(f"\n{_wrapped(below)}")
                if end.code != 2:
                    raise
    raise UserError(f"{_told(box.getvalue())} (see {prog} --help)")


def _wrapped(text: str) -> str:
    """Paragraphs as wide as the terminal, of up to 100 letters; lines that begin with $ stay lines."""
    width = min(shutil.get_terminal_size().columns, 100)
    parts = (part.strip() for part in text.split("\n\n"))
    return "\n\n".join(
        part if part.startswith("$") else textwrap.fill(part, width, break_on_hyphens=False) for part in parts
    )


@contextlib.contextmanager
def _whole_paragraphs() -> Iterator[None]:
    """tyro takes an indented line of a docstring for a list, and keeps its end: here it belongs to its paragraph."""
    strings = getattr(tyro, "_strings", None)
    join = getattr(strings, "remove_single_line_breaks", None)
    if join is None:  # another tyro
        yield
        return
    strings.remove_single_line_breaks = lambda text: join("\n".join(map(str.strip, text.split("\n"))))
    try:
        yield
    finally:
        strings.remove_single_line_breaks = join


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif value is not None:
            del os.environ[name]


def _told(box: str) -> str:
    """The mistake that a box of tyro's is about."""
    title, *lines = box.splitlines()
    # A frame stands around each line and a rule between two parts; where stdout knows no such signs, blanks and dashes.
    rows = ["" if not line.strip("─-╭╮╰╯│ ") else line[2:].rstrip("│ ") for line in lines]
    rows = rows[1:] if rows[:1] == [""] else rows
    first = rows[: rows.index("")] if "" in rows else rows
    if title.strip("╭╮─ ") == "Required options":
        missing = ", ".join(row.strip() for row in first if re.match(" {4}[^ ]", row))
        unknown = rows[rows.index("Unrecognized options:") + 1 :] if "Unrecognized options:" in rows else []
        unknown = [row.strip() for row in unknown[: unknown.index("")]] if "" in unknown else unknown
        return f"required: {missing}" + (f"; unrecognized: {', '.join(unknown)}" if unknown else "")
    text = re.sub(r"^Error parsing ([^:]+): (must|needs) ", r"\1 \2 ", " ".join(" ".join(first).split()))
    text = re.sub(r"^Missing value for argument '(.+?)'\. .*", r"\1 needs a value", text.removeprefix("Error parsing "))
    text = text[:1].lower() + text[1:]
    close = [row.strip() for row in rows if re.match(r" {4}--", row)]
    hint = f"; perhaps you meant {close[0]}" if close and "Perhaps you meant:" in map(str.strip, rows) else ""
    return f"{text.rstrip('.')}{hint}"


# Options that depend on each other


def filled(options: T, defaults: Mapping[str, Any]) -> T:
    """The options with defaults where none was given."""
    return dataclasses.replace(
        options, **{name: value for name, value in defaults.items() if getattr(options, name) is None}
    )


def check_effect(options: Any, kind: str, kinds: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a flag that was given although it does nothing for this kind of work.

    Args:
        options: None, False or nothing where one was not given.
        kinds: Name -> the kinds of work that it is for.
    """
    for name, those in kinds.items():
        value = getattr(options, name)
        if value is not None and value is not False and value != () and kind not in those:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} does nothing for {kind}, only for {', '.join(those)}: leave it out")
