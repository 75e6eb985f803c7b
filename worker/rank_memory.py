"""What the ranks of a tensor-parallel engine write, and what they are written into.

With NIXL each rank has an agent and a landing window of its own, so pages go from rank to rank.
With gRPC the fronts carry whole pages, all ranks' parts behind one another, between an outbox and a
window that all ranks of a worker share. A worker offers one of the two. Its windows are not
replaced when silent writers keep them: the slots stay in quarantine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtransfer.errors import TransportUnavailableError
from kvtransfer.geometry import RankPlace, pieces_for
from kvtransfer.group_transport import GroupTransport
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport, unavailable_reason
from kvtransfer.window import LandingWindow
from worker.channel import EngineChannel
from worker.config import WorkerConfig
from worker.kv_traffic import KvTraffic
from worker.rank_kv import RankKv, ask_all
from worker.rank_link import Kind, RankLink
from worker.rank_model import RankModel, window_slots
from worker.rank_transfers import LinkedWriter, RankTransfers
from worker.transports import (
    OUTBOX_SLOTS,
    TransferMemory,
    Transports,
    send_message,
    shared_slots,
    submit_order,
)


def shares_host_memory(config: WorkerConfig) -> bool:
    """Whether the ranks hand KV over by gRPC; the same answer in each of them. Raises
    TransportUnavailableError where NIXL is asked for by name and cannot be had."""
    if config.transport == "grpc":
        return True
    reason = unavailable_reason()
    if reason and config.transport == "nixl":
        raise TransportUnavailableError(reason)
    return bool(reason)


def rank_place(config: WorkerConfig, layout: PageLayout, kv_heads: int, *, rank: int) -> RankPlace:
    size = config.tensor_parallel_size
    return RankPlace(
        layout=layout,
        kv_heads=kv_heads,
        rank=rank,
        tp_size=size,
        shared_window=size > 1 and shares_host_memory(config),
    )


def outbox_offset(place: RankPlace) -> int | None:
    """Where the rank's part of a page begins; None where another one fills in the same heads."""
    pieces = pieces_for(
        range(place.kv_heads), place.kv_heads, place.tp_size, piece_bytes=place.layout.page_bytes
    )
    return next((piece.offset for piece in pieces if piece.rank == place.rank), None)


# ---- the leading rank -------------------------------------------------------------------------


def make_rank_transports(
    config: WorkerConfig,
    *,
    instance_id: str,
    memory: TransferMemory,
    channel: EngineChannel,
    links: Sequence[RankLink],
) -> Transports:
    """As `make_transports`, for all ranks. Raises TransportUnavailableError."""
    if config.transport == "cuda_ipc":
        raise TransportUnavailableError(
            "transport cuda_ipc is not available: it moves the pages of one GPU, and this worker's "
            f"lie on {config.tensor_parallel_size}"
        )
    slots, layout = memory.window_slots, memory.layout
    if memory.source is None and not slots:
        return Transports({}, None, 0)
    if not shares_host_memory(config):
        window = None
        if slots:
            shape = (slots, layout.page_bytes)
            window = torch.zeros(shape, dtype=torch.uint8, device=memory.device)
        group = GroupTransport(
            NixlTransport(instance_id=instance_id, pool=memory.source, landing=window),
            [LinkedWriter(link) for link in links],
            kv_heads=memory.kv_heads,
            piece_bytes=layout.page_bytes,
        )
        return Transports({"nixl": group}, None if window is None else LandingWindow(window), 0)
    whole = replace(layout, kv_heads=memory.kv_heads)
    window = shared_slots(memory.window_fd, slots, whole)
    outbox = shared_slots(memory.outbox_fd, memory.outbox_slots, whole)

    def fill(copies: Sequence[tuple[int, int]]) -> None:
        ask_all(links, Kind.FILL, {"copies": list(copies)})
        if outbox is not None and memory.source is not None:
            for page, slot in copies:
                outbox[slot, : layout.page_bytes].copy_(memory.source[page])
        for link in links:
            link.answer()

    grpc = GrpcTransport(
        pool=memory.source,
        outbox=outbox,
        landing=window,
        submit=lambda order: submit_order(channel, order),
        send=lambda peer, data: send_message(channel, peer, data),
        fill=fill,
    )
    landing = None if window is None else LandingWindow(window)
    return Transports({"grpc": grpc}, landing, memory.outbox_slots, shared_slots=slots)


# ---- the others -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowingMemory:
    """What a following rank's two threads work on."""

    kv: RankKv
    window: torch.Tensor | None
    """Where pages land for it."""
    outbox: torch.Tensor | None
    nixl: NixlTransport | None

    def transfers(self, link: RankLink) -> RankTransfers:
        return RankTransfers(
            link,
            self.kv,
            nixl=self.nixl,
            outbox=self.outbox,
            outbox_offset=outbox_offset(self.kv.place),
        )


def following_memory(
    config: WorkerConfig,
    model: RankModel,
    *,
    rank: int,
    traffic: KvTraffic,
    instance_id: str,
    fds: tuple[int, int],
) -> FollowingMemory:
    """Raises TransportUnavailableError."""
    pool, layout, kv_heads = model.runner.kv_pool, model.layout, model.checkpoint.num_kv_heads
    place = rank_place(config, layout, kv_heads, rank=rank)
    kv = RankKv(pool.as_bytes(), place)
    receives, sends = traffic is KvTraffic.RECEIVES, traffic is KvTraffic.SENDS
    slots = window_slots(config, pool.num_pages) if receives else 0
    window: torch.Tensor | None = None
    outbox: torch.Tensor | None = None
    nixl: NixlTransport | None = None
    if place.shared_window:
        whole = replace(layout, kv_heads=kv_heads)
        window = shared_slots(fds[0], slots, whole)
        outbox = shared_slots(fds[1], OUTBOX_SLOTS if sends else 0, whole)
    elif receives or sends:
        if receives:
            shape = (slots, layout.page_bytes)
            window = torch.zeros(shape, dtype=torch.uint8, device=pool.device)
        source = kv.pool if sends else None
        nixl = NixlTransport(instance_id=instance_id, pool=source, landing=window)
    return FollowingMemory(kv=kv, window=window, outbox=outbox, nixl=nixl)
