"""Property tests over the whole handover: whatever bit is wrong, wherever, nobody publishes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.events import PagesLanded
from kvtransfer.layout import PageLayout
from kvtransfer.states import TransferFailure
from tests.kvtransfer.pair import LAYOUT, Pair

TOKENS = st.integers(1, 30)


def valid_bit(draw: st.DrawFn, tokens: int) -> tuple[int, int, int]:
    """(position, byte, bit) of a bit that a valid token of the request has in its pages."""
    position = draw(st.integers(0, LAYOUT.pages_of(tokens) - 1))
    row = draw(st.integers(0, LAYOUT.rows - 1))
    within = LAYOUT.valid_tokens(position, tokens) * LAYOUT.token_bytes
    byte = row * LAYOUT.row_bytes + draw(st.integers(0, within - 1))
    return position, byte, draw(st.integers(0, 7))


@st.composite
def flips(draw: st.DrawFn) -> tuple[int, int, int, int]:
    tokens = draw(TOKENS)
    return (tokens, *valid_bit(draw, tokens))


def failed_as_mismatch(pair: Pair) -> None:
    assert not pair.completed("r")
    assert not pair.released("r")
    assert pair.failures("prefill")[-1].failure is TransferFailure.MISMATCH
    assert pair.prefill.held_pages() == {}
    assert pair.window.counts().free == pair.window.slots


@given(flips())
def test_a_bit_that_flips_in_a_slot_is_caught(flip: tuple[int, int, int, int]) -> None:
    tokens, position, byte, bit = flip
    pair = Pair(slots=8, seed=tokens)
    pair.step()
    landed = pair._verify

    def spoil(event: PagesLanded) -> None:
        for page in event.pages:
            if page.position == position:
                event.window[page.slot, byte] ^= 1 << bit
        landed(event)

    pair._verify = spoil  # type: ignore[method-assign]
    pair.hand_over("r", tokens, list(range(LAYOUT.pages_of(tokens))))
    pair.run(60)
    failed_as_mismatch(pair)


@given(flips(), st.integers(0, 3))
def test_a_source_page_that_is_reused_between_seal_and_send_is_caught(
    flip: tuple[int, int, int, int], rounds: int
) -> None:
    """Another request's KV takes the page, in part or as a whole, at whatever moment before its
    acknowledgement: a page that left before is caught by decode, or was copied already."""
    tokens, position, byte, bit = flip
    pair = Pair(slots=2, seed=tokens)
    pair.step()
    pages = list(range(LAYOUT.pages_of(tokens)))
    original = pair.source.clone()
    ticket = pair.grant("r", tokens)
    pair.prefill.open(ticket)
    pair.prefill.push("r", pair.sealed(pages, tokens))
    pair.prefill.complete("r", 7)
    pair.run(rounds)
    pair.source[position, byte] ^= 1 << bit
    pair.run(120)
    if pair.completed("r"):
        reused, pair.source[:] = pair.source.clone(), original
        assert pair.identical("r", tokens, pages), "what was published is what was sealed"
        pair.source[:] = reused
    else:
        failed_as_mismatch(pair)
    if rounds == 0:
        assert not pair.completed("r")


@given(
    layers=st.integers(1, 4),
    page_size=st.sampled_from([1, 2, 4, 16]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 64]),
    data=st.data(),
)
def test_any_bit_of_any_page_size_changes_the_seal(
    layers: int, page_size: int, heads: int, head_dim: int, data: st.DataObject
) -> None:
    layout = PageLayout(
        layers=layers, page_size=page_size, kv_heads=heads, head_dim=head_dim, itemsize=2
    )
    valid = data.draw(st.integers(1, page_size))
    pool = torch.randint(0, 256, (1, layout.page_bytes), dtype=torch.uint8)
    before = seals_of(digest_pages(pool, [0], [valid], layout))
    row = data.draw(st.integers(0, layout.rows - 1))
    byte = data.draw(st.integers(0, valid * layout.token_bytes - 1))
    pool[0, row * layout.row_bytes + byte] ^= 1 << data.draw(st.integers(0, 7))
    assert seals_of(digest_pages(pool, [0], [valid], layout)) != before


def test_a_mismatch_is_counted_and_logged_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(slots=8)
    pair.step()
    sealed = pair.sealed([3], 4)
    pair.source[3, 0] ^= 1
    pair.prefill.open(pair.grant("r", 4))
    pair.prefill.push("r", sealed)
    pair.run(20)
    for agent in (pair.prefill, pair.decode):
        assert agent.stats().failures == {"mismatch": 1}
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 2
    assert all("request r" in line and "position 0 changed" in line for line in told)
