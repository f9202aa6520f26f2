"""The temporal cache: what depends on the timestep and on fixed conditioning only is computed once per schedule."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import torch

Tensor = torch.Tensor
# fewer rows take other kernels of torch's on a CPU, with other bits: a schedule's rows must not tell how they were met
_FEWEST = 16


class TemporalTable:
    """Rows of a function of (timestep, conditioning), kept by their arguments.

    A UNet's time projections and a DiT's modulations don't depend on the state, and a schedule has finitely many
    timesteps: a third of DiT-XL's weights need not be read in the loop (Huang et al. 2024, temporal information block).

    compute    from tensors with R rows, the timesteps `[R]` first, to `[R, width]` float32
    exact      compute rows together with the batch that asked for them, so that they have the bits the network itself
               would compute; else many rows are computed at once, which differs by rounding (below 1e-6)
    max_bytes  of the rows that are kept; those unused for longest are dropped

    rows_at_once  how many rows are computed together where not `exact`: with 1 a row's bits depend on that row only
    schedule      gives the times `[steps]` of the sampling that runs, if they are known: conditioning that is met for the
                  first time gets all of its rows at once. Networks may count them in thousandths
    """

    rows_at_once = 64

    def __init__(self, compute: Callable[..., Tensor], exact: bool = False, max_bytes: int = 256 << 20) -> None:
        self._compute = compute
        self._exact = exact
        self._max_bytes = max_bytes
        self._rows: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.before: Callable[[Tensor], None] | None = None  # told the timesteps of rows that `compute` is called for
        self.schedule: Callable[[], Tensor | None] = lambda: None
        self.computed = 0
        self._row_bytes = 0
        self._refused = 0  # bytes of the largest schedule that did not fit

    def __str__(self) -> str:
        refused = f", of {self._refused / 1e6:.1f} MB for a schedule, which do not fit" if self._refused else ""
        return f"temporal table: {self.computed} rows computed, {self.nbytes / 1e6:.1f} MB kept{refused}"

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept."""
        return sum(row.nbytes for row in self._rows.values())

    def clear(self) -> None:
        """Forgets all rows, for when the weights behind them have changed."""
        self._rows.clear()

    def lookup(self, *inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows for these inputs, `[B, width]` float32; those that are not there yet are computed."""
        keys = self._keys(inputs)
        rows = [self._rows.get(key) for key in keys]
        if any(row is None for row in rows):
            self._look_ahead(*inputs)
            rows = self._add(keys, inputs)
        elif len(self._rows) > len(keys):
            for key in keys:
                self._rows.move_to_end(key)
        return torch.stack(rows, out=out)

    def prepare(self, *inputs: Tensor) -> None:
        """Computes the rows for these inputs, `[R]` timesteps and conditioning of R rows, before they are asked for.

        Does nothing in exact mode, where rows belong to the batch that asks for them, nor when the rows would not fit.
        """
        keys = self._keys(inputs)
        if self._exact or not keys:
            return
        if not self._row_bytes:
            self._add(keys[:1], tuple(tensor[:1] for tensor in inputs), _FEWEST)
        nbytes = len(set(keys)) * self._row_bytes
        if nbytes <= self._max_bytes:
            self._add(keys, inputs, _FEWEST)
        else:
            self._refused = max(self._refused, nbytes)

    def _look_ahead(self, t: Tensor, *conditioning: Tensor) -> None:
        """Computes what the rest of a sampling with this conditioning will ask for, where it is known and fits."""
        times = None if self._exact or self._refused or self.rows_at_once == 1 else self.schedule()
        if times is None:
            return
        asked, times = set(t.tolist()), times.to(t)
        for known in (times / 1000, times):
            if asked <= set(known.tolist()):
                repeated = known.to(t.dtype).repeat(len(t))
                self.prepare(repeated, *(values.repeat_interleave(len(known), 0) for values in conditioning))
                return

    def _keys(self, inputs: tuple[Tensor, ...]) -> list[Hashable]:
        keys = list(zip(*map(_row_keys, inputs), strict=True))
        if self._exact:
            whole = tuple(keys)
            keys = [(position, whole) for position in range(len(keys))]
        return keys

    def _add(self, keys: list[Hashable], inputs: tuple[Tensor, ...], fewest: int = 1) -> list[Tensor]:
        """Computes what is missing, at least `fewest` rows at a time, and returns the rows of `keys`."""
        found = {key: self._rows[key] for key in keys if key in self._rows}
        first = {key: position for position, key in reversed(list(enumerate(keys))) if key not in found}
        wanted = list(range(len(keys))) if self._exact and first else sorted(first.values())
        size = len(wanted) if self._exact else self.rows_at_once
        for part in _parts(wanted, size):
            index = torch.tensor(part + part[-1:] * (fewest - len(part)), device=inputs[0].device)
            chosen = [tensor.index_select(0, index) for tensor in inputs]
            if self.before is not None:
                self.before(chosen[0])
            computed = self._compute(*chosen).float()
            self.computed += len(part)
            found |= {keys[position]: row.clone() for position, row in zip(part, computed, strict=False)}
        rows = [found[key] for key in keys]
        self._row_bytes = rows[0].nbytes
        self._rows.update(found)
        while self._rows and self.nbytes > self._max_bytes:
            self._rows.popitem(last=False)
        return rows


def _parts(values: list[int], size: int) -> Iterable[list[int]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _row_keys(tensor: Tensor) -> list[Hashable]:
    """One hashable value per row; equal values mean equal rows."""
    if tensor.dim() == 1:
        return tensor.tolist()
    raw = tensor.detach().contiguous().view(torch.uint8).flatten(1).cpu().numpy()
    return [row.tobytes() for row in raw]
