"""Pictures and videos of a tiny checkpoint."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from checks import HANG, assert_close
from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix, camera_rays
from epigraf_fast.models import region
from epigraf_fast.models.renderer import Images
from epigraf_fast.tools import render
from epigraf_fast.training.pretrained import load_generator


def read(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def run(*arguments: object) -> None:
    """At the resolution of training, unless another is given."""
    size = [] if "--resolution" in arguments else ["--resolution", "16"]
    run_tool(render, *arguments, *size)


def test_a_grid_shows_every_seed_from_every_side(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = ("--seeds", "0-4", "--columns", 3, "--yaw", -0.5, 0.5, "--show", "rgb", "depth", "normals")
    run("grid", tiny_run, "--out", out, *arguments)
    pictures = [read(tmp_path / f"grid{suffix}.png") for suffix in ("", "-depth", "-normals")]
    for picture in pictures:
        assert picture.shape == (2 * 16, 3 * 2 * 16 + 2 * 2, 3)  # a gap of an eighth between objects
        assert (picture[16:, 2 * 34 :] == 255).all()  # five of six places
        assert (picture[:, [32, 33, 66, 67]] == 255).all()
        assert picture[:16].std() > 0
    row = np.delete(pictures[0][:16], [32, 33, 66, 67], axis=1)
    rows = row.reshape(16, 6, 16, 3).transpose(1, 0, 2, 3)
    assert len({cell.tobytes() for cell in rows}) == 6

    _, generator = load_generator(tiny_run, "cpu")
    ws = render.Scene(generator, 16).ws([1])
    pose = render.showing_pose(generator)
    pose[0] = 0.5
    with torch.no_grad():
        planes = generator.synthesis(ws, "const")
        expected = render.to_uint8(generator.render(planes, pose[None], 16, stochastic=False).rgb)
    assert (expected[0].permute(1, 2, 0).numpy() == rows[3]).all()


def test_single_views_have_planes_in_part(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid from one side and a walk, of the same pictures; from two sides, and in orbits, planes are whole."""
    monkeypatch.setattr(region, "WHOLE_BELOW", 8)
    _, generator = load_generator(tiny_run, "cpu")
    narrow = {"fov": 2.0, "radius": 1.0, "ray_start": 0.98, "ray_end": 1.02, "cube_scale": 0.2}
    generator.camera = dataclasses.replace(generator.camera, **narrow)
    for name in ("ray_start", "ray_end", "cube_scale"):
        setattr(generator.renderer, name, narrow[name])
    scene, seeds = render.Scene(generator, 16), [0, 1]
    poses = generator.mean_camera_pose.cpu() + torch.tensor([[0.0, 0.0, 0.0], [0.4, -0.2, 0.0]])
    areas: list[int] = []
    render_ = generator.render

    def rendered(planes: Tensor, *args: Any, **kwargs: Any) -> Images:
        areas.append(planes.shape[2] * planes.shape[3])
        return render_(planes, *args, **kwargs)

    monkeypatch.setattr(generator, "render", rendered)

    def pictures(allowed: str) -> list[np.ndarray]:
        generator.region = allowed
        found = [
            render.grid(scene, seeds, (), poses[1:], 2, render.Progress),
            *render.interpolation(scene, seeds, (), poses, render.Progress),
            render.grid(scene, seeds, (), poses, 2, render.Progress),
            *render.orbit(scene, seeds, (), poses, 2, render.Progress),
        ]
        return [frame["rgb"].astype(int) for frame in found]

    in_part = pictures("auto")
    whole = 16**2
    assert all(area < 0.9 * whole for area in areas[:4])  # two of the grid, two of the walk
    assert areas[4:] == [whole] * 8
    for a, b in zip(in_part, pictures("off"), strict=True):
        assert np.abs(a - b).max() <= 1  # a rounding may change the last bit
        assert a.std() > 0
    assert areas[12:] == [whole] * 12


