"""How the model outputs of several branches combine into one prediction."""

from fastdiff.guidance.cfg import CFG

__all__ = ["CFG"]
