"""Numbers and names as the report page shows them."""

from __future__ import annotations

from collections.abc import Sequence

from ....common.dataset import TASKS

MINUS, NONE = "−", "–"
METRIC_NAMES = {"micro_f1": "micro F1", "macro_f1": "macro F1", "rouge_l": "ROUGE-L"}
MODE_NAMES = {"base": "base model", "shared": "shared only", "personal": "personal", "alone": "alone"}
UNITS = ("B", "kB", "MB", "GB", "TB")


def number(value: float | None) -> str:
    """Format a metric: three decimals, or four digits for a number above 100."""
    if value is None:
        return NONE
    text = f"{abs(value):.3f}" if abs(value) < 100 else f"{abs(value):.4g}"
    return (MINUS if value < 0 and text.strip("0.") else "") + text


def signed(value: float | None, error: float | None = None) -> str:
    """Format a difference with its sign and, where it is known, its standard error."""
    if value is None:
        return NONE
    sign = "" if value < 0 else "+"
    return sign + number(value) + ("" if error is None else f" ± {number(error)}")


def size(count: float) -> str:
    """Format a number of bytes with three digits."""
    unit = 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    decimals = 0 if unit == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{decimals}f} {UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """Format a duration: seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(amount: int, noun: str) -> str:
    """Format a count with its noun, whose plural ends in s: "1 site", "2 sites", "1,296 rows"."""
    if noun == "reply":
        return f"{amount:,} {'reply' if amount == 1 else 'replies'}"
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def metric_name(metric: str) -> str:
    """The name of a metric in words."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def primary_metric(task: str) -> str:
    """The metric that tables show for a task; empty for an unknown task."""
    return TASKS[task].primary_metric if task in TASKS else ""


def lower_is_better(task: str) -> bool:
    """Whether a lower primary metric is better."""
    return task in TASKS and TASKS[task].lower_is_better


def rounds(numbers: Sequence[int]) -> str:
    """Format round numbers as ranges: "1–3, 7"."""
    spans: list[list[int]] = []
    for number_ in sorted(set(numbers)):
        if spans and number_ == spans[-1][1] + 1:
            spans[-1][1] = number_
        else:
            spans.append([number_, number_])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Format names as a list in words; more than ``most`` are counted."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
