"""Who serves: the list of workers, and which of them may be paired.

Every registry keeps a list of its own (`Members`), which the router works with; they differ in
where it comes from. In memory, workers tell this router alone. Through Redis, several routers
share what each was told. With Kubernetes, the pods are the list. A router whose source is out of
reach goes on with the list that it has.

Two workers that disagree on protocol version or fingerprint would exchange KV that means nothing
to the other, so such a worker is listed with the reason, where an operator sees it, and is never
paired.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.fingerprint import difference
from protos.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

ROLES = {
    inference_pb2.WORKER_ROLE_PREFILL: "prefill",
    inference_pb2.WORKER_ROLE_DECODE: "decode",
    inference_pb2.WORKER_ROLE_UNIFIED: "unified",
}
"""The roles that this router gives work to, under the names it shows."""


@dataclass(slots=True)
class WorkerRecord:
    """One worker instance as the router knows it."""

    registration: worker_pb2.RegisterRequest
    problem: str = ""
    """What is wrong with it whatever other workers there are; empty: nothing."""
    incompatible: str = ""
    """Why it is never paired; empty: it may be."""
    held_back: str = ""
    """Why it gets no new requests though it would take them; empty: it gets them."""
    connected: bool = False
    """The router's session with it is up."""
    status: worker_pb2.WorkerStatus = field(default_factory=worker_pb2.WorkerStatus)
    """What it last said of itself."""
    last_heartbeat: float = field(default_factory=time.monotonic)
    lost_since: float = field(default_factory=time.monotonic)
    """When its session ended, or it registered; meaningless while connected."""
    lost_reason: str = "it was not reached yet"
    """Why the session ended; meaningless while connected."""
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
        """prefill, decode, unified, or unknown."""
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
        if self.held_back or self.drains:
            return inference_pb2.WORKER_STATE_DRAINING
        return inference_pb2.WORKER_STATE_READY

    @property
    def reason(self) -> str:
        """Why it gets no requests; empty where it does, or where it drains by itself."""
        if self.incompatible:
            return self.incompatible
        return self.held_back if self.connected else self.lost_reason

    @property
    def ready(self) -> bool:
        """May be given new requests."""
        return self.state == inference_pb2.WORKER_STATE_READY

    def take_status(self, status: worker_pb2.WorkerStatus) -> None:
        """What it says of itself, by whatever way. Words overtake each other, and an instance that
        drains is never ready again: an older one does not bring it back.
        """
        drains = self.drains
        self.status = status
        if drains:
            self.note_draining()

    @property
    def drains(self) -> bool:
        """It has said that it takes nothing any more."""
        return self.status.state == inference_pb2.WORKER_STATE_DRAINING

    def note_draining(self) -> None:
        self.status.state = inference_pb2.WORKER_STATE_DRAINING

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
            reason=self.reason,
            silent_s=0.0 if self.connected else time.monotonic() - self.last_heartbeat,
        )


def state_name(state: inference_pb2.WorkerState) -> str:
    """ready, draining, lost, incompatible."""
    return inference_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()


