"""A site's key, its certificates and the way to its coordinator, looked at before they are used.

Every check returns what is there in one line, or raises :class:`Wrong` with what is not, in plain words.
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
from .result import CheckFailed

PATIENCE = 10.0  # seconds for the coordinator
SOON = 30  # days
FOREIGN = {2, 7, 18, 19, 20, 21}  # OpenSSL's codes: no chain to the CA, or one whose signatures are not the CA's
MISMATCH = {62, 64}
NOT_YET, EXPIRED = 9, 10


def check_key(path: Path) -> str:
    """The private key that the coordinator knows the site by."""
    content = _read_private(path)
    try:
        key = load_ssh_private_key(content, None)
    except TypeError:
        raise CheckFailed(
            f"{path} has a passphrase, which nobody enters at a start: ssh-keygen -p takes it off"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CheckFailed(f"{path} is no OpenSSH private key (colora provision makes one)") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")
        raise CheckFailed(f"{path} is a key of another kind, {kind}: Flower wants ECDSA (ssh-keygen -t ecdsa -b 384)")
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    print_of = base64.b64encode(hashlib.sha256(base64.b64decode(public.split()[1])).digest()).decode().rstrip("=")
    return f"ECDSA {key.curve.name}, SHA256:{print_of}"


def check_ca(path: Path) -> str:
    """The certificate that the coordinator's must be signed by."""
    authorities = _certificates(path)
    for certificate in authorities:
        _check_dates(certificate, path)
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            constraints = None
        if constraints is None or not constraints.ca:
            raise CheckFailed(f"{path} is a certificate, but not of an authority: it cannot vouch for the coordinator")
    return ", ".join(f"{_called(c)}, valid until {_until(c)}" for c in authorities)


def check_link(folder: Path, parts: tuple[str, ...]) -> str:
    """The certificates between trainer and SuperNode; ``parts`` (``trainer``, ``node``) are the ones needed here."""
    (authority, *_) = _certificates(folder / "ca.crt")
    _check_dates(authority, folder / "ca.crt")
    for part in parts:
        path = folder / f"{part}.crt"
        (certificate, *_) = _certificates(path)
        _check_dates(certificate, path)
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise CheckFailed(f"{path} is not signed by {folder / 'ca.crt'}") from None
        try:
            key = load_pem_private_key(_read_private(path.with_suffix(".key")), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise CheckFailed(f"{path.with_suffix('.key')} is no private key (PEM)") from None
        if key.public_key() != certificate.public_key():
            raise CheckFailed(f"{path.with_suffix('.key')} is not the key of {path.name}")
    return f"{' and '.join(parts)} of {_called(authority)}, valid until {_until(authority)}"


def check_coordinator(coordinator: CoordinatorSettings) -> str:
    """Whether a coordinator with a certificate of the site's CA answers at the address."""
    address = coordinator.address
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise CheckFailed(f"coordinator.address is {address!r}, not host:port")
    if coordinator.insecure:
        return _ask(f"http://{address}/health", False, address)
    try:
        context = ssl.create_default_context(cafile=coordinator.ca)
    except (OSError, ssl.SSLError):
        _connect(host.strip("[]"), int(port), address)
        raise CheckFailed(f"{address} answers, but without a CA certificate nobody can tell who it is") from None
    return f"{_ask(f'https://{address}/health', context, address)}, with a certificate of this CA"


def _ask(url: str, verify: ssl.SSLContext | bool, address: str) -> str:
    began = time.monotonic()
    try:
        with httpx.Client(verify=verify, timeout=PATIENCE) as client:  # proxies from the environment, as SuperNode
            answer = client.get(url)
    except httpx.HTTPError as error:
        raise CheckFailed(_why(error, address, tls=bool(verify))) from None
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise CheckFailed(f"coordinator.address is {address!r}, not host:port") from None
    if answer.status_code != 200:
        raise CheckFailed(
            f"{address} answers {answer.status_code} to /health: something else than colora server is there"
        )
    return f"{address} answers in {1000 * (time.monotonic() - began):.0f} ms"


def _connect(host: str, port: int, address: str) -> None:
    try:
        socket.create_connection((host, port), PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise CheckFailed(_why(error, address, tls=False)) from None


def _why(error: BaseException, address: str, *, tls: bool) -> str:
    """The reason that lies below what an HTTP library says."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _why_not_trusted(cause, address)
        if isinstance(cause, ssl.SSLError):
            if isinstance(cause, ssl.SSLEOFError) or "EOF" in (cause.reason or ""):
                return f"{address} hangs up during the TLS handshake"
            return f"{address} answers, but not with TLS: a plain HTTP server ({cause.reason or 'no TLS record'})"
        if isinstance(cause, socket.gaierror):
            return f"{address}: no such host is known here"
        if isinstance(cause, ConnectionRefusedError):
            return f"{address} refuses the connection: nothing listens there"
        if isinstance(cause, httpx.TimeoutException | TimeoutError):
            return f"{address} does not answer within {PATIENCE:g} s: a firewall, or another host"
    if not tls and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return f"{address} does not speak plain HTTP, as coordinator.insecure = true wants: a TLS server?"
    return f"{address} cannot be reached ({type(error).__name__}: {error})"


def _why_not_trusted(error: ssl.SSLCertVerificationError, address: str) -> str:
    if error.verify_code in FOREIGN:
        return f"{address} shows a certificate that this site's CA did not sign: another coordinator, or an old ca.crt"
    if error.verify_code in MISMATCH:
        return f"{address} shows a certificate of the right CA, but for other names than {address.rpartition(':')[0]}"
    if error.verify_code in (EXPIRED, NOT_YET):
        when = "has expired" if error.verify_code == EXPIRED else "is not valid yet"
        return f"{address} shows a certificate that {when} (or this machine's clock is wrong)"
    return f"{address} shows a certificate that cannot be trusted: {error.verify_message}"


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
        raise CheckFailed(f"{path} is open to other users (mode {mode:04o}): chmod 600 closes it")
    return content


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise CheckFailed(f"{path} is no certificate (PEM)") from None


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise CheckFailed(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if now < certificate.not_valid_before_utc:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d}"
        raise CheckFailed(f"{path} is not valid before {begins} (or this machine's clock is wrong)")


def _until(certificate: x509.Certificate) -> str:
    left = (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}" + (f", only {left} days more" if left < SOON else "")


def _called(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value) if names else "a CA without a name"
