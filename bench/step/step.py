"""Whole training iterations, G + D + R1 every 16: `python -m bench.step --preset ffhq --resolution 512 --batch 8`.

On a GPU: images a second, phases, memory, launches, idle share and the GPU-days of the full schedule, one process a
variant. On a CPU, a small network by default, and no times: how many times as fast each variant is as the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epigraf_fast.config import PRESETS, Config, check, preset
from epigraf_fast.ops import backends
from epigraf_fast.training.distributed import World
from epigraf_fast.training.precision import HALF_BLOCKS, MODES, capability_of
from epigraf_fast.training.profile import listening
from epigraf_fast.training.step import Trainer

from .. import results
from ..ops import published
from ..timing import Spread, cpu_ratios

Row = dict[str, Any]

WARM_UP = 3  # iterations that are not counted, the first with regularization
AT_KIMG = 2500  # of the schedules: density noise on, D's blur over, patches of all scales
GROUP = 4  # micro-batches are multiples of the minibatch-std group
# What the CPU calls to give the GPU work, by the names in a trace.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
# Table 1 and Table 2 of the paper: (image resolution, patch resolution) -> V100 GPU-days.
PAPER_GPU_DAYS = {(256, 64): 16, (512, 32): 19, (512, 64): 24, (512, 128): 34}


@dataclass(frozen=True)
class Variant:
    """One way to compute the same training iteration.

    Args:
        what: Said with every result.
        precision: Of the settings; D's top blocks are fp16 on a GPU with all of them.
        backend: Of the ops, see `Config.backend`.
        published: Whether the renderer and the modulated convolutions are those of `published`.
        tuned: Baselines: channels_last, which the published code did not use and this engine does.
        compiled: Whether torch.compile takes the networks.
        graphs: Whether each phase is a CUDA graph, see `Config.cuda_graphs`.
        region: Whether planes are computed where rays look, see `GeneratorConfig.region`; never with `published`.
    """

    name: str
    what: str
    precision: str = "fp32"
    backend: str | None = None
    published: bool = False
    tuned: bool = False
    compiled: bool = False
    graphs: bool = False
    region: bool = True


NAMED = {
    variant.name: variant
    for variant in (
        Variant(
            "published",
            "the published op sequence in eager torch: grid_sample, sort and gather, unfused modulation, our bias_act "
            "and upfirdn2d; TF32 off, contiguous activations, D's top 4 blocks fp16 on a GPU",
            published=True,
        ),
        Variant(
            "eager-fp32",
            "published, with activations in channels_last, as ours-fp32 has them",
            published=True,
            tuned=True,
        ),
        Variant(
            "eager",
            "published, with TF32 on and activations in channels_last, as ours-tf32 has them",
            precision="tf32",
            published=True,
            tuned=True,
        ),
        Variant(
            "compile",
            "eager, with synthesis network, renderer and D through torch.compile; the D regularization stays eager "
            "(torch.compile has no double backward)",
            precision="tf32",
            published=True,
            tuned=True,
            compiled=True,
        ),
        Variant("ours-fp32", "this engine, the published arithmetic: TF32 off, D's top 4 blocks fp16"),
        Variant(
            "eager-fp16",
            "eager, with the top 4 resolutions of G fp16, as ours-fp16 has them",
            precision="fp16",
            published=True,
            tuned=True,
        ),
        Variant("ours-fp32-whole", "ours-fp32, planes always computed whole", region=False),
        Variant("ours-tf32x3", "this engine, convolutions as three products in TF32, D's top 4 blocks fp16", "tf32x3"),
        Variant("ours-tf32", "this engine, TF32 on, D's top 4 blocks fp16", precision="tf32"),
        Variant("ours-tf32-graphs", "ours-tf32, each phase one CUDA graph", precision="tf32", graphs=True),
        Variant("ours-fp16", "this engine, top 4 resolutions of G and blocks of D fp16, TF32 on", precision="fp16"),
        Variant("reference", "this engine, every op by its reference in plain torch; TF32 off", backend="reference"),
    )
}


def variant(name: str, device: torch.device) -> Variant:
    """A named variant, or `ours-BACKEND`: this engine with that backend wherever an op has it.

    Raises:
        ValueError: There is none of this name, or the backend is not here.
    """
    if name in NAMED:
        return NAMED[name]
    backend = name.removeprefix("ours-")
    if not name.startswith("ours-") or backend not in backends.BACKENDS:
        raise ValueError(f"variant must be one of {', '.join(NAMED)} or ours-BACKEND, got {name!r}")
    status = backends.status()
    having = [op for op in backends.OPS if status[op][backend] is None]
    if not having:
        raise ValueError(f"{name}: no op has the backend here: {status[backends.OPS[0]][backend]}")
    what = f"this engine, backend {backend} where it is: {', '.join(having)}; TF32 off"
    default = all(backends.resolve(op, None, device.type) == backend for op in having)
    return Variant(name, what, backend=None if default and len(having) < len(backends.OPS) else backend)


def precision_on(variant: Variant, capability: int | None) -> str:
    """The variant's precision on a device, fp32 where that has it not: a CPU, or a GPU without TF32."""
    return variant.precision if capability and capability >= MODES[variant.precision].capability else "fp32"


