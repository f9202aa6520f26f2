"""Runs a scheduler's steps: finds the plan of a step, gives it memory and noise, and keeps the attributes as they should be."""

import torch

from fastdiff.ops.solver_step import MAX_SLOTS
from fastdiff.pipeline.schedulers_build import make_plan
from fastdiff.pipeline.schedulers_execute import Noise, execute
from fastdiff.pipeline.schedulers_memory import Memory
from fastdiff.pipeline.schedulers_plan import LostError, Node, Plan, references
from fastdiff.pipeline.schedulers_probe import NotAffineError, Ref, fill, probe
from fastdiff.pipeline.schedulers_report import Refusal, SchedulerReport, accept, is_vector
from fastdiff.pipeline.schedulers_rows import Rows
from fastdiff.pipeline.schedulers_state import TRIMMED, Attributes, own

_PATIENCE = 3  # steps in a row that cannot be planned before a schedule is left to the scheduler
_SCHEDULES, _ROWS = 32, 4096


class Runner:
    """The fast half of one scheduler object.

    stock   diffusers' class
    philox  noise seeds of the samples (a number for all), or None for torch's generators
    strict  raise RuntimeError where a step would be left to the scheduler's own code

    node    where the scheduler stands, None where nobody knows; roots: where schedules begin, by the attributes that decide
    dirty   an attribute was set since: the scheduler may stand elsewhere
    """

    def __init__(self, stock: type, philox: int | tuple[int, ...] | None, strict: bool = False):
        self.stock, self.philox, self.strict = stock, philox, strict
        self.report = SchedulerReport(stock.__name__)
        self.attributes = Attributes()
        self.dirty, self.failures, self.reason, self.scope = True, 0, "", (None, None)
        self.memory: Memory | None = None
        self.node: Node | None = None
        self.roots: dict[tuple, Node] = {}
        self.kinds: dict[tuple, tuple] = {}
        self.rows = Rows(self)
        self.times, self.done = None, 0  # the timesteps of this run, and the steps done on them

    def step(self, scheduler, output, timestep, sample, options: dict):
        """The scheduler's `step`, on the kernel where it can be."""
        self.done += 1
        try:
            result = self._fused(scheduler.__dict__, output, timestep, sample, options.copy())
        except Refusal as refusal:
            self.leave(str(refusal))
            self.restore(scheduler.__dict__)
            self.dirty = True
            return self._own_step(scheduler, output, timestep, sample, options, refusal)
        self.report.fused += 1
        return result

    def leave(self, reason: str) -> None:
        """Notes that a step is left to the scheduler's own code."""
        if self.strict:
            raise RuntimeError(f"as_fast: strict, but a step of {self.stock.__name__} is not on the kernel: {reason}")
        self.report.stock[reason] += 1

    def _own_step(self, scheduler, output, timestep, sample, options: dict, refusal: Refusal):
        try:
            return self.stock.step(scheduler, output, timestep, sample, **options)
        except (ValueError, RuntimeError, IndexError) as error:
            if is_vector(timestep):  # hardly any scheduler takes one, and what it says is of no help
                raise ValueError(f"as_fast: one timestep per sample is not possible here: {refusal}") from error
            raise

    def _fused(self, attributes: dict, output, timestep, sample, options: dict):
        generator = given = None
        if options:
            generator, given = options.pop("generator", None), options.pop("variance_noise", None)
            if given is not None:
                options["variance_noise"] = True
        memory = self.memory
        if memory is None or not self._is_usual(memory, output, sample):
            memory = self._prepare(attributes, output, sample)
        if self.dirty or (self.rows.nodes and not is_vector(timestep)) or self.attributes.edited():
            self._resync(attributes, sample.shape)
            memory = self.memory
        if is_vector(timestep) and len(timestep) == len(sample):
            timestep = self.rows.common(timestep)
        if is_vector(timestep):
            return self.rows.step(output, timestep, sample, Noise(generator, given), options)
        plan = self.plan(self.node, timestep, options, sample.dim())
        if isinstance(plan, str):
            raise Refusal(plan)
        result = execute(self, plan, output, sample, Noise(generator, given), (timestep, options))
        attributes.update(memory.attributes(plan))
        for name in plan.hidden:
            attributes.pop(name, None)
        self.node = plan.node
        return result

    def scale(self, attributes: dict, sample, timestep):
        """`scale_model_input` for one timestep per sample."""
        memory = self._prepare(attributes, sample, sample)
        if self.dirty or self.attributes.edited():
            self._resync(attributes, memory.shape)
        return self.rows.scale(sample, timestep)

    @staticmethod
    def _is_usual(memory: Memory, output, sample) -> bool:
        """Whether the tensors are as at the step before and need no closer look."""
        if type(sample) is not torch.Tensor or type(output) is not torch.Tensor or sample.dtype is not memory.dtype:
            return False
        if output.dtype is not memory.dtype or sample.shape != memory.shape or output.shape != memory.shape:
            return False
        if output.device != memory.device or sample.device != memory.device or torch.is_grad_enabled():
            return False
        return not torch.compiler.is_compiling()

    def _prepare(self, attributes: dict, output, sample) -> Memory:
        """Looks closely at the tensors; memory for them."""
        accept(output, sample)
        if "noise_sampler" in attributes:
            raise Refusal("its noise comes from a Brownian tree")
        memory = self.memory
        dtype = torch.float64 if torch.float64 in (output.dtype, sample.dtype) else torch.float32
        if memory is None or (sample.shape, dtype, sample.device) != (memory.shape, memory.dtype, memory.device):
            self.restore(attributes)
            memory = self.memory = Memory(sample.shape, dtype, sample.device)
            self.dirty = True
        return memory

    def _resync(self, attributes: dict, shape: torch.Size) -> None:
        """Finds where the scheduler stands from its attributes, as after `set_timesteps`."""
        self.restore(attributes)
        self.node = None
        self.rows.nodes.clear()
        key, state, tensors, tables = self.attributes.read(attributes, shape)
        if len(tensors) > MAX_SLOTS:
            raise Refusal(f"it remembers more than {MAX_SLOTS} tensors")
        scope = tables, attributes.get("_internal_dict")
        if tables != self.scope[0] or scope[1] is not self.scope[1]:
            self.scope, self.failures = scope, 0
        if self.memory.filled > _ROWS:
            self.memory = Memory(self.memory.shape, self.memory.dtype, self.memory.device)
            self._forget()
        self.memory.put(tensors)
        if attributes.get("timesteps") is not self.times:
            self.times, self.done = attributes.get("timesteps"), 1
        depth = self.done - 1 if self.philox is not None else 0  # steps share a plan where they share their noise
        key = (*key, len(shape), depth)
        if key not in self.roots:
            if len(self.roots) >= _SCHEDULES:
                self._forget()
            self.roots[key] = Node(state, depth)
        self.node, self.dirty = self.roots[key], False

    def _forget(self) -> None:
        """Lets go of all plans."""
        self.roots.clear()
        self.kinds.clear()

    def restore(self, attributes: dict, only: str | None = None) -> bool:
        """Writes hidden results (or the one of this name) back as attributes; whether there was any.

        Without a name, what is a view of the history becomes memory of its own: the scheduler's code may change it in place.
        """
        found = False
        for name, value in self.node.state.items() if self.node is not None else ():
            held = any(references(value))
            if held and only in (None, name) and name not in attributes:
                attributes[name], found = fill(value, self._tensor), True
            elif only is None and (held or isinstance(value, list)) and name in attributes:
                attributes[name] = own(attributes[name])
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

    def plan(self, node: Node, timestep, options: dict, dim: int) -> Plan | str:
        """The plan of the step after `node`, made once; a reason where there is none."""
        try:
            at = self.attributes.time(timestep)
            key = (at, *sorted(options.items())) if options else at
            plan = node.next.get(key)
        except (TypeError, RuntimeError):
            raise Refusal(f"arguments hold tensors: timestep, {', '.join(sorted(options))}") from None
        if plan is None:
            if self.failures >= _PATIENCE:
                return self.reason
            plan = node.next[key] = self._make(node, timestep, options, dim)
            self.failures = self.failures + 1 if isinstance(plan, str) else 0
            self.reason = plan
        return plan

    def _make(self, node: Node, timestep, options: dict, dim: int) -> Plan | str:
        try:
            response = probe(self.stock, node.state, self.attributes.as_argument(timestep), options, dim)
            for name in TRIMMED.keys() & response.tensors.keys():
                response.tensors[name] = response.tensors[name][-TRIMMED[name] :]
            plan = make_plan(node, response, self.philox is not None)
        except NotAffineError as error:
            return str(error)
        except LostError:
            raise
        except Exception as error:  # its own step will say the same to the user, or know better
            raise Refusal(f"its step failed on basis vectors: {type(error).__name__}: {error}") from None
        return plan
