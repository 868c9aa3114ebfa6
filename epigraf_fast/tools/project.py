"""Finds the object of a given image: style vectors, and the camera, whose rendering is that image.

$ epigraf project runs/demo photo.png --out fit.mp4 fit.png
$ epigraf project runs/ffhq face.png --out fit.mp4 --yaw 0.1 --pitch 1.5 --steps 600

The picture has to look as the training set does: square, the object in its place, the same background. Without --yaw
and --pitch the camera is estimated, from the best of many random objects and cameras. A .mp4, .webm or .gif shows the
fit as it comes, then the object once around; a .png the image, the fit, and the object from aside; a .npz holds ws,
angles and the PSNR. What the image does not show is the generator's guess.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from ..config import CameraConfig
from ..errors import UserError
from ..files import READ_ERRORS, reason
from ..models.generator import Generator
from ..training.log import to_uint8
from ..training.pretrained import load_generator
from ..training.sampling import latents_of_seeds, prior_angles, turntable_angles
from .arguments import PATHS, Checkpoint, Device, Json, Overwrite, default, parse, real, whole
from .command import Progress, check_output, output, require, running, waiting
from .render import ENCODERS, FFMPEG, save_picture, video

POOL = 64  # random objects, of which the best become starts
CAMERAS = 6  # each of them is seen from, where the camera is sought
STARTS = {True: 4, False: 8}  # by whether the camera is known
ALONE = {True: 0.25, False: 0.4}  # share of the steps after which only the best start goes on
STATISTICS = 256  # objects that tell how style vectors spread
POSE_EVERY, POSE_STEP = 4, 0.2  # steps between two looks beside a camera, and how far to look at first, radians
AROUND = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0))
FRAMES, FPS = 48, 24  # of the turntable
SIDES = (-0.7, -0.35, 0.35, 0.7)  # radians of yaw beside the found camera, in the .png
BESIDE = 0.3  # radians, how far cameras of the data may stand from their mean, where no formula draws them


class Fit(NamedTuple):
    """One object with its camera."""

    ws: Tensor  # [num_ws, w_dim]
    angles: Tensor  # [3]
    loss: float


def difference(images: Tensor, target: Tensor) -> Tensor:
    """Mean square difference [B] of images [B, 3, R, R] and a target [3, R, R], summed over R, R / 2 and R / 4.

    Coarse levels have a gradient where an object has not come near its place yet.
    """
    total, wanted = images.new_zeros(len(images)), target[None]
    for _ in range(3):
        total = total + (images - wanted).square().mean(dim=(1, 2, 3))
        if images.shape[-1] < 8:
            break
        images, wanted = F.avg_pool2d(images, 2), F.avg_pool2d(wanted, 2)
    return total


def psnr(image: Tensor, target: Tensor) -> float:
    """In dB, of images in [-1, 1]."""
    error = float((image.clamp(-1, 1) - target).square().mean()) / 4
    return -10 * math.log10(max(error, 1e-12))


def random_cameras(camera: CameraConfig, mean: Tensor, count: int) -> Tensor:
    """[count, 3] where a training image may have been taken from."""
    if camera.prior != "custom":
        return prior_angles(camera, count)
    beside = BESIDE * torch.randn(count, 3) * torch.tensor([1.0, 0.5, 0.0])
    return mean.cpu() + beside


def fit(
    generator: Generator,
    target: Tensor,
    angles: Tensor | None,
    steps: int,
    *,
    seed: int = 0,
    progress: Callable[[Any, str], Any] = lambda items, what: items,
    show: Callable[[int, Tensor], None] = lambda step, image: None,
) -> Fit:
    """Minimizes `difference` by Adam, over style vectors that start as some seed's.

    w is sought in units of its spread over seeds, one for all layers and, more slowly, a part of each layer's own. The
    renderer has no gradient to its camera: a camera that is sought moves where a look beside it is better.

    Args:
        target: [3, R, R] in [-1, 1].
        angles: Of the camera, [3]; None: it is sought.
        show: Is given every step, and the best image [3, R, R] at that time.
    """
    device, size = target.device, target.shape[-1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        ws = generator.ws(*latents_of_seeds(generator, range(STATISTICS)))[:, 0]
        mean, spread = ws.mean(dim=0), ws.std(dim=0) + 1e-8
        pool = ws[torch.randperm(STATISTICS)[:POOL]]
        count = POOL * CAMERAS
        cameras = random_cameras(generator.camera, generator.mean_camera_pose, count).to(device)
    known = angles is not None
    cameras = angles.to(device).expand(POOL, 1, -1) if known else cameras.unflatten(0, (POOL, CAMERAS))

    def drawn(ws: Tensor, cameras: Tensor, planes: Tensor | None = None) -> Tensor:
        planes = generator.synthesis(ws, noise_mode="const") if planes is None else planes
        return generator.render(planes, cameras, size, ws=ws, stochastic=False).rgb

    def repeated(w: Tensor) -> Tensor:
        return w[:, None].expand(-1, generator.mapping.num_ws, -1)

    losses = torch.empty(cameras.shape[:2], device=device)
    with torch.no_grad():
        for number in progress(range(POOL), "starts"):
            ws, several = repeated(pool[number : number + 1]), cameras.shape[1]
            planes = generator.synthesis(ws, noise_mode="const").expand(several, -1, -1, -1)
            losses[number] = difference(drawn(ws.expand(several, -1, -1), cameras[number], planes), target)
    nearest, which = losses.min(dim=1)
    best = nearest.topk(STARTS[known], largest=False).indices
    place, cameras = ((pool[best] - mean) / spread).clone().requires_grad_(), cameras[best, which[best]].clone()
    own = torch.zeros(len(best), *ws.shape[1:], device=device, requires_grad=True)
    reach, kept = [POSE_STEP] * len(best), list(range(len(best)))
    optimizer = torch.optim.Adam([{"params": [place], "lr": 1.0}, {"params": [own], "lr": 0.2}], betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    result: Fit | None = None
    for step in progress(range(steps), "steps"):
        share = step / steps
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = 0.08 * rate * min(1, 20 * share + 0.1) * (1 + math.cos(math.pi * share)) / 2
        styles = mean + spread * (place[kept, None] + own[kept])
        planes = generator.synthesis(styles, noise_mode="const")
        images = drawn(styles, cameras[kept], planes)
        losses = difference(images, target)
        penalty = 1e-4 * place[kept].square().mean(dim=1) + 1e-2 * own[kept].square().mean(dim=(1, 2))
        optimizer.zero_grad(set_to_none=True)
        (losses + penalty).sum().backward()
        first = int(losses.argmin())
        if result is None or losses[first] < result.loss:
            result = Fit(styles[first].detach().clone(), cameras[kept[first]].clone(), float(losses[first].detach()))
        show(step, images[first].detach())
        if not known and step % POSE_EVERY == 0:
            with torch.no_grad():
                for row, start in enumerate(kept):
                    beside = cameras[start] + reach[start] * cameras.new_tensor(AROUND)
                    beside[:, 1] = beside[:, 1].clamp(0.01, math.pi - 0.01)
                    same = (x[row : row + 1].expand(len(AROUND), *x.shape[1:]) for x in (styles, planes))
                    found = difference(drawn(next(same), beside, next(same)), target)
                    if found.min() < losses[row]:
                        cameras[start] = beside[int(found.argmin())]
                    else:  # it looks nearer next time
                        reach[start] *= 0.6
        optimizer.step()
        if len(kept) > 1 and share >= ALONE[known]:
            kept = [kept[first]]
    return result


@torch.no_grad()
def views(generator: Generator, found: Fit, cameras: Tensor, size: int) -> Iterator[Tensor]:
    """The object from cameras [T, 3]: [3, size, size] each."""
    ws = found.ws[None]
    planes = generator.synthesis(ws, noise_mode="const")
    for camera in cameras.to(ws.device):
        yield generator.render(planes, camera[None], size, ws=ws, stochastic=False).rgb[0]


def read_image(path: Path, size: int, device: torch.device) -> Tensor:
    """[3, size, size] in [-1, 1]; transparent parts are white.

    Raises:
        UserError: No image, or not square.
    """
    try:
        with PIL.Image.open(path) as image:
            image = image.convert("RGBA")
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): give a picture") from None
    if image.width != image.height:
        raise UserError(f"{path} is {image.width}x{image.height}, not square: cut it as the training images are")
    white = PIL.Image.new("RGBA", image.size, "white")
    small = PIL.Image.alpha_composite(white, image).convert("RGB").resize((size, size), PIL.Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).to(device) / 127.5 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `epigraf project`."""

    checkpoint: Checkpoint
    image: Positional[Path]
    """The picture to find, square and framed as the training images are."""
    out: Annotated[tuple[Path, ...], PATHS]
    """Files to write: .mp4, .webm or .gif (the fit, then once around), .png (views), .npz (ws, angles, psnr)."""
    overwrite: Overwrite = False
    yaw: Annotated[float | None, real(-2 * math.pi, 2 * math.pi), default("estimated")] = None
    """Of the picture's camera, radians; with --pitch."""
    pitch: Annotated[float | None, real(0, math.pi), default("estimated")] = None
    """Of the picture's camera, radians from straight above; with --yaw."""
    steps: Annotated[int, whole(4, 100_000)] = 300
    """Steps of the search."""
    seed: Annotated[int, whole(0, 2**31 - 1)] = 0
    """Of the cameras and objects that it starts from."""
    resolution: Annotated[int | None, whole(8, 1024), default("that of training")] = None
    """Pixels a side at which image and renderings are compared."""
    device: Device = None
    json: Json = False


