"""What quantized layers share: plain buffers in the canonical layout, and what happens to activations on the way in."""

import torch
from torch import nn

from fastdiff.quant import formats
from fastdiff.quant.activations import fake_quantize
from fastdiff.quant.kernels import tables
from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import Scheme
from fastdiff.quant.steps import StepContext

Tensor = torch.Tensor

_OPTIONAL = ("weight_zero", "weight_scale2", "bias", "input_scale", "input_zero")


class QLayer(nn.Module):
    """A layer whose weight is codes. Moving to a device moves everything; a change of dtype never touches its buffers.

    weight           int8 or float8 [N, K] (convolutions [N, kh, kw, C]), or uint8 [N, K / 2] with two 4-bit codes a byte
    weight_scale     float32 [N], or [N, K / group]
    weight_zero      uint8 like weight_scale, or None;  weight_scale2  float32 [1], or None
    bias             float32 [N], or None
    input_scale      float32 [1] or [S] (per step), or None for dynamic or unquantized activations
    input_zero       uint8 like input_scale, or None
    """

    def __init__(self, quantized: QTensor, bias: Tensor | None, scheme: Scheme) -> None:
        nn.Module.__init__(self)  # subclasses pass for torch's own layers, whose parameters they don't have
        self.scheme = scheme
        self.in_features = quantized.codes.shape[1]
        self.out_features = quantized.codes.shape[0]
        self.steps: StepContext | None = None
        self._input_enabled = True
        self._prepared = None
        self.revision = 0
        scale, zero = quantized.scale, quantized.zero
        flat = scale.shape[1] == 1
        self.register_buffer("weight", self._stored(quantized.codes))
        self.register_buffer("weight_scale", (scale[:, 0] if flat else scale).float().contiguous())
        values = {
            "weight_zero": None if zero is None else (zero[:, 0] if flat else zero).contiguous(),
            "weight_scale2": None if quantized.scale2 is None else quantized.scale2.reshape(1),
            "bias": None if bias is None else bias.detach().float().clone(),
        }
        for name in _OPTIONAL:
            self.register_buffer(name, values.get(name))

    def set_input_range(self, scale: Tensor, zero: Tensor | None, steps: StepContext | None) -> None:
        """Fixes the range of the activations: [1], or one per step of `steps`."""
        device = self.weight.device
        self.input_scale, self.steps = scale.float().to(device), steps
        self.input_zero = None if zero is None else zero.to(device)
        self.forget_prepared()

    @property
    def static_tables(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of static activations as ops.quantize_static wants them, [1] or [S]."""
        return tables(self)

    def enable_input(self, enabled: bool) -> None:
        """Switches the quantization of activations, for calibration."""
        self._input_enabled = enabled
        self.forget_prepared()

    def set_codes(self, quantized: QTensor) -> None:
        """Replaces the codes; scales stay."""
        self.weight.copy_(self._stored(quantized.codes))
        self.forget_prepared()

    def transformed(self, x: Tensor) -> Tensor:
        """The activations in the coordinates in which they are quantized."""
        return x

    def codes(self) -> QTensor:
        """The weight as a QTensor of one code per element."""
        codes = self.weight.flatten(1)
        if self.scheme.weight.bits == 4:
            codes = formats.unpack_nibbles(codes, self.in_features, signed=self.scheme.weight.dtype == "int4")
        column = lambda v: None if v is None else v.reshape(self.out_features, -1)
        return QTensor(
            codes, column(self.weight_scale), column(self.weight_zero), self.scheme.weight, self.weight_scale2
        )

    def values_of(self, x: Tensor) -> Tensor:
        """The activations that remain after quantization, float32."""
        spec = self.scheme.input
        if spec is None or not self._input_enabled:
            return x.float()
        if spec.dynamic:
            return self.dynamic_values(x)
        scale, zero = self.input_range(x)
        return fake_quantize(x, spec, scale, zero)

    def input_range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for the rows of x, shaped to broadcast against it."""
        if self.steps is None:
            return self.input_scale, self.input_zero
        of = lambda table: None if table is None else self.steps.of(table, x)
        return of(self.input_scale), of(self.input_zero)

    def dynamic_values(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scheme.input)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forget_prepared(self) -> None:
        """Drops what was computed from the buffers; `revision` tells others that did so."""
        self._prepared = None
        self.revision += 1

    def extra_repr(self) -> str:
        scheme = self.scheme
        inputs = "float" if scheme.input is None else scheme.input.dtype
        return f"{self.in_features}, {self.out_features}, weight={scheme.weight.dtype}, input={inputs}"

    def _stored(self, codes: Tensor) -> Tensor:
        return formats.pack_nibbles(codes) if self.scheme.weight.bits == 4 else codes

    def _apply(self, fn, recurse: bool = True):
        self.forget_prepared()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.forget_prepared()
        super()._load_from_state_dict(*args, **kwargs)


def qlayers(net: nn.Module) -> dict[str, QLayer]:
    """All quantized layers by name, the parts of split ones one by one."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QLayer)}
