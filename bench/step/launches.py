"""How much work a training step gives to its device, counted on any machine: `python -m bench.step.launches`.

Torch's operations and ours that write memory are counted as they are dispatched in a micro-batch of each phase, forward
and backward; views and allocations are not. On a GPU without graphs each is a kernel or two, and 3 to 5 us of the CPU's
time. Our ops are those that a GPU has; they are counted, not computed. Widths and numbers of samples do not change the
count, so the networks have few channels here.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from epigraf_fast.config import PRESETS, Config, check, preset
from epigraf_fast.ops import library, native

from .. import results
from .step import NAMED, Step

PHASES = {"G": "_generator_phase", "D": "_discriminator_phase", "R1": "_regularization_phase"}
ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
METADATA = {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::_unsafe_view"}


class Counting(TorchDispatchMode):
    """`counts`: by the operation's name, how often it was dispatched while this was on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name in ALLOCATING or name in METADATA):
            # Of a convolution, the gradients that are asked for are kernels of their own.
            self.counts[name] += sum(args[-1]) if name == "aten::convolution_backward" else 1
        if not name.startswith("epigraf_fast::"):
            return func(*args, **(kwargs or {}))
        with FakeTensorMode() as mode:
            results = func(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, _zeros_like, results)


def _zeros_like(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).zero_()


@contextlib.contextmanager
def _modulating_as_usual(counting: Counting) -> Iterator[None]:
    """A plain call lets the two gradients of a modulated weight meet in one kernel; where something looks on, as here,
    the op of torch's library would leave them to be added. So it is called, and counted, as usual."""
    module = importlib.import_module("epigraf_fast.ops.modulation")

    def launch(name: str, *args: Any) -> None:
        counting.counts[f"epigraf_fast::{name}"] += 1
        native.launch(name, *args)

    routes = {**vars(library), "route": lambda *tensors: library.PLAIN}
    launches = {**vars(native), "launch": launch}
    with (
        mock.patch.object(module, "library", types.SimpleNamespace(**routes)),
        mock.patch.object(module, "native", types.SimpleNamespace(**launches)),
    ):
        yield


def narrow(config: Config, micro_batch: int) -> Config:
    """The settings with few channels and samples: as many layers, and the same calls."""
    config = dataclasses.replace(
        config,
        batch=micro_batch,
        micro_batch=micro_batch,
        device="cpu",
        generator=dataclasses.replace(
            config.generator, channel_base=1024, channel_max=8, plane_channels=8, decoder_hidden=16
        ),
        discriminator=dataclasses.replace(config.discriminator, channel_base=1024, channel_max=8),
        renderer=dataclasses.replace(config.renderer, coarse_samples=4, fine_samples=4),
    )
    check(config)
    return config


def count(config: Config, variant: str) -> dict[str, collections.Counter[str]]:
    """Phase -> operation -> how often a micro-batch dispatches it."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the backend is there then; it is not run
    chosen = NAMED[variant]
    if not chosen.published:
        chosen = dataclasses.replace(chosen, backend="triton")
    step = Step(chosen, config, torch.device("cpu"))
    counted = {}
    for phase, method in PHASES.items():
        original = getattr(step.trainer, method)

        def phased(*args: Any, phase: str = phase, original: Any = original) -> None:
            with Counting() as counting, _modulating_as_usual(counting):
                original(*args)
            counted[phase] = counting.counts

        setattr(step.trainer, method, phased)
    step.run(regularize=True)
    return counted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.step.launches", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="ffhq")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--variants", default="ours-fp32,published", help=f"of {', '.join(NAMED)}")
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="list the N most frequent operations")
    parser.add_argument("--json", help="write the counts here")
    args = parser.parse_args(argv)
    variants = args.variants.split(",")
    if not NAMED.keys() >= {*variants}:
        parser.error(f"--variants takes {', '.join(NAMED)}, got {args.variants}")
    config = narrow(preset(args.preset), args.micro_batch)
    cases = []
    for name in variants:
        for phase, ops in count(config, name).items():
            cases.append({"variant": name, "phase": phase, "launches": ops.total(), "ops": dict(ops.most_common())})
            print(f"{name:20} {phase:3} {ops.total():6}")
            for op, times in ops.most_common(args.ops):
                print(f"    {times:6} {op}")
    if args.json:
        results.write(args.json, results.result("launches", vars(args), cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
