"""Converts published EpiGRAF snapshots to this project's format, and exports average generators as safetensors.

$ epigraf convert network-snapshot-025000.pkl --out runs/ffhq-published
$ epigraf convert runs/ffhq --out exported
$ epigraf convert runs/ffhq --out exported --names published

No code of a pickle is run. Every tensor is accounted for: taken over, checked to be a constant that
is computed here, known to be unused, or named as left.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tyro.conf import UseAppendAction

from ..config import PRESETS, Config, check, differences, preset, to_dict
from ..errors import UserError
from ..models.background import ENCODER_STEPS
from ..models.layers import LOW_PASS, ScalarEncoder, channels_at
from ..progress import waiting
from ..training.checkpoint import checkpoint_path, save_checkpoint
from ..training.identify import SNAPSHOT, what_else
from ..training.memory import meta_networks
from ..training.pretrained import check_finite, find_generator, load_generator, save_safetensors
from .arguments import Checkpoint, Overwrite, about, check_effect, default, real
from .command import check_folder, output_folder
from .published import Optimizer, Snapshot, read_snapshot
from .published_settings import LABEL_DIM, Stored, apply, get, import_settings, parse

# Published names and ours, which translate both ways: the first pair that fits the whole name.
GENERATOR_NAMES = (
    ("synthesis.tri_plane_decoder.b{res}.torgb.{rest}", "synthesis.b{res}.to_planes.{rest}"),
    ("synthesis.tri_plane_decoder.b{res}.{rest}", "synthesis.b{res}.{rest}"),
    ("synthesis.tri_plane_mlp.model.0.{last}", "decoder.fc0.{last}"),
    ("synthesis.tri_plane_mlp.model.1.{last}", "decoder.fc1.{last}"),
    ("synthesis.bg_model.blocks.0.conv1.{rest}", "background.layer0.{rest}"),
    ("synthesis.bg_model.blocks.1.conv0.{rest}", "background.layer1.{rest}"),
    ("synthesis.bg_model.blocks.1.conv1.{rest}", "background.layer2.{rest}"),
    ("synthesis.bg_model.blocks.0.to_out.{rest}", "background.out0.{rest}"),
    ("synthesis.bg_model.blocks.1.to_out.{rest}", "background.out1.{rest}"),
    ("mapping.mean_camera_pose", "mean_camera_pose"),
    ("mapping.{rest}", "mapping.{rest}"),
)
DISCRIMINATOR_NAMES = (
    ("scalar_enc.const_embed.weight", "patch_encoder.table"),
    ("hyper_mod_mapping.{rest}", "hypernetwork.{rest}"),
    ("head_mapping.{rest}", "head.{rest}"),
    ("b4.conv.{rest}", "conv.{rest}"),
    ("b4.fc.{rest}", "fc.{rest}"),
    ("b4.out.{rest}", "out.{rest}"),
    ("b{res}.fromrgb.{rest}", "b{res}.from_rgb.{rest}"),
    ("b{res}.conv1.affine.{rest}", "b{res}.affine.{rest}"),
    ("b{res}.{rest}", "b{res}.{rest}"),
)
PARTS = {"res": r"(?P<res>\d+)", "rest": r"(?P<rest>.+)", "last": r"(?P<last>weight|bias)"}
BACKGROUND = "synthesis.bg_model.blocks."
EXPORTS = {"ours": "G_ema.safetensors", "published": "G_ema-published.safetensors"}
CAMERA_STEPS = "head_mapping.camera_scalar_enc"
COEFFICIENTS = ".fourier_encoder.fourier_coefs"
NOISE = re.compile(r"\.noise_(const|strength)$")


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


def _translate(name: str, names: Iterable[tuple[str, str]]) -> str | None:
    for template, other in names:
        found = re.fullmatch(template.replace(".", r"\.").format(**PARTS), name)
        if found:
            return other.format(**found.groupdict())
    return None


def low_pass_filter() -> Tensor:
    """The published `resample_filter`: [1, 3, 3, 1] with itself, sum 1."""
    taps = torch.tensor(LOW_PASS)
    return taps[:, None] * taps


def octaves(levels: int) -> Tensor:
    """The published `fourier_coefs`: pi 2^k / 2^L. What is encoded comes multiplied by the number of steps."""
    return math.pi * 2.0 ** (torch.arange(levels) - levels)


def _check_constant(network: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    tensor = tensor.float()
    if name.endswith("resample_filter"):
        good = tensor.shape == (4, 4) and torch.allclose(tensor, low_pass_filter())
    else:
        good = tensor.ndim == 1 and torch.allclose(tensor, octaves(len(tensor)))
    if not good:
        raise UserError(f"{network}: {name} is not the constant that this version computes")


class Imported(NamedTuple):
    """What a snapshot is a snapshot of."""

    config: Config
    label_dim: int
    report: list[str]


def config_of(
    snapshot: Snapshot,
    base: Config,
    given: Mapping[str, Any] | None = None,
    *,
    base_name: str | None = None,
    training: bool = True,
) -> Imported:
    """Settings and number of label numbers: from the tensors' shapes, then as stored, then from `base`.

    Args:
        given: Our settings, by dotted name, that hold against all others.
        base_name: The preset whose settings may stand for those that the snapshot does not tell; None asks for them.
        training: Whether settings of training matter.

    Raises:
        UserError: The shapes are not those of an EpiGRAF model; a setting that is not told, or that cannot be held.
    """
    given = dict(given or {})
    try:
        stored, found, condition = _tensor_settings(snapshot, base, given)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"G_ema or D is no EpiGRAF network: {error} is not there") from None
    config, label_dim, untold, unknown = import_settings(stored, base, found, given, training=training)
    if untold and base_name is None:
        reasons = "; ".join(dict.fromkeys(filter(None, untold.values())))
        raise UserError(
            f"the snapshot does not tell {', '.join(untold)}{f' ({reasons})' if reasons else ''}: "
            f"give --preset NAME to take a preset's, or --set NAME=VALUE for each"
        )
    derived: dict[str, Any] = {}
    if label_dim is None:
        label_dim = condition - 2 * config.generator.pose_conditioning
        derived["loader.labels"] = label_dim > 0
    derived["patch.resolution"] = min(config.patch.resolution, config.resolution)
    white = config.renderer.background != "none" and config.renderer.white_background
    derived["renderer.white_foreground"] = white
    group, micro = max(1, config.discriminator.minibatch_std_group), max(1, config.micro)
    if config.batch % micro or micro % group:  # a micro-batch is no part of a snapshot
        derived["micro_batch"] = None if config.batch % group else group
    config = apply(config, derived | given)
    check(config)
    report = []
    if untold:
        lines = ", ".join(f"{name} = {get(config, name)}" for name in untold)
        report.append(f"not told by the snapshot, as the preset {base_name} has it: {lines}")
    if given:
        report.append(f"as you say: {', '.join(f'{name} = {get(config, name)}' for name in given)}")
    if unknown:
        report.append(f"stored settings that this version does not know, and left: {', '.join(unknown)}")
    if white and not config.renderer.white_foreground:
        report.append(
            "without renderer.white_foreground images differ: the published code adds white to the planes too"
        )
    if training and (stored.get("training.fp32") is False or stored.get("D.num_fp16_res", 0)):
        report.append("D's top 4 blocks were trained in half precision, which --discriminator.half-blocks 4 does")
    if stored.get("model.generator.tri_plane.fp32") is False:
        report.append("G's top 4 resolutions were trained in half precision, which --precision fp16 does")
    return Imported(config, label_dim, report)


def _tensor_settings(snapshot: Snapshot, base: Config, given: Mapping[str, Any]) -> tuple[Stored, dict[str, Any], int]:
    """The stored settings, what the tensors tell, by our dotted names, and how many numbers G's mapping is told."""
    generator, discriminator = snapshot.networks["G_ema"], snapshot.networks.get("D")
    found, labels, resolution = _generator_settings(generator, base), None, None
    if discriminator is not None:
        d_settings, labels = _discriminator_settings(discriminator, base)
        found |= d_settings
        resolution = found["resolution"]
    stored = Stored(snapshot.settings, resolution)
    embed = generator.get("mapping.embed.weight")
    condition = 0 if embed is None else embed.shape[1]
    if labels is None:  # of G alone, where two numbers may be a pose or two classes
        told = (stored.get("G.c_dim"), stored.get("dataset.c_dim"), 0 if condition == 0 else None)
        labels = next((count for count in told if type(count) is int), None)
    if labels is None:
        pose = given.get("generator.pose_conditioning", stored.get("model.generator.camera_cond"))
        labels = condition - 2 * pose if isinstance(pose, bool) else None
    if labels is not None:
        if condition - labels not in (0, 2) or labels < 0:
            raise UserError(f"the mapping has {condition} conditions, the labels are {labels}")
        found |= {LABEL_DIM: labels, "loader.labels": labels > 0}
        found |= {"generator.pose_conditioning": condition - labels == 2}
    return stored, found, condition


