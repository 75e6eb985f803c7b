"""A scripted router on a free port."""

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from protos.baton.v1 import inference_pb2_grpc
from tests.baton.scripted import ScriptedInference


@pytest.fixture
def inference() -> ScriptedInference:
    return ScriptedInference()


@pytest.fixture
def address(inference: ScriptedInference) -> Iterator[str]:
    """host:port of a server that answers as `inference` says."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()
