"""The labels of a site's first state are those of its head for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.label_list import with_pinned_labels
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import SiteDataset
from colora.common.errors import StateError
from colora.common.models.base_model import load_base_model
from colora.common.models.saved import read_saved_model
from colora.common.protocol.types import TrainRequest
from tests.conftest import labelled_rows, write_lines


def dataset(*labels: str) -> SiteDataset:
    return SiteDataset("ada", "classification", (), (), labels)


def test_known_labels_keep_the_order_of_the_first_state() -> None:
    assert with_pinned_labels(dataset("a", "b"), ()).labels == ("a", "b")
    assert with_pinned_labels(dataset("a", "b"), ("b", "c", "a")).labels == ("b", "c", "a")
    with pytest.raises(StateError, match=r"site ada: The rows have the label 'd', .* Its labels are b, c, a\."):
        with_pinned_labels(dataset("a", "d"), ("b", "c", "a"))


def test_rows_that_change_between_rounds_do_not_change_what_the_head_means(tiny_recipe: dict, tmp_path: Path) -> None:
    """Without the pin, the output of "no" would stand for "maybe" once no row says "maybe"."""
    site = tiny_recipe["site"][0]
    recipe = recipe_from(tiny_recipe)

    def trainer(*labels: str) -> Trainer:
        for key in ("source", "test_source"):
            write_lines(Path(site[key]), labelled_rows(list(labels), 12))
        rows = load_site_rows(SiteSettings("ada", recipe.site[0].data), 0)
        model = attach_adapters(load_base_model(recipe.plan.model, generates=False), recipe.plan)
        return Trainer(model, rows, StateStore(tmp_path / "state", "tiny"))

    first, plan = trainer("maybe", "no", "yes"), to_json(recipe.plan)
    shared = initial_shared_state(recipe.plan, 3)
    reply = first.handle(TrainRequest("tiny", 1, "train", 0, plan, shared, False))
    second = trainer("no", "yes")
    assert second.task.rows.labels == ("maybe", "no", "yes")
    second.handle(TrainRequest("tiny", 2, "train", 1, plan, dict(reply.shared), True))
    saved = read_saved_model(tmp_path / "state")
    assert saved.metadata.labels == ("maybe", "no", "yes")
    assert dict(saved.metadata.columns) == {"text": "text", "prompt": "prompt"}
    with pytest.raises(StateError, match="'other'"):
        trainer("no", "other")
