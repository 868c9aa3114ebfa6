"""What the importer makes of every setting of the published code: the one table, and how it is applied.

A published setting is imported, told by the tensors (and compared with them), refused where this version cannot hold
it, or without effect on what is computed. `docs/coming-from-epigraf.md` shows the same table. Nothing is taken from a
preset without a word: what neither tensors nor stored settings tell is asked for.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..camera import PRIORS
from ..config import Config
from ..errors import UserError
from .published import Unresolved

Kind = Literal["imported", "in the tensors", "refused", "no effect"]
AUGMENTATIONS = ("rotate90", "xint", "scale", "rotate", "xfrac", "aniso", "brightness", "contrast", "hue", "saturation")
LABEL_DIM = "label_dim"  # stands among our settings, and is none: how many numbers a label has
ABSENT = object()
# Beginnings of the names of our settings that matter to training alone.
TRAINING = ("optim.", "patch.", "discriminator.", "augment.", "batch", "kimg", "loader.mirror")
TRAINING += ("generator.pose_swap", "generator.pose_dropout", "renderer.density_noise")


class Stored:
    """Stored settings by their names in the table: what refers to a part of the run is listed under the run.

    Where two references tell different values, neither is taken: the setting is `Unresolved`.

    Args:
        settings: Of a `Snapshot`.
        resolution: Of the images, where the tensors tell it.
    """

    # The networks' own reference to a part of the run -> that part.
    REFERENCES = (
        ("model.generator.dataset.", "dataset."),
        ("model.generator.patch.", "training.patch."),
        ("model.discriminator.patch.", "training.patch."),
    )

    def __init__(self, settings: Mapping[str, Any], resolution: int | None = None) -> None:
        self.values: dict[str, Any] = {}
        self.sections: set[str] = set()
        lists: dict[str, dict[int, Any]] = {}
        for name, value in settings.items():
            short = next((to + f"{name}."[len(at) :] for at, to in self.REFERENCES if f"{name}.".startswith(at)), name)
            short = short.removesuffix(".")
            parent, _, last = short.rpartition(".")
            above = parent
            while above:
                self.sections.add(above)
                above = above.rpartition(".")[0]
            if last.isdecimal():
                lists.setdefault(parent, {}).setdefault(int(last), value)
                continue
            known = self.values.setdefault(short, value)
            if known != value and not isinstance(known, Unresolved):
                text = value.text if isinstance(value, Unresolved) else f"{shown(known)} here and {shown(value)} there"
                self.values[short] = Unresolved(text)
        for name, entries in lists.items():
            self.values.setdefault(name, [entries[i] for i in sorted(entries)])
        self.resolution = self.whole("dataset.resolution") if resolution is None else resolution

    def why_not(self, name: str) -> str | None:
        """What refers to something that the file does not hold: a setting, or what it is a part of."""
        while name:
            if isinstance(self.values.get(name), Unresolved):
                return f"{name} is {shown(self.values[name])}"
            name = name.rpartition(".")[0]
        return None

    def get(self, name: str, default: Any = ABSENT) -> Any:
        """A value; the default where the file does not hold it."""
        return default if self.why_not(name) else self.values.get(name, default)

    def whole(self, name: str) -> int | None:
        """A positive whole number; None where there is none."""
        value = self.get(name)
        return value if type(value) is int and value > 0 else None

    def has_section(self, name: str) -> bool:
        """Whether anything stands beside a setting."""
        return name.rpartition(".")[0] in self.sections


class Unfit(Exception):
    """A value that this version has no setting for; the words say what it has."""


Take = Callable[[Any, Stored], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A published setting, or several that a pattern names.

    Args:
        name: From the root of the settings; G. and D. are further arguments of the networks.
        default: In the published configuration files.
        ours: What it becomes.
        take: Value -> our settings; raises `Unfit`.
        absent: What `ours` is where there is no such setting, as in older published code; `ABSENT`: it has to be told.
        when: Whether it has an effect, with our other settings.
        fine: The values that are not refused.
        training: Whether it matters to training alone.
        note: For the document.
    """

    name: str
    kind: Kind
    default: str = ""
    ours: tuple[str, ...] = ()
    take: Take | None = None
    absent: Any = ABSENT
    when: Callable[[Config], bool] = lambda config: True
    fine: Callable[[Any, Config], bool] = lambda value, config: False
    training: bool = False
    note: str = ""


