"""What an accelerated pipeline runs on."""

from dataclasses import asdict, dataclass

from fastdiff.accelerated import Report
from fastdiff.pipeline.schedulers_report import SchedulerReport


@dataclass(frozen=True)
class PipelineReport:
    """What every part of a pipeline runs on, and why not where not.

    pipeline   its class
    parts      reports of what is accelerated, by component
    left       why other components run as before
    quantized  bytes of the weights of quantized denoisers, by component
    guidance   what adaptive guidance did, by component
    set_up_s   seconds that accelerating took
    """

    pipeline: str
    parts: dict[str, Report | SchedulerReport]
    left: dict[str, str]
    quantized: dict[str, int]
    guidance: dict[str, str]
    set_up_s: float

    @property
    def fallbacks(self) -> list[str]:
        """What runs as before acceleration, and why, one sentence each."""
        found = [f"{name}: {reason}" for name, reason in self.left.items()]
        for name, part in self.parts.items():
            found += [f"{name}: {reason}" for reason in part.fallbacks]
        return found

    @property
    def bytes(self) -> int:
        """Of the packed weights of all parts."""
        return sum(part.bytes for part in self.parts.values() if isinstance(part, Report))

    def __str__(self) -> str:
        lines = [f"{self.pipeline}: {self.bytes / 1e6:.1f} MB packed in {self.set_up_s:.2f} s"]
        for name, part in self.parts.items():
            lines += [f"{name}: {line}" if i == 0 else f"  {line}" for i, line in enumerate(str(part).splitlines())]
        lines += [f"{name}: quantized to {size / 1e6:.1f} MB" for name, size in self.quantized.items()]
        lines += [f"{name}: {line}" for name, line in self.guidance.items()]
        lines += [f"{name}: as before ({reason})" for name, reason in self.left.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The report as plain lists, strings and numbers."""
        return asdict(self)
