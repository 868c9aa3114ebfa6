"""Pictures and videos of a trained generator.

$ epigraf render grid runs/demo --out grid.png --seeds 0-15
$ epigraf render images runs/demo --out object.png --seeds 0-99
$ epigraf render steps runs/demo --out steps.png --seeds 0-4 --columns 8
$ epigraf render mixing runs/demo --out mixing.png --seeds 0-3 --mix-seeds 4-9
$ epigraf render turntable runs/demo --out turntable.mp4 --seeds 0-3 --show rgb depth normals
$ epigraf render interpolation runs/demo --out walk.mp4 --seeds 0-5
$ epigraf render fly-around runs/ffhq --out fly.webm --seeds 0-3 --resolution 1024

`grid` shows every seed, from one view or several; `images` writes a file for each, as object-3.png; `steps` goes from
seed to seed, a row for each way; `mixing` has the shape of a row's seed and the finer styles of a column's. `turntable`
looks from all around, `interpolation` walks through the seeds and `fly-around` swings and zooms; as .png their frames
become files, as frame-0007.png.
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
from ..progress import Progress, waiting
from ..training.log import depth_to_uint8, tile, to_uint8
from ..training.pretrained import load_generator
from ..training.sampling import circle_angles, latents_of_seeds, showing_pose, surface_depth, turntable_angles
from .arguments import (
    NUMBERS,
    GeneratorOptions,
    Overwrite,
    about,
    check_effect,
    default,
    filled,
    optional,
    real,
    several,
    whole,
)
from .command import check_output, output, output_folder, require

PICTURES = ("grid", "images", "steps", "mixing")
VIDEOS = ("turntable", "interpolation", "fly-around")
KINDS = (*PICTURES, *VIDEOS)
SHOWN = ("rgb", "depth", "normals")
FFMPEG = "imageio_ffmpeg", "imageio-ffmpeg", "tools", ", or write a .gif"
OPAQUE = 0.5  # rays that gather less have no surface
SMALLEST = 256  # pixels of an object, unless another number is asked for
STEPS = 8  # of `steps`, in a row
GAP = 1 / 8  # between objects that have several views, of their size
MOST_PIXELS = 2**28  # of a picture, at three bytes each
LONGEST_SIDE = 16384  # pixels, of a video and of an object: what H.264 can hold
CIRCLES = ("interpolation", "fly-around")
# Flag -> the kinds that it is for, and what holds without it.
FOR_KINDS = {
    "yaw": ("grid", "images"),
    "columns": ("grid", "steps", "turntable", "fly-around"),
    "mix_seeds": ("mixing",),
    "mix_from": ("mixing",),
    "frames": VIDEOS,
    "fps": VIDEOS,
    "yaw_range": CIRCLES,
    "pitch_range": CIRCLES,
    "zoom": ("fly-around",),
}
VIEW = "three-quarter where objects are seen from all around, else the mean pose's"
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


ENCODERS = {
    ".mp4": {"quality": 8},
    ".webm": {"codec": "libvpx-vp9", "quality": None, "output_params": ["-crf", "24", "-b:v", "0", "-row-mt", "1"]},
}
Frame = dict[str, np.ndarray]


def tiled(views: Iterable[dict[str, Tensor]], columns: int, gap: float = 0) -> Frame:
    """Views side by side, row by row; missing ones are white, and so is a gap (of their height) between columns."""
    views = list(views)
    out = {}
    for name in views[0]:
        images = torch.cat([view[name].cpu() for view in views])
        empty = -len(images) % columns
        images = torch.cat([images, images.new_full((empty, *images.shape[1:]), 255)])
        white = round(gap * images.shape[2])
        picture = tile(F.pad(images, (0, white), value=255), columns)
        out[name] = picture[:, : picture.shape[1] - white]
    return out


def grid(
    scene: Scene, seeds: Sequence[int], classes: Sequence[int], poses: Tensor, columns: int, progress: Callable
) -> Frame:
    """Every seed from every pose [V, 3]; `columns` seeds a row."""
    return tiled(objects(scene, scene.ws(seeds, classes), poses, progress), columns, GAP if len(poses) > 1 else 0)


def objects(scene: Scene, ws: Tensor, poses: Tensor, progress: Callable) -> Iterator[dict[str, Tensor]]:
    """Of each style vectors the views from all poses [V, 3], side by side: uint8 [1, 3, R, V * R] of each thing."""
    for w in progress(ws, "objects"):
        painted = scene.paint(w, poses[0] if len(poses) == 1 else None)
        views = [scene.view(painted, pose) for pose in poses]
        yield {name: torch.cat([view[name] for view in views], dim=3) for name in views[0]}


def steps(
    scene: Scene, seeds: Sequence[int], classes: Sequence[int], pose: Tensor, columns: int, progress: Callable
) -> Frame:
    """From each seed to the next in a row of `columns` steps, linear in w, both ends shown."""
    ws = scene.ws(seeds, classes)
    shares = torch.linspace(0, 1, columns).tolist()
    between = [low.lerp(high, share) for low, high in itertools.pairwise(ws) for share in shares]
    return tiled(objects(scene, torch.stack(between), pose[None], progress), columns)


def mixing(
    scene: Scene,
    seeds: Sequence[int],
    others: Sequence[int],
    classes: Sequence[int],
    first: int,
    pose: Tensor,
    progress: Callable,
) -> Frame:
    """Row seeds whose style vectors from `first` on are those of the column seeds; both alone at the borders."""
    rows, columns = scene.ws(seeds, classes), scene.ws(others, classes)
    place = torch.arange(rows.shape[1], device=rows.device)[:, None] >= first
    every = [*columns]
    for row in rows:
        every += [row, *(torch.where(place, column, row) for column in columns)]
    shown = list(objects(scene, torch.stack(every), pose[None], progress))
    corner = {name: torch.full_like(picture, 255) for name, picture in shown[0].items()}
    return tiled([corner, *shown], 1 + len(columns))


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
    """Takes uint8 frames [H, W, 3] as they come and leaves an MP4 (H.264), a WebM (VP9), a GIF or, for a .png, a file
    for each, as x-0007.png; whole or not at all."""
    if path.suffix == ".png":
        with output_folder(path.parent) as folder:
            number = itertools.count()
            yield lambda frame: PIL.Image.fromarray(frame).save(folder / frame_name(path, next(number)).name)
        return
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
                writer = imageio_ffmpeg.write_frames(
                    str(partial), size, fps=fps, macro_block_size=2, **ENCODERS[path.suffix]
                )
                stack.callback(writer.close)
                writer.send(None)
            writer.send(np.ascontiguousarray(frame[:height, :width]))
            count += 1

        yield add
        with waiting(f"writing {path.name}"):
            writer.close()
            check_video(partial, count)


def frame_name(path: Path, number: int) -> Path:
    """The file of a frame, where a video is written as pictures."""
    return path.with_stem(f"{path.stem}-{number:04d}")


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
    """The .png of pictures; the .mp4, .webm, .gif or .png (each frame) of videos. What --show names besides goes into
    files beside it, as x-depth.png."""
    overwrite: Overwrite = False
    show: Annotated[tuple[str, ...], several(SHOWN)] = ("rgb",)
    """What to show, one file each."""
    resolution: Annotated[int | None, whole(2, LONGEST_SIDE), default(f"that of training, at least {SMALLEST}")] = None
    """Pixels a side of an object, any number."""
    ray_samples: Annotated[int | None, whole(3, 4096), default("as in training")] = None
    """Coarse samples a ray, and as many fine ones."""
    columns: Annotated[int | None, whole(1, 10_000), default(f"about a square, steps: {STEPS}")] = None
    """Objects a row, of steps its steps."""
    mix_seeds: Annotated[tuple[int, ...] | None, NUMBERS, optional] = None
    """For mixing: the seeds of the columns."""
    mix_from: Annotated[int | None, whole(1, 1000), default("half of them")] = None
    """For mixing: the style vectors from this one on are the column's."""
    yaw: Annotated[tuple[float, ...] | None, real(-2 * math.pi, 2 * math.pi, several=True), default(VIEW)] = None
    """For grid and images: the views, radians."""
    pitch: Annotated[float | None, real(0, math.pi), default(VIEW)] = None
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


