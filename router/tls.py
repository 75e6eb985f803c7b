"""TLS of the router's doors: what clients see, and what workers see.

Clients get the certificate and, with `tls_client_ca`, show one. Workers register at a door of
their own then (`router/grpc_doors.py`): in mutual TLS with `tls_ca`, else in plain text.
Files are checked at the start, by name.
"""

import ssl
from typing import Any

import uvicorn

from protos.tls import ServerFiles, check_files
from router.config import RouterConfig


def clients_files(config: RouterConfig) -> ServerFiles | None:
    """Of the clients' door; None: plain text.

    Raises:
        OSError: a file cannot be read, or does not hold what it should.
    """
    if not config.tls_cert:
        return None
    trusted = [("tls_ca", config.tls_ca), ("tls_client_ca", config.tls_client_ca)]
    check_files(config, *[(name, file) for name, file in trusted if file])
    _keep_apart(config)
    return ServerFiles(
        certificate=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca
    )


def workers_files(config: RouterConfig) -> ServerFiles | None:
    """Of the workers' door; None: plain text."""
    if not config.mutual:
        return None
    return ServerFiles(certificate=config.tls_cert, key=config.tls_key, client_ca=config.tls_ca)


def uvicorn_options(config: RouterConfig) -> dict[str, Any]:
    """What uvicorn needs to speak TLS on the HTTP door; nothing without a certificate."""
    if not config.tls_cert:
        return {}
    options: dict[str, Any] = {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    if config.tls_client_ca:
        options |= {"ssl_ca_certs": config.tls_client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def renew(served: uvicorn.Config, config: RouterConfig) -> None:
    """Has the HTTP door show what the certificate's files hold now to whoever connects next."""
    if served.ssl is not None:
        served.ssl.load_cert_chain(config.tls_cert, config.tls_key)


def _keep_apart(config: RouterConfig) -> None:
    """Raises OSError where an authority signs clients and workers."""
    if not (config.tls_ca and config.tls_client_ca):
        return
    inside, outside = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    inside.load_verify_locations(config.tls_ca)
    outside.load_verify_locations(config.tls_client_ca)
    known = set(inside.get_ca_certs(binary_form=True))
    if known & set(outside.get_ca_certs(binary_form=True)):
        raise OSError(
            f"tls_ca {config.tls_ca} and tls_client_ca {config.tls_client_ca} share an authority: "
            "a client could register as a worker and be given prompts. Sign clients with another"
        )
