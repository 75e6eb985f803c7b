"""The copy out of the landing window: pages as their writer cut them, into pages as they are cut
here.

It digests what it copies with the writer's weights, so the digest can be compared with the seal
whatever the two page sizes are. Where both cut alike this is `copy_and_digest`. Elsewhere one
kernel does the same on CUDA; on a CPU, and out of a window of the host's, a page is first taken out
of the window, so that what is scattered is what was digested and a late write cannot come between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvtransfer.device_digest import DeviceDigests, digester
from kvtransfer.digest import (
    SEAL_BYTES,
    as_tensor,
    copy_and_digest,
    device_weights,
    digest_pages,
    seals_of,
    start_copy_and_digest,
    words_of,
)
from kvtransfer.geometry import Piece, WriterPages
from kvtransfer.layout import WORD_BYTES, PageLayout
from kvtransfer.ticket import LandedPage


@dataclass(frozen=True, slots=True, kw_only=True)
class LandingTarget:
    """Where the KV of one request goes."""

    pool: torch.Tensor
    """[pages, page_bytes] uint8."""

    layout: PageLayout
    """Of the pool's pages."""

    pages: Sequence[int]
    """The request's pages in the pool, from its first token on."""

    heads: range
    """The model's KV heads that they hold."""

    kept_tokens: int
    """Leading tokens whose KV is here already, in pages that others may read: they are digested
    where a larger page of the writer brings them along, and never written."""


Seals = dict[int, list[bytes]]
"""Writing rank -> the digest of its part of each landed page."""


class FoundSeals(Protocol):
    """What `start_landing` found, or is to find."""

    def found(self) -> Seals:
        """Waits for the copy, too: slots may go back to their writer then."""
        ...


@dataclass(frozen=True, slots=True)
class PendingLanding:
    """`FoundSeals` of one rank."""

    _digests: dict[int, DeviceDigests | torch.Tensor]
    """By writing rank; [len(landed), RANGES] int64 where the host has them."""

    def found(self) -> Seals:
        return {
            rank: seals_of(as_tensor(d.wait()) if isinstance(d, DeviceDigests) else d)
            for rank, d in self._digests.items()
        }


@dataclass(frozen=True, slots=True)
class KnownLanding:
    """`FoundSeals` of what was done at once."""

    known: Seals

    def found(self) -> Seals:
        return self.known


def land_pages(
    window: torch.Tensor, landed: Sequence[LandedPage], writer: WriterPages, target: LandingTarget
) -> Seals:
    """Copies the valid tokens of `landed`, as far as their heads are this rank's, from `window`
    ([slots, slot_bytes] uint8, on the pool's device or on the host) into the request's pages, and
    digests the very bytes that it copied, once that is done. On CUDA it works on a stream of its
    own. Raises ValueError for slots, tokens or pages out of range.
    """
    return start_landing(window, landed, writer, target).found()


def start_landing(
    window: torch.Tensor, landed: Sequence[LandedPage], writer: WriterPages, target: LandingTarget
) -> PendingLanding:
    """As `land_pages`, without waiting for a GPU that does it by itself."""
    mine = target.heads
    return PendingLanding(
        {
            piece.rank: _land_piece(window, landed, writer, piece, target)
            for piece in writer.pieces
            if piece.heads.start < mine.stop and mine.start < piece.heads.stop
        }
    )


def first_unsealed(landed: Sequence[LandedPage], found: Seals) -> LandedPage | None:
    """The first page that is not what was sealed; None: all of them are."""
    spoilt: list[int] = []
    for rank, seals in found.items():
        first = SEAL_BYTES * rank
        sealed = [page.seal[first : first + SEAL_BYTES] for page in landed]
        if sealed != seals:
            pairs = enumerate(zip(sealed, seals, strict=True))
            spoilt.append(next(index for index, (ours, theirs) in pairs if ours != theirs))
    return landed[min(spoilt)] if spoilt else None


def _land_piece(
    window: torch.Tensor,
    landed: Sequence[LandedPage],
    writer: WriterPages,
    piece: Piece,
    target: LandingTarget,
) -> DeviceDigests | torch.Tensor:
    """[len(landed), RANGES] int64 on the host, or on their way there."""
    on_device = target.pool.device.type == "cuda" and window.device == target.pool.device
    alike = writer.layout == target.layout and piece.heads == target.heads
    if alike and window.shape[1] == target.layout.page_bytes:
        return (start_copy_and_digest if on_device else copy_and_digest)(
            window,
            [page.slot for page in landed],
            target.pool,
            [target.pages[page.position] for page in landed],
            [page.valid_tokens for page in landed],
            target.layout,
        )
    _check(window, landed, writer, target)
    if on_device:
        return _launch(window, landed, writer, piece, target)
    if target.pool.device.type == "cpu":
        return _staged(window, landed, writer, piece, target)
    with torch.cuda.stream(digester(target.pool.device).stream):
        return _staged(window, landed, writer, piece, target)


