"""`baton prefill`."""

from prefill_service.front import PrefillFront
from worker.config import WorkerConfig
from worker.front import run_front


def run(config: WorkerConfig) -> int:
    """Runs a prefill worker until it is drained; returns the process's exit status."""
    return run_front(config, PrefillFront())
