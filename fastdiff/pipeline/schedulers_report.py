"""Which steps of a scheduler the kernel takes, and the record of those that it did not."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from fastdiff.ops.native import TYPE_CODES


class Refusal(Exception):
    """Why a step is left to the scheduler's own code."""


def is_vector(timestep: object) -> bool:
    """Whether this is one timestep per sample, of several samples."""
    return type(timestep) is torch.Tensor and timestep.dim() == 1 and len(timestep) > 1


def accept(output, sample) -> None:
    """Raises Refusal for tensors that the kernel cannot take."""
    if type(sample) is not torch.Tensor or type(output) is not torch.Tensor:
        raise Refusal("the sample or the model's output is not a plain tensor")
    if output.shape != sample.shape or sample.dim() < 2 or not sample.numel():
        raise Refusal("the shapes of sample and model output differ, are empty or have one dimension")
    if output.dtype not in TYPE_CODES or sample.dtype not in TYPE_CODES or output.device != sample.device:
        raise Refusal(f"dtypes {output.dtype} and {sample.dtype}, or the tensors' devices")
    if (output.requires_grad or sample.requires_grad) and torch.is_grad_enabled():
        raise Refusal("gradients are recorded")
    if torch.compiler.is_compiling():
        raise Refusal("torch.compile traces it")
    if sample.device.type not in ("cpu", "cuda"):
        raise Refusal(f"no kernels for device {sample.device.type}")


@dataclass
class SchedulerReport:
    """What ran: `fused` steps on the kernel, and how many steps the scheduler's own code did, by reason."""

    scheduler: str
    fused: int = 0
    stock: Counter = field(default_factory=Counter)

    @property
    def fallbacks(self) -> list[str]:
        """Steps that the scheduler's own code did, and why, one sentence each."""
        return [f"{count} steps on diffusers' own code: {reason}" for reason, count in self.stock.items()]

    def __str__(self) -> str:
        lines = [
            f"{self.scheduler}: {self.fused} steps on the fused kernel, {self.stock.total()} on diffusers' own code"
        ]
        return "\n".join([*lines, *(f"  {count} x {reason}" for reason, count in self.stock.items())])
