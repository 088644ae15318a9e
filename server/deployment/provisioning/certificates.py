"""A certificate authority, the certificates that it signs, and the keys that identify sites."""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YEARS = 10  # for which an authority is valid
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority (ECDSA P-384) that signs certificates of servers and clients, not of authorities."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate, self.key = certificate, key

    @classmethod
    def new(cls, name: str) -> Authority:
        """Create an authority that is valid for ten years. A random suffix keeps its name unique."""
        key = _new_key()
        subject = _name(f"{name[:50]} {secrets.token_hex(4)}", "authority")
        expires = _now().replace(microsecond=0) + datetime.timedelta(days=365 * YEARS + 2)
        builder = _builder(subject, subject, key, expires).add_extension(_AUTHORITY, critical=True)
        builder = builder.add_extension(_usage(certificates=True), critical=True)
        return cls(builder.sign(key, hashes.SHA384()), key)

    @classmethod
    def read(cls, pair: Pair) -> Authority:
        """Load an authority. Raises ValueError if certificate or key is invalid or they do not belong together."""
        certificate, key = x509.load_pem_x509_certificate(pair.certificate), load_pem_private_key(pair.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError("the key does not belong to the certificate")
        return cls(certificate, key)

    @property
    def pair(self) -> Pair:
        """The authority's certificate and key."""
        return Pair(self.certificate.public_bytes(Encoding.PEM), _pem(self.key))

    def sign(self, unit: str, owner: str, usage: x509.ObjectIdentifier, hosts: Sequence[str] = ()) -> Pair:
        """Create a key and a certificate that is valid as long as the authority.

        ``unit`` and ``owner`` (at most 64 characters) are informative. TLS clients check ``hosts``: host names and IP
        addresses.
        """
        key = _new_key()
        expires = self.certificate.not_valid_after_utc
        builder = _builder(_name(owner, unit), self.certificate.subject, key, expires, issuer=self.key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_host, hosts))), critical=False)
        return Pair(builder.sign(self.key, hashes.SHA384()).public_bytes(Encoding.PEM), _pem(key))


def hosts_of(certificate: bytes) -> set[str]:
    """Return the host names and IP addresses of a PEM certificate. Raises ValueError if it is invalid."""
    extensions = x509.load_pem_x509_certificate(certificate).extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in names}


def new_site_key(comment: str) -> tuple[bytes, bytes]:
    """Create an ECDSA P-384 key pair (private, public) in OpenSSH format, as Flower's node authentication needs."""
    key = _new_key()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + f" {comment}\n".encode()


_AUTHORITY = x509.BasicConstraints(ca=True, path_length=0)


def _builder(
    subject: x509.Name,
    issuer_name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    expires: datetime.datetime,
    *,
    issuer: ec.EllipticCurvePrivateKey | None = None,
) -> x509.CertificateBuilder:
    """Set the fields common to all certificates. They are valid from yesterday, for clocks that are slow."""
    signer = (issuer or key).public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(days=1))
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str, unit: str) -> x509.Name:
    parts = ((NameOID.ORGANIZATION_NAME, "colora"), (NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in (*parts, (NameOID.COMMON_NAME, common))])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