def _same(*ours: str) -> Take:
    return lambda value, stored: dict.fromkeys(ours, value)


def _choice(ours: str, choices: Mapping[Any, Any]) -> Take:
    def take(value: Any, stored: Stored) -> dict[str, Any]:
        if isinstance(value, (list, float)) or value not in choices:
            raise Unfit(f"it must be one of {', '.join(map(str, choices))}")
        return {ours: choices[value]}

    return take


def _imported(name: str, default: str, *ours: str, take: Take | None = None, **options: Any) -> Setting:
    kind = options.pop("kind", "imported")
    training = all(x.startswith(TRAINING) for x in ours)
    return Setting(name, kind, default, ours, take or _same(*ours), training=training, **options)


def _told(name: str, default: str, *ours: str, **options: Any) -> Setting:
    """In the tensors, of which there may be too few: what is stored has to agree."""
    return _imported(name, default, *ours, kind="in the tensors", **options)


def _refused(name: str, default: str, *fine: Any, note: str, **options: Any) -> Setting:
    options = {"fine": lambda value, config: value in fine, **options}
    return Setting(name, "refused", default, note=note, **options)


def _no_effect(name: str, default: str = "", note: str = "", **options: Any) -> Setting:
    return Setting(name, "no effect", default, note=note, **options)


def _patch_of_start_blocks(value: Any, stored: Stored) -> dict[str, Any]:
    if stored.resolution is None or not isinstance(value, int) or not 0 <= value < 10:
        raise Unfit("it must be log2(image / patch)")
    return {"patch.resolution": stored.resolution >> value}


def _betas(value: Any, stored: Stored) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise Unfit("it must be two numbers")
    return {"optim.beta1": value[0], "optim.beta2": value[1]}


def _gamma(value: Any, stored: Stored) -> dict[str, Any]:
    if value != "auto":
        return {"optim.r1_gamma": value}
    batch = stored.whole("training.batch_size")
    if batch is None or stored.resolution is None:
        raise Unfit("it takes dataset.resolution and training.batch_size, which are not told")
    return {"optim.r1_gamma": 0.0002 * stored.resolution**2 / batch}


def _density_noise(value: Any, stored: Stored) -> dict[str, Any]:
    """None at all where it would end at once."""
    return {"renderer.density_noise": 0.0 if stored.get("model.generator.nerf_noise_kimg_growth") == 0 else value}


def _blur(value: Any, stored: Stored) -> dict[str, Any]:
    return {"optim.blur_sigma": value if stored.get("model.loss_kwargs.blur_fade_kimg", 0) else 0.0}


def _positive(ours: str) -> Take:
    """Where 0 would be a schedule that ends at once, which another setting says."""
    return lambda value, stored: {} if value == 0 else {ours: value}


def _at_once(ours: str) -> Take:
    """A schedule may take no time there; here it takes none that matters."""
    return lambda value, stored: {ours: 1e-6 if value == 0 else value}


def _ema_half_life(value: Any, stored: Stored) -> dict[str, Any]:
    batch = stored.whole("training.batch_size")
    if value == 0.3125:  # ours follows the batch, too
        return {"optim.ema_kimg": None}
    if not isinstance(value, (int, float)) or batch is None:
        raise Unfit("it takes training.batch_size, which is not told")
    return {"optim.ema_kimg": float(value * batch)}


def _resumed(value: Any, stored: Stored) -> dict[str, Any]:
    """A run that began with another's weights has a faster ADA, and no ramp of the average."""
    kimg, rampup = (500.0, 0.05) if value in ("latest", None) else (100.0, 1e6)
    return {"augment.kimg": kimg, "optim.ema_rampup": rampup}


