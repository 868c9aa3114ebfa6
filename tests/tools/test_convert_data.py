"""Poses of EG3D and NeRF-synthetic become ours and come back; pictures and poses agree."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix, frustum_extent
from epigraf_fast.data import ImageDataset
from epigraf_fast.tools import convert_data
from epigraf_fast.tools.poses import border_fov, to_angles

FOCAL = 4.2647  # of EG3D's FFHQ labels


def eg3d_label(eye: tuple[float, float, float], focal: float = FOCAL) -> list[float]:
    """25 numbers of a camera that looks at the origin: axes right, down, forward, y up, from first principles."""
    eye = np.array(eye, np.float64)
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    assert down[1] < 0
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, down, forward, eye], axis=1)
    return [*matrix.flatten().tolist(), focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1]


def run(*arguments: object) -> None:
    run_tool(convert_data, *arguments)


def images(folder: Path, names: list[str], size: int, alpha: bool = False) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size, size, 4 if alpha else 3), 40 * number + 10, np.uint8)
        if alpha:
            pixels[..., 3] = np.where(np.arange(size) < size // 2, 0, 255)[:, None]
        PIL.Image.fromarray(pixels).save(folder / name)


EYES = [(0.0, 0.0, 2.7), (0.5, 0.0, 2.653), (0.0, 0.6, 2.632), (-0.7, -0.4, 2.577)]


@pytest.fixture
def eg3d(tmp_path: Path) -> Path:
    """A folder as EG3D has it."""
    folder = tmp_path / "eg3d"
    names = [f"00/{number}.png" for number in range(len(EYES))]
    images(folder, names, 16)
    labels = [[name, eg3d_label(eye)] for name, eye in zip(names, EYES, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_from_eg3d(eg3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Faces look along +z there and along +x here; the image's right stays right."""
    run("from-eg3d", eg3d, "--out", tmp_path / "ours.zip", "--ray-start", 2.25, "--ray-end", 3.3)
    printed = capsys.readouterr().out
    assert "4 cameras: distance 2.7 " in printed
    assert "aim up to 0.00 degrees" in printed
    dataset = ImageDataset(tmp_path / "ours.zip", 16, mirror=False)
    dataset.check_images()
    pitches = [math.acos(eye[1] / np.linalg.norm(eye)) for eye in EYES]
    yaws = [math.atan2(eye[2], eye[0]) - math.pi / 2 for eye in EYES]
    np.testing.assert_allclose(dataset.angles[:, 0], yaws, atol=1e-6)
    np.testing.assert_allclose(dataset.angles[:, 1], pitches, atol=1e-6)
    assert dataset.angles[1, 0] < 0  # towards +x there is towards +z -> -z here
    # The same camera, with the world turned by 90 degrees about y: +z there is +x here.
    turn = np.array([[0, 0, 1.0], [0, 1, 0], [-1, 0, 0]])
    for angles, eye in zip(dataset.angles.double(), EYES, strict=True):
        ours = cam2world_matrix(angles[None], 2.7)[0].numpy()
        theirs = np.array(eg3d_label(eye)[:16]).reshape(4, 4)
        np.testing.assert_allclose(ours[:3, 3], turn @ theirs[:3, 3], atol=2e-3)
        np.testing.assert_allclose(ours[:3, 0], turn @ theirs[:3, 0], atol=1e-6)  # right
        np.testing.assert_allclose(ours[:3, 1], -turn @ theirs[:3, 1], atol=1e-6)  # up
    # The outermost pixel centres lie half a pixel inside the borders, as in the rendering tool.
    assert border_fov(dataset.camera["fov"], 16) == pytest.approx(math.degrees(2 * math.atan(0.5 / FOCAL)), abs=1e-4)
    values = {key: dataset.camera[key] for key in ("fov", "radius", "ray_start", "ray_end")}
    assert 0 <= dataset.camera["cube_scale"] - frustum_extent(**values) < 2e-4


@pytest.mark.parametrize("container", ["zip", "json"])
def test_eg3d_and_back(eg3d: Path, tmp_path: Path, container: str) -> None:
    ours = tmp_path / f"ours.{container}"
    if container == "json":
        ours = eg3d / "ours.json"
    run("from-eg3d", eg3d, "--out", ours, "--ray-start", 2.25, "--ray-end", 3.3)
    run("to-eg3d", ours, "--out", tmp_path / "back.json")
    original = json.loads((eg3d / "dataset.json").read_text())["labels"]
    back = json.loads((tmp_path / "back.json").read_text())["labels"]
    assert [name for name, _ in back] == [name for name, _ in original]
    for (_, a), (_, b) in zip(original, back, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-3)  # the distances differ by rounding
        np.testing.assert_allclose(np.array(a)[[0, 1, 2, 4, 5, 6, 8, 9, 10]], np.array(b)[[0, 1, 2, 4, 5, 6, 8, 9, 10]],
                                   atol=1e-6)  # fmt: skip
        np.testing.assert_allclose(a[16:], b[16:], atol=1e-5)