def _generator_settings(tensors: dict[str, Tensor], base: Config) -> dict[str, Any]:
    """What the tensors of G tell, by our dotted names."""
    planes = _blocks(tensors, "synthesis.tri_plane_decoder.")
    w_dim = len(tensors["mapping.w_avg"])
    outputs = tensors[f"synthesis.tri_plane_decoder.b{max(planes)}.torgb.weight"].shape[0]
    hidden, plane_channels = tensors["synthesis.tri_plane_mlp.model.0.weight"].shape
    decoder = tensors["synthesis.tri_plane_mlp.model.1.weight"]
    painted = outputs - 3 * plane_channels
    if painted not in (0, 3) or len(decoder) != 4 or "synthesis.tri_plane_mlp.model.2.weight" in tensors:
        raise UserError("the planes and their decoder do not fit: view directions or coordinates were never published")
    background = "plane" if painted else "none"
    if any(name.startswith(BACKGROUND) for name in tensors):
        background = "sphere"
    channel_base, channel_max = _channels(
        {res: tensors[f"synthesis.tri_plane_decoder.b{res}.conv1.weight"].shape[0] for res in planes},
        base.generator.channel_base,
    )
    return {
        "generator.z_dim": tensors["mapping.fc0.weight"].shape[1] - (w_dim if "mapping.embed.weight" in tensors else 0),
        "generator.w_dim": w_dim,
        "generator.mapping_layers": sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in tensors),
        "generator.plane_resolution": max(planes),
        "generator.plane_channels": plane_channels,
        "generator.channel_base": channel_base,
        "generator.channel_max": channel_max,
        "generator.decoder_hidden": hidden,
        "generator.noise": any(name.endswith(".noise_strength") for name in tensors),
        "renderer.background": background,
    }


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


