"""Which kernels the GPU of this machine has passed, and which were fastest: kept on disk by what that depends on.

`training.proof` runs the checks, `training.warmup` the timings. Here is what they found: a file for every GPU with its
driver, libraries and this package's code; in it, by a name of the settings, item -> verdict, and what was timed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import machine
from ..atomic import replacing
from . import nvrtc

PASSED, FAILED, SLOWER = "passed", "failed", "slower"
UNSUITED = "unsuited"  # there are no such kernels for the settings
SUSPECT = "suspect"  # a run with them ended by an error of the GPU


class Verdict(NamedTuple):
    """What one item of a check came to, and why it failed."""

    state: str
    why: str = ""
    seconds: float = 0.0


Items = dict[str, Verdict]  # item -> verdict; an item is "backend what", as "triton composite"

# What the kernels of an op call by name: they are no better than these.
NEEDS = {"modulated_conv2d": ("upfirdn2d", "bias_act")}


def accepted(items: Mapping[str, Verdict], ops: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """op -> the backends that passed everything that was checked of them, and at all.

    Args:
        ops: backend -> the ops that it has, of `backends.IMPLEMENTED`.
    """
    good = {item for item, verdict in items.items() if verdict.state == PASSED}
    found: dict[str, list[str]] = {}
    for backend, names in ops.items():
        whole = [item for item in items if item.startswith(f"{backend} ") and item.split(" ", 1)[1] not in names]
        if not all(item in good for item in whole):
            continue
        for op in names:
            if all(f"{backend} {part}" in good for part in (op, *NEEDS.get(op, ()))):
                found.setdefault(op, []).append(backend)
    return {op: tuple(names) for op, names in found.items()}


@functools.cache
def facts(device: torch.device | str) -> dict[str, Any]:
    """What a verdict depends on beside the settings."""
    device = torch.device(device)
    name, capability = "cpu", None
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "gpu": name,
        "capability": capability,
        "driver": machine.driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "triton": triton,
        "code": code(),
    }


@functools.cache
def code() -> str:
    """A checksum of the kernels, of the ops and of the extension."""
    package = Path(__file__).parents[1]
    paths = [*Path(__file__).parent.glob("*.py"), *package.glob("_C*.so"), *nvrtc.csrc().glob("*.[ch]*")]
    kernels = importlib.util.find_spec(f"{package.name}.kernels")  # which a checkout has beside the package
    for place in (kernels and kernels.submodule_search_locations) or []:
        paths += Path(place).glob("*.py")
    return _checksum([(path.name, hashlib.blake2b(path.read_bytes()).hexdigest()) for path in sorted(paths)])


def _checksum(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=10).hexdigest()


def signature(settings: Mapping[str, Any]) -> str:
    """A name of the settings that a check was made with."""
    return _checksum(settings)


def folder(what: str = "verdicts") -> Path:
    """$XDG_CACHE_HOME/epigraf_fast/verdicts, by default in ~/.cache; or what else is kept there."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and os.path.isabs(home) else Path(os.path.expanduser("~/.cache"))
    return base / "epigraf_fast" / what


def read(device: torch.device | str, *elsewhere: Path) -> dict[str, Items]:
    """signature -> items, of the file of this GPU; what is damaged or of another GPU counts as nothing.

    Args:
        elsewhere: Folders to look in too.
    """
    found: dict[str, Items] = {}
    for place in (*elsewhere, folder()):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            found |= {
                str(name): {str(item): Verdict(*verdict) for item, verdict in items.items()}
                for name, items in _content(device, place, "checks").items()
            }
    return found


def write(device: torch.device | str, name: str, items: Items, *elsewhere: Path) -> Path | None:
    """Adds the items of a signature to the file of this GPU, in the first folder that takes it.

    Args:
        elsewhere: Folders to write to where the usual one cannot be written.

    Returns:
        The file, or None where nothing can be written.
    """
    return _add(device, "checks", name, items, elsewhere)


def read_timings(device: torch.device | str, name: str, *elsewhere: Path) -> Any:
    """What `write_timings` was given for a signature; None: nothing. It may be damaged."""
    for place in (folder(), *elsewhere):
        found = _content(device, place, "timings").get(name)
        if found is not None:
            return found
    return None


def write_timings(device: torch.device | str, name: str, value: Any, *elsewhere: Path) -> Path | None:
    """Adds plain values to the file of this GPU, see `write`."""
    return _add(device, "timings", name, value, elsewhere)


def _content(device: torch.device | str, place: Path, kind: str) -> dict[str, Any]:
    """A part of the file of this GPU in a folder, or nothing."""
    try:
        content = json.loads((place / _name(device)).read_bytes())
        part = content[kind] if content["facts"] == facts(device) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return part if isinstance(part, dict) else {}


def _add(device: torch.device | str, kind: str, name: str, value: Any, elsewhere: Iterable[Path]) -> Path | None:
    for place in (folder(), *elsewhere):
        path = place / _name(device)
        parts = {part: _content(device, place, part) for part in ("checks", "timings")}
        parts[kind][name] = value
        with contextlib.suppress(OSError):
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"facts": facts(device), **parts}, indent=1) + "\n")
            return path
    return None


def _name(device: torch.device | str) -> str:
    return f"{_checksum(facts(device))}.json"


def of_bare_ops(device: torch.device | str) -> Items | None:
    """What a call takes that no run has checked for: the worst of all checks of this GPU; None: there was none."""
    worst: Items = {}
    checks = read(device)
    for items in checks.values():
        for item, verdict in items.items():
            if item not in worst or worst[item].state == UNSUITED or verdict.state == FAILED:
                worst[item] = verdict
    return worst if checks else None