def _discrete(value: Any, stored: Stored) -> dict[str, Any]:
    """The evenly spaced scales from 0.25 to 1."""
    steps = len(value) if isinstance(value, list) else 0
    even = [0.25 + 0.75 * i / max(steps - 1, 1) for i in range(steps)]
    if steps < 2 or not all(
        isinstance(x, (int, float)) and abs(x - y) < 1e-6 for x, y in zip(value, even, strict=True)
    ):
        raise Unfit("it must be evenly spaced from 0.25 to 1")
    return {"patch.num_scales": steps}


def _strength(value: Any, stored: Stored) -> dict[str, Any]:
    """What is not fixed begins at 0."""
    return {"augment.p": value if stored.get("training.augment.mode") == "fixed" else 0.0}


def _probability(ours: str) -> Take:
    def take(value: Any, stored: Stored) -> dict[str, Any]:
        if value not in (0, 1):
            raise Unfit("it must be 0 or 1: operations are on or off here")
        return {ours: value == 1}

    return take


def _where(name: str, *values: Any) -> Callable[[Config], bool]:
    """Whether one of our settings has one of these values."""
    return lambda config: get(config, name) in values


# When a published setting has an effect, and what several say.
CAMERA_PRIOR = _where("camera.prior", *PRIORS[1:])
SPHERE = _where("renderer.background", "sphere")
POSES_IN_G = _where("generator.pose_conditioning", True)
CAMERAS_IN_D = _where("discriminator.camera_conditioning", True)
AUGMENTED = _where("augment.mode", "ada", "fixed")
FIXED = _where("augment.mode", "fixed")
BETA = _where("patch.distribution", "beta")
DISCRETE = _where("patch.distribution", "discrete")
MODULATE = _choice("discriminator.modulate", {True: "input", False: "none"})


def _camera_rows(section: str) -> Iterator[Setting]:
    names = {"fov": "12", "radius": "1", "ray_start": "0.88", "ray_end": "1.12"}
    for name, default in names.items():
        yield _imported(f"dataset.{section}.{name}", default, f"camera.{name}")
    priors = {name: name for name in PRIORS} | {"gaussian": "normal"}
    yield _imported(f"dataset.{section}.dist", "custom", "camera.prior", take=_choice("camera.prior", priors))
    for theirs, ours in (("horizontal", "yaw"), ("vertical", "pitch")):
        for part, name in (("mean", "mean"), ("stddev", "spread")):
            yield _imported(f"dataset.{section}.{theirs}_{part}", "", f"camera.{ours}_{name}", when=CAMERA_PRIOR)


def _pose_noise(section: str, when: Callable[[Config], bool]) -> Setting:
    name = f"{section}.camera_cond_noise_std"
    return _refused(name, "0", None, 0, note="no noise on poses", when=when, training=True)


def _conv_clamp(network: str, ours: str) -> Setting:
    def take(value: Any, stored: Stored) -> dict[str, Any]:
        return {ours: 0.0 if value is None else value}

    note = "None, as `training.fp32` makes it, is 0"
    return _imported(f"{network}.conv_clamp", "256", ours, take=take, absent=256.0, note=note)