def _discriminator_settings(tensors: dict[str, Tensor], base: Config) -> tuple[dict[str, Any], int]:
    """What the tensors of D tell, by our dotted names; and how many numbers a label has."""
    blocks = [res for res in _blocks(tensors, "") if res > 4]
    widths = {res: tensors[f"b{res}.conv0.weight"].shape[0] for res in blocks}
    widths[4] = tensors["b4.fc.weight"].shape[0]
    channel_base, channel_max = _channels(widths, base.discriminator.channel_base)
    modulated = "hyper_mod_mapping.fc0.weight" in tensors
    camera = CAMERA_STEPS + COEFFICIENTS in tensors
    settings = {
        "channel_base": channel_base,
        "channel_max": channel_max,
        "modulate": "input" if modulated else "none",
        "camera_conditioning": camera,
    }
    known = 0
    if modulated:
        table = tensors["scalar_enc.const_embed.weight"]
        settings["code_dim"] = tensors["hyper_mod_mapping.fc0.weight"].shape[0]
        settings["patch_steps"], settings["patch_table_dim"] = table.shape[0] - 1, table.shape[1]
        known += tensors["hyper_mod_mapping.embed.weight"].shape[1]
    if camera:
        levels = len(tensors[CAMERA_STEPS + COEFFICIENTS])
        settings["camera_steps"] = 2**levels
        known += 2 * 2 * levels
    head = tensors.get("head_mapping.embed.weight")
    labels = (0 if head is None else head.shape[1]) - known
    named = {f"discriminator.{name}": value for name, value in settings.items()}
    return {"resolution": max(blocks), **named}, labels


