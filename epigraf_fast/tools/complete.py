"""Completion of `epigraf`'s command line in a shell: tyro writes the script from the options of all commands."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from ..errors import UserError
from . import training_options

SHELLS = ("bash", "zsh", "fish")


def complete(words: Sequence[str], commands: Mapping[str, tuple[str, str]]) -> None:
    """Prints or writes the script, as tyro's flag in `words` says. Raises UserError where it names no shell.

    Args:
        commands: The words of a command -> its module in this folder, and what it does.
    """
    if len(words) < 2 or words[1] not in SHELLS:
        raise UserError(f"{words[0]} needs a shell, one of {', '.join(SHELLS)}")
    found: dict[str, Any] = {}
    for name, (module, about) in commands.items():
        if name == "train":
            options = _one_of("preset", training_options.commands())
        else:
            options = importlib.import_module(f".{module}", __package__).Options
        found[name] = options, about
    groups: dict[str, dict[str, Any]] = {}
    for name in [name for name in found if " " in name]:
        group, _, last = name.partition(" ")
        groups.setdefault(group, {})[last] = found.pop(name)
    for group, members in groups.items():
        found[group] = (
            dataclasses.make_dataclass(group, [("command", _nameless(_union(members)))]),
            f"commands of {group}",
        )
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    tyro.cli(_union(found), prog="epigraf", args=list(words), config=config)


def _union(members: Mapping[str, tuple[Any, str]]) -> Any:
    return Union[  # noqa: UP007 - of types that are found at run time
        tuple(Annotated[kind, tyro.conf.subcommand(name, description=about)] for name, (kind, about) in members.items())
    ]


def _one_of(name: str, defaults: Mapping[str, tuple[str, Any]]) -> Any:
    """Options that are one of several defaults, by name."""
    kinds = tyro.extras.subcommand_type_from_defaults(
        {key: value for key, (_, value) in defaults.items()}, prefix_names=False
    )
    return dataclasses.make_dataclass("Options", [(name, _nameless(kinds))])


def _nameless(kinds: Any) -> Any:
    """A field whose name stands in no flag."""
    return Annotated[kinds, tyro.conf.arg(name="", prefix_name=False)]
