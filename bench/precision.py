"""How near each precision's gradients are to those in float64: `python -m bench.precision --json FILE`.

A small network is trained for a while. Then the gradients of its phases are computed in float64 and in every precision,
products being rounded as on a GPU (`bench.rounding`), elementwise kernels of half precision as they are. For each:
cosine and length against float64, and of the gradients at the convolutions in half precision the share that is 0 where
float64 has a number. Of the planes' gradient: which share fp16 would make 0, by the scale of the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from epigraf_fast.camera import Patch
from epigraf_fast.config import Config, preset
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.ops import convolution
from epigraf_fast.training.networks import set_arithmetic
from epigraf_fast.training.precision import HALF_BLOCKS, MODES
from epigraf_fast.training.proof_items import _phases
from epigraf_fast.training.step import Trainer

from . import results
from .rounding import Rounding

CPU = torch.device("cpu")
PUBLISHED = "fp32, half D"  # the published mix
SCALES = (0, 4, 8, 10, 12, 13, 14, 15, 16)  # powers of two
SCALE = 10  # of the loss with precision fp16, where nothing else is said
TINY = 2.0**-25  # what is not larger becomes 0 in fp16

Found = dict[str, tuple[Tensor, list[Tensor]]]  # phase -> its gradient, and those that came to its convolutions


def quiet(config: Config) -> Config:
    """The settings without what draws numbers in the dtype of the networks, which float64 would draw others of."""
    return dataclasses.replace(
        config,
        micro_batch=None,
        backend="torch",  # the renderer's products are torch's, so that they are rounded
        generator=dataclasses.replace(config.generator, noise=False, region="off", pose_dropout=0.0, style_mixing=0.0),
        discriminator=dataclasses.replace(config.discriminator, camera_dropout=0.0),
        augment=dataclasses.replace(config.augment, mode="none"),
        optim=dataclasses.replace(config.optim, loss_scale=2.0**SCALE),
    )


def trained(config: Config, iterations: int) -> tuple[ImageDataset, dict[str, Any]]:
    """A data set, and the state of a trainer after so many iterations in fp32."""
    torch.manual_seed(config.seed)
    data = ImageDataset(config.data, config.resolution, use_labels=config.loader.labels, mirror=config.loader.mirror)
    trainer = Trainer(config, data, CPU)
    batches = make_loader(data, config.batch, config.seed)
    for _ in range(iterations):
        trainer.iteration(*next(batches))
    return data, trainer.state_dict()


def gradients(
    config: Config,
    data: ImageDataset,
    state: dict[str, Any],
    precision: str | None,
    *,
    phases: Sequence[str] = ("G", "D", "R1"),
) -> tuple[Found, Tensor]:
    """The gradients of the phases, the loss's scale divided out, and that of the planes.

    Args:
        config: Of `quiet`.
        precision: One of `MODES`, or `PUBLISHED`; None: float64.
    """
    half_blocks = HALF_BLOCKS if precision == PUBLISHED else None
    asked = dataclasses.replace(
        config,
        precision=precision if precision in MODES else "fp32",
        discriminator=dataclasses.replace(config.discriminator, half_blocks=half_blocks),
    )
    trainer = Trainer(asked, data, CPU)
    trainer.load_state_dict(state)
    if precision == PUBLISHED:
        trainer.discriminator.half_on = ("cpu",)
    if precision is None:
        _in_double(trainer)
    planes: list[Tensor] = []
    trainer.generator.synthesis.register_forward_hook(lambda module, given, x: _keep_gradient(x, planes))
    optimizers = {"G": trainer.g_optimizer, "D": trainer.d_optimizer, "R1": trainer.d_optimizer}
    found: Found = {}
    with _arithmetic(asked):
        for name, compute, inputs in _phases(trainer, drawn=False, seed=0):
            if name not in phases:
                continue
            given = tree_map(_double, inputs) if precision is None else inputs
            with Rounding() as rounding:
                grads, _ = compute(*given)
            flat = torch.cat([x.detach().flatten().double() for x in grads if x is not None])
            scale = trainer.scale_of(optimizers[name])
            found[name] = flat if scale is None else flat / float(scale), rounding.incoming
    return found, planes[0]


def _keep_gradient(x: Tensor, kept: list[Tensor]) -> None:
    if x.requires_grad:
        x.register_hook(lambda grad: kept.append(grad.detach().clone()))


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _in_double(trainer: Trainer) -> None:
    """Has the phases compute in float64, on the numbers that fp32 draws."""
    trainer.generator.double()
    trainer.discriminator.double()
    sample = trainer._sample_patches
    trainer._sample_patches = lambda num: Patch(*map(_double, sample(num)))


@contextlib.contextmanager
def _arithmetic(config: Config) -> Iterator[None]:
    """Torch's switches as the precision has them; every 3 x 3 convolution is split where any is."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    set_arithmetic(config)
    convolution.split_from(1 if MODES[config.precision].split else None)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        convolution.split_from(None)


