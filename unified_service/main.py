"""`baton unified`."""

from unified_service.front import UnifiedFront
from worker.config import WorkerConfig
from worker.front import run_front


def run(config: WorkerConfig) -> int:
    """Runs a unified worker until it is drained; returns the process's exit status."""
    return run_front(config, UnifiedFront())
