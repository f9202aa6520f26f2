"""The truth about this machine: versions, devices, and which kernels run here or why not."""

import importlib.metadata
import platform

import torch

import fastdiff
from fastdiff.ops import OPS, native

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "safetensors")


def collect() -> dict:
    """Versions, CPU, GPUs and, for each op and variant, "" or the sentence that says why it cannot run here."""
    return {
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "kernels": {name: _variants(op) for name, op in OPS.items()},
    }


def slow_only(info: dict) -> bool:
    """Whether some op has nothing but its reference."""
    fast = lambda variants: any(name != "reference" and not why for name, why in variants.items())
    return not all(fast(variants) for variants in info["kernels"].values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    module = native.cpu()
    levels = {"detected": module.isa_detected(), "used": module.isa()} if module else {}
    return {
        "machine": platform.machine(),
        "model": cpu_model(),
        "threads": torch.get_num_threads(),
        "instruction_set": levels,
        "missing": native.cpu_missing() or "",
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
                "multiprocessors": device.multi_processor_count,
            }
        )
    return found


def _variants(op) -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usable = {}
    for variant in op.variants:
        places = [place for place in (device, "cpu") if place in variant.devices]
        if not places:
            usable[variant.name] = f"runs on {' and '.join(variant.devices)}; torch sees no CUDA GPU"
        else:
            usable[variant.name] = (variant.missing and variant.missing()) or ""
    return usable
