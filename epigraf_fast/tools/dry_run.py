"""What `--dry-run` says of a run: all that can be known without training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import Config, differences, preset, to_dict
from ..data import ImageDataset
from ..errors import UserError
from ..training.checkpoint import check_resumable, find_checkpoint, load_checkpoint
from ..training.endurance import device_bytes, explain_out_of_memory
from ..training.log import read_stats
from ..training.memory import meta_networks, parameter_count, step_bytes
from ..training.precision import capability_of, settled

FEW = 2000  # images, below which a discriminator learns them by heart
OWN = ("data", "run_dir", "device")  # settings that say where, not what


def facts(
    config: Config, base: str, dataset: ImageDataset, device: torch.device, processes: int, resume: str | None
) -> dict[str, Any]:
    """Everything as plain JSON values; memory in bytes, an estimate in fp32.

    Args:
        base: The preset that the settings began as.

    Raises:
        UserError: The checkpoint that `resume` names cannot be continued with these settings.
    """
    with explain_out_of_memory(config, dataset.label_dim, device, processes):
        generator, discriminator = meta_networks(config, dataset.label_dim)
        fixed, step = step_bytes(config, generator, discriminator, dataset.angles)
    begun, _ = settled(preset(base), capability_of(device))
    checkpoint, cur_nimg, changes = find_checkpoint(resume, Path(config.run_dir)), 0, []
    if checkpoint is not None:
        stored, content = load_checkpoint(checkpoint)
        changes = check_resumable(stored, config)
        cur_nimg = content["trainer"]["cur_nimg"]
    return {
        "config": to_dict(config),
        "preset": base,
        "differs": {name: new for name, (_, new) in differences(begun, config).items() if not name.startswith(OWN)},
        "data": {
            "images": len(dataset.files),
            "images_with_mirrored": len(dataset),
            "classes": dataset.label_dim,
            "camera": "of the data" if dataset.camera else "of the settings",
        },
        "parameters": {"G": parameter_count(generator), "D": parameter_count(discriminator)},
        "memory": {"fixed": fixed, "micro_batch": step, "machine": device_bytes(device)},
        "iterations": -(-round(config.kimg * 1000) // config.batch),
        "device": str(device),
        "processes": processes,
        "resume": None if checkpoint is None else {"from": str(checkpoint), "images": cur_nimg, "changes": changes},
        "seconds_left": seconds_left(config, cur_nimg),
    }


def seconds_left(config: Config, cur_nimg: int) -> float | None:
    """As the run's own log tells its speed; None where nothing was measured."""
    try:
        speeds = [line["sec_per_kimg"] for line in read_stats(Path(config.run_dir) / "stats.jsonl") if "kimg" in line]
    except (UserError, KeyError):
        return None
    return speeds[-1] * max(config.kimg - cur_nimg / 1000, 0) if speeds else None


def summary(found: dict[str, Any]) -> Iterator[str]:
    """The same in about ten lines."""
    config, data, memory = found["config"], found["data"], found["memory"]
    mirrored = f", {data['images_with_mirrored']:,} with the mirrored" * config["loader"]["mirror"]
    classes = f", {data['classes']} classes or numbers a label" * bool(data["classes"])
    yield f"data: {config['data']}: {data['images']:,} images{mirrored}{classes}, all readable"
    shown = config["kimg"] * 1000 / data["images_with_mirrored"]
    if data["images"] < FEW and shown > 100:
        yield (
            f"warning: {data['images']:,} images are few: each is shown {shown:,.0f} times; D learns so few by heart. "
            "Give thousands, or --augment.mode ada and fewer --kimg"
        )
    camera = config["camera"]
    yield (
        f"camera ({data['camera']}): fov {camera['fov']:g}, radius {camera['radius']:g}, "
        f"rays {camera['ray_start']:g} to {camera['ray_end']:g}, cube {camera['cube_scale']:g}"
    )
    batch, micro = config["batch"], config["micro_batch"] or config["batch"]
    yield (
        f"training: {config['kimg']:,g} kimg, {found['iterations']:,} iterations of {batch} images "
        f"(micro-batches of {micro}), patches of {config['patch']['resolution']}x{config['patch']['resolution']} "
        f"of {config['resolution']}x{config['resolution']}"
    )
    yield f"parameters: G {found['parameters']['G']:,}, D {found['parameters']['D']:,}"
    fixed, step, machine = (memory[name] / 2**30 for name in ("fixed", "micro_batch", "machine"))
    yield (
        f"memory, estimated in fp32: {fixed:.2f} GiB for weights, gradients, Adam and the average, {step:.2f} GiB for "
        f"a micro-batch of {micro}"
    )
    fits = "fits" if fixed + step < 0.9 * machine else "is too much or close to it: lower --micro-batch"
    yield f"device: {found['device']} of {machine:.1f} GiB, which {fits}; {found['processes']} process(es)"
    if found["seconds_left"] is not None:
        yield f"time: about {found['seconds_left'] / 3600:.1f} h left, as fast as {config['run_dir']}/stats.jsonl says"
    else:
        yield "time: not known before something was measured; a run says it as it goes"
    if found["resume"]:
        changes = ", ".join(found["resume"]["changes"]) or "nothing changes"
        yield f"resume: {found['resume']['from']}, after {found['resume']['images']:,} images: {changes}"
    else:
        yield f"run: a new one in {config['run_dir']}"
    differs = ", ".join(f"{name} {value}" for name, value in found["differs"].items())
    yield f"differs from the preset {found['preset']}: {differs or 'in nothing'}"
    yield "(--json prints every setting too)"
