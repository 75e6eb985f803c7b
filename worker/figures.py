"""What an engine counts, as a message to its front: plain numbers, no monitoring system's types.

Both ends of the channel read this module, and a front must not load torch for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from observability.histogram import Histogram
from protos.baton.v1 import channel_pb2, inference_pb2

if TYPE_CHECKING:
    from engine.scheduler.scheduler import Scheduler
    from kvtransfer.agent import TransferStats


def engine_figures(
    scheduler: Scheduler,
    transfers: TransferStats,
    *,
    queues: Mapping[str, int],
    pages: inference_pb2.PageCounts,
    computed_tokens: int,
    pass_seconds: Histogram,
) -> channel_pb2.EngineFigures:
    """Between two steps, so that the numbers belong together."""
    return channel_pb2.EngineFigures(
        queues=queues,
        pages=pages,
        new_token_ratio=scheduler.new_token_ratio.current,
        retractions=scheduler.num_retractions,
        preemptions=scheduler.num_preemptions,
        prefix_query_tokens=scheduler.prefix_query_tokens,
        prefix_hit_tokens=scheduler.prefix_hit_tokens,
        computed_tokens=computed_tokens,
        pass_seconds=to_message(pass_seconds),
        transfers=[
            channel_pb2.TransferFigures(
                transport=transport,
                bytes=tally.bytes,
                seconds=to_message(tally.seconds),
                failures=tally.failures,
            )
            for transport, tally in transfers.by_transport.items()
        ],
        dropped_messages=transfers.dropped,
        peers=transfers.peers,
    )


def to_message(histogram: Histogram) -> channel_pb2.HistogramCounts:
    return channel_pb2.HistogramCounts(
        bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum
    )


def from_message(message: channel_pb2.HistogramCounts) -> Histogram:
    """One without buckets has not been told yet: it is empty."""
    return Histogram(message.bounds, counts=message.counts or None, total=message.sum)
