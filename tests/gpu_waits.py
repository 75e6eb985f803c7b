"""That nothing waits for the device: torch refuses whatever would."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation of torch that waits for the device raises.

    Torch warns, once a process and after the mode is set, that the mode is a prototype. Where
    warnings are errors that would leave the mode behind, and each later test would fail for it.
    """
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
