"""TLS, and mutual TLS, with files that may be replaced while a process runs.

    [tls]
    certificate_file = "/run/tls/router.pem"
    key_file = "/run/tls/router.key"
    ca_file = "/run/tls/ca.pem"

Whoever makes a connection, on either side, makes it with the files as they are then. Connections that exist go on.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from hocket.errors import HocketError, Reason
from hocket.settings import build

if TYPE_CHECKING:
    from pathlib import Path

SERVICES: Final = ("router", "aggregator", "registry", "worker")
"""What `mutual` may name."""
_LOOK_SECONDS: Final = 1.0
"""How long the files may be taken to be unchanged."""
_FILE_BYTES_MAX: Final = 4 * 2**20

_log: Final = structlog.get_logger("tls")


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Table `[tls]`. Without any file there is no TLS.

    Args:
        certificate_file: Own certificate and those between it and the authority (PEM); what the process shows as a
            server, and as a client whoever asks for it.
        key_file: Its private key (PEM, not encrypted).
        ca_file: The authorities that peers' certificates must come from (PEM). Servers are otherwise checked against
            the public authorities that grpc brings along.
        mutual: Services whose callers must show a certificate that `ca_file` has signed.
        server_name: A name that the certificates of all servers called from here have in common, such as `hocket`. It
            is compared instead of the name in their address, which need not be in a certificate then; for workers
            whose addresses nobody knows beforehand.
    """

    certificate_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    mutual: tuple[str, ...] = ("aggregator", "worker")
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate_file is None) is not (self.key_file is None):
            raise ValueError("certificate_file and key_file go together")
        for service in self.mutual:
            if service not in SERVICES:
                raise ValueError(f"mutual cannot name {service!r}; there are {', '.join(SERVICES)}")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that are named."""
        named = (self.certificate_file, self.key_file, self.ca_file)
        return tuple(path for path in named if path is not None)


@dataclass(frozen=True, slots=True)
class Files:
    """What the files held at one time.

    Args:
        pair: Private key and certificate chain (PEM), None for neither.
        ca: Authorities that peers are checked against (PEM), None for the public ones.
    """

    pair: tuple[bytes, bytes] | None = field(repr=False)
    ca: bytes | None


class Tls:
    """The certificates of this process, read again when their files change.

    Files that are there but cannot be used, a certificate whose key has not followed yet for example, change nothing:
    the ones before stay in use, and the log says so. May be used from several threads, as grpc does.

    Args:
        settings: Names at least one file.

    Raises:
        HocketError: `BAD_REQUEST` if a file cannot be read, is no PEM, or the key is not the certificate's.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._seen = _states(settings)
        self._files = _read(settings)
        self._next_look = time.monotonic() + _LOOK_SECONDS

    @property
    def server_name(self) -> str:
        """What servers' certificates must be for; empty for the name in their address."""
        return self._settings.server_name

    def current(self) -> Files:
        """What to make a connection with now: the same object until the files change."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + _LOOK_SECONDS
                self._look()
            return self._files

    def _look(self) -> None:
        seen = _states(self._settings)
        if seen == self._seen:
            return
        try:
            files = _read(self._settings)
        except HocketError as error:
            _log.error("certificates not replaced: the ones before stay in use", reason=error.message)
        else:
            if _states(self._settings) != seen:
                return  # replaced while they were read: the next look reads them again
            self._files = files
            _log.info("certificates replaced", files=[str(path) for path in self._settings.files])
        self._seen = seen

    def server_credentials(self, service: str) -> grpc.ServerCredentials:
        """What one port of a service listens with; another port needs its own.

        Raises:
            HocketError: `BAD_REQUEST` without a certificate, or without an authority for callers' certificates where
                the settings ask for those.
        """
        offered = self.current()
        mutual = service in self._settings.mutual
        if offered.pair is None:
            raise HocketError(
                Reason.BAD_REQUEST, "a service that speaks TLS needs [tls] certificate_file and key_file", field="tls"
            )
        if mutual and offered.ca is None:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"callers of the {service} must show a certificate: name the authority that signs them in "
                f"[tls] ca_file, or take {service} out of [tls] mutual",
                field="tls",
            )

        def fetch() -> Any:  # noqa: ANN401 - a configuration, or None for no change, which the types do not know
            """Asked before every handshake."""
            nonlocal offered
            files = self.current()
            if files is offered:
                return None
            offered = files
            return _configuration(files)

        return grpc.dynamic_ssl_server_credentials(_configuration(offered), fetch, require_client_authentication=mutual)


def open_tls(**values: object) -> Tls | None:
    """The certificates that settings of table `[tls]` name; None where they name none.

    Raises:
        HocketError: `BAD_REQUEST` as `hocket.settings.build` and `Tls`.
    """
    settings = build(TlsSettings, values, "tls")
    return Tls(settings) if settings.files else None


def _configuration(files: Files) -> grpc.ServerCertificateConfiguration:
    pairs = [] if files.pair is None else [files.pair]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=files.ca)


def _states(settings: TlsSettings) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells a file from the one that was there before; None for one that is not there."""
    states: list[tuple[int, int, int] | None] = []
    for path in settings.files:
        try:
            status = path.stat()
        except OSError:
            states.append(None)
        else:
            states.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(states)


def _read(settings: TlsSettings) -> Files:
    """The files, checked here: what grpc cannot use it would complain about at every handshake."""
    ca = None if settings.ca_file is None else _bytes(settings.ca_file)
    pair = None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        try:
            # What is not ASCII is in the comments between certificates.
            context.load_verify_locations(cadata=ca.decode("ascii", errors="ignore"))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise HocketError(
                Reason.BAD_REQUEST, f"{settings.ca_file} holds no certificates of authorities (PEM): {error}"
            ) from error
    if settings.certificate_file is not None and settings.key_file is not None:
        pair = (_bytes(settings.key_file), _bytes(settings.certificate_file))
        try:
            context.load_cert_chain(settings.certificate_file, settings.key_file, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{settings.certificate_file} and {settings.key_file} are not a certificate and its unencrypted "
                f"private key (PEM): {error}",
            ) from error
    return Files(pair, ca)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _FILE_BYTES_MAX:
        raise HocketError(Reason.BAD_REQUEST, f"{path} has more than {_FILE_BYTES_MAX} bytes: it holds no certificates")
    return data


_ADVICE: Final = (
    (r"certificate has expired", "the server's certificate has expired: renew it"),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the server's certificate does not come from an authority that is trusted here: name the right one in ca_file",
    ),
    (
        r"Peer name (?P<name>.*) is not in peer certificate",
        "the server's certificate is not for {name}: call it by a name in its certificate, or have one made for {name}",
    ),
    (r"WRONG_VERSION_NUMBER", "the server speaks no TLS: leave out ca_file, certificate_file and key_file"),
    (
        r"(all addresses|all backends failing).*(Socket closed|Connection reset|Broken pipe)",
        "the server hung up: if it speaks TLS, name its authority in ca_file; if it asks for certificates, show one",
    ),
)
"""What to do, by what grpc 1.76 says when no connection comes about."""


def advice(details: str) -> str | None:
    """What to do about a connection that failed for its certificates, by grpc's words; None for other failures."""
    for pattern, text in _ADVICE:
        if found := re.search(pattern, details, re.DOTALL):
            return text.format_map(found.groupdict())
    return None
