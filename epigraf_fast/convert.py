"""Converts published EpiGRAF snapshots to this project's format, and exports average generators as safetensors.

$ python -m epigraf_fast.convert network-snapshot-025000.pkl runs/ffhq-published
$ python -m epigraf_fast.convert runs/ffhq exported
$ python -m epigraf_fast.convert runs/ffhq exported --names published

No code of a pickle is run. Every tensor is accounted for: taken over, checked to be a constant that
is computed here, known to be unused, or named as left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Parser, check_effect, real, whole
from .camera import PRIORS
from .command import check_folder, output_folder, running, waiting
from .config import PRESETS, Config, check, preset, to_dict
from .errors import UserError
from .models.background import ENCODER_STEPS
from .models.layers import LOW_PASS, ScalarEncoder, channels_at
from .published import Optimizer, Snapshot, read_snapshot
from .training.checkpoint import checkpoint_path, save_checkpoint
from .training.identify import SNAPSHOT, what_else
from .training.memory import meta_networks
from .training.pretrained import check_finite, load_generator, save_safetensors

# Published name -> ours, the first pattern that matches the whole name.
GENERATOR_NAMES = (
    (r"synthesis\.tri_plane_decoder\.(b\d+)\.torgb\.(.+)", r"synthesis.\1.to_planes.\2"),
    (r"synthesis\.tri_plane_decoder\.(b\d+\..+)", r"synthesis.\1"),
    (r"synthesis\.tri_plane_mlp\.model\.([01])\.(weight|bias)", r"decoder.fc\1.\2"),
    (r"synthesis\.bg_model\.blocks\.0\.conv1\.(.+)", r"background.layer0.\1"),
    (r"synthesis\.bg_model\.blocks\.1\.conv0\.(.+)", r"background.layer1.\1"),
    (r"synthesis\.bg_model\.blocks\.1\.conv1\.(.+)", r"background.layer2.\1"),
    (r"synthesis\.bg_model\.blocks\.([01])\.to_out\.(.+)", r"background.out\1.\2"),
    (r"mapping\.mean_camera_pose", r"mean_camera_pose"),
    (r"(mapping\..+)", r"\1"),
)
DISCRIMINATOR_NAMES = (
    (r"scalar_enc\.const_embed\.weight", r"patch_encoder.table"),
    (r"hyper_mod_mapping\.(.+)", r"hypernetwork.\1"),
    (r"head_mapping\.(.+)", r"head.\1"),
    (r"b4\.(conv|fc|out)\.(.+)", r"\1.\2"),
    (r"(b\d+)\.fromrgb\.(.+)", r"\1.from_rgb.\2"),
    (r"(b\d+)\.conv1\.affine\.(.+)", r"\1.affine.\2"),
    (r"(b\d+\..+)", r"\1"),
)
BACKGROUND = "synthesis.bg_model.blocks."
BACKGROUND_LAYERS = {
    "layer0": "0.conv1",
    "layer1": "1.conv0",
    "layer2": "1.conv1",
    "out0": "0.to_out",
    "out1": "1.to_out",
}
BACKGROUND_STEPS = 8  # of the published code
EXPORTS = {"ours": "G_ema.safetensors", "published": "G_ema-published.safetensors"}
CAMERA_STEPS = "head_mapping.camera_scalar_enc"
COEFFICIENTS = ".fourier_encoder.fourier_coefs"


@dataclass
class Account:
    """What became of the tensors of one published network."""

    taken: dict[str, str] = field(default_factory=dict)  # published name -> ours
    constant: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self, name: str) -> Iterator[str]:
        total = len(self.taken) + len(self.constant) + len(self.unused) + len(self.left)
        yield (
            f"{name}: {total} tensors: {len(self.taken)} taken, {len(self.constant)} constants checked, "
            f"{len(self.unused)} unused, {len(self.left)} left"
        )
        if self.unused:
            yield f"  unused (later blocks never look at the image): {', '.join(self.unused)}"
        if self.left:
            yield f"  left: {', '.join(self.left)}"


def account_for(tensors: dict[str, Tensor], network: str) -> Account:
    """Sorts the tensors of a published network: "G", "G_ema" or "D".

    Raises:
        UserError: A constant has another value than the one that is computed here.
    """
    account = Account()
    names = DISCRIMINATOR_NAMES if network == "D" else GENERATOR_NAMES
    first_block = max((int(found[1]) for found in map(re.compile(r"b(\d+)\.").match, tensors) if found), default=0)
    for name, tensor in tensors.items():
        if name.endswith(("resample_filter", COEFFICIENTS)):
            _check_constant(network, name, tensor)
            account.constant.append(name)
        elif network == "D" and re.match(rf"b(?!{first_block}\.)\d+\.fromrgb\.", name):
            account.unused.append(name)
        else:
            ours = _translate(name, names)
            if ours is None:
                account.left.append(name)
            else:
                account.taken[name] = ours
    return account


def _translate(name: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    for pattern, ours in patterns:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(ours)
    return None


def low_pass_filter() -> Tensor:
    """The published `resample_filter`: [1, 3, 3, 1] with itself, sum 1."""
    taps = torch.tensor(LOW_PASS)
    return taps[:, None] * taps


def _check_constant(network: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    tensor = tensor.float()
    if name.endswith("resample_filter"):
        good = tensor.shape == (4, 4) and torch.allclose(tensor, low_pass_filter())
    else:  # frequencies in octaves
        powers = 2.0 ** torch.arange(len(tensor))
        good = tensor.ndim == 1 and bool(tensor[0] > 0) and torch.allclose(tensor / tensor[0], powers)
    if not good:
        raise UserError(f"{network}: {name} is not the constant that this version computes")


def config_of(snapshot: Snapshot, base: Config, patch_resolution: int | None = None) -> tuple[Config, int]:
    """Settings and number of label numbers: from the tensors' shapes, then the stored settings, then the preset `base`.

    Raises:
        UserError: The shapes are not those of an EpiGRAF model.
    """
    generator, discriminator = snapshot.networks["G_ema"], snapshot.networks.get("D")
    stored = snapshot.settings
    try:
        planes = _blocks(generator, "synthesis.tri_plane_decoder.")
        w_dim = len(generator["mapping.w_avg"])
        embed = generator.get("mapping.embed.weight")
        condition = 0 if embed is None else embed.shape[1]
        label_dim, d_settings, resolution, camera_in_d = condition, base.discriminator, base.resolution, False
        if discriminator is not None:
            d_settings, resolution, label_dim = _discriminator_config(discriminator, base)
            camera_in_d = d_settings.camera_conditioning
        if condition - label_dim not in (0, 2):
            raise UserError(f"the mapping has {condition} conditions, the labels are {label_dim}")
        outputs = generator[f"synthesis.tri_plane_decoder.b{max(planes)}.torgb.weight"].shape[0]
        hidden, plane_channels = generator["synthesis.tri_plane_mlp.model.0.weight"].shape
        decoder = generator["synthesis.tri_plane_mlp.model.1.weight"]
        painted = outputs - 3 * plane_channels
        if painted not in (0, 3) or len(decoder) != 4 or "synthesis.tri_plane_mlp.model.2.weight" in generator:
            raise UserError(
                "the planes and their decoder do not fit: view directions or coordinates were never published"
            )
        background = "plane" if painted else "none"
        if any(name.startswith(BACKGROUND) for name in generator):
            background = "sphere"
        channel_base, channel_max = _channels(
            {res: generator[f"synthesis.tri_plane_decoder.b{res}.conv1.weight"].shape[0] for res in planes},
            base.generator.channel_base,
        )
        config = dataclasses.replace(
            base,
            resolution=resolution,
            camera=_camera(stored, base),
            generator=dataclasses.replace(
                base.generator,
                z_dim=generator["mapping.fc0.weight"].shape[1] - (w_dim if condition else 0),
                w_dim=w_dim,
                mapping_layers=sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in generator),
                plane_resolution=max(planes),
                plane_channels=plane_channels,
                channel_base=channel_base,
                channel_max=channel_max,
                decoder_hidden=hidden,
                pose_conditioning=condition - label_dim == 2,
            ),
            renderer=dataclasses.replace(
                base.renderer,
                coarse_samples=_stored(stored, "num_ray_steps", base.renderer.coarse_samples),
                fine_samples=_stored(stored, "num_ray_steps", base.renderer.fine_samples),
                density_activation=_stored(stored, "clamp_mode", base.renderer.density_activation),
                white_background=_stored(stored, "dataset.white_back", base.renderer.white_background),
                background=background,
                background_samples=_stored(stored, "bg_model.num_steps", BACKGROUND_STEPS)
                if background == "sphere"
                else base.renderer.background_samples,
                background_start=_stored(stored, "bg_model.start", base.renderer.background_start),
                last_back=_stored(stored, "dataset.last_back", base.renderer.last_back),
            ),
            discriminator=dataclasses.replace(d_settings, camera_conditioning=camera_in_d),
            patch=dataclasses.replace(
                base.patch,
                resolution=patch_resolution or min(resolution, _stored(stored, "patch.resolution", 64)),
            ),
            loader=dataclasses.replace(base.loader, labels=label_dim > 0),
        )
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"G_ema or D is no EpiGRAF network: {error} is not there") from None
    check(config)
    return config, label_dim


def _blocks(tensors: dict[str, Tensor], prefix: str) -> list[int]:
    """The resolutions b4, b8, ... that have tensors."""
    found = (re.match(rf"{re.escape(prefix)}b(\d+)\.", name) for name in tensors)
    return sorted({int(match[1]) for match in found if match})


def _channels(widths: dict[int, int], usual: int) -> tuple[int, int]:
    """channel_base and channel_max of the rule min(base / res, max); the usual base, if the widths allow it."""
    channel_max, last = max(widths.values()), max(widths)
    for channel_base in (usual, widths[last] * last):
        if all(channels_at(res, channel_base, channel_max) == width for res, width in widths.items()):
            return channel_base, channel_max
    raise UserError(f"the widths {widths} do not follow min(base / resolution, max)")


def _discriminator_config(tensors: dict[str, Tensor], base: Config) -> tuple[Any, int, int]:
    """Its settings, the image resolution and the number of label numbers."""
    blocks = [res for res in _blocks(tensors, "") if res > 4]
    widths = {res: tensors[f"b{res}.conv0.weight"].shape[0] for res in blocks}
    widths[4] = tensors["b4.fc.weight"].shape[0]
    channel_base, channel_max = _channels(widths, base.discriminator.channel_base)
    modulated = "hyper_mod_mapping.fc0.weight" in tensors
    camera = CAMERA_STEPS + COEFFICIENTS in tensors
    settings = dataclasses.replace(
        base.discriminator,
        channel_base=channel_base,
        channel_max=channel_max,
        modulate="input" if modulated else "none",
        camera_conditioning=camera,
    )
    known = 0
    if modulated:
        table = tensors["scalar_enc.const_embed.weight"]
        settings = dataclasses.replace(
            settings,
            code_dim=tensors["hyper_mod_mapping.fc0.weight"].shape[0],
            patch_steps=table.shape[0] - 1,
            patch_table_dim=table.shape[1],
        )
        known += tensors["hyper_mod_mapping.embed.weight"].shape[1]
    if camera:
        levels = len(tensors[CAMERA_STEPS + COEFFICIENTS])
        settings = dataclasses.replace(settings, camera_steps=2**levels)
        known += 2 * 2 * levels
    head = tensors.get("head_mapping.embed.weight")
    return settings, max(blocks), (0 if head is None else head.shape[1]) - known


def _stored(stored: dict[str, Any], name: str, default: Any) -> Any:
    """A stored setting by the end of its dotted name, if it is there and of the default's kind."""
    for key, value in stored.items():
        if (f".{key}").endswith(f".{name}"):
            if isinstance(default, float) and isinstance(value, int):
                value = float(value)
            if type(value) is type(default):
                return value
    return default


