"""What acts on the sampling loop from its hook points."""

from fastdiff.steering.adaptive_guidance import AdaptiveGuidance

__all__ = ["AdaptiveGuidance"]
