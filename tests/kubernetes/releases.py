"""A release of the chart in the cluster: Helm's own commands, and what its routers say."""

import contextlib
import json
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton import Client
from baton.connection import ConnectionConfig
from tests.helm.helms import CHART, HelmError, Values
from tests.kubernetes.api import ApiError, Object, wait_for
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod import PodRun

START_LIMIT_S = 240.0
"""From `helm install` to a router that serves, on two busy cores."""
PROMPT = "def add(a, b):\n"
CERTIFIED = "baton-part"
"""The name in certificates of routers and workers, as the chart's default is."""
REVISION = "baton.dev/revision"
ROLES = ("router", "prefill", "decode")
SMALL: Values = {
    "router": {"replicas": 1, "preStopSleepSeconds": 1},
    "prefill": {"replicas": 1, "minReadySeconds": 1},
    "decode": {"replicas": 1, "minReadySeconds": 1},
}
"""What every release of the tests says, so that it starts and ends fast on two cores."""


@dataclass(frozen=True)
class Access:
    """How to be let in at the routers' doors; anybody is, unless told otherwise."""

    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    verify: ssl.SSLContext | None = None
    """Whom to trust over HTTPS; None: it is plain HTTP."""
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, address: str, path: str) -> httpx.Response:
        scheme, verify = ("https", self.verify) if self.verify is not None else ("http", True)
        with httpx.Client(verify=verify, timeout=10.0, trust_env=False) as client:
            return client.get(
                f"{scheme}://{address}:8000{path}",
                headers=self.headers,
                extensions={"sni_hostname": CERTIFIED},
            )


@dataclass(frozen=True)
class Release:
    """One release, in a namespace of its own."""

    cluster: Cluster
    name: str
    namespace: str
    access: Access = field(default_factory=Access)

    # ---- Helm -----------------------------------------------------------------------------------

    def helm(self, command: str, *arguments: str, values: Values | None = None) -> str:
        """Raises HelmError with its words."""
        options = ["--kubeconfig", str(self.cluster.plane.kubeconfig), "--namespace",
                   self.namespace]  # fmt: skip
        if values is not None:
            options += ["--values", "-"]
        done = subprocess.run(
            [str(self.cluster.helm), command, self.name, *arguments, *options],
            input=json.dumps(values or {}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode != 0:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout

    def install(self, values: Values) -> None:
        self.helm("install", str(CHART), "--create-namespace", values=values)

    def upgrade(self, values: Values) -> None:
        self.helm("upgrade", str(CHART), values=values)

    # ---- the cluster ----------------------------------------------------------------------------

    def path(self, kind: str, name: str = "", api: str = "/api/v1") -> str:
        return f"{api}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def scale(self, role: str, replicas: int) -> None:
        path = self.path("deployments", f"{self.name}-{role}", "/apis/apps/v1")
        self.cluster.api.patch(path, {"spec": {"replicas": replicas}})

    def annotate(self, pod: PodRun, name: str, value: str | None) -> None:
        body = {"metadata": {"annotations": {name: value}}}
        self.cluster.api.patch(self.path("pods", pod.name), body)

    def delete(self, pod: PodRun) -> None:
        self.cluster.api.call("DELETE", self.path("pods", pod.name))

    def pods(self, role: str) -> list[PodRun]:
        return self.cluster.kubelet.of(role)

    # ---- its routers ----------------------------------------------------------------------------

    @property
    def router(self) -> PodRun:
        """One that is Ready."""
        return next(run for run in self.pods("router") if run.ready)

    def workers(self, router: PodRun | None = None) -> list[dict[str, Any]]:
        address = (router or self.router).address
        answer = self.access.get(address, "/workers")
        answer.raise_for_status()
        listed: list[dict[str, Any]] = answer.json()
        return listed

    def states(self, router: PodRun | None = None) -> dict[str, str]:
        """Address -> state of each worker that a router lists."""
        return {w["address"]: w["state"] for w in self.workers(router)}

    def health(self, router: PodRun | None = None) -> dict[str, Any]:
        address = (router or self.router).address
        answer = self.access.get(address, "/health")
        said: dict[str, Any] = {**answer.json(), "code": answer.status_code}
        return said

    def client(self) -> Client:
        return Client(f"{self.router.address}:50051", config=self.access.connection)

    def answer(self, tokens: int = 24) -> str:
        with self.client() as client:
            done = client.complete(PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
        return done.text

    def wait_until_serving(self, *, workers: int) -> None:
        """Every router that should be there is Ready and has that many ready workers."""

        def serving() -> bool:
            if self.cluster.kubelet.problems:
                raise RuntimeError(self.cluster.kubelet.logs())
            routers = self.pods("router")
            return bool(routers) and all(
                run.ready and list(self.states(run).values()).count("ready") == workers
                for run in routers
            )

        try:
            wait_for(serving, f"{workers} workers ready at every router", limit_s=START_LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.kubelet.logs()}") from error

    def wait_until_balanced(self) -> None:
        def balanced() -> bool:
            pages = [w["pages"] for w in self.workers() if w["state"] == "ready"]
            for p in pages:
                assert p["free"] + p["cached"] + p["held"] + p["in_use"] == p["total"], p
            return bool(pages) and all(p["held"] == p["in_use"] == 0 for p in pages)

        wait_for(balanced, "no page is owned while idle", limit_s=20.0)

    def objects(self) -> list[str]:
        """Everything that carries the release's name, by kind and name."""
        found: list[str] = []
        for api in (*GROUPS, "/api/v1"):
            for resource in self.cluster.api.get(api)["resources"]:
                if resource["namespaced"] and "list" in resource["verbs"]:
                    found += [
                        f"{resource['kind']}/{item['metadata']['name']}"
                        for item in self._of(api, resource)
                    ]
        return found

    def _of(self, api: str, resource: Object) -> list[Object]:
        selector = f"app.kubernetes.io/instance={self.name}"
        try:
            return self.cluster.api.items(
                self.path(resource["name"], api=api), labelSelector=selector
            )
        except ApiError as error:
            if error.status == httpx.codes.METHOD_NOT_ALLOWED:
                return []
            raise


GROUPS = (
    "/apis/apps/v1", "/apis/policy/v1beta1", "/apis/rbac.authorization.k8s.io/v1",
    "/apis/networking.k8s.io/v1", "/apis/autoscaling/v1", "/apis/batch/v1",
)  # fmt: skip


@contextlib.contextmanager
def installed(
    cluster: Cluster, name: str, values: Values, *, workers: int, access: Access | None = None
) -> Iterator[Release]:
    """A release that serves, in the namespace of its name; uninstalled at the end.

    Args:
        workers: how many its values ask for.
        access: where its doors are not open to anybody.
    """
    release = Release(cluster, name, name, access or Access())
    release.install(merged(SMALL, values))
    try:
        release.wait_until_serving(workers=workers)
        yield release
    finally:
        with contextlib.suppress(HelmError):  # the test may have done it
            release.helm("uninstall")
        wait_for(lambda: not any(map(release.pods, ROLES)), "its pods are told to go")
        wait_for(lambda: not cluster.kubelet.of_namespace(name), "its pods are gone", limit_s=120.0)


def merged(below: Values, above: Values) -> Values:
    return {
        key: merged(below.get(key, {}), above[key])
        if isinstance(above.get(key), dict)
        else above.get(key, below.get(key))
        for key in below.keys() | above.keys()
    }