TABLE: tuple[Setting, ...] = (
    # The data and its cameras
    _told("dataset.resolution", "512", "resolution"),
    _told("training_set_kwargs.resolution", "512", "resolution"),
    _told("G.img_resolution", "512", "resolution"),
    *_camera_rows("camera"),
    *_camera_rows("sampling"),
    _refused("dataset.camera.dist_type", "spherical", "spherical", note="cameras stand on a sphere"),
    _imported("dataset.cube_scale", "0.2", "camera.cube_scale"),
    _imported(
        "dataset.white_back",
        "false",
        "renderer.white_background",
        note="with a background `--renderer.white-foreground` too: white is added to both, as published",
    ),
    _imported("dataset.last_back", "false", "renderer.last_back"),
    _told("dataset.c_dim", "0", LABEL_DIM),
    _told("G.c_dim", "0", LABEL_DIM),
    _told("D.c_dim", "0", LABEL_DIM),
    _told("training.use_labels", "false", "loader.labels"),
    _told("training_set_kwargs.use_labels", "false", "loader.labels"),
    _imported("training.mirror", "true", "loader.mirror"),
    _imported("training_set_kwargs.xflip", "true", "loader.mirror"),
    _no_effect("dataset.name", "ffhq_512_posed"),
    _no_effect("dataset.path*", "", "give `--data`"),
    _no_effect("training_set_kwargs.*", "", "the data set that is given"),
    # Generator
    _refused("model.name", "epigraf", "epigraf", note="the 2D baselines' snapshots are another network"),
    _refused("model.generator.backbone", "stylegan2", "stylegan2", note="the one that was published"),
    _no_effect("model.generator.fmaps", "1", "widths are in the tensors"),
    _no_effect("model.generator.cbase", "32768", "`--generator.channel-base` follows from the tensors' widths"),
    _no_effect("model.generator.cmax", "512", "`--generator.channel-max` follows from the tensors' widths"),
    _no_effect("G.channel_*", "", "as `cbase` and `cmax`"),
    _told("model.generator.w_dim", "512", "generator.w_dim"),
    _told("G.w_dim", "512", "generator.w_dim"),
    _told("G.z_dim", "512", "generator.z_dim"),
    _told("model.generator.map_depth", "2", "generator.mapping_layers"),
    _told("G.mapping_kwargs.num_layers", "2", "generator.mapping_layers"),
    _refused("G.img_channels", "3", 3, note="images have three channels"),
    _told("model.generator.camera_cond", "false", "generator.pose_conditioning"),
    _told("G.mapping_kwargs.camera_cond", "false", "generator.pose_conditioning"),
    _imported("model.generator.camera_cond_drop_p", "0", "generator.pose_dropout", absent=0.0, when=POSES_IN_G),
    _imported("G.mapping_kwargs.camera_cond_drop_p", "0", "generator.pose_dropout", when=POSES_IN_G),
    _imported("model.generator.camera_cond_spoof_p", "0.5", "generator.pose_swap_probability", when=POSES_IN_G),
    _pose_noise("model.generator", POSES_IN_G),
    _pose_noise("G.mapping_kwargs", POSES_IN_G),
    _imported("model.generator.num_ray_steps", "48", "renderer.coarse_samples", "renderer.fine_samples"),
    _imported(
        "model.generator.clamp_mode",
        "softplus",
        "renderer.density_activation",
        take=_choice("renderer.density_activation", {"softplus": "softplus", "relu": "relu"}),
        note="of the sphere, too",
    ),
    _imported("model.generator.density_shift", "0", "renderer.density_shift", absent=0.0),
    _imported(
        "model.generator.nerf_sp_beta_init",
        "1",
        "renderer.softplus_beta",
        absent=1.0,
        note="refused where start and end differ",
    ),
    _imported("model.generator.nerf_sp_beta_target", "1", "renderer.softplus_beta"),
    _no_effect("model.generator.nerf_sp_beta_kimg_growth", "", "start and end are equal"),
    _imported("model.generator.nerf_noise_std_init", "1", "renderer.density_noise", take=_density_noise),
    _imported(
        "model.generator.nerf_noise_kimg_growth",
        "5,000",
        "renderer.density_noise_kimg",
        take=_positive("renderer.density_noise_kimg"),
        when=lambda config: config.renderer.density_noise > 0,
        note="0 is no noise",
    ),
    _told("model.generator.use_noise", "true", "generator.noise"),
    _told("model.generator.tri_plane.res", "512", "generator.plane_resolution"),
    _told("model.generator.tri_plane.feat_dim", "32", "generator.plane_channels"),
    _told("model.generator.tri_plane.mlp.hid_dim", "64", "generator.decoder_hidden"),
    _refused("model.generator.tri_plane.mlp.n_layers", "2", 2, note="the decoder has two layers"),
    _refused("model.generator.tri_plane.view_hid_dim", "0", None, 0, note="no view directions were published"),
    _refused("model.generator.tri_plane.has_view_cond", "false", None, 0, note="the same, later"),
    _refused("model.generator.tri_plane.posenc_period_len", "0", None, 0, note="no coordinates were published"),
    _no_effect("model.generator.tri_plane.fp32", "true", "roundings alone; false is `--precision fp16`"),
    _no_effect("model.generator.tri_plane.last_block_fp32", "", "roundings alone"),
    _told(
        "model.generator.bg_model.type",
        "null",
        "renderer.background",
        take=_choice("renderer.background", {None: "none", "plane": "plane", "sphere": "sphere"}),
    ),
    _imported("model.generator.bg_model.num_steps", "8", "renderer.background_samples", when=SPHERE),
    _imported("model.generator.bg_model.start", "1", "renderer.background_start", when=SPHERE),
    _refused("model.generator.bg_model.posenc_period_len", "64", 64, note="the sphere's encoding", when=SPHERE),
    _refused("model.generator.bg_model.output_channels", "4", 4, note="colour and density", when=SPHERE),
    _refused("model.generator.bg_model.coord_dim", "4", 4, note="direction and inverse radius", when=SPHERE),
    _refused("model.generator.bg_model.num_blocks", "2", 2, note="the sphere's network", when=SPHERE),
    _refused("model.generator.bg_model.fmm.enabled", "false", False, note="the sphere's network", when=SPHERE),
    _no_effect("model.generator.bg_model.fmm.*", "", "off"),
    _no_effect("model.generator.bg_model.cbase", "32768", "widths are in the tensors"),
    _no_effect("model.generator.bg_model.cmax", "128", "widths are in the tensors"),
    _no_effect("model.generator.bg_model.num_fp16_blocks", "0", "roundings alone"),
    _conv_clamp("G", "generator.clamp"),
    _no_effect("G.num_fp16_res", "", "roundings alone"),
    _no_effect("G.fused_modconv_default", "", "roundings alone"),
    # Discriminator
    _no_effect("model.discriminator.fmaps", "0.5", "widths are in the tensors"),
    _no_effect("model.discriminator.cbase", "32768", "`--discriminator.channel-base` follows from the tensors' widths"),
    _no_effect("model.discriminator.cmax", "512", "`--discriminator.channel-max` follows from the tensors' widths"),
    _no_effect("D.channel_*", "", "as `cbase` and `cmax`"),
    _refused("D.img_channels", "3", 3, note="images have three channels"),
    _imported(
        "model.discriminator.num_additional_start_blocks",
        "3",
        "patch.resolution",
        take=_patch_of_start_blocks,
        note="the image's, halved so many times",
    ),
    _imported("D.img_resolution", "64", "patch.resolution"),
    _told("model.discriminator.camera_cond", "false", "discriminator.camera_conditioning"),
    _imported("model.discriminator.camera_cond_drop_p", "0", "discriminator.camera_dropout", when=CAMERAS_IN_D),
    _pose_noise("model.discriminator", CAMERAS_IN_D),
    _told("model.discriminator.hyper_mod", "true", "discriminator.modulate", take=MODULATE),
    _imported("model.discriminator.mbstd_group_size", "4", "discriminator.minibatch_std_group"),
    _imported("D.epilogue_kwargs.mbstd_group_size", "4", "discriminator.minibatch_std_group"),
    _conv_clamp("D", "discriminator.clamp"),
    _no_effect("D.num_fp16_res", "4", "roundings alone; `--discriminator.half-blocks` is the same"),
    _refused("D.block_kwargs.freeze_layers", "0", 0, note="every layer learns", training=True),
    # Losses and optimizers
    _imported("model.generator.optim.lr", "0.0025", "optim.g_lr", absent=0.0025),
    _imported("model.discriminator.optim.lr", "0.002", "optim.d_lr"),
    _imported("model.generator.optim.betas", "0, 0.99", "optim.beta1", "optim.beta2", take=_betas),
    _imported("model.discriminator.optim.betas", "0, 0.99", "optim.beta1", "optim.beta2", take=_betas),
    _refused("model.generator.optim.grad_clip", "null", None, note="gradients are not clipped", training=True),
    _imported(
        "model.generator.ema_multiplier",
        "0.3125",
        "optim.ema_kimg",
        take=_ema_half_life,
        absent=None,
        note="times the batch, which is the default",
    ),
    _refused("model.loss_kwargs.pl_weight", "0", 0, note="no path lengths with planes", training=True),
    _imported("model.loss_kwargs.blur_init_sigma", "10", "optim.blur_sigma", take=_blur, absent=0.0),
    _imported(
        "model.loss_kwargs.blur_fade_kimg",
        "200",
        "optim.blur_kimg",
        take=_positive("optim.blur_kimg"),
        when=lambda config: config.optim.blur_sigma > 0,
        note="0 is no blur",
    ),
    # Training
    _imported("training.batch_size", "64", "batch"),
    _no_effect(
        "training.batch_gpu",
        "null",
        "gradients do not depend on how a batch is split: `--micro-batch`, at least a group",
    ),
    _imported("training.gamma", "auto", "optim.r1_gamma", take=_gamma, note="auto is 0.0002 resolution² / batch"),
    _imported("training.kimg", "50,000", "kimg"),
    _imported(
        "training.resume",
        "latest",
        "augment.kimg",
        "optim.ema_rampup",
        take=_resumed,
        note="another run's weights: 100, and no ramp (1e6)",
    ),
    _refused("training.freezed", "0", 0, note="every layer learns", training=True),
    _refused("training.patch.enabled", "true", True, note="patches alone", training=True),
    _told("training.patch.patch_params_cond", "true", "discriminator.modulate", take=MODULATE),
    _imported("training.patch.resolution", "64", "patch.resolution"),
    _imported("training.patch.mbstd_group_size", "4", "discriminator.minibatch_std_group"),
    _imported(
        "training.patch.distribution",
        "beta",
        "patch.distribution",
        take=_choice("patch.distribution", {"beta": "beta", "uniform": "uniform", "discrete_uniform": "discrete"}),
    ),
    _imported("training.patch.anneal_kimg", "10,000", "patch.anneal_kimg", take=_at_once("patch.anneal_kimg")),
    _imported("training.patch.beta_val_start", "0.001", "patch.beta_start", when=BETA),
    _imported("training.patch.beta_val_end", "0.8", "patch.beta_end", when=BETA),
    _refused("training.patch.alpha", "1", 1, note="Beta(1, beta)", when=BETA, training=True),
    _imported("training.patch.discrete_support", "0.25, 1", "patch.num_scales", take=_discrete, when=DISCRETE),
    _refused(
        "training.patch.min_scale_trg",
        "patch / image",
        fine=lambda value, config: (
            isinstance(value, (int, float)) and abs(value - config.patch.resolution / config.resolution) < 1e-6
        ),
        note="a patch has at least the image's pixels",
        training=True,
    ),
    _refused("training.patch.max_scale", "1", 1, note="up to the whole image", training=True),
    _imported(
        "training.augment.mode",
        "ada",
        "augment.mode",
        take=_choice("augment.mode", {"noaug": "none", "ada": "ada", "fixed": "fixed"}),
    ),
    _imported("training.p", "0.2", "augment.p", take=_strength, when=FIXED, note="where it is fixed; ada begins at 0"),
    _imported("training.target", "0.6", "augment.target", when=_where("augment.mode", "ada")),
    *(
        _imported(
            f"training.augment.probs.{theirs}",
            "0" if theirs == "xflip" else "1",
            f"augment.{ours}",
            take=_probability(f"augment.{ours}"),
            when=AUGMENTED,
            note="0 or 1",
        )
        for theirs, ours in (("xflip", "x_flip"), *((name, name) for name in AUGMENTATIONS), ("lumaflip", "luma_flip"))
    ),
    *(
        _refused(f"training.augment.probs.{name}", "", None, 0, note="not in EpiGRAF", when=AUGMENTED, training=True)
        for name in ("imgfilter", "noise", "cutout")
    ),
    _no_effect("training.fp32", "false", "as `conv_clamp` and `num_fp16_res` say"),
    _no_effect("training.seed", "0", "the streams of random numbers are others"),
    _no_effect("training.name"),
    _no_effect("training.desc"),
    _no_effect("training.metrics", "fid2k_full"),
    _no_effect("training.main_metric"),
    _no_effect("training.tick", "4", "`--log-kimg`"),
    _no_effect("training.image_snap", "100", "`--snapshot-kimg`"),
    _no_effect("training.snap", "250", "`--checkpoint-kimg`"),
    _no_effect("training.val_freq", "100", "`--metric-kimg`"),
    _no_effect("training.test_batch_gpu", "4"),
    _no_effect("training.workers", "3", "`--loader.workers`"),
    _no_effect("training.nobench", "false"),
    _no_effect("training.dry_run", "false", "`--dry-run`"),
)
SECTIONS = ("model.", "dataset.", "training.", "training_set_kwargs.", "G.", "D.")  # other names say where it ran


