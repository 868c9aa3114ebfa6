"""Settings: the presets against method.md 11 to 16, every check, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from checks import assert_close
from epigraf_fast.config import (
    PRESETS,
    CameraConfig,
    Config,
    check,
    differences,
    flat,
    from_dict,
    preset,
    to_dict,
    with_data_camera,
)
from epigraf_fast.errors import UserError

TinyConfig = Callable[..., Config]
GROUP = "discriminator.minibatch_std_group"


def changed(config: Config, setting: str, value: Any) -> Config:
    """The settings with one of them, by its dotted name, set to another value."""
    part, _, name = setting.rpartition(".")
    if part:
        return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})
    return dataclasses.replace(config, **{name: value})


def fault(config: Config) -> str:
    """What `check` says of settings; nothing if they pass."""
    try:
        check(config)
    except UserError as error:
        return str(error)
    return ""


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass_every_check(name: str) -> None:
    check(preset(name))


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="preset must be one of demo, ffhq, cats, plants, food, got 'birds'"):
        preset("birds")


@pytest.mark.parametrize("name", ["ffhq", "cats"])
def test_cameras_of_faces(name: str) -> None:
    config = preset(name)
    assert config.camera == CameraConfig(
        prior="custom", fov=12.0, radius=1.0, ray_start=0.88, ray_end=1.12, cube_scale=0.2
    )
    assert not config.renderer.white_background
    assert not config.loader.labels
    assert config.loader.mirror


@pytest.mark.parametrize("name", ["plants", "food"])
def test_cameras_of_megascans(name: str) -> None:
    config = preset(name)
    assert config.camera == CameraConfig(
        prior="spherical_uniform",
        yaw_mean=0.0,
        yaw_spread=math.pi,
        pitch_mean=math.pi / 2,
        pitch_spread=math.pi / 2,
        fov=30.0,
        radius=1.0,
        ray_start=0.75,
        ray_end=1.25,
        cube_scale=0.475,
    )
    assert config.renderer.white_background
    assert config.loader.labels
    assert config.loader.mirror


@pytest.mark.parametrize(
    ("name", "resolution", "kimg", "r1_gamma", "g_poses", "d_poses"),
    [
        ("ffhq", 512, 20_000, 0.1, True, True),
        ("cats", 256, 15_000, 0.05, False, True),
        ("plants", 256, 15_000, 0.05, False, False),
        ("food", 256, 15_000, 0.05, False, False),
    ],
)
def test_what_differs_between_data_sets(
    name: str, resolution: int, kimg: float, r1_gamma: float, g_poses: bool, d_poses: bool
) -> None:
    config = preset(name)
    assert (config.resolution, config.kimg, config.optim.r1_gamma) == (resolution, kimg, r1_gamma)
    assert (config.generator.pose_conditioning, config.discriminator.camera_conditioning) == (g_poses, d_poses)


@pytest.mark.parametrize("name", ["ffhq", "cats", "plants", "food"])
def test_the_paper_otherwise(name: str) -> None:
    config = preset(name)
    assert (config.batch, config.micro_batch, config.precision) == (64, "auto", "auto")
    g, d, r, p, o = config.generator, config.discriminator, config.renderer, config.patch, config.optim
    assert (g.z_dim, g.w_dim, g.mapping_layers, g.plane_resolution, g.plane_channels) == (512, 512, 2, 512, 32)
    assert (g.channel_base, g.channel_max, g.decoder_hidden) == (32768, 512, 64)
    assert (g.pose_swap_probability, g.pose_swap_kimg) == (0.5, 1000)
    assert (d.channel_base, d.channel_max, d.modulate, d.code_dim) == (16384, 512, "input", 512)
    assert (d.patch_steps, d.patch_table_dim, d.camera_steps, d.camera_dropout) == (1000, 256, 64, 0.5)
    assert d.minibatch_std_group == 4
    assert (r.coarse_samples, r.fine_samples, r.density_activation, r.softplus_beta) == (48, 48, "softplus", 1)
    assert (r.density_shift, r.density_noise, r.density_noise_kimg) == (0, 1, 5000)
    assert (r.last_interval, r.last_back, r.white_foreground) == (1e10, False, False)
    assert (g.clamp, d.clamp, g.noise, g.pose_dropout) == (256, 256, True, 0)
    assert (p.resolution, p.distribution, p.beta_start, p.beta_end) == (64, "beta", 0.001, 0.8)
    assert (p.anneal_kimg, p.groups) == (10_000, "strided")
    assert (o.g_lr, o.d_lr, o.beta1, o.beta2, o.r1_interval) == (0.0025, 0.002, 0, 0.99, 16)
    assert (o.blur_sigma, o.blur_kimg, o.ema_kimg, o.ema_rampup) == (10, 200, None, 0.05)
    assert (r.background, r.background_samples, r.background_start) == ("none", 16, 1)
    a = config.augment
    assert (a.mode, a.p, a.target, a.kimg, a.interval, a.x_flip) == ("ada", 0, 0.6, 500, 4, False)


def test_demo_needs_no_data_and_no_gpu() -> None:
    config = preset("demo")
    assert config.data == "builtin"
    assert config.precision == "auto"
    assert config.turntable > 0
    assert config.metric_images > 0


# Checks


@pytest.mark.parametrize("value", [None, "auto"])
@pytest.mark.parametrize(
    "name", [name for name, default in flat(Config()).items() if type(default) in (int, float)], ids=str
)
def test_what_is_no_number_is_one_line(name: str, value: str | None) -> None:
    """As a stored file may have it, which is not read by the command line's types."""
    *part, key = name.split(".")
    stored = to_dict(preset("demo"))
    (stored[part[0]] if part else stored)[key] = value
    with pytest.raises(UserError, match=rf"^{re.escape(name)} must be a number, got {value}$"):
        check(from_dict(stored))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("resolution", 24, "resolution must be a power of two of at least 8, got 24"),
        ("resolution", 4, "resolution must be a power of two of at least 8, got 4"),
        ("resolution", 0, "resolution must be a power of two of at least 8, got 0"),
        ("patch.resolution", 12, "patch.resolution must be a power of two of at least 8, got 12"),
        ("generator.plane_resolution", 96, "generator.plane_resolution must be a power of two of at least 8, got 96"),
        (
            "patch.resolution",
            32,
            "patch.resolution must be at most the resolution 16, got 32: set --patch.resolution 16",
        ),
        ("optim.loss_scale", 3.0, "optim.loss_scale must be a power of two from 1 to 2^24, got 3: set 16384"),
        ("batch", 0, "batch must be a positive multiple of micro_batch, got 0 and 0"),
        ("batch", -8, "batch must be a positive multiple of micro_batch, got -8 and -8"),
        ("micro_batch", 0, "batch must be a positive multiple of micro_batch, got 8 and 0"),
        ("micro_batch", 3, "batch must be a positive multiple of micro_batch, got 8 and 3: set --micro-batch 2"),
        (
            "batch",
            6,
            "micro_batch must be a multiple of discriminator.minibatch_std_group = 4, got 6: "
            "set --micro-batch 3 or --batch 8",
        ),
        ("discriminator.minibatch_std_group", 0, "discriminator.minibatch_std_group must be at least 1, got 0"),
        ("kimg", 0.0, "kimg must be finite and at least 0.001, which is one image, got 0.0"),
        ("kimg", math.inf, "kimg must be finite and at least 0.001, which is one image, got inf"),
        ("log_kimg", 0.0004, "log_kimg must be finite and at least 0.001, which is one image, got 0.0004"),
        ("snapshot_kimg", -1.0, "snapshot_kimg must be finite and at least 0.001, which is one image, got -1.0"),
        ("checkpoint_kimg", math.nan, "checkpoint_kimg must be finite and at least 0.001, which is one image, got nan"),
        ("keep_checkpoints", 0, "keep_checkpoints must be finite and positive, got 0"),
        ("grid", (0, 3), "grid must be finite and positive, got 0"),
        ("optim.g_lr", 0.0, "optim.g_lr must be finite and positive, got 0.0"),
        ("optim.d_lr", math.nan, "optim.d_lr must be finite and positive, got nan"),
        ("optim.r1_interval", 0, "optim.r1_interval must be finite and positive, got 0"),
        ("optim.blur_kimg", 0.0, "optim.blur_kimg must be finite and positive, got 0.0"),
        ("optim.r1_gamma", -0.1, "optim.r1_gamma must be finite and zero or more, got -0.1"),
        ("optim.ema_kimg", -1.0, "optim.ema_kimg must be finite and zero or more, got -1.0"),
        ("augment.p", -0.1, "augment.p must be in [0, 1], got -0.1"),
        ("augment.p", 5.0, "augment.p must be in [0, 1], got 5.0"),
        ("augment.kimg", 0.0, "augment.kimg must be finite and positive, got 0.0"),
        ("augment.interval", 0, "augment.interval must be finite and positive, got 0"),
        ("augment.target", 1.5, "augment.target must be in [-1, 1], the mean of a sign, got 1.5"),
        ("optim.beta1", 1.0, r"optim.beta1 must be in [0, 1), got 1.0"),
        ("optim.beta2", -0.1, r"optim.beta2 must be in [0, 1), got -0.1"),
        ("generator.z_dim", 0, "generator.z_dim must be finite and positive, got 0"),
        ("generator.mapping_layers", 0, "generator.mapping_layers must be finite and positive, got 0"),
        ("generator.pose_swap_probability", 1.5, "generator.pose_swap_probability must be in [0, 1], got 1.5"),
        ("generator.pose_dropout", 1.5, "generator.pose_dropout must be in [0, 1], got 1.5"),
        ("generator.clamp", -1.0, "generator.clamp must be finite and zero or more, got -1.0"),
        ("discriminator.clamp", math.nan, "discriminator.clamp must be finite and zero or more, got nan"),
        ("renderer.white_foreground", True, "white_foreground belongs to a background and white_background"),
        ("discriminator.camera_dropout", -0.5, "discriminator.camera_dropout must be in [0, 1], got -0.5"),
        ("discriminator.patch_steps", 0, "discriminator.patch_steps must be finite and positive, got 0"),
        ("patch.anneal_kimg", 0.0, "patch.anneal_kimg must be finite and positive, got 0.0"),
        ("patch.beta_start", 0.0, "patch.beta_start must be finite and positive, got 0.0"),
        ("patch.num_scales", 0, "patch.num_scales must be finite and positive, got 0"),
        ("renderer.coarse_samples", 2, "renderer.coarse_samples must be at least 3 and fine_samples at least 0"),
        ("renderer.fine_samples", -1, "renderer.coarse_samples must be at least 3 and fine_samples at least 0"),
        (
            "renderer.background_samples",
            1,
            "renderer.background_samples must be at least 2 and background_start at most",
        ),
        (
            "renderer.background_start",
            1.1,
            "renderer.background_samples must be at least 2 and background_start at most",
        ),
        ("renderer.background_start", 0.0, "renderer.background_start must be finite and positive, got 0.0"),
        ("generator.style_mixing", 1.1, "generator.style_mixing must be in [0, 1], got 1.1"),
        ("optim.lr_rampdown", 1.5, "optim.lr_rampdown must be in [0, 1], got 1.5"),
        ("generator.decoder_fourier", 1, "generator.decoder_fourier must be 0 or at least 2, got 1"),
        ("discriminator.scales", 0, "discriminator.scales must be finite and positive, got 0"),
        ("patch.importance", -1, "patch.importance must be finite and zero or more, got -1"),
        ("optim.path_length_weight", 2.0, "optim.path_length_weight must be 0 with generator.backbone triplane"),
        ("optim.path_length_interval", 0, "optim.path_length_interval must be finite and positive, got 0"),
        ("renderer.density_noise", -1.0, "renderer.density_noise must be finite and zero or more, got -1.0"),
        ("renderer.softplus_beta", 0.0, "renderer.softplus_beta must be finite and positive, got 0.0"),
        ("loader.workers", -1, "loader.workers must be finite and zero or more, got -1"),
        ("metric_images", -5, "metric_images must be finite and zero or more, got -5"),
        ("metric_kimg", 0.0, "metric_kimg must be finite and at least 0.001, which is one image, got 0.0"),
        ("metric_kimg", 1.0, "metric_kimg needs images to measure: set --metric-images 2048"),
        ("inception", "inception.pt", "inception needs images to measure: set --metric-images 2048"),
        ("metric_images", 1, "metric_images must be 0 or at least 2, got 1"),
        ("turntable", -1, "turntable must be finite and zero or more, got -1"),
        ("seed", -1, "seed must be in [0, 2^32), got -1"),
        ("seed", 2**32, "seed must be in [0, 2^32), got 4294967296"),
        ("device", "tpu", "device must be cpu or cuda, got 'tpu'"),
        ("device", "cuda:x", "device must be cpu or cuda, got 'cuda:x'"),
        ("camera.fov", 0.0, "camera.fov must be between 0 and 180 degrees, got 0.0"),
        ("camera.fov", 180.0, "camera.fov must be between 0 and 180 degrees, got 180.0"),
        ("camera.ray_start", 0.0, "camera.ray_start must be finite and positive, got 0.0"),
        ("camera.ray_end", 0.75, "camera.ray_end must exceed ray_start = 0.75, got 0.75"),
        ("camera.radius", -1.0, "camera.radius must be finite and positive, got -1.0"),
        ("camera.ray_end", math.inf, "camera.ray_end must be finite, got inf"),
        ("camera.yaw_mean", math.nan, "camera.yaw_mean must be finite, got nan"),
        ("camera.pitch_spread", -0.5, "camera.pitch_spread must be finite and zero or more, got -0.5"),
        ("renderer.density_shift", -math.inf, "renderer.density_shift must be finite, got -inf"),
    ],
)
def test_faults(setting: str, value: Any, message: str, tiny_config: TinyConfig) -> None:
    with pytest.raises(UserError) as caught:
        check(changed(tiny_config(), setting, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_passes_or_is_refused_in_one_line(name: str) -> None:
    """NaN, infinities, the largest and smallest numbers: no other exception, and no number that is not finite."""
    for setting, value in flat(preset(name)).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        numbers = (-1, 0, 1, 10**18)
        if isinstance(value, float):
            numbers = (math.nan, math.inf, -math.inf, 1e308, -1.0, 0.0)
        for number in numbers:
            message = fault(changed(preset(name), setting, number))
            assert "\n" not in message
            assert message or math.isfinite(number), f"{setting} {number}"


def test_advice_on_batches_is_accepted() -> None:
    """Each of the settings that a message names, alone."""
    base, advised = Config(), 0
    for batch, micro, group in itertools.product(range(1, 14), (None, 1, 2, 3, 4, 6, 9, 20), (1, 2, 3, 4, 5)):
        config = changed(dataclasses.replace(base, batch=batch, micro_batch=micro), GROUP, group)
        if message := fault(config):
            advice = re.findall(r"--(micro-batch|batch) (\d+)", message)
            assert advice, message
            for setting, value in advice:
                check(changed(config, setting.replace("-", "_"), int(value)))
                advised += 1
    assert advised > 100


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch", 3),  # smaller than a minibatch-std group
        ("micro_batch", 4),
        ("micro_batch", 1),
        ("patch.resolution", 16),
        ("optim.r1_gamma", 0.0),
        ("optim.blur_sigma", 0.0),
        ("optim.ema_kimg", 0.0),
        ("renderer.fine_samples", 0),
        ("renderer.density_noise", 0.0),
        ("discriminator.patch_table_dim", 0),
        ("device", "cuda:1"),
        ("seed", 2**32 - 1),
    ],
)
def test_what_is_allowed(setting: str, value: Any, tiny_config: TinyConfig) -> None:
    check(changed(tiny_config(), setting, value))


