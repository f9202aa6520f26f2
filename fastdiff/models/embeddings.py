"""Sinusoidal embeddings that the UNet and the DiT share, and the reading of their configurations."""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def timestep_sinusoid(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Return the sinusoidal embedding of the timesteps (Vaswani et al. 2017, section 3.5).

    t        `[B]` any dtype, in units of training steps
    returns  `[B, dim]` float32; an odd `dim` ends in a column of zeros
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    )
    angles = t.float()[:, None] * freqs
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return nn.functional.pad(torch.cat(parts, dim=1), (0, dim % 2))


def grid_sinusoid(dim: int, side: int) -> Tensor:
    """Return the position table of a square grid: the first half of the channels encodes x, the second half y.

    returns  `[side * side, dim]` float32, computed in float64; `dim` must be a multiple of 4
    """
    if dim % 4:
        raise ValueError(f"grid_sinusoid: dim must be a multiple of 4, got {dim}; change heads or head size")
    quarter = dim // 4
    # on the CPU also where the weights are built on the meta device: a checkpoint does not hold this table
    freqs = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * freqs
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, dim / 2]
    x = line[None].expand(side, -1, -1)
    y = line[:, None].expand(-1, side, -1)
    return torch.cat((x, y), dim=2).reshape(side * side, dim).float()


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them: sinusoid -> conditioning vector."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


def rows_of_timesteps(t: Tensor | float, x: Tensor) -> Tensor:
    """Return the timesteps as one number per row of `x`: `[B]`, float32 for a Python number."""
    t = torch.as_tensor(t, device=x.device)
    return t.expand(x.shape[0]) if t.ndim == 0 else t


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build the configuration dataclass `cls` from the entries of a diffusers config.json.

    Entries that start with an underscore are ignored. Lists become tuples. Entries that `cls` does not have are
    compared with `cls.FIXED`: the value at which they change nothing.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    known = {}
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key.startswith("_"):
            continue
        if key in names:
            known[key] = value
        elif key not in cls.FIXED:
            raise ValueError(f"{cls.__name__}: unknown entry {key!r}; supported are {sorted(names | set(cls.FIXED))}")
        elif value not in cls.FIXED[key]:
            raise ValueError(f"{cls.__name__}: {key} = {value!r} is not supported, only {list(cls.FIXED[key])}")
    return cls(**known)


def check_integers(owner: str, limit: int, **values: Any) -> None:
    """Raise ValueError for the first value that is not an integer in 1..limit.

    The limits stand far above every known model; they keep a hostile configuration from taking the memory.
    """
    for key, value in values.items():
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{owner}: {key} must be an integer from 1 to {limit}, got {value!r}")


def check_switches(owner: str, **values: Any) -> None:
    """Raise ValueError for the first value that is not true or false."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{owner}: {key} must be true or false, got {value!r}")


def check_eps(owner: str, norm_eps: Any) -> None:
    """Raise ValueError unless the value is a float between 0 and 1."""
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise ValueError(f"{owner}: norm_eps must be between 0 and 1, got {norm_eps!r}")
