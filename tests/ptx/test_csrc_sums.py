"""Sums over pixels at sizes of a step, where two kernels add up what the blocks of a third have left.

That third kernel is not run, it would take minutes: random numbers stand for its partial sums. An ordinary run has the
smaller of the two sums.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.ptx import Program, csrc_host, csrc_launch
from bench.resources import of_csrc
from checks import assert_close, draw
from epigraf_fast import ops

ARCH = 80


def run_sums(call: Callable[[], object]) -> tuple[Tensor, dict[str, Tensor], list[tuple[str, int]]]:
    """The partial sums, the tensors of the launch that has any, and the kernels after the first with their blocks."""
    lacking = of_csrc.lacking(ARCH) or csrc_host.module()
    if isinstance(lacking, str):
        pytest.skip(lacking)
    parts: list[Tensor] = []
    tensors: dict[str, Tensor] = {}
    launched = []

    def run(one: csrc_launch.Compiled) -> None:
        if "partials" not in one.tensors:
            return
        if not parts:
            partials = one.tensors["partials"]
            partials.copy_(draw(partials.numel(), seed=1))
            parts.append(partials.clone())
            tensors.update(one.tensors)
            return
        program = Program("")
        program.entries[one.entry.name] = one.entry
        options = {"grid": one.grid, "block": one.block, "params": one.params, "tensors": one.tensors, "arch": ARCH}
        program.launch(one.entry.name, **options, count=False)
        launched.append((one.kernel.partition("<")[0], one.grid[0] * one.grid[1] * one.grid[2]))

    with csrc_launch.forwarded(ARCH, run):
        call()
    return parts[0], tensors, launched


@pytest.mark.compiled
def test_sums_of_the_epilogue_in_two_steps() -> None:
    batch, channels, size = 2, 136, (128, 256)
    x = torch.zeros(batch, *size, channels).permute(0, 3, 1, 2).requires_grad_()
    vectors = {name: torch.ones(batch, channels, requires_grad=True) for name in ("demod", "style0", "style1")}
    bias, strength = torch.zeros(channels, requires_grad=True), torch.ones((), requires_grad=True)
    inputs = [*vectors.values(), bias, strength]

    def call() -> None:
        styles = vectors["style0"], vectors["style1"]
        noise = torch.zeros(1, 1, *size)
        settings = {"demod": vectors["demod"], "noise": noise, "strength": strength, "bias": bias, "styles": styles}
        ys = ops.layer_epilogue(x, **settings, act="lrelu", backend="cpu")
        torch.autograd.grad(ys, inputs, [y.detach() for y in ys])

    partials, found, launched = run_sums(call)
    assert [kernel for kernel, _ in launched] == ["layer_slices_kernel", "layer_sums_kernel"]
    assert launched[0][1] >= 264
    sums = partials.double().view(batch, -1, 5, channels).sum(1)  # [B, 5, C]
    expected = {
        "grad_demod": sums[:, 0],
        "grad_bias": sums[:, 1].sum(0),
        "grad_strength": sums[:, 2].sum(),
        "grad_style0": sums[:, 3],
        "grad_style1": sums[:, 4],
    }
    for name, value in expected.items():
        assert_close(found[name], value, name, torch.float32)


def test_sums_of_a_bias_in_two_steps() -> None:
    channels = 40
    x, bias = torch.zeros(128 * 300 + 1, channels, requires_grad=True), torch.zeros(channels, requires_grad=True)

    def call() -> None:
        y = ops.bias_act(x, bias, act="lrelu", backend="cpu")
        torch.autograd.grad(y, bias, y.detach())

    partials, found, launched = run_sums(call)
    assert [kernel for kernel, _ in launched] == ["bias_act_sum_parts_kernel"] * 2
    assert launched[0][1] >= 264
    assert_close(found["grad_bias"], partials.double().view(-1, channels).sum(0), "grad_bias", torch.float32)
