"""An adapter that makes all texts alike turns an accuracy into the share of a label."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from colora.client.trainer_service.session import TrainerSession
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import load_site
from colora.common.config.schema import Plan, to_json
from colora.common.protocol.types import Arrays

if TYPE_CHECKING:
    from conftest import SiteSetup

UP, DOWN = "encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"
LARGE = 1e6


def leveling_adapter(plan: Plan) -> Arrays:
    """Two rank-1 updates after which the last layer norm gives every text the same features, up to 1/LARGE.

    The first adds +z to one hidden unit and -z to another; gelu makes the sum of the two |z|. The second adds this sum,
    which is positive for every text, times a large fixed vector.
    """
    rng = np.random.default_rng(0)
    values = {key: np.zeros(array.shape, np.float32) for key, array in initial_shared_state(plan).items()}
    values[f"{UP}.lora_A.weight"][0] = rng.normal(size=values[f"{UP}.lora_A.weight"].shape[1])
    values[f"{UP}.lora_B.weight"][:2, 0] = LARGE, -LARGE
    values[f"{DOWN}.lora_A.weight"][0, :2] = 1.0
    values[f"{DOWN}.lora_B.weight"][:, 0] = LARGE * rng.normal(size=len(values[f"{DOWN}.lora_B.weight"]))
    return values


@pytest.mark.parametrize(("rule", "parts"), [("all", 30), ("rounded", 5)])
def test_the_share_of_a_label_is_sent_exactly_or_in_fifths(site_setup: SiteSetup, rule: str, parts: int) -> None:
    """The site trains in round 1 and gets the adapter in round 2. It has 30 test rows, and 5 is about √30."""
    site_setup.configure("[allow]", f'metrics = "{rule}"')
    words = "red blue green cat dog sun moon sea hill".split()  # noqa: SIM905
    texts = [" ".join(np.roll(words, k)[: 4 + k % 5]) for k in range(120)]
    rows = [f"{text},{'no' if k % 3 == 0 else 'yes'}" for k, text in enumerate(texts)]
    (site_setup.folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    plan = site_setup.plan(method="fedit")
    adapter = dataclasses.replace(plan.adapter, rank=1, alpha=1.0, target_modules=(UP, DOWN))
    plan = dataclasses.replace(plan, adapter=adapter)
    session = TrainerSession(load_site(site_setup.file))
    accepted = session.accept(plan.name, to_json(plan))
    first = site_setup.request(plan)
    session.answer(accepted, first, lambda done, total: None)
    request = site_setup.request(plan, 2, shared=leveling_adapter(plan))
    reply, _ = session.answer(accepted, request, lambda done, total: None)
    sent = session.released(accepted, request, reply).reply.metrics["personal.accuracy"]
    rows_of_test = session.trainer(accepted).task.rows.test
    yes = Counter(row["label"] for row in rows_of_test)["yes"] / len(rows_of_test)
    print(f"the share of yes is {yes:.3f}, sent: {sent:.3f}")
    assert len(rows_of_test) == 30
    assert yes not in (0.0, 0.5, 1.0)
    expected = [round(share * parts) / parts for share in (yes, 1 - yes)]  # the site's head decides for one label
    assert any(sent == pytest.approx(share) for share in expected)
