"""The front's part in metrics and logs: listens in on what passes, asks the engine at a scrape."""

import asyncio
import logging
import time
from typing import Protocol

from observability import trace_context
from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from protos.door_watch import TlsDoorWatch
from protos.tls import ServerFiles
from worker import metrics
from worker.config import WorkerConfig
from worker.metrics_http import MetricsServer
from worker.refusals import WorkerRefusals
from worker.request_clock import RequestClock, WorkKey

logger = logging.getLogger(__name__)

PlacedRequest = worker_pb2.ReserveRequest | worker_pb2.PrefillRequest | worker_pb2.GenerateLocally

NO_METRICS = -1
"""The port that means: none."""


class MetricsSource(Protocol):
    """What is needed of the front."""

    config: WorkerConfig
    refusals: WorkerRefusals

    async def status(self, *, figures: bool = False) -> worker_pb2.WorkerStatus:
        """Raises TimeoutError where the engine does not answer in time."""
        ...

    def describe(self) -> worker_pb2.RegisterRequest: ...


class FrontMetrics:
    """One worker's."""

    def __init__(self, source: MetricsSource, role: inference_pb2.WorkerRole) -> None:
        self.address = ""
        """host:port that serves them; empty: nobody does."""
        self._source = source
        self._clock = RequestClock(role)
        self._server: MetricsServer | None = None
        self._status = worker_pb2.WorkerStatus()
        self._figures = channel_pb2.EngineFigures()
        self._figures_at = time.monotonic()

    async def start(self) -> None:
        """Raises OSError where the port cannot be listened on."""
        config = self._source.config
        if config.metrics_port == NO_METRICS:
            return
        if config.mutual:
            # Whoever scrapes shows no certificate, as at the router's /metrics.
            files = ServerFiles(certificate=config.tls_cert, key=config.tls_key)
            self._source.refusals.metrics_door = TlsDoorWatch()
            self._server = MetricsServer(
                self.render,
                tls=files,
                watch=self._source.refusals.metrics_door,
                on_garbage=self._source.refusals.on_metrics_garbage,
            )
        else:
            self._server = MetricsServer(
                self.render, on_garbage=self._source.refusals.on_metrics_garbage
            )
        port = await self._server.start(config.host, config.metrics_port)
        self.address = f"{config.host}:{port}"
        scheme = "https" if config.mutual else "http"
        logger.info("metrics on %s://%s/metrics", scheme, self.address)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()

    async def render(self) -> bytes:
        """What /metrics answers. In the middle of a long step the engine's last figures serve."""
        age_s = 0.0
        try:
            self._status = await self._source.status(figures=True)
        except TimeoutError:
            age_s = time.monotonic() - self._figures_at
        return metrics.render(
            registration=self._source.describe(),
            status=self._status,
            figures=self._figures,
            figures_age_s=age_s,
            prefix_caching=self._source.config.enable_radix_cache,
            clock=self._clock,
            refusals=self._source.refusals,
        )

    # ---- what passes ----------------------------------------------------------------------------

    def on_accepted(self, key: WorkKey, request: PlacedRequest) -> None:
        self._clock.begin(
            key,
            prompt_tokens=len(request.prompt_ids),
            trace_id=trace_context.trace_id(trace_context.checked(request.traceparent)),
            now=time.monotonic(),
        )

    def on_step(self, step: worker_pb2.StepOutput) -> None:
        """Its tokens are queued for the router: they leave before they are counted."""
        asyncio.get_running_loop().call_soon(self._clock.on_outputs, step.outputs, time.monotonic())

    def on_failed(self, failed: worker_pb2.WorkFailed) -> None:
        self._clock.on_failed(failed)

    def on_done(self, done: channel_pb2.RequestDone) -> None:
        # After the step that was queued before it.
        key = (done.request_id, done.attempt)
        asyncio.get_running_loop().call_soon(self._end, key, time.monotonic())

    def _end(self, key: WorkKey, now: float) -> None:
        ended = self._clock.end(key, now)
        if ended is None:
            return
        name = f"{key[0]}#{key[1]}"
        logger.info(
            "request %s ended here: %s, %d tokens in %.1f ms",
            name,
            ended.outcome,
            ended.tokens,
            1e3 * (now - ended.arrived),
            extra={
                "request_id": name,
                "trace_id": ended.trace_id,
                "outcome": ended.outcome,
                "output_tokens": ended.tokens,
                "duration_ms": round(1e3 * (now - ended.arrived), 3),
            },
        )

    def on_figures(self, figures: channel_pb2.EngineFigures) -> None:
        self._figures, self._figures_at = figures, time.monotonic()
