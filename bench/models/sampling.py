"""A whole sampling of a bundled model: by our sampler, and by diffusers' scheduler loop as the peers' users write it."""

from collections.abc import Callable

import torch

from bench.models.workloads import Workload
from fastdiff.models.load import load_model

STEPS = 20
Forward = Callable[..., torch.Tensor]


def scheduler_of(workload: Workload):
    """diffusers' DPM-Solver++ (2M) with the model's own noise schedule."""
    from diffusers import DPMSolverMultistepScheduler

    config = _model(workload).scheduler_config
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return DPMSolverMultistepScheduler(**{key: config[key] for key in keys})


def diffusers_loop(workload: Workload, forward: Forward) -> Callable[[], torch.Tensor]:
    """A function that samples once; with guidance `forward(x, t, *labels)` sees both branches in one batch."""
    scheduler, noise, labels = scheduler_of(workload), _noise(workload), _labels(workload)
    guided = workload.guidance != 1.0
    rows = noise.shape[0] * (2 if guided else 1)

    def sample() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = noise
        for t in scheduler.timesteps:
            doubled = torch.cat([x, x]) if guided else x
            out = forward(doubled, torch.full((rows,), float(t)), *labels)
            if guided:
                cond, null = out.chunk(2)
                out = null + workload.guidance * (cond - null)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return sample


def our_loop(workload: Workload, net: torch.nn.Module) -> Callable[[], torch.Tensor]:
    """A function that samples once with `fastdiff.Sampler`, with the steps of the same scheduler."""
    import fastdiff

    model, noise, labels = _model(workload), _noise(workload), _labels(workload)
    sampler = fastdiff.Sampler(net, prediction=model.prediction)
    settings = {"solver": fastdiff.from_scheduler(scheduler_of(workload), STEPS), "guidance": workload.guidance}
    if labels:
        cond, null = labels[0].chunk(2)
        settings |= {"cond": {"class_labels": cond}, "negative": {"class_labels": null}}
    return lambda: sampler.sample(x=noise, **settings)


def trajectory(workload: Workload, forward: Forward, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Inputs of `forward` at `count` steps of a sampling, spread evenly."""
    seen = []

    def record(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.clone() for tensor in inputs))
        return forward(*inputs)

    diffusers_loop(workload, record)()
    return [seen[round(i * (len(seen) - 1) / max(count - 1, 1))] for i in range(count)]


def _model(workload: Workload):
    return load_model(f"bundled:{workload.name.split('_')[1]}")


def _noise(workload: Workload) -> torch.Tensor:
    rows = workload.images or workload.inputs(0)[0].shape[0]
    return torch.randn(rows, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def _labels(workload: Workload) -> list[torch.Tensor]:
    """Class labels, those of the null branch behind them where there is guidance; empty for an unconditional model."""
    classes = _model(workload).num_classes
    if classes is None:
        return []
    cond = torch.arange(_noise(workload).shape[0]) % classes
    return [torch.cat([cond, torch.full_like(cond, classes)])] if workload.guidance != 1.0 else [cond]
