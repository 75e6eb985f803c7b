"""How commands that talk to a router gain access: one group of flags for both doors."""

import ssl
from dataclasses import dataclass

from baton.config import SettingsError
from baton.connection import ConnectionConfig, Tls
from protos.tls import TlsSettings, check_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAccess(TlsSettings):
    """What to show a router, and what to expect of it. A process of the deployment has its TLS
    settings in its environment, and a command beside it takes the same.
    """

    api_key: str = ""
    """Key that the router asks for; empty: none. Better given as BATON_API_KEY than as a flag,
    which every user of this machine can read."""

    tls: bool = False
    """Speak TLS; grpcs:// and https:// addresses and every other setting of TLS ask for it, too."""

    tls_root_ca: str = ""
    """PEM file with the authorities that may have signed the router's certificate; empty: tls_ca,
    or else the public ones."""

    tls_client_cert: str = ""
    """PEM file with this client's certificate, where the router asks for one; empty: tls_cert."""

    tls_client_key: str = ""
    """PEM file with the private key of tls_client_cert."""

    def __post_init__(self) -> None:
        check_pairs(self, NEEDS)

    def connection(self, address: str = "") -> ConnectionConfig:
        """For the gRPC door.

        Raises:
            SettingsError: a file cannot be used, or the address asks for plain text.
        """
        if not (self._wanted or address.startswith("grpcs://")):
            return ConnectionConfig(api_key=self.api_key)
        if address.startswith("grpc://"):
            raise SettingsError(f"{address} asks for plain text, but TLS is set: use grpcs://")
        certificate, key = self._shown
        try:
            tls = Tls.from_files(
                root_certificates=self._trusted or None,
                private_key=key or None,
                certificate_chain=certificate or None,
                server_name=self.tls_server_name or None,
            )
        except (OSError, ValueError) as error:
            raise SettingsError(f"TLS: {error}") from error
        return ConnectionConfig(tls=tls, api_key=self.api_key)

    def http_headers(self) -> dict[str, str]:
        """For the HTTP door."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

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
        certificate, key = self._shown
        try:
            context = ssl.create_default_context(cafile=self._trusted or None)
            if certificate:
                context.load_cert_chain(certificate, key)
        except OSError as error:
            raise SettingsError(f"TLS: {error}") from error
        return context

    @property
    def _trusted(self) -> str:
        return self.tls_root_ca or self.tls_ca

    @property
    def _shown(self) -> tuple[str, str]:
        if self.tls_client_cert:
            return self.tls_client_cert, self.tls_client_key
        return self.tls_cert, self.tls_key

    @property
    def _wanted(self) -> bool:
        return self.tls or any((self._trusted, self._shown[0], self.tls_server_name))


NEEDS = (
    ("tls_client_cert", "tls_client_key"),
    ("tls_client_key", "tls_client_cert"),
    ("tls_cert", "tls_key"),
    ("tls_key", "tls_cert"),
)


def as_a_part(tls: TlsSettings) -> ClientAccess:
    """The access of a process that has the deployment's own certificate; plain text without."""
    if not tls.mutual:
        return ClientAccess()
    return ClientAccess(
        tls_cert=tls.tls_cert,
        tls_key=tls.tls_key,
        tls_ca=tls.tls_ca,
        tls_server_name=tls.tls_server_name,
    )
