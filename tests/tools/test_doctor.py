"""The doctor's report, on this machine and on ones that it is told about."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from checks import HANG
from command_lines import run_tool
from epigraf_fast import __version__, machine
from epigraf_fast.ops import backends, native
from epigraf_fast.tools import doctor


def test_command_prints_json() -> None:
    command = [sys.executable, "-m", "epigraf_fast", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
    report = json.loads(result.stdout)
    assert report["versions"]["epigraf_fast"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"] == backends.status()
    assert report["opt_in"] == list(doctor.OPT_IN)
    assert report.keys() == doctor.report().keys()


def test_command_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    run_tool(doctor)
    text = capsys.readouterr().out
    for word in (torch.__version__, *backends.OPS, *backends.BACKENDS, *doctor.EXTRAS, *doctor.OPT_IN):
        assert word in text


def test_backend_table() -> None:
    report = {
        "backends": {
            "composite": {"reference": None, "torch": None, "triton": None, "cuda": "not compiled", "cpu": None},
            "bias_act": {"reference": None, "torch": "-", "triton": "not written", "cuda": "not compiled", "cpu": None},
        },
        "defaults": {
            "composite": {"cpu": "reference", "cuda": "triton"},
            "bias_act": {"cpu": "reference", "cuda": "reference"},
        },
    }
    header, *lines = doctor.format_backends(report).splitlines()
    assert header.split() == ["op", *backends.BACKENDS, "default", "on", "cpu", "default", "on", "cuda"]
    assert [line.split() for line in lines[:2]] == [
        ["composite", "yes", "yes", "yes", "-", "yes", "reference", "triton"],
        ["bias_act", "yes", "-", "-", "-", "yes", "reference", "reference"],
    ]
    assert lines[0].index("reference") == lines[1].index("reference")
    assert lines[2:] == ["no cuda: not compiled", "no torch (bias_act): -", "no triton (bias_act): not written"]
    header, *lines = doctor.format_backends(report, {"composite": "triton", "bias_act": "cpu"}).splitlines()
    assert header.endswith("this run")
    assert [line.split()[-1] for line in lines[:2]] == ["triton", "cpu"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"metrics": ("torch", "no-such-package")})
    report = doctor.report()
    assert report["extras"] == {"metrics": ["no-such-package"]}
    assert "missing: pip install no-such-package" in doctor.format_report(report)


def test_an_extension_from_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.report()
    built = SimpleNamespace(cpu_level=lambda: "base", build_info=lambda: {"cpu_levels": ["base", "v4"]})
    monkeypatch.setattr(native, "extension", lambda: built)
    for best, said in (("v3", ", extension for base, and this processor has v3: pip install"), ("base", "for base\n")):
        built.processor_level = lambda best=best: best
        cpu = {"threads": 2, "capability": "AVX2", "level": native.cpu_level()}
        assert said in doctor.format_report({**report, "cpu": cpu})


@pytest.mark.parametrize(
    ("cuda", "available", "reason"), [(None, False, "without CUDA"), ("12.8", False, "finds no GPU")]
)
def test_reason_for_no_gpu(cuda: str | None, available: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    report = doctor.report()
    assert reason in report["cuda"]["reason"]
    assert report["cuda"]["reason"] in doctor.format_report(report)
    assert report["defaults"]["composite"].keys() == {"cpu"}


def test_gpu_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    v100 = SimpleNamespace(name="Tesla V100", major=7, minor=0, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: v100)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(doctor, "_output", lambda *command: "570.86.10\n" if command[0] == "nvidia-smi" else "")
    report = doctor.report()
    (gpu,) = report["cuda"]["gpus"]
    assert (gpu["capability"], gpu["memory_gib"], gpu["driver"]) == (70, 16.0, "570.86.10")
    assert gpu["reason"] == f"torch {torch.__version__} has no code for sm_70"
    assert f"cannot be used: {gpu['reason']}" in doctor.format_report(report)
    assert report["defaults"]["composite"].keys() == {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", 80, True),
        ("sm_80", 86, True),
        ("sm_86", 80, False),
        ("sm_80", 90, False),
        ("compute_80", 90, True),
        ("sm_90a", 90, True),
        ("sm_90", 120, False),
        ("sm_120", 120, True),
    ],
)
def test_which_code_runs_where(arch: str, capability: int, runs: bool) -> None:
    assert machine.runs(arch, capability) == runs