def opt_in_backend(device: torch.device) -> str | None:
    """What this engine is asked for to be measured at its fastest: its own kernels where they are not the default."""
    if device.type != "cuda":
        return None
    status = backends.status()
    usable = {name: status[op][name] is None for op, name in (("decode_triplane", "triton"), ("bias_act", "cuda"))}
    return "gpu" if all(usable.values()) else next((name for name, there in usable.items() if there), None)


class RandomData:
    """Poses and labels in place of a data set: the images of a measurement are noise."""

    camera = None

    def __init__(self, config: Config, size: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        spread = torch.tensor([0.3, 0.15, 0.0])
        self.angles = torch.randn(size, 3, generator=generator) * spread + torch.tensor([0.0, torch.pi / 2, 0.0])
        self.label_dim = 10 if config.loader.labels else 0
        self.labels = torch.eye(max(self.label_dim, 1))[torch.arange(size) % max(self.label_dim, 1)]
        self.labels = self.labels[:, : self.label_dim]
        self.label_values = torch.arange(self.label_dim)
        self.mean_camera_pose = self.angles.mean(dim=0)
        self.resolution, self.name = config.resolution, "random"

    def __len__(self) -> int:
        return len(self.angles)


def settings(args: argparse.Namespace) -> Config:
    """The settings of the iteration, all variants alike."""
    config = preset(args.preset)
    if args.size == "tiny":
        config = tiny(config)
    batch = args.batch or config.batch
    resolution = args.resolution or config.resolution
    patch = dataclasses.replace(config.patch, resolution=args.patch or config.patch.resolution)
    micro = min(args.micro_batch or batch, batch)
    config = dataclasses.replace(
        config, resolution=resolution, batch=batch, micro_batch=micro, patch=patch, device=args.device
    )
    check(config)
    return config


def tiny(config: Config) -> Config:
    """The same method in small, for a CPU."""
    return dataclasses.replace(
        config,
        resolution=32,
        batch=4,
        generator=dataclasses.replace(
            config.generator,
            z_dim=32,
            w_dim=32,
            plane_resolution=32,
            plane_channels=8,
            channel_base=512,
            channel_max=32,
            decoder_hidden=16,
        ),
        renderer=dataclasses.replace(config.renderer, coarse_samples=8, fine_samples=8),
        discriminator=dataclasses.replace(
            config.discriminator, channel_base=512, channel_max=32, code_dim=32, patch_table_dim=16
        ),
        patch=dataclasses.replace(config.patch, resolution=16),
    )


class Step:
    """A trainer of one variant, and what its iterations need around them."""

    def __init__(self, variant: Variant, config: Config, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self.fused = published.fused_backend(device.type, variant.compiled)
        half = HALF_BLOCKS if device.type == "cuda" else 0
        region = config.generator.region if variant.region and not variant.published else "off"
        backend = variant.backend or (None if variant.published else opt_in_backend(device))
        self.config = dataclasses.replace(
            config,
            precision=precision_on(variant, capability_of(device)),
            backend=config.backend if backend is None else backend,
            cuda_graphs=variant.graphs and device.type == "cuda",
            generator=dataclasses.replace(config.generator, region=region),
            discriminator=dataclasses.replace(config.discriminator, half_blocks=half),
        )
        torch.manual_seed(0)
        with self.environment():
            self.trainer = Trainer(self.config, RandomData(self.config), device)
        if variant.published:
            layout = torch.channels_last if variant.tuned else torch.contiguous_format
            published.publish(self.trainer.generator, layout)
            if variant.tuned:
                self.trainer.discriminator.to(memory_format=torch.channels_last)
                self.trainer.generator.synthesis.to(memory_format=torch.channels_last)
        if variant.compiled:
            _compile(self.trainer)
        shape = config.batch, 3, config.resolution, config.resolution
        images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.images = images.pin_memory() if device.type == "cuda" else images
        data = RandomData(config)
        self.labels, self.angles = data.labels[: config.batch], data.angles[: config.batch]
        repeats = -(-config.batch // len(data))
        if repeats > 1:
            self.labels = data.labels.repeat(repeats, 1)[: config.batch]
            self.angles = data.angles.repeat(repeats, 1)[: config.batch]

    def settings(self) -> Row:
        """What decides the speed of library calls: the same for a baseline and for what it is compared with."""
        with self.environment():
            baseline = self.variant.published
            return {
                "precision": self.config.precision,
                "tf32": torch.backends.cudnn.allow_tf32 and self.device.type == "cuda",
                "cudnn_benchmark": torch.backends.cudnn.benchmark,
                "channels_last": self.variant.tuned if baseline else True,
                "half_blocks": self.config.discriminator.half_blocks,
                "bias_act": backends_of(self)["bias_act"],
            }

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Torch's switches and the ops as the variant has them; cuDNN tries its algorithms for each, as sizes stay."""
        from epigraf_fast.tools import train  # the engine's own switches are those that train.py sets

        switches = (
            (torch.backends.cuda.matmul, "allow_tf32"),
            (torch.backends.cudnn, "allow_tf32"),
            (torch.backends.cudnn, "benchmark"),
        )
        before = [getattr(owner, name) for owner, name in switches]
        with contextlib.ExitStack() as stack:
            train.pick_device(self.config, World())
            torch.backends.cudnn.benchmark = self.device.type == "cuda"
            if self.variant.published:
                stack.enter_context(published.installed(self.fused))
            try:
                yield
            finally:
                for (owner, name), value in zip(switches, before, strict=True):
                    setattr(owner, name, value)

    def run(self, regularize: bool) -> None:
        """One iteration, with the regularization of D or without, whatever its turn."""
        self.trainer.iterations, self.trainer.cur_nimg = 0 if regularize else 1, AT_KIMG * 1000
        with self.environment():
            self.trainer.iteration(self.images, self.labels, self.angles)

    def require_finite(self) -> None:
        """Raises RuntimeError if a loss was not finite: what is wrong gets no speed."""
        broken = [
            name for name, value in self.trainer.statistics().items() if value != value or abs(value) == torch.inf
        ]
        self.trainer.reset_statistics()
        if broken:
            raise RuntimeError(f"{self.variant.name}: {', '.join(broken)} not finite")


def _compile(trainer: Trainer) -> None:
    """The networks through torch.compile, D's only where no gradient of a gradient is taken."""
    published.prepare_compiler()
    generator, discriminator = trainer.generator, trainer.discriminator
    generator.synthesis.forward = torch.compile(generator.synthesis.forward, dynamic=False)
    rendering = torch.compile(generator.renderer.forward, dynamic=False)

    def render(*args: Any, density_noise_std: float | torch.Tensor = 0.0, **options: Any) -> Any:
        # A number would be compiled in, and every other number compiled anew.
        std = torch.as_tensor(density_noise_std, device=trainer.device)
        return rendering(*args, density_noise_std=std, **options)

    generator.renderer.forward = render
    eager = discriminator.forward
    compiled = torch.compile(eager, dynamic=False)
    discriminator.forward = compiled
    regularization = trainer._regularization_phase

    def eagerly(*args: Any) -> None:
        discriminator.forward = eager
        regularization(*args)
        discriminator.forward = compiled

    trainer._regularization_phase = eagerly


def measure_gpu(step: Step, seconds: float, largest: bool) -> Row:
    """Everything about one variant.

    Args:
        seconds: To spend on timing, about.
        largest: Whether to look for the largest micro-batch.
    """
    begun = time.perf_counter()
    for i in range(WARM_UP):
        step.run(regularize=i == 0)
    step.require_finite()
    setup = time.perf_counter() - begun
    torch.cuda.reset_peak_memory_stats()
    with_r1 = [_wall(step, 1, regularize=True) for _ in range(3)]
    peak = torch.cuda.max_memory_allocated()
    count = max(3, min(16, int(seconds / min(with_r1))))
    phases, plain = _phases(step, count)
    interval, batch = step.config.optim.r1_interval, step.config.batch
    regularization = max(0.0, sorted(with_r1)[1] - plain)
    iteration = plain + regularization / interval
    usual, regularized = _profile(step, regularize=False), _profile(step, regularize=True)
    launches, kernels, busy = (a + (b - a) / interval for a, b in zip(usual, regularized, strict=True))
    row: Row = {
        "iteration_ms": 1000 * iteration,
        "without_r1_ms": 1000 * plain,
        "r1_ms": 1000 * regularization,
        "phase_ms": phases,
        "img_per_sec": batch / iteration,
        "peak_bytes": peak,
        "launches": launches,
        "kernels": kernels,
        "idle": max(0.0, 1 - busy / iteration),
        "setup_seconds": setup,
        "iterations": count,
        "gpu_days": step.config.kimg * 1000 / (batch / iteration) / 86400,
    }
    step.require_finite()
    if largest:
        row["largest_micro_batch"] = largest_micro_batch(step, peak)
    return row


def _wall(step: Step, count: int, regularize: bool) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        step.run(regularize)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def _phases(step: Step, count: int) -> tuple[dict[str, Row], float]:
    """Device milliseconds of every annotated range, and seconds of an iteration without regularization."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        events.setdefault(name, []).append((start, end))

    with listening(timed):
        plain = _wall(step, count, regularize=False)
        _wall(step, 3, regularize=True)
    found = {
        name: Spread.of([start.elapsed_time(end) for start, end in pairs]).to_dict() for name, pairs in events.items()
    }
    return found, plain


def _profile(step: Step, regularize: bool) -> tuple[int, int, float]:
    """Launches of one iteration, the kernels and copies that they ran, and the seconds in which any of those ran."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step.run(regularize)
        torch.cuda.synchronize()
    return activity(profiler.events())


def activity(events: Iterable[Any]) -> tuple[int, int, float]:
    """Of a profiler's events: launches, what ran on the GPU, and the seconds in which any of it did."""
    launches, spans = 0, []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            launches += event.name.startswith(LAUNCHES)
        elif not getattr(event, "is_user_annotation", False):
            spans.append((event.time_range.start, event.time_range.end))
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return launches, len(spans), busy / 1e6


def largest_micro_batch(step: Step, peak: int) -> int | None:
    """The largest micro-batch whose iteration fits the GPU's memory: predicted from two peaks, then tried."""
    config, variant, device = step.config, step.variant, step.device
    batch = config.batch
    step.trainer = None
    free_memory()

    def peak_of(micro: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        whole = dataclasses.replace(config, batch=micro, micro_batch=micro)
        trial = Step(variant, whole, device)
        trial.run(regularize=True)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    total = torch.cuda.get_device_properties(0).total_memory
    other = 2 * batch if peak < total / 3 else max(GROUP, batch // 2 // GROUP * GROUP)
    if other == batch:
        return None
    slope = (peak_of(other) - peak) / (other - batch)
    free_memory()
    micro = int((0.97 * total - peak) / slope + batch) // GROUP * GROUP if slope > 0 else batch
    for _ in range(4):
        if micro < GROUP:
            return None
        try:
            peak_of(micro)
            return micro
        except torch.OutOfMemoryError:
            micro = int(micro * 0.93) // GROUP * GROUP
        finally:
            free_memory()
    return None


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def backends_of(step: Step) -> dict[str, str]:
    """Op -> the backend that a variant's iterations call."""
    asked = step.config.backend if step.config.backend in backends.BACKENDS else None
    default = {op: backends.resolve(op, None, step.device.type) for op in backends.OPS}
    found = {op: asked if asked and backends.status()[op][asked] is None else default[op] for op in backends.OPS}
    if step.variant.published:
        for op in backends.OPS:
            if op not in ("bias_act", "upfirdn2d"):
                found[op] = "published"
            elif step.fused is not None:
                found[op] = step.fused
    return found


def on_gpu(args: argparse.Namespace) -> Iterator[Row]:
    """Every variant in a process of its own: a fault or a full memory stays there."""
    for name in args.variants:
        head = {"variant": name, "what": variant(name, torch.device("cuda")).what}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "row.json"
            command = [sys.executable, "-m", "bench.step", *args.line, "--variants", name, "--child", str(path)]
            try:
                code = subprocess.run(command, cwd=results.ROOT, timeout=args.timeout, check=False).returncode
                row = json.loads(path.read_text()) if path.is_file() else {"failed": f"exit status {code}"}
            except subprocess.TimeoutExpired:
                row = {"failed": f"took more than {args.timeout} seconds"}
        yield head | row


def child(args: argparse.Namespace, config: Config) -> None:
    """Measures one variant, and leaves its row in a file."""
    device = torch.device("cuda")
    chosen = variant(args.variants[0], device)
    row: Row = {}
    try:
        step = Step(chosen, config, device)
        row |= {"backends": backends_of(step), "settings": step.settings()}
        row |= measure_gpu(step, args.seconds, args.largest)
        if args.profile:
            write_trace(step, args.profile)
    except Exception as error:  # said in the table, beside the other variants
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    Path(args.child).write_text(json.dumps(row))


def on_cpu(args: argparse.Namespace, config: Config) -> list[Row]:
    """All variants in turn: how many times as fast each is as the last."""
    device = torch.device("cpu")
    steps = {name: Step(variant(name, device), config, device) for name in args.variants}
    for step in steps.values():
        step.run(regularize=True)
        step.require_finite()
    if args.profile:
        write_trace(next(iter(steps.values())), args.profile)
    rows = [
        {"variant": name, "what": step.variant.what, "backends": backends_of(step), "settings": step.settings()}
        for name, step in steps.items()
    ]
    for label, regularize in (("without_r1", False), ("with_r1", True)):
        functions = {name: functools.partial(step.run, regularize) for name, step in steps.items()}
        slower = cpu_ratios(functions, budget=args.seconds) if len(functions) > 1 else {}
        for row in rows:
            if row["variant"] in slower:
                s = slower[row["variant"]]
                faster = Spread(1 / s.median, 1 / s.p80, 1 / s.p20, s.count).to_dict()
                row.setdefault("times_as_fast", {})[label] = faster
                row["against"] = args.variants[-1]
    return rows


def write_trace(step: Step, path: str) -> None:
    """A torch profiler trace of one iteration, with the regularization of D."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step.run(regularize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(path)


def format_row(row: Row) -> str:
    """What one variant gave, in a few lines."""
    lines = [f"{row['variant']}: {row['what']}"]
    if "settings" in row:
        lines.append(describe(row["settings"]))
    if row.get("failed"):
        lines.append(f"! {row['failed']}")
    for label, s in row.get("times_as_fast", {}).items():
        lines.append(
            f"{label.replace('_', ' ')}: {s['median']:.2f}x {row['against']} ({s['p20']:.2f} to {s['p80']:.2f})"
        )
    if "img_per_sec" in row:
        phases = ", ".join(f"{name} {spread['median']:.1f}" for name, spread in row["phase_ms"].items())
        lines += [
            f"{row['img_per_sec']:.1f} img/s, {row['iteration_ms']:.1f} ms an iteration ({phases} ms), "
            f"peak {row['peak_bytes'] / 2**30:.2f} GiB, {row['launches']:.0f} launches, GPU idle {row['idle']:.0%}",
            f"full schedule: {row['gpu_days']:.2f} days of this GPU"
            + (f"; largest micro-batch {row['largest_micro_batch']}" if row.get("largest_micro_batch") else ""),
        ]
    return "\n  ".join(lines)


def describe(settings: Row) -> str:
    """`Step.settings` in one line."""
    switches = {"TF32": settings["tf32"], "cudnn.benchmark": settings["cudnn_benchmark"]}
    words = [f"precision {settings['precision']}"]
    words += [f"{name} {'on' if value else 'off'}" for name, value in switches.items()]
    words += ["channels_last" if settings["channels_last"] else "contiguous"]
    words += [f"D's half blocks {settings['half_blocks']}", f"bias_act and upfirdn2d: {settings['bias_act']}"]
    return ", ".join(words)


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    everything = "published,eager,compile,ours-fp32,ours-tf32,ours-fp16" if gpu else "ours-fp32,published,reference"
    out = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split(":")[0] + ".")
    out.add_argument("--preset", choices=PRESETS, default="ffhq")
    out.add_argument("--resolution", type=int, default=None, help="default: the preset's")
    out.add_argument("--patch", type=int, default=None, help="patch resolution; default: the preset's")
    out.add_argument("--batch", type=int, default=8 if gpu else None)
    out.add_argument("--micro-batch", type=int, default=None, help="default: the batch")
    out.add_argument("--size", choices=("real", "tiny"), default="real" if gpu else "tiny")
    out.add_argument("--variants", type=lambda text: text.split(","), default=everything.split(","))
    out.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    out.add_argument("--seconds", type=float, default=3.0, help="to spend on timing a variant")
    out.add_argument("--timeout", type=float, default=180.0, help="of a variant, seconds")
    out.add_argument(
        "--no-largest", dest="largest", action="store_false", help="do not look for the largest micro-batch"
    )
    out.add_argument("--profile", default=None, metavar="FILE", help="write a torch profiler trace of an iteration")
    out.add_argument("--json", default=None, help="write the results there")
    out.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return out


def described(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The settings of a run, for its result file."""
    names = ("preset", "size", "variants", "seconds", "micro_batch", "profile")
    return {name: getattr(args, name) for name in names} | {
        "resolution": config.resolution,
        "patch": config.patch.resolution,
        "batch": config.batch,
        "kimg": config.kimg,
        "at_kimg": AT_KIMG,
        "r1_interval": config.optim.r1_interval,
        "paper_v100_days": PAPER_GPU_DAYS.get((config.resolution, config.patch.resolution))
        if args.size == "real" and args.preset != "demo"
        else None,
    }


def main(argv: list[str] | None = None) -> int:
    line = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(line)
    args.line = line
    device = torch.device(args.device)
    for name in args.variants:
        variant(name, device)
    config = settings(args)
    if args.child:
        child(args, config)
        return 0
    rows = []
    for row in on_gpu(args) if device.type == "cuda" else on_cpu(args, config):
        print(format_row(row), flush=True)
        rows.append(row)
        if args.json:  # after every variant: this process may be stopped
            results.write(args.json, results.result("step", described(args, config), rows))
    return int(any(row.get("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
