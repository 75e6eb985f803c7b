"""KV pages over all ranks: sealed, and copied out of the landing window, each rank its own part.

Rank 0's side asks the others over a link and waits for them; their side does the same work on
their pools. With one rank there is nobody to ask.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtransfer.cpu_digest import cpu_digest
from kvtransfer.digest import SEAL_BYTES, copy_and_digest
from kvtransfer.geometry import KvGeometry, RankPlace, WriterPages
from kvtransfer.landing import (
    FoundSeals,
    KnownLanding,
    LandingTarget,
    PendingLanding,
    Seals,
    start_landing,
)
from kvtransfer.pool_sealer import KnownSeals, PendingSeals, PoolSealer
from kvtransfer.ticket import LandedPage
from worker.rank_link import Kind, RankLink
from worker.rank_windows import RankWindows


@dataclass(frozen=True, slots=True)
class RankKv:
    """One rank's pool, and what is done with its pages."""

    pool: torch.Tensor
    """[pages, page_bytes] uint8."""
    place: RankPlace

    def land(
        self,
        window: torch.Tensor,
        landed: Sequence[LandedPage],
        writer: WriterPages,
        *,
        pages: Sequence[int],
        kept_tokens: int,
    ) -> Seals:
        pending = self.start_landing(window, landed, writer, pages=pages, kept_tokens=kept_tokens)
        return pending.found()

    def start_landing(
        self,
        window: torch.Tensor,
        landed: Sequence[LandedPage],
        writer: WriterPages,
        *,
        pages: Sequence[int],
        kept_tokens: int,
    ) -> PendingLanding:
        target = LandingTarget(
            pool=self.pool,
            layout=self.place.layout,
            pages=pages,
            heads=self.place.heads,
            kept_tokens=kept_tokens,
        )
        return start_landing(window, landed, writer, target)

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        return PoolSealer(self.pool, self.place.layout).seals(pages, valid_tokens)

    def compile_kernels(self, window: torch.Tensor | None) -> None:
        """Has the kernels made that seal and land pages, which takes a second on a new machine and
        is no part of a request. Before any page is in use. `window`: as for `land`, or None."""
        pool, layout = self.pool, self.place.layout
        if pool.device.type != "cuda":
            cpu_digest()
            return
        self.seals([0], [layout.page_size])
        if window is not None and (window.device, window.shape[1]) == (pool.device, pool.shape[1]):
            copy_and_digest(window, [0], pool, [0], [layout.page_size], layout)

    def start_seals(
        self,
        pages: Sequence[int],
        valid_tokens: Sequence[int],
        *,
        behind_step: bool,
        passed: torch.cuda.Event | None,
    ) -> PendingSeals:
        sealer = PoolSealer(self.pool, self.place.layout)
        return sealer.start(pages, valid_tokens, behind_step=behind_step, passed=passed)

    # ---- answers of a following rank ----------------------------------------------------------

    def answer_seal(self, payload: bytes) -> bytes:
        asked = json.loads(payload)
        return b"".join(self.seals(asked["pages"], asked["valid"]))

    def answer_land(self, payload: bytes, windows: RankWindows) -> bytes:
        asked = json.loads(payload)
        window = windows.open(asked["first_slot"])
        landed = [
            LandedPage(slot=slot, position=position, valid_tokens=valid, seal=b"", chain_hash=b"")
            for slot, position, valid in asked["landed"]
        ]
        theirs = KvGeometry(page_size=asked["page_size"], tp_size=asked["tp_size"])
        writer = self.place.writer_pages(theirs, slot_bytes=int(window.shape[1]))
        found = self.land(
            window, landed, writer, pages=asked["pages"], kept_tokens=asked["kept_tokens"]
        )
        return json.dumps({rank: b"".join(seals).hex() for rank, seals in found.items()}).encode()


class RankSealer:
    """`Sealer` over all ranks; each thread has one of its own, over links of its own."""

    def __init__(self, local: RankKv, links: Sequence[RankLink]) -> None:
        self._local = local
        self._links = links

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        asked: dict[str, Any] = {"pages": list(pages), "valid": list(valid_tokens)}
        ask_all(self._links, Kind.SEAL, asked)
        parts = [self._local.seals(pages, valid_tokens)]
        parts += [_split(link.answer()) for link in self._links]
        return [b"".join(ranks) for ranks in zip(*parts, strict=True)]

    @property
    def queues(self) -> bool:
        return not self._links and self._local.pool.device.type == "cuda"

    def start(
        self,
        pages: Sequence[int],
        valid_tokens: Sequence[int],
        *,
        behind_step: bool = False,
        passed: torch.cuda.Event | None = None,
    ) -> PendingSeals:
        """Waits where there are other ranks, whose answers come over their links."""
        if self._links:
            return KnownSeals(self.seals(pages, valid_tokens))
        return self._local.start_seals(pages, valid_tokens, behind_step=behind_step, passed=passed)


class RankLander:
    """Copies what has landed, on all ranks; of the scheduler's thread."""

    def __init__(self, local: RankKv, links: Sequence[RankLink]) -> None:
        self._local = local
        self._links = links

    def start(
        self,
        window: torch.Tensor,
        landed: Sequence[LandedPage],
        writer: WriterPages,
        *,
        pages: Sequence[int],
        kept_tokens: int,
        first_slot: int = 0,
    ) -> FoundSeals:
        """As `start_landing`, of all ranks together; waits where there are others. `first_slot`:
        which of the worker's windows it is; the other ranks have theirs."""
        asked: dict[str, Any] = {
            "first_slot": first_slot,
            "landed": [(page.slot, page.position, page.valid_tokens) for page in landed],
            "page_size": writer.geometry.page_size,
            "tp_size": writer.geometry.tp_size,
            "pages": list(pages),
            "kept_tokens": kept_tokens,
        }
        ask_all(self._links, Kind.LAND, asked)
        local = self._local.start_landing(
            window, landed, writer, pages=pages, kept_tokens=kept_tokens
        )
        if not self._links:
            return local
        answers = [json.loads(link.answer()) for link in self._links]
        theirs = [
            {int(rank): _split(bytes.fromhex(seals)) for rank, seals in answer.items()}
            for answer in answers
        ]
        return KnownLanding(_agreed([local.found(), *theirs]))


def ask_all(links: Sequence[RankLink], kind: Kind, asked: dict[str, Any]) -> None:
    """The same question to all of them, who work on it at once."""
    if links:
        payload = json.dumps(asked).encode()
        for link in links:
            link.send(kind, payload)


def _agreed(found: Sequence[Seals]) -> Seals:
    """One answer for each writing rank: where several of ours read the same piece, one that read
    something else must not be covered by one that did not."""
    agreed: Seals = {}
    for seals in found:
        for rank, digests in seals.items():
            known = agreed.setdefault(rank, digests)
            agreed[rank] = [a if a == b else b"" for a, b in zip(known, digests, strict=True)]
    return agreed


def _split(data: bytes) -> list[bytes]:
    return [data[start : start + SEAL_BYTES] for start in range(0, len(data), SEAL_BYTES)]
