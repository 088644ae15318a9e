"""Where a section stands on the page: the level of its heading, and the prefix of its id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..summary import SiteSummary
from .formats import count
from .markup import Html, element

SHOWN = 24  # sites in a chart; of more, those with the largest and the smallest gains
MAX_ROWS = 1000  # rows of a table


@dataclass
class Placement:
    """Makes the sections of one run, and remembers their titles for the navigation."""

    prefix: str = ""
    level: int = 2
    titles: list[tuple[str, str]] = field(default_factory=list)  # (id, title)

    def section(self, key: str, title: str, *content: object) -> Html:
        """Return a section with a heading."""
        id_ = self.prefix + key
        self.titles.append((id_, title))
        heading = element(f"h{self.level}", title, id=id_)
        return element("section", heading, *content)

    def heading(self, title: str) -> Html:
        """Return a heading inside a section."""
        return element(f"h{self.level + 1}", title)


def by_gain(rows: Sequence[SiteSummary]) -> list[SiteSummary]:
    """The sites with the largest gain first; those without a gain come last, the best personal model first."""

    def order(row: SiteSummary) -> tuple[bool, float]:
        return row.gain is None, -(row.gain or 0.0)

    return sorted(rows, key=order)


def extremes(rows: Sequence[SiteSummary], most: int = SHOWN) -> tuple[list[SiteSummary], str]:
    """The sites that a chart shows, in the given order, and a sentence about those that it does not."""
    if len(rows) <= most:
        return list(rows), ""
    half = most // 2
    first = f"The chart shows the first {half} and the last {half} of {count(len(rows), 'site')}."
    note = f"{first} The table of all sites has the others."
    return [*rows[:half], *rows[-half:]], note


def limited(rows: Sequence[list[object]], most: int = MAX_ROWS) -> tuple[Sequence[list[object]], Html | None]:
    """The first rows of a table, and a paragraph about the others."""
    if len(rows) <= most:
        return rows, None
    note = f"The table shows the first {most:,} of {len(rows):,} rows. The others are in events.jsonl."
    return rows[:most], element("p", note, class_="note")
