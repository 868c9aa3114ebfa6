"""The choice among plans: what the timer says is fastest is what launches take, also after a save and a load."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.ops.tune
from checks import assert_close, draw, draw_uniform
from epigraf_fast import ops
from epigraf_fast.data import ImageDataset
from epigraf_fast.ops import tuning as ops_tuning
from epigraf_fast.tools import train
from epigraf_fast.training.warmup import BUDGET, FILE, Choice, Layouts, choose_kernels, warm_up

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from epigraf_fast.kernels import decode_triplane, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _no_choices(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.forget_choices()
    yield
    tuning.forget_choices()


def inputs():
    float32 = {"dtype": torch.float32}
    rays = (
        draw(1, 96, 4, 4, seed=1, **float32),
        0.1 * draw(1, 3, 3, seed=2, **float32),
        torch.nn.functional.normalize(draw(1, 3, 3, seed=3, **float32), dim=-1),
        draw_uniform(1, 3, 5, seed=4, **float32) - 0.5,
    )
    sizes = ((64, 32), (64,), (4, 64), (4,))
    network = tuple(draw(*size, seed=5 + i, **float32) for i, size in enumerate(sizes))
    return tuple(x.to(DEVICE) for x in rays), ops.Network(*(x.to(DEVICE) for x in network))


def last_is_fastest(launch=True):
    """A timer that makes the call if it is to launch, and says that each is faster than the one before."""
    calls = []

    def timer(call):
        if launch:
            call()
        calls.append(call)
        return 1.0 / len(calls)

    return timer


def case(way, arch, **changes):
    (planes, *_), (w0, _, w1, _) = inputs()
    return decode_triplane.case(way, planes, w0, w1, "fp32", arch)._replace(**changes)


def test_launches_take_the_fastest_plan(monkeypatch):
    rays, network = inputs()
    arch = tuning.architecture(rays[0].device)
    expected = ops.decode_triplane_rays(*rays, network, backend="reference")
    ops_tuning.tune_decode_triplane(*rays, network, timer=last_is_fastest())
    for way in ("fwd", "bwd"):
        plans = tuning.plans(case(way, arch))
        assert tuning.plan(case(way, arch)) == plans[-1] != plans[0]
        assert tuning.plan(case(way, arch, height=9)) == plans[0]
    asked, plan = [], tuning.plan
    monkeypatch.setattr(decode_triplane, "plan", lambda case: asked.append(plan(case)) or asked[-1])
    assert_close(ops.decode_triplane_rays(*rays, network, backend="triton"), expected, "out")
    assert asked == [tuning.plans(case("fwd", arch))[-1]]


def test_a_plan_that_the_gpu_cannot_hold_is_not_taken():
    """GPUs of one generation have more and less shared memory; what does not fit says so when it is launched."""
    rays, network = inputs()
    arch = tuning.architecture(rays[0].device)
    fastest, fitting = last_is_fastest(launch=False), len(tuning.plans(case("fwd", arch))) - 1

    def timer(call):
        if fitting == timer.calls:
            raise OutOfResources(200_000, 101_376, "shared memory")
        timer.calls += 1
        return fastest(call)

    timer.calls = 0
    rows = ops_tuning.tune_decode_triplane(*rays, network, timer=timer)
    plans = tuning.plans(case("fwd", arch))
    assert tuning.plan(case("fwd", arch)) == plans[-2]
    assert [row["ms"] is None for row in rows[: len(plans)]] == [False] * fitting + [True]


def test_a_deterministic_run_keeps_to_the_defaults(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    rays, network = inputs()
    ops_tuning.tune_decode_triplane(*rays, network, timer=last_is_fastest())  # as torch is told to be
    ops_tuning.tune_decode_triplane(*rays, network, deterministic=True, timer=last_is_fastest())
    assert tuning.export_choices() == []
    assert len(tuning.plans(case("bwd", 90, deterministic=True))) == 1 < len(tuning.plans(case("bwd", 90)))


def test_choices_survive_json():
    tuning.tune(case("bwd", 90), lambda plan: None, last_is_fastest())
    saved = json.loads(json.dumps(ops_tuning.export_choices()))
    tuning.forget_choices()
    assert tuning.plan(case("bwd", 90)) == tuning.plans(case("bwd", 90))[0]
    ops_tuning.import_choices(saved)
    assert tuning.plan(case("bwd", 90)) == tuning.plans(case("bwd", 90))[-1]


@pytest.mark.parametrize("change", [{"plan": [[128, 1, 1, None]]}, {"kernel": "other"}, {"unknown": 1}, {"plan": 3}])
def test_choices_of_another_version_are_refused(change):
    tuning.tune(case("fwd", 80), lambda plan: None, last_is_fastest())
    (saved,) = ops_tuning.export_choices()
    with pytest.raises(ValueError, match="tuning: "):
        ops_tuning.import_choices([{**saved, **change}])


def test_every_size_has_plans_for_every_architecture():
    for arch in (70, 75, 80, 86, 90, 100, 120):
        for channels in range(8, 72, 8):
            for hidden in (16, 33, 64, 65, 128):
                for texel in (2, 4):
                    for kernel in ("sample_fwd", "sample_bwd", "decode_fwd", "decode_bwd"):
                        sizes = {"channels": channels, "hidden": hidden, "texel_bytes": texel, "kernel": kernel}
                        assert tuning.plans(case("fwd", arch, **sizes))


def test_several_tiles_are_for_few_outputs():
    """More than a product is padded to spill with them."""
    for precision in ("fp32", "tf32"):
        for arch in (80, 90):
            of = {out: tuning.plans(case("fwd", arch, precision=precision, out=out)) for out in (16, 17)}
            tiles = {out: max(config.tiles for plan in plans for config in plan) for out, plans in of.items()}
            assert tiles == {16: 4, 17: 1}


def test_a_run_times_once_and_others_read_what_it_found(tmp_path):
    """From the run's folder, then from where verdicts are kept; on another GPU, or for other sizes, they time anew."""
    rays, network = inputs()
    device = rays[0].device

    def choose(run, *changes, **options):
        tuning.forget_choices()
        return choose_kernels(tmp_path / run, device, rays, network, *(changes or (1.0,)), **options)

    first = choose("first", timer=last_is_fastest())
    assert first.fresh
    chosen = tuning.export_choices()
    assert [choice["kernel"] for choice in chosen] == ["decode_fwd", "decode_bwd"]
    for run in ("first", "second"):
        again = choose(run, timer=None if DEVICE == "cuda" else last_is_fastest())
        assert (again.fresh, list(again.rows)) == (False, first.rows)
        assert tuning.export_choices() == chosen
    assert choose("third", 2.0, timer=last_is_fastest(launch=False)).fresh

    path = tmp_path / "first" / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another GPU"}))
    assert not choose("first", timer=last_is_fastest()).fresh
    damages = "nothing", {"choices": [{"kernel": "other"}]}, {"choices": chosen, "times": [{"kernel": 1}]}
    for number, damaged in enumerate(damages):
        (kept,) = (tmp_path / "cache").rglob("*.json")
        content = json.loads(kept.read_text())
        content["timings"] = dict.fromkeys(content["timings"], damaged)
        kept.write_text(json.dumps(content))
        assert choose(f"damaged {number}", timer=last_is_fastest(launch=False)).fresh


