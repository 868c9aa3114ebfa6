"""An image that the generator has made gets back its look, from sides that the fit has not seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import imageio.v3
import numpy as np
import PIL.Image
import pytest
import torch

from bench.runs import project as bench
from command_lines import run_tool
from epigraf_fast.models.generator import Generator
from epigraf_fast.tools import project
from epigraf_fast.training.pretrained import load_generator

SIZE = 16
POSE = torch.tensor([0.6, 1.2, 0.0])
ASIDE = POSE + torch.tensor([[0.6, 0.0, 0.0], [-0.6, 0.2, 0.0], [1.5, -0.3, 0.0]])


@pytest.fixture
def generator(tiny_run: Path) -> Generator:
    return load_generator(tiny_run, "cpu")[1].requires_grad_(False)


def psnrs(generator: Generator, found: project.Fit, truth: project.Fit, cameras: torch.Tensor) -> list[float]:
    pairs = zip(*(project.views(generator, one, cameras, SIZE) for one in (found, truth)), strict=True)
    return [project.psnr(a, b.clamp(-1, 1)) for a, b in pairs]


@pytest.fixture
def truth(generator: Generator) -> project.Fit:
    """An object that is none of those that a search starts from."""
    return project.Fit(generator.ws(*project.latents_of_seeds(generator, [1003]))[0], POSE, 0.0)


@pytest.mark.parametrize(("known", "steps"), [(True, 50), (False, 160)])
def test_the_look_comes_back(known: bool, steps: int, generator: Generator, truth: project.Fit) -> None:
    """From sides that the search has not seen, and with a camera that is near the true one."""
    other = truth._replace(ws=generator.ws(*project.latents_of_seeds(generator, [1004]))[0])
    assert max(psnrs(generator, other, truth, ASIDE)) < 20  # what any object would have
    (target,) = (image.clamp(-1, 1) for image in project.views(generator, truth, POSE[None], SIZE))
    before, seen = torch.get_rng_state(), []
    found = project.fit(
        generator, target, POSE if known else None, steps, show=lambda step, image: seen.append((step, image))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert min(psnrs(generator, found, truth, ASIDE)) >= 25
    assert (found.angles - POSE).abs().max() <= (0 if known else 0.2)
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert len(seen) <= steps
    assert {image.shape[1:] for _, image in seen} == {target.shape[1:]}
    assert project.psnr(seen[-1][1], target) > project.psnr(seen[0][1], target) + 5


def test_files(
    tiny_run: Path, generator: Generator, truth: project.Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (target,) = project.views(generator, truth, POSE[None], SIZE)
    PIL.Image.fromarray(project._picture(target)).resize((64, 64), PIL.Image.Resampling.NEAREST).save(
        tmp_path / "x.png"
    )
    outs = [tmp_path / f"fit{suffix}" for suffix in (".gif", ".png", ".npz")]
    line = [str(tiny_run), str(tmp_path / "x.png"), "--out", *map(str, outs), "--steps", "6"]
    run_tool(project, *line, "--yaw", "0.6", "--pitch", "1.2", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["yaw"], result["pitch"], result["files"]) == (
        pytest.approx(0.6),
        pytest.approx(1.2),
        [*map(str, outs)],
    )
    frames = imageio.v3.imread(outs[0])
    assert frames.shape[1:] == (128, 256, 3)
    assert project.FRAMES < len(frames) <= 6 + project.FRAMES  # frames that are equal become one
    with PIL.Image.open(outs[1]) as picture:
        assert picture.size == ((2 + len(project.SIDES)) * SIZE, SIZE)
        assert (np.asarray(picture)[:, :SIZE] == project._picture(target)).all()
    stored = np.load(outs[2])
    found = project.Fit(torch.from_numpy(stored["ws"]), torch.from_numpy(stored["angles"]), 0.0)
    (image,) = project.views(generator, found, found.angles[None], SIZE)
    assert project.psnr(image, target.clamp(-1, 1)) == pytest.approx(result["psnr"], abs=0.3)  # 8 bits


def test_the_benchmark_tells_what_a_fit_has_not_seen(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "x.json", tmp_path / "x.png"
    assert (
        bench.main([str(tiny_run), "--seeds", "1003", "--steps", "8", "--json", str(path), "--plot", str(picture)]) == 0
    )
    content = json.loads(path.read_text())
    given, estimated = content["cases"]
    assert (given["camera"], given["camera_error_degrees"]) == ("given", 0)
    assert estimated["camera"] == "estimated"
    for row in (given, estimated):
        assert row["held_out"].keys() == bench.HELD_OUT.keys()
        assert row["lowest"] == min(row["held_out"].values())
    assert "run_dir" not in content["config"]["config"]
    with PIL.Image.open(picture) as image:
        assert image.size == ((1 + len(bench.HELD_OUT)) * SIZE, 2 * 2 * SIZE)
    assert "lowest of all held-out views" in capsys.readouterr().out


def test_cameras_are_apart_by_the_turn_between_them() -> None:
    ahead = (0.0, math.pi / 2, 0.0)
    others = (ahead, (-3 * math.pi / 2, math.pi / 2, 0.0), (0.0, 0.3, 0.0), (math.pi, 0.3, 0.0))
    cameras = torch.tensor(others, dtype=torch.float64)
    turns = project.apart(cameras, cameras).rad2deg()
    assert turns[0, :3].tolist() == pytest.approx([0, 90, 90 - math.degrees(0.3)], abs=1e-4)
    # Nearly from above, both: the pictures are upside down to each other.
    assert float(turns[2, 3]) == pytest.approx(180, abs=1e-4)
    assert torch.equal(turns, turns.T)


def test_starts_from_all_sides_are_kept(generator: Generator) -> None:
    image = torch.zeros(3, SIZE, SIZE)
    near, turned, below = (1.0, 0.2, 0.0), (1.0 + math.pi, 0.2, 0.0), (1.0, 2.9, 0.0)
    cameras = torch.tensor([near, (1.1, 0.2, 0.0), below, (1.0, 0.3, 0.0), turned])
    sought = project._Search(generator, image, None, 10, lambda step, image: None)
    assert sought.first([1, 0, 3, 2, 4], cameras, 3) == [1, 2, 4]
    assert sought.first([1, 0, 3, 2, 4], cameras, 5) == [1, 2, 4, 0, 3]  # where too few are far apart
    known = project._Search(generator, image, POSE, 10, lambda step, image: None)
    assert known.first([1, 0, 3, 2, 4], cameras, 3) == [1, 0, 3]


def test_cameras_stay_on_the_sphere() -> None:
    cameras = project.on_sphere(torch.tensor([[7.0, -0.2, 0.0], [1.0, 1.0, 0.0], [0.0, 4.0, 0.0]]))
    assert cameras[:, 0].tolist() == [7, 1, 0]
    assert cameras[1, 1] == 1
    assert 0 < cameras[0, 1] < 0.02
    assert math.pi - 0.02 < cameras[2, 1] < math.pi


@pytest.mark.parametrize(
    ("picture", "more", "words"),
    [
        ((8, 8), ("--yaw", "0.1"), "--yaw and --pitch belong together"),
        ((8, 4), (), "is 8x4, not square"),
        (None, (), "cannot be read (it is no image)"),
    ],
)
def test_faults_are_one_line(
    picture: tuple | None, more: tuple, words: str, tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    path = tmp_path / "x.png"
    path.write_text("no") if picture is None else PIL.Image.new("RGB", picture).save(path)
    assert words in one_error_line(project, tiny_run, path, "--out", tmp_path / "y.png", *more)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
