"""Checks of a site's private key, its certificates, and the connection to its coordinator.

Every check returns one line of detail, or raises ``CheckFailed``.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from ....common.config.site_schema import CoordinatorSettings
from ....common.flower_compat import SIGNATURE_MAX_AGE, SIGNATURE_MAX_AHEAD
from .result import CheckFailed

TIMEOUT = 10.0  # seconds for the coordinator to answer
EXPIRES_SOON = 30  # days
UNTRUSTED = {2, 7, 18, 19, 20, 21}  # OpenSSL verify codes: no chain to the CA, or a signature that is not the CA's
NAME_MISMATCH = {62, 64}  # OpenSSL verify codes
NOT_YET_VALID, EXPIRED = 9, 10  # OpenSSL verify codes
LINK_CERTIFICATES = {"trainer": "trainer", "supernode": "node"}  # component -> file name in the link folder


def check_key(path: Path) -> str:
    """Check the private key by which the coordinator recognizes the site."""
    content = _read_private(path)
    try:
        key = load_ssh_private_key(content, None)
    except TypeError:
        raise CheckFailed(f"{path} has a passphrase, which a service cannot enter; ssh-keygen -p removes it") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CheckFailed(f"{path} is not an OpenSSH private key; colora provision creates one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")
        raise CheckFailed(f"{path} is a key of type {kind}, but Flower needs ECDSA (ssh-keygen -t ecdsa -b 384)")
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    fingerprint = base64.b64encode(hashlib.sha256(base64.b64decode(public.split()[1])).digest()).decode().rstrip("=")
    return f"ECDSA {key.curve.name}, SHA256:{fingerprint}"


def check_ca(path: Path) -> str:
    """Check the CA certificate that must have signed the coordinator's certificate."""
    authorities = _certificates(path)
    for certificate in authorities:
        _check_dates(certificate, path)
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            constraints = None
        if constraints is None or not constraints.ca:
            raise CheckFailed(f"{path} is not the certificate of a CA, so it cannot verify the coordinator")
    return ", ".join(f"{_name(c)}, valid until {_expiry(c)}" for c in authorities)


def check_link(folder: Path, components: tuple[str, ...]) -> str:
    """Check the certificates between trainer and SuperNode; ``components`` are those that run on this machine."""
    (authority, *_) = _certificates(folder / "ca.crt")
    _check_dates(authority, folder / "ca.crt")
    for component in components:
        path = folder / f"{LINK_CERTIFICATES[component]}.crt"
        (certificate, *_) = _certificates(path)
        _check_dates(certificate, path)
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise CheckFailed(f"{path} is not signed by {folder / 'ca.crt'}") from None
        try:
            key = load_pem_private_key(_read_private(path.with_suffix(".key")), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise CheckFailed(f"{path.with_suffix('.key')} is not a private key in PEM format") from None
        if key.public_key() != certificate.public_key():
            raise CheckFailed(f"{path.with_suffix('.key')} is not the key of {path.name}")
    return f"{' and '.join(components)}, signed by {_name(authority)}, valid until {_expiry(authority)}"


def check_coordinator(coordinator: CoordinatorSettings) -> str:
    """Check that a coordinator answers at the address, with a certificate of the site's CA and about the same time."""
    address = coordinator.address
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise CheckFailed(f"coordinator.address is {address!r}, not host:port")
    if coordinator.insecure:
        return _request(f"http://{address}/health", False, address)
    try:
        context = ssl.create_default_context(cafile=coordinator.ca)
    except (OSError, ssl.SSLError):
        _connect(host.strip("[]"), int(port), address)
        raise CheckFailed(f"{address} answers, but cannot be verified without a CA certificate") from None
    return f"{_request(f'https://{address}/health', context, address)}, with a certificate of this CA"


def _request(url: str, verify: ssl.SSLContext | bool, address: str) -> str:
    began = time.monotonic()
    try:
        with httpx.Client(verify=verify, timeout=TIMEOUT) as client:  # uses proxies of the environment, as SuperNode
            response = client.get(url)
    except httpx.HTTPError as error:
        raise CheckFailed(_connection_error(error, address, tls=bool(verify))) from None
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise CheckFailed(f"coordinator.address is {address!r}, not host:port") from None
    if response.status_code != 200:
        raise CheckFailed(f"{address} answers /health with status {response.status_code}, so it is not a colora server")
    _check_clock(response.headers.get("date", ""), address)
    return f"{address} answers in {1000 * (time.monotonic() - began):.0f} ms"


def _check_clock(date: str, address: str) -> None:
    """Compare this machine's clock with the time of a response; Flower refuses signatures of another time."""
    try:
        ahead = (datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):  # a proxy without the header
        return
    if not -SIGNATURE_MAX_AGE < ahead < SIGNATURE_MAX_AHEAD:
        relation = "ahead of" if ahead > 0 else "behind"
        raise CheckFailed(
            f"this machine's clock is {abs(ahead):.0f} s {relation} that of {address}; Flower accepts "
            f"{SIGNATURE_MAX_AHEAD:.0f} s ahead and {SIGNATURE_MAX_AGE:.0f} s behind"
        )


def _connect(host: str, port: int, address: str) -> None:
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise CheckFailed(_connection_error(error, address, tls=False)) from None


def _connection_error(error: BaseException, address: str, *, tls: bool) -> str:
    """Describe a failed connection by the cause below the HTTP library's error."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _verification_error(cause, address)
        if isinstance(cause, ssl.SSLError):
            if isinstance(cause, ssl.SSLEOFError) or "EOF" in (cause.reason or ""):
                return f"{address} closed the connection during the TLS handshake"
            return f"{address} answers without TLS ({cause.reason or 'no TLS record'}); it may be a plain HTTP server"
        if isinstance(cause, socket.gaierror):
            return f"{address}: unknown host"
        if isinstance(cause, ConnectionRefusedError):
            return f"{address} refused the connection; nothing listens there"
        if isinstance(cause, httpx.TimeoutException | TimeoutError):
            return f"{address} did not answer within {TIMEOUT:g} s; a firewall may block it"
    if not tls and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return f"{address} does not answer plain HTTP, which coordinator.insecure = true requires; it may use TLS"
    return f"{address} cannot be reached ({type(error).__name__}: {error})"


def _verification_error(error: ssl.SSLCertVerificationError, address: str) -> str:
    if error.verify_code in UNTRUSTED:
        return (
            f"the certificate of {address} is not signed by this site's CA; "
            "this is another coordinator, or ca.crt is out of date"
        )
    if error.verify_code in NAME_MISMATCH:
        return f"the certificate of {address} is signed by the right CA, but not valid for {address.rpartition(':')[0]}"
    if error.verify_code in (EXPIRED, NOT_YET_VALID):
        when = "has expired" if error.verify_code == EXPIRED else "is not valid yet"
        return f"the certificate of {address} {when}, or this machine's clock is wrong"
    return f"the certificate of {address} cannot be verified: {error.verify_message}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckFailed(f"{path} cannot be read: {error.strerror}") from None


def _read_private(path: Path) -> bytes:
    content = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise CheckFailed(f"{path} is accessible to other users (mode {mode:04o}); use chmod 600")
    return content


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise CheckFailed(f"{path} is not a certificate in PEM format") from None


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise CheckFailed(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if now < certificate.not_valid_before_utc:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d}"
        raise CheckFailed(f"{path} is not valid before {begins}, or this machine's clock is wrong")


def _expiry(certificate: x509.Certificate) -> str:
    days = (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    warning = f" (in {days} days)" if days < EXPIRES_SOON else ""
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}{warning}"


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value) if names else "an unnamed CA"
