"""Small transformers whose text and image attend to each other, and calls that suit them."""

import torch
from context_networks import TEXT, TOKENS, Network

POOLED = 12
_SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=TEXT, caption_projection_dim=48, pooled_projection_dim=POOLED, pos_embed_max_size=9,
)  # fmt: skip
_FLUX = dict(
    in_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=TEXT, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
)  # fmt: skip


def _call(rows, generator, **sample) -> dict:
    normal = lambda *shape: torch.randn(shape, generator=generator)
    text = {"encoder_hidden_states": normal(rows, TOKENS, TEXT), "pooled_projections": normal(rows, POOLED)}
    return sample | text | {"timestep": torch.tensor([700.0, 31.5, 988.0, 1.0])[:rows]}


def _image(rows, size, generator) -> dict:
    return _call(rows, generator, hidden_states=torch.randn(rows, 4, *size, generator=generator))


def _packed(rows, size, generator) -> dict:
    """Pixels one after another, with their places."""
    tokens = size[0] * size[1]
    call = _call(rows, generator, hidden_states=torch.randn(rows, tokens, 6, generator=generator))
    places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in size))
    ids = {"img_ids": places, "txt_ids": torch.zeros(TOKENS, 3)}
    return call | ids | {"timestep": call["timestep"] / 1000}


def _guided(rows, size, generator) -> dict:
    return _packed(rows, size, generator) | {"guidance": torch.tensor([3.5, 1.0, 7.0, 0.0])[:rows]}


_SIZES = ((8, 8), (6, 14))
JOINT = {
    "sd3": Network("SD3Transformer2DModel", _SD3, _image, _SIZES),
    "sd3.5": Network("SD3Transformer2DModel", _SD3, _image, _SIZES, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))),
    "sd3-layer-norm": Network("SD3Transformer2DModel", _SD3, _image, ((4, 10),), dict(qk_norm="layer_norm", num_layers=1)),
    "flux": Network("FluxTransformer2DModel", _FLUX, _packed, ((4, 5), (1, 3))),
    "flux-guided": Network("FluxTransformer2DModel", _FLUX, _guided, ((3, 5),), dict(guidance_embeds=True, out_channels=4)),
    "flux-double": Network("FluxTransformer2DModel", _FLUX, _packed, ((2, 3),), dict(num_single_layers=0)),
    "flux-single": Network("FluxTransformer2DModel", _FLUX, _packed, ((2, 3),), dict(num_layers=0)),
}  # fmt: skip
