"""Camera poses of other projects to dataset.json, and back.

$ python -m epigraf_fast.convert_data from-eg3d eg3d.zip ffhq.zip --ray-start 2.25 --ray-end 3.3
$ python -m epigraf_fast.convert_data from-nerf lego/transforms_train.json lego.zip --resolution 128
$ python -m epigraf_fast.convert_data to-eg3d ffhq.zip labels.json
$ python -m epigraf_fast.convert_data to-nerf lego.zip transforms.json

EG3D: dataset.json with labels of 25 numbers, cam2world (4x4, camera axes right, down, forward; y is up in the world)
and intrinsics (3x3, in units of the image side). NeRF-synthetic: transforms.json, cam2world with camera axes right, up,
backward; z is up in the world. Here a camera looks at the origin from a distance that all share, upright: what the
poses lose by that is measured and printed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from .arguments import Parser, check_effect, real, whole
from .camera import cam2world_matrix, frustum_extent
from .command import Progress, check_output, output, running
from .data import IMAGE_SUFFIXES
from .errors import UserError

OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # right, down, forward <-> right, up, backward
Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # (x, y, z) -> (x, z, -y)
TOLERANCE = 10.0  # degrees that a camera may look beside the origin
EG3D_YAW = 90.0  # degrees: there a face looks along +z, here yaw 0 is on +x


@dataclass(frozen=True)
class Poses:
    """Cameras of a data set.

    Attributes:
        names: Of the images.
        cam2world: [N, 4, 4], camera axes right, up, backward, y up in the world.
        fov: [N] degrees between the image's borders.
    """

    names: list[str]
    cam2world: np.ndarray
    fov: np.ndarray


def border_fov(fov: float, resolution: int) -> float:
    """Degrees between the image's borders, of a field of view between the centres of its outermost pixels (ours)."""
    return math.degrees(2 * math.atan(math.tan(math.radians(fov) / 2) * resolution / (resolution - 1)))


def centre_fov(fov: float, resolution: int) -> float:
    """The inverse of `border_fov`."""
    return math.degrees(2 * math.atan(math.tan(math.radians(fov) / 2) * (resolution - 1) / resolution))


def read_eg3d(metadata: Any) -> Poses:
    """Poses of EG3D's dataset.json."""
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    try:
        names, values = zip(*(labels.items() if isinstance(labels, dict) else labels), strict=True)
        values = np.array(values, np.float64)
        if values.ndim != 2 or values.shape[1] != 25:
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise UserError('"labels" must be [name, 25 numbers] pairs, as EG3D writes them') from None
    if not np.isfinite(values).all():
        raise UserError("a label is not finite")
    cam2world = values[:, :16].reshape(-1, 4, 4) @ OPENCV
    focal = values[:, 16]
    if not (focal > 0).all():
        raise UserError("the focal length, number 17 of a label, must be positive")
    return Poses(list(names), cam2world, np.degrees(2 * np.arctan(0.5 / focal)))


def read_nerf(metadata: Any) -> Poses:
    """Poses of a NeRF-synthetic transforms.json."""
    try:
        names = [os.path.normpath(frame["file_path"]) for frame in metadata["frames"]]
        matrices = np.array([frame["transform_matrix"] for frame in metadata["frames"]], np.float64)
        fov = math.degrees(float(metadata["camera_angle_x"]))
        if matrices.shape[1:] != (4, 4) or not np.isfinite(matrices).all() or not 0 < fov < 180:
            raise ValueError
    except (TypeError, ValueError, KeyError, IndexError):
        raise UserError("needs camera_angle_x (radians) and frames with file_path and transform_matrix (4x4)") from None
    names = [name if name.lower().endswith(IMAGE_SUFFIXES) else f"{name}.png" for name in names]
    return Poses(names, Z_UP @ matrices, np.full(len(names), fov))


