"""Camera poses of other projects to dataset.json, and back.

$ epigraf data convert from-eg3d eg3d.zip --out ffhq.zip --ray-start 2.25 --ray-end 3.3
$ epigraf data convert from-nerf lego/transforms_train.json --out lego.zip --resolution 128
$ epigraf data convert from-nerf room/transforms.json --out room.zip --crop --resolution 256 --axes opencv
$ epigraf data convert to-eg3d ffhq.zip --out labels.json
$ epigraf data convert to-nerf lego.zip --out transforms.json

EG3D: dataset.json with labels of 25 numbers, cam2world (4x4, camera axes right, down, forward; y is up in the world)
and intrinsics (3x3, in units of the image side). NeRF: transforms.json, cam2world (3x4 or 4x4) with camera axes right,
up, backward, z up in the world; lenses as camera_angle_x, or as fl_x and w (and fl_y, h, cx, cy), for all or by frame.

Here a camera looks at the origin, upright, from a distance that all share; images are square, and all have one field of
view around their centre. Poses that differ from that by more than the tolerances are refused. With --crop, the largest
square field of view that all images hold around their principal points is cut from each. Lens distortion is refused.

Images are written as they are where the reader takes them; else as PNG: transparent ones on white, turned upright as
EXIF says, the upper 8 of 16 bits.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
from tyro.conf import Positional

from ..camera import frustum_extent
from ..data import check_angles, check_camera
from ..errors import UserError
from ..files import (
    IMAGE_SUFFIXES,
    Files,
    is_deep,
    is_image,
    is_transparent,
    name_key,
    pair_names,
    unusable,
    upright,
    upright_size,
)
from ..progress import Progress
from .arguments import Overwrite, about, check_effect, default, filled, optional, real, whole
from .command import check_output, output
from .poses import (
    AXES,
    EG3D_YAW,
    UP,
    Box,
    Poses,
    border_fov,
    centre_fov,
    check_cameras,
    eg3d_labels,
    nerf_transforms,
    read_eg3d,
    read_nerf,
    square_views,
)

TOLERANCES = {"tolerance": 10.0, "distance_tolerance": 0.01}
FROM, TO = ("from-eg3d", "from-nerf"), ("to-eg3d", "to-nerf")
# Flag -> the directions that it is for.
FOR_DIRECTIONS = dict.fromkeys(
    ("crop", "axes", "up", "tolerance", "distance_tolerance", "ray_start", "ray_end"), FROM
) | dict.fromkeys(("fov", "radius"), TO)


def picture(image: PIL.Image.Image, box: Box | None, size: tuple[int, int]) -> PIL.Image.Image:
    """RGB on white, `box` (default: all) of it at a size (box filter)."""
    if image.mode.startswith("I"):  # 16-bit grey; of colours, Pillow has decoded the upper half
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = is_transparent(image)
    image = image.convert("RGBA" if transparent else "RGB")
    if box is not None or image.size != size:
        # Averaged with colours times alpha, so that invisible colours stay invisible.
        image = image.convert("RGBa") if transparent else image
        image = image.resize(size, PIL.Image.Resampling.BOX, box=box)
        image = image.convert("RGBA") if transparent else image
    if transparent:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def encoded(source: Files, name: str, box: Box | None, resolution: int | None) -> tuple[bytes, str]:
    """An image as the reader takes it, and its suffix: the file as it is, if that can be; else a PNG."""
    with source.open(name) as file:
        content = file.read()
        with PIL.Image.open(io.BytesIO(content)) as image:
            plain = not (is_deep(image) or is_transparent(image))
            shown = upright(image)
            width, height = shown.size if box is None else (round(box[2] - box[0]), round(box[3] - box[1]))
            size = (resolution, resolution) if resolution else (width, height)
            whole = box is None or box == (0, 0, *shown.size)
            if plain and shown is image and whole and size == image.size:
                image.load()  # a damaged one is not passed on
                return content, os.path.splitext(name)[1].lower()
            buffer = io.BytesIO()
            picture(shown, None if whole else box, size).save(buffer, "png")
            return buffer.getvalue(), ".png"


@dataclass(frozen=True)
class Item:
    """A pose to write, with its image.

    Attributes:
        number: Of the pose in the source.
        name: In the data set that is written, without suffix.
        suffix: Of the image.
        image: Of the source's; None if there is none, for a .json alone.
        size: Its width and height, if it is there.
        box: What to cut from it.
    """

    number: int
    name: str
    suffix: str
    image: str | None
    size: tuple[int, int] | None
    box: Box | None = None


def find_images(source: Files, names: Sequence[str], needed: bool) -> tuple[list[Item], list[str]]:
    """The poses to write, with their images, and remarks on what is left over.

    Args:
        names: Of all poses.
        needed: Leave out the poses without an image.
    """
    images = [name for name in source.names if is_image(name)]
    with source.naming():
        pairs = pair_names(images, names, source.tops)
    of_pose = {pose: image for image, pose in pairs.items()}
    remarks = []
    if images and not pairs:
        remarks.append(f"no pose is named like an image: an image is {images[0]}, a pose {names[0]}: name them alike")
    elif images:
        left = [name for name in names if name not in of_pose], [name for name in images if name not in pairs]
        for what, found in zip(("poses without an image", "images without a pose"), left, strict=True):
            if found:
                remarks.append(f"{what}: {len(found)}, first {found[0]}")
    if needed and not pairs:
        source.fail(remarks[0] if remarks else f"holds no image ({', '.join(IMAGE_SUFFIXES)}): put them there")
    items = []
    for number, name in enumerate(Progress(names, "poses")):
        image = of_pose.get(name)
        if image is not None:
            with source.open(image) as file, PIL.Image.open(file) as opened:
                fault, size = unusable(opened), upright_size(opened)
            if fault:
                source.fail(f"image {image} is {fault}: save it as 8-bit RGB")
            suffix = os.path.splitext(image)[1].lower()
            items.append(Item(number, name_key(image, source.tops), suffix, image, size))
        elif not needed:
            suffix = os.path.splitext(name)[1].lower()
            suffix = suffix if suffix in IMAGE_SUFFIXES else ".png"
            items.append(Item(number, name_key(name, source.tops), suffix, None, None))
    return items, remarks


def side_of(source: Files, items: Sequence[Item], resolution: int | None) -> int | None:
    """The side of the images that are written, None if nothing tells it.

    Raises:
        UserError: They are to be written as they are, or cut, and are no squares of one size.
    """
    sides: dict[tuple[float, float], str] = {}
    for item in items if resolution is None else ():
        if item.box is not None:
            left, top, right, bottom = item.box
            if max(abs(edge - round(edge)) for edge in item.box) > 1e-3:
                source.fail(f"image {item.image} would be cut to {right - left:.2f} pixels: give a --resolution")
            sides.setdefault((round(right - left), round(bottom - top)), item.image)
        elif item.size is not None:
            sides.setdefault(item.size, item.image)
    for (width, height), image in sides.items():
        if width != height or len(sides) > 1:
            (w, h), first = next(iter(sides.items()))
            source.fail(f"image {image} is {width}x{height}, {first} {w}x{h}: give a --resolution")
    return resolution or next((width for width, _ in sides), None)


def write(
    out: Path,
    metadata: Callable[[list[str]], dict[str, Any]],
    source: Files,
    items: Sequence[Item],
    resolution: int | None,
) -> None:
    """Writes a .json, or a .zip with the images too, whole or not at all.

    Args:
        metadata: What to write of the names that the items have got.
    """
    with output(out) as partial:
        if out.suffix == ".json":
            partial.write_text(json.dumps(metadata([item.name + item.suffix for item in items])) + "\n")
            return
        with zipfile.ZipFile(partial, "w") as archive:
            names = []
            for item in Progress(items, "images"):
                content, suffix = encoded(source, item.image, item.box, resolution)
                names.append(item.name + suffix)
                archive.writestr(zipfile.ZipInfo(names[-1]), content)
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(metadata(names)), zipfile.ZIP_DEFLATED)


def open_source(options: Options) -> tuple[Files, dict[str, Any]]:
    """The files to convert and their .json, which the output must not overwrite."""
    source = Files(options.source)
    if source.metadata is None:
        source.fail("has no dataset.json: give the .json with the poses")
    read = [source.path, *([source.folder / source.metadata] if source.folder is not None else [])]
    if options.out.exists() and any(options.out.samefile(one) for one in read):
        raise UserError(f"{options.out} is what is read: choose another output")
    return source, source.read_metadata()


def from_others(options: Options, read: Callable[[dict], Poses], yaw_offset: float) -> list[str]:
    """Another project's poses to ours. Returns the report."""
    source, stored = open_source(options)
    with source.naming():
        poses = read(stored)
    items, remarks = find_images(source, poses.names, needed=options.out.suffix == ".zip")
    with source.naming():
        poses = poses.some([item.number for item in items])
        tolerances = {name: getattr(options, name) for name in ("tolerance", "distance_tolerance")}
        angles, radius, loss = check_cameras(
            poses, axes=options.axes, up=options.up, yaw_offset=yaw_offset, **tolerances
        )
        boxes, fov = square_views(poses, [item.size for item in items], options.crop)
    items = [dataclasses.replace(item, box=box) for item, box in zip(items, boxes, strict=True)]
    side = side_of(source, items, options.resolution)
    report = [*remarks, f"{len(items)} cameras: {loss}, field of view {fov:.4g} degrees between the borders"]
    if options.crop:
        cut = [item.box[2] - item.box[0] for item in items]
        report.append(f"cut to {min(cut):.1f} to {max(cut):.1f} pixels of each width")
    camera = None
    if options.ray_start is not None and options.ray_end is not None:
        if side is None:
            raise UserError("the images are not beside the poses: give their --resolution for the field of view")
        camera = {
            "fov": round(centre_fov(fov, side), 6),
            "radius": radius,
            "ray_start": options.ray_start,
            "ray_end": options.ray_end,
        }
        camera["cube_scale"] = math.ceil(frustum_extent(**camera) * 1e4) / 1e4
        report.append(f"camera: {camera}")
    else:
        report.append("no camera is stored: give --ray-start and --ray-end, or set fov and lengths when training")

    def metadata(names: list[str]) -> dict[str, Any]:
        poses = {"camera_angles": dict(zip(names, angles.round(7).tolist(), strict=True))}
        return poses | ({} if camera is None else {"camera": camera})

    write(options.out, metadata, source, items, options.resolution)
    return [*report, f"wrote {options.out}"]


