"""Baton serves large language models with prefill and decode apart.

This package is what a user touches: the client library below, and the command line `baton`.
Importing it loads gRPC and nothing heavier.
"""

from baton.aio import AsyncClient, AsyncTokenStream
from baton.client import Client, TokenStream
from baton.connection import ConnectionConfig, KeepAlive, Tls
from baton.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RequestError,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from baton.messages import (
    Chunk,
    Completion,
    Model,
    Report,
    ServerInfo,
    Token,
    TopLogprob,
    Usage,
    Worker,
)
from baton.options import RequestOptions

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncTokenStream",
    "Cancelled",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionConfig",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "InternalError",
    "InvalidRequest",
    "KeepAlive",
    "Model",
    "NotFound",
    "PermissionDenied",
    "Report",
    "RequestError",
    "RequestOptions",
    "ResourceExhausted",
    "ServerInfo",
    "Tls",
    "Token",
    "TokenStream",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Worker",
]
