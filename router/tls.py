"""TLS of the router's two doors, read once at start so that a wrong file fails there, by name.

Workers register in plain text, on a trusted network, through a door of their own (`workers_host`,
`workers_port`): it opens only where the public gRPC door speaks TLS, and takes no requests.
"""

import ssl
from pathlib import Path
from typing import Any

import grpc

from router.config import RouterConfig


def grpc_credentials(config: RouterConfig) -> grpc.ServerCredentials | None:
    """Credentials of the gRPC door; None: plain text.

    Raises:
        OSError: a file cannot be read, or it holds no usable certificate or key.
    """
    if not config.tls_cert:
        return None
    _check(config)
    client_ca = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [(Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )


def uvicorn_options(config: RouterConfig) -> dict[str, Any]:
    """What uvicorn needs to speak TLS on the HTTP door; nothing without a certificate."""
    if not config.tls_cert:
        return {}
    options: dict[str, Any] = {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    if config.tls_client_ca:
        options |= {"ssl_ca_certs": config.tls_client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def _check(config: RouterConfig) -> None:
    # gRPC takes unusable files without a word and then refuses every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        path = getattr(config, name)
        if path and not Path(path).is_file():
            raise OSError(f"{name}: there is no file {path}")
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except ssl.SSLError as error:
        raise OSError(
            f"tls_cert {config.tls_cert} and tls_key {config.tls_key} are no PEM certificate with "
            f"its own key: {error}"
        ) from error
    if config.tls_client_ca:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise OSError(
                f"tls_client_ca: {config.tls_client_ca} holds no PEM certificate: {error}"
            ) from error
