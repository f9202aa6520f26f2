"""Group norm of images whose channels come first."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.group_norm import check_group_norm, finish, images, normalize, refuse_group_norm, run_group_norm
from fastdiff.ops.registry import op


def _check(x, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype) -> None:
    if x.dim() < 2:
        raise ValueError(f"group_norm_nchw: x must be [B, C, ...], got {list(x.shape)}")
    rest = (groups, weight, bias, activation, scale, shift, out_scale, out_dtype)
    check_group_norm("group_norm_nchw", x, x.shape[1], *rest)


@op(check=_check)
def group_norm_nchw(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Normalizes groups of channels of [B, C, ...], scales, shifts, activates and quantizes.

    x    [B, C, ...] float32, bfloat16 or float16, contiguous
    out  x.shape, out_dtype

    Everything else as in group_norm.
    """
    B, C = x.shape[:2]
    y = normalize(x.reshape(B, groups, C // groups, x.shape[2:].numel()), eps).reshape(x.shape)
    ones = (1,) * (x.dim() - 2)
    per_channel = lambda v: v.reshape(*v.shape, *ones)
    return finish(x, y, per_channel, weight, bias, activation, scale, shift, out_scale, out_dtype)


def _refuse(x, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype) -> str | None:
    return refuse_group_norm((x,), (weight, bias, scale, shift))


@group_norm_nchw.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype):
    out = memory.empty(x.shape, out_dtype)
    if out.numel():
        rest = (weight, bias, eps, activation, scale, shift, out_scale)
        kernel, pixels = native.cpu().group_norm_nchw, x.shape[2:].numel()
        run_group_norm(kernel, out, x, None, (x.shape[1], 0), pixels, groups, *rest)
    return out


@group_norm_nchw.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype):
    from fastdiff.kernels.group_norm import group_norm_triton

    out = memory.empty(x.shape, out_dtype, x.device)
    group_norm_triton(out, x, None, False, groups, weight, bias, eps, activation, scale, shift, out_scale)
    return out


@group_norm_nchw.sample
def _(device):
    for k, (x, _, groups, *rest) in enumerate(images(device)):
        x = x.permute(0, 3, 1, 2).contiguous()
        x = x.flatten(2) if k % 4 == 0 else x
        yield x, groups, *rest, None, (torch.float32, torch.bfloat16, torch.float16)[k % 3 if k < 21 else 0]
        if x.numel() < 1000:
            yield x, groups, *rest, torch.tensor([0.02], device=device), torch.int8