Listener = Callable[[WorkerRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who hears of changes; called at once, in the router's loop."""

    added: Listener
    """A worker that may be paired from now on."""
    removed: Listener
    """One that left the list, or was never paired."""
    beat: Listener
    """A sign of life arrived."""
    changed: Listener
    """It is held back from now on, or no longer."""


class Members:
    """The router's own list, and the rules for who may be paired. Never waits."""

    def __init__(self) -> None:
        self._records: dict[str, WorkerRecord] = {}
        self._listeners: list[Listeners] = []

    def __iter__(self) -> Iterator[WorkerRecord]:
        """Oldest first; a copy, so that members may leave meanwhile."""
        return iter(list(self._records.values()))

    def get(self, instance_id: str) -> WorkerRecord | None:
        return self._records.get(instance_id)

    def subscribe(self, listeners: Listeners) -> None:
        self._listeners.append(listeners)

    def add(self, registration: worker_pb2.RegisterRequest, *, problem: str = "") -> WorkerRecord:
        """Lists a worker, or notes that it is still there. Others at its address are removed:
        their process is gone. With a `problem` it is never paired.
        """
        known = self._records.get(registration.instance_id)
        if known is not None and known.registration == registration:
            self.touch(known)
            return known
        for record in self:
            if registration.address == record.registration.address or record is known:
                self.remove(record.id, reason=f"replaced by {registration.instance_id}")
        record = WorkerRecord(registration, problem=problem)
        record.incompatible = self._incompatibility(record)
        self._records[record.id] = record
        if record.incompatible:
            logger.warning("worker %s is never paired: %s", record.id, record.incompatible)
        else:
            self._announce(record)
        return record

    def newer_at(self, registration: worker_pb2.RegisterRequest) -> WorkerRecord | None:
        """The listed worker that has this one's address and started after it."""
        for record in self._records.values():
            theirs = record.registration
            if (
                theirs.address == registration.address
                and theirs.instance_id != registration.instance_id
                and registration.epoch
                and theirs.epoch > registration.epoch
            ):
                return record
        return None

    def touch(self, record: WorkerRecord, *, age_s: float = 0.0) -> None:
        """A sign of life, `age_s` seconds ago; an older one than is known changes nothing."""
        heard = time.monotonic() - age_s
        if heard > record.last_heartbeat:
            record.last_heartbeat = heard
            for listeners in self._listeners:
                listeners.beat(record)

    def hold_back(self, record: WorkerRecord, reason: str) -> None:
        """Gives it no new requests while there is a reason; empty: it gets them again."""
        if record.held_back != reason:
            record.held_back = reason
            for listeners in self._listeners:
                listeners.changed(record)

    def remove(self, instance_id: str, *, reason: str) -> None:
        """Takes a worker off the list; an unknown one is no error."""
        record = self._records.pop(instance_id, None)
        if record is None:
            return
        logger.info("worker %s left: %s", instance_id, reason)
        for listeners in self._listeners:
            listeners.removed(record)
        self._reconsider()

    def _announce(self, record: WorkerRecord) -> None:
        logger.info(
            "%s worker %s registered at %s",
            record.role_name,
            record.id,
            record.registration.address,
        )
        for listeners in self._listeners:
            listeners.added(record)

    def _reconsider(self) -> None:
        """A worker that only contradicted one that has left may be paired from now on."""
        for record in self:
            if record.incompatible:
                record.incompatible = self._incompatibility(record)
                if not record.incompatible:
                    self._announce(record)

    def _incompatibility(self, record: WorkerRecord) -> str:
        registration = record.registration
        if record.problem:
            return record.problem
        if registration.protocol_version != PROTOCOL_VERSION:
            return (
                f"speaks protocol version {registration.protocol_version}, "
                f"this router {PROTOCOL_VERSION}"
            )
        if registration.role not in ROLES:
            known = ", ".join(ROLES.values())
            return f"has role {registration.role}; this router knows {known}"
        if not registration.instance_id or not registration.address:
            return "registered without an instance id or an address"
        ours = registration.fingerprint
        for other in self._records.values():
            theirs = other.registration.fingerprint
            if not other.incompatible and theirs != ours:
                what = difference(ours, theirs)
                return f"its fingerprint differs from that of {other.id}: {what}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryHealth:
    """How the source of the list is."""

    up: bool = True
    """False: it cannot be reached, and the router serves from what it knows."""
    problem: str = ""
    """What is wrong; empty while it is up."""
    last_sync: float = 0.0
    """When the list last agreed with its source; time.monotonic() seconds, 0: never."""
    failures: int = 0
    """How often it could not be reached since the start."""


class WorkerRegistry(ABC):
    """Where the router's list of workers comes from."""

    kind: Literal["memory", "redis", "kubernetes"]

    def __init__(self) -> None:
        self.members = Members()

    async def start(self) -> None:  # noqa: B027 (memory needs none)
        """Called once, before the doors open. A source that is away now is no error."""

    async def close(self) -> None:  # noqa: B027 (memory needs none)
        """Called once, when the router stops. Workers stay listed wherever others see them."""

    @abstractmethod
    def health(self) -> RegistryHealth:
        """How the source of the list is; never waits."""

    @abstractmethod
    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        """Lists a worker; called at its start and whenever it finds itself unknown.

        An older instance at the same address is removed: its process is gone. Returns why the
        worker will not be paired, empty where it may be.
        """

    @abstractmethod
    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        """Takes a sign of life. False: that instance is not listed and has to register again."""

    @abstractmethod
    async def remove(self, instance_id: str, *, reason: str) -> None:
        """A worker has left, for every router; an unknown one is no error."""

    def forget(self, instance_id: str, *, reason: str) -> None:
        """Takes a worker off this router's list alone: it can no longer be reached from here."""
        self.members.remove(instance_id, reason=reason)

    def workers(self) -> list[WorkerRecord]:
        """All listed workers, oldest first."""
        return list(self.members)

    def subscribe(self, listeners: Listeners) -> None:
        self.members.subscribe(listeners)

    def info(self) -> inference_pb2.RegistryInfo:
        """The source as clients see it."""
        health = self.health()
        return inference_pb2.RegistryInfo(
            kind=self.kind,
            up=health.up,
            last_sync_age_s=self.sync_age_s(),
            problem=health.problem,
        )

    def sync_age_s(self) -> float:
        """Seconds since the list last agreed with its source; since ever, where it never did."""
        return max(0.0, time.monotonic() - self.health().last_sync)


class RegistryUnavailableError(OSError):
    """The registry asked for cannot be made; the message says what to do."""


class InMemoryRegistry(WorkerRegistry):
    """The registry of a single router: workers tell it alone."""

    kind = "memory"

    def health(self) -> RegistryHealth:
        return RegistryHealth(last_sync=time.monotonic())

    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        newer = self.members.newer_at(registration)
        if newer is not None:
            return replaced_by(newer.id, registration.address)
        return self.members.add(registration).incompatible

    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        return take_heartbeat(self.members, instance_id, status)

    async def remove(self, instance_id: str, *, reason: str) -> None:
        self.members.remove(instance_id, reason=reason)


def take_heartbeat(members: Members, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
    """Whether that worker is listed; if so, it was heard."""
    record = members.get(instance_id)
    if record is None:
        return False
    record.take_status(status)
    members.touch(record)
    return True


def replaced_by(instance_id: str, address: str) -> str:
    return f"{instance_id}, which started later, has the address {address}"
