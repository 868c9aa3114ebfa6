"""Pictures and videos of a trained generator.

$ epigraf render grid runs/demo --out grid.png --seeds 0-15
$ epigraf render turntable runs/demo --out turntable.mp4 --seeds 0-3 --show rgb depth normals
$ epigraf render interpolation runs/demo --out walk.mp4 --seeds 0-5
$ epigraf render fly-around runs/ffhq --out fly.mp4 --seeds 0-3 --resolution 1024
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from ..camera import cam2world_matrix, camera_rays
from ..errors import UserError
from ..models.generator import Generator, Images
from ..ops import PlaneRegion
from ..training.log import depth_to_uint8, tile, to_uint8
from ..training.pretrained import load_generator
from ..training.sampling import circle_angles, latents_of_seeds, surface_depth, turntable_angles
from .arguments import (
    GeneratorOptions,
    Overwrite,
    about,
    check_effect,
    default,
    filled,
    parse,
    real,
    several,
    whole,
)
from .command import Progress, check_output, output, require, running, waiting

KINDS = ("grid", "turntable", "interpolation", "fly-around")
SHOWN = ("rgb", "depth", "normals")
FFMPEG = "imageio_ffmpeg", "imageio-ffmpeg", "tools", ", or write a .gif"
OPAQUE = 0.5  # rays that gather less have no surface
MOST_PIXELS = 2**28  # of a picture, at three bytes each
LONGEST_SIDE = 16384  # pixels, of a video and of an object: what H.264 can hold
VIDEOS = KINDS[1:]
CIRCLES = ("interpolation", "fly-around")
# Flag -> the kinds that it is for, and what holds without it.
FOR_KINDS = {
    "yaw": ("grid",),
    "columns": ("grid", "turntable", "fly-around"),
    "frames": VIDEOS,
    "fps": VIDEOS,
    "yaw_range": CIRCLES,
    "pitch_range": CIRCLES,
    "zoom": ("fly-around",),
}
DEFAULTS = {"frames": 120, "fps": 30.0, "yaw_range": 0.4, "pitch_range": 0.2, "zoom": 1.5}


def normals(images: Images, angles: Tensor, generator: Generator, fov: float | None = None) -> Tensor:
    """Surface normals from the depth: [B, 3, H, W], in camera axes (right, up, towards the camera), 0 where empty.

    The points of neighbouring pixels span the surface: n is the cross product of the central differences of
    origin + t direction along columns and rows, normalized.
    """
    camera = generator.camera
    size = images.depth.shape[-1]
    cam2world = cam2world_matrix(angles, camera.radius)
    _, directions = camera_rays(cam2world, camera.fov if fov is None else fov, size)
    t = surface_depth(images, camera.ray_end).flatten(1)[..., None]
    points = (t * directions) @ cam2world[:, :3, :3]  # in camera axes
    points = points.transpose(1, 2).unflatten(2, (size, size))
    padded = F.pad(points, (1, 1, 1, 1), mode="replicate")
    right = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    normal = F.normalize(torch.cross(down, right, dim=1), dim=1)
    return normal * (images.weight_sum > OPAQUE)


def pictures(
    images: Images, angles: Tensor, generator: Generator, shown: Sequence[str], fov: float | None = None
) -> dict[str, Tensor]:
    """uint8 [B, 3, H, W] of each thing to show; normals as (n + 1) / 2, white where there is no surface."""
    camera, out = generator.camera, {}
    if "rgb" in shown:
        out["rgb"] = to_uint8(images.rgb)
    if "depth" in shown:
        out["depth"] = depth_to_uint8(surface_depth(images, camera.ray_end), camera.ray_start, camera.ray_end)
    if "normals" in shown:
        out["normals"] = to_uint8(normals(images, angles, generator, fov) + 1.0 * (images.weight_sum <= OPAQUE))
    return out


class Painted(NamedTuple):
    """One object, ready to be looked at."""

    planes: Tensor  # [1, 3*C and what a background takes, H, W]
    ws: Tensor  # [1, num_ws, w_dim]
    region: PlaneRegion | None = None  # where the planes lie in whole ones; None: they are whole


class Scene:
    """A generator and how to look at it.

    Rays go through in chunks and objects one by one, so that memory stays bounded at any resolution.

    Args:
        generator: In evaluation mode.
        resolution: Of the images.
        shown: Of `SHOWN`.
        truncation, cutoff: See `StyleMapping`.
    """

    def __init__(
        self,
        generator: Generator,
        resolution: int,
        shown: Sequence[str] = ("rgb",),
        *,
        truncation: float = 1.0,
        cutoff: int | None = None,
    ) -> None:
        self.generator, self.resolution, self.shown = generator, resolution, shown
        self.truncation, self.cutoff = truncation, cutoff

    @torch.no_grad()
    def ws(self, seeds: Sequence[int], classes: Sequence[int] = ()) -> Tensor:
        """Style vectors [num, num_ws, w_dim]; with pose conditioning, of the mean pose."""
        z, label = latents_of_seeds(self.generator, seeds, classes)
        return self.generator.ws(z, label, truncation_psi=self.truncation, truncation_cutoff=self.cutoff)

    @torch.no_grad()
    def paint(self, ws: Tensor, angles: Tensor | None = None) -> Painted:
        """The object of style vectors [num_ws, w_dim], for any view; or for that of the camera [3] alone."""
        ws = ws[None]
        if angles is None:
            return Painted(self.generator.synthesis(ws, noise_mode="const"), ws)
        planes, region = self.generator.paint(ws, angles[None], noise_mode="const")
        return Painted(planes, ws, region)

    @torch.no_grad()
    def view(self, painted: Painted, angles: Tensor, fov: float | None = None) -> dict[str, Tensor]:
        """One object from one camera [3]: uint8 [1, 3, R, R] of each thing to show."""
        angles = angles.to(painted.planes.device)[None]
        with (
            Progress(what="rays", total=self.resolution**2) as rays,
            self.generator.renderer.register_forward_hook(lambda *call: rays.update(call[-1].rgb.shape[1])),
        ):
            place = {} if painted.region is None else {"region": painted.region}
            images = self.generator.render(
                painted.planes, angles, self.resolution, ws=painted.ws, fov=fov, stochastic=False, **place
            )
        return pictures(images, angles, self.generator, self.shown, fov)


Frame = dict[str, np.ndarray]


def tiled(views: Iterable[dict[str, Tensor]], columns: int) -> Frame:
    """Views side by side, row by row; missing ones are white."""
    views = list(views)
    out = {}
    for name in views[0]:
        images = torch.cat([view[name].cpu() for view in views])
        empty = -len(images) % columns
        images = torch.cat([images, images.new_full((empty, *images.shape[1:]), 255)])
        out[name] = tile(images, columns)
    return out


def grid(
    scene: Scene, seeds: Sequence[int], classes: Sequence[int], poses: Tensor, columns: int, progress: Callable
) -> Frame:
    """Every seed from every pose [V, 3]; `columns` seeds a row."""
    ws = scene.ws(seeds, classes)
    views = []
    for w in progress(ws, "objects"):
        painted = scene.paint(w, poses[0] if len(poses) == 1 else None)
        views += [scene.view(painted, pose) for pose in poses]
    return tiled(views, columns * len(poses))


def orbit(
    scene: Scene,
    seeds: Sequence[int],
    classes: Sequence[int],
    path: Tensor,
    columns: int,
    progress: Callable,
    fovs: Sequence[float | None] = (None,),
) -> Iterator[Frame]:
    """Frames of all seeds along a path of poses [T, 3], with a field of view each."""
    objects = [scene.paint(w) for w in progress(scene.ws(seeds, classes), "objects")]
    for pose, fov in zip(progress(path, "frames"), itertools.cycle(fovs), strict=False):
        yield tiled((scene.view(painted, pose, fov) for painted in objects), columns)


def interpolation(
    scene: Scene, seeds: Sequence[int], classes: Sequence[int], path: Tensor, progress: Callable
) -> Iterator[Frame]:
    """A walk through the seeds and back to the first, linear in w, while the camera follows a path [T, 3]."""
    ws = scene.ws(seeds, classes)
    ws = torch.cat([ws, ws[:1]])
    for number, pose in enumerate(progress(path, "frames")):
        place = number / len(path) * len(seeds)
        low = int(place)
        painted = scene.paint(ws[low].lerp(ws[low + 1], place - low), pose)
        yield tiled([scene.view(painted, pose)], 1)


@contextlib.contextmanager
def video(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes uint8 frames [H, W, 3] as they come and leaves an MP4 (H.264) or a GIF, whole or not at all."""
    if path.suffix == ".gif":
        frames: list[np.ndarray] = []
        with output(path) as partial:
            yield frames.append
            with waiting(f"writing {path.name}"):
                partial.write_bytes(gif_of(np.stack(frames), fps))
        return
    imageio_ffmpeg = require(*FFMPEG)
    with output(path) as partial, contextlib.ExitStack() as stack:
        writer, count = None, 0

        def add(frame: np.ndarray) -> None:
            nonlocal writer, count
            height, width = (size - size % 2 for size in frame.shape[:2])  # the pixel format halves colours
            if writer is None:
                size = width, height
                writer = imageio_ffmpeg.write_frames(str(partial), size, fps=fps, quality=8, macro_block_size=2)
                stack.callback(writer.close)
                writer.send(None)
            writer.send(np.ascontiguousarray(frame[:height, :width]))
            count += 1

        yield add
        with waiting(f"writing {path.name}"):
            writer.close()
            check_video(partial, count)