def to_angles(poses: Poses, yaw_offset: float) -> tuple[np.ndarray, dict[str, float]]:
    """Yaw, pitch and roll [N, 3] in radians of the camera positions, and what that loses.

    Args:
        yaw_offset: Degrees that are taken from every yaw: turns the world about its up axis.

    Returns:
        The angles, and: `radius`, the median distance from the origin; `radius_spread`, the largest deviation from it
        as a share; `aim` and `roll`, the largest angles (degrees) between the camera and one that looks at the origin,
        upright; `fov_spread`, the largest deviation from the median field of view (degrees).
    """
    matrices = poses.cam2world
    rotation, position = matrices[:, :3, :3], matrices[:, :3, 3]
    if not np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-3):
        raise UserError("a camera matrix has no rotation: its first three columns must be orthonormal")
    distance = np.linalg.norm(position, axis=1)
    if not (distance > 0).all():
        raise UserError("a camera stands in the origin")
    outward = position / distance[:, None]
    pitch = np.arccos(outward[:, 1].clip(-1, 1))
    yaw = np.arctan2(outward[:, 2], outward[:, 0]) - math.radians(yaw_offset)
    yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
    angles = np.stack([yaw, pitch, np.zeros_like(yaw)], axis=1)
    turned = angles + np.array([math.radians(yaw_offset), 0, 0])
    ideal = cam2world_matrix(torch.from_numpy(turned), 1.0).numpy()[:, :3, :3]
    aim = np.arccos((rotation[:, :, 2] * ideal[:, :, 2]).sum(1).clip(-1, 1))
    right, up = (
        (rotation[:, :, 0] * ideal[:, :, 0]).sum(1),
        (rotation[:, :, 0] * ideal[:, :, 1]).sum(1),
    )
    radius, fov = float(np.median(distance)), float(np.median(poses.fov))
    return angles, {
        "radius": radius,
        "radius_spread": float(np.abs(distance / radius - 1).max()),
        "aim": float(np.degrees(aim).max()),
        "roll": float(np.degrees(np.abs(np.arctan2(up, right))).max()),
        "fov_spread": float(np.abs(poses.fov - fov).max()),
    }


def eg3d_labels(angles: np.ndarray, fov: float, radius: float, yaw_offset: float) -> np.ndarray:
    """Labels [N, 25] of our angles; `fov` between the borders, degrees."""
    turned = torch.from_numpy(angles + np.array([math.radians(yaw_offset), 0, 0]))
    cam2world = cam2world_matrix(turned, radius).numpy() @ OPENCV
    focal = 0.5 / math.tan(math.radians(fov) / 2)
    intrinsics = np.array([focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1])
    return np.concatenate([cam2world.reshape(-1, 16), np.tile(intrinsics, (len(angles), 1))], axis=1)


def nerf_transforms(names: Sequence[str], angles: np.ndarray, fov: float, radius: float) -> dict[str, Any]:
    """A transforms.json of our angles; `fov` between the borders, degrees."""
    matrices = np.linalg.inv(Z_UP) @ cam2world_matrix(torch.from_numpy(angles), radius).numpy()
    frames = [
        {"file_path": f"./{os.path.splitext(name)[0]}", "transform_matrix": matrix.tolist()}
        for name, matrix in zip(names, matrices, strict=True)
    ]
    return {"camera_angle_x": math.radians(fov), "frames": frames}


