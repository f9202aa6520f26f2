"""What the linear layers share: checks of their arguments, the epilogue in torch, and the native call."""

import torch
import torch.nn.functional as F

from fastdiff.ops import memory, native
from fastdiff.ops.packing import refuse_panels

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "swiglu": F.silu,
}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
PAIRS = ("geglu", "geglu_tanh", "swiglu")


def row_stride(t: torch.Tensor) -> int | None:
    """The one stride between the rows of [..., K], in elements, or None where there is none."""
    if t.is_contiguous():
        return t.shape[-1]
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        return None
    stride = span = None
    for size, step in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != span:
            return None
        span = step * size
    return t.shape[-1] if stride is None else stride


def columns(out_features: int, activation: str) -> int:
    """Columns of the result: half of the outputs where an activation takes pairs."""
    return out_features // 2 if activation in PAIRS else out_features


def check_call(op, x, out_features, padded, activation, bias, gate, residual, out_scale, out_dtype) -> None:
    """Raises where the arguments that all linear layers have do not fit together."""
    if activation not in _CODES:
        raise ValueError(f"{op}: activation must be one of {', '.join(_CODES)}, got {activation!r}")
    N = columns(out_features, activation)
    wide = padded if activation in PAIRS else N
    if padded != (32 * -(-N // 16) if activation in PAIRS else 16 * -(-N // 16)):
        raise ValueError(
            f"{op}: weight has {padded // 16} panels of 16 columns, which is not what {out_features} outputs need"
        )
    if row_stride(x) is None:
        raise ValueError(f"{op}: x must be rows with one stride, got strides {x.stride()}; call contiguous()")
    if bias is not None and (bias.shape != (wide,) or not bias.is_contiguous()):
        raise ValueError(f"{op}: bias must be contiguous [{wide}], got {list(bias.shape)}")
    if gate is not None:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
        if gate.dim() != 2 or gate.shape[1] != N or gate.stride(1) != 1 or rows % max(gate.shape[0], 1):
            raise ValueError(f"{op}: gate must be [B, {N}] where B divides {rows} rows, got {list(gate.shape)}")
    if residual is not None and (residual.shape != (*x.shape[:-1], N) or row_stride(residual) is None):
        raise ValueError(
            f"{op}: residual must be rows {[*x.shape[:-1], N]} with one stride, got {list(residual.shape)}"
        )
    if out_dtype not in FLOATS and (out_dtype != torch.int8 or out_scale is None):
        raise TypeError(f"{op}: out_dtype must be a float, or int8 with an out_scale, got {out_dtype}")


def check_scales(op, scale, padded, out_features, activation, *groups: int) -> None:
    """Raises where there is not one contiguous scale per column (and group)."""
    wide = [padded if activation in PAIRS else out_features, *groups]
    if list(scale.shape) != wide or not scale.is_contiguous():
        raise ValueError(f"{op}: weight_scale must be contiguous {wide}, got {list(scale.shape)}")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What float16 is multiplied as: bfloat16."""
    return x.to(torch.bfloat16) if x.dtype == torch.float16 else x


def quantize_rows(x: torch.Tensor, x_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and their scales ([..., 1] or [1]) of float rows, in float32: dynamic, or static with a given scale."""
    x = x.float()
    if x_scale is not None:
        return torch.round(x * (1 / x_scale.float())).clamp(-127, 127).nan_to_num(-127), x_scale
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = torch.where(amax.isfinite(), amax * torch.tensor(1 / 127, dtype=torch.float32), torch.nan)
    inverse = torch.where(amax > 0, torch.full_like(amax, 127) / amax, 0)  # 127 / amax would multiply a reciprocal
    codes = torch.round(x * inverse).clamp(-127, 127)
    return torch.where(scale.isnan(), 0, codes), scale


def finish(y, N, bias, activation, gate, residual, out_scale, out_dtype) -> torch.Tensor:
    """The epilogue on scaled sums [..., N padded to 16]; N columns of result. Float64 stays float64."""
    lead = y.shape[:-1]
    if bias is not None:
        y = y + F.pad(bias, (0, y.shape[-1] - bias.numel()))
    if activation in PAIRS:
        value, gated = y.view(*lead, y.shape[-1] // 32, 2, 16).unbind(-2)
        y = (value * ACTIVATIONS[activation](gated)).flatten(-2)[..., :N]
    else:
        y = ACTIVATIONS[activation](y[..., :N])
    if gate is not None:
        rows = lead.numel()
        y = (y.reshape(gate.shape[0], rows // max(gate.shape[0], 1), N) * gate[:, None].to(y.dtype)).view(*lead, N)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if out_dtype == torch.int8:
        return torch.round(y * (1 / out_scale)).clamp(-127, 127).nan_to_num(-127).to(torch.int8).contiguous()
    return y.clone(memory_format=torch.contiguous_format) if y.dtype == torch.float64 else y.to(out_dtype).contiguous()


def run(kernel, x, x_scale, weight, weight_scale, weight_sum, group, out_features, bias, activation, gate, residual,
        out_scale, out_dtype) -> torch.Tensor:  # fmt: skip
    """Calls one of the native linear layers."""
    shape, codes = x.shape, native.TYPE_CODES
    K, N = shape[-1], columns(out_features, activation)
    out = memory.empty_over(residual, (*shape[:-1], N), out_dtype)
    rows = shape[:-1].numel()
    at = lambda t: 0 if t is None else t.data_ptr()
    sums = weight.shape[0] * 16 if activation in PAIRS else out_features
    kernel(
        x.data_ptr(), codes[x.dtype], rows, K, row_stride(x), at(x_scale), int(x_scale is not None and x_scale.numel() > 1),
        weight.data_ptr(), codes.get(weight.dtype, 4), weight.shape[0], at(weight_scale), at(weight_sum), sums, group,
        N, _CODES[activation], at(bias),
        at(gate), 0 if gate is None else gate.stride(0), 1 if gate is None else rows // max(gate.shape[0], 1),
        0 if gate is None else codes[gate.dtype],
        at(residual), 0 if residual is None else row_stride(residual), 0 if residual is None else codes[residual.dtype],
        at(out_scale), out.data_ptr(), codes[out_dtype],
    )  # fmt: skip
    return out


def refuse_triton(x, weight, out_dtype, *scales) -> str | None:
    """Why the Triton kernel cannot serve a call, or None."""
    if torch.float64 in (x.dtype, weight.dtype, out_dtype, *(s.dtype for s in scales)):
        return "computes in float32"
    return refuse_panels(weight)


def run_triton(x, x_scale, weight, weight_scale, group, dtype, out_features, bias, activation, gate, residual,
               out_scale, out_dtype) -> torch.Tensor:  # fmt: skip
    """Calls the Triton kernel; `dtype` is what it multiplies, int8 for codes of x."""
    from fastdiff.kernels.linear_launch import linear_triton

    out = memory.empty((*x.shape[:-1], columns(out_features, activation)), out_dtype, x.device)
    step = 0 if residual is None else row_stride(residual)
    linear_triton(
        out, x, row_stride(x), x_scale, weight, weight_scale, group, dtype, bias, activation, gate, residual, step,
        out_scale,
    )  # fmt: skip
    return out


def triton_codes(x: torch.Tensor, x_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of rows and their scales by Triton kernels, as `quantize_rows` makes them; codes stay what they are."""
    from fastdiff.kernels.linear_expand import static_codes
    from fastdiff.kernels.quantize_rows import quantize_rows_triton

    if x.dtype == torch.int8:
        return x, x_scale
    if x_scale is not None:
        return static_codes(x, x_scale, row_stride(x)), x_scale
    codes = memory.empty(x.shape, torch.int8, x.device)
    scales = memory.empty(x.shape[:-1], torch.float32, x.device)
    quantize_rows_triton(codes, scales, x, row_stride(x))
    return codes, scales
