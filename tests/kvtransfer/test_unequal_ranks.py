"""Heads split among any number of ranks land among any other number: every byte, every seal."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.parallel.shards import rank_kv_heads
from kvtransfer.digest import SEAL_BYTES, digest_pages, seals_of
from kvtransfer.geometry import KvGeometry, RankPlace, rank_heads
from kvtransfer.landing import LandingTarget, Seals, first_unsealed, land_pages
from kvtransfer.layout import PageLayout
from kvtransfer.ticket import LandedPage

HEADS = 4
HEAD_BYTES = 4
UNTOUCHED = 0x5A
RANKS = st.sampled_from([1, 2, 4, 8])
PAGE_SIZES = st.sampled_from([1, 3, 4, 8])


def rank_layout(page_size: int, ranks: int) -> PageLayout:
    heads = len(rank_heads(HEADS, rank=0, tp_size=ranks))
    return PageLayout(layers=2, page_size=page_size, kv_heads=heads, head_dim=2, itemsize=2)


@dataclasses.dataclass
class Handover:
    """Random KV as `theirs` cut it, in the windows of all ranks of `mine`."""

    kv: torch.Tensor
    """[rows, tokens, heads, HEAD_BYTES]."""
    theirs: KvGeometry
    mine: KvGeometry
    shared: bool
    places: list[RankPlace] = dataclasses.field(default_factory=list)
    windows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    pools: list[torch.Tensor] = dataclasses.field(default_factory=list)
    landed: list[LandedPage] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        tokens, own = self.kv.shape[1], rank_layout(self.mine.page_size, self.mine.tp_size)
        source = rank_layout(self.theirs.page_size, self.theirs.tp_size)
        slot_bytes = own.page_bytes
        if self.shared:
            slot_bytes = rank_layout(self.mine.page_size, 1).page_bytes
        self.places = [
            RankPlace(
                layout=own,
                kv_heads=HEADS,
                rank=rank,
                tp_size=self.mine.tp_size,
                shared_window=self.shared,
            )
            for rank in range(self.mine.tp_size)
        ]
        run = self.places[0].writer_pages(self.theirs, slot_bytes=slot_bytes).slots
        count = source.pages_of(tokens)
        pieces = [self.source_pages(rank, source) for rank in range(self.theirs.tp_size)]
        for place in self.places:
            writer = place.writer_pages(self.theirs, slot_bytes=slot_bytes)
            assert writer.slots == run
            window = torch.full(((count + 1) * run, slot_bytes), 0xA5, dtype=torch.uint8)
            for piece in writer.pieces:
                for position in range(count):
                    start = (count - position) * run * slot_bytes + piece.offset
                    page = pieces[piece.rank][position]
                    window.view(-1)[start : start + source.page_bytes] = page
            self.windows.append(window)
            pages = own.pages_of(tokens)
            self.pools.append(torch.full((pages, own.page_bytes), UNTOUCHED, dtype=torch.uint8))
        for position in range(count):
            valid = source.valid_tokens(position, tokens)
            seal = b"".join(
                seals_of(digest_pages(pages, [position], [valid], source))[0] for pages in pieces
            )
            slot = (count - position) * run
            self.landed.append(
                LandedPage(
                    slot=slot, position=position, valid_tokens=valid, seal=seal, chain_hash=b""
                )
            )

    def source_pages(self, rank: int, layout: PageLayout) -> torch.Tensor:
        tokens = self.kv.shape[1]
        heads = rank_heads(HEADS, rank=rank, tp_size=self.theirs.tp_size)
        count = layout.pages_of(tokens)
        padded = torch.zeros(
            (layout.rows, count * layout.page_size, len(heads), HEAD_BYTES), dtype=torch.uint8
        )
        padded[:, :tokens] = self.kv[:, :, heads.start : heads.stop]
        shape = (layout.rows, count, layout.page_size * layout.token_bytes)
        return padded.reshape(shape).transpose(0, 1).reshape(count, layout.page_bytes).contiguous()

    def land(self) -> list[Seals]:
        found = []
        for place, window, pool in zip(self.places, self.windows, self.pools, strict=True):
            writer = place.writer_pages(self.theirs, slot_bytes=int(window.shape[1]))
            target = LandingTarget(
                pool=pool,
                layout=place.layout,
                pages=list(range(len(pool)))[::-1],
                heads=place.heads,
                kept_tokens=0,
            )
            found.append(land_pages(window, self.landed, writer, target))
        return found

    def arrived(self, rank: int) -> torch.Tensor:
        """[rows, tokens, heads of the rank, HEAD_BYTES], read from its pool."""
        place, tokens = self.places[rank], self.kv.shape[1]
        own = place.layout
        pages = self.pools[rank].flip(0).view(-1, own.rows, own.page_size, own.token_bytes)
        flat = pages.transpose(0, 1).reshape(own.rows, -1, len(place.heads), HEAD_BYTES)
        assert bool((flat[:, tokens:] == UNTOUCHED).all())
        return flat[:, :tokens]


@st.composite
def handovers(draw: st.DrawFn) -> Handover:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tokens = draw(st.integers(1, 20))
    kv = torch.randint(
        0, 256, (4, tokens, HEADS, HEAD_BYTES), dtype=torch.uint8, generator=generator
    )
    return Handover(
        kv,
        KvGeometry(page_size=draw(PAGE_SIZES), tp_size=draw(RANKS)),
        KvGeometry(page_size=draw(PAGE_SIZES), tp_size=draw(RANKS)),
        shared=draw(st.booleans()),
    )


@given(handovers())
def test_every_rank_gets_its_heads_of_every_token(case: Handover) -> None:
    for found in case.land():
        assert first_unsealed(case.landed, found) is None
    for rank, place in enumerate(case.places):
        wanted = case.kv[:, :, place.heads.start : place.heads.stop]
        assert torch.equal(case.arrived(rank), wanted)


@given(handovers(), st.data())
def test_a_bit_flipped_in_one_window_is_caught_by_whoever_reads_that_piece(
    case: Handover, data: st.DataObject
) -> None:
    struck = data.draw(st.integers(0, len(case.places) - 1))
    place, window = case.places[struck], case.windows[struck]
    writer = place.writer_pages(case.theirs, slot_bytes=int(window.shape[1]))
    mine = [p for p in writer.pieces if set(p.heads) & set(place.heads)]
    piece = data.draw(st.sampled_from(mine))
    page = data.draw(st.sampled_from(case.landed))
    offset = data.draw(st.integers(0, writer.layout.page_bytes - 1))
    start = page.slot * window.shape[1] + piece.offset
    window.view(-1)[start + offset] ^= 1 << data.draw(st.integers(0, 7))
    layout = writer.layout
    matters = offset % layout.row_bytes < page.valid_tokens * layout.token_bytes
    for rank, found in enumerate(case.land()):
        spoilt = first_unsealed(case.landed, found)
        assert spoilt == (page if matters and rank == struck else None)


def test_a_seal_that_is_too_short_matches_nothing() -> None:
    page = LandedPage(slot=0, position=0, valid_tokens=1, seal=b"\0" * SEAL_BYTES, chain_hash=b"")
    assert first_unsealed([page], {0: [b"\0" * SEAL_BYTES]}) is None
    assert first_unsealed([page], {1: [b"\0" * SEAL_BYTES]}) is page


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
def test_engine_and_transfer_agree_on_whose_head_is_whose(tp_size: int) -> None:
    for rank in range(tp_size):
        ours = rank_heads(8, rank=rank, tp_size=tp_size)
        assert ours == rank_kv_heads(8, rank=rank, size=tp_size)


def test_ranks_that_do_not_divide_the_heads_are_refused() -> None:
    place = RankPlace(layout=rank_layout(4, 1), kv_heads=HEADS)
    with pytest.raises(ValueError, match="4 KV heads cannot lie on 3 ranks"):
        place.writer_pages(KvGeometry(page_size=4, tp_size=3), slot_bytes=64)
