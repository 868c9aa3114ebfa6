"""The data report and its plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from checks import assert_close
from command_lines import run_tool
from epigraf_fast.camera import frustum_extent
from epigraf_fast.config import CameraConfig, preset
from epigraf_fast.tools import check_data


def test_report_and_plot(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x" / "poses.png"
    run_tool(check_data, tiny_data, "--check-labels", "--plot", out)
    printed = capsys.readouterr().out
    assert "24 images of 16x16, 48 with the mirrored, all readable" in printed
    assert "labels: 3 classes, 8 to 8 images each" in printed
    assert "camera (stored in the set): fov 30" in printed
    assert "warning" not in printed
    with PIL.Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 1000
    # Three kinds of marks: cameras and histograms in blue, the frustum in red, poses in the colour map.
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)
    assert red[:, pixels.shape[1] // 2 :].sum() > 100


def test_the_numbers_are_those_of_the_set(
    tmp_path: Path, write_data: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(files: dict, metadata: dict) -> None:
        metadata["camera_angles"] = {name: [1.0 + 0.01 * (i % 2), 1.5, 0.0] for i, name in enumerate(files)}
        del metadata["camera"]

    run_tool(check_data, write_data(tmp_path / "x.zip", edit=edit), "--preset", "plants")
    printed = capsys.readouterr().out
    assert "yaw: 1.000 to 1.010, mean 1.005" in printed
    assert "pitch: 1.500 to 1.500" in printed
    run_tool(check_data, tmp_path / "x.zip", "--preset", "plants", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["resolution"], found["camera"]["from"]) == (24, 16, "preset")
    assert found["yaw"] == pytest.approx({"min": 1.0, "max": 1.01, "mean": 1.005, "std": 0.0051}, rel=1e-2)
    assert any("not centred" in warning for warning in found["warnings"])
    assert "camera (of the preset): fov 30, radius 1, rays 0.75 to 1.25" in printed
    assert "warning: the yaws are not centred at zero (mean 1.00" in printed


def test_classes_without_images_and_poses_without_an_image_are_named(
    tmp_path: Path, write_data: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(files: dict, metadata: dict) -> None:
        metadata["labels"] = [[name, 1 + number % 2] for number, (name, _) in enumerate(metadata["labels"])]
        metadata["camera_angles"] |= {"gone/x.png": [1.0, 1.5, 0.0]}

    run_tool(check_data, write_data(tmp_path / "x.zip", edit=edit), "--check-labels")
    printed = capsys.readouterr().out
    assert "labels: 2 classes, 12 to 12 images each" in printed
    assert "warning: classes without an image, which are never drawn: 1 of 3: 0\n" in printed
    assert 'warning: names in "camera_angles" without an image: 1, first gone/x.png' in printed


def test_labels_that_are_vectors(
    tmp_path: Path, write_data: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(files: dict, metadata: dict) -> None:
        metadata["labels"] = [[name, [number, 0.5]] for number, (name, _) in enumerate(metadata["labels"])]

    run_tool(check_data, write_data(tmp_path / "x.zip", edit=edit), "--check-labels")
    assert "labels: vectors of 2 numbers" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_of_a_prior(suffix: str, tiny_data: Path, tmp_path: Path) -> None:
    """Presets that draw cameras from a formula show it; the random state stays."""
    before = torch.get_rng_state()
    run_tool(check_data, tiny_data, "--preset", "food", "--plot", tmp_path / f"x{suffix}")
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / f"x{suffix}").stat().st_size > 10_000


def test_frustum_lines_reach_as_far_as_the_check_says() -> None:
    camera = CameraConfig(**{k: getattr(preset("plants").camera, k) for k in ("fov", "radius", "ray_start", "ray_end")})
    lines = check_data.frustum_lines(camera, torch.tensor([0.4, 1.0, 0.0]))
    assert lines.shape == (12, 2, 3)
    reach = torch.from_numpy(np.linalg.norm(lines, axis=-1).max(keepdims=True))
    expected = frustum_extent(camera.fov, camera.radius, camera.ray_start, camera.ray_end)
    assert_close(reach.flatten(), torch.tensor([expected]), "reach")
    sides = np.linalg.norm(lines[:, 0] - lines[:, 1], axis=-1)
    np.testing.assert_allclose(sides[8:], camera.ray_end - camera.ray_start, rtol=1e-5)
    width = math.sin(math.atan(math.sqrt(2) * math.tan(math.radians(15)))) * math.sqrt(2)
    np.testing.assert_allclose(sides[:4], camera.ray_start * width, rtol=1e-5)


def test_faults_are_one_line(tiny_data: Path, tmp_path: Path, one_error_line: Callable[..., str]) -> None:
    assert "there is no such data set" in one_error_line(check_data, tmp_path / "none.zip")
    assert "--plot must end in" in one_error_line(check_data, tiny_data, "--plot", tmp_path / "x.txt")
    assert "resolution 32 was asked for" in one_error_line(check_data, tiny_data, "--resolution", 32)
    folder = tmp_path / "broken"
    folder.mkdir()
    PIL.Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    angles = {name: [0.3, 1.2, 0.0] for name in ("a.png", "b.png")}
    (folder / "dataset.json").write_text(json.dumps({"camera_angles": angles}))
    assert "b.png cannot be read" in one_error_line(check_data, folder)
