"""CUDA graphs: the launches of a training phase recorded once, and replayed by one call from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST_KINDS = 8  # that a phase keeps graphs of: each holds gradients of its own


class GraphMemory:
    """The stream that phases are recorded on, and the memory that their graphs share: one runs at a time.

    Args:
        device: On a CPU nothing is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: set[torch.cuda.CUDAGraph] = set()
        self.pool: Any = None

    def record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what the function launches, and what it returned: tensors that every replay writes."""
        if not self.graphs:  # a pool that no graph holds is gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on: that of the loader, which pins memory, must not spoil the recording.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = function()
        self.graphs.add(graph)
        return graph, outputs

    def release(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graphs.remove(graph)
        graph.reset()


@dataclass(eq=False)
class Recording:
    """What a phase keeps of one kind of inputs."""

    kind: Any
    inputs: tuple[Any, ...]
    tensors: list[Tensor]  # those among the inputs
    graph: torch.cuda.CUDAGraph | None = None
    outputs: Any = None


class GraphedPhase:
    """A function of tensors that is replayed from a CUDA graph.

    The first call with inputs of a kind is a plain one, in which kernels are chosen and compiled; the second records,
    and replays; the others replay. A replay reads the inputs from tensors of its own, which they are copied to, so
    their shapes and dtypes, and every value among them that is no tensor, make the kind. Of several kinds, as a phase
    has with planes of several sizes, the last `MOST_KINDS` are kept.
    All else that the function reads must keep its memory, and is written in place: weights, buffers, counters.
    On a CPU a replay is a plain call on those same tensors.

    Args:
        function: Of nested tuples of tensors and plain values. It must not wait for the device.
        memory: Shared with other phases.
    """

    def __init__(self, function: Callable[..., Any], memory: GraphMemory) -> None:
        self.function, self.memory = function, memory
        self.recordings: list[Recording] = []  # the last one used comes last

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns; valid until the next call."""
        leaves, structure = tree_flatten(inputs)
        given = [x for x in leaves if isinstance(x, Tensor)]
        kind = structure, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        known = next((x for x in self.recordings if x.kind == kind), None)
        if known is None:
            if len(self.recordings) == MOST_KINDS:
                self._release(self.recordings.pop(0))
            own = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            tensors = [x for x in own if isinstance(x, Tensor)]
            self.recordings.append(Recording(kind, tree_unflatten(own, structure), tensors))
            return self._plainly(self.recordings[-1])
        self.recordings.remove(known)
        self.recordings.append(known)
        with torch.no_grad():
            torch._foreach_copy_(known.tensors, given)
        if self.memory.stream is None:
            return self._plainly(known)
        if known.graph is None:
            known.graph, known.outputs = self.memory.record(lambda: self.function(*known.inputs))
        known.graph.replay()
        return known.outputs

    def _plainly(self, recording: Recording) -> Any:
        """One call without a graph, on the stream that will be recorded."""
        stream = self.memory.stream
        if stream is None:
            return self.function(*recording.inputs)
        current = torch.cuda.current_stream(stream.device)  # without a device it is that of torch's current one
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*recording.inputs)
        current.wait_stream(stream)
        return outputs

    def _release(self, recording: Recording) -> None:
        if recording.graph is not None:
            self.memory.release(recording.graph)
        recording.graph = recording.outputs = None
