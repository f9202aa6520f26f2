"""What a quantization run says about every layer."""

from dataclasses import dataclass

from torch import nn

from fastdiff.quant.conv import QSplit
from fastdiff.quant.plan import LayerPlan
from fastdiff.quant.schemes import Scheme
from fastdiff.quant.work import Work


@dataclass
class LayerRecord:
    """What was done with one layer; `bits` counts scales. A spared layer has the bits of its dtype and no sqnr_db, and an
    imported one none either, as there is nothing to compare it with.
    """

    name: str
    bits: float
    nbytes: int
    sqnr_db: float | None
    note: str
    scheme: Scheme | None = None
    drift: float | None = None


def record_of(net: nn.Module, plan: LayerPlan, work: Work) -> LayerRecord:
    """The record of a layer after the run."""
    layer = net.get_submodule(plan.name)
    own = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    if plan.scheme is None:
        bits = 8.0 * layer.weight.element_size()
        return LayerRecord(plan.name, bits, own, None, plan.note)
    parts = [layer.first, layer.second] if isinstance(layer, QSplit) else [layer]
    stored = sum(t.nbytes for part in parts for name, t in part.named_buffers() if name.startswith("weight"))
    count = sum(part.in_features * part.out_features for part in parts)
    names = [plan.name] if len(parts) == 1 else [f"{plan.name}.first", f"{plan.name}.second"]
    drifts = [work.ranges[name].drift() for name in names if name in work.ranges]
    return LayerRecord(
        plan.name, 8.0 * stored / count, own, work.sqnr[plan.name], plan.note, plan.scheme, max(drifts, default=None)
    )
