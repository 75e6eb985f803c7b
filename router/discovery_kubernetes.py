"""Pods of a Kubernetes cluster, followed by a list and a watch.

The official client blocks, so it has a thread of its own and tells the router's loop what it sees.
A watch that is dropped goes on where it was; one whose place the API server has forgotten (410
Gone) begins with a new list; and all pods are listed anew at fixed times whatever happens, so that
a lost event is not lost for ever. This is the only module that knows kubernetes.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from router.registry import RegistryUnavailableError
from router.registry_pods import Pod, PodSink

logger = logging.getLogger(__name__)

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_TIMEOUT_S = 5.0
READ_GRACE_S = 5.0
"""Silence past a watch's own end after which its connection counts as dead."""
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 10.0
STOP_TIMEOUT_S = 2.0
PORT_NAME = "grpc"
"""Container port that is the worker's where no annotation names one."""

_FAILURES = (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodQuery:
    """Which pods are workers, and how they say so."""

    namespace: str
    """Empty: the router's own."""
    selector: str
    """Label selector, as kubectl takes it."""
    role_label: str
    """Label whose value is prefill, decode or unified."""
    port_annotation: str
    """Annotation with the worker's gRPC port."""
    drain_annotation: str
    """Annotation that stops new requests while its value is neither empty nor false."""
    reconcile_s: float
    """Longest time between two complete lists. Seconds."""


class KubernetesPods:
    """`PodSource` of a cluster."""

    def __init__(self, query: PodQuery, *, kubeconfig: str = "") -> None:
        """
        Args:
            query: which pods.
            kubeconfig: file that says where the API is; empty: this pod's service account, else
                the user's own file.

        Raises:
            RegistryUnavailableError: nothing says where the API is.
        """
        settings, own_namespace = _connection(kubeconfig)
        self._query = query
        self._namespace = query.namespace or own_namespace
        self._api = client.CoreV1Api(client.ApiClient(settings))
        self._stopping = threading.Event()
        self._watch: watch.Watch | None = None
        self._thread = threading.Thread(target=self._run, name="kubernetes", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink: PodSink | None = None
        self._odd: set[str] = set()
        """Pods that were complained about."""

    def start(self, sink: PodSink) -> None:
        self._loop, self._sink = asyncio.get_running_loop(), sink
        self._thread.start()

    async def close(self) -> None:
        self._stopping.set()
        if self._watch is not None:
            self._watch.stop()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                self._follow(self._list())
                pause_s = FIRST_PAUSE_S
            except _FAILURES as error:
                if _is_gone(error):
                    logger.info("the watch's place has expired: listing the pods anew")
                    continue
                self._fail(_describe(error))
                self._stopping.wait(pause_s)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)
            except Exception as error:
                logger.exception("following the pods failed")
                self._fail(repr(error))
                self._stopping.wait(LAST_PAUSE_S)

    def _list(self) -> str:
        """Tells of all pods; the place in the cluster's history from which to watch."""
        answer: Any = self._api.list_namespaced_pod(
            self._namespace,
            label_selector=self._query.selector,
            _request_timeout=(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S + READ_GRACE_S),
            _preload_content=False,
        )
        listing = json.loads(answer.data)
        pods = [self._pod(item) for item in listing.get("items") or []]
        self._tell(lambda sink: sink.replace(pods))
        return str(listing["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> None:
        """Watches until it is time to list again. Raises what ends a watch for good."""
        until = time.monotonic() + self._query.reconcile_s
        while not self._stopping.is_set() and (left_s := until - time.monotonic()) > 0:
            try:
                for event in self._events(version, max(1, int(left_s))):
                    version = event["raw_object"]["metadata"]["resourceVersion"]
                    self._take(event["type"], event["raw_object"])
                    if self._stopping.is_set():
                        return
            except urllib3.exceptions.ProtocolError as error:
                logger.debug("the watch broke off and goes on from %s: %s", version, error)
            # An API server that hangs up at once must not be asked in a busy loop.
            self._stopping.wait(min(FIRST_PAUSE_S, max(0.0, until - time.monotonic())))

    def _events(self, version: str, seconds: int) -> Any:
        self._watch = watch.Watch()
        return self._watch.stream(
            self._api.list_namespaced_pod,
            self._namespace,
            label_selector=self._query.selector,
            resource_version=version,
            allow_watch_bookmarks=True,
            # With a time limit, the client leaves an expired place to us.
            timeout_seconds=seconds,
            _request_timeout=(CONNECT_TIMEOUT_S, seconds + READ_GRACE_S),
        )

    def _take(self, kind: str, item: Mapping[str, Any]) -> None:
        if kind in ("ADDED", "MODIFIED"):
            pod = self._pod(item)
            self._tell(lambda sink: sink.put(pod))
        elif kind == "DELETED":
            uid = str(item["metadata"]["uid"])
            self._odd.discard(uid)
            self._tell(lambda sink: sink.drop(uid))
        # A BOOKMARK only moves the place.

    def _fail(self, why: str) -> None:
        self._tell(lambda sink: sink.failed(why))

    def _tell(self, say: Callable[[PodSink], None]) -> None:
        loop, sink = self._loop, self._sink
        if loop is None or sink is None or self._stopping.is_set():
            return
        try:
            loop.call_soon_threadsafe(say, sink)
        except RuntimeError:
            # The loop has ended, and this thread ends with it.
            self._stopping.set()

    # ---- what a pod says ------------------------------------------------------------------------

    def _pod(self, item: Mapping[str, Any]) -> Pod:
        query, metadata, status = self._query, item["metadata"], item.get("status") or {}
        name, annotations = str(metadata["name"]), metadata.get("annotations") or {}
        conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
        draining = ""
        if metadata.get("deletionTimestamp"):
            draining = f"pod {name} is being deleted"
        elif annotations.get(query.drain_annotation, "").lower() not in ("", "false"):
            draining = f"pod {name} is annotated {query.drain_annotation}"
        return Pod(
            uid=str(metadata["uid"]),
            name=name,
            role=(metadata.get("labels") or {}).get(query.role_label, ""),
            address=self._address(item, str(status.get("podIP") or "")),
            running=status.get("phase") == "Running",
            ready=conditions.get("Ready") == "True",
            draining=draining,
        )

    def _address(self, item: Mapping[str, Any], ip: str) -> str:
        metadata = item["metadata"]
        annotated = (metadata.get("annotations") or {}).get(self._query.port_annotation, "")
        port = annotated or _container_port(item)
        if not port.isdecimal() or not 0 < int(port) < 65536:
            if metadata["uid"] not in self._odd:
                self._odd.add(metadata["uid"])
                logger.warning(
                    "pod %s is no usable worker: its annotation %s is %r, and no container port "
                    "is called %s",
                    metadata["name"], self._query.port_annotation, annotated, PORT_NAME,
                )  # fmt: skip
            return ""
        if not ip:
            return ""
        return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _container_port(item: Mapping[str, Any]) -> str:
    for container in (item.get("spec") or {}).get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == PORT_NAME:
                return str(port["containerPort"])
    return ""


def _connection(kubeconfig: str) -> tuple[client.Configuration, str]:
    """How to reach the API, and the namespace that is one's own."""
    settings = client.Configuration()
    try:
        if not kubeconfig:
            try:
                config.load_incluster_config(client_configuration=settings)
                return _bounded(settings), NAMESPACE_FILE.read_text().strip()
            except config.ConfigException:
                pass  # not in a pod
        config.load_kube_config(config_file=kubeconfig or None, client_configuration=settings)
        _, active = config.list_kube_config_contexts(config_file=kubeconfig or None)
    except (config.ConfigException, OSError, ValueError) as error:
        raise RegistryUnavailableError(f"registry kubernetes: {error}") from error
    return _bounded(settings), str(active["context"].get("namespace") or "default")


def _bounded(settings: client.Configuration) -> client.Configuration:
    # Pauses between attempts are ours, and every failure is told.
    settings.retries = False
    return settings


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, ApiException) and error.status == HTTPStatus.GONE


def _describe(error: BaseException) -> str:
    if isinstance(error, ApiException):
        return f"the cluster's API refuses: {error.status} {error.reason}{_words(error)}"
    return f"the cluster's API cannot be reached: {' '.join(str(error).split())}"


def _words(error: ApiException) -> str:
    """What the API server says beside the status: which right is missing, and whose."""
    try:
        return f": {json.loads(error.body or '')['message']}"
    except (TypeError, ValueError, KeyError):
        return ""