@pytest.mark.parametrize(("name", "extent", "advice"), [("ffhq", "0.1968", "0.197"), ("plants", "0.474", "0.475")])
def test_frustum_outside_the_cube(name: str, extent: str, advice: str) -> None:
    """The message names the number and the fix, and the fix is one."""
    config = preset(name)
    with pytest.raises(UserError) as caught:
        check(changed(config, "camera.cube_scale", float(extent) - 0.001))
    message = str(caught.value)
    assert f"the view frustum reaches {extent}" in message
    assert f"set --camera.cube-scale {advice} or narrow the rays" in message
    check(changed(config, "camera.cube_scale", float(advice)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("renderer.background", "sphere"), ("generator.view_direction", True), ("generator.decoder_fourier", 8)],
)
def test_the_image_backbone_has_no_rays(setting: str, value: Any, tiny_config: TinyConfig) -> None:
    config = tiny_config(generator={"backbone": "image"})
    check(config)
    with pytest.raises(UserError, match=f"{setting} belongs to generator.backbone triplane"):
        check(changed(config, setting, value))


def test_scale_specific_discriminators_ask_for_their_scales() -> None:
    config = Config()
    assert config.patches is config.patch
    config = changed(config, "discriminator.scales", 4)
    assert (config.patches.distribution, config.patches.num_scales) == ("discrete", 4)
    assert config.patches.anneal_kimg == config.patch.anneal_kimg


