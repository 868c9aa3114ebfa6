"""Which backend a call gets, and what it says when there is none."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import csrc_backends
from checks import assert_close, draw
from epigraf_fast import ops
from epigraf_fast.ops import backends, native

ROOT = Path(__file__).resolve().parents[2]
NET = ops.Network(draw(5, 2), draw(5), draw(4, 5), draw(4))
T = torch.arange(4.0).expand(1, 2, 4)

# public op: (the op in the table of backends, a call that lacks the backend)
CALLS = {
    "sample_triplane": ("sample_triplane", functools.partial(ops.sample_triplane, draw(1, 6, 2, 2), draw(1, 3, 3))),
    "decode_triplane": (
        "decode_triplane",
        functools.partial(ops.decode_triplane, draw(1, 6, 2, 2), draw(1, 3, 3), NET),
    ),
    "decode_triplane_rays": (
        "decode_triplane",
        functools.partial(ops.decode_triplane_rays, draw(1, 6, 2, 2), draw(1, 2, 3), draw(1, 2, 3), draw(1, 2, 4), NET),
    ),
    "decode_triplane_coarse_to_fine": (
        "decode_triplane",
        functools.partial(
            ops.decode_triplane_coarse_to_fine,
            draw(1, 6, 2, 2),
            draw(1, 2, 3),
            draw(1, 2, 3),
            draw(1, 2, 4),
            NET,
            lambda coarse: coarse[..., 0],
        ),
    ),
    "sample_stratified": (
        "sample_importance",
        functools.partial(ops.sample_stratified, 1, 2, 3, 0.0, 1.0, stochastic=False, device="cpu"),
    ),
    "sample_importance": (
        "sample_importance",
        functools.partial(ops.sample_importance, T, draw(1, 2, 4, dtype=torch.float32), T / 3),
    ),
    "composite": ("composite", functools.partial(ops.composite, T, draw(1, 2, 4, 4, dtype=torch.float32))),
    "cut": ("cut", functools.partial(ops.cut, draw(1, 2, 4, 4), torch.tensor([[1, 2]]), (3, 2))),
    "bias_act": ("bias_act", functools.partial(ops.bias_act, draw(2, 3), draw(3))),
    "upfirdn2d": ("upfirdn2d", functools.partial(ops.upfirdn2d, draw(1, 2, 4, 4), draw(3))),
    "conv2d_resample": (
        "modulated_conv2d",
        functools.partial(ops.conv2d_resample, draw(1, 2, 4, 4), draw(3, 2, 3, 3)),
    ),
    "modulated_conv2d": (
        "modulated_conv2d",
        functools.partial(ops.modulated_conv2d, draw(1, 2, 4, 4), draw(3, 2, 3, 3), draw(1, 2)),
    ),
    "modulation": (
        "modulated_conv2d",
        functools.partial(ops.modulation, draw(3, 2, 3, 3), draw(1, 2), torch.float64),
    ),
    "modulated_layer": (
        "modulated_conv2d",
        functools.partial(ops.modulated_layer, draw(1, 2, 4, 4), draw(3, 2, 3, 3), draw(1, 3)),
    ),
    "layer_epilogue": ("modulated_conv2d", functools.partial(ops.layer_epilogue, draw(1, 2, 4, 4), bias=draw(2))),
}
NOT_OPS = {"Composite", "Modulation", "Network", "OfWeight", "PlaneRegion", "draw_seed"}  # they have no backends


def test_status_covers_the_table():
    status = backends.status()
    assert tuple(status) == backends.OPS
    for op, row in status.items():
        assert tuple(row) == backends.BACKENDS, op
        assert row["reference"] is None, op
        assert all(reason is None or reason for reason in row.values()), op


def test_every_public_op_is_called_here():
    assert {*CALLS} == {*ops.__all__} - NOT_OPS
    assert {op for op, _ in CALLS.values()} == {*backends.OPS}


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_resolve_gives_one_that_is_there(op, device):
    chosen = backends.resolve(op, None, device)
    assert backends.status()[op][chosen] is None
    assert backends.resolve(op, "reference", device) == "reference"


@pytest.mark.parametrize("op", backends.OPS)
def test_cpu_backend_is_not_for_other_devices(op):
    with pytest.raises(ValueError, match=f"{op}: backend 'cpu' is not available"):
        backends.resolve(op, "cpu", "cuda")


@pytest.mark.parametrize("op", csrc_backends.OPS)
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_is_tested_here(op, name):
    """The one skip of a backend that this machine lacks: tests/ops leaves it out of everything else."""
    reason = backends.status()[op][name]
    if reason is not None:
        pytest.skip(f"no test of {op} on {name}: {reason}")
    assert name in [getattr(found, "values", (found,))[0] for found in csrc_backends.here(op)]


def test_resolve_says_why_one_is_missing(monkeypatch):
    monkeypatch.setattr(native, "lacking", lambda backend: "the extension was not built")
    with pytest.raises(ValueError, match=r"bias_act: backend 'cuda' is not available.*the extension was not built"):
        backends.resolve("bias_act", "cuda", "cuda")


@pytest.mark.parametrize("name", CALLS)
def test_missing_backend_is_an_error_that_says_why(name):
    op, call = CALLS[name]
    for backend, reason in backends.status()[op].items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"{op}: backend '{backend}' is not available.*{re.escape(reason)}"):
                call(backend=backend)


@pytest.mark.parametrize("name", CALLS)
def test_unknown_backend_is_an_error_that_lists_the_known(name):
    op, call = CALLS[name]
    message = re.escape(f"{op}: backend must be None or one of reference, torch, triton, cuda, cpu, got 'numpy'")
    with pytest.raises(ValueError, match=message):
        call(backend="numpy")


def assert_as_the_reference(name, call):
    actual, expected = call(), call(backend="reference")
    if isinstance(actual, torch.Tensor):
        actual, expected = (actual,), (expected,)
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            assert_close(one, other, name)


@pytest.mark.parametrize("name", CALLS)
def test_default_gives_what_the_reference_gives(name):
    _, call = CALLS[name]
    assert_as_the_reference(name, call)


@pytest.mark.parametrize("name", backends.RUN_BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_takes_the_named_backend_where_an_op_has_it(name, device, monkeypatch):
    """Whatever is implemented, were it all here; and every family can be told so by one argument."""
    monkeypatch.setattr(backends, "lacking_on", lambda op, backend, device_type: None)
    chosen = backends.choose(name, device)
    expected = {op: backends.resolve(op, None, device) for op in backends.OPS}
    for backend in ("triton", "cuda") if name == "gpu" else (name,):
        named = backends.OPS if backend == "reference" else backends.IMPLEMENTED.get(backend, ())
        expected |= dict.fromkeys(named, backend)
    assert chosen == expected
    if (name, device) != ("cpu", "cuda"):  # which is not there
        for family, ops_ in backends.FAMILIES.items():
            argument = backends.family_backend(family, chosen, device)
            assert {op: backends.resolve(op, argument, device) for op in ops_} == {op: chosen[op] for op in ops_}


def test_gpu_is_the_kernels_of_both_kinds(monkeypatch):
    monkeypatch.setattr(backends, "lacking_on", lambda op, backend, device_type: None)
    assert set(backends.choose("gpu", "cuda").values()) == {"triton", "cuda"}


def test_families_are_all_ops():
    assert [op for family in backends.FAMILIES.values() for op in family] == [*backends.OPS]


def test_a_run_is_told_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "_lacking_triton", lambda: "Triton is not installed: pip install triton")
    with pytest.raises(ValueError, match=r"^backend 'triton' is not available: Triton is not installed: pip install"):
        backends.choose("triton", "cuda")
    with pytest.raises(ValueError, match=r"^backend 'cpu' is not available: the tensors are on cuda$"):
        backends.choose("cpu", "cuda")
    with pytest.raises(
        ValueError, match="backend must be one of auto, gpu, reference, torch, triton, cuda, cpu, got 'numpy'"
    ):
        backends.choose("numpy", "cpu")


def test_a_family_has_one_backend(monkeypatch):
    chosen = {**backends.choose("auto", "cpu"), "composite": "triton"}
    with pytest.raises(ValueError, match=r"^renderer: the ops must share a backend, got .* composite triton, cut cpu$"):
        backends.family_backend("renderer", chosen, "cpu")


HIDDEN = "EPIGRAF_FAST_EXTENSION=0 in the environment hides the extension"


def reasons(monkeypatch, extension):
    """Why cpu and cuda are missing for bias_act, given what `native.extension` finds."""
    monkeypatch.setattr(native, "extension", lambda: extension)
    row = backends.status()["bias_act"]
    return row["cpu"], row["cuda"]


def test_status_tells_the_reasons_apart(monkeypatch):
    cpu, cuda = reasons(monkeypatch, "the extension is not built: how to")
    assert cpu == cuda == "the extension is not built: how to"
    assert backends.resolve("bias_act", None, "cpu") == "reference"
    cpu, cuda = reasons(monkeypatch, SimpleNamespace(cuda_built=False))
    assert cpu is None
    assert "built without CUDA" in cuda
    assert backends.resolve("bias_act", None, "cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = SimpleNamespace(cuda_built=True, build_info=lambda: {"cuda": "13.0", "cuda_archs": "80 90", "openmp": True})
    assert reasons(monkeypatch, gpu) == (None, "there is no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stand_in(monkeypatch, 13000, (9, 0))
    assert reasons(monkeypatch, gpu) == (None, None)
    assert backends.resolve("bias_act", "cuda", "cuda") == "cuda"
    monkeypatch.setattr(backends, "_accepted", {})
    assert backends.resolve("bias_act", None, "cuda") == "reference"
    backends.accept({"bias_act": ("cuda",)})  # once this GPU has passed the check
    assert backends.resolve("bias_act", None, "cuda") == "cuda"
    assert backends.resolve("bias_act", None, "cpu") == "cpu"
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        backends.resolve("bias_act", "cuda", "cpu")


def stand_in(monkeypatch, driver, capability):
    """The driver's CUDA, as 12040 for 12.4, and the GPU's compute capability."""
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("nvcc", "archs", "driver", "capability", "words"),
    [
        ("13.0", "80 90", 13000, (7, 0), "only for sm_80, sm_90: build it anew, EPIGRAF_FAST_CUDA=nvrtc"),
        ("13.0", "80 90", 12080, (8, 0), "built by nvcc 13.0, and the driver is of CUDA 12.8: update the driver"),
        ("12.8", "70 80 90", 12020, (7, 0), None),
        ("12.8", "70 80 90", 13000, (7, 0), None),
        ("12.8", "70 80 90", 12020, (8, 6), None),
        ("12.8", "70 80 90", 12080, (10, 0), None),  # by PTX
        ("12.8", "70 80 90", 12040, (10, 0), "no code for sm_100, only for sm_70, sm_80, sm_90"),
    ],
)
def test_what_nvcc_built_fits_driver_and_gpu(nvcc, archs, driver, capability, words, monkeypatch):
    stand_in(monkeypatch, driver, capability)
    said = native._unfit(nvcc, archs, compiler="12.2.0")
    assert said is None if words is None else words in said


def test_why_a_build_fell_back_is_told(monkeypatch, tmp_path):
    note = tmp_path / "_build.txt"
    monkeypatch.setattr(native, "NOTE", note)
    monkeypatch.setattr(native, "extension", lambda: SimpleNamespace(cuda_built=False))
    assert native.lacking("cuda").startswith("the extension is built without CUDA: EPIGRAF")
    note.write_text("nvcc: #error -- unsupported GNU version!\n")
    assert "without CUDA (nvcc: #error -- unsupported GNU version!): EPIGRAF" in native.lacking("cuda")


def test_triton_asks_for_a_compiler_and_the_header_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lacking = backends._lacking_compiler.__wrapped__
    monkeypatch.setattr(backends, "_lacking_compiler", lacking)
    monkeypatch.setattr(backends.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler, and CC=no-such-compiler is none" in backends._lacking_triton()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no gcc and no clang: apt-get install gcc" in backends._lacking_triton()
    (tmp_path / "gcc").touch(mode=0o755)
    assert re.search(r"Triton needs Python.h in .*python3\.\d+-dev", backends._lacking_triton())
    (tmp_path / "Python.h").touch()
    assert backends._lacking_triton() is None


def test_what_the_kernels_refuse_falls_back_where_nobody_named_them(monkeypatch):
    """Two channels a plane and double precision: what the reference gives, not an error; named, they are refused."""
    monkeypatch.setattr(backends, "resolve", lambda op, backend, device_type: backend or "triton")
    for op in ("decode_triplane", "sample_triplane", "sample_importance", "composite", "cut"):
        module = sys.modules[f"epigraf_fast.ops.{op}"]
        if hasattr(module, "resolve"):
            monkeypatch.setattr(module, "resolve", backends.resolve)
    calls = {name: CALLS[name][1] for name in ("sample_triplane", "decode_triplane", "decode_triplane_rays")}
    calls["composite"] = functools.partial(ops.composite, T.double(), draw(1, 2, 4, 4))
    calls["sample_importance"] = functools.partial(ops.sample_importance, T.double(), draw(1, 2, 4), T.double() / 3)
    for name, call in calls.items():
        assert_as_the_reference(name, call)
        with pytest.raises((TypeError, ValueError), match='backend is "triton"'):
            call(backend="triton")


@pytest.mark.parametrize("blocked", [True, False])
def test_without_the_extension_everything_works(blocked):
    program = """
