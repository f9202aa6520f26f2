"""Which layers of a network are quantized, how, in which blocks, and why the others are spared."""

import dataclasses
import re
from dataclasses import dataclass

from torch import nn

from fastdiff.quant.config import QuantConfig
from fastdiff.quant.hadamard import block_of
from fastdiff.quant.layer import QLayer
from fastdiff.quant.schemes import LowRank, Rotate, Scheme, TensorSpec

# a unit of reconstruction and of streaming: the outermost of these lists' items that holds a layer
_BLOCK = re.compile(
    r"^(?:.*?\.)?(?:resnets|attentions|downsamplers|upsamplers|transformer_blocks|single_transformer_blocks|blocks)\.\d+"
)
# layers that see the timestep and fixed conditioning only (the temporal information block)
TEMPORAL = re.compile(
    r"(?:^|\.)(?:time_embedding|time_emb_proj|time_embed|emb_layers|add_embedding|adaln_single|time_proj"
    r"|time_text_embed|timestep_embedder|t_embedder|img_mod|txt_mod|proj_out_1)(?:\.|$)|norm1(?:_context)?\.(?:emb|linear)"
    r"|norm_out\.linear|adaLN"
)
_SMALLEST_GROUP = 16
_SMALLEST_ROTATION = 16


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer; scheme None spares it, and `note` says why or what differs from the settings.

    temporal  whether it belongs to the temporal information block
    """

    name: str
    scheme: Scheme | None
    note: str = ""
    temporal: bool = False


def plan_layers(net: nn.Module, config: QuantConfig) -> list[LayerPlan]:
    """The plan of every linear and convolution layer, in the order of registration; ValueError for quantized ones."""
    plans = []
    for name, layer in net.named_modules():
        if isinstance(layer, QLayer):
            raise ValueError(f"quantize: {name} is quantized already; start from the original model")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        temporal = bool(TEMPORAL.search(name)) and config.temporal.mode != "off"
        if config.spares(name):
            plans.append(LayerPlan(name, None, "spared by the settings", temporal))
            continue
        if temporal and config.temporal.scheme is None:
            plans.append(LayerPlan(name, None, "depends on the timestep only: kept per step", True))
            continue
        if temporal:
            plan = adapt(name, layer, config.temporal.scheme)
            plans.append(dataclasses.replace(plan, temporal=True))
            continue
        scheme = config.scheme_of(name)
        plans.append(LayerPlan(name, None, "spared by the settings") if scheme is None else adapt(name, layer, scheme))
    return plans


def adapt(name: str, layer: nn.Module, scheme: Scheme) -> LayerPlan:
    """Fits a scheme to the layer's sizes: group sizes that divide, rotations and ranks that make sense."""
    notes: list[str] = []
    if isinstance(layer, nn.Conv2d):
        why = _conv_refusal(layer)
        if why:
            return LayerPlan(name, None, why)
        k = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        kept = {"input": _conv_input(scheme, notes), "weight": _conv_weight(scheme)}
        scheme = dataclasses.replace(scheme, transforms=(), **kept)
    else:
        k = layer.in_features
    scheme = _fit_group(scheme, k, notes)
    kept = tuple(t for t in scheme.transforms if not _is_useless(t, layer, k, notes))
    return LayerPlan(name, dataclasses.replace(scheme, transforms=kept), "; ".join(notes))


def block_name(layer: str) -> str:
    """The unit that a layer belongs to: itself outside of the known lists."""
    found = _BLOCK.match(layer)
    return found[0] if found else layer


def set_module(net: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the submodule `name`."""
    parent_name, _, key = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(key)] = new
    elif isinstance(parent, nn.ModuleDict):
        parent[key] = new
    else:
        setattr(parent, key, new)


def _conv_refusal(layer: nn.Conv2d) -> str:
    if layer.groups != 1 or layer.dilation != (1, 1):
        return "grouped and dilated convolutions have no integer form here"
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r} has no integer form here"
    if isinstance(layer.padding, str) and layer.padding == "same" and any(k % 2 == 0 for k in layer.kernel_size):
        return "uneven padding has no integer form here"
    return ""


def _conv_input(scheme: Scheme, notes: list[str]) -> TensorSpec | None:
    """Dynamic ranges of a convolution are per sample, for which 4 bits are too few."""
    spec = scheme.input
    if spec is None or spec.granularity != "group":
        return spec
    spec = dataclasses.replace(spec, granularity="token", group_size=None)
    if spec.dtype not in ("int4", "uint4"):
        return spec
    notes.append("int8 activations: a convolution has one range per sample")
    return dataclasses.replace(spec, dtype="int8", symmetric=True)


def _conv_weight(scheme: Scheme) -> TensorSpec:
    """Integer kernels of convolutions want scales of groups that are nested."""
    plain = scheme.weight.dtype == "int4" and scheme.weight.granularity == "group" and scheme.weight.range == "absmax"
    if not plain or scheme.rounding.kind == "gptq" or scheme.input is None or scheme.input.bits != 8:
        return scheme.weight
    return dataclasses.replace(scheme.weight, range="nested")


def _fit_group(scheme: Scheme, k: int, notes: list[str]) -> Scheme:
    changed = {}
    for side in ("weight", "input"):
        spec = getattr(scheme, side)
        if spec is None or spec.group_size is None or k % spec.group_size == 0:
            continue
        group = spec.group_size
        while group > _SMALLEST_GROUP and k % group:
            group //= 2
        if k % group == 0:
            changed[side] = dataclasses.replace(spec, group_size=group)
            notes.append(f"{side} groups of {group}")
        else:
            whole = "channel" if side == "weight" else "token"
            changed[side] = dataclasses.replace(spec, granularity=whole, group_size=None)
            notes.append(f"{side} scaled per {whole}: {k} inputs have no group")
    return dataclasses.replace(scheme, **changed)


def _is_useless(transform: object, layer: nn.Module, k: int, notes: list[str]) -> bool:
    if isinstance(transform, Rotate) and block_of(k, transform.group) < _SMALLEST_ROTATION:
        notes.append(f"not rotated: {k} inputs")
        return True
    if isinstance(transform, LowRank) and 2 * transform.rank > min(k, layer.weight.shape[0]):
        notes.append("no low-rank branch: the layer is too small")
        return True
    return False
