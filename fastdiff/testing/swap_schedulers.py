"""A pytest plugin that runs tests of diffusers on fast schedulers: `pytest TREE/tests/schedulers -p fastdiff.testing.swap_schedulers`.

Before collection every scheduler class of `diffusers` and `diffusers.schedulers` is replaced by the subclass of the same name
whose steps run on the fused kernel; afterwards the originals are back. The summary says how many steps ran where.
"""

import importlib
from collections import Counter

from fastdiff.pipeline import fast_class, schedulers_runner

_SHOWN = 40
_NAMESPACES = ("diffusers", "diffusers.schedulers")
_reports: list[schedulers_runner.SchedulerReport] = []
_originals: list[tuple[object, str, object]] = []


class _Collected(schedulers_runner.SchedulerReport):
    """A report that the summary counts."""

    def __init__(self, *args):
        super().__init__(*args)
        _reports.append(self)


def swap() -> list[str]:
    """Replaces the classes; returns their names."""
    names = set()
    for module in map(importlib.import_module, _NAMESPACES):
        for name in dir(module):
            found = getattr(module, name, None) if name.endswith("Scheduler") else None
            if isinstance(found, type) and callable(getattr(found, "step", None)):
                _originals.append((module, name, found))
                setattr(module, name, fast_class(found))
                names.add(name)
    _originals.append((schedulers_runner, "SchedulerReport", schedulers_runner.SchedulerReport))
    schedulers_runner.SchedulerReport = _Collected
    return sorted(names)


def restore() -> None:
    """Puts the original classes back."""
    while _originals:
        setattr(*_originals.pop())


def pytest_configure(config):
    config.fastdiff_swapped = swap()


def pytest_unconfigure(config):
    restore()


def pytest_terminal_summary(terminalreporter, config):
    stock = Counter()
    for report in _reports:
        stock.update({f"{report.scheduler}: {reason}": count for reason, count in report.stock.items()})
    fused = sum(report.fused for report in _reports)
    terminalreporter.section("fastdiff schedulers")
    terminalreporter.line(f"{len(config.fastdiff_swapped)} classes replaced")
    terminalreporter.line(f"{fused} steps on the fused kernel, {stock.total()} on diffusers' own code")
    for reason, count in stock.most_common(_SHOWN):
        terminalreporter.line(f"  {count} x {reason}")
    if len(stock) > _SHOWN:
        terminalreporter.line(f"  and {len(stock) - _SHOWN} more reasons")
