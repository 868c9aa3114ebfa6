"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

import pytest

from bench import results
from epigraf_fast.atomic import TEMPORARY, replacing
from epigraf_fast.ops import nvrtc, verdicts


def test_two_hosts_of_one_disk_have_one_process_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers, whose numbers are small: neither's half is taken for the other's whole."""
    path = tmp_path / "a.json"
    with replacing(path) as ours:
        ours.write_text("our")
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "another")
            with replacing(path) as theirs:
                theirs.write_text("theirs, whole")
        assert path.read_text() == "theirs, whole"
        assert ours.read_text() == "our"
        assert all(TEMPORARY.fullmatch(temporary.name) for temporary in (ours, theirs))
        ours.write_text("ours, whole")
    assert path.read_text() == "ours, whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert TEMPORARY.fullmatch(temporary.name)
        assert not path.exists()
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


KERNEL = re.search(r"^__global__ .*?(\w+)\(", (nvrtc.csrc() / "bias_act.cu").read_text(), re.MULTILINE)[1]


class Compiler:
    """Stands in for NVRTC."""

    version = (12, 8)

    def compile(self, source: Path, names: list[str], arch: int) -> tuple[bytes, str]:
        return b"code", ""


@pytest.mark.parametrize("writer", ["results", "verdicts", "kernels"])
def test_what_is_kept_is_written_so(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name that says whose it is, until it is whole."""
    names, original = [], os.replace

    def replace(source: Path, target: Path) -> None:
        names.append(source.name)
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(verdicts, "folder", lambda *_: tmp_path)
    if writer == "results":
        results.write(tmp_path / "a.json", {"a": 1})
    elif writer == "verdicts":
        verdicts.write_timings("cpu", "name", {"a": 1.0})
    else:
        nvrtc.machine_code(KERNEL, Compiler(), 70, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert names == [f"{kept.name}.{socket.gethostname()}-{os.getpid()}.tmp"]
