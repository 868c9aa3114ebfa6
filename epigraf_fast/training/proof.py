"""The proof that the kernels are right on this device, made before they are taken; `proof_items` has what is checked.

Every item is checked in a child process, so that an illegal address, a hang or a compiler that crashes ends nothing but
itself: the parent marks that item, and starts another child for the rest. What was found is kept, see `ops.verdicts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import Config, flat, from_dict, to_dict
from ..config import check as check_config
from ..data import ImageDataset
from ..errors import DeviceError, UserError
from ..ops import backends, verdicts
from ..ops.verdicts import FAILED, PASSED, SLOWER, SUSPECT, Items, Verdict
from ..progress import waiting
from .distributed import World
from .progress import say
from .proof_items import BEGUN, BOTH, GRADIENTS, GRAPHS, RECORDED, SETTINGS, TIME, Request

TIMED = ("cuda",)  # kinds of devices whose kernels have to be faster than what they replace
PATIENCE = 60.0  # seconds without news of a child, before it counts as hanging
PAUSE = 0.05  # seconds between two looks
POSES = 64  # of a data set that a child is told
RUN = "a run"  # an item that no check has: what became of the last run that took the kernels

# Settings that kernels cannot depend on.
ELSEWHERE = (
    *("data", "run_dir", "seed", "kimg", "device", "batch", "micro_batch", "backend", "cuda_graphs", "inception"),
    *("log_kimg", "snapshot_kimg", "checkpoint_kimg", "keep_checkpoints", "grid", "metric_images", "metric_kimg"),
    *("turntable", "loader.workers", "loader.mirror"),
)


class Finding(NamedTuple):
    """What is known of the kernels on a device.

    Args:
        items: Item -> verdict.
        fresh: Whether it was checked now, and not read.
    """

    items: Items
    fresh: bool = True

    @property
    def passed(self) -> dict[str, tuple[str, ...]]:
        """op -> the kernels that may be taken."""
        return verdicts.accepted(self.items, backends.KERNELS)

    @property
    def records(self) -> bool:
        """Whether CUDA graphs of a run's phases may be taken."""
        verdict = self.items.get(f"{GRAPHS} {RECORDED}")
        return verdict is not None and verdict.state == PASSED


def request_for(config: Config, label_dim: int, angles: torch.Tensor, device: torch.device, micro: int) -> Request:
    """What is to be checked for a run, without any item.

    Args:
        angles: [N, 3], the poses of its data set.
        micro: Images of a micro-batch.
    """
    some = angles[torch.linspace(0, len(angles) - 1, min(len(angles), POSES)).long()]
    return Request(to_dict(config), label_dim, some.tolist(), micro, str(device), [], {})


def signature(config: Config, label_dim: int, micro: int) -> str:
    """The name of what kernels may depend on in a run."""
    settings = {name: value for name, value in flat(config).items() if name not in ELSEWHERE}
    return verdicts.signature(settings | {"label_dim": label_dim, "micro": micro})


def start_child(path: Path, errors: Any) -> subprocess.Popen:
    """A Python of its own that checks the request in a file: it shares no CUDA context with this one."""
    command = [sys.executable, "-m", f"{__package__}.proof_items", str(path)]
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
    )


def prove(
    request: Request,
    *,
    settings: bool = True,
    start: Callable[[Path, Any], subprocess.Popen] = start_child,
    patience: float = PATIENCE,
) -> Items:
    """Checks every kernel that this machine has, then networks on those that passed.

    Args:
        settings: Whether to run a micro-batch at the run's own sizes.
        start: Starts a child for the request in a file; it appends to the file of the same name and suffix .report.
        patience: Seconds without news after which a child is ended.
    """
    usable = {
        backend: [op for op in ops if backends.lacking_on(op, backend, torch.device(request.device).type) is None]
        for backend, ops in backends.KERNELS.items()
    }

    def check(*items: str) -> Items:
        passed = {op: list(names) for op, names in verdicts.accepted(found, backends.KERNELS).items()}
        return _check(request._replace(items=list(items), passed=passed), start, patience)

    def having() -> list[str]:
        good = verdicts.accepted(found, backends.KERNELS)
        return [backend for backend in backends.KERNELS if any(backend in names for names in good.values())]

    found: Items = {}
    found |= check(*(f"{backend} {op}" for backend, ops in usable.items() for op in ops))
    found |= check(*(f"{backend} {GRADIENTS}" for backend in having()))
    if settings and having():
        together = check(f"{BOTH} {SETTINGS}")
        found |= together
        (verdict,) = together.values()
        if verdict.state == FAILED:
            alone = [f"{backend} {SETTINGS}" for backend in having()]
            found |= check(*alone)
            if all(found[item].state == PASSED for item in alone):  # they fail only side by side
                found |= dict.fromkeys(alone, verdict)
    if settings and torch.device(request.device).type in TIMED:
        found |= check(*(f"{backend} {TIME}" for backend in having()))
    if able_to_record(request.config):
        found |= check(f"{GRAPHS} {RECORDED}")
    return found


