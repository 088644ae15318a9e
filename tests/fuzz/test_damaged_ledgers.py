"""Damaged ledgers of the privacy budget: nothing changed is counted in silence, and nothing runs for ever."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from colora.client.training.privacy_budget import LEDGER, PrivacyLedger, check_budget
from colora.common.errors import ConfigError, DamagedError, RefusedError, StateError
from colora.common.training.accountant import Spending, epsilon_of, noise_for

from .test_damaged_disks import DAMAGES

SPENT = [Spending(1.1, 0.2, 50), Spending(0.9, 1.0, 3)]
ENTRY: dict[str, Any] = {"federation": "fed", "noise_multiplier": 1.1, "sample_rate": 0.2, "steps": 50}


def ledger(folder: Path) -> PrivacyLedger:
    written = PrivacyLedger(folder / LEDGER)
    for number, spending in enumerate(SPENT):
        written.spend("fed", f"{number:032x}", spending)
    return written


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_damaged_bytes_of_a_ledger_are_never_counted(tmp_path: Path, count: int) -> None:
    kept, rng = ledger(tmp_path), random.Random(14)
    whole, refused = kept.file.path.read_bytes(), 0
    for number in range(count):
        kept.file.path.write_bytes(DAMAGES[number % len(DAMAGES)](whole, rng))
        try:
            assert kept.spendings("fed") == SPENT, "a flip of a space changes nothing"
        except DamagedError as error:
            refused += 1
            assert "is damaged, so the privacy budget that the site has spent is unknown" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 0.9 * count


@pytest.mark.parametrize("spent", [{"steps": 5}, {"steps": 51}, {"noise_multiplier": 9.1}, {"federation": "other"}])
def test_a_plausible_change_is_found_by_the_checksum(tmp_path: Path, spent: dict[str, Any]) -> None:
    kept = ledger(tmp_path)
    data = json.loads(kept.file.path.read_text())
    next(iter(data["spendings"].values())).update(spent)
    kept.file.path.write_text(json.dumps(data))
    for call in (
        kept.spendings,
        lambda: kept.others("fed"),
        lambda: kept.has("x"),
        lambda: kept.spend("f", "x", SPENT[0]),
    ):
        with pytest.raises(DamagedError, match="its SHA-256 is not the stored one"):
            call()


@pytest.mark.parametrize("key", ["noise_multiplier", "sample_rate", "steps", "federation"])
@pytest.mark.parametrize(
    "value",
    [
        *(-49, -1.1, float("nan"), float("inf"), -float("inf"), 10**30, 10**400, 5e-324, 1e308),
        *(None, True, "1", [1], {}, "", "x" * 9999, 1.2),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_right_checksum_too(tmp_path: Path, key: str, value: Any) -> None:
    """Negative steps would lower ε, and a noise of NaN would keep the accountant busy."""
    kept = PrivacyLedger(tmp_path / LEDGER)
    kept.file.write({"a": ENTRY, "b": {**ENTRY, key: value}})
    if (key, value) in (("noise_multiplier", 1.2), ("federation", "1")):
        assert len(kept.spendings()) == 2
        return
    with pytest.raises(DamagedError, match="is damaged, so the privacy budget") as refused:
        kept.spendings()
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "5", "null", "[" * 100_000, '{"a": 1}', '{"sha256": "x", "spendings": {}}']
)
def test_another_file_is_no_ledger(tmp_path: Path, text: str) -> None:
    kept = PrivacyLedger(tmp_path / LEDGER)
    kept.file.path.write_text(text)
    with pytest.raises(DamagedError):
        kept.spendings()


def test_a_ledger_that_cannot_be_read_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir()
    with pytest.raises(StateError, match=r"privacy\.json cannot be read: Is a directory\."):
        PrivacyLedger(tmp_path / LEDGER).spendings()


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), 5e-324, 1e-170, 1e-100])
def test_noise_with_which_nothing_can_be_computed_is_refused(tmp_path: Path, noise: float) -> None:
    spending = Spending(noise, 0.1, 10)
    for call in (
        lambda: epsilon_of([spending], 1e-5),
        lambda: check_budget([SPENT[0], spending], 1e-5, 8.0, "privacy.epsilon", "ada"),
        lambda: PrivacyLedger(tmp_path / LEDGER).spend("fed", "x", spending),
    ):
        with pytest.raises(RefusedError, match=r"privacy\.noise_multiplier: expected 1e-06 to 1e\+09"):
            call()
    assert not (tmp_path / LEDGER).exists()


@pytest.mark.parametrize("error", [ZeroDivisionError("float division by zero"), OverflowError("x"), ValueError("x")])
def test_an_arithmetic_error_of_the_accountant_is_a_refusal(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from opacus.accountants import RDPAccountant

    def fail(*_: object, **__: object) -> float:
        raise error

    monkeypatch.setattr(RDPAccountant, "get_epsilon", fail)
    with pytest.raises(RefusedError, match="ε cannot be computed"):
        epsilon_of(SPENT, 1e-5)
    monkeypatch.setattr(RDPAccountant, "get_epsilon", lambda *_, **__: float("nan"))
    with pytest.raises(RefusedError, match="ε cannot be computed"):
        check_budget(SPENT, 1e-5, 8.0, "privacy.epsilon", "ada")


@pytest.mark.parametrize("epsilon", [5e-324, 1e-9])
def test_a_budget_that_no_noise_reaches_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="too small: no amount of noise reaches it"):
        noise_for(epsilon, 1e-5, 1.0, 10)
