"""The temporal information block: the layers that see the timestep and fixed conditioning only (Huang et al. 2024).

One or several embeddings h(t) of two linear layers, and heads g_i that take SiLU(h(t) + e), e from the conditioning.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.quant import observe
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.plan import TEMPORAL

Tensor = torch.Tensor

_ROWS = 512  # distinct (time, conditioning) pairs that are looked at


@dataclass(frozen=True, eq=False)
class Embedding:
    """One h(t) with its heads and what it was called with.

    stem      name of the module with `linear_1` and `linear_2`
    heads     names of the linear layers that follow
    sinusoid  [R, C] inputs;  extra  [R, D] what is added to h before SiLU, zero where there is nothing
    """

    stem: str
    heads: tuple[str, ...]
    sinusoid: Tensor
    extra: Tensor


@dataclass(frozen=True, eq=False)
class TemporalBlock:
    """All embeddings of a network, for the R rows (time, conditioning) of a calibration set."""

    embeddings: tuple[Embedding, ...]
    times: Tensor

    @property
    def stages(self) -> list[list[str]]:
        """Names of the linear layers, in the order in which their inputs depend on each other."""
        first, second = ([f"{e.stem}.{part}" for e in self.embeddings] for part in ("linear_1", "linear_2"))
        return [first, second, [head for e in self.embeddings for head in e.heads]]

    @property
    def layers(self) -> list[str]:
        """Names of all linear layers of the block."""
        return [name for stage in self.stages for name in stage]

    def outputs(self, net: nn.Module, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """What the components return with the layers that `net` has now: h of every embedding, and every head."""
        out = {}
        for e in self.embeddings:
            stem = net.get_submodule(e.stem)
            h = stem.linear_2(F.silu(stem.linear_1(e.sinusoid[rows])))
            out[e.stem] = h
            feature = F.silu(h + e.extra[rows])
            out |= {head: net.get_submodule(head)(feature) for head in e.heads}
        return out

    def features(self, net: nn.Module, rows: Tensor | slice = slice(None)) -> Tensor:
        """The outputs of all heads side by side, [R, sum of widths]."""
        out = self.outputs(net, rows)
        return torch.cat([out[head] for e in self.embeddings for head in e.heads], dim=1)


def find_block(net: nn.Module, names: list[str], data: CalibrationSet) -> TemporalBlock | None:
    """The block made of the layers `names`, with the inputs that the calibration set gives it; None without one."""
    stems = [name for name, m in net.named_modules() if hasattr(m, "linear_2") and TEMPORAL.search(name)]
    if not stems:
        return None
    inner = {f"{stem}.{part}" for stem in stems for part in ("linear_1", "linear_2")}
    heads: dict[str, list[str]] = {stem: [] for stem in stems}
    for name in names:
        if name not in inner:
            heads[_owner(name, stems)].append(name)
    rows = _distinct(data)
    kept = CalibrationSet(*data.rows(rows), data.times)
    found = []
    for stem in stems:
        _, _, sums = observe.capture(net, _sum_module(net, stem), kept)
        inputs, _, h = observe.capture(net, stem, kept)
        h, total = torch.cat(h), torch.cat(sums)
        found.append(Embedding(stem, tuple(heads[stem]), torch.cat([a[0] for a in inputs]), total - h))
    return TemporalBlock(tuple(found), kept.t)


def feature_errors(reference: dict[str, Tensor], quantized: dict[str, Tensor]) -> dict[str, float]:
    """Per component the largest |q - ref|^2 / |ref|^2 over the rows."""
    error = lambda a, b: float(((a - b).square().sum(1) / a.square().sum(1).clamp(min=1e-30)).max())
    return {name: error(reference[name], quantized[name]) for name in reference}


def stored_errors(reference: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """The same for a cache whose rows are kept in `dtype`."""
    return feature_errors(reference, {name: value.to(dtype).float() for name, value in reference.items()})


def _owner(head: str, stems: list[str]) -> str:
    """The embedding that a head follows: the one in its own norm, else the first."""
    parent = head.rpartition(".")[0]
    return next((stem for stem in stems if parent and stem.startswith(f"{parent}.")), stems[0])


def _sum_module(net: nn.Module, stem: str) -> str:
    """The module that adds the conditioning to h: the parent where that is called `emb`, else the stem itself."""
    parent = stem.rpartition(".")[0]
    return parent if parent.rpartition(".")[2] == "emb" else stem


def _distinct(data: CalibrationSet) -> Tensor:
    """The first row of every different (time, conditioning)."""
    seen: dict[tuple, int] = {}
    columns = [
        data.t.tolist(),
        *(value.flatten(1).tolist() if value.dim() > 1 else value.tolist() for value in data.cond.values()),
    ]
    for row, key in enumerate(zip(*columns, strict=True)):
        seen.setdefault(tuple(tuple(k) if isinstance(k, list) else k for k in key), row)
    return torch.tensor(sorted(seen.values())[:_ROWS])
