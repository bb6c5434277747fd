"""A compiled program on a GPU: copies, and a CUDA graph for each shape that comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

_MOST_GRAPHS = 16  # each holds the memory of its activations; the one used longest ago goes first
_WARM_UP_RUNS = 3  # what a kernel sets up at its first run cannot be captured


class OnGpu:
    """`runner`: tensors on the GPU in, tensors on the GPU out. One thread at a time. The same steps as in `script`."""

    def __init__(self, torch: Any, runner: Callable[[list[Any]], Sequence[Any]], *, graphs: bool) -> None:
        self._torch, self._runner, self._graphs = torch, runner, graphs
        self._captured: OrderedDict[Any, tuple[list[Any], Any, Sequence[Any]]] = OrderedDict()

    def from_host(self, tensors: list[Any]) -> Sequence[Any]:
        """Copies in, all kernels, copies out: outputs in host memory of their own."""
        return [t.cpu() for t in self.on_device(self.placed(tensors))]

    def placed(self, tensors: list[Any]) -> list[Any]:
        """On the GPU; where a graph is captured for these shapes, in the memory that it reads."""
        if not self._graphs:
            return [t.cuda(non_blocking=True) for t in tensors]
        inputs, _, _ = self._graph_of(tensors)
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        return list(inputs)

    def on_device(self, tensors: list[Any]) -> Sequence[Any]:
        """Submitted, not waited for. With graphs `tensors` are what `placed` gave."""
        if not self._graphs:
            return self._runner(tensors)
        _, graph, outputs = self._graph_of(tensors)
        graph.replay()
        return outputs

    def close(self) -> None:
        self._captured.clear()
        vars(self).pop("_runner", None)

    def _graph_of(self, tensors: list[Any]) -> tuple[list[Any], Any, Sequence[Any]]:
        key = tuple((t.dtype, tuple(t.shape)) for t in tensors)
        if key not in self._captured:
            while len(self._captured) >= _MOST_GRAPHS:
                self._captured.popitem(last=False)
            self._captured[key] = self._capture(tensors)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _capture(self, tensors: list[Any]) -> tuple[list[Any], Any, Sequence[Any]]:
        cuda = self._torch.cuda
        inputs = [t.cuda() for t in tensors]
        beside = cuda.Stream()
        beside.wait_stream(cuda.current_stream())
        with cuda.stream(beside):
            for _ in range(_WARM_UP_RUNS):
                self._runner(list(inputs))
        cuda.current_stream().wait_stream(beside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            outputs = self._runner(list(inputs))
        return inputs, graph, outputs
