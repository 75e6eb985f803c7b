"""Several routers over the same workers: the list is shared through Redis.

A worker registers with any one router. That router writes it into Redis, all others find it there
and dial it themselves. Each router tells Redis, several times a second, whom it hears: workers
that send it heartbeats, and those whose session with it is up. So a worker stays listed while
anybody hears it, whichever router it registered with, and whether that one still lives.

Redis is never on a request's path. While it is away, routers serve from the list that they have,
take registrations and heartbeats as before, and write them down when it is back, also where it
comes back empty. This is the only module that knows redis.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from protos.baton.v1 import worker_pb2
from router.registry import (
    RegistryHealth,
    WorkerRecord,
    WorkerRegistry,
    replaced_by,
    take_heartbeat,
)
from router.registry_scripts import KEYS, REGISTER, REMOVE, SYNC

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.0
"""Longest one step in Redis may take; below the 2 s that a worker waits for its registration."""

LEFT = "it has left"

_FAILURES = (RedisError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """What the registry needs to know of Redis."""

    url: str
    """redis://, rediss:// or unix://, with user, password and database."""
    prefix: str
    """Name of the deployment; several may share one Redis."""
    ttl_s: float
    """A worker that no router has heard for so long is off the shared list. Seconds."""
    sync_interval_s: float
    """Pause between two looks at the shared list. Seconds."""
    heard_for_s: float
    """How long a heartbeat counts as a sign of life. Seconds."""


