"""Which torch a machine gets, by stand-ins of nvidia-smi and of the driver's files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checks import HANG
from epigraf_fast import machine
from epigraf_fast.errors import UserError
from epigraf_fast.ops import backends
from epigraf_fast.training import networks
from epigraf_fast.training.advice import advice

ROOT = Path(__file__).resolve().parents[1]
PINS = (ROOT / "constraints.txt").read_text()

OLD = 'case "$*" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2 ;; esac'
BROKEN = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
ABSENT = "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.' >&2; exit 9"

V100, A100, H100 = "Tesla V100-SXM2-16GB, 7.0", "NVIDIA A100-SXM4-80GB, 8.0", "NVIDIA H100 80GB HBM3, 9.0"
B200, P100 = "NVIDIA B200, 10.0", "Tesla P100-PCIE-16GB, 6.0"


class Computer:
    """A folder of commands that has no nvidia-smi, and one of the driver's files."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.root = folder / "bin", folder / "root"
        self.bin.mkdir()
        self.root.mkdir()
        for tool in ("sh", "make"):
            (self.bin / tool).symlink_to(shutil.which(tool) or "/nowhere")

    def nvidia_smi(self, driver: str, *cards: str, first: str = "") -> Computer:
        lines = [f"{driver}, {card}" for card in cards]
        if first == OLD:
            lines = [line.rpartition(",")[0] for line in lines]
        script = self.bin / "nvidia-smi"
        script.write_text("\n".join(["#!/bin/sh", first, *(f"echo '{line}'" for line in lines)]) + "\n")
        script.chmod(0o755)
        return self

    def driver(self, version: str, *models: str, open_: bool = False) -> Computer:
        proc = self.root / "proc/driver/nvidia"
        (self.root / "dev").mkdir()
        (self.root / "dev/nvidia0").touch()
        for i, model in enumerate(models):
            (proc / f"gpus/0000:0{i}:00.0").mkdir(parents=True)
            (proc / f"gpus/0000:0{i}:00.0/information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 96\n")
        proc.mkdir(parents=True, exist_ok=True)
        kind = f"UNIX Open Kernel Module for x86_64  {version}" if open_ else f"UNIX x86_64 Kernel Module  {version}"
        (proc / "version").write_text(f"NVRM version: NVIDIA {kind}  Release Build\nGCC version:  gcc 12.2.0\n")
        return self

    def choose(self, monkeypatch: pytest.MonkeyPatch) -> machine.Choice:
        monkeypatch.setenv("PATH", str(self.bin))
        return machine.choose(machine.look(self.root))


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Computer(tmp_path)


@pytest.mark.parametrize(
    ("driver", "cards", "torch", "reason"),
    [
        ("535.129.03", [V100], machine.CUDA12, r"Tesla V100-SXM2-16GB \(sm_70\), driver 535.129.03: .* so CUDA 12"),
        ("580.65.06", [V100], machine.CUDA12, "CUDA 13 has no code for Tesla V100"),
        ("550.54.15", [A100, A100], machine.CUDA12, r"^NVIDIA A100[^,]*, driver.*CUDA 13 needs driver 580, so CUDA 12"),
        ("580.65.06", [H100], machine.TESTED, r"H100 80GB HBM3 \(sm_90\), driver 580.65.06: CUDA 13$"),
        ("580.65.06", [B200], machine.TESTED, r"B200 \(sm_100\).*: CUDA 13$"),
        ("580.65.06", [H100, V100], machine.CUDA12, "H100.*V100.*no code for Tesla V100"),
        ("580.65.06", [P100, H100], machine.TESTED, r"\(sm_60\).*: CUDA 13$"),
        ("580.65.06", [P100], machine.TESTED, "older than sm_70, the CPU trains"),
    ],
)
def test_torch_by_card_and_driver(driver, cards, torch, reason, computer, monkeypatch) -> None:
    choice = computer.nvidia_smi(driver, *cards).choose(monkeypatch)
    assert (choice.torch, choice.fault) == (torch, None)
    assert re.search(reason, choice.reason), choice.reason


def test_a_driver_too_old_for_any_torch_says_so(computer, monkeypatch) -> None:
    choice = computer.nvidia_smi("470.82.01", A100, first=OLD).choose(monkeypatch)
    assert re.search(r"A100-SXM4-80GB, driver 470.82.01: the driver is too old, CUDA 12 needs 525", choice.fault)


