"""Values that the chart is rendered with: every example, and each option turned on."""

from typing import Any

import yaml

from tests.helm.helms import CHART, Values

ADD_ONS = {"Certificate", "PodMonitor", "PrometheusRule", "ScaledObject", "ServiceMonitor"}
"""Kinds that other projects bring: no schema of Kubernetes and no plain API server knows them."""

TLS = {"enabled": True, "secretName": "certificate"}
WORKERS_TLS = {**TLS, "workers": {"enabled": True, "secretName": "workers"}}
KEDA = {"kind": "keda", "prometheusAddress": "http://prometheus:9090"}
CPU_METRIC = {
    "type": "Resource",
    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
}
PLACEMENT: dict[str, Any] = {
    "nodeSelector": {"kind": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "DoNotSchedule",
        }
    ],
    "priorityClassName": "high",
    "podAnnotations": {"some/note": "yes"},
    "extraEnv": [{"name": "SOME", "value": "thing"}],
}
EVERY_GPU = {"gpus": 2, "runtimeClassName": "nvidia", "rdma": {"enabled": True}, **PLACEMENT}

OPTIONS: dict[str, Values] = {
    "nothing": {},
    "names": {"nameOverride": "other", "commonLabels": {"team": "serving"}, "revision": "r7"},
    "full name": {"fullnameOverride": "a-name-of-our-own"},
    "images": {
        "image": {
            "registry": "registry.example:5000",
            "pullSecrets": ["pull"],
            "router": {"digest": f"sha256:{'0' * 64}"},
            "cpu": {"tag": "1.2.3"},
        }
    },
    "model on a claim": {"model": {"source": "pvc", "pvc": {"claimName": "m", "subPath": "a/b"}}},
    "model of the hub": {"model": {"source": "hub", "hub": {"id": "some/model"}}},
    "private model of the hub": {
        "model": {"source": "hub", "hub": {"id": "some/model", "secretName": "token"}}
    },
    "model as an image": {
        "model": {"source": "imageVolume", "imageVolume": {"reference": "r/m:1", "path": "/a"}}
    },
    "router settings": {"router": {"settings": {"max_queued_requests": 16, "max_replays": 1}}},
    "router placement": {"router": PLACEMENT},
    "router service": {
        "router": {"service": {"type": "LoadBalancer", "httpPort": 80, "annotations": {"a": "b"}}}
    },
    "router scaling": {"router": {"autoscaling": {"enabled": True}}},
    "one router": {"router": {"replicas": 1, "registry": "memory"}},
    "redis": {"router": {"registry": "redis"}, "redis": {"enabled": True}},
    "redis elsewhere": {"router": {"registry": "redis"}, "redis": {"externalUrl": "redis://r:6379"}},
    "redis in a secret": {"router": {"registry": "redis"}, "redis": {"urlSecretName": "redis"}},
    "gpus": {"prefill": EVERY_GPU, "decode": EVERY_GPU},
    "worker settings": {
        "prefill": {"settings": {"page_size": 32, "dtype": "bfloat16"}},
        "decode": {"settings": {"page_size": 32, "max_total_tokens": 4194304}},
    },
    "kernel cache": {"prefill": {"cache": {"claimName": "kernels"}}},
    "no budget": {"prefill": {"pdb": {"enabled": False}}, "router": {"pdb": {"enabled": False}}},
    "keda": {"prefill": {"autoscaling": KEDA}, "decode": {"autoscaling": KEDA}},
    "hpa": {
        "prefill": {"autoscaling": {"kind": "hpa", "metrics": [CPU_METRIC]}},
        "decode": {"autoscaling": {"kind": "hpa", "metrics": [CPU_METRIC]}},
    },
    "unified": {"prefill": {"enabled": False}, "decode": {"enabled": False},
                "unified": {"enabled": True, "autoscaling": KEDA}},
    "all roles": {"unified": {"enabled": True}},
    "together": {
        "prefill": {"enabled": False, "gpus": 1}, "decode": {"enabled": False, "gpus": 1},
        "together": {"enabled": True}, "router": {"registry": "redis"}, "redis": {"enabled": True},
    },
    "tls": {"tls": TLS},
    "mutual tls": {
        "tls": {**TLS, "clientCaSecretName": "clients"}, "test": {"clientSecretName": "me"}
    },
    "cert-manager": {
        "tls": {"enabled": True, "certManager": {
            "enabled": True, "issuerRef": {"name": "ours"}, "dnsNames": ["llm.example"]}}
    },
    "tls of workers": {
        "tls": WORKERS_TLS,
        "metrics": {"podMonitor": {"enabled": True, "tlsConfig": {
            "serverName": "baton-part", "ca": {"secret": {"name": "workers", "key": "ca.crt"}}}}},
    },
    "tls of workers, cert-manager": {
        "tls": {"enabled": True, "workers": {"enabled": True, "serverName": "other"},
                "certManager": {"enabled": True, "issuerRef": {"name": "ours"}}},
        "networkPolicy": {"enabled": True},
    },
    "api keys": {"apiKeys": {"secretName": "keys"}, "test": {"apiKeySecretName": "mine"}},
    "everything closed": {
        "tls": {**WORKERS_TLS, "clientCaSecretName": "clients"},
        "apiKeys": {"secretName": "keys", "secretKey": "file"},
        "test": {"clientSecretName": "me", "apiKeySecretName": "mine", "apiKeySecretKey": "k"},
        "networkPolicy": {"enabled": True},
    },
    "no accounts": {"serviceAccount": {"create": False}, "rbac": {"create": False}},
    "network policy": {"networkPolicy": {"enabled": True}},
    "network policy, redis, hub": {
        "networkPolicy": {"enabled": True, "clients": [{"namespaceSelector": {}}]},
        "router": {"registry": "redis"}, "redis": {"externalUrl": "redis://r:6379"},
        "model": {"source": "hub", "hub": {"id": "some/model"}},
    },
    "monitoring": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": True},
        }
    },
    "tls, scraped": {"tls": TLS, "metrics": {"serviceMonitor": {"enabled": True}}},
    "network policy, scraped": {
        "networkPolicy": {"enabled": True, "monitoring": [{"namespaceSelector": {}}]},
    },
}  # fmt: skip

