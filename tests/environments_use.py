"""Basic use of an installed fastdiff, run by `environments.py`: numbers against torch and diffusers, one JSON line at the end."""

import importlib.metadata
import json
import platform
import sys

import diffusers
import torch
from tiny_pipelines import TINY

import fastdiff
from fastdiff import info
from fastdiff.models.load import load_model
from fastdiff.plain import plain_sample
from fastdiff.solvers.compat import process_of


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def sampler() -> float:
    """The bundled DiT with guidance, accelerated and on kernels, against plain torch operations."""
    model = load_model("bundled:dit")
    labels = [{"class_labels": torch.tensor(row)} for row in ([1, 9], [10, 10])]
    settings = dict(solver="unipc-3", steps=6, guidance=2.0)
    made = fastdiff.Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))
    shape, plan = (2, model.channels, model.size, model.size), made.plan(2, **settings)
    with torch.no_grad():
        plain = plain_sample(model.net, plan, made.initial_state(shape, plan, 0), *labels)
    fastdiff.accelerate(model.net)
    fast = made.sample(shape, cond=labels[0], negative=labels[1], **settings)
    return relative(fast, plain)


def scheduler() -> float:
    """`as_fast` against the scheduler that it was made of, ten steps of UniPC."""
    results = []
    for convert in (lambda s: s, fastdiff.as_fast):
        made = convert(diffusers.UniPCMultistepScheduler())
        made.set_timesteps(10)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in made.timesteps:
            x = made.step(torch.tanh(x) * (1.0 + t / 2000.0), t, x).prev_sample
        results.append(x)
    return relative(results[1], results[0])


def pipeline(name: str) -> tuple[float, float, bool]:
    """Differences of "exact" and "w8a8" to the stock pipeline, and whether `undo` gives it back bit for bit."""
    tiny = TINY[name]
    pipe = tiny.build()
    pipe.set_progress_bar_config(disable=True)
    stock, differences = tiny(pipe), []
    for mode in ("exact", "w8a8"):
        fastdiff.accelerate(pipe, mode)
        differences.append(relative(tiny(pipe), stock))
        fastdiff.undo(pipe)
    return *differences, torch.equal(tiny(pipe), stock)


def compiled() -> float:
    """An op inside torch.compile, as one graph."""
    from fastdiff.ops import OPS

    op = OPS["gram"]
    args = next(iter(op.samples("cpu")))
    return relative(torch.compile(op, fullgraph=True, backend="aot_eager")(*args), op(*args))


def main() -> None:
    found = info.collect()
    record = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "triton": found["kernels"]["gram"]["triton"],
        "kernels": found["cpu"]["instruction_set"].get("used"),
        "sampler": sampler(),
        "as_fast": scheduler(),
        "compiled": compiled(),
        **{name: pipeline(name) for name in ("SD1.5", "DiT", "FLUX")},
    }
    print(json.dumps(record))
    small = [record["sampler"] < 1e-4, record["as_fast"] < 1e-5, record["compiled"] < 1e-6, record["kernels"]]
    pipes = [
        exact < 1e-4 and lossy < 0.2 and back for exact, lossy, back in (record[n] for n in ("SD1.5", "DiT", "FLUX"))
    ]
    sys.exit(0 if all(small + pipes) else 1)


if __name__ == "__main__":
    main()