def transforms(angles: np.ndarray, radius: float = 4.03) -> dict[str, Any]:
    """A transforms.json from first principles: z up, axes right, up, backward."""
    frames = []
    for number, (yaw, pitch) in enumerate(angles):
        outward = np.array([math.sin(pitch) * math.cos(yaw), -math.sin(pitch) * math.sin(yaw), math.cos(pitch)])
        right = np.cross([0, 0, 1.0], outward)
        right /= np.linalg.norm(right)
        matrix = np.eye(4)
        matrix[:3] = np.stack([right, np.cross(outward, right), outward, radius * outward], axis=1)
        frames.append({"file_path": f"./train/r_{number}", "rotation": 0.01, "transform_matrix": matrix.tolist()})
    return {"camera_angle_x": 0.6911, "frames": frames}


ANGLES = np.array([[0.1, 0.4], [-2.0, 1.2], [3.0, 1.5]])


@pytest.fixture
def nerf(tmp_path: Path) -> Path:
    folder = tmp_path / "lego"
    images(folder, [f"train/r_{number}.png" for number in range(len(ANGLES))], 20, alpha=True)
    (folder / "transforms_train.json").write_text(json.dumps(transforms(ANGLES)))
    return folder / "transforms_train.json"


def test_from_nerf_and_back(nerf: Path, tmp_path: Path) -> None:
    run("from-nerf", nerf, "--out", tmp_path / "lego.zip", "--resolution", 8, "--ray-start", 2, "--ray-end", 6)
    dataset = ImageDataset(tmp_path / "lego.zip", 8, mirror=False)
    dataset.check_images()
    np.testing.assert_allclose(dataset.angles[:, :2], ANGLES, atol=1e-6)
    assert dataset.camera["radius"] == pytest.approx(4.03)
    picture = dataset[2][0]
    assert (picture[:, :4] == 255).all()  # transparent: white
    assert (picture[:, 4:] == 90).all()
    run("to-nerf", tmp_path / "lego.zip", "--out", tmp_path / "back.json")
    back, original = json.loads((tmp_path / "back.json").read_text()), transforms(ANGLES)
    assert back["camera_angle_x"] == pytest.approx(original["camera_angle_x"], abs=1e-6)
    for a, b in zip(original["frames"], back["frames"], strict=True):
        np.testing.assert_allclose(a["transform_matrix"], b["transform_matrix"], atol=1e-5)
        assert Path(a["file_path"]) == Path(b["file_path"])


