"""What is timed once before the first step, and kept for this GPU and run: kernels, and layouts of convolutions."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..atomic import replacing
from ..camera import cam2world_matrix, camera_rays
from ..config import Config
from ..models.decoder import Decoder
from ..ops import Network, convolution_layout, tuning, verdicts
from ..ops.checks import resolve_deterministic
from ..progress import waiting
from .precision import mode_of
from .progress import say
from .step import Trainer

FILE = "kernels.json"
LAYOUTS = "layouts.json"
BUDGET = 45.0  # seconds after which no other plan is timed
DAMAGED = ValueError, LookupError, TypeError, AttributeError

Timer = Callable[[Callable[[], Any]], float]


class Choice(NamedTuple):
    """Which of the kernels' plans are taken.

    Args:
        rows: As `ops.tuning.tune_decode_triplane` gives them; none where the defaults stay.
        fresh: Whether they were timed now.
    """

    rows: Sequence[dict[str, Any]] = ()
    fresh: bool = False

    def lines(self) -> list[str]:
        """What was chosen, the times beside."""
        lines = []
        for kernel in dict.fromkeys(row["kernel"] for row in self.rows):
            rows = [row for row in self.rows if row["kernel"] == kernel]
            (chosen,) = [row for row in rows if row["chosen"]]
            times = [f"{_words(row)} {_time(row)}" for row in rows if row is not chosen]
            beside = f", against {', '.join(times)}" if times else ", the only plan"
            when = "" if self.fresh else " (timed at an earlier start)"
            lines.append(f"{kernel}: {_words(chosen)} {_time(chosen)}{beside}{when}")
        return lines


def _words(row: dict[str, Any]) -> str:
    """A plan: points, warps and, if there are several, tiles of each launch."""
    return " + ".join(f"{points} x {warps}{f' x {tiles}' * (tiles > 1)}" for points, warps, tiles, _ in row["plan"])


def _time(row: dict[str, Any]) -> str:
    return "not timed" if row["ms"] is None else f"{row['ms']:.3g} ms"


def warm_up(trainer: Trainer, *, timer: Timer | None = None) -> Choice:
    """`choose_kernels` for the micro-batches of a run, where it renders by Triton. Draws no random numbers.

    Every process of a run times its own GPU.
    """
    config = trainer.config
    fused = isinstance(getattr(trainer.generator, "decoder", None), Decoder)
    if trainer.backends["decode_triplane"] != "triton" or not fused:
        return Choice()
    problem = micro_batch(config, trainer.micro, trainer.device)
    scale, precision = config.camera.cube_scale, mode_of(config).decoder
    return choose_kernels(Path(config.run_dir), trainer.device, *problem, scale, precision=precision, timer=timer)


def micro_batch(config: Config, images: int, device: torch.device) -> tuple[tuple[Tensor, ...], Network]:
    """What the decoder is given for a micro-batch: planes, ray_origins, ray_directions, t; and its network.

    Points lie as those of whole images seen from the mean pose, since how they share texels decides the time. Other
    values do not, and are constants.
    """
    generator, camera = config.generator, config.camera
    size = images, generator.plane_resolution, generator.plane_resolution, 3 * generator.plane_channels
    planes = torch.full(size, 0.1, device=device).permute(0, 3, 1, 2)  # channels_last, as the synthesis gives them
    angles = torch.tensor([[camera.yaw_mean, camera.pitch_mean, 0.0]], device=device).expand(images, 3)
    rays = camera_rays(cam2world_matrix(angles, camera.radius), camera.fov, config.patch.resolution)
    t = torch.linspace(camera.ray_start, camera.ray_end, config.renderer.coarse_samples, device=device)
    t = t.expand(images, rays[0].shape[1], -1).contiguous()
    hidden, outputs = generator.decoder_hidden, 4
    sizes = (hidden, generator.plane_channels), (hidden,), (outputs, hidden), (outputs,)
    network = Network(*(torch.full(size, 0.1, device=device) for size in sizes))
    return (planes, *rays, t), network


def choose_kernels(
    run_dir: Path,
    device: torch.device,
    rays: tuple[Tensor, ...],
    network: Network,
    cube_scale: float,
    *,
    precision: str = "fp32",
    timer: Timer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """Times the fused decoder's plans on the run's shapes, or reads what an earlier start found on the same GPU.

    The choices go to `kernels.json`, so that a resumed run takes the same kernels, and to where verdicts are kept, so
    that other runs with the same shapes need not time them. After `BUDGET` seconds no other plan is tried.

    Args:
        rays: planes, ray_origins, ray_directions and t of a micro-batch, see `ops.decode_triplane_rays`.
        timer, clock: For tests; default: by CUDA events, and the host's.
    """
    if device.type != "cuda" and timer is None:
        return Choice()
    sizes = {"sizes": [list(x.shape) for x in (*rays, *network)], "cube_scale": cube_scale, "precision": precision}
    key = verdicts.signature({**sizes, "deterministic": resolve_deterministic(None)})

    def measure() -> dict[str, Any]:
        rows = tuning.tune_decode_triplane(
            *rays, network, cube_scale, precision=precision, timer=timer, seconds=BUDGET, clock=clock
        )
        return {"choices": tuning.export_choices(), "times": rows}

    return _once(run_dir / FILE, device, key, "the kernels", measure, _taken)


class Layouts(NamedTuple):
    """Which convolutions take copies of their images, see `ops.convolution_layout`.

    Args:
        rows: As `tune` gives them; none where nothing was timed.
        fresh: Whether they were timed now.
    """

    rows: Sequence[dict[str, Any]] = ()
    fresh: bool = False

    def lines(self) -> list[str]:
        """What was chosen, the times beside."""
        timed = [row for row in self.rows if row["ms"] is not None]
        copied = [row for row in timed if row["chosen"]]
        if not timed:
            return []
        when = "" if self.fresh else " (timed at an earlier start)"
        kinds = f"{len(timed)} kinds" + f" that were timed of {len(self.rows)}" * (len(timed) < len(self.rows))
        if not copied:
            return [f"convolutions: all {kinds} in channels_last{when}"]
        before, after = (sum(row[name] for row in copied) for name in ("ms", "ms_copied"))
        names = ", ".join("x".join(map(str, row["weight"])) for row in copied)
        return [
            f"convolutions: {len(copied)} of {kinds} between copies in NCHW, {after:.3g} ms against "
            f"{before:.3g} ms of each once: {names}{when}"
        ]


def choose_layouts(
    trainer: Trainer, *, timer: Timer | None = None, clock: Callable[[], float] = time.monotonic
) -> Layouts:
    """Times the convolutions of a micro-batch in both layouts, or reads what an earlier start found on the same GPU.

    What is faster goes to `layouts.json`, as `choose_kernels` has it. Nothing is timed without a GPU, nor where every
    run is to give the same bits. A run's random numbers stay as they are.

    Args:
        timer, clock: For tests; default: by CUDA events, and the host's.
    """
    device, config = trainer.device, trainer.config
    if (device.type != "cuda" and timer is None) or resolve_deterministic(None):
        return Layouts()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), convolution_layout.recording() as seen:
        trainer.rehearse()
    if not seen:
        return Layouts()
    # Not the shapes of images, which follow the cameras that were drawn where planes are computed in part.
    images = trainer.micro, config.generator.plane_resolution, config.resolution, config.patch.resolution
    problem = {"convolutions": sorted(list(map(str, kind)) for kind in seen), "images": images}
    cudnn = {"benchmark": torch.backends.cudnn.benchmark, "tf32": torch.backends.cudnn.allow_tf32}
    key = verdicts.signature(problem | cudnn)

    def measure() -> dict[str, Any]:
        timed = tuning.milliseconds if timer is None else timer
        rows = convolution_layout.tune(seen, device, timed, seconds=BUDGET, clock=clock)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # CUDA graphs take their memory beside what is kept here
        return {"times": rows}

    return _once(Path(config.run_dir) / LAYOUTS, device, key, "the convolutions", measure, _laid_out)


Found = TypeVar("Found", Choice, Layouts)


def _once(
    path: Path,
    device: torch.device,
    key: str,
    what: str,
    measure: Callable[[], dict[str, Any]],
    take: Callable[[dict[str, Any]], Found],
) -> Found:
    """What a run, or another one with the same problem on the same GPU, has measured before; else it measures now.

    Args:
        path: The run's file of it, which counts for this problem alone: a run may go on with other settings.
        key: Of the problem, for `ops.verdicts`.
        measure: Plain values, which it takes up, too.
        take: Takes up what was stored; raises one of `DAMAGED`.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
            if stored["device"] == name and stored.get("key", key) == key:  # that of `bench.ops.tune` has none
                return take(stored)
        except (OSError, *DAMAGED) as error:
            say(f"{path} is damaged or of another version, and not read: {error}")
    stored, found = verdicts.read_timings(device, key, path.parent), None
    with contextlib.suppress(*DAMAGED):
        found = take(stored) if stored is not None else None
    if found is None:
        with waiting(f"timing {what}"):
            stored = measure()
        found = take(stored)._replace(fresh=True)
        verdicts.write_timings(device, key, stored, path.parent)
    try:
        with replacing(path) as temporary:  # processes of one run never see half a file
            temporary.write_text(json.dumps({"device": name, "key": key, **stored}, indent=2) + "\n")
    except OSError as error:
        say(f"warning: {path} cannot be written ({error.strerror}): a resumed run may take other {what.split()[-1]}")
    return found


def _taken(stored: dict[str, Any]) -> Choice:
    """Takes up what a file has. Raises one of `DAMAGED`."""
    choice = Choice(stored.get("times", []))
    choice.lines()  # which finds what is wrong with them
    tuning.import_choices(stored["choices"])
    return choice


def _laid_out(stored: dict[str, Any]) -> Layouts:
    """Takes up what a file has. Raises one of `DAMAGED`."""
    layouts = Layouts(stored["times"])
    layouts.lines()
    convolution_layout.copy(convolution_layout.chosen_of(layouts.rows))
    return layouts
