"""A runner whose KV is a hash chain, so that every page mix-up shows.

The KV of a token is a digest of the token and of the KV before it, rooted in the request's name
space; it lies in the slot that `out_cache_loc` names. A step reads each row's KV through the
request-to-token table and walks the whole chain: a page of another request, of another tenant, of
an older owner, a hole, or a prefix that was computed after other tokens breaks it. What is drawn
next is a function of the last digest, so the expected tokens need nothing but the request
(`cases.reference`).
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.execution.forward_batch import ForwardBatch, ForwardResult, TokenLogprobs
from engine.memory.page_allocator import PageAllocator
from engine.memory.pools import MemoryPools

VOCAB = 64
EOS = 0
CONTEXT = 256
Chain = tuple[int, int] | None
"""A token and the digest up to it; None: garbage of whoever had the page before."""


class BrokenChain(AssertionError):
    """A row's KV is not that of its tokens."""


def root(extra_key: str) -> int:
    """The digest before the first token; tenants differ, as another adapter's KV would."""
    return zlib.crc32(extra_key.encode())


def extend_chain(digest: int, token: int) -> int:
    return hash((digest, token))


def next_token(digest: int, seed: int, allowed: Sequence[int] | None = None) -> int:
    """What is drawn after `digest`; `allowed`: what a grammar lets through."""
    drawn = hash((digest, seed, 7))
    return drawn % VOCAB if allowed is None else allowed[drawn % len(allowed)]


