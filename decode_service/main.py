"""`baton decode`."""

from decode_service.front import DecodeFront
from worker.config import WorkerConfig
from worker.front import run_front


def run(config: WorkerConfig) -> int:
    """Runs a decode worker until it is drained; returns the process's exit status."""
    return run_front(config, DecodeFront())
