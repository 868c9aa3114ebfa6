"""Published snapshots: synthetic ones convert with every tensor accounted for, hostile ones are refused."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import io
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_snapshots import (
    BACKGROUND,
    DEFAULT,
    IMAGE,
    PLANES,
    WITH_CAMERAS,
    Call,
    Shapes,
    published_list,
    refusal,
    shapes_of,
    values,
    write_snapshot,
)
from torch import Tensor

from command_lines import run_tool
from epigraf_fast.camera import sample_angles
from epigraf_fast.config import preset
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.errors import UserError
from epigraf_fast.tools import convert
from epigraf_fast.tools.published import Snapshot, _load_storage, read_snapshot
from epigraf_fast.training.checkpoint import find_checkpoint, load_checkpoint
from epigraf_fast.training.memory import meta_networks
from epigraf_fast.training.pretrained import load_generator
from epigraf_fast.training.step import Trainer

EXPECTED_WIDTHS = {DEFAULT: (28_983_507, 27_482_880), BACKGROUND: (29_574_795, 27_495_168)}


@pytest.mark.parametrize("title", EXPECTED_WIDTHS)
def test_every_published_tensor_has_a_place_at_full_width(title: str) -> None:
    """The published list, name by name and shape by shape, fills our networks, and nothing else does."""
    networks = {}
    for letter in ("G", "D"):
        shapes = published_list(f"{title}: {letter}")
        assert len(shapes) > 100
        networks[letter] = {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes.items()}
    networks["G_ema"] = networks["G"]
    snapshot = Snapshot(networks, {}, {}, 0.0, {})
    with pytest.raises(UserError, match=r"the snapshot does not tell camera\.fov, .*: give --preset NAME .* or --set"):
        convert.config_of(snapshot, preset("ffhq"))
    config, label_dim, report = convert.config_of(snapshot, preset("ffhq"), base_name="ffhq")
    assert "as the preset ffhq has it: camera.fov = 12.0, camera.radius = 1.0" in report[0]
    camera = "camera" in title
    assert label_dim == 0
    assert (config.generator.pose_conditioning, config.discriminator.camera_conditioning) == (camera, camera)
    expected = preset("ffhq")
    if not camera:
        expected = dataclasses.replace(
            expected,
            generator=dataclasses.replace(expected.generator, pose_conditioning=False),
            discriminator=dataclasses.replace(expected.discriminator, camera_conditioning=False),
        )
    else:
        renderer = dataclasses.replace(expected.renderer, background="sphere")
        expected = dataclasses.replace(expected, renderer=renderer)
    assert config == expected
    generator, discriminator = meta_networks(config, label_dim)
    for module, letter, expected in zip((generator, discriminator), "GD", EXPECTED_WIDTHS[title], strict=True):
        account = convert.account_for(networks[letter], letter)
        state = convert.translate(networks[letter], account, module, letter)
        assert state.keys() == module.state_dict().keys()
        assert sum(state[name].numel() for name, _ in module.named_parameters()) == expected
        sorted_out = [*account.taken, *account.constant, *account.unused, *account.left]
        assert sorted(sorted_out) == sorted(networks[letter])
        assert account.left == []
        unused = {f"b{res}.fromrgb.{x}" for res in (256, 128, 64, 32, 16, 8) for x in ("weight", "bias")}
        assert set(account.unused) == (unused if letter == "D" else set())


@pytest.fixture
def shapes() -> tuple[Shapes, Shapes]:
    return shapes_of(DEFAULT)


def test_a_snapshot_becomes_a_checkpoint(
    tmp_path: Path, shapes: tuple[Shapes, Shapes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Values, settings, optimizers and counters arrive, and the run can be continued from there."""
    path, out = tmp_path / "network-snapshot-000128.pkl", tmp_path / "out"
    networks = write_snapshot(path, *shapes)
    run_tool(convert, path, "--out", out, "--preset", "plants")  # for the pitches of the prior
    report = capsys.readouterr().out
    assert re.search(
        r"^G_ema: (\d+) tensors: \d+ taken, \d+ constants checked, 0 unused, 0 left$", report, re.MULTILINE
    )
    assert re.search(r"^D: .* 2 unused, 0 left$", report, re.MULTILINE)
    assert "b8.fromrgb.weight, b8.fromrgb.bias" in report
    assert re.search(r"^Adam of G: taken for \d+ parameters$", report, re.MULTILINE)
    assert "images seen: 128,000 (stats.cur_nimg)" in report
    assert re.search(
        r"^not told .* preset plants has it: camera.pitch_mean = 1.57\d+, camera.pitch_spread = 1.57\d+$",
        report,
        re.MULTILINE,
    )

    config, content = load_checkpoint(find_checkpoint(str(out), tmp_path / "none"))
    assert json.loads((out / "config.json").read_text())["generator"]["w_dim"] == 16
    assert (config.resolution, config.patch.resolution, config.generator.plane_resolution) == (IMAGE, 8, PLANES)
    assert (config.camera.fov, config.camera.cube_scale, config.camera.prior) == (20.0, 0.5, "normal")
    assert (config.camera.yaw_spread, config.camera.pitch_spread) == (0.5, math.pi / 2)
    assert (config.renderer.coarse_samples, config.renderer.white_background) == (6, True)
    trainer = content["trainer"]
    assert (trainer["cur_nimg"], trainer["iterations"], float(trainer["augment_p"])) == (128_000, 2_001, 0.25)

    average, discriminator = trainer["average"], trainer["discriminator"]
    same = {
        "synthesis.b8.conv0.affine.weight": "synthesis.tri_plane_decoder.b8.conv0.affine.weight",
        "synthesis.b8.to_planes.weight": "synthesis.tri_plane_decoder.b8.torgb.weight",
        "synthesis.b4.const": "synthesis.tri_plane_decoder.b4.const",
        "synthesis.b8.conv1.noise_strength": "synthesis.tri_plane_decoder.b8.conv1.noise_strength",
        "decoder.fc1.weight": "synthesis.tri_plane_mlp.model.1.weight",
        "mapping.w_avg": "mapping.w_avg",
        "mean_camera_pose": "mapping.mean_camera_pose",
    }
    for ours, theirs in same.items():
        assert torch.equal(average[ours], networks["G_ema"][theirs]), ours
        assert torch.equal(trainer["generator"][ours], networks["G"][theirs]), ours
    same = {
        "patch_encoder.table": "scalar_enc.const_embed.weight",
        "hypernetwork.embed.weight": "hyper_mod_mapping.embed.weight",
        "head.fc1.bias": "head_mapping.fc1.bias",
        "b16.from_rgb.weight": "b16.fromrgb.weight",
        "b8.affine.bias": "b8.conv1.affine.bias",
        "b8.conv1.bias": "b8.conv1.bias",
        "fc.weight": "b4.fc.weight",
    }
    for ours, theirs in same.items():
        assert torch.equal(discriminator[ours], networks["D"][theirs]), ours

    _, module = meta_networks(config, 0)
    for number, (name, parameter) in enumerate(module.named_parameters()):
        state = trainer["d_optimizer"]["state"][number]
        assert state["exp_avg"].shape == parameter.shape
        # One step of Adam with gradient 2 x, beta1 = 0, beta2 = 0.99.
        torch.testing.assert_close(state["exp_avg"], 2 * discriminator[name])
        torch.testing.assert_close(state["exp_avg_sq"], 0.04 * discriminator[name].square())
        assert float(state["step"]) == 1


