"""Surfaces of a tiny checkpoint, and of a ball whose surface is known."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checks import assert_close
from command_lines import run_tool
from epigraf_fast.models.feature_decoder import FeatureDecoder
from epigraf_fast.models.generator import Generator
from epigraf_fast.tools import mesh
from epigraf_fast.training.pretrained import load_generator

trimesh = pytest.importorskip("trimesh", reason="needs the extra tools")
RADIUS, STEEPNESS = 0.15, 2000.0  # of the ball; its density falls through 0 at the radius


class Ball:
    """Stands in for the decoder: raw density STEEPNESS (RADIUS - |p - centre|), colours from the position."""

    def __init__(self, *centres: tuple[float, float, float]) -> None:
        self.centres = torch.tensor(centres or ((0.0, 0.0, 0.0),))

    coarse_to_fine = FeatureDecoder.coarse_to_fine

    def at_points(self, planes: Tensor, points: Tensor, cube_scale: float) -> Tensor:
        distance = (points[..., None, :] - self.centres).norm(dim=-1).amin(dim=-1, keepdim=True)
        return torch.cat([points / cube_scale, STEEPNESS * (RADIUS - distance)], dim=-1)

    def __call__(
        self, planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, cube_scale: float, region: None = None
    ) -> Tensor:
        return self.at_points(planes, origins[..., None, :] + t[..., None] * directions[..., None, :], cube_scale)


@pytest.fixture
def generator(tiny_run: Path) -> Generator:
    generator = load_generator(tiny_run, "cpu")[1]
    del generator.decoder
    generator.decoder = Ball()
    return generator


PLANES = torch.zeros(1, 12, 8, 8)


def test_the_volume_has_the_axes_of_the_world(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    generator.decoder = Ball((0.2, -0.1, 0.05))
    whole = mesh.density_volume(generator, PLANES, 20)
    monkeypatch.setattr(mesh, "CHUNK", 123)
    assert (mesh.density_volume(generator, PLANES, 20) == whole).all()
    x, y, z = np.unravel_index(whole.argmax(), whole.shape)
    axis = np.linspace(-0.475, 0.475, 20)
    np.testing.assert_allclose((axis[x], axis[y], axis[z]), (0.2, -0.1, 0.05), atol=0.026)
    assert whole[0, 0, 0] == whole.min()  # beyond every ray


def test_a_volume_that_no_ray_reaches_is_one_line(generator: Generator) -> None:
    """The corners of the cube alone."""
    with pytest.raises(mesh.UserError, match="none of 2 points a side is within reach of the rays: raise --resolution"):
        mesh.density_volume(generator, PLANES, 2)


@pytest.mark.parametrize("slab", [1, 5, 16, 100])
def test_slabs_give_the_surface_of_the_whole(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed, with as many corners and faces, at the same places; also where the level is met on a shared layer."""
    marching_cubes = pytest.importorskip("skimage.measure", reason="needs the extra tools").marching_cubes
    monkeypatch.setattr(mesh, "SLAB", slab)
    axis = np.linspace(-3, 3, 34)
    x, y, z = axis[:, None, None], axis[:, None], axis
    gyroid = np.sin(2 * x) * np.cos(2 * y) + np.sin(2 * y) * np.cos(2 * z) + np.sin(2 * z) * np.cos(2 * x)
    volume = np.pad(gyroid.astype(np.float32), 1, constant_values=-2)
    vertices, faces = mesh.level_set(volume, 0.3)
    whole_vertices, whole_faces, _, _ = marching_cubes(volume, 0.3)
    assert vertices.shape == whole_vertices.shape
    assert faces.shape == whole_faces.shape
    ours, theirs = (trimesh.Trimesh(v, f, process=False) for v, f in ((vertices, faces), (whole_vertices, whole_faces)))
    assert ours.is_watertight
    assert ours.is_winding_consistent
    assert ours.volume == pytest.approx(theirs.volume, rel=1e-6)
    assert ours.area == pytest.approx(theirs.area, rel=1e-6)

    cube = np.zeros((34, 34, 34), np.float32)
    cube[5:20, 5:20, 5:20], cube[6:19, 6:19, 6:19] = 1, 2
    solid = trimesh.Trimesh(*mesh.level_set(cube, 1.0), process=False)  # the level of whole layers
    assert solid.is_winding_consistent
    assert solid.volume == pytest.approx(trimesh.Trimesh(*marching_cubes(cube, 1.0)[:2]).volume, rel=1e-6)


