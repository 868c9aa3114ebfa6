"""Pickles of the structure that published snapshots have, at small sizes, for the tests of the importer."""

from __future__ import annotations

import collections
import copy
import math
import pickle
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_lines import run_tool
from epigraf_fast.tools import convert

LISTS = Path(__file__).parent / "data" / "published_state_dict.txt"
Shapes = dict[str, tuple[tuple[int, ...], bool]]  # name -> shape, whether it is a buffer


def published_list(title: str) -> Shapes:
    """One section of the list of published names."""
    section = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", LISTS.read_text(), re.MULTILINE | re.DOTALL)[1]
    lines = re.findall(r"^(\S+) \[([\d, ]*)\]( buffer)?$", section, re.MULTILINE)
    return {name: (tuple(map(int, filter(None, size.split(", ")))), bool(buffer)) for name, size, buffer in lines}


DEFAULT = "FFHQ 512, default"
BACKGROUND = "FFHQ 512, camera conditioning in G and D, sphere background"
# Real sizes to small ones. Up to these resolutions every width is 512.
PLANES, IMAGE = 8, 16
SIZES = {512: 16, 513: 17, 8192: 256, 1024: 32, 828: 72, 852: 96, 256: 4, 128: 16, 96: 12, 64: 16, 32: 4}


def tiny(shapes: Shapes) -> Shapes:
    """The same structure at small widths and resolutions."""
    kept: Shapes = {}
    for name, (shape, buffer) in shapes.items():
        block = re.search(r"(?:^|\.)b(\d+)\.", name)
        if not block or int(block[1]) <= (PLANES if name.startswith("synthesis") else IMAGE):
            sizes = SIZES | ({128: 128} if ".bg_model." in name else {})
            kept[name] = tuple(sizes.get(n, n) for n in shape), buffer
    return kept


def shapes_of(title: str) -> tuple[Shapes, Shapes]:
    """Of G and D, small."""
    return tuple(tiny(published_list(f"{title}: {letter}")) for letter in "GD")