def test_training_goes_on_from_a_snapshot(tmp_path: Path, shapes: tuple[Shapes, Shapes], tiny_data: Path) -> None:
    """The checkpoint fits a trainer of its settings, optimizers included, and takes a step."""
    path, out = tmp_path / "network-snapshot-000004.pkl", tmp_path / "out"
    write_snapshot(path, *shapes, images=4000)
    run_tool(convert, path, "--out", out, "--preset", "ffhq")
    config, content = load_checkpoint(find_checkpoint(str(out), tmp_path / "none"))
    config = dataclasses.replace(config, batch=4, micro_batch=4)
    dataset = ImageDataset(tiny_data, config.resolution)
    trainer = Trainer(config, dataset, torch.device("cpu"))
    trainer.load_state_dict(content["trainer"])
    assert trainer.cur_nimg == 4000
    before = {name: p.clone() for name, p in trainer.generator.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.iteration(*next(make_loader(dataset, 4, 0)))
    assert trainer.cur_nimg == 4004
    for name, parameter in trainer.generator.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert any((p != before[name]).any() for name, p in trainer.generator.named_parameters())


def test_the_generator_is_the_same_from_every_file_and_back(tmp_path: Path, shapes: tuple[Shapes, Shapes]) -> None:
    """Checkpoint and safetensors render equal images; back-conversion gives every published tensor."""
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    networks = write_snapshot(path, *shapes, package="")
    run_tool(convert, path, "--out", out, "--preset", "ffhq")
    pictures = []
    for source in (out, out / "G_ema.safetensors"):
        config, generator = load_generator(source, "cpu")
        assert not generator.training
        z = torch.randn(1, config.generator.z_dim, generator=torch.Generator().manual_seed(0))
        angles = sample_angles(1, "uniform", draws=torch.full((1, 2), 0.4))
        with torch.no_grad():
            pictures.append(generator(z, angles, resolution=8, noise_mode="const", stochastic=False).rgb)
    assert torch.isfinite(pictures[0]).all()
    assert torch.equal(*pictures)

    run_tool(convert, out, "--out", tmp_path / "back", "--names", "published")
    from safetensors.torch import load_file

    back = load_file(tmp_path / "back" / "G_ema-published.safetensors")
    assert back.keys() == networks["G_ema"].keys()
    for name, tensor in networks["G_ema"].items():
        assert torch.equal(back[name], tensor), name


def test_an_export_does_not_overwrite_what_it_reads(
    tiny_run: Path, tmp_path: Path, one_error_line: Callable[..., str]
) -> None:
    """Neither by its own name nor through a link."""
    run_tool(convert, tiny_run, "--out", tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/G_ema.safetensors").symlink_to(tmp_path / "one/G_ema.safetensors")
    before = (tmp_path / "one/G_ema.safetensors").read_bytes()
    for out in ("one", "two"):
        message = one_error_line(convert, tmp_path / "one", "--out", tmp_path / out, "--overwrite")
        assert "G_ema.safetensors is what is read: choose another folder" in message
    assert (tmp_path / "one/G_ema.safetensors").read_bytes() == before


def test_our_checkpoints_are_exported_under_our_names(tiny_run: Path, tmp_path: Path) -> None:
    """Every tensor of the average generator of the newest checkpoint; the file is read like a checkpoint."""
    run_tool(convert, tiny_run, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["G_ema.safetensors"]
    config, generator = load_generator(tmp_path / "G_ema.safetensors", "cpu")
    expected_config, expected = load_generator(tiny_run, "cpu")
    assert config == expected_config
    state = generator.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], x) for name, x in expected.state_dict().items())