def test_what_gets_lost_is_measured() -> None:
    """A camera turned by 3 degrees aside, one rolled by 5, one 10 percent farther away."""
    matrices = cam2world_matrix(torch.tensor([[0.3, 1.2, 0]] * 3, dtype=torch.float64), 2.0).numpy()

    def rotation(degrees: float, axes: tuple[int, int]) -> np.ndarray:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = np.eye(3)
        matrix[np.ix_(axes, axes)] = [[c, -s], [s, c]]
        return matrix

    matrices[0, :3, :3] = matrices[0, :3, :3] @ rotation(3, (0, 2))
    matrices[1, :3, :3] = matrices[1, :3, :3] @ rotation(5, (0, 1))
    matrices[2, :3, 3] *= 1.1
    angles, loss = to_angles(matrices, 0.0)
    np.testing.assert_allclose(angles, [[0.3, 1.2, 0]] * 3, atol=1e-12)
    np.testing.assert_allclose(loss["distance"], [2, 2, 2.2])
    np.testing.assert_allclose(loss["aim"], [3, 0, 0], atol=1e-5)
    np.testing.assert_allclose(loss["roll"], [0, 5, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.pop("labels"), '"labels" must be'),
        (lambda m: m["labels"][0][1].pop(), '"labels" must be'),
        (lambda m: m["labels"][0][1].__setitem__(0, 3.0), "has no rotation"),
        (lambda m: m["labels"][0][1].__setitem__(16, 0.0), "focal length"),
        (lambda m: m["labels"][0][1].__setitem__(3, math.inf), "not finite"),
        (lambda m: m["labels"][0][1].__setitem__(3, 2.0), "beyond --tolerance 10 degrees"),
    ],
)
def test_wrong_labels_are_one_line(
    spoil: Callable[[Any], object], words: str, eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    metadata = json.loads((eg3d / "dataset.json").read_text())
    spoil(metadata)
    (eg3d / "dataset.json").write_text(json.dumps(metadata))
    assert words in one_error_line(convert_data, "from-eg3d", eg3d, "--out", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_wrong_arguments_are_one_line(
    eg3d: Path, nerf: Path, tmp_path: Path, one_error_line: Callable[..., str], tiny_data: Path
) -> None:
    def fault(*arguments: object) -> str:
        return one_error_line(convert_data, *arguments)

    assert "there is no" in fault("from-nerf", tmp_path / "none.json", "--out", tmp_path / "x.zip")
    assert "must end in .json or .zip" in fault("from-nerf", nerf, "--out", tmp_path / "x.tar")
    assert "camera_angle_x" in fault("from-nerf", eg3d, "--out", tmp_path / "x.zip")
    assert "has no dataset.json: give the .json" in fault("from-eg3d", nerf.parent, "--out", tmp_path / "x.zip")
    assert "--ray-end must be" in fault(
        "from-nerf", nerf, "--out", tmp_path / "x.zip", "--ray-start", 2, "--ray-end", 1
    )
    assert '"camera_angles"' in fault("to-eg3d", eg3d, "--out", tmp_path / "x.json")
    run("from-nerf", nerf, "--out", tmp_path / "poses.json")
    assert "give --fov and --radius" in fault("to-nerf", tmp_path / "poses.json", "--out", tmp_path / "x.json")
    assert "give their --resolution" in fault(
        "to-nerf", tmp_path / "poses.json", "--out", tmp_path / "x.json", "--fov", 30, "--radius", 1
    )
    (nerf.parent / "train" / "r_1.png").write_bytes(b"nothing")
    assert "image train/r_1.png cannot be read" in fault("from-nerf", nerf, "--out", tmp_path / "x.zip")
    (tmp_path / "x.bin").write_bytes(b"no zip")
    assert "is not a folder and not a readable zip" in fault(
        "from-eg3d", tmp_path / "x.bin", "--out", tmp_path / "x.zip"
    )
    assert not list(tmp_path.glob("x.zip*"))
    with zipfile.ZipFile(tiny_data) as archive:
        assert "camera_angles" in json.loads(archive.read("dataset.json"))


# Lenses


def edited(nerf: Path, edit: Callable[[dict[str, Any]], object], angles: np.ndarray = ANGLES) -> Path:
    """The .json, written anew with other cameras and then edited."""
    metadata = transforms(angles)
    edit(metadata)
    nerf.write_text(json.dumps(metadata))
    return nerf


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """[H, W, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def replace_images(nerf: Path, size: tuple[int, int]) -> list[np.ndarray]:
    pictures = [noise(size, seed) for seed in range(len(ANGLES))]
    for number, pixels in enumerate(pictures):
        PIL.Image.fromarray(pixels).save(nerf.parent / f"train/r_{number}.png")
    return pictures


def fov_of(out: Path, resolution: int) -> float:
    """Degrees between the borders, of the camera that was stored."""
    return border_fov(ImageDataset(out, resolution).camera["fov"], resolution)


RAYS = ("--ray-start", 2, "--ray-end", 6)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(fl_x=40.0, w=20) or m.pop("camera_angle_x"),
        lambda m: m.update(fl_x=40.0, fl_y=40.0, w=20, h=20, cx=10.0, cy=10.0, k1=0, p2=0.0) or m.pop("camera_angle_x"),
        lambda m: m.update(fl_x=400.0, w=200, camera_angle_x=2 * math.atan(0.25)),  # of larger images
        lambda m: [frame.update(fl_x=40.0, w=20) for frame in m["frames"]],  # each frame's goes before the common angle
        lambda m: m.update(camera_angle_x=2 * math.atan(0.25), camera_angle_y=2 * math.atan(0.25)),
        lambda m: m.update(camera_angle_x=2 * math.atan(0.25), camera_model="OPENCV", distortion_params=[0, 0.0]),
        lambda m: [f.update(camera_angle_x=2 * math.atan(0.25)) for f in m["frames"]] and m.update(fl_x=1.0, w=20),
    ],
)
def test_focal_lengths_in_pixels(nerf: Path, tmp_path: Path, edit: Callable[[dict], object]) -> None:
    """tan(fov / 2) = (w / 2) / fl_x = 1/4, however it is told."""
    run("from-nerf", edited(nerf, edit), "--out", tmp_path / "x.zip", "--resolution", 8, *RAYS)
    assert fov_of(tmp_path / "x.zip", 8) == pytest.approx(math.degrees(2 * math.atan(0.25)), abs=1e-4)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["frames"][1].update(k1=0.01), ("r_1", "k1 is 0.01", "undistort")),
        (lambda m: m.update(p2=-1e-5), ("r_0", "p2 is -1e-05", "undistort")),
        (lambda m: m.update(distortion_params=[0, 0.1, 0]), ("r_0", "distortion_params", "undistort")),
        (lambda m: m.update(is_fisheye=True), ("is_fisheye is True", "undistort")),
        (lambda m: m["frames"][2].update(camera_model="OPENCV_FISHEYE"), ("r_2", "camera_model OPENCV_FISHEYE")),
        (lambda m: m.update(fl_x=40.0, w=20), ("r_0", "fl_x", "28.07", "camera_angle_x", "39.6")),
        (lambda m: m.update(fl_x=27.8), ("r_0", "add w and h")),
        (lambda m: m.update(cx=10), ("r_0", "add w and h")),
        (lambda m: m.pop("camera_angle_x"), ("r_0", "needs camera_angle_x (radians), or fl_x and w")),
        (lambda m: m.update(camera_angle_x=39.6), ("camera_angle_x", "below pi")),
        (lambda m: m.update(camera_angle_x="0.69"), ("camera_angle_x must be a positive number, got '0.69'",)),
        (lambda m: m.update(camera_angle_x=10**400), ("camera_angle_x must be a positive number",)),
        (lambda m: m["frames"][1].update(w=-20), ("r_1", "w must be a positive number, got -20")),
        (lambda m: m.update(w=20, h=20, cx=12, cy=10), ("r_0", "principal point off the centre", "--crop")),
        (lambda m: m["frames"][1].update(w=20, h=20, cx=10, cy=9.5), ("r_1", "principal point", "--crop")),
        (lambda m: m.update(w=20, h=20, fl_y=30.0), ("r_0", "not square: fl_x is 0.92", "--crop")),
        (lambda m: m["frames"][2].update(camera_angle_x=0.8), ("r_2", "45.837 degrees, not the 39.597", "--crop")),
        (lambda m: m.update(w=30, h=20), ("r_0 is 20x20", "30x20")),
        (lambda m: m["frames"][1].pop("file_path"), ("frame 1 has no file_path",)),
        (lambda m: m["frames"][1].pop("transform_matrix"), ("r_1 must be 3 or 4 rows",)),
        (lambda m: m["frames"][1].update(transform_matrix=[[1, 2], [3]]), ("r_1 must be 3 or 4 rows",)),
        (lambda m: m["frames"][1]["transform_matrix"][3].__setitem__(3, 2.0), ("r_1", "no cam2world")),
        (lambda m: m["frames"][1]["transform_matrix"][0].__setitem__(3, math.nan), ("r_1", "finite")),
        (lambda m: [r.__setitem__(0, -r[0]) for r in m["frames"][1]["transform_matrix"]], ("r_1", "right-handed")),
        (lambda m: m.update(frames={}), ("needs frames",)),
        (lambda m: m["frames"][1].update(file_path="../r_1"), ("../r_1", "leaves")),
        (lambda m: m["frames"][1].update(file_path="train/r_0.png"), ("./train/r_0 and train/r_0.png", "same image")),
    ],
)  # fmt: skip
def test_lenses_that_ours_is_not_are_refused(
    nerf: Path, tmp_path: Path, edit: Callable[[dict], object], words: tuple[str, ...],
    one_error_line: Callable[..., str],
) -> None:  # fmt: skip
    """By the name of the frame, where one is meant."""
    message = one_error_line(convert_data, "from-nerf", edited(nerf, edit), "--out", tmp_path / "x.zip", *RAYS)
    assert str(nerf) in message
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("x.zip*"))


def test_images_that_are_not_square(nerf: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    """32x16 is not squashed: the middle 16x16 is what --crop leaves, with the field of view of that."""
    pictures = replace_images(nerf, (32, 16))
    arguments = "from-nerf", nerf, "--out", tmp_path / "x.zip", *RAYS
    for more in ((), ("--resolution", 8)):
        assert "image of ./train/r_0 is 32x16, not square: add --crop" in one_error_line(
            convert_data, *arguments, *more
        )
    assert "must be a .zip" in one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "x.json", "--crop")
    run(*arguments, "--crop")
    dataset = ImageDataset(tmp_path / "x.zip", 16, mirror=False)
    for number, pixels in enumerate(pictures):
        np.testing.assert_array_equal(dataset[number][0].permute(1, 2, 0), pixels[:, 8:24])
    half = math.tan(0.6911 / 2) / 2  # of the width that is left
    assert fov_of(tmp_path / "x.zip", 16) == pytest.approx(math.degrees(2 * math.atan(half)), abs=1e-4)


def test_a_principal_point_off_the_centre_is_cut_around(nerf: Path, tmp_path: Path) -> None:
    """Of 32x16 with the point at (20, 9), what lies 7 pixels around it: to the bottom, the nearest border."""
    pictures = replace_images(nerf, (32, 16))
    edited(nerf, lambda m: m.update(fl_x=40.0, w=32, h=16, cx=20.0, cy=9.0) or m.pop("camera_angle_x"))
    run("from-nerf", nerf, "--out", tmp_path / "x.zip", *RAYS, "--crop", "--resolution", 16)
    run("from-nerf", nerf, "--out", tmp_path / "y.zip", "--crop")
    with zipfile.ZipFile(tmp_path / "y.zip") as archive, archive.open("train/r_0.png") as file:
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), pictures[0][2:16, 13:27])
    expected = PIL.Image.fromarray(pictures[0][2:16, 13:27]).resize((16, 16), PIL.Image.Resampling.BOX)
    dataset = ImageDataset(tmp_path / "x.zip", 16, mirror=False)
    np.testing.assert_array_equal(dataset[0][0].permute(1, 2, 0), np.asarray(expected))
    assert fov_of(tmp_path / "x.zip", 16) == pytest.approx(math.degrees(2 * math.atan(7 / 40)), abs=1e-4)


def test_lenses_that_differ_by_frame_are_cut_to_the_narrowest(
    nerf: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    """A step from grey to white at one angle lies at one place in all images; pixels that are not square become so."""
    size, focal = 40, ((80.0, 80.0), (50.0, 50.0), (100.0, 60.0))
    for number, (fx, fy) in enumerate(focal):
        x, y = (np.arange(size) + 0.5 - size / 2) / fx, (np.arange(size) + 0.5 - size / 2) / fy
        pixels = np.where((x[None, :] > 0.1) | (y[:, None] > 0.1), 255, 90).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(nerf.parent / f"train/r_{number}.png")

    def edit(metadata: dict) -> None:
        del metadata["camera_angle_x"]
        for frame, (fx, fy) in zip(metadata["frames"], focal, strict=True):
            frame.update(fl_x=fx, fl_y=fy, w=size, h=size)

    arguments = "from-nerf", edited(nerf, edit), "--out", tmp_path / "x.zip", "--crop"
    assert "give a --resolution" in one_error_line(convert_data, *arguments)
    run(*arguments, "--resolution", 8, *RAYS)
    half = 20 / 100  # the smallest
    assert fov_of(tmp_path / "x.zip", 8) == pytest.approx(math.degrees(2 * math.atan(half)), abs=1e-4)
    dataset = ImageDataset(tmp_path / "x.zip", 8, mirror=False)
    expected = np.full((8, 8), 90)
    expected[6:], expected[:, 6:] = 255, 255  # 0.1 of 0.2 to either side: three quarters
    for number in range(3):
        image = dataset[number][0][0].numpy().astype(int)
        assert np.abs(image - expected).max() <= 83, number  # half of a step in the mixed pixels at most
        np.testing.assert_array_equal(image[:5, :5], 90)
        np.testing.assert_array_equal(image[7:], 255)


def test_eg3d_intrinsics_are_looked_at(eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    def spoil(*changes: tuple[int, float]) -> str:
        metadata = json.loads((eg3d / "dataset.json").read_text())
        for place, value in changes:
            metadata["labels"][2][1][place] = value
        path = eg3d / "spoilt.json"
        path.write_text(json.dumps(metadata))
        return one_error_line(convert_data, "from-eg3d", path, "--out", tmp_path / "x.zip")

    assert "00/2.png has its principal point off the centre" in spoil((18, 0.6))
    assert "00/2.png has pixels that are not square" in spoil((20, 4.0))
    assert "00/2.png has a field of view of 14.25 degrees, not the 13.37" in spoil((16, 4.0), (20, 4.0))
    assert "00/2.png are no intrinsics" in spoil((17, 0.1))
    assert "00/2.png are no intrinsics" in spoil((24, 0.0))
    assert "focal length of 00/2.png" in spoil((20, -4.0))


# Poses


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("axes", ["opengl", "opencv"])
@pytest.mark.parametrize("up", ["y", "z"])
def test_axes_and_worlds_of_every_kind(
    nerf: Path, tmp_path: Path, rows: int, axes: str, up: str, one_error_line: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Told, they are read; not told, the line says which they look like."""

    def edit(metadata: dict) -> None:
        for frame in metadata["frames"]:
            matrix = np.array(frame["transform_matrix"])
            if up == "y":
                matrix = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]) @ matrix
            if axes == "opencv":
                matrix = matrix @ np.diag([1.0, -1, -1, 1])
            frame["transform_matrix"] = matrix[:rows].tolist()

    edited(nerf, edit)
    run("from-nerf", nerf, "--out", tmp_path / "x.json", "--axes", axes, "--up", up)
    angles = json.loads((tmp_path / "x.json").read_text())["camera_angles"]
    np.testing.assert_allclose(np.array(list(angles.values()))[:, :2], ANGLES, atol=1e-6)
    if (axes, up) != ("opengl", "z"):
        message = one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "y.json")
        assert f"add --axes {axes} --up {up}" in message
        assert "train/r_" in message
        assert not (tmp_path / "y.json").exists()


