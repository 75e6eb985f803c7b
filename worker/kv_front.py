"""KV sessions as a worker's front sees them: between a session's callbacks and the engine.

Also the watch for proof of death: on one host, a peer's engine that has exited can be seen through
a pidfd, and only then may what it might still write to be given to others. A closed socket proves
nothing.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Protocol

from kvtransfer.host import pid_namespace
from kvtransfer.orders import WriteOrder
from protos.baton.v1 import channel_pb2, kv_pb2, worker_pb2

logger = logging.getLogger(__name__)


class FrontLink(Protocol):
    """What KV sessions need of the front."""

    def to_engine(self, message: channel_pb2.FrontToEngine) -> None: ...

    def report_peer(self, state: worker_pb2.PeerState, *, remember: bool = False) -> None: ...


class DeathWatch:
    """Tells when the processes of a peer on this host have exited: of several ranks, all of them,
    since each writes for itself."""

    def __init__(self) -> None:
        self._pidfds: dict[str, set[int]] = {}

    def watch(self, peer: str, pids: Sequence[int], link: FrontLink) -> None:
        """Begins to watch; no effect where the system has no pidfds."""
        self.forget(peer)
        if not hasattr(os, "pidfd_open"):
            return
        alive = self._pidfds[peer] = set()
        try:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    alive.add(os.pidfd_open(pid))
        except OSError:
            for pidfd in alive:
                os.close(pidfd)
            del self._pidfds[peer]
            return
        for pidfd in alive:
            asyncio.get_running_loop().add_reader(pidfd, self._on_exit, peer, pidfd, link)
        if not alive:
            self._report(peer, link)

    def _on_exit(self, peer: str, pidfd: int, link: FrontLink) -> None:
        self._close(pidfd)
        alive = self._pidfds.get(peer, set())
        alive.discard(pidfd)
        if not alive:
            self._report(peer, link)

    def _report(self, peer: str, link: FrontLink) -> None:
        self.forget(peer)
        gone = channel_pb2.PeerGone(
            instance_id=peer, reason=f"the engine of {peer} has exited", proven_dead=True
        )
        link.to_engine(channel_pb2.FrontToEngine(peer_gone=gone))
        # The session may live on for a moment: no request should be sent on its way meanwhile.
        link.report_peer(
            worker_pb2.PeerState(instance_id=peer, connected=False, reason=gone.reason)
        )

    def forget(self, peer: str) -> None:
        for pidfd in self._pidfds.pop(peer, set()):
            self._close(pidfd)

    @staticmethod
    def _close(pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def close(self) -> None:
        for peer in list(self._pidfds):
            self.forget(peer)


class KvFront:
    """`SessionHandler` of both roles."""

    def __init__(self, link: FrontLink) -> None:
        self._link = link
        self._transports: dict[str, str] = {}
        """Transport negotiated with each connected peer."""
        self._deaths = DeathWatch()

    def transport_of(self, peer: str) -> str:
        return self._transports.get(peer, "")

    def peer_connected(self, info: kv_pb2.ConnectInfo, transport: str) -> None:
        peer = info.instance_id
        self._transports[peer] = transport
        if info.pid_namespace and info.pid_namespace == pid_namespace():
            self._deaths.watch(peer, [info.pid, *info.more_pids], self._link)
        offers = {offer.name: offer.metadata for offer in info.transports}
        connected = channel_pb2.PeerConnected(
            info=info, transport=transport, offer=offers.get(transport, b"")
        )
        self._link.to_engine(channel_pb2.FrontToEngine(peer_connected=connected))

    def peer_lost(self, peer: str, reason: str) -> None:
        if peer not in self._transports:
            return
        logger.warning("KV peer %s is lost: %s", peer, reason)
        gone = channel_pb2.PeerGone(instance_id=peer, reason=reason)
        self._link.to_engine(channel_pb2.FrontToEngine(peer_gone=gone))
        self._report(peer, connected=False, reason=reason)
        del self._transports[peer]

    def message(self, peer: str, data: bytes) -> None:
        kv = channel_pb2.KvIn(peer=peer, message=data)
        self._link.to_engine(channel_pb2.FrontToEngine(kv=kv))

    def write_done(self, write_id: int, peer: str, error: str) -> None:
        done = channel_pb2.KvWriteDone(write_id=write_id, peer=peer, error=error)
        self._link.to_engine(channel_pb2.FrontToEngine(kv_write_done=done))

    def attached(self, attached: channel_pb2.PeerAttached) -> None:
        """The engine's answer to `peer_connected`: KV can flow, or why it cannot."""
        self._report(attached.instance_id, connected=attached.ok, reason=attached.reason)

    def _report(self, peer: str, *, connected: bool, reason: str) -> None:
        state = worker_pb2.PeerState(
            instance_id=peer,
            connected=connected,
            transport=self.transport_of(peer),
            reason=reason,
        )
        self._link.report_peer(state, remember=connected)

    def close(self) -> None:
        self._deaths.close()


def write_order(message: channel_pb2.KvWrite) -> WriteOrder:
    return WriteOrder(
        write_id=message.write_id,
        peer=message.peer,
        copies=tuple((copy.outbox_slot, copy.landing_slot) for copy in message.copies),
        ranges=tuple((part.first, part.end) for part in message.ranges),
        message=message.message,
    )
