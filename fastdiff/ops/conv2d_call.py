"""What the convolutions share: shapes, checks, the last steps of their references, and the call of the kernel."""

import torch
import torch.nn.functional as F

from fastdiff.ops import native
from fastdiff.ops.packing import in_rows, packed_k
from fastdiff.ops.promote import FLOATS


def output_size(size: int, kernel: int, stride: int, before: int, after: int, upsample: int) -> int:
    """Rows or columns of the result, for `size` of the input."""
    return (size * upsample + before + after - kernel) // stride + 1


def output_shape(x, out_channels: int, kernel: int, stride: int, padding: list[int], upsample: int) -> tuple[int, ...]:
    """Shape of the result, [B, Ho, Wo, N]."""
    left, right, top, bottom = padding
    height = output_size(x.shape[1], kernel, stride, top, bottom, upsample)
    width = output_size(x.shape[2], kernel, stride, left, right, upsample)
    return x.shape[0], height, width, out_channels


def check_images(name: str, images: list[torch.Tensor], kinds: tuple[torch.dtype, ...]) -> None:
    """Raises unless the images share batch, height, width and device, and are contiguous with a dtype of `kinds`."""
    first = images[0]
    for x in images:
        if x.dtype not in kinds:
            raise TypeError(f"{name}: x must be one of {[str(k) for k in kinds]}, got {x.dtype}")
        if x.dim() != 4 or x.shape[:3] != first.shape[:3] or x.device != first.device:
            raise ValueError(
                f"{name}: x and x2 must be [B, H, W, C] with one B, H, W and device, "
                f"got {[list(i.shape) for i in images]} on {[str(i.device) for i in images]}"
            )
        if 0 in x.shape[1:] or not x.is_contiguous():
            raise ValueError(
                f"{name}: x must be contiguous and of at least one pixel and channel, "
                f"got shape {list(x.shape)}, strides {x.stride()}; permute an NCHW tensor with ops.copy"
            )


def check_geometry(name: str, x: torch.Tensor, kernel: int, stride: int, padding: list[int], upsample: int) -> None:
    """Raises where sizes make no convolution."""
    if kernel < 1 or stride < 1 or upsample not in (1, 2):
        raise ValueError(
            f"{name}: kernel and stride must be >= 1 and upsample 1 or 2, got {kernel}, {stride}, {upsample}"
        )
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"{name}: padding must be four numbers >= 0 (left, right, top, bottom), got {padding}")
    shape = output_shape(x, 1, kernel, stride, padding, upsample)
    if min(shape[1:3]) < 1:
        raise ValueError(f"{name}: kernel {kernel} is larger than the padded image of shape {list(x.shape)}")


def check_epilogue(name: str, shape: tuple[int, ...], bias, emb, residual, device: torch.device) -> None:
    """Raises unless bias, emb and residual fit a result of this shape."""
    batch, n = shape[0], shape[3]
    for what, value, wanted in (("bias", bias, (n,)), ("emb", emb, (batch, n)), ("residual", residual, shape)):
        if value is not None and (value.shape != wanted or value.device != device):
            raise ValueError(
                f"{name}: {what} must be {list(wanted)} on {device}, got {list(value.shape)} on {value.device}"
            )
    for what, value in (("bias", bias), ("emb", emb)):
        if value is not None and (value.dtype != torch.float32 or (value.shape[-1] > 1 and value.stride(-1) != 1)):
            raise TypeError(f"{name}: {what} must be float32 with contiguous last dimension, got {value.dtype}")
    if residual is not None and (residual.dtype not in FLOATS or not residual.is_contiguous()):
        raise TypeError(f"{name}: residual must be a contiguous float tensor, got {residual.dtype}")


def check_weight(name: str, weight: torch.Tensor, channels: list[int], out_channels: int, kernel: int) -> None:
    """Raises unless a packed weight has the shape that pack_conv gives it."""
    rows = in_rows(weight)
    group = 16 // weight.element_size() if rows else packed_k(weight.dtype)
    steps = sum(-(-c // group) for c in channels) * kernel * kernel
    panels = -(-out_channels // 16)
    wanted = (16 * panels, steps * group) if rows else (panels, steps, 16, group)
    if tuple(weight.shape) != wanted or not weight.is_contiguous():
        raise ValueError(
            f"{name}: weight must be packed as {list(wanted)}, got {list(weight.shape)}; pack it with pack_conv()"
        )


def refuse_pixels(x: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """Why the Triton kernel cannot number the pixels, or None."""
    most = max(x.shape[0] * x.shape[1] * x.shape[2], shape[0] * shape[1] * shape[2])
    return None if most < 2**31 else f"takes less than 2^31 pixels, got {most}"


def convolve(x, weight, stride: int, padding: list[int], upsample: int) -> torch.Tensor:
    """Plain torch: [B, H, W, C] images and [N, C, k, k] weights of one dtype to [B, Ho, Wo, N]."""
    planes = x.permute(0, 3, 1, 2)
    if upsample == 2:
        planes = planes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(F.pad(planes, padding), weight, stride=stride).permute(0, 2, 3, 1)


def finish(y, bias, emb, residual) -> torch.Tensor:
    """Adds bias, time embedding and residual in the precision of y, in this order."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if emb is not None:
        y = y + emb.to(y.dtype)[:, None, None, :]
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y


def optional(value: torch.Tensor | None) -> int:
    """The address of a tensor, or 0."""
    return 0 if value is None else value.data_ptr()


def kind(value: torch.Tensor | None) -> int:
    """The type code of a tensor, or 0."""
    return 0 if value is None else native.TYPE_CODES[value.dtype]


def run_native(segments, weight, sums, scales, out, sizes, bias, emb, residual, out_scale) -> None:
    """Calls the kernel: segments are (x, scale | None, number of scales), sizes those of the binding."""
    native.cpu().conv2d(
        [(x.data_ptr(), kind(x), x.shape[3], optional(scale), count) for x, scale, count in segments],
        (weight.data_ptr(), kind(weight), optional(scales), optional(sums)),
        (out.data_ptr(), kind(out), optional(out_scale)),
        (optional(bias), optional(emb), 0 if emb is None else emb.stride(0), optional(residual), kind(residual)),
        sizes,
    )