# Ours -> the ends of the stored names; the cameras stood under `sampling` in older snapshots.
CAMERA_NAMES = {name: (f"sampling.{name}", f"camera.{name}") for name in ("fov", "radius", "ray_start", "ray_end")}
CAMERA_NAMES |= {"prior": ("sampling.dist", "camera.dist"), "cube_scale": ("dataset.cube_scale",)}
for _ours, _theirs in (("yaw", "horizontal"), ("pitch", "vertical")):
    CAMERA_NAMES[f"{_ours}_mean"] = f"sampling.{_theirs}_mean", f"camera.{_theirs}_mean"
    CAMERA_NAMES[f"{_ours}_spread"] = f"sampling.{_theirs}_stddev", f"camera.{_theirs}_stddev"


def _camera(stored: dict[str, Any], base: Config) -> Any:
    values = {}
    for ours, names in CAMERA_NAMES.items():
        values[ours] = getattr(base.camera, ours)
        for name in names:
            values[ours] = _stored(stored, name, values[ours])
    if values["prior"] not in PRIORS:
        values["prior"] = base.camera.prior
    return dataclasses.replace(base.camera, **values)


def translate(tensors: dict[str, Tensor], account: Account, module: nn.Module, network: str) -> dict[str, Tensor]:
    """Our state dict of a published network.

    Raises:
        UserError: A tensor is missing, too many, or has another shape.
    """
    state = {ours: tensors[theirs] for theirs, ours in account.taken.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise UserError(f"{network} has no tensor for {name}")
        if name not in expected:
            raise UserError(f"{network} has {name}, which the network of these settings has not")
        if tuple(state[name].shape) != expected[name]:
            raise UserError(f"{network}: {name} has shape {list(state[name].shape)}, expected {list(expected[name])}")
    return {name: state[name].detach().float().contiguous().clone() for name in expected}


def optimizer_state(
    stored: Optimizer | None, names: list[str], account: Account, module: nn.Module
) -> tuple[dict[str, Any], str]:
    """Adam's state by the number of our parameter, and what became of it. Without a usable one: empty."""
    if stored is None:
        return {"state": {}}, "not there"
    if len(stored.states) != len(names):
        return {"state": {}}, f"left: it has {len(stored.states)} parameters, the network {len(names)}"
    by_name = {account.taken.get(name): state for name, state in zip(names, stored.states, strict=True)}
    states = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        state = by_name.get(name)
        shapes = {key: getattr(state.get(key), "shape", None) for key in ("exp_avg", "exp_avg_sq")} if state else {}
        if not state or "step" not in state or any(shape != parameter.shape for shape in shapes.values()):
            return {"state": {}}, f"left: it has no state that fits {name}"
        states[number] = {
            "step": torch.as_tensor(float(state["step"])),
            "exp_avg": state["exp_avg"].float().contiguous().clone(),
            "exp_avg_sq": state["exp_avg_sq"].float().contiguous().clone(),
        }
    return {"state": states}, f"taken for {len(states)} parameters"


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our average generator under the published names, constants included."""
    back = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"synthesis\.(b\d+)\.(.+)", name)
        behind = re.fullmatch(r"background\.(\w+)\.(.+)", name)
        fully_connected = re.fullmatch(r"decoder\.fc([01])\.(.+)", name)
        if layer:
            block, rest = f"synthesis.tri_plane_decoder.{layer[1]}", layer[2].replace("to_planes.", "torgb.")
            back[f"{block}.{rest}"] = tensor
            back[f"{block}.resample_filter"] = low_pass_filter()
            if rest.endswith(".noise_const"):
                back[f"{block}.{rest.removesuffix('noise_const')}resample_filter"] = low_pass_filter()
        elif fully_connected:
            back[f"synthesis.tri_plane_mlp.model.{fully_connected[1]}.{fully_connected[2]}"] = tensor
        elif behind:
            back[f"{BACKGROUND}{BACKGROUND_LAYERS[behind[1]]}.{behind[2]}"] = tensor
        elif name == "mean_camera_pose":
            back["mapping.mean_camera_pose"] = tensor
        elif name.startswith("mapping."):
            back[name] = tensor
        else:
            raise UserError(f"{name} has no published name")
    if any(name.startswith(BACKGROUND) for name in back):
        back[f"{BACKGROUND}0.scalar_enc{COEFFICIENTS}"] = ScalarEncoder(ENCODER_STEPS).frequencies
    return back


def import_snapshot(
    path: Path, out: Path, *, preset_name: str = "ffhq", patch_resolution: int | None = None, kimg: float | None = None
) -> list[str]:
    """Converts a published pickle.

    Writes `out`/G_ema.safetensors, `out`/config.json and, if the pickle has G and D too, a checkpoint to train on from.

    Returns:
        The report, line by line.
    """
    snapshot = read_snapshot(path)
    base = dataclasses.replace(preset(preset_name), run_dir=str(out))
    try:
        config, label_dim = config_of(snapshot, base, patch_resolution)
        generator, discriminator = meta_networks(config, label_dim)
        modules = {"G_ema": generator, "G": generator, "D": discriminator}
        accounts = {name: account_for(tensors, name) for name, tensors in snapshot.networks.items()}
        states = {
            name: translate(tensors, accounts[name], modules[name], name) for name, tensors in snapshot.networks.items()
        }
        for name, state in states.items():
            check_finite(state, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    report = [line for name, account in accounts.items() for line in account.lines(name)]

    report += [f"wrote {out / 'G_ema.safetensors'}", f"wrote {out / 'config.json'}"]
    if {"G", "D"} <= states.keys():
        number = re.search(r"(\d{6,})", path.stem)
        images = round((float(number[1]) if kimg is None and number else kimg or 0.0) * 1000)
        trainer = {
            "generator": states["G"],
            "discriminator": states["D"],
            "average": states["G_ema"],
            "cur_nimg": images,
            "iterations": images // config.batch,
            "augment_p": torch.tensor(snapshot.augment_p),
            "sums": {},
            "counts": {},
        }
        for name, ours, module in (("G", "g_optimizer", generator), ("D", "d_optimizer", discriminator)):
            trainer[ours], what = optimizer_state(
                snapshot.optimizers.get(name), snapshot.parameters[name], accounts[name], module
            )
            report.append(f"Adam of {name}: {what}")
        report.append(f"augmentation strength: {snapshot.augment_p:.4f}; images seen: {images:,}")
        report.append(f"wrote {checkpoint_path(out, images)}")
    else:
        trainer = None
        report.append("G or D is not in the file: no checkpoint to train on from was written")
    with output_folder(out) as partial:
        save_safetensors(states["G_ema"], config, partial / "G_ema.safetensors")
        (partial / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if trainer is not None:
            save_checkpoint(partial, config, trainer, keep=config.keep_checkpoints)
    return report


def export_generator(path: Path, out: Path, names: str = "ours") -> list[str]:
    """Writes the average generator of our checkpoint as safetensors.

    Args:
        names: "ours", as every tool here reads it, or "published".
    """
    config, generator = load_generator(path, three_d=names == "published")
    state, target = generator.state_dict(), out / EXPORTS[names]
    if names == "published":
        state = published_names(state)
    with output_folder(out) as partial:
        save_safetensors(state, config, partial / target.name)
    whose = "the published" if names == "published" else "our"
    return [f"G_ema: {len(state)} tensors under {whose} names", f"wrote {target}"]


# Flag -> the kind of checkpoint that it is for, and what holds without it.
PICKLE, OURS = "a .pkl", "a checkpoint of ours"
FOR_KINDS = {"preset": (PICKLE,), "patch_resolution": (PICKLE,), "kimg": (PICKLE,), "names": (OURS,)}


def arguments() -> Parser:
    parser = Parser("convert", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a published .pkl, or a checkpoint or run folder of ours")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--preset",
        choices=PRESETS[1:],
        help="a .pkl: camera and training settings that it does not tell (default: ffhq)",
    )
    parser.add_argument(
        "--patch-resolution", type=whole(8, 4096), help="a .pkl: of the patches (default: as stored, else 64)"
    )
    parser.add_argument(
        "--names",
        choices=EXPORTS,
        help="of ours: names of the exported tensors (default: ours)",
    )
    parser.add_argument("--kimg", type=real(0, 1e7), help="a .pkl: thousands of images seen (default: as in its name)")
    parser.add_overwrite()
    return parser


def main(args: Sequence[str] | None = None) -> None:
    with running():
        print(*run(arguments().parse_args(args)), sep="\n")


def run(options: argparse.Namespace) -> list[str]:
    pickled = options.checkpoint.suffix == ".pkl" or what_else(options.checkpoint) == SNAPSHOT
    check_effect(vars(options), PICKLE if pickled else OURS, FOR_KINDS)
    names = options.names or "ours"
    written = ("G_ema.safetensors", "config.json", "checkpoints/*.pt") if pickled else (EXPORTS[names],)
    check_folder("out", options.out, written, overwrite=options.overwrite)
    with waiting(f"converting {options.checkpoint.name}"):
        if pickled:
            return import_snapshot(
                options.checkpoint,
                options.out,
                preset_name=options.preset or "ffhq",
                patch_resolution=options.patch_resolution,
                kimg=options.kimg,
            )
        return export_generator(options.checkpoint, options.out, names)


if __name__ == "__main__":
    main()
