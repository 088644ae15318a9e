"""The signature of a SuperNode's request: checked before the body is read, and good for one connection only.

Flower signs a timestamp, not the request. Whoever sees a signature could use it for any call of that site for five
minutes, so the gateway accepts it only on the connection on which it came first.
"""

from __future__ import annotations

import datetime
import time
from base64 import b64decode
from collections.abc import Iterable, Mapping
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ....common.flower_compat import SIGNATURE_MAX_AGE, SIGNATURE_MAX_AHEAD

# In the format of Flower's errors, so that SuperNode shows it. The SuperLink's own response has no reason.
REFUSALS = {  # of a signature: status and content
    "unknown key": (400, {"code": 2004, "detail": "This key is not registered with the coordinator."}),
    "invalid": (401, {"detail": "Invalid SuperNode authentication: check the site's key and the clocks."}),
    "used": (503, {"detail": "This signature was already used on another connection. Sign the request again."}),
}
Verdict = Literal["valid", "unknown key", "invalid", "used"]


class SignatureCheck:
    """Checks the three headers of a request against the registered keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        """``keys`` are public keys as SuperNodes send them: PEM in base64."""
        self.keys = {key: load_pem_public_key(b64decode(key)) for key in keys}
        self._used: dict[tuple[str, str], tuple[float, object]] = {}  # (key, timestamp) → when and where it was used

    def check(self, headers: Mapping[str, str], connection: object) -> Verdict:
        """Check a request's headers. ``connection`` identifies the connection on which the request came."""
        key, signed_at = headers.get("flwr-public-key", ""), headers.get("flwr-timestamp", "")
        public = self.keys.get(key)
        if public is None:
            return "unknown key"
        if not (_is_recent(signed_at) and _is_signed(public, signed_at, headers.get("flwr-signature", ""))):
            return "invalid"
        # A second valid signature of the same text can be computed from the first, so the text is what is remembered.
        self._forget_old()
        _, first = self._used.setdefault((key, signed_at), (time.monotonic(), connection))
        return "valid" if first is connection else "used"

    def _forget_old(self) -> None:
        """Forget what is too old to be accepted again. The oldest entries come first."""
        before = time.monotonic() - SIGNATURE_MAX_AGE - SIGNATURE_MAX_AHEAD
        while self._used and self._used[first := next(iter(self._used))][0] < before:
            del self._used[first]


def _is_recent(signed_at: str) -> bool:
    try:
        age = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(signed_at)).total_seconds()
    except (ValueError, TypeError):  # no time, or a time without a zone
        return False
    return -SIGNATURE_MAX_AHEAD < age < SIGNATURE_MAX_AGE


def _is_signed(public: object, text: str, signature: str) -> bool:
    try:
        assert isinstance(public, EllipticCurvePublicKey)
        public.verify(b64decode(signature, validate=True), text.encode("ascii"), ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, UnicodeError):
        return False
    return True
