"""Scheduler, kubelets and the cluster's DNS, played by one thread: pods become Baton's processes.

It lists instead of watching, so an API server that is away for a moment changes nothing for the
pods that run.
"""

import contextlib
import itertools
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.kubernetes.api import Api, ApiError, Object
from tests.kubernetes.pod import PodRun, said

PAUSE_S = 0.15
NODES = ("node-1", "node-2")
ROLE = "app.kubernetes.io/component"
CAPACITY = {"cpu": "64", "memory": "256Gi", "pods": "110", "ephemeral-storage": "1Ti"}
"""What each node claims: the pods' requests are for real machines, their processes are small."""


@dataclass(frozen=True)
class Ended:
    """How a pod went."""

    name: str
    exits: dict[str, int]
    killed: bool


@dataclass
class Kubelet:
    """The nodes of the cluster."""

    api: Api
    directory: Path
    held: set[str] = field(default_factory=set)
    """Pods, by name, that are reported not Ready, whatever their probes say."""
    hold_new: bool = False
    """Pods that begin now are held."""
    pods: dict[str, PodRun] = field(default_factory=dict)
    """By uid."""
    ended: list[Ended] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What went wrong here: a test's own fault."""

    def __post_init__(self) -> None:
        self._addresses = (f"10.66.{n // 250 + 1}.{n % 250 + 2}" for n in itertools.count())
        self._pool = ThreadPoolExecutor(8)
        self._stopping = threading.Event()
        self._sent: dict[str, Object] = {}
        self._hosts = self.directory / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        # A name that is not in the file has nobody to ask.
        self._hosts.with_name("resolv.conf").write_text("nameserver 127.0.0.1\n")
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)

    def start(self) -> None:
        for name in NODES:
            metadata = {"name": name, "labels": {"kubernetes.io/hostname": name}}
            self.api.create("/api/v1/nodes", {"metadata": metadata})
            conditions = [{"type": "Ready", "status": "True", "reason": "Played"}]
            status = {"capacity": CAPACITY, "allocatable": CAPACITY, "conditions": conditions}
            self.api.patch(f"/api/v1/nodes/{name}/status", {"status": status})
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=30)
        for run in self.pods.values():
            run.kill()
            run.sandbox.end()
        self._pool.shutdown()
        self.api.close()

    def of(self, role: str) -> list[PodRun]:
        """Pods of a role that are not being deleted."""
        return [
            run
            for run in list(self.pods.values())
            if run.item["metadata"]["labels"].get(ROLE) == role
            and "deletionTimestamp" not in run.item["metadata"]
        ]

    def of_namespace(self, namespace: str) -> list[PodRun]:
        """All that still run."""
        return [
            run
            for run in list(self.pods.values())
            if run.item["metadata"]["namespace"] == namespace
        ]

    def logs(self) -> str:
        return "\n".join([*self.problems, said(dict(self.pods))])

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(PAUSE_S):
            try:
                with away():
                    self._take(self.api.items("/api/v1/pods"))
                    self._write_hosts()
                for run in self.pods.values():
                    run.step(self._pool)
            except Exception:
                self.problems.append(traceback.format_exc())

    def _take(self, items: list[Object]) -> None:
        for item in items:
            uid = item["metadata"]["uid"]
            run = self.pods.get(uid)
            if run is not None:
                run.item["metadata"] = item["metadata"]
            if "nodeName" not in item["spec"]:
                self._bind(item, items)
            elif run is None and "deletionTimestamp" not in item["metadata"]:
                if item.get("status", {}).get("phase") == "Pending":
                    self._begin(item)
            elif run is None:
                self._forget(item)
            else:
                self._report(run)
        for uid in self.pods.keys() - {item["metadata"]["uid"] for item in items}:
            self._drop(uid)

    def _bind(self, item: Object, items: list[Object]) -> None:
        """To the emptier node; a pod that wants what no node has waits, as it would."""
        limits = [c.get("resources", {}).get("limits", {}) for c in item["spec"]["containers"]]
        if item["spec"].get("nodeSelector") or any(set(some) - set(CAPACITY) for some in limits):
            return
        count = {node: sum(i["spec"].get("nodeName") == node for i in items) for node in NODES}
        node = min(NODES, key=lambda name: count[name])
        item["spec"]["nodeName"] = node
        body = {
            "metadata": {"name": item["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        with contextlib.suppress(ApiError):  # it may be gone again
            self.api.create(f"{path(item)}/binding", body)

    def _begin(self, item: Object) -> None:
        uid = item["metadata"]["uid"]
        directory = self.directory / uid
        with contextlib.suppress(ApiError):  # a ConfigMap may come later than its pod
            if self.hold_new:
                self.held.add(item["metadata"]["name"])
            self.pods[uid] = PodRun(item, next(self._addresses), directory, self.api, self._hosts)
            self._report(self.pods[uid])

    def _report(self, run: PodRun) -> None:
        metadata = run.item["metadata"]
        if "deletionTimestamp" in metadata:
            run.end()
            if run.done:
                self._forget(run.item)
                return
        status = run.status(held=run.name in self.held)
        if self._sent.get(metadata["uid"]) != status:
            with contextlib.suppress(ApiError):
                self.api.patch(f"{path(run.item)}/status", {"status": status})
                self._sent[metadata["uid"]] = status

    def _forget(self, item: Object) -> None:
        with contextlib.suppress(ApiError):
            self.api.call("DELETE", path(item), {"gracePeriodSeconds": 0})

    def _drop(self, uid: str) -> None:
        run = self.pods[uid]
        run.kill()
        run.sandbox.end()
        # In this order: who sees that it has gone finds here how.
        self.ended.append(Ended(run.name, run.exits, run.killed))
        del self.pods[uid]

    def _write_hosts(self) -> None:
        """Services by name, as the cluster's DNS tells them; all ports are those of the pods."""
        lines = ["127.0.0.1 localhost"]
        for item in self.api.items("/api/v1/endpoints"):
            name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
            for subset in item.get("subsets", []):
                for address in subset.get("addresses", []):
                    lines.append(f"{address['ip']} {name} {name}.{namespace}")
        text = "\n".join([*lines, ""])
        if text != self._hosts.read_text():
            # The same file: it is mounted in every container.
            with self._hosts.open("r+") as hosts:
                hosts.write(text)
                hosts.truncate()


@contextlib.contextmanager
def away() -> Iterator[None]:
    """An API server that is away, or has only just come, changes nothing."""
    try:
        yield
    except httpx.TransportError:
        pass
    except ApiError as error:
        if error.status < httpx.codes.INTERNAL_SERVER_ERROR:
            raise


def path(item: Object) -> str:
    metadata = item["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
