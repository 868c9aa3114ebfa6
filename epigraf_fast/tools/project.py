"""Finds the object of a given image: style vectors, and the camera, whose rendering is that image.

$ epigraf project runs/demo photo.png --out fit.mp4 fit.png
$ epigraf project runs/ffhq face.png --out fit.mp4 --yaw 0.1 --pitch 1.5 --steps 600

The picture has to look as the training set does: square, the object in its place, the same background. Without --yaw
and --pitch the camera is estimated, from the best of many random objects and cameras. A .mp4, .webm or .gif shows the
fit as it comes, then the object once around; a .png the image, the fit, and the object from aside; a .npz holds ws,
angles and the PSNR. What the image does not show is the generator's guess.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from ..camera import Patch, cam2world_matrix
from ..config import CameraConfig
from ..errors import UserError
from ..files import READ_ERRORS, reason
from ..models.generator import Generator
from ..progress import Progress, waiting
from ..training.log import to_uint8
from ..training.pretrained import load_generator
from ..training.sampling import latents_of_seeds, prior_angles, turntable_angles
from .arguments import PATHS, Checkpoint, Device, Json, Overwrite, default, real, whole
from .command import check_output, output, require
from .render import ENCODERS, FFMPEG, save_picture, video

POOL = 64  # random objects, of which the best become starts
CAMERAS = 6  # each of them is seen from, where the camera is sought
STARTS = {True: 4, False: 12}  # by whether the camera is known
LAST = {True: 1, False: 3}  # of them that L-BFGS begins with; only where the camera is sought they are far apart
APART = 0.7  # radians between cameras that are far apart
STATISTICS = 2048  # objects that tell how style vectors spread
TOGETHER = {True: 0.15, False: 0.25}  # share of the steps after which the last starts are left
TRIED = 0.1  # share of the steps that each of several last starts has before one is left
SHARED = 0.8  # share after which layers go ways of their own
RATE = 0.15  # of Adam
PENALTY, OWN_PENALTY = 1e-5, 1e-2  # of places, and of what layers have of their own
POSE_EVERY, POSE_STEP = 2, 0.2  # steps between two looks beside a camera, and how far to look at first, radians
POSE_UNIT, POSE_DIFFERENCE = 0.03, 2e-4  # radians: of a camera as a variable, and of its finite differences
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


def coarse(size: int) -> tuple[slice, float, tuple[float, float]]:
    """What the first steps look at of an image: every second pixel of a row, of large images about 64.

    Returns:
        Those rows and columns, and the scale and offset of the patch whose rays they are. (A rendering of half the size
        would have other rays: the first and last pixels of any size are those of the corners.)
    """
    stride = max(2, size // 64) if size >= 32 else 1
    count = 1 + (size - 1) // stride
    first, last = (size - 1 - (count - 1) * stride) // 2, max(1, size - 1)
    scale, offset = (count - 1) * stride / last, first / last
    return slice(first, None, stride), scale, (offset, 1 - scale - offset)


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


def on_sphere(cameras: Tensor) -> Tensor:
    """Cameras [..., 3] with their pitch inside [0, pi], where yaw still turns them."""
    yaw, pitch, roll = cameras.unbind(dim=-1)
    return torch.stack([yaw, pitch.clamp(0.01, math.pi - 0.01), roll], dim=-1)


def apart(cameras: Tensor, others: Tensor) -> Tensor:
    """The turns [N, M] from cameras [N, 3] to others [M, 3], radians, 0 to pi."""
    one, other = (cam2world_matrix(angles, 1.0)[:, :3, :3] for angles in (cameras, others))
    trace = torch.einsum("nij,mij->nm", one, other)
    return ((trace - 1) / 2).clamp(-1, 1).acos()


def fit(
    generator: Generator,
    target: Tensor,
    angles: Tensor | None,
    steps: int,
    *,
    seed: int = 0,
    show: Callable[[int, Tensor], None] = lambda step, image: None,
) -> Fit:
    """Minimizes `difference` over style vectors, from the best of some seeds': by Adam for several of them, on coarse
    images, then by L-BFGS for the few that are left, at last for one.

    w is sought in principal components of its spread over seeds, in units of their standard deviations: first one w for
    all layers, which is what an object of the generator has, at last a part of each layer's own, which costs more. The
    renderer has no gradient to its camera. A camera that is sought moves where a look beside it is better, then along
    finite differences; an object has its likes seen from elsewhere, so that starts from all sides are kept for long.

    Args:
        target: [3, R, R] in [-1, 1].
        angles: Of the camera, [3]; None: it is sought.
        steps: Evaluations of the loss, at most.
        show: Is given every step, and the best image [3, R, R] until then.
    """
    search = _Search(generator, target, angles, steps, show)
    with contextlib.suppress(_Spent), Progress(what="steps", total=steps) as search.bar:
        starts = search.by_adam(*search.starts(seed))
        if len(starts) > 1:
            tried = [search.by_lbfgs(search.step + round(TRIED * steps), *start) for start in starts]
            starts = [min(tried, key=search.loss)]
        place, camera = search.by_lbfgs(round(SHARED * steps), *starts[0])
        search.by_lbfgs(steps, place, camera, place.new_zeros(generator.mapping.num_ws, len(place)))
    return search.best


class _Spent(Exception):
    """All steps are done."""


class _Search:
    """What `fit` does, part by part; a place [w_dim] is a w in units of its spread."""

    def __init__(
        self,
        generator: Generator,
        target: Tensor,
        angles: Tensor | None,
        steps: int,
        show: Callable[[int, Tensor], None],
    ) -> None:
        self.generator, self.target, self.angles, self.steps, self.show = generator, target, angles, steps, show
        self.step, self.bar = 0, Progress()
        self.best: Fit | None = None
        with torch.no_grad():
            self.samples = generator.ws(*latents_of_seeds(generator, range(STATISTICS)))[:, 0]
            self.mean = self.samples.mean(dim=0)
            variance, axes = torch.linalg.eigh(torch.cov(self.samples.T).double())
            spread = variance.clamp(min=1e-6 * float(variance.max()) + 1e-12).sqrt()
            self.axes = (axes * spread).T.to(self.mean)  # [w_dim, w_dim]: place @ axes is w - mean
            self.inverse = (axes / spread).to(self.mean)

    def styles(self, place: Tensor, own: Tensor | None = None) -> Tensor:
        """Style vectors [B, num_ws, w_dim] of places [B, w_dim], and of one object's own parts [num_ws, w_dim]."""
        every = place[:, None].expand(-1, self.generator.mapping.num_ws, -1)
        return self.mean + (every if own is None else every + own) @ self.axes

    def drawn(self, styles: Tensor, planes: Tensor, cameras: Tensor) -> Tensor:
        """Images [B, 3, R, R]."""
        size = self.target.shape[-1]
        return self.generator.render(planes, cameras, size, ws=styles, stochastic=False).rgb

    def drawn_coarsely(self, styles: Tensor, planes: Tensor, cameras: Tensor) -> Tensor:
        """Some of their rows and columns, see `coarse`."""
        rows, scale, offset = coarse(self.target.shape[-1])
        count = len(cameras)
        patch = Patch(cameras.new_full((count,), scale), cameras.new_tensor(offset).expand(count, 2))
        size = len(range(self.target.shape[-1])[rows])
        return self.generator.render(planes, cameras, size, patch, ws=styles, stochastic=False).rgb

    def coarse_target(self) -> Tensor:
        rows, *_ = coarse(self.target.shape[-1])
        return self.target[:, rows, rows]

    def planes(self, styles: Tensor) -> Tensor:
        return self.generator.synthesis(styles, noise_mode="const")

    def tell(self, image: Tensor, loss: float, styles: Tensor, camera: Tensor) -> None:
        """One step more; losses at another size are infinite. Raises `_Spent` behind the last."""
        if self.best is None or loss <= self.best.loss:
            self.best = Fit(styles.detach().clone(), camera.clone(), loss)
            self.image = F.interpolate(image.detach()[None], self.target.shape[-2:])[0]
        self.show(self.step, self.image)
        self.step += 1
        self.bar.update()
        if self.step == self.steps:
            raise _Spent

    @torch.no_grad()
    def starts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Places [S, w_dim] and cameras [S, 3] of the best of random objects, seen from random cameras."""
        known, device = self.angles is not None, self.target.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pool = self.samples[torch.randperm(STATISTICS)[:POOL].to(device)]
            if not known:
                generator = self.generator
                cameras = random_cameras(generator.camera, generator.mean_camera_pose, POOL * CAMERAS)
        cameras = self.angles.expand(POOL, 1, -1) if known else cameras.unflatten(0, (POOL, CAMERAS))
        cameras, places, losses = cameras.to(device), (pool - self.mean) @ self.inverse, []
        target = self.coarse_target()
        for place, several in zip(Progress(places, "starts"), cameras, strict=True):
            styles = self.styles(place[None])
            same = (part.expand(len(several), *part.shape[1:]) for part in (styles, self.planes(styles)))
            losses.append(difference(self.drawn_coarsely(*same, several), target))
        nearest, which = torch.stack(losses).min(dim=1)
        order, seen = nearest.argsort().tolist(), cameras[torch.arange(POOL), which]
        best = self.first(order, seen, STARTS[known])
        return places[best], seen[best].clone()

    def first(self, order: list[int], cameras: Tensor, count: int) -> list[int]:
        """The first of an order; where the camera is sought, those far apart before others."""
        if self.angles is not None:
            return order[:count]
        turns, kept = apart(cameras, cameras), []
        for row in order:
            if not kept or turns[row, kept].min() > APART:
                kept.append(row)
        return [*kept, *(row for row in order if row not in kept)][:count]

    @torch.no_grad()
    def loss(self, start: tuple[Tensor, Tensor]) -> float:
        place, camera = start
        styles = self.styles(place[None])
        return float(difference(self.drawn(styles, self.planes(styles), camera[None]), self.target))

    def by_adam(self, places: Tensor, cameras: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The last starts' places [w_dim] and cameras [3]; the worse half of the starts is given up again and again."""
        target, first = self.coarse_target(), round(TOGETHER[self.angles is not None] * self.steps)
        last = LAST[self.angles is not None]
        rounds = math.ceil(math.log2(len(places) / last))
        places, reach = places.clone().requires_grad_(), [POSE_STEP] * len(places)
        optimizer, kept = torch.optim.Adam([places], betas=(0.9, 0.99)), list(range(len(places)))
        for step in range(first):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 5) * (1 - 0.5 * step / first)
            styles = self.styles(places[kept])
            planes = self.planes(styles)
            images = self.drawn_coarsely(styles, planes, cameras[kept])
            losses = difference(images, target)
            optimizer.zero_grad(set_to_none=True)
            (losses + PENALTY * places[kept].square().mean(dim=1)).sum().backward()
            with torch.no_grad():
                order = losses.argsort().tolist()
                self.tell(images[order[0]], math.inf, styles[order[0]], cameras[kept[order[0]]])
                if self.angles is None and step % POSE_EVERY == 0:
                    for row, start in enumerate(kept):
                        beside = on_sphere(cameras[start] + reach[start] * cameras.new_tensor(AROUND))
                        same = (x[row : row + 1].expand(len(AROUND), *x.shape[1:]) for x in (styles, planes))
                        found = difference(self.drawn_coarsely(*same, beside), target)
                        if found.min() < losses[row]:
                            cameras[start] = beside[int(found.argmin())]
                        else:  # it looks nearer next time
                            reach[start] *= 0.6
            optimizer.step()
            if (step + 1) * rounds // first > step * rounds // first:
                kept = [kept[row] for row in self.first(order, cameras[kept], max(last, len(kept) // 2))]
        return [(places[start].detach(), cameras[start].clone()) for start in kept]

    def by_lbfgs(self, until: int, place: Tensor, camera: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Place [w_dim] and camera [3] after some step, or where nothing changes; with `own`, each layer's own part."""
        place, turn = place.clone().requires_grad_(), torch.zeros_like(camera[:2]).requires_grad_()
        variables = [place] + ([turn] if self.angles is None else [])
        if own is not None:
            own = own.clone().requires_grad_()
            variables.append(own)

        def seen() -> Tensor:
            return on_sphere(camera + POSE_UNIT * F.pad(turn.detach(), (0, 1)))

        def evaluate() -> Tensor:
            for variable in variables:
                variable.grad = None
            styles = self.styles(place[None], own)
            planes = self.planes(styles)
            (image,) = self.drawn(styles, planes, seen()[None])
            loss = difference(image[None], self.target)[0]
            penalty = PENALTY * place.square().mean() + (0 if own is None else OWN_PENALTY * own.square().mean())
            (loss + penalty).backward()
            if self.angles is None:
                with torch.no_grad():
                    beside = seen() + POSE_DIFFERENCE * camera.new_tensor([[1, 0, 0], [0, 1, 0]])
                    same = (x.expand(2, *x.shape[1:]) for x in (styles, planes))
                    found = difference(self.drawn(*same, beside), self.target)
                    turn.grad = (found - loss) * (POSE_UNIT / POSE_DIFFERENCE)
            self.tell(image, float(loss.detach()), styles[0], seen())
            return (loss + penalty).detach()

        if self.step < until:
            optimizer = torch.optim.LBFGS(
                variables,
                max_iter=self.steps,
                max_eval=until - self.step,
                history_size=50,
                tolerance_grad=1e-9,
                tolerance_change=1e-12,
                line_search_fn="strong_wolfe",
            )
            optimizer.step(evaluate)
        return place.detach(), seen()


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
    steps: Annotated[int, whole(4, 100_000)] = 400
    """Steps of the search."""
    seed: Annotated[int, whole(0, 2**31 - 1)] = 0
    """Of the cameras and objects that it starts from."""
    resolution: Annotated[int | None, whole(8, 1024), default("that of training")] = None
    """Pixels a side at which image and renderings are compared."""
    device: Device = None
    json: Json = False


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

    found = fit(generator, target, known, options.steps, seed=options.seed, show=show)
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
