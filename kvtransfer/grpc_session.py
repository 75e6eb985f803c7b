"""KV sessions of a worker's front: prefill dials, decode serves.

The handshake checks protocol version and compatibility fingerprint and chooses the transport, once
and at registration, so that none of it lies on a request's path. The session then carries
heartbeats (whatever the transport: it is how a hung peer is noticed), and, where gRPC was chosen,
messages and page bytes.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

import grpc

from kvtransfer.grpc_stream import KvSession, SessionHandler, SessionTiming, SlotMemory
from kvtransfer.kv_frames import (
    Frame,
    add_session_to_server,
    session_call,
    without_data,
)
from kvtransfer.orders import WriteOrder
from protos.baton.v1 import kv_pb2
from protos.fingerprint import difference
from protos.tls import PLAIN, TlsSettings, open_channel
from protos.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

_EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]
_Read = Callable[[], Awaitable[Frame | None]]
_Write = Callable[[Frame], Awaitable[None]]

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


ONE_HOST = frozenset({"cuda_ipc"})
"""Transports that join processes of one host and one PID namespace only."""


class PeerRefused(LookupError):
    """Two workers cannot exchange KV; the message says why."""

    def __init__(self, cause: str, message: str) -> None:
        """`cause`: protocol, fingerprint, identity, transport, or by_peer (the other end's)."""
        super().__init__(message)
        self.cause = cause


def check_fit(mine: kv_pb2.ConnectInfo, theirs: kv_pb2.ConnectInfo) -> None:
    """Raises PeerRefused where two workers must not exchange KV."""
    if theirs.protocol_version != mine.protocol_version:
        raise PeerRefused(
            "protocol",
            f"peer {theirs.instance_id} speaks protocol {theirs.protocol_version}, "
            f"this worker {mine.protocol_version}: run the same release on both",
        )
    if theirs.fingerprint != mine.fingerprint:
        what = difference(theirs.fingerprint, mine.fingerprint)
        raise PeerRefused(
            "fingerprint",
            f"peer {theirs.instance_id} has another fingerprint than this worker: {what}",
        )
    if not theirs.instance_id or theirs.instance_id == mine.instance_id:
        raise PeerRefused("identity", f"peer has the instance id {theirs.instance_id!r}")


def choose_transport(
    mine: kv_pb2.ConnectInfo, theirs: kv_pb2.ConnectInfo, wanted: str, excluded: set[str]
) -> str:
    """The first transport of ours that the peer offers, too; `wanted` unless "auto". Raises
    PeerRefused, by name, where there is none."""
    together = bool(mine.pid_namespace) and mine.pid_namespace == theirs.pid_namespace
    offered = [o.name for o in theirs.transports if together or o.name not in ONE_HOST]
    own = [offer.name for offer in mine.transports if offer.name not in excluded]
    for name in own:
        if name in offered and wanted in ("auto", name):
            return name
    needs = "/".join(own) if wanted == "auto" else wanted
    raise PeerRefused(
        "transport",
        f"peer {theirs.instance_id} offers {'/'.join(offered) or 'no transport'}, "
        f"this worker needs {needs or 'one that still works'}",
    )


class KvSessionClient:
    """Prefill's end: one peer address, dialled again and again until `close`."""

    def __init__(
        self,
        *,
        address: str,
        info: kv_pb2.ConnectInfo,
        handler: SessionHandler,
        outbox: SlotMemory | None = None,
        transport: str = "auto",
        timing: SessionTiming | None = None,
        refused: Callable[[PeerRefused], None] | None = None,
        tls: TlsSettings = PLAIN,
    ) -> None:
        """`address`: host:port of decode's front; `info`: this worker; `outbox`: shared memory
        that orders read from; `refused` is called when the two do not fit."""
        self._tls = tls
        self.address = address
        self._info = info
        self._handler = handler
        self._outbox = outbox
        self._wanted = transport
        self._excluded: set[str] = set()
        self._timing = timing if timing is not None else SessionTiming()
        self._refused = refused
        self._session: KvSession | None = None
        self._closed = asyncio.Event()

    @property
    def peer(self) -> str:
        """Instance id at the other end; empty while there is no session."""
        return self._session.peer if self._session is not None else ""

    def send_message(self, data: bytes) -> None:
        """Dropped while there is no session: its end was reported by `peer_lost`."""
        if self._session is not None:
            self._session.send_message(data)

    def submit(self, order: WriteOrder) -> None:
        """Answered by `write_done`, at once with an error where the session has ended."""
        if self._session is None or self._session.peer != order.peer:
            error = f"no session with peer {order.peer}"
            self._handler.write_done(order.write_id, order.peer, error)
        else:
            self._session.submit(order)

    def retry_without(self, transport: str, reason: str) -> None:
        """The engine could not attach the peer by that transport: negotiate again without it."""
        logger.warning("%s does not reach %s: %s", transport, self.address, reason)
        self._excluded.add(transport)
        if self._session is not None:
            self._session.close(f"{transport} does not work: {reason}")

    async def run(self) -> None:
        """Dials until `close`; never raises for what the peer does."""
        pause = self._timing.redial_s
        while not self._closed.is_set():
            connected = await self._dial()
            base = self._timing.redial_s
            pause = base if connected else min(pause * 2, 10 * base)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), pause)

    def close(self) -> None:
        """Ends the session and `run`."""
        self._closed.set()
        if self._session is not None:
            self._session.close("this worker closed the session")

    async def _dial(self) -> bool:
        """One connection from start to end; whether a session came about."""
        try:
            channel = open_channel(self.address, tls=self._tls, options=CHANNEL_OPTIONS)
        except OSError as error:
            logger.error("no KV session to %s: %s", self.address, error)
            return False
        async with channel:
            call = session_call(channel)

            async def read() -> Frame | None:
                frame = await call.read()
                return None if frame is _EOF else frame

            try:
                handshake = self._handshake(read, call.write)
                session = await asyncio.wait_for(handshake, self._timing.handshake_s)
            except (
                TimeoutError,
                ConnectionError,
                grpc.RpcError,
                asyncio.InvalidStateError,
            ) as error:
                logger.debug("KV session to %s: %r", self.address, error)
                call.cancel()
                return False
            except PeerRefused as error:
                logger.warning("KV session to %s refused: %s", self.address, error)
                if self._refused is not None:
                    self._refused(error)
                call.cancel()
                return False
            reason = "this worker closed the session"
            try:
                if not self._closed.is_set():
                    reason = await session.run()
            finally:
                self._session = None
                call.cancel()
                self._handler.peer_lost(session.peer, reason)
            return True

    async def _handshake(self, read: _Read, write: _Write) -> KvSession:
        """Raises PeerRefused, by name, where the two do not fit."""
        await write(kv_pb2.KvFrame(hello=self._info))
        first = await read()
        if first is None:
            raise ConnectionError("stream ended before hello")
        frame = without_data(first)
        kind = frame.WhichOneof("kind")
        if kind == "refused":
            raise PeerRefused("by_peer", frame.refused.reason)
        if kind != "hello":
            raise PeerRefused("protocol", f"first frame is {kind}, not hello")
        check_fit(self._info, frame.hello)
        chosen = choose_transport(self._info, frame.hello, self._wanted, self._excluded)
        session = KvSession(
            peer=frame.hello.instance_id,
            read=read,
            write=write,
            handler=self._handler,
            outbox=self._outbox,
            window=None,
            timing=self._timing,
        )
        # ours is attached first: a ticket exists only after decode has attached, too
        self._session = session
        self._handler.peer_connected(frame.hello, chosen)
        try:
            await write(kv_pb2.KvFrame(chosen=kv_pb2.TransportChosen(name=chosen)))
        except BaseException:
            self._session = None
            self._handler.peer_lost(session.peer, "the handshake broke")
            raise
        return session


