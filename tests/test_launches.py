"""bench.step.launches: what a step gives its device to do, and that it does not become more unseen."""

from __future__ import annotations

import json

import pytest
import torch

from bench.step import launches
from epigraf_fast.config import preset

# Of a micro-batch of the ffhq preset; lower them when fewer are needed.
MOST = {"G": 625, "D": 570, "R1": 642}


def test_views_and_allocations_are_no_work():
    x, weight = torch.ones(1, 2, 5, 5, requires_grad=True), torch.ones(3, 2, 3, 3)
    with launches.Counting() as counting:
        y = torch.nn.functional.conv2d(x.transpose(2, 3).detach().requires_grad_(), weight)
        torch.empty(3).view(3, 1)
        (y * 2).sum().backward()
    counts = dict(counting.counts)
    assert counts["aten::convolution"] == counts["aten::convolution_backward"] == 1  # of the input alone
    assert counts["aten::mul"] == 2
    assert "aten::empty" not in counts
    assert "aten::view" not in counts


def test_a_step_stays_within_what_it_needs(tmp_path, capsys):
    assert launches.main(["--variants", "ours-fp32", "--json", str(tmp_path / "launches.json")]) == 0
    written = json.loads((tmp_path / "launches.json").read_text())
    counted = {case["phase"]: case["launches"] for case in written["cases"]}
    assert counted.keys() == MOST.keys()
    for phase, most in MOST.items():
        assert 0.95 * most < counted[phase] <= most, f"{phase}: {counted[phase]}; MOST has {most}"
    assert f"R1  {counted['R1']:6}" in capsys.readouterr().out
    assert sum(written["cases"][0]["ops"].values()) == counted["G"]


def test_an_unknown_variant(capsys):
    with pytest.raises(SystemExit):
        launches.main(["--variants", "ours-fp32,mine"])
    assert "--variants takes published, eager" in capsys.readouterr().err


def test_ops_are_not_computed():
    """They give zeros of the right shape: a full-size step is counted in seconds."""
    config = launches.narrow(preset("demo"), 4)
    counts = launches.count(config, "ours-fp32")
    assert counts["G"]["epigraf_fast::composite"] == 1
    assert counts["D"]["epigraf_fast::composite_backward"] == 0