def test_truncation_seeds_and_labels(tiny_run: Path, tmp_path: Path) -> None:
    """psi = 0 shows one object for all seeds of a class; other classes differ, other seeds too."""

    def cells(*arguments: object) -> list[bytes]:
        run("grid", tiny_run, "--out", tmp_path / "x.png", "--overwrite", "--columns", 3, *arguments)
        picture = read(tmp_path / "x.png")
        return [picture[:, 16 * i : 16 * i + 16].tobytes() for i in range(3)]

    assert len(set(cells("--seeds", "0-2", "--truncation", 0))) == 1
    assert len(set(cells("--seeds", "0-2", "--labels", 1))) == 3
    assert len(set(cells("--seeds", "4,4,4", "--labels", "0-2"))) == 3
    assert len(set(cells("--seeds", "4,4,4"))) == 1
    assert cells("--seeds", "0-2", "--truncation", 0.5) != cells("--seeds", "0-2", "--truncation", 0.5, "--cutoff", 2)


def test_objects_seen_from_all_around_are_shown_from_above_and_aside(tiny_run: Path, tmp_path: Path) -> None:
    _, generator = load_generator(tiny_run, "cpu")
    assert torch.equal(render.showing_pose(generator), generator.mean_camera_pose)  # of a prior of its own
    generator.camera = dataclasses.replace(generator.camera, prior="spherical_uniform")
    yaw, pitch, roll = render.showing_pose(generator).tolist()
    assert (0.3 < yaw < 1.2, 0.8 < pitch < 1.4, roll) == (True, True, 0)
    run_tool(render, "grid", tiny_run, "--out", tmp_path / "x.png", "--seeds", "0")
    assert read(tmp_path / "x.png").shape == (256, 256, 3)


def test_images_steps_and_mixing(tiny_run: Path, tmp_path: Path) -> None:
    """Each cell is the picture that a grid, whose cells are tested, shows of the same style vectors."""
    run("images", tiny_run, "--out", tmp_path / "o.png", "--seeds", "2,5", "--show", "rgb", "depth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-2.png", "o-5.png", "o-depth-2.png", "o-depth-5.png"]
    two, five = read(tmp_path / "o-2.png"), read(tmp_path / "o-5.png")
    assert two.shape == (16, 16, 3)
    run("grid", tiny_run, "--out", tmp_path / "grid.png", "--seeds", "2,5", "--columns", 2)
    assert (read(tmp_path / "grid.png") == np.concatenate([two, five], axis=1)).all()
    run("steps", tiny_run, "--out", tmp_path / "steps.png", "--seeds", "2,5,2", "--columns", 3)
    steps = read(tmp_path / "steps.png")
    assert steps.shape == (32, 48, 3)
    assert (steps[:16, :16] == two).all()
    assert (steps[:16, 32:] == five).all()
    assert np.abs(steps[:16].reshape(16, 3, 16, 3)[:, ::-1].reshape(16, 48, 3).astype(int) - steps[16:]).max() <= 1
    run("mixing", tiny_run, "--out", tmp_path / "mix.png", "--seeds", 2, "--mix-seeds", "5,2", "--mix-from", 1)
    mix = read(tmp_path / "mix.png")
    assert (mix[:16, :16] == 255).all()
    assert (mix[:16, 16:] == np.concatenate([five, two], axis=1)).all()
    assert (mix[16:, :16] == two).all()
    assert (mix[16:, 32:] == two).all()
    assert (mix[16:, 16:32] != two).any()
    assert (mix[16:, 16:32] != five).any()
    _, generator = load_generator(tiny_run, "cpu")
    scene, pose = render.Scene(generator, 16), render.showing_pose(generator)
    a, b = scene.ws([2, 5], ())
    mixed = scene.view(scene.paint(torch.cat([a[:1], b[1:]]), pose), pose)
    assert (mix[16:, 16:32] == mixed["rgb"][0].permute(1, 2, 0).numpy()).all()