def test_a_ball_is_found(generator: Generator) -> None:
    """At the depth that rays see: along a radius the density S x is reached with transmittance exp(-S x^2 / 2), so the
    mean depth below the surface is sqrt(pi / (2 S)); rays that come in aslant see less deep."""
    generator.renderer.config = generator.renderer.config.__class__(
        coarse_samples=48, fine_samples=48, last_interval=1e-3, white_background=True
    )
    volume = mesh.density_volume(generator, PLANES, 64)
    threshold = mesh.automatic_threshold(generator, PLANES, whole_sphere=True)
    surface = mesh.extract(generator, PLANES, volume, threshold)
    expected = RADIUS - threshold / STEEPNESS
    deepest = math.sqrt(math.pi / (2 * STEEPNESS))
    assert 0.5 * deepest < RADIUS - expected < deepest
    distance = np.linalg.norm(surface.vertices, axis=1)
    np.testing.assert_allclose(distance, expected, atol=2e-3)
    solid = mesh.to_trimesh(surface)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * math.pi * expected**3, rel=0.02)  # positive: faces look outwards
    colors = torch.from_numpy(surface.vertices) / 0.475 * 127.5 + 127.5
    assert_close(torch.from_numpy(surface.colors).float(), colors.round(), "colours", torch.bfloat16)


def test_the_picture_shows_the_ball_where_the_renderer_does(generator: Generator) -> None:
    """A ball off the centre covers the same pixels; its near side is painted over its far side."""
    generator.decoder = Ball((0.1, 0.1, -0.05))
    surface = mesh.extract(generator, PLANES, mesh.density_volume(generator, PLANES, 48), 0.0)
    shown = mesh.picture(surface, generator, size=65)
    assert shown.shape == (65, 130, 3)
    with torch.no_grad():
        pose = generator.mean_camera_pose[None]
        opaque = generator.render(PLANES, pose, 65, stochastic=False).weight_sum[0, 0].numpy() > 0.5
    for half in (shown[:, :65], shown[:, 65:]):
        covered = half.min(axis=2) < 250
        assert (covered & opaque).sum() > 0.9 * (covered | opaque).sum()
    clay = shown[:, 65:, 0].astype(int)
    rows, columns = np.nonzero(opaque)
    assert clay[int(rows.mean()), int(columns.mean())] > 215  # faces the camera