class Source:
    """Where a data set's metadata and images come from: a .json with its images beside it, a folder or a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive = None
        if not path.exists():
            raise UserError(f"there is no {path}: give a .json, a folder or a zip")
        if path.is_dir():
            self.root, metadata = path, "dataset.json"
        elif path.suffix == ".json":
            self.root, metadata = path.parent, path.name
        else:
            try:
                self.archive = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{path} is no .json, no folder and no zip ({error})") from None
            metadata = "dataset.json"
        try:
            self.metadata = json.loads(self.read(metadata))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: {metadata} cannot be read ({error})") from None

    def read(self, name: str) -> bytes:
        return self.archive.read(name) if self.archive else (self.root / name).read_bytes()

    def resolution(self, name: str) -> int | None:
        """The width of an image, None if it is not there."""
        try:
            with PIL.Image.open(io.BytesIO(self.read(name))) as image:
                return image.width
        except (OSError, KeyError):
            return None


def opaque(image: PIL.Image.Image, resolution: int | None) -> PIL.Image.Image:
    """RGB on white, at a resolution (box filter)."""
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        if resolution and image.size != (resolution, resolution):
            # Averaged with colours times alpha, so that invisible colours stay invisible.
            image = image.convert("RGBa").resize((resolution, resolution), PIL.Image.Resampling.BOX).convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    image = image.convert("RGB")
    if resolution and image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), PIL.Image.Resampling.BOX)
    return image


def write(out: Path, metadata: dict[str, Any], source: Source, names: Sequence[str], resolution: int | None) -> None:
    """Writes a .json, or a .zip with the images too, whole or not at all."""
    with output(out) as partial:
        if out.suffix == ".json":
            partial.write_text(json.dumps(metadata) + "\n")
            return
        with zipfile.ZipFile(partial, "w") as archive:
            for name in Progress(names, "images"):
                try:
                    content = source.read(name)
                    with PIL.Image.open(io.BytesIO(content)) as image:
                        if resolution or "A" in image.mode or "transparency" in image.info:
                            buffer = io.BytesIO()
                            opaque(image, resolution).save(buffer, "png")
                            content = buffer.getvalue()
                except (OSError, KeyError) as error:
                    raise UserError(f"{source.path}: image {name} cannot be read ({error})") from None
                archive.writestr(zipfile.ZipInfo(name), content)
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(metadata), zipfile.ZIP_DEFLATED)


def from_others(options: argparse.Namespace, read: Callable[[Any], Poses], yaw_offset: float) -> list[str]:
    """Another project's poses to ours. Returns the report."""
    source = Source(options.source)
    try:
        poses = read(source.metadata)
        angles, loss = to_angles(poses, yaw_offset)
    except UserError as error:
        raise UserError(f"{options.source}: {error}") from None
    report = [
        f"{len(poses.names)} cameras: distance {loss['radius']:.4g} (up to {loss['radius_spread']:.2%} off), "
        f"aim up to {loss['aim']:.2f} degrees beside the origin, roll up to {loss['roll']:.2f} degrees, "
        f"field of view up to {loss['fov_spread']:.3f} degrees off"
    ]
    if max(loss["aim"], loss["roll"]) > options.tolerance:
        raise UserError(
            f"{options.source}: {report[0]}: that is beyond --tolerance {options.tolerance:g} degrees: "
            "pictures and poses would disagree; centre the scene, or raise the tolerance"
        )
    metadata: dict[str, Any] = {"camera_angles": dict(zip(poses.names, angles.round(7).tolist(), strict=True))}
    resolution = options.resolution or source.resolution(poses.names[0])
    if options.ray_start is not None and options.ray_end is not None:
        if resolution is None:
            raise UserError("the images are not beside the poses: give their --resolution for the field of view")
        camera = {
            "fov": round(centre_fov(float(np.median(poses.fov)), resolution), 6),
            "radius": loss["radius"],
            "ray_start": options.ray_start,
            "ray_end": options.ray_end,
        }
        camera["cube_scale"] = math.ceil(frustum_extent(**camera) * 1e4) / 1e4
        metadata["camera"] = camera
        report.append(f"camera: {camera}")
    else:
        report.append("no camera is stored: give --ray-start and --ray-end, or set fov and lengths when training")
    write(options.out, metadata, source, poses.names, options.resolution)
    return [*report, f"wrote {options.out}"]


