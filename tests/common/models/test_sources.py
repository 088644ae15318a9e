"""Where base models come from."""

from __future__ import annotations

import pytest

from colora.common.config.schema import ModelSettings
from colora.common.errors import ModelError
from colora.common.models.sources import source_folder


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub has changed its HTTP client, whose errors are no OSError."""
    error = pytest.importorskip(client).ConnectError("Name or service not known")

    def unreachable(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match="'some/model' is neither a local folder nor a reachable hub repository"):
        source_folder(ModelSettings("some/model"))
