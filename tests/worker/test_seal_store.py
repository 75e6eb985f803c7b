"""A page leaves only under the seal of what it holds now: of this generation, chain and length."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.memory.page_allocator import PageAllocator
from kvtransfer.layout import PageLayout
from kvtransfer.pool_sealer import PoolSealer
from prefill_service.seals import SealStore, StaleSourceError

LAYOUT = PageLayout(layers=2, page_size=4, kv_heads=1, head_dim=4, itemsize=4)
CHAIN = b"chain"


class Sealed:
    """A store, and one page of its pool that is sealed."""

    def __init__(self, valid: int = LAYOUT.page_size) -> None:
        self.allocator = PageAllocator(1, LAYOUT.page_size)
        self.pool = torch.arange(LAYOUT.page_bytes).to(torch.uint8).view(1, -1)
        parts: Any = SimpleNamespace(
            memory=SimpleNamespace(allocator=self.allocator),
            sealer=PoolSealer(self.pool, LAYOUT),
            layout=LAYOUT,
        )
        self.store = SealStore(parts)
        pages = self.allocator.alloc(1)
        assert pages is not None
        (self.page,) = pages
        self.store.finish(self.store.begin([self.page], [CHAIN], [valid]))

    def leaves(self, *, chain_hash: bytes = CHAIN, valid: int = LAYOUT.page_size) -> bool:
        try:
            self.store.source_page(self.page, position=0, chain_hash=chain_hash, valid=valid)
        except StaleSourceError:
            return False
        return True


def test_a_page_leaves_under_its_seal() -> None:
    sealed = Sealed()
    found = sealed.store.source_page(sealed.page, position=3, chain_hash=CHAIN, valid=4)
    (seal,) = PoolSealer(sealed.pool, LAYOUT).seals([sealed.page], [4])
    assert (found.position, found.seal, found.chain_hash) == (3, seal, CHAIN)


def test_a_page_that_was_freed_and_given_away_again_does_not_leave_whatever_it_holds() -> None:
    sealed = Sealed()
    sealed.allocator.free([sealed.page])
    assert sealed.allocator.alloc(1) == [sealed.page]
    assert not sealed.leaves()


def test_a_page_of_other_tokens_does_not_leave() -> None:
    assert not Sealed().leaves(chain_hash=b"another")


@pytest.mark.parametrize(("sealed", "wanted"), [(2, 4), (4, 2)])
def test_a_page_that_was_sealed_with_another_number_of_tokens_does_not_leave(
    sealed: int, wanted: int
) -> None:
    assert not Sealed(valid=sealed).leaves(valid=wanted)


def test_a_seal_that_was_begun_before_its_page_was_given_away_does_not_count() -> None:
    """A step overlaps with the end of its request: the page is another's when the seal is known."""
    sealed = Sealed()
    begun = sealed.store.begin([sealed.page], [CHAIN], [4])
    sealed.allocator.free([sealed.page])
    assert sealed.allocator.alloc(1) == [sealed.page]
    sealed.store.finish(begun)
    assert not sealed.leaves()
