"""How training may scale to many GPUs, an estimate: `python -m bench.runs.scaling [--json FILE] [--page]`.

Nothing is timed. What an iteration computes and sends is counted from the networks of a preset; how fast GPUs and links
are is assumed, and printed. docs/cluster.md has the arithmetic and the table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from epigraf_fast.camera import Patch
from epigraf_fast.config import PRESETS, Config, preset
from epigraf_fast.training.distributed import buckets_of
from epigraf_fast.training.memory import meta_networks

from .. import results
from ..counts.tables import table

RESULTS = results.FOLDER / "scaling.json"
PAGE = results.ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- scaling:begin, written by python -m bench.runs.scaling --page -->", "<!-- scaling:end -->"

NODE = 8  # GPUs of a machine
GPUS = (8, 64, 256)
TFLOPS = 90.0  # that a GPU sustains over a whole iteration: about an H100 in TF32. Slower ones scale better
INSIDE = 360e9  # bytes/s of a GPU to the others of its machine, each way: 80% of NVLink 4
USABLE = 0.8  # of what a link is named after
LATENCY = {"inside": 5e-6, "between": 20e-6}  # seconds of a step of an exchange


class Link(NamedTuple):
    """Between machines."""

    name: str
    gigabits: float  # a second and a machine, each way


LINKS = (Link("10 Gb/s Ethernet", 10), Link("100 Gb/s Ethernet", 100), Link("8 x 400 Gb/s InfiniBand", 3200))


class Phase(NamedTuple):
    """What a process does in a phase, on average over iterations."""

    name: str
    share: float  # of the iterations that have it
    flops: float  # of an image
    backward_flops: float  # of the last backward pass, and an image
    buckets: tuple[int, ...]  # bytes of gradients that travel together


def phases(config: Config, images: int = 4) -> list[Phase]:
    """G, D and R1 of a preset, with floating-point operations of convolutions and products only.

    Args:
        images: That are counted with.
    """
    generator, discriminator = meta_networks(config, 0)
    size = config.patch.resolution

    def make() -> torch.Tensor:
        return generator(
            torch.empty(images, generator.z_dim),
            torch.empty(images, 3),
            torch.empty(images, 0),
            resolution=size,
            patch=Patch(torch.empty(images), torch.empty(images, 2)),
            region=False,
        ).rgb

    def judge(patches: torch.Tensor) -> torch.Tensor:
        num = len(patches)
        patch = Patch(torch.empty(num), torch.empty(num, 2))
        return discriminator(patches, patch, torch.empty(num, 0), torch.empty(num, 3))

    def counted(function: Any, *inputs: Any) -> tuple[float, Any]:
        with FlopCounterMode(display=False) as counter:
            found = function(*inputs)
        return counter.get_total_flops() / images, found

    def bytes_of(module: torch.nn.Module) -> tuple[int, ...]:
        buckets = buckets_of(list(module.parameters()))
        return tuple(4 * sum(p.numel() for p in bucket) for bucket in buckets)

    r1 = 1 / config.optim.r1_interval if config.optim.r1_gamma else 0.0
    with torch.device("meta"):
        discriminator.requires_grad_(False)
        forward, logits = counted(lambda: judge(make()).sum())
        backward, _ = counted(logits.backward)
        found = [Phase("G", 1.0, forward + backward, backward, bytes_of(generator))]
        discriminator.requires_grad_(True)
        with torch.no_grad():
            fake, patches = counted(make)
        forward, logits = counted(lambda: judge(torch.cat([patches, patches])).sum())
        backward, _ = counted(logits.backward)
        found.append(Phase("D", 1.0, fake + forward + backward, backward, bytes_of(discriminator)))
        reals = torch.empty_like(patches, requires_grad=True)
        forward, logits = counted(lambda: judge(reals).sum())
        first, (grad,) = counted(lambda: torch.autograd.grad(logits, reals, create_graph=True))
        backward, _ = counted(grad.square().sum().backward)
        found.append(Phase("R1", r1, forward + first + backward, backward, bytes_of(discriminator)))
    return found


def all_reduce(size: int, gpus: int, link: Link) -> float:
    """Seconds of a sum over all GPUs: within each machine, between machines with all GPUs at once, within again.

    2 (g - 1) / g bytes / inside for the g GPUs of a machine, and 2 (m - 1) / m bytes / link for m machines; and their
    latencies: a step for every GPU of a machine, and twice the depth of a tree over machines.
    """
    inside, machines = min(gpus, NODE), max(1, gpus // NODE)
    seconds = 2 * (inside - 1) / inside * size / INSIDE + 2 * (inside - 1) * LATENCY["inside"]
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * size / (link.gigabits * 1e9 / 8 * USABLE)
        seconds += 2 * math.ceil(math.log2(machines)) * LATENCY["between"]
    return seconds


def estimate(found: list[Phase], images: int, gpus: int, link: Link) -> dict[str, Any]:
    """An iteration with so many images on each GPU.

    At worst nothing travels before all is computed, as with CUDA graphs; at best all but the last bucket does during
    the last backward pass, if that is long enough.
    """
    compute = sum(phase.share * phase.flops * images for phase in found) / (TFLOPS * 1e12)
    travel = worst = best = 0.0
    for phase in found:
        times = [all_reduce(size, gpus, link) for size in phase.buckets]
        backward = phase.backward_flops * images / (TFLOPS * 1e12)
        travel += phase.share * sum(times)
        worst += phase.share * all_reduce(sum(phase.buckets), gpus, link)
        best += phase.share * max(times[-1], sum(times) - backward)
    return {
        "gpus": gpus,
        "link": link.name if gpus > NODE else "inside one machine",
        "batch": gpus * images,
        "compute_ms": 1e3 * compute,
        "travel_ms": 1e3 * travel,
        "efficiency": [compute / (compute + worst), compute / (compute + min(best, worst))],
    }


def run(name: str, images: int) -> results.Result:
    """The result file of a preset."""
    config = preset(name)
    found = phases(config)
    links = [(gpus, link) for gpus in GPUS for link in (LINKS if gpus > NODE else LINKS[:1])]
    settings = {
        "preset": name,
        "images": images,
        "tflops": TFLOPS,
        "inside_bytes_per_second": INSIDE,
        "usable": USABLE,
        "latency_seconds": LATENCY,
        "links": [link._asdict() for link in LINKS],
    }
    cases = [estimate(found, images, gpus, link) for gpus, link in links]
    return results.result("scaling", settings, cases, phases=[phase._asdict() for phase in found])


def arithmetic(result: results.Result) -> str:
    """What is counted, and what is assumed."""
    config = result["config"]
    lines = table(
        ["phase", "every", "GFLOP an image", "of them the last backward pass", "gradients", "buckets"],
        [
            [
                phase["name"],
                f"{round(1 / phase['share'])}th iteration" if phase["share"] < 1 else "iteration",
                f"{phase['flops'] / 1e9:.0f}",
                f"{phase['backward_flops'] / 1e9:.0f}",
                f"{sum(phase['buckets']) / 2**20:.0f} MiB",
                str(len(phase["buckets"])),
            ]
            for phase in result["phases"]
            if phase["share"]
        ],
    )
    links = "; ".join(f"{x['name']} {x['gigabits'] * config['usable'] / 8:g} GB/s" for x in config["links"])
    latency = config["latency_seconds"]
    return (
        f"Counted, of the {config['preset']} preset ({result['file']}, commit {result['environment']['commit']}):\n\n"
        f"{lines}\n\n"
        f"Assumed: {config['tflops']:g} TFLOP/s on each GPU over a whole iteration; {config['images']} images on each; "
        f"{config['inside_bytes_per_second'] / 1e9:g} GB/s each way inside a machine of {NODE}; between machines, "
        f"{config['usable']:.0%} of what the link is named after: {links}; {1e6 * latency['inside']:g} us a step "
        f"inside, {1e6 * latency['between']:g} us between."
    )


def efficiencies(result: results.Result) -> str:
    """The table of all estimates."""
    return table(
        ["GPUs", "link between machines", "batch", "computing, ms", "gradients, ms", "of ideal speed"],
        [
            [
                str(case["gpus"]),
                case["link"],
                str(case["batch"]),
                f"{case['compute_ms']:.0f}",
                f"{case['travel_ms']:.1f}",
                " to ".join(f"{100 * x:.0f}" for x in case["efficiency"]) + "%",
            ]
            for case in result["cases"]
        ],
    )


def page(result: results.Result) -> str:
    """What docs/cluster.md shows of a result."""
    return f"{arithmetic(result)}\n\n**An estimate, nothing of it is measured:**\n\n{efficiencies(result)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs.scaling", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--preset", choices=PRESETS, default="ffhq", help="whose networks (default: ffhq)")
    parser.add_argument("--images", type=int, default=8, help="on each GPU (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/cluster.md from the file")
    args = parser.parse_args(argv)
    path = args.json or RESULTS
    if args.page:
        before, rest = PAGE.read_text().split(BEGIN)
        found = page({**json.loads(path.read_text()), "file": path.name})
        PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}")
        return 0
    result = run(args.preset, args.images)
    print(page({**result, "file": path.name}))
    if args.json:
        results.write(args.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
