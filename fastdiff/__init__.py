"""fastdiff: a kernel-backed sampling engine for diffusion and flow models."""

__version__ = "0.1.0"