class RedisRegistry(WorkerRegistry):
    """`WorkerRegistry` that several routers share. One task keeps both lists alike."""

    kind = "redis"

    def __init__(self, settings: RedisSettings) -> None:
        super().__init__()
        self._settings = settings
        self._place = _without_secrets(settings.url)
        self._redis = Redis.from_url(
            settings.url,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            # Once, since a connection from before Redis restarted fails at its first use.
            retry=Retry(NoBackoff(), 1),
        )
        # The braces keep all keys on one node of a Redis Cluster.
        self._keys = [f"{{{settings.prefix}}}:{key}" for key in KEYS]
        self._register = self._redis.register_script(REGISTER)
        self._remove = self._redis.register_script(REMOVE)
        self._sync_lists = self._redis.register_script(SYNC)
        self._heard: dict[str, float] = {}
        """When this router itself got a sign of life; what others heard does not count, or two
        routers would keep a dead worker alive between them. time.monotonic() seconds."""
        self._goodbyes: set[str] = set()
        """Workers that left while Redis was away."""
        self._version = b""
        self._health = RegistryHealth(last_sync=time.monotonic())
        self._lock = asyncio.Lock()
        """Held over a step in Redis and what follows from it here, so that no answer is applied
        after a newer one."""
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def health(self) -> RegistryHealth:
        return self._health

    async def start(self) -> None:
        # Once before the doors open: a router that starts anew knows the workers at once.
        await self._sync_once()
        self._task = asyncio.create_task(self._keep_in_step(), name="redis registry")

    async def close(self) -> None:
        self._stopping.set()
        if self._task is not None:
            # Not by cancelling: below Python 3.12, a wait inside redis may swallow that.
            await asyncio.wait({self._task}, timeout=CALL_TIMEOUT_S)
            self._task.cancel()
        with contextlib.suppress(*_FAILURES):
            await self._redis.aclose()

    # ---- what workers say -----------------------------------------------------------------------

    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        newer = self.members.newer_at(registration)
        if newer is not None:
            return replaced_by(newer.id, registration.address)
        async with self._lock:
            if self._health.up:
                try:
                    refusal = await self._list(registration)
                except _FAILURES as error:
                    self._failed(error)
                else:
                    if refusal:
                        self._take_off(registration.instance_id, refusal)
                        return refusal
            # Without Redis the worker is listed here alone; the next sync tells the others.
            record = self.members.add(registration)
            self._hear(record.id)
            return record.incompatible

    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        known = take_heartbeat(self.members, instance_id, status)
        if known:
            self._hear(instance_id)
        return known

    async def remove(self, instance_id: str, *, reason: str) -> None:
        async with self._lock:
            self._take_off(instance_id, reason)
            self._goodbyes.add(instance_id)
            if self._health.up:
                try:
                    await self._say_goodbyes()
                except _FAILURES as error:
                    self._failed(error)

    def forget(self, instance_id: str, *, reason: str) -> None:
        self._take_off(instance_id, reason)

    def _hear(self, instance_id: str) -> None:
        self._heard[instance_id] = time.monotonic()

    def _take_off(self, instance_id: str, reason: str) -> None:
        self._heard.pop(instance_id, None)
        self.members.remove(instance_id, reason=reason)
        # Where it is still listed by others, the next look at the list must show it again.
        self._version = b""

    # ---- keeping both lists alike ---------------------------------------------------------------

    async def _keep_in_step(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._settings.sync_interval_s):
                    await self._stopping.wait()
            except TimeoutError:
                await self._look_once()

    async def _look_once(self) -> None:
        try:
            await self._sync_once()
        except Exception:
            # Whatever an odd answer breaks, the next one may be sound.
            logger.exception("the look at the shared list failed")

    async def _sync_once(self) -> None:
        async with self._lock:
            try:
                await self._say_goodbyes()
                missing = await self._look()
                for instance_id in missing:
                    await self._list_again(instance_id)
            except _FAILURES as error:
                self._failed(error)
            else:
                self._succeeded()

    async def _look(self) -> list[str]:
        """Tells whom this router hears, learns the list; whom of these the list lacks."""
        alive = {record.id for record in self.members if self._is_heard(record)}
        known = self._version
        version, missing, ages, registrations = await self._call(self._sync_lists, known, *alive)
        ids = [name.decode() for name in ages[::2]]
        if registrations:
            self._add(registrations)
        for instance_id, age_ms in zip(ids, ages[1::2], strict=True):
            record = self.members.get(instance_id)
            # What this router said itself is no news.
            if record is not None and instance_id not in alive:
                self.members.touch(record, age_s=age_ms / 1e3)
        listed = set(ids)
        for record in self.members:
            if record.id not in listed and not self._is_heard(record):
                self._take_off(record.id, "it is off the shared list, and not heard here")
        if self._version == known:
            self._version = version
        return [name.decode() for name in missing]

    def _add(self, registrations: list[bytes]) -> None:
        found = [worker_pb2.RegisterRequest.FromString(data) for data in registrations]
        # Every router counts the one that started first as the model's first worker.
        for registration in sorted(found, key=lambda r: (r.epoch, r.instance_id)):
            if self.members.newer_at(registration) is None:
                known = self.members.get(registration.instance_id)
                if known is None or known.registration != registration:
                    self.members.add(registration)

    async def _list_again(self, instance_id: str) -> None:
        record = self.members.get(instance_id)
        if record is not None:
            refusal = await self._list(record.registration)
            if refusal:
                self._take_off(instance_id, refusal)

    def _is_heard(self, record: WorkerRecord) -> bool:
        heard = self._heard.get(record.id)
        fresh = heard is not None and time.monotonic() - heard <= self._settings.heard_for_s
        return record.connected or fresh

    # ---- Redis ----------------------------------------------------------------------------------

    async def _list(self, registration: worker_pb2.RegisterRequest) -> str:
        """Writes a worker down; why it may not be, or nothing. Raises what Redis raises."""
        answer, newer = await self._call(
            self._register,
            registration.instance_id,
            registration.address,
            registration.epoch,
            registration.SerializeToString(deterministic=True),
        )
        if answer == b"listed":
            return ""
        return LEFT if answer == b"left" else replaced_by(newer.decode(), registration.address)

    async def _say_goodbyes(self) -> None:
        for instance_id in list(self._goodbyes):
            await self._call(self._remove, instance_id)
            self._goodbyes.discard(instance_id)

    async def _call(self, script: Any, *arguments: str | bytes | int) -> Any:
        ttl_ms = int(self._settings.ttl_s * 1e3)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return cast(Any, await script(keys=self._keys, args=[ttl_ms, *arguments]))

    def _succeeded(self) -> None:
        if not self._health.up:
            logger.warning("Redis at %s answers again", self._place)
        self._health = RegistryHealth(last_sync=time.monotonic(), failures=self._health.failures)

    def _failed(self, error: BaseException) -> None:
        why = " ".join(str(error).split()) or type(error).__name__
        problem = f"Redis at {self._place} does not answer: {why}"
        if self._health.up:
            logger.warning("%s; serving from the list of workers that is known", problem)
        self._health = RegistryHealth(
            up=False,
            problem=problem,
            last_sync=self._health.last_sync,
            failures=self._health.failures + 1,
        )


def _without_secrets(url: str) -> str:
    """host:port or path of a Redis URL, fit for logs."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname}:{parts.port or 6379}"
