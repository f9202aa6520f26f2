"""Whether a diffusers attention layer computes what its projections and norms say, and nothing else."""

from torch import nn

from fastdiff.models.lower.lowered import require

_EXTRAS = ("group_norm", "spatial_norm", "norm_cross")
_SECOND_STREAM = ("added_kv_proj_dim", "add_k_proj", "to_add_out")


def check_attention(name: str, attention: nn.Module, processors: set[str], joint: bool = False) -> None:
    """Raises UnsupportedError where a processor or an option changes the result.

    joint  the layer projects a second stream of tokens too
    """
    processor = type(attention.processor).__name__
    require(processor in processors, f"{name} has the processor {processor}")
    for part in _EXTRAS if joint else _EXTRAS + _SECOND_STREAM:
        require(getattr(attention, part, None) is None, f"{name} has {part}")
    require(not getattr(attention, "residual_connection", False), f"{name} has a residual of its own")
    require(getattr(attention, "rescale_output_factor", 1.0) == 1.0, f"{name} scales its result")
    require(not getattr(attention, "fused_projections", False), f"{name} has fused projections")
    same = attention.to_k.out_features == attention.to_v.out_features == attention.to_q.out_features
    require(same, f"{name} shares keys among heads")
    scale = getattr(attention, "scale", None)
    usual = (attention.to_q.out_features // attention.heads) ** -0.5
    require(scale is None or abs(scale / usual - 1) < 1e-6, f"{name} has the scale {scale}")
