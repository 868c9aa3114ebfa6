"""Several processes that train together: torchrun's environment, one flat all-reduce, agreement on when to stop."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config
from ..errors import UserError

# While rank 0 draws pictures or measures FID, the others wait. A dead process is noticed by torchrun, not by this.
TIMEOUT = datetime.timedelta(hours=4)

FAULT = 1000  # what a process says that has no batch, where others say the number of the signal that stops them, or 0
VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # that torchrun sets, and what holds without it


class World:
    """The processes of a job; without torchrun, one alone, for which everything here does nothing.

    Args:
        rank, size: Of this process.
        local_rank: On its machine, the number of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.control: dist.ProcessGroup | None = None  # for words between the CPUs, which must not wait for a GPU

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says."""
        return cls(*(int(os.environ.get(name, default)) for name, default in VARIABLES))

    def connect(self, device: torch.device) -> None:
        """Joins the processes: NCCL between GPUs, gloo between CPUs."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one dtype by their means over the processes, in one all-reduce."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def agree(self, *words: int) -> list[int]:
        """The largest number that a process has to say, of each."""
        if self.size == 1:
            return list(words)
        largest = torch.tensor(words)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def reseed(self, seed: int, cur_nimg: int) -> None:
        """Gives every process random numbers of its own, after the networks were built from the same ones."""
        if self.size > 1:
            # torch's CPU generator keeps 32 bits of a seed.
            torch.manual_seed(((seed * 1_000_003 + cur_nimg) * 1_000_003 + self.rank + 1) % 2**32)


def check_world(config: Config, world: World) -> None:
    """Raises UserError unless the batch can be shared by the processes."""
    if config.batch % world.size:
        raise UserError(f"batch must be a multiple of the {world.size} processes, got {config.batch}")
    share, group = config.batch // world.size, config.discriminator.minibatch_std_group
    micro = min(config.micro, share)
    if share % micro or micro % min(group, micro):
        raise UserError(
            f"the share of a process, batch / {world.size} = {share}, must be a multiple of micro_batch = {micro}, and "
            f"that of discriminator.minibatch_std_group = {group}: set --micro-batch {min(group, share)}"
        )