def test_background_and_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are found in the shapes; every tensor of the background arrives, and goes back."""
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    networks = write_snapshot(path, *shapes_of(BACKGROUND), changes=WITH_CAMERAS)
    run_tool(convert, path, "--out", out, "--preset", "ffhq")
    assert "G_ema: " in capsys.readouterr().out
    config, generator = load_generator(out, "cpu")
    assert config.generator.pose_conditioning
    assert config.discriminator.camera_conditioning
    assert config.discriminator.camera_steps == 64
    assert (config.renderer.background, config.renderer.background_samples) == ("sphere", 5)
    state, theirs = generator.state_dict(), networks["G_ema"]
    for ours, name in (("layer0", "0.conv1"), ("layer2", "1.conv1"), ("out1", "1.to_out")):
        for part in ("weight", "bias", "affine.weight", "affine.bias"):
            assert torch.equal(state[f"background.{ours}.{part}"], theirs[f"synthesis.bg_model.blocks.{name}.{part}"])

    run_tool(convert, out, "--out", tmp_path / "back", "--names", "published")
    from safetensors.torch import load_file

    back = load_file(tmp_path / "back" / "G_ema-published.safetensors")
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name


def test_without_optimizers_or_discriminator(
    tmp_path: Path, shapes: tuple[Shapes, Shapes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pkl"
    write_snapshot(path, *shapes, optimizers=False)
    run_tool(convert, path, "--out", tmp_path / "a", "--kimg", "1", "--preset", "ffhq")
    assert "Adam of D: not there" in capsys.readouterr().out
    write_snapshot(path, shapes[0], None)
    run_tool(convert, path, "--out", tmp_path / "b", "--preset", "ffhq")
    assert "no checkpoint to train on from" in capsys.readouterr().out
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert load_generator(tmp_path / "b", "cpu")[0].generator.w_dim == 16


# Hostile pickles


def storage_bytes(payload: object) -> bytes:
    """What stands where a tensor's storage is expected."""
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