def test_an_eg3d_set_with_z_up(eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    metadata = json.loads((eg3d / "dataset.json").read_text())
    for _, label in metadata["labels"]:
        matrix = np.array(label[:16]).reshape(4, 4)
        label[:16] = (np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]) @ matrix).flatten().tolist()
    (eg3d / "z.json").write_text(json.dumps(metadata))
    assert "--axes opencv --up z" in one_error_line(
        convert_data, "from-eg3d", eg3d / "z.json", "--out", tmp_path / "x.json"
    )
    for name, more in (("dataset", ()), ("z", ("--up", "z"))):
        run("from-eg3d", eg3d / f"{name}.json", "--out", tmp_path / f"{name}.json", *more)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["camera_angles"] for name in ("dataset", "z"))
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-6)


def test_distances_that_differ_are_refused_by_name(
    nerf: Path, tmp_path: Path, one_error_line: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(metadata: dict) -> None:
        for row in metadata["frames"][1]["transform_matrix"][:3]:
            row[3] *= 1.05

    edited(nerf, edit)
    message = one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "x.json")
    assert "camera of ./train/r_1 is 4.232 from the origin, that of most 4.03" in message
    assert "--distance-tolerance 0.01" in message
    run("from-nerf", nerf, "--out", tmp_path / "x.json", "--distance-tolerance", 0.06)
    assert "distance 4.03 (up to 5.00% off)" in capsys.readouterr().out
    edited(nerf, lambda m: [row.__setitem__(3, 0.0) for f in m["frames"] for row in f["transform_matrix"][:3]])
    message = one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "y.json")
    assert "camera of ./train/r_0 stands in the origin" in message


