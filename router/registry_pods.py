"""Workers that are found as pods: nobody registers, the cluster's own list is the truth.

A pod says where a worker is and whether it is meant to serve; what it is, only the worker itself
can say, so it is asked (`Worker.Describe`). The pod's uid is the identity: a container that
restarts in its pod is another instance of the same worker, found as soon as the old one's session
ends. While the cluster's API is away, the pods that are known stay known.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import grpc

from protos.baton.v1 import worker_pb2
from protos.tls import PLAIN, TlsSettings, open_channel
from router.registry import (
    ROLES,
    RegistryHealth,
    WorkerRecord,
    WorkerRegistry,
    take_heartbeat,
)

logger = logging.getLogger(__name__)

Describe = Callable[[str], Awaitable[worker_pb2.RegisterRequest]]
"""Asks the worker at an address what it is. Raises grpc.RpcError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What the cluster says of one worker."""

    uid: str
    name: str
    role: str
    """prefill, decode or unified, by its label."""
    address: str
    """host:port; empty while it has none."""
    running: bool
    """Its containers run, however they are."""
    ready: bool
    """It passes its readiness probe."""
    draining: str = ""
    """Why it should get no new requests; empty: it should."""

    @property
    def held_back(self) -> str:
        if self.draining:
            return self.draining
        return "" if self.ready else f"pod {self.name} is not Ready"


class PodSink(Protocol):
    """Who hears of pods. Called in the router's loop, never waits."""

    def replace(self, pods: Iterable[Pod]) -> None:
        """All pods there are."""
        ...

    def put(self, pod: Pod) -> None:
        """One is new or has changed."""
        ...

    def drop(self, uid: str) -> None:
        """One is gone."""
        ...

    def failed(self, problem: str) -> None:
        """The cluster's API cannot be reached; the source goes on trying."""
        ...


class PodSource(Protocol):
    """Where pods come from."""

    def start(self, sink: PodSink) -> None:
        """Called in the router's loop; what is found is told to `sink`, in that loop."""
        ...

    async def close(self) -> None: ...


