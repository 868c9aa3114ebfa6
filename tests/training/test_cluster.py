"""Two nodes on the loopback: a job survives the loss of one, goes on alone, and takes another in (docs/cluster.md)."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents import Node
from torch.distributed import run

from bench.runs import scaling
from checks import HANG
from command_lines import flags
from epigraf_fast.config import Config, preset
from epigraf_fast.tools import train
from epigraf_fast.training.checkpoint import list_checkpoints
from epigraf_fast.training.memory import meta_networks, parameter_count
from epigraf_fast.training.start import checksum
from together import free_port

TinyConfig = Callable[..., Config]
PAGE = scaling.PAGE


def wait_for(what: Callable[[], Any], *nodes: Node) -> Any:
    deadline = time.monotonic() + HANG / 4
    while not (found := what()):
        assert time.monotonic() < deadline, "\n".join(node.read() for node in nodes)
        assert all(node.process.is_alive() for node in nodes), "\n".join(node.read() for node in nodes)
        time.sleep(0.1)
    return found


def test_a_node_is_lost_and_another_one_comes(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """Two, then one, then two again, each from the newest checkpoint; at the end both have the same weights."""
    run_dir, last, seen = tmp_path / "run", tmp_path / "last", tmp_path / "seen"
    seen.mkdir()
    config = tiny_config(kimg=100.0, checkpoint_kimg=0.016, log_kimg=1.0)

    def newest() -> int:
        """Images of the newest checkpoint."""
        return int(list_checkpoints(run_dir)[-1].stem.split("-")[1]) if list_checkpoints(run_dir) else 0

    def worker() -> int:
        original, end = train.loop, newest() + 16 if last.exists() else 100_000

        def loop(config: Config, dataset: Any, trainer: Any, *rest: Any) -> int:
            name, iteration = f"{trainer.world.size}-{trainer.world.rank}", trainer.iteration
            (seen / f"{name} from {trainer.cur_nimg}").touch()

            def slowly(*batch: Any) -> None:  # while nodes come and go nothing is to be computed
                iteration(*batch)
                time.sleep(0.2)

            trainer.iteration = slowly
            code = original(config, dataset, trainer, *rest)
            if code == 0:
                state = trainer.state_dict()
                parts = ("generator", "discriminator", "average", "g_optimizer", "d_optimizer", "augment_p")
                (seen / f"{name} at {trainer.cur_nimg} {checksum([state[part] for part in parts])}").touch()
            return code

        train.loop = loop
        return train.main([*flags(dataclasses.replace(config, kimg=end / 1000)), "--resume", "auto"])

    port = free_port()
    nodes = [Node(tmp_path / f"node{i}", port, "1:2", worker, host=i == 0) for i in range(2)]
    try:
        wait_for(lambda: newest() >= 16, *nodes)
        nodes[1].kill()
        (alone,) = wait_for(lambda: list(seen.glob("1-0 from *")), nodes[0])
        lost = int(alone.name.split()[-1])
        assert lost >= 16
        wait_for(lambda: newest() > lost, nodes[0])
        last.touch()
        nodes[1] = Node(tmp_path / "node2", port, "1:2", worker, host=False)
        for node in nodes:
            node.process.join(HANG / 4)
            assert node.process.exitcode == 0, "\n".join(node.read() for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert "another process is gone" in nodes[0].read()
    words = [path.name.split() for path in seen.iterdir()]
    begun = sorted({int(rest[0]) for _, what, *rest in words if what == "from"})
    ended = [rest for _, what, *rest in words if what == "at"]
    assert len(ended) == 2
    assert ended[0] == ended[1], "number of images and checksum of all weights and moments"
    assert begun[:2] == [0, lost]
    assert int(ended[0][0]) == begun[2] + 16 == newest()


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """Their flags are torchrun's and training's, and Slurm's variables become those of the rendezvous."""
    expected = {"node1:29500": ("2", "ffhq"), "a1:29500": ("3", "7")}
    for script in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL):
        path = tmp_path / "script"
        path.write_text(
            "set -eu\n"
            'srun() { "$@"; }\n'
            "scontrol() { printf 'a1\\na2\\na3\\n'; }\n"
            "torchrun() { printf '%s\\n' \"$@\"; }\n"
            f"SLURM_JOB_NODELIST=a[1-3] SLURM_JOB_NUM_NODES=3 SLURM_JOB_ID=7\n{script}"
        )
        said = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        parsed = run.parse_args(said)
        assert expected.pop(parsed.rdzv_endpoint) == (parsed.nnodes, parsed.rdzv_id)
        assert (parsed.rdzv_backend, parsed.nproc_per_node, parsed.training_script) == ("c10d", "8", "train.py")
        assert train.parse(parsed.training_script_args).resume == "auto"
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
    assert not expected


def test_the_estimate_of_the_page_is_that_of_the_file() -> None:
    result = json.loads(scaling.RESULTS.read_text()) | {"file": scaling.RESULTS.name}
    text = PAGE.read_text().partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert text.strip() == scaling.page(result)
    found = [scaling.Phase(**phase) for phase in result["phases"]]
    images = result["config"]["images"]
    links = {link.name: link for link in scaling.LINKS}
    for case in result["cases"]:
        again = scaling.estimate(found, images, case["gpus"], links.get(case["link"], scaling.LINKS[0]))
        assert again == case
        worst, best = case["efficiency"]
        assert 0 < worst <= best <= 1
    generator, discriminator = meta_networks(preset("ffhq"), 0)
    assert [sum(phase.buckets) // 4 for phase in found[:2]] == [*map(parameter_count, (generator, discriminator))]


def test_an_average_by_hand() -> None:
    """64 MB over 16 GPUs in two machines: 7/4 of it inside, and once all of it between."""
    link = scaling.Link("a link", 80)
    expected = 1.75 * 64e6 / 360e9 + 14 * 5e-6 + 64e6 / (0.8 * 10e9) + 2 * 20e-6
    assert scaling.all_reduce(64_000_000, 16, link) == pytest.approx(expected)
    phase = scaling.Phase("G", 0.5, 90e9, 45e9, (64_000_000,) * 2)
    case = scaling.estimate([phase], 4, 16, link)  # 4 ms of computing, 2 of them backward, every other iteration
    assert case["compute_ms"] == pytest.approx(2)
    assert case["travel_ms"] == pytest.approx(1e3 * expected)
    both = scaling.all_reduce(128_000_000, 16, link)
    assert case["efficiency"] == pytest.approx([2 / (2 + 500 * both), 2 / (2 + 500 * (2 * expected - 2e-3))])