def test_the_camera_that_looks_aside_is_named(eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    metadata = json.loads((eg3d / "dataset.json").read_text())
    metadata["labels"][2][1][3] = 1.0  # its position's x
    (eg3d / "dataset.json").write_text(json.dumps(metadata))
    message = one_error_line(convert_data, "from-eg3d", eg3d, "--out", tmp_path / "x.json")
    assert "camera of 00/2.png looks" in message
    assert "centre the scene" in message


# Images


def test_16_bit_grey_stays_grey(nerf: Path, tmp_path: Path) -> None:
    """All over white it became: its upper 8 bits are what is shown."""
    grey = (np.arange(400, dtype=np.uint16) * 160).reshape(20, 20)
    PIL.Image.fromarray(grey).save(nerf.parent / "train/r_0.png")
    run("from-nerf", nerf, "--out", tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive, archive.open("train/r_0.png") as file:
        pixels = np.asarray(PIL.Image.open(file))
    np.testing.assert_array_equal(pixels, np.broadcast_to((grey >> 8)[..., None], (20, 20, 3)))


@pytest.mark.parametrize("mode", ["L", "P", "1", "palette with a hole"])
def test_grey_and_palettes_are_what_they_show(nerf: Path, tmp_path: Path, mode: str) -> None:
    """Copied, or resized from the colours they stand for; a transparent entry is white."""
    pixels = np.kron(np.array([[0, 250], [130, 40]], np.uint8), np.ones((10, 10), np.uint8))
    image = PIL.Image.fromarray(pixels)
    if mode == "palette with a hole":
        image = image.convert("P")
        image.save(nerf.parent / "train/r_0.png", transparency=int(np.asarray(image)[0, 0]))
        expected = np.where(pixels == 0, 255, pixels)
    else:
        image = image.convert(mode)
        image.save(nerf.parent / "train/r_0.png")
        expected = np.asarray(image.convert("L"))
    for out, resolution, more in (("x", 20, ()), ("y", 4, ("--resolution", 4))):
        run("from-nerf", nerf, "--out", tmp_path / f"{out}.zip", *more)
        with zipfile.ZipFile(tmp_path / f"{out}.zip") as archive, archive.open("train/r_0.png") as file:
            found = np.asarray(PIL.Image.open(file).convert("RGB"))
        step = 20 // resolution
        small = expected.reshape(resolution, step, resolution, step).mean(axis=(1, 3))
        np.testing.assert_allclose(found, np.broadcast_to(small[..., None], found.shape), atol=0.5)


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        (PIL.Image.new("CMYK", (20, 20)), "jpeg", "of mode CMYK: save it as 8-bit RGB"),
        (PIL.Image.new("F", (20, 20)), "tiff", "of mode F"),
        ([PIL.Image.new("RGB", (20, 20), color) for color in ("red", "blue")], "png", "an animation of 2 frames"),
    ],
)
@pytest.mark.parametrize("resolution", [(), ("--resolution", 8)])
def test_images_without_one_meaning_are_refused(
    nerf: Path, tmp_path: Path, image: Any, kind: str, words: str, resolution: tuple,
    one_error_line: Callable[..., str],
) -> None:  # fmt: skip
    first, *others = image if isinstance(image, list) else [image]
    more = {"save_all": True, "append_images": others} if others else {}
    first.save(nerf.parent / "train/r_1.png", kind, **more)
    assert f"image train/r_1.png is {words}" in one_error_line(
        convert_data, "from-nerf", nerf, "--out", tmp_path / "x.zip", *resolution
    )
    assert not list(tmp_path.glob("x.zip*"))


