"""QLinear: a linear layer on integer codes, with smoothing, rotation and a low-rank branch."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.ops.coded import Coded
from fastdiff.quant.hadamard import rotate
from fastdiff.quant.kernels import coded_linear, linear_kernel
from fastdiff.quant.layer import QLayer
from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import Scheme

Tensor = torch.Tensor


class QLinear(QLayer, nn.Linear):
    """y = W x + b with W = up down + dequantized codes, in the coordinates that smoothing and rotation define.

    The input is divided by `smooth` [K], the low-rank branch takes it from there, then every `rotation` channels are
    rotated, quantized and multiplied with the codes. A kernel of fastdiff.ops computes the product where one exists for
    the formats; else the dequantized weight in float32.

    To others it is a linear layer (peft wraps it in adapters, which run beside the codes), but one without parameters.

    lowrank_down [r, K], lowrank_up [N, r] float32, or None
    """

    def __init__(
        self, quantized: QTensor, bias: Tensor | None, scheme: Scheme, smooth: Tensor | None = None, rotation: int = 1
    ) -> None:
        super().__init__(quantized, bias, scheme)
        self.rotation = rotation
        self.register_buffer("smooth", smooth)
        self.register_buffer("lowrank_down", None)
        self.register_buffer("lowrank_up", None)
        self._adapters: dict[str, tuple[Tensor, Tensor]] = {}

    def set_low_rank(self, up: Tensor, down: Tensor) -> None:
        """Sets the branch in floating point: up [N, r], down [r, K] over the smoothed input."""
        self.lowrank_up, self.lowrank_down = up.float().contiguous(), down.float().contiguous()

    def add_lora(self, name: str, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """Adds scale * up @ down to the weight as columns of the low-rank branch; the codes do not change.

        down  [r, K], up [N, r] in the coordinates of the layer's input
        """
        if down.shape[1] != self.in_features or up.shape != (self.out_features, down.shape[0]):
            raise ValueError(
                f"add_lora: down must be [r, {self.in_features}] and up [{self.out_features}, r], "
                f"got {list(down.shape)} and {list(up.shape)}"
            )
        device = self.weight.device
        down = down.detach().to(device, torch.float32)
        down = down if self.smooth is None else down * self.smooth
        self._adapters[name] = scale * up.detach().to(device, torch.float32), down
        self.forget_prepared()

    def with_lora(self, adapters: dict[str, tuple[Tensor, Tensor, float]]) -> "QLinear":
        """A layer on the same codes with more adapters: down, up and scale of each, as `add_lora` takes them."""
        other = copy.copy(self)
        other._adapters = dict(self._adapters)
        for name, adapter in adapters.items():
            other.add_lora(name, *adapter)
        return other

    def remove_lora(self, name: str) -> None:
        """Removes an adapter; KeyError when it is not there."""
        del self._adapters[name]
        self.forget_prepared()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in x's dtype."""
        if self.smooth is not None:
            x = x / self.smooth.to(x.dtype)
        branches = self.branches
        side = sum(F.linear(F.linear(x.float(), down), up) for up, down in branches) if branches else None
        if self._prepared is None:
            self._prepared = (self._input_enabled and linear_kernel(self)) or self._dense_product()
        y = self._prepared(rotate(x, self.rotation).to(x.dtype))
        return y if side is None else (y.float() + side).to(x.dtype)

    def transformed(self, x: Tensor) -> Tensor:
        return rotate(x if self.smooth is None else x / self.smooth.to(x.dtype), self.rotation)

    def dense(self) -> Tensor:
        """The weight that the layer applies to its input, [N, K] float32: what a linear layer would hold."""
        weight = rotate(self.codes().dequantize(), self.rotation)
        for up, down in self.branches:
            weight = weight + up @ down
        return weight if self.smooth is None else weight / self.smooth

    @property
    def branches(self) -> list[tuple[Tensor, Tensor]]:
        """What runs beside the codes over the smoothed input: up [N, r] and down [r, K], adapters last."""
        own = [] if self.lowrank_up is None else [(self.lowrank_up, self.lowrank_down)]
        return [*own, *self._adapters.values()]

    def coded(self) -> Coded:
        """The layer for kernels that fuse it with its neighbours; raises ValueError where there are none."""
        return coded_linear(self)

    def _dense_product(self):
        weight = self.codes().dequantize()
        return lambda x: F.linear(self.values_of(x), weight, self.bias).to(x.dtype)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        device = self.weight.device
        self._adapters = {name: (u.to(device), d.to(device)) for name, (u, d) in self._adapters.items()}
        return self
