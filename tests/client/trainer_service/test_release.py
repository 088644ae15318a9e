"""Which metrics leave a site, and what they say about its rows."""

from __future__ import annotations

import math

import pytest

from colora.client.trainer_service.release import SiteSize, release, rounded_metrics
from colora.common.protocol.types import BENEFIT, MAX_BENEFIT, METRIC_NAMES, UPDATE_SCALE, TrainReply

SIZE = SiteSize(train=90, test=30)
METRICS = {
    "personal.accuracy": 22 / 30,
    "personal.loss": 0.61842,
    "train.loss": 12.345,
    BENEFIT: 0.91,
    UPDATE_SCALE: 0.1234,
}


def reply_with(metrics: dict[str, float]) -> TrainReply:
    return TrainReply("ada", "town", 3, "key", {}, 8, 8, metrics)


def test_all_leaves_every_metric_as_it_is() -> None:
    released = release(reply_with(METRICS), "all", SIZE)
    assert released.reply.metrics == METRICS
    assert (released.withheld, released.rounded) == ((), ())


def test_none_leaves_not_even_the_training_loss() -> None:
    released = release(reply_with(METRICS), "none", SIZE)
    assert released.reply.metrics == {}
    assert released.withheld == tuple(sorted(METRICS))
    assert (released.reply.key, released.reply.terms) == ("key", 8)


@pytest.mark.parametrize("rule", ["all", "rounded"])
def test_a_second_evaluation_of_a_round_has_no_metrics(rule: str) -> None:
    released = release(reply_with(METRICS), rule, SIZE, evaluates=False)  # type: ignore[arg-type]
    assert released.reply.metrics == {}
    assert released.withheld == tuple(sorted(METRICS))


def test_rounded_metrics_by_hand() -> None:
    """√30 is about 5, so shares are fifths; the ratio of 64 examples is in eighths; the rest has two digits."""
    assert rounded_metrics(METRICS, SIZE) == {
        "personal.accuracy": 4 / 5,
        "personal.loss": 0.62,
        "train.loss": 12.0,
        BENEFIT: 7 / 8,
        UPDATE_SCALE: 0.12,
    }


def test_the_share_of_the_majority_label_is_blurred_to_its_standard_error() -> None:
    """An adapter that makes all texts alike has the accuracy of the majority label: k of 30 rows.

    Exactly, the coordinator reads k. Rounded, 31 values of k become 6, and k is known to ±3 rows, which is about the
    standard error of k itself, √(30 · ½ · ½) = 2.7.
    """
    sent = {k: rounded_metrics({"personal.accuracy": k / 30}, SIZE)["personal.accuracy"] for k in range(31)}
    assert len(set(sent.values())) == 6
    spread = [[k for k in sent if sent[k] == value] for value in set(sent.values())]
    assert max(len(each) for each in spread) == 7
    assert all(abs(sent[k] - k / 30) <= 1 / 10 + 1e-12 for k in sent)
    assert (sent[0], sent[30]) == (0.0, 1.0)


@pytest.mark.parametrize("size", [SiteSize(0, 0), SiteSize(1, 1), SiteSize(7, 3), SiteSize(10**6, 10**6)])
def test_a_rounded_metric_stays_in_its_range_and_rounding_twice_is_rounding_once(size: SiteSize) -> None:
    values = {name: (MAX_BENEFIT if name == BENEFIT else 1.0) for name in METRIC_NAMES}
    assert rounded_metrics(values, size) == values
    once = rounded_metrics({name: value * 0.7654321 for name, value in values.items()}, size)
    assert rounded_metrics(once, size) == once


def test_numbers_that_are_none_pass_as_they_are() -> None:
    found = rounded_metrics({"train.loss": math.nan, "shared.loss": math.inf}, SIZE)
    assert math.isnan(found["train.loss"])
    assert found["shared.loss"] == math.inf
