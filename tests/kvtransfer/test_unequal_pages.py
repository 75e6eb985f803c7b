"""Pages of one size land in pages of another: every byte, every seal, nothing beside."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.geometry import KvGeometry, RankPlace, WriterPages
from kvtransfer.landing import LandingTarget, land_pages
from kvtransfer.layout import PageLayout
from kvtransfer.ticket import LandedPage

MINE = PageLayout(layers=2, page_size=4, kv_heads=2, head_dim=2, itemsize=2)
PAGE_SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
UNTOUCHED = 0x5A


@dataclasses.dataclass
class Landing:
    """A sequence of random KV in the window, cut by its writer, and where it shall go."""

    kv: torch.Tensor
    """[rows, tokens, token_bytes]."""
    window: torch.Tensor
    landed: list[LandedPage]
    writer: WriterPages
    target: LandingTarget

    def land(self) -> list[bytes]:
        return land_pages(self.window, self.landed, self.writer, self.target)[0]

    def seals(self) -> list[bytes]:
        return [page.seal for page in self.landed]


def landing(theirs: int, mine: int, tokens: int, kept: int, seed: int = 0) -> Landing:
    """`kept` tokens are here already, in whole pages."""
    generator = torch.Generator().manual_seed(seed)
    own = dataclasses.replace(MINE, page_size=mine)
    place = RankPlace(layout=own, kv_heads=own.kv_heads)
    writer = place.writer_pages(KvGeometry(page_size=theirs), slot_bytes=own.page_bytes)
    kv = torch.randint(
        0, 256, (own.rows, tokens, own.token_bytes), dtype=torch.uint8, generator=generator
    )
    first, total = writer.first_position(kept), writer.pages_of(tokens)
    slots = (total - first + 1) * writer.slots
    window = torch.randint(0, 256, (slots, own.page_bytes), dtype=torch.uint8, generator=generator)
    landed = []
    for position in range(first, total):
        # Backwards, so that slots and positions are not the same.
        slot = (total - position) * writer.slots
        valid = writer.valid_tokens(position, tokens)
        start = slot * own.page_bytes
        page = window.view(-1)[start : start + writer.page_bytes]
        begin = position * theirs
        page.view(own.rows, theirs, own.token_bytes)[:, :valid] = kv[:, begin : begin + valid]
        (seal,) = seals_of(digest_pages(page[None], [0], [valid], writer.layout))
        landed.append(
            LandedPage(slot=slot, position=position, valid_tokens=valid, seal=seal, chain_hash=b"")
        )
    pages = own.pages_of(tokens)
    pool = torch.full((2 * pages + 1, own.page_bytes), UNTOUCHED, dtype=torch.uint8)
    order = torch.randperm(len(pool), generator=generator)[:pages].tolist()
    target = LandingTarget(pool=pool, layout=own, pages=order, heads=place.heads, kept_tokens=kept)
    return Landing(kv, window, landed, writer, target)


@st.composite
def landings(draw: st.DrawFn) -> Landing:
    theirs, mine = draw(PAGE_SIZES), draw(PAGE_SIZES)
    tokens = draw(st.integers(1, 40))
    kept = draw(st.integers(0, tokens // mine)) * mine
    return landing(theirs, mine, tokens, kept, seed=draw(st.integers(0, 99)))


@given(landings())
def test_every_token_lands_in_its_place_and_nothing_else_is_written(case: Landing) -> None:
    assert case.land() == case.seals()
    own, tokens = case.target.layout, case.kv.shape[1]
    wanted = torch.full_like(case.target.pool, UNTOUCHED)
    for token in range(case.target.kept_tokens, tokens):
        page = wanted[case.target.pages[token // own.page_size]]
        rows = page.view(own.rows, own.page_size, own.token_bytes)
        rows[:, token % own.page_size] = case.kv[:, token]
    assert torch.equal(case.target.pool, wanted)


@given(landings(), st.data())
def test_a_flipped_bit_of_a_valid_token_breaks_the_seal_and_no_other_does(
    case: Landing, data: st.DataObject
) -> None:
    if not case.landed:
        return
    struck = data.draw(st.sampled_from(range(len(case.landed))))
    page = case.landed[struck]
    offset = data.draw(st.integers(0, case.writer.page_bytes - 1))
    memory = case.window.view(-1)
    memory[page.slot * case.window.shape[1] + offset] ^= 1 << data.draw(st.integers(0, 7))
    layout = case.writer.layout
    matters = offset % layout.row_bytes < page.valid_tokens * layout.token_bytes
    for index, (seal, expected) in enumerate(zip(case.land(), case.seals(), strict=True)):
        assert (seal != expected) == (matters and index == struck)


@pytest.mark.parametrize(("theirs", "mine", "slots"), [(64, 16, 4), (16, 64, 1), (48, 32, 2)])
def test_a_page_takes_as_many_slots_as_it_needs(theirs: int, mine: int, slots: int) -> None:
    own = dataclasses.replace(MINE, page_size=mine)
    place = RankPlace(layout=own, kv_heads=own.kv_heads)
    pages = place.writer_pages(KvGeometry(page_size=theirs), slot_bytes=own.page_bytes)
    assert pages.slots == slots


def test_a_page_that_reaches_beyond_the_window_is_refused() -> None:
    case = landing(16, 4, 16, 0)
    last = case.landed[0]._replace(slot=len(case.window) - 1)
    with pytest.raises(ValueError, match="does not fit"):
        land_pages(case.window, [last], case.writer, case.target)


def test_a_position_beyond_the_request_is_refused() -> None:
    case = landing(2, 4, 8, 0)
    stray = case.landed[0]._replace(position=4)
    with pytest.raises(ValueError, match="tokens up to 10 in 2 pages"):
        land_pages(case.window, [stray], case.writer, case.target)


@pytest.mark.gpu
@pytest.mark.parametrize(("theirs", "mine"), [(64, 16), (16, 64), (48, 32), (16, 16)])
def test_the_kernel_does_what_the_processor_does(theirs: int, mine: int) -> None:
    case = landing(theirs, mine, 200, mine)
    pool = case.target.pool.cuda()
    on_gpu = dataclasses.replace(case.target, pool=pool)
    torch.cuda.synchronize()
    window = case.window.cuda()
    torch.cuda.synchronize()
    assert land_pages(window, case.landed, case.writer, on_gpu)[0] == case.land()
    assert torch.equal(pool.cpu(), case.target.pool)
    pool.fill_(UNTOUCHED)
    torch.cuda.synchronize()
    assert land_pages(case.window, case.landed, case.writer, on_gpu)[0] == case.seals()
    assert torch.equal(pool.cpu(), case.target.pool)
