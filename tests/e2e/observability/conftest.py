"""A cluster for what processes tell of themselves: metrics, traces, log lines, phases."""

import json
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import wait_for

PAGE = 16
MAX_TOTAL_TOKENS = 4096
FLAGS = (
    "--unified", "1",
    "--restart",
    "--page-size", str(PAGE),
    "--max-total-tokens", str(MAX_TOTAL_TOKENS),
    "--log-format", "json",
    "--log-level", "debug",
)  # fmt: skip


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self._spans: list[trace_pb2.Span] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[trace_pb2.Span]:
        """All spans of a trace so far."""
        with self._lock:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

    def request_of(self, trace_id: str) -> tuple[trace_pb2.Span, list[trace_pb2.Span]]:
        """The one request of a trace and its phases, once they have come."""
        wait_for(lambda: _request(self.of(trace_id)), f"trace {trace_id}", within_s=20.0)
        request = _request(self.of(trace_id))
        assert request is not None
        phases = [span for span in self.of(trace_id) if span is not request]
        return request, sorted(phases, key=lambda span: span.start_time_unix_nano)

    def stop(self) -> None:
        self._server.stop(grace=None).wait()


def _request(spans: list[trace_pb2.Span]) -> trace_pb2.Span | None:
    return next((s for s in spans if s.kind == trace_pb2.Span.SPAN_KIND_SERVER), None)


def log_lines(cluster: Cluster, request_id: str) -> list[dict[str, Any]]:
    """JSON lines of all processes that name a request."""
    lines = [line for line in cluster.log.read_text().splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines if request_id in line]
    return [r for r in records if str(r.get("request_id", "")).startswith(request_id)]


def end_of(cluster: Cluster, request_id: str) -> dict[str, Any]:
    """The router's line about a request that is over."""

    def found() -> list[dict[str, Any]]:
        return [r for r in log_lines(cluster, request_id) if "phases_ms" in r]

    wait_for(found, f"the access line of {request_id}", within_s=20.0)
    return found()[0]


def _goes_to_the_pair(cluster: Cluster) -> bool:
    answer = cluster.complete(prompt=[5, 6, 7], max_tokens=2, temperature=0, ignore_eos=True)
    worker: str = answer.json()["baton"]["decode_worker"]
    return worker.startswith("decode-")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def cluster(
    slow_llama: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Cluster]:
    flags = (*FLAGS, "--otlp-endpoint", f"http://127.0.0.1:{collector.port}")
    with running_cluster(slow_llama, tmp_path_factory.mktemp("observed"), *flags) as running:
        # A deployment takes requests as soon as somebody can serve them; here the pair is to.
        wait_for(lambda: _goes_to_the_pair(running), "a pair that serves", within_s=60.0)
        yield running