def to_others(options: Options, eg3d: bool, yaw_offset: float) -> list[str]:
    """Our poses to another project's. Returns the report."""
    source, stored = open_source(options)
    entries = stored.get("camera_angles")
    if not isinstance(entries, dict) or not entries:
        source.fail(f'{source.metadata} has no "camera_angles"')
    with source.naming(f"{source.metadata}: "):
        for name, value in entries.items():
            check_angles(name, value)
        fov, radius = options.fov, options.radius
        if (fov is None or radius is None) and stored.get("camera") is not None:
            camera = check_camera(stored["camera"])
            fov, radius = fov or camera["fov"], radius or camera["radius"]
    if fov is None or radius is None:
        source.fail("stores no camera: give --fov and --radius")
    items, remarks = find_images(source, list(entries), needed=options.out.suffix == ".zip")
    oblong = next((item for item in items if item.size and item.size[0] != item.size[1]), None)
    if oblong is not None:
        source.fail("image {} is {}x{}, not square: crop it".format(oblong.image, *oblong.size))
    side = side_of(source, items, options.resolution)
    if side is None:
        raise UserError("the images are not beside the poses: give their --resolution for the field of view")
    fov = border_fov(fov, side)
    angles = np.array(list(entries.values()), np.float64)[[item.number for item in items]]

    def metadata(names: list[str]) -> dict[str, Any]:
        if not eg3d:
            return nerf_transforms(names, angles, fov, radius)
        labels = eg3d_labels(angles, fov, radius, yaw_offset).round(9).tolist()
        return {"labels": [[name, row] for name, row in zip(names, labels, strict=True)]}

    write(options.out, metadata, source, items, options.resolution)
    return [*remarks, f"{len(items)} cameras", f"wrote {options.out}"]