def gif_of(frames: np.ndarray, fps: float) -> bytes:
    """The file of an endless GIF of uint8 frames [T, H, W, 3]."""
    import imageio.v3

    return imageio.v3.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)


def check_video(path: Path, count: int) -> None:
    """Raises OSError unless the file holds so many frames: an encoder that has died, on a full disk, says nothing."""
    try:
        found, _ = require(*FFMPEG).count_frames_and_secs(str(path))
    except RuntimeError:
        found = 0
    if found != count:
        raise OSError(f"{found} of {count} frames are in it: is the disk full?")


def save_all(frames: Iterable[Frame], paths: dict[str, Path], fps: float) -> None:
    """One video for each thing that is shown, from one pass over the frames."""
    with contextlib.ExitStack() as stack:
        videos = {name: stack.enter_context(video(path, fps)) for name, path in paths.items()}
        for frame in frames:
            for name, add in videos.items():
                add(frame[name])


def check_generator_arguments(options: GeneratorOptions, generator: Generator) -> None:
    """Raises UserError for those of `GeneratorOptions` that the generator cannot follow."""
    classes, num_ws = generator.label_dim, generator.mapping.num_ws
    if options.labels is not None and not classes:
        raise UserError("--labels does nothing here, as the generator was trained without classes: leave it out")
    if options.labels is not None and max(options.labels) >= classes:
        raise UserError(f"--labels must be of class from 0 to {classes - 1}, got {max(options.labels)}")
    if options.cutoff is not None and options.cutoff > num_ws:
        raise UserError(f"--cutoff must be from 0 to {num_ws}, the style vectors that there are, got {options.cutoff}")
    if options.cutoff is not None and options.truncation == 1:
        raise UserError("--cutoff does nothing without a --truncation below 1: give one, or leave it out")


