"""Diffusers pipelines of the nine reference families, of a few thousand parameters, made without files or network."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_text import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from torch import nn


@dataclass(frozen=True)
class Tiny:
    """A pipeline and how it is called.

    build      makes the pipeline; the same weights every time
    arguments  of a call, besides generator, number of steps and output type
    """

    build: Callable[[], object]
    arguments: dict

    def __call__(self, pipe, seed: int = 0, steps: int = 3, rows: int = 1, **others) -> torch.Tensor:
        """Latents of a run (of DiT, which has no such output, the pictures), or pictures for another `output_type`."""
        generator = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
        call = {"num_inference_steps": steps, "output_type": "latent"} | self.arguments | others
        call = {
            name: _repeat(value, rows) if "prompt" in name or "labels" in name else value
            for name, value in call.items()
        }
        with torch.no_grad():
            out = pipe(**call, generator=generator if rows > 1 else generator[0], return_dict=False)[0]
        return torch.as_tensor(out)


def _repeat(value: object, rows: int) -> object:
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(rows, dim=0)
    if isinstance(value, list):
        return value * rows
    return value if value is None or rows == 1 else [value] * rows


def denoiser(pipe) -> nn.Module:
    """The module that a pipeline's loop calls."""
    return pipe.components.get("unet") or pipe.components["transformer"]


def one_call(pipe, tiny: Tiny, rows: int, run: int = 0) -> dict:
    """The arguments of the first call of the denoiser in a run, by name; every row has its own timestep."""
    net, seen = denoiser(pipe), []
    names = list(inspect.signature(type(net).forward).parameters)[1:]

    def look(_, args, kwargs):
        seen.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = net.register_forward_pre_hook(look, with_kwargs=True)
    tiny(pipe, seed=run, steps=1, rows=rows)
    handle.remove()
    first = seen[0]
    count = (first["sample"] if "sample" in first else first["hidden_states"]).shape[0]
    scale = 1 / 1000 if "img_ids" in first else 1
    times = torch.tensor([950.0, 700.0, 400.0, 50.0, 10.0, 1.0])[:count] * scale
    return first | {"timestep": times, "return_dict": False}