EXAMPLES: dict[str, Values] = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "examples").glob("*"))
}

CASES: dict[str, Values] = OPTIONS | {f"example {name}": v for name, v in EXAMPLES.items()}

NEEDS: dict[str, str] = {"model as an image": "1.31", "example rdma": "1.31"}
"""Cases that the chart refuses on clusters before a version, which it then names."""

REFUSED: dict[str, tuple[Values, str]] = {
    "a typo": ({"prefil": {}}, "prefil"),
    "a typo below": ({"router": {"replica": 3}}, "replica"),
    "a typo in a setting": ({"router": {"settings": {"max_queud_requests": 1}}}, "max_queud"),
    "a worker's setting of the wrong type": (
        {"decode": {"settings": {"page_size": "big"}}}, "page_size"),
    "a setting that the chart decides": ({"decode": {"settings": {"port": 1}}}, "port"),
    "a transport that is none": ({"decode": {"settings": {"transport": "pigeon"}}}, "transport"),
    "memory for two routers": ({"router": {"registry": "memory"}}, "for one router"),
    "redis without redis": ({"router": {"registry": "redis"}}, "redis.enabled"),
    "prefill alone": ({"decode": {"enabled": False}}, "need each other"),
    "no workers": ({"prefill": {"enabled": False}, "decode": {"enabled": False}}, "no workers"),
    "two workers a pod as pods": (
        {"prefill": {"enabled": False}, "decode": {"enabled": False},
         "together": {"enabled": True}}, "two workers into one pod"),
    "a claim without a name": ({"model": {"source": "pvc"}}, "claimName"),
    "tls without a certificate": ({"tls": {"enabled": True}}, "tls.secretName"),
    "workers' tls without clients'": (
        {"tls": {"workers": {"enabled": True, "secretName": "w"}}}, "needs tls.enabled"),
    "workers' tls without a certificate": (
        {"tls": {**TLS, "workers": {"enabled": True}}}, "tls.workers.secretName"),
    "api keys without one for the test": (
        {"apiKeys": {"secretName": "keys"}}, "test.apiKeySecretName"),
    "keda without prometheus": (
        {"prefill": {"autoscaling": {"kind": "keda"}}}, "prometheusAddress"),
}  # fmt: skip
"""Values and a word of what Helm says to them."""
