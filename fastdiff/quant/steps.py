"""Which row of the per-step tables every sample of a call uses: found from the time the network is called with."""

import torch
from torch import nn

Tensor = torch.Tensor


class StepContext:
    """Maps the network's time input to rows of the per-step tables, as tensors on the device.

    times  [S] float32, the model times that the tables were made for; a time in between uses the nearest
    rows   [B] int64 (or [1]) for the call in progress
    """

    def __init__(self, times: Tensor) -> None:
        if times.dim() != 1 or times.numel() == 0:
            raise ValueError(f"StepContext: times must be a vector of at least one, got {list(times.shape)}")
        self.times = times.float()
        self.rows = torch.zeros(1, dtype=torch.int64, device=times.device)

    def set(self, t: Tensor | float) -> None:
        """Looks the rows of the times `t` ([B] or one number) up."""
        t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1)
        if self.times.device != t.device:
            self.times = self.times.to(t.device)
        self.rows = (t - self.times).abs().argmin(1)

    def of(self, table: Tensor, x: Tensor) -> Tensor:
        """The table's values for the rows of x, shaped to broadcast against x: [S] -> [B or 1, 1, ...]."""
        if table.numel() == 1:
            return table.reshape(1)
        if self.rows.numel() not in (1, x.shape[0]):
            raise ValueError(
                f"StepContext: the network was called with {self.rows.numel()} times, a layer inside got {x.shape[0]} rows"
            )
        return table[self.rows].view(-1, *[1] * (x.dim() - 1))

    def follow(self, net: nn.Module):
        """Calls `set` before every forward of `net`, from its second argument or `t`, `timestep`; returns the handle."""
        return net.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, net: nn.Module, args: tuple, kwargs: dict) -> None:
        self.set(time_of(args, kwargs))


def time_of(args: tuple, kwargs: dict) -> Tensor | float:
    """The time that a network is called with: its second argument, or `t`, or `timestep`."""
    t = args[1] if len(args) > 1 else next((kwargs[name] for name in ("t", "timestep") if name in kwargs), None)
    if t is None:
        raise ValueError("quantize: tables per step need the time as the network's second argument, `t` or `timestep`")
    return t
