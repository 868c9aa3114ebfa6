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

from epigraf_fast import convert_data
from epigraf_fast.camera import cam2world_matrix, frustum_extent
from epigraf_fast.data import ImageDataset
from epigraf_fast.make_dataset import vtk_view_angle

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
    convert_data.main([str(argument) for argument in arguments])


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
    run("from-eg3d", eg3d, tmp_path / "ours.zip", "--ray-start", 2.25, "--ray-end", 3.3)
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
    assert vtk_view_angle(dataset.camera["fov"], 16) == pytest.approx(
        math.degrees(2 * math.atan(0.5 / FOCAL)), abs=1e-4
    )
    values = {key: dataset.camera[key] for key in ("fov", "radius", "ray_start", "ray_end")}
    assert 0 <= dataset.camera["cube_scale"] - frustum_extent(**values) < 2e-4


@pytest.mark.parametrize("container", ["zip", "json"])
def test_eg3d_and_back(eg3d: Path, tmp_path: Path, container: str) -> None:
    ours = tmp_path / f"ours.{container}"
    if container == "json":
        ours = eg3d / "ours.json"
    run("from-eg3d", eg3d, ours, "--ray-start", 2.25, "--ray-end", 3.3)
    run("to-eg3d", ours, tmp_path / "back.json")
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
    run("from-nerf", nerf, tmp_path / "lego.zip", "--resolution", 8, "--ray-start", 2, "--ray-end", 6)
    dataset = ImageDataset(tmp_path / "lego.zip", 8, mirror=False)
    dataset.check_images()
    np.testing.assert_allclose(dataset.angles[:, :2], ANGLES, atol=1e-6)
    assert dataset.camera["radius"] == pytest.approx(4.03)
    picture = dataset[2][0]
    assert (picture[:, :4] == 255).all()  # transparent: white
    assert (picture[:, 4:] == 90).all()
    run("to-nerf", tmp_path / "lego.zip", tmp_path / "back.json")
    back, original = json.loads((tmp_path / "back.json").read_text()), transforms(ANGLES)
    assert back["camera_angle_x"] == pytest.approx(original["camera_angle_x"], abs=1e-6)
    for a, b in zip(original["frames"], back["frames"], strict=True):
        np.testing.assert_allclose(a["transform_matrix"], b["transform_matrix"], atol=1e-5)
        assert Path(a["file_path"]) == Path(b["file_path"])


def test_what_gets_lost_is_measured() -> None:
    """A camera turned by 3 degrees aside, one rolled by 5, one 10 percent farther away."""
    names = ["a", "b", "c"]
    matrices = cam2world_matrix(torch.tensor([[0.3, 1.2, 0]] * 3, dtype=torch.float64), 2.0).numpy()

    def rotation(degrees: float, axes: tuple[int, int]) -> np.ndarray:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = np.eye(3)
        matrix[np.ix_(axes, axes)] = [[c, -s], [s, c]]
        return matrix

    matrices[0, :3, :3] = matrices[0, :3, :3] @ rotation(3, (0, 2))
    matrices[1, :3, :3] = matrices[1, :3, :3] @ rotation(5, (0, 1))
    matrices[2, :3, 3] *= 1.1
    angles, loss = convert_data.to_angles(convert_data.Poses(names, matrices, np.array([30.0, 30, 31])), 0.0)
    np.testing.assert_allclose(angles, [[0.3, 1.2, 0]] * 3, atol=1e-12)
    assert loss == pytest.approx(
        {"radius": 2.0, "radius_spread": 0.1, "aim": 3.0, "roll": 5.0, "fov_spread": 1.0}, abs=0.01
    )


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
    assert words in one_error_line(convert_data.main, "from-eg3d", eg3d, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_wrong_arguments_are_one_line(
    eg3d: Path, nerf: Path, tmp_path: Path, one_error_line: Callable[..., str], tiny_data: Path
) -> None:
    def fault(*arguments: object) -> str:
        return one_error_line(convert_data.main, *arguments)

    assert "there is no" in fault("from-nerf", tmp_path / "none.json", tmp_path / "x.zip")
    assert "must end in .json or .zip" in fault("from-nerf", nerf, tmp_path / "x.tar")
    assert "camera_angle_x" in fault("from-nerf", eg3d, tmp_path / "x.zip")
    assert "cannot be read" in fault("from-eg3d", nerf.parent, tmp_path / "x.zip")
    assert "--ray-end must be" in fault("from-nerf", nerf, tmp_path / "x.zip", "--ray-start", 2, "--ray-end", 1)
    assert '"camera_angles"' in fault("to-eg3d", eg3d, tmp_path / "x.json")
    run("from-nerf", nerf, tmp_path / "poses.json")
    assert "give --fov and --radius" in fault("to-nerf", tmp_path / "poses.json", tmp_path / "x.json")
    assert "give their --resolution" in fault(
        "to-nerf", tmp_path / "poses.json", tmp_path / "x.json", "--fov", 30, "--radius", 1
    )
    for source, target in ((nerf, nerf), (eg3d, eg3d / "dataset.json"), (tiny_data, tiny_data)):
        before = target.read_bytes()
        direction = "from-nerf" if source == nerf else "to-eg3d"
        assert "is the source: choose another name" in fault(direction, source, target, "--overwrite")
        assert target.read_bytes() == before
    (nerf.parent / "train" / "r_1.png").unlink()
    assert "image train/r_1.png cannot be read" in fault("from-nerf", nerf, tmp_path / "x.zip")
    (tmp_path / "x.bin").write_bytes(b"no zip")
    assert "is no .json, no folder and no zip" in fault("from-eg3d", tmp_path / "x.bin", tmp_path / "x.zip")
    assert not list(tmp_path.glob("x.zip*"))
    with zipfile.ZipFile(tiny_data) as archive:
        assert "camera_angles" in json.loads(archive.read("dataset.json"))
