"""Distances and re-projection errors of a tiny checkpoint, and of scenes whose errors are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import assert_close, draw
from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix, camera_rays
from epigraf_fast.config import CameraConfig
from epigraf_fast.data import ImageDataset
from epigraf_fast.models.renderer import Images
from epigraf_fast.tools import metrics
from epigraf_fast.training.checkpoint import list_checkpoints
from epigraf_fast.training.metrics import ScriptFeatures, kernel_distance
from epigraf_fast.training.pretrained import load_generator

CAMERA = CameraConfig(fov=30.0, radius=1.0, ray_start=0.75, ray_end=1.25, cube_scale=0.475)
POSES = torch.tensor([[0.3, 1.2, 0.0]]), torch.tensor([[0.5, 1.2, 0.0]])


def view_of_a_ball(angles: Tensor, radius: float = 0.15, size: int = 65) -> Images:
    """A ball at the origin, coloured by position, rendered exactly."""
    origins, directions = camera_rays(cam2world_matrix(angles, CAMERA.radius), CAMERA.fov, size)
    middle = -(origins * directions).sum(-1)
    under = radius**2 - (1 - middle**2)
    hit = (under > 0).float()
    t = middle - under.clamp(min=0).sqrt()
    rgb = (origins + t[..., None] * directions) / radius * hit[..., None]
    shape = (1, -1, size, size)
    return Images(rgb.transpose(1, 2).reshape(shape), (t * hit).reshape(shape), hit.reshape(shape))


def error(first: Images, second: Images) -> dict[str, float]:
    return metrics.reprojection_error(first, POSES[0], second, POSES[1], CAMERA)


def test_an_exact_scene_has_no_error() -> None:
    """Only what bilinear lookup costs; half a turn hides every point but some of the rim."""
    first, second = (view_of_a_ball(angles) for angles in POSES)
    found = error(first, second)
    assert found["reprojection_rgb"] < 2e-3
    assert found["reprojection_depth"] < 2e-3
    assert 0.7 < found["reprojection_points"] < 0.97
    opposite = POSES[0] + torch.tensor([[math.pi, 0, 0]])
    hidden = metrics.reprojection_error(first, POSES[0], view_of_a_ball(opposite), opposite, CAMERA)
    assert hidden["reprojection_points"] < 0.03


def test_errors_are_in_their_units() -> None:
    """A view that is 0.2 brighter (of a range of 2), one whose surface lies 0.005 nearer (of a ray range of 0.5)."""
    first, second = (view_of_a_ball(angles) for angles in POSES)
    brighter = error(first, second._replace(rgb=second.rgb + 0.2))
    assert brighter["reprojection_rgb"] == pytest.approx(0.1, abs=2e-3)
    nearer = error(first, second._replace(depth=second.depth - 0.005 * second.weight_sum))
    assert nearer["reprojection_depth"] == pytest.approx(0.01, abs=1e-3)
    painted_on = error(first, first)  # a picture that turns with the camera
    assert painted_on["reprojection_rgb"] > 20 * error(first, second)["reprojection_rgb"]


def test_an_empty_view_compares_nothing() -> None:
    first = view_of_a_ball(POSES[0])
    empty = Images(0 * first.rgb, 0 * first.depth, 0 * first.weight_sum)
    assert all(math.isnan(value) for value in error(empty, first).values())
    assert error(first, empty)["reprojection_points"] == 0


def test_kernel_distance_is_the_formula() -> None:
    x, y = draw(7, 5, seed=1), draw(9, 5, seed=2) + 0.3

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    def unbiased(a: Tensor, b: Tensor) -> float:
        n = len(a)
        within = sum(k(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j)
        return within / (n * (n - 1)) - 2 * sum(k(p, q) for p in a for q in b) / n**2

    y7 = y[:7]
    assert_close(kernel_distance(x, y7, subsets=3), unbiased(x, y7), "all of both", torch.float64)
    rng = torch.Generator().manual_seed(4)
    expected = []
    for _ in range(2):
        a, b = (s[torch.randperm(len(s), generator=rng)[:4]] for s in (x, y))
        expected.append(unbiased(a, b))
    found = kernel_distance(x, y, subset=4, subsets=2, seed=4)
    assert_close(found, sum(expected) / 2, "subsets", torch.float64)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x[:1], y)


def test_equal_distributions_have_no_kernel_distance() -> None:
    same = kernel_distance(draw(400, 8, seed=1), draw(400, 8, seed=2))
    shifted = kernel_distance(draw(400, 8, seed=1), draw(400, 8, seed=2) + 0.5)
    assert abs(same) < 0.05 * shifted


class Network(nn.Module):
    """Stands in for Inception: the mean and the deviation of 2x2 cells."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return x if return_features else x[:, :1]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(Network()).save(str(path))
    return path


def test_script_features(inception: Path) -> None:
    features = ScriptFeatures(inception)
    images = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8)
    assert features.num_features == 12
    assert_close(features(images), Network()(images, True), "features", torch.float32)


