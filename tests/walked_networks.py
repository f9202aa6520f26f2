"""Small networks of diffusers that belong to no lowered family, and a call of each."""

import diffusers
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn

Call = tuple[nn.Module, dict]


def outputs(net: nn.Module, call: dict) -> list[torch.Tensor]:
    """All tensors that a call gives, in order."""
    with torch.no_grad():
        given = net(**call | {"return_dict": False})
    return [t for part in given for t in (part if isinstance(part, list | tuple) else [part]) if t is not None]


def _with_weights(net: nn.Module) -> nn.Module:
    """None of them zero, as some of ControlNets are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _flux_control() -> Call:
    net = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    call = {"hidden_states": _normal(2, 16, 4), "controlnet_cond": _normal(2, 16, 4) + 1, "img_ids": grid}
    call |= {"encoder_hidden_states": _normal(2, 6, 32), "pooled_projections": _normal(2, 32), "guidance": None}
    return _with_weights(net), call | {"timestep": torch.tensor([0.5, 0.2]), "txt_ids": torch.zeros(6, 3)}


def _sd3_control() -> Call:
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        extra_conditioning_channels=0, qk_norm="rms_norm",
    )  # fmt: skip
    call = {"hidden_states": _normal(2, 4, 8, 8), "controlnet_cond": _normal(2, 4, 8, 8) + 1}
    call |= {"encoder_hidden_states": _normal(2, 6, 32), "pooled_projections": _normal(2, 64)}
    return _with_weights(net), call | {"timestep": torch.tensor([5, 3])}


def _cogvideox() -> Call:
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = _normal(48, 8).repeat_interleave(2, -1)
    call = {"hidden_states": _normal(2, 3, 4, 8, 8), "encoder_hidden_states": _normal(2, 8, 8)}
    return _with_weights(net), call | {
        "timestep": torch.tensor([5, 3]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina2() -> Call:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
        cap_feat_dim=8, scaling_factor=1.0,
    )  # fmt: skip
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    call = {"hidden_states": _normal(2, 4, 8, 8), "encoder_hidden_states": _normal(2, 6, 8)}
    return _with_weights(net), call | {"timestep": torch.tensor([0.5, 0.3]), "encoder_attention_mask": mask}


class _Streams(nn.Module):
    """Attention of SD3 over two streams of tokens, of a block in the middle and of the last one."""

    def __init__(self) -> None:
        super().__init__()
        joint = dict(heads=2, dim_head=8, context_pre_only=False, bias=True, qk_norm="rms_norm")
        streams = dict(query_dim=16, cross_attention_dim=None, added_kv_proj_dim=16, out_dim=16, **joint)
        self.middle = Attention(**streams, processor=JointAttnProcessor2_0())
        self.last = Attention(**streams | {"context_pre_only": True}, processor=JointAttnProcessor2_0())

    def forward(self, x: torch.Tensor, context: torch.Tensor, return_dict: bool = False) -> tuple:
        return self.last(*self.middle(x, encoder_hidden_states=context))


def _streams() -> Call:
    return _with_weights(_Streams()), {"x": _normal(2, 9, 16), "context": _normal(2, 5, 16)}


WALKED = {"Joint": _streams, "FluxControlNet": _flux_control, "SD3ControlNet": _sd3_control, "CogVideoX": _cogvideox}
WALKED |= {"Lumina2": _lumina2}
