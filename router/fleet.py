"""The workers as a whole: links to all, who can take a request, and what they can hold."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.errors import BatonError, ErrorCode
from router.config import RouterConfig
from router.policy import Pair
from router.registry import ROLES, Listeners, WorkerRecord, WorkerRegistry
from router.worker_link import SessionLost, WorkerLink

logger = logging.getLogger(__name__)

PREFILL = inference_pb2.WORKER_ROLE_PREFILL
DECODE = inference_pb2.WORKER_ROLE_DECODE
UNIFIED = inference_pb2.WORKER_ROLE_UNIFIED


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the workers registered about the model they serve."""

    name: str
    path: str
    context_length: int
    """Longest prompt + output. Tokens; 0: unknown."""
    vocab_size: int
    prefill_capacity_tokens: int
    """Longest prompt + one token that the largest empty prefill worker holds; 0: unknown."""
    decode_capacity_tokens: int
    """Longest prompt + output that the largest empty decode worker holds; 0: unknown."""
    unified_capacity_tokens: int = 0
    """The same of the largest empty unified worker; 0: there is none."""
    fingerprint: str = ""
    """Of the workers: what makes the model's numbers (weights, dtype, layout)."""

    def memory_for(self, prompt_tokens: int) -> tuple[int, str]:
        """Longest prompt + output that empty workers hold, given such a prompt, and the role of
        those that hold it. Tokens; 0: unknown.
        """
        pair = self.decode_capacity_tokens
        if self.prefill_capacity_tokens and prompt_tokens + 1 > self.prefill_capacity_tokens:
            pair = 0
        if self.unified_capacity_tokens > pair:
            return self.unified_capacity_tokens, "unified"
        return pair, "decode"


