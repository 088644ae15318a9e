"""The secret of a site: made once, readable by its user only, never replaced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from colora.client.trainer_service.session import TrainerSession
from colora.client.trainer_service.site_secret import site_secret
from colora.client.training.privacy_budget import LEDGER, PrivacyLedger
from colora.common.atomic_io import save_arrays
from colora.common.config.loader import load_site
from colora.common.config.schema import to_json
from colora.common.errors import RefusedError, StateError
from colora.common.training.accountant import Spending

if TYPE_CHECKING:
    from conftest import SiteSetup


def test_the_secret_is_made_once_with_mode_0600(tmp_path: Path) -> None:
    first = site_secret(tmp_path)
    assert site_secret(tmp_path) == first
    assert int(first, 16).bit_length() > 200
    assert (tmp_path / "site.secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").mkdir()
    assert site_secret(tmp_path / "other") != first


@pytest.mark.parametrize("content", ["", "abc", "g" * 64, "\x00" * 64])
def test_a_damaged_secret_is_an_error_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "site.secret").write_text(content)
    with pytest.raises(StateError, match=r"site.secret does not hold the secret of a site"):
        site_secret(tmp_path)
    assert (tmp_path / "site.secret").read_text() == content


@pytest.mark.parametrize("place", [0, 10, 63, 64, 70, 71, 72, 100, 135])
def test_a_flipped_bit_of_the_secret_or_of_its_checksum_is_found(tmp_path: Path, place: int) -> None:
    """0x01 turns most hexadecimal digits into others."""
    site_secret(tmp_path)
    path = tmp_path / "site.secret"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(StateError, match=r"site\.secret does not hold the secret of a site"):
        site_secret(tmp_path)


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_secret_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path: Path, end: str) -> None:
    (tmp_path / "site.secret").write_text("0123456789abcdef" * 4 + end)
    assert site_secret(tmp_path) == "0123456789abcdef" * 4


def test_no_new_secret_is_made_where_the_old_one_made_noise(tmp_path: Path) -> None:
    """It would give a round that runs again another noise."""
    save_arrays(tmp_path / "town" / "round-000001.safetensors", {}, {"noised": False})
    first = site_secret(tmp_path)
    (tmp_path / "site.secret").unlink()
    assert site_secret(tmp_path) != first, "no noise, no harm"
    (tmp_path / "site.secret").unlink()
    save_arrays(tmp_path / "town" / "round-000002.safetensors", {}, {"noised": True})
    with pytest.raises(StateError, match=r"site\.secret is missing, but .*round-000002.* Restore it from a backup"):
        site_secret(tmp_path)
    (tmp_path / "town" / "round-000002.safetensors").unlink()
    PrivacyLedger(tmp_path / LEDGER).spend("town", "key", Spending(1.0, 0.5, 2))
    with pytest.raises(StateError, match=r"site\.secret is missing, but .*privacy\.json shows"):
        site_secret(tmp_path)
    assert not (tmp_path / "site.secret").exists()
    (tmp_path / "site.secret").write_text("f" * 64)  # as the sentence says
    assert site_secret(tmp_path) == "f" * 64


def test_a_round_that_runs_again_has_the_same_bits_and_those_of_another_secret_differ(site_setup: SiteSetup) -> None:
    """The stored reply is deleted in between, so that the round is trained again in a new session."""
    site_setup.configure(trainer='seeds = "secret"')
    plan = site_setup.plan()
    request, store = site_setup.request(plan), site_setup.state / plan.name / "round-000001.safetensors"

    def train_again() -> object:
        store.unlink(missing_ok=True)
        session = TrainerSession(load_site(site_setup.file))
        reply, replayed = session.answer(session.accept(plan.name, to_json(plan)), request, lambda done, total: None)
        assert not replayed
        return reply

    site_setup.state.mkdir()
    first, again = train_again(), train_again()
    assert site_setup.equal(first, again)  # type: ignore[arg-type]
    simulated = site_setup.expected(plan, request)[0]
    assert not site_setup.equal(first, simulated)  # type: ignore[arg-type]
    (site_setup.state / "site.secret").unlink()
    assert not site_setup.equal(first, train_again())  # type: ignore[arg-type]
    site_setup.configure(trainer='seeds = "recipe"')
    assert site_setup.equal(train_again(), simulated)  # type: ignore[arg-type]


def test_a_federation_cannot_be_called_like_the_secret(site_setup: SiteSetup) -> None:
    session = TrainerSession(load_site(site_setup.configure().file))
    plan = site_setup.plan("Site.secret")
    with pytest.raises(RefusedError, match="name: expected a name that the state folder does not use"):
        session.accept(plan.name, to_json(plan))