def values(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers of these shapes; the constants have their values."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=rng) for name, (shape, _) in shapes.items()}
    for name in tensors:
        if name.endswith("resample_filter"):
            tensors[name] = convert.low_pass_filter()
        elif name.endswith("fourier_coefs"):
            tensors[name] = math.pi * 2.0 ** (torch.arange(len(tensors[name])) - len(tensors[name]))
    return tensors


# Pickles of the published structure. The classes exist only while a pickle is written.


class Call:
    """Pickles as a call of a global."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def stand_in(module: str, name: str, base: type = object) -> Any:
    """A class that pickles as module.name."""
    if hasattr(sys.modules.get(module), name):
        return getattr(sys.modules[module], name)
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    for end in range(len(module.split("."))):
        package = ".".join(module.split(".")[: end + 1])
        sys.modules.setdefault(package, types.ModuleType(package))
    setattr(sys.modules[module], name, made)
    return made


def module_of(tensors: dict[str, Tensor], buffers: set[str], prefix: str, init: dict[str, Any], package: str) -> Any:
    """A persistent object that holds the tensors below a prefix."""
    own = {name: t for name, t in tensors.items() if name.startswith(prefix)}
    parts = list(dict.fromkeys(name[len(prefix) :].split(".")[0] for name in own))
    parameters, kept, children = (collections.OrderedDict() for _ in range(3))
    for part in parts:
        full = prefix + part
        if full in own:
            if full in buffers:
                kept[part] = own[full]
            else:
                parameters[part] = nn.Parameter(own[full])
        else:
            children[part] = module_of(tensors, buffers, f"{full}.", {}, package)
    if prefix.endswith(("tri_plane_mlp.model.", "bg_model.blocks.")):  # a plain torch.nn container
        plain = nn.Sequential() if prefix.endswith("model.") else nn.ModuleList()
        plain.__dict__["_modules"] = children
        return plain
    if prefix.endswith("const_embed."):
        plain = nn.Embedding(1, 1)
        plain.__dict__["_parameters"] = parameters
        return plain
    state = {
        "training": False,
        "_parameters": parameters,
        "_buffers": kept,
        "_non_persistent_buffers_set": set(),
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": init,
    }
    meta = {
        "type": "class",
        "version": 6,
        "module_src": "raise SystemError('this source is never run')",
        "class_name": "Network",
        "state": state,
    }
    return Call(sys.modules[f"{package}torch_utils.persistence"]._reconstruct_persistent_obj, meta)


def config_node(value: Any, parent: Any = None) -> Any:
    """Settings as omegaconf pickles them: every node knows the one that it stands in."""
    if isinstance(value, dict):
        node = stand_in("omegaconf.dictconfig", "DictConfig")()
        held = {"_content": {key: config_node(part, node) for key, part in value.items()}}
    elif isinstance(value, list):
        node = stand_in("omegaconf.listconfig", "ListConfig")()
        held = {"_content": [config_node(part, node) for part in value]}
    else:
        node = stand_in("omegaconf.nodes", "AnyNode")()
        held = {"_val": value}
    metadata = stand_in("omegaconf.base", "ContainerMetadata" if "_content" in held else "Metadata")()
    metadata.__dict__.update(
        object_type=dict, ref_type=typing.Any, flags={}, resolver_cache=collections.defaultdict(dict)
    )
    node.__dict__.update(_metadata=metadata, _parent=parent, **held)
    return node


# All settings of a run, as the published launcher stores them: the networks refer to the run.
RUN: dict[str, Any] = {
    "num_gpus": 4,
    "env": {"name": "local", "datasets_dir": "${oc.env:DATASETS}"},
    "dataset": {
        "name": "tiny_${dataset.resolution}",
        "resolution": 16,
        "c_dim": 0,
        "path": "data/${dataset.name}.zip",
        "camera": {"dist_type": "spherical", "horizontal_mean": 0.0, "horizontal_stddev": 0.5},
        "sampling": {"fov": 20.0, "radius": 1.0, "ray_start": 0.75, "ray_end": 1.25, "dist": "normal"},
        "cube_scale": 0.5,
        "white_back": True,
        "last_back": False,
    },
    "model": {
        "name": "epigraf",
        "generator": {
            "backbone": "stylegan2",
            "fmaps": 1.0,
            "cbase": 32768,
            "cmax": 512,
            "optim": {"lr": 0.0025, "betas": [0.0, 0.99]},
            "patch": "${training.patch}",
            "dataset": "${dataset}",
            "w_dim": 16,
            "map_depth": 2,
            "camera_cond": False,
            "camera_cond_drop_p": 0.0,
            "camera_cond_spoof_p": 0.5,
            "num_ray_steps": 6,
            "clamp_mode": "softplus",
            "nerf_noise_std_init": 1.0,
            "nerf_noise_kimg_growth": 5000,
            "density_shift": 0.0,
            "use_noise": True,
            "tri_plane": {
                "res": 8,
                "feat_dim": 4,
                "fp32": True,
                "view_hid_dim": 0,
                "posenc_period_len": 0,
                "mlp": {"n_layers": 2, "hid_dim": 16},
            },
            "bg_model": {
                "type": None,
                "output_channels": 4,
                "coord_dim": 4,
                "num_blocks": 2,
                "cbase": 32768,
                "cmax": 128,
                "num_fp16_blocks": 0,
                "fmm": {"enabled": False, "rank": 3, "activation": "demod"},
                "posenc_period_len": 64.0,
                "num_steps": 5,
                "start": 1.0,
            },
        },
        "discriminator": {
            "fmaps": 0.5,
            "cbase": 32768,
            "cmax": 512,
            "patch": "${training.patch}",
            "num_additional_start_blocks": 1,
            "mbstd_group_size": 4,
            "camera_cond": False,
            "camera_cond_drop_p": 0.25,
            "hyper_mod": True,
            "optim": {"lr": 0.002, "betas": [0.0, 0.99]},
        },
        "loss_kwargs": {"pl_weight": 0.0, "blur_init_sigma": 10, "blur_fade_kimg": 200},
    },
    "training": {
        "name": "patch_beta",
        "batch_size": 64,
        "batch_gpu": None,
        "gamma": "auto",
        "use_labels": False,
        "mirror": True,
        "resume": "latest",
        "freezed": 0,
        "p": 0.2,
        "target": 0.6,
        "kimg": 50000,
        "seed": 3,
        "fp32": False,
        "metrics": "fid2k_full",
        "patch": {
            "enabled": True,
            "patch_params_cond": True,
            "min_scale_trg": 0.5,
            "max_scale": 1.0,
            "anneal_kimg": 10000,
            "resolution": 8,
            "mbstd_group_size": "${model.discriminator.mbstd_group_size}",
            "distribution": "beta",
            "alpha": 1.0,
            "beta_val_start": 0.001,
            "beta_val_end": 0.8,
        },
        "augment": {
            "mode": "ada",
            "probs": {"xflip": 0.0}
            | dict.fromkeys(["rotate90", "xint", "scale", "rotate", "xfrac", "aniso", "brightness"], 1.0)
            | dict.fromkeys(["contrast", "lumaflip", "hue", "saturation"], 1.0),
        },
    },
}
WITH_CAMERAS = {  # as in the second list of tensors
    "model.generator.camera_cond": True,
    "model.discriminator.camera_cond": True,
    "model.generator.bg_model.type": "sphere",
}


def changed(changes: dict[str, Any], run: dict[str, Any] = RUN) -> dict[str, Any]:
    """The settings of a run with others in place; ... takes one away."""
    run = copy.deepcopy(run)
    for name, value in changes.items():
        *parts, last = name.split(".")
        place = run
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
        if value is ...:
            del place[last]
    return run


def write_snapshot(
    path: Path,
    g_shapes: Shapes,
    d_shapes: Shapes | None,
    package: str = "src.",
    optimizers: bool = True,
    edit: Callable[[dict[str, Any]], None] | None = None,
    changes: dict[str, Any] | None = None,
    images: int | None = 128_000,
) -> dict[str, dict[str, Tensor]]:
    """Writes a pickle of the published structure. Returns the tensors of every network.

    Args:
        changes: Settings of the run, against `RUN`; G. and D. are other arguments of the networks.
        images: As stored in stats.cur_nimg, with 64 an iteration.
    """

    before = set(sys.modules)

    def _reconstruct_persistent_obj(meta: dict) -> None: ...

    persistence = f"{package}torch_utils.persistence"
    stand_in(persistence, "Module")
    _reconstruct_persistent_obj.__module__ = persistence
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    sys.modules[persistence]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    easy = stand_in(f"{package}dnnlib.util", "EasyDict", dict)

    networks = {"G": values(g_shapes, 1), "G_ema": values(g_shapes, 2)}
    shapes = {"G": g_shapes, "G_ema": g_shapes}
    if d_shapes:
        networks["D"], shapes["D"] = values(d_shapes, 3), d_shapes
    content: dict[str, Any] = {
        "training_set_kwargs": easy(class_name="dataset", resolution=16, use_labels=False, xflip=True),
        "vis": {"grid_z": torch.zeros(2, 3), "images": np.zeros((2, 2), np.float32)},
        "stats": {"best_metric_value": np.float64(1.0), "counts": collections.defaultdict(dict, {"a": {}})},
    }
    if images is not None:
        content["stats"] |= {"cur_nimg": images, "batch_idx": images // 64 + 1}
    changes = changes or {}
    run = config_node(changed({name: value for name, value in changes.items() if name[:2] not in ("G.", "D.")}))
    arguments = {
        "G": {"img_resolution": 16, "img_channels": 3, "mapping_kwargs": easy(camera_cond_drop_p=0.0)},
        "D": {"img_resolution": 8, "img_channels": 3, "epilogue_kwargs": easy(mbstd_group_size=4)},
    }
    arguments = changed({name: value for name, value in changes.items() if name[:2] in ("G.", "D.")}, arguments)
    for name, tensors in networks.items():
        buffers = {key for key, (_, buffer) in shapes[name].items() if buffer}
        part = {"G": "generator", "D": "discriminator"}[name[0]]
        config = run.__dict__["_content"]["model"].__dict__["_content"][part]
        content[name] = module_of(tensors, buffers, "", {"cfg": config, **arguments[name[0]]}, package)
    content["augment_pipe"] = module_of({"p": torch.tensor(0.25)}, {"p"}, "", {}, package)
    if optimizers:
        for name in networks.keys() - {"G_ema"}:
            trained = [nn.Parameter(t.clone()) for key, t in networks[name].items() if not shapes[name][key][1]]
            adam = torch.optim.Adam(trained, lr=0.002, betas=(0.0, 0.99))
            for parameter in trained:
                parameter.grad = 2 * parameter.detach()
            adam.step()
            content[f"{name}_opt"] = adam
    if edit:
        edit(content)
    path.write_bytes(pickle.dumps(content))
    for name in set(sys.modules) - before:  # those of `stand_in`
        if name.split(".")[0] in ("src", "torch_utils", "dnnlib", "omegaconf"):
            del sys.modules[name]
    return networks


def refusal(path: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one error line of a conversion, which leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        run_tool(convert, path, "--out", out, *options)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()
    return captured.err
