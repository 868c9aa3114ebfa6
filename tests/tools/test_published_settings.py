"""Settings of published snapshots: references are followed, every line of the table holds, nothing is silent."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published_snapshots import (
    BACKGROUND,
    DEFAULT,
    WITH_CAMERAS,
    Shapes,
    config_node,
    refusal,
    shapes_of,
    write_snapshot,
)
from torch import Tensor

from checks import assert_close, draw
from command_lines import run_tool
from epigraf_fast.camera import cam2world_matrix, camera_rays
from epigraf_fast.config import Config, differences, preset
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import UserError
from epigraf_fast.models.background import sphere_points
from epigraf_fast.tools import convert, published_settings
from epigraf_fast.tools.published import Snapshot, Unresolved, read_snapshot
from epigraf_fast.tools.published_settings import TABLE, Setting, Stored
from epigraf_fast.training.checkpoint import find_checkpoint, load_checkpoint
from epigraf_fast.training.pretrained import load_generator
from epigraf_fast.training.step import Trainer

PITCHES = {"dataset.camera.vertical_mean": 1.5, "dataset.camera.vertical_stddev": 0.3}
EVERYTHING_TOLD = WITH_CAMERAS | PITCHES | {"training.gamma": 0.7}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, the entries of lists numbered."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that a snapshot with cameras and a sphere stores, every setting under its name in the table alone."""
    path = tmp_path_factory.mktemp("told") / "x.pkl"
    write_snapshot(path, *shapes_of(BACKGROUND), optimizers=False, changes=EVERYTHING_TOLD)
    values = Stored(read_snapshot(path).settings).values
    return {name: value for name, value in values.items() if not isinstance(value, Unresolved)}


@pytest.fixture(scope="module")
def networks() -> dict[str, dict[str, Tensor]]:
    """Those of `told`, without numbers."""
    shapes = dict(zip(("G_ema", "D"), shapes_of(BACKGROUND), strict=True))
    found = {
        name: {key: torch.empty(shape, device="meta") for key, (shape, _) in part.items()}
        for name, part in shapes.items()
    }
    return found | {"G": found["G_ema"]}


def imported(networks: dict[str, dict[str, Tensor]], settings: dict[str, Any], **options: Any) -> convert.Imported:
    snapshot = Snapshot(networks, {}, {}, 0.0, dict(flat(settings)))
    return convert.config_of(snapshot, preset("ffhq"), **options)


