"""Who serves: the list of workers, and which of them may be paired.

Two workers that disagree on protocol version or fingerprint would exchange KV that means nothing
to the other, so such a worker is listed with the reason, where an operator sees it, and is never
paired.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

ROLES = {
    inference_pb2.WORKER_ROLE_PREFILL: "prefill",
    inference_pb2.WORKER_ROLE_DECODE: "decode",
}
"""The roles that this router pairs, under the names it shows."""


@dataclass(slots=True)
class WorkerRecord:
    """One worker instance as the router knows it."""

    registration: worker_pb2.RegisterRequest
    incompatible: str = ""
    """Why it is never paired; empty: it may be."""
    connected: bool = False
    """The router's session with it is up."""
    status: worker_pb2.WorkerStatus = field(default_factory=worker_pb2.WorkerStatus)
    """What it last said of itself."""
    last_heartbeat: float = field(default_factory=time.monotonic)
    lost_since: float = field(default_factory=time.monotonic)
    """When its session ended, or it registered; meaningless while connected."""
    peers: dict[str, worker_pb2.PeerState] = field(default_factory=dict)
    """On a prefill worker: its KV sessions, by decode instance."""

    @property
    def id(self) -> str:
        return self.registration.instance_id

    @property
    def role(self) -> inference_pb2.WorkerRole:
        return self.registration.role

    @property
    def role_name(self) -> str:
        """prefill, decode, or unknown."""
        return ROLES.get(self.role, "unknown")

    @property
    def model(self) -> worker_pb2.ModelDescription:
        return self.registration.model

    @property
    def state(self) -> inference_pb2.WorkerState:
        if self.incompatible:
            return inference_pb2.WORKER_STATE_INCOMPATIBLE
        if not self.connected:
            return inference_pb2.WORKER_STATE_LOST
        if self.status.state == inference_pb2.WORKER_STATE_DRAINING:
            return inference_pb2.WORKER_STATE_DRAINING
        return inference_pb2.WORKER_STATE_READY

    @property
    def ready(self) -> bool:
        """May be given new requests."""
        return self.state == inference_pb2.WORKER_STATE_READY

    def info(self) -> inference_pb2.WorkerInfo:
        """The worker as clients see it."""
        return inference_pb2.WorkerInfo(
            id=self.id,
            role=self.role,
            address=self.registration.address,
            pid=self.registration.pid,
            engine_pids=self.registration.engine_pids,
            state=self.state,
            transports=self.registration.transports,
            pages=self.status.pages,
            running=self.status.running,
            waiting=self.status.waiting,
        )


def state_name(state: inference_pb2.WorkerState) -> str:
    """ready, draining, lost, incompatible."""
    return inference_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()


class WorkerRegistry(ABC):
    """Where workers register. One router keeps it in memory; several share one elsewhere."""

    @abstractmethod
    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        """Lists a worker; called at its start and whenever it finds itself unknown.

        Another instance at the same address is removed: its process is gone. Returns why the
        worker will not be paired, empty where it may be.
        """

    @abstractmethod
    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        """Takes a sign of life. False: that instance is not listed and has to register again."""

    @abstractmethod
    async def remove(self, instance_id: str, *, reason: str) -> None:
        """Takes a worker off the list; an unknown one is no error."""

    @abstractmethod
    def workers(self) -> list[WorkerRecord]:
        """All listed workers, oldest first."""

    @abstractmethod
    def subscribe(self, *, added: "Listener", removed: "Listener", beat: "Listener") -> None:
        """Has these called in the router's loop, at once: for a worker that may be paired from now
        on, for one that left the list (or was never paired), and after each heartbeat."""


Listener = Callable[[WorkerRecord], None]


class InMemoryRegistry(WorkerRegistry):
    """The registry of a single router."""

    def __init__(self) -> None:
        self._records: dict[str, WorkerRecord] = {}
        self._listeners: list[tuple[Listener, Listener, Listener]] = []

    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        known = self._records.get(registration.instance_id)
        if known is not None and known.registration == registration:
            known.last_heartbeat = time.monotonic()
            return known.incompatible
        for record in self.workers():
            if registration.address == record.registration.address or record is known:
                await self.remove(record.id, reason=f"replaced by {registration.instance_id}")
        record = WorkerRecord(registration, incompatible=self._incompatibility(registration))
        self._records[record.id] = record
        if record.incompatible:
            logger.warning("worker %s is never paired: %s", record.id, record.incompatible)
        else:
            self._announce(record)
        return record.incompatible

    def _announce(self, record: WorkerRecord) -> None:
        logger.info(
            "%s worker %s registered at %s",
            record.role_name,
            record.id,
            record.registration.address,
        )
        for added, _, _ in self._listeners:
            added(record)

    def _incompatibility(self, registration: worker_pb2.RegisterRequest) -> str:
        if registration.protocol_version != PROTOCOL_VERSION:
            return (
                f"speaks protocol version {registration.protocol_version}, "
                f"this router {PROTOCOL_VERSION}"
            )
        if registration.role not in ROLES:
            return f"has role {registration.role}; this router pairs prefill and decode workers"
        if not registration.instance_id or not registration.address:
            return "registered without an instance id or an address"
        ours = registration.fingerprint
        for other in self._records.values():
            theirs = other.registration.fingerprint
            if not other.incompatible and theirs != ours:
                return (
                    f"fingerprint {ours} differs from {theirs} of {other.id}: "
                    "another model, dtype or layout"
                )
        return ""

    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        record = self._records.get(instance_id)
        if record is None:
            return False
        record.last_heartbeat = time.monotonic()
        record.status = status
        for _, _, beat in self._listeners:
            beat(record)
        return True

    async def remove(self, instance_id: str, *, reason: str) -> None:
        record = self._records.pop(instance_id, None)
        if record is None:
            return
        logger.info("worker %s left: %s", instance_id, reason)
        for _, removed, _ in self._listeners:
            removed(record)
        self._reconsider()

    def _reconsider(self) -> None:
        """A worker that only contradicted one that has left may be paired from now on."""
        for record in self._records.values():
            if record.incompatible:
                record.incompatible = self._incompatibility(record.registration)
                if not record.incompatible:
                    self._announce(record)

    def workers(self) -> list[WorkerRecord]:
        return list(self._records.values())

    def subscribe(self, *, added: Listener, removed: Listener, beat: Listener) -> None:
        self._listeners.append((added, removed, beat))