def to_others(options: argparse.Namespace, eg3d: bool, yaw_offset: float) -> list[str]:
    """Our poses to another project's. Returns the report."""
    source = Source(options.source)
    entries = source.metadata.get("camera_angles") if isinstance(source.metadata, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'{options.source}: dataset.json has no "camera_angles"')
    try:
        angles = np.array(list(entries.values()), np.float64).reshape(len(entries), 3)
    except ValueError:
        raise UserError(f"{options.source}: camera_angles must be [yaw, pitch, roll]") from None
    camera = source.metadata.get("camera") or {}
    fov, radius = options.fov or camera.get("fov"), options.radius or camera.get("radius")
    if fov is None or radius is None:
        raise UserError(f"{options.source} stores no camera: give --fov and --radius")
    names = list(entries)
    resolution = options.resolution or source.resolution(names[0])
    if resolution is None:
        raise UserError("the images are not beside the poses: give their --resolution for the field of view")
    fov = border_fov(fov, resolution)
    if eg3d:
        labels = eg3d_labels(angles, fov, radius, yaw_offset)
        metadata = {"labels": [[name, row] for name, row in zip(names, labels.round(9).tolist(), strict=True)]}
    else:
        metadata = nerf_transforms(names, angles, fov, radius)
    write(options.out, metadata, source, names, options.resolution)
    return [f"{len(names)} cameras", f"wrote {options.out}"]


FROM, TO = ("from-eg3d", "from-nerf"), ("to-eg3d", "to-nerf")
# Flag -> the directions that it is for.
FOR_DIRECTIONS = {"tolerance": FROM, "ray_start": FROM, "ray_end": FROM, "fov": TO, "radius": TO}


def arguments() -> Parser:
    parser = Parser("convert_data", __doc__)
    parser.add_argument("direction", choices=(*FROM, *TO))
    parser.add_argument("source", type=Path, help="a zip or folder with dataset.json, or a .json with images beside it")
    parser.add_argument("out", type=Path, help=".json (the poses), or .zip (with the images)")
    parser.add_argument("--resolution", type=whole(4, 16384), help="resize the images (transparent ones go on white)")
    parser.add_argument(
        "--yaw-offset", type=real(-360, 360), help="degrees between the worlds' yaws (default: 90 for EG3D, else 0)"
    )
    parser.add_argument(
        "--tolerance",
        type=real(0, 180),
        help=f"degrees a camera may look beside the origin (default: {TOLERANCE:g})",
    )
    parser.add_argument("--ray-start", type=real(1e-9, 1e9), help="from: where rays begin, in the units of the poses")
    parser.add_argument("--ray-end", type=real(1e-9, 1e9), help="from: where they end")
    parser.add_argument(
        "--fov", type=real(0.01, 179), help="to: degrees between outermost pixel centres, if none is stored"
    )
    parser.add_argument("--radius", type=real(1e-9, 1e9), help="to: distance of the cameras, if none is stored")
    parser.add_overwrite()
    return parser


def main(args: Sequence[str] | None = None) -> None:
    with running():
        print(*run(arguments().parse_args(args)), sep="\n")


def run(options: argparse.Namespace) -> list[str]:
    check_effect(vars(options), options.direction, FOR_DIRECTIONS)
    options.tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    eg3d = options.direction.endswith("eg3d")
    yaw_offset = options.yaw_offset if options.yaw_offset is not None else EG3D_YAW if eg3d else 0.0
    suffixes = (".json",) if options.direction == "to-nerf" else (".json", ".zip")
    for source in (options.source, options.source / "dataset.json"):
        if options.out.exists() and source.exists() and options.out.samefile(source):
            raise UserError(f"out {options.out} is the source: choose another name")
    check_output("out", options.out, suffixes, overwrite=options.overwrite)
    if None not in (options.ray_start, options.ray_end) and options.ray_end <= options.ray_start:
        raise UserError(f"--ray-end must be above --ray-start {options.ray_start:g}, got {options.ray_end:g}")
    if options.direction in FROM:
        return from_others(options, read_eg3d if eg3d else read_nerf, yaw_offset)
    return to_others(options, eg3d, yaw_offset)


if __name__ == "__main__":
    main()
