"""CUDA-graph capture of one sampling step; the same graph serves every step of every solver."""

from collections.abc import Callable

import torch


class StepGraph:
    """A captured function without arguments, replayed with one launch.

    The step index, coefficients, seeds and times are read from device memory, so nothing in the graph depends on which
    step or solver runs. Whatever `body` touches must stay alive and in place.
    """

    def __init__(self, body: Callable[[], None], device: torch.device):
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.graph(self._graph, stream=stream):
            body()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self) -> None:
        """Runs the captured step on the current stream."""
        self._graph.replay()