@pytest.mark.parametrize("plans", [0, 1, 2, 9])
def test_timing_keeps_to_its_time(plans, tmp_path):
    """What was not timed is not taken; with nothing timed the defaults stay. The lines say so."""
    rays, network = inputs()
    clock = SimpleNamespace(now=100.0)
    fastest = last_is_fastest(launch=False)

    def timer(call):
        clock.now += BUDGET / plans
        return fastest(call)

    if not plans:
        start = iter((0.0,))
        now = lambda: next(start, 2 * BUDGET)  # noqa: E731
    else:
        now = lambda: clock.now  # noqa: E731
    choice = choose_kernels(tmp_path, rays[0].device, rays, network, 1.0, timer=timer, clock=now)
    timed = [row for row in choice.rows if row["ms"] is not None]
    assert len(timed) == min(plans, len(choice.rows))
    arch = tuning.architecture(rays[0].device)
    for way in ("fwd", "bwd"):
        rows = [row for row in choice.rows if row["kernel"] == f"decode_{way}"]
        known = [row for row in rows if row["ms"] is not None]
        expected = known[-1] if known else rows[0]
        assert [row for row in rows if row["chosen"]] == [expected]
        assert [list(part) for part in tuning.plan(case(way, arch))] == expected["plan"]
    assert sum(line.count("not timed") for line in choice.lines()) == len(choice.rows) - len(timed)
    if plans == 9 and DEVICE == "cpu":
        assert choice.lines()[0] == "decode_fwd: 32 x 4 0.333 ms, against 64 x 4 x 4 1 ms, 32 x 2 0.5 ms"


