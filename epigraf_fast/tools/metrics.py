"""How good a generator is: distances to the data, and whether its views agree with each other.

$ epigraf metrics runs/demo
$ epigraf metrics runs/ffhq --data datasets/ffhq.zip --images 50000 --all-reals --inception inception.pt

A folder stands for all its checkpoints. Weights are local files, nothing is downloaded: those of EfficientNet come with
a package, those of Inception (FID, KID) as a TorchScript file that maps uint8 images to 2048 features.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ..camera import cam2world_matrix, camera_rays
from ..config import CameraConfig, Config
from ..data import ImageDataset
from ..errors import UserError
from ..models.generator import Generator, Images
from ..progress import Progress, waiting
from ..training.checkpoint import NAME, list_checkpoints
from ..training.metrics import FeatureDistance, ScriptFeatures, kernel_distance
from ..training.pretrained import BUILTIN, find_generator, load_generator
from ..training.sampling import fixed_latents, known_labels, surface_depth
from ..training.snapshot import METRIC_SEED, measure_fakes, real_images
from . import plotting
from .arguments import Checkpoint, Device, Json, Overwrite, about, default, optional, real, whole
from .command import check_output, output

SOLID = 0.9  # opacity of the rays whose points are carried over to the other view
OCCLUSION = 0.02  # a point this share of the ray range behind the other view's surface is hidden there


def reprojection_error(
    first: Images, first_angles: Tensor, second: Images, second_angles: Tensor, camera: CameraConfig
) -> dict[str, float]:
    """Carries the surface points that one view sees over to another view and compares what is there.

    A point is origin + t direction at the rendered depth t of a solid pixel. Where it falls into the second image, on a
    solid pixel, its distance from the second camera is compared with the depth there, and, unless it is hidden, its
    colour with the colour there (both bilinear).

    Args:
        first, second: Of the same objects, rgb [B, 3, R, R].
        first_angles, second_angles: [B, 3] radians.

    Returns:
        reprojection_rgb: Mean absolute difference of colours in [0, 1].
        reprojection_depth: Median absolute difference of depths, as a share of ray_end - ray_start.
        reprojection_points: Share of the solid pixels that were compared in colour.
        All NaN where nothing could be compared.
    """
    size, span = first.depth.shape[-1], camera.ray_end - camera.ray_start
    matrices = [cam2world_matrix(angles, camera.radius) for angles in (first_angles, second_angles)]
    origins, directions = camera_rays(matrices[0], camera.fov, size)
    points = origins + surface_depth(first, camera.ray_end).flatten(1)[..., None] * directions  # [B, R, 3]
    local = (points - matrices[1][:, None, :3, 3]) @ matrices[1][:, :3, :3]  # in the second camera's axes
    x, y, z = local.unbind(-1)
    place = torch.stack([x, -y], dim=-1) / (-z * math.tan(math.radians(camera.fov) / 2))[..., None]
    seen = torch.cat([second.rgb, surface_depth(second, camera.ray_end), second.weight_sum], dim=1)
    found = F.grid_sample(seen, place[:, None], mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]

    solid = first.weight_sum.flatten(1) > SOLID
    inside = solid & (z < 0) & (place.abs().amax(dim=-1) <= 1) & (found[:, 4] > SOLID)
    behind = (local.norm(dim=-1) - found[:, 3]) / span
    visible = inside & (behind < OCCLUSION)
    colours = (first.rgb.flatten(2) - found[:, :3]).abs().mean(dim=1) / 2
    return {
        "reprojection_rgb": float(colours[visible].mean()),
        "reprojection_depth": float(behind[inside].abs().median()) if inside.any() else math.nan,
        "reprojection_points": float(visible.sum() / solid.sum()) if solid.any() else math.nan,
    }


@torch.no_grad()
def consistency(generator: Generator, dataset: ImageDataset, config: Config, num: int, turn: float) -> dict[str, float]:
    """`reprojection_error` between two views `turn` radians of yaw apart, mean over `num` objects."""
    latents = fixed_latents(num, generator, dataset, config.camera, METRIC_SEED)
    errors = []
    for one, its_label, pose in Progress(list(zip(*latents, strict=True)), "re-projected objects"):
        ws = generator.ws(one[None], its_label[None])
        planes = generator.synthesis(ws, noise_mode="const")
        poses = [pose[None], pose[None] + torch.tensor([turn, 0.0, 0.0], device=pose.device)]
        views = [generator.render(planes, p, config.resolution, ws=ws, stochastic=False) for p in poses]
        errors.append(reprojection_error(views[0], poses[0], views[1], poses[1], config.camera))
    means = {}
    for name in errors[0]:
        values = [error[name] for error in errors if not math.isnan(error[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


class Distances:
    """fd_efficientnet, and FID and KID where Inception's weights are given; the real images are seen once.

    Args:
        dataset: The real images.
        num_real: How many of them.

    Attributes:
        num_real: How many there were.
        num_features: Name -> how many features it looks at: from fewer images than that it is far too large.
    """

    def __init__(self, dataset: ImageDataset, num_real: int, inception: Path | None, device: torch.device) -> None:
        with waiting("reading the feature networks"):
            self.frechet = {"fd_efficientnet": FeatureDistance(device)}
            self.features = None
            if inception is not None:
                self.features = ScriptFeatures(inception, device)
                self.frechet["fid"] = FeatureDistance(device, self.features)
        self.num_real = min(num_real, len(dataset))
        self.num_features = {name: distance.num_features for name, distance in self.frechet.items()}
        reals = []
        with Progress(what="real images", total=self.num_real) as bar:
            for images in real_images(dataset, num_real):
                for distance in self.frechet.values():
                    distance.update_real(images)
                if self.features is not None:
                    reals.append(self.features(images))
                bar.update(len(images))
        self.reals = torch.cat(reals) if reals else None

    def measure(self, generator: Generator, dataset: ImageDataset, config: Config, num: int) -> dict[str, float]:
        """Of `num` generated images."""
        fakes: list[Tensor] = []
        for distance in self.frechet.values():
            distance.reset_fake()

        def use(images: Tensor) -> None:
            for distance in self.frechet.values():
                distance.update_fake(images)
            if self.features is not None:
                fakes.append(self.features(images))

        measure_fakes(generator, dataset, config, num, use)
        values = {}
        for name, distance in self.frechet.items():
            with waiting(f"computing {name}"):
                values[name] = distance.compute()
        if self.reals is not None:
            values["kid"] = kernel_distance(
                self.reals, torch.cat(fakes), progress=lambda subsets: Progress(subsets, "computing kid")
            )
        return values


def remarks(distances: Distances, images: int) -> Iterator[str]:
    """What has to be known of the numbers that will be measured."""
    yield (
        f"{images:,} generated images against {distances.num_real:,} real ones: distances compare only with those of "
        "as many"
    )
    fewest = min(images, distances.num_real)
    for name, features in distances.num_features.items():
        if fewest < features:
            yield (
                f"warning: {name} looks at {features:,} features, of which {fewest:,} images do not tell: it comes out "
                f"far too large; give at least --images {features}, and as many real ones"
            )


# Number -> its unit, and what is better.
UNITS = {
    "fd_efficientnet": "squared distance of features; lower is better",
    "fid": "squared distance of features; lower is better",
    "kid": "squared mean discrepancy; lower is better",
    "reprojection_rgb": "mean difference of colours, of 1; lower is better",
    "reprojection_depth": "median difference of depths, of the ray range; lower is better",
    "reprojection_points": "share of solid pixels that were compared",
}
KEPT = "measurements.json"  # in a run's folder: what was measured, of checkpoints that are gone too


def kept(folder: Path, results: Sequence[dict]) -> list[dict]:
    """Adds results to what the run's folder keeps; all there, in order, that were measured with the same options."""
    path = folder / KEPT
    try:
        before = json.loads(path.read_text()) if path.is_file() else []
        same = {(Path(result["checkpoint"]).name, conditions(result)): result for result in [*before, *results]}
    except (ValueError, TypeError, KeyError, AttributeError):
        Progress.say(f"warning: {path} is damaged, and begun anew")
        same = {(Path(result["checkpoint"]).name, conditions(result)): result for result in results}
    everything = [same[key] for key in sorted(same)]
    try:
        with output(path) as partial:
            partial.write_text(json.dumps(everything, indent=2) + "\n")
    except UserError as error:
        Progress.say(f"warning: {error}; the numbers of checkpoints that are removed will be lost")
    return [result for result in everything if conditions(result) == conditions(results[0])]


