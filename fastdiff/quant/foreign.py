"""Quantized checkpoints of other libraries as linear layers by name: torchao, ModelOpt, nunchaku, GGUF.

Every reader takes the tensors that it knows out of those it is given, and leaves the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.quant import gguf
from fastdiff.quant.importers import from_int8, from_nunchaku, nunchaku_low_rank, nunchaku_vector
from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor
Tensors = dict[str, Tensor]

TOKEN = TensorSpec("int8", "token", dynamic=True)


@dataclass(frozen=True, eq=False)
class ForeignLayer:
    """A linear layer y = W (x / smooth) + up down (x / smooth) + bias.

    weight  [N, K];  bias [N], smooth [K], down [r, K] and up [N, r] float32, or None
    inputs  how activations are quantized, or None;  input_scale  [1] float32 where that is static
    """

    weight: QTensor
    bias: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    inputs: TensorSpec | None = None
    input_scale: Tensor | None = None


def torchao(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, ForeignLayer]:
    """int8 weights as torchao flattens them: `name._weight_qdata` and `name._weight_scale`.

    Activations are quantized by token where the metadata of the weight say how activations are.
    """
    layers = {}
    for name in _stems(tensors, "._weight_qdata"):
        weight = from_int8(tensors.pop(f"{name}._weight_qdata"), _scale(tensors, f"{name}._weight_scale"))
        dynamic = '"act_quant_kwargs": {' in metadata.get(f"{name}.weight", "")
        bias = _first(tensors, f"{name}.bias", f"{name}._bias__data")
        layers[name] = ForeignLayer(weight, bias, inputs=TOKEN if dynamic else None)
    return layers


def modelopt(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, ForeignLayer]:
    """int8 weights of ModelOpt: `name.weight`, `name.weight_scale`, and `input_scale` or `pre_quant_scale` where it is there."""
    layers = {}
    for name in _stems(tensors, ".weight_scale"):
        if tensors.get(f"{name}.weight", torch.empty(0)).dtype != torch.int8:
            raise ValueError(f"import: {name}.weight must be int8 beside its weight_scale; other formats are not read")
        weight = from_int8(tensors.pop(f"{name}.weight"), _scale(tensors, f"{name}.weight_scale"))
        smooth = tensors.pop(f"{name}.pre_quant_scale", None)
        if smooth is not None:
            smooth = 1 / _positive(f"{name}.pre_quant_scale", smooth, weight.codes.shape[1])
        static = _scale(tensors, f"{name}.input_scale").reshape(1) if f"{name}.input_scale" in tensors else None
        inputs = TOKEN if static is None else TensorSpec("int8", "tensor")
        layers[name] = ForeignLayer(weight, _bias(tensors, name), smooth, inputs=inputs, input_scale=static)
    return layers


def nunchaku(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, ForeignLayer]:
    """int4 weights of SVDQuant as nunchaku tiles them, with their smoothing and low-rank branch.

    Activations, int4 in its own kernels, are quantized to int8 by token: the same weights, and less noise.
    """
    layers = {}
    for name in _stems(tensors, ".qweight"):
        if f"{name}.wscales" not in tensors or f"{name}.wtscale" in tensors:
            raise ValueError(f"import: {name} is not int4 with wscales; other formats of nunchaku are not read")
        weight = from_nunchaku(tensors.pop(f"{name}.qweight"), _scale(tensors, f"{name}.wscales"))
        N, K = weight.codes.shape
        tensors.pop(f"{name}.smooth_factor_orig", None)
        smooth, down, up = (tensors.pop(f"{name}.{part}", None) for part in ("smooth_factor", "proj_down", "proj_up"))
        smooth = None if smooth is None else nunchaku_vector(_positive(f"{name}.smooth_factor", smooth, K))
        if down is not None and up is not None:
            if down.shape[0] != K or up.shape != (N, down.shape[1]) or down.shape[1] % 16:
                raise ValueError(
                    f"import: {name}.proj_down and proj_up must be [{K}, r] and [{N}, r], r a multiple of 16"
                )
            down, up = nunchaku_low_rank(down.float(), down=True), nunchaku_low_rank(up.float(), down=False)
            # its branch reads the input itself, ours the smoothed one
            down = down if smooth is None else down * smooth
        bias = _bias(tensors, name)
        bias = None if bias is None else nunchaku_vector(bias)
        layers[name] = ForeignLayer(weight, bias, smooth, down, up, TOKEN)
    return layers


def from_gguf(
    blocks: Mapping[str, tuple[gguf.BlockType, tuple[int, ...], Any]],
) -> tuple[dict[str, ForeignLayer], Tensors]:
    """What `read_gguf` returns as layers of codes (Q8_0 and Q4_0 matrices) and tensors in floating point (the rest).

    Both hold the numbers of the file exactly.
    """
    layers: dict[str, ForeignLayer] = {}
    tensors: Tensors = {}
    for name, (kind, shape, raw) in blocks.items():
        codes = kind.name in ("Q8_0", "Q4_0") and len(shape) == 2 and name.endswith(".weight")
        if codes and not (kind.name == "Q8_0" and bool((raw[:, 2:] == 128).any())):  # -128 has no place in our grid
            layers[name.removesuffix(".weight")] = ForeignLayer(gguf.to_qtensor(raw, kind, shape))
        else:
            tensors[name] = torch.from_numpy(gguf.decode(raw, kind).copy()).reshape(shape)
    return layers, tensors


# name -> reader; the first that finds layers has read the file
READERS: dict[str, Callable[[Tensors, Mapping[str, str]], dict[str, ForeignLayer]]] = {
    "torchao": torchao,
    "nunchaku": nunchaku,
    "ModelOpt": modelopt,
}


def _stems(tensors: Tensors, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def _first(tensors: Tensors, *names: str) -> Tensor | None:
    return next((tensors.pop(name).float() for name in names if name in tensors), None)


def _bias(tensors: Tensors, name: str) -> Tensor | None:
    return _first(tensors, f"{name}.bias")


def _scale(tensors: Tensors, name: str) -> Tensor:
    """Takes a tensor of scales, float32; ValueError unless all are finite and positive."""
    if name not in tensors:
        raise ValueError(f"import: {name} is missing")
    return _positive(name, tensors.pop(name))


def _positive(name: str, values: Tensor, count: int | None = None) -> Tensor:
    values = values.float()
    if not bool((torch.isfinite(values) & (values > 0)).all()) or count not in (None, values.numel()):
        raise ValueError(
            f"import: {name} must hold {count or 'its'} finite positive numbers, got {list(values.shape)}"
        )
    return values
