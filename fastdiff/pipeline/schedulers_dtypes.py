"""What only the dtypes of a step's tensors decide: in which dtype noise is drawn and results are returned."""

import inspect

import torch
from torch.overrides import TorchFunctionMode

from fastdiff.pipeline.schedulers_probe import fill


def dtypes(
    cls, state, timestep, options, dim: int, output: torch.dtype, sample: torch.dtype
) -> tuple[list, torch.dtype | None]:
    """([dtype of each result], dtype of the noise) of a step with a model output and a sample of these dtypes."""
    drawn: list[torch.dtype] = []
    shape = [1] * (dim - 1) + [4]

    class Draws(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in ("randn", "randn_like"):
                drawn.append(made.dtype)
            return made

    twin = object.__new__(cls)
    vars(twin).update({k: fill(v, lambda ref: torch.zeros(shape, dtype=output)) for k, v in state.items()})
    noise = {"variance_noise": torch.zeros(shape, dtype=output)} if options.get("variance_noise") else {}
    given = {**options, **noise}
    if "generator" in given:
        given["generator"] = torch.Generator()
    with torch.no_grad(), Draws():
        result = cls.step(twin, torch.zeros(shape, dtype=output), timestep, torch.zeros(shape, dtype=sample), **given)
    values = (
        list(result)
        if isinstance(result, tuple)
        else [getattr(result, n) for n in inspect.signature(type(result)).parameters]
    )
    return [v.dtype if isinstance(v, torch.Tensor) else None for v in values], drawn[0] if drawn else None
