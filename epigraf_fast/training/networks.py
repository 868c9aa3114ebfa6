"""The networks that settings describe, and the implementations of the ops that they take."""

from __future__ import annotations

import os
import re

import torch

from ..config import Config
from ..errors import UserError
from ..models.augment import Augment
from ..models.discriminator import Discriminator, discriminator_class
from ..models.generator import Generator
from ..models.image_generator import ImageGenerator, generator_class
from ..ops import backends

HALF_BLOCKS = 4  # top resolutions of G and blocks of D in fp16, with precision fp16 on a GPU


def find_device(name: str | None) -> torch.device:
    """The device of that name; default: a GPU if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no GPU: see epigraf doctor")
        if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return torch.device(name)


def set_arithmetic(config: Config) -> None:
    """Tells torch, for the whole process, what the settings say on precision and on determinism.

    The tri-plane ops follow torch's switch, see their `deterministic`. Call it before the GPU is used.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not reproducible
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every tensor; ours are all written
    # `use_deterministic_algorithms` does the same, and imports a compiler for it that takes longer than torch itself.
    torch.set_deterministic_debug_mode("warn" if config.deterministic else "default")


def choose_backends(config: Config, device_type: str) -> dict[str, str]:
    """op -> the backend that a run takes on this kind of device.

    Raises:
        UserError: The backend is missing here, or has no kernels for the settings.
    """
    try:
        chosen = backends.choose(config.backend, device_type)
    except ValueError as error:
        raise UserError(f"{error} (--backend auto takes what is there)") from None
    channels, hidden = config.generator.plane_channels, config.generator.decoder_hidden
    samples = config.renderer.coarse_samples + config.renderer.fine_samples
    if chosen["composite"] == "triton" and samples > 2048:
        raise UserError(
            f"renderer.coarse_samples and fine_samples must be at most 2048 together with backend triton, got {samples}"
        )
    if chosen["decode_triplane"] == "triton":
        if channels % 8 or channels > 64:
            raise UserError(
                f"generator.plane_channels must be a multiple of 8 and at most 64 with backend triton, got {channels}"
            )
        if not 16 <= hidden <= 128:
            raise UserError(f"generator.decoder_hidden must be in [16, 128] with backend triton, got {hidden}")
    return chosen


def build_generator(config: Config, label_dim: int, device_type: str | None = None) -> Generator | ImageGenerator:
    """The generator, on torch's default device.

    Args:
        label_dim: Numbers of a class label, 0 for none.
        device_type: Where it will run, "cpu" or "cuda", with the backends of `choose_backends`; None takes the defaults
            of wherever that is.
    """
    renderer_backend, backend = _family_backends(config, device_type)
    return generator_class(config.generator)(
        config.generator,
        config.renderer,
        config.camera,
        label_dim=label_dim,
        image_resolution=config.resolution,
        half_blocks=HALF_BLOCKS if config.precision == "fp16" else 0,
        precision=config.precision,
        backend=backend,
        renderer_backend=renderer_backend,
    )


def build_discriminator(config: Config, label_dim: int, device_type: str | None = None) -> Discriminator:
    """The discriminator; see `build_generator`."""
    _, backend = _family_backends(config, device_type)
    return discriminator_class(config.discriminator)(
        config.discriminator,
        config.resolution,
        config.patch.resolution,
        label_dim=label_dim,
        half_blocks=HALF_BLOCKS if config.precision == "fp16" else config.discriminator.half_blocks,
        backend=backend,
    )


def build_augment(config: Config, device_type: str | None = None) -> Augment | None:
    """What augments the discriminator's input, if anything does; see `build_generator`."""
    if config.augment.mode == "none":
        return None
    return Augment(config.augment, backend=_family_backends(config, device_type)[1])


def _family_backends(config: Config, device_type: str | None) -> tuple[str | None, str | None]:
    """What the renderer's ops and the convolutions are handed as `backend`."""
    if device_type is None:
        return None, None
    chosen = choose_backends(config, device_type)
    return tuple(backends.family_backend(family, chosen, device_type) for family in ("renderer", "convolutions"))