def test_an_interpolation_is_linear_in_w(tiny_run: Path) -> None:
    """A quarter, a half and three quarters of the way from one seed to the next, and back."""
    _, generator = load_generator(tiny_run, "cpu")
    scene, pose = render.Scene(generator, 16), render.showing_pose(generator)
    frames = list(render.interpolation(scene, [2, 5], (), pose.expand(8, 3), render.Progress))
    two, five = scene.ws([2, 5], ())
    for frame, place in zip(frames, (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25), strict=True):
        shown = scene.view(scene.paint(two.lerp(five, place), pose), pose)["rgb"][0]
        assert np.abs(frame["rgb"].astype(int) - shown.permute(1, 2, 0).numpy()).max() <= 1, place


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*((kind, suffix) for kind in render.VIDEOS for suffix in (".mp4", ".gif")), ("turntable", ".webm")],
)
def test_videos(kind: str, suffix: str, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / f"video{suffix}"
    run(kind, tiny_run, "--out", out, "--seeds", "0-2", "--frames", 4, "--fps", 10, "--show", "rgb", "depth")
    tiles = (1, 1) if kind == "interpolation" else (2, 2)
    for path in (out, tmp_path / f"video-depth{suffix}"):
        frames = imageio.v3.imread(path, **({"plugin": "FFMPEG"} if suffix != ".gif" else {}))
        assert frames.shape[1:] == (16 * tiles[0], 16 * tiles[1], 3)
        assert len(frames) == 4
        if path == out:
            assert np.abs(frames[0].astype(int) - frames[2]).max() > 4
    assert len(list(tmp_path.iterdir())) == 2


def test_frames_as_pictures(tiny_run: Path, tmp_path: Path) -> None:
    run(
        "turntable",
        tiny_run,
        "--out",
        tmp_path / "new" / "x.png",
        "--seeds",
        0,
        "--frames",
        3,
        "--show",
        "rgb",
        "depth",
    )
    names = [f"x{part}-{number:04d}.png" for part in ("", "-depth") for number in range(3)]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    assert len({read(tmp_path / "new" / name).tobytes() for name in names}) == 6


def test_other_resolutions(tiny_run: Path, tmp_path: Path) -> None:
    """Twice the resolution shows the same picture, finer; odd sizes lose a row in an MP4."""
    for size in (17, 33):  # the pixels of 17 are every second of 33
        run("grid", tiny_run, "--out", tmp_path / f"{size}.png", "--seeds", 0, "--resolution", size)
    small, large = read(tmp_path / "17.png"), read(tmp_path / "33.png")
    assert np.abs(large[::2, ::2].astype(int) - small).max() <= 1
    run("turntable", tiny_run, "--out", tmp_path / "x.mp4", "--seeds", 0, "--resolution", 17, "--frames", 2)
    assert imageio.v3.imread(tmp_path / "x.mp4", plugin="FFMPEG").shape == (2, 16, 16, 3)


def test_memory_at_1024_is_bounded(tiny_run: Path, tmp_path: Path) -> None:
    """A million rays, in a process of its own: what they take beyond a tiny picture is far below all samples."""
    program = f"""
import resource, sys
from epigraf_fast.__main__ import main
sizes = []
for size in (16, 1024):
    main(["render", "grid", {str(tiny_run)!r}, "--out", {str(tmp_path / "x.png")!r}, "--seeds", "0", "--ray-samples",
          "10", "--resolution", str(size), "--device", "cpu", "--overwrite"])
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((sizes[1] - sizes[0]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=True)
    used = int(done.stdout.split()[-1])
    assert read(tmp_path / "x.png").shape == (1024, 1024, 3)
    samples = 1024**2 * 20 * (4 + 1) * 4 // 2**20  # colours, densities and depths of every sample, MiB
    assert used < samples / 2, f"{used} MiB of {samples}"


def test_normals_of_a_plane(tiny_run: Path) -> None:
    """Depths of a plane that faces the camera give its direction; a plane turned by 45 degrees looks half aside."""
    _, generator = load_generator(tiny_run, "cpu")
    angles = torch.tensor([[0.7, 1.1, 0.0]])
    cam2world = cam2world_matrix(angles, generator.camera.radius)
    origins, directions = camera_rays(cam2world, generator.camera.fov, 8)
    for expected in ((0.0, 0.0, 1.0), (-math.sqrt(0.5), 0.0, math.sqrt(0.5)), (0.0, math.sqrt(0.5), math.sqrt(0.5))):
        normal = cam2world[0, :3, :3] @ torch.tensor(expected)
        t = -(origins @ normal) / (directions @ normal)  # the plane through the origin
        opaque = torch.ones(1, 1, 8, 8)
        images = Images(torch.zeros(1, 3, 8, 8), t.view(1, 1, 8, 8), opaque)
        found = render.normals(images, angles, generator)
        target = torch.tensor(expected)[None, :, None, None].expand_as(found)
        assert_close(found[..., 1:-1, 1:-1], target[..., 1:-1, 1:-1], "normals", torch.float16)
        empty = render.normals(images._replace(weight_sum=0 * opaque), angles, generator)
        assert not empty.any()


def test_zoom_comes_back() -> None:
    fovs = render.zoomed(30.0, 2.0, 10)
    assert fovs[0] == pytest.approx(30.0)
    assert math.tan(math.radians(min(fovs)) / 2) == pytest.approx(math.tan(math.radians(15)) / 2)
    assert fovs[5] == min(fovs)
    assert fovs[3] == pytest.approx(fovs[7])


def test_fly_around_zooms(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame has its own field of view; the options say how close, and 1.5 times if they do not."""
    taken = []

    def orbit(scene: Any, seeds: Any, classes: Any, path: Tensor, columns: int, track: Any, fovs: Any = None) -> Any:
        taken.append((len(path), fovs))
        return real(scene, seeds, classes, path, columns, track, fovs)

    real = render.orbit
    monkeypatch.setattr(render, "orbit", orbit)
    fov = load_generator(tiny_run, "cpu")[1].camera.fov
    for number, (given, zoom) in enumerate(((("--zoom", "3"), 3.0), ((), 1.5))):
        out = tmp_path / f"{number}.gif"
        run_tool(render, "fly-around", tiny_run, "--out", out, "--frames", "4", "--seeds", "0", *given)
        frames, fovs = taken.pop()
        assert frames == 4
        halves = [math.tan(math.radians(angle) / 2) / math.tan(math.radians(fov) / 2) for angle in fovs]
        assert halves == pytest.approx([1, zoom**-0.5, 1 / zoom, zoom**-0.5])
        assert out.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("grid", "RUN", "--out", "x.jpg"), "must end in .png"),
        (("turntable", "RUN", "--out", "x.avi"), "must end in .mp4, .webm, .gif or .png"),
        (("grid", "RUN", "--out", "x.png", "--seeds", "a"), "--seeds must look like 0-15 or 1,4,7-9, got 'a'"),
        (("grid", "RUN", "--out", "x.png", "--labels", "3"), "class from 0 to 2, got 3"),
        (("grid", "RUN", "--out", "x.png", "--resolution", "1"), "--resolution must be a whole number from 2 to 16384"),
        (("grid", "RUN", "--out", "x.png", "--pitch", "4"), "--pitch must be a finite number from 0 to 3.14159, got 4"),
        (
            ("grid", "RUN", "--out", "x.png", "--ray-samples", "2"),
            "--ray-samples must be a whole number from 3 to 4096",
        ),
        (("turntable", "RUN", "--out", "x.mp4", "--frames", "1"), "--frames must be a whole number from 2 to 100000"),
        (("grid", "NOWHERE", "--out", "x.png"), "there is no checkpoint"),
        (("grid", "EMPTY", "--out", "x.png"), "holds no checkpoint"),
        (("grid", "RUN", "--out", "x.png", "--device", "cuda"), "torch sees no GPU"),
    ],
)
def test_faults_are_one_line(
    arguments: tuple[str, ...], words: str, tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    places = {"RUN": tiny_run, "NOWHERE": tmp_path / "none", "EMPTY": tmp_path / "empty"}
    arguments = tuple(tmp_path / a if a.startswith("x.") else places.get(a, a) for a in arguments)
    assert words in one_error_line(render, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_missing_ffmpeg_is_one_line(
    tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    message = one_error_line(render, "turntable", tiny_run, "--out", tmp_path / "x.mp4", "--frames", 2)
    assert "imageio-ffmpeg is not installed" in message
    assert not list(tmp_path.iterdir())


def test_a_video_that_lost_frames_is_no_video(tmp_path: Path) -> None:
    """As on a full disk, where the encoder dies and says nothing."""
    frame = np.zeros((16, 16, 3), np.uint8)
    with render.video(tmp_path / "x.mp4", 10) as add:
        for _ in range(3):
            add(frame)
    render.check_video(tmp_path / "x.mp4", 3)
    with pytest.raises(OSError, match="3 of 4 frames are in it: is the disk full"):
        render.check_video(tmp_path / "x.mp4", 4)
    content = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="0 of 3 frames"):
        render.check_video(tmp_path / "x.mp4", 3)


def test_an_interrupted_video_leaves_nothing(tmp_path: Path) -> None:
    def frames() -> Iterator[render.Frame]:
        yield {"rgb": np.zeros((16, 16, 3), np.uint8)}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        render.save_all(frames(), {"rgb": tmp_path / "x.mp4"}, 10)
    assert not list(tmp_path.iterdir())
