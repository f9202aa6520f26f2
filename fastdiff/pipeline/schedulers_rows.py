"""Steps of a diffusers scheduler whose samples stand at different timesteps."""

from typing import TYPE_CHECKING

import torch

from fastdiff.ops.solver_step import solver_step
from fastdiff.pipeline.schedulers_execute import Noise, counted, draw, kinds_of, set_seeds
from fastdiff.pipeline.schedulers_plan import Node, Plan, references
from fastdiff.pipeline.schedulers_probe import fill
from fastdiff.pipeline.schedulers_report import Refusal
from fastdiff.pipeline.schedulers_state import is_same

if TYPE_CHECKING:
    from fastdiff.pipeline.schedulers_runner import Runner


class Rows:
    """Where every sample of a batch stands. A sample whose timestep goes back towards noise begins anew.

    nodes  one per sample; empty before the first step and where the samples stand together
    root   where samples begin
    last   timestep of each sample's last step
    """

    def __init__(self, runner: "Runner"):
        self.runner = runner
        self.nodes: list[Node] = []
        self.root: Node | None = None
        self.last: list[float] = []

    def step(self, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, noise: Noise, options: dict):
        """The scheduler's results for one timestep per sample: [B] on any device."""
        runner, values = self.runner, timestep.tolist()
        nodes = self._begin(values)
        plans = [runner.plan(node, t, options, sample.dim()) for node, t in zip(nodes, timestep, strict=True)]
        self._check(plans)
        kinds = None
        if {output.dtype, sample.dtype} != {runner.memory.dtype}:
            kinds = kinds_of(runner, plans[0], output, sample, (timestep[0], options))
        wide = sample.to(runner.memory.dtype).contiguous()
        if any(plan.noise == "output" for plan in plans):
            x = torch.empty_like(wide).copy_(output)
        else:
            x = self._noise(plans, wide, noise, kinds[1] if kinds else wide.dtype)
        result = self._run(plans, x, wide, output, kinds)
        self.nodes = [plan.node for plan in plans]
        return result

    def common(self, timestep: torch.Tensor) -> torch.Tensor:
        """The timestep of all samples where they have been standing together and go on so, else `timestep`.

        Raises ValueError where they would part on the way.
        """
        held = any(True for value in self.runner.node.state.values() for _ in references(value))
        if self.nodes or not held:
            return timestep
        if len(set(timestep.tolist())) > 1:
            raise ValueError("as_fast: a vector of timesteps must begin right after set_timesteps")
        return timestep[0]

    def _begin(self, values: list[float]) -> list[Node]:
        """Where the samples stand before a call at these timesteps."""
        runner = self.runner
        if not self.nodes:
            self.root, self.nodes, self.last = runner.node, [runner.node] * len(values), list(values)
        falling = len(runner.attributes.times) < 2 or runner.attributes.times[0] > runner.attributes.times[-1]
        for b, (t, last) in enumerate(zip(values, self.last, strict=True)):
            if t > last if falling else t < last:
                self.nodes[b] = self.root
        self.last = values
        return self.nodes

    def scale(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The scheduler's `scale_model_input` with one timestep per sample."""
        parts, nodes = [], self._begin(timestep.tolist())
        for b, node in enumerate(nodes):
            state = {name: fill(value, lambda ref: None) for name, value in node.state.items()}
            twin = object.__new__(self.runner.stock)
            vars(twin).update(state)
            when = self.runner.attributes.as_argument(timestep[b])
            parts.append(self.runner.stock.scale_model_input(twin, sample[b : b + 1], when))
            key = "scaled", self.runner.attributes.time(timestep[b])
            if key not in node.next:
                marks = {n: v for n, v in vars(twin).items() if n not in state or not is_same(state[n], v)}
                node.next[key] = Node({**node.state, **marks}, node.depth, node.relation) if marks else node
            self.nodes[b] = node.next[key]
        return torch.cat(parts)

    def _check(self, plans: list[Plan | str]) -> None:
        for plan in plans:
            if isinstance(plan, str):
                raise Refusal(plan)
        if len({(plan.results, plan.own_h, plan.kind) for plan in plans}) > 1 or any(plan.inputs for plan in plans):
            raise Refusal("these timesteps need different kinds of steps; call step once for each kind")

    def _noise(self, plans: list[Plan], sample: torch.Tensor, noise: Noise, dtype: torch.dtype | None) -> torch.Tensor:
        if all(plan.noise == "none" for plan in plans):
            return torch.empty_like(sample)
        if any(plan.noise == "given" for plan in plans):
            return noise.given.to(sample.dtype).clone(memory_format=torch.contiguous_format)
        if self.runner.philox is not None:
            set_seeds(self.runner, noise.generator)
            if any(plan.noise == "drawn" for plan in plans):
                return counted(self.runner, [plan.node.depth - 1 for plan in plans], sample)
            return torch.empty_like(sample)
        if not isinstance(noise.generator, list):
            return draw(sample.shape, noise.generator, dtype or torch.float32, sample.device).to(sample.dtype)
        x = torch.zeros_like(sample)
        for b, plan in enumerate(plans):  # a sample that draws nothing leaves its generator alone
            if plan.noise == "drawn":
                x[b : b + 1] = draw(sample[:1].shape, noise.generator[b], dtype or torch.float32, sample.device)
        return x

    def _run(self, plans: list[Plan], x, sample, output, kinds) -> object:
        memory, first = self.runner.memory, plans[0]
        numbers = [memory.numbers(plan) for plan in plans]
        others = []
        for k in range(1, max(map(len, numbers))):
            made = x.clone()
            self._launch([row[k] if k < len(row) else -1 for row in numbers], made, memory.history, sample, output)
            others.append(made)
            for b, plan in enumerate(plans):
                place = k - 1 - (len(plan.further) - len(plan.places))
                if 0 <= place < len(plan.places):
                    memory.history[plan.places[place], b] = made[b]
        history = torch.empty((1, *memory.shape), dtype=x.dtype, device=x.device) if first.own_h else memory.history
        self._launch([row[0] for row in numbers], x, history, sample, output)
        for b, plan in enumerate(plans):
            if plan.keep >= 0:
                memory.history[plan.keep, b] = x[b]
        shown = (
            torch.stack([history[plan.slot_h, b] for b, plan in enumerate(plans)]) if "h" in first.results else None
        )
        values = [
            {"next": x, "h": shown, None: None}[r] if not isinstance(r, int) else others[r] for r in first.results
        ]
        if kinds is not None:
            values = [v if v is None else v.to(kind) for v, kind in zip(values, kinds[0], strict=True)]
        return tuple(values) if first.kind is None else first.kind(**dict(zip(first.names, values, strict=True)))

    def _launch(self, numbers: list[int], x, history, sample, output) -> None:
        memory = self.runner.memory
        rows = torch.tensor([numbers], dtype=torch.int32, device=x.device)
        tick, none = torch.zeros(1, dtype=torch.int32, device=x.device), x.new_empty(0, *memory.shape)
        solver_step(x, history, none, tick, [output], None, sample, memory.coef, memory.meta, rows, memory.seed)