# What is in a file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${dataset.fov}", 30.0),
        ("${dataset}", {"fov": 30.0, "white": True, "betas": [0.0, 0.99], "up": 30.0, "nothing": None}),
        ("${dataset.betas}", [0.0, 0.99]),
        ("${dataset.betas[1]}", 0.99),
        ("${dataset.betas.1}", 0.99),
        ("${dataset[fov]}", 30.0),
        ("${dataset.${key}}", 30.0),
        ("${ ${name}.${key} }", 30.0),
        ("${.near}", 1),
        ("${.}", None),
        ("${..above}", 2),
        ("${...dataset.fov}", 30.0),
        ("${.twice}", 30.0),
        ("${dataset.nothing}", None),
        ("${dataset.white}", True),
        ("${name}_${.near}_${key}.zip", "dataset_1_fov.zip"),
        ("plain", "plain"),
    ],
)
def test_references_are_followed(text: str, value: Any, tmp_path: Path) -> None:
    """As omegaconf does: from the root, from the node's own container up, inside of another, through others."""
    tree = {
        "dataset": {"fov": 30.0, "white": True, "betas": [0.0, 0.99], "up": "${.fov}", "nothing": None},
        "model": {
            "above": 2,
            "generator": {"near": 1, "asked": text, "twice": "${.thrice}", "thrice": "${dataset.up}"},
        },
        "key": "fov",
        "name": "dataset",
    }
    if text == "${.}":  # the container that holds it: no end
        value = Unresolved(text)
    path = tmp_path / "x.pkl"

    def edit(content: dict[str, Any]) -> None:
        generator = config_node(tree).__dict__["_content"]["model"].__dict__["_content"]["generator"]
        content["G_ema"].reduced[1][0]["state"]["_init_kwargs"]["cfg"] = generator

    write_snapshot(path, shapes_of(DEFAULT)[0], None, optimizers=False, edit=edit)
    if text == "${.}":
        with pytest.raises(UserError, match=r"hold each other|without end"):
            read_snapshot(path)
        return
    settings = read_snapshot(path).settings
    for name, expected in flat(value, "model.generator.asked"):
        assert settings[name] == expected


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${nowhere}", "${dataset.nowhere}", "${.own}", "???", "${", "a${b"])
def test_what_is_not_in_the_file_is_no_value(text: str, tmp_path: Path) -> None:
    write_snapshot(tmp_path / "x.pkl", *shapes_of(DEFAULT), optimizers=False, changes={"model.generator.own": text})
    assert read_snapshot(tmp_path / "x.pkl").settings["model.generator.own"] == Unresolved(text)


def test_networks_that_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each holds its own copy of the run."""

    def edit(content: dict[str, Any]) -> None:
        other = copy.deepcopy(content["G_ema"].reduced[1][0]["state"]["_init_kwargs"]["cfg"])
        content["D"].reduced[1][0]["state"]["_init_kwargs"]["cfg"] = other.__dict__["_parent"].__dict__["_content"][
            "discriminator"
        ]
        run = other.__dict__["_parent"].__dict__["_parent"]
        run.__dict__["_content"]["dataset"].__dict__["_content"]["cube_scale"].__dict__["_val"] = 0.75

    write_snapshot(tmp_path / "x.pkl", *shapes_of(DEFAULT), optimizers=False, changes=PITCHES, edit=edit)
    line = refusal(tmp_path / "x.pkl", tmp_path / "out", capsys)
    assert "does not tell camera.cube_scale (dataset.cube_scale is 0.5 here and 0.75 there): give" in line


def test_references_without_end_end(tmp_path: Path) -> None:
    """Each of 20 settings asks twice for the next: 2^20 values, were they all written out."""
    many = {f"dataset.s{i}": {"a": f"${{dataset.s{i + 1}}}", "b": f"${{dataset.s{i + 1}}}"} for i in range(20)}
    write_snapshot(tmp_path / "x.pkl", shapes_of(DEFAULT)[0], None, optimizers=False, changes=many)
    with pytest.raises(UserError, match="its settings refer to each other without end"):
        read_snapshot(tmp_path / "x.pkl")


def test_a_snapshot_of_the_launcher_needs_no_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cameras, whites and patches stand under the run, where the networks' settings refer to them."""
    changes = PITCHES | {
        "dataset.sampling.fov": 15.0,
        "dataset.last_back": True,
        "training.patch.resolution": 16,
        "training.patch.min_scale_trg": 1.0,
        "model.discriminator.num_additional_start_blocks": 0,
        "D.img_resolution": 16,
    }
    write_snapshot(tmp_path / "x.pkl", *shapes_of(DEFAULT), optimizers=False, changes=changes)
    run_tool(convert, tmp_path / "x.pkl", "--out", tmp_path / "out")
    assert "preset" not in capsys.readouterr().out
    config, _ = load_generator(tmp_path / "out", "cpu")
    assert (config.camera.fov, config.camera.cube_scale, config.camera.prior) == (15.0, 0.5, "normal")
    assert (config.renderer.white_background, config.renderer.last_back) == (True, True)
    assert (config.patch.resolution, config.batch, config.kimg) == (16, 64, 50_000)
    assert config.optim.r1_gamma == pytest.approx(0.0002 * 16**2 / 64)


@pytest.mark.parametrize(
    ("changes", "words", "answer"),
    [
        (
            {"dataset.sampling.fov": "${my.fov:3}"},
            r"tell camera.fov \(dataset.sampling.fov is \${my.fov:3}\): give --preset NAME .* or --set NAME=VALUE",
            "camera.fov=20",
        ),
        ({"dataset.cube_scale": ...}, "does not tell camera.cube_scale: give", "camera.cube_scale=0.5"),
        ({"dataset.cube_scale": "wide"}, "'wide', it must be a number: give --set", "camera.cube-scale=.5"),
        (
            {"dataset.sampling.dist": "hybrid"},
            "dataset.sampling.dist is 'hybrid', it must be one of custom, uniform, .*: give --set camera.prior=VALUE",
            "camera.prior=normal",
        ),
        ({"dataset.camera.fov": 21.0}, "would be 20.0, but dataset.camera.fov makes it 21.0: give", "camera.fov=20"),
        (
            {"model.generator.nerf_sp_beta_init": 1.0, "model.generator.nerf_sp_beta_target": 3.0},
            "nerf_sp_beta_target is 3.0, so renderer.softplus_beta would be 3.0, but .* 1.0: give --set",
            "renderer.softplus_beta=3",
        ),
        (
            {"model.discriminator.num_additional_start_blocks": 0},
            "so patch.resolution would be 8, but .*num_additional_start_blocks makes it 16",
            "patch.resolution=8",
        ),
        (
            {"training.patch.discrete_support": [0.5, 1.0], "training.patch.distribution": "discrete_uniform"},
            "it must be evenly spaced from 0.25 to 1",
            "patch.num_scales=2",
        ),
        ({"training.augment.probs.hue": 0.5}, "it must be 0 or 1: operations are on or off", "augment.hue=true"),
        ({"training.batch_size": ...}, "takes dataset.resolution and training.batch_size", "batch=64"),
        ({"training.mirror": "${my.own:1}"}, None, "loader.mirror=true"),
    ],
)
def test_what_is_asked_for_is_taken(
    changes: dict[str, Any], words: str | None, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    write_snapshot(path, *shapes_of(DEFAULT), optimizers=False, changes=PITCHES | changes)
    answers = ["--set", answer]
    if answer == "batch=64":
        answers += ["--set", "optim.r1_gamma=0.1"]
    if words:
        assert re.search(words, refusal(path, out, capsys))
    run_tool(convert, path, "--out", out, *answers)
    assert f"as you say: {answer.partition('=')[0].replace('-', '_')} = " in capsys.readouterr().out


def test_a_preset_speaks_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that nothing is known of but the networks' own settings."""

    def edit(content: dict[str, Any]) -> None:
        for name in ("G", "G_ema", "D"):
            content[name].reduced[1][0]["state"]["_init_kwargs"]["cfg"].__dict__["_parent"] = None

    path, out = tmp_path / "x.pkl", tmp_path / "out"
    write_snapshot(path, *shapes_of(DEFAULT), optimizers=False, edit=edit)
    line = refusal(path, out, capsys)
    for name in ("camera.fov", "camera.cube_scale", "renderer.white_background", "optim.r1_gamma", "batch"):
        assert f" {name}" in line
    assert "dataset.cube_scale" not in line
    assert "renderer.coarse_samples" not in line
    run_tool(convert, path, "--out", out, "--preset", "plants")
    report = capsys.readouterr().out
    for text in ("camera.fov = 30.0", "renderer.white_background = True", "optim.r1_gamma = 0.05", "batch = 64"):
        assert re.search(rf"not told by the snapshot, as the preset plants has it: .*{text}", report)
    assert "coarse_samples" not in report


def test_the_average_alone_asks_nothing_about_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    changes = {
        "training": ...,
        "dataset.sampling.dist": "custom",
        "model.generator.patch": ...,
        "D.block_kwargs": {"freeze_layers": 3},
    }
    write_snapshot(path, *shapes_of(DEFAULT), optimizers=False, changes=changes, images=None)
    assert "--average converts" in refusal(path, out, capsys, "--preset", "ffhq", "--set", "patch.resolution=8")
    run_tool(convert, path, "--out", out, "--average")
    assert "D: " not in capsys.readouterr().out
    assert sorted(x.name for x in out.iterdir()) == ["G_ema.safetensors", "config.json"]


def test_a_pose_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a generator alone, two conditions are a pose or two classes: the settings tell, else the user."""
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    shapes = shapes_of(BACKGROUND)[0]
    write_snapshot(path, shapes, None, changes=EVERYTHING_TOLD | {"dataset.c_dim": ..., "dataset.resolution": ...})
    run_tool(convert, path, "--out", out)
    config, generator = load_generator(out, "cpu")
    assert (config.generator.pose_conditioning, generator.label_dim, config.resolution) == (True, 0, 16)
    unknown = {
        "training.use_labels": ...,
        "dataset.c_dim": ...,
        "model.generator.camera_cond": ...,
        "dataset.resolution": ...,
        "G.img_resolution": ...,
    }
    write_snapshot(path, shapes, None, changes=EVERYTHING_TOLD | unknown, edit=lambda c: c.pop("training_set_kwargs"))
    capsys.readouterr()
    assert "does not tell resolution, generator.pose_conditioning: give" in refusal(path, tmp_path / "no", capsys)
    answers = "--set", "generator.pose_conditioning=false", "--set", "resolution=16"
    run_tool(convert, path, "--out", tmp_path / "two", *answers)
    config, generator = load_generator(tmp_path / "two", "cpu")
    assert (config.generator.pose_conditioning, generator.label_dim, config.loader.labels) == (False, 2, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("camera.fox=3", "there is no setting camera.fox: see"),
        ("camera=3", "there is no setting camera: see"),
        ("camera.fov", "it must be NAME=VALUE"),
        ("camera.fov=wide", "it must be a number"),
        ("camera.fov=nan", "it must be a number"),
        ("batch=1.5", "it must be a whole number"),
        ("loader.mirror=perhaps", "it must be true or false"),
        ("camera.prior=mine", "it must be one of custom, uniform"),
    ],
)
def test_wrong_answers(text: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        published_settings.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("camera.fov=12", ("camera.fov", 12.0)),
        ("--camera.cube-scale=.2", ("camera.cube_scale", 0.2)),
        ("loader.mirror=False", ("loader.mirror", False)),
        ("micro_batch=none", ("micro_batch", None)),
        ("optim.ema-kimg=20", ("optim.ema_kimg", 20.0)),
        ("camera.prior=custom", ("camera.prior", "custom")),
        ("data=12.zip", ("data", "12.zip")),
    ],
)
def test_answers(text: str, expected: tuple[str, Any]) -> None:
    assert published_settings.parse(text) == expected


# The table, line by line


FRUSTUM = 15.0
# Published name -> a value, what our settings become, other stored settings that go with it.
IMPORTED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    **{
        f"dataset.{section}.{name}": (value, {f"camera.{ours}": value if name != "dist" else "truncated_gaussian"}, {})
        for section in ("camera", "sampling")
        for name, ours, value in (
            ("fov", "fov", FRUSTUM),
            ("radius", "radius", 1.01),
            ("ray_start", "ray_start", 0.8),
            ("ray_end", "ray_end", 1.2),
            ("dist", "prior", "truncated_gaussian"),
            ("horizontal_mean", "yaw_mean", 0.25),
            ("horizontal_stddev", "yaw_spread", 0.75),
            ("vertical_mean", "pitch_mean", 1.25),
            ("vertical_stddev", "pitch_spread", 0.125),
        )
    },
    "dataset.cube_scale": (0.6, {"camera.cube_scale": 0.6}, {}),
    "dataset.white_back": (False, {"renderer.white_background": False, "renderer.white_foreground": False}, {}),
    "dataset.last_back": (True, {"renderer.last_back": True}, {}),
    "training.mirror": (False, {"loader.mirror": False}, {}),
    "training_set_kwargs.xflip": (False, {"loader.mirror": False}, {}),
    "model.generator.camera_cond_drop_p": (0.5, {"generator.pose_dropout": 0.5}, {}),
    "G.mapping_kwargs.camera_cond_drop_p": (0.5, {"generator.pose_dropout": 0.5}, {}),
    "model.generator.camera_cond_spoof_p": (0.75, {"generator.pose_swap_probability": 0.75}, {}),
    "model.generator.num_ray_steps": (12, {"renderer.coarse_samples": 12, "renderer.fine_samples": 12}, {}),
    "model.generator.clamp_mode": ("relu", {"renderer.density_activation": "relu"}, {}),
    "model.generator.density_shift": (-1, {"renderer.density_shift": -1.0}, {}),
    "model.generator.nerf_sp_beta_init": (2, {"renderer.softplus_beta": 2.0}, {}),
    "model.generator.nerf_sp_beta_target": (2, {"renderer.softplus_beta": 2.0}, {}),
    "model.generator.nerf_noise_std_init": (0.5, {"renderer.density_noise": 0.5}, {}),
    "model.generator.nerf_noise_kimg_growth": (2000, {"renderer.density_noise_kimg": 2000.0}, {}),
    "model.generator.bg_model.num_steps": (7, {"renderer.background_samples": 7}, {}),
    "model.generator.bg_model.start": (0.5, {"renderer.background_start": 0.5}, {}),
    "G.conv_clamp": (None, {"generator.clamp": 0.0}, {}),
    "model.discriminator.num_additional_start_blocks": (
        0,
        {"patch.resolution": 16},
        {"training.patch.min_scale_trg": 1.0},
    ),
    "D.img_resolution": (16, {"patch.resolution": 16}, {"training.patch.min_scale_trg": 1.0}),
    "training.patch.resolution": (16, {"patch.resolution": 16}, {"training.patch.min_scale_trg": 1.0}),
    "model.discriminator.camera_cond_drop_p": (0.125, {"discriminator.camera_dropout": 0.125}, {}),
    **{
        name: (2, {"discriminator.minibatch_std_group": 2}, {})
        for name in (
            "model.discriminator.mbstd_group_size",
            "D.epilogue_kwargs.mbstd_group_size",
            "training.patch.mbstd_group_size",
        )
    },
    "D.conv_clamp": (None, {"discriminator.clamp": 0.0}, {}),
    "model.generator.optim.lr": (0.001, {"optim.g_lr": 0.001}, {}),
    "model.discriminator.optim.lr": (0.001, {"optim.d_lr": 0.001}, {}),
    "model.generator.optim.betas": ([0.5, 0.9], {"optim.beta1": 0.5, "optim.beta2": 0.9}, {}),
    "model.discriminator.optim.betas": ([0.5, 0.9], {"optim.beta1": 0.5, "optim.beta2": 0.9}, {}),
    "model.generator.ema_multiplier": (0.5, {"optim.ema_kimg": 32.0}, {}),
    "model.loss_kwargs.blur_init_sigma": (5, {"optim.blur_sigma": 5.0}, {}),
    "model.loss_kwargs.blur_fade_kimg": (100, {"optim.blur_kimg": 100.0}, {}),
    "training.batch_size": (32, {"batch": 32}, {}),
    "training.gamma": ("auto", {"optim.r1_gamma": 0.0002 * 16**2 / 64}, {}),
    "training.kimg": (25_000, {"kimg": 25_000.0}, {}),
    "training.resume": ("other.pkl", {"augment.kimg": 100.0, "optim.ema_rampup": 1e6}, {}),
    "training.patch.distribution": ("uniform", {"patch.distribution": "uniform"}, {}),
    "training.patch.anneal_kimg": (1000, {"patch.anneal_kimg": 1000.0}, {}),
    "training.patch.beta_val_start": (0.1, {"patch.beta_start": 0.1}, {}),
    "training.patch.beta_val_end": (0.9, {"patch.beta_end": 0.9}, {}),
    "training.patch.discrete_support": (
        [0.25, 0.5, 0.75, 1.0],
        {"patch.distribution": "discrete", "patch.num_scales": 4},
        {"training.patch.distribution": "discrete_uniform"},
    ),
    "training.augment.mode": ("noaug", {"augment.mode": "none"}, {}),
    "training.p": (0.3, {"augment.mode": "fixed", "augment.p": 0.3}, {"training.augment.mode": "fixed"}),
    "training.target": (0.5, {"augment.target": 0.5}, {}),
    "training.augment.probs.xflip": (1.0, {"augment.x_flip": True}, {}),
    "training.augment.probs.lumaflip": (0, {"augment.luma_flip": False}, {}),
    **{
        f"training.augment.probs.{name}": (0.0, {f"augment.{name}": False}, {})
        for name in published_settings.AUGMENTATIONS
    },
}
# Published name -> a value that the tensors contradict.
CONTRADICTED: dict[str, Any] = {
    "dataset.resolution": 32,
    "training_set_kwargs.resolution": 32,
    "G.img_resolution": 32,
    "dataset.c_dim": 3,
    "G.c_dim": 3,
    "D.c_dim": 3,
    "training.use_labels": True,
    "training_set_kwargs.use_labels": True,
    "model.generator.w_dim": 8,
    "G.w_dim": 8,
    "G.z_dim": 8,
    "model.generator.map_depth": 8,
    "G.mapping_kwargs.num_layers": 8,
    "model.generator.camera_cond": False,
    "G.mapping_kwargs.camera_cond": False,
    "model.generator.use_noise": False,
    "model.generator.tri_plane.res": 64,
    "model.generator.tri_plane.feat_dim": 32,
    "model.generator.tri_plane.mlp.hid_dim": 64,
    "model.generator.bg_model.type": None,
    "model.discriminator.camera_cond": False,
    "model.discriminator.hyper_mod": False,
    "training.patch.patch_params_cond": False,
}
# Published name -> a value that cannot be held.
REFUSED: dict[str, Any] = {
    "dataset.camera.dist_type": "cylindrical",
    "model.name": "stylegan2",
    "model.generator.backbone": "raw_planes",
    "G.img_channels": 1,
    "D.img_channels": 1,
    "model.generator.camera_cond_noise_std": 0.1,
    "G.mapping_kwargs.camera_cond_noise_std": 0.1,
    "model.discriminator.camera_cond_noise_std": 0.1,
    "model.generator.tri_plane.mlp.n_layers": 3,
    "model.generator.tri_plane.view_hid_dim": 32,
    "model.generator.tri_plane.has_view_cond": True,
    "model.generator.tri_plane.posenc_period_len": 64,
    "model.generator.bg_model.posenc_period_len": 48,  # as many frequencies as of 64
    "model.generator.bg_model.output_channels": 5,
    "model.generator.bg_model.coord_dim": 3,
    "model.generator.bg_model.num_blocks": 3,
    "model.generator.bg_model.fmm.enabled": True,
    "D.block_kwargs.freeze_layers": 2,
    "model.generator.optim.grad_clip": 10.0,
    "model.loss_kwargs.pl_weight": 2.0,
    "training.freezed": 2,
    "training.patch.enabled": False,
    "training.patch.alpha": 2.0,
    "training.patch.min_scale_trg": 0.25,
    "training.patch.max_scale": 0.5,
    "training.augment.probs.imgfilter": 1.0,
    "training.augment.probs.noise": 1.0,
    "training.augment.probs.cutout": 1.0,
}


def named(setting: Setting) -> str:
    return setting.name


def of_kind(kind: str) -> list[Setting]:
    return [setting for setting in TABLE if setting.kind == kind]


def test_every_line_of_the_table_has_its_case() -> None:
    for kind, cases in (("imported", IMPORTED), ("in the tensors", CONTRADICTED), ("refused", REFUSED)):
        assert sorted(map(named, of_kind(kind))) == sorted(cases), kind
    names = [setting.name for setting in TABLE]
    assert len(names) == len(set(names)) > 120


@pytest.fixture(scope="module")
def baseline(told: dict[str, Any], networks: dict[str, dict[str, Tensor]]) -> Config:
    return imported(networks, told).config


@pytest.mark.parametrize("setting", of_kind("imported"), ids=named)
def test_imported(
    setting: Setting, told: dict[str, Any], networks: dict[str, dict[str, Tensor]], baseline: Config
) -> None:
    """Where it is stored under this name alone, so that nothing else can have told it."""
    value, expected, others = IMPORTED[setting.name]
    assert set(setting.ours) <= expected.keys()
    elsewhere = {other.name for other in TABLE if set(other.ours) & set(setting.ours)}
    settings = {name: x for name, x in told.items() if name not in elsewhere} | {setting.name: value} | others
    result = imported(networks, settings)
    assert {name: new for name, (_, new) in differences(baseline, result.config).items()} == pytest.approx(expected)
    assert not any("not know" in line for line in result.report)


@pytest.mark.parametrize("setting", of_kind("in the tensors"), ids=named)
def test_what_is_stored_agrees_with_the_tensors(
    setting: Setting, told: dict[str, Any], networks: dict[str, dict[str, Tensor]]
) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(setting.name)} is .*, but the tensors say "):
        imported(networks, told | {setting.name: CONTRADICTED[setting.name]})


@pytest.mark.parametrize("setting", of_kind("refused"), ids=named)
def test_refused(setting: Setting, told: dict[str, Any], networks: dict[str, dict[str, Tensor]]) -> None:
    value = REFUSED[setting.name]
    with pytest.raises(UserError) as caught:
        imported(networks, told | {setting.name: value})
    assert str(caught.value).startswith(f"{setting.name} is {value!r}, which this version cannot hold ({setting.note})")
    if setting.training:
        assert "--average converts the average generator alone" in str(caught.value)
        imported(networks, told | {setting.name: value}, training=False)


@pytest.mark.parametrize("setting", of_kind("no effect"), ids=named)
def test_no_effect(
    setting: Setting, told: dict[str, Any], networks: dict[str, dict[str, Tensor]], baseline: Config
) -> None:
    """Whatever it is, and it is no unknown setting."""
    result = imported(networks, told | {setting.name.replace("*", "x"): 12345})
    assert result.config == baseline
    assert not any("not know" in line for line in result.report)


def test_a_setting_that_the_table_has_not_is_said(told: dict[str, Any], networks: dict[str, dict[str, Tensor]]) -> None:
    report = imported(networks, told | {"model.generator.novel": 3, "env.python": "x"}).report
    assert report == ["stored settings that this version does not know, and left: model.generator.novel = 3"] or (
        "stored settings that this version does not know, and left: model.generator.novel = 3" in report
    )


def test_older_snapshots_lack_settings(told: dict[str, Any], networks: dict[str, dict[str, Tensor]]) -> None:
    """What the published code did before it had them."""
    expected = {
        "model.generator.density_shift": ("renderer.density_shift", 0.0),
        "model.generator.camera_cond_drop_p": ("generator.pose_dropout", 0.0),
        "model.generator.optim.lr": ("optim.g_lr", 0.0025),
        "model.loss_kwargs.blur_init_sigma": ("optim.blur_sigma", 0.0),
        "model.generator.ema_multiplier": ("optim.ema_kimg", None),
        "model.generator.nerf_sp_beta_init": ("renderer.softplus_beta", 1.0),
        "G.conv_clamp": ("generator.clamp", 256.0),
        "D.conv_clamp": ("discriminator.clamp", 256.0),
    }
    assert expected.keys() == {setting.name for setting in TABLE if setting.absent is not published_settings.ABSENT}
    for name, (ours, value) in expected.items():
        settings = {key: x for key, x in told.items() if key != name}
        base = published_settings.apply(preset("ffhq"), {ours: 0.125})
        snapshot = Snapshot(networks, {}, {}, 0.0, dict(flat(settings)))
        assert published_settings.get(convert.config_of(snapshot, base).config, ours) == value, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.generator.nerf_noise_kimg_growth": 0}, {"renderer.density_noise": 0.0}),
        ({"model.loss_kwargs.blur_fade_kimg": 0}, {"optim.blur_sigma": 0.0}),
        ({"training.patch.anneal_kimg": 0}, {"patch.anneal_kimg": 1e-6}),
        ({"G.conv_clamp": 128}, {"generator.clamp": 128.0}),
        ({"dataset.sampling.dist": "gaussian"}, {"camera.prior": "normal"}),
    ],
)
def test_values_at_the_edge(
    changes: dict[str, Any], expected: dict[str, Any], told: dict[str, Any], networks: dict[str, dict[str, Tensor]]
) -> None:
    config = imported(networks, told | changes).config
    for name, value in expected.items():
        assert published_settings.get(config, name) == value


def test_groups_fit_a_micro_batch(told: dict[str, Any], networks: dict[str, dict[str, Tensor]]) -> None:
    """Else D's statistics would be those of smaller groups."""
    names = [setting.name for setting in TABLE if "discriminator.minibatch_std_group" in setting.ours]
    for group, micro in ((16, 16), (2, 8)):
        config = imported(networks, told | dict.fromkeys(names, group)).config
        assert (config.discriminator.minibatch_std_group, config.micro) == (group, micro)
    config = imported(networks, told | {"training.batch_size": 12}).config
    assert (config.batch, config.micro) == (12, 4)


# What comes out


@pytest.mark.parametrize(
    ("name", "stored", "kimg", "expected", "words"),
    [
        ("renamed", (128_000, 2001), None, (128_000, 2001), "images seen: 128,000 (stats.cur_nimg)"),
        ("network-snapshot-000128", (128_064, 2002), None, (128_064, 2002), "images seen: 128,064 (stats.cur_nimg)"),
        ("network-snapshot-025000", (128_000, 2001), None, (128_000, 2001), "name says 25,000 kimg, it holds 128.000"),
        ("network-snapshot-000128", (128_000, None), None, (128_000, 2000), "images seen: 128,000 (stats.cur_nimg)"),
        ("network-snapshot-000064", (None, None), None, (64_000, 1000), "images seen: 64,000 (the file's name"),
        ("network-snapshot-000064", ("many", 3), None, (64_000, 1000), "images seen: 64,000 (the file's name"),
        ("network-snapshot-000064", (128_000, 2001), 1.0, (1000, 15), "images seen: 1,000 (as you say)"),
    ],
)
def test_images_seen(
    name: str, stored: tuple[Any, Any], kimg: float | None, expected: tuple[int, int], words: str
) -> None:
    """As the file says; its name where it says nothing; the user above all."""
    settings = dict(zip(("stats.cur_nimg", "stats.batch_idx"), stored, strict=True))
    snapshot = Snapshot({}, {}, {}, None, settings)
    images, iterations, lines = convert.images_seen(snapshot, Path(f"{name}.pkl"), kimg, 64)
    assert (images, iterations) == expected
    assert words in "\n".join(lines)
    assert len(lines) == 1 + ("name says" in words)


def test_a_renamed_file_keeps_its_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "renamed.pkl", tmp_path / "out"
    write_snapshot(path, *shapes_of(DEFAULT), optimizers=False, changes=PITCHES)
    run_tool(convert, path, "--out", out)
    trainer = load_checkpoint(find_checkpoint(str(out), tmp_path / "none"))[1]["trainer"]
    assert (trainer["cur_nimg"], trainer["iterations"]) == (128_000, 2001)
    capsys.readouterr()
    write_snapshot(path, *shapes_of(DEFAULT), optimizers=False, changes=PITCHES, images=None)
    assert "does not tell how many images the run had seen: give --kimg N" in refusal(path, tmp_path / "no", capsys)


def test_a_lost_augmentation_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pkl"
    for number, (changes, words) in enumerate(
        (({}, "augmentation strength: not there, it starts at 0.0"), ({"training.augment.mode": "noaug"}, None))
    ):
        write_snapshot(
            path,
            *shapes_of(DEFAULT),
            optimizers=False,
            changes=PITCHES | changes,
            edit=lambda content: content.update(augment_pipe=None),
        )
        run_tool(convert, path, "--out", tmp_path / f"out{number}")
        report = capsys.readouterr().out
        assert words in report if words else "strength" not in report


def test_without_noise_images(tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are zero, in images, in training with the stored Adam, and not there on the way back."""
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    g_shapes, d_shapes = shapes_of(DEFAULT)
    g_shapes = {name: x for name, x in g_shapes.items() if ".noise_" not in name}
    theirs = write_snapshot(path, g_shapes, d_shapes, changes=PITCHES | {"model.generator.use_noise": False})
    run_tool(convert, path, "--out", out)
    report = capsys.readouterr().out
    assert "no noise images (use_noise is false)" in report
    assert re.search(
        rf"^Adam of G: taken for {sum(not b for _, b in g_shapes.values())} parameters$", report, re.MULTILINE
    )
    config, generator = load_generator(out, "cpu")
    assert not config.generator.noise
    ws = generator.ws(draw(1, 16, dtype=torch.float32))
    assert torch.equal(generator.synthesis(ws, "random"), generator.synthesis(ws, "none"))

    _, content = load_checkpoint(find_checkpoint(str(out), tmp_path / "none"))
    dataset = ImageDataset(tiny_data, config.resolution)
    trainer = Trainer(dataclasses.replace(config, batch=4, micro_batch=4), dataset, torch.device("cpu"))
    trainer.load_state_dict(content["trainer"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.iteration(*next(make_loader(dataset, 4, 0)))
    for name, parameter in trainer.generator.named_parameters():
        if name.endswith("noise_strength"):
            assert parameter == 0

    run_tool(convert, out, "--out", tmp_path / "back", "--names", "published")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "back" / "G_ema-published.safetensors").keys() == theirs["G_ema"].keys()


def by_hand(generator: Any, config: Config, ws: Tensor, angles: Tensor, resolution: int) -> Tensor:
    """The published image without random numbers, from the planes on, in the order of method.md 1 to 6."""
    camera, settings = config.camera, config.renderer
    planes = generator.synthesis(ws, "const")
    origins, directions = camera_rays(cam2world_matrix(angles, camera.radius), camera.fov, resolution)
    batch, rays, _ = origins.shape
    relu = settings.density_activation == "relu"

    def field(t: Tensor) -> Tensor:  # [B, R, S] -> [B, R, S, 4]
        points = ((origins[:, :, None] + t[..., None] * directions[:, :, None]) / camera.cube_scale).flatten(1, 2)
        features = [
            torch.nn.functional.grid_sample(plane, points[:, None][..., list(axes)], align_corners=True)[:, :, 0]
            for plane, axes in zip(
                planes[:, : generator.plane_channels].chunk(3, 1), ((0, 1), (0, 2), (1, 2)), strict=True
            )
        ]
        x = torch.stack(features).mean(dim=0).transpose(1, 2)
        first, second = generator.decoder.fc0, generator.decoder.fc1
        x = x @ (first.weight / math.sqrt(first.weight.shape[1])).T + first.bias
        x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
        x = x @ (second.weight / math.sqrt(second.weight.shape[1])).T + second.bias
        return x.view(batch, rays, -1, 4)

    def integrate(t: Tensor, raw: Tensor, last: float) -> tuple[Tensor, Tensor]:  # weights, transmittance
        density = raw.clamp(min=0) if relu else (1 + raw.exp()).log()
        interval = torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], last)], dim=-1)
        alpha = 1 - (-interval * density).exp()
        left = torch.ones_like(alpha)
        for i in range(1, alpha.shape[-1]):
            left[..., i] = left[..., i - 1] * (1 - alpha[..., i - 1] + 1e-10)
        return alpha * left, left

    last = 1e10 if settings.background == "none" else 1e-3
    coarse_t = (
        torch.linspace(camera.ray_start, camera.ray_end, settings.coarse_samples).double().expand(batch, rays, -1)
    )
    coarse = field(coarse_t)
    weights, _ = integrate(coarse_t, coarse[..., 3] + settings.density_shift, last)
    inner = weights[..., 1:-1] + 2e-5
    cdf = torch.cat([torch.zeros_like(inner[..., :1]), (inner / inner.sum(dim=-1, keepdim=True)).cumsum(-1)], dim=-1)
    bins = (coarse_t[..., 1:] + coarse_t[..., :-1]) / 2
    u = torch.linspace(0, 1, settings.fine_samples).double().expand(batch, rays, -1).contiguous()
    knot = torch.searchsorted(cdf.contiguous(), u)
    lower, upper = (knot - 1).clamp(min=0), knot.clamp(max=inner.shape[-1])
    step = cdf.gather(-1, upper) - cdf.gather(-1, lower)
    part = (u - cdf.gather(-1, lower)) / torch.where(step < 1e-5, 1.0, step)
    fine_t = bins.gather(-1, lower) + part * (bins.gather(-1, upper) - bins.gather(-1, lower))
    t, order = torch.cat([fine_t, coarse_t], dim=-1).sort(dim=-1, stable=True)
    values = torch.cat([field(fine_t), coarse], dim=2).gather(2, order[..., None].expand(-1, -1, -1, 4))
    weights, left = integrate(t, values[..., 3] + settings.density_shift, last)
    opacity = weights.sum(dim=-1)
    if settings.last_back:
        weights[..., -1] += 1 - opacity
    rgb = (weights[..., None] * values[..., :3]).sum(dim=2)
    if settings.white_background:
        rgb = rgb + 1 - opacity[..., None]
    if settings.background == "sphere":
        inverse = torch.linspace(settings.background_start, 0, settings.background_samples).double()
        inverse = inverse.expand(batch, rays, -1)
        points = sphere_points(origins / camera.radius, directions, inverse)
        behind = generator.background.decode(points.flatten(1, 2), ws[:, -4:]).view(batch, rays, -1, 4)
        weights, _ = integrate(-inverse, behind[..., 3], 1e10)
        back = (weights[..., None] * behind[..., :3]).sum(dim=2)
        if settings.white_background:
            back = back + 1 - weights.sum(dim=-1)[..., None]
        rgb = rgb + left[..., -1:] * back
    if settings.background == "plane":
        picture = planes[:, generator.plane_channels :]
        picture = torch.nn.functional.interpolate(picture, (resolution,) * 2, mode="bilinear", align_corners=True)
        rgb = rgb + left[..., -1:] * picture.flatten(2).transpose(1, 2)
    return rgb.transpose(1, 2).unflatten(2, (resolution, resolution))


def with_painted_plane(shapes: Shapes) -> Shapes:
    """Three more outputs of every layer that adds to the planes."""
    return {
        name: ((shape[0] + 3, *shape[1:]), buffer) if re.search(r"torgb\.(weight|bias)$", name) else (shape, buffer)
        for name, (shape, buffer) in shapes.items()
    }


@pytest.mark.parametrize("background", ["none", "sphere", "plane"])
@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_images_are_the_published_ones(background: str, activation: str, tmp_path: Path) -> None:
    """White and last_back, density shift, both activations, in front of every background."""
    shapes = shapes_of(BACKGROUND if background == "sphere" else DEFAULT)[0]
    changes = PITCHES | {
        "model.generator.clamp_mode": activation,
        "model.generator.density_shift": -2.0,
        "model.generator.bg_model.type": None if background == "none" else background,
        "dataset.last_back": True,
    }
    if background == "sphere":
        changes |= {"model.generator.camera_cond": True}
    if background == "plane":
        shapes = with_painted_plane(shapes)
    write_snapshot(tmp_path / "x.pkl", shapes, None, changes=changes)
    run_tool(convert, tmp_path / "x.pkl", "--out", tmp_path / "out")
    config, generator = load_generator(tmp_path / "out", "cpu")
    assert config.renderer.background == background
    generator = generator.double()
    angles = torch.tensor([[0.4, 1.2, 0.0], [-2.0, 2.0, 0.0]], dtype=torch.float64)
    ws = generator.ws(draw(2, 16))
    image = generator.render(generator.synthesis(ws, "const"), angles, 16, ws=ws).rgb
    expected = by_hand(generator, config, ws, angles, 16)
    assert expected.std() > 0.1
    assert_close(image, expected, "image", "network_fp32")


def test_the_command_to_train_on_holds_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from epigraf_fast.tools import train

    path, out = tmp_path / "x.pkl", tmp_path / "out"
    changes = EVERYTHING_TOLD | {"model.generator.density_shift": -1.0, "G.conv_clamp": None, "training.mirror": False}
    changes |= {"training_set_kwargs.xflip": False, "model.generator.ema_multiplier": 0.5, "dataset.sampling.fov": 12.5}
    edit = lambda content: content["training_set_kwargs"].update(xflip=False)  # noqa: E731
    write_snapshot(path, *shapes_of(BACKGROUND), changes=changes, edit=edit)
    for options in ([], ["--preset", "food"]):
        run_tool(convert, path, "--out", out / str(len(options)), *options)
        line = re.search(r"^to train on: python train.py (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
        command = train.parse(shlex.split(line))
        config, _ = load_checkpoint(find_checkpoint(command.resume, tmp_path / "none"))
        assert differences(config, command.config).keys() == {"data", "run_dir"}
        assert config.renderer.density_shift == -1
