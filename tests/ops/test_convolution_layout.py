"""Convolutions between copies in the other layout: the same numbers, laid out as without; chosen by the timer alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checks import assert_close, draw
from epigraf_fast.ops import convolution_layout, modulated_conv2d, native
from epigraf_fast.ops.convolution_derivatives import conv2d, conv_transpose2d
from epigraf_fast.training.networks import set_arithmetic
from epigraf_fast.training.start import checksum
from epigraf_fast.training.step import Trainer
from epigraf_fast.training.warmup import LAYOUTS, choose_layouts

LAST = torch.channels_last
CALLS = {
    "3x3": (lambda x, w: conv2d(x, w, padding=1), (5, 3, 3, 3)),
    "1x1": (lambda x, w: conv2d(x, w), (5, 3, 1, 1)),
    "down": (lambda x, w: conv2d(x, w, stride=2), (5, 3, 3, 3)),
    "up": (lambda x, w: conv_transpose2d(x, w, stride=2), (3, 5, 3, 3)),
}


@pytest.fixture(autouse=True)
def _as_they_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convolution_layout.copy(())
    yield
    convolution_layout.copy(())


def kinds(call, *inputs):
    with convolution_layout.recording() as seen:
        call(*inputs)
    return seen


def derivatives(call, x, weight):
    """Output, first and second derivatives; and how the first ones lie."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = call(x, weight)
    first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, weight))
    return (y, *first, *second), [tensor.stride() for tensor in (y, *first)]


@pytest.mark.parametrize("name", CALLS)
def test_copies_change_no_number_and_no_layout(name, monkeypatch):
    call, shape = CALLS[name]
    x, weight = (
        draw(*size, seed=seed).contiguous(memory_format=LAST) for size, seed in (((2, 3, 8, 8), 1), (shape, 2))
    )
    expected, strides = derivatives(call, x, weight)
    convolution_layout.copy(kinds(call, x, weight))
    read = {"convolution": [], "convolution_backward": []}
    for op, inputs in read.items():
        dispatched = getattr(torch.ops.aten, op)

        def noted(*args, inputs=inputs, dispatched=dispatched):
            inputs += [x for x in args if isinstance(x, torch.Tensor)]
            return dispatched(*args)

        monkeypatch.setattr(torch.ops.aten, op, noted)
    actual, laid_out = derivatives(call, x, weight)
    with torch.no_grad():
        assert_close(call(x, weight), expected[0], "without derivatives")
    for inputs in read.values():
        assert inputs
        assert all(x.is_contiguous() for x in inputs)
    assert laid_out == strides
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, str(number))


def test_only_channels_last_images_of_the_kind_are_copied(monkeypatch):
    """Neither those that lie in the other layout, nor another kernel, stride or dtype."""
    call, shape = CALLS["3x3"]
    x, weight = draw(2, 3, 8, 8).contiguous(memory_format=LAST), draw(*shape)
    convolution_layout.copy(kinds(call, x, weight))
    assert not kinds(call, x.contiguous(), weight)
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **more: copies.append(x) or contiguous(x, **more))
    call(x, weight)
    assert len(copies) == 3
    copies.clear()
    call(x.float(), weight.float())
    conv2d(x, weight, stride=2)
    conv2d(x, weight[:4], padding=1)
    conv_transpose2d(x, weight.transpose(0, 1))
    call(contiguous(x), weight)
    assert not copies


def test_the_largest_image_of_a_kind_is_timed():
    call, shape = CALLS["3x3"]
    weight = draw(*shape)
    with convolution_layout.recording() as seen:
        for size in (4, 16, 8):
            call(draw(2, 3, size, size).contiguous(memory_format=LAST), weight)
    ((kind, found),) = seen.items()
    assert (kind.weight, found.x) == (shape, (2, 3, 16, 16))


