"""A request whose KV is on the way: which pages it will have here, and which of them have come.

What lands is copied out of its slots and checked by the device, while the host prepares for the
request's first step. Nobody believes a page before its check was taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.scheduler.req import Req
from kvtransfer.geometry import WriterPages
from kvtransfer.landing import FoundSeals, Seals, first_unsealed
from kvtransfer.ticket import LandedPage


class Check(NamedTuple):
    """Pages that are being copied out of their slots, and what they turn out to be."""

    pages: Sequence[LandedPage]
    found: FoundSeals


@dataclass(slots=True)
class Landing:
    """A request whose ticket is out: its KV is on the way."""

    req: Req
    prefix: list[int]
    """Pages of the prefix that is here already, locked in the tree."""
    writer: WriterPages
    """What landed pages are, and what positions count: prefill may cut KV otherwise."""
    chain: list[bytes]
    """Expected chain hash of each of the writer's pages, the prefix's included."""
    travelling: int
    """Pages of the writer that are to land."""
    pages: list[int] = field(default_factory=list)
    """All pages of the request here; bound when they are said to be coming, or when the first one
    lands; a promise until then."""
    transport: str = ""
    accepted: set[int] = field(default_factory=set)
    """Positions of pages that were copied and verified."""
    checks: list[Check] = field(default_factory=list)
    """Of pages whose copies are on their way."""
    first_token: int | None = None
    """Known when the writer has finished."""
    verify_s: float = 0.0
    """Copy and check of the pages that landed last, as far as the handover waited for them: not
    while the rest of its join was made."""
    verified: float = 0.0
    completed: float = 0.0
    queued: float = 0.0
    """time.monotonic() seconds."""

    @property
    def own_pages(self) -> list[int]:
        return self.pages[len(self.prefix) :]

    @property
    def whole(self) -> bool:
        """Whether all pages have landed; some may still be being checked."""
        checking = sum(len(check.pages) for check in self.checks)
        return len(self.accepted) + checking >= self.travelling

    def take_checks(self, *, verify: bool) -> tuple[list[int], str]:
        """Waits for the copies under way. Positions of their pages, which are accepted then, and
        what is wrong with one of them; empty where nothing is, or nobody asks to `verify`."""
        checks, self.checks = self.checks, []
        found = [(check.pages, check.found.found()) for check in checks]
        for pages, seals in found if verify else ():
            if problem := self._what_is_wrong(pages, seals):
                return [], problem
        positions = [page.position for pages, _ in found for page in pages]
        self.accepted.update(positions)
        return positions, ""

    def _what_is_wrong(self, pages: Sequence[LandedPage], seals: Seals) -> str:
        for page in pages:
            if page.chain_hash != self.chain[page.position]:
                return f"page {page.position} is of other tokens"
        spoilt = first_unsealed(pages, seals)
        return "" if spoilt is None else f"page {spoilt.position} is not what was sealed"
