"""The command `epigraf`, and `python -m epigraf_fast`: a table of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .tools.command import begin, begun, running

# The words of a command -> its module in epigraf_fast.tools, and what it does.
COMMANDS = {
    "train": ("train", "train a model; every setting of a preset is a flag"),
    "doctor": ("doctor", "what this machine can run, and why not the rest"),
    "render": ("render", "pictures and videos of generated objects"),
    "mesh": ("mesh", "meshes and density volumes of generated objects"),
    "viewer": ("viewer", "look at generated objects in a browser"),
    "project": ("project", "find the object of a given image"),
    "metrics": ("metrics", "distances to the data, and whether views agree"),
    "figures": ("figures", "the paper's figures about patches, and a run's curves"),
    "convert": ("convert", "published snapshots to checkpoints, generators to safetensors"),
    "data make": ("make_data", "render meshes into a data set"),
    "data check": ("check_data", "check a data set, and draw its poses"),
    "data convert": ("convert_data", "camera poses of EG3D and NeRF to ours, and back"),
}
COMPLETION = "--tyro-print-completion", "--tyro-write-completion"


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 done, 1 training diverged or the GPU failed, 2 a fault in what was given, 3 another process of
        the run hangs, 128 + n ended by signal n.
    """
    begin()
    words = list(sys.argv[1:] if args is None else args)
    name = " ".join(words[: 2 if words[:1] == ["data"] else 1])
    if name in COMMANDS:
        module = importlib.import_module(f".tools.{COMMANDS[name][0]}", __package__)
        rest = words[len(name.split()) :]
        if name == "train":  # ends in a way of its own
            return module.main(rest)
        from .tools.arguments import parse

        with running():
            module.run(parse(module.Options, name, module.__doc__, rest))
        return 0
    begun()
    if words[:1] and words[0] in COMPLETION:
        from .tools.complete import complete

        with running():
            complete(words, COMMANDS)
        return 0
    asked = bool({"-h", "--help"} & set(words))
    if asked or not words or words == ["data"]:
        print(usage("data" if words[:1] == ["data"] else ""))
        return 0 if asked else 2
    print(f"error: there is no command {name!r} (see epigraf --help)", file=sys.stderr)
    return 2


def usage(group: str = "") -> str:
    """The help page, of all commands or of those of a group."""
    shown = {name: about for name, (_, about) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    return "\n".join(
        [
            f"usage: epigraf {group or 'COMMAND'} ...",
            "",
            "Trains EpiGRAF, a 3D GAN on patches, and shows, measures and exports what it has learnt.",
            "",
            *(f"  {name:{width}}  {about}" for name, about in shown.items()),
            "",
            "epigraf COMMAND --help explains one. Exit codes: 0 done, 1 training diverged or the GPU failed, 2 a fault",
            "in what was given (one line says which), 3 another process of the run hangs, 128 + n ended by signal n.",
            "Completion for bash, zsh or fish: epigraf --tyro-print-completion SHELL",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