class PodRegistry(WorkerRegistry):
    """`WorkerRegistry` whose workers are pods."""

    kind = "kubernetes"

    def __init__(
        self,
        source: PodSource,
        *,
        look_interval_s: float,
        describe_timeout_s: float,
        describe: Describe | None = None,
        tls: TlsSettings = PLAIN,
    ) -> None:
        """
        Args:
            source: tells of pods.
            look_interval_s: pause between two looks at pods whose worker has no session.
            describe_timeout_s: longest a worker may take to say what it is.
            describe: asks it; None: over gRPC.
            tls: how it is asked.
        """
        super().__init__()
        self._source = source
        self._look_interval_s = look_interval_s
        self._timeout_s = describe_timeout_s
        self._tls = tls
        self._describe = describe or self._ask
        self._pods: dict[str, Pod] = {}
        self._found: dict[str, str] = {}
        """Pod uid -> instance id of the worker found there last."""
        self._left: set[str] = set()
        """Instances that said goodbye, though their pods may be there for a moment yet."""
        self._news = asyncio.Event()
        self._health = RegistryHealth(
            up=False, problem="the pods were not listed yet", last_sync=time.monotonic()
        )
        self._task: asyncio.Task[None] | None = None

    def health(self) -> RegistryHealth:
        return self._health

    async def start(self) -> None:
        self._source.start(self)
        self._task = asyncio.create_task(self._keep_looking(), name="pods")

    async def close(self) -> None:
        await self._source.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # ---- what workers say -----------------------------------------------------------------------

    async def register(self, registration: worker_pb2.RegisterRequest) -> str:
        """A worker need not register here; one that does is looked at now, not a second later."""
        pod = next((p for p in self._pods.values() if p.address == registration.address), None)
        if pod is None or not pod.running:
            return (
                f"no running pod with the address {registration.address} is known; this router "
                "finds its workers as pods, so they may be started without a router"
            )
        # It runs, or it would not ask: it is listed, and held back until its pod is Ready.
        await self._look_at([pod], also_held_back=True)
        record = self.members.get(registration.instance_id)
        if record is None:
            return f"another worker, or none, answers at {registration.address}"
        return record.incompatible

    async def heartbeat(self, instance_id: str, status: worker_pb2.WorkerStatus) -> bool:
        return take_heartbeat(self.members, instance_id, status)

    async def remove(self, instance_id: str, *, reason: str) -> None:
        self._left.add(instance_id)
        self.members.remove(instance_id, reason=reason)

    # ---- what the cluster says (PodSink) --------------------------------------------------------

    def replace(self, pods: Iterable[Pod]) -> None:
        listed = {pod.uid: pod for pod in pods}
        for uid in self._pods.keys() - listed.keys():
            self._gone(uid)
        for pod in listed.values():
            self._take(pod)
        self._reached()

    def put(self, pod: Pod) -> None:
        self._take(pod)
        self._reached()

    def drop(self, uid: str) -> None:
        self._gone(uid)
        self._reached()

    def failed(self, problem: str) -> None:
        if self._health.up:
            logger.warning("%s; serving from the pods that are known", problem)
        self._health = RegistryHealth(
            up=False,
            problem=problem,
            last_sync=self._health.last_sync,
            failures=self._health.failures + 1,
        )

    def _reached(self) -> None:
        if self._health.failures and not self._health.up:
            logger.warning("the cluster's API answers again")
        self._health = RegistryHealth(last_sync=time.monotonic(), failures=self._health.failures)

    def _take(self, pod: Pod) -> None:
        before = self._pods.get(pod.uid)
        self._pods[pod.uid] = pod
        record = self._record(pod)
        if not pod.running:
            self._unlist(pod.uid, f"pod {pod.name} does not run")
        elif record is not None:
            self.members.hold_back(record, pod.held_back)
        if pod != before:
            self._news.set()

    def _gone(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None:
            self._unlist(uid, f"pod {pod.name} is gone")

    def _unlist(self, uid: str, reason: str) -> None:
        instance_id = self._found.pop(uid, None)
        if instance_id is not None:
            self._left.discard(instance_id)
            self.members.remove(instance_id, reason=reason)

    def _record(self, pod: Pod) -> WorkerRecord | None:
        instance_id = self._found.get(pod.uid)
        return None if instance_id is None else self.members.get(instance_id)

    # ---- looking at them ------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._look_at(list(self._pods.values()))
            except Exception:
                # Whatever an odd answer breaks, the other pods must be found.
                logger.exception("the look at the pods failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_interval_s):
                    await self._news.wait()

    async def _look_at(self, pods: list[Pod], *, also_held_back: bool = False) -> None:
        """Asks those that have no session who they are. One that is listed already is asked even
        where it is not Ready: its session may come back.
        """
        asked = [pod for pod in pods if self._needs_a_look(pod, also_held_back)]
        answers = await asyncio.gather(*(self._meet(pod) for pod in asked))
        met = [(a, pod) for a, pod in zip(answers, asked, strict=True) if a is not None]
        # Every router counts the one that started first as the model's first worker.
        for registration, pod in sorted(met, key=lambda m: (m[0].epoch, m[0].instance_id)):
            if self._pods.get(pod.uid) is not None and registration.instance_id not in self._left:
                self._list(registration, self._pods[pod.uid])

    def _needs_a_look(self, pod: Pod, also_held_back: bool) -> bool:
        record = self._record(pod)
        if record is not None and record.connected:
            self.members.touch(record)
            return False
        wanted = pod.running and bool(pod.address)
        return wanted and (record is not None or also_held_back or not pod.held_back)

    async def _meet(self, pod: Pod) -> worker_pb2.RegisterRequest | None:
        try:
            registration = await self._describe(pod.address)
        except (grpc.RpcError, OSError, TimeoutError) as error:
            logger.debug("pod %s does not say what it is: %s", pod.name, error)
            return None
        # The worker knows its address as its host sees it, the cluster as others reach it.
        registration.address = pod.address
        return registration

    def _list(self, registration: worker_pb2.RegisterRequest, pod: Pod) -> None:
        role = ROLES.get(registration.role, "unknown")
        problem = ""
        if pod.role != role:
            problem = f"pod {pod.name} is labelled {pod.role or 'nothing'}, its worker is {role}"
        before = self._found.get(pod.uid, "")
        if before != registration.instance_id:
            self._left.discard(before)
        self._found[pod.uid] = registration.instance_id
        record = self.members.add(registration, problem=problem)
        self.members.hold_back(record, pod.held_back)

    async def _ask(self, address: str) -> worker_pb2.RegisterRequest:
        # A channel of its own, which cannot be in the back-off of an earlier failure.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        async with open_channel(address, tls=self._tls, options=options) as channel:
            call = channel.unary_unary(
                "/baton.v1.Worker/Describe",
                request_serializer=worker_pb2.DescribeRequest.SerializeToString,
                response_deserializer=worker_pb2.RegisterRequest.FromString,
            )
            answer = await call(worker_pb2.DescribeRequest(), timeout=self._timeout_s)
            return cast(worker_pb2.RegisterRequest, answer)