def conditions(result: dict) -> str:
    """What has to be the same where two results are compared."""
    return json.dumps([sorted(result), *(result.get(name) for name in ("data", "images", "reals", "objects", "turn"))])


def plot(results: Sequence[dict], path: Path) -> None:
    """Draws every number against the images seen, as the names of the checkpoints tell; from 0 on, lest noise looks
    like progress."""
    names = [name for name in UNITS if name in results[0]]
    found = [NAME.fullmatch(Path(result["checkpoint"]).name) for result in results]
    kimg = [int(match[1]) / 1000 if match else float(number) for number, match in enumerate(found)]
    figure = plotting.new_figure(3.6 * len(names), 3.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [result[name] for result in results]
        axes.plot(kimg, values, marker="o")
        top = max((value for value in values if math.isfinite(value)), default=1.0)
        axes.set_ylim(min(0.0, *values), 1.0 if name == "reprojection_points" else 1.15 * top if top > 0 else 1.0)
        axes.set(title=name, xlabel="thousands of images" if all(found) else "checkpoint")
        axes.set_ylabel(textwrap.fill(UNITS[name], 34), fontsize=8)
    figure.suptitle(f"{results[0]['images']:,} generated images against {results[0]['reals']:,} real ones", fontsize=9)
    plotting.save(figure, path, dpi=100)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of `epigraf metrics`."""

    checkpoint: Annotated[Checkpoint, about(help="A checkpoint, a folder: all its checkpoints, or `builtin`.")]
    data: Annotated[str | None, default("what the run was trained on")] = None
    """The real images."""
    images: Annotated[int, whole(2, 10_000_000)] = 1280
    """How many images to generate, and how many real ones to compare with."""
    all_reals: bool = False
    """Compare with every real image, as FID50k-full does."""
    inception: Annotated[Path | None, optional] = None
    """TorchScript file of Inception: adds FID and KID."""
    objects: Annotated[int, whole(0, 1_000_000)] = 16
    """How many objects the re-projection error looks at; 0 leaves it out, as 2D generators need."""
    turn: Annotated[float, real(-math.pi, math.pi)] = 0.2
    """Radians of yaw between the two views that it compares."""
    out: Annotated[Path | None, optional] = None
    """The .json to write the results to, after every checkpoint."""
    plot: Annotated[Path | None, optional] = None
    """The .png, .pdf or .svg to draw the results of all checkpoints in."""
    overwrite: Overwrite = False
    device: Device = None
    json: Json = False


def run(options: Options) -> None:
    if options.out is not None:
        check_output("--out", options.out, (".json",), overwrite=options.overwrite)
    if options.plot is not None:
        plotting.check_figure("--plot", options.plot, overwrite=options.overwrite)
    if options.turn == 0:
        raise UserError("--turn must not be 0, which compares a view with itself; --objects 0 leaves the error out")
    folder = options.checkpoint != BUILTIN and options.checkpoint.is_dir()
    paths = (
        (list_checkpoints(options.checkpoint) or sorted(options.checkpoint.glob("checkpoint-*.pt"))) if folder else []
    )
    run_folder = folder and bool(paths)
    paths = paths or [find_generator(options.checkpoint)]
    distances, results = None, []
    for path in paths:
        with waiting("reading checkpoint and data set"):
            config, generator = load_generator(path, options.device, three_d=options.objects > 0)
            dataset = ImageDataset(
                options.data or config.data,
                config.resolution,
                use_labels=generator.label_dim > 0,
                mirror=config.loader.mirror,
            )
        if dataset.label_dim != generator.label_dim:
            raise UserError(
                f"{dataset.path} has {dataset.label_dim} classes, {path} was trained on {generator.label_dim}: "
                "give the set it was trained on"
            )
        known, found = known_labels(generator), dataset.label_values
        unknown = sorted(set(found.tolist()) - set(known.tolist())) if known.ndim == found.ndim == 1 else []
        if unknown:
            raise UserError(
                f"{dataset.path} has images of class {unknown[0]}, without which {path} was trained: "
                "give the set it was trained on"
            )
        if distances is None:
            device = generator.mean_camera_pose.device
            num_real = len(dataset) if options.all_reals else options.images
            distances = Distances(dataset, num_real, options.inception, device)
            for line in remarks(distances, options.images):
                Progress.say(line)
        result = {"checkpoint": str(path), "data": str(dataset.path), "images": options.images}
        result["reals"] = distances.num_real
        result |= distances.measure(generator, dataset, config, options.images)
        if options.objects:
            result |= {"objects": options.objects, "turn": options.turn}
            result |= consistency(generator, dataset, config, options.objects, options.turn)
        results.append(result)
        every = kept(options.checkpoint, results) if run_folder else results
        if not options.json:
            values = (f"{name} {result[name]:.4g}" for name in UNITS if name in result)
            print(path.name, *values, sep="  ", flush=True)
        if options.out is not None:  # after each, so that an interruption loses none that is measured
            with output(options.out) as partial:
                partial.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot is not None:
        plot(every, options.plot)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for path in filter(None, (options.out, options.plot)):
        print(f"wrote {path}")
