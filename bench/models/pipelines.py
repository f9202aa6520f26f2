"""Whole calls of diffusers pipelines at published sizes, with random weights: from a prompt or a class to a picture."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.models.architectures import dit, sd15, seeded

STEPS = 20


@dataclass(frozen=True)
class Pipeline:
    """How a pipeline is made and called.

    build      the same weights every time, float32
    arguments  of a call, besides the number of steps, the generator and the output type
    denoiser   the component that the loop calls
    peer       optimum-intel's class of such pipelines, if it has one
    """

    build: Callable[[], object]
    arguments: dict = field(hash=False)
    denoiser: str
    peer: str | None = None

    def __call__(self, pipe) -> torch.Tensor:
        """One picture, `[1, height, width, 3]` in 0..1."""
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipe(**self.arguments, num_inference_steps=STEPS, generator=generator, output_type="np").images
        )


def stable_diffusion():
    """Stable Diffusion 1.5: CLIP ViT-L text encoder, UNet of 860 M parameters, the decoder of its latents."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {
        "vae": seeded(_autoencoder),
        "text_encoder": seeded(_text_encoder),
        "tokenizer": _tokenizer(),
        "unet": seeded(sd15),
        "scheduler": DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }
    return _quiet(StableDiffusionPipeline(**parts, **none))


def dit_xl2():
    """DiT-XL/2 at 256 pixels with its decoder."""
    from diffusers import DiTPipeline, DPMSolverMultistepScheduler

    transformer = seeded(lambda: dit(16, 72, 28, 32, 1000))
    return _quiet(DiTPipeline(transformer, seeded(_autoencoder), DPMSolverMultistepScheduler()))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _autoencoder():
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)


def _text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=768))


def _tokenizer():
    """One token per character: made without files."""
    from transformers import CLIPTokenizer

    letters = [c for c in string.printable if not c.isspace()]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(c + "</w>" for c in letters), *ends]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


_PROMPT = {"prompt": "a lighthouse in a storm, oil on canvas", "negative_prompt": "blurred"}
PIPELINES = {
    "sd15_pipeline": Pipeline(
        stable_diffusion,
        {**_PROMPT, "height": 256, "width": 256, "guidance_scale": 7.5},
        "unet",
        "OVStableDiffusionPipeline",
    ),
    "dit_xl2_pipeline": Pipeline(dit_xl2, {"class_labels": [207], "guidance_scale": 4.0}, "transformer"),
}