@pytest.mark.parametrize("resolution", [(), ("--resolution", 8)])
def test_truncated_images_are_not_passed_on(
    nerf: Path, tmp_path: Path, resolution: tuple, one_error_line: Callable[..., str]
) -> None:
    path = nerf.parent / "train/r_1.png"
    PIL.Image.fromarray(noise((20, 20))).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    message = one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "x.zip", *resolution)
    assert "image train/r_1.png cannot be read (image file is truncated" in message
    assert not list(tmp_path.glob("x.zip*"))


def test_images_become_upright(nerf: Path, tmp_path: Path) -> None:
    """Turned to the right by the camera: what the reader sees is what the converter writes, and what it cuts."""
    pixels = noise((16, 32))
    for number in range(len(ANGLES)):
        image = PIL.Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(nerf.parent / f"train/r_{number}.png", exif=exif)
    edited(nerf, lambda m: m.update(w=32, h=16))
    run("from-nerf", nerf, "--out", tmp_path / "x.zip", "--crop")
    dataset = ImageDataset(tmp_path / "x.zip", 16, mirror=False)
    upright = pixels.transpose(1, 0, 2)[:, ::-1]
    np.testing.assert_array_equal(dataset[0][0].permute(1, 2, 0), upright[:, 8:24])


def test_files_that_fit_are_copied(eg3d: Path, tmp_path: Path) -> None:
    """Byte by byte, with their own suffix; others become PNG and are named so."""
    PIL.Image.fromarray(noise((16, 16))).save(eg3d / "00/0.jpg")
    (eg3d / "00/0.png").unlink()
    pixels = np.dstack([noise((16, 16)), np.full((16, 16), 255, np.uint8)])
    pixels[3, 5, 3] = 0
    PIL.Image.fromarray(pixels).save(eg3d / "00/1.webp", lossless=True)
    (eg3d / "00/1.png").unlink()
    run("from-eg3d", eg3d, "--out", tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert sorted(archive.namelist()) == ["00/0.jpg", "00/1.png", "00/2.png", "00/3.png", "dataset.json"]
        assert archive.read("00/0.jpg") == (eg3d / "00/0.jpg").read_bytes()
        assert archive.read("00/2.png") == (eg3d / "00/2.png").read_bytes()
        assert list(json.loads(archive.read("dataset.json"))["camera_angles"]) == archive.namelist()[:-1]
    pixels[3, 5] = 255
    np.testing.assert_array_equal(ImageDataset(tmp_path / "x.zip", 16)[1][0].permute(1, 2, 0), pixels[..., :3])


def test_our_own_oblong_images_are_not_squashed_either(
    eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    run("from-eg3d", eg3d, "--out", eg3d / "ours.json", "--ray-start", 2.25, "--ray-end", 3.3)
    PIL.Image.fromarray(noise((16, 8))).save(eg3d / "00/1.png")
    arguments = "to-eg3d", eg3d / "ours.json", "--out", tmp_path / "x.zip", "--resolution", 8
    assert "image 00/1.png is 16x8, not square" in one_error_line(convert_data, *arguments)


# Names


def test_names_of_every_spelling(nerf: Path, tmp_path: Path) -> None:
    """Backslashes, other suffixes, none, decomposed letters, a folder that is a link."""
    folder = nerf.parent
    (folder / "train").rename(tmp_path / "disk")
    (folder / "train").symlink_to(tmp_path / "disk")
    (folder / "train/r_0.png").rename(folder / "train/\u00e9.png")

    def edit(metadata: dict) -> None:
        paths = ".\\train\\e\u0301.jpg", "train/r_1.PNG", "./train//r_2"
        for frame, path in zip(metadata["frames"], paths, strict=True):
            frame["file_path"] = path

    run("from-nerf", edited(nerf, edit), "--out", tmp_path / "x.zip", "--resolution", 8)
    dataset = ImageDataset(tmp_path / "x.zip", 8, mirror=False)
    assert dataset.files == ["train/r_1.png", "train/r_2.png", "train/\u00e9.png"]
    np.testing.assert_allclose(dataset.angles[:, :2], ANGLES[[1, 2, 0]], atol=1e-6)


def test_a_renamed_top_folder(nerf: Path, tmp_path: Path) -> None:
    (nerf.parent / "train").rename(nerf.parent / "images")
    run("from-nerf", nerf, "--out", tmp_path / "x.zip", "--resolution", 8)
    assert len(ImageDataset(tmp_path / "x.zip", 8, mirror=False)) == 3


def test_absolute_names(nerf: Path, tmp_path: Path) -> None:
    """As of the machine where the poses were made."""
    edited(nerf, lambda m: [f.update(file_path=f"/data/lego/{f['file_path']}") for f in m["frames"]])
    run("from-nerf", nerf, "--out", tmp_path / "x.zip", "--resolution", 8)
    assert ImageDataset(tmp_path / "x.zip", 8).files == [f"train/r_{number}.png" for number in range(3)]


def test_leftovers_are_counted_and_named(
    nerf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_error_line: Callable[..., str]
) -> None:
    (nerf.parent / "train/r_1.png").rename(nerf.parent / "train/other.png")
    run("from-nerf", nerf, "--out", tmp_path / "x.zip", "--resolution", 8)
    printed = capsys.readouterr().out
    assert "poses without an image: 1, first ./train/r_1" in printed
    assert "images without a pose: 1, first train/other.png" in printed
    np.testing.assert_allclose(ImageDataset(tmp_path / "x.zip", mirror=False).angles[:, :2], ANGLES[[0, 2]], atol=1e-6)
    for number in (0, 2):
        (nerf.parent / f"train/r_{number}.png").unlink()
    message = one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "y.zip")
    assert "an image is train/other.png, a pose ./train/r_0" in message
    (nerf.parent / "train/other.png").unlink()
    assert "holds no image" in one_error_line(convert_data, "from-nerf", nerf, "--out", tmp_path / "y.zip")


@pytest.mark.parametrize("link", ["the file itself", "symlink", "hard link", "linked folder"])
def test_the_source_is_never_overwritten(
    eg3d: Path, tmp_path: Path, link: str, one_error_line: Callable[..., str]
) -> None:
    sources = [eg3d / "dataset.json", tmp_path / "set.zip"]
    with zipfile.ZipFile(sources[1], "w") as archive:
        for file in sorted(eg3d.rglob("*.*")):
            archive.write(file, file.relative_to(eg3d))
    for source in sources:
        before, out = source.read_bytes(), source
        if link == "symlink":
            out = tmp_path / f"out{source.suffix}"
            out.symlink_to(source)
        elif link == "hard link":
            out = tmp_path / f"out{source.suffix}"
            out.hardlink_to(source)
        elif link == "linked folder":
            folder = tmp_path / f"link-{source.suffix[1:]}"
            folder.symlink_to(source.parent)
            out = folder / source.name
        message = one_error_line(convert_data, "from-eg3d", source, "--out", out, "--overwrite")
        assert "is what is read: choose another output" in message
        if source.suffix == ".json":
            one_error_line(convert_data, "from-eg3d", eg3d, "--out", out, "--overwrite")
        assert source.read_bytes() == before
        assert out.samefile(source)


# Archives


def test_damaged_archives_are_one_line(eg3d: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    """Another method, a password, a flipped bit, JSON without an end to its depth: as in the reader."""
    path = tmp_path / "set.zip"

    def pack(method: int = zipfile.ZIP_DEFLATED, metadata: bytes | None = None) -> bytearray:
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in sorted(eg3d.rglob("*.png")):
                archive.write(file, file.relative_to(eg3d))
            archive.writestr("dataset.json", metadata or (eg3d / "dataset.json").read_bytes())
        return bytearray(path.read_bytes())

    def fault() -> str:
        return one_error_line(convert_data, "from-eg3d", path, "--out", tmp_path / "x.zip")

    pack(zipfile.ZIP_LZMA)
    run("from-eg3d", path, "--out", tmp_path / "lzma.zip")
    for offsets, value, words in (
        ((8, 10), 9, "its method is deflate64): repack with Deflate"),
        ((6, 8), 1, "repack with Deflate, without a password"),
    ):
        content = pack()
        local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
        content[local + offsets[0]] = content[central + offsets[1]] = value
        path.write_bytes(content)
        message = fault()
        assert "image 00/0.png cannot be read" in message
        assert words in message
    content = pack()
    content[content.index(b"PK\x01\x02") - 10] ^= 0x55  # near the end of what is packed last
    path.write_bytes(content)
    assert "dataset.json" in fault()
    pack(metadata=b'{"labels": ' + b"[" * 100_000)
    assert "dataset.json is not valid JSON (it is nested too deeply)" in fault()
    path.write_bytes(pack()[:-30])
    assert "not a readable zip" in fault()
    assert not list(tmp_path.glob("x.zip*"))
