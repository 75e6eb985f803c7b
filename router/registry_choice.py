"""Makes the registry that the settings ask for, and loads its package only then.

`redis` and `kubernetes` are extras: a router of one machine needs neither.
"""

from router.config import RouterConfig
from router.registry import InMemoryRegistry, RegistryUnavailableError, WorkerRegistry


def make_registry(config: RouterConfig) -> WorkerRegistry:
    """Connects to nothing yet. Raises RegistryUnavailableError."""
    if config.registry == "redis":
        return _redis(config)
    if config.registry == "kubernetes":
        return _kubernetes(config)
    return InMemoryRegistry()


def _redis(config: RouterConfig) -> WorkerRegistry:
    try:
        from router.registry_redis import RedisRegistry, RedisSettings
    except ImportError as error:
        raise _missing("redis") from error
    return RedisRegistry(
        RedisSettings(
            url=config.redis_url,
            prefix=config.redis_prefix,
            ttl_s=config.redis_ttl_s,
            sync_interval_s=config.redis_sync_s,
            heard_for_s=config.heartbeat_timeout_s,
        )
    )


def _kubernetes(config: RouterConfig) -> WorkerRegistry:
    try:
        from router.discovery_kubernetes import KubernetesPods, PodQuery
    except ImportError as error:
        raise _missing("kubernetes") from error
    from router.registry_pods import PodRegistry

    source = KubernetesPods(
        PodQuery(
            namespace=config.kubernetes_namespace,
            selector=config.kubernetes_selector,
            role_label=config.kubernetes_role_label,
            port_annotation=config.kubernetes_port_annotation,
            drain_annotation=config.kubernetes_drain_annotation,
            reconcile_s=config.kubernetes_reconcile_s,
        ),
        kubeconfig=config.kubernetes_kubeconfig,
    )
    return PodRegistry(
        source,
        look_interval_s=config.heartbeat_interval_s,
        describe_timeout_s=config.silence_timeout_s,
        tls=config,
    )


def _missing(package: str) -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"registry {package} needs the Python package {package}: "
        f"pip install 'baton-serve[{package}]'"
    )
