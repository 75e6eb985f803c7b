"""Seals of the prefill worker's pages, stored beside them.

A page is sealed when it is computed. The seal is bound to the page's *generation* (bumped at every
allocation) and to the hash of its token chain, so that a page which was freed and computed anew
can never be sent under the seal of what it held before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.memory.page_allocator import PageAllocator
from kvtransfer.pool_sealer import PendingSeals
from kvtransfer.ticket import SourcePage
from worker.engine_parts import EngineParts


class StaleSourceError(Exception):
    """A cached page no longer holds what it was sealed with: it must not be sent."""


class _Seal(NamedTuple):
    """One for every page that is computed, while a client waits."""

    generation: int
    chain_hash: bytes
    digest: bytes
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class Sealing:
    """Pages between the launch of the step that computes them and its end."""

    pages: list[int]
    generations: list[int]
    chain: list[bytes]
    valid: list[int]
    pending: PendingSeals | None
    """None: they are sealed when the step has ended."""


class SealStore:
    """One seal a page at most; a stale one is as good as none."""

    def __init__(self, parts: EngineParts) -> None:
        self._allocator: PageAllocator = parts.memory.allocator
        self._sealer = parts.sealer
        self._layout = parts.layout
        self._seals: dict[int, _Seal] = {}

    def begin(
        self,
        pages: Sequence[int],
        chain: Sequence[bytes],
        valid: Sequence[int],
        *,
        passed: torch.cuda.Event | None = None,
    ) -> "Sealing":
        """Of pages whose KV is being computed: a GPU seals them right behind the step, or when it
        has `passed` the event, so that nobody waits for that afterwards. `finish` follows when the
        step has ended, or nothing."""
        generations = [self._allocator.generation(page) for page in pages]
        pending = None
        if pages and self._sealer.queues:
            pending = self._sealer.start(pages, valid, behind_step=True, passed=passed)
        return Sealing(list(pages), generations, list(chain), list(valid), pending)

    def finish(self, sealing: "Sealing") -> None:
        """The KV of its pages is computed: they are sealed from now on."""
        if not sealing.pages:
            return
        if sealing.pending is not None:
            digests = sealing.pending.seals()
        else:
            digests = self._sealer.seals(sealing.pages, sealing.valid)
        for page, generation, link, count, digest in zip(
            sealing.pages,
            sealing.generations,
            sealing.chain,
            sealing.valid,
            digests,
            strict=True,
        ):
            self._seals[page] = _Seal(generation, link, digest, count)

    def digest_of(self, page: int) -> bytes | None:
        """Of a whole page that was sealed and not given away since; None for any other."""
        seal = self._seals.get(page)
        if seal is None or seal.generation != self._allocator.generation(page):
            return None
        return seal.digest if seal.valid_tokens == self._layout.page_size else None

    def reseal(self, page: int, *, chain_hash: bytes, digest: bytes) -> None:
        """A whole page has come back from host memory as `page`, and was found to hold what
        `digest` says."""
        generation = self._allocator.generation(page)
        self._seals[page] = _Seal(generation, chain_hash, digest, self._layout.page_size)

    def source_page(self, page: int, *, position: int, chain_hash: bytes, valid: int) -> SourcePage:
        """The page as the transfer takes it. Raises StaleSourceError unless it holds just that."""
        seal = self._seals.get(page)
        wanted = (self._allocator.generation(page), chain_hash, valid)
        if seal is None or (seal.generation, seal.chain_hash, seal.valid_tokens) != wanted:
            raise StaleSourceError(f"page {position} of the prompt is not what was sealed")
        return SourcePage(page, position, valid, seal.digest, chain_hash)