def run(options: Options) -> None:
    check_effect(options, options.kind, FOR_KINDS)
    options = filled(options, DEFAULTS)
    seeds, shown = options.seeds, list(dict.fromkeys(options.show))
    paths = {
        name: options.out if name == shown[0] else options.out.with_stem(f"{options.out.stem}-{name}") for name in shown
    }
    suffixes = (".png",) if options.kind in PICTURES else (*ENCODERS, ".gif", ".png")
    for path in paths.values():
        for file in files_of(options, path):
            check_output("--out", file, suffixes, overwrite=options.overwrite)
    if options.out.suffix in ENCODERS:
        require(*FFMPEG)
    if options.kind == "steps" and len(seeds) < 2:
        raise UserError("--seeds must be at least two, as steps lead from one to the next")
    if options.kind == "mixing" and not options.mix_seeds:
        raise UserError("mixing needs --mix-seeds, the seeds of its columns")
    with waiting("reading the checkpoint"):
        config, generator = load_generator(options.checkpoint, options.device)
    check_generator_arguments(options, generator)
    first, num_ws = options.mix_from or generator.mapping.num_ws // 2, generator.mapping.num_ws
    if first >= num_ws:
        raise UserError(f"--mix-from must be from 1 to {num_ws - 1}, the style vectors that there are, got {first}")
    resolution = options.resolution or max(config.resolution, SMALLEST)
    columns = options.columns or (STEPS if options.kind == "steps" else math.ceil(math.sqrt(len(seeds))))
    check_size(options, resolution, columns)
    if options.ray_samples is not None:
        generator.renderer.config = dataclasses.replace(
            generator.renderer.config, coarse_samples=options.ray_samples, fine_samples=options.ray_samples
        )
    scene = Scene(generator, resolution, shown, truncation=options.truncation, cutoff=options.cutoff)
    centre, classes = showing_pose(generator), options.labels or ()
    if options.pitch is not None:
        centre[1] = options.pitch
    yaws = torch.tensor(options.yaw if options.yaw is not None else [float(centre[0])])
    poses = torch.stack([yaws, centre[1].expand_as(yaws), torch.zeros_like(yaws)], dim=1)
    if options.kind in VIDEOS:
        save_all(frames_of(options, scene, centre, columns), paths, options.fps)
    elif options.kind == "images":
        for seed, views in zip(seeds, objects(scene, scene.ws(seeds, classes), poses, Progress), strict=True):
            for name, picture in tiled([views], 1).items():
                save_picture(picture, paths[name].with_stem(f"{paths[name].stem}-{seed}"))
    else:
        if options.kind == "grid":
            frame = grid(scene, seeds, classes, poses, columns, Progress)
        elif options.kind == "steps":
            frame = steps(scene, seeds, classes, centre, columns, Progress)
        else:
            frame = mixing(scene, seeds, options.mix_seeds, classes, first, centre, Progress)
        for name, picture in frame.items():
            save_picture(picture, paths[name])
    for path in paths.values():
        files = files_of(options, path)
        print(f"wrote {files[0]}" + (f" to {files[-1].name}" if len(files) > 1 else ""))


def files_of(options: Options, path: Path) -> list[Path]:
    """The files that one thing to show becomes."""
    if options.kind == "images":
        return [path.with_stem(f"{path.stem}-{seed}") for seed in options.seeds]
    if options.kind in VIDEOS and path.suffix == ".png":
        return [frame_name(path, number) for number in range(options.frames)]
    return [path]


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
    rows = math.ceil(len(options.seeds) / columns)
    if options.kind in ("interpolation", "images"):
        columns = rows = 1
    elif options.kind == "steps":
        rows = len(options.seeds) - 1
    elif options.kind == "mixing":
        columns, rows = 1 + len(options.mix_seeds), 1 + len(options.seeds)
    width, height = resolution * columns * views, resolution * rows
    if width * height > MOST_PIXELS or (options.kind in VIDEOS and max(width, height) > LONGEST_SIDE):
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
