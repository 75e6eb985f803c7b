"""The landing windows of a decode worker: one that tickets are granted in, and what it replaced.

A silent writer keeps its slots (kvtransfer/quarantine.py), and enough silent writers would keep a
whole window. Then another takes its place: new memory under a new registration, since what a writer
holds of the old one can be taken back neither by a cancel nor by deregistering. Transfers that are
under way end in the window where they began, so that nobody notices; a window whose last slot came
back is ready to take the next one's place.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvtransfer import messages
from kvtransfer.errors import NoSlotsError, TransferError
from kvtransfer.links import PeerLinks
from kvtransfer.transport import Transport
from kvtransfer.window import LandingWindow, SlotCounts

logger = logging.getLogger(__name__)

MakeMemory = Callable[[int], torch.Tensor | None]
"""The memory of the n-th window (from 1), like the first one's; None where there is no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinePolicy:
    """How much of its memory a decode worker lets silent writers keep."""

    refuse_after_s: float = 2.0
    """A writer that has not answered a withdrawal for so long gets no further ticket until it has.
    Seconds; a writer that is well answers within milliseconds, or when the write ends that it is
    about."""

    replace_share: float = 0.5
    """A window of which silent writers keep more than this share is replaced."""

    max_windows: int = 3
    """Windows that may exist, the first one included: each takes as much memory. Where all of them
    are kept by silent writers, requests wait for slots or are refused."""


@dataclass(slots=True)
class _Window:
    books: LandingWindow
    offers: dict[str, bytes]
    """Transport -> what its peers need in order to write here; empty: they need nothing."""


class LandingWindows:
    """Changed on the transfer thread alone; `grant` and readings come from other threads, too."""

    def __init__(
        self,
        first: LandingWindow,
        *,
        links: PeerLinks,
        transports: Mapping[str, Transport],
        policy: QuarantinePolicy,
        make_memory: MakeMemory | None = None,
    ) -> None:
        """`make_memory` None: the first window is never replaced."""
        self._links = links
        self._transports = transports
        self._policy = policy
        self._make_memory = make_memory
        self._lock = threading.Lock()
        self._windows = [_Window(first, {})]
        self._current = self._windows[0]
        self._ready: set[tuple[str, int]] = set()
        """(peer, first slot) of windows that peers have said they can write."""
        self._warned = False
        self.replacements = 0

    @property
    def current(self) -> LandingWindow:
        """Where tickets are granted."""
        return self._current.books

    def for_writer(self, peer: str) -> LandingWindow:
        """The window that a new ticket of this writer is for. Raises NoSlotsError while the writer
        has not connected to it."""
        with self._lock:
            window = self._current
            if self._reaches(peer, window):
                return window.books
        raise NoSlotsError(
            f"instance {peer} has not yet connected to the landing window that replaced another",
            retry_after_s=0.1,
        )

    def _reaches(self, peer: str, window: _Window) -> bool:
        transport = self._links.get(peer)
        known = window.books.first_slot == 0 or (peer, window.books.first_slot) in self._ready
        return known or (transport is not None and not window.offers.get(transport.name))

    def counts(self) -> SlotCounts:
        """Over all windows; of those that were replaced only what is still owned."""
        with self._lock:
            current, windows = self._current, list(self._windows)
        counts = current.books.counts()
        for other in windows:
            if other is not current:
                old = other.books.counts()
                counts = SlotCounts(
                    free=counts.free,
                    granted=counts.granted + old.granted,
                    quarantined=counts.quarantined + old.quarantined,
                    total=counts.total + old.granted + old.quarantined,
                )
        return counts

    # ---- the transfer thread ----------------------------------------------------------------

    def check(self, silent: Mapping[LandingWindow, int]) -> None:
        """Replaces the current window if too much of it is kept, and repeats what peers have not
        answered. `silent`: slots that silent writers keep, by window."""
        books = self._current.books
        if silent.get(books, 0) > self._policy.replace_share * books.slots:
            self._replace()
        for peer in self._links.peers():
            self.announce(peer)

    def announce(self, peer: str) -> None:
        """Tells a peer of the current window, unless it can write there."""
        window = self._current
        transport = self._links.get(peer)
        if transport is not None and not self._reaches(peer, window):
            offer = window.offers[transport.name]
            self._links.send(peer, messages.window_opened(window.books.first_slot, offer))

    def on_ready(self, peer: str, first_slot: int) -> None:
        """The peer can write the window that begins there."""
        with self._lock:
            if any(window.books.first_slot == first_slot for window in self._windows):
                self._ready.add((peer, first_slot))

    def forget(self, peer: str) -> None:
        """The peer's connection has ended, and what it knew with it."""
        with self._lock:
            self._ready = {(other, slot) for other, slot in self._ready if other != peer}

    def _replace(self) -> None:
        following = self._clean() or self._open()
        if following is None:
            if not self._warned:
                logger.error(
                    "%d of %d landing slots are kept by silent writers, and there is no memory "
                    "for another window: restart those prefill workers, or this worker",
                    self.counts().quarantined,
                    self.current.slots,
                )
            self._warned = True
            return
        logger.warning(
            "silent writers keep more than %d %% of the landing window: another takes its place",
            self._policy.replace_share * 100,
        )
        with self._lock:
            self._current = following
            self._warned = False
        self.replacements += 1

    def _clean(self) -> _Window | None:
        """A window that was replaced, and whose slots have all come back."""
        for window in self._windows:
            counts = window.books.counts()
            if window is not self._current and counts.free == counts.total:
                return window
        return None

    def _open(self) -> _Window | None:
        """New memory, registered anew with every transport."""
        number = len(self._windows)
        if number >= self._policy.max_windows or self._make_memory is None:
            return None
        last = self._windows[-1].books
        first_slot = last.first_slot + last.slots
        try:
            memory = self._make_memory(number)
            if memory is None:
                return None
            offers = {
                name: transport.open_landing(first_slot, memory)
                for name, transport in self._transports.items()
            }
        except (RuntimeError, TransferError) as error:  # torch's out-of-memory is the former
            logger.error("no further landing window: %s", error)
            # Not tried again: what was taken for it cannot be given back while it may be mapped.
            self._make_memory = None
            return None
        window = _Window(LandingWindow(memory, first_slot=first_slot), offers)
        with self._lock:
            self._windows.append(window)
        return window
