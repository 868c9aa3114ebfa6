"""The figures: densities that integrate to one, sigmas of a checkpoint, a run's curves, and that files are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from checks import assert_close
from command_lines import run_tool
from epigraf_fast.camera import Patch
from epigraf_fast.config import Config, PatchConfig
from epigraf_fast.tools import figures
from epigraf_fast.training.checkpoint import save_checkpoint
from epigraf_fast.training.networks import build_discriminator
from epigraf_fast.training.step import Trainer

TinyConfig = Callable[..., Config]
TinyTrainer = Callable[[Config], tuple[Trainer, Iterator]]


@pytest.mark.parametrize("distribution", ["uniform", "beta"])
@pytest.mark.parametrize("cur_nimg", [2_000_000, 5_000_000, 20_000_000])
def test_densities_integrate_to_one(distribution: str, cur_nimg: int) -> None:
    """And those that training draws have their mean."""
    config = PatchConfig(distribution=distribution, beta_start=0.5)
    edges = 1 - np.linspace(0, (1 - 0.125) ** (1 / 3), 20_001)[::-1] ** 3  # fine at 1, where Beta(1, < 1) is infinite
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    density = figures.scale_density(config, 0.125, cur_nimg, middle)
    assert abs((density * width).sum() - 1) < 5e-3
    share = min(cur_nimg / 1e7, 1)
    if distribution == "uniform":
        mean = (1 + 1 - (1 - 0.125) * share) / 2
    else:
        mean = 0.125 + (1 - 0.125) / (1 + 0.5 + 0.3 * share)
    assert abs((density * width * middle).sum() - mean) < 5e-3
    outside = figures.scale_density(config, 0.125, cur_nimg, np.array([0.0, 0.12]))
    assert (outside == 0).all()


@pytest.fixture
def run(tiny_config: TinyConfig, tiny_trainer: TinyTrainer, tmp_path: Path) -> tuple[Trainer, Path]:
    config = tiny_config()
    trainer, batches = tiny_trainer(config)
    trainer.iteration(*next(batches))
    save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    lines = [
        {"cur_nimg": n, "kimg": n / 1000, "loss/G": 1 / n, "logits/real": 0.5, "img_per_sec": 3.0} for n in (8, 16)
    ]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.json").write_text(json.dumps([{"cur_nimg": 8, "fd_efficientnet": 9.0, "images": 10}]))
    return trainer, tmp_path


def test_modulation_is_what_the_blocks_see(run: tuple[Trainer, Path]) -> None:
    """Of a discriminator that is read back, at the scales of patches in the middle."""
    trainer, run_dir = run
    config, judge = figures.load_discriminator(run_dir)
    assert config == trainer.config
    scales, seen = torch.tensor([0.5, 1.0]), {}
    sigmas = figures.modulation(judge, scales)
    assert list(sigmas) == ["layer 2", "layer 4"]
    for res in (16, 8):
        block = getattr(trainer.discriminator, f"b{res}")
        block.register_forward_pre_hook(lambda _, args, res=res: seen.update({res: args[1]}))
    trainer.discriminator(
        torch.zeros(2, 3, 8, 8),
        Patch(scales, torch.tensor([[0.25, 0.25], [0, 0]])),
        torch.zeros(2, 3),
        torch.zeros(2, 3),
    )
    assert_close(sigmas["layer 2"], seen[16].detach(), "first block")
    assert_close(sigmas["layer 4"], seen[8].detach(), "second block")


def test_modulation_without_position(tiny_config: TinyConfig) -> None:
    """A discriminator that knows the scale alone can be drawn, too."""
    config = tiny_config(discriminator={"patch_position": False})
    judge = build_discriminator(config, 3, "cpu")
    scales = torch.tensor([0.5, 1.0])
    _, elsewhere = judge.modulation(Patch(scales, torch.rand(2, 2)))
    for sigma, same in zip(figures.modulation(judge, scales).values(), elsewhere, strict=True):
        assert_close(sigma, same.detach(), "sigma", "exact")


def test_the_modulation_s_figure_is_smooth_and_says_what_it_is(run: tuple[Trainer, Path]) -> None:
    _, judge = figures.load_discriminator(run[1])
    scales = torch.linspace(0.5, 1, figures.SCALES)
    (name, sigma), *_ = figures.modulation(judge, scales).items()
    figure = figures.draw_modulation(judge, 0.5, seed=0)
    first = figure.axes[0]
    assert first.get_title() == name
    lines = {line.get_label(): line.get_ydata() for line in first.lines}
    filters = [label for label in lines if label.startswith("filter ")]
    assert len(filters) == figures.FILTERS == len(first.get_legend().get_texts()) - 1
    half = figures.WINDOW // 2
    for label in filters:
        raw = sigma[:, int(label.split()[1])].numpy()
        assert lines[label][100] == pytest.approx(raw[100 - half : 100 + half + 1].mean(), abs=1e-5)
        assert lines[label][0] == pytest.approx(raw[: half + 1].mean(), abs=1e-5)
    assert "as without modulation" in figure._suptitle.get_text()


@pytest.mark.parametrize("figure", ["scales", "schedules", "modulation", "curves"])
def test_pictures(figure: str, run: tuple[Trainer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run[1] / "figures" / "out.png"
    line = [figure, "--out", str(out)]
    line += [str(run[1])] if figure in ("modulation", "curves") else []
    run_tool(figures, *line)
    assert capsys.readouterr().out == f"wrote {out}\n"
    with PIL.Image.open(out) as picture:
        assert min(picture.size) > 100
        assert len(set(picture.convert("L").tobytes())) > 20


def test_curves_hold_every_statistic(run: tuple[Trainer, Path]) -> None:
    figure = figures.draw_curves(run[1])
    drawn = {axis.get_ylabel(): {l.get_label(): l.get_xydata().tolist() for l in axis.lines} for axis in figure.axes}
    assert drawn == {
        "images a second": {"img_per_sec": [[0.008, 3.0], [0.016, 3.0]]},
        "logits": {"real": [[0.008, 0.5], [0.016, 0.5]]},
        "loss": {"G": [[0.008, 0.125], [0.016, 0.0625]]},
        "metrics": {"fd_efficientnet": [[0.008, 9.0]]},
    }


def test_faults(
    tmp_path: Path,
    tiny_config: TinyConfig,
    tiny_trainer: TinyTrainer,
    one_error_line: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_tool(figures, "curves")
    assert "curves needs a run" in capsys.readouterr().err
    assert "holds no stats.jsonl" in one_error_line(figures, "curves", tmp_path)
    for content in ("[", "{}x", "[1]", '[{"fd": 3}]', "3"):
        (tmp_path / "metrics.json").write_text(content)
        assert "metrics.json is damaged: " in one_error_line(figures, "curves", tmp_path)
    assert "holds no checkpoint" in one_error_line(figures, "modulation", tmp_path)
    assert "--out must end in .png, .pdf or .svg" in one_error_line(figures, "scales", "--out", tmp_path / "x.txt")
    config = tiny_config(discriminator={"modulate": "none"})
    trainer, _ = tiny_trainer(config)
    save_checkpoint(tmp_path, config, trainer.state_dict(), 1)
    arguments = "modulation", tmp_path, "--out", tmp_path / "x.png"
    assert "is not modulated" in one_error_line(figures, *arguments)