DIRECTIONS = (*FROM, *TO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `epigraf data convert`."""

    direction: Annotated[Positional[Literal[DIRECTIONS]], about(metavar="|".join(DIRECTIONS), help="What to what.")]
    source: Positional[Path]
    """A zip or folder with dataset.json, or a .json with images beside it."""
    out: Path
    """The .json (the poses) or .zip (with the images) to write."""
    overwrite: Overwrite = False
    resolution: Annotated[int | None, whole(4, 16384), default("as they are")] = None
    """Resize the images to so many pixels a side; transparent ones go on white."""
    crop: bool = False
    """From others: cut the square view that all images hold."""
    axes: Annotated[Literal[tuple(AXES)] | None, default("opencv for EG3D, else opengl")] = None
    """From others: their camera axes."""
    up: Annotated[Literal[tuple(UP)] | None, default("y for EG3D, else z")] = None
    """From others: the up axis of their world."""
    yaw_offset: Annotated[float | None, real(-360, 360), default("90 for EG3D, else 0")] = None
    """Degrees between the worlds' yaws."""
    tolerance: Annotated[float | None, real(0, 180), default(f"{TOLERANCES['tolerance']:g}")] = None
    """From others: degrees by which a camera may look past the origin."""
    distance_tolerance: Annotated[float | None, real(0, 1e9), default(f"{TOLERANCES['distance_tolerance']:g}")] = None
    """From others: share by which a camera's distance may differ from that of most."""
    ray_start: Annotated[float | None, real(1e-9, 1e9), optional] = None
    """From others: where rays begin, in the units of the poses."""
    ray_end: Annotated[float | None, real(1e-9, 1e9), optional] = None
    """From others: where rays end."""
    fov: Annotated[float | None, real(0.01, 179), optional] = None
    """To others: degrees between the centres of the outermost pixels, if the set stores none."""
    radius: Annotated[float | None, real(1e-9, 1e9), optional] = None
    """To others: distance of the cameras, if the set stores none."""


def run(options: Options) -> None:
    check_effect(options, options.direction, FOR_DIRECTIONS)
    eg3d = options.direction.endswith("eg3d")
    conventions = {"axes": "opencv", "up": "y"} if eg3d else {"axes": "opengl", "up": "z"}
    options = filled(options, TOLERANCES | conventions)
    yaw_offset = options.yaw_offset if options.yaw_offset is not None else EG3D_YAW if eg3d else 0.0
    suffixes = (".json",) if options.direction == "to-nerf" else (".json", ".zip")
    check_output("--out", options.out, suffixes, overwrite=options.overwrite)
    if None not in (options.ray_start, options.ray_end) and options.ray_end <= options.ray_start:
        raise UserError(f"--ray-end must be above --ray-start {options.ray_start:g}, got {options.ray_end:g}")
    if options.crop and options.out.suffix != ".zip":
        raise UserError(f"--crop cuts the images: the output must be a .zip, got {options.out}")
    if options.direction in FROM:
        report = from_others(options, read_eg3d if eg3d else read_nerf, yaw_offset)
    else:
        report = to_others(options, eg3d, yaw_offset)
    print(*report, sep="\n")
