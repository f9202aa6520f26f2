"""Operations with one contract and several implementations each."""

from fastdiff.ops.activate import activate
from fastdiff.ops.attention import attention, attention_lse
from fastdiff.ops.conv2d import conv2d
from fastdiff.ops.conv2d_w8a8 import conv2d_w8a8
from fastdiff.ops.copy import copy
from fastdiff.ops.depthwise_conv2d import depthwise_conv2d
from fastdiff.ops.gated_norm_modulate import gated_norm_modulate
from fastdiff.ops.geglu import geglu
from fastdiff.ops.gram import gram
from fastdiff.ops.group_norm import group_norm
from fastdiff.ops.group_norm_nchw import group_norm_nchw
from fastdiff.ops.join_heads import join_heads
from fastdiff.ops.linear import linear
from fastdiff.ops.linear_attention import linear_attention
from fastdiff.ops.linear_w4a8 import linear_w4a8
from fastdiff.ops.linear_w4a16 import linear_w4a16
from fastdiff.ops.linear_w8a8 import linear_w8a8
from fastdiff.ops.linear_w8a16 import linear_w8a16
from fastdiff.ops.norm_modulate import norm_modulate
from fastdiff.ops.norm_modulate_int8 import norm_modulate_int8
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.qk_norm_rope import qk_norm_rope
from fastdiff.ops.quantize_rows import quantize_rows
from fastdiff.ops.quantize_static import quantize_static
from fastdiff.ops.registry import OPS, Op, backend
from fastdiff.ops.resample import resample
from fastdiff.ops.scale_channels import scale_channels
from fastdiff.ops.solver_step import solver_step

__all__ = [
    "OPS",
    "Op",
    "activate",
    "attention",
    "attention_lse",
    "backend",
    "conv2d",
    "conv2d_w8a8",
    "copy",
    "depthwise_conv2d",
    "gated_norm_modulate",
    "geglu",
    "gram",
    "group_norm",
    "group_norm_nchw",
    "join_heads",
    "linear",
    "linear_attention",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "norm_modulate",
    "norm_modulate_int8",
    "philox_normal",
    "qk_norm_rope",
    "quantize_rows",
    "quantize_static",
    "resample",
    "scale_channels",
    "solver_step",
]