class Outcome(NamedTuple):
    """Settings out of a snapshot."""

    config: Config
    label_dim: int | None
    untold: dict[str, str]  # our settings that were not told -> why not, if more is known
    unknown: list[str]  # stored settings that the table has not, as name = value


def shown(value: Any) -> str:
    """A stored value in a message."""
    text = value.text if isinstance(value, Unresolved) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def apply(config: Config, values: Mapping[str, Any]) -> Config:
    """The settings with others in place, by dotted name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name != LABEL_DIM:
            part, _, field = name.rpartition(".")
            parts.setdefault(part, {})[field] = value
    whole = parts.pop("", {})
    return dataclasses.replace(
        config, **whole, **{part: dataclasses.replace(getattr(config, part), **v) for part, v in parts.items()}
    )


def get(config: Config, name: str) -> Any:
    """A setting by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def import_settings(
    stored: Stored, base: Config, found: Mapping[str, Any], given: Mapping[str, Any], *, training: bool
) -> Outcome:
    """Settings as the user says, from the tensors, as they are stored, and for the rest from `base`.

    Args:
        found: What the tensors tell.
        given: What the user says, against all others.
        training: Whether settings of training matter.

    Raises:
        UserError: Two sources disagree; a value that this version does not have.
    """
    rows = [setting for setting in TABLE if training or not setting.training]
    values, sources, reasons = dict(found), dict.fromkeys(found, "the tensors say"), {}
    for setting in rows:
        value, why_not = stored.get(setting.name), stored.why_not(setting.name)
        if setting.take and why_not:
            reasons |= dict.fromkeys(setting.ours, why_not)
        if setting.take is None or value is ABSENT:
            continue
        try:
            told = {ours: _fitting(ours, x) for ours, x in setting.take(value, stored).items() if ours not in given}
        except Unfit as error:
            if set(setting.ours) <= given.keys() or not setting.when(apply(base, values | given)):
                continue
            raise UserError(f"{setting.name} is {shown(value)}, {error}{_fix(setting.ours)}") from None
        for ours, x in told.items():
            if values.setdefault(ours, x) != x:
                raise UserError(
                    f"{setting.name} is {shown(value)}, so {ours} would be {x}, but {sources[ours]} "
                    f"{values[ours]}{_fix([ours])}"
                )
            sources.setdefault(ours, f"{setting.name} makes it")
    for setting in rows:
        told = stored.why_not(setting.name) or setting.name in stored.values
        if setting.absent is not ABSENT and not told and stored.has_section(setting.name):
            values.setdefault(setting.ours[0], setting.absent)
    config = apply(base, values | given)
    known = values.keys() | given.keys() | {LABEL_DIM, "loader.labels"}  # which the poses decide
    untold = {
        ours: reasons.get(ours, "")
        for setting in rows
        for ours in setting.ours
        if ours not in known and setting.when(config)
    }
    for setting in rows:
        value = stored.get(setting.name)
        if (
            setting.kind == "refused"
            and value is not ABSENT
            and setting.when(config)
            and not setting.fine(value, config)
        ):
            alone = "; --average converts the average generator alone" if setting.training else ""
            raise UserError(f"{setting.name} is {shown(value)}, which this version cannot hold ({setting.note}){alone}")
    return Outcome(config, values.get(LABEL_DIM), untold, list(_unknown(stored)))


