"""What a run of weeks meets: requests to stop, losses that diverge, a device that is too small."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..config import Config, micro_batch_for, micro_of
from ..errors import DivergenceError, Stopped, UserError
from .checkpoint import list_checkpoints
from .distributed import World
from .memory import meta_networks, step_bytes
from .step import SKIPPED, Trainer

Result = TypeVar("Result")

TOO_LARGE = "can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow"
REPEATED = 0.5  # seconds in which signals are one: those who start programs pass them on, beside the terminal
SKIPPED_STEPS = 20  # of G that overflow, all of a line of the log, before a run ends
USABLE = 0.9  # of a device's memory: libraries and fragments take the rest


class StopRequest:
    """Ctrl-C, SIGTERM and a terminal that is closed, in the block of this context manager.

    Before training begins they interrupt at once, by `Stopped`. From then on they are kept in `signal` until the loop
    has come to the end of a step, saves and leaves; but what `at_once` does they interrupt. A second Ctrl-C ends the
    process, whatever it does.

    Args:
        talks: Whether to confirm on stderr that it was heard, where that can take a while.
    """

    def __init__(self, talks: bool = True) -> None:
        self.signal, self.talks, self.patient, self.hears = 0, talks, False, True

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._asked) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's

    def _asked(self, number: int, frame: object) -> None:
        if not self.hears:
            return
        self.signal, self.hears = number, False
        time.sleep(REPEATED)
        self.hears = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.patient:
            raise Stopped(number)
        if self.talks:
            word = b"\nstopping after this step; Ctrl-C ends at once, without saving\n"
            with contextlib.suppress(OSError):
                os.write(2, word)  # print is not for a signal that comes while something is printed

    def at_once(self, work: Callable[[], Result]) -> Result | None:
        """Does work that can be left half-done; None where a signal came before or interrupts it."""
        try:
            self.patient = False
            if self.signal:
                return None
            return work()
        except Stopped:
            return None
        finally:
            self.patient = True


def require_finite(trainer: Trainer, run_dir: Path) -> dict[str, float]:
    """The statistics, if every one is finite, and G still learns."""
    statistics = trainer.statistics()
    if statistics.get(SKIPPED) == 1 and trainer.counts[SKIPPED] >= SKIPPED_STEPS:
        raise DivergenceError(
            f"each of the last {trainer.counts[SKIPPED]} steps of G overflowed fp16 at {trainer.cur_nimg} images, the "
            f"loss scaled by {statistics['loss_scale/G']:g}: go on with --resume auto and --precision tf32 or bf16"
        )
    broken = [name for name, value in statistics.items() if not math.isfinite(value)]
    if broken:
        last = [str(path) for path in list_checkpoints(run_dir)[-1:]]
        raise DivergenceError(
            f"{', '.join(broken)} not finite at {trainer.cur_nimg} images; nothing was saved over the last good "
            f"checkpoint ({last[0] if last else 'none yet'}). Lower the learning rates, or raise optim.r1_gamma"
        )
    return statistics


@contextlib.contextmanager
def explain_out_of_memory(config: Config, label_dim: int, device: torch.device, processes: int = 1) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that names the micro-batch that would fit.

    Args:
        processes: That share a batch.
    """
    config = dataclasses.replace(config, batch=config.batch // processes)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        available = device_bytes(device)
        try:
            fits = micro_batch_that_fits(config, label_dim, available)
        except RuntimeError:  # there is no tensor that large
            fits = None
        advice = f"set --micro-batch {fits}" if fits else "not even one image fits: make the networks smaller"
        memory = f"{available / 2**30:.1f} GiB of {device}"
        raise UserError(f"a micro-batch of {config.micro} needs more memory than the {memory}: {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the CPU, whose allocator of torch raises a plain RuntimeError; or more than any memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in TOO_LARGE)


def device_bytes(device: torch.device) -> int:
    """All memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sized(
    config: Config, label_dim: int, device: torch.device, world: World, free: int | None = None
) -> tuple[Config, str]:
    """The settings with a micro-batch in place of `auto`, the same in all processes, and what to say of it.

    Args:
        free: Bytes of the device's memory; default: what is free now. On a CPU nothing is measured.
    """
    if config.micro_batch != "auto":
        return config, ""
    share, group = config.batch // world.size, config.discriminator.minibatch_std_group
    micro, why = micro_of(config, share), "by default on a CPU"
    if device.type == "cuda" or free is not None:
        free = torch.cuda.mem_get_info(device)[0] if free is None else free
        one = dataclasses.replace(config, batch=share, micro_batch=micro)
        fixed, step = step_bytes(one, *meta_networks(one, label_dim))
        most = max(1, int((USABLE * free - fixed) * micro / step)) if USABLE * free > fixed else 1
        micro, why = micro_batch_for(share, most, group), f"by {free / 2**30:.1f} GiB of free memory"
    everyone = world.exchange(micro)
    return dataclasses.replace(config, micro_batch=min(everyone)), f"micro-batch {min(everyone)}, {why}"


def micro_batch_that_fits(config: Config, label_dim: int, available: int) -> int | None:
    """The largest micro-batch, at most half of the one in force, whose step is estimated to fit; None if none does."""
    fixed, step = step_bytes(config, *meta_networks(config, label_dim))
    group = config.discriminator.minibatch_std_group
    for micro in range(config.micro // 2, 0, -1):
        valid = config.batch % micro == 0 and micro % min(group, micro) == 0
        if valid and fixed + step * micro / config.micro <= USABLE * available:
            return micro
    return None