@pytest.mark.parametrize(("copied", "taken"), [(2.0, True), (2.9, True), (2.95, False), (4.0, False)])
def test_copies_are_taken_where_they_are_faster(copied, taken, monkeypatch):
    """And not for a gain that is no larger than what timings differ by."""
    call, shape = CALLS["3x3"]
    seen = kinds(call, draw(2, 3, 8, 8).contiguous(memory_format=LAST), draw(*shape))
    times, ways = iter((3.0, copied)), []

    def timer(work):
        work()
        ways.append((convolution_layout._copied, *computed))
        computed.clear()
        return next(times)

    computed, real = [], convolution_layout.gradients
    monkeypatch.setattr(convolution_layout, "gradients", lambda *args: computed.append(args[-1]) or real(*args))
    (row,) = convolution_layout.tune(seen, torch.device("cpu"), timer)
    assert ways == [(frozenset(), (True, True)), (frozenset(seen), (True, True))]
    assert (row["ms"], row["ms_copied"], row["chosen"]) == (3.0, copied, taken)
    assert convolution_layout.chosen_of(json.loads(json.dumps([row]))) == [*seen] * taken
    assert convolution_layout._copied == frozenset([*seen] * taken)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("FIND was unable to find an engine")]
)
def test_no_time_left_and_no_room(error):
    """What is not timed stays as it lies."""
    seen = {}
    for call, shape in CALLS.values():
        seen |= kinds(call, draw(2, 3, 8, 8).contiguous(memory_format=LAST), draw(*shape))
    clock = iter((0.0, 1.0, 2.0, 3.0, 4.0))
    timed = []

    def timer(work):
        timed.append(work)
        if len(timed) == 3:
            raise error
        return 1.0 / len(timed)

    rows = convolution_layout.tune(seen, torch.device("cpu"), timer, seconds=3.0, clock=lambda: next(clock))
    assert [row["chosen"] for row in rows] == [True, False, False, False]
    assert [row["ms"] for row in rows] == [1.0, None, None, None]
    assert len(timed) == 3


def test_a_gpu_that_has_failed_ends_the_timing():
    call, shape = CALLS["3x3"]
    seen = kinds(call, draw(2, 3, 8, 8).contiguous(memory_format=LAST), draw(*shape))

    def timer(work):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        convolution_layout.tune(seen, torch.device("cpu"), timer)
    assert convolution_layout._copied == frozenset()


def channels_last_modulated(size):
    return draw(1, 4, size, size, dtype=torch.float32).contiguous(memory_format=LAST)


def test_the_modulated_layers_take_them():
    """The upsampling layer too, whose kernel is transposed."""
    x, style = channels_last_modulated(8), draw(1, 4, dtype=torch.float32)
    weight, kernel = draw(6, 4, 3, 3, dtype=torch.float32), torch.tensor([0.125, 0.375, 0.375, 0.125])

    def both(x):
        return [modulated_conv2d(x, weight, style, up=up, kernel=kernel) for up in (1, 2)]

    seen = kinds(both, x)
    assert [(kind.weight, kind.transposed) for kind in seen] == [((6, 4, 3, 3), False), ((4, 6, 3, 3), True)]
    expected = both(x)
    convolution_layout.copy(seen)
    for a, b in zip(both(x), expected, strict=True):
        assert_close(a, b, "y")


def run_of(tiny_config, tiny_trainer):
    config = tiny_config(batch=2, renderer={"coarse_samples": 3, "fine_samples": 1})
    trainer, _ = tiny_trainer(config)
    for network in (trainer.generator, trainer.discriminator):
        network.to(memory_format=LAST)
    return trainer


def copies_win(kept):
    def timer(work):
        work()
        kept.append(work)
        return 1.0 / len(kept)

    return timer


def test_a_run_times_its_convolutions_once(tiny_config, tiny_trainer, monkeypatch, capsys):
    """Those of G and D, at a micro-batch; random numbers stay; the next start, and another run, read what was found."""
    monkeypatch.setattr(native, "on_gpu", lambda *tensors: True)  # which is where images become channels_last
    trainer, timed = run_of(tiny_config, tiny_trainer), []
    seen = rehearsed(trainer)
    state, weights = torch.get_rng_state(), [p.clone() for p in trainer.generator.parameters()]
    first = choose_layouts(trainer, timer=copies_win(timed))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, trainer.generator.parameters()))
    assert first.fresh
    assert len(timed) == 2 * len(first.rows) == 2 * len(seen) > 0
    assert convolution_layout._copied == frozenset(seen)
    (line,) = first.lines()
    assert line.startswith(f"convolutions: {len(seen)} of {len(seen)} kinds between copies in NCHW, ")
    stored = json.loads((Path(trainer.config.run_dir) / LAYOUTS).read_text())
    assert (stored["device"], stored["times"]) == ("cpu", list(first.rows))

    convolution_layout.copy(())
    again = choose_layouts(trainer, timer=copies_win(timed))
    assert not again.fresh
    assert convolution_layout._copied == frozenset(seen)
    assert again.lines() == [line + " (timed at an earlier start)"]
    (Path(trainer.config.run_dir) / LAYOUTS).write_text('{"device": "cpu", "times": [{"weight": 3}]}')
    assert not choose_layouts(trainer, timer=copies_win(timed)).fresh
    assert "damaged or of another version" in capsys.readouterr().out
    assert len(timed) == 2 * len(seen)


