"""Quantized checkpoints of other libraries into a network: GGUF, torchao int8, ModelOpt int8, nunchaku SVDQuant int4."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fastdiff.models.checkpoint import load_checkpoint
from fastdiff.models.header import CheckpointError
from fastdiff.quant import QLinear, QTensor, QuantConfig, Quantized, Scheme
from fastdiff.quant.foreign import READERS, ForeignLayer, from_gguf
from fastdiff.quant.gguf import read_gguf
from fastdiff.quant.plan import set_module
from fastdiff.quant.records import LayerRecord

Tensor = torch.Tensor
Rename = Callable[[str], str | tuple[str, ...]]


def import_weights(net: nn.Module, path: str | os.PathLike, rename: Rename = lambda name: name) -> Quantized:
    """Fills a network with a quantized checkpoint of another library, in place: the same numbers, in our layout.

    path    a GGUF file, or a safetensors file of torchao (int8), ModelOpt (int8) or nunchaku (int4 SVDQuant); its contents
            tell which
    rename  the module of the network that a module of the file is, or several that share its rows, as `to_q`, `to_k` and
            `to_v` share those of a fused projection

    The file is checked as strictly as our own before anything changes. Raises CheckpointError (a ValueError) for a broken
    file, and where names or shapes are not those of the network.
    """
    path = Path(path)
    try:
        source, layers, tensors = _read(path)
        layers, tensors = _to_modules(net, layers, tensors, rename)
        made = {name: _build(net, name, layer) for name, layer in layers.items()}
        _check_rest(net, made, tensors)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error), file=path) from None
    for name, layer in made.items():
        set_module(net, name, layer)
    own = net.state_dict()
    net.load_state_dict({n: t.to(own[n].dtype) for n, t in tensors.items()}, strict=False, assign=True)
    exact = tuple((f"^{re.escape(name)}$", layer.scheme) for name, layer in made.items())
    return Quantized(net, QuantConfig(None, exact, calibration={"imported": source}), _records(made, source))


def _read(path: Path) -> tuple[str, dict[str, ForeignLayer], dict[str, Tensor]]:
    """Where the file comes from, its quantized layers, and its other tensors."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO is refused, not waited for
    with open(fd, "rb", buffering=0) as file:
        if file.read(4) == b"GGUF":
            file.seek(0)
            return "GGUF", *from_gguf(read_gguf(file, os.fstat(file.fileno()).st_size))
    tensors, metadata = load_checkpoint(path)
    for source, reader in READERS.items():
        layers = reader(tensors, metadata)
        if layers:
            return source, layers, tensors
    raise ValueError(f"no quantized layers of {', '.join(READERS)} or GGUF; use load_model for plain weights")


def _to_modules(
    net: nn.Module, layers: dict[str, ForeignLayer], tensors: dict[str, Tensor], rename: Rename
) -> tuple[dict[str, ForeignLayer], dict[str, Tensor]]:
    """Both by the names of the network; layers that are no linear layers there become tensors."""
    modules, found, rest = dict(net.named_modules()), {}, {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        targets = _targets(modules, rename(stem)) if stem else [(name, None)]
        for target, rows in targets:
            rest[f"{target}.{part}" if stem else name] = tensor if rows is None else tensor[rows]
    for name, layer in layers.items():
        for target, rows in _targets(modules, rename(name)):
            part = layer if rows is None else _rows(layer, rows)
            if type(modules[target]) is nn.Linear:
                bias = rest.pop(f"{target}.bias", None) if part.bias is None else part.bias
                found[target] = ForeignLayer(**(vars(part) | {"bias": bias}))
            elif part.smooth is None and part.up is None:
                rest[f"{target}.weight"] = part.weight.dequantize()
            else:
                raise ValueError(f"import: {target} must be a linear layer, is {type(modules[target]).__name__}")
    return found, rest


def _targets(modules: dict[str, nn.Module], names: str | tuple[str, ...]) -> list[tuple[str, slice | None]]:
    """Modules and their rows of the layer in the file; None for all of them."""
    names = (names,) if isinstance(names, str) else names
    unknown = next((name for name in names if name not in modules), None)
    if unknown is not None:
        raise ValueError(f"import: the network has no module {unknown!r}; give rename=")
    if len(names) == 1:
        return [(names[0], None)]
    targets, at = [], 0
    for name in names:
        targets.append((name, slice(at, at + modules[name].out_features)))
        at += modules[name].out_features
    return targets


def _rows(layer: ForeignLayer, rows: slice) -> ForeignLayer:
    w, cut = layer.weight, lambda t: None if t is None else t[rows]
    weight = QTensor(w.codes[rows], w.scale[rows], cut(w.zero), w.spec)
    return ForeignLayer(**(vars(layer) | {"weight": weight, "bias": cut(layer.bias), "up": cut(layer.up)}))


def _build(net: nn.Module, name: str, layer: ForeignLayer) -> QLinear:
    own, (N, K) = net.get_submodule(name), layer.weight.codes.shape
    if (own.out_features, own.in_features) != (N, K):
        raise ValueError(f"import: {name} must be [{own.out_features}, {own.in_features}], the file has [{N}, {K}]")
    if (layer.bias is None) != (own.bias is None) or (layer.bias is not None and layer.bias.shape != (N,)):
        raise ValueError(f"import: {name}.bias must be {None if own.bias is None else [N]}")
    made = QLinear(layer.weight, layer.bias, Scheme(layer.weight.spec, layer.inputs), layer.smooth)
    if layer.up is not None:
        made.set_low_rank(layer.up, layer.down)
    if layer.input_scale is not None:
        made.set_input_range(layer.input_scale, None, None)
    return made


def _check_rest(net: nn.Module, made: dict[str, QLinear], tensors: dict[str, Tensor]) -> None:
    """The other tensors must be exactly the parameters and buffers that the quantized layers leave."""
    own = {n: t for n, t in net.state_dict().items() if n.rpartition(".")[0] not in made}
    wrong = sorted(set(own) ^ set(tensors))
    if wrong:
        raise CheckpointError("missing in the file, or not in the network", wrong[0])
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"must be {own[name].dtype} {list(own[name].shape)}, got {got}", name)


def _records(made: dict[str, QLinear], source: str) -> list[LayerRecord]:
    note = f"imported from {source}"
    bits = lambda layer: layer.codes().bits
    return [LayerRecord(n, bits(layer), layer.nbytes, None, note, layer.scheme) for n, layer in made.items()]