def translate(tensors: dict[str, Tensor], account: Account, module: nn.Module, network: str) -> dict[str, Tensor]:
    """Our state dict of a published network.

    Raises:
        UserError: A tensor is missing, too many, or has another shape.
    """
    state = {ours: tensors[theirs] for theirs, ours in account.taken.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if network != "D" and not module.synthesis.noise:  # without noise images: of strength 0
        noise = {name: torch.zeros(shape) for name, shape in expected.items() if NOISE.search(name)}
        state = noise | state
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
        if NOISE.search(name) and name not in by_name:
            continue  # no noise images, there and here
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
    names, back = [(ours, theirs) for theirs, ours in GENERATOR_NAMES], {}
    for name, tensor in state.items():
        theirs = _translate(name, names)
        if theirs is None:
            raise UserError(f"{name} has no published name")
        back[theirs] = tensor
        layer = re.match(r"(synthesis\.tri_plane_decoder\.b\d+\.)(conv[01]\.)?", theirs)
        if layer:
            back |= {f"{prefix}resample_filter": low_pass_filter() for prefix in (layer[1], layer[0])}
    if any(name.startswith(BACKGROUND) for name in back):
        back[f"{BACKGROUND}0.scalar_enc{COEFFICIENTS}"] = octaves(len(ScalarEncoder(ENCODER_STEPS).frequencies))
    return back


def import_snapshot(
    path: Path,
    out: Path,
    *,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    kimg: float | None = None,
    average: bool = False,
) -> list[str]:
    """Converts a published pickle.

    Writes `out`/G_ema.safetensors, `out`/config.json and, if the pickle has G and D too, a checkpoint to train on from.

    Args:
        preset_name: Whose settings stand for those that the snapshot does not tell; default: they are asked for.
        settings: Ours, by dotted name, that hold whatever the snapshot says.
        kimg: Thousands of images seen; default: as stored, else as the file's name says.
        average: The average generator alone, and no questions about training.

    Returns:
        The report, line by line.
    """
    snapshot = read_snapshot(path)
    base = dataclasses.replace(preset(preset_name or "ffhq"), run_dir=str(out))
    training = not average and {"G", "D"} <= snapshot.networks.keys()
    wanted = ("G_ema", "G", "D") if training else ("G_ema",)
    tensors = {name: network for name, network in snapshot.networks.items() if name in wanted}
    try:
        config, label_dim, told = config_of(snapshot, base, settings, base_name=preset_name, training=training)
        images, iterations, counted = images_seen(snapshot, path, kimg, config.batch) if training else (0, 0, [])
        generator, discriminator = meta_networks(config, label_dim)
        modules = {"G_ema": generator, "G": generator, "D": discriminator}
        accounts = {name: account_for(network, name) for name, network in tensors.items()}
        states = {name: translate(network, accounts[name], modules[name], name) for name, network in tensors.items()}
        for name, state in states.items():
            check_finite(state, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    report = [line for name, account in accounts.items() for line in account.lines(name)] + told
    if not config.generator.noise:
        report.append("no noise images (use_noise is false): their strengths are 0, and stay so")

    trainer = None
    if training:
        strength = snapshot.augment_p
        trainer = {
            "generator": states["G"],
            "discriminator": states["D"],
            "average": states["G_ema"],
            "cur_nimg": images,
            "iterations": iterations,
            "augment_p": torch.tensor(config.augment.p if strength is None else strength),
            "sums": {},
            "counts": {},
        }
        for name, ours, module in (("G", "g_optimizer", generator), ("D", "d_optimizer", discriminator)):
            trainer[ours], what = optimizer_state(
                snapshot.optimizers.get(name), snapshot.parameters[name], accounts[name], module
            )
            report.append(f"Adam of {name}: {what}")
        report += counted
        if strength is not None:
            report.append(f"augmentation strength: {strength:.4f}")
        elif config.augment.mode != "none":
            report.append(f"augmentation strength: not there, it starts at {config.augment.p}")
    elif not average:
        report.append("G or D is not in the file: no checkpoint to train on from was written")

    with output_folder(out) as partial:
        save_safetensors(states["G_ema"], config, partial / "G_ema.safetensors")
        (partial / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if trainer is not None:
            save_checkpoint(partial, config, trainer, keep=config.keep_checkpoints)
    report += [f"wrote {out / 'G_ema.safetensors'}", f"wrote {out / 'config.json'}"]
    if trainer is not None:
        report.append(f"wrote {checkpoint_path(out, images)}")
        report.append(f"to train on: {training_command(config, out, preset_name)}")
    return report


def images_seen(snapshot: Snapshot, path: Path, kimg: float | None, batch: int) -> tuple[int, int, list[str]]:
    """Images and iterations that the run had seen, and where they are known from.

    Raises:
        UserError: Neither the user nor the file tells.
    """
    stored, iterations = (snapshot.settings.get(f"stats.{name}") for name in ("cur_nimg", "batch_idx"))
    counts = [value if type(value) is int and value >= 0 else None for value in (stored, iterations)]
    named = re.search(r"(\d{6,})", path.stem)
    lines = []
    if kimg is not None:
        images, source = round(kimg * 1000), "as you say"
    elif counts[0] is not None:
        images, source = counts[0], "stats.cur_nimg"
        if named and int(named[1]) != images // 1000:
            lines.append(f"the file's name says {int(named[1]):,} kimg, it holds {images / 1000:,.3f}: that is taken")
    elif named:
        images, source = 1000 * int(named[1]), "the file's name, it holds no number"
    else:
        raise UserError(
            "it does not tell how many images the run had seen: give --kimg N (0 starts all schedules anew)"
        )
    exact = images == counts[0] and counts[1] is not None
    return images, counts[1] if exact else images // batch, [*lines, f"images seen: {images:,} ({source})"]


def training_command(config: Config, out: Path, preset_name: str | None) -> str:
    """How train.py goes on with these settings: from the preset, or that one of which the fewest differ."""
    aside = ("data", "run_dir")
    changes = {
        name: {key: new for key, (_, new) in differences(preset(name), config).items() if key not in aside}
        for name in ([preset_name] if preset_name else PRESETS[1:])
    }
    name = min(changes, key=lambda key: len(changes[key]))
    words = []
    for key, value in changes[name].items():
        part, dot, last = key.replace("_", "-").rpartition(".")
        words.append(f"--{part}{dot}no-{last}" if value is False else f"--{part}{dot}{last}")
        if not isinstance(value, bool):
            words.append(f"{value}")
    return shlex.join(
        ["python", "train.py", name, "--data", "FILE", "--run-dir", "FOLDER", "--resume", str(out), *words]
    )


def export_generator(path: Path, out: Path, names: str = "ours") -> list[str]:
    """Writes the average generator of our checkpoint as safetensors.

    Args:
        names: "ours", as every tool here reads it, or "published".
    """
    config, generator = load_generator(path, three_d=names == "published")
    state, target = generator.state_dict(), out / EXPORTS[names]
    if names == "published":
        if not config.generator.noise:  # where that code has neither
            state = {name: tensor for name, tensor in state.items() if not NOISE.search(name)}
        state = published_names(state)
    if target.exists() and target.samefile(find_generator(path)):
        raise UserError(f"{target} is what is read: choose another folder")
    with output_folder(out) as partial:
        save_safetensors(state, config, partial / target.name, generator.label_values)
    whose = "the published" if names == "published" else "our"
    return [f"G_ema: {len(state)} tensors under {whose} names", f"wrote {target}"]


# Flag -> the kind of checkpoint that it is for, and what holds without it.
PICKLE, OURS = "a .pkl", "a checkpoint of ours"
FOR_KINDS = dict.fromkeys(("preset", "set", "average", "kimg"), (PICKLE,)) | {"names": (OURS,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of `epigraf convert`."""

    checkpoint: Annotated[Checkpoint, about(help="A published .pkl, or a checkpoint or run folder of ours.")]
    out: Path
    """The folder to write."""
    overwrite: Overwrite = False
    preset: Annotated[Literal[tuple(PRESETS[1:])] | None, default("they are asked for")] = None
    """Of a .pkl: whose settings stand for those that it does not tell."""
    set: UseAppendAction[Annotated[tuple[str, ...], about(metavar="NAME=VALUE")]] = ()
    """Of a .pkl: one of our settings, as camera.fov=12, whatever it says; may be given again."""
    average: bool = False
    """Of a .pkl: the average generator alone, nothing to train on from."""
    kimg: Annotated[float | None, real(0, 1e7), default("as it says")] = None
    """Of a .pkl: thousands of images seen."""
    names: Annotated[Literal[tuple(EXPORTS)] | None, default("ours")] = None
    """Of ours: names of the exported tensors."""


def run(options: Options) -> None:
    pickled = options.checkpoint.suffix == ".pkl" or what_else(options.checkpoint) == SNAPSHOT
    check_effect(options, PICKLE if pickled else OURS, FOR_KINDS)
    names = options.names or "ours"
    written = ("G_ema.safetensors", "config.json", "checkpoints/*.pt") if pickled else (EXPORTS[names],)
    check_folder("--out", options.out, written, overwrite=options.overwrite)
    with waiting(f"converting {options.checkpoint.name}"):
        if pickled:
            report = import_snapshot(
                options.checkpoint,
                options.out,
                preset_name=options.preset,
                settings=dict(parse(text) for text in options.set),
                kimg=options.kimg,
                average=options.average,
            )
        else:
            report = export_generator(options.checkpoint, options.out, names)
    print(*report, sep="\n")
