"""Which way a worker's KV travels."""

from enum import Enum, auto


class KvTraffic(Enum):
    """Decides what memory and transports an engine takes."""

    SENDS = auto()
    """Pages leave the pool for other workers' windows (prefill)."""
    RECEIVES = auto()
    """Pages land in a window of its own (decode)."""
    NONE = auto()
    """Both phases are computed here, so nothing moves and no transport is opened (unified)."""