def able_to_record(values: dict[str, Any]) -> bool:
    """Whether the settings, as `to_dict` gives them, can do with CUDA graphs."""
    try:
        check_config(from_dict(values | {"cuda_graphs": True}))
    except UserError:
        return False
    return True


def _check(request: Request, start: Callable[[Path, Any], subprocess.Popen], patience: float) -> Items:
    """The verdicts of a request's items, by as many children as it takes."""
    found: Items = {}
    with tempfile.TemporaryDirectory(prefix="epigraf-proof-") as folder:
        number = 0
        while rest := [item for item in request.items if item not in found]:
            path = Path(folder, f"{number}.json")
            path.write_text(json.dumps(request._replace(items=rest)._asdict()), encoding="utf-8")
            found |= _watch(rest, path, start, patience)
            number += 1
    return found


def _watch(items: Sequence[str], path: Path, start: Callable[[Path, Any], subprocess.Popen], patience: float) -> Items:
    """What one child found: at least one item's verdict, that of the item that ended it included."""
    report, found, current = path.with_suffix(".report"), {}, items[0]
    with open(path.with_suffix(".errors"), "w+b") as errors:
        child = start(path, errors)
        status, read, last = None, 0, time.monotonic()
        try:
            while status is None:
                status = child.poll()  # before the last look: what was written until then is seen
                lines = report.read_text(encoding="utf-8").split("\n")[:-1] if report.exists() else []
                for line in lines[read:]:
                    item, state, why, seconds = json.loads(line)
                    current = item
                    if state != BEGUN:
                        found[item] = Verdict(state, why, round(seconds, 3))
                if len(lines) > read:
                    read, last = len(lines), time.monotonic()
                if status is None and time.monotonic() - last > patience:
                    if len(found) == len(items):  # it only does not end
                        return found
                    why = f"it hangs: no progress in {patience:g} s"
                    return found | {_unfinished(items, current, found): Verdict(FAILED, why)}
                if status is None:
                    time.sleep(PAUSE)
        finally:
            if status is None:
                with contextlib.suppress(OSError):
                    child.kill()
                while child.poll() is None:
                    time.sleep(PAUSE)
        if status != 0 and (current not in found or not found):
            errors.seek(0)
            found[_unfinished(items, current, found)] = Verdict(FAILED, _how(status, errors.read()))
    if not found:  # it ended well, and said nothing
        found[items[0]] = Verdict(FAILED, "the check said nothing")
    return found


def _unfinished(items: Sequence[str], current: str, found: Items) -> str:
    """The item that a child was at when it ended."""
    return current if current not in found else next(item for item in items if item not in found)


def _how(status: int, errors: bytes) -> str:
    """How a process ended, in one line."""
    if status < 0:
        try:
            word = f"it crashed: {signal.Signals(-status).name}"
        except ValueError:
            word = f"it crashed: signal {-status}"
    else:
        word = f"it ended with exit status {status}"
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return f"{word}: {lines[-1][:200]}" if lines else word


def lines_of(finding: Finding) -> list[str]:
    """What a run says at its start of kernels that it does not take."""
    return [
        f"not taken on this GPU: {item}: {verdict.why}"
        for item, verdict in finding.items.items()
        if verdict.state in (FAILED, SLOWER)
    ]