def compare(found: Found, truth: Found) -> list[dict[str, Any]]:
    """A row a phase: cosine and length against the truth; with half precision also the share of lost gradients."""
    rows = []
    for phase, (grad, incoming) in truth.items():
        mine, arrived = found[phase]
        row = {
            "phase": phase,
            "overflow": not bool(mine.isfinite().all()),
            "cosine": None,
            "length": None,
            "lost": None,
        }
        if not row["overflow"]:
            row["cosine"] = float(torch.dot(mine, grad) / (mine.norm() * grad.norm()))
            row["length"] = float(mine.norm() / grad.norm())
        if any(x.element_size() == 2 for x in arrived):
            halves = [(x, y) for x, y in zip(arrived, incoming, strict=True) if x.element_size() == 2]
            there = sum(int((y != 0).sum()) for _, y in halves)
            row["lost"] = sum(int(((x == 0) & (y != 0)).sum()) for x, y in halves) / there
        rows.append(row)
    return rows


def measure(
    config: Config, iterations: int, precisions: Sequence[str] = (*MODES, PUBLISHED), powers: Sequence[int] = ()
) -> dict[str, Any]:
    """Rows of every precision and phase, and what fp16 loses of the planes' gradient by the scale's power of two.

    Args:
        powers: For each, a row of G's phase in fp16 with the loss scaled by that power of two.
    """
    config = quiet(config)
    data, state = trained(config, iterations)
    truth, planes = gradients(config, data, state, None)
    rows = []
    for name in precisions:
        found, _ = gradients(config, data, state, name)
        scales = {"G": SCALE} if name == "fp16" else {}
        rows += [{"precision": name, "scale": scales.get(row["phase"]), **row} for row in compare(found, truth)]
    for power in powers:
        scaled = dataclasses.replace(config, optim=dataclasses.replace(config.optim, loss_scale=2.0**power))
        found, _ = gradients(scaled, data, state, "fp16", phases=("G",))
        rows += [{"precision": "fp16", "scale": power, **row} for row in compare(found, {"G": truth["G"]})]
    size = planes[planes != 0].abs()
    below = {str(power): float((size * 2.0**power <= TINY).double().mean()) for power in SCALES}
    return {"rows": rows, "planes_that_fp16_loses": below}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'precision':<12} {'scale':<6} {'phase':<6} {'1 - cosine':>10} {'length':>8} {'lost':>8}"]
    for row in found["rows"]:
        scale = "" if row["scale"] is None else f"2^{row['scale']}"
        numbers = f"{'overflow':>10} {'-':>8}"
        if not row["overflow"]:
            numbers = f"{1 - row['cosine']:>10.1e} {row['length']:>8.5f}"
        lost = "-" if row["lost"] is None else f"{row['lost']:.3%}"
        lines.append(f"{row['precision']:<12} {scale:<6} {row['phase']:<6} {numbers} {lost:>8}")
    shares = ", ".join(f"2^{power} {share:.2%}" for power, share in found["planes_that_fp16_loses"].items())
    lines.append(f"of the planes' gradient fp16 would lose, by the scale of the loss: {shares}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=100, help="of training before, batches of 8")
    parser.add_argument("--json", default=None, help="write the results there")
    args = parser.parse_args(argv)
    found = measure(preset("demo"), args.iterations, powers=SCALES)
    print(table(found))
    if args.json:
        rows = found.pop("rows")
        settings = {"preset": "demo", "iterations": args.iterations}
        results.write(args.json, results.result("precision", settings, rows, **found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