def test_micro_batch_defaults_to_the_batch() -> None:
    assert Config(batch=48).micro == 48
    assert Config(batch=48, micro_batch=8).micro == 8
    assert Config(batch=4, micro_batch=8).micro == 4
    assert Config(batch=48, micro_batch="auto").micro == 8
    assert Config(batch=12, micro_batch="auto").micro == 4  # whole groups of 4


# To JSON and back


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = preset(name)
    assert from_dict(to_dict(config)) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_settings_left_out_take_their_defaults() -> None:
    assert from_dict({"resolution": 128, "optim": {"g_lr": 0.1}}) == changed(Config(resolution=128), "optim.g_lr", 0.1)


@pytest.mark.parametrize("values", [{"colour": 1}, {"optim": {"colour": 1}}])
def test_unknown_settings(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the stored settings do not fit this version: .*'colour'"):
        from_dict(values)


def test_differences() -> None:
    old = preset("ffhq")
    assert differences(old, old) == {}
    new = changed(changed(old, "batch", 32), "optim.g_lr", 0.002)
    assert differences(old, new) == {"batch": (64, 32), "optim.g_lr": (0.0025, 0.002)}


def test_the_camera_of_the_data_replaces_all_but_the_prior() -> None:
    config = preset("plants")
    assert with_data_camera(config, None) is config
    stored = {"fov": 45.0, "radius": 3.5, "ray_start": 2.0, "ray_end": 5.0, "cube_scale": 3.4}
    merged = with_data_camera(config, stored)
    assert merged.camera == dataclasses.replace(config.camera, **stored)
    assert merged.camera.prior == "spherical_uniform"
    assert dataclasses.replace(merged, camera=config.camera) == config
    assert_close([merged.camera.pitch_mean, merged.camera.yaw_spread], [math.pi / 2, math.pi], "prior", "exact")
