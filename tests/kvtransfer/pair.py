"""Two workers' transfer halves, joined by a fake network, with a small role on each side.

Everything runs in one thread, by turns, on a clock that the test moves.
"""

import random
from collections.abc import Callable

import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.digest import copy_and_digest, digest_pages, seals_of
from kvtransfer.events import (
    KvEvent,
    PagesLanded,
    SourceReleased,
    TransferCompleted,
    TransferFailedEvent,
)
from kvtransfer.fake_transport import FakeNetwork, FakeTransport, Fault
from kvtransfer.layout import PageLayout
from kvtransfer.pool_sealer import Sealer
from kvtransfer.quarantine import Quarantine
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.window import LandingWindow

LAYOUT = PageLayout(layers=2, page_size=4, kv_heads=2, head_dim=4, itemsize=2)
PREFILL, DECODE = "prefill-1", "decode-1"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """`step()` is one round of both sides; the roles verify, accept and keep books."""

    def __init__(
        self,
        *,
        slots: int = 4,
        pages: int = 32,
        faults: tuple[Fault, ...] = (),
        seed: int = 0,
        lease_s: float = 6.0,
        verify: bool = True,
        more_windows: bool = True,
        quarantine: type[Quarantine] = Quarantine,
        make_sealer: Callable[[torch.Tensor], Sealer] | None = None,
        writes_behind: bool = True,
    ) -> None:
        self.clock = Clock()
        generator = torch.Generator().manual_seed(seed)
        size = (pages, LAYOUT.page_bytes)
        self.source = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        self.target = torch.zeros(size, dtype=torch.uint8)
        self.window = LandingWindow(torch.zeros((slots, LAYOUT.page_bytes), dtype=torch.uint8))
        self.network = FakeNetwork(seed=seed, faults=faults)
        self.random = random.Random(seed)
        prefill = FakeTransport(
            instance_id=PREFILL,
            network=self.network,
            pool=self.source,
            landing=None,
            writes_behind=writes_behind,
        )
        decode = FakeTransport(
            instance_id=DECODE, network=self.network, pool=None, landing=self.window.memory
        )
        self.prefill = TransferAgent(
            instance_id=PREFILL,
            layout=LAYOUT,
            transports={"fake": prefill},
            pool=self.source,
            window=None,
            verify=verify,
            lease_s=lease_s,
            clock=self.clock,
            sealer=None if make_sealer is None else make_sealer(self.source),
        )
        self.decode = TransferAgent(
            instance_id=DECODE,
            layout=LAYOUT,
            transports={"fake": decode},
            pool=None,
            window=self.window,
            lease_s=lease_s,
            clock=self.clock,
            more_windows=self._more if more_windows else None,
            quarantine=quarantine,
        )
        self.connect()
        self.prefill_events: list[KvEvent] = []
        self.decode_events: list[KvEvent] = []
        self.positions: dict[str, dict[int, int]] = {}
        """Request -> position -> page of `target` that the role copied and verified."""
        self._next_target = 0

    def _more(self, number: int) -> torch.Tensor | None:
        return torch.zeros_like(self.window.memory)

    def connect(self) -> None:
        self.decode.peer_connected(PREFILL, "fake", PREFILL.encode())
        self.prefill.peer_connected(DECODE, "fake", DECODE.encode())

    def grant(self, request: str, tokens: int, prefix: int = 0) -> Ticket:
        return self.decode.grant(
            request_id=request,
            writer=PREFILL,
            total_pages=LAYOUT.pages_of(tokens),
            total_tokens=tokens,
            prefix_len=prefix,
            token_hash=b"hash",
        )

    def sealed(self, pages: list[int], tokens: int, first: int = 0) -> list[SourcePage]:
        valid = [LAYOUT.valid_tokens(first + i, tokens) for i in range(len(pages))]
        seals = seals_of(digest_pages(self.source, pages, valid, LAYOUT))
        return [
            SourcePage(page=page, position=first + i, valid_tokens=v, seal=seal)
            for i, (page, v, seal) in enumerate(zip(pages, valid, seals, strict=True))
        ]

    def hand_over(self, request: str, tokens: int, pages: list[int]) -> Ticket:
        """Everything that prefill does for a request, at once."""
        ticket = self.grant(request, tokens)
        self.prefill.open(ticket)
        self.prefill.push(request, self.sealed(pages, tokens))
        self.prefill.complete(request, 7)
        return ticket

    def step(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        self.prefill.thread.step()
        self.decode.thread.step()
        self.prefill_events += self.prefill.poll_events()
        for event in self.decode.poll_events():
            self.decode_events.append(event)
            if isinstance(event, PagesLanded):
                self._verify(event)

    def _verify(self, event: PagesLanded) -> None:
        pages = list(range(self._next_target, self._next_target + len(event.pages)))
        self._next_target += len(pages)
        valid = [page.valid_tokens for page in event.pages]
        slots = [page.slot for page in event.pages]
        digests = copy_and_digest(event.window, slots, self.target, pages, valid, LAYOUT)
        seals = seals_of(digests)
        if any(seal != page.seal for seal, page in zip(seals, event.pages, strict=True)):
            self.decode.reject(event.request_id, "digest mismatch")
            return
        kept = self.positions.setdefault(event.request_id, {})
        for landed, page in zip(event.pages, pages, strict=True):
            kept[landed.position] = page
        self.decode.accept(event.request_id, [page.position for page in event.pages])

    def run(self, rounds: int = 40, seconds: float = 0.0) -> None:
        for _ in range(rounds):
            self.step(seconds)

    def expire(self) -> None:
        """Moves the clock far enough for every lease, renewals included."""
        self.run(rounds=80, seconds=0.25)

    # ---- what came out ----------------------------------------------------------------------

    def completed(self, request: str) -> bool:
        return any(
            isinstance(e, TransferCompleted) and e.request_id == request for e in self.decode_events
        )

    def released(self, request: str) -> bool:
        return any(
            isinstance(e, SourceReleased) and e.request_id == request for e in self.prefill_events
        )

    def failures(self, side: str) -> list[TransferFailedEvent]:
        events = self.prefill_events if side == "prefill" else self.decode_events
        return [e for e in events if isinstance(e, TransferFailedEvent)]

    def identical(self, request: str, tokens: int, pages: list[int]) -> bool:
        """Whether every valid token's bytes arrived."""
        kept = self.positions.get(request, {})
        for position, page in enumerate(pages):
            size = LAYOUT.valid_tokens(position, tokens) * LAYOUT.token_bytes
            source = self.source[page].view(LAYOUT.rows, -1)[:, :size]
            target = self.target[kept[position]].view(LAYOUT.rows, -1)[:, :size]
            if not torch.equal(source, target):
                return False
        return True