def test_what_was_timed_counts_for_its_precision_and_micro_batch_alone(tiny_config, tiny_trainer, monkeypatch):
    """And for any seed: planes in part have the size that cameras ask for."""
    monkeypatch.setattr(native, "on_gpu", lambda *tensors: True)
    few = {"batch": 4, "renderer": {"coarse_samples": 3, "fine_samples": 1}}
    few |= {"generator": {"plane_resolution": 128}, "micro_batch": 2}
    runs = tiny_config().run_dir

    def fresh(run, **settings):
        config = tiny_config(run_dir=str(Path(runs, run)), **few | settings)
        set_arithmetic(config)
        return choose_layouts(tiny_trainer(config)[0], timer=copies_win([])).fresh

    assert fresh("first")
    assert not any(fresh(f"seed {seed}", seed=seed) for seed in (1, 2, 3))
    assert fresh("tf32", precision="tf32")
    assert not fresh("again", precision="tf32")
    assert fresh("larger", micro_batch=4)
    assert not fresh("first", precision="tf32")  # a run that goes on with it; another one had timed that
    assert convolution_layout._copied
    assert fresh("first", precision="tf32", micro_batch=4)


def rehearsed(trainer):
    with convolution_layout.recording() as seen:
        trainer.rehearse()
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch": 2},
        {"discriminator": {"scales": 2}},
        {"discriminator": {"global_context": "paste"}, "optim": {"reuse_fakes": True}},
        {"generator": {"style_mixing": 0.9, "plane_resolution": 128}},
        {"generator": {"backbone": "image", "pose_conditioning": False}, "patch": {"resolution": 16}},
        {"augment": {"mode": "ada", "p": 0.5}, "patch": {"importance": 2}},
        {"cuda_graphs": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_rehearsal_is_of_both_networks_and_leaves_no_trace(settings, tiny_config, tiny_trainer, monkeypatch):
    """D judges twice as many images, in two parts; a run goes on to the same bits."""
    config = tiny_config(batch=4, renderer={"coarse_samples": 3, "fine_samples": 1}, **settings)
    judged, judge = [], Trainer._judge

    def noted(trainer, patches, *args, **more):
        judged.append((len(patches), more))
        return judge(trainer, patches, *args, **more)

    monkeypatch.setattr(Trainer, "_judge", noted)
    states = []
    for rehearses in (False, True):
        trainer, batches = tiny_trainer(config)
        trainer.iteration(*next(batches))
        if rehearses:
            judged.clear()
            fakes = None if trainer.fakes is None else trainer.fakes.clone()
            choose_layouts(trainer, timer=copies_win([]))
            assert judged == [(2 * trainer.micro, {"parts": 2})]
            assert fakes is None or torch.equal(trainer.fakes, fakes)
            convolution_layout.copy(())
        trainer.iteration(*next(batches))
        states.append(checksum([trainer.state_dict(), torch.get_rng_state()]))
    assert states[0] == states[1]


def test_settings_begin_without_copies(tiny_config):
    convolution_layout.copy([convolution_layout.Kind((1, 1, 3, 3), 1, False, torch.float32)])
    set_arithmetic(tiny_config())
    assert not convolution_layout._copied


def test_nothing_is_timed_without_a_gpu_or_where_bits_are_fixed(tiny_config, tiny_trainer, monkeypatch):
    trainer = run_of(tiny_config, tiny_trainer)
    assert choose_layouts(trainer).lines() == []
    torch.use_deterministic_algorithms(True)
    try:
        assert not choose_layouts(trainer, timer=copies_win([])).rows
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (Path(trainer.config.run_dir) / LAYOUTS).exists()
