"""The memory estimate against a real step's saved tensors."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_part import IN_PART
from torch import Tensor

from epigraf_fast.config import Config
from epigraf_fast.training.memory import meta_networks, parameter_count, spared_from_collections, step_bytes
from epigraf_fast.training.regions import largest_plan
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]


def test_networks_without_memory_are_those_of_the_trainer(
    tiny_config: TinyConfig, tiny_trainer: Callable[[Config], tuple[Trainer, Iterator]]
) -> None:
    config = tiny_config()
    trainer, _ = tiny_trainer(config)
    for meta, real in zip(meta_networks(config, 3), (trainer.generator, trainer.discriminator), strict=True):
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        assert {name: p.shape for name, p in meta.named_parameters()} == {
            name: p.shape for name, p in real.named_parameters()
        }


def test_weights_gradients_moments_and_average(tiny_config: TinyConfig) -> None:
    """fp32: weight, gradient, two moments, for G also its average."""
    config = tiny_config()
    generator, discriminator = meta_networks(config, 3)
    fixed, _ = step_bytes(config, generator, discriminator)
    assert fixed == 4 * (5 * parameter_count(generator) + 4 * parameter_count(discriminator))


@pytest.mark.parametrize(("micro", "settings"), [(4, {}), (8, {}), (4, IN_PART)], ids=["4", "8", "planes in part"])
def test_the_step_is_what_autograd_keeps(
    micro: int,
    settings: dict[str, Any],
    tiny_config: TinyConfig,
    tiny_trainer: Callable[[Config], tuple[Trainer, Iterator]],
) -> None:
    """The reference ops on a CPU save the same, up to a tenth; of the largest box that is to be expected."""
    config = tiny_config(**{"micro_batch": micro, **settings}, backend="reference", optim={"blur_sigma": 0.0})
    trainer, _ = tiny_trainer(config)
    parameters = {
        p.untyped_storage().data_ptr() for m in (trainer.generator, trainer.discriminator) for p in m.parameters()
    }
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    largest, angles = largest_plan(config, trainer.angles, "cpu"), trainer.angles
    assert (largest is not None) == bool(settings)
    for _ in range(1000):
        fakes = next(trainer._with_patches(trainer._draw_fakes(8)).split(micro))
        if largest is None or fakes.plans[0].share == largest.share:
            break
    else:
        raise AssertionError(f"no micro-batch computes {largest.share} of the planes")
    trainer.discriminator.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer._judge(*trainer._generate(fakes), fakes.label, fakes.angles)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    _, estimate = step_bytes(config, *meta_networks(config, 3), angles)
    assert 0.9 * measured <= estimate <= 1.1 * measured
    if largest is not None:  # without poses, and as they have no prior, whole planes are reckoned with
        assert largest.share < 1
        assert step_bytes(config, *meta_networks(config, 3))[1] > estimate


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept() -> None:
    """64 MiB that are freed still belong to the process, and only once it has been told so."""
    program = """
import resource, sys, torch
from epigraf_fast.training.memory import keep_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
if "keep" in sys.argv:
    keep_freed_memory()
x = torch.ones(2**24)
held = resident()
del x
print(held - resident())
"""

    def given_back(*arguments: str) -> int:
        command = [sys.executable, "-c", program, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert given_back() > 2**25
    assert given_back("keep") < 2**25


def test_collections_pass_over_what_was_there_before() -> None:
    """They find the cycles that are made inside of the block, and those of before it are gone."""

    class Node:
        def __init__(self) -> None:
            self.itself = self

    def cycles() -> int:
        return sum(type(thing) is Node for thing in gc.get_objects())

    kept = [Node()]
    Node()
    with spared_from_collections():
        assert gc.get_freeze_count() > 1000
        assert cycles() == 0, "what was there is not looked at"
        Node()
        assert cycles() == 1
        gc.collect()
        assert cycles() == 0
    assert gc.get_freeze_count() == 0
    assert cycles() == len(kept)
