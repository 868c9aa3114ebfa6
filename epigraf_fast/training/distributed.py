"""Several processes that train together: torchrun's environment, averaged gradients, agreement on when to stop."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config, micro_batch_for
from ..errors import UserError

# While rank 0 draws pictures or measures FID, the others wait. A dead process is noticed by torchrun, not by this.
TIMEOUT = datetime.timedelta(hours=4)

BUCKET = 2**22  # numbers, 16 MiB, of gradients that travel together

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

    @contextlib.contextmanager
    def averaged_gradients(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Around the last backward pass: the gradients become their means over the processes.

        They travel in buckets, in an order that all processes share: backwards through the parameters, as they become
        ready, each bucket as soon as it and those before it are complete. A gradient that is missing here counts as
        zero; one that is missing everywhere stays None.
        """
        if self.size == 1:
            yield
            return
        buckets = _Buckets(parameters)
        try:
            yield
        finally:
            buckets.detach()
        somewhere = self.agree(*(p.grad is not None for p in parameters))
        buckets.finish(self.size, {id(p) for p, anywhere in zip(parameters, somewhere, strict=True) if anywhere})

    def agree(self, *words: int) -> list[int]:
        """The largest number that a process has to say, of each."""
        if self.size == 1:
            return list(words)
        largest = torch.tensor(words)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def gather(self, value: Any) -> list[Any] | None:
        """The plain values of all processes in order, for rank 0; None for the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.control)
        return values

    def reseed(self, seed: int, cur_nimg: int) -> None:
        """Gives every process random numbers of its own, after the networks were built from the same ones."""
        if self.size > 1:
            # torch's CPU generator keeps 32 bits of a seed.
            torch.manual_seed(((seed * 1_000_003 + cur_nimg) * 1_000_003 + self.rank + 1) % 2**32)


class _Buckets:
    """Gradients on their way: sent by hooks during a backward pass, brought home by `finish`."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.buckets: list[list[Tensor]] = []
        size = BUCKET
        for p in reversed(parameters):
            if size >= BUCKET:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.numel()
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, dist.Work]] = []
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
            for number, bucket in enumerate(self.buckets)
            for p in bucket
        ]

    def _arrived(self, number: int) -> None:
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def finish(self, processes: int, wanted: set[int]) -> None:
        """Sends the rest, waits, and writes the means into the gradients of the parameters of these ids."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            flat /= processes
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if id(p) in wanted:
                    p.grad = mean.view(p.shape)


def check_world(config: Config, world: World) -> None:
    """Raises UserError unless the batch can be shared by the processes."""
    size, group = world.size, config.discriminator.minibatch_std_group

    def fits(images: int, micro: int) -> bool:
        return images % micro == 0 and micro % min(group, micro) == 0

    def shared(batch: int) -> bool:
        """Whether one process could train on so many images, and these processes, too."""
        shares = [batch, batch // size]
        return batch % size == 0 and all(fits(share, min(config.micro_batch or share, share)) for share in shares)

    if config.batch % size:
        whole = size * math.lcm(config.micro_batch or 1, group)  # in most settings multiples of this can be shared
        batch = next((batch for batch in range(config.batch, config.batch + whole + 1) if shared(batch)), None)
        advice = f"--batch {batch}" if batch else f"--batch {-(-config.batch // whole) * whole} --micro-batch {group}"
        raise UserError(f"batch must be a multiple of the {size} processes, got {config.batch}: set {advice}")
    if not shared(config.batch):
        share = config.batch // size
        micro = min(config.micro, share)
        raise UserError(
            f"the share of a process, batch / {size} = {share}, must be a multiple of micro_batch = {micro}, and "
            f"that of discriminator.minibatch_std_group = {group}: set --micro-batch "
            f"{micro_batch_for(share, micro, group)}"
        )
