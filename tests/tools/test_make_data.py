"""The rendering tool: its arithmetic, and where a marker lands in its images."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from checks import HANG
from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix, frustum_extent
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import UserError
from epigraf_fast.tools import make_data
from epigraf_fast.tools.make_data import RECIPES
from epigraf_fast.tools.poses import border_fov


def test_a_scaled_recipe_shows_the_same_in_other_units():
    for recipe in RECIPES.values():
        scaled = recipe.scaled(4.0)
        assert scaled.camera() == {k: v if k == "fov" else 4 * v for k, v in recipe.camera().items()}
        sides, sphere_radius = np.array([1.0, 2.0, 4.0]), 2.5
        factor = make_data.scale_for(recipe, sides, sphere_radius)
        assert make_data.scale_for(scaled, sides, sphere_radius) == pytest.approx(4 * factor)
        assert (scaled.min_box_volume, scaled.unit) == (recipe.min_box_volume, 4)  # of the box in the recipe's units


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_keeps_its_frustum_in_the_cube_and_its_sphere_in_sight(name):
    recipe = RECIPES[name]
    extent = frustum_extent(recipe.fov, recipe.radius, recipe.ray_start, recipe.ray_end)
    assert 0.95 * recipe.cube_scale < extent <= recipe.cube_scale
    visible = recipe.radius * math.sin(math.radians(recipe.fov) / 2)
    sphere_radius = recipe.sphere_radius or visible
    assert 0.9 * visible < sphere_radius <= visible
    assert recipe.ray_start <= recipe.radius - sphere_radius
    assert recipe.radius + sphere_radius <= recipe.ray_end


def test_view_angle_puts_fov_on_pixel_centres():
    half = math.radians(border_fov(30, 64)) / 2
    # The outermost centres lie half a pixel, 1/64 of the half width, inside VTK's frustum.
    assert math.tan(half) * (1 - 1 / 64) == pytest.approx(math.tan(math.radians(15)))


def test_downsample_averages_blocks():
    image = np.zeros((4, 6, 3), np.uint8)
    image[0, 0] = 255, 100, 8
    small = make_data.downsample(image, 2)
    assert small.shape == (2, 3, 3)
    assert small[0, 0].tolist() == [64, 25, 2]
    assert not small[1:].any()
    assert not small[:, 1:].any()


def test_bounds_and_scale():
    points = np.array([[1, 0, 0], [3, 0, 0], [2, 4, 0], [2, 0, 1.0]])
    centre, sides, sphere_radius = make_data.bounds(points)
    assert centre.tolist() == [2, 2, 0.5]
    assert sides.tolist() == [2, 4, 1]
    assert sphere_radius == pytest.approx(math.sqrt(1 + 4 + 0.25))
    assert make_data.scale_for(RECIPES["megascans"], sides, sphere_radius) == 0.5
    assert make_data.scale_for(RECIPES["builtin"], sides, sphere_radius) * sphere_radius == pytest.approx(1.95)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_subfolders_become_classes(tmp_path):
    meshes, classes = make_data.folder_meshes(touch(tmp_path, "pear/1/x.obj", "fig/y.PLY", "fig/y.txt", "pear/2.glb"))
    assert classes == ["fig", "pear"]
    assert [(mesh.name, mesh.label) for mesh in meshes] == [("fig/y", 0), ("pear/1/x", 1), ("pear/2", 1)]


def test_flat_folder_has_no_classes(tmp_path):
    meshes, classes = make_data.folder_meshes(touch(tmp_path, "b.stl", "a.gltf"))
    assert classes == []
    assert [(mesh.name, mesh.label) for mesh in meshes] == [("a", None), ("b", None)]


def test_meshes_in_linked_folders(tmp_path):
    touch(tmp_path / "disk", "x.obj")
    touch(tmp_path / "meshes", "fig/y.ply")
    (tmp_path / "meshes/pear").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/up").symlink_to(tmp_path / "meshes")
    meshes, classes = make_data.folder_meshes(tmp_path / "meshes")
    assert classes == ["fig", "pear"]
    assert {mesh.name: mesh.label for mesh in meshes} == {"fig/y": 0, "pear/x": 1}


def test_a_mesh_is_never_overwritten(tmp_path, capsys):
    touch(tmp_path, "a.obj")
    (tmp_path / "link.zip").hardlink_to(tmp_path / "a.obj")
    arguments = ["--recipe", "megascans", "--meshes", str(tmp_path), "--overwrite"]
    for name, words in (("a.obj", "--out must end in .zip"), ("link.zip", "is one of the meshes: choose another")):
        with pytest.raises(SystemExit) as caught:
            run_tool(make_data, *arguments, "--out", tmp_path / name)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


def test_folder_faults(tmp_path):
    with pytest.raises(UserError, match="none is not a folder"):
        make_data.folder_meshes(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no \.obj"):
        make_data.folder_meshes(touch(tmp_path, "x.txt"))
    with pytest.raises(UserError, match=r"b\.obj is in no class folder"):
        make_data.folder_meshes(touch(tmp_path, "fig/a.obj", "b.obj"))


def test_material_file(tmp_path):
    path = tmp_path / "x.obj"
    path.write_text("# made by hand\nmtllib my leaves.mtl\nv 0 0 0\n")
    assert make_data.material_file(path) is None
    touch(tmp_path, "my leaves.mtl")
    assert make_data.material_file(path) == tmp_path / "my leaves.mtl"
    assert make_data.material_file(tmp_path / "my leaves.mtl") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "megascans"], "needs --meshes"),
        (["--recipe", "megascans", "--meshes", "/none"], "/none is not a folder"),
        (["--recipe", "builtin", "--resolution", "48"], "power of two"),
    ],
)
def test_command_line_faults_are_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_tool(make_data, *arguments, "--out", tmp_path / "x.zip")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvista", None)
    with pytest.raises(UserError, match=r"pyvista is not installed: pip install -e '\.\[make_dataset\]'"):
        make_data.Renderer(RECIPES["builtin"], 64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pybullet, .*, is not installed: pip install pybullet"):
        next(make_data.pybullet_meshes(seed=0))


@pytest.fixture(scope="module")
def pyvista():
    """pyvista, where it can render: without an OpenGL driver VTK may take the whole process down."""
    module = pytest.importorskip("pyvista", reason="needs the extra make_dataset")
    program = "import pyvista; pyvista.Plotter(off_screen=True).screenshot(return_img=True)"
    if subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=HANG, check=False).returncode:
        pytest.skip("VTK cannot render here: no EGL or OSMesa library")
    return module


def cubes(pyvista, path: Path, *colored: tuple[tuple[float, float, float], tuple[int, int, int]], side: float) -> Path:
    """Writes a .ply of cubes with given centres and colours."""
    meshes = []
    for centre, color in colored:
        cube = pyvista.Cube(center=centre, x_length=side, y_length=side, z_length=side).triangulate().clean()
        cube = pyvista.PolyData(cube.points, cube.faces)
        cube.point_data["RGB"] = np.tile(np.array(color, np.uint8), (cube.n_points, 1))
        meshes.append(cube)
    pyvista.merge(meshes).save(path, texture="RGB")
    return path


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("corner", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_markers_land_where_camera_py_says(pyvista, tmp_path, recipe, corner):
    """A small red cube and a blue one opposite, away from the file's origin: the red one's centroid in the image."""
    recipe, resolution, side = RECIPES[recipe], 32, 0.1
    red, shift = np.array(corner) * (0.8, 0.4, 0.4), np.array([3.0, -2.0, 1.0])
    path = cubes(
        pyvista, tmp_path / "x.ply", (tuple(red + shift), (255, 0, 0)), (tuple(shift - red), (0, 0, 255)), side=side
    )
    angles = torch.tensor([[0.3, 1.0, 0], [2.0, 2.4, 0], [-1.2, 0.4, 0], [-2.9, 1.7, 0]], dtype=torch.float64)
    recipe = dataclasses.replace(recipe, min_box_volume=0)
    views, _ = make_data.Renderer(recipe, resolution).render(make_data.Mesh("x", path), angles)

    scale = make_data.scale_for(recipe, 2 * (abs(red) + side / 2), float(np.linalg.norm(abs(red) + side / 2)))
    cam2world = cam2world_matrix(angles, recipe.radius).numpy()
    tangent = math.tan(math.radians(recipe.fov) / 2)
    for view, matrix in zip(views, cam2world, strict=True):
        x, y, z = matrix[:3, :3].T @ (red * scale - matrix[:3, 3])
        expected = (np.array([x, -y]) / (-z * tangent) + 1) / 2 * (resolution - 1)
        weight = np.where(view[..., 0] > view[..., 2], 255.0 - view[..., 1], 0)
        rows, columns = np.mgrid[:resolution, :resolution]
        found = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        np.testing.assert_allclose(found, expected, atol=0.25)


def lambert(normal: tuple[float, float, float]) -> float:
    """The 8-bit brightness of a grey face."""
    towards = [np.array(direction) / np.linalg.norm(direction) for direction, _ in make_data.LIGHTS]
    diffuse = sum(power * max(0, t @ normal) for t, (_, power) in zip(towards, make_data.LIGHTS, strict=True))
    return 255 * make_data.GREY[0] * (make_data.AMBIENT + diffuse)


def test_lights_stay_with_the_object(pyvista, tmp_path):
    """A face has one brightness from every side; the background is white and the whole object in view."""
    path = tmp_path / "cube.stl"
    pyvista.Cube().triangulate().save(path)
    poses = {
        (1, 0, 0): [[0, 1.57], [0.4, 1.2], [-0.4, 1.8]],
        (-1, 0, 0): [[3.1, 1.57]],
        (0, 1, 0): [[2, 0.1], [1, 0.4]],
    }
    renderer = make_data.Renderer(RECIPES["builtin"], 32)
    for normal, angles in poses.items():
        angles = torch.tensor([[*pair, 0] for pair in angles])
        views, alpha = renderer.render(make_data.Mesh("cube", path), angles)
        assert 0.2 < alpha < 0.6
        for view in views:
            np.testing.assert_allclose(view[16, 16], lambert(normal), atol=1.5)
            border = np.concatenate([view[0], view[-1], view[:, 0], view[:, -1]])
            assert (border == 255).all()


@pytest.mark.filterwarnings("ignore:The VTK reader")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 3\n"),
        ("b.stl", b"nonsense"),
        ("c.obj", b"v 0 0\nf 1 2 3\n"),
        ("d.glb", b"glTF\x02\x00"),
        ("e.gltf", b"{"),
        ("f.ply", b""),
    ],
)
def test_damaged_meshes_are_named(pyvista, tmp_path, name, content):
    """A line each, and the others are rendered."""
    path = tmp_path / name
    path.write_bytes(content)
    renderer = make_data.Renderer(RECIPES["builtin"], 16)
    angles = torch.tensor([[0.1, 1.0, 0.0]])
    with pytest.raises(make_data.Dropped, match=r"it (cannot be read|has no) "):
        renderer.render(make_data.Mesh("x", path), angles)
    pyvista.Cube().triangulate().save(tmp_path / "good.stl")
    assert renderer.render(make_data.Mesh("x", tmp_path / "good.stl"), angles) is not None


def test_folder_to_data_set(pyvista, tmp_path, capsys):
    for folder in ("a", "b", "flat"):
        (tmp_path / "meshes" / folder).mkdir(parents=True)
    cubes(pyvista, tmp_path / "meshes/b/cube.ply", ((5, 0, 0), (200, 40, 40)), side=9)
    pyvista.Plane().triangulate().save(tmp_path / "meshes/a/sheet.stl")  # no volume: dropped
    pyvista.Sphere().save(tmp_path / "meshes/a/ball.stl")
    (tmp_path / "meshes/a/nothing.obj").write_text("# no vertex\n")
    box = pyvista.Cube(x_length=1, y_length=2, z_length=0.5).triangulate()
    box.save(tmp_path / "meshes/flat/box.stl")  # solid, but of a volume of 1
    arguments = ["--recipe", "megascans", "--meshes", str(tmp_path / "meshes"), "--views", "3", "--resolution", "16"]
    for name in ("one.zip", "two.zip"):
        run_tool(make_data, *arguments, "--attribution", "ours", "--out", tmp_path / "sets" / name)
    told = capsys.readouterr()
    assert "6 images of 2 objects, 3 meshes dropped" in told.out
    for name, rule in (
        ("a/sheet.stl", "its box has a volume of 0, --min-box-volume is 2"),
        ("a/nothing.obj", "it has no surface that can be read"),
        ("flat/box.stl", "its box has a volume of 1, --min-box-volume is 2"),
    ):
        assert f"dropped {tmp_path / 'meshes' / name}: {rule}\n" in told.err
    assert "class flat has lost all its objects" in told.err
    one, two = tmp_path / "sets/one.zip", tmp_path / "sets/two.zip"
    assert one.read_bytes() == two.read_bytes()

    dataset = ImageDataset(one, 16, use_labels=True, mirror=False)
    dataset.check_images()
    assert len(dataset) == 6
    assert dataset.labels.tolist() == 3 * [[1, 0]] + 3 * [[0, 1]]
    assert dataset.camera == RECIPES["megascans"].camera()
    with zipfile.ZipFile(one) as archive:
        metadata = json.loads(archive.read("dataset.json"))
    assert metadata["objects"] == ["a/ball", "b/cube"]
    assert metadata["classes"] == ["a", "b"]
    assert metadata["attribution"] == "ours"
    image = dataset[3][0].float()
    assert image[0, 8, 8] > 3 * image[1, 8, 8]  # the red of the file's vertices

    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_tool(make_data, *arguments, "--min-alpha", "0.99", "--out", tmp_path / "sets/none.zip")
    assert re.search(r"a/ball\.stl: it covers 0\.\d+ of its images, --min-alpha is 0\.99", capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["one.zip", "two.zip"]
    run_tool(make_data, *arguments, "--min-box-volume", "0.5", "--scale", "4", "--out", tmp_path / "sets/all.zip")
    kept = ImageDataset(tmp_path / "sets/all.zip", 16, use_labels=True, mirror=False)
    assert kept.labels.sum(dim=0).tolist() == [3, 3, 3]


def test_builtin_set_is_reproduced(pyvista, tmp_path):
    """The first object of the shipped set comes out again, but for the rounding of another OpenGL driver."""
    pytest.importorskip("pybullet_data", reason="needs the extra make_dataset")
    out = tmp_path / "objects.zip"
    run_tool(make_data, "--recipe", "builtin", "--objects", "1", "--out", out)
    ours, shipped = ImageDataset(out, mirror=False), ImageDataset("builtin", mirror=False)
    assert torch.equal(ours.angles, shipped.angles[:10])
    for index in range(10):
        assert (ours[index][0].float() - shipped[index][0].float()).abs().mean() < 1
