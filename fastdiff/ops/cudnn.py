"""Convolutions by cuDNN through torch, channels last, and their last steps in one pass of ours."""

import torch
import torch.nn.functional as F

from fastdiff.ops import memory, native
from fastdiff.ops.conv2d_call import output_shape
from fastdiff.ops.packing import padded_channels, refuse_panels

Tensor = torch.Tensor


def cudnn_missing() -> str | None:
    """Why cuDNN cannot run here at all, or None."""
    if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
        return "torch sees no CUDA GPU with cuDNN"
    return native.triton_missing()


def refuse_conv2d(
    x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype
) -> str | None:
    """What cuDNN serves worse than a kernel that fuses, or not at all; None for the rest.

    float32 is left out because cuDNN rounds it to TF32 unless the user forbids it.
    """
    left, right, top, bottom = padding
    if refusal := refuse_panels(weight):
        return refusal
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype or out_dtype != x.dtype:
        return "x, weight and result must be of one 16-bit type"
    if x2 is not None or upsample != 1 or left != right or top != bottom:
        return "a second segment, upsampling and uneven padding would need a copy of x"
    if emb is not None or residual is not None:
        return "rounds to 16 bits before emb and residual are added"
    return None if x.numel() else "x must have elements"


def channels_last(weight: Tensor, out_channels: int, channels: int, kernel: int) -> Tensor:
    """A packed weight of one segment as [N, C, k, k] where it lies; channels without padding are what cuDNN reads."""
    (padded,) = padded_channels(weight, [channels], kernel)
    taps = weight[:out_channels, : kernel * kernel * padded].view(out_channels, kernel, kernel, padded)
    return taps[..., :channels].permute(0, 3, 1, 2)


def run_conv2d(
    x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype
) -> Tensor:
    """`conv2d` by cuDNN; its sums are rounded to 16 bits before the bias is added in float32."""
    planes = channels_last(weight, out_channels, x.shape[3], kernel)
    y = F.conv2d(x.permute(0, 3, 1, 2), planes, stride=stride, padding=(padding[2], padding[0])).permute(0, 2, 3, 1)
    if bias is None:
        return y.contiguous()
    from fastdiff.kernels.conv2d_launch import finish_triton

    shape = output_shape(x, out_channels, kernel, stride, padding, upsample)
    out = memory.empty(shape, out_dtype, x.device)
    finish_triton(y.contiguous(), 1, [None, None], None, bias, None, None, None, out)
    return out
