"""The KV of retracted requests, kept in host memory until they return.

A retracted request's pages are wanted by others at once, and its own tokens are wanted again soon.
What it had computed, its incomplete last page included, is copied to host memory; when there is
room again it is copied back, and nothing but its last token is computed. Computing everything again
is the other way; the cheaper one is taken, as far as their speeds are known.

Pages that are being copied out stay owned here until the copy has ended, then whole ones go to the
prefix tree. Nothing waits for that unless memory is short (`reclaim`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from engine.memory.audit import MemoryInvariantError
from engine.memory.host_pool import HostPool, Rate
from engine.memory.page_allocator import PageAllocator
from engine.memory.page_copier import PageCopy
from engine.memory.prefix_cache import BasePrefixCache, CacheableRequest, LoadBack, TreeNode


class RetractableRequest(CacheableRequest, Protocol):
    """The part of a request that is read and updated here."""

    @property
    def seqlen(self) -> int:
        """Tokens so far; the KV of the last one does not exist."""
        ...

    def resume_at(self, kv_len: int) -> None:
        """The KV of the first `kv_len` tokens is in its pages again."""
        ...

    def drop_match(self) -> None:
        """It owns no page, and locks no prefix."""
        ...


class KeptState(Enum):
    """Where the KV of a retracted request is."""

    SAVING = auto()
    """On the device still, and on its way to the host."""
    SAVED = auto()
    """In host memory."""
    LOADING = auto()
    """On its way to new pages, which are the request's already."""
    LOADED = auto()
    """In the request's pages, which may be taken from it until it is admitted (`claim`)."""


WORTH_A_TRIAL_TOKENS = 128
"""Fewer tell nothing of how fast prompts are computed: a step of few tokens takes as long as one of
many."""


def restore_is_cheaper(
    *,
    num_bytes: int,
    num_tokens: int,
    copy_bytes_per_s: float | None,
    prefill_tokens_per_s: float | None,
) -> bool:
    """Whether copying `num_bytes` takes less time than computing `num_tokens`.

    Each way is tried once before they are compared, the copy first: it disturbs nobody's step. So a
    decode worker, which computes no prompts but these, knows both speeds after two retractions.
    """
    if copy_bytes_per_s is None:
        return True
    if prefill_tokens_per_s is None:
        return num_tokens < WORTH_A_TRIAL_TOKENS
    return num_bytes / copy_bytes_per_s <= num_tokens / prefill_tokens_per_s


@dataclass(eq=False, slots=True, kw_only=True)
class _Kept:
    """One request's KV. Like a request, it can own pages of the device itself."""

    tokens: list[int]
    """Those whose KV it is."""
    extra_key: str
    host_pages: list[int]
    pages: list[int]
    tree_len: int
    last_node: TreeNode | None
    state: KeptState = KeptState.SAVING
    first: int = 0
    """Leading pages that were on the device when the others were loaded."""
    req_pool_idx: int | None = None
    copy: PageCopy = field(init=False)

    @property
    def kv_committed_len(self) -> int:
        return len(self.tokens)

    def token_ids(self, end: int) -> list[int]:
        return self.tokens[:end]


