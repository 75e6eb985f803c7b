"""A scripted Kubernetes API server: pods in one namespace, lists and real watches over HTTP.

It keeps a history of events, as the real one does, and can be made to hang up, to forget its
history, to lose an event, to refuse and to be away.
"""

import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

SELECTOR = "app.kubernetes.io/part-of=baton"
ROLE_LABEL = "app.kubernetes.io/component"
PORT_ANNOTATION = "baton.dev/grpc-port"
DRAIN_ANNOTATION = "baton.dev/drain"


def pod(name: str, role: str, port: int | str, **changes: Any) -> dict[str, Any]:
    """A Running and Ready pod. Changes: phase, ready, ip, annotations, deleted, ports, uid."""
    annotations = {PORT_ANNOTATION: str(port)} if port else {}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": "ns",
        "uid": changes.get("uid", f"uid-{name}"),
        "labels": {"app.kubernetes.io/part-of": "baton", ROLE_LABEL: role},
        "annotations": annotations | changes.get("annotations", {}),
    }
    if changes.get("deleted"):
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ready = "True" if changes.get("ready", True) else "False"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [{"name": "worker", "ports": changes.get("ports", [])}]},
        "status": {
            "phase": changes.get("phase", "Running"),
            "podIP": changes.get("ip", "127.0.0.1"),
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


@dataclass
class Call:
    """One request that came in."""

    watch: bool
    version: str
    selector: str


@dataclass
class KubeApi:
    """The server; every method may be called from any thread."""

    calls: list[Call] = field(default_factory=list)
    refuse: int = 0
    """HTTP status with which every request is answered; 0: none."""
    gone_in_stream: bool = True
    """How an expired watch is told: as an event of the stream, or as the HTTP status."""

    def __post_init__(self) -> None:
        self._pods: dict[str, dict[str, Any]] = {}
        self._version = 10
        self._oldest = 0
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._generation = 0
        self._bound: ThreadingHTTPServer | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    # ---- the script -----------------------------------------------------------------------------

    def put(self, item: dict[str, Any], *, silently: bool = False) -> None:
        """Adds or changes a pod; `silently`: no watch hears of it."""
        with self._changed:
            kind = "MODIFIED" if item["metadata"]["uid"] in self._pods else "ADDED"
            self._version += 1
            item["metadata"]["resourceVersion"] = str(self._version)
            self._pods[item["metadata"]["uid"]] = item
            if not silently:
                self._emit(kind, item)

    def delete(self, uid: str, *, silently: bool = False) -> None:
        with self._changed:
            item = self._pods.pop(uid)
            self._version += 1
            item["metadata"]["resourceVersion"] = str(self._version)
            if not silently:
                self._emit("DELETED", item)

    def bookmark(self) -> None:
        """Tells watches how far they are."""
        with self._changed:
            self._version += 1
            metadata = {"resourceVersion": str(self._version)}
            self._emit("BOOKMARK", {"kind": "Pod", "apiVersion": "v1", "metadata": metadata})

    def hang_up(self) -> None:
        """Ends every watch in the middle of its stream."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def forget(self) -> None:
        """Nothing up to now can be watched any more."""
        with self._changed:
            self._version += 1
            self._oldest = self._version
            self._events.clear()
            self._generation += 1
            self._changed.notify_all()

    @property
    def version(self) -> str:
        return str(self._version)

    def watches(self) -> list[Call]:
        return [call for call in self.calls if call.watch]

    def lists(self) -> list[Call]:
        return [call for call in self.calls if not call.watch]

    def _emit(self, kind: str, item: dict[str, Any]) -> None:
        event = json.loads(json.dumps({"type": kind, "object": item}))
        self._events.append((self._version, event))
        self._changed.notify_all()

    # ---- the server -----------------------------------------------------------------------------

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                api._answer(self)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...

        self._bound = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._bound.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Away; pods are remembered."""
        if self._bound is not None:
            bound, self._bound = self._bound, None
            bound.shutdown()
            bound.server_close()
            self.hang_up()

    def kubeconfig(self, directory: Path) -> Path:
        """A file that leads here."""
        file = directory / "kubeconfig.json"
        named = {"name": "it"}
        server = {"server": f"http://127.0.0.1:{self.port}"}
        context = {"cluster": "it", "user": "it", "namespace": "ns"}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [named | {"cluster": server}],
            "users": [named | {"user": {"token": "t0ken"}}],
            "contexts": [named | {"context": context}],
        }
        file.write_text(json.dumps(content))
        return file

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        watch = query.get("watch", "").lower() in ("true", "1")
        version = query.get("resourceVersion", "")
        self.calls.append(Call(watch, version, query.get("labelSelector", "")))
        if self._bound is None:
            request.close_connection = True
            request.connection.close()
        elif request.headers.get("Authorization") != "Bearer t0ken":
            _send(request, 401, _status(401, "Unauthorized"))
        elif url.path != "/api/v1/namespaces/ns/pods":
            _send(request, 404, _status(404, "NotFound"))
        elif self.refuse:
            _send(request, self.refuse, _status(self.refuse, "Forbidden"))
        elif not watch:
            with self._changed:
                _send(request, 200, self._listing())
        elif int(version) < self._oldest and not self.gone_in_stream:
            _send(request, 410, _status(410, "Expired"))
        else:
            self._stream(request, int(version), float(query["timeoutSeconds"]))

    def _listing(self) -> dict[str, Any]:
        return {
            "kind": "PodList",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": str(self._version)},
            "items": list(self._pods.values()),
        }

    def _stream(self, request: BaseHTTPRequestHandler, version: int, seconds: float) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        if version < self._oldest:
            _chunk(request, {"type": "ERROR", "object": _status(410, "Expired")})
            _chunk(request, None)
            return
        generation, until = self._generation, time.monotonic() + seconds
        while True:
            with self._changed:
                news = [event for at, event in self._events if at > version]
                if not news and generation == self._generation and time.monotonic() < until:
                    self._changed.wait(0.1)
                    continue
            if generation != self._generation:
                request.close_connection = True
                return  # in mid-stream: no last chunk
            for event in news:
                _chunk(request, event)
                version = int(event["object"]["metadata"]["resourceVersion"])
            if time.monotonic() >= until:
                _chunk(request, None)
                return


def _chunk(request: BaseHTTPRequestHandler, event: dict[str, Any] | None) -> None:
    data = b"" if event is None else json.dumps(event).encode() + b"\n"
    request.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    request.wfile.flush()


def _send(request: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": f"{reason} by the script",
    }