def _unknown(stored: Stored) -> Iterator[str]:
    """What the table has no line for, and what it would have to compare with something that the file does not hold."""
    for name, value in stored.values.items():
        lines = [setting for setting in TABLE if fnmatch.fnmatchcase(name, setting.name)]
        cannot = isinstance(value, Unresolved) and not any(setting.take for setting in lines)
        parts = any(setting.name.startswith(f"{name}.") for setting in TABLE)  # which are asked for
        if name.startswith(SECTIONS) and (not lines or cannot) and not parts:
            yield f"{name} = {shown(value)}"


def _fix(ours: Iterable[str]) -> str:
    names = [name for name in ours if name != LABEL_DIM]
    return f": give {' '.join(f'--set {name}=VALUE' for name in names)}" if names else ""


def _fitting(ours: str, value: Any) -> Any:
    """A stored value in the type of our setting."""
    kind = int if ours == LABEL_DIM else _type(ours)
    options = typing.get_args(kind)
    if options and type(None) in options:
        if value is None:
            return None
        kind, options = options[0], ()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if (kind in (bool, str) and isinstance(value, kind)) or value in options:
        return value
    words = {float: "a number", int: "a whole number", bool: "true or false"}
    raise Unfit(f"it must be {words.get(kind) or 'one of ' + ', '.join(map(str, options))}")