class Fleet:
    """Owns one link per worker that may be paired."""

    def __init__(self, registry: WorkerRegistry, *, config: RouterConfig) -> None:
        self.registry = registry
        self._config = config
        self.router_id = f"router-{uuid.uuid4().hex[:12]}"
        self._links: dict[str, WorkerLink] = {}
        self._changed = asyncio.Event()
        self._retiring: set[WorkerLink] = set()
        """Of workers that are off the list, while what they said last is read."""
        self._goodbyes: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        registry.subscribe(
            Listeners(
                added=self._added,
                removed=self._removed,
                beat=self._beat,
                changed=lambda _: self._on_change(None),
            )
        )

    async def start(self) -> None:
        await self.registry.start()
        self._sweeper = asyncio.create_task(self._sweep(), name="fleet sweeper")

    async def close(self) -> None:
        """Ends all sessions, which aborts what still runs on the workers."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self.registry.close()
        links, self._links = [*self._links.values(), *self._retiring], {}
        await asyncio.gather(*(link.close("the router stops") for link in links), *self._goodbyes)

    # ---- what is usable -------------------------------------------------------------------------

    def pairs(
        self, *, total_tokens: int, prompt_tokens: int, one_token: bool = False
    ) -> list[Pair]:
        """Pairs that can take a request of this size: both ready, KV session up, memory enough;
        and every unified worker, as a pair with itself, that is ready and holds it.

        Args:
            total_tokens: prompt + output that decode, or a unified worker, must hold.
            prompt_tokens: tokens whose KV prefill must hold.
            one_token: no decode follows, so pairs have none.
        """
        prefills = [link for link in self._ready(PREFILL) if _holds(link, prompt_tokens + 1)]
        unified = [link for link in self._ready(UNIFIED) if _holds(link, total_tokens)]
        alone = [Pair(link, link) for link in unified]
        if one_token:
            return [Pair(link, None) for link in prefills] + alone
        decodes = [link for link in self._ready(DECODE) if _holds(link, total_tokens)]
        return [
            Pair(prefill, decode)
            for prefill in prefills
            for decode in decodes
            if _attached(prefill, decode.id) and _attached(decode, prefill.id)
        ] + alone

    def _ready(self, role: inference_pb2.WorkerRole) -> list[WorkerLink]:
        return [
            link for link in self._links.values() if link.record.role == role and link.record.ready
        ]

    def why_unusable(self) -> str:
        """Empty while a pair or a unified worker is usable; else what is missing, for clients and
        operators."""
        if self.pairs(total_tokens=0, prompt_tokens=0):
            return ""
        listed = {record.role for record in self.registry.workers()}
        if UNIFIED not in listed:
            return self._why_no_pair()
        if listed.isdisjoint({PREFILL, DECODE}):
            return self._none_ready(UNIFIED)
        return f"{self._why_no_pair()}; {self._none_ready(UNIFIED)}"

    def _none_ready(self, role: inference_pb2.WorkerRole) -> str:
        lost = [r.id for r in self.registry.workers() if r.role == role and not r.ready]
        known = f" (not ready: {', '.join(lost)})" if lost else ""
        return f"no {ROLES[role]} worker is ready{known}"

    def _why_no_pair(self) -> str:
        for role in (PREFILL, DECODE):
            if not self._ready(role):
                return self._none_ready(role)
        reasons = [
            f"{link.id} → {peer.instance_id}: {peer.reason}"
            for link in self._ready(PREFILL)
            for peer in link.record.peers.values()
            if peer.reason
        ]
        return "no prefill worker has a KV session with a decode worker" + (
            f" ({'; '.join(reasons)})" if reasons else ""
        )

    def model(self) -> ModelFacts | None:
        """The model served; None while no compatible worker is listed."""
        records = [r for r in self.registry.workers() if not r.incompatible]
        if not records:
            return None
        first = records[0].model
        return ModelFacts(
            name=self._config.served_model_name or first.name,
            path=first.path,
            context_length=min(r.model.context_length for r in records),
            vocab_size=first.vocab_size,
            prefill_capacity_tokens=_capacity(records, PREFILL),
            decode_capacity_tokens=_capacity(records, DECODE),
            unified_capacity_tokens=_capacity(records, UNIFIED),
            fingerprint=records[0].registration.fingerprint,
        )

    # ---- figures --------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Asks every connected worker for its figures; those that do not answer keep their last."""
        links = [link for link in self._links.values() if link.record.connected]
        await asyncio.gather(*(self._refresh(link) for link in links))

    async def _refresh(self, link: WorkerLink) -> None:
        try:
            status = await link.get_status(timeout_s=self._config.status_timeout_s)
        except (grpc.RpcError, SessionLost) as error:
            logger.debug("no fresh figures of worker %s: %s", link.id, error)
        else:
            link.record.take_status(status)

    # ---- operators' words -----------------------------------------------------------------------

    async def drain(self, name: str, *, timeout_s: float | None) -> str:
        """Tells a worker to drain; its instance id.

        Args:
            name: instance id, the unambiguous beginning of one, or an address.
            timeout_s: seconds after which it hands over what still runs; None: its own setting.

        Raises:
            BatonError: NOT_FOUND, INVALID_ARGUMENT (ambiguous), or UNAVAILABLE (out of reach).
        """
        link = self._named(name)
        try:
            await link.drain(timeout_s=timeout_s)
        except (grpc.RpcError, SessionLost) as error:
            raise BatonError(
                ErrorCode.UNAVAILABLE, f"worker {link.id} cannot be told to drain: {error}"
            ) from error
        link.note_draining()
        await self._refresh(link)
        return link.id

    async def probe(
        self, prefill: str, decode: str, request: worker_pb2.ProbeRequest
    ) -> worker_pb2.ProbeReport:
        """Has a prefill worker measure its way to a decode worker; both named as for `drain`.

        Raises:
            BatonError: NOT_FOUND, INVALID_ARGUMENT (ambiguous), or UNAVAILABLE (out of reach).
        """
        link = self._named(prefill)
        request.decode_instance = self._named(decode).id
        try:
            return await link.probe(request)
        except (grpc.RpcError, SessionLost) as error:
            raise BatonError(
                ErrorCode.UNAVAILABLE, f"worker {link.id} cannot measure: {error}"
            ) from error

    def _named(self, name: str) -> WorkerLink:
        links = list(self._links.values())
        exact = [link for link in links if name in (link.id, link.record.registration.address)]
        found = exact or [link for link in links if name and link.id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if not found:
            known = ", ".join(sorted(link.id for link in links)) or "none"
            raise BatonError(
                ErrorCode.NOT_FOUND, f"no worker is called {name or 'nothing'}; there are: {known}"
            )
        ids = ", ".join(sorted(link.id for link in found))
        raise BatonError(ErrorCode.INVALID_ARGUMENT, f"{name} may be any of: {ids}")

    # ---- changes --------------------------------------------------------------------------------

    async def wait_for_change(self, timeout_s: float | None = None) -> None:
        """Returns at the next change of any worker's state or pairing, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _on_change(self, link: WorkerLink | None) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._tell_peers(link)
        if link is not None and link.left:
            # Its word to the registry may get lost on the way; this one is here.
            goodbye = self.registry.remove(link.id, reason="it has drained and left")
            self._meanwhile(goodbye)

    def _meanwhile(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    def _tell_peers(self, changed: WorkerLink | None) -> None:
        """Prefill workers hear of every change among decode workers; a new one hears of all."""
        decodes = [
            link.record
            for link in self._links.values()
            if link.record.role == DECODE and link.record.connected
        ]
        update = worker_pb2.PeerUpdate(
            peers=[
                worker_pb2.Peer(instance_id=r.id, address=r.registration.address) for r in decodes
            ]
        )
        listed = {record.id for record in decodes}
        for link in self._links.values():
            if link.record.role != PREFILL or not link.record.connected:
                continue
            for gone in link.record.peers.keys() - listed:
                # What was said of a peer that left must not count when it comes back.
                del link.record.peers[gone]
            if link.told_peers != update:
                link.told_peers = update
                link.send(worker_pb2.RouterMessage(peers=update))

    def _added(self, record: WorkerRecord) -> None:
        link = WorkerLink(
            record, router_id=self.router_id, config=self._config, on_change=self._on_change
        )
        self._links[record.id] = link
        link.start()
        self._on_change(None)

    def _removed(self, record: WorkerRecord) -> None:
        link = self._links.pop(record.id, None)
        if link is not None:
            self._retiring.add(link)
            self._meanwhile(self._retire(link))
        self._on_change(None)

    async def _retire(self, link: WorkerLink) -> None:
        try:
            await link.retire("it left or was replaced")
        finally:
            self._retiring.discard(link)

    def _beat(self, record: WorkerRecord) -> None:
        link = self._links.get(record.id)
        if link is not None:
            link.on_heartbeat()

    async def _sweep(self) -> None:
        """Takes workers off the list that neither talk nor send heartbeats."""
        limit_s = self._config.forget_lost_s
        while True:
            await asyncio.sleep(min(1.0, limit_s / 2))
            now = time.monotonic()
            for record in self.registry.workers():
                silent_s = now - max(record.last_heartbeat, record.lost_since)
                if not record.connected and silent_s > limit_s:
                    self.registry.forget(record.id, reason=f"silent for {silent_s:.0f} s")


def _holds(link: WorkerLink, tokens: int) -> bool:
    limit = link.record.model.max_total_tokens
    return limit == 0 or tokens <= limit


def _capacity(records: list[WorkerRecord], role: inference_pb2.WorkerRole) -> int:
    return max((r.model.max_total_tokens for r in records if r.role == role), default=0)


def _attached(link: WorkerLink, peer: str) -> bool:
    """Whether this worker says that KV can flow to or from the peer. Both ends are asked: a ticket
    for a writer that decode has not attached yet would be refused.
    """
    state = link.record.peers.get(peer)
    return state is not None and state.connected
