"""At least a few rows and labels for every site of a Dirichlet split, whatever its concentration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..common.config.schema import PartitionSettings
from ..common.errors import DataError


def top_up(parts: dict[str, list[int]], labels: Sequence[str], settings: PartitionSettings) -> int:
    """Move rows, in place, until every site has ``min_rows`` rows and ``min_labels`` labels; return how many moved.

    A site gets the label that it lacks, or a row, from the site that has most rows to spare. ``parts`` are indices of
    ``labels`` by site. A site that is given a label gets two rows of it, one of which can be held out for testing.
    Raises DataError where there are too few rows.
    """
    known = {labels[i] for part in parts.values() for i in part}
    rows, least = sum(map(len, parts.values())), settings.min_rows
    kinds = min(settings.min_labels, len(known))
    if rows < len(parts) * least:
        raise DataError(
            "partition.sites",
            f"at most {rows // least} sites with partition.min_rows = {least}",
            len(parts),
            message=f"partition.sites is {len(parts)}, but {rows} rows are too few for {least} at every site.",
            hint="Lower partition.sites or partition.min_rows.",
        )
    before = {i: site for site, part in parts.items() for i in part}
    for site, part in parts.items():
        while len(counts := Counter(labels[i] for i in part)) < kinds:
            _give(parts, site, labels, known - set(counts), settings)
        while len(part) < least:
            _give(parts, site, labels, known, settings)
    return sum(before[i] != site for site, part in parts.items() for i in part)


def follow(parts: dict[str, list[int]], labels: Sequence[str], trained: dict[str, Counter[str]]) -> int:
    """Move test rows, in place, to sites that train on their labels, and one to a site without any; return how many.

    ``parts`` are indices of ``labels`` by site, and ``trained`` counts each site's training rows by label. A row whose
    label no site trains on stays.
    """
    moved = 0
    for site in parts:
        for i in [i for i in parts[site] if not trained[site][labels[i]]]:
            best = max(trained, key=lambda other: trained[other][labels[i]])
            if trained[best][labels[i]]:
                parts[site].remove(i)
                parts[best].append(i)
                moved += 1
    for site in parts:
        if not parts[site]:
            donors = sorted(parts, key=lambda other: -len(parts[other]))
            spare = [(o, i) for o in donors if len(parts[o]) > 1 for i in parts[o] if trained[site][labels[i]]]
            for other, i in spare[:1]:
                parts[other].remove(i)
                parts[site].append(i)
                moved += 1
    return moved


def _give(
    parts: dict[str, list[int]], site: str, labels: Sequence[str], wanted: set[str], settings: PartitionSettings
) -> None:
    """Move up to two rows of one wanted label to a site. Raises DataError where no site can spare one."""
    best: tuple[int, int, str, str] | None = None  # spare rows, their number at the site, site, label
    for other, part in parts.items():
        if other == site:
            continue
        counts = Counter(labels[i] for i in part)
        for label in sorted(wanted & set(counts)):
            needed = 2 if len(counts) <= settings.min_labels else 0
            spare = min(len(part) - settings.min_rows, counts[label] - needed)
            if spare > 0 and (best is None or (spare, counts[label]) > best[:2]):
                best = spare, counts[label], other, label
    if best is None:
        raise DataError(
            "partition.min_labels",
            f"enough rows for {settings.min_labels} labels at every site",
            f"too few of {', '.join(sorted(wanted)[:5])}",
            message=f"The rows are too few to give every site {settings.min_labels} labels.",
            hint="Lower partition.sites, partition.min_labels or partition.min_rows.",
        )
    spare, _, other, label = best
    for i in [i for i in parts[other] if labels[i] == label][-min(2, spare) :]:
        parts[other].remove(i)
        parts[site].append(i)