def test_views_are_a_turn_apart(tiny_run: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, generator = load_generator(tiny_run, "cpu")
    turns, original = [], metrics.reprojection_error

    def reprojection_error(first: Any, first_angles: Any, second: Any, second_angles: Any, camera: Any) -> Any:
        turns.append((second_angles - first_angles)[0].tolist())
        assert not torch.equal(first.rgb, second.rgb)
        return original(first, first_angles, second, second_angles, camera)

    monkeypatch.setattr(metrics, "reprojection_error", reprojection_error)
    metrics.consistency(generator, ImageDataset(str(tiny_data), use_labels=config.loader.labels), config, 2, 0.25)
    assert turns == [[pytest.approx(0.25, abs=1e-6), 0, 0]] * 2


def test_a_folder_of_checkpoints(
    tiny_run: Path, inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All metrics of every checkpoint, the same ones a second time, in a table and a file."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
    (tiny_run / metrics.KEPT).unlink(missing_ok=True)  # of other tests on the same run
    out = tmp_path / "x" / "metrics.json"
    arguments = ["--images", "12", "--objects", "3", "--inception", str(inception)]
    plot = tmp_path / "x" / "metrics.png"
    run_tool(metrics, tiny_run, *arguments, "--out", out, "--plot", plot)
    assert plot.stat().st_size > 10_000
    results = json.loads(out.read_text())
    assert [Path(result["checkpoint"]).name for result in results] == [
        "checkpoint-000000008.pt",
        "checkpoint-000000016.pt",
    ]
    printed, told = capsys.readouterr()
    assert "12 generated images against 12 real ones: distances compare only with those of as many" in told
    assert "warning: fd_efficientnet looks at 1,280 features, of which 12 images do not tell" in told
    assert "warning: fid looks at" not in told  # at 12
    for result in results:
        assert (result["images"], result["reals"]) == (12, 12)
        assert result.keys() == {
            *("checkpoint", "data", "images", "reals", "objects", "turn", "fd_efficientnet", "fid", "kid"),
            *("reprojection_rgb", "reprojection_depth", "reprojection_points"),
        }
        assert result["fd_efficientnet"] > 0
        assert result["fid"] > 0
        assert f"fid {result['fid']:.4g}" in printed
    assert json.loads((tiny_run / metrics.KEPT).read_text()) == results
    gone = results[0] | {"checkpoint": str(tiny_run / "checkpoints" / "checkpoint-000000004.pt")}
    other = gone | {"images": 13}
    (tiny_run / metrics.KEPT).write_text(json.dumps([gone, other]))
    assert metrics.kept(tiny_run, results) == [gone, *results]  # what is comparable, of checkpoints that are gone too
    assert json.loads((tiny_run / metrics.KEPT).read_text()) == [gone, other, *results]
    (tiny_run / metrics.KEPT).write_text("[{")
    assert metrics.kept(tiny_run, results) == results
    assert f"{metrics.KEPT} is damaged, and begun anew" in capsys.readouterr().err
    (tiny_run / metrics.KEPT).unlink()
    run_tool(metrics, results[1]["checkpoint"], *arguments, "--out", out, "--overwrite", "--json")
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out) == results[1:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("RUN", "--plot", "x.txt"), "--plot must end in"),
        (("RUN", "--images", "1"), "--images must be a whole number from 2 to 10000000, got 1"),
        (("RUN", "--data", "nowhere.zip"), "there is no such data set"),
        (("RUN", "--data", "builtin"), "but resolution 16 was asked for"),
        (("RUN", "--inception", "none.pt"), "there are no weights none.pt"),
        (("RUN", "--inception", __file__), "is no TorchScript file"),
        (("nowhere.pt",), "there is no checkpoint nowhere.pt"),
    ],
)
def test_faults_are_one_line(
    arguments: tuple[str, ...], words: str, tiny_run: Path, one_error_line: Callable[..., str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
    arguments = tuple(tiny_run if a == "RUN" else a for a in arguments)
    assert words in one_error_line(metrics, *arguments)


def test_another_number_of_classes_is_one_line(
    tiny_run: Path, tmp_path: Path, write_data: Callable[..., Path], one_error_line: Callable[..., str]
) -> None:
    def edit(files: dict, metadata: dict) -> None:
        metadata["labels"] = [[name, number % 2] for number, (name, _) in enumerate(metadata["labels"])]

    data = write_data(tmp_path / "two.zip", edit=edit)
    assert "has 2 classes" in one_error_line(metrics, tiny_run, "--data", data)


def test_a_class_that_was_not_trained_is_one_line(
    tiny_run: Path, tmp_path: Path, tiny_data: Path, one_error_line: Callable[..., str]
) -> None:
    """The set has classes 0 to 2, the generator was trained on 1 and 2."""
    path = list_checkpoints(tiny_run)[-1]
    content = torch.load(path, weights_only=True)
    content["trainer"]["label_values"] = torch.tensor([1, 2])
    torch.save(content, tmp_path / path.name)
    message = one_error_line(metrics, tmp_path / path.name, "--data", tiny_data)
    assert "has images of class 0, without which" in message


def test_weights_without_features_are_one_line(
    tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
    torch.jit.script(nn.Linear(3, 3)).save(str(tmp_path / "x.pt"))
    assert "gives no features" in one_error_line(metrics, tiny_run, "--inception", tmp_path / "x.pt")
