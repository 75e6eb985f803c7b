"""The compiled digest equals numpy's and torch's to the bit, and copies what it digests."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import digest as module
from kvtransfer.cpu_digest import CpuWeights, cpu_digest
from kvtransfer.digest import copy_and_digest, digest_pages, digest_parts, seal_from_int, seals_of
from kvtransfer.layout import PageLayout

PAGES = 3

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): numpy is all there is"
)


@st.composite
def layouts(draw: st.DrawFn) -> PageLayout:
    """Rows of a word to several blocks of the C source's, of every element size."""
    itemsize = draw(st.sampled_from([1, 2, 4]))
    return PageLayout(
        layers=draw(st.integers(1, 3)),
        page_size=draw(st.sampled_from([1, 5, 16, 64])),
        kv_heads=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([4, 12, 20, 64])),
        itemsize=itemsize,
    )


def memory(data: st.DataObject, layout: PageLayout) -> torch.Tensor:
    """Pages of random bytes, at any address."""
    size, shift = PAGES * layout.page_bytes, data.draw(st.integers(0, 65))
    seed = data.draw(st.integers(0, 2**32 - 1))
    noise = np.random.default_rng(seed).integers(0, 256, size + shift, dtype=np.uint8)
    if data.draw(st.booleans()):
        noise |= 0x80  # words that are negative
    return torch.from_numpy(noise)[shift:].view(PAGES, layout.page_bytes)


@pytest.fixture
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(module, "cpu_digest", lambda: None)
        yield


@given(layouts(), st.data())
def test_it_equals_numpy_and_torch(layout: PageLayout, data: st.DataObject) -> None:
    assert cpu_digest() is not None, "cc is there, so that it can be built"
    pool = memory(data, layout)
    pages = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=5))
    valid = [data.draw(st.integers(1, layout.page_size)) for _ in pages]
    found = digest_pages(pool, pages, valid, layout)
    assert torch.equal(found, module._numpy(pool, pages, valid, layout))
    for page, count, seal in zip(pages, valid, seals_of(found), strict=True):
        parts = digest_parts(pool[page].clone(), count, layout)
        assert seal_from_int(int(parts.sum())) == seal


@given(layouts(), st.data())
def test_a_copy_brings_valid_tokens_and_the_digest_of_what_it_brought(
    layout: PageLayout, data: st.DataObject
) -> None:
    window, pool = memory(data, layout), memory(data, layout)
    wanted = pool.clone()
    slots = data.draw(st.permutations(range(PAGES)))
    valid = [data.draw(st.integers(1, layout.page_size)) for _ in slots]
    found = copy_and_digest(window, slots, pool, range(PAGES), valid, layout)
    module._copy(window, slots, wanted, range(PAGES), valid, layout)
    assert torch.equal(pool, wanted)
    assert torch.equal(found, digest_pages(window, slots, valid, layout))


@pytest.mark.usefixtures("numpy_alone")
def test_without_it_the_seals_are_the_same() -> None:
    layout = PageLayout(layers=2, page_size=4, kv_heads=2, head_dim=4, itemsize=2)
    page = (torch.arange(layout.page_bytes) % 251).to(torch.uint8).view(1, -1)
    into = torch.zeros_like(page)
    digests = copy_and_digest(page, [0], into, [0], [3], layout)
    assert int(digests) % 2**64 == 17916775818560072704
    assert torch.equal(into.view(4, -1)[:, :48], page.view(4, -1)[:, :48])
    assert not into.view(4, -1)[:, 48:].any()


def test_halves_of_a_weight_add_up() -> None:
    words = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000, dtype=np.int64)
    halves = CpuWeights(words[:1], words)
    together = halves.low.astype(np.int64) + (halves.high.astype(np.int64) << 32)
    assert np.array_equal(together, words)
