"""Cameras as other projects store them, what they lose as ours, and ours as theirs; for `epigraf data convert`."""

from __future__ import annotations

import itertools
import math
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..camera import cam2world_matrix
from ..data import is_number
from ..errors import UserError
from ..files import clean_name

OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # right, down, forward <-> right, up, backward
Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # (x, y, z) -> (x, z, -y)
AXES = {"opengl": np.eye(4), "opencv": OPENCV}
UP = {"y": np.eye(4), "z": Z_UP}
EG3D_YAW = 90.0  # degrees: there a face looks along +z, here yaw 0 is on +x
EXACT = 1e-3  # of an image's side, or of a focal length: half a pixel of 512
Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels
PINHOLE = ("PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "PERSPECTIVE")


@dataclass(frozen=True)
class Poses:
    """Cameras as a project stores them.

    Attributes:
        names: Of the images.
        matrices: [N, 4, 4] cam2world, axes and world as there.
        lenses: [N, 4]: fx and cx in widths of the image, fy and cy in heights. NaN for fy: pixels are square.
        sizes: Width and height of the image that a lens is meant for, or None.
    """

    names: list[str]
    matrices: np.ndarray
    lenses: np.ndarray
    sizes: list[tuple[float, float] | None]

    def some(self, numbers: Sequence[int]) -> Poses:
        """Those of these numbers."""
        names, sizes = ([values[n] for n in numbers] for values in (self.names, self.sizes))
        return Poses(names, self.matrices[numbers], self.lenses[numbers], sizes)


def border_fov(fov: float, resolution: int) -> float:
    """Degrees between the image's borders, of a field of view between the centres of its outermost pixels (ours)."""
    return math.degrees(2 * math.atan(math.tan(math.radians(fov) / 2) * resolution / (resolution - 1)))


def centre_fov(fov: float, resolution: int) -> float:
    """The inverse of `border_fov`."""
    return math.degrees(2 * math.atan(math.tan(math.radians(fov) / 2) * (resolution - 1) / resolution))


def read_eg3d(metadata: dict[str, Any]) -> Poses:
    """Poses of EG3D's dataset.json."""
    labels = metadata.get("labels")
    try:
        names, values = zip(*(labels.items() if isinstance(labels, dict) else labels), strict=True)
        if not all(isinstance(name, str) for name in names) or {len(value) for value in values} != {25}:
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise UserError('"labels" must be [name, 25 numbers] pairs, as EG3D writes them') from None
    for name, value in zip(names, values, strict=True):
        if not all(map(is_number, value)):
            raise UserError(f"the label of {name} is not finite, or no numbers")
        fx, skew, _, zero, fy, _, *last = value[16:]
        if not (fx > 0 and fy > 0):
            raise UserError(f"the focal length of {name}, number 17 and 21 of its label, must be positive")
        if max(abs(skew), abs(zero), *(abs(a - b) for a, b in zip(last, (0, 0, 1), strict=True))) > EXACT:
            raise UserError(f"the last 9 numbers of the label of {name} are no intrinsics [f, 0, c, 0, f, c, 0, 0, 1]")
    numbers = np.array(values, np.float64)
    matrices = check_matrices(numbers[:, :16].reshape(-1, 4, 4), names)
    return Poses(list(names), matrices, numbers[:, [16, 18, 20, 21]], [None] * len(names))


def read_nerf(metadata: dict[str, Any]) -> Poses:
    """Poses of a transforms.json; what a frame says goes before what the file says for all."""
    frames = metadata.get("frames")
    if not (isinstance(frames, list) and frames and all(isinstance(frame, dict) for frame in frames)):
        raise UserError(
            "needs frames with file_path and transform_matrix (3x4 or 4x4), and camera_angle_x, or fl_x and w"
        )
    common = {name: value for name, value in metadata.items() if name != "frames"}
    names, matrices, lenses, sizes = [], [], [], []
    for number, frame in enumerate(frames):
        name = frame.get("file_path")
        if not (isinstance(name, str) and clean_name(name)):
            raise UserError(f"frame {number} has no file_path: add it")
        names.append(name)
        matrices.append(as_matrix(frame.get("transform_matrix"), name))
        size, lens = read_lens(common, frame, name)
        sizes.append(size)
        lenses.append(lens)
    return Poses(names, check_matrices(np.stack(matrices), names), np.array(lenses), sizes)


def as_matrix(rows: Any, name: str) -> np.ndarray:
    """cam2world [4, 4] of 3 or 4 rows of a .json."""
    try:
        matrix = np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        matrix = np.zeros(0)
    if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
        raise UserError(f"the matrix of {name} must be 3 or 4 rows of 4 finite numbers, got {reprlib.repr(rows)}")
    return np.concatenate([matrix, [[0.0, 0, 0, 1]]])[[0, 1, 2, -1 if len(matrix) == 3 else 3]]


def check_matrices(matrices: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The matrices [N, 4, 4] themselves. UserError names the first that is no rotation and position."""
    rotation = matrices[:, :3, :3]
    turned = np.isclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-3).all(axis=(1, 2))
    turned &= np.linalg.det(rotation) > 0
    last = np.isclose(matrices[:, 3], [0, 0, 0, 1], atol=1e-6).all(axis=1)
    for good, fault in (
        (turned, "has no rotation: its first three columns must be orthonormal and right-handed"),
        (last, "has a last row that is not 0 0 0 1: it is no cam2world"),
    ):
        if not good.all():
            raise UserError(f"the matrix of {names[int(good.argmin())]} {fault}")
    return matrices


def read_lens(
    common: dict[str, Any], frame: dict[str, Any], name: str
) -> tuple[tuple[float, float] | None, list[float]]:
    """Size and lens (see `Poses`) of a frame of a transforms.json."""
    settings = common | frame

    def number(key: str, low: float = 0.0) -> float | None:
        value = settings.get(key)
        if value is not None and not (is_number(value) and value > low):
            raise UserError(f"frame {name}: {key} must be a positive number, got {reprlib.repr(value)}")
        return value

    bent = [key for key in settings if re.fullmatch(r"[kp]\d|skew|distortion(_params)?|is_fisheye|ortho", key)]
    bent = [key for key in bent if np.any(np.array(settings[key], dtype=object) != 0) and settings[key] is not None]
    if bent:
        raise UserError(
            f"frame {name}: the lens is not that of a pinhole camera ({bent[0]} is {reprlib.repr(settings[bent[0]])}): "
            "undistort the images, as by colmap image_undistorter, and convert the poses of those"
        )
    model = settings.get("camera_model") or "PINHOLE"
    if str(model).upper() not in PINHOLE:
        raise UserError(f"frame {name}: camera_model {model} is no pinhole camera: undistort the images")
    size = (number("w"), number("h"))
    lens = []
    for axis, side in zip("xy", size, strict=True):
        keys = f"fl_{axis}", f"camera_angle_{axis}"
        if any(key in frame for key in keys):  # its own lens, however the common one is given
            settings = {key: value for key, value in settings.items() if key not in keys or key in frame}
        pixels, angle, centre = number(keys[0]), number(keys[1]), number(f"c{axis}", -math.inf)
        if side is None and not pixels is centre is None:
            raise UserError(f"frame {name}: fl_x, fl_y, cx, cy are in pixels of an unknown size: add w and h")
        if angle is not None and angle >= math.pi:
            raise UserError(f"frame {name}: {keys[1]} must be below pi (radians), got {angle:g}")
        focal = [] if pixels is None else [pixels / side]
        focal += [] if angle is None else [0.5 / math.tan(angle / 2)]
        if len(focal) == 2 and abs(focal[0] / focal[1] - 1) > EXACT:
            fov = math.degrees(2 * math.atan(0.5 / focal[0]))
            raise UserError(
                f"frame {name}: {keys[0]} gives a field of view of {fov:.4g} degrees, {keys[1]} one of "
                f"{math.degrees(angle):.4g}: remove the wrong one"
            )
        if axis == "x" and not focal:
            raise UserError(f"frame {name} needs camera_angle_x (radians), or fl_x and w (pixels)")
        lens += [focal[0] if focal else math.nan, 0.5 if centre is None else centre / side]
    return (None if None in size else size), lens


def to_angles(cam2world: np.ndarray, yaw_offset: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Yaw, pitch and roll [N, 3] in radians of the camera positions, and what tells how much that loses.

    Args:
        cam2world: [N, 4, 4], camera axes right, up, backward, y up in the world.
        yaw_offset: Degrees that are taken from every yaw: turns the world about its up axis.

    Returns:
        The angles, and [N] each: `distance` from the origin; `aim` and `roll`, the angles (degrees) between the camera
        and one that looks at the origin, upright.
    """
    rotation, position = cam2world[:, :3, :3], cam2world[:, :3, 3]
    distance = np.linalg.norm(position, axis=1)
    outward = position / np.maximum(distance, 1e-30)[:, None]
    pitch = np.arccos(outward[:, 1].clip(-1, 1))
    yaw = np.arctan2(outward[:, 2], outward[:, 0]) - math.radians(yaw_offset)
    yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
    angles = np.stack([yaw, pitch, np.zeros_like(yaw)], axis=1)
    turned = angles + np.array([math.radians(yaw_offset), 0, 0])
    ideal = cam2world_matrix(torch.from_numpy(turned), 1.0).numpy()[:, :3, :3]
    aim = np.arccos((rotation[:, :, 2] * ideal[:, :, 2]).sum(1).clip(-1, 1))
    right = (rotation[:, :, 0] * ideal[:, :, 0]).sum(1)
    up = (rotation[:, :, 0] * ideal[:, :, 1]).sum(1)
    return angles, {
        "distance": distance,
        "aim": np.degrees(aim),
        "roll": np.degrees(np.abs(np.arctan2(up, right))),
    }


def check_cameras(
    poses: Poses, *, axes: str, up: str, yaw_offset: float, tolerance: float, distance_tolerance: float
) -> tuple[np.ndarray, float, str]:
    """The angles [N, 3] in radians, the distance that the cameras share, and what that loses, in words.

    Args:
        axes, up: Of the matrices: of `AXES` and `UP`.
        yaw_offset: See `to_angles`.
        tolerance: Degrees that a camera may look beside the origin, or be rolled by.
        distance_tolerance: Share by which its distance may differ from the median.

    Raises:
        UserError: It loses more than the tolerances allow. The line names the camera, and the axes that would fit.
    """

    def losses(axes: str, up: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return to_angles(UP[up] @ poses.matrices @ AXES[axes], yaw_offset)

    def fits(axes: str, up: str) -> bool:
        _, loss = losses(axes, up)
        return bool(max(loss["aim"].max(), loss["roll"].max()) <= tolerance)

    angles, loss = losses(axes, up)
    distance = loss["distance"]
    if not distance.all():
        raise UserError(f"the camera of {poses.names[int(distance.argmin())]} stands in the origin: leave it out")
    for what, meaning in (("aim", "looks {:.2f} degrees beside the origin"), ("roll", "is rolled by {:.2f} degrees")):
        worst = int(loss[what].argmax())
        if loss[what][worst] > tolerance:
            fix = "centre the scene, or raise the tolerance"
            better = next((pair for pair in itertools.product(AXES, UP) if fits(*pair)), None)
            if better is not None:
                fix = "all fit {} axes in a world with {} up: add --axes {} --up {}".format(*better, *better)
            raise UserError(
                f"the camera of {poses.names[worst]} {meaning.format(loss[what][worst])}, which is beyond --tolerance "
                f"{tolerance:g} degrees: {fix}"
            )
    radius = float(np.median(distance))
    spread = np.abs(distance / radius - 1)
    worst = int(spread.argmax())
    if spread[worst] > distance_tolerance:
        raise UserError(
            f"the camera of {poses.names[worst]} is {distance[worst]:.4g} from the origin, that of most {radius:.4g}: "
            f"all must share one to within --distance-tolerance {distance_tolerance:g}: leave it out, or raise that"
        )
    words = (
        f"distance {radius:.4g} (up to {spread.max():.2%} off), aim up to {loss['aim'].max():.2f} degrees beside the "
        f"origin, roll up to {loss['roll'].max():.2f} degrees"
    )
    return angles, radius, words


def square_views(
    poses: Poses, sizes: Sequence[tuple[float, float] | None], crop: bool
) -> tuple[list[Box | None], float]:
    """What to cut from every image so that all have one square field of view around the centre, and that (degrees).

    Args:
        sizes: Width and height of the images; where they are not known, those that the lenses are meant for count.

    Raises:
        UserError: Something must be cut, and `crop` does not allow it, or nothing is left.
    """
    fx, cx, fy, cy = poses.lenses.T
    width, height = np.array([size or meant or (1, 1) for size, meant in zip(sizes, poses.sizes, strict=True)]).T
    for name, size, meant in zip(poses.names, sizes, poses.sizes, strict=True):
        if size and meant and abs(size[0] * meant[1] / (size[1] * meant[0]) - 1) > 0.02:
            raise UserError(
                f"the image of {name} is {size[0]}x{size[1]}, its lens is for {meant[0]:g}x{meant[1]:g}: "
                "give the images that the poses were made for"
            )
    fx, cx, cy = fx * width, cx * width, cy * height
    fy = np.where(np.isnan(fy), fx, fy * height)
    if crop:
        reach = np.minimum.reduce([cx / fx, (width - cx) / fx, cy / fy, (height - cy) / fy])
        half = float(reach.min())
        if half <= 0:
            raise UserError(f"the principal point of {poses.names[int(reach.argmin())]} lies outside of its image")
        edges = np.stack([cx - half * fx, cy - half * fy, cx + half * fx, cy + half * fy], axis=1)
        return [tuple(box) for box in edges.round(6).tolist()], math.degrees(2 * math.atan(half))
    half = 0.5 * width / fx
    usual = float(np.median(half))
    faults = (
        (width != height, "is {w:g}x{h:g}, not square"),
        (np.maximum(abs(cx / width - 0.5), abs(cy / height - 0.5)) > EXACT, "has its principal point off the centre"),
        (abs(fx / fy - 1) > EXACT, "has pixels that are not square: fl_x is {r:.5g} fl_y"),
        (abs(half / usual - 1) > EXACT, "has a field of view of {a:.5g} degrees, not the {b:.5g} of most"),
    )
    for wrong, words in faults:
        if wrong.any():
            n = int(wrong.argmax())
            a, b = (math.degrees(2 * math.atan(x)) for x in (half[n], usual))
            what = words.format(w=width[n], h=height[n], r=fx[n] / fy[n], a=a, b=b)
            raise UserError(f"the image of {poses.names[n]} {what}: add --crop, which cuts all to one square view")
    return [None] * len(half), math.degrees(2 * math.atan(usual))


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
