"""Which transports an engine offers, and the memory they land in.

On a CPU one landing window in shared memory serves both: NIXL writes it from another process, the
front fills it from a gRPC stream. On a GPU the two need different memory (the device's for NIXL,
the host's for gRPC), so a worker offers one: NIXL where it is to be had, else gRPC.

The shared memory has room for the windows that may replace the first one; nothing of them is
committed before they are used.
"""

import logging
import os
from dataclasses import dataclass

import torch

from kvtransfer.errors import TransportUnavailableError
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.orders import WriteOrder
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transport import Transport
from kvtransfer.window import LandingWindow
from kvtransfer.windows import MakeMemory, QuarantinePolicy
from protos.baton.v1 import channel_pb2
from worker.channel import EngineChannel
from worker.config import TransportName

logger = logging.getLogger(__name__)

MAX_WINDOWS = QuarantinePolicy().max_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMemory:
    """What the transports of one engine may touch."""

    layout: PageLayout
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
    on_device = memory.device.type == "cuda"
    window = _window(memory, in_device_memory=on_device and name != "grpc")
    nixl: Transport | None = None
    if name != "grpc":
        try:
            nixl = NixlTransport(instance_id=instance_id, pool=memory.source, landing=window)
        except TransportUnavailableError as error:
            if name == "nixl":
                raise
            logger.warning("%s; KV moves by gRPC", error.message)
    if nixl is not None and (on_device or name == "nixl"):
        return _bundle({"nixl": nixl}, memory, window, 0)
    if on_device and window is not None and window.device.type == "cuda":
        window = _window(memory, in_device_memory=False)
    grpc = GrpcTransport(
        pool=memory.source,
        outbox=_shared(memory.outbox_fd, memory.outbox_slots, memory.layout),
        landing=window,
        submit=lambda order: channel.send(_order(order)),
        send=lambda peer, data: channel.send(
            channel_pb2.EngineToFront(kv=channel_pb2.KvOut(peer=peer, message=data))
        ),
    )
    offered: dict[str, Transport] = {"grpc": grpc} if nixl is None else {"nixl": nixl, "grpc": grpc}
    return _bundle(offered, memory, window, memory.outbox_slots)


def _bundle(
    by_name: dict[str, Transport],
    memory: TransferMemory,
    window: torch.Tensor | None,
    outbox_slots: int,
) -> Transports:
    if window is None:
        return Transports(by_name, None, outbox_slots)
    shared = window.device.type == "cpu"
    return Transports(
        by_name,
        LandingWindow(window),
        outbox_slots,
        shared_slots=MAX_WINDOWS * memory.window_slots if shared else 0,
        more_windows=lambda number: _window(memory, number, in_device_memory=not shared),
    )


def _window(
    memory: TransferMemory, number: int = 0, *, in_device_memory: bool
) -> torch.Tensor | None:
    slots = memory.window_slots
    if not slots:
        return None
    if in_device_memory:
        shape = (slots, memory.layout.page_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=memory.device)
    every = _shared(memory.window_fd, MAX_WINDOWS * slots, memory.layout)
    return None if every is None else every[number * slots : (number + 1) * slots]


def _shared(fd: int, slots: int, layout: PageLayout) -> torch.Tensor | None:
    if not slots:
        return None
    size = slots * layout.page_bytes
    os.ftruncate(fd, size)
    return SharedMemory.attach(fd, size).tensor(slots, layout.page_bytes)


def _order(order: WriteOrder) -> channel_pb2.EngineToFront:
    copies = [channel_pb2.SlotCopy(outbox_slot=o, landing_slot=s) for o, s in order.copies]
    write = channel_pb2.KvWrite(
        write_id=order.write_id, peer=order.peer, copies=copies, message=order.message
    )
    return channel_pb2.EngineToFront(kv_write=write)
