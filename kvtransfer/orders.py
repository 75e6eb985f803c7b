"""What the engine asks of its front in the gRPC transport; apart, so that fronts load no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOrder:
    """Engine to front: send these outbox slots to the peer's landing slots, then the message.

    The front answers each order exactly once with `on_write_done`; until then it may read the
    outbox slots.
    """

    write_id: int
    peer: str
    copies: tuple[tuple[int, int], ...]
    """(outbox slot, landing slot at the peer)."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Bytes `first .. end - 1` of each slot, which go to the same place of the other; none: all."""
    message: bytes
    """Delivered after the bytes; empty on all but a write's last order."""
