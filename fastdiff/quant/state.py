"""A quantized network as named tensors and JSON, in the canonical layout of storage, and back."""

import json
from typing import Any

import torch
from torch import nn

from fastdiff.quant.attention import AttentionHandle
from fastdiff.quant.config import QuantConfig, decode, encode
from fastdiff.quant.correction import NAME, EpsCorrection
from fastdiff.quant.layer import qlayers
from fastdiff.quant.quantize import Quantized, apply_state
from fastdiff.quant.schemes import Scheme
from fastdiff.quant.steps import StepContext

Tensor = torch.Tensor

KEY = "quantization_config"
RECORDS = "fastdiff.quant"


def to_tensors(made: Quantized) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Tensors and metadata of the checkpoint, and the entry `quantization_config` of config.json.

    Floating-point tensors that float16 holds exactly are kept as float16.
    """
    layers = qlayers(made.net)
    parts = {f"{name}.{part}" for name, layer in layers.items() for part in layer.state_dict()}
    tensors = {name: t if name in parts else _narrow(t) for name, t in made.net.state_dict().items()}
    schemes = {json.dumps(encode(r.scheme), sort_keys=True): r.scheme for r in made.layers if r.scheme is not None}
    index = {text: i for i, text in enumerate(sorted(schemes))}
    settings = made.config.to_dict() | {
        "schemes": [json.loads(text) for text in sorted(schemes)],
        "layers": {
            r.name: index[json.dumps(encode(r.scheme), sort_keys=True)] for r in made.layers if r.scheme is not None
        },
        "times": None if made.steps is None else [float(t) for t in made.steps.times],
    }
    return tensors, {RECORDS: json.dumps(layer_records(made.net)), KEY: json.dumps(settings, sort_keys=True)}, settings


def layer_records(net: nn.Module) -> dict[str, dict[str, Any]]:
    """What a strict reader compares the tensors of every quantized layer with (`models.quant_record`)."""
    return {
        name: {
            "dtype": layer.scheme.weight.dtype,
            "bits": layer.scheme.weight.bits,
            "group": layer.codes().group,
            "in_features": layer.in_features,
            "sym": layer.weight_zero is None,
        }
        for name, layer in qlayers(net).items()
    }


def from_tensors(net: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> StepContext | None:
    """Makes `net` (floating-point, may be on the meta device) the quantized network of the tensors, in place.

    Raises ValueError where settings, tensors and network disagree. Returns what the per-step ranges follow, or None.
    """
    config = QuantConfig.from_dict({k: v for k, v in settings.items() if k not in ("schemes", "layers", "times")})
    schemes = _schemes(settings)
    known = {name: layer for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    for name, scheme in schemes.items():
        if name not in known:
            raise ValueError(f"quantization_config: the model has no linear or convolution layer {name!r}")
        _check_sizes(name, known[name], scheme, tensors)
    steps = _steps(settings)
    apply_state(net, schemes, tensors, steps)
    for name, layer in qlayers(net).items():
        if layer.scheme.static_input and layer.input_scale is None:
            raise ValueError(f"quantization_config: {name} has static activations but no input_scale")
        if layer.input_scale is not None and layer.input_scale.numel() not in (
            1,
            0 if steps is None else len(steps.times),
        ):
            raise ValueError(f"quantization_config: {name}.input_scale has not one value per entry of times")
    if steps is not None:
        steps.follow(net)
    if config.attention == "int8":
        AttentionHandle(net)
    if config.correct_output:
        _correction(tensors).attach(net)
    return steps


def _correction(tensors: dict[str, Tensor]) -> EpsCorrection:
    parts = [tensors.get(f"{NAME}.{part}") for part in ("times", "k", "bias", "var")]
    times, k, bias, var = parts
    if any(
        p is None or p.dtype not in (torch.float16, torch.float32) or not bool(torch.isfinite(p).all()) for p in parts
    ):
        raise ValueError(f"quantization_config: {NAME} needs finite times, k, bias and var")
    if not (times.dim() == 1 and times.shape == k.shape == var.shape == bias.shape[:1] and bias.dim() == 2 and len(k)):
        raise ValueError(f"quantization_config: {NAME} must have one k, var and row of bias per time")
    return EpsCorrection(times, k, bias, var)


def _schemes(settings: dict[str, Any]) -> dict[str, Scheme]:
    listed, layers = settings.get("schemes"), settings.get("layers")
    if not isinstance(listed, list) or not isinstance(layers, dict):
        raise ValueError("quantization_config: schemes must be a list and layers an object")
    if any(type(i) is not int or not 0 <= i < len(listed) for i in layers.values()):
        raise ValueError("quantization_config: layers must name entries of schemes by their index")
    schemes = [decode(Scheme, values) for values in listed]
    return {name: schemes[i] for name, i in layers.items()}


def _steps(settings: dict[str, Any]) -> StepContext | None:
    times = settings.get("times")
    if times is None:
        return None
    if not isinstance(times, list) or not times or any(type(t) not in (int, float) for t in times):
        raise ValueError("quantization_config: times must be a list of numbers")
    return StepContext(torch.tensor(times, dtype=torch.float32))


def _check_sizes(name: str, layer: nn.Module, scheme: Scheme, tensors: dict[str, Tensor]) -> None:
    """The stored codes must be those of this layer: shapes were checked against the records, not against the model."""
    parts, cut = {name: layer.weight.shape[1]}, scheme.split_input
    if cut is not None:
        if type(cut) is not int or not 0 < cut < layer.weight.shape[1]:
            raise ValueError(
                f"quantization_config: split_input of {name} must be inside its {layer.weight.shape[1]} inputs"
            )
        parts = {f"{name}.first": cut, f"{name}.second": layer.weight.shape[1] - cut}
    group = scheme.input.group_size if scheme.input is not None else None
    if group is not None and (isinstance(layer, nn.Conv2d) or any(k % group for k in parts.values())):
        raise ValueError(f"quantization_config: the inputs of {name} cannot be cut into groups of {group}")
    for part, channels in parts.items():
        inner = layer.weight[0, 0].numel()
        k = channels * inner
        wanted = (layer.weight.shape[0], -(-k // 2) if scheme.weight.bits == 4 else k)
        codes = tensors.get(f"{part}.weight")
        if codes is None or (codes.shape[0], codes[0].numel() if len(codes) else 0) != wanted:
            got = None if codes is None else list(codes.shape)
            raise ValueError(f"quantization_config: {part}.weight must hold {list(wanted)} codes, got {got}")
        kernel = tuple(getattr(layer, "kernel_size", ()))
        if scheme.weight.bits == 8 and tuple(codes.shape[1:-1]) != kernel:
            raise ValueError(f"quantization_config: {part}.weight must be channels-last with kernel {list(kernel)}")


def _narrow(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    half = tensor.to(torch.float16)
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
