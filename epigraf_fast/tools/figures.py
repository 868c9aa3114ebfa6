"""The paper's figures about patches, and a run's curves.

$ epigraf figures scales --out fig3.png
$ epigraf figures schedules --out fig8.png
$ epigraf figures modulation runs/ffhq --out fig7.png
$ epigraf figures curves runs/demo --out curves.png
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from ..camera import Patch
from ..config import Config, PatchConfig
from ..errors import UserError
from ..models.discriminator import Discriminator
from ..progress import waiting
from ..training.checkpoint import load_checkpoint
from ..training.log import read_stats
from ..training.networks import build_discriminator
from ..training.pretrained import find_generator, label_dim_of
from ..training.schedule import patch_beta, patch_min_scale
from ..training.snapshot import read_metrics
from . import plotting
from .arguments import Overwrite, about, check_effect, default, filled, real, whole

MAX_DENSITY = 5.0  # what Fig. 3 clamps densities to
FILTERS = 5  # random filters of a layer in Fig. 7
SCALES, WINDOW = 512, 51  # patch scales in Fig. 7, and how many of them are averaged
LAYERS = 4
GROUPS = {"img_per_sec": "images a second", "time": "seconds for 1000 images"}  # of a run's numbers, their axes
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the annealing, in Fig. 3


def scale_density(config: PatchConfig, smallest: float, cur_nimg: int, scales: np.ndarray) -> np.ndarray:
    """The probability density of patch scales, uniform (Eq. 4) or beta (Eq. 5), at `cur_nimg` images.

    Args:
        smallest: r / R.
        scales: Where, any shape.
    """
    inside = (scales >= smallest) & (scales <= 1)
    if config.distribution == "beta":
        beta = patch_beta(config, cur_nimg)
        x = np.clip((scales - smallest) / (1 - smallest), 0, 1)
        with np.errstate(divide="ignore"):
            density = beta * (1 - x) ** (beta - 1) / (1 - smallest)
        return np.where(inside, density, 0.0)
    least = min(patch_min_scale(config, cur_nimg, 1, smallest), 1 - 1e-9)  # a spike where all scales are 1
    return np.where(inside & (scales >= least), 1 / (1 - least), 0.0)


def modulation(discriminator: Discriminator, scales: Tensor) -> dict[str, Tensor]:
    """sigma of every block's conv1 over patch scales, patches in the middle of the image: name -> [n, C].

    Raises:
        UserError: The discriminator is not modulated.
    """
    if discriminator.config.modulate == "none":
        raise UserError("the discriminator of this run is not modulated: there is nothing to draw")
    middle = Patch(scales, ((1 - scales) / 2)[:, None].expand(-1, 2))
    with torch.no_grad():
        _, sigmas = discriminator.modulation(middle)
    return {f"layer {2 * (number + 1)}": sigma for number, sigma in enumerate(sigmas)}


def load_discriminator(path: Path) -> tuple[Config, Discriminator]:
    """Settings and discriminator of a checkpoint, or of the newest one of a run.

    Raises:
        UserError: There is none, or a generator alone.
    """
    file = find_generator(path)
    if file.suffix == ".safetensors":
        raise UserError(
            f"{path} is a generator alone: D, which this figure draws, is not in it; give a run's checkpoint"
        )
    config, content = load_checkpoint(file)
    if config.discriminator.scales > 1:
        raise UserError("the discriminators of this run are not modulated: there is nothing to draw")
    discriminator = build_discriminator(config, label_dim_of(config, content["trainer"]["average"]))
    discriminator.load_state_dict(content["trainer"]["discriminator"])
    return config, discriminator.eval()


def draw_scales(resolution: int, patch: int, anneal_kimg: float) -> Any:
    """Fig. 3: uniform scales from 0.9 on, beta scales, and Beta(1, beta) itself."""
    figure = plotting.new_figure(12, 3.2)
    axes = figure.subplots(1, 3, sharey=True)
    scales, smallest = np.linspace(0, 1, 2001)[:-1], patch / resolution
    titles = {"uniform": "annealed uniform scales", "beta": "annealed beta scales"}
    for axis, (distribution, title) in zip(axes, titles.items(), strict=False):
        config = PatchConfig(resolution=patch, distribution=distribution, anneal_kimg=anneal_kimg)
        for share in SHARES:
            # The uniform panel begins at 0.9, as published; before that, all scales are nearly 1.
            begun = (1 - 0.9) / (1 - smallest) if distribution == "uniform" else 0.0
            cur_nimg = round((begun + share * (1 - begun)) * anneal_kimg * 1000)
            density = scale_density(config, smallest, cur_nimg, scales)
            axis.plot(scales, density.clip(max=MAX_DENSITY), label=f"t = {share:g} T")
        axis.set(title=title, xlabel="patch scale s")
        axis.legend()
    axes[0].set_ylabel("density")
    for beta in (0.001, 0.2, 0.4, 0.8, 1.0):
        density = beta * (1 - scales) ** (beta - 1)
        axes[2].plot(scales, density.clip(max=MAX_DENSITY), label=f"beta = {beta:g}")
    axes[2].set(title="Beta(1, beta)", xlabel="x")
    axes[2].legend()
    return figure


def draw_schedules(resolution: int, patch: int, anneal_kimg: float, batch: int) -> Any:
    """Fig. 8: the smallest scale over training."""
    figure = plotting.new_figure(5, 3.4)
    axis = figure.subplots()
    kimg = np.linspace(0, 1.5 * anneal_kimg, 601)
    for distribution, name in (("graf", "GRAF"), ("gnerf", "GNeRF"), ("uniform", "linear")):
        config = PatchConfig(resolution=patch, distribution=distribution, anneal_kimg=anneal_kimg)
        values = [patch_min_scale(config, round(k * 1000), batch, patch / resolution) for k in kimg]
        axis.plot(kimg, values, label=name)
    axis.set(xlabel="thousands of images", ylabel="smallest scale", ylim=(0, 1.05))
    axis.legend()
    return figure


def smoothed(sigma: Tensor, width: int) -> Tensor:
    """Means over `width` (odd) neighbouring scales, of [n, C]; at the ends over those that there are."""
    kernel, columns = sigma.new_ones(1, 1, width), sigma.T[:, None]
    count = F.conv1d(torch.ones_like(columns[:1]), kernel, padding=width // 2)
    return (F.conv1d(columns, kernel, padding=width // 2) / count)[:, 0].T


def draw_modulation(discriminator: Discriminator, smallest: float, seed: int) -> Any:
    """Fig. 7: sigma of a few random filters over the patch scale, of four layers, and the mean of all filters.

    Neighbouring scales are averaged: the Fourier features of a scale turn fast, and the learned table has a row for
    each of a thousand.
    """
    scales = torch.linspace(smallest, 1, SCALES)
    sigmas = list(modulation(discriminator, scales).items())
    chosen = [sigmas[i] for i in sorted({round(x) for x in np.linspace(0, len(sigmas) - 1, LAYERS)})]
    figure = plotting.new_figure(3.2 * len(chosen), 4.2)
    axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    rng = torch.Generator().manual_seed(seed)
    for axis, (name, sigma) in zip(axes, chosen, strict=True):
        filters = sorted(torch.randperm(sigma.shape[1], generator=rng)[:FILTERS].tolist())
        lines = smoothed(sigma, WINDOW)
        for number in filters:
            axis.plot(scales.numpy(), lines[:, number].numpy(), linewidth=1.2, label=f"filter {number}")
        axis.plot(scales.numpy(), lines.mean(dim=1).numpy(), "k--", linewidth=1.2, label=f"mean of {sigma.shape[1]}")
        axis.axhline(1, color="grey", linewidth=0.6)
        axis.set(title=name, xlabel="patch scale s (1: the whole image)", ylim=(0, 2))
        axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0].set_ylabel("sigma, the factor on the input of conv1")
    figure.suptitle(
        "How D uses its filters at each patch scale: 0 is off, 1 as without modulation, 2 twice as strong; "
        f"means over {WINDOW / SCALES:.0%} of the scales",
        fontsize=9,
    )
    return figure


def draw_curves(run_dir: Path) -> Any:
    """Losses, logits, speed and the rest of stats.jsonl, one panel a group; distances of metrics.json in their own."""
    lines = read_stats(run_dir / "stats.jsonl")
    for entry in read_metrics(run_dir):
        lines.append({f"metrics/{name}": value for name, value in entry.items()} | {"cur_nimg": entry["cur_nimg"]})
    hidden = {"cur_nimg", "kimg", "seconds", "sec_per_kimg", "images", "metrics/cur_nimg", "metrics/images"}
    groups: dict[str, set[str]] = {}
    for line in lines:
        for name in line.keys() - hidden:
            if "/" in name or name == "img_per_sec":
                groups.setdefault(name.partition("/")[0], set()).add(name)
    if not groups:
        raise UserError(f"{run_dir} holds no stats.jsonl with a line in it: give the folder of a run")
    figure = plotting.new_figure(8, 2.4 * len(groups))
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)
    for axis, (group, names) in zip(axes[:, 0], sorted(groups.items()), strict=True):
        for name in sorted(names):
            points = [(line["cur_nimg"] / 1000, line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], marker="." if len(points) < 30 else "")
        axis.set_ylabel(GROUPS.get(group, group.replace("_", " ")))
        axis.legend(loc="upper right")
    axes[-1, 0].set_xlabel("thousands of images")
    return figure


FIGURES = ("scales", "schedules", "modulation", "curves")
# Flag -> the figures that it is for, and what holds without it.
FOR_FIGURES = {
    "run": ("modulation", "curves"),
    "resolution": ("scales", "schedules"),
    "patch": ("scales", "schedules"),
    "anneal_kimg": ("scales", "schedules"),
    "batch": ("schedules",),
    "seed": ("modulation",),
}
PATCH = PatchConfig()
DEFAULTS = {"resolution": 512, "patch": PATCH.resolution, "anneal_kimg": PATCH.anneal_kimg, "batch": 64, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf figures`."""

    figure: Annotated[Positional[Literal[FIGURES]], about(metavar="|".join(FIGURES), help="What to draw.")]
    run: Annotated[Positional[Path | None], about(metavar="[RUN]", help_behavior_hint="")] = None
    """For modulation a checkpoint or run folder, for curves a run folder."""
    out: Annotated[Path | None, default("the figure's name, .png")] = None
    """The .png, .pdf or .svg to write."""
    overwrite: Overwrite = False
    resolution: Annotated[int | None, whole(8, 16384), default(DEFAULTS["resolution"])] = None
    """For scales and schedules: pixels a side of the images."""
    patch: Annotated[int | None, whole(1, 16384), default(DEFAULTS["patch"])] = None
    """For scales and schedules: pixels a side of a patch."""
    anneal_kimg: Annotated[float | None, real(1e-3, 1e9), default(DEFAULTS["anneal_kimg"])] = None
    """For scales and schedules: thousands of images until patches have all scales."""
    batch: Annotated[int | None, whole(1, 1_000_000), default(DEFAULTS["batch"])] = None
    """For schedules: images an iteration."""
    seed: Annotated[int | None, whole(0, 2**63 - 1), default(DEFAULTS["seed"])] = None
    """For modulation: which filters are shown."""


def run(options: Options) -> None:
    check_effect(options, options.figure, FOR_FIGURES)
    if options.run is None and options.figure in FOR_FIGURES["run"]:
        raise UserError(f"{options.figure} needs a run: give its folder")
    options = filled(options, DEFAULTS)
    if options.patch >= options.resolution:
        raise UserError(f"--patch must be below the --resolution {options.resolution}, got {options.patch}")
    out = options.out or Path(f"{options.figure}.png")
    plotting.check_figure("--out", out, overwrite=options.overwrite)
    if options.figure == "scales":
        figure = draw_scales(options.resolution, options.patch, options.anneal_kimg)
    elif options.figure == "schedules":
        figure = draw_schedules(options.resolution, options.patch, options.anneal_kimg, options.batch)
    elif options.figure == "modulation":
        with waiting("reading the checkpoint"):
            config, discriminator = load_discriminator(options.run)
        figure = draw_modulation(discriminator, config.patch.resolution / config.resolution, options.seed)
    else:
        figure = draw_curves(options.run)
    plotting.save(figure, out, dpi=120)
    print(f"wrote {out}")