def _check(
    window: torch.Tensor, landed: Sequence[LandedPage], writer: WriterPages, target: LandingTarget
) -> None:
    slots, slot_bytes = window.shape
    for page in landed:
        if page.slot < 0 or page.slot * slot_bytes + writer.window_bytes > slots * slot_bytes:
            raise ValueError(f"a page of {writer.window_bytes} bytes does not fit at {page.slot}")
        if not 1 <= page.valid_tokens <= writer.page_size:
            raise ValueError(f"{page.valid_tokens} valid tokens outside 1..{writer.page_size}")
        end = page.position * writer.page_size + page.valid_tokens
        if page.position < 0 or end > len(target.pages) * target.layout.page_size:
            raise ValueError(f"tokens up to {end} in {len(target.pages)} pages")
    if not all(0 <= page < len(target.pool) for page in target.pages):
        raise ValueError(f"pages {list(target.pages)} outside the pool")


def _staged(
    window: torch.Tensor,
    landed: Sequence[LandedPage],
    writer: WriterPages,
    piece: Piece,
    target: LandingTarget,
) -> torch.Tensor:
    size = writer.layout.page_bytes
    staged = torch.empty((len(landed), size), dtype=torch.uint8, device=target.pool.device)
    memory = window.view(-1)
    for row, page in zip(staged, landed, strict=True):
        start = page.slot * window.shape[1] + piece.offset
        row.copy_(memory[start : start + size], non_blocking=True)
        _scatter(row, page, writer, piece, target)
    valid = [page.valid_tokens for page in landed]
    return digest_pages(staged, range(len(landed)), valid, writer.layout)


def _scatter(
    page_bytes: torch.Tensor,
    page: LandedPage,
    writer: WriterPages,
    piece: Piece,
    target: LandingTarget,
) -> None:
    theirs, mine = writer.layout, target.layout
    source = page_bytes.view(theirs.rows, theirs.page_size, theirs.token_bytes)
    here, there = _common_bytes(piece, target)
    source = source[:, :, here]
    first = page.position * theirs.page_size
    token, end = max(first, target.kept_tokens), first + page.valid_tokens
    while token < end:
        index, offset = divmod(token, mine.page_size)
        count = min(end - token, mine.page_size - offset)
        own = target.pool[target.pages[index]].view(mine.rows, mine.page_size, mine.token_bytes)
        own[:, offset : offset + count, there].copy_(
            source[:, token - first : token - first + count]
        )
        token += count


def _common_bytes(piece: Piece, target: LandingTarget) -> tuple[slice, slice]:
    """The heads that both hold, in a token of the piece and in one of ours."""
    mine, size = target.heads, target.layout.head_dim * target.layout.itemsize
    first, stop = max(piece.heads.start, mine.start), min(piece.heads.stop, mine.stop)
    return (
        slice((first - piece.heads.start) * size, (stop - piece.heads.start) * size),
        slice((first - mine.start) * size, (stop - mine.start) * size),
    )


def _launch(
    window: torch.Tensor,
    landed: Sequence[LandedPage],
    writer: WriterPages,
    piece: Piece,
    target: LandingTarget,
) -> DeviceDigests:
    """One kernel over all rows of all pages; each byte is read once."""
    theirs, mine, device = writer.layout, target.layout, target.pool.device
    firsts = [page.position * theirs.page_size for page in landed]
    # a page of theirs touches at most so many of ours, however the two lie to one another
    reach = -(-theirs.page_size // mine.page_size) + 1
    lists = [list(target.pages[first // mine.page_size :][:reach]) for first in firsts]
    table = [
        [page.slot, page.valid_tokens, first, max(0, target.kept_tokens - first), *pages]
        + [0] * (reach - len(pages))
        for page, first, pages in zip(landed, firsts, lists, strict=True)
    ]
    here, there = _common_bytes(piece, target)
    return digester(device).launch(
        "land_and_digest",
        source=words_of(window),
        target=words_of(target.pool),
        table=np.array(table, dtype=np.int64),
        weights=device_weights(theirs, device),
        numbers=(
            4 + reach,
            window.shape[1] // WORD_BYTES,
            piece.offset // WORD_BYTES,
            theirs.row_bytes // WORD_BYTES,
            theirs.token_bytes // WORD_BYTES,
            mine.row_bytes // WORD_BYTES,
            mine.page_size,
            mine.token_bytes // WORD_BYTES,
            here.start // WORD_BYTES,
            here.stop // WORD_BYTES,
            there.start // WORD_BYTES,
        ),
    )
