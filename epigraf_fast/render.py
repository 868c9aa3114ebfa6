"""Pictures and videos of a trained generator.

$ python -m epigraf_fast.render grid runs/demo --out grid.png --seeds 0-15
$ python -m epigraf_fast.render turntable runs/demo --out turntable.mp4 --seeds 0-3 --show rgb depth normals
$ python -m epigraf_fast.render interpolation runs/demo --out walk.mp4 --seeds 0-5
$ python -m epigraf_fast.render fly-around runs/ffhq --out fly.mp4 --seeds 0-3 --resolution 1024
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .camera import cam2world_matrix, camera_rays
from .errors import UserError, one_line_errors
from .models.generator import Generator, Images
from .training.log import depth_to_uint8, save_gif, save_png, tile, to_uint8
from .training.pretrained import load_generator
from .training.sampling import circle_angles, latents_of_seeds, surface_depth, turntable_angles

KINDS = ("grid", "turntable", "interpolation", "fly-around")
SHOWN = ("rgb", "depth", "normals")
OPAQUE = 0.5  # rays that gather less have no surface


def parse_numbers(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"numbers must look like 0-15 or 1,4,7-9, got {text!r}")
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    numbers = [n for ends in ranges for n in range(ends[0], ends[-1] + 1)]
    if not numbers or max(numbers) >= 2**63:
        raise UserError(f"numbers must be a range that goes up, below 2^63, got {text!r}")
    return numbers


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
    def paint(self, ws: Tensor) -> Painted:
        """The object of style vectors [num_ws, w_dim]."""
        return Painted(self.generator.synthesis(ws[None], noise_mode="const"), ws[None])

    @torch.no_grad()
    def view(self, painted: Painted, angles: Tensor, fov: float | None = None) -> dict[str, Tensor]:
        """One object from one camera [3]: uint8 [1, 3, R, R] of each thing to show."""
        angles = angles.to(painted.planes.device)[None]
        images = self.generator.render(
            painted.planes, angles, self.resolution, ws=painted.ws, fov=fov, stochastic=False
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
        painted = scene.paint(w)
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
    objects = [scene.paint(w) for w in scene.ws(seeds, classes)]
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
        painted = scene.paint(ws[low].lerp(ws[low + 1], place - low))
        yield tiled([scene.view(painted, pose)], 1)


@contextlib.contextmanager
def video(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes uint8 frames [H, W, 3] as they come and leaves an MP4 (H.264) or a GIF, whole or not at all."""
    if path.suffix == ".gif":
        frames: list[np.ndarray] = []
        yield frames.append
        save_gif(np.stack(frames), path, fps)
        return
    try:
        from imageio_ffmpeg import write_frames
    except ImportError:
        raise UserError("imageio-ffmpeg is not installed: pip install 'epigraf_fast[tools]', or write a .gif") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.mp4")
    writer = None

    def add(frame: np.ndarray) -> None:
        nonlocal writer
        height, width = (size - size % 2 for size in frame.shape[:2])  # the pixel format halves colours
        if writer is None:
            writer = write_frames(str(partial), (width, height), fps=fps, quality=8, macro_block_size=2)
            writer.send(None)
        writer.send(np.ascontiguousarray(frame[:height, :width]))

    try:
        yield add
        writer.close()
        partial.replace(path)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)


def save_all(frames: Iterable[Frame], paths: dict[str, Path], fps: float) -> None:
    """One video for each thing that is shown, from one pass over the frames."""
    with contextlib.ExitStack() as stack:
        videos = {name: stack.enter_context(video(path, fps)) for name, path in paths.items()}
        for frame in frames:
            for name, add in videos.items():
                add(frame[name])


def progress_bar(items: Any, unit: str) -> Any:
    """A bar on a terminal, nothing in a file."""
    from tqdm import tqdm

    return tqdm(items, desc=unit, unit="", disable=None, leave=False)


