"""Time and memory of quantizing networks of full size: `python -m bench.quantization --full-size`."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.models import architectures
from fastdiff.quantized import quantize

MODELS: dict[str, Callable[[], nn.Module]] = {
    "DiT-XL/2": lambda: architectures.dit(16, 72, 28, 32, 1000),
    "SD1.5 UNet": architectures.sd15,
}


def run(name: str, recipe: str) -> dict:
    """Seconds, and the largest memory while it quantizes, above that of the process without a model, relative to the model
    in float32.
    """
    import diffusers  # noqa: F401  # its memory is not the model's

    empty = _status("VmRSS")
    net = architectures.seeded(MODELS[name])
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    wall, cpu = time.perf_counter(), time.process_time()
    made = quantize(net, recipe)
    seconds, busy = time.perf_counter() - wall, time.process_time() - cpu
    peak = _status("VmHWM") - empty
    return {
        **{"model": name, "recipe": recipe, "seconds": round(seconds, 1), "cpu_seconds": round(busy, 1)},
        **{"bytes_float32": size, "bytes_quantized": made.nbytes, "peak_of_float32": round(peak / size, 3)},
        **{"layers": sum(r.scheme is not None for r in made.layers), "threads": torch.get_num_threads()},
    }


def _status(entry: str) -> int:
    """Bytes of this process, as Linux counts them."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0])


def measure(recipe: str = "w8a8") -> list[dict]:
    """One row per model, each from a process of its own."""
    rows = []
    for name in MODELS:
        command = [sys.executable, "-m", __spec__.name, name, recipe]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return rows


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
