"""Model families and how each runs on fused kernels: class name -> what lowers it."""

from fastdiff.models.lower.dit import lower_dit
from fastdiff.models.lower.flux import lower_flux
from fastdiff.models.lower.ltx import lower_ltx
from fastdiff.models.lower.pixart import lower_pixart
from fastdiff.models.lower.sana import lower_sana
from fastdiff.models.lower.sd3 import lower_sd3
from fastdiff.models.lower.t5 import lower_t5
from fastdiff.models.lower.unet import lower_unet
from fastdiff.models.lower.vae import lower_decoder, lower_encoder
from fastdiff.models.lower.wan import lower_wan

FAMILIES = {
    "Decoder": lower_decoder,
    "DiT": lower_dit,
    "DiTTransformer2DModel": lower_dit,
    "Encoder": lower_encoder,
    "FluxTransformer2DModel": lower_flux,
    "LTXVideoTransformer3DModel": lower_ltx,
    "PixArtTransformer2DModel": lower_pixart,
    "SD3Transformer2DModel": lower_sd3,
    "SanaTransformer2DModel": lower_sana,
    "T5EncoderModel": lower_t5,
    "UMT5EncoderModel": lower_t5,
    "UNet": lower_unet,
    "UNet2DModel": lower_unet,
    "UNet2DConditionModel": lower_unet,
    "WanTransformer3DModel": lower_wan,
}