@dataclasses.dataclass(frozen=True)
class Kind:
    """The first word."""

    kind: Annotated[Positional[Literal[KINDS]], about(metavar="|".join(KINDS), help="What to make.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GeneratorOptions, Kind):
    """The command line of `epigraf render`."""

    out: Path
    """The .png (grid), .mp4 or .gif to write; what else --show names goes beside it, as in x-depth.png."""
    overwrite: Overwrite = False
    show: Annotated[tuple[str, ...], several(SHOWN)] = ("rgb",)
    """What to show, one file each."""
    resolution: Annotated[int | None, whole(2, LONGEST_SIDE), default("that of training")] = None
    """Pixels a side of an object, any number."""
    ray_samples: Annotated[int | None, whole(3, 4096), default("as in training")] = None
    """Coarse samples a ray, and as many fine ones."""
    columns: Annotated[int | None, whole(1, 10_000), default("about a square")] = None
    """Objects a row."""
    yaw: Annotated[
        tuple[float, ...] | None, real(-2 * math.pi, 2 * math.pi, several=True), default("the mean pose's")
    ] = None
    """For grid: the views, radians."""
    pitch: Annotated[float | None, real(0, math.pi), default("the mean pose's")] = None
    """Radians from straight above."""
    frames: Annotated[int | None, whole(2, 100_000), default(DEFAULTS["frames"])] = None
    """Frames of the whole video."""
    fps: Annotated[float | None, real(0.1, 240), default(DEFAULTS["fps"])] = None
    """Frames a second."""
    yaw_range: Annotated[float | None, real(0, math.pi), default(DEFAULTS["yaw_range"])] = None
    """For fly-around and interpolation: how far the camera goes to a side, radians."""
    pitch_range: Annotated[float | None, real(0, math.pi / 2), default(DEFAULTS["pitch_range"])] = None
    """For fly-around and interpolation: how far it goes up and down, radians."""
    zoom: Annotated[float | None, real(0.1, 10), default(DEFAULTS["zoom"])] = None
    """For fly-around: how much closer the camera looks halfway; 1 is no closer."""


def main(args: Sequence[str] | None = None) -> None:
    with running():
        run(parse(Options, "render", __doc__, args))


def run(options: Options) -> None:
    check_effect(options, options.kind, FOR_KINDS)
    options = filled(options, DEFAULTS)
    seeds, shown = options.seeds, list(dict.fromkeys(options.show))
    paths = {
        name: options.out if name == shown[0] else options.out.with_stem(f"{options.out.stem}-{name}") for name in shown
    }
    suffixes = (".png",) if options.kind == "grid" else (".mp4", ".gif")
    for path in paths.values():
        check_output("--out", path, suffixes, overwrite=options.overwrite)
    if options.out.suffix == ".mp4":
        require(*FFMPEG)
    with waiting("reading the checkpoint"):
        config, generator = load_generator(options.checkpoint, options.device)
    check_generator_arguments(options, generator)
    resolution = options.resolution or config.resolution
    columns = options.columns or math.ceil(math.sqrt(len(seeds)))
    check_size(options, resolution, columns)
    if options.ray_samples is not None:
        generator.renderer.config = dataclasses.replace(
            generator.renderer.config, coarse_samples=options.ray_samples, fine_samples=options.ray_samples
        )
    scene = Scene(generator, resolution, shown, truncation=options.truncation, cutoff=options.cutoff)
    centre = generator.mean_camera_pose.cpu().clone()
    if options.pitch is not None:
        centre[1] = options.pitch
    if options.kind == "grid":
        yaws = torch.tensor(options.yaw if options.yaw is not None else [float(centre[0])])
        poses = torch.stack([yaws, centre[1].expand_as(yaws), torch.zeros_like(yaws)], dim=1)
        for name, picture in grid(scene, seeds, options.labels or (), poses, columns, Progress).items():
            save_picture(picture, paths[name])
    else:
        save_all(frames_of(options, scene, centre, columns), paths, options.fps)
    for path in paths.values():
        print(f"wrote {path}")


def frames_of(options: Options, scene: Scene, centre: Tensor, columns: int) -> Iterator[Frame]:
    """The frames of the video that was asked for."""
    seeds, classes = options.seeds, options.labels or ()
    if options.kind == "turntable":
        path = turntable_angles(options.frames, *([] if options.pitch is None else [options.pitch]))
        return orbit(scene, seeds, classes, path, columns, Progress)
    circle = circle_angles(options.frames, centre, options.yaw_range, options.pitch_range)
    if options.kind == "interpolation":
        return interpolation(scene, seeds, classes, circle, Progress)
    fovs = zoomed(scene.generator.camera.fov, options.zoom, options.frames)
    return orbit(scene, seeds, classes, circle, columns, Progress, fovs)


def check_size(options: Options, resolution: int, columns: int) -> None:
    """Raises UserError where the picture would not fit into memory, or a frame into a video."""
    views = len(options.yaw or [0])
    width, height = resolution * columns * views, resolution * math.ceil(len(options.seeds) / columns)
    if options.kind == "interpolation":
        width = height = resolution
    if width * height > MOST_PIXELS or (options.kind != "grid" and max(width, height) > LONGEST_SIDE):
        raise UserError(f"the picture would have {width}x{height} pixels: lower --resolution, or give fewer --seeds")


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Writes a uint8 [H, W, 3] picture as a PNG, whole or not at all."""
    with waiting(f"writing {path.name}"), output(path) as partial:
        PIL.Image.fromarray(picture).save(partial, format="PNG")


def zoomed(fov: float, zoom: float, frames: int) -> list[float]:
    """Fields of view (degrees) that go from `fov` to one `zoom` times closer and back."""
    half = math.tan(math.radians(fov) / 2)
    share = [(1 - math.cos(2 * math.pi * i / frames)) / 2 for i in range(frames)]
    return [math.degrees(2 * math.atan(half * zoom**-s)) for s in share]
