"""Samples as a Markdown table and as JSON lines."""

from bench.models.rounds import Measured
from bench.models.variants import VARIANTS
from bench.models.workloads import Workload

_COLUMNS = (
    "variant",
    "ms (median)",
    "ms (min)",
    "% of peak",
    "time / first",
    "relative error",
    "RSS MB",
    "peak RSS MB",
    "set-up s",
    "others",
    "group",
)


def records(workload: Workload, about: dict, found: list[Measured], peaks: dict[str, float]) -> list[dict]:
    """One dictionary per variant and group; `time_to_first` refers to the first variant of the group that ran.

    peaks  G(FL)OP/s by precision; `percent_of_peak` is None for a precision that has none
    """
    firsts = {m.group: m for m in reversed(found) if m.seconds}  # the first that ran, of each group
    return [
        {"model": workload.name, "variant": m.variant, "group": m.group, "flops": about["flops"]}
        | ({"error": m.error} if m.error or not m.seconds else _numbers(m, firsts, about["flops"], peaks))
        for m in found
    ]


def _numbers(entry: Measured, firsts: dict[int, Measured], flops: int, peaks: dict[str, float]) -> dict:
    peak = peaks.get(VARIANTS[entry.variant].precision)
    return {
        "ms": 1e3 * entry.median,
        "ms_min": 1e3 * min(entry.seconds),
        "samples": len(entry.seconds),
        "clean_samples": len(entry.clean),
        "others": sum(entry.others) / len(entry.others),
        "percent_of_peak": 100 * flops / entry.median / 1e9 / peak if peak else None,
        "time_to_first": entry.median / firsts[entry.group].median,
        "relative_error": entry.relative_error,
        "setup_seconds": entry.setup,
        **entry.after,
    }


def table(workload: Workload, about: dict, rows: list[dict]) -> str:
    """Markdown; times are medians over the samples during which others left the processors alone (`others`: their share)."""
    size = f"{about['flops'] / 1e9:.2f} GFLOP, {about['parameters'] / 1e6:.1f} M parameters"
    lines = [f"**{workload.name}** ({size})", "", f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join(lines + [_line(row) for row in rows])


def _line(row: dict) -> str:
    if "error" in row:
        return f"| {row['variant']} | not available: {row['error']} |" + " |" * (len(_COLUMNS) - 2)
    cells = [row["variant"], _number(row["ms"]), _number(row["ms_min"])]
    cells += [_maybe(row["percent_of_peak"], "{:.0f}"), _maybe(row["time_to_first"], "{:.2f}")]
    cells += [f"{row['relative_error']:.1e}", str(row.get("rss_mb", "")), str(row.get("peak_rss_mb", ""))]
    cells += [f"{sum(row['setup_seconds'].values()):.1f}", f"{row['others']:.2f}", str(row["group"])]
    return f"| {' | '.join(cells)} |"


def _number(ms: float) -> str:
    return f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
