"""OpenTelemetry: the one door to it, and an optional one (the extra `otel`).

A request's span is started when the request is admitted, since workers are told of it, and its
phases are added when it is over, from durations that are known anyway: tracing measures nothing,
and no request waits for it. Spans leave by a thread of their own through a bounded queue; where the
collector is away they are dropped.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from observability import trace_context

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

MAX_QUEUED_SPANS = 8_192
FLUSH_S = 1.0
"""How often spans leave, if they do not fill a batch before."""

STOP_LIMIT_S = 3.0
"""Longest the end of a process waits for its last spans to leave."""

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


class TracingUnavailableError(OSError):
    """Traces were asked for and cannot be made; the message says what to install or change."""


class Part(NamedTuple):
    """A phase of a request, between two moments."""

    name: str
    started: float
    ended: float
    """time.monotonic() seconds."""


class RequestTrace:
    """One request's span, until it is over."""

    def __init__(self, span: "Span", offset_ns: int) -> None:
        """`offset_ns`: from the monotonic clock to the wall's, read once a request: its parts must
        not move against each other where the wall's clock is set."""
        self.span = span
        self._offset_ns = offset_ns

    def wall(self, moment: float) -> int:
        """Nanoseconds since 1970 of a time.monotonic() moment."""
        return self._offset_ns + round(moment * 1e9)

    @property
    def traceparent(self) -> str:
        """What workers are told: children of this span."""
        context = self.span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class Tracing:
    """Makes spans and has them sent."""

    def __init__(self, *, endpoint: str, ratio: float, facts: Mapping[str, str]) -> None:
        """
        Args:
            endpoint: http://host:port (plain) or https://host:port (TLS) of an OTLP gRPC collector.
            ratio: share of traces kept, 0 to 1, of those that no client has decided about.
            facts: of this process, such as service.name.

        Raises:
            TracingUnavailableError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import SpanLimits, TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise TracingUnavailableError(
                f"otlp_endpoint is set, but OpenTelemetry is not installed ({error}); "
                "install the extra: pip install 'baton-serve[otel]'"
            ) from error
        self._provider = TracerProvider(
            resource=Resource.create(dict(facts)),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            span_limits=SpanLimits(max_attribute_length=1024),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:"))
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUED_SPANS,
                schedule_delay_millis=FLUSH_S * 1e3,
            )
        )
        self._tracer = self._provider.get_tracer("baton")

    def begin(
        self, name: str, traceparent: str, attributes: Attributes, *, started: float
    ) -> RequestTrace:
        """Starts a request's span, as a child of the client's where it named one. `started`:
        time.monotonic() seconds."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = None
        if traceparent:
            carrier = {trace_context.HEADER: traceparent}
            parent = TraceContextTextMapPropagator().extract(carrier)
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=offset_ns + round(started * 1e9),
        )
        return RequestTrace(span, offset_ns)

    def end(
        self,
        trace: RequestTrace,
        parts: Sequence[Part],
        attributes: Attributes,
        *,
        ended: float,
        error: str = "",
    ) -> None:
        """Adds the phases, as siblings, and ends the request's span.

        Args:
            trace: from `begin`.
            parts: in any order.
            attributes: what is known now.
            ended: when it was over, time.monotonic() seconds.
            error: why it failed; empty: it did not.
        """
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if not trace.span.is_recording():
            return
        wall = trace.wall
        context = set_span_in_context(trace.span)
        for part in parts:
            child = self._tracer.start_span(
                part.name, context=context, start_time=wall(part.started)
            )
            child.end(wall(part.ended))
        trace.span.set_attributes(dict(attributes))
        if error:
            trace.span.set_status(Status(StatusCode.ERROR, error))
        trace.span.end(wall(ended))

    def stop(self) -> None:
        """Sends what is left, and does not wait long for a collector that does not answer."""
        stopping = threading.Thread(target=self._provider.shutdown, daemon=True, name="last spans")
        stopping.start()
        stopping.join(STOP_LIMIT_S)