def add_generator_arguments(parser: argparse.ArgumentParser, seeds: str = "0-15") -> None:
    """What every tool that looks at a generator asks for."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, a run folder, or a converted one")
    parser.add_argument("--seeds", default=seeds, help="as in 0-15 or 1,4,7-9 (default: %(default)s)")
    parser.add_argument("--labels", help="classes, taken in turn (default: seed modulo those that have images)")
    parser.add_argument("--truncation", type=float, default=1.0, help="psi; 1 is none (default: %(default)s)")
    parser.add_argument("--cutoff", type=int, help="style vectors that are truncated (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises UserError unless low <= value <= high and finite."""
    if not (low <= value <= high and math.isfinite(value)):
        bound = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}" if low > -math.inf else "finite"
        raise UserError(f"--{name} must be {bound}, got {value:g}")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m epigraf_fast.render",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    add_generator_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help=".png (grid), .mp4 or .gif; others get -depth, -normals"
    )
    parser.add_argument("--show", nargs="+", choices=SHOWN, default=["rgb"], help="one file each (default: rgb)")
    parser.add_argument("--resolution", type=int, help="any (default: that of training)")
    parser.add_argument("--ray-samples", type=int, help="coarse and fine samples a ray (default: as in training)")
    parser.add_argument("--columns", type=int, help="objects a row (default: about a square)")
    parser.add_argument("--yaw", type=float, nargs="+", help="grid: views, radians (default: the mean pose)")
    parser.add_argument("--pitch", type=float, help="radians from straight above (default: the mean pose's)")
    parser.add_argument("--frames", type=int, default=120, help="of the whole video (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=30.0, help="frames a second (default: %(default)s)")
    parser.add_argument(
        "--yaw-range",
        type=float,
        default=0.4,
        help="fly-around, interpolation: radians to a side (default: %(default)s)",
    )
    parser.add_argument("--pitch-range", type=float, default=0.2, help="the same up and down (default: %(default)s)")
    parser.add_argument(
        "--zoom", type=float, default=1.5, help="fly-around: how much closer halfway; 1 is not (default: %(default)s)"
    )
    options = parser.parse_args(args)
    with one_line_errors():
        run(options)


def run(options: argparse.Namespace) -> None:
    seeds = parse_numbers(options.seeds)
    classes = parse_numbers(options.labels) if options.labels else []
    shown = list(dict.fromkeys(options.show))
    suffixes = (".png",) if options.kind == "grid" else (".mp4", ".gif")
    if options.out.suffix not in suffixes:
        raise UserError(f"--out must end in {' or '.join(suffixes)}, got {options.out}")
    check_range("frames", options.frames, 2)
    check_range("fps", options.fps, 0.1)
    check_range("zoom", options.zoom, 0.1, 10)
    config, generator = load_generator(options.checkpoint, options.device)
    resolution = config.resolution if options.resolution is None else options.resolution
    check_range("resolution", resolution, 2)
    columns = options.columns or math.ceil(math.sqrt(len(seeds)))
    check_range("columns", columns, 1)
    if options.ray_samples is not None:
        check_range("ray-samples", options.ray_samples, 3)
        generator.renderer.config = dataclasses.replace(
            generator.renderer.config, coarse_samples=options.ray_samples, fine_samples=options.ray_samples
        )
    scene = Scene(generator, resolution, shown, truncation=options.truncation, cutoff=options.cutoff)
    centre = generator.mean_camera_pose.cpu().clone()
    if options.pitch is not None:
        check_range("pitch", options.pitch, 0, math.pi)
        centre[1] = options.pitch
    paths = {
        name: options.out if name == shown[0] else options.out.with_stem(f"{options.out.stem}-{name}") for name in shown
    }
    if options.kind == "grid":
        yaws = torch.tensor(options.yaw if options.yaw is not None else [float(centre[0])])
        poses = torch.stack([yaws, centre[1].expand_as(yaws), torch.zeros_like(yaws)], dim=1)
        for name, picture in grid(scene, seeds, classes, poses, columns, progress_bar).items():
            save_png(picture, paths[name])
    else:
        circle = circle_angles(options.frames, centre, options.yaw_range, options.pitch_range)
        if options.kind == "turntable":
            frames = orbit(
                scene,
                seeds,
                classes,
                turntable_angles(options.frames, *([] if options.pitch is None else [options.pitch])),
                columns,
                progress_bar,
            )
        elif options.kind == "interpolation":
            frames = interpolation(scene, seeds, classes, circle, progress_bar)
        else:
            fovs = zoomed(generator.camera.fov, options.zoom, options.frames)
            frames = orbit(scene, seeds, classes, circle, columns, progress_bar, fovs)
        save_all(frames, paths, options.fps)
    for path in paths.values():
        print(f"wrote {path}")


def zoomed(fov: float, zoom: float, frames: int) -> list[float]:
    """Fields of view (degrees) that go from `fov` to one `zoom` times closer and back."""
    half = math.tan(math.radians(fov) / 2)
    share = [(1 - math.cos(2 * math.pi * i / frames)) / 2 for i in range(frames)]
    return [math.degrees(2 * math.atan(half * zoom**-s)) for s in share]


if __name__ == "__main__":
    main()
