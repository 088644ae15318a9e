"""The secret of a site, from which its seeds derive: the order of examples, dropout and first personal values.

A coordinator chooses the recipe's seed. From a seed that it knows it could compute which example a step sees and which
inputs dropout removes. The secret is made once and stays, so a round that runs again gives the same bits.
"""

from __future__ import annotations

from pathlib import Path

from ...common.atomic_io import load_arrays
from ...common.errors import StateError
from ...common.models.saved import FILES
from ...common.secret_file import new_secret, read_secret
from ..training.privacy_budget import LEDGER

FILE = "site.secret"
NO_ARRAYS = "\0"  # a prefix that no array has


def site_secret(state: Path) -> str:
    """Return the secret in the state folder, 64 hexadecimal digits. The first call makes it, with mode 0600.

    Raises StateError for a file that cannot be read, written or understood, and for a missing one where rounds with
    noise were made. A damaged secret is not replaced, since a new one would change the order of the examples in the
    middle of a federation, and the noise of a round that runs again. One without a checksum is not checked: a flipped
    digit there only costs privacy budget (``private_rounds.py``).
    """
    path = state / FILE
    hint = "Restore the file. If you delete it, the examples are trained in a new order from the next round on."
    return read_secret(path, "a site", hint) or _new_secret(path)


def _new_secret(path: Path) -> str:
    """Make and write a secret. Raises StateError where the old one's noise is in the replies of the site."""
    witness = _noise_in(path.parent)
    if witness:
        raise StateError(
            str(path),
            "the secret of the site",
            "no file",
            message=f"{path} is missing, but {witness} shows that its noise was used for differential privacy.",
            hint=f"Restore it from a backup. If there is none, write a new one (openssl rand -hex 32 > {path}): "
            "rounds that run again then get other noise and spend privacy budget again.",
        )
    return new_secret(path)


def _noise_in(state: Path) -> Path | None:
    """Return the ledger of the privacy budget or a state with noise, if there is one."""
    if (state / LEDGER).exists():
        return state / LEDGER
    for path in sorted(state.glob(f"*/{FILES}")):
        try:
            meta = load_arrays(path, prefix=NO_ARRAYS)[1]
        except StateError:  # damaged: the ledger says more than it could
            continue
        if meta.get("noised"):
            return path
    return None
