"""TLS between Baton's processes: one group of settings, and the credentials that are made of it.

Every process takes the same three files: a certificate with its key, shown to whoever dials it and
to whomever it dials, and the authorities that sign the deployment's parts. Router and workers that
are told of such authorities speak mutual TLS with each other and refuse everybody else: whoever
could register a worker would be given other people's prompts.

Files are read anew at each dial and, where they have changed, at each handshake, so a certificate
is renewed by replacing its files. New files that do not fit each other change nothing.
"""

import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """The same group in every process. Empty, the default: plain text, for one machine."""

    tls_cert: str = ""
    """PEM file with the certificate chain that this process shows; empty: plain text. It is read
    again when it changes, as all of these files are."""

    tls_key: str = ""
    """PEM file with the private key of tls_cert."""

    tls_ca: str = ""
    """PEM file with the authorities that sign router and workers: these speak mutual TLS with each
    other then, and refuse whoever shows none of their certificates. A command trusts a router that
    they signed. Let them sign nobody else."""

    tls_server_name: str = ""
    """Name to expect in the certificate of whoever this process dials; empty: the host that is
    dialled. For certificates that name a role and no host, such as those of pods."""

    @property
    def mutual(self) -> bool:
        """Router and workers speak mutual TLS."""
        return bool(self.tls_ca)


PLAIN = TlsSettings()
"""Plain text."""

NEEDS = (("tls_cert", "tls_key"), ("tls_key", "tls_cert"))
"""Settings that mean nothing alone, and what each needs."""


def check_pairs(settings: TlsSettings, needs: Sequence[tuple[str, str]] = NEEDS) -> None:
    """Raises ValueError, by name, where one of two settings that belong together is missing."""
    for name, other in needs:
        if getattr(settings, name) and not getattr(settings, other):
            raise ValueError(f"{name} needs {other} as well: TLS takes a certificate and a key")


def check_files(settings: TlsSettings, *authorities: tuple[str, str]) -> None:
    """Reads everything once, so that a wrong file fails at the start, by name.

    Args:
        settings: the group.
        authorities: (name of a setting, file) of certificates to trust.

    Raises:
        OSError: a file cannot be read, or does not hold what it should.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, file in (("tls_cert", settings.tls_cert), ("tls_key", settings.tls_key)):
        _read(name, file)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except ssl.SSLError as error:
        raise OSError(
            f"tls_cert {settings.tls_cert} and tls_key {settings.tls_key} are no PEM certificate "
            f"with its own key: {error}"
        ) from error
    for name, file in authorities:
        _read(name, file)
        try:
            context.load_verify_locations(file)
        except ssl.SSLError as error:
            raise OSError(f"{name}: {file} holds no PEM certificate: {error}") from error


def _read(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"{name}: {file} cannot be read: {error.strerror}") from error


def open_channel(
    address: str, *, tls: TlsSettings, options: Sequence[tuple[str, Any]]
) -> grpc.aio.Channel:
    """A channel from one part of a deployment to another; its files are read now.

    Args:
        address: host:port.
        tls: plain text unless `mutual`.
        options: of the channel.

    Raises:
        OSError: a file cannot be read.
    """
    if not tls.mutual:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read("tls_ca", tls.tls_ca),
        private_key=_read("tls_key", tls.tls_key),
        certificate_chain=_read("tls_cert", tls.tls_cert),
    )
    if tls.tls_server_name:
        options = [*options, ("grpc.ssl_target_name_override", tls.tls_server_name)]
    return grpc.aio.secure_channel(address, credentials, options=options)


class ServerFiles:
    """A server's certificate, key and the authorities of its clients, as last read."""

    def __init__(self, *, certificate: str, key: str, client_ca: str = "") -> None:
        """`client_ca`: only clients whose certificate these authorities signed; empty: any."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether there are new files that fit each other; each is told of once."""
        try:
            state = self._state()
            if state == self._seen:
                return False
            self._seen = state
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
        except OSError as error:
            logger.error("the certificate in use stays: %s cannot be: %s", self._certificate, error)
            return False
        logger.info("the certificate %s was replaced", self._certificate)
        return True

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        files = filter(None, (self._certificate, self._key, self._client_ca))
        stats = [Path(file).stat() for file in files]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)

    def credentials(self, *, on_connection: Callable[[], None]) -> grpc.ServerCredentials:
        """For a gRPC server. `on_connection` is called at the beginning of each handshake, on any
        of gRPC's threads."""

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            on_connection()
            try:
                return self._configuration() if self.changed() else None
            except OSError:
                return None

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            fetch,  # type: ignore[arg-type]  # None, which the stubs leave out, means no change
            require_client_authentication=bool(self._client_ca),
        )

    def context(self, *, on_connection: Callable[[], None]) -> ssl.SSLContext:
        """For a server of asyncio's. `on_connection` is called at the beginning of each handshake.
        Raises OSError: a file cannot be read."""
        return _RenewedContext(self._made, self.changed, on_connection)

    def _made(self) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(self._certificate, self._key)
        if self._client_ca:
            made.load_verify_locations(self._client_ca)
            made.verify_mode = ssl.CERT_REQUIRED
        return made

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(Path(self._key).read_bytes(), Path(self._certificate).read_bytes())],
            root_certificates=Path(self._client_ca).read_bytes() if self._client_ca else None,
        )


class _RenewedContext(ssl.SSLContext):
    """Looks for new files at each handshake: a server keeps the context that it started with."""

    def __new__(cls, *_: object) -> "_RenewedContext":
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(
        self,
        make: Callable[[], ssl.SSLContext],
        changed: Callable[[], bool],
        on_connection: Callable[[], None],
    ) -> None:
        self._make, self._changed, self._on_connection = make, changed, on_connection
        self._current = make()

    def wrap_bio(self, *arguments: Any, **more: Any) -> ssl.SSLObject:
        self._on_connection()
        if self._changed():
            try:
                self._current = self._make()
            except OSError as error:
                logger.error("the certificate in use stays: %s", error)
        return self._current.wrap_bio(*arguments, **more)
