"""Time of one scheduler step, diffusers' own and on the fused kernel, interleaved: `python -m bench.schedulers [threads]`."""

import statistics
import sys
import time
import warnings

import diffusers
import torch

from fastdiff import as_fast

SHAPES, STEPS, ROUNDS = ((2, 4, 64, 64), (1, 16, 128, 128)), 20, 25
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = {
    "DPM-Solver++ 2M": (diffusers.DPMSolverMultistepScheduler, _SD),
    "UniPC": (diffusers.UniPCMultistepScheduler, _SD),
    "Euler": (diffusers.EulerDiscreteScheduler, _SD),
    "DDIM": (diffusers.DDIMScheduler, {**_SD, "clip_sample": False}),
    "flow Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


def measure(cls: type, config: dict, shape: tuple[int, ...], together: bool) -> tuple[float, float]:
    """Median microseconds of a step (diffusers' own, fused); `together` lets them take turns step by step, else run by run."""
    pair = cls(**config), as_fast(cls(**config))
    outputs, x0, times = [torch.randn(shape) for _ in range(4)], torch.randn(shape), ([], [])
    for _ in range(ROUNDS):
        for scheduler in pair:
            scheduler.set_timesteps(STEPS)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x0, scheduler.timesteps[0])
        x = [x0, x0]
        order = (
            [(i, k) for i in range(STEPS) for k in (0, 1)]
            if together
            else [(i, k) for k in (0, 1) for i in range(STEPS)]
        )
        for i, k in order:
            t = pair[k].timesteps[i]
            begin = time.perf_counter_ns()
            x[k] = pair[k].step(outputs[i % 4], t, x[k], return_dict=False)[0]
            times[k].append(time.perf_counter_ns() - begin)
    return tuple(statistics.median(spent[STEPS:]) / 1e3 for spent in times)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(
        f"diffusers {diffusers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, microseconds"
    )
    with torch.no_grad():
        for shape in SHAPES:
            for name, (cls, config) in CASES.items():
                for way, together in (("run by run", False), ("step by step", True)):
                    stock, fast = measure(cls, config, shape, together)
                    print(
                        f"{shape!s:18} {name:16} {way:13} {stock:8.1f} {fast:8.1f}  {stock / fast:5.1f}x", flush=True
                    )


if __name__ == "__main__":
    main()
