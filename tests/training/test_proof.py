"""The proof on a device, by a stand-in: CPU tensors, Triton's interpreter, the extension's CPU code as backend cuda.

Children are forks of the test, so that a fault that is put into a kernel here is in theirs.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epigraf_fast import ops
from epigraf_fast.config import Config, preset, to_dict
from epigraf_fast.data import ImageDataset
from epigraf_fast.errors import DeviceError
from epigraf_fast.kernels import sample_importance as importance_kernels
from epigraf_fast.kernels import sample_triplane as triplane_kernels
from epigraf_fast.ops import backends, native, verdicts
from epigraf_fast.ops.verdicts import FAILED, PASSED, SLOWER, Verdict
from epigraf_fast.tools import train
from epigraf_fast.training import defaults, proof, proof_items
from epigraf_fast.training.defaults import tuned
from epigraf_fast.training.distributed import World
from epigraf_fast.training.proof import Finding

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or native.lacking("cpu") is not None or not backends._interpreting(),
    reason="needs Triton's interpreter and the extension",
)

KERNELS = {
    "triton": ("sample_triplane", "sample_importance", "cut"),
    "cuda": ("bias_act", "upfirdn2d", "modulated_conv2d"),
}
SIZES = proof_items.Sizes(1, 5, 8, 9)


class Fork:
    """A child of this process that checks a request."""

    def __init__(self, path: Path, errors: Any) -> None:
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                faulthandler.disable()
                os.dup2(errors.fileno(), 2)
                code = proof_items.main([str(path)])
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def stand_in(imported: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lacking = backends.lacking_on

    def lacking_on(op: str, backend: str, device_type: str) -> str | None:
        return native.lacking("cpu") if backend == "cuda" else lacking(op, backend, device_type)

    monkeypatch.setattr(backends, "CHECKED", ("cuda", "cpu"))
    monkeypatch.setattr(backends, "KERNELS", KERNELS)
    monkeypatch.setattr(backends, "lacking_on", lacking_on)
    monkeypatch.setattr(backends, "fallback", lambda op, device_type: "torch" if device_type == "cuda" else "reference")
    monkeypatch.setattr(backends, "_accepted", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def request_of(config: Config) -> proof_items.Request:
    poses = torch.tensor([[0.1, 1.5, 0.0], [0.6, 1.2, 0.0]])
    return proof.request_for(config, 3, poses, torch.device("cpu"), 8)._replace(sizes=SIZES)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A kernel that does not end. While one runs, an hour passes whenever the parent looks at its clock."""
    looping, monotonic = tmp_path / "looping", time.monotonic
    hours = 0

    def loop(*args: Any, **kwargs: Any) -> None:
        looping.touch()
        while True:
            time.sleep(0.1)

    class Patient(Fork):
        def kill(self) -> None:
            super().kill()
            looping.unlink()

    def ahead() -> float:
        nonlocal hours
        hours += looping.exists()
        return monotonic() + 3600 * hours

    monkeypatch.setattr(sys.modules[__name__], "Fork", Patient)
    monkeypatch.setattr(proof, "time", SimpleNamespace(monotonic=ahead, sleep=time.sleep))
    return loop


@pytest.fixture(scope="module")
def imported() -> None:
    """What the checks import, once for all children."""
    request = proof_items.Request(to_dict(preset("demo")), 0, [[0.0, 1.5, 0.0]], 1, "cpu", [], {}, SIZES)
    items = ["triton cut", "cpu bias_act", "cpu modulated_conv2d"]
    said: list[Any] = []
    proof_items.run(request._replace(items=items), lambda *words: said.append(words))
    assert [words[0] for words in said if words[1] == PASSED] == items