class _WithState:
    """A reduce whose state holds a call."""

    def __init__(self, payload: object) -> None:
        self.payload = payload

    def __reduce__(self) -> tuple:
        return (collections.OrderedDict, (), {"x": self.payload})


def hostile(kind: str, target: Path) -> tuple[object, str]:
    """A payload that would create `target`, and the name that has to be refused."""
    command = f"touch {target}"
    call = Call(os.system, command)
    system = f"{os.system.__module__}.system"
    return {
        "os.system": (call, system),
        "builtins.eval": (Call(builtins.eval, f"open({str(target)!r}, 'w')"), "builtins.eval"),
        "builtins.exec": (Call(builtins.exec, f"open({str(target)!r}, 'w')"), "builtins.exec"),
        "getattr": (Call(getattr, collections.OrderedDict, "fromkeys"), "builtins.getattr"),
        "nested in storage": (Call(torch.storage._load_from_bytes, storage_bytes(call)), system),
        "reduce in state": (_WithState(call), system),
        "in a tensor": (
            Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, collections.OrderedDict()),
            system,
        ),
        "torch.load": (Call(torch.load, str(target)), "torch.serialization.load"),
        "module": (Call(__import__, "os"), "builtins.__import__"),
    }[kind]


KINDS = ("os.system", "builtins.eval", "builtins.exec", "getattr", "nested in storage", "reduce in state")
KINDS += ("in a tensor", "torch.load", "module")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["whole", "beside", "inside"])
def test_hostile_pickles_are_refused_by_name(
    kind: str, place: str, tmp_path: Path, shapes: tuple[Shapes, Shapes], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the whole pickle, beside good networks, or inside a network's state; nothing runs, nothing is written."""
    path, target = tmp_path / "x.pkl", tmp_path / "ran"
    payload, name = hostile(kind, target)
    if place == "whole":
        path.write_bytes(pickle.dumps(payload))
    else:

        def edit(content: dict[str, Any]) -> None:
            if place == "beside":
                content["stats"] = payload
            else:
                content["G"].reduced[1][0]["state"]["_buffers"]["x"] = payload

        write_snapshot(path, *shapes, optimizers=False, edit=edit)
    message = refusal(path, tmp_path / "out", capsys)
    assert name in message
    assert "refused, nothing was run" in message
    assert not target.exists()


def test_hostile_opcodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old ways to name a global, dotted names, and attempts to change what is allowed."""
    out, path = tmp_path / "out", tmp_path / "x.pkl"
    programs = {
        b"cos\nsystem\n(S'true'\ntR.": "os.system",
        b"(S'true'\nios\nsystem\n.": "os.system",
        b"c__builtin__\neval\n.": "__builtin__.eval",
        b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.abc\x93.": "collections.OrderedDict.__init__.abc",
        b"\x80\x04\x8c\x0fomegaconf.nodes\x8c\x08sys.exit\x93.": "omegaconf.nodes.sys.exit",
    }
    for program, name in programs.items():
        path.write_bytes(program)
        assert name in refusal(path, out, capsys)
    # BUILD with attributes for a class (a tuple of None and a dict sets them one by one), then for a function.
    for module, name in (
        (b"typing", b"Any"),
        (b"collections", b"OrderedDict"),
        (b"torch._utils", b"_rebuild_tensor_v2"),
    ):
        path.write_bytes(b"c" + module + b"\n" + name + b"\n(N}S'__setstate__'\nI1\nstb.")
        refusal(path, out, capsys)
        path.write_bytes(b"c" + module + b"\n" + name + b"\n}S'kind'\nI1\nsb.")
        refusal(path, out, capsys)


def test_damaged_files(tmp_path: Path, shapes: tuple[Shapes, Shapes], capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.pkl", tmp_path / "out"
    assert "there is no file" in refusal(path, out, capsys)
    for content in (b"", b"PK", pickle.dumps({"G": 1}), pickle.dumps([]), pickle.dumps({"G_ema": 3})):
        path.write_bytes(content)
        refusal(path, out, capsys)
    write_snapshot(path, *shapes)
    whole = path.read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        refusal(path, out, capsys)


def fault_of(path: Path) -> str:
    """What the reader says against a pickle, nothing if it takes it."""
    try:
        read_snapshot(path)
    except UserError as error:
        return str(error)
    return ""


def test_no_damage_gets_past_the_reader(tmp_path: Path, shapes: tuple[Shapes, Shapes]) -> None:
    """Flipped bytes either leave a snapshot of other values or are refused; nothing else is ever raised."""
    path = tmp_path / "x.pkl"
    write_snapshot(path, shapes[0], None, optimizers=False)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # Most bytes are weights; the opcodes lie between them.
    structure = [m.start() for m in re.finditer(rb"[\x80-\x95cRtbuesa(.)}\]]", whole)]
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.choice(structure, 3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        fault = fault_of(path)
        assert "\n" not in fault
        refused += bool(fault)
    assert refused > 5


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_stay_inside_their_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = torch.arange(4.0).storage()
    rebuild = torch._utils._rebuild_tensor_v2
    path = tmp_path / "x.pkl"
    for arguments, words in (
        ((storage, 1, (2, 2), (2, 1)), "reaches beyond its storage"),
        ((storage, 0, (2**40,), (1,)), "reaches beyond its storage"),
        ((storage, -1, (2,), (1,)), "offset -1"),
        ((storage, 0, (2,), (-1,)), "stride"),
        ((storage, 0, (2,), ()), "stride"),
        (("storage", 0, (2,), (1,)), "no storage"),
    ):
        path.write_bytes(pickle.dumps(Call(rebuild, *arguments, False, collections.OrderedDict())))
        assert words in refusal(path, tmp_path / "out", capsys)


# Snapshots of another kind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g, d: g.pop("mapping.fc1.bias"), "no tensor for mapping.fc1.bias"),
        (lambda g, d: g.pop("mapping.w_avg"), "is no EpiGRAF network"),
        (lambda g, d: g.update({"mapping.fc0.bias": ((17,), False)}), r"mapping.fc0.bias has shape \[17\]"),
        (lambda g, d: g.update({"mapping.fc9.bias": ((16,), False)}), "mapping.fc9.bias, which"),
        (lambda g, d: d.update({"b16.conv0.weight": ((15, 16, 3, 3), False)}), r"b16.affine.bias has shape \[16\]"),
        (lambda g, d: d.update({"b8.conv0.weight": ((15, 16, 3, 3), False)}), "do not follow"),
        (lambda g, d: d.pop("b16.skip.weight"), "D has no tensor for b16.skip.weight"),
        (lambda g, d: g.clear(), "is no EpiGRAF network"),
    ],
)
def test_another_network_is_one_line(
    change: Callable[[Shapes, Shapes], object],
    words: str,
    tmp_path: Path,
    shapes: tuple[Shapes, Shapes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(*shapes)
    write_snapshot(tmp_path / "x.pkl", *shapes, optimizers=False)
    assert re.search(words, refusal(tmp_path / "x.pkl", tmp_path / "out", capsys, "--preset", "ffhq"))


def test_wrong_values_are_named(
    tmp_path: Path,
    shapes: tuple[Shapes, Shapes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A filter that is not [1, 3, 3, 1], a broken frequency, a weight that is not a number."""
    original = values
    for name, words in (
        ("synthesis.tri_plane_decoder.b8.resample_filter", "is not the constant"),
        ("mapping.fc0.bias", "is not finite"),
    ):

        def spoiled(shapes: Shapes, seed: int = 0, name: str = name) -> dict[str, Tensor]:
            tensors = original(shapes, seed)
            return {key: t / 0 if key == name else t for key, t in tensors.items()}

        monkeypatch.setattr("published_snapshots.values", spoiled)
        write_snapshot(tmp_path / "x.pkl", *shapes, optimizers=False)
        assert words in refusal(tmp_path / "x.pkl", tmp_path / "out", capsys, "--preset", "ffhq")


def test_our_checkpoints_are_no_pickles_of_theirs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert.export_generator(tmp_path, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("named", [b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n"])
def test_tensors_of_a_gpu_are_read_without_one(named: bytes, tmp_path: Path) -> None:
    """Adam's state lay on the GPU of the run; the class of its storages is named in two ways."""
    written = storage_bytes(torch.arange(3.0).storage())
    moved = written.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0").replace(
        b"ctorch\nFloatStorage\n", named
    )
    assert moved.count(b"cuda:0") == 1
    assert moved.count(named) == 1
    assert torch.equal(torch.tensor(_load_storage(moved).tolist()), torch.arange(3.0))
