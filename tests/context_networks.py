"""Small transformers that read a text, one or more of every family, and calls that suit them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

TEXT, TOKENS = 16, 9  # width and length
_PIXART = dict(
    num_attention_heads=3, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
    cross_attention_dim=72, caption_channels=TEXT, attention_bias=True,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
)  # fmt: skip
_WAN = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=32, ffn_dim=40,
    num_layers=2, rope_max_seq_len=32,
)  # fmt: skip
_LTX = dict(
    in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=10, cross_attention_dim=40, num_layers=2,
    caption_channels=TEXT,
)  # fmt: skip
_SANA = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, num_layers=2, num_cross_attention_heads=2,
    cross_attention_head_dim=24, cross_attention_dim=48, caption_channels=TEXT, mlp_ratio=1.5, sample_size=8, patch_size=1,
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A configuration of a diffusers class and how it is called.

    inputs  (rows, size, generator) -> the arguments of forward; size is one of `sizes`
    """

    kind: str
    config: dict
    inputs: Callable[..., dict]
    sizes: tuple[tuple[int, ...], ...]
    changes: dict = field(default_factory=dict)

    def build(self, **changes) -> nn.Module:
        """The network, with weights of a size that matters in every layer."""
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        net = getattr(diffusers, self.kind)(**{**self.config, **self.changes, **changes})
        for name, p in net.named_parameters():
            table = "scale_shift_table" in name or p.dim() < 2
            nn.init.normal_(p, std=0.3 if table else max(p[0].numel(), 4) ** -0.5)
        for module in net.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return net.eval()

    def call(self, rows: int = 2, size: tuple[int, ...] | None = None, seed: int = 0) -> dict:
        """Arguments of forward, the same for the same seed."""
        return self.inputs(rows, size or self.sizes[0], torch.Generator().manual_seed(seed))


def _times(rows: int) -> torch.Tensor:
    return torch.tensor([500, 20, 980, 3])[:rows]


def _text(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, TOKENS, TEXT, generator=generator)


def _mask(rows: int) -> torch.Tensor:
    """Rows with 3, 5 and 7 tokens that count, one of them not at the start."""
    mask = (torch.arange(TOKENS) < torch.tensor([3, 5, 7, 7])[:rows, None]).float()
    mask[-1, 0] = 0
    return mask


def _image(rows, size, generator) -> dict:
    return {
        "hidden_states": torch.randn(rows, 4, *size, generator=generator),
        "timestep": _times(rows),
        "encoder_hidden_states": _text(rows, generator),
        "encoder_attention_mask": _mask(rows),
    }


def _conditioned(rows, size, generator) -> dict:
    sizes = torch.tensor([[512.0, 768.0], [1024.0, 1024.0], [300.0, 200.0], [64.0, 64.0]])[:rows]
    added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    return _image(rows, size, generator) | {"added_cond_kwargs": added}


def _video(rows, size, generator) -> dict:
    call = _image(rows, size, generator)
    del call["encoder_attention_mask"]
    return call


def _guided(rows, size, generator) -> dict:
    return _image(rows, size, generator) | {"guidance": torch.tensor([0.45, 0.1, 0.9, 0.2])[:rows]}


def _tokens(rows, size, generator) -> dict:
    frames, height, width = size
    sample = torch.randn(rows, frames * height * width, 8, generator=generator)
    place = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (0.3, 32, 32)}
    return _image(rows, size, generator) | {"hidden_states": sample} | place


def _placed(rows, size, generator) -> dict:
    call = _tokens(rows, size, generator)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del call[name]
    return call | {"video_coords": 100 * torch.rand(rows, 3, call["hidden_states"].shape[1], generator=generator)}


NETWORKS = {
    "pixart-sigma": Network("PixArtTransformer2DModel", _PIXART, _image, ((8, 8), (6, 10))),
    "pixart-alpha": Network(
        "PixArtTransformer2DModel", _PIXART, _conditioned, ((8, 8), (2, 14)), {"use_additional_conditions": True}
    ),
    "wan": Network("WanTransformer3DModel", _WAN, _video, ((3, 6, 8), (1, 2, 10))),
    "wan-unnormed": Network("WanTransformer3DModel", _WAN, _video, ((2, 4, 4),), {"cross_attn_norm": False}),
    "ltx": Network("LTXVideoTransformer3DModel", _LTX, _tokens, ((3, 2, 5), (1, 1, 7))),
    "ltx-placed": Network(
        "LTXVideoTransformer3DModel", _LTX, _placed, ((2, 3, 4),), {"norm_elementwise_affine": True}
    ),
    "sana": Network("SanaTransformer2DModel", _SANA, _image, ((8, 8), (5, 7))),
    "sana-guided": Network(
        "SanaTransformer2DModel",
        _SANA,
        _guided,
        ((4, 6),),
        {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "interpolation_scale": 1},
    ),
}


def predict(net: nn.Module, call: dict) -> torch.Tensor:
    """The prediction of the network."""
    with torch.no_grad():
        return net(**call).sample


def truth(net: nn.Module, call: dict) -> torch.Tensor:
    """What a float64 copy of the network computes."""
    wide = lambda value: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    call = {name: wide(value) for name, value in call.items()}
    return predict(copy.deepcopy(net).double(), call)
