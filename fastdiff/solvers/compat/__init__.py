"""Other libraries' settings in our terms: a diffusers scheduler's class and config become solver, process and levels."""

from fastdiff.solvers.compat.setup import Setup, diffusers_setup, process_of

__all__ = ["Setup", "diffusers_setup", "process_of"]
