"""What the tools look at: a run of a few steps on the tiny data set, with everything switched on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from command_lines import run_tool
from epigraf_fast import progress
from epigraf_fast.config import (
    CameraConfig,
    Config,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    PatchConfig,
    RendererConfig,
    to_dict,
)
from epigraf_fast.data import ImageDataset, make_loader
from epigraf_fast.training.checkpoint import save_checkpoint
from epigraf_fast.training.step import Trainer

RESOLUTION = 16


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, after two and four steps."""
    run_dir = tmp_path_factory.mktemp("run")
    dataset = ImageDataset(tiny_data, use_labels=True)
    config = Config(
        data=str(tiny_data),
        resolution=RESOLUTION,
        batch=4,
        run_dir=str(run_dir),
        device="cpu",
        camera=CameraConfig(**dataset.camera),
        generator=GeneratorConfig(
            z_dim=16,
            w_dim=16,
            plane_resolution=16,
            plane_channels=4,
            channel_base=256,
            channel_max=16,
            decoder_hidden=8,
            pose_conditioning=True,
        ),
        renderer=RendererConfig(
            coarse_samples=6, fine_samples=6, density_shift=4.0, white_background=True, last_interval=1e-3
        ),
        discriminator=DiscriminatorConfig(
            channel_base=128, channel_max=16, code_dim=16, patch_steps=32, patch_table_dim=4, camera_steps=8
        ),
        patch=PatchConfig(resolution=8),
        loader=DataConfig(labels=True, workers=0),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = Trainer(config, dataset, torch.device("cpu"))
        loader = make_loader(dataset, config.batch, config.seed)
        for _ in range(2):
            for _ in range(2):
                trainer.iteration(*next(loader))
            save_checkpoint(run_dir, config, trainer.state_dict(), keep=3)
    (run_dir / "config.json").write_text(json.dumps(to_dict(config)))
    return run_dir


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of waits, however slow the machine is: what a test reads are results and errors."""
    monkeypatch.setattr(progress, "PATIENCE", {True: threading.TIMEOUT_MAX, False: threading.TIMEOUT_MAX})


@pytest.fixture
def one_error_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`one_error_line(tool, *words)`: runs a command that must fail with one line and exit code 2."""

    def one_error_line(tool: ModuleType, *words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run_tool(tool, *words)
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: "), message
        assert message.count("\n") == 1, message
        return message

    return one_error_line
