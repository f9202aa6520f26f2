"""CUDA-graph capture: of one sampling step, which then serves every step of every solver, or of a network's forward."""

from collections.abc import Callable

import torch


class StepGraph:
    """A captured function without arguments, replayed with one launch.

    The step index, coefficients, seeds and times are read from device memory, so nothing in the graph depends on which
    step or solver runs. Whatever `body` touches must stay alive and in place.

    pool  memory that graphs share which never run at the same time (`torch.cuda.graph_pool_handle`); None: its own
    """

    def __init__(self, body: Callable[[], None], device: torch.device, pool: tuple[int, int] | None = None):
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            body()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self) -> None:
        """Runs the captured step on the current stream."""
        self._graph.replay()