@dataclass
class ChainKv:
    """[slots] of one pool; pages are garbage from the moment they are handed out."""

    allocator: PageAllocator
    chain: list[Chain] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain = [None] * self.allocator.total_tokens
        handed_out = self.allocator.alloc

        def alloc(n: int, *, after: int | None = None) -> list[int] | None:
            pages = handed_out(n, after=after)
            for page in pages or ():
                self.spoil(page)
            return pages

        self.allocator.alloc = alloc  # type: ignore[method-assign]

    def spoil(self, page: int) -> None:
        size = self.allocator.page_size
        self.chain[page * size : (page + 1) * size] = [None] * size

    def page(self, page: int) -> list[Chain]:
        size = self.allocator.page_size
        return self.chain[page * size : (page + 1) * size]

    def fill(self, page: int, content: list[Chain]) -> None:
        size = self.allocator.page_size
        self.chain[page * size : (page + 1) * size] = content

    def write_prompt(
        self, pages: Sequence[int], tokens: Sequence[int], extra_key: str, *, start: int
    ) -> None:
        """What a transfer brings: the KV of `tokens[start:]`; that of the rest must be there."""
        self.check_prompt(pages, tokens[:start], extra_key)
        digest, size = root(extra_key), self.allocator.page_size
        for position, token in enumerate(tokens):
            digest = extend_chain(digest, token)
            if position >= start:
                self.chain[pages[position // size] * size + position % size] = (token, digest)

    def check_prompt(self, pages: Sequence[int], tokens: Sequence[int], extra_key: str) -> None:
        """What a transfer reads; raises `BrokenChain`."""
        digest, size = root(extra_key), self.allocator.page_size
        for position, token in enumerate(tokens):
            digest = extend_chain(digest, token)
            found = self.chain[pages[position // size] * size + position % size]
            if found != (token, digest):
                raise BrokenChain(
                    f"page {pages[position // size]} is read at position {position}: {found}, not "
                    f"{(token, digest)}"
                )


@dataclass
class Parts:
    """A step that runs a few layers at a time."""

    tenants: list[str]
    rows: list[list[int]]
    """The table's rows at the first part."""
    next_layer: int


class ChainRunner:
    """Implements `SplitRunner`."""

    num_layers = 3

    def __init__(self, memory: MemoryPools) -> None:
        self.kv = ChainKv(memory.allocator)
        self.tenants: deque[list[str]] = deque()
        """Of each launched step that has not begun: the name space of each row."""
        self._parts: Parts | None = None

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        return self._forward(batch, self.tenants.popleft())

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        """The KV is there with the last layer; until then nobody may read it."""
        rows = self._rows(batch)
        if first_layer == 0:
            assert self._parts is None, "two steps in parts"
            self._parts = Parts(self.tenants.popleft(), rows, 0)
            for slot in batch.out_cache_loc.tolist():
                self.kv.chain[slot] = None
        parts = self._parts
        assert parts is not None
        assert parts.next_layer == first_layer < last_layer
        assert parts.rows == rows, "the step's pages have changed between two parts"
        parts.next_layer = last_layer
        if last_layer < self.num_layers:
            return ForwardResult(batch.input_ids[:0], None)
        self._parts = None
        return self._forward(batch, parts.tenants)

    def drop_split(self) -> None:
        self._parts = None

    def _rows(self, batch: ForwardBatch) -> list[list[int]]:
        rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens_cpu, strict=True)
        return [batch.req_to_token[row, :length].tolist() for row, length in rows]

    def _forward(self, batch: ForwardBatch, tenants: list[str]) -> ForwardResult:
        self._check_shapes(batch)
        rows = batch.req_pool_indices.tolist()
        self._write(batch, rows, tenants)
        allowed = _allowed(batch)
        drawn = [
            next_token(self._read(batch, row, length, tenant), seed, allowed.get(i))
            for i, (row, length, tenant, seed) in enumerate(
                zip(rows, batch.seq_lens_cpu, tenants, batch.sampling.seed.tolist(), strict=True)
            )
        ]
        logprobs = None
        if batch.sampling.any_logprobs:
            logprobs = torch.tensor([-float(token) for token in drawn])
        return ForwardResult(
            torch.tensor(drawn, dtype=torch.int64), logprobs, prompt=_judged(batch)
        )

    def _write(self, batch: ForwardBatch, rows: list[int], tenants: list[str]) -> None:
        """Each input's digest follows the one before it, which its row must already lead to."""
        inputs = iter(
            zip(
                batch.input_ids.tolist(),
                batch.positions.tolist(),
                batch.out_cache_loc.tolist(),
                strict=True,
            )
        )
        for row, tenant, prefix, extend in zip(
            rows, tenants, batch.extend_prefix_lens, batch.extend_lens, strict=True
        ):
            if prefix == 0:
                digest = root(tenant)
            else:
                before = self.kv.chain[int(batch.req_to_token[row, prefix - 1])]
                if before is None:
                    raise BrokenChain(
                        f"row {row} continues after {prefix} tokens that nobody wrote"
                    )
                digest = before[1]
            for position in range(prefix, prefix + extend):
                token, at, slot = next(inputs)
                if at != position:
                    raise BrokenChain(f"row {row}: an input of position {position} says {at}")
                digest = extend_chain(digest, token)
                self.kv.chain[slot] = (token, digest)

    def _read(self, batch: ForwardBatch, row: int, length: int, tenant: str) -> int:
        """The digest of the row's `length` tokens, each link of it looked at."""
        digest = root(tenant)
        for position, slot in enumerate(batch.req_to_token[row, :length].tolist()):
            found = self.kv.chain[slot]
            if found is None or extend_chain(digest, found[0]) != found[1]:
                raise BrokenChain(
                    f"row {row}, position {position} of {length}: slot {slot} holds {found}, which "
                    "does not follow the tokens before"
                )
            digest = found[1]
        return digest

    def _check_shapes(self, batch: ForwardBatch) -> None:
        b = len(batch.seq_lens_cpu)
        assert batch.seq_lens.tolist() == batch.seq_lens_cpu
        assert batch.sampling.position.tolist() == batch.seq_lens_cpu
        assert sum(batch.extend_lens) == batch.input_ids.numel() == batch.out_cache_loc.numel()
        assert [
            p + e for p, e in zip(batch.extend_prefix_lens, batch.extend_lens, strict=True)
        ] == (batch.seq_lens_cpu)
        slots = batch.out_cache_loc.tolist()
        assert len(set(slots)) == len(slots), "two inputs share a slot"
        rows = batch.req_pool_indices.tolist()
        assert len(set(rows)) == len(rows) == b, "two requests share a row"


def _allowed(batch: ForwardBatch) -> dict[int, list[int]]:
    """What each row with a grammar may draw."""
    edits = batch.sampling.edits
    if edits is None or edits.mask is None:
        return {}
    masks = edits.mask.masks().tolist()
    return {
        row: [t for t in range(VOCAB) if words[t // 32] >> (t % 32) & 1]
        for row, words in zip(edits.mask.rows.tolist(), masks, strict=True)
    }


def _judged(batch: ForwardBatch) -> TokenLogprobs | None:
    """Each prompt token's log probability is minus its id."""
    targets = batch.prompt_targets
    if targets is None:
        return None
    none = torch.empty(len(targets.target_ids), 0)
    return TokenLogprobs(chosen=-targets.target_ids.float(), top_ids=none.long(), top=none)