def test_without_a_gpu(computer, monkeypatch) -> None:
    assert computer.choose(monkeypatch) == (machine.TESTED, "no GPU: the CPU trains", None)
    computer.nvidia_smi("", first=ABSENT)
    choice = computer.choose(monkeypatch)
    assert choice.torch == machine.TESTED
    assert "nvidia-smi fails: NVIDIA-SMI has failed" in choice.reason


def test_nvcc_is_for_machines_with_a_gpu(computer, monkeypatch, capsys) -> None:
    def said(*words: str) -> str:
        assert machine.main(["--cuda", "--root", str(computer.root), *words]) == 0
        return capsys.readouterr().out.strip()

    monkeypatch.setenv("PATH", str(computer.bin))
    assert said() == "0"
    computer.nvidia_smi("580.65.06", V100)
    assert said() == "nvrtc"  # nvcc 13 has no code for it, and torch for CUDA 12 brings NVRTC 12
    computer.nvidia_smi("550.54.15", H100)
    assert said() == "nvrtc"  # whose driver loads nothing of nvcc 13
    computer.nvidia_smi("580.65.06", H100)
    assert said() == "auto"
    assert said("--device", "cpu") == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert said() == "0"


def test_a_broken_nvidia_smi_and_the_files_of_the_driver(computer, monkeypatch) -> None:
    """Without device nodes the driver is another's: of the host of a container that was given no GPU."""
    computer.nvidia_smi("", first=BROKEN).driver("580.65.06", "Tesla V100-PCIE-16GB", open_=True)
    choice = computer.choose(monkeypatch)
    assert choice.torch == machine.CUDA12
    assert re.search(r"V100.* driver 580.65.06, nvidia-smi fails: .*mismatch: CUDA 13 has no code", choice.reason)
    (computer.bin / "nvidia-smi").unlink()
    shutil.rmtree(computer.root / "proc")
    (computer.root / "dev/nvidia0").unlink()
    (computer.root / "dev").rmdir()
    computer.driver("550.54.15")
    assert "a GPU of unknown kind, driver 550.54.15" in computer.choose(monkeypatch).reason
    (computer.root / "dev/nvidia0").unlink()
    assert computer.choose(monkeypatch).reason == "no GPU: the CPU trains"


