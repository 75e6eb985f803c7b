"""Which transports an engine offers, and the memory they land in.

On a CPU one landing window in shared memory serves both: NIXL writes it from another process, the
front fills it from a gRPC stream. On a GPU, cuda_ipc and NIXL share a window in the device's memory
and gRPC has one of the host's, as many slots again, whose pages are committed when first written.
So a worker offers at once whatever works here, and each pair of workers takes the best that joins
the two.

The shared memory has room for the windows that may replace the first one; nothing of them is
committed before they are used.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtransfer.cuda_ipc_transport import CudaIpcTransport
from kvtransfer.cuda_memory import allocate_window
from kvtransfer.errors import TransportError, TransportUnavailableError
from kvtransfer.group_transport import GroupTransport
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.orders import WriteOrder
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transport import RankTransport, Transport
from kvtransfer.window import LandingWindow
from kvtransfer.windows import MakeMemory, QuarantinePolicy
from protos.baton.v1 import channel_pb2
from worker.channel import EngineChannel
from worker.config import TransportName

logger = logging.getLogger(__name__)

OUTBOX_SLOTS = 16
"""Pages between source pool and gRPC stream: enough to keep the stream busy."""

MAX_WINDOWS = QuarantinePolicy().max_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMemory:
    """What the transports of one engine may touch."""

    layout: PageLayout
    """Of this rank's pages."""
    kv_heads: int
    """Of the whole model."""
    device: torch.device
    source: torch.Tensor | None
    """[pages, page_bytes] uint8 that pages leave from; None on a worker that sends none."""
    window_slots: int
    """0 on a worker that receives none."""
    outbox_slots: int
    window_fd: int
    outbox_fd: int
    """Empty shared memory files, which the front maps, too."""


@dataclass(frozen=True, slots=True)
class Transports:
    """By name, best first, and the window that peers write."""

    by_name: dict[str, Transport]
    window: LandingWindow | None
    outbox_slots: int
    """Slots of the outbox in shared memory; 0 where gRPC is not offered."""
    shared_slots: int = 0
    """Slots in shared memory, of all windows that there may be."""
    more_windows: MakeMemory | None = None
    """What may take the window's place; None where there is no window."""

    @property
    def grpc(self) -> GrpcTransport | None:
        transport = self.by_name.get("grpc")
        return transport if isinstance(transport, GrpcTransport) else None


def make_transports(
    name: TransportName, *, instance_id: str, memory: TransferMemory, channel: EngineChannel
) -> Transports:
    """None for a worker that neither sends nor receives, whatever is asked for.

    Raises TransportUnavailableError where a transport asked for by name cannot be had.
    """
    if memory.source is None and not memory.window_slots:
        return Transports({}, None, 0)
    on_device = memory.device.type == "cuda" and name != "grpc"
    window = device_window(memory) if on_device else _shared_window(memory, 0)
    offered: dict[str, Transport] = {
        each: GroupTransport(
            transport, kv_heads=memory.kv_heads, piece_bytes=memory.layout.page_bytes
        )
        for each, transport in rank_transports(
            name, instance_id=instance_id, memory=memory, window=window
        ).items()
    }
    if name in ("auto", "grpc"):
        offered["grpc"] = _grpc(memory, channel)
    has_grpc = "grpc" in offered
    return Transports(
        offered,
        None if window is None else LandingWindow(window),
        memory.outbox_slots if has_grpc else 0,
        shared_slots=MAX_WINDOWS * memory.window_slots if has_grpc or not on_device else 0,
        more_windows=lambda number: (
            device_window(memory) if on_device else _shared_window(memory, number)
        ),
    )


def rank_transports(
    name: TransportName, *, instance_id: str, memory: TransferMemory, window: torch.Tensor | None
) -> dict[str, RankTransport]:
    """Those by which one rank writes its peers' memory itself, best first. `window`: what peers
    write. Raises TransportUnavailableError where one asked for by name cannot be had."""
    makers: dict[str, Callable[[], RankTransport]] = {
        "cuda_ipc": lambda: CudaIpcTransport(
            layout=memory.layout, pool=memory.source, landing=window
        ),
        "nixl": lambda: NixlTransport(instance_id=instance_id, pool=memory.source, landing=window),
    }
    if name == "auto" and memory.device.type != "cuda":
        del makers["cuda_ipc"]
    found: dict[str, RankTransport] = {}
    for each, make in makers.items():
        if name not in (each, "auto"):
            continue
        try:
            found[each] = make()
        except TransportUnavailableError as error:
            if name == each:
                raise
            logger.warning("%s; KV moves by another transport", error.message)
    return found


def _grpc(memory: TransferMemory, channel: EngineChannel) -> GrpcTransport:
    return GrpcTransport(
        pool=memory.source,
        outbox=shared_slots(memory.outbox_fd, memory.outbox_slots, memory.layout),
        landing=_shared_window(memory, 0),
        further_landing=_every_shared_window(memory),
        submit=lambda order: submit_order(channel, order),
        send=lambda peer, data: send_message(channel, peer, data),
    )


def device_window(memory: TransferMemory) -> torch.Tensor | None:
    """An allocation of its own, which a process beside this one may map."""
    if not memory.window_slots:
        return None
    try:
        return allocate_window(memory.window_slots, memory.layout.page_bytes, memory.device)
    except TransportError as error:
        raise TransportUnavailableError(f"no landing window: {error.message}") from error


def _shared_window(memory: TransferMemory, number: int) -> torch.Tensor | None:
    every, slots = _every_shared_window(memory), memory.window_slots
    return None if every is None else every[number * slots : (number + 1) * slots]


def _every_shared_window(memory: TransferMemory) -> torch.Tensor | None:
    return shared_slots(memory.window_fd, MAX_WINDOWS * memory.window_slots, memory.layout)


def shared_slots(fd: int, slots: int, layout: PageLayout) -> torch.Tensor | None:
    """Shared memory of so many pages, [slots, page_bytes] uint8; None where there are none."""
    if not slots:
        return None
    size = slots * layout.page_bytes
    os.ftruncate(fd, size)
    return SharedMemory.attach(fd, size).tensor(slots, layout.page_bytes)


def send_message(channel: EngineChannel, peer: str, data: bytes) -> None:
    """A message to a peer, through the front."""
    kv = channel_pb2.KvOut(peer=peer, message=data)
    channel.send(channel_pb2.EngineToFront(kv=kv))


def submit_order(channel: EngineChannel, order: WriteOrder) -> None:
    """A write of the gRPC transport, which the front does."""
    copies = [channel_pb2.SlotCopy(outbox_slot=o, landing_slot=s) for o, s in order.copies]
    write = channel_pb2.KvWrite(
        write_id=order.write_id,
        peer=order.peer,
        copies=copies,
        ranges=[channel_pb2.ByteRange(first=first, end=end) for first, end in order.ranges],
        message=order.message,
    )
    channel.send(channel_pb2.EngineToFront(kv_write=write))