class RetractedKV:
    """Host memory for requests that will return. Used from the scheduler's thread only."""

    def __init__(
        self, allocator: PageAllocator, tree_cache: BasePrefixCache, host: HostPool
    ) -> None:
        self.host = host
        self.prefill_rate = Rate()
        """Prompt tokens a second, as the scheduler measures them."""
        self._allocator = allocator
        self._tree_cache = tree_cache
        self._kept: dict[RetractableRequest, _Kept] = {}
        self._orphans: list[_Kept] = []
        """Copies still going on for requests that have ended."""

    # ---- a request goes

    def keep(self, req: RetractableRequest) -> bool:
        """Takes over all that a retracted request owns on the device, and saves it. False where
        there is no room or computing it again is cheaper: then it is untouched, and the caller
        gives its pages back.
        """
        kv_len = min(req.kv_committed_len, req.seqlen - 1)
        num_pages = -(-kv_len // self._allocator.page_size)
        # Out, and back.
        if num_pages == 0 or not self._is_worth_it(2 * num_pages, kv_len):
            return False
        host_pages = self.host.alloc(num_pages)
        if host_pages is None:
            return False
        self._allocator.free(req.pages[num_pages:])
        kept = _Kept(
            tokens=req.token_ids(kv_len),
            extra_key=req.extra_key,
            host_pages=host_pages,
            pages=req.pages[:num_pages],
            tree_len=req.tree_len,
            last_node=req.last_node,
        )
        req.drop_match()
        kept.copy = self.host.copier.to_host(kept.pages, host_pages)
        self._kept[req] = kept
        if kept.copy.done():
            self._finish_saving(kept)
        return True

    def _is_worth_it(self, num_pages: int, num_tokens: int) -> bool:
        return restore_is_cheaper(
            num_bytes=num_pages * self.host.copier.page_bytes,
            num_tokens=num_tokens,
            copy_bytes_per_s=self.host.rate.per_s,
            prefill_tokens_per_s=self.prefill_rate.per_s,
        )

    def _finish_saving(self, kept: _Kept) -> None:
        kept.copy.wait()
        self.host.measure(kept.copy, len(kept.host_pages))
        self.host.filled(kept.host_pages, kept.copy.digests())
        self._tree_cache.cache_finished_req(kept)
        kept.state = KeptState.SAVED

    # ---- and returns

    def state(self, req: RetractableRequest) -> KeptState | None:
        """None: nothing is kept for it."""
        kept = self._kept.get(req)
        return None if kept is None else kept.state

    def load(self, req: RetractableRequest) -> LoadBack:
        """Brings the KV of a SAVED request back behind the prefix that it has matched and locked,
        all or nothing. NOTHING: no memory, or computing the rest is cheaper; the request goes on
        with its match. Otherwise its new pages are its own from now on."""
        kept, page_size = self._kept[req], self._allocator.page_size
        first = len(req.pages)
        count = len(kept.host_pages) - first
        if count <= 0 or not self._is_worth_it(count, len(kept.tokens) - first * page_size):
            return LoadBack.NOTHING
        self._tree_cache.evict((count - self._allocator.free_pages) * page_size)
        pages = self._allocator.alloc(count, after=req.pages[-1] if req.pages else None)
        if pages is None:
            return LoadBack.NOTHING
        req.pages = [*req.pages, *pages]
        kept.first, kept.state = first, KeptState.LOADING
        kept.copy = self.host.copier.to_device(kept.host_pages[first:], pages)
        if not kept.copy.done():
            return LoadBack.PENDING
        self._finish_loading(req, kept)
        return LoadBack.DONE if kept.state is KeptState.LOADED else LoadBack.NOTHING

    def _finish_loading(self, req: RetractableRequest, kept: _Kept) -> None:
        kept.copy.wait()
        self.host.measure(kept.copy, len(kept.host_pages) - kept.first)
        arrived = kept.copy.digests()
        whole = self.host.whole(kept.host_pages[kept.first :], arrived)
        if whole < len(arrived):
            self.host.counters.spoilt += 1
            self._take_back(req, kept)
            self._drop(req)
            return
        self.host.counters.loaded += len(arrived)
        kept.state = KeptState.LOADED
        req.resume_at(len(kept.tokens))

    def _take_back(self, req: RetractableRequest, kept: _Kept) -> None:
        """The pages that were loaded are free again, and the prefix unlocked."""
        self._allocator.free(req.pages[kept.first :])
        if req.last_node is not None:
            self._tree_cache.dec_lock_ref(req.last_node)
        req.drop_match()
        kept.state = KeptState.SAVED

    def put_back(self, req: RetractableRequest) -> None:
        """A LOADED request is not admitted after all: others need the room more."""
        self._take_back(req, self._kept[req])

    def claim(self, req: RetractableRequest) -> None:
        """The request is admitted (or has ended): what is kept for it here is not wanted any more,
        what it has loaded is its own for good. Nothing happens where nothing is kept."""
        kept = self._kept.get(req)
        if kept is None:
            return
        if kept.state is KeptState.LOADING:
            # Ended while pages of its own are being filled: they must not go back before that.
            kept.pages, kept.last_node = req.pages, req.last_node
            kept.tree_len = kept.first * self._allocator.page_size
            req.drop_match()
        if kept.state in (KeptState.SAVING, KeptState.LOADING):
            self._orphans.append(kept)
            del self._kept[req]
        else:
            self._drop(req)

    def _drop(self, req: RetractableRequest) -> None:
        self.host.free(self._kept.pop(req).host_pages)

    # ---- polled

    def poll(self) -> None:
        """Takes note of copies that have ended; never waits."""
        for req, kept in list(self._kept.items()):
            if kept.state in (KeptState.SAVING, KeptState.LOADING) and kept.copy.done():
                self._finish(req, kept)
        for kept in [k for k in self._orphans if k.copy.done()]:
            self._bury(kept)

    def _finish(self, req: RetractableRequest, kept: _Kept) -> None:
        if kept.state is KeptState.SAVING:
            self._finish_saving(kept)
        elif kept.state is KeptState.LOADING:
            self._finish_loading(req, kept)

    def _bury(self, kept: _Kept) -> None:
        kept.copy.wait()
        self._orphans.remove(kept)
        # What was being saved is as good as before; what was being loaded nobody has looked at.
        self._tree_cache.cache_finished_req(kept, insert=kept.state is KeptState.SAVING)
        self.host.free(kept.host_pages)

    def has_pending_copies(self) -> bool:
        return bool(self._orphans) or any(
            kept.state in (KeptState.SAVING, KeptState.LOADING) for kept in self._kept.values()
        )

    # ---- memory that this holds

    @property
    def pages_leaving(self) -> int:
        """Pages of the device that are free or evictable once their copy has ended."""
        page_size = self._allocator.page_size
        return sum(
            len(kept.pages) - kept.tree_len // page_size
            for kept in [*self._kept.values(), *self._orphans]
            if kept.pages
        )

    @property
    def pages_loaded(self) -> int:
        """Pages of waiting requests that `reclaim` would take back."""
        return sum(
            len(kept.host_pages) - kept.first
            for kept in self._kept.values()
            if kept.state in (KeptState.LOADING, KeptState.LOADED)
        )

    def reclaim(self) -> None:
        """Memory is short: waits for copies, and takes back what is not admitted yet."""
        for req, kept in list(self._kept.items()):
            self._finish(req, kept)
            if kept.state is KeptState.LOADED:
                self.put_back(req)
        for kept in list(self._orphans):
            self._bury(kept)

    def put_back_unclaimed(self) -> None:
        """At the end of a pass: whoever was loaded and is not admitted holds no memory, or those
        before it in the queue could wait for that forever."""
        for req, kept in list(self._kept.items()):
            if kept.state is KeptState.LOADED:
                self.put_back(req)

    def held_pages(self) -> Iterator[Sequence[int]]:
        """Pages of the device that are owned here (for the audit)."""
        for kept in [*self._kept.values(), *self._orphans]:
            yield kept.pages

    def check(self) -> None:
        """Raises `MemoryInvariantError` if a page of this host memory is not accounted for."""
        owned = [
            page for kept in [*self._kept.values(), *self._orphans] for page in kept.host_pages
        ]
        free = self.host.allocator.free_list()
        if sorted(owned + free) != list(range(self.host.allocator.num_pages)):
            raise MemoryInvariantError(
                f"host pages of retracted requests do not balance: {len(owned)} owned, "
                f"{len(free)} free, of {self.host.allocator.num_pages}"
            )
