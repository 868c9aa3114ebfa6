"""How much memory a training step will take, measured on tensors that hold no data; that freed memory is kept; and
what is spared from collections."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..camera import Patch
from ..config import Config
from ..models.discriminator import Discriminator, ScaleDiscriminators
from ..models.generator import Generator
from .networks import build_discriminator, build_generator
from .patches import with_context
from .regions import largest_plan

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def parameter_count(module: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in module.parameters())


def meta_networks(config: Config, label_dim: int) -> tuple[Generator, Discriminator]:
    """Generator and discriminator without memory behind them."""
    with torch.device("meta"):
        return build_generator(config, label_dim), build_discriminator(config, label_dim)


def keep_freed_memory() -> None:
    """Has the process keep up to 1 GiB of freed main memory, as torch does on a GPU, where glibc is its library.

    By default every large tensor of a step on the CPU is new memory, which the system clears page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)


@contextlib.contextmanager
def spared_from_collections() -> Iterator[None]:
    """Leaves what there is now, which is all that was imported and built, out of Python's searches for cyclic garbage.

    A full search walks through all objects that could hold some, 300,000 of them, every few dozen steps.
    """
    gc.collect()  # what is garbage already would stay as long
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def step_bytes(
    config: Config, generator: Generator, discriminator: Discriminator, angles: Tensor | None = None
) -> tuple[int, int]:
    """Estimates the memory of a training step in fp32, with the reference's ops.

    Args:
        generator, discriminator: Of `meta_networks`.
        angles: [N, 3] of the data set, for how much of the planes a step computes (docs/region.md). Without them, and
            with the custom prior, whole planes are reckoned with.

    Returns:
        Bytes of weights, gradients, Adam's moments and the average generator; and bytes that the generator's phase, the
        largest, keeps for its backward pass at one micro-batch.
    """
    fixed = 4 * (5 * parameter_count(generator) + 4 * parameter_count(discriminator))
    parameters = {id(p) for module in (generator, discriminator) for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    num, region = config.micro, largest_plan(config, angles, "meta")
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        label = torch.empty(num, generator.label_dim)
        angles, patch = torch.empty(num, 3), Patch(torch.empty(num), torch.empty(num, 2))
        patches = generator(
            torch.empty(num, generator.z_dim),
            angles,
            label,
            resolution=config.patch.resolution,
            patch=patch,
            density_noise_std=1.0,
            with_context=config.discriminator.global_context != "none",
            region=False if region is None else region,
        ).rgb
        if config.discriminator.global_context != "none":
            patches = with_context(patches, patch, config)
        if isinstance(discriminator, ScaleDiscriminators):  # which reads the scales
            discriminator = discriminator.discriminators[0]
        discriminator(patches, patch, label, angles)
    return fixed, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
