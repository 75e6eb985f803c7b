"""TLS as commands that talk to a router take it: one group of flags for both doors."""

import ssl
from dataclasses import dataclass

from baton.config import SettingsError
from baton.connection import ConnectionConfig, Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """What to show a router that speaks TLS, and what to expect of it."""

    tls: bool = False
    """Speak TLS; grpcs:// and https:// addresses and every setting below ask for it, too."""

    tls_root_ca: str = ""
    """PEM file with the authorities that may have signed the router's certificate; empty: the
    public ones."""

    tls_client_cert: str = ""
    """PEM file with this client's certificate, where the router asks for one."""

    tls_client_key: str = ""
    """PEM file with the private key of tls_client_cert."""

    tls_server_name: str = ""
    """Name to expect in the router's certificate; empty: the host that is called."""

    def __post_init__(self) -> None:
        if bool(self.tls_client_cert) != bool(self.tls_client_key):
            given, missing = "tls_client_cert", "tls_client_key"
            if self.tls_client_key:
                given, missing = missing, given
            raise ValueError(f"{given} needs {missing} as well: TLS takes a certificate and a key")

    def connection(self, address: str) -> ConnectionConfig:
        """For the gRPC door.

        Raises:
            SettingsError: a file cannot be used, or the address asks for plain text.
        """
        if not (self._wanted or address.startswith("grpcs://")):
            return ConnectionConfig()
        if address.startswith("grpc://"):
            raise SettingsError(f"{address} asks for plain text, but TLS is set: use grpcs://")
        try:
            tls = Tls.from_files(
                root_certificates=self.tls_root_ca or None,
                private_key=self.tls_client_key or None,
                certificate_chain=self.tls_client_cert or None,
                server_name=self.tls_server_name or None,
            )
        except (OSError, ValueError) as error:
            raise SettingsError(f"TLS: {error}") from error
        return ConnectionConfig(tls=tls)

    def ssl_context(self, url: str) -> ssl.SSLContext | None:
        """For the HTTP door; None: plain text.

        Raises:
            SettingsError: a file cannot be used, or the address asks for plain text.
        """
        if not url.startswith("https://"):
            if self._wanted:
                raise SettingsError(f"{url} asks for plain text, but TLS is set: use https://")
            return None
        if self.tls_server_name:
            raise SettingsError("tls_server_name is for the gRPC door; name the host in the URL")
        try:
            context = ssl.create_default_context(cafile=self.tls_root_ca or None)
            if self.tls_client_cert:
                context.load_cert_chain(self.tls_client_cert, self.tls_client_key)
        except OSError as error:
            raise SettingsError(f"TLS: {error}") from error
        return context

    @property
    def _wanted(self) -> bool:
        return self.tls or bool(self.tls_root_ca or self.tls_client_cert or self.tls_server_name)