def test_a_glb_is_smooth_and_unlit_and_stores_light(generator: Generator) -> None:
    surface = mesh.extract(generator, PLANES, mesh.density_volume(generator, PLANES, 32), 0.0)
    content = mesh.glb_of(surface)
    assert (content[:8], struct.unpack("<I", content[8:12])) == (b"glTF\2\0\0\0", (len(content),))
    length = struct.unpack("<I", content[12:16])[0]
    scene, data = json.loads(content[20 : 20 + length]), content[28 + length :]
    assert scene["materials"][0]["pbrMetallicRoughness"] == {"metallicFactor": 0, "roughnessFactor": 1}
    assert scene["materials"][0]["extensions"].keys() == set(scene["extensionsUsed"]) == {"KHR_materials_unlit"}
    found = {}
    attributes = scene["meshes"][0]["primitives"][0]["attributes"]
    for name, number in attributes.items():
        view = scene["bufferViews"][scene["accessors"][number]["bufferView"]]
        part = data[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        found[name] = np.frombuffer(part, "<f4").reshape(-1, 3)
    outward = found["POSITION"] / np.linalg.norm(found["POSITION"], axis=1, keepdims=True)
    assert ((found["NORMAL"] * outward).sum(axis=1) > 0.99).all()
    light = found["COLOR_0"]
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(255 * shown, surface.colors, atol=0.01)


def test_components(generator: Generator) -> None:
    generator.decoder = Ball((0.22, 0.0, 0.0), (-0.22, 0.0, 0.0))
    volume = mesh.density_volume(generator, PLANES, 32)
    volume[0, 16, 16] = 1e3  # a speck at the wall, which is closed
    surface = mesh.extract(generator, PLANES, volume, 1.0)
    sizes = np.bincount(mesh.components(surface))
    assert len(sizes) == 3
    assert (np.diff(sizes) <= 0).all()
    lines = "\n".join(mesh.statistics(mesh.measured(surface)))
    assert "watertight: yes" in lines
    assert "components: 3" in lines
    alone = mesh.largest(surface)
    assert len(alone.faces) == sizes[0]
    assert mesh.to_trimesh(alone).is_watertight
    assert abs(abs(alone.vertices[:, 0].mean()) - 0.22) < 0.02


def test_files(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every format holds the same mesh with its colours; the volume has its voxels and axes."""
    import mrcfile

    paths = [tmp_path / f"x{suffix}" for suffix in (".ply", ".obj", ".glb", ".mrc")]
    run_tool(mesh, tiny_run, "--out", *paths, "--resolution", "24", "--seeds", "3", "--truncation", "0.7")
    printed = capsys.readouterr().out
    for words in ("seed 3: densities", "(found)", "watertight: yes", "components: ", "wrote "):
        assert words in printed
    meshes = [trimesh.load(path, force="mesh", process=False) for path in paths[:3]]
    for loaded in meshes:
        assert len(loaded.faces) == len(meshes[0].faces) > 20
        np.testing.assert_allclose(loaded.vertices, meshes[0].vertices, atol=1e-5)
        if loaded is not meshes[2]:  # whose colours are light, in a test of their own
            assert (loaded.visual.vertex_colors == meshes[0].visual.vertex_colors).all()
        assert np.abs(loaded.vertices).max() <= 0.475 * (1 + 2 / 23)
    with mrcfile.open(paths[3]) as file:
        assert file.data.shape == (24, 24, 24)
        assert float(file.voxel_size.x) == pytest.approx(0.95 / 23, rel=1e-5)
        volume = file.data.transpose(2, 1, 0).copy()
    generator = load_generator(tiny_run, "cpu")[1]
    scene = mesh.Scene(generator, 16, truncation=0.7)
    planes = scene.paint(scene.ws([3])[0]).planes
    np.testing.assert_array_equal(volume, mesh.density_volume(generator, planes, 24))
    assert len(list(tmp_path.iterdir())) == 4


def test_several_seeds_as_json(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(tiny_run), "--out", str(tmp_path / "x.ply"), "--resolution", "12", "--seeds", "0-1", "--largest"]
    run_tool(mesh, *line, "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.ply", "x-1.ply"]
    for seed, result in enumerate(json.loads(capsys.readouterr().out)):
        loaded = trimesh.load(result["files"][0], force="mesh", process=False)
        assert (result["seed"], result["components"], result["watertight"]) == (seed, 1, True)
        assert result["faces"] == len(loaded.faces)
        assert result["volume"] == pytest.approx(loaded.volume, rel=1e-4)
        assert result["density_min"] < result["threshold"] < result["density_max"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "x.stl"), "must end in .ply, .obj, .glb, .png or .mrc"),
        (("--out", "x.ply", "--resolution", "7"), "--resolution must be a whole number from 8 to 1024, got 7"),
        (("--out", "x.ply", "--resolution", "8", "--threshold", "1e9"), "--threshold must be between the densities"),
        (("--out", "x.ply", "--threshold", "nan"), "--threshold must be a finite number, got nan"),
    ],
)
def test_faults_are_one_line(
    arguments: tuple[str, ...], words: str, tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    arguments = tuple(tmp_path / a if a.startswith("x.") else a for a in arguments)
    assert words in one_error_line(mesh, tiny_run, *arguments)
    assert not list(tmp_path.iterdir())


def test_an_empty_scene_is_one_line(generator: Generator) -> None:
    generator.decoder.centres += 100
    with pytest.raises(mesh.UserError, match="no ray of this object is opaque"):
        mesh.automatic_threshold(generator, PLANES, whole_sphere=False)


@pytest.mark.parametrize(("module", "suffix"), [("skimage.measure", ".ply"), ("trimesh", ".ply"), ("mrcfile", ".mrc")])
def test_missing_packages_are_one_line(
    module: str,
    suffix: str,
    tiny_run: Path,
    tmp_path: Path,
    one_error_line: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = one_error_line(mesh, tiny_run, "--out", tmp_path / f"x{suffix}", "--resolution", 12)
    assert "is not installed: pip install -e '.[tools]' in epigraf_fast's folder" in message
