"""Runs a scheduler's steps: finds the plan of a step, gives it memory and noise, and keeps the attributes as they should be."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from fastdiff.ops.native import TYPE_CODES
from fastdiff.pipeline.schedulers_execute import Noise, execute
from fastdiff.pipeline.schedulers_memory import Memory
from fastdiff.pipeline.schedulers_plan import LostError, Node, Plan, make_plan, references
from fastdiff.pipeline.schedulers_probe import NotAffineError, Ref, fill, probe
from fastdiff.pipeline.schedulers_state import TRIMMED, Attributes

_PATIENCE = 3  # steps in a row that cannot be planned before a schedule is left to the scheduler
_SCHEDULES, _ROWS = 32, 4096


@dataclass
class SchedulerReport:
    """What ran: `fused` steps on the kernel, and how many steps the scheduler's own code did, by reason."""

    scheduler: str
    fused: int = 0
    stock: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.scheduler}: {self.fused} steps on the fused kernel, {self.stock.total()} on diffusers' own code"]
        return "\n".join([*lines, *(f"  {count} x {reason}" for reason, count in self.stock.items())])


class Refusal(Exception):
    """Why a step is left to the scheduler's own code."""


class Runner:
    """The fast half of one scheduler object.

    stock   diffusers' class
    philox  noise seeds of the samples (a number for all), or None for torch's generators
    """

    def __init__(self, stock: type, philox: int | tuple[int, ...] | None):
        self.stock, self.philox = stock, philox
        self.report = SchedulerReport(stock.__name__)
        self.attributes = Attributes()
        self.dirty, self.failures, self.reason, self.tables = True, 0, "", None
        self.memory: Memory | None = None
        self.node: Node | None = None
        self.roots: dict[tuple, Node] = {}
        self.kinds: dict[tuple, tuple] = {}

    def step(self, scheduler, output, timestep, sample, options: dict):
        """The scheduler's `step`, on the kernel where it can be."""
        try:
            result = self._fused(scheduler.__dict__, output, timestep, sample, options.copy())
        except Refusal as refusal:
            self.report.stock[str(refusal)] += 1
            self.restore(scheduler.__dict__)
            self.dirty = True
            return self.stock.step(scheduler, output, timestep, sample, **options)
        self.report.fused += 1
        return result

    def _fused(self, attributes: dict, output, timestep, sample, options: dict):
        self._accept(output, sample)
        generator, given = options.pop("generator", None), options.pop("variance_noise", None)
        if given is not None:
            options["variance_noise"] = True
        memory = self.memory
        if memory is None or sample.shape != memory.shape or sample.device != memory.device:
            if "noise_sampler" in attributes:
                raise Refusal("its noise comes from a Brownian tree")
            memory = self._new_memory(attributes, output, sample)
        if self.dirty or self.attributes.edited():
            self._resync(attributes, sample)
        plan = self._plan(timestep, options, sample.dim())
        if isinstance(plan, str):
            raise Refusal(plan)
        result = execute(self, plan, output, sample, Noise(generator, given), (timestep, options))
        attributes.update(memory.attributes(plan))
        for name in plan.hidden:
            attributes.pop(name, None)
        self.node = plan.node
        return result

    def _accept(self, output, sample) -> None:
        if type(sample) is not torch.Tensor or type(output) is not torch.Tensor:
            raise Refusal("the sample or the model's output is not a plain tensor")
        if output.shape != sample.shape or sample.dim() < 2 or not sample.numel():
            raise Refusal(f"shapes {list(output.shape)} and {list(sample.shape)} differ, are empty or have one dimension")
        if output.dtype not in TYPE_CODES or sample.dtype not in TYPE_CODES or output.device != sample.device:
            raise Refusal(f"dtypes {output.dtype} and {sample.dtype} or devices of the tensors")
        if (output.requires_grad or sample.requires_grad) and torch.is_grad_enabled():
            raise Refusal("gradients are recorded")
        if torch.compiler.is_compiling():
            raise Refusal("torch.compile traces it")
        if sample.device.type not in ("cpu", "cuda"):
            raise Refusal(f"no kernels for device {sample.device.type}")

    def _new_memory(self, attributes: dict, output, sample) -> Memory:
        self.restore(attributes)
        wide = torch.float64 in (output.dtype, sample.dtype)
        self.memory = Memory(sample.shape, torch.float64 if wide else torch.float32, sample.device)
        self.dirty = True
        return self.memory

    def _resync(self, attributes: dict, sample) -> None:
        """Finds where the scheduler stands from its attributes, as after `set_timesteps`."""
        self.restore(attributes)
        self.node = None
        key, state, tensors, tables = self.attributes.read(attributes, sample.shape)
        if len(tensors) > 5:
            raise Refusal("it remembers more than five tensors")
        if tables != self.tables:
            self.tables, self.failures = tables, 0
        if self.memory.filled > _ROWS:
            self.memory = Memory(self.memory.shape, self.memory.dtype, self.memory.device)
            self.roots.clear()
        self.memory.put(tensors)
        if key not in self.roots:
            if len(self.roots) >= _SCHEDULES:
                self.roots.clear()
            depth = state.get("_step_index")
            self.roots[key] = Node(state, depth if isinstance(depth, int) else 0)
        self.node, self.dirty = self.roots[key], False

    def restore(self, attributes: dict, only: str | None = None) -> bool:
        """Writes hidden results (or the one of this name) back as attributes; whether there was any.

        Lists become new ones: the scheduler's own code changes them in place.
        """
        found = False
        for name, value in self.node.state.items() if self.node is not None else ():
            if only is None and isinstance(value, list) and isinstance(attributes.get(name), list):
                attributes[name] = list(attributes[name])
            elif only in (None, name) and name not in attributes and any(ref.dead >= 0 for ref in references(value)):
                attributes[name], found = fill(value, self._tensor), True
        return found

    def _tensor(self, ref: Ref) -> torch.Tensor:
        if ref.slot >= 0:
            return self.memory.tensor(ref)
        known = self.node.relation
        if ref.dead > 0:  # only its mix with the first one matters
            return torch.zeros_like(self.memory.views[0])
        total = self.memory.views[known.kept].clone()
        for slot, weight in known.rest.items():
            total.sub_(self.memory.views[slot], alpha=weight)
        return total.div_(known.weights[0])

    def _plan(self, timestep, options: dict, dim: int) -> Plan | str:
        """The plan of this step, made once; a reason where there is none."""
        try:
            at = self.attributes.time(timestep)
            key = (at, *sorted(options.items())) if options else at
            plan = self.node.next.get(key)
        except (TypeError, RuntimeError):
            raise Refusal(f"arguments {sorted(options)} hold tensors") from None
        if plan is None:
            if self.failures >= _PATIENCE:
                return self.reason
            plan = self.node.next[key] = self._make(timestep, options, dim)
            self.failures = self.failures + 1 if isinstance(plan, str) else 0
            self.reason = plan
        return plan

    def _make(self, timestep, options: dict, dim: int) -> Plan | str:
        try:
            when = self.attributes.as_argument(timestep)
            response = probe(self.stock, self.node.state, when, options, dim)
            for name in TRIMMED.keys() & response.tensors.keys():
                response.tensors[name] = response.tensors[name][-TRIMMED[name] :]
            plan = make_plan(self.node, response, self.philox is not None)
        except NotAffineError as error:
            return str(error)
        except LostError:
            raise
        except Exception as error:  # its own step will say the same to the user, or know better
            return f"its step failed on basis vectors: {type(error).__name__}: {error}"
        self.memory.need(plan.slots)
        return plan
