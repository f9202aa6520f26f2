"""What every test may rely on: fixed seeds, poisoned memory, an interpreter where there is no GPU."""

import functools
import os
import random
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from hypothesis import settings

settings.register_profile("fast", derandomize=True, deadline=None, max_examples=200, print_blob=True)
settings.register_profile("random", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

# torch remembers its constructors at the first use of a device context; that must be before they are replaced below
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def no_leaks():
    yield
    assert torch.is_grad_enabled(), "the test left gradients switched off"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that the package allocates holds NaN until somebody writes it."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poison(getattr(torch, name)))


def _poison(make):
    @functools.wraps(make)
    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        if torch.compiler.is_compiling() or not out.is_floating_point():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return out.fill_(float("nan")) if caller.startswith("fastdiff") else out

    return poisoned


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
