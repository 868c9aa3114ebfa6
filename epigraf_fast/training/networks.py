"""The networks that settings describe, and the implementations of the ops that they take."""

from __future__ import annotations

import os
import re

import torch

from .. import machine
from ..config import Config
from ..errors import UserError
from ..models.augment import Augment
from ..models.discriminator import Discriminator, discriminator_class
from ..models.generator import Generator
from ..models.image_generator import generator_class
from ..ops import backends, convolution, convolution_layout
from .precision import half_blocks_of, mode_of


def find_device(name: str | None) -> torch.device:
    """The device of that name; default: a GPU if there is one. One with a number becomes torch's current GPU.

    What asks for a stream, an event or a capability and names no device means the current one.

    Raises:
        UserError: There is no such device; torch cannot use it; or, where none was named, the machine has a GPU that
            torch does not see.
    """
    name = name or _default_device()
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no GPU: see epigraf doctor")
        if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
        _require_code(torch.device(name))
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if not machine.hidden():
        found = machine.look()
        if found.has_gpu:
            raise UserError(
                f"this machine has {found}, but torch {torch.__version__} sees no GPU: {_way(found)}; "
                f"or train on the CPU with --device cpu"
            )
    return "cpu"


def _require_code(device: torch.device) -> None:
    """Raises UserError where torch is not compiled for the GPU: its first kernel would end the run."""
    major, minor = torch.cuda.get_device_capability(device)
    if not any(machine.runs(arch, 10 * major + minor) for arch in torch.cuda.get_arch_list()):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"torch {torch.__version__} has no code for {device}, {name} (sm_{major}{minor}): "
            f"{_way(machine.look())}; or train on the CPU with --device cpu"
        )


def _way(found: machine.Machine) -> str:
    """How to get a torch that can use the machine's GPUs."""
    choice = machine.choose(found)
    if choice.fault:
        return "the driver is too old, update it"
    torch_here = torch.__version__.partition("+")[0]
    if torch.version.cuda and torch_here == choice.torch:
        return "epigraf doctor and nvidia-smi may say why"
    return f"install torch=={choice.torch} and triton=={machine.TRITONS[choice.torch]}, with CUDA, as make does"


def set_arithmetic(config: Config) -> None:
    """Tells torch, for the whole process, what the settings say on precision and on determinism.

    The tri-plane ops follow torch's switch, see their `deterministic`. Call it before the GPU is used.
    """
    mode = mode_of(config)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode.tf32
    convolution.split_from(convolution.LEAST if mode.split else None)
    convolution_layout.copy(())  # until a run has timed them
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not reproducible
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every tensor; ours are all written
    # `use_deterministic_algorithms` does the same, and imports a compiler for it that takes longer than torch itself.
    torch.set_deterministic_debug_mode("warn" if config.deterministic else "default")


def choose_backends(config: Config, device_type: str) -> dict[str, str]:
    """op -> the backend that a run takes on this kind of device.

    With backend auto an op that has no kernel for the settings takes its fallback, as it does in every call.

    Raises:
        UserError: A backend was named that is missing here, or has no kernels for the settings.
    """
    try:
        chosen = backends.choose(config.backend, device_type)
    except ValueError as error:
        raise UserError(f"{error} (--backend auto takes what is there)") from None
    for op, reason in _beyond_triton(config).items():
        if chosen[op] == "triton":
            if config.backend != "auto":
                raise UserError(f"{reason} (--backend auto takes what is there)")
            chosen[op] = backends.fallback(op, device_type)
    return chosen


def _beyond_triton(config: Config) -> dict[str, str]:
    """op -> what the settings ask of it that triton's kernels cannot do."""
    generator, beyond = config.generator, {}
    samples = config.renderer.coarse_samples + config.renderer.fine_samples
    if samples > 2048:
        beyond["composite"] = (
            f"renderer.coarse_samples and fine_samples must be at most 2048 together with backend triton, got {samples}"
        )
    channels, hidden = generator.plane_channels, generator.decoder_hidden
    if channels % 8 or channels > 64:
        beyond["decode_triplane"] = (
            f"generator.plane_channels must be a multiple of 8 and at most 64 with backend triton, got {channels}"
        )
    elif not 16 <= hidden <= 128:
        beyond["decode_triplane"] = f"generator.decoder_hidden must be in [16, 128] with backend triton, got {hidden}"
    return beyond


def build_generator(
    config: Config, label_dim: int, device_type: str | None = None, *, half_on: tuple[str, ...] = ("cuda",)
) -> Generator:
    """The generator, on torch's default device.

    Args:
        label_dim: Numbers of a class label, 0 for none.
        device_type: Where it will run, "cpu" or "cuda", with the backends of `choose_backends`; None takes the defaults
            of wherever that is.
        half_on: Kinds of devices on which half precision is taken where the settings have it; others take fp32.
    """
    renderer_backend, backend = _family_backends(config, device_type)
    mode = mode_of(config)
    return generator_class(config.generator)(
        config.generator,
        config.renderer,
        config.camera,
        label_dim=label_dim,
        image_resolution=config.resolution,
        half_blocks=mode.blocks,
        half_dtype=mode.half or torch.float16,
        half_on=half_on,
        precision=mode.decoder,
        backend=backend,
        renderer_backend=renderer_backend,
    )


def build_discriminator(
    config: Config, label_dim: int, device_type: str | None = None, *, half_on: tuple[str, ...] = ("cuda",)
) -> Discriminator:
    """The discriminator; see `build_generator`."""
    _, backend = _family_backends(config, device_type)
    return discriminator_class(config.discriminator)(
        config.discriminator,
        config.resolution,
        config.patch.resolution,
        label_dim=label_dim,
        half_blocks=half_blocks_of(config),
        half_dtype=mode_of(config).half_of_discriminator,
        half_on=half_on,
        backend=backend,
    )


def build_augment(config: Config, device_type: str | None = None) -> Augment | None:
    """What augments the discriminator's input, if anything does; see `build_generator`."""
    if config.augment.mode == "none":
        return None
    return Augment(config.augment, backend=_family_backends(config, device_type)[1])


def _family_backends(config: Config, device_type: str | None) -> tuple[str | None, str | None]:
    """What the renderer's ops and the convolutions are handed as `backend`."""
    if device_type is None or config.backend == "auto":
        return None, None
    chosen = choose_backends(config, device_type)
    return tuple(backends.family_backend(family, chosen, device_type) for family in ("renderer", "convolutions"))
