"""What tests of command lines share: a tool's command, flags of a config, the losses of a run, the line of a fault."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from epigraf_fast.__main__ import COMMANDS, main
from epigraf_fast.config import Config, differences, preset
from epigraf_fast.training.log import read_stats

SPEED = ("seconds", "sec_per_kimg", "img_per_sec")
CLOCKED = ("time/", "gpu/")


def run_tool(tool: ModuleType, *words: object) -> int:
    """Runs the command whose module in epigraf_fast.tools this is."""
    names = {f"epigraf_fast.tools.{module}": name for name, (module, _) in COMMANDS.items()}
    return main([*names[tool.__name__].split(), *map(str, words)])


def flags(config: Config, base: str = "demo") -> list[str]:
    """The command line that turns a preset into these settings."""
    line = [base]
    for name, (_, value) in differences(preset(base), config).items():
        part, _, setting = name.replace("_", "-").rpartition(".")
        prefix = f"--{part}." if part else "--"
        if isinstance(value, bool):
            line.append(f"{prefix}{'' if value else 'no-'}{setting}")
        else:
            values = value if isinstance(value, tuple) else [value]
            line += [f"{prefix}{setting}", *map(str, values)]
    return line


def losses(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of stats.jsonl without what a clock has measured."""
    lines = read_stats(Path(run_dir) / "stats.jsonl")
    return [
        {name: value for name, value in line.items() if name not in SPEED and not name.startswith(CLOCKED)}
        for line in lines
    ]


def assert_one_error_line(captured: str, *words: str) -> None:
    """What is left on the terminal: one line, `error: ...`, with the words, and no traceback."""
    lines = [line.split("\r")[-1] for line in captured.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, captured
    assert lines[-1] == errors[0]
    assert "Traceback" not in captured
    for word in words:
        assert word in errors[0], errors[0]


class Distance:
    """Stands in for FeatureDistance, which needs seconds."""

    def __init__(self, device: torch.device) -> None:
        self.images = 0

    def update_real(self, images: torch.Tensor) -> None:
        pass

    def update_fake(self, images: torch.Tensor) -> None:
        self.images += len(images)

    def reset_fake(self) -> None:
        self.images = 0

    def compute(self) -> float:
        return float(self.images)


class Features(nn.Module):
    """Stands in for EfficientNet."""

    num_features = 4

    def __init__(self, device: object) -> None:
        super().__init__()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 2)).mean(dim=1).flatten(1)