def some_rows(call: dict, rows: slice) -> dict:
    """The same call with some of its rows."""
    count = call["timestep"].shape[0]

    def cut(name: str, value: object) -> object:
        if isinstance(value, dict):
            return {key: cut(key, inner) for key, inner in value.items()}
        of_batch = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == count
        return value[rows] if of_batch and name not in ("img_ids", "txt_ids") else value

    return {name: cut(name, value) for name, value in call.items()}


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _liven(net: nn.Module) -> nn.Module:
    """Weights of a size that matters in every layer: modulations and last layers of a fresh network are near zero."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5 * max(p[0].numel(), 4) ** -0.5 if p.dim() > 1 else 0.1)
    for module in net.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def _vae():
    import diffusers

    torch.manual_seed(2)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(block_out_channels=(8, 16), norm_num_groups=2, sample_size=16, latent_channels=4, shift_factor=0.1)
    return diffusers.AutoencoderKL(**blocks, **sizes).eval()


def _stable_diffusion():
    import diffusers

    unet = diffusers.UNet2DConditionModel(**_UNET, cross_attention_dim=16, attention_head_dim=4)
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    parts = dict(vae=_vae(), text_encoder=clip_encoder(16), tokenizer=clip_tokenizer(), unet=_liven(unet))
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return _quiet(diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **none))


_UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)


def _stable_diffusion_xl():
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    text = dict(text_encoder=clip_encoder(16), text_encoder_2=clip_encoder(16, projection=16))
    tokenizers = dict(tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer())
    parts = dict(vae=_vae(), unet=_liven(unet), scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False)
    return _quiet(diffusers.StableDiffusionXLPipeline(**text, **tokenizers, **parts))


def _stable_diffusion_3():
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    text = dict(text_encoder=clip_encoder(16, 16), text_encoder_2=clip_encoder(16, 16), text_encoder_3=t5_encoder(32))
    tokenizers = dict(tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = dict(transformer=_liven(transformer), vae=_vae(), scheduler=scheduler)
    return _quiet(diffusers.StableDiffusion3Pipeline(**text, **tokenizers, **parts))


def _flux():
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    text = dict(text_encoder=clip_encoder(16), text_encoder_2=t5_encoder(32))
    tokenizers = dict(tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict(transformer=_liven(transformer), vae=_vae(), scheduler=scheduler)
    return _quiet(diffusers.FluxPipeline(**text, **tokenizers, **parts))


def _pixart_sigma():
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    text = dict(text_encoder=t5_encoder(16), tokenizer=t5_tokenizer())
    parts = dict(transformer=_liven(transformer), vae=_vae(), scheduler=diffusers.DPMSolverMultistepScheduler())
    return _quiet(diffusers.PixArtSigmaPipeline(**text, **parts))


def _sana():
    import diffusers

    transformer = diffusers.SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
    )
    torch.manual_seed(2)
    blocks = dict(encoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8))
    blocks |= dict(decoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_out_channels=(8, 8))
    layers = dict(encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), attention_head_dim=2)
    scales = dict(encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)))
    types = dict(downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm")
    vae = diffusers.AutoencoderDC(latent_channels=4, **blocks, **layers, **scales, **types, decoder_act_fns="silu")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict(transformer=_liven(transformer), vae=vae.eval(), scheduler=scheduler)
    return _quiet(diffusers.SanaPipeline(tokenizer=None, text_encoder=None, **parts))


def _embedded(width: int) -> dict:
    """Embedded prompts, for an encoder that is too complex to be made small."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda: torch.randn(1, 12, width, generator=generator)
    mask, negative_mask = torch.ones(1, 12), (torch.arange(12) < 3)[None].float()
    masks = dict(prompt_attention_mask=mask, negative_prompt_attention_mask=negative_mask)
    return dict(prompt=None, negative_prompt=None, prompt_embeds=normal(), negative_prompt_embeds=normal(), **masks)


def _dit():
    import diffusers

    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=1000,
    )
    parts = dict(transformer=_liven(transformer), vae=_vae(), scheduler=diffusers.DDIMScheduler())
    return _quiet(diffusers.DiTPipeline(**parts))


def _ltx():
    import diffusers

    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    text = dict(text_encoder=t5_encoder(16), tokenizer=t5_tokenizer())
    parts = dict(
        transformer=_liven(transformer), vae=vae.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    return _quiet(diffusers.LTXPipeline(**text, **parts))


def _wan():
    import diffusers

    transformer = diffusers.WanTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = dict(text_encoder=t5_encoder(16, "UMT5"), tokenizer=t5_tokenizer())
    parts = dict(
        transformer=_liven(transformer), vae=vae.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    return _quiet(diffusers.WanPipeline(**text, **parts))


_TEXT = dict(prompt="a lighthouse", height=16, width=16)
TINY = {
    "SD1.5": Tiny(_stable_diffusion, _TEXT | dict(negative_prompt="fog", guidance_scale=5.0)),
    "SDXL": Tiny(_stable_diffusion_xl, _TEXT | dict(guidance_scale=5.0)),
    "SD3": Tiny(_stable_diffusion_3, _TEXT | dict(guidance_scale=5.0, max_sequence_length=16)),
    "FLUX": Tiny(_flux, _TEXT | dict(guidance_scale=3.5, max_sequence_length=16)),
    "PixArt-Sigma": Tiny(
        _pixart_sigma, _TEXT | dict(clean_caption=False, max_sequence_length=16, use_resolution_binning=False)
    ),
    "Sana": Tiny(_sana, dict(height=32, width=32, clean_caption=False, use_resolution_binning=False, **_embedded(8))),
    "DiT": Tiny(_dit, dict(class_labels=[1])),
    "LTX": Tiny(_ltx, _TEXT | dict(height=32, width=32, num_frames=9, max_sequence_length=16)),
    "Wan": Tiny(_wan, _TEXT | dict(num_frames=5, guidance_scale=4.0, max_sequence_length=16)),
}
