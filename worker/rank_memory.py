"""What the ranks of a tensor-parallel engine write, and what they are written into.

With cuda_ipc and NIXL each rank has transports and landing windows of its own, so pages go from
rank to rank. With gRPC the fronts carry whole pages, all ranks' parts behind one another, between
an outbox and windows that all ranks of a worker share. A worker offers the former or the latter:
its ranks copy out of one kind of window.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvtransfer.errors import TransportUnavailableError
from kvtransfer.geometry import RankPlace, pieces_for
from kvtransfer.group_transport import GroupTransport
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import unavailable_reason
from kvtransfer.transport import RankTransport, Transport
from kvtransfer.window import LandingWindow
from worker.channel import EngineChannel
from worker.config import TransportName, WorkerConfig
from worker.kv_traffic import KvTraffic
from worker.rank_kv import RankKv, ask_all
from worker.rank_link import Kind, RankLink
from worker.rank_model import RankModel, window_slots
from worker.rank_transfers import LinkedRank, RankTransfers
from worker.rank_windows import RankWindows
from worker.transports import (
    MAX_WINDOWS,
    OUTBOX_SLOTS,
    TransferMemory,
    Transports,
    device_window,
    rank_transports,
    send_message,
    shared_slots,
    submit_order,
)

logger = logging.getLogger(__name__)


def shares_host_memory(config: WorkerConfig) -> bool:
    """Whether the ranks hand KV over by gRPC; the same answer in each of them. Raises
    TransportUnavailableError where NIXL is asked for by name and cannot be had."""
    if config.transport in ("grpc", "cuda_ipc"):
        return config.transport == "grpc"
    reason = unavailable_reason()
    if reason and config.transport == "nixl":
        raise TransportUnavailableError(reason)
    return bool(reason)


def rank_place(config: WorkerConfig, layout: PageLayout, kv_heads: int, *, rank: int) -> RankPlace:
    size = config.tensor_parallel_size
    shared_window = size > 1 and shares_host_memory(config)
    if shared_window and config.transport != "grpc" and rank == 0:
        logger.warning(
            "%s: KV of several ranks goes by gRPC; between GPUs of one host --transport cuda_ipc "
            "needs no NIXL",
            unavailable_reason(),
        )
    return RankPlace(
        layout=layout,
        kv_heads=kv_heads,
        rank=rank,
        tp_size=size,
        shared_window=shared_window,
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
    slots, layout = memory.window_slots, memory.layout
    if memory.source is None and not slots:
        return Transports({}, None, 0)
    if not shares_host_memory(config):
        return _direct(config.transport, instance_id=instance_id, memory=memory, links=links)
    whole = replace(layout, kv_heads=memory.kv_heads)
    windows = shared_slots(memory.window_fd, MAX_WINDOWS * slots, whole)
    window = None if windows is None else windows[:slots]
    outbox = shared_slots(memory.outbox_fd, memory.outbox_slots, whole)

    def fill(copies: Sequence[tuple[int, int]], part: tuple[int, int] | None) -> None:
        first, end = part or (0, layout.page_bytes)
        ask_all(links, Kind.FILL, {"copies": list(copies), "part": (first, end)})
        if outbox is not None and memory.source is not None:
            for page, slot in copies:
                outbox[slot, first:end].copy_(memory.source[page, first:end])
        for link in links:
            link.answer()

    grpc = GrpcTransport(
        pool=memory.source,
        outbox=outbox,
        landing=window,
        further_landing=windows,
        submit=lambda order: submit_order(channel, order),
        send=lambda peer, data: send_message(channel, peer, data),
        fill=fill,
        pieces=[
            piece.offset
            for piece in pieces_for(
                range(memory.kv_heads),
                memory.kv_heads,
                config.tensor_parallel_size,
                piece_bytes=layout.page_bytes,
            )
        ],
    )
    return Transports(
        {"grpc": grpc},
        None if window is None else LandingWindow(window),
        memory.outbox_slots,
        shared_slots=MAX_WINDOWS * slots,
        more_windows=lambda number: _nth(windows, number, slots),
    )


def _direct(
    name: TransportName,
    *,
    instance_id: str,
    memory: TransferMemory,
    links: Sequence[RankLink],
) -> Transports:
    """Every transport that each rank has. Raises TransportUnavailableError where there is none."""
    window = own_window(memory)
    mine = rank_transports(name, instance_id=instance_id, memory=memory, window=window)
    others = [LinkedRank(link) for link in links]
    theirs = [set(rank.transports()) for rank in others]
    offered: dict[str, Transport] = {
        each: GroupTransport(
            transport,
            [rank.writer(each) for rank in others],
            kv_heads=memory.kv_heads,
            piece_bytes=memory.layout.page_bytes,
        )
        for each, transport in mine.items()
        if all(each in names for names in theirs)
    }
    if not offered:
        raise TransportUnavailableError(
            f"transport {name} is not available on each of the {1 + len(links)} ranks"
        )
    return Transports(
        offered,
        None if window is None else LandingWindow(window),
        0,
        more_windows=lambda _: own_window(memory),
    )


def own_window(memory: TransferMemory) -> torch.Tensor | None:
    """Of one rank's pages, in memory that peers may write; None on a worker that receives none.
    Raises TransportUnavailableError where the device has no room."""
    if memory.device.type == "cuda":
        return device_window(memory)
    shape = (memory.window_slots, memory.layout.page_bytes)
    return torch.zeros(shape, dtype=torch.uint8) if memory.window_slots else None


def _nth(windows: torch.Tensor | None, number: int, slots: int) -> torch.Tensor | None:
    return None if windows is None else windows[number * slots : (number + 1) * slots]


# ---- the others -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowingMemory:
    """What a following rank's two threads work on."""

    kv: RankKv
    windows: RankWindows
    """Where pages land for it."""
    outbox: torch.Tensor | None
    transports: Mapping[str, RankTransport]

    def transfers(self, link: RankLink) -> RankTransfers:
        return RankTransfers(
            link,
            self.kv,
            transports=self.transports,
            windows=self.windows,
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
    """Raises TransportError where there is no room for a landing window."""
    pool, layout, kv_heads = model.runner.kv_pool, model.layout, model.checkpoint.num_kv_heads
    place = rank_place(config, layout, kv_heads, rank=rank)
    kv = RankKv(pool.as_bytes(), place)
    receives, sends = traffic is KvTraffic.RECEIVES, traffic is KvTraffic.SENDS
    memory = TransferMemory(
        layout=layout,
        kv_heads=kv_heads,
        device=pool.device,
        source=kv.pool if sends else None,
        window_slots=window_slots(config, pool.num_pages) if receives else 0,
        outbox_slots=OUTBOX_SLOTS if sends else 0,
        window_fd=fds[0],
        outbox_fd=fds[1],
    )
    slots = memory.window_slots
    if place.shared_window:
        whole = replace(layout, kv_heads=kv_heads)
        shared = shared_slots(memory.window_fd, MAX_WINDOWS * slots, whole)
        return FollowingMemory(
            kv=kv,
            windows=RankWindows(slots, lambda number: _nth(shared, number, slots)),
            outbox=shared_slots(memory.outbox_fd, memory.outbox_slots, whole),
            transports={},
        )
    windows = RankWindows(slots, lambda _: own_window(memory))
    transports: dict[str, RankTransport] = {}
    if receives or sends:
        try:
            transports = rank_transports(
                config.transport,
                instance_id=instance_id,
                memory=memory,
                window=windows.open(0) if receives else None,
            )
        except TransportUnavailableError as error:
            logger.error("%s", error.message)  # the leading rank finds that it is not here
    return FollowingMemory(kv=kv, windows=windows, outbox=None, transports=transports)
