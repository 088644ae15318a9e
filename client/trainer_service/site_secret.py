"""The secret of a site, from which its seeds derive: the order of examples, dropout and first personal values.

A coordinator chooses the recipe's seed. From a seed that it knows it could compute which example a step sees and which
inputs dropout removes. The secret is made once and stays, so a round that runs again gives the same bits.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from ...common.atomic_io import write_atomically
from ...common.errors import StateError

FILE = "site.secret"
_FORM = re.compile(r"[0-9a-f]{64}")


def site_secret(state: Path) -> str:
    """Return the secret in the state folder, 64 hexadecimal digits. The first call makes it, with mode 0600.

    Raises StateError for a file that cannot be read, written or understood. A damaged secret is not replaced, since a
    new one would change the order of the examples in the middle of a federation.
    """
    path = state / FILE
    try:
        found = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        found = secrets.token_hex(32)
        write_atomically(path, f"{found}\n".encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise StateError(str(path), "a readable file", reason, message=f"Cannot read {path}: {reason}.") from None
    if not _FORM.fullmatch(found):
        raise StateError(
            str(path),
            "64 hexadecimal digits",
            "something else",
            message=f"{path} does not hold the secret of a site.",
            hint="Restore the file. If you delete it, the examples are trained in a new order from the next round on.",
        )
    return found