import sys, torch
BLOCK
from epigraf_fast import ops
from epigraf_fast.tools.doctor import OPT_IN
from epigraf_fast.ops import backends
x = torch.ones(1, 1, 4, 4, requires_grad=True)
y = ops.upfirdn2d(ops.bias_act(x, torch.ones(1), act="lrelu", clamp=256), torch.ones(4), padding=(2, 1, 2, 1))
y.sum().backward()
print(backends.resolve("bias_act", None, "cpu"), "|", backends.status()["upfirdn2d"]["cpu"])
"""
    program = program.replace("BLOCK", "sys.modules['epigraf_fast._C'] = None" if blocked else "")
    environment = {**os.environ, "EPIGRAF_FAST_EXTENSION": "1" if blocked else "0"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    chosen, _, reason = result.stdout.strip().partition(" | ")
    assert chosen == "reference", result.stderr
    assert reason == (f"the extension is not built: {native.BUILD}" if blocked else HIDDEN)


def test_what_a_gpu_has_passed_becomes_its_default(monkeypatch):
    """Each op takes the one that is written for it, and where that is missing, the fallback; a CPU takes neither."""
    monkeypatch.setattr(backends, "_accepted", {op: (name,) for name, ops in backends.KERNELS.items() for op in ops})
    monkeypatch.setattr(backends, "_lacking_triton", lambda: None)
    monkeypatch.setattr(native, "lacking", lambda backend: None)
    renderer, convolutions = backends.FAMILIES.values()
    expected = {**dict.fromkeys(renderer, "triton"), **dict.fromkeys(convolutions, "cuda")}
    assert {op: backends.resolve(op, None, "cuda") for op in backends.OPS} == expected
    assert backends.choose("auto", "cuda") == expected == backends.choose("gpu", "cuda")
    assert [backends.family_backend(family, expected, "cuda") for family in backends.FAMILIES] == [None, None]
    assert not {"triton", "cuda"} & set(backends.choose("auto", "cpu").values())
    backends.accept({"composite": ("triton",)})
    assert backends.resolve("composite", None, "cuda") == "triton"
    assert backends.resolve("decode_triplane", None, "cuda") == "torch"
    monkeypatch.setattr(native, "lacking", lambda backend: "the extension is not built")
    assert {backends.resolve(op, None, "cuda") for op in convolutions} == {"reference"}


@pytest.mark.parametrize("name", ["sample_triplane", "decode_triplane", "decode_triplane_rays", "composite", "cut"])
def test_the_tier_of_torch_gives_what_the_reference_gives(name):
    _, call = CALLS[name]
    actual, expected = call(backend="torch"), call(backend="reference")
    if isinstance(actual, torch.Tensor):
        actual, expected = (actual,), (expected,)
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            assert_close(one, other, name)
