"""`baton health`: asks a Baton process whether it serves, as a container's health check does.

Images hold no curl and no other probe, and an exec probe has to speak TLS where the door does.
"""

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client_access import ClientAccess
from baton.config import Scalar, fill
from baton.connection import config_for
from baton.errors import error_from_call


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """Whom to ask, and about what."""

    address: str = "127.0.0.1:50051"
    """host:port of the process's gRPC server."""

    service: str = ""
    """baton.v1.Inference: the router can serve requests; baton.v1.Worker: the worker takes them;
    empty: the process answers at all."""

    timeout_s: float = 3.0
    """Longest the answer may take. Seconds."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")


def run_health(given: dict[str, Scalar]) -> int:
    """0 where the service is SERVING, 1 where it is not; prints its status.

    Raises:
        RequestError: the process is out of reach, or knows no such service.
    """
    config, access = fill(HealthConfig, given), fill(ClientAccess, given)
    connection = config_for(config.address, access.connection(config.address))
    with connection.open(config.address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=config.service), timeout=config.timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from None
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1