class KvServicer:
    """Decode's end: any number of prefill peers."""

    def __init__(
        self,
        *,
        info: Callable[[], kv_pb2.ConnectInfo],
        handler: SessionHandler,
        window: SlotMemory | None = None,
        timing: SessionTiming | None = None,
        refused: Callable[[PeerRefused], None] | None = None,
    ) -> None:
        """`info` is asked at each handshake, so that the engine may be ready later than the
        server; `window`: shared memory that page bytes land in; `refused` is called when a peer
        does not fit."""
        self._refused = refused
        self._info = info
        self._handler = handler
        self._window = window
        self._timing = timing if timing is not None else SessionTiming()
        self._sessions: dict[str, KvSession] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        add_session_to_server(self.Session, server)

    def set_window(self, window: SlotMemory) -> None:
        """The engine's landing window, once it exists."""
        self._window = window

    @property
    def peers(self) -> list[str]:
        return list(self._sessions)

    def send_message(self, peer: str, data: bytes) -> None:
        """Dropped while there is no session with the peer."""
        session = self._sessions.get(peer)
        if session is not None:
            session.send_message(data)

    def submit(self, order: WriteOrder) -> None:
        """A serving end sends no pages: answered with an error."""
        error = f"this end of the session with peer {order.peer} sends no pages"
        self._handler.write_done(order.write_id, order.peer, error)

    def close_peer(self, peer: str, reason: str) -> None:
        """Ends one session; the peer may dial again."""
        session = self._sessions.get(peer)
        if session is not None:
            session.close(reason)

    def close(self) -> None:
        """Ends all sessions; call it before the server stops."""
        for session in list(self._sessions.values()):
            session.close("this worker closes its sessions")

    async def Session(  # noqa: N802
        self,
        request_iterator: object,
        context: "grpc.aio.ServicerContext[Frame, Frame]",
    ) -> None:
        """One session, from hello to its end."""

        async def read() -> Frame | None:
            frame = await context.read()
            return None if frame is _EOF else frame

        try:
            handshake = self._handshake(read, context.write)
            accepted = await asyncio.wait_for(handshake, self._timing.handshake_s)
        except TimeoutError:
            return
        if accepted is None:
            return
        session, theirs, transport = accepted
        peer = session.peer
        older = self._sessions.get(peer)
        self._sessions[peer] = session
        if older is not None:
            older.close("a newer session of the same instance")
            self._handler.peer_lost(peer, "a newer session of the same instance")
        self._handler.peer_connected(theirs, transport)
        reason = f"session with peer {peer} was cancelled"
        try:
            reason = await session.run()
        finally:
            if self._sessions.get(peer) is session:
                del self._sessions[peer]
                self._handler.peer_lost(peer, reason)

    async def _handshake(
        self, read: _Read, write: _Write
    ) -> tuple[KvSession, kv_pb2.ConnectInfo, str] | None:
        hello = await read()
        if not isinstance(hello, kv_pb2.KvFrame) or hello.WhichOneof("kind") != "hello":
            return None
        theirs, mine = hello.hello, self._info()
        try:
            check_fit(mine, theirs)
        except PeerRefused as error:
            logger.warning("KV session refused: %s", error)
            if self._refused is not None:
                self._refused(error)
            await write(kv_pb2.KvFrame(refused=kv_pb2.SessionRefused(reason=str(error))))
            return None
        await write(kv_pb2.KvFrame(hello=mine))
        answer = await read()
        if not isinstance(answer, kv_pb2.KvFrame) or answer.WhichOneof("kind") != "chosen":
            return None
        if answer.chosen.name not in [offer.name for offer in mine.transports]:
            return None
        session = KvSession(
            peer=theirs.instance_id,
            read=read,
            write=write,
            handler=self._handler,
            outbox=None,
            window=self._window,
            timing=self._timing,
        )
        return session, theirs, answer.chosen.name


def connect_info(
    *, instance_id: str, fingerprint: str, offers: Sequence[tuple[str, bytes]], pid: int = 0
) -> kv_pb2.ConnectInfo:
    """This worker's hello; `offers`: (transport, metadata), best first."""
    return kv_pb2.ConnectInfo(
        protocol_version=PROTOCOL_VERSION,
        instance_id=instance_id,
        fingerprint=fingerprint,
        transports=[kv_pb2.TransportOffer(name=n, metadata=m) for n, m in offers],
        pid=pid,
    )