def settle(
    config: Config, dataset: ImageDataset, device: torch.device, world: World, *, recheck: bool = False
) -> Finding | None:
    """Decides for all processes of a run which kernels `backend auto` takes: those that passed on every machine's GPU.

    One process of each machine checks, or reads what an earlier start found; the others wait for it.

    Returns:
        What was found, the worst of all machines; None where there is nothing to decide.
    """
    if config.backend != "auto" or device.type not in backends.CHECKED:
        return None
    mine = None
    with world.together():
        if world.local_rank == 0:
            mine = find(config, dataset.label_dim, dataset.angles, device, config.batch // world.size, recheck=recheck)
    everyone = [_items(value) for value in world.exchange(mine and mine.items) if value is not None]
    finding = Finding(worst(everyone), mine is not None and mine.fresh)
    backends.accept(finding.passed)
    if world.rank == 0 and (said := lines_of(finding)):
        say("\n  ".join([*said, "--recheck checks again"]))
    return finding


@contextlib.contextmanager
def suspecting(config: Config, dataset: ImageDataset, device: torch.device, world: World) -> Iterator[None]:
    """Turns an error that a GPU does not recover from into one line, and has the next start check the kernels again."""
    try:
        yield
    except RuntimeError as error:
        if not _is_sticky(error):
            raise
        why, again = str(error).strip().splitlines()[0][:200], ""
        if config.backend == "auto":
            run_dir = Path(config.run_dir)
            name = signature(config, dataset.label_dim, min(config.micro, config.batch // world.size))
            known = verdicts.read(device, run_dir).get(name, {})
            # Not one verdict of a kernel stays, so that `find` checks anew.
            verdicts.write(device, name, {RUN: Verdict(SUSPECT, why)}, run_dir)
            again = "the next start checks the kernels again: "
            if RUN in known:  # and they passed since
                again += "as before, so see dmesg for an Xid, or take --backend torch; "
        raise DeviceError(
            f"{device} has failed ({why}); {again}go on with --run-dir {config.run_dir} --resume auto"
        ) from None


def _is_sticky(error: RuntimeError) -> bool:
    """Of the GPU itself, as an illegal address, and not of its memory being full."""
    kind = getattr(torch, "AcceleratorError", ())
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, kind) or "CUDA error" in str(error)


def _items(value: dict[str, Sequence[Any]]) -> Items:
    return {item: Verdict(*verdict) for item, verdict in value.items()}


def worst(everyone: Sequence[Items]) -> Items:
    """What all machines have found, each item at its worst; what failed on one counts, whatever the others checked."""
    merged: Items = {}
    for item in dict.fromkeys(item for items in everyone for item in items):
        found = [items[item] for items in everyone if item in items]
        bad = [verdict for verdict in found if verdict.state in (FAILED, SLOWER)]
        if bad or len(found) == len(everyone):
            merged[item] = (bad or [verdict for verdict in found if verdict.state != PASSED] or found)[0]
    return merged


def find(
    config: Config,
    label_dim: int,
    angles: torch.Tensor,
    device: torch.device,
    share: int,
    *,
    settings: bool = True,
    recheck: bool = False,
    start: Callable[[Path, Any], subprocess.Popen] = start_child,
) -> Finding:
    """What an earlier check of the same found, or else one that is made now, and kept.

    Args:
        share: Images of a batch that this process trains on.
    """
    micro, run_dir = min(config.micro, share), Path(config.run_dir)
    name = signature(config, label_dim, micro) if settings else signature(config, label_dim, 0)
    known = verdicts.read(device, run_dir).get(name, {})
    before = {RUN: known[RUN]} if RUN in known else {}
    if known.keys() - {RUN} and not recheck:
        return Finding(known, fresh=False)
    if before:
        say(f"the last run with these settings ended by an error of the GPU ({known[RUN].why})")
    request = request_for(dataclasses.replace(config, device=None), label_dim, angles, device, micro)
    with waiting("checking the kernels on this GPU, once"):
        items = prove(request, settings=settings, start=start)
    items |= before
    if verdicts.write(device, name, items, run_dir) is None:
        say("warning: what the check of the kernels found cannot be kept: the next start makes it again")
    return Finding(items)