def test_a_run_times_the_decoder_of_its_micro_batch(tiny_config, tiny_trainer, monkeypatch, capsys):
    """Once, before the loop, and without touching its random numbers; the choices lie in the run folder."""
    sizes = {"plane_channels": 8, "decoder_hidden": 16}
    small = {"batch": 2, "renderer": {"coarse_samples": 3, "fine_samples": 1}, "kimg": 0.004}
    config = tiny_config(generator=sizes, backend="triton", precision="fp32", device=DEVICE, **small)
    trainer, _ = tiny_trainer(config)
    before = torch.get_rng_state()
    assert warm_up(trainer, timer=last_is_fastest(launch=False)).fresh
    assert torch.equal(torch.get_rng_state(), before)
    stored = json.loads((Path(config.run_dir) / FILE).read_text())
    assert [(c["kernel"], c["channels"], c["hidden"], c["out"], c["height"]) for c in stored["choices"]] == [
        (f"decode_{way}", 8, 16, 4, config.generator.plane_resolution) for way in ("fwd", "bwd")
    ]
    assert not warm_up(trainer, timer=last_is_fastest(launch=False)).fresh  # resumed
    reference, _ = tiny_trainer(tiny_config(generator=sizes, backend="reference", **small))
    assert not warm_up(reference, timer=last_is_fastest(launch=False)).rows

    events = []
    monkeypatch.setattr(train, "warm_up", lambda trainer: events.append(trainer.cur_nimg) or Choice())
    monkeypatch.setattr(train, "choose_layouts", lambda trainer: events.append("layouts") or Layouts())
    monkeypatch.setattr(train, "loop", lambda *arguments: events.append("loop") or 0)
    assert (
        train.train(reference.config, tiny_trainer_dataset(reference.config), torch.device("cpu"), None, tune=True) == 0
    )
    assert events == ["layouts", 0, "loop"]


def tiny_trainer_dataset(config):
    return ImageDataset(config.data, use_labels=config.loader.labels, mirror=config.loader.mirror)


def test_the_bench_lists_every_plan_and_marks_the_fastest(tiny_config):
    few = {"coarse_samples": 3, "fine_samples": 1}
    config = tiny_config(generator={"plane_channels": 8, "decoder_hidden": 16}, patch={"resolution": 8}, renderer=few)
    rows = bench.ops.tune.tune(config, 1, torch.device(DEVICE), last_is_fastest(launch=False))
    arch = tuning.architecture(torch.device(DEVICE))
    for precision in ("fp32", "tf32", "fp16"):
        for kernel in ("decode_fwd", "decode_bwd"):
            chosen = [row["chosen"] for row in rows if (row["precision"], row["kernel"]) == (precision, kernel)]
            shape = case(kernel[-3:], arch, channels=8, hidden=16, precision=precision)
            assert chosen == [False] * (len(tuning.plans(shape)) - 1) + [True]
    assert len(bench.ops.tune.format_rows(rows).splitlines()) == len(rows) + 1


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, on which the plans are timed")
def test_the_bench_says_that_there_is_no_gpu(tmp_path, capsys):
    assert bench.ops.tune.main(["--json", str(tmp_path / "kernels.json")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, on which the plans are timed")
def test_without_a_gpu_nothing_is_timed(tmp_path):
    rays, network = inputs()
    assert not choose_kernels(tmp_path, torch.device("cpu"), rays, network, 1.0).rows
    ops_tuning.tune_decode_triplane(*rays, network)
    assert tuning.export_choices() == []
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_plans_are_timed_on_the_device(tmp_path):
    rays, network = inputs()
    assert choose_kernels(tmp_path, rays[0].device, rays, network, 1.0).fresh
    assert len(tuning.export_choices()) == 2