def main(args: Sequence[str] | None = None) -> None:
    with running():
        run(parse(Options, "project", __doc__, args))


def run(options: Options) -> None:
    videos = [path for path in options.out if path.suffix in (*ENCODERS, ".gif")]
    for path in options.out:
        check_output("--out", path, (*ENCODERS, ".gif", ".png", ".npz"), overwrite=options.overwrite)
    if any(path.suffix in ENCODERS for path in videos):
        require(*FFMPEG)
    if (options.yaw is None) != (options.pitch is None):
        raise UserError("--yaw and --pitch belong together: give both, or neither to have the camera estimated")
    with waiting("reading the checkpoint"):
        config, generator = load_generator(options.checkpoint, options.device)
    generator.requires_grad_(False)
    size = options.resolution or config.resolution
    target = read_image(options.image, size, generator.mean_camera_pose.device)
    known = None if options.yaw is None else torch.tensor([options.yaw, options.pitch, 0.0])
    every, shown = max(1, options.steps // 72), []

    def show(step: int, image: Tensor) -> None:
        if videos and step % every == 0:
            shown.append(_beside(target, image))

    found = fit(generator, target, known, options.steps, seed=options.seed, progress=Progress, show=show)
    (image,) = views(generator, found, found.angles[None], size)
    result = {
        "psnr": psnr(image, target),
        "yaw": float(found.angles[0]),
        "pitch": float(found.angles[1]),
        "files": list(map(str, options.out)),
    }
    around = turntable_angles(FRAMES, float(found.angles[1])) + found.angles.cpu() * torch.tensor([1.0, 0.0, 0.0])
    around = around if videos else around[:0]
    once = [_beside(target, *views(generator, found, camera[None], size)) for camera in Progress(around, "turntable")]
    for path in videos:
        with video(path, FPS) as add:
            for frame in [*shown, *once]:
                add(frame)
    for path in options.out:
        if path.suffix == ".png":
            sides = found.angles.cpu() + torch.tensor([[side, 0.0, 0.0] for side in SIDES])
            row = [target, image, *views(generator, found, sides, size)]
            save_picture(np.concatenate([_picture(part) for part in row], axis=1), path)
        elif path.suffix == ".npz":
            with output(path) as partial, partial.open("wb") as file:
                np.savez(file, ws=found.ws.cpu().numpy(), angles=found.angles.cpu().numpy(), psnr=result["psnr"])
    if options.json:
        print(json.dumps(result, indent=2))
        return
    how = "given" if known is not None else "estimated"
    print(f"PSNR {result['psnr']:.1f} dB, camera ({how}): yaw {result['yaw']:.3f}, pitch {result['pitch']:.3f}")
    print(*(f"wrote {path}" for path in options.out), sep="\n")


def _picture(image: Tensor) -> np.ndarray:
    return to_uint8(image[None])[0].permute(1, 2, 0).cpu().numpy()


def _beside(target: Tensor, image: Tensor) -> np.ndarray:
    """Both, at least 128 pixels high."""
    picture = np.concatenate([_picture(target), _picture(image)], axis=1)
    times = -(-128 // len(picture))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
