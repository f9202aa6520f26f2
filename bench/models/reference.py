"""What every variant is compared with: the float32 output of plain torch, and the arithmetic of a forward."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.models.sampling import STEPS, diffusers_loop
from bench.models.workloads import WORKLOADS


def describe(pipe, workload: str) -> None:
    """Sends {"output", "flops", "parameters"} of a workload through a pipe; runs in a process of its own."""
    torch.set_grad_enabled(False)
    chosen = WORKLOADS[workload]
    module, inputs = chosen.build(), chosen.inputs(0)
    call = lambda *given: chosen.call(module, *given)
    if chosen.pipeline is not None:
        output = chosen.pipeline(chosen.pipeline.build())
    else:
        output = diffusers_loop(chosen, call)() if chosen.images is not None else call(*inputs)
    parameters = sum(p.numel() for p in module.parameters())
    module.to("meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*(tensor.to("meta") for tensor in inputs))
    flops = counter.get_total_flops() * (1 if chosen.images is chosen.pipeline is None else STEPS)
    pipe.send({"output": output.numpy(), "flops": flops, "parameters": parameters})


def relative_error(output, reference) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    output, reference = (torch.as_tensor(array).double() for array in (output, reference))
    return float((output - reference).norm() / reference.norm())