@pytest.mark.parametrize(("value", "hides"), [("", True), ("-1", True), ("0", False), ("GPU-8a2f", False)])
def test_gpus_may_be_hidden(value: str, hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert machine.hidden() == hides


def test_constraints_fit_each_torch() -> None:
    """Another torch has wishes of its own for CUDA's packages and for setuptools."""
    assert machine.constraints(PINS, machine.TESTED, machine.TRITONS[machine.TESTED]) == PINS
    for version, triton in machine.TRITONS.items():
        if version != machine.TESTED:
            lines = machine.constraints(PINS, version, triton).splitlines()
            assert {f"torch=={version}", f"triton=={triton}"} <= {*lines}
            dropped = {line.partition("==")[0] for line in {*PINS.splitlines()} - {*lines}}
            assert dropped - {"torch", "triton"} == {"setuptools", "nvidia-cuda-nvrtc-cu12"}


def test_make_takes_what_fits_and_what_it_is_told(computer: Computer, tmp_path: Path) -> None:
    """The rule of the Makefile: one line, and the file is touched only where its content changes."""
    output = tmp_path / "venv/constraints.txt"

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = [computer.bin / "make", "-s", f"VENV={output.parent}", f"PYTHON={sys.executable}", output, *words]
        environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "TORCH")}
        environment["PATH"] = str(computer.bin)
        return subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG
        )

    computer.nvidia_smi("535.129.03", V100)
    assert re.match(r"torch 2\.10\.0, triton 3\.6\.0: Tesla V100.* so CUDA 12\n$", make().stdout)
    assert f"torch=={machine.CUDA12}\n" in output.read_text()
    assert make("TORCH=2.12.1").stdout.startswith("torch 2.12.1, triton 3.7.1: TORCH=2.12.1 (Tesla V100")
    assert "DEVICE=cpu" in make("DEVICE=cpu").stdout
    assert output.read_text() == PINS
    before = output.stat().st_mtime_ns
    make("DEVICE=cpu")
    assert output.stat().st_mtime_ns == before
    assert "TORCH=2.1.0: name its Triton too, as in TRITON=3.7.1. Known: 2.8.0" in make("TORCH=2.1.0").stderr
    computer.nvidia_smi("470.82.01", A100, first=OLD)
    result = make()
    assert result.returncode
    assert "update it, or train on the CPU: make DEVICE=cpu" in result.stderr


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (machine.Machine((machine.Gpu("Tesla V100", 70),), "535.1"), rf"install torch=={machine.CUDA12} and triton=="),
        (machine.Machine((machine.Gpu("NVIDIA A100", 80),), "470.82"), "the driver is too old, update it"),
        (machine.Machine((), "550.54"), "a GPU of unknown kind"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_no_silent_cpu(found, words, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", f"{machine.TESTED}+cu130")
    monkeypatch.setattr(machine, "look", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=rf"this machine has .*sees no GPU: .*{words}|{words}.*sees no GPU") as caught:
        networks.find_device(None)
    assert str(caught.value).endswith("or train on the CPU with --device cpu")
    assert networks.find_device("cpu").type == "cpu"
    monkeypatch.setattr(machine, "look", lambda: machine.Machine((machine.Gpu("Tesla P100", 60),), "535.1"))
    assert networks.find_device(None).type == "cpu"
    monkeypatch.setattr(machine, "look", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert networks.find_device(None).type == "cpu"


def test_a_gpu_that_torch_has_no_code_for_ends_before_the_first_kernel(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr(torch, "__version__", f"{machine.TESTED}+cu130")
    monkeypatch.setattr(machine, "look", lambda: machine.Machine((machine.Gpu("Tesla V100", 70),), "580.65"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=rf"no code for cuda, Tesla V100 \(sm_70\): install torch=={machine.CUDA12}"):
        networks.find_device(None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert networks.find_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("driver", "card", "capability", "state", "lacking", "words"),
    [
        ("580.65.06", H100, (9, 0), "2, 700.00, 700.00", None, []),
        ("550.54.15", A100, (8, 0), "[N/A], [N/A], [N/A]", None, ["driver 550.54.15 has no CUDA 13: update it to 580"]),
        ("535.129.03", V100, (7, 0), "0, 300.00, 300.00", None, []),
        (
            "580.65.06",
            A100,
            (8, 0),
            "93, 250.00, 400.00",
            "Triton needs a C compiler, and there is no gcc",
            ["Triton needs a C compiler", "cuda:1 is 93% busy", r"may draw 250 W of 400 W: nvidia-smi -pl 400"],
        ),
        (
            "580.65.06",
            A100,
            (8, 0),
            "Field is not valid",
            "the extension is built without CUDA",
            ["built without CUDA"],
        ),
    ],
)
def test_advice_on_what_is_slower_than_it_could_be(
    driver, card, capability, state, lacking, words, computer, monkeypatch
) -> None:
    """One line for each; the query names the GPU that CUDA counts as 1 of those that are visible."""
    answer = f'case "$*" in *power*--id=GPU-7) echo "{driver}, {state}"; exit 0 ;; *power*) exit 6 ;; esac'
    computer.nvidia_smi(driver, card, first=answer)
    monkeypatch.setenv("PATH", str(computer.bin))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(machine, "driver", lambda: machine.look(computer.root).driver)
    missing = {"triton": lacking if lacking and "Triton" in lacking else None}
    missing["cuda"] = None if missing["triton"] else lacking
    monkeypatch.setattr(backends, "lacking_on", lambda op, backend, device_type: missing[backend])
    found = advice(torch.device("cuda:1"))
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert re.match(f"slower than it could be: .*{word}", line), line
        assert "\n" not in line
    assert machine.condition(0) is None  # of another GPU it does not answer


def test_the_table_of_the_guide_is_what_is_chosen() -> None:
    capabilities = {"V100": 70, "A100": 80, "H100": 90, "B200": 100, "P100": 60}
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]\w+(?: and \w+)?|none) \| (\d+|none) \| (stops|[\d.]+) \|", text, re.MULTILINE)
    assert len(rows) > 10
    for gpus, driver, torch_version in rows:
        cards = [] if gpus == "none" else [machine.Gpu(name, capabilities[name]) for name in gpus.split(" and ")]
        choice = machine.choose(machine.Machine(tuple(cards), None if driver == "none" else f"{driver}.1"))
        assert ("stops" if choice.fault else choice.torch) == torch_version, (gpus, driver)
    words = [machine.TESTED, machine.CUDA12, str(machine.CUDA12_DRIVER), str(machine.CUDA13_DRIVER)]
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| machine | torch |")[2].partition("\n\n")[0]
    assert all(word in table and word in text for word in words)
