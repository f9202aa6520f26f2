"""What an engine has done so far."""

from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace

from fastdiff.sampler import Cancelled


@dataclass
class EngineReport:
    """Counts and times of an engine since it was made.

    waiting, running             requests now
    finished, failed, cancelled  requests so far
    steps                        joint steps: one call of the network (in parts of `micro_batch`) and one step kernel
    rows                         samples that took part in them, summed
    evaluations                  rows of the network's input, summed: more than `rows` where guidance has two branches
    busy_s                       seconds in which steps ran
    waited_s, longest_wait_s     seconds between `submit` and the first step, summed over requests and the longest
    """

    waiting: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    rows: int = 0
    evaluations: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0
    started: int = field(default=0, repr=False)

    @property
    def rows_per_step(self) -> float:
        """Samples in a joint step, on average."""
        return self.rows / max(self.steps, 1)

    @property
    def rows_per_s(self) -> float:
        """Steps of samples in a second of work."""
        return self.rows / self.busy_s if self.busy_s else 0.0

    @property
    def mean_wait_s(self) -> float:
        """Seconds that a request waited for its first step, on average."""
        return self.waited_s / max(self.started, 1)

    def __str__(self) -> str:
        return (
            f"requests: {self.finished} finished, {self.failed} failed, {self.cancelled} cancelled, "
            f"{self.running} running, {self.waiting} waiting ({self.mean_wait_s:.3f} s on average, "
            f"{self.longest_wait_s:.3f} s at most)\n"
            f"steps: {self.steps} of {self.rows_per_step:.2f} rows on average, {self.rows_per_s:.1f} rows/s, "
            f"{self.evaluations} evaluations of the network"
        )

    def begun(self, waited_s: float) -> None:
        """Counts a request that leaves the queue."""
        self.started += 1
        self.waited_s += waited_s
        self.longest_wait_s = max(self.longest_wait_s, waited_s)

    def stepped(self, rows: int, evaluations: int, seconds: float) -> None:
        """Counts a joint step."""
        self.steps += 1
        self.rows += rows
        self.evaluations += evaluations
        self.busy_s += seconds

    def settled(self, error: BaseException | None) -> None:
        """Counts a request that is done."""
        outcome = (
            "finished" if error is None else "cancelled" if isinstance(error, Cancelled | CancelledError) else "failed"
        )
        setattr(self, outcome, getattr(self, outcome) + 1)

    def now(self, waiting: int, running: int) -> "EngineReport":
        """A copy that holds what waits and runs at this moment."""
        return replace(self, waiting=waiting, running=running)
