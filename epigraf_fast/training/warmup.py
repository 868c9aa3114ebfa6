"""What is done once before the first step: the kernels' configurations are timed, and saved with the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..camera import cam2world_matrix, camera_rays
from ..config import Config
from ..models.decoder import Decoder
from ..ops import tuning
from .files import replacing
from .precision import mode_of
from .progress import say, waiting
from .step import Trainer

FILE = "kernels.json"


def warm_up(trainer: Trainer, *, timer: Callable[[Callable[[], Any]], float] | None = None) -> bool:
    """`choose_kernels` for the micro-batches of a run, where it renders by Triton. Draws no random numbers.

    Every process of a run times its own GPU.
    """
    config = trainer.config
    fused = isinstance(getattr(trainer.generator, "decoder", None), Decoder)
    if trainer.backends["decode_triplane"] != "triton" or not fused:
        return False
    problem = micro_batch(config, trainer.micro, trainer.device)
    scale, precision = config.camera.cube_scale, mode_of(config).decoder
    return choose_kernels(Path(config.run_dir), trainer.device, *problem, scale, precision=precision, timer=timer)


def micro_batch(
    config: Config, images: int, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What the decoder is given for a micro-batch: planes, ray_origins, ray_directions, t; and w0, b0, w1, b1.

    Points lie as those of whole images seen from the mean pose, since how they share texels decides the time. Other
    values do not, and are constants.
    """
    generator, camera = config.generator, config.camera
    size = images, generator.plane_resolution, generator.plane_resolution, 3 * generator.plane_channels
    planes = torch.full(size, 0.1, device=device).permute(0, 3, 1, 2)  # channels_last, as the synthesis gives them
    angles = torch.tensor([[camera.yaw_mean, camera.pitch_mean, 0.0]], device=device).expand(images, 3)
    rays = camera_rays(cam2world_matrix(angles, camera.radius), camera.fov, config.patch.resolution)
    t = torch.linspace(camera.ray_start, camera.ray_end, config.renderer.coarse_samples, device=device)
    t = t.expand(images, rays[0].shape[1], -1).contiguous()
    hidden, outputs = generator.decoder_hidden, 4
    sizes = (hidden, generator.plane_channels), (hidden,), (outputs, hidden), (outputs,)
    network = tuple(torch.full(size, 0.1, device=device) for size in sizes)
    return (planes, *rays, t), network


def choose_kernels(
    run_dir: Path,
    device: torch.device,
    rays: tuple[Tensor, ...],
    network: tuple[Tensor, ...],
    cube_scale: float,
    *,
    precision: str = "fp32",
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> bool:
    """Times the fused decoder's plans on the run's shapes, or reads what an earlier start found on the same GPU.

    The choices go to `kernels.json`, so that a resumed run takes the same kernels.

    Args:
        rays: planes, ray_origins, ray_directions and t of a micro-batch, see `ops.decode_triplane_rays`.
        network: w0, b0, w1 and b1.
        timer: For tests; default: by CUDA events.

    Returns:
        Whether anything was timed: not without a GPU, and not where the file was read.
    """
    if device.type != "cuda" and timer is None:
        return False
    path = run_dir / FILE
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
            if stored["device"] == name:
                tuning.import_choices(stored["choices"])
                return False
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            say(f"{path} is damaged or of another version, the kernels are timed anew: {error}")
    with waiting("timing the kernels"):
        tuning.tune_decode_triplane(*rays, *network, cube_scale, precision=precision, timer=timer)
    try:
        with replacing(path) as temporary:  # processes of one run never see half a file
            temporary.write_text(json.dumps({"device": name, "choices": tuning.export_choices()}, indent=2) + "\n")
    except OSError as error:
        say(f"warning: {path} cannot be written ({error.strerror}): the next start times the kernels again")
    return True
