"""Columns of a source become rows of a task. Raises a DataError that names the row."""

from __future__ import annotations

from collections.abc import Sequence

from ...common.config.schema import DataSettings
from ...common.dataset import Row, SiteDataset
from ...common.errors import DataError
from ...common.tasks import task_class
from ...common.tasks.columns import RawRow


def parse_row(values: Row, number: int, data: DataSettings, site: str) -> Row | None:
    """A row of a source in the form of the site's task; None for a row that ``data.labels`` leaves out."""
    return task_class(data.task).parse_row(RawRow(values, number, site), data)


def check_rows(site: str, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> SiteDataset:
    """Check the rules that need all rows: some on both sides, and what the task asks for. Raises DataError."""
    if not train:
        raise DataError("data.source", "rows to train on", f"none in {data.source}", site=site)
    if not test:
        key, place = ("test_source", data.test_source) if data.test_source else ("test_fraction", data.source)
        raise DataError(f"data.{key}", "rows to test on", f"none in {place} beside {len(train)} to train on", site=site)
    try:
        labels = task_class(data.task).check_rows(data, train, test)
    except DataError as error:
        raise error.at_site(site) from None
    return SiteDataset(site, data.task, train, test, labels)
