"""Calibration sets: states of real trajectories, each with the time at which the network receives it."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Inputs of the network.

    x      [n, ...]; t [n] float32, the network's own time argument
    cond   further keyword arguments, tensors of n rows
    times  [S] float32, the distinct times of the schedule, first step first
    """

    x: Tensor
    t: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)
    times: Tensor | None = None

    def __post_init__(self) -> None:
        rows = {self.x.shape[0], self.t.shape[0], *(value.shape[0] for value in self.cond.values())}
        if len(rows) != 1 or self.t.dim() != 1 or not self.x.shape[0]:
            raise ValueError(f"CalibrationSet: x, t and cond must have the same number of rows, got {sorted(rows)}")
        if not bool(torch.isfinite(self.x).all()):
            raise ValueError("CalibrationSet: x holds NaN or Inf; sample it again")
        if self.times is None:
            object.__setattr__(self, "times", self.t.float().unique().flip(0))

    def __len__(self) -> int:
        return self.x.shape[0]

    def batches(self, size: int = 32) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """The samples in order, `size` at a time."""
        for begin in range(0, len(self), size):
            yield self.rows(slice(begin, begin + size))

    def rows(self, index: slice | Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Some of the samples: x, t, cond."""
        return self.x[index], self.t[index], {name: value[index] for name, value in self.cond.items()}

    def to(self, device: torch.device | str) -> "CalibrationSet":
        """The same samples on another device; times stay where they are."""
        cond = {name: value.to(device) for name, value in self.cond.items()}
        return CalibrationSet(self.x.to(device), self.t.to(device), cond, self.times)

    def digest(self) -> str:
        """sha256 of all values."""
        sha = hashlib.sha256()
        for tensor in (self.x, self.t, *(self.cond[name] for name in sorted(self.cond))):
            sha.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


def ndtc_times(
    n: int, T: int, mean: float = 0.4, std: float | str = 0.4, policy: str = "resample", seed: int = 0
) -> Tensor:
    """Training steps 0..T-1 for a calibration set, normally distributed (Shang et al. 2023, section 3.3), [n] int64.

    mean, std  in units of T; `paper` for std means sqrt(T / 2) steps. The mean may be at most 0.5.
    policy     `clamp` puts what falls outside on the ends, as the authors' release does; `resample` draws it again
    """
    if not 0.0 <= mean <= 0.5:
        raise ValueError(f"ndtc: the mean must be in [0, 0.5] of T, got {mean}")
    if policy not in ("clamp", "resample"):
        raise ValueError(f"ndtc: policy must be clamp or resample, got {policy!r}")
    width = (T / 2) ** 0.5 if std == "paper" else std * T
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: (mean * T + width * torch.randn(count, generator=generator, dtype=torch.float64)).floor()
    t = draw(n)
    while policy == "resample" and bool((outside := (t < 0) | (t > T - 1)).any()):
        t[outside] = draw(int(outside.sum()))
    return t.clamp(0, T - 1).long()


class Recorder(nn.Module):
    """A network that keeps the inputs of its calls; what it keeps is what the network was called with, by construction."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        kept = {name: value.detach().clone() for name, value in cond.items() if torch.is_tensor(value)}
        self.calls.append((x.detach().clone(), t.detach().float().expand(x.shape[0]).clone(), kept))
        return self.net(x, t, **cond)


def trajectories(sampler: Any, shape: Sequence[int], *, seed: int = 0, **settings: Any) -> CalibrationSet:
    """Every network input of sampling runs from fresh noise.

    sampler   a fastdiff.Sampler; its network must be a module
    shape     [B, ...] of the states;  settings  those of `Sampler.sample`, as solver, steps, cond, guidance
    """
    watched = copy.copy(sampler)
    watched.net = recorder = Recorder(sampler.net)
    watched.sample(shape, seed=seed, **settings)
    x, t = torch.cat([call[0] for call in recorder.calls]), torch.cat([call[1] for call in recorder.calls])
    cond = {name: torch.cat([call[2][name] for call in recorder.calls]) for name in recorder.calls[0][2]}
    # times in the order of their first use: the order of the steps
    times = torch.tensor(list(dict.fromkeys(t.tolist())))
    return CalibrationSet(x, t, cond, times)


def all_steps(sampler: Any, shape: Sequence[int], *, every: int = 1, seed: int = 0, **settings: Any) -> CalibrationSet:
    """All samples at every `every`-th time of the schedule; the per-step tables of TFMQ-DM need all of them."""
    full = trajectories(sampler, shape, seed=seed, **settings)
    return _select(full, torch.isin(full.t, full.times[::every]), full.times[::every])


def ndtc(
    sampler: Any,
    shape: Sequence[int],
    *,
    T: int = 1000,
    mean: float = 0.4,
    std: float | str = 0.4,
    policy: str = "resample",
    seed: int = 0,
    **settings: Any,
) -> CalibrationSet:
    """One state of every trajectory, at the step nearest to a normally distributed training step (PTQ4DM).

    The set holds B samples (per guidance branch), each with the time at which the network received it.
    """
    full = trajectories(sampler, shape, seed=seed, **settings)
    wanted = ndtc_times(shape[0], T, mean, std, policy, seed).float()
    nearest = full.times[(wanted[:, None] - full.times).abs().argmin(1)]  # [B]
    # inputs come step after step, branch after branch, sample after sample
    sample = torch.arange(len(full)) % shape[0]
    return _select(full, full.t == nearest[sample], full.times)


def one_time(sampler: Any, shape: Sequence[int], *, t: float, seed: int = 0, **settings: Any) -> CalibrationSet:
    """All samples at the one step nearest to t: what a calibration that ignores time would see."""
    full = trajectories(sampler, shape, seed=seed, **settings)
    nearest = full.times[(full.times - t).abs().argmin()]
    return _select(full, full.t == nearest, nearest[None])


def _select(full: CalibrationSet, keep: Tensor, times: Tensor) -> CalibrationSet:
    return CalibrationSet(full.x[keep], full.t[keep], {k: v[keep] for k, v in full.cond.items()}, times)


SETS = {"all_steps": all_steps, "ndtc": ndtc, "one_time": one_time}
