"""Finds the compiled modules and says in a sentence why one is missing."""

import functools
import importlib
from types import ModuleType

import torch

# the element types as numbers: csrc/common/types.h has the same table
TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int8: 4}


@functools.cache
def cpu() -> ModuleType | None:
    """The C++ module with the CPU kernels, or None where it was not built."""
    return _load("fastdiff._cpu")[0]


@functools.cache
def cuda() -> ModuleType | None:
    """The CUDA module, or None where it was not built or there is no GPU."""
    return _load("fastdiff._cuda")[0] if torch.cuda.is_available() else None


@functools.cache
def cpu_missing() -> str | None:
    """Why the CPU kernels cannot run, or None."""
    module, error = _load("fastdiff._cpu")
    return None if module else f"the C++ kernels are not built ({error}); reinstall with a C++17 compiler on the path"


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    module, error = _load("fastdiff._cuda")
    if module is None:
        return f"the CUDA kernels are not built ({error}); reinstall with FASTDIFF_CUDA=1 and nvcc on the path"
    return module.unusable() or None


@functools.cache
def triton_missing() -> str | None:
    """Why the Triton kernels cannot run, or None."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "triton is not installed; pip install 'triton>=3.6'"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"triton {triton.__version__} is too old; pip install 'triton>=3.6'"


def queue(device: torch.device) -> tuple[int, int]:
    """Where a CUDA kernel for tensors on this device is launched: the device's index and the current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, str(error)
