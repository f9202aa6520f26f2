"""Model families and how each runs on fused kernels: class name -> what lowers it."""

from fastdiff.models.lower.dit import lower_dit
from fastdiff.models.lower.pixart import lower_pixart
from fastdiff.models.lower.unet import lower_unet

FAMILIES = {
    "DiT": lower_dit,
    "DiTTransformer2DModel": lower_dit,
    "PixArtTransformer2DModel": lower_pixart,
    "UNet": lower_unet,
    "UNet2DModel": lower_unet,
    "UNet2DConditionModel": lower_unet,
}
