"""Model families and how each runs on fused kernels: class name -> what lowers it."""

from fastdiff.models.lower.dit import lower_dit

FAMILIES = {
    "DiT": lower_dit,
    "DiTTransformer2DModel": lower_dit,
}