def test_every_fault_stays_with_its_kernel(
    stand_in: None, tiny_config: Any, loop: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel aborts, one loops, one is wrong, one is wrong at the run's own sizes alone; the others are taken."""
    launch = native.launch

    def wrong(name: str, tensors: Any, *numbers: float) -> None:
        launch(name, tensors, *numbers)
        if name == "bias_act_bwd":
            tensors[3].mul_(1.001)
        if name == "upfirdn2d" and len(tensors[0]) == 16:  # fake and real patches of a micro-batch
            tensors[4].fill_(torch.nan)

    monkeypatch.setattr(triplane_kernels, "fwd", lambda *args, **options: os.abort())
    monkeypatch.setattr(importance_kernels, "fwd", loop)
    monkeypatch.setattr(native, "launch", wrong)
    config = tiny_config(batch=8)
    for op in ("sample_triplane", "checks"):  # four channels: not a fault
        monkeypatch.setattr(sys.modules[f"epigraf_fast.ops.{op}"], "check_triton_planes", lambda *args: None)
    found = proof.prove(request_of(config), start=Fork)
    assert {item: verdict.state for item, verdict in found.items()} == {
        "triton sample_triplane": FAILED,
        "triton sample_importance": FAILED,
        "triton cut": PASSED,
        "cuda bias_act": FAILED,
        "cuda upfirdn2d": PASSED,
        "cuda modulated_conv2d": PASSED,
        "triton gradients": PASSED,
        "cuda gradients": PASSED,
        "all settings": FAILED,
        "triton settings": PASSED,
        "cuda settings": FAILED,
        "graphs phases": PASSED,
    }
    assert found["triton sample_importance"].why == "it hangs: no progress in 60 s"
    assert found["triton sample_triplane"].why.startswith("it crashed: SIGABRT")
    assert "gradient to x is off by 0.001 of the largest value, 0.0001 is allowed" in found["cuda bias_act"].why
    assert found["cuda settings"].why == "the gradient of D is not finite"
    assert verdicts.accepted(found, KERNELS) == {"cut": ("triton",)}
    named = proof.lines_of(Finding(found))
    assert "not taken on this GPU: triton sample_importance: it hangs: no progress in 60 s" in named
    # A layer of convolutions calls bias_act by name.
    found["cuda settings"] = Verdict(PASSED)
    assert verdicts.accepted(found, KERNELS) == {"cut": ("triton",), "upfirdn2d": ("cuda",)}


def test_gradients_of_networks_show_what_ops_alone_do_not(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = native.launch

    def wrong(name: str, tensors: Any, *numbers: float) -> None:
        launch(name, tensors, *numbers)
        if name == "bias_act_bwd" and len(tensors[0]) > SIZES.batch:  # of no input of the ops'
            tensors[3].mul_(1.1)

    monkeypatch.setattr(native, "launch", wrong)
    request = request_of(tiny_config(batch=8))
    passed = {op: ["cuda"] for op in KERNELS["cuda"]}
    (verdict,) = proof._check(request._replace(items=["cuda gradients"], passed=passed), Fork, 60.0).values()
    assert verdict.state == FAILED
    assert "gradient of" in verdict.why


def test_recorded_phases_that_read_old_inputs_are_seen(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(tiny_config(batch=8))._replace(items=["graphs phases"])
    assert proof._check(request, Fork, 60.0)["graphs phases"].state == PASSED
    monkeypatch.setattr(torch, "_foreach_copy_", lambda own, given: None)
    assert "in call 2 has cosine" in proof._check(request, Fork, 60.0)["graphs phases"].why


def test_kernels_that_are_slower_are_not_taken(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that knows what is called: the convolutions' kernels take twice as long, the renderer's half."""

    def measure(function: Callable[[], Any], device: torch.device) -> float:
        taken = backends.accepted()
        return 1.0 + (1.0 if taken.get("bias_act") else 0.0) - (0.5 if taken.get("cut") else 0.0)

    monkeypatch.setattr(proof_items, "measure", measure)
    passed = {op: [backend] for backend, names in KERNELS.items() for op in names}
    request = request_of(tiny_config(batch=8))._replace(items=["triton time", "cuda time"], passed=passed)
    found = proof._check(request, Fork, 60.0)
    assert {item: verdict.state for item, verdict in found.items()} == {"triton time": PASSED, "cuda time": SLOWER}
    assert found["cuda time"].why == "a micro-batch takes 1.5e+03 ms with them, 500 ms without"
    good = {f"{backend} {op}": Verdict(PASSED) for backend, names in KERNELS.items() for op in names}
    assert verdicts.accepted(good | found, KERNELS).keys() == {*KERNELS["triton"]}
    assert proof.lines_of(Finding(found))[0].startswith("not taken on this GPU: cuda time: a micro-batch takes")
    monkeypatch.undo()
    assert 0 < proof_items.measure(lambda: time.sleep(0.001), torch.device("cpu")) < 60


def test_a_gpu_that_fails_is_one_line_and_checked_again(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data, device = tiny_config(), SimpleNamespace(label_dim=3), torch.device("cpu")
    name = proof.signature(config, 3, config.micro)
    verdicts.write(device, name, {"cuda bias_act": Verdict(PASSED)})
    verdicts.write(device, "another", {"cuda bias_act": Verdict(PASSED)})
    with pytest.raises(RuntimeError, match="shapes"), proof.suspecting(config, data, device, World()):
        raise RuntimeError("shapes do not match")
    assert verdicts.read(device).keys() == {name, "another"}
    words = r"cpu has failed \(CUDA error: an illegal memory .* --resume auto$"
    with pytest.raises(DeviceError, match=words) as caught, proof.suspecting(config, data, device, World()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")
    assert "\n" not in str(caught.value)
    kept = verdicts.read(device)
    assert kept.keys() == {name, "another"}
    assert [verdict.state for verdict in kept[name].values()] == ["suspect"], "no kernel's verdict stays"
    monkeypatch.setattr(proof, "prove", lambda *args, **kwargs: {"cuda bias_act": Verdict(PASSED)})
    for fresh in (True, False):
        finding = proof.find(config, 3, torch.zeros(2, 3), device, config.batch)
        assert finding.fresh == fresh
        assert finding.items["cuda bias_act"].state == PASSED
    assert capsys.readouterr().out.count("ended by an error of the GPU (CUDA error: an illegal memory access") == 1
    words = "checks the kernels again: as before, so see dmesg for an Xid, or take --backend torch; go on with"
    with pytest.raises(DeviceError, match=words), proof.suspecting(config, data, device, World()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_child_of_its_own(stand_in: None, tiny_config: Any) -> None:
    """As on a GPU, without any fork: what is no kernel of this device is one failed item, and the rest goes on."""
    request = request_of(tiny_config())._replace(items=["reference bias_act", "none bias_act"])
    found = proof._check(request, proof.start_child, 60.0)
    assert found["reference bias_act"].state == PASSED
    assert "backend must be None or one of" in found["none bias_act"].why


def test_what_was_found_is_kept_and_read(
    stand_in: None,
    tiny_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []
    good = {f"{backend} {op}": Verdict(PASSED) for backend, names in KERNELS.items() for op in names}
    bad = good | {"triton cut": Verdict(FAILED, "it crashed: SIGSEGV")}

    def prove(request: proof_items.Request, **options: Any) -> verdicts.Items:
        calls.append(request)
        return bad

    monkeypatch.setattr(proof, "prove", prove)
    config = tiny_config()
    data = SimpleNamespace(label_dim=3, angles=torch.zeros(5, 3))
    assert proof.settle(config, data, torch.device("cpu"), World()).fresh
    assert "triton cut: it crashed: SIGSEGV\n  --recheck checks again" in capsys.readouterr().out
    assert backends.resolve("sample_triplane", None, "cpu") == "triton"
    assert backends.resolve("cut", None, "cpu") == backends.fallback("cut", "cpu")
    assert not proof.settle(config, data, torch.device("cpu"), World()).fresh
    assert "SIGSEGV" in capsys.readouterr().out  # at every start
    assert len(calls) == 1
    proof.settle(config, data, torch.device("cpu"), World(), recheck=True)
    proof.settle(tiny_config(renderer={"fine_samples": 5}), data, torch.device("cpu"), World())
    proof.settle(tiny_config(seed=5, kimg=1.0, run_dir=str(tmp_path / "other")), data, torch.device("cpu"), World())
    assert len(calls) == 3  # other settings ask anew, another seed does not
    assert proof.settle(tiny_config(backend="reference"), data, torch.device("cpu"), World()) is None

    (path,) = (tmp_path / "cache/epigraf_fast/verdicts").iterdir()
    assert {"gpu", "driver", "torch", "triton", "cudnn", "code"} <= json.loads(path.read_text())["facts"].keys()
    monkeypatch.setattr(verdicts, "facts", lambda device: {"gpu": "another"})
    assert verdicts.read("cpu") == {}
    assert verdicts.of_bare_ops("cpu") is None
    monkeypatch.undo()
    path.write_text("{")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert verdicts.read("cpu") == {}
    # Where the usual place cannot be written, beside the run.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert verdicts.write("cpu", "x", good, tmp_path / "run").parent == tmp_path / "run"
    assert verdicts.read("cpu", tmp_path / "run") == {"x": good}
    assert verdicts.write("cpu", "x", good) is None


def test_a_call_that_no_run_has_checked_for(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes what is on disk, the worst of all checks; and where there is none the fallback, and says so once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verdicts, "_name", lambda device: "this.json")
    monkeypatch.setattr(verdicts, "facts", lambda device: {"gpu": "this"})
    x = torch.randn(2, 3)
    for _ in range(2):
        assert torch.equal(ops.bias_act(x, act="lrelu"), ops.bias_act(x, act="lrelu", backend="cpu"))
        assert backends.resolve("sample_triplane", None, "cuda") == "torch"
    assert capsys.readouterr().err.count("have not been checked on this GPU") == 1
    good = {f"{backend} {op}": Verdict(PASSED) for backend, names in KERNELS.items() for op in names}
    verdicts.write("cuda", "a", good)
    verdicts.write("cuda", "b", good | {"cuda gradients": Verdict(FAILED, "cosine")})
    backends.accept(None)
    assert backends.resolve("sample_triplane", None, "cuda") == "triton"
    assert backends.resolve("bias_act", None, "cuda") == "torch"
    assert capsys.readouterr().err == ""


def test_a_run_takes_what_the_device_has_proved(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and cuDNN's trials, each with a line, and why not; nothing without a check or on a plain CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    config, device = tiny_config(), torch.device("cpu")
    proved = Finding({"graphs phases": Verdict(PASSED)})
    assert tuned(config, None, device) == (config, [])
    off = Finding({"graphs phases": Verdict(FAILED, "G: gradients differ")})
    exact = tiny_config(deterministic=True)
    assert tuned(exact, off, device) == (
        exact,
        ["CUDA graphs: off, G: gradients differ", "cudnn.benchmark: off, sums keep one order"],
    )
    assert not torch.backends.cudnn.benchmark
    chosen, lines = tuned(config, proved, device)
    assert chosen == dataclasses.replace(config, cuda_graphs=True)
    assert [line.split(",")[0] for line in lines] == [
        "CUDA graphs: a phase is one launch; here its replays gave the gradients of plain calls",
        "cudnn.benchmark: cuDNN tries its algorithms",
    ]
    assert tuned(chosen, Finding({}), device)[1][0] == "CUDA graphs: as asked for"
    assert torch.backends.cudnn.benchmark
    monkeypatch.setattr(backends, "CHECKED", ("cuda",))
    assert tuned(config, proved, device) == (config, [])


@pytest.mark.parametrize(
    ("device", "cores", "world", "megabytes", "words"),
    [
        ("cuda", 16, World(), 1000, "15, by 16 cores"),
        ("cuda", 64, World(), 1000, "16, by 64 cores"),
        ("cuda", 16, World(3, 8, 3, 4), None, "3, by 16 cores for 4 processes"),
        ("cuda", 1, World(), 1000, "1, by 1 cores"),
        ("cpu", 16, World(), 1000, "2, by 16 cores"),
        ("cuda", 16, World(), 1, "2, by 16 MiB in /dev/shm: make it larger, as with docker run --shm-size 8g"),
        ("cuda", 16, World(3, 8, 3, 8), 0.01, "0, by 0 MiB in /dev/shm: make it larger"),
    ],
)
def test_loader_processes(
    device: str,
    cores: int,
    world: World,
    megabytes: float | None,
    words: str,
    tiny_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(defaults.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    config = tiny_config(batch=2048, loader={"workers": "auto"})  # 1.5 MiB
    room = None if megabytes is None else int(megabytes * 2**24)
    monkeypatch.setattr(defaults, "shared_room", lambda: room)
    chosen, (line,) = defaults.with_loaders(config, torch.device(device), world)
    assert line.startswith(f"loader processes: {words}")
    assert chosen.loader.workers == int(words.split(",")[0])
    assert defaults.with_loaders(chosen, torch.device(device), world) == (chosen, [])


def test_a_start_proves_then_trains_and_says_so(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train` takes what passed, keeps it in the checkpoint, and a start that finds otherwise says what changed."""
    found = {f"cuda {op}": Verdict(PASSED) for op in KERNELS["cuda"]}
    monkeypatch.setattr(proof, "prove", lambda request, **options: found)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    config = tiny_config(kimg=0.008, backend="auto", loader={"workers": "auto"})
    data = ImageDataset(config.data)
    assert train.train(config, data, torch.device("cpu"), None, tune=True) == 0
    said = capsys.readouterr().out
    assert re.search(r"^bias_act .* cuda$", said, re.MULTILINE)
    table = said.partition("chosen for this machine:\n")[2].splitlines()[:3]
    assert [line.split(":")[0] for line in table] == ["  CUDA graphs", "  cudnn.benchmark", "  loader processes"]
    found = found | {"cuda bias_act": Verdict(FAILED, "gradient to x is off")}
    more = dataclasses.replace(config, kimg=0.016)
    assert train.train(more, data, torch.device("cpu"), "auto", recheck=True) == 0
    said = capsys.readouterr().out
    assert "not taken on this GPU: cuda bias_act: gradient to x is off" in said
    assert "bias_act: cuda -> reference" in said


def test_processes_take_what_passed_on_every_machine(
    stand_in: None, tiny_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {f"{backend} {op}": Verdict(PASSED) for backend, names in KERNELS.items() for op in names}
    other = good | {"triton sample_triplane": Verdict(FAILED, "it hangs")}

    class Worlds(World):
        def exchange(self, value: Any) -> list[Any]:
            return [None] * 4 if value is None or isinstance(value, str) else [value, None, other, None]

    recorded = good | {"graphs phases": Verdict(PASSED), "triton settings": Verdict(FAILED, "not finite")}
    monkeypatch.setattr(proof, "find", lambda *args, **options: Finding(good))
    assert verdicts.accepted(proof.worst([good, recorded]), KERNELS).keys() == {*KERNELS["cuda"]}
    assert not Finding(proof.worst([good, recorded])).records
    assert Finding(proof.worst([recorded, recorded])).records
    data = SimpleNamespace(label_dim=0, angles=torch.zeros(5, 3))
    assert not proof.settle(tiny_config(), data, torch.device("cpu"), Worlds(0, 4, 0)).records
    assert backends.resolve("cut", None, "cpu") == "triton"
    assert backends.resolve("sample_triplane", None, "cpu") != "triton"
    assert "triton sample_triplane: it hangs" in capsys.readouterr().out