@functools.cache
def _type(name: str) -> Any:
    """The type of one of our settings. Raises UserError if there is none of that name."""
    part, _, field = name.rpartition(".")
    hints = typing.get_type_hints(Config)
    kind = hints.get(part) if part else Config
    kind = typing.get_type_hints(kind).get(field) if dataclasses.is_dataclass(kind) else None
    if kind is None or dataclasses.is_dataclass(kind):
        raise UserError(f"there is no setting {name}: see python train.py ffhq --help")
    return kind


def parse(text: str) -> tuple[str, Any]:
    """NAME=VALUE: one of our settings, by dotted name (hyphens may stand for underscores), and its value.

    Raises:
        UserError: There is no such setting, or it has another type.
    """
    name, equals, word = text.partition("=")
    name, word = name.strip().removeprefix("--").replace("-", "_"), word.strip()
    kind = _type(name)
    value: Any = {"true": True, "false": False, "none": None}.get(word.lower(), word)
    if isinstance(value, str):
        for number in (int, float):
            try:
                value = number(word)
                break
            except ValueError:
                continue
    try:
        if not equals:
            raise Unfit("it must be NAME=VALUE")
        return name, word if kind is str else _fitting(name, value)
    except Unfit as error:
        raise UserError(f"--set {text}: {error}") from None


def table() -> list[str]:
    """The rows of the document: published name, its default, what becomes of it."""
    rows = ["| published | here | from a snapshot |", "|---|---|---|"]
    for setting in TABLE:
        default = f" ({setting.default})" if setting.default else ""
        flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in setting.ours if name != LABEL_DIM)
        what = f"{setting.kind}: {setting.note}" if setting.note else setting.kind
        rows.append(f"| `{setting.name}`{default} | {flags} | {what} |")
    return rows
