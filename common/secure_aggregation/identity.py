"""Who is who: the key of a site, with which it signs and decrypts, and the public keys of all sites.

The keys are those that ``colora provision`` wrote into the site folders, ECDSA P-384 in OpenSSH format. The coordinator
has no part in them, so it can neither invent a site nor read what one site sends to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from ..errors import ConfigError, RefusedError, StateError
from .masking import NAME, derive

NONCE_BYTES = 12
MAX_ROSTER = 1 << 20  # bytes of a roster file
SIGNATURE = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)  # RFC 6979: a repeated answer has the same bytes
PublicKeys = Mapping[str, ec.EllipticCurvePublicKey]


@dataclass(frozen=True)
class Identity:
    """A site's name and private key, and the public keys of all sites by name, its own among them."""

    site: str
    key: ec.EllipticCurvePrivateKey
    roster: PublicKeys

    def sign(self, text: bytes) -> bytes:
        """Return the signature of a text."""
        return self.key.sign(NAME + text, SIGNATURE)

    def verify(self, site: str, text: bytes, signature: bytes) -> None:
        """Raise RefusedError unless this site signed the text."""
        if not is_signed(self.public_key(site), text, signature):
            message = f"The mask key that the coordinator presents for {site!r} is not signed by {site!r}."
            field = f"signature of {site}"  # the coordinator is told the field
            raise RefusedError(field, f"one by the key of {site}", "another", site=self.site, message=message)

    def public_key(self, site: str) -> ec.EllipticCurvePublicKey:
        """Return a site's public key. Raises RefusedError for a site that the roster lacks."""
        if site not in self.roster:
            hint = "Get the roster of all sites from whoever ran colora provision, and compare it with the other sites."
            message = f"The coordinator names a site {site!r} that is not in this site's roster of public keys."
            raise RefusedError("sites", "those of the roster", site, site=self.site, message=message, hint=hint)
        return self.roster[site]

    def seal(self, to: str, text: bytes, context: bytes) -> bytes:
        """Return ``text`` encrypted for a site. The same arguments give the same bytes.

        The nonce derives from key and text, so that no two texts have one nonce.
        """
        key = self._shared_key(to, self.site, to, context)
        nonce = hashlib.sha256(b"nonce" + key + text).digest()[:NONCE_BYTES]
        return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)

    def open(self, sender: str, sealed: bytes, context: bytes) -> bytes | None:
        """Return what a site sealed for this one in this context; None if it is nothing of the kind."""
        key = self._shared_key(sender, sender, self.site, context)
        try:
            return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
        except (InvalidTag, ValueError):
            return None

    def _shared_key(self, other: str, sender: str, to: str, context: bytes) -> bytes:
        shared = self.key.exchange(ec.ECDH(), self.public_key(other))
        return derive(shared, context, f"envelope from {sender} to {to}")


def is_signed(key: ec.EllipticCurvePublicKey, text: bytes, signature: bytes) -> bool:
    """Whether the owner of a key signed a text."""
    try:
        key.verify(signature, NAME + text, SIGNATURE)
    except InvalidSignature:
        return False
    return True


def read_identity(site: str, key: Path, roster: Path) -> Identity:
    """Read the key of a site and the roster. Raises ConfigError."""
    private, public = _read(key, "trainer.aggregation_key", site), _read(roster, "trainer.roster", site)
    try:
        own = load_ssh_private_key(private, None)
    except (ValueError, TypeError):
        own = None
    if not isinstance(own, ec.EllipticCurvePrivateKey) or not isinstance(own.curve, ec.SECP384R1):
        raise _unusable("trainer.aggregation_key", key, "a private key (ECDSA P-384, OpenSSH format)", site)
    try:
        keys = parse_roster(public)
    except ValueError:
        raise _unusable("trainer.roster", roster, "public keys (ecdsa-sha2-nistp384), each with a name", site) from None
    if keys.get(site) != own.public_key():
        raise _unusable("trainer.roster", roster, f"the public key of {key} with the name {site}", site)
    return Identity(site, own, keys)


def parse_roster(text: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    """Return the public keys of a roster by name: lines in OpenSSH format. Raises ValueError."""
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for line in text.decode().splitlines():
        if not line.strip():
            continue
        name, key = line.split()[-1], load_ssh_public_key(line.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ValueError("a key of another kind")
        if len(line.split()) != 3 or name in keys or key in keys.values():
            raise ValueError("a line without a name, or the same name or key twice")
        keys[name] = key
    return keys


def coordinator_roster(path: Path) -> PublicKeys:
    """Return the public keys that the coordinator checks signatures with, none without a file. Raises StateError.

    The sites do not rely on it: each has a roster of its own.
    """
    if not path.exists():
        return {}
    try:
        return parse_roster(path.read_bytes())
    except (OSError, ValueError) as error:
        message = f"{path} does not hold public keys (ecdsa-sha2-nistp384), each with a name: {error}."
        hint = "Copy it from the folder that colora provision wrote, or delete it: it is optional."
        raise StateError(str(path), "a roster", error, message=message, hint=hint) from None


def _read(path: Path, field: str, site: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_ROSTER)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"Secure aggregation needs {path} ({field}), which cannot be read: {reason}."
        hint = "colora provision writes it into the folder of each site."
        raise ConfigError(field, "a readable file", reason, site=site, message=message, hint=hint) from None


def _unusable(field: str, path: Path, expected: str, site: str) -> ConfigError:
    message = f"{path} does not hold {expected}."
    hint = "Get it from whoever ran colora provision."
    return ConfigError(field, expected, "something else", site=site, message=message, hint=hint)
